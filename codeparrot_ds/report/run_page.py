"""The report as one HTML page and as Markdown. Every text that comes from a run is escaped."""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

from codeparrot_ds.report.page_kit import CSS, NOTHING, PAGE, Table, escape_md, html_table, md_table
from codeparrot_ds.report.plots import THEMES, Chart, number, png_size
from codeparrot_ds.terminal import size_text

# Label, and how the value is written.
_ROWS: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
    ("status", lambda run: run["status"] or NOTHING),
    ("model", lambda run: run["model"] or NOTHING),
    ("parameters", lambda run: _whole(run["parameters"])),
    ("ranks", lambda run: _whole(run["world_size"])),
    ("ZeRO stage", lambda run: _whole(run["zero_stage"])),
    ("precision", lambda run: run["precision"] or NOTHING),
    ("global batch (rows × tokens)", lambda run: f"{_whole(run['global_batch_size'])} × {_whole(run['seq_length'])}"),
    ("steps", lambda run: _of(run["steps"], run["max_train_steps"])),
    ("tokens", lambda run: _whole(run["tokens"])),
    ("validation loss: first", lambda run: _decimal(run["first_eval_loss"])),
    ("validation loss: last", lambda run: _decimal(run["last_eval_loss"])),
    ("validation loss: best", lambda run: _at_step(_decimal(run["best_eval_loss"]), run["best_step"])),
    ("perplexity: first", lambda run: _number(run["first_perplexity"])),
    ("perplexity: last", lambda run: _number(run["last_perplexity"])),
    ("perplexity: best", lambda run: _at_step(_number(run["best_perplexity"]), run["best_step"])),
    ("bits per byte", lambda run: _decimal(run["bits_per_byte"])),
    ("training loss: last", lambda run: _decimal(run["last_loss"])),
    ("non-finite losses", lambda run: _whole(run["non_finite_losses"])),
    ("skipped steps", lambda run: _whole(run["skipped_steps"])),
    ("tokens/s (median)", lambda run: _number(run["tokens_per_second"])),
    ("model FLOPs utilization (median)", lambda run: _percent(run["mfu"])),
    ("peak that it is held against", lambda run: _teraflops(run["peak_flops"])),
    ("waiting for data", lambda run: _percent(run["data_wait_fraction"])),
    ("slowest rank", lambda run: _slowest(run["slowest_rank"])),
    ("peak memory", lambda run: _gibibytes(run["memory_bytes"])),
    ("total time", lambda run: _hours(run["total_hours"])),
    ("starts", lambda run: _whole(run["starts"])),
    ("checkpoints at steps", lambda run: ", ".join(map(str, run["checkpoints"])) or NOTHING),
    ("branch", lambda run: f"{run['branch']} of {run['hub']}" if run["branch"] else NOTHING),
    ("unreadable rows of metrics", lambda run: _whole(run["unreadable_rows"])),
)
# The same for the data that a run read; see opening.data_account.
_DATA_ROWS: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
    ("epoch", lambda data: _whole(data.get("epoch"))),
    ("documents finished", lambda data: _whole(data.get("documents"))),
    ("text of those", lambda data: _text_size(data.get("characters"), data.get("bytes"))),
    ("tokens", lambda data: _whole(data.get("tokens"))),
    # Neither is known before a document is finished: then one is missing and the other 0.
    ("tokens a document", lambda data: _number(data.get("tokens_per_document"))),
    ("characters a token", lambda data: _number(data.get("chars_per_token"))),
    ("rows a lane", lambda data: _span(data.get("rows_per_lane"))),
    ("encoder", lambda data: str(data.get("encoder") or NOTHING)),
    ("unreadable documents", lambda data: _whole(len(data.get("bad_documents") or ()) if data else None)),
)
_UNREADABLE_SHOWN = 20
# Worth a line only where something happened.
_QUIET_AT_ZERO = {"non-finite losses", "skipped steps", "unreadable rows of metrics"}


def html_page(
    summaries: Sequence[dict[str, Any]],
    settings: Sequence[dict[str, Any]],
    pictures: Sequence[tuple[Chart, dict[str, bytes]]],
) -> str:
    """A page without outer assets. ``settings`` has ``config`` and ``ds_config`` of each run."""
    title = _title(summaries)
    parts = [f"<h1>{html.escape(title)}</h1>", f'<p class="subtitle">{html.escape(_subtitle(summaries))}</p>']
    if len(summaries) == 1:
        parts.append(_tiles(summaries[0]))
    parts.append('<div class="charts">' + "".join(_figure(chart, images) for chart, images in pictures) + "</div>")
    parts.append("<h2>Figures</h2>" + html_table(_summary_table(summaries)))
    if data := _data_table(summaries):
        parts.append("<h2>Data</h2>" + html_table(data) + "".join(map(_html_unreadable, summaries)))
    if completions := "".join(map(_html_completions, summaries)):
        parts.append("<h2>Completions</h2>" + completions)
    differences = _differences(summaries, settings)
    if differences:
        parts.append("<h2>Settings that differ</h2>" + html_table(differences))
    parts.append("<h2>Settings</h2>" + "".join(map(_details, summaries, settings)))
    return PAGE.format(title=html.escape(title), css=CSS, body="\n".join(parts))


