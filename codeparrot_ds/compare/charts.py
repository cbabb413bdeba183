"""The pictures of a comparison: memory against tokens/s, parts of a step, losses, differences and scaling."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from codeparrot_ds.compare.findings import Findings, Outcome, Speed, trace_of
from codeparrot_ds.compare.verdict import loss_bands
from codeparrot_ds.report import plots
from codeparrot_ds.report.plots import Chart, Picture, Series
from codeparrot_ds.report.units import number

PARTS = ("forward", "backward", "communication", "optimizer", "data")
HATCHES = ("", "///", "xx", "..", "\\\\")
TINY = 1e-9
"""Where a difference of nothing lies on a logarithmic axis."""
NAME_POINTS = 200
"""The most that names take beside bars; longer ones have several lines."""


def pictures_of(findings: Findings) -> list[Picture]:
    """All pictures that there is something for, two of about the same height after each other."""
    charts = (_scaling(findings), _losses(findings), _differences(findings))
    scaling, losses, distances = (None if chart is None else plots.picture_of(chart) for chart in charts)
    bars = _bars(findings)
    lines = [scaling, losses, distances, bars] if scaling else [bars, losses, distances]
    return [each for each in (_pareto(findings), *lines) if each is not None]


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
    return Chart(name="losses", title="Training loss", unit="nats a token", x_label="step", series=tuple(series))


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
        apart = [abs(mine - theirs) for mine, theirs in pairs]
        distances = [TINY if distance < TINY else distance for distance in apart]  # not max(), which drops a NaN
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


# --------------------------------------------------------------------------------------------------------------------
# Memory against tokens/s


def _pareto(findings: Findings) -> Picture | None:
    points = [
        (style, each, each.speed, each.memory_bytes)
        for style, each in enumerate(_measured(findings))
        if each.speed is not None and each.memory_bytes is not None
    ]
    if not points:
        return None
    words = "; ".join(
        f"{each.name} {number(speed.median)} tokens/s at {findings.in_memory_unit(memory)}"
        for _, each, speed, memory in points
    )
    alternative = f"Memory of a rank against tokens/s: {words}"
    return plots.picture("memory-speed", alternative, lambda theme: _draw_pareto(findings, points, theme))


def _draw_pareto(findings: Findings, points: Sequence[tuple[int, Outcome, Speed, int]], theme: str) -> bytes:
    colours, front = plots.THEMES[theme], findings.front
    unit, scale = findings.memory_unit
    places = {name: place for place, (name, _) in enumerate(findings.ranking, 1)}
    points = sorted(points, key=lambda point: places[point[1].name])
    labels = [f"{len(places)}. {each.name}" for _, each, _, _ in points]
    figure = plots.new_figure(theme, 3.6 + plots.legend_layout(labels).inches)
    axes = figure.add_subplot()
    plots.plain_axes(axes, colours)
    for style, each, speed, memory in reversed(points):  # the fastest on top
        colour = colours["palette"][style % len(colours["palette"])]
        low, high = _spread(speed)
        axes.errorbar(
            memory / scale, speed.median, yerr=[[speed.median - low], [high - speed.median]], color=colour,
            fmt=plots.marker_of(style), markerfacecolor=colour if each.name in front else "none", markersize=7,
            elinewidth=1, capsize=2, label=f"{places[each.name]}. {each.name}",
        )  # fmt: skip
    best = sorted((memory / scale, speed.median) for _, each, speed, memory in points if each.name in front)
    if len(best) > 1:
        axes.plot(*zip(*best, strict=True), color=colours["faint"], linewidth=1, zorder=1)
    axes.set_xlim(*_axis([memory / scale for *_, memory in points]))
    axes.tick_params(axis="x", length=3)  # and away from the vertical axis's lowest number
    axes.set_ylim(*_axis([end for _, _, speed, _ in points for end in _spread(speed)]))
    plots.number_axis(axes.xaxis)
    plots.number_axis(axes.yaxis)
    kind = "tensors on the device" if findings.on_gpu else "resident beside the libraries, measured on this CPU"
    axes.set_xlabel(f"{unit} a rank ({kind})", color=colours["faint"], fontsize=9)
    filled = "filled, joined" if len(best) > 1 else "filled"
    told = f"; {filled}: no other is better in both" if best else ""
    plots.write_title(axes, "Memory and speed", f"tokens/s; bars: spread{told}", colours)
    handles, labels = axes.get_legend_handles_labels()
    plots.add_legend(figure, (handles[::-1], labels[::-1]), colours)
    return plots.png_of(figure)


def _spread(speed: Speed) -> tuple[float, float]:
    """The ends of a bar, which holds the median also where that is of trials far apart."""
    return min(speed.low, speed.median), max(speed.high, speed.median)


def _axis(values: Sequence[float]) -> tuple[float, float]:
    """The ends of an axis with room beside the values: from nothing where that leaves them most of it."""
    low, high = min(values), max(values)
    if low < 0.5 * high or high <= 0:
        return 0.0, 1.08 * high if high > 0 else 1.0
    room = max(0.15 * (high - low), 0.02 * high)
    return low - room, high + room


# --------------------------------------------------------------------------------------------------------------------
# Parts of a step


def _bars(findings: Findings) -> Picture | None:
    shown = [each for each in _measured(findings) if each.parts is not None]
    if not shown:
        return None
    words = "; ".join(
        each.name + " " + ", ".join(f"{part} {number(_milliseconds(each, part))}" for part in PARTS) for each in shown
    )
    alternative = f"Parts of a step in ms: {words}"
    return plots.picture("parts", alternative, lambda theme: _draw_parts(findings, shown, theme))


def _milliseconds(outcome: Outcome, part: str) -> float:
    return 1000 * outcome.parts.seconds[part] if outcome.parts is not None else 0.0


def _draw_parts(findings: Findings, shown: list[Outcome], theme: str) -> bytes:
    colours = plots.THEMES[theme]
    names = [plots.wrapped(each.name, 9, NAME_POINTS) for each in shown]
    row = 0.2 + 0.14 * max(1 + name.count("\n") for name in names)
    figure = plots.new_figure(theme, 1.8 + row * len(shown) + plots.legend_layout([*PARTS, "a scored step"]).inches)
    axes = figure.add_subplot()
    widths = {part: [_milliseconds(each, part) for each in shown] for part in PARTS}
    medians = [_median_step(findings, each) for each in shown]
    known = [(median, place) for place, median in enumerate(medians) if median is not None]
    limit = 1.04 * max([*map(sum, zip(*widths.values(), strict=True)), *(median for median, _ in known)]) or 1.0
    parts = [
        (part if max(widths[part]) > plots.SEEN * limit else "", colour, hatch, widths[part])
        for part, colour, hatch in zip(PARTS, colours["palette"], HATCHES, strict=False)
    ]
    plots.draw_bars(axes, names, parts, limit, colours, 9)
    if known:
        axes.plot(
            *zip(*known, strict=True), "|", color=colours["ink"], markersize=13, markeredgewidth=2,
            label="a scored step",
        )  # fmt: skip
    axes.set_xlabel("ms", color=colours["faint"], fontsize=9)
    note = "means of steps taken apart" + ("; a scored step overlaps them" if known else "")
    plots.write_title(axes, "Parts of a step", note, colours, left=max(plots.text_width(name, 9) for name in names))
    plots.add_legend(figure, axes.get_legend_handles_labels(), colours)
    return plots.png_of(figure)


def _median_step(findings: Findings, outcome: Outcome) -> float | None:
    """Milliseconds of a scored step."""
    seconds = outcome.scored("step_seconds", findings.request.warmup_steps)
    return 1000 * statistics.median(seconds) if seconds else None
