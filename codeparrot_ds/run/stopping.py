"""Stopping at a step boundary: a signal asks, all ranks agree, the run saves and ends."""

from __future__ import annotations

import signal
import threading

import torch
import torch.distributed as dist

from codeparrot_ds.run.ranks import Ranks

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopSignal:
    """Remembers that this rank was asked to stop; nothing is saved inside a signal handler.

    The launcher stops its ranks one after another, so one that acted at once would leave the others waiting for it.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._asked = False
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, self._ask)

    def _ask(self, number: int, frame: object) -> None:
        self._asked = True

    def agreed(self) -> bool:
        """Whether any rank was asked to stop; the same answer on every rank; collective.

        One number over the control group, between the hosts' processes: the device's queue is not waited for.
        """
        if self._ranks.world_size == 1:
            return self._asked
        flag = torch.tensor([int(self._asked)])
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._ranks.control)
        return bool(flag.item())
