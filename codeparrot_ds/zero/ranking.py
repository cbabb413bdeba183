"""Which config is faster, and which are not to be told apart: medians, their spread, ties and the Pareto front.

Pure. The spread of a config is the range from the lowest first to the highest third quartile that any of its trials
saw: it holds what differs between steps of one process, and between processes. One trial shows nothing of the latter,
so its spread is taken to be `PROCESS_SPREAD` at least. Two configs are told apart where their spreads do not overlap.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# Of the median, to either side. Of 16 configs that were compared twice with one trial each, 13 differed by less
# (records/2026-11-28-comparison-2-cores).
PROCESS_SPREAD = 0.05


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Tokens/s of one config: the median over all scored steps of its trials, and the spread around it."""

    median: float
    low: float
    high: float
    steps: int
    trials: int

    def tied(self, other: Speed) -> bool:
        """Whether the spreads overlap: then another comparison may rank the two otherwise."""
        return self.low <= other.high and other.low <= self.high

    def passes(self, other: Speed) -> bool:
        """Whether its median is above the other's spread, and the other's below its own.

        Enough for a search to go on from it, which costs little where it was wrong; not enough to be told apart.
        """
        return self.median > other.high and other.median < self.low


def speed_of(trials: Sequence[Sequence[float]]) -> Speed | None:
    """The speed from the tokens/s of each scored step of each trial; None where there is none."""
    kept = [list(steps) for steps in trials if steps]
    if not kept:
        return None
    everything = [value for steps in kept for value in steps]
    median, unseen = statistics.median(everything), PROCESS_SPREAD if len(kept) == 1 else 0.0
    return Speed(
        median=median,
        low=min(median * (1 - unseen), *(_quartile(steps, 1) for steps in kept)),
        high=max(median * (1 + unseen), *(_quartile(steps, 3) for steps in kept)),
        steps=len(everything),
        trials=len(kept),
    )


def _quartile(values: Sequence[float], number: int) -> float:
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=4, method="inclusive")[number - 1]


def ranked(speeds: Mapping[str, Speed]) -> list[tuple[str, list[str]]]:
    """Names by falling median, each with those that it is not told apart from."""
    order = sorted(speeds, key=lambda name: -speeds[name].median)
    return [(name, [other for other in order if other != name and speeds[name].tied(speeds[other])]) for name in order]


def pareto(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Names of which no other takes as little memory and is as fast: (memory, tokens/s), by rising memory."""
    front = []
    for name, (memory, speed) in points.items():
        others = (point for other, point in points.items() if other != name)
        if not any(m <= memory and s >= speed and (m, s) != (memory, speed) for m, s in others):
            front.append(name)
    return sorted(front, key=lambda name: points[name])
