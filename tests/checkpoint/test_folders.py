"""Checkpoint folders: complete or invisible, damage named, the newest valid one found."""

import json
import os
import shutil
from pathlib import Path

import pytest

from codeparrot_ds.checkpoint.folders import (
    LATEST,
    MANIFEST,
    SEAL,
    Checkpoint,
    CheckpointRow,
    NewerFormatError,
    checkpoint_folders,
    list_checkpoints,
    newest_export,
    publish,
    readable_checkpoints,
    recover,
    remove_old,
    sealed,
    set_aside,
    staging_folder,
)
from codeparrot_ds.durable import write_file, write_json
from codeparrot_ds.errors import UserError


@pytest.fixture
def checkpoints(tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def stage(checkpoints: Path, step: int, content: str = "weights") -> tuple[Path, dict]:
    """Writes the files of a checkpoint into its staging folder and returns it with the manifest's table."""
    staging = staging_folder(checkpoints, step)
    (staging / "export").mkdir(parents=True)
    contents = {"state.json": json.dumps({"step": step}), "export/model.safetensors": f"{content} {step}" * 100}
    return staging, {name: write_file(staging / name, [text.encode()]) for name, text in contents.items()}


def save(checkpoints: Path, step: int, content: str = "weights") -> Checkpoint:
    staging, files = stage(checkpoints, step, content)
    return publish(staging, step, files)


def newest_valid(checkpoints: Path) -> tuple[Checkpoint | None, list[str]]:
    """What a start of the run looks for: the newest checkpoint that holds, and what is wrong with the newer ones."""
    problems: list[str] = []
    for checkpoint, problem in readable_checkpoints(checkpoints):
        damage = [problem] if problem else checkpoint.damage()
        if not damage:
            return checkpoint, problems
        problems += damage
    return None, problems


def test_a_published_checkpoint_is_whole_and_pointed_to(checkpoints):
    final = save(checkpoints, 50)
    assert final.name == "step-00000050"
    assert final.damage() == []
    assert newest_valid(checkpoints) == (final, [])
    assert json.loads((checkpoints / LATEST).read_text()) == {"checkpoint": "step-00000050", "step": 50}
    assert not staging_folder(checkpoints, 50).exists()
    assert final.step == final.read_json(MANIFEST)["step"] == 50
    assert sorted(final.manifest().files) == ["export/model.safetensors", "state.json"]


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def write_manifest(checkpoint: Checkpoint, content: dict) -> None:
    write_json(checkpoint.path / MANIFEST, sealed({key: value for key, value in content.items() if key != SEAL}))


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def make_unreadable(path: Path) -> None:
    """Reading it fails with EIO, as from a bad sector, whoever reads."""
    path.unlink()
    path.symlink_to("/proc/self/mem")
    checkpoint = Checkpoint(path.parents[1])
    content = checkpoint.read_json(MANIFEST)
    content["files"]["export/model.safetensors"]["bytes"] = 0
    write_manifest(checkpoint, content)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncate, "has 999 bytes instead of 1000"),
        (Path.unlink, "is missing"),
        (flip_a_bit, "is damaged: its SHA-256"),
        (make_unreadable, "cannot be read"),
    ],
)
def test_damage_is_named_and_the_next_older_one_is_used(checkpoints, damage, words):
    older = save(checkpoints, 9)
    newer = save(checkpoints, 10)
    broken = newer.export / "model.safetensors"
    damage(broken)
    problems = newer.damage()
    assert len(problems) == 1 and str(broken) in problems[0] and words in problems[0]
    assert newest_valid(checkpoints) == (older, problems)


def test_every_damaged_file_is_named(checkpoints):
    final = save(checkpoints, 10)
    truncate(final.path / "state.json")
    (final.export / "model.safetensors").unlink()
    assert len(final.damage()) == 2


def test_none_is_valid(checkpoints):
    for step in (10, 20):
        truncate(save(checkpoints, step).path / "state.json")
    found, problems = newest_valid(checkpoints)
    assert found is None and ["step-00000020" in problem for problem in problems] == [True, False]
    assert newest_valid(checkpoints.parent / "nowhere") == (None, [])


@pytest.mark.parametrize("content", [None, "", "{", "[]", '"text"', "{}", '{"format": 1, "files": []}', "\xff\xfe"])
def test_a_manifest_that_is_none(checkpoints, content):
    older, newer = save(checkpoints, 10), save(checkpoints, 20)
    if content is None:
        (newer.path / MANIFEST).unlink()
    else:
        (newer.path / MANIFEST).write_text(content, encoding="latin-1")
    found, problems = newest_valid(checkpoints)
    assert found == older
    assert len(problems) == 1 and "step-00000020" in problems[0] and MANIFEST in problems[0]


