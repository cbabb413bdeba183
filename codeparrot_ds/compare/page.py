"""The report of a comparison as one HTML page and as Markdown. Every text that comes from a config is escaped."""

from __future__ import annotations

import html
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from codeparrot_ds import durable
from codeparrot_ds.compare.findings import PROCESS_SPREAD, WAITING, Findings, Outcome, as_json, differences, figures_of
from codeparrot_ds.compare.results import FINISHED
from codeparrot_ds.compare.verdict import BAND, BITS, DIFFERENT, REFERENCE, ROUNDING, UNJUDGED
from codeparrot_ds.report.page_kit import CSS, NOTHING, PAGE
from codeparrot_ds.report.plots import number
from codeparrot_ds.report.run_page import picture_element

if TYPE_CHECKING:
    from codeparrot_ds.compare.charts import Picture


# Signs beside the words, so that neither colour nor a close look is needed.
SIGNS = {REFERENCE: "◆", BITS: "✓", ROUNDING: "✓", BAND: "✓", DIFFERENT: "✗", UNJUDGED: "?"}

_CSS = """
.advice { background: var(--paper); border: 1px solid var(--line); border-left: 6px solid #0072b2; border-radius: 10px;
  padding: 1rem 1.2rem; margin-top: 1.5rem; font-size: 1.15rem; font-weight: 600; overflow-wrap: anywhere; }
.warning { border-left-color: #d55e00; }
td.number, th.number { text-align: right; }
td.name { white-space: normal; min-width: 9rem; }
td.losses { min-width: 18rem; }
@media (max-width: 40rem) { th, td { padding: .4rem .5rem; } td.name { min-width: 7.5rem; } }
td.different { color: #b03a00; font-weight: 600; }
@media screen and (prefers-color-scheme: dark) { td.different { color: #ff9254; } }
td small, th small { color: var(--faint); font-weight: 400; display: block; }
p.note { color: var(--faint); font-size: .9rem; max-width: 60rem; }
.charts { grid-template-columns: repeat(auto-fit, minmax(min(100%, 32rem), 1fr)); align-items: start; }
@media print { .table { overflow: visible; } table { font-size: 8pt; } th, td { padding: .2rem .4rem;
  white-space: normal; overflow-wrap: anywhere; } td.number { white-space: nowrap; } td.wrap { min-width: 0; }
  .charts { grid-template-columns: 1fr 1fr; } .advice { font-size: 12pt; } }
"""

MOST_COLUMNS = 6
Cell = tuple[str, str]
"""A text and its CSS classes."""


def html_page(findings: Findings, pictures: Sequence[Picture]) -> str:
    """The page, without outer assets."""
    title = _title(findings)
    state = "" if findings.complete else " warning"
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="subtitle">{html.escape(_subtitle(findings))}</p>',
        f'<p class="advice{state}">{html.escape(findings.recommendation)}</p>',
        "<h2>Ranking</h2>" + _html_table(*_ranking(findings)),
        *(f'<p class="note">{html.escape(note)}</p>' for note in _ranking_notes(findings)),
    ]
    if left := _left_out(findings):
        parts.append("<h2>Not measured</h2>" + _html_table(*left))
    figures = "".join(picture_element(picture.images, picture.alternative) for picture in pictures)
    parts.append(f'<div class="charts">{figures}</div>')
    for heading, table, note in _sections(findings):
        parts.append(f"<h2>{html.escape(heading)}</h2>" + _html_table(*table))
        if note:
            parts.append(f'<p class="note">{html.escape(note)}</p>')
    for heading, items in _lists(findings):
        texts = "".join(f"<li>{html.escape(item)}</li>" for item in items)
        parts.append(f"<details><summary>{html.escape(heading)}</summary><ul>{texts}</ul></details>")
    for each in findings.outcomes:
        if each.candidate.resolved:
            text = html.escape(json.dumps(each.candidate.resolved, indent=2))
            parts.append(
                f"<details><summary>{html.escape(each.name)}: DeepSpeed config</summary><pre>{text}</pre></details>"
            )
    return PAGE.format(title=html.escape(title), css=CSS + _CSS, body="\n".join(parts))


