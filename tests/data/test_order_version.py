"""What ``order_version`` 2 changed, and that a run keeps the version that it began with."""

from __future__ import annotations

import codecs
import gzip
import hashlib
import json
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from codeparrot_ds.checkpoint.run_folder import order_version_of
from codeparrot_ds.config.run_config import RunConfig
from codeparrot_ds.data.datasets import StreamStart, open_datasets, resume_stream, saved_stream, stream_of
from codeparrot_ds.data.encoder import load_encoder
from codeparrot_ds.data.shards import find_shards, in_version_1
from codeparrot_ds.data.stream import StreamConfig, stream_fingerprint
from codeparrot_ds.data.validation import ValidationLoader
from codeparrot_ds.errors import UserError
from tests.data.conftest import EOS, make_documents, write_shard
from tests.data.streams import RowStream

PLAIN = make_documents(60)
SPECIAL = [f"a = 1 {EOS}", f"{EOS}{EOS}", f"b{EOS}\n    {EOS}c = 2\n", "<|endoftext", f"# {EOS} ends a document"]
MARKED = [f"\ufeffx = {number}" for number in range(3)]


def write_corpus(folder: Path) -> Path:
    """Whatever the two versions read in different ways, and plain documents between."""
    lines = [json.dumps({"content": text}).encode() + b"\n" for text in PLAIN + SPECIAL + MARKED]
    train = folder / "train"
    train.mkdir(parents=True)
    (train / "part-0.jsonl").write_bytes(codecs.BOM_UTF8 + b"".join(lines[:40]))
    (train / "part-1.jsonl.gz").write_bytes(gzip.compress(codecs.BOM_UTF8 + b"".join(lines[40:]), mtime=0))
    values = [f"binary {number}".encode() for number in range(5)]
    pyarrow.parquet.write_table(pyarrow.table({"content": pyarrow.array(values)}), train / "part-2.parquet")
    (train / "part-3.json").write_text(json.dumps([{"content": f"array {number}"} for number in range(5)]))
    write_shard(train / "part-4.parquet", [f"string {number} {EOS}" for number in range(20)])
    return folder


def stream(corpus: Path, tokenizer: Path, order_version: int | None) -> StreamConfig:
    config = RunConfig(data=str(corpus), tokenizer=str(tokenizer), seq_length=32, num_lanes=4, shuffle_buffer=20)
    return stream_of(config, open_datasets(config), load_encoder(tokenizer), order_version)


def rows(config: StreamConfig, count: int) -> np.ndarray:
    return np.stack([row.ids for row in islice(iter(RowStream(config)), count)])


def documents(config: StreamConfig, count: int) -> set[str]:
    """Those that are finished in a lane's rows."""
    ids = rows(config, count)
    found = set()
    for lane in range(config.num_lanes):
        row = ids[lane :: config.num_lanes].ravel()
        ends = np.flatnonzero(row == config.encoder.eos_token_id) + 1
        found |= {config.encoder.decode(part[:-1]) for part in np.split(row, ends)[:-1]}
    return found


def test_version_1_gives_the_rows_of_0_1_0(tmp_path: Path, tokenizer_dir: Path) -> None:
    """Pinned with the code before version 2, on everything that version 2 reads in another way."""
    config = stream(write_corpus(tmp_path), tokenizer_dir, 1)
    assert config.order_version == stream_fingerprint(config)["order_version"] == 1
    assert (
        hashlib.sha256(rows(config, 800).astype("<i4").tobytes()).hexdigest()
        == "c1f1a11bdf7b0e0b773b29ea0fd03df3c67a2cfee8b4ebabe49c97a33cec5b5a"
    )


def test_version_2_reads_every_document_whole(tmp_path: Path, tokenizer_dir: Path) -> None:
    config = stream(write_corpus(tmp_path), tokenizer_dir, None)
    assert config.order_version == stream_fingerprint(config)["order_version"] == 2
    expected = {*PLAIN, *SPECIAL, *(text.removeprefix("\ufeff") for text in MARKED)}
    expected |= {f"{kind} {number}" for kind in ("binary", "array") for number in range(5)}
    expected |= {f"string {number} {EOS}" for number in range(20)}
    assert documents(config, 1200) == expected


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_documents_without_marks_have_the_same_rows_in_both(tmp_path: Path, tokenizer_dir: Path, suffix: str) -> None:
    for number in range(3):
        write_shard(tmp_path / "train" / f"part-{number}{suffix}", PLAIN[number::3])
    one, two = (rows(stream(tmp_path, tokenizer_dir, version), 600) for version in (1, None))
    assert np.array_equal(one, two)


def test_both_encoders_give_one_versions_ids(tmp_path: Path, tokenizer_dir: Path) -> None:
    for version in (1, 2):
        config = stream(write_corpus(tmp_path / str(version)), tokenizer_dir, version)
        slow = rows(config, 400)
        assert config.encoder.prove_fast_encoding(SPECIAL) is None and config.encoder.name == "gigatoken"
        assert np.array_equal(rows(config, 400), slow)


def test_validation_follows_its_version(tmp_path: Path, tokenizer_dir: Path) -> None:
    shards, encoder = find_shards(write_corpus(tmp_path), "train"), load_encoder(tokenizer_dir)
    borders = {}
    for version in (1, 2):
        if version == 1:
            shards_, encoder_ = in_version_1(shards), encoder.in_version_1()
        else:
            shards_, encoder_ = shards, encoder
        loader = ValidationLoader(shards_, encoder_, seq_length=32, num_lanes=2, batch_size=1)
        valid = [row.ids[: row.num_valid_tokens] for row in loader.rows()]
        borders[version] = np.count_nonzero(np.concatenate(valid) == encoder.eos_token_id)
        assert len(loader.bad_documents) == (8 if version == 1 else 0)
    literal = sum(text.count(EOS) for text in SPECIAL) + 20
    num_documents = len(PLAIN + SPECIAL + MARKED) + 10 + 20
    assert borders == {1: num_documents - 12 + literal, 2: num_documents}


def test_a_run_keeps_its_version(tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    assert order_version_of(run) is None and order_version_of(run, "never") is None
    for path, version in ((run, 2), (other, 1)):
        checkpoint = path / "checkpoints" / "step-00000004"
        checkpoint.mkdir(parents=True)
        (path / "run.json").write_text('{"name": "of 0.1.0"}')
        assert order_version_of(path) == 1
        (path / "run.json").write_text('{"order_version": 2}')
        assert order_version_of(path) == 2
        (checkpoint / "manifest.json").write_text("{}")
        (checkpoint / "data.json").write_text(json.dumps({"fingerprint": {"order_version": version}}))
        assert order_version_of(path) == version
    assert order_version_of(run, str(other / "checkpoints" / "step-00000004")) == 1
    (other / "checkpoints" / "step-00000004" / "data.json").write_text("{")
    assert order_version_of(other) == 2  # its record's


def test_a_version_that_is_not_known_is_refused_by_name(tmp_path: Path, tokenizer_dir: Path) -> None:
    write_shard(tmp_path / "train" / "part-0.jsonl", PLAIN)
    config = stream(tmp_path, tokenizer_dir, 3)
    fingerprint = stream_fingerprint(config)
    saved = saved_stream({**fingerprint, "order_version": 3}, StreamStart())
    with pytest.raises(UserError, match="order_version is 2, but the run was started with 3"):
        resume_stream(saved, fingerprint, on_data_change="refuse")