def markdown_page(
    summaries: Sequence[dict[str, Any]], settings: Sequence[dict[str, Any]], drawn: Sequence[Chart]
) -> str:
    """The same in Markdown; pictures are files beside it."""
    parts = [f"# {escape_md(_title(summaries))}", escape_md(_subtitle(summaries)), md_table(_summary_table(summaries))]
    if data := _data_table(summaries):
        parts += ["## Data", md_table(data), *filter(None, map(_md_unreadable, summaries))]
    if completions := list(filter(None, map(_md_completions, summaries))):
        parts += ["## Completions", *completions]
    differences = _differences(summaries, settings)
    if differences:
        parts += ["## Settings that differ", md_table(differences)]
    parts += [f"![{escape_md(_alternative_text(chart))}]({chart.name}.png)" for chart in drawn]
    for summary, setting in zip(summaries, settings, strict=True):
        for name, text in _setting_files(setting):
            parts.append(
                f"<details><summary>{escape_md(summary['name'])}: {name}</summary>\n\n```\n{text}\n```\n\n</details>"
            )
    return "\n\n".join(parts) + "\n"


# --------------------------------------------------------------------------------------------------------------------
# Parts of a page


def _title(summaries: Sequence[dict[str, Any]]) -> str:
    names = [summary["name"] for summary in summaries]
    return f"Run {names[0]}" if len(names) == 1 else "Runs " + ", ".join(names[:-1]) + " and " + names[-1]


def _subtitle(summaries: Sequence[dict[str, Any]]) -> str:
    if len(summaries) > 1:
        return f"{len(summaries)} runs compared"
    (run,) = summaries
    stage = None if run["zero_stage"] is None else f"ZeRO-{run['zero_stage']}"
    parameters = None if run["parameters"] is None else f"{number(run['parameters'])} parameters"
    ranks = None if run["world_size"] is None else f"{run['world_size']} rank{'s' * (run['world_size'] != 1)}"
    facts = [run["model"], parameters, stage, run["precision"], ranks, run["status"]]
    return " · ".join(fact for fact in facts if fact)


def _tiles(run: dict[str, Any]) -> str:
    tiles = (
        ("validation perplexity", _number(run["last_perplexity"])),
        ("validation loss", _decimal(run["last_eval_loss"])),
        ("steps", _whole(run["steps"])),
        ("tokens", _number(run["tokens"])),
        ("tokens/s (median)", _number(run["tokens_per_second"])),
        ("total time", _hours(run["total_hours"])),
    )
    cells = "".join(
        f'<div class="tile"><span>{html.escape(label)}</span><strong>{html.escape(value)}</strong></div>'
        for label, value in tiles
        if value != NOTHING
    )
    return f'<div class="tiles">{cells}</div>'


def _figure(chart: Chart, images: dict[str, bytes]) -> str:
    return picture_element(images, _alternative_text(chart))


def picture_element(images: dict[str, bytes], alternative: str) -> str:
    """A picture that follows the reader's theme; inside the page."""
    source = {theme: f"data:image/png;base64,{base64.b64encode(images[theme]).decode()}" for theme in THEMES}
    width, height = png_size(images["light"])
    return (
        f'<figure><picture><source media="screen and (prefers-color-scheme: dark)" srcset="{source["dark"]}">'
        f'<img src="{source["light"]}" width="{width}" height="{height}" alt="{html.escape(alternative)}">'
        "</picture></figure>"
    )


def _alternative_text(chart: Chart) -> str:
    """The chart in words: where each line begins and ends."""
    ends = []
    for series in chart.series:
        known = [(x, y) for x, y in zip(series.x, series.y, strict=True) if math.isfinite(y)]
        (x0, y0), (x1, y1) = known[0], known[-1]
        ends.append(f"{series.label} from {number(y0)} at {number(x0)} to {number(y1)} at {number(x1)}")
    unit = f" ({chart.unit})" if chart.unit else ""
    return f"{chart.title}{unit} by {chart.x_label}: {'; '.join(ends)}"


def _summary_table(summaries: Sequence[dict[str, Any]]) -> Table:
    table: Table = [("run", [summary["name"] for summary in summaries])]
    for label, write in _ROWS:
        values = [str(write(summary)) for summary in summaries]
        empty = {NOTHING, "0"} if label in _QUIET_AT_ZERO else {NOTHING}
        if not set(values) <= empty:
            table.append((label, values))
    return table