def test_a_flipped_bit_anywhere_in_the_manifest_is_found(checkpoints):
    final = save(checkpoints, 10)
    manifest = final.path / MANIFEST
    whole = manifest.read_bytes()
    for position in range(len(whole)):
        flipped = whole[position] ^ 1 << position % 8
        manifest.write_bytes(whole[:position] + bytes([flipped]) + whole[position + 1 :])
        (problem,) = final.damage()
        assert str(manifest) in problem or f"{final} is not a complete checkpoint: {MANIFEST}" in problem
        assert [row.complete for row in list_checkpoints_of(final)] == [False]


def list_checkpoints_of(checkpoint: Checkpoint) -> list[CheckpointRow]:
    (checkpoint.run / "run.json").write_text("{}")
    return list_checkpoints(checkpoint.run)


def test_a_newer_format_is_refused_by_name(checkpoints):
    final = save(checkpoints, 10)
    write_manifest(final, final.read_json(MANIFEST) | {"format": 2})
    (problem,) = final.damage()
    assert "step-00000010 has format 2" in problem and "update codeparrot-ds" in problem
    with pytest.raises(NewerFormatError, match="update codeparrot-ds"):
        readable_checkpoints(checkpoints)


def test_a_half_written_checkpoint_is_never_seen(checkpoints):
    older = save(checkpoints, 10)
    staging, files = stage(checkpoints, 20)
    assert newest_valid(checkpoints) == (older, [])
    table = {name: {"bytes": file.num_bytes, "sha256": file.sha256} for name, file in files.items()}
    write_json(staging / MANIFEST, {"format": 1, "step": 20, "created": "", "files": table})  # killed before the rename
    assert newest_valid(checkpoints) == (older, [])
    assert checkpoint_folders(checkpoints) == [older]
    assert [row.step for row in list_checkpoints_of(older)] == [10]
    assert newest_export(checkpoints.parent) == older.export


@pytest.mark.parametrize("same_step", [False, True])
def test_a_kill_at_any_call_of_publish_leaves_a_whole_checkpoint(checkpoints, monkeypatch, same_step):
    """Each call to the system on the way fails once, as if the process had died there."""
    calls = [(os, name) for name in ("open", "write", "fsync", "rename", "rmdir", "unlink")] + [(shutil, "rmtree")]
    reached = 0
    for owner, name in calls:
        for number in range(30):
            for folder in checkpoints.iterdir():
                shutil.rmtree(folder) if folder.is_dir() else folder.unlink()
            older = save(checkpoints, 10)
            if same_step:
                save(checkpoints, 20, "first")
            staging, files = stage(checkpoints, 20, "second")
            if not dies_at(monkeypatch, owner, name, number, lambda: publish(staging, 20, files)):  # noqa: B023
                break
            reached += 1
            recover(checkpoints)
            found, problems = newest_valid(checkpoints)
            # A step that was there before is there after, in one version or the other.
            saved = Checkpoint.of_step(checkpoints, 20)
            allowed = (saved,) if same_step else (older, saved)
            assert found in allowed and problems == [], (name, number)
            names = {path.name for path in checkpoints.iterdir()}
            assert not [path for path in names if path.startswith((".staging", ".replaced"))]
    assert reached > 10


class Killed(BaseException):
    """Not an Exception: nothing on the way may tidy up."""


def dies_at(monkeypatch, owner, name, number, work) -> bool:
    """Runs ``work`` until the call ``number`` of ``owner.name``; False when there are fewer calls."""
    real, count = getattr(owner, name), -1

    def dying(*args, **kwargs):
        nonlocal count
        count += 1
        if count == number:
            raise Killed
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, dying)
        try:
            work()
        except Killed:
            return True
    return False


def test_saving_the_same_step_again_replaces_it(checkpoints):
    save(checkpoints, 20, "first")
    final = save(checkpoints, 20, "second")
    assert (final.export / "model.safetensors").read_text().startswith("second")
    assert final.damage() == []
    assert [path.name for path in checkpoints.iterdir() if path.is_dir()] == ["step-00000020"]


def test_retention_keeps_the_newest(checkpoints):
    # Not alphabetical: a run may pass 99,999,999 steps.
    for step in (5, 100, 123_456_789, 99_999_999):
        save(checkpoints, step)
    removed = remove_old(checkpoints, newest=2)
    assert [checkpoint.name for checkpoint in removed] == ["step-00000100", "step-00000005"]
    assert [checkpoint.name for checkpoint in checkpoint_folders(checkpoints)] == ["step-123456789", "step-99999999"]
    assert sorted(path.name for path in checkpoints.iterdir()) == [LATEST, "step-123456789", "step-99999999"]


def test_retention_keeps_each_mth_and_the_best(checkpoints):
    for step in range(10, 110, 10):
        save(checkpoints, step)
    remove_old(checkpoints, newest=2, every=40, best=[30])
    assert [checkpoint.step for checkpoint in checkpoint_folders(checkpoints)] == [100, 90, 80, 40, 30]
    remove_old(checkpoints, newest=1)
    assert [checkpoint.step for checkpoint in checkpoint_folders(checkpoints)] == [100]


