"""pass@k: the unbiased estimator of Chen et al. 2021 (arXiv:2107.03374, equation 1), and how sure it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_Z95 = 1.959963984540054  # a normal variable is within so many standard deviations with probability 0.95


@dataclass(frozen=True, kw_only=True)
class PassAtK:
    """pass@k over the problems of a file; shares, from 0 to 1."""

    k: int
    value: float
    low: float
    high: float
    """Of Wilson's 95% interval for a mean over the problems, taken as a sample of the problems there could be."""
    stderr: float
    """Of that mean: the deviation over the problems by the root of their number; NaN for a single problem."""


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Returns the chance that at least one of ``k`` samples passes, where ``num_right`` of ``num_samples`` did.

    ``1 - C(n - c, k) / C(n, k)``: the share of all choices of ``k`` of the samples that hold a right one. Without bias,
    which ``1 - (1 - c/n)^k`` is not. Raises ``ValueError`` where there are not so many samples.
    """
    if not 1 <= k <= num_samples or not 0 <= num_right <= num_samples:
        raise ValueError(f"pass@{k} of {num_right} right ones among {num_samples} samples")
    return 1.0 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)


def estimate(counts: Sequence[tuple[int, int]], k: int) -> PassAtK:
    """Returns pass@k over problems.

    Args:
        counts: of each problem, at least one: the samples and how many of them passed.
        k: at most the fewest samples of a problem.

    Wilson's interval is that of shares that are 0 or 1. Shares between vary less, so it is too wide for them, never too
    narrow, and it stays honest where no problem was solved or all were.
    """
    values = [pass_at_k(samples, right, k) for samples, right in counts]
    number, mean = len(values), math.fsum(values) / len(values)
    low, high = wilson_interval(mean, number)
    variance = math.fsum((value - mean) ** 2 for value in values) / (number - 1) if number > 1 else math.nan
    return PassAtK(k=k, value=mean, low=low, high=high, stderr=math.sqrt(variance / number))


def wilson_interval(share: float, number: int) -> tuple[float, float]:
    """Returns the 95% interval of a share of ``number`` trials (Wilson 1927)."""
    spread = _Z95**2 / number
    centre = (share + spread / 2) / (1 + spread)
    half = _Z95 / (1 + spread) * math.sqrt(share * (1 - share) / number + spread / (4 * number))
    return max(0.0, centre - half), min(1.0, centre + half)