def _data_table(summaries: Sequence[dict[str, Any]]) -> Table:
    """What the runs read; empty where none says."""
    accounts = [summary["data"] or {} for summary in summaries]
    rows = [(label, [write(account) for account in accounts]) for label, write in _DATA_ROWS]
    return [("run", [summary["name"] for summary in summaries]), *rows] if any(accounts) else []


def _unreadable(summary: dict[str, Any]) -> tuple[str, list[str]]:
    """A heading, and the first unreadable documents of a run; nothing where all could be read."""
    documents = [str(each) for each in (summary["data"] or {}).get("bad_documents") or ()]
    shown = documents[:_UNREADABLE_SHOWN]
    if left := len(documents) - len(shown):
        shown.append(f"and {left:,} more, named in the run's logs")
    return f"{summary['name']}: unreadable documents, which were skipped", shown


def _html_unreadable(summary: dict[str, Any]) -> str:
    heading, documents = _unreadable(summary)
    items = "".join(f"<li>{html.escape(each)}</li>" for each in documents)
    return f"<details open><summary>{html.escape(heading)}</summary><ul>{items}</ul></details>" if items else ""


def _md_unreadable(summary: dict[str, Any]) -> str:
    heading, documents = _unreadable(summary)
    return (
        "\n".join([f"{escape_md(heading)}:", "", *(f"- {escape_md(each)}" for each in documents)]) if documents else ""
    )


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


def _html_completions(summary: dict[str, Any]) -> str:
    return "".join(
        f"<details open><summary>{html.escape(heading)}</summary><pre>{html.escape(text)}</pre></details>"
        for heading, text in _completions(summary)
    )


def _md_completions(summary: dict[str, Any]) -> str:
    # A fence that no text of the model's can close.
    return "\n\n".join(
        f"{escape_md(heading)}:\n\n{(fence := '`' * (3 + text.count('`')))}python\n{text}\n{fence}"
        for heading, text in _completions(summary)
    )


def _differences(summaries: Sequence[dict[str, Any]], settings: Sequence[dict[str, Any]]) -> Table:
    """Every setting of config.yaml and ds_config.json in which the runs differ: what the comparison compares."""
    flat = [_flat(setting["config"]) | _flat(setting["ds_config"], "deepspeed: ") for setting in settings]
    keys = sorted({key for each in flat for key in each} - {"run_name"})
    rows = [(key, [str(each.get(key, NOTHING)) for each in flat]) for key in keys]
    differing = [(key, values) for key, values in rows if len(set(values)) > 1]
    return [("setting", [summary["name"] for summary in summaries]), *differing] if differing else []


def _flat(mapping: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _details(summary: dict[str, Any], setting: dict[str, Any]) -> str:
    return "".join(
        f"<details><summary>{html.escape(summary['name'])}: {name}</summary><pre>{html.escape(text)}</pre></details>"
        for name, text in _setting_files(setting)
    )


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


def _whole(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else NOTHING


def _decimal(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, (int, float)) else NOTHING


def _number(value: Any) -> str:
    return number(value) if isinstance(value, (int, float)) else NOTHING


def _percent(fraction: Any) -> str:
    return f"{100 * fraction:.3g}%" if isinstance(fraction, (int, float)) else NOTHING


def _teraflops(flops: Any) -> str:
    return f"{flops / 1e12:,.3g} TFLOP/s" if isinstance(flops, (int, float)) else NOTHING


def _slowest(rank: Any) -> str:
    if not isinstance(rank, dict):
        return NOTHING
    where = f" on {rank['host']}" if rank["host"] else ""
    return f"{rank['rank']}{where}: {rank['factor']:.2f} × the median rank, in {_percent(rank['share'])} of rows"


def _gibibytes(size: Any) -> str:
    return f"{size / 2**30:.2f} GiB" if isinstance(size, (int, float)) else NOTHING


def _text_size(characters: Any, size: Any) -> str:
    if not isinstance(characters, int) or not isinstance(size, (int, float)) or not characters:
        return NOTHING
    return f"{characters:,} characters, {size_text(size)}"


def _span(values: Any) -> str:
    """The least and the greatest of some whole numbers."""
    if not isinstance(values, list) or not values:
        return NOTHING
    least, most = min(values), max(values)
    return _whole(least) if least == most else f"{_whole(least)}–{_whole(most)}"


def _hours(hours: Any) -> str:
    if not isinstance(hours, (int, float)):
        return NOTHING
    return f"{hours:.1f} h" if hours >= 2 else f"{60 * hours:.1f} min"


def _of(value: Any, total: Any) -> str:
    return f"{_whole(value)} of {_whole(total)}" if isinstance(total, int) else _whole(value)


def _at_step(text: str, step: Any) -> str:
    return text if text == NOTHING else f"{text} at step {_whole(step)}"
