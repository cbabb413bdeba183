"""JSON files read as if anybody had written them: a value, or one sentence that names the file. No torch here.

A run's folder is copied, edited, cut short by a full disk, and sent by mail. Whoever reads it finds damage with the
file's name and nothing worse: no ``RecursionError`` of 100,000 brackets, no wait for a named pipe, no file that takes
all memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from codeparrot_ds.errors import UserError, first_line

MAX_BYTES = 32 << 20
"""Of a whole file. The densest JSON takes some 25 times its size in memory, and the largest of a run (a manifest for
thousands of ranks) is a tenth of this."""
MAX_LINE_BYTES = 4 << 20
"""Of a row in a file of rows."""
MAX_DEPTH = 100
"""Of lists and objects in each other: whatever walks through a value does so without reaching Python's limit."""
TOO_DEEP = f"its brackets are nested more than {MAX_DEPTH} deep"
_BLOCK = 1 << 18


class DamagedFileError(UserError, ValueError):
    """A file that does not hold what was written there.

    A sentence for the user, and a ``ValueError`` to those who can do without the file.

    Args:
        place: of the damage, mostly the file's path.
        reason: what is wrong there.
    """

    def __init__(self, place: object, reason: str) -> None:
        super().__init__(f"{place} is damaged: {reason}")
        self.place, self.reason = str(place), reason

    def __reduce__(self) -> tuple[Any, ...]:  # for its way from a process to another
        return type(self), (self.place, self.reason)


def read_json(path: Path) -> Any:
    """The value in a file.

    Raises:
        DamagedFileError: it is no file, or no JSON.
        OSError: there is none, or the system refuses.
    """
    return parse_json(read_bytes(path), path)


def read_bytes(path: Path) -> bytes:
    """The bytes of a file that a person or this product wrote as text; raises as `read_json`."""
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        raise DamagedFileError(path, "it is a folder")
    if not stat.S_ISREG(status.st_mode):  # opening a named pipe waits for its writer
        raise DamagedFileError(path, "it is not a regular file")
    if status.st_size > MAX_BYTES:
        raise DamagedFileError(path, f"of its {status.st_size:,} bytes at most {MAX_BYTES:,} are read")
    with open(path, "rb") as file:
        return file.read(status.st_size)  # a buffer of so many bytes is made before the first is read


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; raises as `read_json`, and DamagedFileError for any other value."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise DamagedFileError(path, "it holds no JSON object")
    return value


def parse_json(text: bytes | str, place: object) -> Any:
    """The value of a text, whose ``place`` is what to call it; raises DamagedFileError."""
    try:
        value = json.loads(text)
        if not is_too_deep(value):
            return value
        reason = TOO_DEEP
    except RecursionError:
        reason = TOO_DEEP
    except UnicodeDecodeError:
        reason = "it is not text"
    except json.JSONDecodeError as error:
        reason = f"line {error.lineno} is not JSON ({error.msg})"
    except ValueError as error:  # a number of thousands of digits
        reason = first_line(error)
    raise DamagedFileError(place, reason)


def is_too_deep(value: Any) -> bool:
    """Whether a JSON value has lists and objects in each other beyond `MAX_DEPTH`."""
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(MAX_DEPTH):
        inner = (parent.values() if isinstance(parent, dict) else parent for parent in level)
        level = [child for values in inner for child in values if isinstance(child, (dict, list))]
        if not level:
            return False
    return True


@contextlib.contextmanager
def parts_of(place: object) -> Iterator[None]:
    """Around what takes a file's value apart: a part that is missing or of another type is damage of the file.

    Raises:
        DamagedFileError: in the place of what Python raises where a key, a type or a number does not fit.
    """
    try:
        yield
    except UserError:
        raise
    except KeyError as error:
        raise DamagedFileError(place, f"it has no {error.args[0]!r}") from error
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RecursionError) as error:
        raise DamagedFileError(place, first_line(error)) from error


def lines_of(path: Path) -> Iterator[bytes]:
    """The lines of a file of rows, one after another; none where there is no file.

    Of a line that is longer than `MAX_LINE_BYTES` come its first bytes, which are no JSON. The last line may be one
    that a crash left half-written.
    """
    if not path.is_file():
        return
    with open(path, "rb") as file:
        while line := file.readline(MAX_LINE_BYTES):
            whole = line.endswith(b"\n")
            yield line
            while not whole and (rest := file.readline(MAX_LINE_BYTES)):
                whole = rest.endswith(b"\n")


def lines_from_the_end(path: Path) -> Iterator[bytes]:
    """The lines of a file of rows, the last first, as `lines_of` gives them; longer ones are left out."""
    if not path.is_file():
        return
    with open(path, "rb") as file:
        end, rest, too_long = file.seek(0, os.SEEK_END), b"", False
        while end > 0:
            begin = max(0, end - _BLOCK)
            file.seek(begin)
            lines, end = (file.read(end - begin) + rest).split(b"\n"), begin
            if too_long:  # its beginning ends this block, or is all of it
                lines.pop()
                too_long = not lines
            yield from reversed(lines[1:])
            rest = lines[0] if lines else b""
            if len(rest) > MAX_LINE_BYTES:
                rest, too_long = b"", True
        if not too_long:
            yield rest
