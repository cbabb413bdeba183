"""Comparisons are drawn by the same kit as runs and plans."""

from tests.compare.conftest import compared  # noqa: F401
