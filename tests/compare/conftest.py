"""Findings of comparisons whose results a test writes down."""

from __future__ import annotations

import json

import pytest

from codeparrot_ds.compare.candidates import Request, Results, Trial, candidates_of, reference_of, trials_of
from codeparrot_ds.compare.findings import judge_all
from codeparrot_ds.config.run_config import RunConfig
from tests.compare.fake_trial import STEPS, WARMUP_STEPS, found, row


@pytest.fixture
def compared(tmp_path, tokenizer_dir):
    """Findings of configs whose results the test writes down; ``alter(trial, found)`` changes what one found."""
    folder = tmp_path / "out"

    def make(speeds, *, world_sizes=(1,), repeats=2, missing=(), memory=None, bands=False, alter=None, **changes):
        run = RunConfig(
            model="demo", tokenizer=str(tokenizer_dir), seq_length=32, global_batch_size=8, micro_batch_size=2,
            num_lanes=4,
        )  # fmt: skip
        paths = []
        for stage, name in enumerate(speeds):
            paths.append(tmp_path / f"{name}.json")
            paths[-1].write_text(json.dumps({"zero_optimization": {"stage": stage % 4}}))
        request = Request(
            configs=[str(path) for path in paths], config=run, world_sizes=world_sizes, steps=STEPS,
            warmup_steps=WARMUP_STEPS, repeats=repeats,
        )  # fmt: skip
        candidates = candidates_of(request, folder, device="cpu")
        (folder / "initial").mkdir(exist_ok=True)
        (folder / "initial" / "fingerprints.json").write_text('{"float32": "same"}')
        trials = [trial for candidate in candidates for trial in trials_of(candidate)]
        trials += [Trial(candidate=candidates[0], repeat=0, perturbed="fp32")] * bands
        for trial in trials:
            candidate = trial.candidate
            if trial.name in missing:
                continue
            speed = speeds[candidate.label] * candidate.world_size
            rows = [row(step, speed, False) | {"tokens_per_second": speed} for step in range(1, STEPS + 1)]
            rows[0]["tokens_per_second"] = 1.0  # warm-up
            result = {"status": "finished", "reason": None, "step": None, "peak_bytes": None, "seconds": 1.0}
            result |= {"name": trial.name, "repeat": trial.repeat, "found": found(rows, candidate.world_size)}
            for peak in range(candidate.world_size):
                grown = (memory or {}).get(candidate.label, 2 * 10**8)
                result["found"]["resident_peak_bytes"][peak] = 10**8 + grown
            if alter is not None:
                alter(trial, result["found"])
            result |= changes.get(candidate.label, {})
            place = folder / "trials" / trial.name
            place.mkdir(parents=True)
            (place / "result.json").write_text(json.dumps(result))
        results = Results(folder)
        return judge_all(request, results, candidates, reference_of(candidates, results))

    make.folder = folder
    return make
