"""Going on with a run under another DeepSpeed config: what is shown, what is refused, what is saved."""

import json

import pytest

from codeparrot_ds.config import RunConfig
from codeparrot_ds.errors import UserError
from codeparrot_ds.run.folder import check_ds_continuation, open_run

SAVED = {"zero_optimization": {"stage": 2}, "optimizer": {"type": "AdamW"}}
LION = {"zero_optimization": {"stage": 2}, "optimizer": {"type": "Lion"}}
STAGE3 = {"zero_optimization": {"stage": 3}, "optimizer": {"type": "AdamW"}}


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
