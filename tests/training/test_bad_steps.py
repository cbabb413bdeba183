"""Steps with a NaN or infinite loss or gradient, on two real ranks under every kind of DeepSpeed engine."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from codeparrot_ds.engine.operators import build_operators
from codeparrot_ds.training.bad_steps import BadSteps, Finding, _describe, _numbers
from tools.ds_configs import catalogue

pytestmark = pytest.mark.timeout(1500)  # the first of them may have to wait for operators that are being built
SCRIPT = Path(__file__).with_name("bad_step_ranks.py")
CLASSES = {
    "zero0": "FP16_Optimizer",
    "zero0, lean": "FP16_Optimizer",
    "zero0, torch's Adam": "FP16_UnfusedOptimizer",
    "zero0_fp16": "FP16_Optimizer",
    "zero0_fp32": "FusedAdam",
    "zero0_fp32, fp16 autocast": "FusedAdam",
    "zero0_fp32, lean": "FusedAdam",
    "zero1": "DeepSpeedZeroOptimizer",
    "zero1_fp16": "DeepSpeedZeroOptimizer",
    "zero1_fp32": "DeepSpeedZeroOptimizer",
    "zero1_fp32 on the CPU": "DeepSpeedZeroOptimizer",
    "zero1_fp32, lean": "DeepSpeedZeroOptimizer",
    "zero1_fp32_accumulation": "BF16_Optimizer",
    "zero2": "DeepSpeedZeroOptimizer",
    "zero2, lean": "DeepSpeedZeroOptimizer",
    "zero2, unchecked": "DeepSpeedZeroOptimizer",
    "zero2_fp16": "DeepSpeedZeroOptimizer",
    "zero2_fp32": "DeepSpeedZeroOptimizer",
    "zero2_fp32, no norm": "DeepSpeedZeroOptimizer",
    "zero2_fp32_accumulation": "DeepSpeedZeroOptimizer",
    "zero2_offload": "DeepSpeedZeroOptimizer",
    "zero2_offload, fp32 sums": "DeepSpeedZeroOptimizer",
    "zero3": "DeepSpeedZeroOptimizer_Stage3",
    "zero3, no clipping": "DeepSpeedZeroOptimizer_Stage3",
    "zero3_fp16": "DeepSpeedZeroOptimizer_Stage3",
    "zero3_fp32": "DeepSpeedZeroOptimizer_Stage3",
    "zero3_nvme": "DeepSpeedZeroOptimizer_Stage3",
    "zero3_offload": "DeepSpeedZeroOptimizer_Stage3",
}


@pytest.fixture(scope="module")
def poisoned(run_ranks, corpus_dir, tokenizer_dir) -> list[dict]:
    """What ``bad_step_ranks.py`` says on both ranks."""
    for name in ("zero2", "zero2_offload", "zero3_nvme"):
        build_operators(catalogue()[name].config, "cpu")
    arguments = [str(SCRIPT), str(corpus_dir), str(tokenizer_dir)]
    script = f"import runpy, sys; sys.argv = {arguments!r}; runpy.run_path(sys.argv[0], run_name='__main__')"
    return run_ranks(script, timeout=500)


def test_every_class_of_engine_is_among_them(poisoned):
    names = poisoned[0].keys() - {"too many", "scaling", "late", "as plain"}
    assert {name: poisoned[0][name]["optimizer"] for name in names} == CLASSES


@pytest.mark.parametrize("name", CLASSES)
def test_a_bad_step_leaves_no_trace(poisoned, name):
    """Bit for bit: neither in what a step changes, nor in the steps after it."""
    for rank in poisoned:
        said = rank[name]
        # Without a norm a gradient of 1e25 is as good as any.
        bad = said["bad"][:4] if name.endswith("no norm") else said["bad"]
        assert [(step["kept"], step["counted"], step["overflow"]) for step in bad] == [(True, 1, True)] * len(bad)
        good = said["good"]
        assert [(step["kept"], step["counted"], step["overflow"]) for step in good[:1]] == [(False, 0, False)]
        if not name.endswith(("no norm", "fp16 autocast")):  # whose loss scale is another after a bad step
            assert [(step["kept"], step["counted"]) for step in good] == [(False, 0)] * 3
            assert [step["losses"] for step in good] == said["clean_losses"]
            assert said["as_if_unseen"]


@pytest.mark.parametrize("name", CLASSES)
def test_a_bad_step_is_told_with_its_rows(poisoned, name):
    """Global batch 8 on 2 ranks in micro-batches of 2, from 4 lanes: rank 1 has the odd rows and lanes."""
    main, other = (rank[name]["bad"] for rank in poisoned)
    expected = [
        ("step 2 skipped: the loss of rows 9 and 11 (rank 1, lanes 1 and 3, part-00000.jsonl near byte ", "is inf"),
        ("step 3 skipped: the loss of rows 21 and 23 (rank 1, lanes 1 and 3, part-00000.jsonl near ", "is nan"),
        ("step 4 skipped: the gradient of rows 25 and 27 (rank 1, lanes 1 and 3, part-00000.jsonl near ", "is nan"),
        ("step 5 skipped: the gradient of rows 37 and 39 (rank 1, lanes 1 and 3, part-00000.jsonl near ", "is "),
    ]
    for number, (begin, value) in enumerate(expected):
        (line,) = main[number]["lines"]
        assert line.startswith(begin) and value in line
        assert f"({number + 1} in a row; the run stops at 100)" in line or number == 0
        assert not other[number]["lines"]
        said, again, *rows = other[number]["log"]
        assert said == line and again.startswith(f"step {number + 2}: the ")
        assert len(rows) == 2 and all(row.startswith("row ") and " begins " in row for row in rows)
        assert not main[number]["log"]


def test_a_lean_step_is_reported_with_the_next_one(poisoned):
    """(lines, in a row, skipped steps) after each of: good, bad, bad, good, bad, the end."""
    for rank, lines in zip(poisoned, (1, 0), strict=True):
        said = rank["late"]["said"]
        assert said == [[0, 0, 0], [0, 0, 0], [lines, 1, 1], [2 * lines, 2, 2], [2 * lines, 0, 2], [3 * lines, 1, 3]]
    begins = [line.split(" (")[0] for line in poisoned[0]["late"]["lines"]]
    assert begins == [
        "step 2 skipped: the loss of rows 9 and 11",
        "step 3 skipped: the loss of rows 21 and 23",
        "step 5 skipped: the gradient of rows 37 and 39",
    ]


@pytest.mark.parametrize(("name", "band"), [("zero1_fp32", 1e-6), ("zero2", 5e-4)])
def test_lean_steps_of_two_ranks_learn_what_plain_ones_learn(poisoned, name, band):
    for rank in poisoned:
        lean, plain = rank["as plain"][name]
        assert lean == pytest.approx(plain, rel=band) and lean[-1] < lean[0] - 1


def test_the_rows_that_are_quoted_are_the_poisoned_ones(poisoned, make_config):
    from codeparrot_ds.data.encoder import load_encoder
    from codeparrot_ds.data.shards import find_shards
    from codeparrot_ds.data.stream import Dataset, StreamConfig
    from tests.data.streams import RowStream

    config = make_config()
    encoder = load_encoder(config.tokenizer)
    datasets = [Dataset(name=config.data, shards=find_shards(config.data, "train"))]
    stream = RowStream(
        StreamConfig(datasets=datasets, encoder=encoder, seq_length=32, num_lanes=4, shuffle_buffer=8, seed=1)
    )
    rows = [encoder.decode(row.ids) for row, _ in zip(stream, range(24), strict=False)]
    for step, numbers in ((0, (9, 11)), (1, (21, 23))):
        log = poisoned[1]["zero1"]["bad"][step]["log"]
        assert log[2:] == [f"row {row} (lane {row % 4}) begins {rows[row][:80]!r}" for row in numbers]


def test_too_many_in_a_row_end_the_run_on_every_rank(poisoned):
    for rank in poisoned:
        said = rank["too many"]
        assert [step["in_a_row"] for step in said["steps"]] == [1, 2, 0, 1, 2]
        assert said["code"] == 3
        # A fault that the embedding's gradient does not know of: no rows can be told from the others.
        (line,) = poisoned[0]["too many"]["steps"][1]["lines"]
        largest = max(loss for each in poisoned for loss in each["too many"]["steps"][1]["losses"])
        assert line.startswith("step 2 skipped: the gradient of rows 8 to 15 is not finite; all losses are, ")
        assert f"the largest is {largest:.4g} (2 in a row" in line
        assert said["error"].startswith(
            "3 steps in a row were skipped, the last was step 6: the loss of rows 45 and 47"
        )
        assert said["error"].endswith("the last good checkpoint is runs/brave/checkpoints/step-00000001")
    assert poisoned[0]["too many"]["error"] == poisoned[1]["too many"]["error"]


@pytest.mark.parametrize("name", ["zero0_fp16", "zero2_fp16", "zero3_fp16"])
def test_a_loss_scale_that_is_too_large_is_normal_until_it_cannot_fall(poisoned, name):
    for rank in poisoned:
        said = rank["scaling"][name]
        assert [step["kept"] and step["counted"] == 1 for step in said["steps"]] == [True] * 3
        assert said["scales"] == [2.0**7, 2.0**6, 2.0**6]
        assert [step["in_a_row"] for step in said["steps"]] == [0, 0, 1]
        assert "overflowed at the loss scale 256" in said["steps"][0]["log"][0]
        assert said["error"].startswith("2 steps in a row were skipped, the last was step 4: the gradient of rows 25")
    assert len(poisoned[0]["scaling"][name]["steps"][2]["lines"]) == 1


def test_a_few_micro_batches_are_named_and_the_others_counted():
    step = SimpleNamespace(global_batch_size=16, _first_row=lambda step: 16)
    findings = [Finding(rank, 0, "loss", math.nan, [rank], [rank], ["a.jsonl near byte 0"]) for rank in range(5)]
    reason = BadSteps._reason(step, 102, findings, [math.nan] * 5 + [3.0] * 3)
    assert reason.startswith(
        "the loss of row 0 (rank 0, lane 0, a.jsonl near byte 0) is nan; the loss of row 1 (rank 1"
    )
    assert reason.count("; ") == 3 and reason.endswith("; 2 more micro-batches of 8 are named in the log")
    every = BadSteps._reason(step, 102, findings, [math.nan] * 5)
    assert every == "the loss of all its micro-batches, rows 16 to 31, is nan"
    findings[1] = findings[1]._replace(what="gradient", value=math.inf)
    assert "the loss or gradient of all its micro-batches" in BadSteps._reason(step, 102, findings, [math.nan] * 5)


def test_the_words():
    assert _numbers("row", [97]) == "row 97"
    assert _numbers("lane", [1, 3]) == "lanes 1 and 3"
    assert _numbers("row", [1, 3, 5]) == "rows 1, 3 and 5"
    assert _numbers("row", range(1, 25, 2)) == "rows 1, 3 … 23"
    places = ["a.jsonl near byte 5", "b.parquet near row 7", "c.jsonl.gz near line 3", "d.jsonl near byte 0"]
    finding = Finding(0, 0, "gradient", math.inf, range(4), [0, 1, 2, 3], places)
    assert _describe(finding) == (
        "the gradient of rows 0, 1 … 3 (rank 0, lanes 0, 1 … 3, a.jsonl near byte 5, b.parquet near row 7, "
        "2 more places) is inf"
    )
