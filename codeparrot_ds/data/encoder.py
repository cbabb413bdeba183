"""Text to token ids with a Hugging Face tokenizer folder, without importing transformers.

gigatoken encodes a hundred times as fast as the tokenizers library. It is young, so it is used only where it gives the
library's own ids on the corpus's own text (``prove_fast_encoding``).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from tokenizers import Tokenizer

from codeparrot_ds.data.hub_files import hub_tokenizer
from codeparrot_ds.errors import UserError, first_line
from codeparrot_ds.json_files import DamagedFileError, read_object
from codeparrot_ds.model.foreign import refuse_own_code
from codeparrot_ds.paths import did_you_mean_path, exists, may_be_on_hub

logger = logging.getLogger(__name__)

DEFAULT_EOS_TOKEN = "<|endoftext|>"
TOKENIZER_SETTINGS = ("special_tokens_map.json", "tokenizer_config.json")
"""The second counts where both say something."""
MAX_VOCAB_SIZE = 1 << 24
"""Many times that of any model's: an id of two billions in a file of kilobytes would take all memory."""
PROOF_CHARACTERS = 1 << 18
"""Text of the corpus on which both encoders are compared; the library takes about a tenth of a second for it."""
# What code is made of, and what tokenizers have been seen to disagree on.
_HARD_TEXTS = (
    "",
    " ",
    "\n",
    "\t\t\n    \n\r\n  x",
    "def f(self, x_1=0x1F, *a, **k):\n\treturn 'it's' + \"y'all've\"  # 3.14e-10\n\n\n",
    "a  b   c    d     e\u00a0f\u2003g\u200bh\ufeff",
    "naïve café Straße ÀÉÎõü ЖЯ λόγος 漢字かな 한국어 عربى हिन्दी ไทย",
    "e\u0301 A\u030a \u2028\u2029 \x85 \x1c \x7f \u00ad",
    "😀👩\u200d👩\u200d👧🇩🇪 \U0001d54f \U0010ffff \ue000",
    "1 12 123 1234 ١٢٣ ½ ² Ⅷ",
    "=" * 200 + "#" * 100 + " " * 300 + "\n" * 50,
    "<|endoftext|> <|endoftext|>x <|endofte <s></s><pad>",
)


def _byte_letters() -> dict[str, int]:
    """The letters with which byte-level vocabularies write each byte (Radford et al. 2019)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + number): byte for number, byte in enumerate(others)}


_BYTE_OF_LETTER = _byte_letters()
_IN_NO_TEXT = "\U0010ffff"  # Unicode gives it to no character, for ever


class Encoder:
    """The tokenizer as the stream uses it: batches of texts in, arrays of ids out.

    No special token is added, and none is found: ``<|endoftext|>`` in a text is text, and a border only where a
    document ends. (Of a tokenizer that has no other tokens for it, such as one of whole words, it is what is unknown.)
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        path: Path,
        eos_token_id: int,
        fingerprint: str,
        finds_special_tokens: bool = False,
    ) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer, self._finds_special_tokens = tokenizer, finds_special_tokens
        self._fast_encode: Callable[[str], np.ndarray] | None = None
        self.path = path
        """Of tokenizer.json."""
        self.eos_token_id = eos_token_id
        self.fingerprint = fingerprint
        """SHA-256 of tokenizer.json."""
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.int32)

    def in_version_1(self) -> Encoder:
        """The encoder of a run that began with ``order_version`` 1: it finds special tokens in texts."""
        return Encoder(
            self._tokenizer,
            path=self.path,
            eos_token_id=self.eos_token_id,
            fingerprint=self.fingerprint,
            finds_special_tokens=True,
        )

    @functools.cached_property
    def _special_tokens(self) -> list[str]:
        added = orjson.loads(self._tokenizer.to_str())["added_tokens"]
        return [token["content"] for token in added if token["special"] or token["id"] == self.eos_token_id]

    @functools.cached_property
    def _of_texts(self) -> Tokenizer:
        """The tokenizer that encodes."""
        if self._finds_special_tokens or not self._special_tokens:
            return self._tokenizer
        with damage_of(self.path):
            return _without(self._tokenizer, self._special_tokens)

    def _encode(self, texts: list[str]) -> list[Any]:
        # encode_batch_fast leaves out the character offsets, which nobody here reads; older versions lack it.
        encode = getattr(self._of_texts, "encode_batch_fast", self._of_texts.encode_batch)
        return list(encode(texts, add_special_tokens=False))

    @property
    def name(self) -> str:
        """The library that encodes."""
        return "tokenizers" if self._fast_encode is None else "gigatoken"

    @property
    def batch_characters(self) -> int:
        """How much text is worth encoding ahead of the row that is needed: what takes some milliseconds."""
        return 1 << 14 if self._fast_encode is None else 1 << 20

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, unsigned or of ``dtype``; all fit into ``dtype``."""
        if self._fast_encode is not None:
            return [self._fast_encode(text) for text in texts]
        return [np.array(encoding.ids, dtype=self.dtype) for encoding in self._encode(list(texts))]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids, special tokens included."""
        return str(self._tokenizer.decode([int(token_id) for token_id in ids], skip_special_tokens=False))

    def prove_fast_encoding(self, texts: Iterable[str]) -> str | None:
        """Encodes with gigatoken from now on, if it gives the tokenizers library's ids on texts that are hard and on
        the first ``PROOF_CHARACTERS`` of ``texts``; otherwise returns why not.
        """
        try:
            import gigatoken

            fast_encode = gigatoken.Tokenizer.from_json(self._of_texts.to_str()).encode
        except Exception as error:  # whatever it cannot load or parse, the tokenizers library can
            return f"gigatoken cannot be used with this tokenizer ({' '.join(str(error).split())[:200]})"
        num_characters = 0
        special = [f"x{token}{token} {token}\n" for token in self._special_tokens]
        for text in chain(_HARD_TEXTS, special, texts):
            text = text[:PROOF_CHARACTERS]
            [expected] = self._encode([text])
            if fast_encode(text).tolist() != expected.ids:
                return f"gigatoken encodes {text[:40]!r}… differently from the tokenizers library"
            num_characters += len(text)
            if num_characters >= PROOF_CHARACTERS:
                break
        self._fast_encode = fast_encode
        return None

    def forget_fast_encoding(self) -> None:
        """Encodes with the tokenizers library again: for a rank whose proof held where another's did not."""
        self._fast_encode = None

    def token_bytes(self) -> np.ndarray | None:
        """UTF-8 bytes that each token id stands for, shape (vocab_size,), int64, special tokens 0.

        None when the tokenizer is not byte-level, where a token has no fixed number of bytes.
        """
        contents = self.bytes_of_tokens()
        return None if contents is None else np.array([len(content) for content in contents], dtype=np.int64)

    def bytes_of_tokens(self) -> list[bytes] | None:
        """What each token id stands for, special tokens nothing; None when the tokenizer is not byte-level."""
        description = orjson.loads(self._tokenizer.to_str())
        if (description.get("decoder") or {}).get("type") != "ByteLevel":
            return None
        contents = [b""] * self.vocab_size
        for token, token_id in self._tokenizer.get_vocab(with_added_tokens=False).items():
            contents[token_id] = bytes(_BYTE_OF_LETTER.get(letter, ord("?")) for letter in token)
        for added in description["added_tokens"]:
            contents[added["id"]] = b"" if added["special"] else added["content"].encode()
        return contents


