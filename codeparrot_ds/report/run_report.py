"""The report of one or several runs: pictures and tables out of ``metrics.jsonl`` and what else lies in a run's folder.

``report.html`` needs no other file: its pictures and style are inside. ``report.md`` shows the PNGs beside it, and
``report.json`` has the same figures for programs.
"""

from __future__ import annotations

import datetime
import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from codeparrot_ds.checkpoint.folders import checkpoint_folders
from codeparrot_ds.errors import UserError
from codeparrot_ds.metrics import read_row
from codeparrot_ds.paths import no_run
from codeparrot_ds.report.plots import Chart, Series, picture_of
from codeparrot_ds.report.run_page import page_of


@dataclass(kw_only=True)
class RunRecord:
    """What a run left on disk. Rows have the keys of ``metrics.jsonl``; NaN and infinity in them are floats."""

    path: Path
    name: str
    training: list[dict[str, Any]] = field(default_factory=list)
    evaluation: list[dict[str, Any]] = field(default_factory=list)
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
    if not any(run.training or run.evaluation for run in records):
        raise UserError(f"{records[0].path} has no metrics yet; wait for its first logged step (log_steps)")
    _tell_apart(records)
    if out is None:
        out = (records[0].path if len(records) == 1 else records[0].path.parent) / "report"
    folder = Path(out)
    summaries = [summarize(run) for run in records]
    settings = [{"config": run.config, "ds_config": run.ds_config} for run in records]
    pictures = [picture_of(chart) for chart in charts(records)]
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
    record = _read_mapping(path / "run.json")
    run = RunRecord(path=path, name=str(record.get("name") or path.name), record=record)
    run.config = _read_mapping(path / "config.yaml")
    run.ds_config = _read_mapping(path / "ds_config.json")
    lines = (path / "metrics.jsonl").read_bytes().splitlines() if (path / "metrics.jsonl").is_file() else []
    for line in lines:
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
    if not path.is_file():
        return []
    rows = [row for row in map(read_row, path.read_bytes().splitlines()) if row is not None]
    return [row for row in rows if row["step"] == rows[-1]["step"]]


