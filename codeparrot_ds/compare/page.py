"""The report of a comparison as one HTML page and as Markdown. The kit escapes every text."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from codeparrot_ds import durable
from codeparrot_ds.compare import charts
from codeparrot_ds.compare.findings import PROCESS_SPREAD, WAITING, Findings, Outcome, as_json, differences, figures_of
from codeparrot_ds.compare.results import FINISHED
from codeparrot_ds.compare.verdict import BAND, BITS, DIFFERENT, REFERENCE, ROUNDING, UNJUDGED
from codeparrot_ds.report.page_kit import Cell, Table, render
from codeparrot_ds.report.plots import Picture
from codeparrot_ds.report.units import NOTHING, listed, megabytes, percent, short, shown, whole

# Signs beside the words, so that neither colour nor a close look is needed.
SIGNS = {REFERENCE: "◆", BITS: "✓", ROUNDING: "✓", BAND: "✓", DIFFERENT: "✗", UNJUDGED: "?"}

MOST_COLUMNS = 6


def page_of(form: str, findings: Findings, pictures: Sequence[Picture]) -> str:
    """The page as ``html``, without outer assets, or as ``md`` for a pull request, with pictures that are files."""
    return render(
        f"comparison.{form}.j2",
        title=_title(findings),
        subtitle=_subtitle(findings),
        complete=findings.complete,
        recommendation=findings.recommendation,
        ranking=_ranking(findings),
        notes=_ranking_notes(findings),
        left_out=_left_out(findings),
        pictures=pictures,
        sections=_sections(findings),
        lists=_lists(findings),
        settings=[
            (f"{each.name}: DeepSpeed config", json.dumps(each.candidate.resolved, indent=2))
            for each in findings.outcomes
            if each.candidate.resolved
        ],
    )


# --------------------------------------------------------------------------------------------------------------------
# What the page says


def _title(findings: Findings) -> str:
    count = len({each.candidate.label for each in findings.outcomes})
    ranks = sorted({each.candidate.world_size for each in findings.outcomes})
    return f"{count} DeepSpeed config{'s' * (count != 1)} on {listed(map(str, ranks))} rank{'s' * (ranks != [1])}"


def _subtitle(findings: Findings) -> str:
    request = findings.request
    config = request.config
    rows = f"{config.global_batch_size} × {config.seq_length:,} tokens per step"
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


def _ranking(findings: Findings) -> Table:
    head = ["", "config", "tokens/s", "not told apart from", "losses", "step, s", "MFU", "memory per rank"]
    rows: list[list[str | Cell]] = []
    places = {name: place for place, (name, _) in enumerate(findings.ranking, 1)}
    for place, (name, ties) in enumerate(findings.ranking, 1):
        outcome = findings.outcome(name)
        figures, speed, verdict = figures_of(outcome, findings.request), outcome.speed, outcome.verdict
        assert speed is not None
        losses = NOTHING if verdict is None else f"{SIGNS[verdict.kind]} {_in_two_lines(str(verdict))}"
        is_different = verdict is not None and verdict.kind == DIFFERENT
        rows.append(
            [
                str(place),
                name,
                f"{speed.median:,.0f}\n{speed.low:,.0f} to {speed.high:,.0f}",
                ", ".join(str(places[tie]) for tie in ties) or NOTHING,
                Cell(losses, "wrap losses" + " different" * is_different),
                short(figures["step_seconds"]),
                percent(figures["mfu"]),
                findings.in_memory_unit(outcome.memory_bytes),
            ]
        )
    return Table(head, rows, ["number", "name", "number", "number", "", "number", "number", "number"])


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
        peak = megabytes(figures["peak_bytes"])
        rows.append([each.name, each.status, whole(figures["step"]), peak, each.reason or NOTHING])
    head = ["config", "what became of it", "step", "peak", "why"]
    return Table(head, rows, ["name", "", "number", "number", "wrap"]) if rows else None


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
        return Table([corner, *names], [[key, *values] for key, values in rows], ["name"])
    cells = []
    for key, values in rows:
        if key == "ranks":  # the names say it
            continue
        usual, *others = [value for value, _ in Counter(values).most_common()]
        having = {value: [name for name, mine in zip(names, values, strict=True) if mine == value] for value in others}
        texts = [f"{value}: {', '.join(_without_ranks(chosen, names))}" for value, chosen in having.items()]
        cells.append([key, usual, "; ".join(texts)])
    return Table([corner, "most", "others"], cells, ["name", "", "wrap"])


def _without_ranks(chosen: Sequence[str], names: Sequence[str]) -> list[str]:
    """Names, as one where a config is among them with all its numbers of ranks."""
    labels = {name: name.rpartition(" on ")[0] for name in names}
    shorter = []
    for name in chosen:
        all_of_it = [each for each in names if labels[each] == labels[name]]
        shorter.append(labels[name] if set(all_of_it) <= set(chosen) else name)
    return list(dict.fromkeys(shorter))


def _memory(findings: Findings, measured: Sequence[Outcome]) -> Table:
    """On GPUs the plan beside what it predicts; on a CPU something else is measured, and nothing compared."""
    if findings.on_gpu:
        head = ["config", "predicted", "measured", "difference", "host, predicted", "host, resident"]
    else:
        head = ["config", "this CPU, grown", "this CPU, in all", "a GPU, planned", "its host, planned"]
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
        rows.append([each.name, *cells])
    return Table(head, rows, ["name", *["number"] * (len(head) - 1)])


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
    "Sent: bytes per rank and step, counted from the tensors of DeepSpeed's collectives as rings, not measured on "
    "the wire. Start: from the command to the first step. The checkpoint is of all ranks, with its export."
)


def _parts(measured: Sequence[Outcome]) -> Table:
    rows = []
    for each in measured:
        if (parts := each.parts) is not None:
            seconds = [*(parts.seconds[name] for name in charts.PARTS), parts.total_seconds]
            rows.append([each.name, *(shown(value, "{:,.1f}", 1000) for value in seconds)])
    return Table(["config", *(f"{name}, ms" for name in (*charts.PARTS, "all"))], rows, ["name", *["number"] * 6])


def _costs(findings: Findings, measured: Sequence[Outcome]) -> Table:
    head = ["config", "sent a step", "collectives", "checkpoint", "saving, s", "training waited, s", "start, s"]
    rows = []
    for each in measured:
        figures = figures_of(each, findings.request)
        parts, saved = figures["parts"] or {}, figures["checkpoint"] or {}
        calls = ", ".join(f"{count:.0f} {name}" for name, count in parts.get("calls", {}).items())
        sent, size = megabytes(parts.get("sent_bytes")), megabytes(saved.get("bytes"))
        seconds = (saved.get("seconds"), saved.get("stall_seconds"), figures["startup_seconds"])
        rows.append([each.name, sent, calls or NOTHING, size, *map(short, seconds)])
    return Table(head, rows, ["name", "number", "wrap", "number", "number", "number", "number"])


def _numerics(findings: Findings) -> Table | None:
    rows = []
    for each in findings.outcomes:
        verdict = each.verdict
        if verdict is None or verdict.kind == REFERENCE or not (verdict.numerics or verdict.evidence):
            continue
        rows.append([each.name, "; ".join([*verdict.numerics, *verdict.evidence])])
    head = ["config", f"settings that change rounding or the update, beside {findings.reference}"]
    return Table(head, rows, ["name", "wrap"]) if rows else None


def _lists(findings: Findings) -> list[tuple[str, Sequence[str]]]:
    found: list[tuple[str, Sequence[str]]] = []
    if findings.tried:
        found.append(("What the search tried", findings.tried))
    for each in findings.outcomes:
        if each.candidate.notes:
            found.append((f"{each.name}: notes of the check", each.candidate.notes))
    return found


def write_reports(findings: Findings, folder: Path) -> None:
    """Writes ``report.json``, ``report.md``, its PNGs, and ``report.html``; each whole or not at all."""
    durable.write_json(folder / "report.json", as_json(findings))
    pictures = charts.pictures_of(findings)
    for picture in pictures:
        durable.replace_file(folder / f"{picture.name}.png", [picture.images["light"]])
    for form in ("md", "html"):
        durable.replace_file(folder / f"report.{form}", [page_of(form, findings, pictures).encode()])
