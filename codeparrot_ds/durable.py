"""Files that outlive a kill and a power cut. No torch here.

Every byte of a checkpoint, of a run's record and of the push queue takes this way to the disk: written, hashed on the
way, synced, and visible under its name only after that. Each step is one call of :mod:`os`, so that a test can make
every single one of them fail, or be the last that the process does.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

logger = logging.getLogger("codeparrot_ds.durable")

PIECE = 8 << 20
"""Bytes that are hashed and written at a time: they are still in the processor's cache when they are written."""
_NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.ENOSYS}
_told: set[int] = set()


@dataclasses.dataclass(frozen=True)
class WrittenFile:
    """What a file has to be for as long as it lies there."""

    num_bytes: int
    sha256: str


def write_file(path: Path, content: Iterable[Any]) -> WrittenFile:
    """Writes a file and waits until the disk has it.

    Args:
        path: of the file; what was there is overwritten.
        content: its parts in order, anything with the buffer protocol. A part is let go before the next one is taken.

    Raises:
        OSError: the system refused; it names the file.
    """
    digest, size = hashlib.sha256(), 0
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        try:
            for part in content:
                view = memoryview(part).cast("B")
                for start in range(0, len(view), PIECE):
                    piece = view[start : start + PIECE]
                    digest.update(piece)  # releases the interpreter, as os.write does
                    written = 0
                    while written < len(piece):
                        written += os.write(descriptor, piece[written:])
                size += len(view)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise _named(error, path) from error
    return WrittenFile(size, digest.hexdigest())


def replace_file(path: Path, content: Iterable[Any]) -> None:
    """``write_file`` beside the place and a rename into it: a reader sees the old file or the whole new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write_file(temporary, content)
        rename(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def json_bytes(value: Any) -> bytes:
    """JSON as every file of a run has it."""
    return (json.dumps(value, indent=2) + "\n").encode()


def write_json(path: Path, value: Any) -> None:
    """``replace_file`` with JSON."""
    replace_file(path, [json_bytes(value)])


def make_folder(path: Path) -> None:
    """Makes one new folder."""
    os.mkdir(path)


def rename(old: Path, new: Path) -> None:
    """Gives a file or folder another name in one step; a file of that name is replaced."""
    try:
        os.rename(old, new)
    except OSError as error:
        raise _named(error, new) from error


def sync_folder(folder: Path) -> None:
    """Makes new names in a folder survive a power cut, where its file system can: some sync no folders."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise _named(error, folder) from error
        device = os.stat(folder).st_dev
        if device not in _told:
            _told.add(device)
            logger.warning(
                "%s lies on a file system that syncs no folders (%s): a power cut may take the newest checkpoint's "
                "name, a kill cannot",
                folder,
                error.strerror,
            )


def remove_folder(folder: Path, hidden: Path) -> None:
    """Removes a folder; it is renamed to ``hidden`` first, so that a kill halfway leaves nothing that looks whole."""
    shutil.rmtree(hidden, ignore_errors=True)
    rename(folder, hidden)
    try:
        shutil.rmtree(hidden)
    except OSError as error:  # it names a file in there without the folder
        raise OSError(error.errno, error.strerror, str(hidden)) from error


def _named(error: OSError, path: Path) -> OSError:
    """The same error with the file it is about, which reading and writing by descriptor leave out."""
    return OSError(error.errno, error.strerror, str(path)) if error.filename is None else error
