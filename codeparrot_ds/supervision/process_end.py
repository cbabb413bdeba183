"""Ends a process when the one that started it is gone, however that went, or when its own work is done. No torch here.

SIGKILL leaves a process no time to take its children along: ranks would train on without a launcher, hold the run's
folder, and nobody would see their words. Linux sends a signal to the children instead, when they have asked for it.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

_PR_SET_PDEATHSIG = 1  # include/uapi/linux/prctl.h

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Each asks a run to save and stop: SIGTERM from launchers and schedulers, SIGINT from Ctrl-C, SIGUSR1 from Slurm."""
LEADS = "CODEPARROT_DS_LAUNCHER_LEADS"
"""Environment variable of ranks whose parent, the launcher, leads the session that they are in."""


def signal_at_parents_end(number: signal.Signals, parent: int | None = None) -> Callable[[], None]:
    """Returns a function that makes the kernel send this signal to the process that calls it, at its parent's end.

    The function calls into the system alone, so that a forked child may call it before it becomes another program. On
    other systems than Linux it does nothing. Where ``parent`` (a process id) is known, a process whose parent has ended
    already ends at once.
    """
    if not sys.platform.startswith("linux"):
        return lambda: None
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def ask() -> None:
        prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
        if parent is not None and os.getppid() != parent:  # it ended before prctl: no signal will come
            os._exit(1)

    return ask


def launcher_of_this_rank() -> int | None:
    """The process id of the launcher that started this rank; None where another program started that."""
    return os.getsid(0) if LEADS in os.environ else None


def end_process(code: int) -> NoReturn:
    """Ends a rank's process after its exit handlers, without taking the interpreter down.

    While Python takes itself down, a thread of gloo's, autograd's or a library's that asks for the interpreter is ended
    by unwinding its C++ frames, which aborts the process ("terminate called without an active exception"): now and then
    the launcher reported a finished run as failed. https://github.com/pytorch/pytorch/issues/38228
    """
    # Has idle pools of threads end, inductor's for one, and waits for all that are not daemons.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(BrokenPipeError):  # the reader has closed the pipe, as `head` does
            stream.flush()
    os._exit(code)
