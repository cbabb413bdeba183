"""A run that is stopped, killed, damaged or moved to another layout goes on with the same losses."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time

import psutil
import pytest
from stories import REPOSITORY, clean_environment, losses, metrics, run_command

STEPS = ("--max-train-steps", "20", "--save-checkpoint-steps", "10")


@pytest.fixture(scope="module")
def with_dropout(workshop):
    """An uninterrupted run with dropout, whose masks come from each rank's own generator."""
    process = workshop.train("--run-name", "dropout", "--dropout", "0.1", "--deepspeed", "zero2", *STEPS)
    assert process.returncode == 0, process.stderr[-3000:]
    return workshop.runs / "dropout"


@pytest.fixture
def stopped_at_10(with_dropout, tmp_path):
    """The same run as it was after step 10, in a folder of its own."""
    run = tmp_path / with_dropout.name
    shutil.copytree(with_dropout, run)
    shutil.rmtree(run / "checkpoints" / "step-00000020")
    return run


def test_resume_with_dropout_is_exact(workshop, with_dropout, stopped_at_10):
    process = workshop.train(
        *("--run-name", "dropout", "--dropout", "0.1", "--deepspeed", "zero2", *STEPS), output_dir=stopped_at_10.parent
    )
    assert process.returncode == 0, process.stderr[-3000:]
    assert losses(stopped_at_10) == losses(with_dropout)


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(workshop, with_dropout, tmp_path):
    run = tmp_path / "dropout"
    shutil.copytree(with_dropout, run)
    damaged = run / "checkpoints" / "step-00000020" / "fragments-00001.safetensors"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    process = workshop.train(
        *("--run-name", "dropout", "--dropout", "0.1", "--deepspeed", "zero2", *STEPS), output_dir=tmp_path
    )
    assert process.returncode == 0, process.stderr[-3000:]
    assert "step-00000020/fragments-00001.safetensors is damaged" in process.stderr
    assert "resumed from step 10" in process.stderr
    assert losses(run) == losses(with_dropout)


def test_a_run_goes_on_at_another_layout(workshop, tmp_path):
    """Two ranks at stage 3 until step 10, then one rank at stage 1: the losses are those of a run that never moved."""
    fp32 = ("--save-checkpoint-steps", "10", "--max-train-steps", "20", "--run-name", "elastic")
    for folder, arguments in (("moved", ("--deepspeed", "zero3_fp32")), ("whole", ("--deepspeed", "zero1_fp32"))):
        process = workshop.train(*fp32, *arguments, output_dir=tmp_path / folder)
        assert process.returncode == 0, process.stderr[-3000:]
    moved, whole = tmp_path / "moved" / "elastic", tmp_path / "whole" / "elastic"
    shutil.rmtree(moved / "checkpoints" / "step-00000020")
    process = workshop.train(*fp32, "--deepspeed", "zero1_fp32", "--num-gpus", "1", output_dir=tmp_path / "moved")
    assert process.returncode == 0, process.stderr[-3000:]
    assert "world_size 2 -> 1" in process.stderr and "zero_stage 3 -> 1" in process.stderr
    assert max(abs(losses(moved)[step] - losses(whole)[step]) for step in range(11, 21)) <= 1e-5


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_at_the_next_step_and_the_run_goes_on(workshop, with_dropout, tmp_path, number):
    arguments = ("--run-name", "dropout", "--dropout", "0.1", "--deepspeed", "zero2", *STEPS)
    command = workshop.command(*arguments, output_dir=tmp_path)
    process = subprocess.Popen(command, cwd=REPOSITORY, env=clean_environment(), stderr=subprocess.PIPE, text=True)
    run = tmp_path / "dropout"
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").is_file() or not losses(run):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    ranks = [child for child in psutil.Process(process.pid).children(recursive=True)]
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said[-3000:]
    assert not [child for child in ranks if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    outcome = json.loads((run / "run.json").read_text())["outcome"]
    assert outcome["status"] == "stopped" and 0 < outcome["step"] < 20
    assert (run / "checkpoints" / f"step-{outcome['step']:08d}" / "manifest.json").is_file()
    if number == signal.SIGTERM:
        process = workshop.train(*arguments, output_dir=tmp_path)
        assert process.returncode == 0, process.stderr[-3000:]
        assert f"resumed from step {outcome['step']}" in process.stderr
        # A save at another step makes the C++ Adam compute beta^t afresh there: equal to rounding, not to the bit.
        assert losses(run) == pytest.approx(losses(with_dropout), abs=2e-3)


def test_killed_ranks_lose_nothing_that_was_saved(workshop, with_dropout, tmp_path):
    arguments = ("--run-name", "dropout", "--dropout", "0.1", "--deepspeed", "zero2", *STEPS)
    command = workshop.command(*arguments, output_dir=tmp_path)
    process = subprocess.Popen(command, cwd=REPOSITORY, env=clean_environment(), stderr=subprocess.PIPE, text=True)
    run = tmp_path / "dropout"
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").is_file() or max(losses(run), default=0) < 12:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    for child in psutil.Process(process.pid).children(recursive=True):
        if "--local_rank=1" in child.cmdline():
            child.kill()
            break
    _, said = process.communicate(timeout=90)
    assert process.returncode != 0, said[-3000:]
    process = workshop.train(*arguments, output_dir=tmp_path)
    assert process.returncode == 0, process.stderr[-3000:]
    assert "resumed from step 10" in process.stderr
    assert losses(run) == losses(with_dropout)
    assert [row["step"] for row in metrics(run) if "loss" in row] == list(range(1, 21))


def test_the_launcher_itself_and_a_finished_run(workshop, tmp_path):
    """`deepspeed --module codeparrot_ds.train` gives the same run; asked again, a finished run has nothing to do."""
    arguments = workshop.command("--run-name", "bare", "--max-train-steps", "3", output_dir=tmp_path)[4:]
    launcher = ["deepspeed", "--num_gpus", "2", "--module", "codeparrot_ds.train", *arguments]
    process = run_command(launcher, env=clean_environment(DS_ACCELERATOR="cpu"))
    assert process.returncode == 0, process.stderr[-3000:]
    front_door = workshop.train("--run-name", "front", "--max-train-steps", "3", output_dir=tmp_path)
    assert front_door.returncode == 0, front_door.stderr[-3000:]
    assert losses(tmp_path / "bare") == losses(tmp_path / "front")
    again = workshop.train("--run-name", "front", "--max-train-steps", "3", output_dir=tmp_path)
    assert again.returncode == 0 and "resumed from step 3" in again.stderr
    assert len(losses(tmp_path / "front")) == 3
