"""Stopping at a step boundary: a signal or a limit of time asks, all ranks agree, the run saves and ends."""

from __future__ import annotations

import math
import signal
import threading
import time

import torch
import torch.distributed as dist

from codeparrot_ds.engine.ranks import Ranks
from codeparrot_ds.supervision.guard import asked_early
from codeparrot_ds.supervision.process_end import STOP_SIGNALS


class StopSignal:
    """Remembers that this rank was asked to stop, by a signal or by ``max_hours``; a signal handler saves nothing.

    The launcher stops its ranks one after another, so one that acted at once would leave the others waiting for it.
    """

    def __init__(self, ranks: Ranks, max_hours: float | None = None) -> None:
        self._ranks = ranks
        self._asked = asked_early()
        self._deadline = math.inf if max_hours is None else time.monotonic() + 3600 * max_hours
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                signal.signal(number, self._ask)

    def _ask(self, number: int, frame: object) -> None:
        self._asked = True

    @property
    def asked(self) -> bool:
        """Whether this rank was asked by a signal."""
        return self._asked

    def agreed(self) -> bool:
        """Whether any rank was asked to stop; the same answer on every rank; collective.

        One number over the control group, between the hosts' processes: the device's queue is not waited for.
        """
        asked = self._asked or time.monotonic() >= self._deadline
        if self._ranks.world_size == 1:
            return asked
        flag = torch.tensor([int(asked)])
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._ranks.control)
        return bool(flag.item())
