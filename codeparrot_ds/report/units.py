"""Values as a person reads them, the same in every table and picture. Sizes are in GB or MB: 10^9 and 10^6 bytes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

NOTHING = "–"


def number(value: float) -> str:
    """A number as a person reads it: ``1,234``, ``0.0005``, ``2e-06``, ``12.3M``."""
    size = abs(value)
    if not math.isfinite(value):
        return str(value)
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if limit <= size < 1e15:
            return f"{value / limit:.4g}{unit}"
    if size >= 1e15:
        return f"{value:.3g}".replace("e+", "e")
    if size >= 1000:
        return f"{value:,.0f}"
    if value and size < 1e-4:
        return f"{value:.3g}".replace("e-0", "e-")
    return f"{value:.4g}"


def shown(value: Any, form: str, scale: float = 1) -> str:
    """A measured value by a format such as ``{:.4f}``; a dash where there is none."""
    return form.format(value * scale) if isinstance(value, (int, float)) else NOTHING


def whole(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else NOTHING


def short(value: Any) -> str:
    """`number`, or a dash."""
    return number(value) if isinstance(value, (int, float)) else NOTHING


def percent(fraction: Any) -> str:
    return shown(fraction, "{:.3g}%", 100)


def gigabytes(size: Any) -> str:
    """For a size that stands alone; `megabytes` is for those of a column."""
    return shown(size, "{:,.2f} GB", 1e-9)


def megabytes(size: Any) -> str:
    """For sizes of a column: MB, or GB from 10 GB on."""
    if not size:
        return NOTHING if size is None else "0"
    return f"{size / 1e9:,.1f} GB" if size >= 1e10 else f"{size / 1e6:,.0f} MB"


def listed(texts: Iterable[str]) -> str:
    """``a``, ``a and b``, or ``a, b and c``."""
    *first, last = texts
    return f"{', '.join(first)} and {last}" if first else last
