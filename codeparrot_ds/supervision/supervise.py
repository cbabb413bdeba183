"""Runs the launcher to its end: signals to all ranks, a name for every failure, a true exit code. No torch here.

The launcher cannot be asked: it reports success when its ranks died of a signal, and SIGTERM to it kills the runner
alone. The guards of the ranks (:mod:`codeparrot_ds.supervision.guard`) can, on this host or another.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from codeparrot_ds.durable import write_json
from codeparrot_ds.json_files import DamagedFileError, parts_of, read_object
from codeparrot_ds.supervision.control import ADDRESS, TOKEN, ControlServer
from codeparrot_ds.supervision.process_end import STOP_SIGNALS, signal_at_parents_end
from codeparrot_ds.supervision.watchdog import HUNG, LOST, Verdict, Watchdog

END_FILE = "CODEPARROT_DS_END"
"""Environment variable: a file that gets the `End` of a start as JSON, for a program that runs the command."""
DUMP_SECONDS = 2.0
"""Time for the ranks to write their stacks into their logs."""
LAST_WORDS_SECONDS = 1.0
"""Time for reports that are still on the way when the launcher has ended."""
KILLED_SECONDS = 10.0
"""Time for the launcher to notice that its ranks were killed, before it is killed itself."""
NOTICED_SECONDS = 1.5
"""The same, where it waits only for hosts that do not respond."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class End:
    """How a start ended."""

    code: int
    verdict: Verdict | None = None
    """What the watchdog found wrong; None where the ranks ended by themselves."""
    asked: bool = False
    """Whether a signal had asked for the end."""


def run_to_the_end(
    command: list[str],
    environment: dict[str, str],
    run: Path,
    *,
    server: ControlServer | None = None,
    hang_seconds: float = 600.0,
    num_ranks: int | None = None,
    has_rank_0: bool = True,
) -> End:
    """Runs the launcher in a session of its own, follows its ranks, and ends them all when one is lost or they hang.

    Args:
        environment: of the launcher; the address of ``server`` is added where it has none yet.
        run: folder of the run.
        hang_seconds: ceiling of the watchdog's limit.
        has_rank_0: whether rank 0, who keeps the run's record, is among them; else the ranks' own exit codes count.
    """
    server = server or ControlServer()
    environment = {ADDRESS: f"127.0.0.1:{server.port}", TOKEN: server.token} | environment
    starts_before = _starts_and_status(run)[0]
    # Its ranks save and end when it is gone (`train.run_rank`); the launcher itself would stop them without.
    follow = signal_at_parents_end(signal.SIGKILL, os.getpid())
    asked: list[int] = []
    # Before the launcher is there: a signal that comes while it starts must not end this process alone.
    previous = {number: signal.signal(number, lambda number, frame: asked.append(number)) for number in STOP_SIGNALS}
    try:
        process = subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=follow)
        supervisor = _Supervisor(process, server, Watchdog(hang_seconds), run, num_ranks, asked)
        code = supervisor.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        server.close()
    if supervisor.verdict is not None:
        code = supervisor.verdict.code
    elif code == 0 and not has_rank_0:
        code = 0 if server.ranks and all(view.exit_code == 0 for view in server.ranks.values()) else 1
    elif code == 0:
        # Rank 0 must have recorded this start's end.
        starts, status = _starts_and_status(run)
        code = 0 if starts > starts_before and status in ("finished", "stopped") else 1
    elif code < 0:
        code = 128 - code
    end = End(code=code, verdict=supervisor.verdict, asked=bool(supervisor.asked))
    if END_FILE in os.environ:
        write_json(Path(os.environ[END_FILE]), dataclasses.asdict(end))
    return end


