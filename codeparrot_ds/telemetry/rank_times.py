"""Which rank the others wait for: each rank's own time in a step, compared over all ranks.

All ranks take the same time for a step, for they wait for each other in its collectives. A rank's own time is what it
spends before them: waiting for data, and its forward passes. At stage 3 ranks wait for each other in forward passes,
too, where parameters are gathered; there only the wait for data counts.
"""

from __future__ import annotations

import contextlib
import logging
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from codeparrot_ds.engine.ranks import Ranks

logger = logging.getLogger("codeparrot_ds.ranks")
SLOW_FACTOR = 1.3
"""A rank whose own time is this many times the median rank's …"""
SLOW_SHARE = 0.05
"""… by more than this share of a step …"""
SLOW_ROWS = 10
"""… in so many logged rows in a row is named."""


class RankTimes:
    """Times forward passes on this rank and compares ranks at each logged step; ``hosts`` names every rank's."""

    def __init__(self, ranks: Ranks, hosts: list[str], zero_stage: int) -> None:
        self._ranks, self._hosts = ranks, hosts
        self._forward_is_own = zero_stage < 3
        self._seconds = 0.0
        self._events: list[tuple[Any, Any]] = []
        self._slow_rows = 0
        self._slow_rank: int | None = None
        self._named: set[int] = set()

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """Around a forward pass; nothing is waited for, on a GPU either."""
        if not self._forward_is_own:
            yield
        elif self._ranks.device.type == "cpu":
            began = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - began
        else:
            from deepspeed.accelerator import get_accelerator

            begin, end = (get_accelerator().Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))

    def row(self, steps: int, *, data_wait: float, step_seconds: float) -> dict[str, Any]:
        """What a training row says of the ranks; collective. Call it after waiting for the device.

        Args:
            steps: since the last row.
            data_wait: this rank's wait for data, in seconds per step.
            step_seconds: of a step.

        Returns:
            ``rank_seconds_median``, ``rank_seconds_max`` (own seconds per step) and ``slowest_rank``.
        """
        self._seconds += sum(begin.elapsed_time(end) for begin, end in self._events) / 1000
        own = torch.tensor(data_wait + self._seconds / steps, dtype=torch.float64)
        self._seconds = 0.0
        self._events.clear()
        gathered = [torch.empty_like(own) for _ in range(self._ranks.world_size)]
        dist.all_gather(gathered, own, group=self._ranks.control)
        seconds = [one.item() for one in gathered]
        slowest = seconds.index(max(seconds))
        # The lower of two in the middle: of two ranks the slow one is not compared with itself.
        median = statistics.median_low(seconds)
        self._judge(slowest, seconds[slowest], median, step_seconds)
        return {"rank_seconds_median": median, "rank_seconds_max": seconds[slowest], "slowest_rank": slowest}

    def _judge(self, rank: int, seconds: float, median: float, step_seconds: float) -> None:
        """Names a rank that is the slowest again and again; on rank 0, once per rank."""
        slow = seconds > SLOW_FACTOR * median and seconds - median > SLOW_SHARE * step_seconds
        self._slow_rows = (self._slow_rows + 1 if rank == self._slow_rank else 1) if slow else 0
        self._slow_rank = rank if slow else None
        if self._slow_rows >= SLOW_ROWS and rank not in self._named and self._ranks.is_main:
            self._named.add(rank)
            logger.warning(
                "rank %d on %s is slow: it takes %.3f s per step for its data and forward passes, the median rank "
                "%.3f s; the others wait for it",
                *(rank, self._hosts[rank], seconds, median),
            )
