"""The pictures of a comparison: memory against tokens/s, parts of a step, losses, differences and scaling."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import Any

from codeparrot_ds.run.comparison_report import Findings, Outcome, trace_of
from codeparrot_ds.run.plots import THEMES, Chart, Series, draw, legend_columns, marker_of, number, plain_axes
from codeparrot_ds.zero.verdict import loss_bands

PARTS = ("forward", "backward", "communication", "optimizer", "data")
HATCHES = ("", "///", "xx", "..", "\\\\")
PART_COLOURS = (0, 1, 2, 3, 4)
TINY = 1e-9
"""Where a difference of nothing lies on a logarithmic axis."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One picture in both themes, and in words."""

    name: str
    alternative: str
    images: dict[str, bytes]
    height: int = 640


def pictures_of(findings: Findings) -> list[Picture]:
    """All pictures that there is something for, two of about the same height after each other."""
    scaling, losses, distances = map(_drawn, (_scaling(findings), _losses(findings), _differences(findings)))
    bars = _bars(findings)
    lines = [scaling, losses, distances, bars] if scaling else [bars, losses, distances]
    return [picture for picture in (_pareto(findings), *lines) if picture is not None]


def _drawn(chart: Chart | None) -> Picture | None:
    if chart is None:
        return None
    images = {theme: draw(chart, theme) for theme in THEMES}
    return Picture(name=chart.name, alternative=_in_words(chart), images=images, height=round(160 * chart.height))


# --------------------------------------------------------------------------------------------------------------------
# Lines


def _measured(findings: Findings) -> list[Outcome]:
    return [each for each in findings.outcomes if each.rows]


def _losses(findings: Findings) -> Chart | None:
    series = [
        Series(
            label=each.name,
            x=[row["step"] for row in each.rows],
            y=[float(row["loss"]) for row in each.rows],
            style=index,
        )
        for index, each in enumerate(_measured(findings))
    ]
    if not series:
        return None
    return Chart(
        name="losses", title="Training loss", unit="nats a token", x_label="step", series=tuple(series),
        height=_height([each.label for each in series]),
    )  # fmt: skip


def _differences(findings: Findings) -> Chart | None:
    """Distance of every loss from the reference's, with the bands."""
    outcomes = _measured(findings)
    if findings.reference is None or len(outcomes) < 2:
        return None
    reference = trace_of(findings.outcome(findings.reference))
    series = []
    for index, each in enumerate(outcomes):
        if each.name == findings.reference:
            continue
        pairs = list(zip(trace_of(each).losses, reference.losses, strict=False))
        distances = [max(TINY, abs(mine - theirs)) for mine, theirs in pairs]
        series.append(Series(label=each.name, x=range(1, len(distances) + 1), y=distances, style=index))
    for offset, (precision, sensitivity) in enumerate(findings.sensitivity.items()):
        band = loss_bands(reference, sensitivity)
        style = len(outcomes) + offset
        x = range(1, len(band) + 1)
        series.append(Series(label=f"band of {precision}", x=x, y=band, style=style, markers=True, limit=True))
    return Chart(
        name="differences",
        title=f"Distance of the loss from {findings.reference}",
        unit="nats a token; equal losses lie at 1e-9",
        x_label="step",
        series=tuple(series),
        log=True,
        height=_height([each.label for each in series]),
    )


def _scaling(findings: Findings) -> Chart | None:
    """Tokens/s by ranks, of every config that was measured on more than one number of them."""
    labels = dict.fromkeys(each.candidate.label for each in findings.outcomes)
    series = []
    for index, label in enumerate(labels):
        points = sorted(
            (each.candidate.world_size, each.speed.median)
            for each in findings.outcomes
            if each.candidate.label == label and each.speed is not None
        )
        if len(points) > 1:
            x, y = zip(*points, strict=True)
            series.append(Series(label=label, x=x, y=y, style=index, markers=True))
    if not series:
        return None
    return Chart(
        name="scaling", title="Scaling", unit="tokens/s", x_label="ranks", series=tuple(series), from_zero=True
    )


def _height(labels: list[str]) -> float:
    """Inches of a picture whose legend has these labels."""
    return 3.6 + 0.2 * math.ceil(len(labels) / legend_columns(labels))


def _in_words(chart: Chart) -> str:
    ends = []
    for series in chart.series:
        known = [(x, y) for x, y in zip(series.x, series.y, strict=True) if math.isfinite(y)]
        if known:
            ends.append(f"{series.label} from {number(known[0][1])} to {number(known[-1][1])}")
    return f"{chart.title} ({chart.unit}) by {chart.x_label}: {'; '.join(ends)}"


# --------------------------------------------------------------------------------------------------------------------
# Memory against tokens/s


def _pareto(findings: Findings) -> Picture | None:
    points = [each for each in _measured(findings) if each.speed is not None and each.memory_bytes is not None]
    if not points:
        return None
    words = "; ".join(
        f"{each.name} {number(each.speed.median)} tokens/s at {number((each.memory_bytes or 0) / 1e9)} GB"
        for each in points
        if each.speed is not None
    )
    return Picture(
        name="memory-speed",
        alternative=f"Memory of a rank against tokens/s: {words}",
        images={theme: _draw_pareto(findings, points, theme) for theme in THEMES},
        height=round(160 * _height([each.name for each in points])),
    )