def markdown_page(findings: Findings, pictures: Sequence[Picture]) -> str:
    """The same for a pull request; pictures are files beside it."""
    parts = [
        f"# {_md(_title(findings))}",
        _md(_subtitle(findings)),
        f"**{_md(findings.recommendation)}**",
        "## Ranking",
        _md_table(*_ranking(findings)),
        *map(_md, _ranking_notes(findings)),
    ]
    if left := _left_out(findings):
        parts += ["## Not measured", _md_table(*left)]
    parts += [f"![{_md(picture.alternative)}]({picture.name}.png)" for picture in pictures]
    for heading, table, note in _sections(findings):
        parts += [f"## {heading}", _md_table(*table), *([_md(note)] if note else [])]
    for heading, items in _lists(findings):
        parts += [f"## {heading}", "\n".join(f"- {_md(item)}" for item in items)]
    return "\n\n".join(parts) + "\n"


# --------------------------------------------------------------------------------------------------------------------
# What the page says


def _title(findings: Findings) -> str:
    count = len({each.candidate.label for each in findings.outcomes})
    ranks = sorted({each.candidate.world_size for each in findings.outcomes})
    return f"{count} DeepSpeed config{'s' * (count != 1)} on {_listed(ranks)} rank{'s' * (ranks != [1])}"


def _listed(values: Sequence[Any]) -> str:
    *first, last = map(str, values)
    return f"{', '.join(first)} and {last}" if first else last


def _subtitle(findings: Findings) -> str:
    request = findings.request
    config = request.config
    rows = f"{config.global_batch_size} × {config.seq_length:,} tokens a step"
    trials = f"{request.repeats} trial{'s' * (request.repeats != 1)} of {request.steps} steps each"
    facts = [Path(config.model).stem, rows, trials, f"{request.warmup_steps} of them warm-up", findings.device]
    return " · ".join(fact for fact in facts if fact)


def _ranking_notes(findings: Findings) -> list[str]:
    notes = [
        "tokens/s: median over the scored steps of all trials, and from the lowest first to the highest third quartile "
        f"of a trial (of a single one at least {PROCESS_SPREAD:.0%} to either side). Two configs are not told apart "
        "where these spreads overlap; the column has their places. "
        f"Losses are compared with {findings.reference or 'nothing'}, step by step on the same rows from the "
        "same weights; the band is what rounding explains (docs/comparisons.md)."
    ]
    if findings.peak is not None:
        whose = "this machine" if findings.peak.whole_machine else "a device"
        notes.append(
            f"MFU of all: against one peak of {findings.peak.flops / 1e12:,.3g} TFLOP/s of {whose} "
            f"({findings.peak.source}), whatever a config's precision."
        )
    if not findings.on_gpu:
        notes.append("Memory: what a rank's process had resident at most beside its libraries, measured on this CPU.")
    return notes


Table = tuple[list[str], list[list[Cell]]]


def _ranking(findings: Findings) -> Table:
    head = ["", "config", "tokens/s", "not told apart from", "losses", "step, s", "MFU", "memory of a rank"]
    rows = []
    places = {name: place for place, (name, _) in enumerate(findings.ranking, 1)}
    for place, (name, ties) in enumerate(findings.ranking, 1):
        outcome = findings.outcome(name)
        figures, speed, verdict = figures_of(outcome, findings.request), outcome.speed, outcome.verdict
        assert speed is not None
        losses = NOTHING if verdict is None else f"{SIGNS[verdict.kind]} {_in_two_lines(str(verdict))}"
        rows.append(
            [
                (str(place), "number"),
                (name, "name"),
                (f"{speed.median:,.0f}\n{speed.low:,.0f} to {speed.high:,.0f}", "number"),
                (", ".join(str(places[tie]) for tie in ties) or NOTHING, "number"),
                (losses, "wrap losses" + " different" * (verdict is not None and verdict.kind == DIFFERENT)),
                (_number(figures["step_seconds"]), "number"),
                (_percent(figures["mfu"]), "number"),
                (findings.in_memory_unit(outcome.memory_bytes), "number"),
            ]
        )
    return head, rows


def _in_two_lines(text: str) -> str:
    """A verdict with its figures or its reason in the second line."""
    for sign in (": ", " ("):
        first, found, rest = text.partition(sign)
        if found:
            return f"{first}\n{rest.removesuffix(')') if sign == ' (' else rest}"
    return text


def _left_out(findings: Findings) -> Table | None:
    rows = []
    for each in findings.outcomes:
        if each.status == FINISHED or (each.status == WAITING and each.speed is not None and not each.reason):
            continue
        figures = figures_of(each, findings.request)
        rows.append(
            [
                (each.name, "name"),
                (each.status, ""),
                (NOTHING if figures["step"] is None else str(figures["step"]), "number"),
                (_gigabytes(figures["peak_bytes"]), "number"),
                (each.reason or NOTHING, "wrap"),
            ]
        )
    return (["config", "what became of it", "step", "peak", "why"], rows) if rows else None


