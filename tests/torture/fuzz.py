"""Damages what the product reads, again and again: a sentence that names the file or a result, and never anything else.

    python -m tests.torture.fuzz --inputs 20000 [READER …]

Each reader looks at a folder as the commands do. Before it looks, one file there is mutated: bytes of it, one value of
its JSON, its safetensors header, the program in its pickle; or it becomes a named pipe, a folder or nothing. What is
not a one-line ``UserError`` with the file's name in it is a defect; so is a look that takes `SECONDS`,
`WAITING_SECONDS` or `MAX_BYTES`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from codeparrot_ds.errors import UserError

SECONDS = 10
"""Of CPU time that a look may take."""
WAITING_SECONDS = 60
"""That it may take by the clock, on a machine that has others to serve."""
MAX_BYTES = 1 << 30
"""Of memory that a look may take beside what the process has."""
NESTED = "[" * 100_000
RAW = ("1e999", "-1e999", "NaN", "123456789" * 600, NESTED + "]" * 100_000, '{"a":' * 100_000, NESTED, '"\\ud800"', "")
PLAIN: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3.5, 2**31, 2**63, 10**30, "", "many", "²", "1", "nan", "../../x", "/etc/passwd"),
    *("\0", "x" * 10_000, [], {}, [[]], [None], ["a", 1], {"a": 1}, {"": {}}, [0] * 1000, "\u2028", "line\nline"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reader:
    """What is fuzzed."""

    name: str
    files: tuple[str, ...]
    """In the folder, each of which is mutated."""
    make: Callable[[Path], None]
    """Fills the folder."""
    look: Callable[[Path], object]
    mended: Callable[[Path, str], None] = lambda folder, name: None
    """Makes hashes right again, so that what is behind them is reached."""
    also_changed: tuple[str, ...] = ()
    """By that."""


class HangError(BaseException):
    """A look that does not end."""


# --------------------------------------------------------------------------------------------------------------------
# Mutations


def mutated(content: bytes, name: str, draw: random.Random) -> bytes:
    """A file's content with one to three mutations of a kind that fits it."""
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        if name.endswith(".safetensors") and draw.random() < 0.7:
            content = _safetensors(content, draw)
        elif name.endswith(".pt") and draw.random() < 0.8:
            content = _pickle(content, draw)
        elif name.endswith(".json") and draw.random() < 0.7:
            content = _json(content, draw)
        elif name.endswith(".jsonl") and draw.random() < 0.7:
            lines = content.split(b"\n")
            at = draw.randrange(len(lines))
            lines[at] = _json(lines[at], draw)
            content = b"\n".join(lines)
        else:
            content = _bytes(content, draw)
    return content


def _bytes(content: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(content) + 1)
    end = min(len(content), at + draw.choice((1, 2, 8, 100)))
    kinds: tuple[Callable[[], bytes], ...] = (
        lambda: content[:at] + draw.randbytes(1) + content[at + 1 :],
        lambda: content[:at] + draw.randbytes(draw.randrange(1, 9)) + content[at:],
        lambda: content[:at] + content[end:],
        lambda: content[:at] + content[at:end] * 3 + content[end:],
        lambda: content[:at],
        lambda: (
            content[:at] + draw.choice((b"[", b"{", b'"', b"0", b"9" * 30, b"\0" * 9, b"\xff", b"\n")) + content[at:]
        ),
        lambda: content[:at] + draw.choice(RAW).encode() + content[at:],
    )
    return draw.choice(kinds)()


def _json(content: bytes, draw: random.Random) -> bytes:
    """One value of a JSON text replaced, removed, renamed or moved."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return _bytes(content, draw)
    places: list[tuple[Any, Any]] = []
    todo = [value]
    while todo:
        parent = todo.pop()
        keys = list(parent) if isinstance(parent, dict) else range(len(parent)) if isinstance(parent, list) else ()
        for key in keys:
            places.append((parent, key))
            todo.append(parent[key])
    raw = json.dumps(draw.choice(PLAIN)) if draw.random() < 0.7 else draw.choice(RAW)
    if not places or draw.random() < 0.03:
        return raw.encode()
    parent, key = draw.choice(places)
    change = draw.random()
    if change < 0.15:
        del parent[key]
    elif change < 0.25 and isinstance(parent, dict):
        parent[str(draw.choice(PLAIN))[:50]] = parent.pop(key)
    elif change < 0.35:
        parent[key] = json.loads(json.dumps(draw.choice(places)[0]))
    else:
        parent[key] = "@@RAW@@"
    return json.dumps(value, indent=2 if b"\n  " in content else None).replace('"@@RAW@@"', raw).encode() + b"\n"


def _safetensors(content: bytes, draw: random.Random) -> bytes:
    """The header's length, or a value of its table: offsets that overlap or leave the file, shapes, dtypes, names."""
    size = int.from_bytes(content[:8], "little")
    if draw.random() < 0.15 or size > len(content):
        sizes = (0, 1, size + 1, size - 1, 2**20, 2**31, 2**63, 2**64 - 1)
        return struct.pack("<Q", draw.choice(sizes) % 2**64) + content[8:]
    header = _json(content[8 : 8 + size], draw)
    return struct.pack("<Q", len(header)) + header + content[8 + size :]


