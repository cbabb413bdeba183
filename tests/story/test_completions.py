"""Completions while training: those of the saved weights, with training as it is, where all can see them."""

from __future__ import annotations

import json
import shutil

import pytest

from codeparrot_ds.config.files import load_config
from codeparrot_ds.evaluation.complete import EXAMPLE_PROMPTS, first_block
from codeparrot_ds.evaluation.generate import Request, Sampling, generate
from codeparrot_ds.evaluation.models import load_model
from codeparrot_ds.evaluation.problems import load_problems
from codeparrot_ds.report.run_report import write_report
from codeparrot_ds.training.samples import parses
from tests.needs import needed, needs
from tests.story.stories import REPOSITORY, losses, train_in_turn

PROBLEMS = REPOSITORY / "tests" / "evaluation" / "problems.jsonl"
SHORT = ("--max-train-steps", "4", "--save-checkpoint-steps", "2")
SAMPLING = (
    "--eval-prompts",
    "examples",
    "--eval-problems",
    str(PROBLEMS),
    "--allow-execution",
    "--eval-new-tokens",
    "12",
)

CHOSEN = ("--profile", "1", "--micro-batch-size", "auto", "--chunked-loss")


RUNS = {
    "told-2": ("--deepspeed", "zero2", *SAMPLING, *CHOSEN),
    "told-3": ("--deepspeed", "zero3_fp32", *SAMPLING, "--wandb", "offline"),
    "untold-3": ("--deepspeed", "zero3_fp32"),
}


@pytest.fixture(scope="module")
def runs(request, workshop):
    """Stages 2 and 3 with completions, stage 3 without; stage 2 also profiled, with what is chosen for it."""
    chosen = needed(request, "runs")
    options = [workshop.options("--run-name", name, *SHORT, *RUNS[name]) for name in chosen]
    train_in_turn(options, ranks=2)
    return {name: workshop.runs / name for name in chosen}


def samples(run):
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


@needs(runs=["told-3"])
def test_completions_are_those_of_the_weights_that_are_saved(runs):
    model, tokenizer = load_model(runs["told-3"], device="cpu")
    problems = load_problems(PROBLEMS)
    requests = [Request(prompt=problem.prompt, ends=problem.ends) for problem in problems]
    sampling = Sampling(temperature=0.0, max_new_tokens=12)
    found = dict(generate(model, tokenizer, requests, sampling=sampling))
    expected = [problem.cut(found[number].raw) for number, problem in enumerate(problems)]
    rows = [row for row in samples(runs["told-3"]) if row["step"] == 4]
    assert [row["prompt"] for row in rows[:4]] == [prompt for prompt, _ in EXAMPLE_PROMPTS]
    assert [row["task_id"] for row in rows[4:]] == [problem.task_id for problem in problems]
    assert [row["completion"] for row in rows[4:]] == expected
    assert all(row["completion"] == first_block(row["completion"]) for row in rows[:4])


@pytest.mark.parametrize("name", ["told-2", "told-3"])
@needs(runs=lambda name: [name])
def test_each_evaluation_is_logged_with_its_shares(runs, name):
    rows = [json.loads(line) for line in (runs[name] / "metrics.jsonl").read_text().splitlines()]
    evaluated = {row["step"]: row for row in rows if "eval_loss" in row}
    kept = samples(runs[name])
    assert sorted(evaluated) == [0, 2, 4] and [row["step"] for row in kept] == [0] * 9 + [2] * 9 + [4] * 9
    for step, row in evaluated.items():
        mine = [sample for sample in kept if sample["step"] == step]
        assert row["parsing_share"] == sum(sample["parses"] for sample in mine) / 9
        assert row["pass_at_1"] == sum(sample.get("verdict") == "passed" for sample in mine) / 5
        for sample in mine:
            assert sample["parses"] == parses(sample["prompt"] + sample["completion"] + "\n")
            assert sample["log_probability"] <= 0 and sample["tokens"] <= 12


