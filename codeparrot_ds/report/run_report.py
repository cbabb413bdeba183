"""The report of one or several runs: pictures and tables out of ``metrics.jsonl`` and what else lies in a run's folder.

``report.html`` needs no other file: its pictures and style are inside. ``report.md`` shows the PNGs beside it, and
``report.json`` has the same figures for programs.
"""

from __future__ import annotations

import datetime
import gc
import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from codeparrot_ds.checkpoint.folders import checkpoint_folders
from codeparrot_ds.config.files import read_saved_fields
from codeparrot_ds.errors import UserError
from codeparrot_ds.json_files import lines_of, parts_of, read_object
from codeparrot_ds.metrics import read_row
from codeparrot_ds.paths import no_run
from codeparrot_ds.report.page_kit import writable
from codeparrot_ds.report.plots import Chart, Series, picture_of
from codeparrot_ds.report.run_page import page_of

LONG = 100_000
"""Rows of a run from which on a report takes care of its memory."""
# The keys of ``metrics.jsonl`` that a report looks at.
_WHOLE = ("step", "tokens", "memory_bytes", "skipped_steps", "slowest_rank")
_OF_TRAINING = (
    *("loss", "learning_rate", "grad_norm", "tokens_per_second", "mfu", "step_seconds", "data_wait_seconds", "time"),
    *("rank_seconds_median", "rank_seconds_max", *_WHOLE),
)
_OF_EVALUATION = (
    *("eval_loss", "perplexity", "bits_per_byte", "parsing_share", "pass_at_1", "time", "step", "tokens"),
)


class Rows:
    """Rows of ``metrics.jsonl`` as columns: a million of them take 9 bytes a number, and as objects 2.5 GB.

    Args:
        keys: of the columns; what else a row has is not kept.
        most: rows that there may be; those that do not come take no memory.
    """

    def __init__(self, keys: Sequence[str], most: int = 0) -> None:
        self._count = 0
        self._values = {key: np.empty(most) for key in keys}
        self._there = {key: np.zeros(most, dtype=bool) for key in keys}

    def __len__(self) -> int:
        return self._count

    def append(self, row: dict[str, Any]) -> None:
        for key, values in self._values.items():
            value = row.get(key)
            is_there = isinstance(value, int if key == "tokens" else (int, float))
            values[self._count] = value if is_there else math.nan
            self._there[key][self._count] = is_there
        self._count += 1

    def there(self, key: str) -> np.ndarray:
        """Which rows have a number."""
        return self._there[key][: self._count]

    def values(self, key: str) -> np.ndarray:
        """Of every row; NaN where it has no number."""
        return self._values[key][: self._count]

    def known(self, key: str) -> np.ndarray:
        """The numbers of the rows that have one."""
        return _where(self.there(key), self.values(key))

    def row(self, index: int) -> dict[str, Any]:
        """The numbers of one row."""
        found = {key: float(self._values[key][index]) for key in self._values if self._there[key][index]}
        return {key: _whole(value) if key in _WHOLE else value for key, value in found.items()}