def _sections(findings: Findings) -> list[tuple[str, Table, str]]:
    measured = [each for each in findings.outcomes if each.found]
    sections = []
    if measured:
        sections.append(("Memory", _memory(findings, measured), _GPU_MEMORY if findings.on_gpu else _CPU_MEMORY))
    if any(each.parts is not None for each in measured):
        sections.append(("Parts of a step", _parts(measured), _PARTS_NOTE))
        sections.append(("Communication, checkpoint, start", _costs(findings, measured), _COSTS_NOTE))
    if numerics := _numerics(findings):
        sections.append(("Where their numbers may differ", numerics, ""))
    if table := differences(findings):
        sections.append(("Settings that differ", _differing(table), ""))
    return sections


def _differing(table: Sequence[tuple[str, list[str]]]) -> Table:
    """A column for each of few configs; for many the values, each with the configs that have it."""
    (corner, names), *rows = table
    if len(names) <= MOST_COLUMNS:
        return [corner, *names], [[(key, "name"), *((value, "") for value in values)] for key, values in rows]
    cells: list[list[Cell]] = []
    for key, values in rows:
        if key == "ranks":  # the names say it
            continue
        usual, *others = [value for value, _ in Counter(values).most_common()]
        having = {value: [name for name, mine in zip(names, values, strict=True) if mine == value] for value in others}
        texts = [f"{value}: {', '.join(_without_ranks(chosen, names))}" for value, chosen in having.items()]
        cells.append([(key, "name"), (usual, ""), ("; ".join(texts), "wrap")])
    return [corner, "most", "others"], cells


def _without_ranks(chosen: Sequence[str], names: Sequence[str]) -> list[str]:
    """Names, as one where a config is among them with all its numbers of ranks."""
    labels = {name: name.rpartition(" on ")[0] for name in names}
    short = []
    for name in chosen:
        all_of_it = [each for each in names if labels[each] == labels[name]]
        short.append(labels[name] if set(all_of_it) <= set(chosen) else name)
    return list(dict.fromkeys(short))


def _memory(findings: Findings, measured: Sequence[Outcome]) -> Table:
    """On GPUs the plan beside what it predicts; on a CPU something else is measured, and nothing compared."""
    if findings.on_gpu:
        head = ["config", "predicted", "measured", "difference", "host, predicted", "host, resident"]
    else:
        head = [
            *("config", "this CPU, grown", "this CPU, in all", "a GPU, planned", "its host, planned"),
        ]
    rows = []
    for each in measured:
        memory = figures_of(each, findings.request)["memory"]
        device, host = memory["predicted_device_bytes"], memory["predicted_host_bytes"]
        sizes = [device, memory["device_bytes"], host, memory["host_resident_bytes"]]
        if not findings.on_gpu:
            sizes = [memory["host_grown_bytes"], memory["host_resident_bytes"], device, host]
        cells = [findings.in_memory_unit(size) for size in sizes]
        if findings.on_gpu:
            apart = f"{100 * (each.device_bytes / device - 1):+.1f}%" if device and each.device_bytes else NOTHING
            cells.insert(2, apart)
        rows.append([(each.name, "name"), *((cell, "number") for cell in cells)])
    return head, rows


_GPU_MEMORY = "Of a rank, at the peak of a step: tensors on the device as the plan has them, and as torch counts them."
_CPU_MEMORY = (
    "Of a rank, and two things that are not to be compared. This CPU, measured: by how much its process grew beside "
    "its libraries at most, and what it had resident in all; that holds kernels' work space, the loader and freed "
    "pages, and no page of a tensor that was never written. A GPU, by the plan: all tensors of this config in full, "
    "with the kernels that run there, at the peak of a step. Either may be the larger one."
)
_PARTS_NOTE = (
    "Means over ranks of steps that are not scored: the device is waited for after each part and every collective is "
    "made to finish at once. What a config overlaps shows as the difference to a scored step."
)
_COSTS_NOTE = (
    "Sent: bytes a rank sends in a step, counted from the tensors of DeepSpeed's collectives as rings, not measured on "
    "the wire. Start: from the command to the first step. The checkpoint is of all ranks, with its export."
)


