"""A disk that fails when it is told to: the system calls that change a folder are counted, and one goes wrong.

Everything that the package writes goes through functions of :mod:`os`. While a ``Disk`` watches a folder, each call
below it that makes, writes, syncs, renames, links or removes something has a number; at a chosen one the disk can
answer with an error, the process can die, or the power can be cut: then what was not synced is gone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

KILLED = 57
"""Exit code of a process that ended at the call that it was told to end at."""


class Died(BaseException):
    """Instead of the end of the process, which is dear: from here on nothing reaches the disk any more."""


NEEDS_SPACE = ("create", "write", "mkdir", "link")
BY_DESCRIPTOR = ("write", "fsync")
REAL = {name: getattr(os, name) for name in ("open", "close", "write", "fsync", "rename", "mkdir", "link", "unlink",
                                            "rmdir")}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Call:
    """One call that changes the folder: ``create``, ``open`` (of a folder, to sync it), ``write``, ``fsync`` …"""

    kind: str
    path: Path


@dataclasses.dataclass(kw_only=True)
class Fault:
    """What goes wrong, and at which call.

    Attributes:
        at: the number of the call.
        error: the disk answers with this errno; None is the end of the process (``Died``).
        half: the call is a write, and its first half is done.
        lasting: every later call goes wrong as well (of those that need space, when ``error`` is ENOSPC).
        power_cut: what was not synced is lost.
        exits: the process does end, with the code ``KILLED``.
    """

    at: int
    error: int | None = None
    half: bool = False
    lasting: bool = False
    power_cut: bool = False
    exits: bool = False


class Disk:
    """The calls below one folder, and what goes wrong with them.

    Attributes:
        calls: those seen so far.
        struck: whether the fault came.
    """

    def __init__(self, root: Path, fault: Fault | None = None) -> None:
        self.root, self.fault = root, fault
        self.calls: list[Call] = []
        self.struck = False
        self._dead = False
        self._paths: dict[int, Path] = {}  # of open descriptors
        self._unsynced_files: set[int] = set()  # inodes
        self._unsynced_names: list[_Name] = []
        self._backups: Path | None = None

    @contextlib.contextmanager
    def watching(self) -> Iterator[Disk]:
        """Stands between the process and the system while it lasts; in every thread."""
        for name in REAL:
            setattr(os, name, getattr(self, f"_{name}"))
        try:
            yield self
        finally:
            for name, function in REAL.items():
                setattr(os, name, function)
            if self._backups is not None:
                shutil.rmtree(self._backups)

    def _open(self, path: Any, flags: int, *rest: Any, dir_fd: int | None = None) -> int:
        where = self._where(path, dir_fd)
        if where is None:
            return REAL["open"](path, flags, *rest, dir_fd=dir_fd)
        new = bool(flags & os.O_CREAT) and not where.exists()
        self._count("create" if flags & os.O_CREAT else "open", where)
        descriptor = REAL["open"](path, flags, *rest, dir_fd=dir_fd)
        self._paths[descriptor] = where
        if flags & (os.O_WRONLY | os.O_RDWR):
            self._unsynced_files.add(os.fstat(descriptor).st_ino)
        if new:
            self._name("create", where)
        return descriptor

    def _close(self, descriptor: int) -> None:
        self._paths.pop(descriptor, None)
        REAL["close"](descriptor)

    def _write(self, descriptor: int, data: Any) -> int:
        path = self._paths.get(descriptor)
        if path is not None:
            self._count("write", path, lambda: REAL["write"](descriptor, memoryview(data)[: len(data) // 2]))
        return REAL["write"](descriptor, data)

    def _fsync(self, descriptor: int) -> None:
        path = self._paths.get(descriptor)
        if path is None:
            REAL["fsync"](descriptor)
            return
        self._count("fsync", path)
        # The system is not asked: nothing here cuts the real power, and a real disk would take its time.
        inode = os.fstat(descriptor).st_ino
        self._unsynced_files.discard(inode)
        kept: list[_Name] = []
        for name in self._unsynced_names:
            if name.folder != inode:
                kept.append(name)
            elif name.came_from is not None:  # for good: what is inside is found there from now on
                kept = [earlier.moved(name.came_from, name.path) for earlier in kept]
        self._unsynced_names = kept

    def _rename(self, old: Any, new: Any, **folders: Any) -> None:
        source, target = self._where(old, None), self._where(new, None)
        if source is None or target is None:
            REAL["rename"](old, new, **folders)
            return
        self._count("rename", target)
        backup = self._backup(target) if target.is_file() else None
        REAL["rename"](old, new, **folders)
        self._name("rename", target, came_from=source, replaced=backup)

    def _mkdir(self, path: Any, *rest: Any, dir_fd: int | None = None) -> None:
        self._make("mkdir", path, dir_fd, lambda: REAL["mkdir"](path, *rest, dir_fd=dir_fd))

    def _link(self, source: Any, target: Any, **options: Any) -> None:
        self._make("link", target, None, lambda: REAL["link"](source, target, **options))

    def _unlink(self, path: Any, *, dir_fd: int | None = None) -> None:
        self._remove("unlink", path, dir_fd)

    def _rmdir(self, path: Any, *, dir_fd: int | None = None) -> None:
        self._remove("rmdir", path, dir_fd)

    def _make(self, kind: str, path: Any, dir_fd: int | None, make: Callable[[], None]) -> None:
        where = self._where(path, dir_fd)
        if where is not None:
            self._count(kind, where)
        make()
        if where is not None:
            self._name(kind, where)

    def _remove(self, kind: str, path: Any, dir_fd: int | None) -> None:
        where = self._where(path, dir_fd)
        if where is not None:
            self._count(kind, where)
        REAL[kind](path, dir_fd=dir_fd)

    def _where(self, path: Any, dir_fd: int | None) -> Path | None:
        """The path of a call when it is the folder or below it."""
        if isinstance(path, int):
            return None
        where = Path(os.fsdecode(path))
        if dir_fd is not None:
            if dir_fd not in self._paths:
                return None
            where = self._paths[dir_fd] / where
        return where if self.root in (where, *where.parents) else None

    def _count(self, kind: str, path: Path, first_half: Callable[[], Any] | None = None) -> None:
        if self._dead:
            raise Died
        number = len(self.calls)
        self.calls.append(Call(kind, path))
        fault = self.fault
        if fault is None or number < fault.at or (number > fault.at and not fault.lasting):
            return
        if fault.lasting and fault.error == errno.ENOSPC and kind not in NEEDS_SPACE:
            return
        self.struck = True
        if fault.half and first_half is not None:
            first_half()
        if fault.error is not None:
            raise OSError(fault.error, os.strerror(fault.error), *([] if kind in BY_DESCRIPTOR else [str(path)]))
        if fault.power_cut:
            self.cut_the_power()
        if fault.exits:
            os._exit(KILLED)
        self._dead = True
        raise Died

    def _name(self, kind: str, path: Path, *, came_from: Path | None = None, replaced: Path | None = None) -> None:
        folder = os.stat(path.parent).st_ino
        self._unsynced_names.append(_Name(kind=kind, path=path, folder=folder, came_from=came_from, replaced=replaced))

    def _backup(self, path: Path) -> Path:
        if self._backups is None:
            self._backups = Path(tempfile.mkdtemp(prefix="backups-", dir=self.root.parent))
        backup = self._backups / str(len(self.calls))
        REAL["link"](path, backup)
        return backup

    def cut_the_power(self) -> None:
        """The worst that a file system may make of a power cut: no byte and no name is there but the synced ones."""
        with contextlib.ExitStack() as stack:
            for name, function in REAL.items():
                stack.callback(setattr, os, name, getattr(os, name))
                setattr(os, name, function)
            self._lose()

    def _lose(self) -> None:
        for path in list(self.root.rglob("*")):
            if path.is_file() and path.stat().st_ino in self._unsynced_files:
                os.truncate(path, 0)
        for name in reversed(self._unsynced_names):
            if not name.path.exists():
                continue  # removed since
            if name.kind == "rename":
                assert name.came_from is not None
                os.rename(name.path, name.came_from)
                if name.replaced is not None:
                    os.rename(name.replaced, name.path)
            elif name.kind == "mkdir":
                shutil.rmtree(name.path)
            else:
                os.unlink(name.path)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Name:
    """A name that its folder was not yet synced with."""

    kind: str
    path: Path
    folder: int
    came_from: Path | None
    replaced: Path | None

    def moved(self, old: Path, new: Path) -> _Name:
        if old not in self.path.parents:
            return self
        return dataclasses.replace(self, path=new / self.path.relative_to(old))


def in_a_fork(work: Callable[[], None]) -> int:
    """Runs ``work`` in a forked child and returns its exit code: 0, ``KILLED``, or 1 after a traceback."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)