def _where(chosen: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The chosen values, without a copy where they are all."""
    return values if chosen.all() else values[chosen]


def _whole(value: float) -> int | float:
    return int(value) if value.is_integer() else value


@dataclass(kw_only=True)
class RunRecord:
    """What a run left on disk. NaN and infinity in its rows are floats."""

    path: Path
    name: str
    training: Rows = field(default_factory=lambda: Rows(_OF_TRAINING))
    evaluation: Rows = field(default_factory=lambda: Rows(_OF_EVALUATION))
    samples: list[dict[str, Any]] = field(default_factory=list)
    """What the model completed at its last evaluation; rows of ``samples.jsonl``."""
    unreadable_rows: int = 0
    record: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    ds_config: dict[str, Any] = field(default_factory=dict)


def write_report(runs: Sequence[Path | str], out: Path | str | None = None) -> Path:
    """Write report.html, report.md, report.json and the PNGs; return the path of report.html.

    Args:
        runs: Folders of runs; several are drawn over each other.
        out: Folder of the report; by default ``report`` in the run's folder, or beside the first of several runs.

    Raises:
        UserError: a folder that is no run, nothing logged yet, or a place that cannot be written.
    """
    if not runs:
        raise UserError("no run given; name at least one run folder")
    records = [read_run(path) for path in dict.fromkeys(Path(run).resolve() for run in runs)]
    if not any(len(run.training) or len(run.evaluation) for run in records):
        raise UserError(f"{records[0].path} has no metrics yet; wait for its first logged step (log_steps)")
    _tell_apart(records)
    if out is None:
        out = (records[0].path if len(records) == 1 else records[0].path.parent) / "report"
    folder = Path(out)
    summaries = [summarize(run) for run in records]
    settings = [{"config": run.config, "ds_config": run.ds_config} for run in records]
    pictures = []
    for chart in charts(records):
        pictures.append(picture_of(chart))
        if any(len(run.training) > LONG for run in records):
            gc.collect()  # a figure is a circle of objects, and holds its points until the collector finds it
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for picture in pictures:
            (folder / f"{picture.name}.png").write_bytes(picture.images["light"])
        figures = json.dumps({"runs": _without_nan(summaries)}, indent=2, allow_nan=False)
        (folder / "report.json").write_text(figures + "\n", encoding="utf-8")
        for form in ("md", "html"):
            (folder / f"report.{form}").write_text(page_of(form, summaries, settings, pictures), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write the report to {folder}: {error.strerror}") from error
    return folder / "report.html"


# --------------------------------------------------------------------------------------------------------------------
# Reading


def read_run(path: Path) -> RunRecord:
    """A run as it lies on disk, finished, running or crashed.

    Raises:
        UserError: the folder is missing or is no run, or one of its files is not what it should be.
    """
    if not path.is_dir():
        raise UserError(no_run(str(path)))
    if not (path / "run.json").is_file() and not (path / "metrics.jsonl").is_file():
        inside = sorted(metrics.parent.name for metrics in path.glob("*/metrics.jsonl"))
        hint = f"; did you mean {path / inside[-1]}?" if inside else ""
        raise UserError(f"{path} is not a run: it has neither run.json nor metrics.jsonl{hint}")
    record = _record_of(path / "run.json")
    run = RunRecord(path=path, name=writable(str(record.get("name") or path.name)), record=record)
    run.config = read_saved_fields(path / "config.yaml") if (path / "config.yaml").is_file() else {}
    run.ds_config = read_object(path / "ds_config.json") if (path / "ds_config.json").is_file() else {}
    most = sum(1 for _ in lines_of(path / "metrics.jsonl"))
    run.training, run.evaluation = Rows(_OF_TRAINING, most), Rows(_OF_EVALUATION, most)
    for line in itertools.islice(lines_of(path / "metrics.jsonl"), most):  # a run may write more of them meanwhile
        row = read_row(line)
        if row is None:
            run.unreadable_rows += 1
        elif "eval_loss" in row:
            run.evaluation.append(row)
        else:
            run.training.append(row)
    run.samples = _last_samples(path / "samples.jsonl")
    return run


def _last_samples(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for row in map(read_row, lines_of(path)):
        if row is not None:
            if rows and rows[-1]["step"] != row["step"]:
                rows.clear()
            rows.append(row)
    return rows


def _record_of(path: Path) -> dict[str, Any]:
    """What ``run.json`` says that a report shows, each of the type that it has there; empty where there is none."""
    if not path.is_file():
        return {}
    record = read_object(path)
    kinds: dict[str, Any] = {"outcome": dict, "memory": dict, "starts": list, "rank_hosts": list}
    kinds |= dict.fromkeys(("parameters", "world_size", "zero_stage"), int)
    kinds |= dict.fromkeys(("name", "precision", "hub"), str) | {"peak_flops": (int, float)}
    with parts_of(path):
        for key, kind in kinds.items():
            if not isinstance(record.get(key), (kind, type(None))):
                raise TypeError(f"{key} is {record[key]!r:.60}")
        data = _data_account(record.get("data")) or {}
        for key in ("bad_documents", "rows_per_lane"):
            if not isinstance(data.get(key), (list, type(None))):
                raise TypeError(f"{key} is {data[key]!r:.60}")
        sorted(data.get("rows_per_lane") or ())
    return record


def _tell_apart(runs: Sequence[RunRecord]) -> None:
    """Runs of one name in two output folders get their folder's name in front."""
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = f"{run.path.parent.name}/{run.path.name}"


# --------------------------------------------------------------------------------------------------------------------
# Figures


def summarize(run: RunRecord) -> dict[str, Any]:
    """The run's final figures; None where the run does not say.

    Throughput is the median over logged rows, which one slow step does not move. ``data_wait_fraction`` is the share of
    all step time. ``total_hours`` counts from each start to its last row, so the time between two starts is left out.
    """
    farthest = [rows.row(int(rows.values("step").argmax())) for rows in (run.training, run.evaluation) if len(rows)]
    last = max(farthest, key=lambda row: row["step"], default={})
    first, final, best = _evaluations(run.evaluation)
    losses = run.training.known("loss")
    outcome = run.record.get("outcome") or {}
    return {
        "name": run.name,
        "status": _text(outcome.get("status")),
        "model": _text(run.config.get("model")),
        "parameters": run.record.get("parameters"),
        "world_size": run.record.get("world_size"),
        "zero_stage": run.record.get("zero_stage"),
        "precision": run.record.get("precision"),
        "global_batch_size": run.config.get("global_batch_size"),
        "seq_length": run.config.get("seq_length"),
        "steps": last.get("step"),
        "max_train_steps": run.config.get("max_train_steps"),
        "tokens": last.get("tokens"),
        "first_eval_loss": first.get("eval_loss"),
        "last_eval_loss": final.get("eval_loss"),
        "best_eval_loss": best.get("eval_loss"),
        "first_perplexity": first.get("perplexity"),
        "last_perplexity": final.get("perplexity"),
        "best_perplexity": best.get("perplexity"),
        "best_step": best.get("step"),
        "bits_per_byte": final.get("bits_per_byte"),
        "last_loss": float(losses[-1]) if len(losses) else None,
        "non_finite_losses": int((~np.isfinite(losses)).sum()),
        "skipped_steps": _most(run.training.known("skipped_steps")),
        "tokens_per_second": _median(run.training.known("tokens_per_second")),
        "mfu": _median(run.training.known("mfu")),
        "peak_flops": run.record.get("peak_flops"),
        "data_wait_fraction": _data_wait_fraction(run.training),
        "slowest_rank": _slowest_rank(run),
        "memory_bytes": _most(run.training.known("memory_bytes")),
        "predicted_memory_bytes": (run.record.get("memory") or {}).get("predicted_bytes"),
        "total_hours": _total_hours(run),
        "starts": len(run.record.get("starts") or []) or None,
        "checkpoints": sorted(each.step for each in checkpoint_folders(run.path / "checkpoints")),
        "branch": run.record.get("name") if run.record.get("hub") else None,
        "hub": run.record.get("hub"),
        "unreadable_rows": run.unreadable_rows,
        "data": _data_account(run.record.get("data")),
        "completions": run.samples,
    }


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _data_account(data: Any) -> dict[str, Any] | None:
    """What the run says of the data it read (``opening.data_account``); None for runs before it was kept."""
    return data if isinstance(data, dict) and "summary" in data else None


def _evaluations(rows: Rows) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The first, the last and the best evaluation; empty without any."""
    if not len(rows):
        return {}, {}, {}
    losses = rows.values("eval_loss")
    finite = np.isfinite(losses)
    best = rows.row(int(np.where(finite, losses, np.inf).argmin())) if finite.any() else {}
    return rows.row(0), rows.row(len(rows) - 1), best


def _most(values: np.ndarray) -> float | None:
    finite = values[np.isfinite(values)]
    return _whole(float(finite.max())) if len(finite) else None


def _median(values: np.ndarray) -> float | None:
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else None


def _data_wait_fraction(rows: Rows) -> float | None:
    wait, step = rows.values("data_wait_seconds"), rows.values("step_seconds")
    timed = np.isfinite(wait) & np.isfinite(step)
    # Python's sum, as ever: NumPy's adds in another order.
    total = sum(step[timed].data)
    return sum(wait[timed].data) / total if total else None


def _slowest_rank(run: RunRecord) -> dict[str, Any] | None:
    """The rank that was the slowest in most logged rows: ``rank``, ``host``, ``share`` of the rows, ``factor``.

    ``factor`` is its own time a step over the median rank's, the median over those rows.
    """
    most, median, ranks = (
        run.training.values(key) for key in ("rank_seconds_max", "rank_seconds_median", "slowest_rank")
    )
    compared = np.isfinite(most) & np.isfinite(median) & (median != 0) & np.isfinite(ranks)
    if not compared.any():
        return None
    rank = int(Counter(ranks[compared].data).most_common(1)[0][0])
    slowest = compared & (ranks == rank)
    hosts = run.record.get("rank_hosts") or []
    return {
        "rank": rank,
        "host": str(hosts[rank]) if 0 <= rank < len(hosts) else None,
        "share": int(slowest.sum()) / int(compared.sum()),
        "factor": float(np.median(most[slowest] / median[slowest])),
    }


def _total_hours(run: RunRecord) -> float | None:
    times = np.sort(np.concatenate([run.training.known("time"), run.evaluation.known("time")]))
    times = times[np.isfinite(times)]
    starts = []
    for start in run.record.get("starts") or []:
        try:
            starts.append(datetime.datetime.fromisoformat(start["time"]).timestamp())
        except (KeyError, TypeError, ValueError, OverflowError):
            return None
    if not len(times):
        return None
    seconds = 0.0
    starts = starts or [float(times[0])]
    for start, end in zip(starts, [*starts[1:], math.inf], strict=True):
        last = int(np.searchsorted(times, end)) - 1  # the last before the next start
        if last >= 0 and times[last] >= start:
            seconds += float(times[last]) - start
    return seconds / 3600


def _without_nan(value: Any) -> Any:
    """JSON has no NaN or infinity: they become the strings that ``float`` reads, as in ``metrics.jsonl``."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


# --------------------------------------------------------------------------------------------------------------------
# Charts


def charts(runs: Sequence[RunRecord]) -> Iterator[Chart]:
    """The charts for which at least one run has a value, in reading order, each made when it is asked for.

    Steps are compared where they are the same amount of text; runs with other batches share an axis of tokens.
    """
    tokens_a_step = {(run.config.get("global_batch_size"), run.config.get("seq_length")) for run in runs}
    x = "step" if len(tokens_a_step) == 1 else "tokens"

    def evaluated(key: str, **options: Any) -> tuple[Series, ...]:
        return _lines(runs, "evaluation", x, lambda rows: (rows.values(key), rows.there(key)), markers=True, **options)

    def trained(key: str, scale: float = 1, **options: Any) -> tuple[Series, ...]:
        return _lines(runs, "training", x, lambda rows: (_times(rows.values(key), scale), rows.there(key)), **options)

    def shares(key: str) -> tuple[Series, ...]:
        return _lines(runs, "evaluation", x, lambda rows: (rows.values(key) * 100, rows.there(key)), markers=True)

    def waiting(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
        wait, step = rows.values("data_wait_seconds"), rows.values("step_seconds")
        return _quotient(wait, step) * 100, np.isfinite(wait) & np.isfinite(step) & (step != 0)

    def ratio(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
        most, median = rows.values("rank_seconds_max"), rows.values("rank_seconds_median")
        there = rows.there("rank_seconds_max") & rows.there("rank_seconds_median")
        return _quotient(most, median), there & (median != 0)

    def both() -> tuple[Series, ...]:
        return trained("loss", label="training") + evaluated("eval_loss", label="validation", style=1)

    steady = {"from_zero": True}
    noisy = {"from_zero": True, "smooth": True}
    of_loss = {"smooth": True}
    wanted: list[tuple[str, str, str, Callable[[], tuple[Series, ...]], dict[str, bool]]] = [
        ("perplexity", "Validation perplexity", "log scale", lambda: evaluated("perplexity"), {"log": True}),
        ("learning_rate", "Learning rate", "", lambda: trained("learning_rate"), steady),
        ("grad_norm", "Gradient norm", "before clipping", lambda: trained("grad_norm"), noisy),
        ("tokens_per_second", "Throughput", "tokens/s", lambda: trained("tokens_per_second"), noisy),
        ("parsing_share", "Completions that are Python", "%", lambda: shares("parsing_share"), steady),
        ("pass_at_1", "Problems solved", "%", lambda: shares("pass_at_1"), steady),
        ("mfu", "Model FLOPs utilization", "% of peak", lambda: trained("mfu", 100), noisy),
        ("data_wait", "Waiting for data", "% of step time", lambda: _lines(runs, "training", x, waiting), noisy),
        (
            *("slowest_rank", "Slowest rank over the median rank", "own time before collectives"),
            *(lambda: _lines(runs, "training", x, ratio), noisy),
        ),
        ("memory", "Peak memory", "GB", lambda: trained("memory_bytes", 1e-9), steady),
    ]
    if len(runs) == 1:
        wanted.insert(1, ("loss", "{} loss", "nats a token", both, of_loss))
    else:
        wanted.insert(1, ("eval_loss", "Validation loss", "nats a token", lambda: evaluated("eval_loss"), {}))
        wanted.insert(2, ("loss", "Training loss", "nats a token", lambda: trained("loss"), of_loss))
    x_label = "optimizer step" if x == "step" else "tokens"
    for name, title, unit, lines, options in wanted:
        if series := lines():
            title = title.format(" and ".join(one.label for one in series)).capitalize() if "{}" in title else title
            yield Chart(name=name, title=title, unit=unit, x_label=x_label, series=series, **options)


def _lines(
    runs: Sequence[RunRecord],
    rows: str,
    x: str,
    value: Callable[[Rows], tuple[np.ndarray, np.ndarray]],
    *,
    label: str = "",
    style: int = 0,
    markers: bool = False,
) -> tuple[Series, ...]:
    """One line a run that has at least one finite value; a run keeps its style in every chart.

    Args:
        value: the values of all rows, and which of them there are.
    """
    found = []
    for index, run in enumerate(runs):
        table: Rows = getattr(run, rows)
        up, there = value(table)
        there = there & table.there(x)
        across, up = _where(there, table.values(x)), _where(there, up)
        if (across[1:] <= across[:-1]).any():
            order = np.lexsort((up, across))
            across, up = across[order], up[order]
        if np.isfinite(up).any():
            found.append(Series(label=label or run.name, x=across, y=up, style=style + index, markers=markers))
    return tuple(found)


def _times(values: np.ndarray, scale: float) -> np.ndarray:
    return values if scale == 1 else values * scale


def _quotient(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return above / below
