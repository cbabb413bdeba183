"""Trying again where a place on the network does not answer: for how long, and after which pauses. No torch here."""

from __future__ import annotations

import contextlib
import email.utils
import random
import re
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

from codeparrot_ds.errors import UserError

FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 300.0

Answer = TypeVar("Answer")


class UnavailableError(UserError):
    """The place does not answer, or asks for another attempt; nothing is known to be wrong with what was asked.

    ``retry_after`` is what the place asked to wait, in seconds; ``request`` names what it did not answer, so that
    two failures of one request can be told from an outage's end.
    """

    def __init__(self, message: str, retry_after: float | None = None, request: str = ""):
        super().__init__(message)
        self.retry_after, self.request = retry_after, request


class Pauses:
    """The pauses between attempts: twice as long with each failure of the same request, and random to a half.

    A failure of another request than before shows that the place is up: the pauses begin small again. Randomness keeps
    many runs from retrying in step.

    Args:
        patience_seconds: from now, or from the last `reset`, until the attempts end.
        to_the_end: make the last attempt when patience ends, even if the place asked for a longer wait; otherwise give
            up as soon as the next pause would be longer than what is left.
    """

    def __init__(
        self,
        patience_seconds: float,
        *,
        first_seconds: float = FIRST_PAUSE_SECONDS,
        longest_seconds: float = LONGEST_PAUSE_SECONDS,
        to_the_end: bool = False,
    ):
        self.patience_seconds, self._first, self._longest = patience_seconds, first_seconds, longest_seconds
        self._to_the_end = to_the_end
        self.reset()

    def reset(self) -> None:
        """Begins anew after a success."""
        self._next, self._request, self._end = self._first, "", time.monotonic() + self.patience_seconds

    def next(self, error: UnavailableError) -> float | None:
        """Returns the seconds to wait, not less than what the place asked for; None when patience is at its end."""
        if error.request != self._request:
            self._next, self._request = self._first, error.request
        # The system's random numbers: the run's own must not move, and forked workers would share a generator's state.
        pause = max(self._next * random.SystemRandom().uniform(0.5, 1.0), error.retry_after or 0.0)
        self._next = min(2 * self._next, self._longest)
        left = self._end - time.monotonic()
        if pause <= left:
            return pause
        return left if self._to_the_end and left > 0 else None

    def patiently(self, ask: Callable[[], Answer], failed: Callable[[UnavailableError, float | None], None]) -> Answer:
        """Calls ``ask`` until there is an answer, with pauses; raises the last failure when patience is at its end.

        ``failed`` gets each failure and the seconds until the next attempt, None without one.
        """
        while True:
            try:
                return ask()
            except UnavailableError as error:
                pause = self.next(error)
                failed(error, pause)
                if pause is None:
                    raise
                time.sleep(pause)


def say_retry(error: UnavailableError, pause: float | None, say: Callable[[str], None]) -> None:
    """Says what failed and when it is tried again; nothing for the last failure, which is raised."""
    if pause is not None:
        say(f"{error}; trying again in {pause:.1f} s")


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that an answer asks to wait: its ``Retry-After``, a number or a date (RFC 9110), or its ``RateLimit``."""
    value = headers.get("Retry-After", "").strip()
    if value.isdecimal():  # not isdigit, which is true of ² too
        return float(value)
    if value:
        with contextlib.suppress(ValueError):
            return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    window = re.search(r"\br\s*=\s*0\s*;\s*t\s*=\s*(\d+)", headers.get("RateLimit", ""))
    return float(window[1]) if window else None
