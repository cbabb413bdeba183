"""A tiny byte-level tokenizer and corpora of documents that can be told apart."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import zstandard
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from codeparrot_ds.data.encoder import Encoder, load_encoder

EOS = "<|endoftext|>"


def make_documents(count: int, seed: int = 0) -> list[str]:
    """Unique documents of 1 to 12 lines."""
    rng = random.Random(seed)
    words = ["def", "return", "value", "naïve", "for", "in", "self", "items", "x = 1"]
    return [
        f"# document {number}\n"
        + "".join(" ".join(rng.choices(words, k=rng.randint(1, 8))) + "\n" for _ in range(rng.randint(0, 11)))
        for number in range(count)
    ]


def compressed(data: bytes, suffix: str) -> bytes:
    if suffix.endswith(".gz"):
        return gzip.compress(data)
    return zstandard.compress(data) if suffix.endswith(".zst") else data


def write_shard(path: Path, texts: Sequence[str], columns: Mapping[str, str] | None = None) -> None:
    """Writes rows of ``content``, or one of ``columns``, in the format that the suffix of ``path`` names."""
    rows = [dict(columns)] if columns else [{"path": "a.py", "content": text} for text in texts]
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        table = pyarrow.Table.from_pylist(rows)
        pyarrow.parquet.write_table(table, path, row_group_size=7)
        return
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(compressed(data, path.name[path.name.index(".") :]))


@pytest.fixture
def make_corpus(tmp_path: Path) -> Callable[..., Path]:
    """Writes documents round-robin to shards of a split and returns the corpus folder."""

    def write(texts: Sequence[str], *, num_shards: int = 2, suffix: str = ".jsonl", split: str = "train") -> Path:
        for number in range(num_shards):
            write_shard(tmp_path / "corpus" / split / f"part-{number:05d}{suffix}", texts[number::num_shards])
        return tmp_path / "corpus"

    return write


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(make_documents(200, seed=99), trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS})
    )
    return folder


@pytest.fixture(scope="session")
def encoder(tokenizer_dir: Path) -> Encoder:
    return load_encoder(tokenizer_dir)
