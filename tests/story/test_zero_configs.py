"""DeepSpeed configs through the real launcher: equal data gives equal losses, and a run continues as if never stopped.

``ds_config/test_shipped.py`` trains every shipped file; here are the stages and precisions, and where Adam's states
may lie. The runs of ``conftest.py`` are trained in turn by one pair of ranks; single ones here have a launch of their
own and must come out the same to the bit.
"""

from __future__ import annotations

import json
import math
import shutil

import pytest

from tests.needs import needs
from tests.story.stories import (
    COMPARED,
    OTHERS,
    STEPS,
    clean_environment,
    evaluations,
    log,
    losses,
    metrics,
    run_command,
)
from tools.ds_configs import catalogue


@pytest.mark.parametrize("name", COMPARED + OTHERS)
@needs(on_two_ranks=lambda name: [name])
def test_config_trains(on_two_ranks, name):
    run = on_two_ranks[name]
    steps = 20 if name in COMPARED else 5
    rows = [row for row in metrics(run) if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    assert all(math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]) for row in rows)
    assert all(row["skipped_steps"] == 0 for row in rows)
    assert rows[0]["loss"] == pytest.approx(math.log(1024), abs=0.3)
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.05
    assert json.loads((run / "run.json").read_text())["outcome"]["status"] == "finished"
    resolved = json.loads((run / "ds_config.json").read_text())
    assert resolved["train_batch_size"] == 8 and "auto" not in json.dumps(resolved)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", range(4))
@needs(
    on_two_ranks=lambda stage, ranks: ["zero0_fp32", *([f"zero{stage}_fp32"] if ranks == 2 else [])],
    on_one_rank=lambda stage, ranks: [f"zero{stage}_fp32"] if ranks == 1 else [],
)
def test_fp32_losses_agree(on_one_rank, on_two_ranks, stage, ranks):
    reference = losses(on_two_ranks["zero0_fp32"])
    other = losses((on_one_rank, on_two_ranks)[ranks - 1][f"zero{stage}_fp32"])
    assert reference.keys() == other.keys() and len(other) == 20
    assert max(abs(reference[step] - other[step]) for step in reference) <= 2e-6


@pytest.mark.parametrize("stage", [0, 2, 3])
@needs(on_two_ranks=lambda stage: ["zero1", f"zero{stage}"])
def test_bf16_losses_agree(on_two_ranks, stage):
    reference, other = losses(on_two_ranks["zero1"]), losses(on_two_ranks[f"zero{stage}"])
    assert max(abs(reference[step] - other[step]) for step in reference) <= 1e-3


@needs(on_two_ranks=["zero1_fp32"], on_one_rank=["zero1_fp32"])
def test_validation_loss_is_the_same_at_any_world_size(on_one_rank, on_two_ranks):
    for step, loss in evaluations(on_one_rank["zero1_fp32"]).items():
        assert evaluations(on_two_ranks["zero1_fp32"])[step] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("name", ["zero0", "zero1", "zero0_fp32"])
@needs(on_two_ranks=lambda name: [name], continued=lambda name: [name])
def test_resume_is_exact(on_two_ranks, continued, name):
    """A run that stopped after step 10 has the losses of steps 11 to 20 of the one that never stopped.

    ZeRO-3 is below; ZeRO-2, with dropout on top, is in ``test_resume.py``.
    """
    assert "resumed from step 10" in log(continued[name])
    assert losses(continued[name]) == losses(on_two_ranks[name])
    assert evaluations(continued[name]) == evaluations(on_two_ranks[name])


@needs(on_two_ranks=["zero2"])
def test_every_checkpoint_is_a_commit_on_the_runs_branch(on_two_ranks):
    run = on_two_ranks["zero2"]
    hub = json.loads((run / "run.json").read_text())["hub"]
    titles = run_command(["git", "-C", hub, "log", "--format=%s", run.name]).stdout.splitlines()
    wanted = [f"Step {step}: loss {loss:.4f}" for step, loss in reversed(evaluations(run).items()) if step > 0]
    assert [title.split(",")[0] for title in titles if title.startswith("Step")] == wanted and len(wanted) == 2


@needs(on_two_ranks=["zero2"], continued=["zero2"])
def test_a_finished_run_has_nothing_left_to_do(on_two_ranks, continued):
    assert "resumed from step 20" in log(continued["zero2"])
    assert metrics(continued["zero2"]) == metrics(on_two_ranks["zero2"])


