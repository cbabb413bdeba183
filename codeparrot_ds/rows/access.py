"""Bytes of a file from any place. All reading goes through ``read_at``: a file may lie on a disk or on the Hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol


class RandomAccess(Protocol):
    """What a reader needs of a file: ``read_at`` is short at the end of the file only."""

    def read_at(self, offset: int, size: int) -> bytes: ...


class LocalFile:
    """A file on a disk."""

    def __init__(self, path: Path | str) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read_at(self, offset: int, size: int) -> bytes:
        data = os.pread(self._descriptor, size, offset)
        while len(data) < size and (more := os.pread(self._descriptor, size - len(data), offset + len(data))):
            data += more
        return data

    def __enter__(self) -> LocalFile:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)


class HeldFile:
    """Bytes in memory, of what has no places: a pipe."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def read_at(self, offset: int, size: int) -> bytes:
        return self._data[offset : offset + size]
