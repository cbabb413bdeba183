"""Where the seconds go between the command and the first training step."""

from __future__ import annotations

import os
import time

LAUNCHED_AT = "CODEPARROT_DS_LAUNCHED_AT"
"""Environment variable: when the command began, seconds since the epoch."""


class Startup:
    """A stopwatch with named laps, from the moment that the command was typed (or this process began)."""

    def __init__(self) -> None:
        import psutil

        process_began = psutil.Process().create_time()
        self.laps: dict[str, float] = {}
        self._last = process_began
        if LAUNCHED_AT in os.environ:
            # The name is in the run.json of older runs, too: it stays.
            self.laps["front door and launcher"] = round(process_began - float(os.environ[LAUNCHED_AT]), 3)

    def lap(self, name: str) -> None:
        """Ends a lap: the seconds since the last one belong to ``name``."""
        now = time.time()
        self.laps[name] = round(now - self._last, 3)
        self._last = now

    @property
    def total_seconds(self) -> float:
        """All laps together."""
        return sum(self.laps.values())
