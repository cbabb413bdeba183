"""Text to token ids with a Hugging Face tokenizer folder, without importing transformers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from tokenizers import Tokenizer

from codeparrot_ds.errors import UserError

DEFAULT_EOS_TOKEN = "<|endoftext|>"


class Encoder:
    """The tokenizer as the stream uses it: batches of texts in, arrays of ids out, no special tokens added."""

    def __init__(self, tokenizer: Tokenizer, *, eos_token_id: int, fingerprint: str) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        # encode_batch_fast leaves out the character offsets, which nobody here reads; older versions lack it.
        self._encode = getattr(tokenizer, "encode_batch_fast", tokenizer.encode_batch)
        self.eos_token_id = eos_token_id
        self.fingerprint = fingerprint
        """SHA-256 of tokenizer.json."""
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, of ``dtype``."""
        encodings = self._encode(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=self.dtype) for encoding in encodings]

    def token_bytes(self) -> np.ndarray | None:
        """UTF-8 bytes that each token id stands for, shape (vocab_size,), int64, special tokens 0.

        None when the tokenizer is not byte-level, where a token has no fixed number of bytes.
        """
        description = orjson.loads(self._tokenizer.to_str())
        if (description.get("decoder") or {}).get("type") != "ByteLevel":
            return None
        sizes = np.zeros(self.vocab_size, dtype=np.int64)
        for token, token_id in self._tokenizer.get_vocab(with_added_tokens=False).items():
            sizes[token_id] = len(token)  # a byte-level vocabulary writes each byte as one character
        for added in description["added_tokens"]:
            sizes[added["id"]] = 0 if added["special"] else len(added["content"].encode())
        return sizes


def load_encoder(tokenizer_dir: str | Path) -> Encoder:
    """Reads ``tokenizer.json`` and the end-of-sequence token of a Hugging Face tokenizer folder."""
    folder = Path(tokenizer_dir)
    if not folder.is_dir():
        raise UserError(
            f"The tokenizer folder {folder} does not exist; make one with "
            "`codeparrot-ds tokenizer --data DIR --out DIR`."
        )
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{folder} has no tokenizer.json; save the tokenizer with `save_pretrained` or make a new one.")
    data = path.read_bytes()
    try:
        tokenizer = Tokenizer.from_str(data.decode())
    except Exception as error:  # the library raises a bare Exception for whatever it cannot parse
        raise UserError(f"{path} is not a tokenizer that the tokenizers library can read: {error}.") from error
    eos_token = _eos_token(folder)
    eos_token_id = tokenizer.token_to_id(eos_token)
    if eos_token_id is None:
        raise UserError(
            f"The tokenizer in {folder} has no end-of-sequence token {eos_token!r}; "
            "name one of its tokens as eos_token in tokenizer_config.json."
        )
    return Encoder(tokenizer, eos_token_id=eos_token_id, fingerprint=hashlib.sha256(data).hexdigest())


def _eos_token(folder: Path) -> str:
    """The end-of-sequence token that the folder's config names, or the usual one."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            token = orjson.loads(path.read_bytes()).get("eos_token")
        except (orjson.JSONDecodeError, AttributeError):
            raise UserError(f"{path} is not a JSON object; save the tokenizer again.") from None
        if token:
            return token["content"] if isinstance(token, dict) else token
    return DEFAULT_EOS_TOKEN


def estimate_chars_per_token(dataset: Iterable[dict[str, Any]], tokenizer: Any, num_documents: int = 500) -> float:
    """Characters a token over the first ``num_documents`` of ``dataset``, as the recipe estimates it.

    ``dataset`` yields ``{"content": str}``; ``tokenizer`` is a Hugging Face tokenizer. Raises a UserError when there
    is no text to count.
    """
    num_characters = num_tokens = 0
    for example in islice(dataset, num_documents):
        num_characters += len(example["content"])
        num_tokens += len(tokenizer(example["content"], truncation=False)["input_ids"])
    if not num_tokens:
        raise UserError("Characters per token cannot be estimated: the data set has no text.")
    return num_characters / num_tokens
