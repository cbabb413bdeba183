"""What a checkpoint holds beside its tensors: files that other versions read as they read their own."""

from __future__ import annotations

import dataclasses
import json
import tarfile
from pathlib import Path

import pytest

from codeparrot_ds.checkpoint.folders import STATE, Checkpoint, checkpoint_folders
from codeparrot_ds.checkpoint.state import read_state, state_as_json
from codeparrot_ds.durable import json_bytes
from codeparrot_ds.metrics import EvaluationRow

ARCHIVE = Path(__file__).parents[1] / "fixtures" / "0.1.0.tar.xz"


@pytest.fixture(scope="module")
def old(tmp_path_factory) -> list[Checkpoint]:
    """The checkpoints that version 0.1.0 wrote."""
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return [checkpoint for run in (folder / "runs").iterdir() for checkpoint in checkpoint_folders(run / "checkpoints")]


def test_a_state_of_0_1_0_is_written_again_byte_for_byte(old):
    assert len(old) >= 12
    for checkpoint in old:
        written = json_bytes(state_as_json(*read_state(checkpoint)))
        assert written == (checkpoint.path / STATE).read_bytes(), checkpoint


def test_an_import_and_optional_figures_come_back(old):
    state, engine = read_state(old[0])
    row = dataclasses.replace(state.evaluations[-1], parsing_share=0.5, bits_per_byte=None)
    state = dataclasses.replace(state, evaluations=[row], imported={"tag": "global_step4"})
    content = state_as_json(state, engine)
    assert content["extra"]["imported"] == {"tag": "global_step4"}
    (kept,) = content["extra"]["evaluations"]
    assert kept["bits_per_byte"] is None and kept["parsing_share"] == 0.5 and "pass_at_1" not in kept
    assert EvaluationRow.from_json(json.loads(json.dumps(kept)) | {"of_a_later_version": 1}) == row