def _without(tokenizer: Tokenizer, special_tokens: Sequence[str]) -> Tokenizer:
    """A tokenizer that takes its special tokens in a text for text; all others keep their ids.

    They leave the added tokens, which are looked for before all else. One that the model does not know stays there
    under a name that no text has, since the library numbers such tokens in their order. Vocabularies of words or pieces
    find theirs in a text all the same: then those get such names, too.
    """
    description = orjson.loads(tokenizer.to_str())
    model, known = description["model"], tokenizer.get_vocab(with_added_tokens=False)
    added, ids = [], set()
    for token in description["added_tokens"]:
        if token["content"] in special_tokens:
            ids.add(token["id"])
            if token["content"] in known:
                continue
            token["content"] = f"{_IN_NO_TEXT}{token['content']}"
        added.append(token)
    description["added_tokens"] = added
    plain = Tokenizer.from_str(orjson.dumps(description).decode())
    probes = [text for token in special_tokens for text in (token, f"a {token} a", f"a{token}a")]
    if all(ids.isdisjoint(encoding.ids) for encoding in plain.encode_batch(probes, add_special_tokens=False)):
        return plain
    vocabulary = model["vocab"]
    for token in (token for token in special_tokens if token in known and token != model.get("unk_token")):
        if isinstance(vocabulary, list):  # of pieces with their scores, by id
            vocabulary[known[token]][0] = f"{_IN_NO_TEXT}{token}"
        else:
            vocabulary[f"{_IN_NO_TEXT}{token}"] = vocabulary.pop(token)
    return Tokenizer.from_str(orjson.dumps(description).decode())


def find_tokenizer(name: str | Path) -> Path:
    """The folder of a tokenizer: the one of that name here, or the Hub's in the cache of its client.

    Raises:
        UserError: there is neither, or no tokenizer.json in it.
    """
    folder = Path(name)
    if not exists(folder):
        if may_be_on_hub(str(name), bare=True, is_meant=_holds_tokenizer):
            try:
                return hub_tokenizer(str(name))
            except UserError as error:
                raise UserError(f"{error}{did_you_mean_path(name)}") from error
        hint = did_you_mean_path(name, "make one with `codeparrot-ds tokenizer --data DIR --out DIR`")
        raise UserError(f"the tokenizer folder {name} does not exist{hint}")
    if not folder.is_dir():
        raise UserError(f"the tokenizer {folder} is a file: name the folder that holds tokenizer.json")
    if not _holds_tokenizer(folder):
        raise UserError(f"{folder} has no tokenizer.json: save the tokenizer with `save_pretrained` or make a new one")
    return folder


