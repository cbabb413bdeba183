"""Write a folder beside its place and rename it into it, so that it is complete or not there."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from codeparrot_ds.errors import UserError

RESULT = "result"


class UnfinishedError(UserError):
    """Work stopped for a reason that the same command can get past: what is finished is kept."""


@contextlib.contextmanager
def staged_folder(out: Path, *, marker: str, overwrite: bool) -> Iterator[Path]:
    """Yield an empty folder that becomes ``out`` when the block ends without an exception.

    An existing ``out`` with anything in it is refused before any work starts. ``overwrite`` lets it be replaced, but
    only where it holds ``marker`` (the file that a folder of this kind always has): ``--out ~`` must never delete a
    home. The old folder stays whole until the new one is complete.

    Raises:
        UserError: ``out`` may not be replaced, or the disk refuses (full, read-only, no permission).
    """
    out = Path(os.path.abspath(out))
    refuse_existing(out, marker=marker, overwrite=overwrite)
    staging = out.with_name(f".{out.name}.staging-{os.getpid()}")
    try:
        staging.mkdir(parents=True)
        yield staging
        _put_in_place(staging, out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error} ({error.filename or staging})") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def resumable_folder(out: Path, *, marker: str, overwrite: bool) -> Iterator[Path]:
    """Yield a working folder that outlives a kill; its ``result`` becomes ``out`` when the block ends well.

    The folder is the same for each call with this ``out``, and two builds never share it: the second is refused. It
    is removed at the end and after a ``UserError`` that the same command would meet again. It stays after everything
    else: an interrupt, a full disk, an ``UnfinishedError``.

    Raises:
        UserError: as ``staged_folder``, or another build is at work here.
    """
    out = Path(os.path.abspath(out))
    refuse_existing(out, marker=marker, overwrite=overwrite)
    folder = working_folder(out)
    kept = f"finished work is kept in {folder}, and the same command continues from there"
    try:
        with _lock(folder, out):
            try:
                yield folder
                _put_in_place(folder / RESULT, out)
            except UnfinishedError as error:
                raise UnfinishedError(f"{error}; {kept}") from error
            except UserError:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        reason = f"cannot write {out}: {error.strerror or error} ({error.filename or folder})"
        raise UnfinishedError(f"{reason}; {kept}" if folder.is_dir() else reason) from error


def working_folder(out: Path) -> Path:
    """Where a build of ``out`` keeps its finished work."""
    out = Path(os.path.abspath(out))
    return out.with_name(f".{out.name}.building")


def refuse_existing(out: Path, *, marker: str, overwrite: bool) -> None:
    """Raise a ``UserError`` where ``out`` may not be written."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file, not a folder; choose another --out")
    if out.is_dir() and any(out.iterdir()):
        if not (out / marker).is_file():
            raise UserError(f"{out} holds other files and no {marker}; choose a new or empty folder")
        if not overwrite:
            raise UserError(f"{out} already holds a {marker}; choose another folder or pass --overwrite to replace it")


@contextlib.contextmanager
def _lock(folder: Path, out: Path) -> Iterator[None]:
    """Hold the folder for this process: the system gives it free at our end, however that comes."""
    with contextlib.ExitStack() as stack:
        while True:
            folder.mkdir(parents=True, exist_ok=True)
            file: BinaryIO = stack.enter_context((folder / "lock").open("ab"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"another build is writing {out}; wait for it or choose another --out") from None
            # Its holder may have removed the folder between our opening and locking: then this lock guards nothing.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), (folder / "lock").stat()):
                    break
        yield


def _put_in_place(staging: Path, out: Path) -> None:
    """Rename the folder to ``out``; an old one is removed after that, and put back where the rename fails."""
    replaced = out.with_name(f".{out.name}.replaced-{os.getpid()}")
    try:
        if out.is_dir():
            out.rename(replaced)
        staging.rename(out)
    except OSError:
        if replaced.is_dir() and not out.exists():
            replaced.rename(out)
        raise
    shutil.rmtree(replaced, ignore_errors=True)
