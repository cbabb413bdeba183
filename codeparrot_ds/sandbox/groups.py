"""A control group for the programs of one worker, where this user may make one: what all processes of a program may
use together. Files: Linux's ``cgroup-v2.rst`` and ``cgroup-v1/memory.rst``.
"""

from __future__ import annotations

import os
import re
import subprocess
from contextlib import suppress
from pathlib import Path

_PREFIX = "codeparrot-ds-"


class Group:
    """Folders of the kernel's control groups: one of version 2, or of version 1 one for memory and one for processes.

    Attributes:
        entries: open files; who writes ``0`` into each is a member from then on, with all that it starts.
    """

    def __init__(self, folders: list[Path]) -> None:
        self.folders = folders
        self.entries = [os.open(folder / "cgroup.procs", os.O_WRONLY) for folder in folders]

    def can_be_entered(self) -> bool:
        """Whether the kernel lets a process of this user move here, from where it is: tried with one."""
        enter = ["/bin/sh", "-c", "echo 0"]
        return not any(
            subprocess.run(enter, stdout=entry, stderr=subprocess.DEVNULL).returncode for entry in self.entries
        )

    def kills(self) -> int:
        """How many members the kernel has ended because the group was out of memory."""
        for name in ("memory.events", "memory.oom_control"):
            with suppress(FileNotFoundError):  # of the other version
                return int(re.search(r"oom_kill (\d+)", (self.folders[0] / name).read_text())[1])  # type: ignore[index]
        raise FileNotFoundError(f"{self.folders[0]}/memory.events")

    def close(self) -> None:
        """Removes the group, whose members have ended."""
        for entry in self.entries:
            os.close(entry)
        for folder in self.folders:
            folder.rmdir()


def make_group(name: str, memory_bytes: int, processes: int) -> Group | None:
    """Returns a group with these limits, or None where this user, or this machine, allows none.

    Args:
        name: no other's in this process.
    """
    name = f"{_PREFIX}{os.getpid()}-{name}"
    for settings in _settings(memory_bytes, processes):
        made: list[Path] = []
        try:
            for parent, values in settings:
                _remove_leftovers(parent)
                folder = parent / name
                folder.mkdir()
                made.append(folder)
                for file, value in values.items():
                    if file.endswith("?"):  # only where the kernel counts swap
                        with suppress(FileNotFoundError):
                            _set(folder / file[:-1], value)
                    else:
                        _set(folder / file, value)
            group = Group(made)
        except OSError:
            for folder in made:
                folder.rmdir()
            continue
        if group.can_be_entered():
            return group
        group.close()
    return None


def _settings(memory_bytes: int, processes: int) -> list[list[tuple[Path, dict[str, int]]]]:
    """The ways to make a group here, best first: lists of (parent folder, what is written into the group's files)."""
    own = dict(line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines())
    memory, pids, unified = (_folder(own, name) for name in ("memory", "pids", ""))
    ways: list[list[tuple[Path, dict[str, int]]]] = []
    if unified:
        values = {"memory.max": memory_bytes, "memory.swap.max?": 0, "memory.oom.group": 1, "pids.max": processes}
        # In version 2 a group with processes, as this one's is, has no groups below it but at the root.
        ways += [[(unified, values)], [(unified.parent, values)]]
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
