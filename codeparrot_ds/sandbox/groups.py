"""A control group for the programs of one worker, where this user may make one: what all processes of a program may
use together. Files: Linux's ``cgroup-v2.rst`` and ``cgroup-v1/memory.rst``.
"""

from __future__ import annotations

import os
import re
import subprocess
from contextlib import suppress
from functools import cache
from pathlib import Path

_PREFIX = "codeparrot-ds-"


class Group:
    """Folders of the kernel's control groups: one of version 2, or two of version 1, memory's and processes'."""

    def __init__(self, folders: list[Path]) -> None:
        self.folders = folders

    def take(self, process: int) -> None:
        """Makes a process a member, and all that it starts from then on."""
        for folder in self.folders:
            _set(folder / "cgroup.procs", process)

    def kills(self) -> int:
        """How many members the kernel has ended because the group was out of memory."""
        for name in ("memory.events", "memory.oom_control"):
            with suppress(FileNotFoundError):  # of the other version
                return int(re.search(r"oom_kill (\d+)", (self.folders[0] / name).read_text())[1])  # type: ignore[index]
        raise FileNotFoundError(f"{self.folders[0]}/memory.events")

    def close(self) -> None:
        """Removes the group, whose members have ended."""
        for folder in self.folders:
            folder.rmdir()


def make_group(name: str, memory_bytes: int, processes: int) -> Group | None:
    """Returns a group with these limits, or None where this user, or this machine, allows none.

    Args:
        name: no other's in this process.
    """
    way = _possible_way()
    return None if way is None else _make(_ways(memory_bytes, processes)[way], name)


@cache
def _possible_way() -> int | None:
    """Which of ``_ways`` the kernel lets this user take, tried with a process."""
    for number, way in enumerate(_ways(1 << 30, 8)):
        for parent, _ in way:
            _remove_leftovers(parent)
        try:
            group = _make(way, "trial")
        except OSError:
            continue
        process = subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        try:
            group.take(process.pid)
            return number
        except OSError:
            continue
        finally:
            process.communicate()
            group.close()
    return None


def _make(way: list[tuple[Path, dict[str, int]]], name: str) -> Group:
    made: list[Path] = []
    try:
        for parent, values in way:
            folder = parent / f"{_PREFIX}{os.getpid()}-{name}"
            folder.mkdir()
            made.append(folder)
            for file, value in values.items():
                if file.endswith("?"):  # only where the kernel counts swap
                    with suppress(FileNotFoundError):
                        _set(folder / file[:-1], value)
                else:
                    _set(folder / file, value)
    except OSError:
        for folder in made:
            folder.rmdir()
        raise
    return Group(made)


def _ways(memory_bytes: int, processes: int) -> list[list[tuple[Path, dict[str, int]]]]:
    """The ways to make a group here, best first: lists of (parent folder, what is written into the group's files)."""
    own = dict(line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines())
    memory, pids, unified = (_folder(own, name) for name in ("memory", "pids", ""))
    ways: list[list[tuple[Path, dict[str, int]]]] = []
    if unified:
        values = {"memory.max": memory_bytes, "memory.swap.max?": 0, "memory.oom.group": 1, "pids.max": processes}
        ways.append([(unified, values)])
        if not unified.is_mount():  # in version 2 only the root's group may have both processes and groups with limits
            ways.append([(unified.parent, values)])
    if memory and pids:
        limits = {"memory.limit_in_bytes": memory_bytes, "memory.memsw.limit_in_bytes?": memory_bytes}
        ways.append([(memory, limits), (pids, {"pids.max": processes})])
    return ways


def _folder(own: dict[str, str], controller: str) -> Path | None:
    """This process's group of a controller of version 1, or of version 2 for ``""``."""
    if controller not in own:
        return None
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mount, _, kind = line.partition(" - ")
        root, point = mount.split()[3:5]
        kind, _, options = kind.split()[:3]
        found = kind == "cgroup2" if not controller else kind == "cgroup" and controller in options.split(",")
        if found and own[controller].startswith(root):
            return Path(point, own[controller].removeprefix(root).lstrip("/"))
    return None


def _set(file: Path, value: int) -> None:
    descriptor = os.open(file, os.O_WRONLY)  # never made, as another open would
    try:
        os.write(descriptor, str(value).encode())
    finally:
        os.close(descriptor)


def _remove_leftovers(parent: Path) -> None:
    """Removes the empty groups of processes that were killed."""
    for folder in parent.glob(f"{_PREFIX}*-*"):
        process = folder.name.removeprefix(_PREFIX).split("-")[0]
        if not Path("/proc", process).exists():
            with suppress(OSError):  # another process does the same
                folder.rmdir()
