"""What a test needs of a fixture that many share, so that one test alone does not wait for what the others need.

A fixture that trains for many tests at once asks ``needed(request, name)`` for what the chosen tests need of it; each
of these says so with ``@needs(name=…)``.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any, TypeVar

import pytest

Test = TypeVar("Test", bound=Callable[..., Any])


def needs(**wanted: Iterable[Hashable] | Callable[..., Iterable[Hashable]]) -> Callable[[Test], Test]:
    """By the fixture's name: what the test needs, or a function that finds it from the case's parameters."""

    def mark(test: Test) -> Test:
        test.needs = wanted
        return test

    return mark


def needed(request: pytest.FixtureRequest, fixture: str) -> list[Any]:
    """What the tests of this session that were chosen need of a fixture, each once, in the tests' order."""
    found: dict[Any, None] = {}
    for item in request.session.items:
        wanted = getattr(item.function, "needs", {}).get(fixture, ())
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        found |= dict.fromkeys(wanted(**parameters) if callable(wanted) else wanted)
    return list(found)
