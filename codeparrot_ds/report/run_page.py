"""The report of runs as one HTML page and as Markdown: what it says, and in which words."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from codeparrot_ds.report.page_kit import Cell, Table, render
from codeparrot_ds.report.plots import Picture
from codeparrot_ds.report.units import NOTHING, gigabytes, listed, number, percent, short, shown, whole
from codeparrot_ds.terminal import size_text

# Label, and how the value is written.
_ROWS: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
    ("status", lambda run: run["status"] or NOTHING),
    ("model", lambda run: run["model"] or NOTHING),
    ("parameters", lambda run: whole(run["parameters"])),
    ("ranks", lambda run: whole(run["world_size"])),
    ("ZeRO stage", lambda run: whole(run["zero_stage"])),
    ("precision", lambda run: run["precision"] or NOTHING),
    ("global batch (rows × tokens)", lambda run: f"{whole(run['global_batch_size'])} × {whole(run['seq_length'])}"),
    ("steps", lambda run: _of(run["steps"], run["max_train_steps"])),
    ("tokens", lambda run: whole(run["tokens"])),
    ("validation loss: first", lambda run: shown(run["first_eval_loss"], "{:.4f}")),
    ("validation loss: last", lambda run: shown(run["last_eval_loss"], "{:.4f}")),
    ("validation loss: best", lambda run: _at_step(shown(run["best_eval_loss"], "{:.4f}"), run["best_step"])),
    ("perplexity: first", lambda run: short(run["first_perplexity"])),
    ("perplexity: last", lambda run: short(run["last_perplexity"])),
    ("perplexity: best", lambda run: _at_step(short(run["best_perplexity"]), run["best_step"])),
    ("bits per byte", lambda run: shown(run["bits_per_byte"], "{:.4f}")),
    ("training loss: last", lambda run: shown(run["last_loss"], "{:.4f}")),
    ("non-finite losses", lambda run: whole(run["non_finite_losses"])),
    ("skipped steps", lambda run: whole(run["skipped_steps"])),
    ("tokens/s (median)", lambda run: short(run["tokens_per_second"])),
    ("model FLOPs utilization (median)", lambda run: percent(run["mfu"])),
    ("peak that it is held against", lambda run: shown(run["peak_flops"], "{:,.3g} TFLOP/s", 1e-12)),
    ("waiting for data", lambda run: percent(run["data_wait_fraction"])),
    ("slowest rank", lambda run: _slowest(run["slowest_rank"])),
    ("peak memory", lambda run: gigabytes(run["memory_bytes"])),
    ("total time", lambda run: _hours(run["total_hours"])),
    ("starts", lambda run: whole(run["starts"])),
    ("checkpoints at steps", lambda run: ", ".join(map(str, run["checkpoints"])) or NOTHING),
    ("branch", lambda run: f"{run['branch']} of {run['hub']}" if run["branch"] else NOTHING),
    ("unreadable rows of metrics", lambda run: whole(run["unreadable_rows"])),
)
# The same for the data that a run read; see datasets.data_account.
_DATA_ROWS: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
    ("epoch", lambda data: whole(data.get("epoch"))),
    ("documents finished", lambda data: whole(data.get("documents"))),
    ("text of those", lambda data: _text_size(data.get("characters"), data.get("bytes"))),
    ("tokens", lambda data: whole(data.get("tokens"))),
    # Neither is known before a document is finished: then one is missing and the other 0.
    ("tokens per document", lambda data: short(data.get("tokens_per_document"))),
    ("characters per token", lambda data: short(data.get("chars_per_token"))),
    ("rows per lane", lambda data: _span(data.get("rows_per_lane"))),
    ("encoder", lambda data: str(data.get("encoder") or NOTHING)),
    ("unreadable documents", lambda data: whole(len(data.get("bad_documents") or ()) if data else None)),
)
_UNREADABLE_SHOWN = 20
# Worth a line only where something happened.
_QUIET_AT_ZERO = {"non-finite losses", "skipped steps", "unreadable rows of metrics"}
_LONG_ROWS = {"checkpoints at steps", "branch", "slowest rank"}


def page_of(
    form: str, summaries: Sequence[dict[str, Any]], settings: Sequence[dict[str, Any]], pictures: Sequence[Picture]
) -> str:
    """The report as ``html``, without outer assets, or as ``md``, with pictures that are files beside it.

    Args:
        form: of the page.
        summaries: of the runs.
        settings: ``config`` and ``ds_config`` of each run.
        pictures: of all of them.
    """
    return render(
        f"run.{form}.j2",
        title=_title(summaries),
        subtitle=_subtitle(summaries),
        tiles=_tiles(summaries[0]) if len(summaries) == 1 else [],
        pictures=pictures,
        figures=_summary_table(summaries),
        data=_data_table(summaries),
        unreadable=[found for summary in summaries if (found := _unreadable(summary))],
        completions=[each for summary in summaries for each in _completions(summary)],
        differences=_differences(summaries, settings),
        settings=[
            (f"{summary['name']}: {name}", text)
            for summary, setting in zip(summaries, settings, strict=True)
            for name, text in _setting_files(setting)
        ],
    )


def _title(summaries: Sequence[dict[str, Any]]) -> str:
    names = [summary["name"] for summary in summaries]
    return f"Run{'s' * (len(names) > 1)} {listed(names)}"


def _subtitle(summaries: Sequence[dict[str, Any]]) -> str:
    if len(summaries) > 1:
        return f"{len(summaries)} runs compared"
    (run,) = summaries
    stage = None if run["zero_stage"] is None else f"ZeRO-{run['zero_stage']}"
    parameters = None if run["parameters"] is None else f"{number(run['parameters'])} parameters"
    ranks = None if run["world_size"] is None else f"{run['world_size']} rank{'s' * (run['world_size'] != 1)}"
    facts = [run["model"], parameters, stage, run["precision"], ranks, run["status"]]
    return " · ".join(fact for fact in facts if fact)


def _tiles(run: dict[str, Any]) -> list[tuple[str, str]]:
    tiles = (
        ("validation perplexity", short(run["last_perplexity"])),
        ("validation loss", shown(run["last_eval_loss"], "{:.4f}")),
        ("steps", whole(run["steps"])),
        ("tokens", short(run["tokens"])),
        ("tokens/s (median)", short(run["tokens_per_second"])),
        ("total time", _hours(run["total_hours"])),
    )
    return [(label, value) for label, value in tiles if value != NOTHING]


def _table(corner: str, summaries: Sequence[dict[str, Any]], rows: Sequence[tuple[str, list[str]]]) -> Table:
    """A row of texts by label, and a column by run."""
    cells: list[list[str | Cell]]
    cells = [[label, *(Cell(value, "wrap" * (label in _LONG_ROWS)) for value in values)] for label, values in rows]
    return Table([corner, *(summary["name"] for summary in summaries)], cells, ["label"])


def _summary_table(summaries: Sequence[dict[str, Any]]) -> Table:
    rows = []
    for label, write in _ROWS:
        values = [str(write(summary)) for summary in summaries]
        if not set(values) <= ({NOTHING, "0"} if label in _QUIET_AT_ZERO else {NOTHING}):
            rows.append((label, values))
    return _table("run", summaries, rows)


def _data_table(summaries: Sequence[dict[str, Any]]) -> Table | None:
    """What the runs read; None where none says."""
    accounts = [summary["data"] or {} for summary in summaries]
    rows = [(label, [write(account) for account in accounts]) for label, write in _DATA_ROWS]
    return _table("run", summaries, rows) if any(accounts) else None


def _unreadable(summary: dict[str, Any]) -> tuple[str, list[str]] | None:
    """A heading, and the first unreadable documents of a run; None where all could be read."""
    documents = [str(each) for each in (summary["data"] or {}).get("bad_documents") or ()]
    listed = documents[:_UNREADABLE_SHOWN]
    if left := len(documents) - len(listed):
        listed.append(f"and {left:,} more, named in the run's logs")
    return (f"{summary['name']}: unreadable documents, which were skipped", listed) if listed else None


def _completions(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """A heading and the source of each completion of a run's last evaluation."""
    return [
        (
            f"{summary['name']}, step {row.get('step', NOTHING):,}: {row.get('task_id') or 'prompt'}, "
            f"{row.get('verdict') or ('Python' if row.get('parses') else 'no Python')}",
            f"{row.get('prompt', '')}{row.get('completion', '')}",
        )
        for row in summary["completions"]
    ]


