"""Shards of documents on disk, read one document at a time from any position.

A row of a shard is a JSON object (or a parquet row) whose ``content`` is the text of one document. The position after
a document travels with it, so that a reader can stop anywhere and go on later without reading the past again.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import orjson

from codeparrot_ds.errors import UserError

FORMATS = {".jsonl": "jsonl", ".jsonl.gz": "gz", ".jsonl.zst": "zst", ".parquet": "parquet"}
READ_BYTES = 1 << 18


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One file of documents."""

    path: Path
    name: str
    """File name: what identifies the shard in a fingerprint, wherever the corpus lies."""
    format: str
    """One of the values of FORMATS."""
    bytes: int
    """Size on disk."""


class Position(NamedTuple):
    """A place between two documents of a shard."""

    offset: int
    """Bytes of (decompressed) text before it; 0 in parquet, which is addressed by rows."""
    line: int
    """Lines (parquet: rows) before it, bad ones included."""


START = Position(0, 0)


class BadDocument(NamedTuple):
    """Where a document was lost, and why."""

    path: str
    line: int
    """1-based line (parquet: row); 0 for the shard as a whole."""
    reason: str

    def __str__(self) -> str:
        return f"{self.path}, line {self.line}: {self.reason}" if self.line else f"{self.path}: {self.reason}"


class BadDocuments:
    """Counts the documents that could not be read, each once however often its shard is read.

    Raises a UserError when there are more than ``limit`` (None: never).
    """

    def __init__(self, limit: int | None = 100) -> None:
        self.limit = limit
        self._found: dict[tuple[str, int], BadDocument] = {}
        self._reported = 0

    def __len__(self) -> int:
        return len(self._found)

    def __iter__(self) -> Iterator[BadDocument]:
        return iter(self._found.values())

    def add(self, document: BadDocument) -> None:
        self._found[document.path, document.line] = document
        if self.limit is not None and len(self) > self.limit:
            raise UserError(
                f"{len(self)} documents cannot be read, which is more than max_bad_documents={self.limit}; "
                f"the first is {next(iter(self))}, the last is {document}."
            )

    def take_new(self) -> list[BadDocument]:
        """The bad documents found since the last call."""
        new = list(self)[self._reported :] if len(self) > self._reported else []
        self._reported = len(self)
        return new


def find_shards(folder: str | Path, split: str) -> list[Shard]:
    """The shards of ``folder/split``, sorted by name. Raises a UserError when there is nothing to read."""
    root = Path(folder) / split
    if not root.is_dir():
        neighbours = sorted(path.name for path in Path(folder).glob("*/")) if Path(folder).is_dir() else []
        hint = f"it has {', '.join(neighbours)}" if neighbours else "make one with `codeparrot-ds corpus SRC --out DIR`"
        raise UserError(f"The corpus folder {folder} has no split {split!r}; {hint}.")
    shards = []
    for path in sorted(root.iterdir()):
        for suffix, name in FORMATS.items():
            if path.name.endswith(suffix) and path.is_file():
                shards.append(Shard(path=path, name=path.name, format=name, bytes=path.stat().st_size))
    if not shards:
        raise UserError(f"{root} has no shards; a shard's name ends in one of {', '.join(FORMATS)}.")
    if not any(shard.bytes for shard in shards):
        raise UserError(f"Every shard in {root} is empty; build the corpus again.")
    return shards


def read_documents(
    shard: Shard, position: Position = START, *, phase: int = 0, stride: int = 1, bad: BadDocuments
) -> Iterator[tuple[str, Position]]:
    """The documents of ``shard`` from ``position`` on whose line number (from 0) is ``phase`` modulo ``stride``.

    Each comes with the position after it. A bad document is skipped and counted in ``bad``; a damaged file costs what
    follows the damage. Raises a UserError when the shard cannot be opened or ``bad`` is over its limit.
    """
    if shard.bytes == 0:
        bad.add(BadDocument(str(shard.path), 0, "the shard is empty"))
    try:
        for raw, after in _raw_rows(shard, position, phase, stride):
            try:
                text = _content(raw) if isinstance(raw, bytes) else _parquet_content(raw)
            except ValueError as error:
                bad.add(BadDocument(str(shard.path), after.line, str(error)))
            else:
                yield text, after
    except _Damage as damage:
        reason = f"the shard is truncated or damaged from here on ({damage.cause})"
        bad.add(BadDocument(str(shard.path), damage.line, reason))
    except OSError as error:
        raise UserError(f"The shard {shard.path} cannot be read: {error.strerror or error}.") from error


