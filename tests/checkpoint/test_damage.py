"""Any damage to any file of a real checkpoint is found, the file is named, and the checkpoint before it is used."""

import json
import logging
import random
import re
import shutil

import pytest

from codeparrot_ds.checkpoint.folders import Checkpoint
from codeparrot_ds.training import publish
from tests.torture.tiny_run import TinyRun

SEED = 20_261
KINDS = {  # by the names of their files, "#" for numbers: how many bytes of each are flipped
    "manifest.json": 150,
    "state.json": 40,
    "data.json": 40,
    "fragments-#-#.safetensors": 60,
    "rng-#.safetensors": 40,
    "export/model.safetensors": 60,
    "export/config.json": 20,
    "export/generation_config.json": 20,
    "export/README.md": 10,
    "export/training_state.json": 20,
    "export/tokenizer.json": 20,
    "export/tokenizer_config.json": 20,
}


@pytest.fixture(scope="module")
def run(only_rank, tokenizer_dir, tmp_path_factory):
    """A run with checkpoints of steps 10 and 20, saved from a DeepSpeed engine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(publish, "start_drain", lambda run: None)
        run = TinyRun(tokenizer_dir, tmp_path_factory.mktemp("runs") / "brave-otter-7")
        for step in (10, 20):
            run.train_step()
            assert run.save(step).error is None
        yield run


@pytest.fixture
def damaged(run, tmp_path):
    """Its newest checkpoint, to be damaged; whole again afterwards."""
    newest = Checkpoint.of_step(run.checkpoints, 20).path
    shutil.copytree(newest, tmp_path / "whole")
    yield newest
    for aside in run.checkpoints.glob("aside-*"):
        shutil.rmtree(aside)
    shutil.rmtree(newest, ignore_errors=True)
    shutil.copytree(tmp_path / "whole", newest)


def test_the_kinds_are_all_there_are(damaged):
    names = [str(path.relative_to(damaged)) for path in damaged.rglob("*") if path.is_file()]
    assert {re.sub(r"\d{3,}", "#", name) for name in names} == KINDS.keys()


def a_file(checkpoint, kind):
    (path,) = [
        path for path in checkpoint.rglob("*") if re.sub(r"\d{3,}", "#", str(path.relative_to(checkpoint))) == kind
    ]
    return path


def truncated(content, draw):
    return content[: draw.randrange(len(content))]


def flipped(content, draw):
    place = draw.randrange(len(content))
    return content[:place] + bytes([content[place] ^ draw.randrange(1, 256)]) + content[place + 1 :]


def swapped(content, draw):
    """Two neighbouring pieces of 8 bytes in the wrong order: as many of each byte as before."""
    place = draw.randrange(len(content) - 16)
    first, second = content[place : place + 8], content[place + 8 : place + 16]
    return flipped(content, draw) if first == second else content[:place] + second + first + content[place + 16 :]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damage", [truncated, flipped, swapped])
def test_damage_at_any_place_is_found_and_named(damaged, kind, damage):
    path = a_file(damaged, kind)
    whole, draw = path.read_bytes(), random.Random(f"{SEED} {kind} {damage.__name__}")
    for _ in range(KINDS[kind]):
        content = damage(whole, draw)
        path.write_bytes(content)
        problems = Checkpoint(damaged).damage()
        assert len(problems) == 1 and path.name in problems[0] and str(damaged) in problems[0], problems
        # Each rank verifies a share of the files; one of three finds it (each of them, for the manifest).
        shares = [Checkpoint(damaged).damage(share=share, num_shares=3) for share in range(3)]
        assert {problem for share in shares for problem in share} == set(problems)
    path.write_bytes(whole)
    assert Checkpoint(damaged).damage() == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damage", [truncated, flipped, None], ids=["truncated", "flipped", "deleted"])
def test_a_start_uses_the_checkpoint_before(run, damaged, kind, damage, caplog, monkeypatch):
    path = a_file(damaged, kind)
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes(), random.Random(f"{SEED} {kind}")))
    monkeypatch.setattr(logging.getLogger("codeparrot_ds"), "propagate", True)
    found = run.newest()
    assert found == Checkpoint.of_step(run.checkpoints, 10)
    assert run.load(found).state.step == 10
    said = [record.getMessage() for record in caplog.records]
    assert any("damaged checkpoint left out" in line and path.name in line for line in said), said
    assert "step-00000020 was set aside as aside-step-00000020" in said
    assert not damaged.exists()


@pytest.mark.parametrize("content", ["", "{", "no such folder", '{"checkpoint": "step-00000099", "step": 99}'])
def test_the_pointer_is_for_people(run, damaged, content):
    """A start looks at the folders: nothing hangs on ``latest``, and it is put right."""
    latest = run.checkpoints / "latest"
    latest.write_text(content)
    assert run.newest() == Checkpoint(damaged)
    assert json.loads(latest.read_text()) == {"checkpoint": "step-00000020", "step": 20}
