"""Where a rank is in its run, in memory that another process reads; nothing is waited for. No torch.

The rank writes step, phase and micro-batch as it goes; its guard (``supervision/guard.py``) reads them without asking
it, so that they are known of a rank that hangs or is stopped, too.
"""

from __future__ import annotations

import dataclasses
import mmap
import struct
import time

PHASES = ("start", "agree", "data", "forward", "backward", "step", "log", "evaluate", "save", "push", "end")
STEP_PHASES = ("agree", "data", "forward", "backward", "step", "log")
"""Those that a training step goes through; the watchdog learns its limits from the time in them."""
_LAYOUT = struct.Struct("=QqqqQdd")
_SLOTS = 8  # where the first of two places for a record begins; the byte before them says which one is whole


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """Where a rank is."""

    changes: int
    """Beats so far; ranks do the same ones in the same order, so the least is furthest behind."""
    phase: str
    """One of `PHASES`."""
    step: int
    """Optimizer step that is under way, from 1; 0 before the first."""
    batch: int
    """Micro-batch of the step, or of the evaluation, from 1; 0 outside of both."""
    steps_done: int
    """In this start."""
    seconds: float
    """In this place."""
    longest_seconds: float
    """In one place of a step, after the first step, which compiles and warms up."""

    def __str__(self) -> str:
        if self.phase == "start":
            return "while starting"
        batch = f" of micro-batch {self.batch}" if self.batch and self.phase != "evaluate" else ""
        if self.phase == "evaluate" and self.batch:
            batch = f", batch {self.batch}"
        return f"in {self.phase}{batch}, step {self.step}"


class Beats:
    """The shared memory of one rank and its guard.

    A record has several numbers, and its reader may look while they are being written. So there are two: the writer
    fills the one that is not in use and then counts up the byte that says which one is.
    """

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _SLOTS + 2 * _LAYOUT.size)  # shared with forked children
        self._changes = self._step = self._highest = self._steps_done = 0
        self._phase = self._batch = 0
        self._began = time.monotonic()
        self._longest = 0.0
        self._write()

    def beat(self, phase: str, *, step: int | None = None, batch: int = 0) -> None:
        """The rank enters a phase; ``step`` says which step from now on."""
        now = time.monotonic()
        if self._steps_done > 1 and PHASES[self._phase] in STEP_PHASES:
            self._longest = max(self._longest, now - self._began)
        if step is not None:
            self._steps_done += 0 < self._highest < step
            self._step, self._highest = step, max(step, self._highest)
        self._changes += 1
        self._phase, self._batch, self._began = PHASES.index(phase), batch, now
        self._write()

    def _write(self) -> None:
        count = (self._memory[0] + 1) % 256
        _LAYOUT.pack_into(
            self._memory, _SLOTS + count % 2 * _LAYOUT.size,
            *(self._changes, self._phase, self._step, self._batch, self._steps_done, self._began, self._longest),
        )  # fmt: skip
        self._memory[0] = count

    def read(self) -> Place:
        """What the rank wrote last; both processes have the same clock."""
        while True:
            count = self._memory[0]
            record = _LAYOUT.unpack_from(self._memory, _SLOTS + count % 2 * _LAYOUT.size)
            if self._memory[0] == count:  # else it may have been overwritten meanwhile
                break
        changes, phase, step, batch, steps_done, began, longest = record
        return Place(
            changes=changes,
            phase=PHASES[phase],
            step=step,
            batch=batch,
            steps_done=steps_done,
            seconds=max(0.0, time.monotonic() - began),
            longest_seconds=longest,
        )


_current: Beats | None = None


def set_current(beats: Beats | None) -> None:
    """Says which memory :func:`beat` writes to."""
    global _current
    _current = beats


def beat(phase: str, *, step: int | None = None, batch: int = 0) -> None:
    """:meth:`Beats.beat` for this process's rank; nothing where no guard reads it."""
    if _current is not None:
        _current.beat(phase, step=step, batch=batch)
