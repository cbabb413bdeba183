"""Which run a folder is: a copy of another gets a branch and an id of its own, a moved or renamed one keeps them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codeparrot_ds.json_files import DamagedFileError, parts_of, read_object


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What a run pushes as."""

    branch: str
    run_id: str | None
    """Tells two runs of one name apart, here and to wandb; None for one that has none yet."""
    copy_of: Path | None = None
    """The run that the folder was copied from, which is still there."""


def place_of(run: Path, *, path: Path | None = None) -> dict[str, Any]:
    """Where a run lies, for its ``run.json``.

    Args:
        run: its folder.
        path: where that is going to be; None for where it is.
    """
    status = run.stat()
    return {"path": str((path or run).resolve()), "device": status.st_dev, "inode": status.st_ino}


def identity_of(run: Path) -> Identity:
    """The identity of a run that starts in a folder, there or not.

    Raises:
        DamagedFileError: its ``run.json`` is.
    """
    try:
        record = read_object(run / "run.json")
    except FileNotFoundError:
        return Identity(branch=run.name, run_id=None)
    name, run_id = str(record.get("name", run.name)), record.get("id")
    original = _original(run, record)
    if original is None:
        return Identity(branch=name, run_id=None if run_id is None else str(run_id))
    if run.name != name:
        return Identity(branch=run.name, run_id=None, copy_of=original)
    # The same at every start until the run has recorded it, without asking a place that may not answer.
    digest = hashlib.sha256(os.fsencode(run.resolve())).hexdigest()
    return Identity(branch=f"{name}-copy-{digest[:6]}", run_id=None, copy_of=original)


def _original(run: Path, record: Mapping[str, Any]) -> Path | None:
    """The run that a folder was copied from; None for one that is itself, wherever it was moved to.

    A folder that was renamed or moved keeps its inode, or leaves nothing behind. A copy has an inode of its own, and
    what it says of its place is still true of another folder, which may have got another name beside its old one.
    """
    place = record.get("place")
    if place is None:  # recorded by a version before 0.2.0, or never started
        return None
    with parts_of(run / "run.json"):
        path, known = Path(str(place["path"])), (int(place["device"]), int(place["inode"]))
    here = run.stat()
    if known == (here.st_dev, here.st_ino):
        return None
    try:
        if path == run.resolve() or not path.exists():
            path = _renamed(path, known)
        other = read_object(path / "run.json")
        if os.path.samestat(path.stat(), here):  # the same folder by another way, such as a bind mount
            return None
    except (OSError, ValueError, DamagedFileError):  # gone, or nothing that could be continued
        return None
    return path if other.get("id") == record.get("id") else None


def _renamed(path: Path, known: tuple[int, int]) -> Path:
    """The folder of this device and inode beside where it was recorded; raises FileNotFoundError."""
    with os.scandir(path.parent) as entries:
        for entry in entries:
            if entry.inode() == known[1] and entry.is_dir() and entry.stat().st_dev == known[0]:
                return Path(entry.path)
    raise FileNotFoundError(path)
