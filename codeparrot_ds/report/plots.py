"""Line charts as PNG bytes, in a light and a dark theme. matplotlib is imported when the first one is drawn.

What every picture of the product has in common is here too: its size, its colours, and texts that stay inside it.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from codeparrot_ds.report.units import number

# Okabe and Ito's first colours and, instead of their paler ones, others that keep their contrast to the paper. Any two
# stay apart, also for the colour-blind and from the colour of text; a test has the distances. Line style and marker
# change with the colour, so that a black-and-white print can be read too.
LIGHT = ("#0072b2", "#d55e00", "#009e73", "#b5508f", "#664d00", "#3a2b9c", "#8a0f2b", "#d94ff0")
DARK = ("#56b4e9", "#ff9254", "#2fd6a3", "#f09ecf", "#f7f06d", "#8a6cff", "#e0457b", "#9c8a5a")
LINE_STYLES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.2, 1.6)), (0, (6, 2, 1.2, 2)))
MARKERS = "osD^vPX*"

# The pages have the same colours: templates/page.css. "rest" is what a bar has beside its named parts.
THEMES: dict[str, dict[str, Any]] = {
    "light": {
        "paper": "#ffffff", "ink": "#1f2430", "faint": "#5c6475", "grid": "#e4e7ee", "rest": "#bcc3cf",
        "palette": LIGHT,
    },
    "dark": {
        "paper": "#1a1d24", "ink": "#e8eaf0", "faint": "#a0a8b8", "grid": "#2d323d", "rest": "#565d6b",
        "palette": DARK,
    },
}  # fmt: skip
WIDTH_INCHES, DPI = 7.0, 160
WIDTH_POINTS = 72 * WIDTH_INCHES
MOST_PIXELS = 65_000
"""That matplotlib draws in one direction, nearly: a higher picture gets fewer an inch."""
LEGEND_POINTS = 9
LONG_HANDLE = 3.2
"""Widths of a letter that a legend has for a dashed line with its marker."""
SEEN = 0.002
"""Of an axis: a part that is shorter in every bar is not seen, and not in the legend."""
SMOOTH_FROM = 100
STRETCHES = 1000
MARK_UP_TO = 40


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line. ``style`` picks colour, dashes and marker; gaps where ``y`` is not finite."""

    label: str
    x: Sequence[float] | np.ndarray
    y: Sequence[float] | np.ndarray
    style: int = 0
    markers: bool = False
    limit: bool = False
    """What the others are held against: in the colour of text."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One picture. ``name`` is its file name; ``unit`` stands above the vertical axis."""

    name: str
    title: str
    unit: str
    x_label: str
    series: tuple[Series, ...]
    log: bool = False
    from_zero: bool = False
    smooth: bool = False
    """Show a running mean over the faint values where there are many."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A PNG by theme, and what it shows in words."""

    name: str
    alternative: str
    images: Mapping[str, bytes]


def picture(name: str, alternative: str, draw_in: Callable[[str], bytes]) -> Picture:
    """What a function of the theme draws, in every theme."""
    return Picture(name=name, alternative=alternative, images={theme: draw_in(theme) for theme in THEMES})


def picture_of(chart: Chart) -> Picture:
    """A chart in every theme, and in words: where each line begins and ends."""
    ends = []
    for series in chart.series:
        if known := _ends(series):
            (x0, y0), (x1, y1) = known
            ends.append(f"{series.label} from {number(y0)} at {number(x0)} to {number(y1)} at {number(x1)}")
    unit = f" ({chart.unit})" if chart.unit else ""
    words = f"{chart.title}{unit} by {chart.x_label}: {'; '.join(ends)}"
    return picture(chart.name, words, lambda theme: draw(chart, theme))


def _ends(series: Series) -> tuple[tuple[float, float], tuple[float, float]] | None:
    """The first and the last point of a line that are drawn; None without any."""
    known = np.isfinite(np.asarray(series.y, dtype=float))
    if not known.any():
        return None
    first, last = int(known.argmax()), len(known) - 1 - int(known[::-1].argmax())
    return (series.x[first], series.y[first]), (series.x[last], series.y[last])


def draw(chart: Chart, theme: str) -> bytes:
    """The chart as PNG, 1120 pixels wide and 640 high, or higher for what its legend has to say."""
    colours = THEMES[theme]
    named = [series.label for series in chart.series] if len(chart.series) > 1 else []
    layout = legend_layout(named, LONG_HANDLE)
    figure = new_figure(theme, max(4.0, 3.6 + layout.inches))
    axes = figure.add_subplot()
    for series in chart.series:
        _draw_series(axes, series, colours, smooth=chart.smooth)
    _dress(axes, chart, colours)
    write_title(axes, chart.title, _note(chart), colours)
    if named:
        add_legend(figure, axes.get_legend_handles_labels(), colours, LONG_HANDLE)
    if len(chart.series) <= 2:
        _name_last_values(axes, chart.series, colours)
    return png_of(figure)


