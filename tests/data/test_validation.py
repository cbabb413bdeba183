from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from codeparrot_ds.data.encoder import Encoder
from codeparrot_ds.data.shards import find_shards
from codeparrot_ds.data.validation import IGNORED_LABEL, ValidationLoader
from codeparrot_ds.errors import UserError
from tests.data.conftest import make_documents


@pytest.fixture
def make_loader(make_corpus: Callable[..., Path], encoder: Encoder) -> Callable[..., ValidationLoader]:
    def make(texts: list[str], *, num_shards: int = 2, suffix: str = ".jsonl", **fields: Any) -> ValidationLoader:
        folder = make_corpus(texts, num_shards=num_shards, suffix=suffix, split="validation")
        settings = {"seq_length": 16, "num_lanes": 7, "batch_size": 4, **fields}
        return ValidationLoader(find_shards(folder, "validation"), encoder, **settings)

    return make


def valid_rows(loader: ValidationLoader) -> list[tuple[int, ...]]:
    return [tuple(row.ids[: row.num_valid_tokens].tolist()) for row in loader.rows()]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_each_document_once_at_any_world_size(
    make_loader: Callable[..., ValidationLoader], encoder: Encoder, world_size: int, suffix: str
) -> None:
    texts = make_documents(60)
    whole = valid_rows(make_loader(texts, suffix=suffix))
    ranks = [
        valid_rows(make_loader(texts, suffix=suffix, rank=rank, world_size=world_size)) for rank in range(world_size)
    ]
    assert Counter(row for rows in ranks for row in rows) == Counter(whole)
    # All the tokens are those of the documents: nothing lost, nothing twice.
    expected = sum(len(ids) + 1 for ids in encoder.encode_batch(texts))
    assert sum(map(len, whole)) == expected
    lanes: dict[int, list[int]] = {}
    loaders = [make_loader(texts, suffix=suffix, rank=lane, world_size=7) for lane in range(7)]
    for lane, loader in enumerate(loaders):
        lanes[lane] = [token for row in valid_rows(loader) for token in row]
    documents = Counter(
        tuple(piece[:-1].tolist())
        for ids in map(np.array, lanes.values())
        for piece in np.split(ids, np.flatnonzero(ids == encoder.eos_token_id) + 1)[:-1]
    )
    assert documents == Counter(tuple(ids.tolist()) for ids in encoder.encode_batch(texts))


def test_batches_mark_the_padding(make_loader: Callable[..., ValidationLoader], encoder: Encoder) -> None:
    loader = make_loader(make_documents(30))
    batches, rows = list(loader), list(loader.rows())
    assert [len(ids) for ids, _ in batches[:-1]] == [4] * (len(batches) - 1)
    assert 1 <= len(batches[-1][0]) <= 4
    input_ids, labels = (torch.cat(tensors) for tensors in zip(*batches, strict=True))
    assert input_ids.dtype == labels.dtype == torch.long
    assert input_ids.shape == labels.shape == (len(rows), 16)
    padding = labels == IGNORED_LABEL
    assert (16 - padding.sum(1)).tolist() == [row.num_valid_tokens for row in rows]
    assert padding.any() and torch.equal(labels[~padding], input_ids[~padding])
    assert (input_ids[padding] == encoder.eos_token_id).all()
    assert torch.equal(padding, padding.cummax(1).values)  # only at the end of rows


@pytest.mark.parametrize("max_rows", [0, 1, 5, 7, 12, 20])
def test_max_rows_are_the_same_rows_at_any_world_size(
    make_loader: Callable[..., ValidationLoader], max_rows: int
) -> None:
    texts = make_documents(60)
    whole = valid_rows(make_loader(texts))
    for world_size in (1, 2, 3, 4):
        loaders = [
            make_loader(texts, max_rows=max_rows, rank=rank, world_size=world_size) for rank in range(world_size)
        ]
        assert sorted(row for loader in loaders for row in valid_rows(loader)) == sorted(whole[:max_rows])
    assert valid_rows(make_loader(texts, max_rows=-1)) == whole


def test_ended_lanes_leave_gaps_in_the_order(make_loader: Callable[..., ValidationLoader]) -> None:
    # A compressed shard each, the larger one to lane 0: three rows there, one in lane 1: indices 0, 2, 4 and 1.
    settings = {"num_lanes": 2, "suffix": ".jsonl.gz"}
    texts = ["x", "x = 1\n" * 11]
    assert len(valid_rows(make_loader(texts, **settings))) == 4
    lengths = [len(valid_rows(make_loader(texts, **settings, max_rows=limit))) for limit in range(8)]
    assert lengths == [0, 1, 2, 3, 3, 4, 4, 4]


def test_lanes_without_documents_are_fine(make_loader: Callable[..., ValidationLoader]) -> None:
    loader = make_loader(["x"], num_shards=1, num_lanes=64)
    assert [len(row) for row in valid_rows(loader)] == [2]
    ranks = [list(make_loader(["x"], num_shards=1, num_lanes=64, rank=rank, world_size=2)) for rank in (0, 1)]
    assert sorted(map(len, ranks)) == [0, 1]


def test_bad_documents_are_counted_over_passes(make_corpus: Callable[..., Path], encoder: Encoder) -> None:
    folder = make_corpus(make_documents(5), num_shards=1, split="validation")
    settings = {"seq_length": 16, "num_lanes": 2, "batch_size": 4}
    whole = valid_rows(ValidationLoader(find_shards(folder, "validation"), encoder, **settings))
    with open(folder / "validation" / "part-00000.jsonl", "a") as file:
        file.write("{\n")
    loader = ValidationLoader(find_shards(folder, "validation"), encoder, **settings, max_bad_documents=1)
    for _ in range(3):
        assert valid_rows(loader) == whole
    assert [found.line for found in loader.bad_documents] == [6]
    strict = ValidationLoader(find_shards(folder, "validation"), encoder, **settings, max_bad_documents=0)
    with pytest.raises(UserError, match="line 6: broken JSON"):
        list(strict)