def _differences(summaries: Sequence[dict[str, Any]], settings: Sequence[dict[str, Any]]) -> Table | None:
    """Every setting of config.yaml and ds_config.json in which the runs differ: what the comparison compares."""
    flat = [_flat(setting["config"]) | _flat(setting["ds_config"], "deepspeed: ") for setting in settings]
    keys = sorted({key for each in flat for key in each} - {"run_name"})
    rows = [(key, [str(each.get(key, NOTHING)) for each in flat]) for key in keys]
    differing = [(key, values) for key, values in rows if len(set(values)) > 1]
    return _table("setting", summaries, differing) if differing else None


def _flat(mapping: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _setting_files(setting: dict[str, Any]) -> list[tuple[str, str]]:
    files = []
    if setting["config"]:
        import yaml

        files.append(("config.yaml", yaml.safe_dump(setting["config"], sort_keys=False).strip()))
    if setting["ds_config"]:
        files.append(("ds_config.json", json.dumps(setting["ds_config"], indent=2)))
    return files


# --------------------------------------------------------------------------------------------------------------------
# Values as text


def _slowest(rank: Any) -> str:
    if not isinstance(rank, dict):
        return NOTHING
    where = f" on {rank['host']}" if rank["host"] else ""
    return f"{rank['rank']}{where}: {rank['factor']:.2f} × the median rank, in {percent(rank['share'])} of rows"


def _text_size(characters: Any, size: Any) -> str:
    if not isinstance(characters, int) or not isinstance(size, (int, float)) or not characters:
        return NOTHING
    return f"{characters:,} characters, {size_text(size)}"


def _span(values: Any) -> str:
    """The least and the greatest of some whole numbers."""
    if not isinstance(values, list) or not values:
        return NOTHING
    least, most = min(values), max(values)
    return whole(least) if least == most else f"{whole(least)}–{whole(most)}"


def _hours(hours: Any) -> str:
    if not isinstance(hours, (int, float)):
        return NOTHING
    return f"{hours:.1f} h" if hours >= 2 else f"{60 * hours:.1f} min"


def _of(value: Any, total: Any) -> str:
    return f"{whole(value)} of {whole(total)}" if isinstance(total, int) else whole(value)


def _at_step(text: str, step: Any) -> str:
    return text if text == NOTHING else f"{text} at step {whole(step)}"