def _pickle(content: bytes, draw: random.Random) -> bytes:
    """The program of a file that torch wrote, in an archive whose sums are right."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = [(member, archive.read(member)) for member in archive.infolist()]
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, RuntimeError, struct.error):
        return _bytes(content, draw)
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as archive:
        for member, data in members:
            if member.filename.endswith("data.pkl") or draw.random() < 0.02:
                data = _program(data, draw)
            with contextlib.suppress(ValueError, UnicodeError, struct.error):
                archive.writestr(zipfile.ZipInfo(member.filename), data)
    return written.getvalue()


def _program(program: bytes, draw: random.Random) -> bytes:
    opcodes = [
        bytes([code])
        for code in b".(0123FIKJMNTUXZalpqrtu}e])\x80\x81\x82\x85\x86\x87\x88\x89\x8a\x8b\x8c\x8e\x93\x94bcRoiQP"
    ]
    at = draw.randrange(len(program) + 1)
    kinds: tuple[Callable[[], bytes], ...] = (
        lambda: program[:at] + draw.choice(opcodes) + program[at:],
        lambda: program[:at] + draw.choice(opcodes) + program[at + 1 :],
        lambda: program[:at] + program[at + 1 :],
        lambda: pickle.dumps(draw.choice(PLAIN), protocol=2),
        lambda: b"\x80\x02" + b"(" * 100_000 + b".",
        lambda: b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b".",
        lambda: b"\x80\x02" + draw.choice((b"0.", b"2.", b"t.", b"u.", b"R.", b"b.", b"h\x05.", b"X\xff\xff\xff\x7f.")),
        lambda: _bytes(program, draw),
    )
    return draw.choice(kinds)()


# --------------------------------------------------------------------------------------------------------------------
# Looks


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """Ends a look that takes too long; what takes too much memory has a MemoryError."""

    def end(*_: object) -> None:
        raise HangError

    clocks = {signal.ITIMER_PROF: (signal.SIGPROF, SECONDS), signal.ITIMER_REAL: (signal.SIGALRM, WAITING_SECONDS)}
    before = {number: signal.signal(number, end) for number, _ in clocks.values()}
    for clock, (_, seconds) in clocks.items():
        signal.setitimer(clock, seconds)
    try:
        yield
    finally:
        for clock, (number, _) in clocks.items():
            signal.setitimer(clock, 0)
            signal.signal(number, before[number])


def bound_memory() -> None:
    """Lets this process take `MAX_BYTES` more than it has."""
    has = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (has + MAX_BYTES, resource.RLIM_INFINITY))


def verdict(reader: Reader, folder: Path) -> str | None:
    """What is wrong with what a look at a folder came to; None where nothing is."""
    try:
        with limits(), contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(said):
            reader.look(folder)
    except UserError as error:
        sentence = str(error)
        if "\n" in sentence.strip():
            return f"more than a line: {sentence[:300]!r}"
        return None if folder.name in sentence else f"does not say where: {sentence[:300]!r}"
    except HangError:
        return f"does not end within {SECONDS} s of CPU time or {WAITING_SECONDS} s"
    except BaseException:
        return traceback.format_exc(limit=-6)
    return None


def fuzz(reader: Reader, inputs: int, seed: int, room: Path, *, most: int = 5) -> list[str]:
    """What went wrong with so many inputs, at most so many of a kind."""
    draw = random.Random(f"{reader.name} {seed}")
    clean = room / "clean"
    clean.mkdir()
    reader.make(clean)
    problem = verdict(reader, clean)
    assert problem is None, f"{reader.name} is not read when it is whole: {problem}"
    folder = room / "damaged-here"
    problems: dict[str, str] = {}
    for number in range(inputs):
        if number % 50 == 0:  # a look may write
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(clean, folder)
        name = draw.choice(reader.files)
        path = folder / name
        odd = draw.random()
        if odd < 0.01:
            path.unlink()
            os.mkfifo(path)
        elif odd < 0.02:
            path.unlink()
            path.mkdir()
        elif odd < 0.03:
            path.unlink()
        else:
            path.write_bytes(mutated((clean / name).read_bytes(), name, draw))
            reader.mended(folder, name)
        if (problem := verdict(reader, folder)) is not None:
            problems.setdefault(problem[-300:], f"{reader.name}, input {number} of seed {seed}, {name}: {problem}")
            if len(problems) >= most:
                break
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        for changed in {name, *reader.also_changed}:
            shutil.copyfile(clean / changed, folder / changed)
    return list(problems.values())


def main() -> int:
    from tests.torture.readers import READERS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("readers", nargs="*", help=f"of {', '.join(READERS)}; all by default")
    parser.add_argument("--inputs", type=int, default=20_000, help="for each reader")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    found = 0
    for name in options.readers or READERS:
        began = time.process_time()
        with tempfile.TemporaryDirectory() as room:
            reader, warm = READERS[name], Path(room, "warm")
            warm.mkdir()
            reader.make(warm)
            reader.look(warm)  # imports what it needs before memory is bounded
            bound_memory()
            problems = fuzz(reader, options.inputs, options.seed, Path(room))
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        found += len(problems)
        print(
            f"{name}: {options.inputs} inputs, {len(problems)} problems, {time.process_time() - began:.0f} s",
            flush=True,
        )
        for problem in problems:
            print(f"PROBLEM: {problem[:3000]}", flush=True)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
