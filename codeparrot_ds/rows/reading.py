"""The rows of a file, one at a time, from any position of any piece of it.

A piece is a range of bytes where a reader can start anywhere (JSON lines, tables), every n-th row where it cannot. The
position after a row travels with it, so that a reader can stop anywhere and continue later without reading the past
again. What cannot be read comes as a ``BadRow`` in its place, and costs nothing else.
"""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from codeparrot_ds.errors import UserError
from codeparrot_ds.layouts import find_columns, no_text, parse_columns
from codeparrot_ds.rows import files
from codeparrot_ds.rows.access import HeldFile, RandomAccess
from codeparrot_ds.rows.compressed import DAMAGE, Frames
from codeparrot_ds.rows.files import TABLES, Shard, local_shard, open_shard
from codeparrot_ds.rows.values import split_values

MAX_ROW_BYTES = 1 << 26
"""Of one row, and of one text: nobody writes a program of 64 MiB, and one of two gigabytes fits into 98 KB of zstd."""
Columns = Callable[[Sequence[str]], Sequence[str]]
BLANK = object()
"""In the place of a row: a line without one."""


class Piece(NamedTuple):
    """A part of a shard: the rows that begin in its bytes [begin, end).

    Of a shard that is always read from 0 to its end, those whose row (from 0) is ``phase`` modulo ``stride``.
    """

    shard: Shard
    begin: int
    end: int
    phase: int = 0
    stride: int = 1


class Position(NamedTuple):
    """A place between two rows of a piece."""

    offset: int
    """Text: the byte. Tables: the row. Compressed: the byte of the text since ``frame`` began."""
    line: int
    """Lines or rows before it, counted from the start of the piece, bad ones included."""
    frame: int = 0
    """Compressed: the byte of the file at which the gzip member or zstd frame begins; 0 elsewhere."""


START = Position(0, 0)


class BadRow(Exception):
    """Why there is no text in a row's place.

    ``kind`` is what such rows are counted as: ``bad_rows``, ``lone_surrogates``, ``not_text``, ``nul_bytes``,
    ``too_long``, or ``damaged``: of that the position is the one before what was lost.
    """

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind, self.reason = kind, reason


def _too_long() -> BadRow:
    return BadRow("too_long", "longer than 64 MiB")


def read_rows(
    piece: Piece, position: Position = START, columns: Columns | None = None
) -> Iterator[tuple[Any, Position]]:
    """The rows of ``piece`` from ``position`` on, each with the position after it.

    A row is what its JSON says, or a dictionary of columns; a ``BadRow``; or BLANK.

    Args:
        columns: chooses those of a table that are read, by its names; None for all. Where it chooses none a row has the
            names of all and no values.

    Raises a UserError where the system refuses to read, and FileNotFoundError.
    """
    with open_shard(piece.shard) as file:
        try:
            yield from _rows(file, piece, position, columns)
        except OSError as error:
            raise UserError(f"The shard {piece.shard.path} cannot be read: {error.strerror or error}.") from error


def read_row_file(path: Path) -> Iterator[tuple[str, Any]]:
    """The rows of a whole file, JSON lines by any other name, or of a saved data set, each with its place for people.

    Raises a UserError with place and reason for one that cannot be read, and for a file that cannot.
    """
    saved = files.saved_files(path)
    for file in [path] if saved is None else saved:
        yield from _rows_with_places(file)