def _parts(measured: Sequence[Outcome]) -> Table:
    names = ("forward", "backward", "communication", "optimizer", "data")
    rows = []
    for each in measured:
        parts = each.parts
        if parts is not None:
            cells = [(f"{1000 * parts.seconds[name]:,.1f}", "number") for name in names]
            rows.append([(each.name, "name"), *cells, (f"{1000 * parts.total_seconds:,.1f}", "number")])
    return ["config", *(f"{name}, ms" for name in names), "all, ms"], rows


def _costs(findings: Findings, measured: Sequence[Outcome]) -> Table:
    head = ["config", "sent a step", "collectives", "checkpoint", "saving, s", "training waited, s", "start, s"]
    rows = []
    for each in measured:
        figures = figures_of(each, findings.request)
        parts, saved = figures["parts"] or {}, figures["checkpoint"] or {}
        calls = ", ".join(f"{count:.0f} {name}" for name, count in parts.get("calls", {}).items())
        rows.append(
            [
                (each.name, "name"),
                (_gigabytes(parts.get("sent_bytes")), "number"),
                (calls or NOTHING, "wrap"),
                (_gigabytes(saved.get("bytes")), "number"),
                (_number(saved.get("seconds")), "number"),
                (_number(saved.get("stall_seconds")), "number"),
                (_number(figures["startup_seconds"]), "number"),
            ]
        )
    return head, rows


def _numerics(findings: Findings) -> Table | None:
    rows = []
    for each in findings.outcomes:
        verdict = each.verdict
        if verdict is None or verdict.kind == REFERENCE or not (verdict.numerics or verdict.evidence):
            continue
        said = [*verdict.numerics, *verdict.evidence]
        rows.append([(each.name, "name"), ("\n".join(said[:1]) if len(said) == 1 else "; ".join(said), "wrap")])
    return (
        (["config", f"settings that change rounding or the update, beside {findings.reference}"], rows)
        if rows
        else None
    )


def _lists(findings: Findings) -> list[tuple[str, Sequence[str]]]:
    found: list[tuple[str, Sequence[str]]] = []
    if findings.tried:
        found.append(("What the search tried", findings.tried))
    for each in findings.outcomes:
        if each.candidate.notes:
            found.append((f"{each.name}: notes of the check", each.candidate.notes))
    return found


# --------------------------------------------------------------------------------------------------------------------
# Forms


def _html_table(head: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    classes = [cell[1] for cell in rows[0]] if rows else [""] * len(head)
    heads = "".join(
        f'<th scope="col"{" class=number" * ("number" in kind)}>{html.escape(text)}</th>'
        for text, kind in zip(head, classes, strict=True)
    )
    body = ""
    for row in rows:
        body += "<tr>" + "".join(map(_html_cell, row)) + "</tr>"
    return f'<div class="table"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


def _html_cell(cell: Cell) -> str:
    text, classes = cell
    first, _, rest = html.escape(text).partition("\n")
    if classes == "name":  # long ones may be broken where they have parts
        first = first.replace(",", ",<wbr>").replace("_", "_<wbr>").replace(" on ", " on&nbsp;")
    inside = first + (f"<small>{rest}</small>" if rest else "")
    return f'<td class="{classes}">{inside}</td>' if classes else f"<td>{inside}</td>"


def _md_table(head: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    lines = [list(head), ["---"] * len(head), *([text for text, _ in row] for row in rows)]
    return "\n".join("| " + " | ".join(cell if cell == "---" else _md(cell) for cell in line) + " |" for line in lines)


def _md(text: str) -> str:
    for sign in "\\`*_<>|[]":
        text = text.replace(sign, "\\" + sign)
    first, _, rest = text.partition("\n")
    return f"{first} ({rest})" if rest else first


def _number(value: Any) -> str:
    return NOTHING if value is None else number(value)


def _percent(value: float | None) -> str:
    return NOTHING if value is None else f"{100 * value:.3g}%"


def _gigabytes(value: float | None) -> str:
    if not value:
        return NOTHING if value is None else "0"
    return f"{value / 1e9:,.1f} GB" if value >= 1e10 else f"{value / 1e6:,.0f} MB"


def write_reports(findings: Findings, folder: Path) -> None:
    """Writes ``report.json``, ``report.md``, its PNGs, and ``report.html``; each whole or not at all."""
    from codeparrot_ds.compare.charts import pictures_of

    durable.write_json(folder / "report.json", as_json(findings))
    pictures = pictures_of(findings)
    for picture in pictures:
        durable.replace_file(folder / f"{picture.name}.png", [picture.images["light"]])
    durable.replace_file(folder / "report.md", [markdown_page(findings, pictures).encode()])
    durable.replace_file(folder / "report.html", [html_page(findings, pictures).encode()])
