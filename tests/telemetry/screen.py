"""A terminal of some width for the tests: a real pseudo-terminal, and what a person would see on it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import struct
import sys
import termios
from collections.abc import Iterator

_PARTS = re.compile(r"\x1b\[(\d*)([A-Za-z])|(\r|\n)|([^\x1b\r\n]+)")


class Screen:
    """What was written to a terminal so far."""

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self._reader, self._writer = os.openpty()
        fcntl.ioctl(self._writer, termios.TIOCSWINSZ, struct.pack("HHHH", 100, columns, 0, 0))
        os.set_blocking(self._reader, False)
        self.stream = os.fdopen(self._writer, "w", encoding="utf-8", buffering=1)
        self._written = b""

    def lines(self) -> list[str]:
        """The lines that a person sees, from the first to the last that is not empty."""
        self.stream.flush()
        with contextlib.suppress(BlockingIOError):
            while piece := os.read(self._reader, 1 << 16):
                self._written += piece
        rows, row, column = [[]], 0, 0
        for number, letter, move, text in _PARTS.findall(self._written.decode()):
            if move == "\r":
                column = 0
            elif move == "\n":
                row += 1  # the terminal's driver has put a carriage return before it
            elif letter == "A":
                row -= int(number or 1)
            elif letter == "K":
                del rows[row][column:]
            for character in text:
                if column == self.columns:
                    row, column = row + 1, 0
                rows += [[] for _ in range(row + 1 - len(rows))]
                rows[row][column:] = [*[" "] * (column - len(rows[row])), character, *rows[row][column + 1 :]]
                column += 1
            rows += [[] for _ in range(row + 1 - len(rows))]
        return "\n".join("".join(cells).rstrip() for cells in rows).rstrip("\n").split("\n")

    def close(self) -> None:
        self.stream.close()
        os.close(self._reader)


@contextlib.contextmanager
def standard_error_on(columns: int) -> Iterator[Screen]:
    """Standard error as such a terminal, while it lasts."""
    screen, before = Screen(columns), sys.stderr
    sys.stderr = screen.stream
    try:
        yield screen
    finally:
        sys.stderr = before
        screen.close()
