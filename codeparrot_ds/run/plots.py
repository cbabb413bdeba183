"""Line charts as PNG bytes, in a light and a dark theme. matplotlib is imported when the first one is drawn."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# Okabe and Ito's colours, which stay apart for the colour-blind; lightened for the dark theme. Line style and marker
# change with the colour, so that a black-and-white print can be read too.
LIGHT = ("#0072b2", "#d55e00", "#009e73", "#b5508f", "#a87400", "#3b3b3b", "#4b7fb8", "#8a3ffc")
DARK = ("#56b4e9", "#ff9254", "#2fd6a3", "#f09ecf", "#f2c14e", "#e0e0e0", "#9db7ff", "#c8a2ff")
LINE_STYLES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.2, 1.6)), (0, (6, 2, 1.2, 2)))
MARKERS = "osD^vPX*"

# The page has the same colours: CSS in report_page.
THEMES: dict[str, dict[str, Any]] = {
    "light": {"paper": "#ffffff", "ink": "#1f2430", "faint": "#5c6475", "grid": "#e4e7ee", "palette": LIGHT},
    "dark": {"paper": "#1a1d24", "ink": "#e8eaf0", "faint": "#a0a8b8", "grid": "#2d323d", "palette": DARK},
}
SMOOTH_FROM = 100
STRETCHES = 1000
MARK_UP_TO = 40


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line. ``style`` picks colour, dashes and marker; gaps where ``y`` is not finite."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
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
    height: float = 4.0
    """Inches, of 160 pixels; the width is 7."""


def draw(chart: Chart, theme: str) -> bytes:
    """The chart as PNG, 1120 pixels wide and 640 high unless it says otherwise."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    colours = THEMES[theme]
    figure = Figure(figsize=(7, chart.height), dpi=160, layout="constrained", facecolor=colours["paper"])
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for series in chart.series:
        _draw_series(axes, series, colours, smooth=chart.smooth)
    _dress(axes, chart, colours)
    _name_lines(figure, axes, chart, colours)
    file = io.BytesIO()
    figure.savefig(file, format="png", facecolor=colours["paper"], metadata={"Software": None})
    return file.getvalue()