@needs(runs=["told-3", "untold-3"])
def test_training_is_as_without_them(runs):
    assert losses(runs["told-3"]) == losses(runs["untold-3"])


@needs(runs=["told-3", "untold-3"])
def test_reports_and_trackers_show_them(runs, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(runs["told-3"] / "tensorboard"))
    events.Reload()
    assert "completions/text_summary" in events.Tags()["tensors"]
    assert {"validation/parsing_share", "validation/pass_at_1"} <= set(events.Tags()["scalars"])
    assert list((runs["told-3"] / "wandb").glob("offline-run-*/files/media/table/completions_*.table.json"))
    page = write_report([runs["told-3"]], tmp_path)
    assert "<h2>Completions</h2>" in page.read_text() and "area_of_rectangle" in page.read_text()
    assert "## Completions" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "parsing_share.png").is_file() and (tmp_path / "pass_at_1.png").is_file()
    plain = write_report([runs["untold-3"]], tmp_path / "plain").read_text()
    assert "Completions" not in plain


def test_what_cannot_be_completed_is_said_before_anything_starts(workshop, tmp_path):
    bad, wrong = tmp_path / "bad.jsonl", tmp_path / "wrong.jsonl"
    bad.write_text("{}\n")
    wrong.write_text(PROBLEMS.read_text().splitlines()[0].replace("return a + b", "return a"))
    for options, words in (
        (("--eval-problems", str(PROBLEMS)), "allow that with --allow-execution"),
        (("--eval-problems", str(bad), "--allow-execution"), "bad.jsonl, line 1: task_id is missing"),
        (("--eval-problems", str(wrong), "--allow-execution"), f"1 of 1 reference solutions of {wrong} do not pass"),
        (("--eval-prompts", "absent.txt"), "absent.txt: no such file"),
    ):
        answer = workshop.refuse(*options, "--run-name", "refused", output_dir=tmp_path)
        assert answer.returncode == 2 and words in answer.stderr, answer.stderr
    assert not (tmp_path / "refused").exists()
    # Accepted, or with nothing to accept, the next mistake is the one that ends it.
    bare = tmp_path / "bare.jsonl"
    bare.write_text(json.dumps({**json.loads(wrong.read_text()), "canonical_solution": ""}))
    for problems, words in ((wrong, "judging the reference solutions of"), (bare, "all 1 problems of")):
        options = ("--eval-problems", str(problems), "--allow-execution", "--accept-failing-references")
        answer = workshop.refuse(*options, "--resume", str(tmp_path), "--run-name", "refused", output_dir=tmp_path)
        assert answer.returncode == 2 and words in answer.stderr, answer.stderr
        assert "reference solutions of" not in answer.stderr.splitlines()[-1], answer.stderr
    shutil.rmtree(tmp_path)


@needs(runs=["told-2", "told-3"])
def test_a_profiled_run_tells_where_its_fourth_step_went(runs):
    profile = json.loads((runs["told-2"] / "profile" / "profile.json").read_text())
    parts = {(part["phase"], part["kind"]): part["host_seconds"] for part in profile["parts"]}
    assert profile["steps"] == 1 and profile["attention"]
    assert all(parts[phase, "matrix products"] > 0 for phase in ("forward", "backward"))
    assert parts["forward", "attention"] > 0 and ("optimizer", "rest") in parts
    assert any(kind == "communication" for _, kind in parts)
    told = sum(parts.values()) + profile["data_seconds"] + profile["other_seconds"]
    assert told == pytest.approx(profile["step_seconds"], rel=0.01)
    assert (runs["told-2"] / "profile" / "trace.json.gz").is_file() and not (runs["told-3"] / "profile").exists()


@needs(runs=["told-2"])
def test_a_micro_batch_that_was_chosen_is_kept_as_a_number(runs):
    config = load_config(runs["told-2"] / "config.yaml")
    assert config.micro_batch_size == config.global_batch_size // 2 and config.chunked_loss
