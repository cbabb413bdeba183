"""Checkpoint folders on disk: complete or invisible, every byte accounted for. No torch here.

A checkpoint is written into a hidden staging folder, every file's size and SHA-256 go into ``manifest.json``,
everything is synced to the disk, and one rename makes it visible. Whoever finds a ``step-*`` folder with a manifest
that holds has a whole checkpoint; anything else is not one.
"""

from __future__ import annotations

import concurrent.futures
import datetime
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from codeparrot_ds.errors import UserError

FORMAT = 1
MANIFEST = "manifest.json"
STAGING = ".staging-"
LATEST = "latest"


def step_folder(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint of an optimizer step lives."""
    return checkpoints / f"step-{step:08d}"


def staging_folder(checkpoints: Path, step: int) -> Path:
    """Where it is written before it is complete; hidden, and never looked at when resuming."""
    return checkpoints / f"{STAGING}{step:08d}"


def file_entry(path: Path) -> dict[str, Any]:
    """Size in bytes and SHA-256 of one file, after its bytes are on the disk."""
    digest = hashlib.sha256()
    with path.open("rb+") as file:
        os.fsync(file.fileno())
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def write_json(path: Path, value: Any) -> None:
    """Writes JSON through a temporary file, synced and renamed, so that a reader sees the old or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes renames and new names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(staging: Path, final: Path, step: int, files: dict[str, dict[str, Any]]) -> None:
    """Turns a fully written staging folder into the checkpoint ``final`` and points ``latest`` at it.

    Args:
        staging: the folder with every file in place.
        final: its name as a checkpoint.
        step: the optimizer step.
        files: ``file_entry`` of every file by its path relative to ``staging``.
    """
    created = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    write_json(staging / MANIFEST, {"format": FORMAT, "step": step, "created": created, "files": files})
    for folder in {path.parent for path in staging.rglob("*")}:
        sync_folder(folder)
    if final.exists():  # The same step again, after a resume from an older one: its bytes are replaced as a whole.
        _remove(final)
    staging.rename(final)
    sync_folder(final.parent)
    write_json(final.parent / LATEST, {"checkpoint": final.name, "step": step})


def _remove(checkpoint: Path) -> None:
    # Renamed first: a kill in the middle must not leave a half-removed folder that looks like a checkpoint.
    hidden = checkpoint.with_name(f"{STAGING}{checkpoint.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    shutil.rmtree(checkpoint.rename(hidden))


class NewerFormatError(UserError):
    """A checkpoint that a later version of this program wrote: whole, but not to be read, and not to be passed over."""


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint.

    Raises:
        UserError: there is none, or it is not JSON.
        NewerFormatError: a newer version of this program wrote it.
    """
    path = checkpoint / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version, entries, created = (manifest[key] for key in ("format", "files", "created"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{checkpoint} is not a complete checkpoint: {MANIFEST} cannot be read ({error})") from error
    if isinstance(version, int) and version > FORMAT:
        raise NewerFormatError(
            f"{checkpoint} has format {version}; this version reads up to {FORMAT}: update codeparrot-ds"
        )
    whole = isinstance(version, int) and isinstance(created, str) and isinstance(entries, dict)
    if not whole or not all(
        isinstance(entry, dict) and {"bytes", "sha256"} <= entry.keys() for entry in entries.values()
    ):
        raise UserError(f"{path} is damaged: it is not a table of files with 'bytes' and 'sha256'")
    return manifest


def verify_checkpoint(checkpoint: Path) -> list[str]:
    """Compares every file with the manifest and returns the damage, one sentence a file; none when it is whole."""
    checkpoint = Path(checkpoint)
    try:
        entries = read_manifest(checkpoint)["files"]
    except UserError as error:
        return [str(error)]
    with concurrent.futures.ThreadPoolExecutor(max_workers=4) as pool:  # hashlib releases the GIL
        problems = pool.map(lambda item: _compare(checkpoint / item[0], item[1]), sorted(entries.items()))
        return [problem for problem in problems if problem]


def _compare(path: Path, entry: dict[str, Any]) -> str | None:
    if not path.is_file():
        return f"{path} is missing"
    size = path.stat().st_size
    if size != entry["bytes"]:
        return f"{path} has {size} bytes instead of {entry['bytes']}"
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    return None if digest.hexdigest() == entry["sha256"] else f"{path} is damaged: its SHA-256 is not the manifest's"


def checkpoint_folders(checkpoints: Path) -> list[Path]:
    """The visible checkpoint folders, newest step first, not yet verified."""
    folders = [path for path in checkpoints.glob("step-*") if path.name[5:].isdigit() and path.is_dir()]
    return sorted(folders, key=lambda path: int(path.name[5:]), reverse=True)


def newest_valid(checkpoints: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose every byte is right, and what is wrong with the newer ones.

    Raises:
        NewerFormatError: a later version of this program went on with the run; an older checkpoint would undo that.
    """
    problems: list[str] = []
    for folder in checkpoint_folders(checkpoints):
        try:
            read_manifest(folder)
        except NewerFormatError:
            raise
        except UserError as error:
            problems.append(str(error))
            continue
        damage = verify_checkpoint(folder)
        if not damage:
            return folder, problems
        problems += damage
    return None, problems


def list_checkpoints(run: Path) -> list[dict[str, Any]]:
    """The checkpoints of a run, oldest first: ``step``, ``path``, ``bytes``, ``files``, ``created``, ``complete``.

    Raises:
        UserError: the folder is not a run.
    """
    run = Path(run)
    if not (run / "run.json").is_file():
        raise UserError(f"{run} is not a run: it has no run.json")
    rows = []
    for folder in reversed(checkpoint_folders(run / "checkpoints")):
        row: dict[str, Any] = {"step": int(folder.name[5:]), "path": str(folder), "complete": False}
        try:
            manifest = read_manifest(folder)
        except UserError:
            row |= {"bytes": 0, "files": 0, "created": ""}
        else:
            sizes = [entry["bytes"] for entry in manifest["files"].values()]
            row |= {"bytes": sum(sizes), "files": len(sizes), "created": manifest["created"], "complete": True}
        rows.append(row)
    return rows


def remove_old(checkpoints: Path, keep: int) -> list[Path]:
    """Removes all but the newest ``keep`` checkpoints and left-over staging folders; returns what was removed."""
    removed = [path for path in checkpoints.glob(f"{STAGING}*") if path.is_dir()]
    removed += checkpoint_folders(checkpoints)[keep:]
    for folder in removed:
        if folder.name.startswith(STAGING):
            shutil.rmtree(folder)
        else:
            _remove(folder)
    return removed


def newest_export(run: Path) -> Path:
    """The Hugging Face folder of a run's newest complete checkpoint.

    Raises:
        UserError: the run has none yet.
    """
    for folder in checkpoint_folders(Path(run) / "checkpoints"):
        if (folder / MANIFEST).is_file() and (folder / "export").is_dir():
            return folder / "export"
    raise UserError(f"{run} has no checkpoint yet: train it until the first save, or name a model folder")
