"""Going on with a run under another DeepSpeed config: what is shown, what is refused, what is saved."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from codeparrot_ds.checkpoint.folders import publish, staging_folder
from codeparrot_ds.checkpoint.run_folder import check_ds_continuation, open_run
from codeparrot_ds.config.run_config import RunConfig
from codeparrot_ds.errors import UserError
from codeparrot_ds.launch.preflight import check_run

SAVED = {"zero_optimization": {"stage": 2}, "optimizer": {"type": "AdamW"}}
LION = {"zero_optimization": {"stage": 2}, "optimizer": {"type": "Lion"}}
STAGE3 = {"zero_optimization": {"stage": 3}, "optimizer": {"type": "AdamW"}}


def free_port():
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


@pytest.fixture
def config(tmp_path):
    return RunConfig(output_dir=str(tmp_path), run_name="brave-otter-7")


@pytest.fixture
def run(config, tmp_path):
    """A run's folder with a saved config and a checkpoint."""
    path = tmp_path / "brave-otter-7"
    open_run(config, SAVED, 2, ["here"], {"zero_optimization.stage": "zero2.json:3"})
    checkpoint = path / "checkpoints" / "step-00000005"
    checkpoint.mkdir()
    (checkpoint / "manifest.json").write_text("{}")
    return path


def test_sources_are_saved_beside_the_config(run):
    assert json.loads((run / "ds_config.json").read_text()) == SAVED
    assert json.loads((run / "ds_config_sources.json").read_text()) == {"zero_optimization.stage": "zero2.json:3"}


def test_safe_changes_are_told_and_the_new_config_is_saved(config, run):
    assert list(map(str, check_ds_continuation(config, run, STAGE3))) == ["zero_optimization.stage 2 -> 3"]
    assert check_ds_continuation(config, run, SAVED) == []


def test_another_optimizer_is_refused_before_anything_is_written(config, run):
    with pytest.raises(UserError, match='cannot continue the run: optimizer.type "AdamW" -> "Lion"'):
        check_ds_continuation(config, run, LION)
    with pytest.raises(UserError, match="cannot continue the run"):
        open_run(config, LION, 2, ["here"])
    assert json.loads((run / "ds_config.json").read_text()) == SAVED


def test_a_checkpoint_given_by_path_is_compared_with_its_own_run(config, run, tmp_path):
    elsewhere = RunConfig(
        output_dir=str(tmp_path), run_name="calm-fern-8", resume=str(run / "checkpoints" / "step-00000005")
    )
    with pytest.raises(UserError, match="cannot continue"):
        check_ds_continuation(elsewhere, tmp_path / "calm-fern-8", LION)
    assert len(check_ds_continuation(elsewhere, tmp_path / "calm-fern-8", STAGE3)) == 1


def test_nothing_is_compared_where_nothing_is_restored(config, tmp_path):
    path = tmp_path / "brave-otter-7"
    open_run(config, SAVED, 2, ["here"])
    assert check_ds_continuation(config, path, LION) == []  # no checkpoint yet
    never = RunConfig(output_dir=str(tmp_path), run_name="brave-otter-7", resume="never")
    assert check_ds_continuation(never, path, LION) == []


# --------------------------------------------------------------------------------------------------------------------
# The front door and the ranks


def test_the_front_door_shows_warnings_and_changes_once(make_config, tmp_path, capsys):
    own = tmp_path / "own.json"
    own.write_text('{"zero_optimization": {"stage": 3, "reduce_bucket_size": 1e6, "round_robin_gradients": true}}')
    config = make_config(deepspeed=str(own))
    run = Path(config.output_dir) / config.run_name
    open_run(config, check_run(make_config(), device="cpu", world_size=2).ds_config, 2, ["here"])
    staging = staging_folder(run / "checkpoints", 5)
    staging.mkdir()
    publish(staging, 5, {})
    capsys.readouterr()
    check_run(config, device="cpu", world_size=2)
    warning, changed = capsys.readouterr().err.splitlines()
    assert warning == (
        f"{own}:1: warning: zero_optimization.round_robin_gradients: does nothing at stage 3: it is for stages 1-2"
    )
    assert changed.startswith(f"{run} resumes with another DeepSpeed config: zero_optimization.stage 2 -> 3; ")


def test_every_error_of_the_file_is_told_before_a_rank_starts(make_config, tmp_path):
    own = tmp_path / "own.json"
    own.write_text('{\n"zero_optimization": {"stage": 2, "overlap_com": true},\n"fp61": {}\n}')
    with pytest.raises(UserError) as caught:
        check_run(make_config(deepspeed=str(own)), device="cpu", world_size=2)
    assert f"{own}:2: error: zero_optimization.overlap_com" in str(caught.value)
    assert f"{own}:3: error: fp61" in str(caught.value)


def test_a_rank_that_was_started_without_the_front_door_checks_as_well(make_config, tmp_path):
    own = tmp_path / "own.json"
    own.write_text('{"zero_optimization": {"stage": 2}, "fp61": {"enabled": true}}')
    command = [sys.executable, "-m", "codeparrot_ds.train", "demo", "--deepspeed", str(own)]
    config = make_config()
    for field in ("data", "tokenizer", "output_dir", "run_name", "hub", "wandb"):
        command += ["--" + field, str(getattr(config, field))]
    environment = os.environ | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "DS_ACCELERATOR": "cpu"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert answer.returncode == 2
    assert "fp61: unknown key, which DeepSpeed 0.19.8 ignores; did you mean 'fp16'?" in answer.stderr
    assert not Path(config.output_dir).exists()
