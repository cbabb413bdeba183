"""A run's metrics in a terminal, once or as they come. Neither torch nor numpy here."""

from __future__ import annotations

import math
import os
import shutil
import sys
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from codeparrot_ds.json_files import MAX_LINE_BYTES
from codeparrot_ds.metrics import read_row
from codeparrot_ds.report.run_list import FINISHED, RUNNING, RunState, how_to_resume, state_of, step_of
from codeparrot_ds.report.units import short
from codeparrot_ds.shell import next_steps, pasteable
from codeparrot_ds.terminal import duration

SECONDS = 1.0
"""Between two looks at a run that is followed."""
LAST_ROWS = 8
BARS, PLAIN_BARS = "▁▂▃▄▅▆▇█", "_.-=*#"
_LABEL, _FIGURES = 14, 24  # columns beside a sparkline
_CURVES = (
    ("loss", "loss"),
    ("eval loss", "eval_loss"),
    ("gradient norm", "grad_norm"),
    ("learning rate", "learning_rate"),
    ("tokens/s", "tokens_per_second"),
)


class Rows:
    """The rows of a run's ``metrics.jsonl``, of which each call of `read` reads what is new.

    Of those before, the last are kept, and the numbers of the curves: a million rows as objects take 2.5 GB.
    """

    def __init__(self, run: Path) -> None:
        self._path = run / "metrics.jsonl"
        self._begin()

    def _begin(self) -> None:
        self._offset = 0
        self.curves = {key: array("d") for _, key in _CURVES}
        self.last: deque[dict[str, Any]] = deque(maxlen=LAST_ROWS)
        self.last_timed: dict[str, Any] = {}
        """The last with ``step_seconds``; empty before the first."""

    def read(self) -> Iterator[dict[str, Any]]:
        """Yields the rows that came since the last call; after a restart, which drops rows, all that are left."""
        if not self._path.is_file():
            return
        with self._path.open("rb") as file:
            if os.fstat(file.fileno()).st_size < self._offset:
                self._begin()
            file.seek(self._offset)
            while line := file.readline(MAX_LINE_BYTES):
                if not line.endswith(b"\n") and len(line) < MAX_LINE_BYTES:  # the last line may be half-written
                    break
                self._offset += len(line)
                if (row := read_row(line)) is not None:
                    self._keep(row)
                    yield row

    def _keep(self, row: dict[str, Any]) -> None:
        self.last.append(row)
        for key, values in self.curves.items():
            if isinstance(row.get(key), (int, float)):
                values.append(row[key])
        if isinstance(row.get("step_seconds"), (int, float)):
            self.last_timed = row

    def read_all(self) -> Rows:
        """Reads what is new, for those who look at what is kept; returns itself."""
        deque(self.read(), maxlen=0)
        return self


def frame(run: RunState, rows: Rows, *, columns: int = 80, bars: str = BARS) -> list[str]:
    """A run in lines of at most so many columns: where it stands, its curves, its last rows."""
    done = f" ({run.step / run.max_train_steps:.0%})" if run.step and run.max_train_steps else ""
    left, last = "", rows.last_timed
    if run.status == RUNNING and run.max_train_steps and last and math.isfinite(last["step_seconds"]):
        left = f", {duration((run.max_train_steps - last['step']) * last['step_seconds'])} left"
    lines = [f"{run.name}  {run.status}, step {step_of(run)}{done}{left}", ""]
    for label, key in _CURVES:
        if values := rows.curves[key]:
            curve = sparkline(values, max(8, columns - _LABEL - _FIGURES - 2), bars)
            lines.append(f"{label:<{_LABEL}}{curve}  {short(values[0])} to {short(values[-1])}")
    if not rows.last:
        return [*lines, "no metrics yet: the first come with the first evaluation or logged step"]
    head = f"{'step':>9}  {'loss':>8}  {'eval loss':>9}  {'learning rate':>13}  {'tokens/s':>9}"
    lines += ["", head, *map(_line_of, rows.last)]
    return [line[: columns - 1] for line in lines]


def _line_of(row: dict[str, Any]) -> str:
    loss, evaluated = (
        f"{row[key]:.4f}" if isinstance(row.get(key), (int, float)) else "" for key in ("loss", "eval_loss")
    )
    rate, speed = (
        short(row[key]) if isinstance(row.get(key), (int, float)) else ""
        for key in ("learning_rate", "tokens_per_second")
    )
    return f"{row['step']:>9,}  {loss:>8}  {evaluated:>9}  {rate:>13}  {speed:>9}".rstrip()


def sparkline(values: Sequence[float], width: int, bars: str = BARS) -> str:
    """Values as a row of bars, each the mean of a stretch of them; a gap where none of these is finite."""
    width = min(width, len(values))
    stretches = [values[at * len(values) // width : (at + 1) * len(values) // width] for at in range(width)]
    means = []
    for stretch in stretches:
        known = [value for value in stretch if math.isfinite(value)]
        means.append(sum(known) / len(known) if known else math.nan)
    known = [mean for mean in means if math.isfinite(mean)]
    low, high = min(known, default=0.0), max(known, default=0.0)
    scale = (len(bars) - 1) / (high - low) if high > low else 0.0
    return "".join(bars[round((mean - low) * scale)] if math.isfinite(mean) else " " for mean in means)


def show(run: Path) -> str:
    """A run as it stands."""
    rows = Rows(run).read_all()
    state = state_of(run)
    return "\n".join(frame(state, rows, columns=_columns(), bars=_bars())) + after(state)


def after(run: RunState) -> str:
    """What to type next."""
    if run.status == FINISHED:
        return "\n" + next_steps(pasteable("report", run.path), pasteable("evaluate", run.path))
    if run.status == RUNNING:
        return "\n" + next_steps(pasteable("runs", run.path, "--follow"))
    return how_to_resume([run])


def follow(run: Path, *, wait: Callable[[float], None] = time.sleep) -> None:
    """Shows a run's metrics as they come, until it ends or Ctrl-C.

    A terminal has one picture that is drawn anew; elsewhere each row is a line.
    """
    redraws = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    rows, height = Rows(run), 0
    try:
        while True:
            state = state_of(run)  # before the rows: what was written before its end is shown
            if redraws:
                lines = frame(state, rows.read_all(), columns=_columns(), bars=_bars())
                lines += ["", "Ctrl-C ends this view, not the run"] if state.status == RUNNING else []
                # Up to the first line of the last picture, and clear from there on.
                print(f"\x1b[{height}A\x1b[J" * bool(height) + "\n".join(lines), flush=True)
                height = len(lines)
            else:
                for row in rows.read():
                    print(_plainly(row), flush=True)
            if state.status != RUNNING:
                break
            wait(SECONDS)
    except KeyboardInterrupt:
        state = state_of(run)
        if redraws:
            print()
    if not redraws:
        print(f"{state.name}: {state.status}, step {step_of(state)}")
    print(after(state).lstrip("\n"))


def _plainly(row: dict[str, Any]) -> str:
    names = ("loss", "eval_loss", "perplexity", "learning_rate", "grad_norm", "tokens_per_second")
    facts = [f"{name} {short(row[name])}" for name in names if isinstance(row.get(name), (int, float))]
    return f"step {row['step']:,}: {', '.join(facts)}"


def _columns() -> int:
    return min(120, shutil.get_terminal_size().columns)


def _bars() -> str:
    try:
        BARS.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return PLAIN_BARS
    return BARS