def _read_mapping(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    import yaml

    try:
        data = path.read_text(encoding="utf-8")
        value = json.loads(data) if path.suffix == ".json" else yaml.safe_load(data)
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path} is damaged: {' '.join(str(error).split())}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged: it holds no mapping")
    return value


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
    last = max([*run.training, *run.evaluation], key=lambda row: row["step"], default={})
    evaluations = [row for row in run.evaluation if _is_finite(row.get("eval_loss"))]
    best = min(evaluations, key=lambda row: row["eval_loss"], default={})
    first, final = (run.evaluation[0], run.evaluation[-1]) if run.evaluation else ({}, {})
    losses = _column(run.training, "loss")
    outcome = run.record.get("outcome") or {}
    return {
        "name": run.name,
        "status": outcome.get("status"),
        "model": run.config.get("model"),
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
        "last_loss": losses[-1] if losses else None,
        "non_finite_losses": sum(not math.isfinite(loss) for loss in losses),
        "skipped_steps": max(_column(run.training, "skipped_steps"), default=None),
        "tokens_per_second": _median(_column(run.training, "tokens_per_second")),
        "mfu": _median(_column(run.training, "mfu")),
        "peak_flops": run.record.get("peak_flops"),
        "data_wait_fraction": _data_wait_fraction(run.training),
        "slowest_rank": _slowest_rank(run),
        "memory_bytes": max(_column(run.training, "memory_bytes"), default=None),
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


def _data_account(data: Any) -> dict[str, Any] | None:
    """What the run says of the data it read (``opening.data_account``); None for runs before it was kept."""
    return data if isinstance(data, dict) and "summary" in data else None


def _column(rows: Iterable[dict[str, Any]], key: str) -> list[float]:
    return [row[key] for row in rows if isinstance(row.get(key), (int, float))]


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _median(values: Sequence[float]) -> float | None:
    finite = [value for value in values if math.isfinite(value)]
    return statistics.median(finite) if finite else None


def _data_wait_fraction(rows: Sequence[dict[str, Any]]) -> float | None:
    timed = [row for row in rows if _is_finite(row.get("data_wait_seconds")) and _is_finite(row.get("step_seconds"))]
    total = sum(row["step_seconds"] for row in timed)
    return sum(row["data_wait_seconds"] for row in timed) / total if total else None


def _slowest_rank(run: RunRecord) -> dict[str, Any] | None:
    """The rank that was the slowest in most logged rows: ``rank``, ``host``, ``share`` of the rows, ``factor``.

    ``factor`` is its own time a step over the median rank's, the median over those rows.
    """
    rows = [row for row in run.training if _is_finite(row.get("rank_seconds_max")) and row.get("rank_seconds_median")]
    if not rows:
        return None
    ranks = [row["slowest_rank"] for row in rows]
    rank = statistics.mode(ranks)
    factors = [row["rank_seconds_max"] / row["rank_seconds_median"] for row in rows if row["slowest_rank"] == rank]
    hosts = run.record.get("rank_hosts") or []
    return {
        "rank": rank,
        "host": hosts[rank] if rank < len(hosts) else None,
        "share": len(factors) / len(rows),
        "factor": statistics.median(factors),
    }


def _total_hours(run: RunRecord) -> float | None:
    times = sorted(_column([*run.training, *run.evaluation], "time"))
    starts = []
    for start in run.record.get("starts") or []:
        try:
            starts.append(datetime.datetime.fromisoformat(start["time"]).timestamp())
        except (KeyError, TypeError, ValueError):
            return None
    if not times:
        return None
    seconds = 0.0
    starts = starts or times[:1]
    for start, end in zip(starts, [*starts[1:], math.inf], strict=True):
        seconds += max((time - start for time in times if start <= time < end), default=0.0)
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


def charts(runs: Sequence[RunRecord]) -> list[Chart]:
    """The charts for which at least one run has a value, in reading order.

    Steps are compared where they are the same amount of text; runs with other batches share an axis of tokens.
    """
    tokens_a_step = {(run.config.get("global_batch_size"), run.config.get("seq_length")) for run in runs}
    x = "step" if len(tokens_a_step) == 1 else "tokens"

    def evaluated(key: str, **options: Any) -> tuple[Series, ...]:
        return _lines(runs, "evaluation", x, lambda row: row.get(key), markers=True, **options)

    def trained(key: str, scale: float = 1, **options: Any) -> tuple[Series, ...]:
        return _lines(runs, "training", x, lambda row: _times(row.get(key), scale), **options)

    def shares(key: str) -> tuple[Series, ...]:
        return _lines(runs, "evaluation", x, lambda row: _times(row.get(key), 100), markers=True)

    def waiting(row: dict[str, Any]) -> float | None:
        return _times(_data_wait_fraction([row]), 100)

    def ratio(row: dict[str, Any]) -> float | None:
        return row["rank_seconds_max"] / row["rank_seconds_median"] if row.get("rank_seconds_median") else None

    ratios = _lines(runs, "training", x, ratio)
    if len(runs) == 1:
        both = trained("loss", label="training") + evaluated("eval_loss", label="validation", style=1)
        kinds = " and ".join(series.label for series in both)
        losses = [("loss", f"{kinds} loss".capitalize(), "nats a token", both, {"smooth": True})]
    else:
        losses = [
            ("eval_loss", "Validation loss", "nats a token", evaluated("eval_loss"), {}),
            ("loss", "Training loss", "nats a token", trained("loss"), {"smooth": True}),
        ]
    steady = {"from_zero": True}
    noisy = {"from_zero": True, "smooth": True}
    wanted = [
        ("perplexity", "Validation perplexity", "log scale", evaluated("perplexity"), {"log": True}),
        *losses,
        ("learning_rate", "Learning rate", "", trained("learning_rate"), steady),
        ("grad_norm", "Gradient norm", "before clipping", trained("grad_norm"), noisy),
        ("tokens_per_second", "Throughput", "tokens/s", trained("tokens_per_second"), noisy),
        ("parsing_share", "Completions that are Python", "%", shares("parsing_share"), steady),
        ("pass_at_1", "Problems solved", "%", shares("pass_at_1"), steady),
        ("mfu", "Model FLOPs utilization", "% of peak", trained("mfu", 100), noisy),
        ("data_wait", "Waiting for data", "% of step time", _lines(runs, "training", x, waiting), noisy),
        ("slowest_rank", "Slowest rank over the median rank", "own time before collectives", ratios, noisy),
        ("memory", "Peak memory", "GB", trained("memory_bytes", 1e-9), steady),
    ]
    x_label = "optimizer step" if x == "step" else "tokens"
    return [
        Chart(name=name, title=title, unit=unit, x_label=x_label, series=series, **options)
        for name, title, unit, series, options in wanted
        if series
    ]


def _lines(
    runs: Sequence[RunRecord],
    rows: str,
    x: str,
    value: Callable[[dict[str, Any]], float | None],
    *,
    label: str = "",
    style: int = 0,
    markers: bool = False,
) -> tuple[Series, ...]:
    """One line a run that has at least one finite value; a run keeps its style in every chart."""
    found = []
    for index, run in enumerate(runs):
        points = [(row.get(x), value(row)) for row in getattr(run, rows)]
        known = sorted((at, y) for at, y in points if isinstance(at, int) and isinstance(y, (int, float)))
        if any(math.isfinite(y) for _, y in known):
            across, up = [at for at, _ in known], [y for _, y in known]
            found.append(Series(label=label or run.name, x=across, y=up, style=style + index, markers=markers))
    return tuple(found)


def _times(value: Any, scale: float) -> float | None:
    return value * scale if isinstance(value, (int, float)) else None
