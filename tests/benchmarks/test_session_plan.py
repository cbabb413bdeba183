"""The list of a GPU session: levers that a checkout lacks or has anyway, and peers that train on the rows of ours."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from benchmarks.session import plan as module
from benchmarks.session.plan import ON_CPU, ON_GPU, Item, plan


def items(ranks: int = 1, sizes=ON_GPU, only=None) -> list[Item]:
    options = argparse.Namespace(
        ranks=ranks, sizes=sizes, only=only, patience=1.0, data="/corpus", tokenizer="/tokenizer"
    )
    return plan(options, vocab_size=32_768, folder=Path("/record"), workspace="/workspace")


def test_a_lever_that_is_not_there_or_is_there_anyway_says_so(monkeypatch):
    levers = {
        "of tomorrow": {"a_field_of_tomorrow": True},
        "value of tomorrow": {"compile": "by and by"},
        "default": {"chunked_loss": False},
        "lever": {"chunked_loss": True},
        "its double": {"chunked_loss": True, "dropout": 0.0},
        "patched": {"chunked_loss": True, "patch": "liger"},
    }
    monkeypatch.setattr(module, "LEVERS", module.LEVERS | levers)
    lacks = {item.name.removeprefix("111M: "): item.lacks for item in items() if item.name.startswith("111M: ")}
    assert lacks["of tomorrow"] == "this checkout has no field a_field_of_tomorrow"
    assert lacks["value of tomorrow"] == "compile must be true or false, not 'by and by' in this checkout"
    assert lacks["default"] == "the same as 111M: as it is"
    assert lacks["lever"] == "the same as 111M: chunked loss"
    assert lacks["its double"] == "the same as 111M: chunked loss"
    assert lacks["patched"] is lacks["chunked loss"] is lacks["as it is"] is None


@pytest.mark.parametrize("sizes", [ON_GPU, ON_CPU])
@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_every_run_and_every_peer_has_whole_steps_of_the_same_rows(sizes, ranks):
    found = items(ranks, sizes)
    assert len({item.name for item in found}) == len(found)
    small = next(item.order["fields"] for item in found if item.name.endswith(": as it is"))
    for item in found:
        if item.peer is not None or (item.order or {}).get("does") == "peer":
            words = item.peer or item.order["arguments"]
            rows, times = (int(words[words.index(name) + 1]) for name in ("--micro-batch", "--accumulation"))
            processes = 1 if words[0] == "recipe" else ranks
            assert rows * times * processes == small["global_batch_size"] == item_rows(sizes, ranks), item.name
        elif item.order is not None and "fields" in item.order:
            fields = item.order["fields"]
            assert fields["global_batch_size"] % (fields["micro_batch_size"] * ranks) == 0, item.name
    loops = {item.name for item in found if item.name.startswith("peer: ")}
    assert ("peer: FSDP2" in loops) is ("peer: bare" not in loops) is (ranks > 1)


def item_rows(sizes, ranks: int) -> int:
    return sizes.small["global_batch_size"] * ranks


def test_windows_that_count_begin_behind_the_profiled_step():
    for sizes in (ON_GPU, ON_CPU):
        for item in items(sizes=sizes):
            if item.name.endswith(": as it is"):
                assert item.order["warmup"] * item.order["fields"]["log_steps"] >= 4