# --------------------------------------------------------------------------------------------------------------------
# What all pictures have


def new_figure(theme: str, height: float) -> Any:
    """A figure of so many inches in the theme's colours, with the canvas that draws it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    dpi = min(DPI, int(MOST_PIXELS / height))
    paper = THEMES[theme]["paper"]
    figure = Figure(figsize=(WIDTH_INCHES, height), dpi=dpi, layout="constrained", facecolor=paper)
    FigureCanvasAgg(figure)
    return figure


def png_of(figure: Any) -> bytes:
    """A figure as PNG, the same bytes at any time."""
    from PIL import Image

    figure.canvas.draw()  # once, where savefig would lay it out in a pass of its own
    # Nothing is transparent: without that channel a file is a tenth smaller and written in less time.
    image, file = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3]), io.BytesIO()
    image.save(file, format="png", dpi=(figure.dpi, figure.dpi))
    return file.getvalue()


def png_size(image: bytes) -> tuple[int, int]:
    """Width and height of a PNG in pixels."""
    return int.from_bytes(image[16:20], "big"), int.from_bytes(image[20:24], "big")


@lru_cache(maxsize=4096)
def text_width(text: str, points: float, bold: bool = False) -> float:
    """How wide a text is drawn, in points; the widest of its lines."""
    from matplotlib.backends.backend_agg import RendererAgg
    from matplotlib.font_manager import FontProperties

    renderer = RendererAgg(1, 1, DPI)
    font = FontProperties(size=points, weight="bold" if bold else "normal")
    widths = (renderer.get_text_width_height_descent(line, font, ismath=False)[0] for line in text.split("\n"))
    return float(max(widths)) * 72 / DPI


def wrapped(text: str, points: float, width: float, bold: bool = False) -> str:
    """A text in lines of at most so many points, broken where a name has its parts, or anywhere in a part too long."""
    lines = [""]
    for part in re.findall(r"[^\s_\-/,.]*[\s_\-/,.]?", text):
        if text_width((lines[-1] + part).rstrip(), points, bold) <= width:
            lines[-1] += part
            continue
        if lines[-1]:
            lines.append("")
        for letter in part:
            if lines[-1] and text_width(lines[-1] + letter.rstrip(), points, bold) > width:
                lines.append("")
            lines[-1] += letter
    return "\n".join(line.rstrip() for line in lines)


def write_title(axes: Any, title: str, note: str, colours: dict[str, Any], *, left: float = 60, size: int = 12) -> None:
    """What a picture shows, and in small below it its unit and how to read it; in lines that stay inside it.

    Args:
        axes: whose left edge they begin at.
        title: the bold line.
        note: the line below.
        colours: of the theme.
        left: points from the picture's left edge to that of the axes, or more.
        size: of the title, in points.
    """
    width = WIDTH_POINTS - left - 12
    below = wrapped(note, 9, width)
    heading = axes.set_title(
        wrapped(title, size, width, bold=True), loc="left", color=colours["ink"], fontsize=size, fontweight="bold",
        pad=24 + 11 * below.count("\n"),
    )  # fmt: skip
    unit = axes.annotate(
        below, (0, 1), xytext=(0, 8), xycoords="axes fraction", textcoords="offset points", fontsize=9,
        color=colours["faint"],
    )  # fmt: skip
    for text in (heading, unit):
        text.set_parse_math(False)


def legend_label(name: str) -> str:
    """A name as a label; matplotlib leaves those that begin with an underscore out of its legends."""
    return f" {name}" if name.startswith("_") else name


@dataclass(frozen=True, kw_only=True)
class LegendLayout:
    """Where a legend's entries stand: in so many columns, their labels in lines, and the inches that they take."""

    columns: int
    labels: Sequence[str]
    inches: float


def legend_layout(labels: Sequence[str], handle: float = 2.0, most_columns: int = 3) -> LegendLayout:
    """A layout that stays inside the picture, whatever the labels.

    Args:
        labels: of the entries; none take no room.
        handle: length of the sign beside each, in widths of a letter.
        most_columns: beside each other.
    """
    beside = (handle + 0.8) * LEGEND_POINTS  # the sign and the gap between it and its label
    room = WIDTH_POINTS - 16
    widest = max((text_width(label, LEGEND_POINTS) for label in labels), default=0)
    columns = most_columns
    while columns > 1 and columns * (beside + widest) + (columns - 1) * 2 * LEGEND_POINTS > room:
        columns -= 1
    shown = [wrapped(label, LEGEND_POINTS, room - beside) for label in labels] if columns == 1 else list(labels)
    lines = max((1 + label.count("\n") for label in shown), default=0)
    return LegendLayout(columns=columns, labels=shown, inches=math.ceil(len(shown) / columns) * (0.05 + 0.15 * lines))


