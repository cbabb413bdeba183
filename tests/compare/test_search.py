"""A search over configs whose trials are stood in for: its way, its budget, how it goes on, and what it says."""

import dataclasses
import json
import signal
import sys
from pathlib import Path

import pytest

from codeparrot_ds.compare import charts as comparison_charts
from codeparrot_ds.compare import trial_process as comparison_trial
from codeparrot_ds.compare.candidates import Request, candidates_of
from codeparrot_ds.compare.search import Search
from codeparrot_ds.compare.trial_process import TrialRunner
from codeparrot_ds.config.run_config import RunConfig

PROGRAM = (sys.executable, str(Path(__file__).with_name("fake_trial.py")))
MINE = {"zero_optimization": {"stage": 1, "reduce_bucket_size": 5_000_000}, "bf16": {"enabled": True}}


@pytest.fixture
def start(tmp_path, monkeypatch, tokenizer_dir):
    """Searches from one config at stage 1 with micro-batch 2 of 8 rows."""
    monkeypatch.setattr(comparison_trial, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(comparison_trial, "SAMPLE_SECONDS", 0.05)
    monkeypatch.setattr(comparison_charts, "pictures_of", lambda findings: [])  # drawn elsewhere
    # As DeepSpeed steps: a lean step of stage 0 takes less than stage 3 of so small a model, and everything would fit.
    config = RunConfig(model="demo", tokenizer=str(tokenizer_dir), seq_length=32, global_batch_size=8,
                       micro_batch_size=2, num_lanes=4, lean_step="off")  # fmt: skip
    (tmp_path / "mine.json").write_text(json.dumps(MINE))
    request = Request(configs=[str(tmp_path / "mine.json")], config=config, world_sizes=[1], steps=4, warmup_steps=1)
    folder = tmp_path / "out"
    for weights in ("initial", "perturbed-bf16"):
        (folder / weights).mkdir(parents=True)
        (folder / weights / "fingerprints.json").write_text('{"float32": "same"}')

    def run(plans=None, minutes=10.0, **changes):
        monkeypatch.setenv("FAKE_TRIALS", json.dumps(plans or {}))
        asked = dataclasses.replace(request, **changes)
        said = []
        given = candidates_of(asked, folder, device="cpu")
        trials = TrialRunner(request=asked, folder=folder, hang_seconds=30, program=PROGRAM)
        search = Search(asked, folder, given, device="cpu", minutes=minutes, run=trials, say=said.append)
        findings = search.run()
        return findings, said

    run.folder = folder
    (run.mine,) = candidates_of(request, folder, device="cpu")
    return run


def started(folder):
    return sorted(path.parent.name for path in folder.glob("trials/*/result.json"))


def test_it_climbs_to_the_fastest_and_says_its_way(start):
    findings, said = start()
    assert findings.recommendation == (
        "Take stage 0, micro-batch 8 on 1 rank: 1,800 tokens/s (1,800 to 1,800, 2 trials), 1.57x (1.49x to 1.65x) the "
        "tokens/s of the reference mine on 1."
    )
    told = [line.partition(":")[0] for line in said]
    assert told == [
        "mine on 1 (given)",
        "stage 0, micro-batch 2 on 1 (stage 0, the fastest way to fit by the plan)",
        "stage 2, micro-batch 2, bucket 5e+06 on 1 (stage 2, the fastest way to fit by the plan)",
        "stage 3, micro-batch 2, bucket 5e+06 on 1 (stage 3, the fastest way to fit by the plan)",
        "stage 0, micro-batch 4 on 1 (micro-batch 4, from stage 0, micro-batch 2 on 1)",
        "stage 0, micro-batch 8 on 1 (micro-batch 8, from stage 0, micro-batch 4 on 1)",
        "stage 1, micro-batch 8, bucket 5e+06 on 1 (stage 1, from stage 0, micro-batch 8 on 1)",
        "no neighbour of stage 0, micro-batch 8 on 1 is faster",
        "more trials of stage 0, micro-batch 8 on 1, stage 1, micro-batch 8, bucket 5e+06 on 1",
    ]
    page = (start.folder / "report.html").read_text()
    assert "What the search tried" in page and "no neighbour of stage 0, micro-batch 8 on 1 is faster" in page
    best = findings.outcome("stage 0, micro-batch 8 on 1")
    assert len(best.results) == 2 and findings.complete


def test_it_goes_on_where_it_was_stopped_and_comes_out_the_same(start):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            start({"stage-0-micro-batch-4": "interrupt"})
    finally:
        signal.signal(signal.SIGINT, before)
    known = started(start.folder)
    assert json.loads((start.folder / "report.json").read_text())["ranking"][0]["name"] == "stage 0, micro-batch 2 on 1"
    times = {name: (start.folder / "trials" / name / "result.json").stat().st_mtime_ns for name in known}
    findings, _ = start()
    assert findings.recommendation.startswith("Take stage 0, micro-batch 8 on 1 rank: 1,800 tokens/s")
    assert times == {name: (start.folder / "trials" / name / "result.json").stat().st_mtime_ns for name in known}
    every = started(start.folder)
    assert start()[0].tried == findings.tried and started(start.folder) == every


def test_it_stays_inside_its_budget_and_says_what_it_left(start):
    findings, said = start(minutes=0.001)  # one trial: how long it takes is not known before
    assert said[-1].startswith("the budget ends here: ") and "would take about" in said[-1]
    assert len(started(start.folder)) == 1 and findings.recommendation.startswith("Take mine on 1 rank")
    findings, _ = start(minutes=10)
    assert findings.recommendation.startswith("Take stage 0, micro-batch 8")


def test_what_breaks_or_trains_otherwise_is_not_gone_on_from(start):
    findings, _ = start({"stage-0-micro-batch-2": "crash", "stage-2": "fast and wrong"})
    assert findings.ranking[0][0].startswith("stage 2, micro-batch 2")
    assert findings.recommendation.startswith("Take stage 0, micro-batch 8")
    assert not any("from stage 2" in line for line in findings.tried)
    assert any("stage 0, micro-batch 2 on 1 (" in line and "crash" in line for line in findings.tried)
    assert any("losses: different from step 1" in line for line in findings.tried)


def test_what_the_plan_rules_out_is_named_and_offloading_makes_room(start, monkeypatch):
    from codeparrot_ds.compare import candidates as comparison

    def too_large(predicted, world_size, device):
        return "needs 99 GB a rank by the plan" if predicted.peak_bytes > limit else None

    monkeypatch.setattr(comparison, "_why_not_here", too_large)
    limit = start.mine.predicted.peak_bytes
    findings, said = start()
    assert any(line.startswith("stage 0: not run") or "needs 99 GB" in line for line in said)
    assert any("offload" in each.name or "checkpointing" in each.name for each in findings.outcomes)
