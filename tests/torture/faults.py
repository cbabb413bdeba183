"""Kills that come with something else: a full disk, a stopped rank, a clock that jumps, and the like.

A fault begins at a moment of a run as a kill does. If the run has not ended of it within some seconds, what the kill
aims at is killed, and the fault is taken away. The next start must continue, and the run must end as if nothing had
happened. Root is needed: the run has a mount namespace of its own, and its folder is a small file system in memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from tests.torture.kills import GONE_SECONDS, MOMENTS, TARGETS, Course, Kill, Start, Torture

ROOM_BYTES = 256 << 20
"""Of the file system that a run is written to: for some checkpoints."""
OF_THE_DISK = ("read-only", "full disk", "large files")
OF_MEMORY = ("memory of a rank", "memory of all")
FAULTS = ("stopped ranks", *OF_THE_DISK, *OF_MEMORY, "loader worker", "waiting for the hub", "clock")
CGROUPS = Path("/sys/fs/cgroup/memory")
IN_NAMESPACE = ("unshare", "--mount", "--propagation", "private")
JUMPS = (-2 * 86_400, -3600, 3600, 400 * 86_400)
"""Of the clock, in seconds."""


@dataclasses.dataclass(kw_only=True)
class FaultyKill(Kill):
    """A kill, and what came before it."""

    fault: str
    ended_by_itself: bool = False
    """Whether the run ended of the fault, before anybody was killed."""


class Faults(Torture):
    """Torture with faults, each kind as often.

    Args:
        faults: the kinds; ``memory of all`` is left out where there are no memory cgroups of version 1.
    """

    def __init__(self, course: Course, room: Path, seed: int, *, faults: tuple[str, ...] = FAULTS) -> None:
        self._faults = [fault for fault in faults if fault != "memory of all" or _has_memory_groups()]
        self._next_faults: list[str] = []
        self._saves_may_fail = False
        room.mkdir(parents=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={ROOM_BYTES}", "torture", str(room)], check=True)
        self._clock, library = room / "clock", room / "shifted_clock.so"
        self._shift_clock(0)
        source = Path(__file__).with_name("shifted_clock.c")
        subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
        environment = {"LD_PRELOAD": str(library), "CODEPARROT_DS_TORTURE_CLOCK": str(self._clock)}
        super().__init__(dataclasses.replace(course, prefix=IN_NAMESPACE, environment=environment), room, seed)

    def _shift_clock(self, seconds: int) -> None:
        """Of all processes of all starts from now on; written over in place, for they have mapped it."""
        with self._clock.open("r+b" if self._clock.exists() else "wb", buffering=0) as file:
            file.write(seconds.to_bytes(8, "little", signed=True))

    def close(self) -> None:
        """Takes the file system away."""
        subprocess.run(["umount", "--lazy", str(self.room)], check=True)

    def _next_kill(self) -> FaultyKill:
        draw = self._draw
        if not self._next_faults:
            self._next_faults = draw.sample(self._faults, len(self._faults))
        fault = self._next_faults.pop()
        # A start has neither ranks nor a writer, and a fault is to meet both.
        moments = ("training",) if fault == "waiting for the hub" else [each for each in MOMENTS if each != "starting"]
        return FaultyKill(moment=draw.choice(moments), target=draw.choice(TARGETS), fault=fault)

    def _kill(self, start: Start, kill: Kill) -> bool:
        assert isinstance(kill, FaultyKill)
        self._saves_may_fail |= kill.fault in (*OF_THE_DISK, *OF_MEMORY)
        if not self._moment_comes(start, kill):
            return False
        with self._fault(start, kill) as began:
            if began:
                until = time.monotonic() + self._draw.uniform(0.1, 3)
                while time.monotonic() < until and not start.ended():
                    time.sleep(0.01)
            if not start.ended() and self._kill_now(start, kill):
                return True
            code = start.wait()
            if not began or code == 0:
                return False
            kill.ended_by_itself = True
            kill.seconds = round(time.monotonic() - start.began, 3)
            self._after(start, kill)
            return True

    @contextlib.contextmanager
    def _fault(self, start: Start, kill: FaultyKill) -> Iterator[bool]:
        """The fault while it lasts; yields whether it has begun."""
        faults: dict[str, Callable[[Start, FaultyKill], contextlib.AbstractContextManager[bool]]] = {
            "stopped ranks": self._stopped,
            "read-only": self._read_only,
            "full disk": self._full,
            "large files": lambda start, _: self._limited(start, resource.RLIMIT_FSIZE, lambda rank: 200_000),
            "memory of a rank": lambda start, _: self._limited(
                start, resource.RLIMIT_AS, lambda rank: rank.memory_info().vms
            ),
            "memory of all": self._cgroup,
            "loader worker": self._worker,
            "waiting for the hub": self._hub,
            "clock": self._jump,
        }
        with faults[kill.fault](start, kill) as began:
            yield began

    @contextlib.contextmanager
    def _stopped(self, start: Start, kill: FaultyKill) -> Iterator[bool]:
        """One rank or all stand still; some continue before the kill, and the guards of the others must end them."""
        ranks = _trainers(start)
        chosen = ranks if self._draw.random() < 0.5 else ranks[:1]
        _signal(chosen, signal.SIGSTOP)
        if self._draw.random() < 0.6:
            time.sleep(self._draw.uniform(0.2, 2))
            _signal(chosen, signal.SIGCONT)
        yield bool(chosen)

    @contextlib.contextmanager
    def _read_only(self, start: Start, kill: FaultyKill) -> Iterator[bool]:
        """What is opened in the run's folder from now on cannot be written, or in its checkpoints alone."""
        folder = start.run / "checkpoints" if self._draw.random() < 0.5 else start.run
        inside = ["nsenter", "--target", str(start.command.pid), "--mount"]
        # Busy while a file in there is open for writing, through the mount that is a moment old.
        again = 'for try in $(seq 50); do mount -o remount,bind,ro "$0" && exit 0; sleep 0.02; done; exit 1'
        command = f'mount --bind "$0" "$0" && {again}'
        done = subprocess.run([*inside, "sh", "-c", command, str(folder)], capture_output=True, text=True)
        if done.returncode != 0 and not start.ended():
            self._problem(start, f"the test cannot remount {folder}: {done.stderr}")
        yield done.returncode == 0  # the namespace ends with its processes

    @contextlib.contextmanager
    def _full(self, start: Start, kill: FaultyKill) -> Iterator[bool]:
        """No byte is free, as where a quota is used up."""
        ballast = self.room / "ballast"
        with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(b"\0" * 4096)
        try:
            yield True
        finally:
            ballast.unlink()

    @contextlib.contextmanager
    def _limited(self, start: Start, limit: int, most: Callable[[psutil.Process], int]) -> Iterator[bool]:
        """One rank, or all, may have no more of something: its writer fails, or anything else in it."""
        ranks = _trainers(start)
        for rank in ranks if self._draw.random() < 0.5 else ranks[-1:]:
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.rlimit(limit, (most(rank), resource.RLIM_INFINITY))
        yield bool(ranks)

    @contextlib.contextmanager
    def _cgroup(self, start: Start, kill: FaultyKill) -> Iterator[bool]:
        """All processes may have a little more memory together: the system's OOM killer chooses one of them."""
        group = CGROUPS / f"codeparrot-torture-{os.getpid()}"
        group.mkdir()
        try:
            (group / "memory.limit_in_bytes").write_text(str(8 << 20))
            for process in start.alive():
                with contextlib.suppress(OSError):
                    (group / "cgroup.procs").write_text(str(process.pid))
            yield True
        finally:
            _dissolve(group)

    @contextlib.contextmanager
    def _worker(self, start: Start, kill: FaultyKill) -> Iterator[bool]:
        """A process that a rank has started is gone."""
        workers = [child for rank in _trainers(start) for child in _children(rank)]
        if workers:
            _signal([self._draw.choice(workers)], signal.SIGKILL)
        yield bool(workers)

    @contextlib.contextmanager
    def _hub(self, start: Start, kill: FaultyKill) -> Iterator[bool]:
        """Nothing can be pushed until the run waits for nothing else."""
        with contextlib.ExitStack() as stack:
            while not start.ended() and not (start.run / "hub").is_dir():
                time.sleep(0.01)
            if start.ended():
                yield False
                return
            lock = stack.enter_context((start.run / "hub" / "lock").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
            while not start.ended() and not _has_finished(start.run):
                time.sleep(0.01)
            yield not start.ended()

    @contextlib.contextmanager
    def _jump(self, start: Start, kill: FaultyKill) -> Iterator[bool]:
        self._shift_clock(self._draw.choice(JUMPS))
        try:
            yield True
        finally:
            self._shift_clock(0)

    def _check_start(self, start: Start, newest: int | None) -> None:
        known = len(self.problems)
        super()._check_start(start, newest)
        if self._saves_may_fail:
            self.problems[known:] = [each for each in self.problems[known:] if "could not be written" not in each]

    def _compare(self, run: Path) -> None:
        known = len(self.problems)
        super()._compare(run)
        if len(self.problems) == known:  # the room is small
            shutil.rmtree(run.parent)

    def _compare_branch(self, run: Path) -> None:
        known = len(self.problems)
        super()._compare_branch(run)
        if self._saves_may_fail:  # then a step may be missing; the last one is compared as a file
            self.problems[known:] = [each for each in self.problems[known:] if not self._is_only_missing(run)]
        self._saves_may_fail = False

    def _is_only_missing(self, run: Path) -> bool:
        steps = self._pushed(run)
        return len(steps) == len(set(steps)) and steps[-1:] == [self.course.steps]


def _has_memory_groups() -> bool:
    return (CGROUPS / "memory.limit_in_bytes").exists()


def _dissolve(group: Path) -> None:
    """Moves every process out of a group and removes it: some are forked meanwhile, and the dead take a moment."""
    deadline = time.monotonic() + GONE_SECONDS
    while True:
        for pid in (group / "cgroup.procs").read_text().split():
            with contextlib.suppress(OSError):
                (CGROUPS / "cgroup.procs").write_text(pid)
        try:
            group.rmdir()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.02)


def _trainers(start: Start) -> list[psutil.Process]:
    """The ranks themselves; ``Start.processes`` gives their guards."""
    return [rank for guard in start.processes("all ranks") for rank in _children(guard)]


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children()
    except psutil.NoSuchProcess:
        return []


def _signal(processes: list[psutil.Process], number: int) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def _has_finished(run: Path) -> bool:
    try:
        return json.loads((run / "run.json").read_text())["outcome"]["status"] == "finished"
    except (OSError, ValueError, KeyError):
        return False