class _Supervisor:
    def __init__(
        self,
        process: subprocess.Popen[bytes],
        server: ControlServer,
        watchdog: Watchdog,
        run: Path,
        num_ranks: int | None,
        asked: list[int],
    ) -> None:
        self.process, self.server, self.watchdog, self.run = process, server, watchdog, run
        self.num_ranks = num_ranks
        self.asked = asked  # the signals that have come, to which the handler adds
        self.verdict: Verdict | None = None
        self._passed_on = 0
        self._kill_at: float | None = None
        self._all_there = False

    def wait(self) -> int:
        """Waits for the launcher's end; returns its exit code, negative for a signal."""
        with self._woken_by_its_end():
            while True:
                code = self.process.poll()
                if code is not None:
                    self._last_words()
                    return code
                if len(self.asked) > self._passed_on:
                    self._passed_on += 1
                    self._stop(first=self._passed_on == 1)
                self.server.turn(0.1)
                self._watch()

    def _last_words(self) -> None:
        """Receives what the guards reported before the launcher ended, which may be why it did."""
        deadline = time.monotonic() + LAST_WORDS_SECONDS
        while self.server.listening() and time.monotonic() < deadline:
            self.server.turn(0.05)
        if self.verdict is None and self._passed_on < 2:  # the second signal kills
            self.verdict = self.watchdog.judge(self.server.ranks)
            if self.verdict is not None:
                self._say(self.verdict)

    @contextlib.contextmanager
    def _woken_by_its_end(self) -> Iterator[None]:
        try:
            descriptor = os.pidfd_open(self.process.pid)
        except (AttributeError, OSError):  # an older system: it is noticed a tenth of a second later
            yield
            return
        self.server.watch(descriptor)
        try:
            yield
        finally:
            self.server.forget(descriptor)
            os.close(descriptor)

    def _stop(self, *, first: bool) -> None:
        if first:
            say("checkpointing at the next step boundary (Ctrl-C again: exit without saving)")
            self.server.tell({"do": "stop"})
            return
        self.server.tell({"do": "kill", "code": 128 + signal.SIGKILL})
        os.killpg(self.process.pid, signal.SIGKILL)

    def _watch(self) -> None:
        if not self._all_there and self.num_ranks is not None and len(self.server.ranks) >= self.num_ranks:
            self._all_there = True
            self.server.tell({"do": "forget environment"})
        if self._kill_at is not None:
            if self._only_the_lost_are_left():
                self._kill_at = min(self._kill_at, time.monotonic() + NOTICED_SECONDS)
            if time.monotonic() > self._kill_at:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.process.pid, signal.SIGKILL)
            return
        verdict = self.watchdog.judge(self.server.ranks)
        if verdict is not None:
            self._end_all(verdict)

    def _end_all(self, verdict: Verdict) -> None:
        """Reports what is wrong and ends every rank on every host."""
        self.verdict = verdict
        stacks = ""
        if verdict.dump:
            self.server.tell({"do": "dump"})
            deadline = time.monotonic() + DUMP_SECONDS
            while time.monotonic() < deadline and self.process.poll() is None:
                self.server.turn(0.1)
            stacks = f"; every rank's Python stacks are in {self.run / 'log'}"
        self._say(verdict, stacks)
        self.server.tell({"do": "kill", "code": verdict.code})
        self._kill_at = time.monotonic() + KILLED_SECONDS

    def _say(self, verdict: Verdict, stacks: str = "") -> None:
        kind = {LOST: "rank lost", HUNG: "hang"}.get(verdict.code, "failed")
        say(f"codeparrot-ds train: {kind}: {verdict.sentence}{stacks}")

    def _only_the_lost_are_left(self) -> bool:
        """Whether every rank but those of hosts that do not answer has ended: the launcher would wait for ever."""
        lost = self.verdict.hosts if self.verdict is not None else ()
        return bool(lost) and all(
            view.exit_code is not None or view.gone is not None
            for view in self.server.ranks.values()
            if view.host not in lost
        )


def say(text: str) -> None:
    """A line on standard error, in the place of the bar that rank 0 may be showing there; it draws it anew below."""
    start_of_line = "\r\x1b[K" if sys.stderr.isatty() else ""
    print(f"{start_of_line}{text}", file=sys.stderr, flush=True)


def _starts_and_status(run: Path) -> tuple[int, str | None]:
    """How often a run was started, and how the last start ended; no clock is asked, it may be set back in between."""
    try:
        with parts_of(run / "run.json"):
            record = read_object(run / "run.json")
            return len(record["starts"]), record["outcome"]["status"]
    except (OSError, DamagedFileError):
        return 0, None
