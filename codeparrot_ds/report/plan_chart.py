"""A memory plan as a picture: one stacked bar a config, and a line where the device ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from codeparrot_ds.memory.plan import Plan, PlanRow, in_gigabytes
from codeparrot_ds.memory.workload import CATEGORIES
from codeparrot_ds.model.shapes import num_parameters
from codeparrot_ds.report.plots import (
    THEMES,
    WIDTH_POINTS,
    add_legend,
    legend_layout,
    new_figure,
    number,
    number_axis,
    plain_axes,
    png_of,
    text_width,
    wrapped,
    write_title,
)
from codeparrot_ds.terminal import gigabytes

BESIDE = "beside tensors"
PARTS = (*CATEGORIES, BESIDE)
NAME_POINTS, VALUE_POINTS = 8, 7
MOST_NAME = 200
"""Points that names take beside the bars; longer ones have several lines."""
GAP = 4
"""Points between a bar and its value."""
SEEN = 0.002
"""Of the axis: a part that is shorter in every bar is not seen, and not in the legend."""
FAR = 3
"""A device with so many times what the longest bar needs is said and not drawn: the bars would be slivers."""


def draw_plan(plan: Plan, theme: str = "light") -> bytes:
    """The rows of a plan's tables as PNG, one panel a number of ranks on one scale; 1120 pixels wide."""
    colours = THEMES[theme]
    panels = [(ranks, plan.shown(ranks)) for ranks in plan.request.world_sizes if plan.shown(ranks)]
    names = {ranks: _names(rows) for ranks, rows in panels}
    row_inches = 0.1 + 0.14 * max((1 + name.count("\n") for each in names.values() for name in each), default=1)
    heights = [len(rows) * row_inches + 1.3 for _, rows in panels] or [1.3]
    figure = new_figure(theme, sum(heights) + 0.1 + legend_layout(PARTS, most_columns=4).inches)
    grid = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    left = max((text_width(name, NAME_POINTS) for each in names.values() for name in each), default=0.0)
    limit = _axis_end(plan, [row for _, rows in panels for row in rows], WIDTH_POINTS - left - 24)
    for axes, (ranks, rows) in zip(grid, panels, strict=False):
        _dress(axes, names[ranks], limit, colours)
        _draw_bars(axes, rows, colours)
        is_drawn = _draw_device(axes, plan, limit, colours)
        write_title(axes, _title(plan, ranks, rows), _note(plan, is_drawn), colours, left=left, size=11)
    _legend(figure, grid, panels, limit, colours)
    return png_of(figure)


def _names(rows: Sequence[PlanRow]) -> list[str]:
    """Of the bars: the configs, and their micro-batches where there are several."""
    several = len({row.micro_batch_size for row in rows}) > 1
    texts = [f"{row.config}, micro-batch {row.micro_batch_size}" if several else row.config for row in rows]
    return [wrapped(text, NAME_POINTS, MOST_NAME) for text in texts]


def _value(row: PlanRow) -> str:
    return in_gigabytes(row.needed_bytes) + ("" if row.fits is not False else "  does not fit")


def _axis_end(plan: Plan, rows: Sequence[PlanRow], points: float) -> float:
    """GB at the right end of all panels: every bar with its value, and the device unless it is far away.

    Args:
        plan: with the device.
        rows: of all panels.
        points: width of the axes.
    """
    longest = max((row.needed_bytes for row in rows), default=0) / 1e9
    ends = [row.needed_bytes / 1e9 / (1 - (GAP + text_width(_value(row), VALUE_POINTS)) / points) for row in rows]
    device = (plan.request.device_memory or 0) / 1e9
    if device <= FAR * longest:
        ends.append(1.03 * device)
    return max(ends, default=0) or 1.0


def _bytes_of(row: PlanRow, part: str) -> int:
    return row.needed_bytes - row.memory.peak_bytes if part == BESIDE else row.memory.device.get(part, 0)


def _colours_of_parts(colours: dict[str, Any]) -> list[str]:
    return [*colours["palette"][: len(CATEGORIES)], colours["rest"]]


def _draw_bars(axes: Any, rows: Sequence[PlanRow], colours: dict[str, Any]) -> None:
    places = range(len(rows))
    left = [0.0] * len(rows)
    for part, colour in zip(PARTS, _colours_of_parts(colours), strict=True):
        widths = [_bytes_of(row, part) / 1e9 for row in rows]
        axes.barh(places, widths, left=left, height=0.72, color=colour, edgecolor=colours["paper"], linewidth=0.4)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for place, end, row in zip(places, left, rows, strict=True):
        axes.annotate(
            _value(row), (end, place), xytext=(GAP, 0), textcoords="offset points", va="center", fontsize=VALUE_POINTS,
            color=colours["ink"] if row.fits is not False else colours["palette"][1],
            bbox={"facecolor": colours["paper"], "edgecolor": "none", "pad": 0.5},  # read also on the device's line
        )  # fmt: skip


def _draw_device(axes: Any, plan: Plan, limit: float, colours: dict[str, Any]) -> bool:
    """Draws the end of the device where it is on the axis; returns whether it is."""
    device = (plan.request.device_memory or 0) / 1e9
    if not 0 < device <= limit:
        return False
    axes.axvline(device, color=colours["ink"], linewidth=1.2, linestyle=(0, (5, 2)))
    return True


def _dress(axes: Any, names: Sequence[str], limit: float, colours: dict[str, Any]) -> None:
    plain_axes(axes, colours)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color=colours["grid"], linewidth=0.8)
    axes.tick_params(labelsize=NAME_POINTS)
    axes.spines["bottom"].set_visible(False)
    axes.spines["left"].set_visible(True)
    axes.set_yticks(range(len(names)), names)
    for text in axes.get_yticklabels():
        text.set_parse_math(False)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0, limit)
    number_axis(axes.xaxis)


def _title(plan: Plan, ranks: int, rows: Sequence[PlanRow]) -> str:
    sizes = ", ".join(str(size) for size in sorted({row.micro_batch_size for row in rows}))
    model = f"{plan.request.model} ({number(num_parameters(plan.shape))})"
    return f"{model} on {ranks} rank{'s' * (ranks != 1)}, micro-batch {sizes}"


def _note(plan: Plan, is_drawn: bool) -> str:
    device = plan.request.device_memory
    said = "" if device is None else f"dashed: {gigabytes(device)} of a device"
    if device is not None and not is_drawn:
        said = f"a device has {gigabytes(device)}, beyond this axis"
    return "; ".join(filter(None, ["GB a rank needs at the peak of a step", said]))


def _legend(
    figure: Any, grid: Sequence[Any], panels: Sequence[tuple[int, list[PlanRow]]], limit: float, colours: dict[str, Any]
) -> None:
    """The parts that are seen somewhere, with the bars of the first panel for their colours."""
    rows = [row for _, rows in panels for row in rows]
    seen = [max((_bytes_of(row, part) for row in rows), default=0) / 1e9 > SEEN * limit for part in PARTS]
    handles = [container for container, is_seen in zip(grid[0].containers, seen, strict=False) if is_seen]
    labels = [part for part, is_seen in zip(PARTS, seen, strict=True) if is_seen]
    add_legend(figure, (handles, labels), colours, most_columns=4)
