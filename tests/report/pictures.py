"""What holds of every picture, looked up in matplotlib's own figure after it was drawn."""

from __future__ import annotations

import contextlib
import itertools

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.text import Text

PIXEL = 1.0
APART = 20.0
"""Between two colours in CIE Lab; some 2 are just seen side by side, and the two blues of old were 9 apart."""
# What a colour-blind eye makes of linear RGB: Machado, Oliveira and Fernandes (2009), severity 1.
EYES = {
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
}


@contextlib.contextmanager
def drawn():
    """The figures that are drawn meanwhile, laid out."""
    figures, draw = [], FigureCanvasAgg.draw

    def draw_and_keep(self):
        draw(self)
        figures.append(self.figure)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FigureCanvasAgg, "draw", draw_and_keep)
        yield figures


def linear(colour):
    """A colour's linear RGB."""
    value = np.array(to_rgb(colour))
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def distance(one, other, eye=None):
    """How far two colours are apart in CIE Lab (D65), as a colour-blind eye sees them where one is given."""
    lab = []
    for colour in (one, other):
        rgb = linear(colour) if eye is None else np.clip(np.array(EYES[eye]) @ linear(colour), 0, 1)
        matrix = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
        xyz = matrix @ rgb / (0.9505, 1.0, 1.089)
        x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
        lab.append(np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)]))
    return float(np.linalg.norm(lab[0] - lab[1]))


def contrast(one, other):
    """Of two colours, as WCAG has it."""
    light, dark = sorted((float(linear(each) @ (0.2126, 0.7152, 0.0722)) for each in (one, other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def texts_of(figure):
    """Every text that is drawn, with its box in pixels; of ticks those within their axis."""
    renderer = figure.canvas.get_renderer()
    ticks, shown = set(), set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            room = 1e-9 * (high - low)
            for minor in (False, True):
                labels = axis.get_ticklabels(minor=minor)
                ticks.update(map(id, labels))
                locations = axis.get_ticklocs(minor=minor)
                shown |= {id(t) for at, t in zip(locations, labels, strict=False) if low - room <= at <= high + room}
            ticks.update(
                id(label) for tick in axis.majorTicks + axis.minorTicks for label in (tick.label1, tick.label2)
            )
    found = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    found = [text for text in found if id(text) in shown or id(text) not in ticks]
    return [(text.get_text(), text.get_window_extent(renderer)) for text in found]


def sticks_out(box, frame):
    """Whether a box leaves another by more than a pixel."""
    return (
        box.x0 < frame.x0 - PIXEL or box.y0 < frame.y0 - PIXEL or box.x1 > frame.x1 + PIXEL or box.y1 > frame.y1 + PIXEL
    )


def problems(figure):
    """What is wrong with a picture, in words; empty where nothing is."""
    return [*_of_texts(figure), *_of_marks(figure), *_of_legend(figure), *_of_words(figure), *_of_colours(figure)]


def _of_texts(figure):
    texts = texts_of(figure)
    found = [f"{text!r} leaves the picture" for text, box in texts if sticks_out(box, figure.bbox)]
    for (one, a), (other, b) in itertools.combinations(texts, 2):
        width, height = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        if width > PIXEL and height > PIXEL:
            found.append(f"{one!r} lies on {other!r}")
    return found


def _of_marks(figure):
    renderer, found = figure.canvas.get_renderer(), []
    for axes in figure.axes:
        if axes.bbox.width < 0.3 * figure.bbox.width or axes.bbox.height < 20:
            found.append(f"nothing is left of the axes: {axes.bbox}")
        bars = [patch.get_window_extent(renderer) for patch in axes.patches]
        spread = [each.get_window_extent(renderer) for each in axes.collections if each.get_paths()]
        found += [f"{box} leaves its axes" for box in (*bars, *spread) if sticks_out(box, axes.bbox)]
        for line in axes.lines:
            points = line.get_transform().transform(line.get_xydata())
            for x, y in points[np.isfinite(points).all(axis=1)]:
                if not (axes.bbox.x0 - PIXEL <= x <= axes.bbox.x1 + PIXEL) or not (
                    axes.bbox.y0 - PIXEL <= y <= axes.bbox.y1 + PIXEL
                ):
                    found.append(f"a point of {line.get_label()!r} leaves its axes")
    return found


def plain(text):
    """A text without what breaking it into lines changes."""
    return "".join(text.split())


def bar_colours(figure, pixels):
    """Colours of the bars of which one is at least so many pixels wide."""
    renderer = figure.canvas.get_renderer()
    patches = [patch for axes in figure.axes for patch in axes.patches]
    return {to_hex(patch.get_facecolor()) for patch in patches if patch.get_window_extent(renderer).width >= pixels}


def labelled(figure):
    """Label → whether something of it is drawn, of lines and points."""
    found = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            lines = [part for part in getattr(handle, "lines", [handle])[:1] if hasattr(part, "get_xydata")]
            if lines:
                found[plain(label)] = bool(np.isfinite(lines[0].get_xydata()).all(axis=1).any())
    return found


def _of_legend(figure):
    lines = labelled(figure)
    named = {plain(text.get_text()) for legend in figure.legends for text in legend.get_texts()}
    bars = {to_hex(patch.get_facecolor()) for legend in figure.legends for patch in legend.get_patches()}
    found = [f"{label} is in the legend and not drawn" for label, is_drawn in lines.items() if not is_drawn]
    if len(lines) > 1 and not set(lines) <= named:
        found.append(f"not in the legend: {set(lines) - named}")
    # A bar of a pixel or two may be named or not.
    if not bar_colours(figure, 2.5) <= bars <= bar_colours(figure, PIXEL):
        found.append(f"bars of {bar_colours(figure, PIXEL)}, and a legend of {bars}")
    if named and len(named) != len(lines) + len(bars):
        found.append(f"the legend names {named}, and {len(lines)} lines and {len(bars)} kinds of bars are drawn")
    return found


def _of_words(figure):
    """What the words announce is drawn, and what needs words has them."""
    words = " ".join(text for text, _ in texts_of(figure))
    lines = [line for axes in figure.axes for line in axes.lines]
    bare = [line for line in lines if line.get_label().startswith("_") and len(line.get_xdata()) > 1]
    drawn = {
        "dashed": any(line.get_linestyle() not in ("-", "None") for line in bare),
        "faint": any((line.get_alpha() or 1) < 1 for line in bare),
        "joined": any(line.get_linestyle() == "-" and line.get_alpha() is None for line in bare),
        "gaps": any(not np.isfinite(np.asarray(line.get_ydata(), dtype=float)).all() for line in lines),
    }
    return [f"{word!r}: said {word in words}, drawn {seen}" for word, seen in drawn.items() if (word in words) != seen]


def _of_colours(figure):
    used = bar_colours(figure, PIXEL)
    for axes in figure.axes:
        for handle in axes.get_legend_handles_labels()[0]:
            line = getattr(handle, "lines", [handle])[0]
            if hasattr(line, "get_color"):
                used.add(to_hex(line.get_color()))
    used.add(to_hex(figure.get_facecolor()))
    return [
        f"{one} and {other} are hardly told apart ({distance(one, other):.0f})"
        for one, other in itertools.combinations(sorted(used), 2)
        if distance(one, other) < APART
    ]
