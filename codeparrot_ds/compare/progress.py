"""How far a comparison is: a bar on a terminal, a line per trial elsewhere, with the time that is left."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence

from codeparrot_ds.compare.candidates import (
    Candidate,
    Request,
    Results,
    Trial,
    all_trials,
    left_to_run,
    reference_of,
)
from codeparrot_ds.compare.results import FINISHED, TrialResult
from codeparrot_ds.telemetry.tracking import AboveTheBar, Bar
from codeparrot_ds.terminal import duration

BESIDE_THE_NAME = 56
"""Columns of the bar, its counts and the time that is left."""


class TrialProgress:
    """Receives steps and finished trials; a context manager."""

    def __init__(
        self, request: Request, candidates: Sequence[Candidate], results: Results, say: Callable[[str], None]
    ) -> None:
        self._request, self._candidates, self._results, self._say = request, candidates, results, say
        self._left = left_to_run(candidates, results)
        # How long a trial takes depends on its ranks more than on anything else.
        ready = [candidate for candidate in candidates if candidate.skipped is None]
        self._seconds: list[tuple[int, float]] = [
            (trial.candidate.world_size, result.seconds)
            for trial in all_trials(ready, reference_of(candidates, results))
            if (result := results.of(trial)) is not None and result.status == FINISHED
        ]
        self._done = len(self._seconds)
        self._bar: Bar | None = None
        self._total_steps = len(self._left) * request.steps
        self._trial_began = time.monotonic()

    def __enter__(self) -> TrialProgress:
        if sys.stderr.isatty() and self._left:
            self._bar = Bar(start=0, total=self._total_steps)
            self.steps_done(0)
        if self._done and self._left:
            self._tell(f"{self._done} of {self._done + len(self._left)} trials are done; continuing with the others")
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            if not self._left:
                self._bar.show(self._total_steps, [self._time_left()])
            self._bar.close()

    def steps_done(self, steps: int) -> None:
        """The steps of the trial that runs."""
        if self._bar is not None and self._left:
            before = self._total_steps - len(self._left) * self._request.steps
            room = max(8, self._bar.columns - BESIDE_THE_NAME)
            name = _title(self._left[0])
            name = name if len(name) <= room else f"{name[: room - 1]}…"
            self._bar.show(before + min(steps, self._request.steps), [self._time_left(), name])

    def finished(self, trial: Trial, result: TrialResult) -> None:
        """A trial has its result."""
        self._done += 1
        if result.status == FINISHED:
            self._seconds.append((trial.candidate.world_size, result.seconds))
        self._left = left_to_run(self._candidates, self._results)
        self._trial_began = time.monotonic()
        what = result.reason or _speed(result, self._request.warmup_steps)
        status = "" if result.status == FINISHED else f"{result.status}: "
        place = f"[{self._done}/{self._done + len(self._left)}]"
        self._tell(f"{place} {_title(trial)}: {status}{what}; {result.seconds:.0f} s, {self._time_left()}")

    def _time_left(self) -> str:
        if not self._left:
            return "nothing left"
        if not self._seconds:
            return "time left unknown"
        everything = statistics.mean(seconds for _, seconds in self._seconds)
        each = []
        for trial in self._left:
            alike = [seconds for ranks, seconds in self._seconds if ranks == trial.candidate.world_size]
            each.append(statistics.mean(alike) if alike else everything)
        each[0] = max(0.0, each[0] - (time.monotonic() - self._trial_began))  # of the trial that runs
        return f"about {duration(sum(each))} left"

    def _tell(self, line: str) -> None:
        if self._bar is not None:
            AboveTheBar().write(f"{line}\n")
        else:
            self._say(line)


def _title(trial: Trial) -> str:
    return f"sensitivity run of {trial.perturbed}" if trial.perturbed else trial.candidate.name


def _speed(result: TrialResult, warmup_steps: int) -> str:
    rows = result.rows[warmup_steps:]
    if not rows:
        return "no scored step"
    return f"{statistics.median(row['tokens_per_second'] for row in rows):,.0f} tokens/s"
