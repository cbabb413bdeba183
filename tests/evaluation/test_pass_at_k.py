"""pass@k against numbers computed by hand, and against the published formula."""

import math

import numpy as np
import pytest

from codeparrot_ds.evaluation.pass_at_k import estimate, pass_at_k, wilson_interval

# Samples, right ones, k, and 1 - C(n-c, k) / C(n, k) worked out on paper.
BY_HAND = [
    (1, 0, 1, 0.0),
    (1, 1, 1, 1.0),
    (5, 2, 1, 2 / 5),
    (5, 2, 2, 1 - 3 / 10),
    (5, 2, 3, 1 - 1 / 10),
    (5, 2, 4, 1.0),
    (4, 1, 2, 1 - 3 / 6),
    (10, 3, 5, 1 - 21 / 252),
    (10, 1, 10, 1.0),
    (10, 0, 10, 0.0),
    (6, 3, 3, 1 - 1 / 20),
    (200, 1, 100, 0.5),
    (200, 199, 1, 199 / 200),
    (200, 2, 100, 1 - (100 * 99) / (200 * 199)),
]


def published(n, c, k):
    """Chen et al. 2021, figure 3."""
    return 1.0 if n - c < k else 1.0 - np.prod(1.0 - k / np.arange(n - c + 1, n + 1))


@pytest.mark.parametrize(("n", "c", "k", "expected"), BY_HAND)
def test_the_estimator_gives_what_paper_gives(n, c, k, expected):
    assert pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-12)


def test_the_estimator_is_the_published_formula():
    for n in (1, 7, 50, 200):
        for c in {0, 1, n // 2, n}:
            for k in {1, (n + 1) // 2, n}:
                assert pass_at_k(n, c, k) == pytest.approx(published(n, c, k), abs=1e-12)


@pytest.mark.parametrize(("n", "c", "k"), [(5, 2, 6), (5, 6, 1), (5, -1, 1), (5, 1, 0)])
def test_what_cannot_be_estimated_is_refused(n, c, k):
    with pytest.raises(ValueError, match=f"pass@{k}"):
        pass_at_k(n, c, k)


@pytest.mark.parametrize(
    ("right", "of", "low", "high"),
    [(0, 10, 0.0, 0.2775), (1, 10, 0.0179, 0.4042), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0)],
)
def test_wilsons_interval_is_the_tables(right, of, low, high):
    assert wilson_interval(right / of, of) == pytest.approx((low, high), abs=5e-5)


def test_problems_are_averaged_with_their_spread():
    result = estimate([(5, 2), (5, 0), (5, 5), (4, 1)], 2)
    values = [0.7, 0.0, 1.0, 0.5]
    assert result.value == pytest.approx(0.55)
    assert result.stderr == pytest.approx(np.std(values, ddof=1) / 2)
    assert (result.low, result.high) == wilson_interval(result.value, 4) and result.low < 0.55 < result.high
    assert estimate([(1, 0)] * 10, 1).high > 0.2  # nothing solved does not mean that nothing could be
    assert math.isnan(estimate([(1, 1)], 1).stderr)


def test_intervals_hold_the_truth_as_often_as_they_say():
    """A thousand files of 40 problems, whose chances are drawn: the interval misses the mean chance in 5% at most."""
    random = np.random.default_rng(0)
    missed = 0
    for _ in range(1000):
        right = random.binomial(10, random.beta(1, 3, size=40))
        result = estimate([(10, int(c)) for c in right], 1)
        missed += not result.low <= 0.25 <= result.high
    assert missed <= 50
