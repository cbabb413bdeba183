"""A rank's guard: a small process that starts before the rank, watches it, and outlives it. No torch here.

A rank that is stuck in a collective, in C++ or in a stopped process cannot answer; its guard can. It reports to the
command where the rank is and how it ended, passes signals on, has the rank's Python stacks written, and makes sure that
no rank is left when the command, or the network to it, is gone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import os
import select
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

from codeparrot_ds.supervision.control import ADDRESS, BEAT_SECONDS, SILENCE_SECONDS, TOKEN, Line, connect
from codeparrot_ds.supervision.forwarded_env import file_of_this_host
from codeparrot_ds.supervision.heartbeat import Beats, set_current
from codeparrot_ds.supervision.process_end import STOP_SIGNALS, signal_at_parents_end

DUMP = signal.SIGUSR2
"""Has a rank write its Python stacks to its log, whatever it is doing."""
PATIENT_PHASES = ("evaluate", "save", "push", "end")  # in which a healthy rank may beat rarely
LEFT_ALONE_SECONDS = {False: 20.0, True: 600.0}
"""That a rank which lost the command may stay in one place before it is killed; True: in a patient phase."""
TURN_SECONDS = 0.1

_asked_early = False


def asked_early() -> bool:
    """Whether a stop signal came to this rank before it had its own handlers."""
    return _asked_early


def guard_this_rank() -> None:
    """Becomes two processes: the one that returns trains, the other guards it and never returns."""
    beats = Beats()
    guard = os.getpid()
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # until both have their handlers: a signal now is kept
    rank = os.fork()
    if rank == 0:
        _begin_as_rank(beats, guard)
        return
    os._exit(_guard(rank, beats))


def write_stacks_to(path: Path) -> None:
    """Makes `DUMP` write every thread's Python stack to a file, from now on."""
    faulthandler.register(DUMP, file=path.open("a", encoding="utf-8"), all_threads=True)


def _begin_as_rank(beats: Beats, guard: int) -> None:
    signal_at_parents_end(signal.SIGKILL, guard)()  # without its guard nobody could report or end it
    set_current(beats)

    def remember(number: int, frame: object) -> None:
        global _asked_early
        _asked_early = True

    for number in STOP_SIGNALS:
        signal.signal(number, remember)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    faulthandler.register(DUMP, file=sys.stderr, all_threads=True)  # until the run has its log


class _Guard:
    """What a guard remembers."""

    def __init__(self, rank: int, beats: Beats) -> None:
        self.rank, self.beats = rank, beats
        self.line: Line | None = None
        self.stop_sent: float | None = None
        self.killed_with: int | None = None
        self.last_report = 0.0

    def signal_rank(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.rank, number)

    def stop(self) -> None:
        self.stop_sent = self.stop_sent or time.monotonic()
        self.signal_rank(signal.SIGTERM)

    def lose_contact(self) -> None:
        """Asks the rank to save and stop: the command is gone, so nobody waits for it."""
        if self.line is not None:
            self.line.close()
            self.line = None
        print(
            f"rank {os.environ.get('RANK')} on {socket.gethostname()}: lost contact with the launcher; saving at the "
            "next step boundary if possible, then exiting",
            file=sys.stderr,
        )
        self.stop()

    def obey(self, message: dict[str, Any]) -> None:
        order = message.get("do")
        if order == "stop":
            self.stop()
        elif order == "dump":
            self.signal_rank(DUMP)
        elif order == "kill":
            self.killed_with = int(message["code"])
            self.signal_rank(signal.SIGKILL)
        elif order == "forget environment" and os.environ.get("LOCAL_RANK") == "0":
            forget_environment()

    def report(self) -> dict[str, Any]:
        return {"place": dataclasses.asdict(self.beats.read()), "state": process_state(self.rank)}


def forget_environment() -> None:
    """Removes the file with the run's environment."""
    path = file_of_this_host(os.environ)
    if path is not None:
        path.unlink(missing_ok=True)


def process_state(pid: int) -> str:
    """One letter of ``/proc/PID/stat``: ``T`` for a process that was stopped; ``?`` where nothing says it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return "?"


def _guard(rank: int, beats: Beats) -> int:
    """Guards a rank to its end; returns the exit code for it."""
    guard = _Guard(rank, beats)
    for number in STOP_SIGNALS:
        signal.signal(number, lambda number, frame: guard.stop())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    had_line = False
    if ADDRESS in os.environ:
        try:
            guard.line = _report_for_duty(rank)
            had_line = guard.line is not None
        except ConnectionRefusedError:  # the command ended while this rank started
            had_line = True
            guard.lose_contact()
    while True:
        ended = _ended(rank)
        if ended is not None:
            break
        if guard.line is not None:
            _listen(guard)
        else:
            time.sleep(TURN_SECONDS)
        if had_line and guard.line is None:
            _end_alone(guard)
    if guard.line is not None:
        guard.line.send(guard.report() | {"ended": ended})
        guard.line.close()
    if os.environ.get("LOCAL_RANK") == "0":
        forget_environment()
    if guard.killed_with is not None:
        return guard.killed_with
    return ended if ended >= 0 else 128 - ended


def _report_for_duty(rank: int) -> Line | None:
    line = connect(os.environ)
    if line is None:
        print(
            f"rank {os.environ.get('RANK')}: cannot reach the launcher at {os.environ[ADDRESS]}: it will not know "
            "how this rank is",
            file=sys.stderr,
        )
        return None
    hello = {"token": os.environ.get(TOKEN), "rank": os.environ.get("RANK"), "host": socket.gethostname(), "pid": rank}
    line.send(hello)
    return line


def _listen(guard: _Guard) -> None:
    line = guard.line
    assert line is not None
    readable, _, _ = select.select([line.socket], [], [], TURN_SECONDS)
    messages = line.receive() if readable else []
    for message in messages or ():
        guard.obey(message)
    now = time.monotonic()
    reachable = messages is not None and now - line.heard < SILENCE_SECONDS
    if reachable and now - guard.last_report >= BEAT_SECONDS:
        guard.last_report = now
        reachable = line.send(guard.report())
    if not reachable:
        guard.lose_contact()


def _end_alone(guard: _Guard) -> None:
    """Kills a rank that nobody waits for once it is stuck: the others may be gone, and collectives wait for ever."""
    place = guard.beats.read()
    assert guard.stop_sent is not None
    still = min(place.seconds, time.monotonic() - guard.stop_sent)
    if still > LEFT_ALONE_SECONDS[place.phase in PATIENT_PHASES]:
        guard.killed_with = 1
        guard.signal_rank(signal.SIGKILL)


def _ended(rank: int) -> int | None:
    pid, status = os.waitpid(rank, os.WNOHANG)
    return None if pid == 0 else os.waitstatus_to_exitcode(status)
