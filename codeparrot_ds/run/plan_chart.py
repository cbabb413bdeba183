"""A memory plan as a picture: one stacked bar a config, and a line where the device ends."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from codeparrot_ds.model.shapes import num_parameters
from codeparrot_ds.run.plan import Plan, PlanRow
from codeparrot_ds.run.plots import THEMES
from codeparrot_ds.zero.memory import CATEGORIES

BESIDE = "beside tensors"
ROW_INCHES = 0.24


def draw_plan(plan: Plan, theme: str = "light") -> bytes:
    """The rows of a plan's tables as PNG, one panel a number of ranks; 1120 pixels wide."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    colours = THEMES[theme]
    panels = [(ranks, plan.shown(ranks)) for ranks in plan.request.world_sizes if plan.shown(ranks)]
    heights = [len(rows) * ROW_INCHES + 1.1 for _, rows in panels] or [1.1]
    figure = Figure(figsize=(7, sum(heights) + 0.6), dpi=160, layout="constrained", facecolor=colours["paper"])
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(heights), 1, squeeze=False, sharex=True, height_ratios=heights)
    for index, (ranks, rows) in enumerate(panels):
        axes = grid[index][0]
        _draw_bars(axes, plan, rows, colours)
        _dress(axes, plan, ranks, rows, colours)
    _legend(figure, grid, colours)
    file = io.BytesIO()
    figure.savefig(file, format="png", facecolor=colours["paper"], metadata={"Software": None})
    return file.getvalue()


def _draw_bars(axes: Any, plan: Plan, rows: Sequence[PlanRow], colours: dict[str, Any]) -> None:
    places = range(len(rows))
    left = [0.0] * len(rows)
    parts = [*CATEGORIES, BESIDE]
    for part, colour in zip(parts, [*colours["palette"][: len(CATEGORIES)], colours["grid"]], strict=True):
        widths = [_bytes_of(row, part) / 1e9 for row in rows]
        axes.barh(
            places, widths, left=left, height=0.72, color=colour, label=part,
            edgecolor=colours["paper"], linewidth=0.4,
        )  # fmt: skip
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for place, end, row in zip(places, left, rows, strict=True):
        text = f"{end:,.1f}" + ("" if row.fits is not False else "  does not fit")
        axes.annotate(
            text, (end, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=7,
            color=colours["ink"] if row.fits is not False else colours["palette"][1],
        )  # fmt: skip
    if plan.request.device_memory is not None:
        axes.axvline(plan.request.device_memory / 1e9, color=colours["ink"], linewidth=1.2, linestyle=(0, (5, 2)))


def _bytes_of(row: PlanRow, part: str) -> int:
    return row.needed_bytes - row.memory.peak_bytes if part == BESIDE else row.memory.device.get(part, 0)


def _dress(axes: Any, plan: Plan, ranks: int, rows: Sequence[PlanRow], colours: dict[str, Any]) -> None:
    sizes = sorted({row.micro_batch_size for row in rows})
    names = [row.config if len(sizes) == 1 else f"{row.config}, {row.micro_batch_size}" for row in rows]
    axes.set_yticks(range(len(rows)), names)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_facecolor(colours["paper"])
    axes.grid(axis="x", color=colours["grid"], linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "left")
        spine.set_color(colours["faint"])
    axes.tick_params(colors=colours["faint"], labelsize=8, length=0)
    ends = [row.needed_bytes / 1e9 for row in rows]
    device = plan.request.device_memory
    axes.set_xlim(0, 1.2 * max([*ends, 0 if device is None or device / 1e9 > 3 * max(ends) else device / 1e9]))
    rows_text = ", ".join(map(str, sizes))
    end = "" if device is None else f", dashed: {device / 1e9:,.0f} GB"
    title = (
        f"{plan.request.model} ({num_parameters(plan.shape) / 1e6:,.0f}M) on {ranks} rank(s), micro-batch {rows_text}"
    )
    text = axes.set_title(title, loc="left", color=colours["ink"], fontsize=11, fontweight="bold", pad=18)
    note = axes.annotate(
        f"GB a rank at the peak of a step{end}", (0, 1), xytext=(0, 5), xycoords="axes fraction",
        textcoords="offset points", fontsize=8, color=colours["faint"],
    )  # fmt: skip
    for label in (text, note):
        label.set_parse_math(False)


def _legend(figure: Any, grid: Any, colours: dict[str, Any]) -> None:
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower left", ncols=4, frameon=False, fontsize=8, labelcolor=colours["ink"]
    )