def _holds_tokenizer(folder: str | Path) -> bool:
    return (Path(folder) / "tokenizer.json").is_file()


def load_encoder(tokenizer: str | Path) -> Encoder:
    """Reads ``tokenizer.json`` and the end-of-sequence token of a Hugging Face tokenizer, here or on the Hub."""
    folder = find_tokenizer(tokenizer)
    refuse_own_code(folder, ("tokenizer_config.json",))
    path = folder / "tokenizer.json"
    data = path.read_bytes()
    loaded = tokenizer_of(path, data)
    eos_token = _eos_token(folder)
    eos_token_id = loaded.token_to_id(eos_token)
    if eos_token_id is None:
        raise UserError(
            f"The tokenizer in {folder} has no end-of-sequence token {eos_token!r}; "
            "name one of its tokens as eos_token in tokenizer_config.json."
        )
    # Of two tokens of one id the library's own list of ids keeps either, by chance.
    vocabulary = loaded.get_vocab()
    if others := sorted(token for token, known in vocabulary.items() if known == eos_token_id and token != eos_token):
        raise UserError(
            f"{path} has one id for {eos_token!r}, its end-of-sequence token, and {others[0]!r}; save it again."
        )
    encoder = Encoder(loaded, path=path, eos_token_id=eos_token_id, fingerprint=hashlib.sha256(data).hexdigest())
    if encoder.vocab_size > MAX_VOCAB_SIZE:  # the library makes a list of all ids up to the highest
        raise UserError(
            f"{path} has the token id {encoder.vocab_size - 1:,}; the highest can be {MAX_VOCAB_SIZE - 1:,}."
        )
    return encoder


def tokenizer_of(path: Path, data: bytes) -> Tokenizer:
    """The tokenizer that the bytes of a ``tokenizer.json`` describe.

    Raises:
        UserError: the library cannot read it.
    """
    refuse_cut_letters(path, data)
    with damage_of(path):
        return Tokenizer.from_str(data.decode())


def refuse_cut_letters(path: Path, data: bytes) -> None:
    """Refuses merges from whose second part the prefix of continuing tokens would be cut inside a letter.

    The library cuts as many bytes as the prefix has, whatever they are, and ends the whole process (tokenizers 0.23.3)
    when the message about what is left is no UTF-8.

    Raises:
        UserError: there is such a merge.
    """
    try:
        model = orjson.loads(data)["model"]
        prefix, merges = model["continuing_subword_prefix"] or "", model["merges"]
        seconds = [merge.split(" ")[-1] if isinstance(merge, str) else merge[-1] for merge in merges if prefix]
        letters = {second: second.encode() for second in seconds}
        size = len(prefix.encode())
    except (orjson.JSONDecodeError, LookupError, TypeError, AttributeError):
        return  # of another kind or form: the library says what is wrong with it
    for second, content in letters.items():
        if content[size : size + 1] and content[size] & 0xC0 == 0x80:  # UTF-8's bytes within a letter
            raise UserError(
                f"{path} is not a tokenizer that the tokenizers library can read: its merge with {second!r} lacks the "
                f"continuing_subword_prefix {prefix!r}."
            )


@contextlib.contextmanager
def damage_of(path: Path) -> Iterator[None]:
    """Within, what the library makes of a file that is no tokenizer is a sentence: a bare Exception, or a panic of its
    Rust, which Python takes for the end of the process."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = first_line(error).removesuffix(".")
        raise UserError(f"{path} is not a tokenizer that the tokenizers library can read: {reason}.") from error


def tokenizer_settings(folder: Path) -> dict[str, Any]:
    """What a tokenizer's folder says beside ``tokenizer.json``, without what is null.

    Raises:
        UserError: one of `TOKENIZER_SETTINGS` is no JSON object.
    """
    settings: dict[str, Any] = {}
    for path in (folder / name for name in TOKENIZER_SETTINGS):
        if not path.is_file():
            continue
        try:
            settings |= {key: value for key, value in read_object(path).items() if value is not None}
        except DamagedFileError:
            raise UserError(f"{path} is not a JSON object; save the tokenizer again.") from None
    return settings


def _eos_token(folder: Path) -> str:
    """The end-of-sequence token that the folder's config names, or the usual one."""
    token = tokenizer_settings(folder).get("eos_token") or DEFAULT_EOS_TOKEN
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str):
        raise UserError(f"{folder}: eos_token in tokenizer_config.json is no text; save the tokenizer again.")
    return text


def estimate_chars_per_token(dataset: Iterable[dict[str, Any]], tokenizer: Any, num_documents: int = 500) -> float:
    """Characters per token over the first ``num_documents`` of ``dataset``, as the recipe estimates it.

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
