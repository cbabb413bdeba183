"""The runs of a folder in a table: step, loss, status, when, and how to resume. Neither torch nor numpy here."""

from __future__ import annotations

import dataclasses
import datetime
import fcntl
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from codeparrot_ds.config.files import read_saved_fields
from codeparrot_ds.json_files import DamagedFileError, lines_from_the_end, parts_of, read_object
from codeparrot_ds.metrics import read_row
from codeparrot_ds.shell import next_steps, pasteable
from codeparrot_ds.terminal import duration

RUNNING, FINISHED, INTERRUPTED, DAMAGED = "running", "finished", "interrupted", "damaged"
MOST_COMMANDS = 5
_LOCK = ".lock"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunState:
    """Where a run stands."""

    name: str
    path: Path
    status: str
    """What its last start came to: running, finished, stopped, diverged; interrupted where it ended without a word,
    imported or not started where there was none, damaged where its record cannot be read."""
    step: int | None = None
    max_train_steps: int | None = None
    loss: float | None = None
    """Nats per token, of the last logged step."""
    eval_loss: float | None = None
    """Of the last evaluation."""
    time: float | None = None
    """When it was last heard of, in seconds since the epoch."""
    resume: str | None = None
    """The command that continues it; None where nothing is left to do or it runs."""

    def as_json(self) -> dict[str, Any]:
        """By name; a number that JSON has no word for is a string that ``float`` reads."""
        values = dataclasses.asdict(self) | {"path": str(self.path)}
        return {
            key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in values.items()
        }


def runs_in(folder: Path) -> list[RunState]:
    """The runs in a folder, that which was heard of last first."""
    found = [state_of(path.parent) for path in sorted(folder.glob("*/run.json"))]
    return sorted(found, key=lambda run: run.time or 0.0, reverse=True)


def state_of(run: Path) -> RunState:
    """Where a run stands by what lies in its folder; one whose files are damaged is said to be so."""
    try:
        with parts_of(run):
            record = read_object(run / "run.json")
            config = read_saved_fields(run / "config.yaml")
            outcome = dict(record.get("outcome") or {})
            starts = [datetime.datetime.fromisoformat(start["time"]).timestamp() for start in record.get("starts", ())]
            resume = _command(run, record, config)
            total = config.get("max_train_steps")
            max_train_steps = None if total is None else int(total)
            step = None if outcome.get("step") is None else int(outcome["step"])
            status = str(outcome.get("status") or ("imported" if "imported" in record else "not started"))
    except (OSError, DamagedFileError):
        return RunState(name=run.name, path=run, status=DAMAGED)
    training, evaluation = _last_rows(run / "metrics.jsonl", "loss", "eval_loss")
    last = max(training, evaluation, key=lambda row: row.get("step", -1))
    if status == RUNNING and not _is_held(run / _LOCK):
        status = INTERRUPTED
    times = [value for value in (last.get("time"), *starts) if isinstance(value, (int, float))]
    return RunState(
        name=run.name,
        path=run,
        status=status,
        step=last.get("step", step),
        max_train_steps=max_train_steps,
        loss=_number(training.get("loss")),
        eval_loss=_number(evaluation.get("eval_loss")),
        time=max(times, default=None),
        resume=None if status in (RUNNING, FINISHED) else resume,
    )


def _command(run: Path, record: dict[str, Any], config: dict[str, Any]) -> str:
    """What continues a run as it was: from its newest checkpoint, on as many ranks."""
    options: list[object] = [] if config.get("resume", "auto") == "auto" else ["--resume", "auto"]
    if len(record.get("hosts", ())) > 1:
        options += ["--hostfile", "HOSTFILE"]
    elif (record.get("world_size") or 1) > 1:
        options += ["--num-gpus", record["world_size"]]
    return pasteable("train", "--config", run / "config.yaml", *options)


def _last_rows(metrics: Path, *keys: str) -> list[dict[str, Any]]:
    """For each key the last row of ``metrics.jsonl`` that has it, empty where none has; the end alone is read."""
    found: dict[str, dict[str, Any]] = {}
    signs = {key: f'"{key}"'.encode() for key in keys}
    for line in lines_from_the_end(metrics):
        # A line that a crash left half-written is no row.
        if any(key not in found and sign in line for key, sign in signs.items()) and (row := read_row(line)):
            found = {key: row for key in keys if key in row} | found
            if len(found) == len(keys):
                break
    return [found.get(key, {}) for key in keys]


def _number(value: Any) -> float | None:
    return value if isinstance(value, (int, float)) else None


def _is_held(lock: Path) -> bool:
    """Whether the process that trains the run is alive: it holds the lock until it ends."""
    try:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:  # held; or nobody here may know, and then the record stands
        return True
    return False


# --------------------------------------------------------------------------------------------------------------------
# In words


def table(runs: Sequence[RunState], *, now: float | None = None) -> str:
    """The runs a line each, in 80 columns where the names are no longer than those that are made up; how to resume."""
    now = time.time() if now is None else now
    rows = [("run", "step", "loss", "eval", "status", "when")]
    for run in runs:
        age = "" if run.time is None else " ".join(duration(now - run.time).split()[:2]) + " ago"
        rows.append((run.name, step_of(run), _loss(run.loss), _loss(run.eval_loss), run.status, age))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    sides = ("<", ">", ">", ">", "<", "<")
    lines = [
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)) for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines) + how_to_resume(runs)


def step_of(run: RunState) -> str:
    """``120 of 300``; a dash where nothing is known."""
    step = "–" if run.step is None else f"{run.step:,}"
    return step if run.max_train_steps is None else f"{step} of {run.max_train_steps:,}"


def _loss(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def how_to_resume(runs: Sequence[RunState]) -> str:
    """The commands that continue those of the runs that can be; empty where none can."""
    commands = [run.resume for run in runs if run.resume is not None]
    if not commands:
        return ""
    more = len(commands) - MOST_COMMANDS
    lines = ["", "", "To resume:", *(f"  {command}" for command in commands[:MOST_COMMANDS])]
    return "\n".join([*lines, *([f"  … and {more} more"] if more > 0 else [])])


def nothing_in(folder: Path) -> str:
    """What to say of a folder without runs, with a folder near it that has some."""
    found = [*folder.glob("*/*/run.json"), *Path().glob("*/run.json"), *Path().glob("*/runs/*/run.json")]
    elsewhere = sorted({path.parent.parent for path in found} - {folder})
    if not elsewhere:
        return f"no runs in {folder}\n" + next_steps(pasteable("demo"))
    return f"no runs in {folder}\n" + next_steps(*(pasteable("runs", path) for path in elsewhere[:MOST_COMMANDS]))