def test_a_kill_while_removing_leaves_no_half_checkpoint(checkpoints, monkeypatch):
    for step in (10, 20):
        save(checkpoints, step)
    assert dies_at(monkeypatch, os, "rmdir", 0, lambda: remove_old(checkpoints, newest=1))
    assert [checkpoint.name for checkpoint in checkpoint_folders(checkpoints)] == ["step-00000020"]
    recover(checkpoints)
    assert sorted(path.name for path in checkpoints.iterdir()) == [LATEST, "step-00000020"]


def test_what_is_set_aside_is_out_of_the_row_and_whole(checkpoints):
    first = set_aside(save(checkpoints, 20))
    second = set_aside(save(checkpoints, 20, "again"))
    assert (first.name, second.name) == ("aside-step-00000020", "aside-step-00000020.2")
    assert first.damage() == second.damage() == []
    assert checkpoint_folders(checkpoints) == []
    recover(checkpoints)
    assert first.path.is_dir() and second.path.is_dir() and first.step == second.step == 20


def test_shares_cover_every_file_once(checkpoints):
    final = save(checkpoints, 10)
    truncate(final.path / "state.json")
    flip_a_bit(final.export / "model.safetensors")
    shares = [final.damage(share=share, num_shares=2) for share in range(2)]
    assert [len(damage) for damage in shares] == [1, 1]
    assert sorted(shares[0] + shares[1]) == final.damage()


def test_list_checkpoints(checkpoints):
    with pytest.raises(UserError, match="is not a run"):
        list_checkpoints(checkpoints.parent)
    save(checkpoints, 10)
    (save(checkpoints, 9).path / MANIFEST).unlink()
    (checkpoints / "step-notes").mkdir()
    rows = list_checkpoints_of(Checkpoint.of_step(checkpoints, 10))
    assert [(row.step, row.complete, row.files) for row in rows] == [(9, False, 0), (10, True, 2)]
    assert rows[1].bytes == 1000 + len('{"step": 10}') and rows[1].path.endswith("step-00000010")


def test_newest_export(checkpoints):
    with pytest.raises(UserError, match="no checkpoint yet"):
        newest_export(checkpoints.parent)
    first, second = save(checkpoints, 10), save(checkpoints, 20)
    assert newest_export(checkpoints.parent) == second.export
    (second.path / MANIFEST).unlink()
    assert newest_export(checkpoints.parent) == first.export


NO_STEPS = ("step-²", "step-", "step-1_0", "step-٣x", "step-10.old", "aside-step-²", "aside-step-old", "aside-step-5.x")


@pytest.mark.parametrize("name", NO_STEPS)
def test_a_folder_with_another_name_is_no_checkpoint(checkpoints, name):
    write_json(checkpoints.parent / "run.json", {})
    newest = save(checkpoints, 50)
    shutil.copytree(newest.path, checkpoints / name)
    assert checkpoint_folders(checkpoints) == [newest]
    assert [row.step for row in list_checkpoints(checkpoints.parent)] == [50]
    with pytest.raises(UserError, match=f"{name} is not named as a checkpoint is, such as step-00000500"):
        _ = Checkpoint(checkpoints / name).step


@pytest.mark.parametrize(
    "entry",
    [
        {"bytes": "many", "sha256": "ab"},
        {"bytes": True, "sha256": "ab"},
        {"bytes": 1e999, "sha256": "ab"},
        {"bytes": 1, "sha256": None},
        {"bytes": 1},
        [],
    ],
)
def test_a_manifest_with_other_values_in_it_is_damaged(checkpoints, entry):
    checkpoint = save(checkpoints, 50)
    content = json.loads((checkpoint.path / MANIFEST).read_text())
    content["files"]["state.json"] = entry
    write_manifest(checkpoint, content)
    assert checkpoint.damage() == checkpoint.damage_in_sight()
    assert [str(checkpoint.path / MANIFEST) in problem for problem in checkpoint.damage()] == [True]


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "a/../../b", "line\nline"])
def test_a_manifest_names_no_file_outside(checkpoints, name):
    checkpoint = save(checkpoints, 50)
    content = json.loads((checkpoint.path / MANIFEST).read_text())
    content["files"][name] = {"bytes": 1, "sha256": "ab"}
    write_manifest(checkpoint, content)
    (problem,) = checkpoint.damage()
    assert "not in the checkpoint's folder" in problem


def test_a_pipe_in_the_place_of_a_file_is_damage_and_no_wait(checkpoints):
    checkpoint = save(checkpoints, 50)
    (checkpoint.path / "state.json").unlink()
    os.mkfifo(checkpoint.path / "state.json")
    assert checkpoint.damage() == [f"{checkpoint.path / 'state.json'} is not a regular file"]