def add_legend(
    figure: Any,
    entries: tuple[Sequence[Any], Sequence[str]],
    colours: dict[str, Any],
    handle: float = 2.0,
    most_columns: int = 3,
) -> None:
    """The legend below a picture: artists and their labels; ``handle`` and ``most_columns`` as in `legend_layout`."""
    handles, labels = entries
    layout = legend_layout(labels, handle, most_columns)
    legend = figure.legend(
        handles, layout.labels, loc="outside lower left", ncols=layout.columns, frameon=False, fontsize=LEGEND_POINTS,
        labelcolor=colours["ink"], handlelength=handle,
    )  # fmt: skip
    for text in legend.get_texts():
        text.set_parse_math(False)


def plain_axes(axes: Any, colours: dict[str, Any]) -> None:
    """What the axes of every chart have in common."""
    axes.set_facecolor(colours["paper"])
    axes.grid(axis="y", color=colours["grid"], linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(colours["faint"])
    axes.tick_params(colors=colours["faint"], labelsize=9, length=0)


def draw_bars(
    axes: Any, names: Sequence[str], parts: Sequence[tuple[str, str, str, Sequence[float]]], limit: float,
    colours: dict[str, Any], points: float,
) -> list[float]:  # fmt: skip
    """Stacked bars from the top down; returns where each ends.

    Args:
        axes: to draw on.
        names: of the bars, in lines.
        parts: label in the legend or "" for none, colour, hatch, and the width in every bar.
        limit: right end of the axis.
        colours: of the theme.
        points: size of the names.
    """
    plain_axes(axes, colours)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color=colours["grid"], linewidth=0.8)
    axes.tick_params(labelsize=points)
    axes.spines["bottom"].set_visible(False)
    axes.spines["left"].set_visible(True)
    ends = [0.0] * len(names)
    for label, colour, hatch, widths in parts:
        axes.barh(
            range(len(names)), widths, left=ends, height=0.72, label=label, color=colour, hatch=hatch,
            edgecolor=colours["paper"], linewidth=0.5,
        )  # fmt: skip
        ends = [start + width for start, width in zip(ends, widths, strict=True)]
    axes.set_yticks(range(len(names)), names)
    for text in axes.get_yticklabels():
        text.set(color=colours["ink"], parse_math=False)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0, limit)
    number_axis(axes.xaxis)
    return ends


def number_axis(axis: Any) -> None:
    """Numbers on an axis as they stand in the tables."""
    from matplotlib.ticker import FuncFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))


def marker_of(style: int) -> str:
    """The marker of a style; colour and marker together stay apart for 64 of them."""
    return str(_of(MARKERS, style))


