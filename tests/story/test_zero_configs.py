"""DeepSpeed configs through the real launcher: equal data gives equal losses, and a run goes on as if never stopped.

``tests/zero/test_catalogue.py`` trains every shipped file; here are the stages and precisions, and where Adam's states
may lie.
"""

from __future__ import annotations

import concurrent.futures
import json
import math
import shutil

import pytest
from stories import clean_environment, evaluations, losses, metrics, run_command

from codeparrot_ds.zero.catalogue import catalogue

COMPARED = [f"zero{stage}{suffix}" for suffix in ("", "_fp32") for stage in range(4)]
# Adam's states in the host's memory, and on the disk.
OTHERS = ["zero2_offload", "zero3_nvme"]


@pytest.mark.parametrize("name", COMPARED + OTHERS)
def test_config_trains(trained, name):
    run = trained(name)
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
def test_fp32_losses_agree(trained, stage, ranks):
    if ranks == 1 and stage % 2 == 0:  # two runs of one rank take little longer than one
        with concurrent.futures.ThreadPoolExecutor() as pool:
            list(pool.map(lambda each: trained(f"zero{each}_fp32", 1), (stage, stage + 1)))
    reference, other = losses(trained("zero0_fp32")), losses(trained(f"zero{stage}_fp32", ranks))
    assert reference.keys() == other.keys() and len(other) == 20
    assert max(abs(reference[step] - other[step]) for step in reference) <= 1e-5


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_bf16_losses_agree(trained, stage):
    reference, other = losses(trained("zero1")), losses(trained(f"zero{stage}"))
    assert max(abs(reference[step] - other[step]) for step in reference) <= 5e-3


def test_validation_loss_is_the_same_at_any_world_size(trained):
    for step, loss in evaluations(trained("zero1_fp32", 1)).items():
        assert evaluations(trained("zero1_fp32", 2))[step] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("name", ["zero0", "zero1", "zero3", "zero0_fp32"])
def test_resume_is_exact(workshop, trained, tmp_path, name):
    """A run that stopped after step 10 has the losses of steps 11 to 20 of the one that never stopped.

    ZeRO-2, with dropout on top, is in ``test_resume.py``.
    """
    whole = trained(name)
    shutil.copytree(whole, tmp_path / whole.name)
    shutil.rmtree(tmp_path / whole.name / "checkpoints" / "step-00000020")
    process = workshop.train(
        *("--deepspeed", name, "--num-gpus", "2", "--run-name", whole.name, "--max-train-steps", "20"),
        *("--save-checkpoint-steps", "10"),
        output_dir=tmp_path,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    assert "resumed from step 10" in process.stderr
    assert losses(tmp_path / whole.name) == losses(whole)
    assert evaluations(tmp_path / whole.name) == evaluations(whole)


def test_a_run_goes_on_at_another_layout(workshop, trained, tmp_path):
    """Two ranks at stage 3 until step 10, then one rank at stage 1: the losses are those of a run that never moved."""
    moved = tmp_path / "zero3_fp32-on-2"
    shutil.copytree(trained("zero3_fp32"), moved)
    shutil.rmtree(moved / "checkpoints" / "step-00000020")
    process = workshop.train(
        *("--deepspeed", "zero1_fp32", "--num-gpus", "1", "--run-name", moved.name, "--max-train-steps", "20"),
        *("--save-checkpoint-steps", "10"),
        output_dir=tmp_path,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    assert "world_size 2 -> 1" in process.stderr and "zero_stage 3 -> 1" in process.stderr
    whole = losses(trained("zero1_fp32"))
    assert max(abs(loss - whole[step]) for step, loss in losses(moved).items()) <= 1e-5


def test_the_launcher_itself_gives_the_same_run(workshop, trained, tmp_path):
    """`deepspeed --module codeparrot_ds.train` gives the front door's run; a finished run has nothing left to do."""
    arguments = (
        *("--run-name", "bare", "--deepspeed", "zero2", "--max-train-steps", "20"),
        *("--save-checkpoint-steps", "10"),
    )
    command = workshop.command(*arguments, output_dir=tmp_path)[4:]
    launcher = ["deepspeed", "--num_gpus", "2", "--module", "codeparrot_ds.train", *command]
    process = run_command(launcher, env=clean_environment(DS_ACCELERATOR="cpu"))
    assert process.returncode == 0, process.stderr[-3000:]
    assert losses(tmp_path / "bare") == losses(trained("zero2"))
    again = workshop.train(*arguments, output_dir=tmp_path)
    assert again.returncode == 0 and "resumed from step 20" in again.stderr
    assert len(losses(tmp_path / "bare")) == 20


@pytest.mark.parametrize("name", [name for name in catalogue() if name.endswith("_fp16")])
def test_fp16_is_refused_on_a_cpu_before_any_rank_starts(workshop, name):
    process = workshop.train("--deepspeed", name, "--run-name", "never", "--max-train-steps", "5")
    assert process.returncode == 2
    (line,) = process.stderr.strip().splitlines()
    assert "fp16" in line and "GPU" in line and f"zero{name[4]}" in line
    assert not (workshop.runs / "never").exists()
