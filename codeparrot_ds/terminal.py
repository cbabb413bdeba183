"""What a terminal shows: progress, sizes, durations, colour."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any


@contextmanager
def progress_line(unit: str = "documents") -> Iterator[Callable[[str, int, int | None], None]]:
    """A callback ``(phase, done, total)``: a bar on a terminal, a line every ten seconds elsewhere."""
    bar: Any = None
    last = time.monotonic()

    def report(phase: str, done: int, total: int | None) -> None:
        nonlocal bar, last
        if sys.stderr.isatty():
            if bar is None or bar.desc != f"{phase}: ":
                from tqdm import tqdm

                if bar is not None:
                    bar.close()
                bar = tqdm(desc=phase, total=total, unit=f" {unit}", unit_scale=True)
            bar.update(done - bar.n)
        elif time.monotonic() - last > 10:
            last = time.monotonic()
            print(f"{phase}: {done:,}" + (f" of {total:,}" if total else "") + f" {unit}", file=sys.stderr)

    try:
        yield report
    finally:
        if bar is not None:
            bar.close()


# A corpus may hold what a terminal obeys. Shown by Unicode's pictures of control characters, but for tab and newline.
VISIBLE = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\t\n"}


def visible(text: str) -> str:
    """Text in which what a terminal would obey is shown instead."""
    return text.translate(VISIBLE)


def uses_colour(is_terminal: bool, environment: Mapping[str, str]) -> bool:
    """Whether to write colours: on a terminal that has them, unless NO_COLOR (no-color.org) is set."""
    return is_terminal and not environment.get("NO_COLOR") and environment.get("TERM") != "dumb"


Progress = Callable[[str, int, "int | None"], None]
"""Called as ``progress(phase, documents done, documents in all or None)``, now and then: the caller thins it out."""


def gigabytes(size: float) -> str:
    """A size as a person reads it, in GB of 10^9 bytes, or MB where it is smaller."""
    return f"{size / 1e9:,.1f} GB" if abs(size) >= 1e8 or size == 0 else f"{size / 1e6:,.1f} MB"


def duration(seconds: float) -> str:
    """Seconds as a person reads them: ``42 s``, ``3 min 5 s``, ``2 h 4 min``, ``7 d 3 h``."""
    if not math.isfinite(seconds):
        return "unknown time"
    whole = max(0, round(seconds))
    for size, unit, smaller, name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // smaller} {name}"
    return f"{whole} s"


def size_text(size: float) -> str:
    """Bytes in the unit that leaves digits to read: ``310 bytes``, ``28.4 kB``, ``8.1 MB``, ``12,345.0 MB``."""
    if size < 1000:
        return f"{size:,.0f} bytes"
    return f"{size / 1e3:,.1f} kB" if size < 1e6 else f"{size / 1e6:,.1f} MB"
