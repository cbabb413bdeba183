"""What options that take numbers mean by their text: types for ``argparse`` that say in a sentence what they take."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable


def whole_number(text: str) -> int:
    """The whole number that a text means, ``1e5`` too; ValueError or OverflowError if it means none."""
    if text.lstrip("+-").isdigit():
        return int(text)
    number = float(text)
    if not number.is_integer():
        raise ValueError(text)
    return int(number)


def whole(minimum: int | None = None, maximum: int | None = None) -> Callable[[str], int]:
    """A whole number, of at least ``minimum`` and at most ``maximum`` where there are any."""
    least = "" if minimum is None else f" of at least {minimum}"
    most = "" if maximum is None else f" and at most {maximum}"

    def parse(text: str) -> int:
        try:
            number = whole_number(text)
        except (ValueError, OverflowError):
            number = None
        if number is None or (minimum is not None and number < minimum) or (maximum is not None and number > maximum):
            raise argparse.ArgumentTypeError(f"must be a whole number{least}{most}, not {text!r}")
        return number

    return parse


def real(
    *, minimum: float | None = None, above: float | None = None, maximum: float | None = None, unit: str = ""
) -> Callable[[str], float]:
    """A finite number within limits.

    Args:
        minimum: the least that it may be.
        above: what it must be more than.
        maximum: the most that it may be.
        unit: what it counts, for the message.
    """
    limits = [
        f"{words} {limit:g}"
        for words, limit in (("of at least", minimum), ("above", above), ("at most", maximum))
        if limit is not None
    ]
    taken = " ".join(filter(None, ["a number", unit and f"of {unit}", " and ".join(limits)]))

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if (
            not math.isfinite(value)
            or (minimum is not None and value < minimum)
            or (above is not None and value <= above)
            or (maximum is not None and value > maximum)
        ):
            raise argparse.ArgumentTypeError(f"must be {taken}, not {text!r}")
        return value

    return parse


count = whole(1)
index = whole(0)
port = whole(1, 65_535)


def counts(text: str) -> tuple[int, ...]:
    """Counts with commas between them, in order and once each."""
    parts = [part for part in text.split(",") if part.strip()]
    if not parts:
        raise argparse.ArgumentTypeError(f"must be whole numbers of at least 1, such as 1,2,4, not {text!r}")
    return tuple(sorted({count(part.strip()) for part in parts}))


def batches(text: str) -> int:
    """A count, or -1 for all."""
    return -1 if text == "-1" else _count_or_all(text)


def _count_or_all(text: str) -> int:
    try:
        return count(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"must be -1 (all) or at least 1, not {text}") from None