def _draw_series(axes: Any, series: Series, colours: dict[str, Any], *, smooth: bool) -> None:
    colour = _colour_of(series, colours)
    x, y = np.asarray(series.x, dtype=float), np.asarray(series.y, dtype=float)
    y = np.where(np.isfinite(y), y, np.nan)
    line = {"color": colour, "linestyle": _of(LINE_STYLES, series.style), "linewidth": 1.8}
    if (series.markers and len(x) <= MARK_UP_TO) or len(x) == 1:
        marker = {"marker": marker_of(series.style), "markersize": 5, "markeredgewidth": 0}
        axes.plot(x, y, label=series.label, **line, **marker)
    elif smooth and len(x) >= SMOOTH_FROM and not series.markers:
        axes.plot(*_extremes(x, y), color=colour, linewidth=0.7, alpha=0.3)
        axes.plot(x, _running_mean(y, len(y) // 50), label=series.label, **line)
    else:
        axes.plot(x, y, label=series.label, **line)


def _colour_of(series: Series, colours: dict[str, Any]) -> str:
    palette = colours["palette"]
    return str(colours["ink"] if series.limit else palette[series.style % len(palette)])


def legend_columns(labels: Sequence[str]) -> int:
    """How many labels of a legend fit beside each other in a picture."""
    return 3 if max(map(len, labels), default=0) <= 28 else 2


def marker_of(style: int) -> str:
    """The marker of a style; colour and marker together stay apart for 64 of them."""
    return str(_of(MARKERS, style))


def _of(choices: Sequence[Any], style: int) -> Any:
    """A choice that is another one when the colours begin again."""
    return choices[(style + style // len(LIGHT)) % len(choices)]


def _extremes(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest point of each of 1000 stretches: the same picture, and drawn in a fraction of the time."""
    if len(y) <= 2 * STRETCHES:
        return x, y
    kept = {0, len(y) - 1}
    for part in np.array_split(np.arange(len(y)), STRETCHES):
        known = part[np.isfinite(y[part])]
        if len(known):
            kept |= {int(known[np.argmin(y[known])]), int(known[np.argmax(y[known])])}
    index = sorted(kept)
    return x[index], y[index]


def _running_mean(y: np.ndarray, reach: int) -> np.ndarray:
    """Mean over ``reach`` neighbours on either side, fewer at the ends; what is not finite is left out."""
    known = np.isfinite(y)
    total = np.concatenate([[0.0], np.cumsum(np.where(known, y, 0.0))])
    count = np.concatenate([[0], np.cumsum(known)])
    low = np.maximum(np.arange(len(y)) - reach, 0)
    high = np.minimum(np.arange(len(y)) + reach + 1, len(y))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(known, (total[high] - total[low]) / (count[high] - count[low]), np.nan)


def plain_axes(axes: Any, colours: dict[str, Any]) -> None:
    """What the axes of every chart have in common."""
    axes.set_facecolor(colours["paper"])
    axes.grid(axis="y", color=colours["grid"], linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(colours["faint"])
    axes.tick_params(colors=colours["faint"], labelsize=9, length=0)


def _dress(axes: Any, chart: Chart, colours: dict[str, Any]) -> None:
    from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    plain_axes(axes, colours)
    axes.tick_params(which="minor", length=0)
    axes.tick_params(axis="x", length=3)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlabel(chart.x_label, color=colours["faint"], fontsize=9)
    axes.set_xlim(left=0 - 0.02 * axes.get_xlim()[1])
    if chart.log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        low, high = axes.get_ylim()
        if high / low < 100:
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    else:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    if chart.from_zero and not chart.log:
        axes.set_ylim(bottom=0, top=max(1.08 * axes.get_ylim()[1], 1e-12))


def _name_lines(figure: Any, axes: Any, chart: Chart, colours: dict[str, Any]) -> None:
    title = axes.set_title(chart.title, loc="left", color=colours["ink"], fontsize=12, fontweight="bold", pad=24)
    unit = chart.unit
    if chart.smooth and any(len(series.x) >= SMOOTH_FROM and not series.markers for series in chart.series):
        unit += ", faint; running mean, bold"
    place = {"xytext": (0, 8), "xycoords": "axes fraction", "textcoords": "offset points"}
    note = axes.annotate(unit, (0, 1), fontsize=9, **place)
    note.set_color(colours["faint"])
    for text in (title, note):
        text.set_parse_math(False)
    if len(chart.series) > 1:
        columns = legend_columns([series.label for series in chart.series])
        legend = figure.legend(
            loc="outside lower left", ncols=columns, frameon=False, fontsize=9, labelcolor=colours["ink"],
            handlelength=3.2,
        )  # fmt: skip
        for text in legend.get_texts():
            text.set_parse_math(False)
    if len(chart.series) <= 2:
        for series in chart.series:
            _name_last_value(axes, series, colours)


def _name_last_value(axes: Any, series: Series, colours: dict[str, Any]) -> None:
    known = [(x, y) for x, y in zip(series.x, series.y, strict=True) if math.isfinite(y)]
    if series.markers and known:
        colour = _colour_of(series, colours)
        axes.annotate(
            number(known[-1][1]), known[-1], xytext=(0, 8), textcoords="offset points", ha="right", fontsize=9,
            color=colour, fontweight="bold",
        )  # fmt: skip


def number(value: float) -> str:
    """A number as a person reads it: ``1,234``, ``0.0005``, ``2e-06``, ``12.3M``."""
    size = abs(value)
    if not math.isfinite(value):
        return str(value)
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if size >= limit:
            return f"{value / limit:.4g}{unit}"
    if size >= 1000:
        return f"{value:,.0f}"
    if value and size < 1e-4:
        return f"{value:.3g}".replace("e-0", "e-")
    return f"{value:.4g}"