def from_step_10(run, folder):
    """A copy of a run of 20 steps as it was after 10."""
    shutil.copytree(run, folder / run.name)
    shutil.rmtree(folder / run.name / "checkpoints" / "step-00000020")
    return folder / run.name


@needs(on_two_ranks=["zero3"])
def test_the_command_continues_where_another_launch_stopped(workshop, on_two_ranks, tmp_path):
    """Bit for bit: that the first ten steps shared their processes with other runs is not to be seen."""
    whole = on_two_ranks["zero3"]
    run = from_step_10(whole, tmp_path)
    options = ("--deepspeed", "zero3", "--num-gpus", "2", "--run-name", run.name, *STEPS)
    process = workshop.train(*options, output_dir=tmp_path)
    assert process.returncode == 0, process.stderr[-3000:]
    assert "resumed from step 10" in process.stderr
    assert losses(run) == losses(whole)
    assert evaluations(run) == evaluations(whole)


@needs(on_two_ranks=["zero3_fp32", "zero1_fp32"])
def test_a_run_continues_at_another_layout(workshop, on_two_ranks, tmp_path):
    """Two ranks at stage 3 until step 10, then one rank at stage 1: the losses are those of a run that never moved."""
    moved = from_step_10(on_two_ranks["zero3_fp32"], tmp_path)
    process = workshop.train(
        *("--deepspeed", "zero1_fp32", "--num-gpus", "1", "--run-name", moved.name, *STEPS), output_dir=tmp_path
    )
    assert process.returncode == 0, process.stderr[-3000:]
    assert "world_size 2 -> 1" in process.stderr and "zero_stage 3 -> 1" in process.stderr
    whole = losses(on_two_ranks["zero1_fp32"])
    assert max(abs(loss - whole[step]) for step, loss in losses(moved).items()) <= 2e-6


@needs(on_two_ranks=["zero2"])
def test_the_launcher_itself_gives_the_same_run(workshop, on_two_ranks, tmp_path):
    """`deepspeed --module codeparrot_ds.train` in processes of its own, bit for bit."""
    options = workshop.options("--run-name", "bare", "--deepspeed", "zero2", *STEPS, output_dir=tmp_path)
    launcher = ["deepspeed", "--num_gpus", "2", "--module", "codeparrot_ds.train", *options]
    process = run_command(launcher, env=clean_environment(DS_ACCELERATOR="cpu"))
    assert process.returncode == 0, process.stderr[-3000:]
    assert losses(tmp_path / "bare") == losses(on_two_ranks["zero2"])


@pytest.mark.parametrize("stage", range(4))
@needs(on_two_ranks=lambda stage: [f"zero{stage}"])
def test_the_export_of_every_stage_completes_in_batches(on_two_ranks, stage):
    """With nothing but what its folder says; `benchmarks/downstream.py` takes such exports to other programs, too."""
    from transformers import pipeline

    export = on_two_ranks[f"zero{stage}"] / "checkpoints" / "step-00000020" / "export"
    pipe = pipeline("text-generation", model=str(export), device="cpu", dtype="float32")
    assert pipe.model.config.n_ctx == pipe.tokenizer.model_max_length == 1024
    assert pipe.tokenizer.pad_token_id == pipe.model.generation_config.pad_token_id == pipe.tokenizer.eos_token_id
    prompts = ["def f(x):", "import os", "class A:\n    def g(self):\n        return"]
    options = {"max_new_tokens": 8, "do_sample": False, "no_repeat_ngram_size": 1}  # after 20 steps it repeats one
    batched = [rows[0]["generated_text"] for rows in pipe(prompts, batch_size=3, **options)]
    assert batched == [pipe(prompt, **options)[0]["generated_text"] for prompt in prompts]


@pytest.mark.parametrize("name", [name for name in catalogue() if name.endswith("_fp16")])
def test_fp16_is_refused_on_a_cpu_before_any_rank_starts(workshop, name, monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")  # some CPUs have it
    process = workshop.refuse("--deepspeed", name, "--run-name", "never", "--max-train-steps", "5")
    assert process.returncode == 2
    (line,) = process.stderr.strip().splitlines()
    assert "fp16" in line and "GPU" in line and f"zero{name[4]}" in line
    assert not (workshop.runs / "never").exists()
