"""Ends a process when the one that started it is gone, however that went. No torch here.

SIGKILL leaves a process no time to take its children along: ranks would train on without a launcher, hold the run's
folder, and nobody would see their words. Linux sends a signal to the children instead, when they have asked for it.
"""

from __future__ import annotations

import ctypes
import signal
import sys
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1  # include/uapi/linux/prctl.h


def signal_at_parents_end(number: signal.Signals) -> Callable[[], None]:
    """Returns a function that makes the kernel send this signal to the process that calls it, at its parent's end.

    The function calls into the C library alone, so that a forked child may call it before it becomes another program.
    On other systems than Linux it does nothing.
    """
    if not sys.platform.startswith("linux"):
        return lambda: None
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    return lambda: prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