class _Damage(Exception):
    """A compressed file or a parquet file cannot be decoded from ``line`` (1-based) on."""

    def __init__(self, line: int, cause: Exception) -> None:
        super().__init__(line, cause)
        self.line, self.cause = line, cause


def _raw_rows(shard: Shard, position: Position, phase: int, stride: int) -> Iterator[tuple[Any, Position]]:
    """Undecoded rows with the position after each: bytes of a JSON line, or an Arrow scalar."""
    if shard.format == "parquet":
        yield from _parquet_rows(shard, position, phase, stride)
    elif shard.format == "gz":
        with gzip.open(shard.path, "rb") as file:
            # BadGzipFile is an OSError: name it before OSError is taken for an unreadable path.
            yield from _lines(file, position, phase, stride, (EOFError, zlib.error, gzip.BadGzipFile))
    elif shard.format == "zst":
        import zstandard

        with io.BufferedReader(_ZstdFile(shard.path), READ_BYTES) as file:
            yield from _lines(file, position, phase, stride, (EOFError, zstandard.ZstdError))
    else:
        with open(shard.path, "rb", buffering=READ_BYTES) as file:
            file.seek(position.offset)
            yield from _lines(file, position, phase, stride, ())


def _lines(
    file: BinaryIO | io.BufferedIOBase, position: Position, phase: int, stride: int, damage: tuple[type[Exception], ...]
) -> Iterator[tuple[bytes, Position]]:
    """Non-blank lines from ``position`` on. A file that cannot seek is decompressed up to it, nothing more."""
    offset, line = position
    try:
        if damage:
            skipped = 0
            while skipped < offset and (chunk := file.read(min(READ_BYTES, offset - skipped))):
                skipped += len(chunk)
        for text in file:
            offset += len(text)
            line += 1
            if (line - 1) % stride == phase and not text.isspace():
                yield text, Position(offset, line)
    except damage as error:
        raise _Damage(line + 1, error) from error


def _content(line: bytes) -> str:
    """The document of one JSON line. Raises a ValueError with the reason when there is none."""
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        # orjson refuses lone surrogates and invalid UTF-8 here as well.
        raise ValueError(f"broken JSON ({error})") from None
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    if "content" not in row:
        raise ValueError("no `content` column")
    if not isinstance(row["content"], str):
        raise ValueError(f"`content` is {type(row['content']).__name__}, not a string")
    return row["content"]


class _ZstdFile(io.RawIOBase):
    """Decompressed zstd frames. The package's own ``stream_reader`` ends a truncated frame without an error."""

    def __init__(self, path: Path) -> None:
        import zstandard

        self._file = open(path, "rb")  # noqa: SIM115 (closed by close)
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        self._frame: Any = None
        self._input = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            self._input = self._input or self._file.read(READ_BYTES >> 2)
            if not self._input:
                if self._frame is not None:
                    raise EOFError("the file ended inside a zstd frame")
                return 0
            self._frame = self._frame or self._decompressor.decompressobj()
            self._output = memoryview(self._frame.decompress(self._input))
            self._input = self._frame.unused_data if self._frame.eof else b""
            self._frame = None if self._frame.eof else self._frame
        size = min(len(buffer), len(self._output))
        buffer[:size], self._output = self._output[:size], self._output[size:]
        return size


def _parquet_rows(shard: Shard, position: Position, phase: int, stride: int) -> Iterator[tuple[Any, Position]]:
    """Arrow scalars of the ``content`` column; row groups before the position are not read."""
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        with pyarrow.parquet.ParquetFile(shard.path) as file:
            names = file.schema_arrow.names
            if "content" not in names:
                raise UserError(f"{shard.path} has no column `content`; it has {', '.join(names)}.")
            for group in range(file.num_row_groups):
                num_rows = file.metadata.row_group(group).num_rows
                if row + num_rows <= position.line:
                    row += num_rows
                    continue
                # No Arrow threads: a forked loader worker must not depend on its parent's thread pool.
                batches = file.iter_batches(64, row_groups=[group], columns=["content"], use_threads=False)
                for value in (value for batch in batches for value in batch.column(0)):
                    row += 1
                    if row > position.line and (row - 1) % stride == phase:
                        yield value, Position(0, row)
    except (FileNotFoundError, PermissionError):
        raise
    except (pyarrow.ArrowException, OSError) as error:
        raise _Damage(row + 1, error) from error


def _parquet_content(value: Any) -> str:
    text = value.as_py()  # a UnicodeDecodeError is a ValueError
    if not isinstance(text, str):
        raise ValueError(f"`content` is {type(text).__name__}, not a string")
    return text
