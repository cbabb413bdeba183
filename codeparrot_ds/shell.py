"""What the user's shell has to do with: commands that are meant for pasting, and SIGTERM as Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
from collections.abc import Iterator
from typing import NoReturn

COMMAND = "CODEPARROT_DS_COMMAND"
"""Environment variable: how this program is called where it is not on PATH (``./launch.sh``)."""


def pasteable(*parts: object) -> str:
    """A command line of this program, quoted so that a shell reads these very parts."""
    return shlex.join([os.environ.get(COMMAND) or "codeparrot-ds", *map(str, parts)])


def next_steps(*commands: str) -> str:
    """The last lines of a long command: what to type next.

    Each command is made by `pasteable`; a comment may follow it.
    """
    return "\n".join(["", "Next:", *(f"  {command}" for command in commands)])


class TerminatedError(KeyboardInterrupt):
    """SIGTERM, where it ends a command as Ctrl-C does."""


@contextlib.contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """Lets SIGTERM end a block as Ctrl-C does, so that what is to be left in order is; main thread only."""

    def interrupt(number: int, frame: object) -> NoReturn:
        raise TerminatedError

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
