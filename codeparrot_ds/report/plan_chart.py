"""A memory plan as a picture: one stacked bar a config, and a line where the device ends."""

from __future__ import annotations

from collections.abc import Sequence

from codeparrot_ds.memory.plan import Plan, PlanRow, in_gigabytes
from codeparrot_ds.memory.workload import CATEGORIES
from codeparrot_ds.model.shapes import num_parameters
from codeparrot_ds.report import plots
from codeparrot_ds.report.units import number
from codeparrot_ds.terminal import gigabytes

BESIDE = "beside tensors"
PARTS = (*CATEGORIES, BESIDE)
NAME_POINTS, VALUE_POINTS = 8, 7
MOST_NAME = 200
"""Points that names take beside the bars; longer ones have several lines."""
GAP = 4
"""Points between a bar and its value."""
FAR = 3
"""A device with so many times what the longest bar needs is said and not drawn: the bars would be slivers."""


def draw_plan(plan: Plan, theme: str = "light") -> bytes:
    """The rows of a plan's tables as PNG, one panel a number of ranks on one scale; 1120 pixels wide."""
    colours = plots.THEMES[theme]
    panels = [(ranks, plan.shown(ranks)) for ranks in plan.request.world_sizes if plan.shown(ranks)]
    all_rows = [row for _, rows in panels for row in rows]
    names = {ranks: _names(rows) for ranks, rows in panels}
    row_inches = 0.1 + 0.14 * max((1 + name.count("\n") for each in names.values() for name in each), default=1)
    heights = [len(rows) * row_inches + 1.3 for _, rows in panels] or [1.3]
    figure = plots.new_figure(theme, sum(heights) + 0.1 + plots.legend_layout(PARTS, most_columns=4).inches)
    grid = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    left = max((plots.text_width(name, NAME_POINTS) for each in names.values() for name in each), default=0.0)
    limit = _axis_end(plan, all_rows, plots.WIDTH_POINTS - left - 24)
    seen = [part if any(_gigabytes_of(row, part) > plots.SEEN * limit for row in all_rows) else "" for part in PARTS]
    shades = [*colours["palette"][: len(CATEGORIES)], colours["rest"]]
    for axes, (ranks, rows) in zip(grid, panels, strict=False):
        parts = [
            (label, shade, "", [_gigabytes_of(row, part) for row in rows])
            for part, label, shade in zip(PARTS, seen, shades, strict=True)
        ]
        ends = plots.draw_bars(axes, names[ranks], parts, limit, colours, NAME_POINTS)
        for place, (end, row) in enumerate(zip(ends, rows, strict=True)):
            axes.annotate(
                _value(row), (end, place), xytext=(GAP, 0), textcoords="offset points", va="center",
                fontsize=VALUE_POINTS, color=colours["ink"] if row.fits is not False else colours["palette"][1],
                bbox={"facecolor": colours["paper"], "edgecolor": "none", "pad": 0.5},  # read also on the device's line
            )  # fmt: skip
        device = (plan.request.device_memory or 0) / 1e9
        is_drawn = 0 < device <= limit
        if is_drawn:
            axes.axvline(device, color=colours["ink"], linewidth=1.2, linestyle=(0, (5, 2)))
        plots.write_title(axes, _title(plan, ranks, rows), _note(plan, is_drawn), colours, left=left, size=11)
    plots.add_legend(figure, grid[0].get_legend_handles_labels(), colours, most_columns=4)
    return plots.png_of(figure)


def _names(rows: Sequence[PlanRow]) -> list[str]:
    """Of the bars: the configs, and their micro-batches where there are several."""
    several = len({row.micro_batch_size for row in rows}) > 1
    texts = [f"{row.config}, micro-batch {row.micro_batch_size}" if several else row.config for row in rows]
    return [plots.wrapped(text, NAME_POINTS, MOST_NAME) for text in texts]


def _value(row: PlanRow) -> str:
    return in_gigabytes(row.needed_bytes) + ("" if row.fits is not False else "  does not fit")


def _axis_end(plan: Plan, rows: Sequence[PlanRow], points: float) -> float:
    """GB at the right end of axes so many points wide: every bar with its value, and the device unless far away."""
    longest = max((row.needed_bytes for row in rows), default=0) / 1e9
    ends = [row.needed_bytes / 1e9 / (1 - (GAP + plots.text_width(_value(row), VALUE_POINTS)) / points) for row in rows]
    device = (plan.request.device_memory or 0) / 1e9
    if device <= FAR * longest:
        ends.append(1.03 * device)
    return max(ends, default=0) or 1.0


def _gigabytes_of(row: PlanRow, part: str) -> float:
    size = row.needed_bytes - row.memory.peak_bytes if part == BESIDE else row.memory.device.get(part, 0)
    return size / 1e9


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
