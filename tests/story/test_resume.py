"""A run that is stopped or damaged goes on with the same losses; ``test_kills.py`` kills them."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import subprocess
import time

import psutil
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from codeparrot_ds.checkpoint.folders import list_checkpoints
from tests.needs import needs
from tests.story.stories import REPOSITORY, STEPS, clean_environment, evaluations, log, losses, metrics, run_command


@pytest.fixture
def with_dropout(on_two_ranks):
    """An uninterrupted run with dropout, whose masks come from each rank's own generator."""
    return on_two_ranks["dropout"]


@needs(on_two_ranks=["dropout"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(workshop, with_dropout, tmp_path):
    run = tmp_path / "dropout"
    shutil.copytree(with_dropout, run)
    damaged = run / "checkpoints" / "step-00000020" / "fragments-00001-000.safetensors"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    process = workshop.train(
        *("--run-name", "dropout", "--dropout", "0.1", "--deepspeed", "zero2", "--num-gpus", "2", *STEPS),
        output_dir=tmp_path,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    assert "step-00000020/fragments-00001-000.safetensors is damaged" in process.stderr
    assert "step-00000020 was set aside as aside-step-00000020" in process.stderr
    assert (run / "checkpoints" / "aside-step-00000020" / damaged.name).read_bytes() == content
    assert "resumed from step 10" in process.stderr
    assert losses(run) == losses(with_dropout)
    assert evaluations(run) == evaluations(with_dropout)


@needs(on_two_ranks=["dropout"])
def test_a_signal_saves_at_the_next_step_and_the_run_goes_on(workshop, with_dropout, tmp_path):
    """SIGINT; ``test_demo.py`` stops a demo with SIGTERM."""
    arguments = ("--run-name", "dropout", "--dropout", "0.1", "--deepspeed", "zero2", "--num-gpus", "2", *STEPS)
    command = workshop.command(*arguments, output_dir=tmp_path)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=REPOSITORY, env=clean_environment(), **pipes)
    run = tmp_path / "dropout"
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").is_file() or not losses(run):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    ranks = [child for child in psutil.Process(process.pid).children(recursive=True)]
    process.send_signal(signal.SIGINT)
    told, said = process.communicate(timeout=60)
    assert process.returncode == 0, said[-3000:]
    assert not [child for child in ranks if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    outcome = json.loads((run / "run.json").read_text())["outcome"]
    assert outcome["status"] == "stopped" and 0 < outcome["step"] < 20
    assert (run / "checkpoints" / f"step-{outcome['step']:08d}" / "manifest.json").is_file()
    proposed = shlex.split(told.partition("Stopped and saved. Continue with:")[2])
    assert proposed == ["codeparrot-ds", *command[3:]]
    process = run_command([*command[:3], *proposed[1:]])
    assert process.returncode == 0, process.stderr[-3000:]
    assert f"resumed from step {outcome['step']}" in process.stderr
    assert losses(run) == losses(with_dropout)


@needs(on_two_ranks=["zero3_fp32"], on_one_rank=["imported"])
def test_a_checkpoint_of_deepspeeds_own_goes_on_at_another_stage_and_world_size(on_two_ranks, on_one_rank):
    """Saved by the engine at stage 3 on two ranks, imported, trained at stage 1 on one: the next rows and losses."""
    whole, imported = losses(on_two_ranks["zero3_fp32"]), losses(on_one_rank["imported"])
    assert "resumed from step 10" in log(on_one_rank["imported"])
    assert list(imported) == list(range(11, 21))
    assert all(abs(loss - whole[step]) <= 2e-6 for step, loss in imported.items())
    assert json.loads((on_one_rank["imported"] / "run.json").read_text())["outcome"]["status"] == "finished"


@needs(on_two_ranks=["zero3_fp32"], continued=["back"])
def test_a_run_that_goes_back_to_an_older_checkpoint_sets_the_later_one_aside(on_two_ranks, continued):
    run = continued["back"]
    assert "step-00000020 was set aside as aside-step-00000020" in log(run)
    assert losses(run) == losses(on_two_ranks["zero3_fp32"])
    rows = [(row.step, row.aside) for row in list_checkpoints(run)]
    assert rows == [(10, False), (20, True), (20, False)]
    shown = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [event.step for event in shown.Scalars("train/loss")] == list(range(1, 21))
    assert [event.step for event in shown.Scalars("validation/perplexity")] == list(evaluations(run))
    assert len(list((run / "tensorboard").iterdir())) > 1


@needs(on_two_ranks=["zero2"], continued=["new batch"])
def test_another_batch_size_goes_on_with_the_next_rows(workshop, on_two_ranks, continued):
    whole, run = on_two_ranks["zero2"], continued["new batch"]
    assert "warning: the learning rate jumps from 0 to 4.77e-05" in log(run)  # it had finished at step 20
    refused = workshop.refuse("--run-name", whole.name, "--global-batch-size", "16", "--max-train-steps", "24")
    assert refused.returncode == 2 and "--on-batch-change continue" in refused.stderr
    before, after = (
        json.loads((each / "checkpoints" / f"step-{step:08d}" / "data.json").read_text())
        for each, step in ((whole, 20), (run, 24))
    )
    assert (before["rows"], after["rows"]) == (20 * 8, 20 * 8 + 4 * 16)
    tokens = {step: row["tokens"] for row in metrics(run) if "loss" in row for step in [row["step"]]}
    assert (tokens[20], tokens[24]) == (160 * 64, 224 * 64)
    assert json.loads((run / "run.json").read_text())["data"]["rows_per_lane"] == [28] * 8
