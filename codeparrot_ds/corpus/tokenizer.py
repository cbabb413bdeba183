"""Trains the byte-level BPE tokenizer on a corpus and saves it in Hugging Face format.

Only the ``tokenizers`` library is used: ``transformers`` takes seconds to import and adds one small file, which is
written here.
"""

import json
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from codeparrot_ds.data.datasets import split_shards
from codeparrot_ds.data.encoder import Encoder, load_encoder
from codeparrot_ds.data.shards import BadDocuments, read_texts
from codeparrot_ds.errors import UserError
from codeparrot_ds.staging import staged_folder
from codeparrot_ds.terminal import Progress

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_NAME = "tokenizer.json"
NUM_ESTIMATE_DOCUMENTS = 500
MIN_PAIR_FREQUENCY = 2
MIN_VOCAB_SIZE = 257

# transformers' own value for "no limit". The tokenizer cannot know the model's sequence length, and with 1024 here it
# would warn about every document that the packed dataset tokenizes whole.
_NO_MAX_LENGTH = int(1e30)


def train_tokenizer(
    data: Path | str,
    out: Path,
    *,
    vocab_size: int = 32768,
    seed: int = 1,
    max_documents: int | None = None,
    max_bytes: int | None = None,
    columns: str = "",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict:
    """Train on the corpus's train split, as GPT-2's tokenizer: bytes as alphabet, one special token ``<|endoftext|>``.

    The result is the same for the same corpus and arguments, on any number of cores.

    Args:
        data: A corpus (its ``train`` split is read; validation stays unseen), as in a run config.
        out: The tokenizer folder, loadable by ``AutoTokenizer.from_pretrained`` as a fast tokenizer.
        vocab_size: Tokens in all, with the 256 bytes and the special token.
        seed: Order in which shards are taken, which matters only under a limit.
        max_documents: Train on at most so many documents.
        max_bytes: Train on about so many bytes of text.
        columns: Of the rows, as in a run config.

    Returns:
        ``vocab_size``, ``chars_per_token`` (over 500 documents of the train split), ``documents``, ``bytes``, and the
        ``sha256`` of ``tokenizer.json``.

    Raises:
        UserError: no corpus at ``data``, a vocabulary that it cannot fill, or another tokenizer at ``out``.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise UserError(f"vocab_size is {vocab_size}; {MIN_VOCAB_SIZE} is the least (256 bytes and {END_OF_TEXT})")
    shards = split_shards(str(data), "train", named=True, columns=columns)
    random.Random(seed).shuffle(shards)
    account = {"documents": 0, "bytes": 0}
    tokenizer = _empty_tokenizer()
    with staged_folder(Path(out), marker=TOKENIZER_NAME, overwrite=overwrite) as folder:
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            # A pair seen once is no pattern. Without this bound the last tokens of a small corpus are whole words that
            # occur a single time, and every vocabulary size seems to be supported.
            min_frequency=MIN_PAIR_FREQUENCY,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        bad = BadDocuments()
        texts = _limited(
            read_texts(shards, bad),
            account,
            max_documents,
            max_bytes,
            progress or (lambda phase, done, total: None),
        )
        tokenizer.train_from_iterator(texts, trainer)
        if not account["documents"] and len(bad):
            raise UserError(f"no document can be read from {data}: {next(iter(bad))}")
        supported = tokenizer.get_vocab_size()
        if supported < vocab_size:
            raise UserError(
                f"vocab_size is {vocab_size}, but the {account['bytes']:,} bytes of {data} support only {supported} "
                f"tokens; choose at most {supported} or a larger corpus"
            )
        tokenizer.save(str(folder / TOKENIZER_NAME))
        (folder / "tokenizer_config.json").write_text(json.dumps(_transformers_config(), indent=2) + "\n")
        encoder = load_encoder(folder)
        ratio = _chars_per_token(encoder, islice(read_texts(shards, BadDocuments()), NUM_ESTIMATE_DOCUMENTS))
    return {"vocab_size": vocab_size, "chars_per_token": ratio, **account, "sha256": encoder.fingerprint}


def _chars_per_token(encoder: Encoder, texts: Iterator[str]) -> float:
    num_characters = num_tokens = 0
    # Batches use all cores; their size bounds the memory.
    while batch := list(islice(texts, 64)):
        num_characters += sum(map(len, batch))
        num_tokens += sum(map(len, encoder.encode_batch(batch)))
    return num_characters / num_tokens


def _empty_tokenizer() -> Tokenizer:
    """GPT-2's pipeline. Its byte alphabet makes every text representable, so decoding gives the input back exactly."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def _transformers_config() -> dict:
    """What ``AutoTokenizer`` needs beside ``tokenizer.json``."""
    return {
        "tokenizer_class": "GPT2Tokenizer",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "unk_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "add_prefix_space": False,
        # The clean-up joins "x ." to "x.": a decoded program would not be the program.
        "clean_up_tokenization_spaces": False,
        "model_max_length": _NO_MAX_LENGTH,
    }


def _limited(
    texts: Iterator[str], account: dict, max_documents: int | None, max_bytes: int | None, report: Progress
) -> Iterator[str]:
    for text in texts:
        if account["documents"] == max_documents or (max_bytes is not None and account["bytes"] >= max_bytes):
            return
        account["documents"] += 1
        account["bytes"] += len(text.encode("utf-8"))
        report("reading", account["documents"], max_documents)
        yield text