def _draw_pareto(findings: Findings, points: list[Outcome], theme: str) -> bytes:
    colours = THEMES[theme]
    figure, axes = _figure(theme, _height([each.name for each in points]))
    front = findings.front
    places = {name: place for place, (name, _) in enumerate(findings.ranking, 1)}
    line = [(each.memory_bytes or 0, each.speed.median) for each in points if each.speed and each.name in front]
    line.sort()
    axes.plot([m / 1e9 for m, _ in line], [s for _, s in line], color=colours["faint"], linewidth=1, zorder=1)
    for index, each in enumerate(points):
        assert each.speed is not None and each.memory_bytes is not None
        colour = colours["palette"][index % len(colours["palette"])]
        x, speed = each.memory_bytes / 1e9, each.speed
        error = [[speed.median - min(speed.low, speed.median)], [max(speed.high, speed.median) - speed.median]]
        face = colour if each.name in front else "none"
        axes.errorbar(
            x, speed.median, yerr=error, fmt=marker_of(index), color=colour, markerfacecolor=face, markersize=7,
            elinewidth=1, capsize=2, label=each.name,
        )  # fmt: skip
        axes.annotate(
            str(places[each.name]), (x, speed.median), xytext=(6, 4), textcoords="offset points", fontsize=8,
            color=colours["ink"],
        )  # fmt: skip
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    kind = "tensors on the device" if points[0].device_bytes is not None else "resident, beside the libraries"
    axes.set_xlabel(f"GB a rank ({kind})", color=colours["faint"], fontsize=9)
    _title(
        axes,
        "Memory and speed",
        "tokens/s; numbers: rank; bars: spread; filled, joined: no other is better in both",
        colours,
    )
    _legend(figure, colours)
    return _png(figure, theme)


# --------------------------------------------------------------------------------------------------------------------
# Parts of a step


def _bars(findings: Findings) -> Picture | None:
    shown = [each for each in _measured(findings) if each.found.get("parts")]
    if not shown:
        return None
    words = "; ".join(
        each.name + " " + ", ".join(f"{part} {number(each.found['parts']['seconds'][part])}" for part in PARTS)
        for each in shown
    )
    height = 2.1 + 0.32 * len(shown)
    return Picture(
        name="parts",
        alternative=f"Parts of a step in seconds: {words}",
        images={theme: _draw_bars(findings, shown, theme, height) for theme in THEMES},
        height=round(160 * height),
    )


def _draw_bars(findings: Findings, shown: list[Outcome], theme: str, height: float) -> bytes:
    colours = THEMES[theme]
    figure, axes = _figure(theme, height)
    places = list(range(len(shown)))[::-1]
    left = [0.0] * len(shown)
    for part, hatch, colour in zip(PARTS, HATCHES, PART_COLOURS, strict=True):
        widths = [each.found["parts"]["seconds"][part] for each in shown]
        axes.barh(
            places, widths, left=left, height=0.7, label=part, color=colours["palette"][colour], hatch=hatch,
            edgecolor=colours["paper"], linewidth=0.6,
        )  # fmt: skip
        left = [start + width for start, width in zip(left, widths, strict=True)]
    medians = [_median_step(findings, each) for each in shown]
    known = [(median, place) for median, place in zip(medians, places, strict=True) if median is not None]
    axes.plot(
        [median for median, _ in known], [place for _, place in known], "|", color=colours["ink"], markersize=13,
        markeredgewidth=2, label="a scored step",
    )  # fmt: skip
    axes.set_yticks(places, [each.name.replace(",", ",\n") for each in shown])
    for text in axes.get_yticklabels():
        text.set_color(colours["ink"])
        text.set_parse_math(False)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color=colours["grid"], linewidth=0.8)
    axes.set_xlabel("seconds", color=colours["faint"], fontsize=9)
    _title(axes, "Parts of a step", "seconds; a scored step overlaps them", colours)
    _legend(figure, colours)
    return _png(figure, theme)


def _median_step(findings: Findings, outcome: Outcome) -> float | None:
    import statistics

    seconds = outcome.scored("step_seconds", findings.request.warmup_steps)
    return statistics.median(seconds) if seconds else None


# --------------------------------------------------------------------------------------------------------------------
# What all have


def _figure(theme: str, height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    colours = THEMES[theme]
    figure = Figure(figsize=(7, height), dpi=160, layout="constrained", facecolor=colours["paper"])
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    plain_axes(axes, colours)
    return figure, axes


def _title(axes: Any, title: str, unit: str, colours: dict[str, Any]) -> None:
    axes.set_title(title, loc="left", color=colours["ink"], fontsize=12, fontweight="bold", pad=24)
    note = axes.annotate(unit, (0, 1), fontsize=9, xytext=(0, 8), xycoords="axes fraction", textcoords="offset points")
    note.set_color(colours["faint"])


def _legend(figure: Any, colours: dict[str, Any]) -> None:
    labels = [label for axes in figure.axes for label in axes.get_legend_handles_labels()[1]]
    legend = figure.legend(
        loc="outside lower left", ncols=legend_columns(labels), frameon=False, fontsize=9, labelcolor=colours["ink"]
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def _png(figure: Any, theme: str) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", facecolor=THEMES[theme]["paper"], metadata={"Software": None})
    return file.getvalue()