def _of(choices: Sequence[Any], style: int) -> Any:
    """A choice that is another one when the colours begin again."""
    return choices[(style + style // len(LIGHT)) % len(choices)]


# --------------------------------------------------------------------------------------------------------------------
# Lines


def _draw_series(axes: Any, series: Series, colours: dict[str, Any], *, smooth: bool) -> None:
    colour = _colour_of(series, colours)
    x, y = np.asarray(series.x, dtype=float), np.asarray(series.y, dtype=float)
    if not np.isfinite(y).all():
        y = np.where(np.isfinite(y), y, np.nan)
    dashes = _of(LINE_STYLES, series.style)
    # Whole lines below broken ones: where two are equal, both are seen.
    # Nor are lines and markers on an axis cut in half by it: the limits hold all values.
    line = {"color": colour, "linestyle": dashes, "linewidth": 1.8, "zorder": 2.0 if dashes == "-" else 2.1}
    line["clip_on"] = False
    marker = {"marker": marker_of(series.style), "markersize": 5, "markeredgewidth": 0}
    if (series.markers and len(x) <= MARK_UP_TO) or len(x) == 1:
        axes.plot(x, y, label=legend_label(series.label), **line, **marker)
        return
    if smooth and len(x) >= SMOOTH_FROM and not series.markers:
        axes.plot(*_extremes(x, y), color=colour, linewidth=0.7, alpha=0.3)
        x, y = _running_mean(x, y, len(y) // 50)
    x, y = _extremes(x, y, gaps=True)
    axes.plot(x, y, label=legend_label(series.label), **line)
    alone = _between_gaps(y)
    if alone.any():  # a line has no length there
        axes.plot(x[alone], y[alone], color=colour, linestyle="none", clip_on=False, **marker)


def _between_gaps(y: np.ndarray) -> np.ndarray:
    """Which values have no finite neighbour."""
    known = np.concatenate([[False], np.isfinite(y), [False]])
    return known[1:-1] & ~known[:-2] & ~known[2:]


def _colour_of(series: Series, colours: dict[str, Any]) -> str:
    palette = colours["palette"]
    return str(colours["ink"] if series.limit else palette[series.style % len(palette)])


def _extremes(x: np.ndarray, y: np.ndarray, *, gaps: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest point of each of 1000 stretches: the same picture, and drawn in a fraction of the time.

    A stretch without any finite value is left out, or with ``gaps`` a gap.
    """
    if len(y) <= 2 * STRETCHES:
        return x, y
    kept = {0, len(y) - 1}
    for part in np.array_split(np.arange(len(y)), STRETCHES):
        known = part[np.isfinite(y[part])]
        if len(known):
            kept |= {int(known[np.argmin(y[known])]), int(known[np.argmax(y[known])])}
        elif gaps:
            kept.add(int(part[0]))
    index = sorted(kept)
    return x[index], y[index]


def _running_mean(x: np.ndarray, y: np.ndarray, reach: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean over ``reach`` neighbours on either side, fewer at the ends; what is not finite is left out.

    Of many points some thousands are chosen evenly: between these a mean of so many neighbours does not turn.
    """
    known = np.isfinite(y)
    total, count = np.zeros(len(y) + 1), np.zeros(len(y) + 1, dtype=np.int32)
    np.cumsum(y if known.all() else np.where(known, y, 0.0), out=total[1:])
    np.cumsum(known, out=count[1:])
    at = np.arange(len(y)) if len(y) <= 4 * STRETCHES else np.linspace(0, len(y) - 1, 4 * STRETCHES).astype(int)
    low, high = np.maximum(at - reach, 0), np.minimum(at + reach + 1, len(y))
    with np.errstate(invalid="ignore", divide="ignore"):
        return x[at], np.where(known[at], (total[high] - total[low]) / (count[high] - count[low]), np.nan)


def _dress(axes: Any, chart: Chart, colours: dict[str, Any]) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    plain_axes(axes, colours)
    axes.tick_params(which="minor", length=0)
    axes.tick_params(axis="x", length=3)
    number_axis(axes.xaxis)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlabel(chart.x_label, color=colours["faint"], fontsize=9)
    last = max([1.0, *(float(np.max(series.x)) for series in chart.series if len(series.x))])
    axes.set_xlim(-0.02 * last, 1.02 * last)
    axes.margins(y=0.12)  # room for the last values
    if chart.log:
        axes.set_yscale("log")
        number_axis(axes.yaxis)
        axes.yaxis.set_minor_formatter(NullFormatter())
        low, high = axes.get_ylim()
        if high / low < 1000:
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    else:
        number_axis(axes.yaxis)
    if chart.from_zero and not chart.log:
        axes.set_ylim(bottom=0, top=max(axes.get_ylim()[1], 1.08 * axes.dataLim.ymax, 1e-12))


def _note(chart: Chart) -> str:
    """The unit, and what a reader could not know of the lines."""
    parts = [chart.unit] if chart.unit else []
    if chart.smooth and any(len(series.x) >= SMOOTH_FROM and not series.markers for series in chart.series):
        parts = [f"{chart.unit}, faint", "running mean, bold"]
    if not all(np.isfinite(np.asarray(series.y, dtype=float)).all() for series in chart.series):
        parts.append("gaps: not a finite number")
    return "; ".join(parts)


def _name_last_values(axes: Any, lines: Sequence[Series], colours: dict[str, Any]) -> None:
    """The last value of each line with markers beside its end: of two the higher above, the lower below."""
    from matplotlib.patheffects import withStroke

    ends = []
    for series in lines:
        if series.markers and (known := _ends(series)):
            ends.append((*known[1], _colour_of(series, colours)))
    lowest = min(ends, key=lambda end: end[1], default=None)
    for end in ends:
        x, y, colour = end
        below = len(ends) > 1 and end is lowest
        axes.annotate(
            number(y), (x, y), xytext=(0, -7 if below else 7), textcoords="offset points", fontsize=9, color=colour,
            ha="left" if x < 0.1 * axes.get_xlim()[1] else "right", va="top" if below else "bottom", fontweight="bold",
            path_effects=[withStroke(linewidth=3, foreground=colours["paper"])],  # read also on a line
        )  # fmt: skip
