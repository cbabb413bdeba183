"""How far a comparison is: a bar on a terminal, a line a trial elsewhere, with the time that is left."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from codeparrot_ds.run.comparison import Request, Trial, read_result


class TrialProgress:
    """Told of steps and of finished trials; use it as a context manager."""

    def __init__(self, trials: Sequence[Trial], request: Request, folder: Path, say: Callable[[str], None]) -> None:
        self._request, self._say = request, say
        results = {trial.name: read_result(folder, trial) for trial in trials}
        self._left = [trial for trial in trials if results[trial.name] is None]
        self._total = len(trials)
        # How long a trial takes depends on its ranks more than on anything else.
        self._seconds: list[tuple[int, float]] = [
            (trial.candidate.world_size, result["seconds"])
            for trial in trials
            if (result := results[trial.name]) is not None
        ]
        self._bar: Any = None

    def __enter__(self) -> TrialProgress:
        if sys.stderr.isatty() and self._left:
            from tqdm import tqdm

            self._bar = tqdm(
                total=len(self._left) * self._request.steps, unit="step", dynamic_ncols=True, desc="comparing"
            )
        if len(self._left) < self._total and self._left:
            self._tell(f"{self._total - len(self._left)} of {self._total} trials are done; going on with the others")
        self._started = time.monotonic()
        self._bar_base = 0
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def steps_done(self, steps: int) -> None:
        """The steps of the trial that runs."""
        if self._bar is not None:
            self._bar.n = self._bar_base + min(steps, self._request.steps)
            self._bar.set_postfix_str(f"{self._left[0].name}, {self._time_left()}")
            self._bar.refresh()

    def finished(self, trial: Trial, result: dict[str, Any]) -> None:
        """A trial has its result."""
        self._left.remove(trial)
        self._seconds.append((trial.candidate.world_size, result["seconds"]))
        self._bar_base += self._request.steps
        number = self._total - len(self._left)
        what = result["reason"] or _speed(result, self._request.warmup_steps)
        name = f"sensitivity run of {trial.perturbed}" if trial.perturbed else trial.candidate.name
        status = "" if result["status"] == "finished" else f"{result['status']}: "
        self._tell(f"[{number}/{self._total}] {name}: {status}{what}; {result['seconds']:.0f} s, {self._time_left()}")

    def _time_left(self) -> str:
        from codeparrot_ds.run.tracking import duration

        if not self._left:
            return "nothing left"
        if not self._seconds:
            return "time left unknown"
        everything = statistics.mean(seconds for _, seconds in self._seconds)
        total = 0.0
        for trial in self._left:
            alike = [seconds for ranks, seconds in self._seconds if ranks == trial.candidate.world_size]
            total += statistics.mean(alike) if alike else everything
        return f"about {duration(total)} left"

    def _tell(self, line: str) -> None:
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        else:
            self._say(line)


def _speed(result: dict[str, Any], warmup_steps: int) -> str:
    rows = (result["found"] or {}).get("rows", [])[warmup_steps:]
    if not rows:
        return "no scored step"
    return f"{statistics.median(row['tokens_per_second'] for row in rows):,.0f} tokens/s"