def _rows_with_places(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        file: contextlib.AbstractContextManager[RandomAccess]
        if path.is_file():
            shard = local_shard(path, "jsonl")
            assert shard is not None
            shard = dataclasses.replace(shard, exact_numbers=True)
            file = open_shard(shard)
        else:  # a pipe has no places
            data = path.read_bytes()
            shard = Shard(path=path, name=path.name, format="jsonl", bytes=len(data), exact_numbers=True)
            file = contextlib.nullcontext(HeldFile(data))
        unit = "row" if shard.format in TABLES or shard.is_values else "line"
        with file as opened:
            for row, after in _rows(opened, Piece(shard, 0, shard.bytes), START, None):
                if isinstance(row, BadRow):
                    raise UserError(f"{path}, {unit} {after.line + (row.kind == 'damaged')}: {row.reason}")
                if row is not BLANK:
                    yield f"{path}, {unit} {after.line}", row
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def _rows(
    file: RandomAccess, piece: Piece, position: Position, columns: Columns | None
) -> Iterator[tuple[Any, Position]]:
    if piece.shard.format in TABLES:
        return _table_rows(file, piece, position, columns)
    if piece.shard.is_values:
        return _values(file, piece, position)
    return _lines(file, piece, position) if piece.shard.format == "jsonl" else _compressed(file, piece, position)


def row_number(piece: Piece, position: Position) -> int:
    """The line or row of the file, from 1, that ends at a position; counts the lines before the piece, for an error."""
    if piece.shard.format in TABLES:
        return position.offset
    if piece.begin == 0:
        return position.line
    with open_shard(piece.shard) as file:
        before, offset, start = 0, 0, _line_start(file, piece)
        while offset < start:
            block = file.read_at(offset, min(files.READ_BYTES, start - offset))
            before += block.count(b"\n")
            offset += len(block) or start
    return before + position.line


# --------------------------------------------------------------------------------------------------------------------
# Texts


def document_of(row: Any, columns: str, *, as_before: bool = False) -> str:
    """The text of a row in the column that ``layouts.find_columns`` finds. Raises a BadRow where there is none."""
    column = parse_columns(columns).get("content", "content")
    if isinstance(row, dict) and column not in row:
        found = find_columns(tuple(row), columns).get("content")
        if found is None:
            raise BadRow("bad_rows", no_text(tuple(row), columns))
        column = found
    return text_of(row, column, as_before=as_before)


def text_of(row: Any, column: str, *, as_before: bool = False) -> str:
    """The text in a column of a row, without a byte order mark. Raises a BadRow where there is none."""
    if not isinstance(row, dict):
        raise row if isinstance(row, BadRow) else BadRow("bad_rows", "not a JSON object")
    if column not in row:
        raise BadRow("bad_rows", f"no column {column!r} (columns: {', '.join(map(str, row))})")
    text = row[column]
    if not isinstance(text, str):
        if isinstance(text, bytes):
            raise BadRow("not_text", f"`{column}` is not UTF-8 text")
        raise BadRow("bad_rows", f"`{column}` is {type(text).__name__}, not a string")
    if "\0" in text:
        raise BadRow("nul_bytes", f"`{column}` has a NUL character: not text")
    if as_before:
        return text
    if len(text) > MAX_ROW_BYTES:
        raise _too_long()
    return text.removeprefix("\ufeff")


def _parsed(line: bytes | memoryview, *, as_before: bool, exact: bool = False) -> Any:
    """What a JSON line holds: a row, a BadRow or BLANK; numbers of any size where they are to be exact."""
    try:
        row = orjson.loads(line)
        return _exactly(bytes(line)) or row if exact else row
    except orjson.JSONDecodeError as error:
        text = bytes(line)
        if not text or text.isspace():
            return BLANK
        # Files that were joined have marks at any line.
        if text.startswith(codecs.BOM_UTF8) and not as_before:
            return _parsed(text.removeprefix(codecs.BOM_UTF8), as_before=True, exact=exact)
        if text.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return BadRow("not_text", "UTF-16, not UTF-8: convert the file")
        if b"\\ud" in text.lower() and _has_lone_surrogate(text):
            return BadRow("lone_surrogates", "a lone surrogate, which is half a character")
        if exact and (row := _exactly(text)) is not None:
            return row
        hint = ""
        if text.strip() in (b"[", b"{") or text.startswith(b"[{"):
            hint = "; an array or indented JSON is read from a local file whose name ends in .json"
        return BadRow("bad_rows", f"broken JSON ({error}){hint}")


def _exactly(line: bytes) -> Any:
    """A row as json reads it, which knows NaN, infinity and 2**64, a float to orjson; None where it cannot."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _has_lone_surrogate(line: bytes) -> bool:
    """Whether a row is good JSON but for halves of surrogate pairs, which are characters in no encoding."""
    try:
        json.dumps(json.loads(line), ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return True
    except (ValueError, RecursionError):
        pass
    return False


def _damage(error: Exception, line: int) -> tuple[BadRow, Position]:
    """A file that cannot be decoded behind so many lines."""
    reason = f"truncated or damaged from here on ({' '.join(str(error).split())})"
    return BadRow("damaged", reason), Position(line, line)


# --------------------------------------------------------------------------------------------------------------------
# Kinds of files


def _lines(file: RandomAccess, piece: Piece, position: Position) -> Iterator[tuple[Any, Position]]:
    """JSON lines that begin in the piece, parsed in place in blocks of the file."""
    shard, end = piece.shard, piece.end
    as_before, exact, longest = shard.as_before, shard.exact_numbers, _longest(shard)
    line = position.line
    offset = position.offset if position.offset > piece.begin else _line_start(file, piece)
    longer = 0  # bytes to read at least, when a line is longer than what was read
    while offset < end:
        # A short piece asks for little more than itself.
        size = max(longer, min(shard.read_bytes, max(end - offset, 1 << 15)))
        block = file.read_at(offset, size)
        if not block:
            yield _damage(EOFError(f"it had {shard.bytes} bytes before"), line)
            return
        at_end = len(block) < size or offset + size >= shard.bytes
        view = memoryview(block)
        start = 0
        while start < len(block) and offset + start < end:
            newline = block.find(b"\n", start)
            if newline < 0 and not at_end:
                break
            stop = newline if newline >= 0 else len(block)
            line += 1
            row = _parsed(view[start:stop], as_before=as_before, exact=exact)
            start = stop + 1
            yield row, Position(min(offset + start, shard.bytes), line)
        if start == 0 and len(block) > longest:
            line += 1
            start = _next_line(file, offset + len(block), shard) - offset
            yield _too_long(), Position(offset + start, line)
        longer = 0 if start else min(2 * len(block), longest + 1)
        offset += start


def _line_start(file: RandomAccess, piece: Piece) -> int:
    """Where the first line begins that begins in the piece; its end when none does."""
    if piece.begin == 0:
        return 0
    # A line begins at ``begin`` when the byte before it ends one.
    return min(_next_line(file, piece.begin - 1, piece.shard, piece.end), piece.end)


def _next_line(file: RandomAccess, offset: int, shard: Shard, end: int | None = None) -> int:
    """Where the line begins that is behind the first line end from a byte on; where that is looked for when none is."""
    end = shard.bytes if end is None else end
    while offset < end:
        block = file.read_at(offset, min(shard.read_bytes, end - offset))
        if not block:
            break
        newline = block.find(b"\n")
        if newline >= 0:
            return offset + newline + 1
        offset += len(block)
    return end


def _compressed(file: RandomAccess, piece: Piece, position: Position) -> Iterator[tuple[Any, Position]]:
    """Lines of gzip members or zstd frames; a position names its member, so that none before it is decompressed."""
    shard = piece.shard
    longest = _longest(shard)
    frames = Frames(file, position.frame, shard.format, shard.read_bytes)
    line, offset = position.line, position.offset  # bytes of text since ``position.frame``
    try:
        with io.BufferedReader(frames, files.READ_BYTES) as text_file:
            _skip(text_file, offset)
            while raw := text_file.readline(longest + 1):
                offset += len(raw)
                is_long = len(raw) > longest and not raw.endswith(b"\n")
                if is_long:
                    raw = b""
                    offset += _skip_line(text_file)
                line += 1
                if (line - 1) % piece.stride != piece.phase:
                    continue
                row = _too_long() if is_long else _parsed(raw, as_before=shard.as_before, exact=shard.exact_numbers)
                begin, frame = frames.frame_at(offset)
                yield row, Position(offset - begin, line, frame)
    except DAMAGE as error:
        yield _damage(error, line)


def _longest(shard: Shard) -> int:
    """Bytes of the longest line that is read."""
    return sys.maxsize - 1 if shard.as_before else MAX_ROW_BYTES


def _skip(file: Any, size: int) -> None:
    while size and (chunk := file.read(min(files.READ_BYTES, size))):
        size -= len(chunk)


def _skip_line(file: Any) -> int:
    """Reads to the end of a line; returns how many bytes that were."""
    size = 0
    while part := file.readline(files.READ_BYTES):
        size += len(part)
        if part.endswith(b"\n"):
            break
    return size


def _values(file: RandomAccess, piece: Piece, position: Position) -> Iterator[tuple[Any, Position]]:
    """The elements of a JSON array, or JSON values over several lines each."""
    shard = piece.shard
    frames = None if shard.format == "jsonl" else Frames(file, position.frame, shard.format, shard.read_bytes)
    line, base = position.line, position.offset
    try:
        chunks = _chunks(file, base, shard.read_bytes) if frames is None else _text_chunks(frames, base)
        for value, end in split_values(chunks, at_start=position == START, max_bytes=MAX_ROW_BYTES):
            line += 1
            if (line - 1) % piece.stride != piece.phase:
                continue
            row = _too_long() if value is None else _parsed(value, as_before=False, exact=shard.exact_numbers)
            begin, frame = (0, 0) if frames is None else frames.frame_at(base + end)
            yield row, Position(base + end - begin, line, frame)
    except DAMAGE as error:
        yield _damage(error, line)


def _chunks(file: RandomAccess, offset: int, size: int) -> Iterator[bytes]:
    while chunk := file.read_at(offset, size):
        yield chunk
        offset += len(chunk)


def _text_chunks(frames: Frames, offset: int) -> Iterator[bytes]:
    with io.BufferedReader(frames, files.READ_BYTES) as text_file:
        _skip(text_file, offset)
        while chunk := text_file.read(files.READ_BYTES):
            yield chunk


def _table_rows(
    file: RandomAccess, piece: Piece, position: Position, columns: Columns | None
) -> Iterator[tuple[Any, Position]]:
    """The rows of a table whose share of the file lies in the piece."""
    import pyarrow

    from codeparrot_ds.rows.tables import open_table

    shard = piece.shard
    try:
        with open_table(file, shard) as table:
            num_rows = sum(table.group_rows)
            first, end = (num_rows * byte // shard.bytes for byte in (piece.begin, piece.end))
            yield from rows_of_table(table, first, end, columns, skip=position.offset, as_before=shard.as_before)
            if table.damage and end == num_rows:
                yield _damage_behind(num_rows, first, table.damage)
    except (pyarrow.ArrowException, OSError) as error:
        yield _damage(error, 0)


def _damage_behind(row: int, first: int, error: object) -> tuple[BadRow, Position]:
    damaged, _ = _damage(Exception(error), row)
    return damaged, Position(row, row - first)


def rows_of_table(
    table: Any, first: int, end: int, columns: Columns | None, *, skip: int = 0, as_before: bool = False
) -> Iterator[tuple[Any, Position]]:
    """The rows [first, end) of a table from row ``skip`` on; a group of rows that cannot be read costs itself.

    Args:
        table: as ``tables.open_table`` gives it.
        columns: as for ``read_rows``.
    """
    import pyarrow

    from codeparrot_ds.rows.tables import cells

    wanted = table.names if columns is None else list(columns(table.names))
    start, row = max(first, skip), 0
    for group, group_rows in enumerate(table.group_rows):
        group_end = row + group_rows
        if group_end <= start or row >= end:
            row = group_end
            continue
        try:
            for batch in table.batches(group, wanted or table.names[:1]):
                batch_row, row = row, row + batch.num_rows
                if row > start:
                    batch = batch.slice(max(0, start - batch_row), end - max(batch_row, start))
                    columns_of_batch = [cells(column, as_text=not as_before) for column in batch.columns]
                    for number, values in enumerate(
                        zip(*columns_of_batch, strict=True), start=max(batch_row, start) + 1
                    ):
                        row_of_table = dict(zip(batch.schema.names, values, strict=True))
                        yield row_of_table if wanted else dict.fromkeys(table.names), Position(number, number - first)
                if row >= end:
                    return
        except (pyarrow.ArrowException, OSError) as error:
            if as_before:
                damaged, _ = _damage(error, row)
                yield damaged, Position(row, row - first)
                return
            reason = f"row group {group} is damaged ({' '.join(str(error).split())})"
            yield BadRow("damaged", reason), Position(max(row, start), max(row, start) - first)
            row = group_end
