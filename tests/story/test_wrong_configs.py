"""Configs made subtly wrong on purpose are called different, with the right reason, and others are not."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from codeparrot_ds.compare.candidates import Request, Results, candidates_of, left_to_run, reference_of
from codeparrot_ds.compare.findings import judge_all
from codeparrot_ds.compare.results import FOUND
from codeparrot_ds.compare.trial_process import initial_weights, orders_of, prepare_trial
from codeparrot_ds.config.arguments import ArgumentParser, add_config_arguments, config_from_arguments
from tests.story.stories import clean_environment, free_port, run_command
from tests.story.wrong_configs import CASES, SMALL, is_right, write_cases

STEPS = 12
# Linear and cosine decay part late; that and more of a kind is in benchmarks/comparison.py.
LEFT_OUT = {
    "linear decay", "clipping at 0.5", "another number of lanes", "learning rate 5% too high", "control: stage 2",
    "control: bf16, fp32 accumulation",
}  # fmt: skip
CHOSEN = [case for case in CASES if case.name not in LEFT_OUT]


@pytest.fixture(scope="module")
def verdicts(workshop, tmp_path_factory):
    """All cases beside fp32 at stage 0, a few steps each, in one launch of one rank."""
    folder = tmp_path_factory.mktemp("wrong")
    parser = ArgumentParser()
    add_config_arguments(parser, preset="--preset")
    data = ["--data", str(workshop.corpus), "--tokenizer", str(workshop.tokenizer), "--num-workers", "0"]
    config = config_from_arguments(parser.parse_args([*SMALL, *data]))
    request = Request(
        configs=["zero0_fp32", *write_cases(CHOSEN, folder)], config=config, world_sizes=[1], steps=STEPS, repeats=1,
        parts_steps=0, checkpoint=False,
    )  # fmt: skip
    out = folder / "out"
    out.mkdir()
    candidates = candidates_of(request, out, device="cpu")
    results = Results(out)
    places = []
    for trial in left_to_run(candidates, results):
        initial = initial_weights(config, out, perturbed=trial.perturbed)
        places.append(prepare_trial(trial, out, initial=initial, orders=orders_of(request, trial, None)))
    script = Path(__file__).with_name("trials_in_turn.py")
    environment = clean_environment(
        DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(free_port()),
    )  # fmt: skip
    process = run_command([sys.executable, str(script), *map(str, places)], env=environment, timeout=540)
    assert process.returncode == 0, process.stderr[-3000:]
    for place in places:
        found = json.loads((place / FOUND).read_text())
        result = {"status": "finished", "reason": None, "repeat": 0, "seconds": 1.0, "found": found}
        (place / "result.json").write_text(json.dumps(result))
    findings = judge_all(request, results, candidates, reference_of(candidates, results))
    return dict(zip((case.name for case in CHOSEN), findings.outcomes[1:], strict=True))


@pytest.mark.parametrize("case", CHOSEN, ids=lambda case: case.name.replace(" ", "-"))
def test_a_config_is_told_for_what_it_is(verdicts, case):
    outcome = verdicts[case.name]
    assert outcome.verdict is not None, outcome.reason
    assert is_right(case, outcome.verdict.kind, outcome.verdict.reason), str(outcome.verdict)
