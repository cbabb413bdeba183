"""Shards of documents, read one document at a time from any position of any piece of them.

A row of a shard is a JSON object (or a parquet row) with the text of one document, in ``content`` or where published
data sets have it (``layouts``). Lanes read pieces of
shards: a range of bytes where a reader can start anywhere (JSON lines, parquet), every n-th line where it cannot
(compressed files). The position after a document travels with it, so that a reader can stop anywhere and continue
later without reading the past again.

All reading goes through ``read_at``, so a shard may lie on a disk or on the Hugging Face Hub.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import orjson

from codeparrot_ds.errors import UserError
from codeparrot_ds.layouts import CARD, Layout, find_columns, lay_out, named_split, no_text
from codeparrot_ds.paths import did_you_mean_path, exists, may_be_on_hub

_LINES = ("json", "jsonl")  # the published dumps of code call JSON lines .json
FORMATS = {
    **{f".{name}.gz": "gz" for name in _LINES},
    **{f".{name}.zst": "zst" for name in _LINES},
    **{f".{name}": "jsonl" for name in _LINES},
    ".parquet": "parquet",
}
READ_BYTES = 1 << 18
"""Bytes that a reader asks the disk for at once; one open piece per lane holds about so much."""
REMOTE_READ_BYTES = 1 << 21
"""The same on the Hub, where each request costs a round trip."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One file of documents."""

    path: Path | str
    """Where it is, for people: a path, or hf://datasets/… on the Hub."""
    name: str
    """What identifies the shard in a fingerprint, wherever the corpus lies: its file name, or its path on the Hub."""
    format: str
    """One of the values of FORMATS."""
    bytes: int
    """Size of the file."""
    remote: Any = None
    """A ``hub_dataset.HubFile`` where the shard is on the Hub."""
    text_column: str = ""
    """The column of the texts; where empty the one that published data sets have (``layouts.COLUMNS``)."""

    @property
    def read_bytes(self) -> int:
        return REMOTE_READ_BYTES if self.remote else READ_BYTES


class Piece(NamedTuple):
    """A part of a shard: the documents that begin in its bytes [begin, end).

    Of a compressed shard, which is always read from 0 to its end, those whose line (from 0) is ``phase`` modulo
    ``stride``.
    """

    shard: Shard
    begin: int
    end: int
    phase: int = 0
    stride: int = 1


class Position(NamedTuple):
    """A place between two documents of a piece."""

    offset: int
    """JSON lines: the byte of the file. Parquet: the row. Compressed: the byte of the text since ``frame`` began."""
    line: int
    """Lines before it, counted from the start of the piece, bad ones included; 0 in parquet."""
    frame: int = 0
    """Compressed: the byte of the file at which the gzip member or zstd frame begins; 0 elsewhere."""


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
        self._found.setdefault(document[:2], document)
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


# --------------------------------------------------------------------------------------------------------------------
# Finding shards


def find_shards(
    data: str | Path, split: str, *, named: bool = False, by_names: bool = True, text_column: str = ""
) -> list[Shard]:
    """The shards of a split, sorted by name. Raises a UserError when there is nothing to read.

    ``data`` is a folder whose names tell splits apart (``layouts``) or do not (then all is ``train``), one shard (which
    is the split, whatever its name is), or the name of a Hub dataset (``org/name``, with ``:config`` and ``@revision``
    where wanted).

    Args:
        data: what to read.
        split: one of ``layouts.SPLITS``.
        named: it was named for this split: see ``layouts.named_split``.
        by_names: False for what a run of version 0.1 found, to resume it: all of a folder that has none per split.
        text_column: see ``Shard``.
    """
    folder = Path(data)
    if not exists(folder):
        if may_be_on_hub(str(data)):
            return [replace(shard, text_column=text_column) for shard in _hub_shards(str(data), split, named)]
        hint = did_you_mean_path(data, "make a corpus with `codeparrot-ds corpus SRC --out DIR`")
        raise UserError(f"the data {data} does not exist{hint}")
    if not folder.is_dir():
        return [replace(_only_shard(folder), text_column=text_column)]
    found = _split_of_folder(folder, split, named) if by_names else _whole_folder(folder, split)
    shards = [
        Shard(
            path=path,
            name=name,
            format=str(file_format(path.name)),
            bytes=path.stat().st_size,
            text_column=text_column,
        )
        for path, name in found
    ]
    if not any(shard.bytes for shard in shards):
        raise UserError(f"Every shard in {_split_folder(folder, split)} is empty; build the corpus again.")
    return shards


def layout_of(folder: Path) -> Layout:
    """Which shards of a folder are of which split."""
    return lay_out(folder, lambda name: file_format(name) is not None)


def _split_of_folder(folder: Path, split: str, named: bool) -> list[tuple[Path, str]]:
    layout = layout_of(folder)
    chosen = named_split(split, layout.splits, named=named)
    if chosen is not None:
        return list(zip(layout.splits[chosen], layout.names(chosen), strict=True))
    if not layout.splits:
        raise _no_shards(folder, split)
    if not layout.told_apart:
        count = len(layout.splits["train"])
        raise UserError(
            f"The corpus folder {folder} has no split {split!r}: no name tells any of its {count:,} shard(s) from the "
            "others, and all are to train on."
        )
    raise UserError(f"The corpus folder {folder} has no split {split!r}; it has {', '.join(layout.splits)}.")


def _whole_folder(folder: Path, split: str) -> list[tuple[Path, str]]:
    root = _split_folder(folder, split)
    paths = [path for path in sorted(root.iterdir()) if file_format(path.name) and path.is_file()]
    paths = [path for path in paths if path.name != CARD]
    if not paths:
        raise _no_shards(folder, split)
    return [(path, path.name) for path in paths]


def _split_folder(folder: Path, split: str) -> Path:
    return folder / split if (folder / split).is_dir() else folder


def _no_shards(folder: Path, split: str) -> UserError:
    if (folder / split).is_dir():
        return UserError(f"{folder / split} has no shards; a shard's name ends in one of {', '.join(FORMATS)}.")
    neighbours = sorted(path.name for path in folder.glob("*/") if path.name[0] != ".")
    hint = f"it has {', '.join(neighbours)}" if neighbours else "make one with `codeparrot-ds corpus SRC --out DIR`"
    return UserError(f"The corpus folder {folder} has no split {split!r}; {hint}.")


def _only_shard(path: Path) -> Shard:
    format_ = file_format(path.name)
    if format_ is None:
        raise UserError(
            f"the data {path} is a file of a kind that is not read: the name of a shard ends in one of "
            f"{', '.join(FORMATS)}, and each of its rows has a `content` column"
        )
    shard = Shard(path=path, name=path.name, format=format_, bytes=path.stat().st_size)
    if not shard.bytes:
        raise UserError(f"the shard {path} is empty")
    return shard


def _hub_shards(name: str, split: str, named: bool) -> list[Shard]:
    from codeparrot_ds.data.hub_dataset import resolve_hub_dataset

    return [
        Shard(
            path=f"hf://datasets/{file.repo}@{file.commit[:12]}/{file.path}",
            name=file.path,
            format=str(file_format(file.path)),
            bytes=file.bytes,
            remote=file,
        )
        for file in resolve_hub_dataset(name, split, named=named)
    ]


def file_format(name: str) -> str | None:
    """The format that a file's name stands for, or None."""
    return next((format_ for suffix, format_ in FORMATS.items() if name.endswith(suffix)), None)


def is_splittable(shard: Shard) -> bool:
    """Whether a reader can start anywhere in the shard."""
    return shard.format in ("jsonl", "parquet")


_SAMPLES, _SAMPLE_BYTES = 16, 4096


def content_id(shard: Shard) -> str:
    """Identifies a shard's bytes without reading them all: a hash of 16 blocks of 4 KiB spread evenly over the file.

    An edit that moves text changes it; one of equal length between two blocks does not. On the Hub, the file's own id.
    """
    if shard.remote is not None:
        return str(shard.remote.content_id)
    digest = hashlib.blake2b(digest_size=16)
    with open_shard(shard) as file:
        last = max(0, shard.bytes - _SAMPLE_BYTES)
        for offset in sorted({last * sample // (_SAMPLES - 1) for sample in range(_SAMPLES)}):
            digest.update(file.read_at(offset, _SAMPLE_BYTES))
    return digest.hexdigest()


# --------------------------------------------------------------------------------------------------------------------
# Bytes


class RandomAccess(Protocol):
    """What a reader needs of a file: ``read_at`` is short at the end of the file only."""

    def read_at(self, offset: int, size: int) -> bytes: ...


class LocalFile:
    """A file on a disk."""

    def __init__(self, path: Path | str) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read_at(self, offset: int, size: int) -> bytes:
        data = os.pread(self._descriptor, size, offset)
        while len(data) < size and (more := os.pread(self._descriptor, size - len(data), offset + len(data))):
            data += more
        return data

    def __enter__(self) -> LocalFile:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)


def open_shard(shard: Shard) -> contextlib.AbstractContextManager[RandomAccess]:
    """Opens a shard for reading. Raises a UserError where the system refuses, and FileNotFoundError."""
    if shard.remote is not None:
        from codeparrot_ds.data.hub_dataset import HubReader

        return contextlib.nullcontext(HubReader(shard.remote))
    try:
        return LocalFile(shard.path)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"The shard {shard.path} cannot be read: {error.strerror or error}.") from error


# --------------------------------------------------------------------------------------------------------------------
# Documents


def read_documents(piece: Piece, position: Position = START, *, bad: BadDocuments) -> Iterator[tuple[str, Position]]:
    """The documents of ``piece`` from ``position`` on, each with the position after it.

    A bad document is skipped and counted in ``bad``; a damaged or missing file costs what cannot be read of it. Raises
    a UserError when the system refuses to read or ``bad`` is over its limit.
    """
    shard = piece.shard
    if shard.bytes == 0:
        bad.add(BadDocument(str(shard.path), 0, "the shard is empty"))
        return
    try:
        opened = open_shard(shard)
    except FileNotFoundError:
        bad.add(BadDocument(str(shard.path), 0, "the shard is gone"))
        return
    reader = {"jsonl": _read_lines, "parquet": _read_parquet}.get(shard.format, _read_compressed)
    with opened as file:
        try:
            yield from reader(file, piece, position, bad)
        except _Damage as damage:
            reason = f"the shard is truncated or damaged from here on ({damage.cause})"
            bad.add(BadDocument(str(shard.path), damage.line, reason))
        except OSError as error:
            raise UserError(f"The shard {shard.path} cannot be read: {error.strerror or error}.") from error


def read_texts(shards: Iterable[Shard], bad: BadDocuments) -> Iterator[str]:
    """The documents of some shards, one after the other."""
    for shard in shards:
        for text, _ in read_documents(Piece(shard, 0, shard.bytes), bad=bad):
            yield text


class _Damage(Exception):
    """A compressed file or a parquet file cannot be decoded from ``line`` (1-based) on."""

    def __init__(self, line: int, cause: Exception) -> None:
        super().__init__(line, cause)
        self.line, self.cause = line, cause


def _document(line: bytes | memoryview, text_column: str) -> str | None:
    """The text of one JSON line, None for a blank one. Raises a ValueError with the reason when there is none."""
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        if bytes(line).isspace() or not len(line):
            return None
        # orjson refuses lone surrogates and invalid UTF-8 here as well.
        raise ValueError(f"broken JSON ({error})") from None
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    column = text_column or "content"
    if column not in row:
        column = _text_column(tuple(row), text_column)
    return _text(row[column], column)


def _text_column(names: tuple[str, ...], text_column: str) -> str:
    """The column of the texts among these. Raises a ValueError when there is none."""
    columns = f"content={text_column}" if text_column else ""
    column = find_columns(names, columns).get("content")
    if column is None:
        raise ValueError(no_text(names, columns))
    return column


def _text(content: object, column: str) -> str:
    if not isinstance(content, str):
        raise ValueError(f"`{column}` is {type(content).__name__}, not a string")
    if "\0" in content:
        raise ValueError(f"`{column}` has a NUL character: not text")
    return content


def _read_lines(
    file: RandomAccess, piece: Piece, position: Position, bad: BadDocuments
) -> Iterator[tuple[str, Position]]:
    """JSON lines that begin in the piece, parsed in place in blocks of the file."""
    shard, end = piece.shard, piece.end
    line = position.line
    offset = position.offset if position.offset > piece.begin else _line_start(file, piece)
    longer = 0  # bytes to read at least, when a line is longer than what was read
    while offset < end:
        # A short piece asks for little more than itself.
        size = max(longer, min(shard.read_bytes, max(end - offset, 1 << 15)))
        block = file.read_at(offset, size)
        if not block:
            raise _Damage(_line_number(file, piece, line + 1), EOFError(f"it had {shard.bytes} bytes before"))
        at_end = len(block) < size or offset + size >= shard.bytes
        view = memoryview(block)
        start = 0
        while start < len(block) and offset + start < end:
            newline = block.find(b"\n", start)
            if newline < 0 and not at_end:
                break
            stop = newline if newline >= 0 else len(block)
            line += 1
            try:
                text = _document(view[start:stop], shard.text_column)
            except ValueError as error:
                bad.add(BadDocument(str(shard.path), _line_number(file, piece, line), str(error)))
                text = None
            start = stop + 1
            if text is not None:
                yield text, Position(min(offset + start, shard.bytes), line)
        longer = 0 if start else 2 * len(block)
        offset += start


def _line_start(file: RandomAccess, piece: Piece) -> int:
    """Where the first line begins that begins in the piece; its end when none does."""
    if piece.begin == 0:
        return 0
    offset = piece.begin - 1  # a line begins at ``begin`` when the byte before it ends one
    while offset < piece.end:
        block = file.read_at(offset, min(piece.shard.read_bytes, piece.end - offset))
        if not block:
            break
        newline = block.find(b"\n")
        if newline >= 0:
            return offset + newline + 1
        offset += len(block)
    return piece.end


def _line_number(file: RandomAccess, piece: Piece, line: int) -> int:
    """The 1-based line in the shard of the ``line``-th line of the piece; counts those before, for an error only."""
    before, offset, start = 0, 0, _line_start(file, piece)
    while offset < start:
        block = file.read_at(offset, min(READ_BYTES, start - offset))
        before += block.count(b"\n")
        offset += len(block) or start
    return before + line


def _read_compressed(
    file: RandomAccess, piece: Piece, position: Position, bad: BadDocuments
) -> Iterator[tuple[str, Position]]:
    """Lines of gzip members or zstd frames; a position names its member, so that none before it is decompressed."""
    shard = piece.shard
    frames = _Frames(file, position.frame, shard)
    line, offset = position.line, position.offset  # bytes of text since ``position.frame``
    try:
        with io.BufferedReader(frames, READ_BYTES) as text_file:
            _skip(text_file, offset)
            for raw in text_file:
                offset += len(raw)
                line += 1
                if (line - 1) % piece.stride != piece.phase:
                    continue
                try:
                    text = _document(raw, shard.text_column)
                except ValueError as error:
                    bad.add(BadDocument(str(shard.path), line, str(error)))
                    continue
                if text is not None:
                    begin, frame = frames.frame_at(offset)
                    yield text, Position(offset - begin, line, frame)
    except frames.damage as error:
        raise _Damage(line + 1, error) from error


def _skip(file: Any, size: int) -> None:
    while size and (chunk := file.read(min(READ_BYTES, size))):
        size -= len(chunk)


class _Frames(io.RawIOBase):
    """The text of a compressed file from one gzip member or zstd frame on, which knows where each one began.

    The zstandard package's own ``stream_reader`` ends a truncated frame without an error, as nothing here may.
    """

    def __init__(self, file: RandomAccess, frame: int, shard: Shard) -> None:
        self._file, self._shard = file, shard
        self._next_read = frame  # byte of the file
        self._text_bytes = 0
        self._starts = [(0, frame)]  # (byte of the text, byte of the file) of the frames that are still needed
        self._frame: Any = None
        self._input = self._output = memoryview(b"")
        self.damage: tuple[type[Exception], ...] = (EOFError, zlib.error)
        if shard.format == "zst":
            import zstandard

            decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
            self._new_frame: Any = decompressor.decompressobj
            self.damage = (EOFError, zstandard.ZstdError)
        else:
            self._new_frame = lambda: zlib.decompressobj(wbits=31)

    def readable(self) -> bool:
        return True

    def frame_at(self, text_byte: int) -> tuple[int, int]:
        """Where the frame that holds a byte of the text begins: in the text and in the file. Must not go backwards."""
        if text_byte == self._text_bytes and not self._output:
            # At the end of a frame: the next one is named whatever was read ahead, so that a position is one position.
            with contextlib.suppress(*self.damage):  # raised again by the next read
                self._decompress()
        while len(self._starts) > 1 and self._starts[1][0] <= text_byte:
            del self._starts[0]
        return self._starts[0]

    def readinto(self, buffer: Any) -> int:
        if not self._output and not self._decompress():
            return 0
        size = min(len(buffer), len(self._output))
        buffer[:size], self._output = self._output[:size], self._output[size:]
        return size

    def _decompress(self) -> bool:
        """Fills the empty output; False at the end of the file."""
        while not self._output:
            if not self._input and not self._read_more():
                if self._frame is not None:
                    raise EOFError(f"the file ended inside a {self._shard.format} frame")
                return False
            if self._frame is None:
                self._frame = self._new_frame()
                self._starts.append((self._text_bytes, self._next_read - len(self._input)))
            self._output = memoryview(self._frame.decompress(self._input))
            self._text_bytes += len(self._output)
            # Zeros after a gzip member are padding.
            rest = self._frame.unused_data.lstrip(b"\0") if self._frame.eof else b""
            self._input = memoryview(rest)
            self._frame = None if self._frame.eof else self._frame
        return True

    def _read_more(self) -> bool:
        data = self._file.read_at(self._next_read, self._shard.read_bytes >> 2)
        self._next_read += len(data)
        self._input = memoryview(data)
        return bool(data)


def _read_parquet(
    file: RandomAccess, piece: Piece, position: Position, bad: BadDocuments
) -> Iterator[tuple[str, Position]]:
    """Rows of the column of texts; row groups before the position are not read."""
    import pyarrow
    import pyarrow.parquet

    shard, row = piece.shard, 0
    try:
        source = pyarrow.PythonFile(_SeekableFile(file, shard.bytes), mode="r")
        # Small buffers and no Arrow threads: many lanes have a shard open at once, and a forked loader worker must not
        # depend on its parent's thread pool.
        with pyarrow.parquet.ParquetFile(source, buffer_size=shard.read_bytes, pre_buffer=False) as table:
            try:
                column = _text_column(tuple(table.schema_arrow.names), shard.text_column)
            except ValueError as error:
                raise UserError(f"{shard.path} has {error}") from None
            num_rows = table.metadata.num_rows
            first, end = (num_rows * byte // shard.bytes for byte in (piece.begin, piece.end))
            first = max(first, position.offset)
            for group in range(table.num_row_groups):
                group_rows = table.metadata.row_group(group).num_rows
                if row + group_rows <= first or row >= end:
                    row += group_rows
                    continue
                for batch in table.iter_batches(64, row_groups=[group], columns=[column], use_threads=False):
                    for value in batch.column(0):
                        row += 1
                        if not first < row <= end:
                            continue
                        try:
                            text = _text(value.as_py(), column)  # a UnicodeDecodeError is a ValueError
                        except ValueError as error:
                            bad.add(BadDocument(str(shard.path), row, str(error)))
                            continue
                        yield text, Position(row, 0)
                    if row >= end:
                        return
    except (pyarrow.ArrowException, OSError) as error:
        raise _Damage(row + 1, error) from error


class _SeekableFile(io.RawIOBase):
    """``read_at`` as the file object that pyarrow reads from."""

    def __init__(self, file: RandomAccess, size: int) -> None:
        self._file, self._size, self._offset = file, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._offset = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._offset, os.SEEK_END: self._size}[whence]
        return self._offset

    def tell(self) -> int:
        return self._offset

    def read(self, size: int = -1) -> bytes:
        data = self._file.read_at(self._offset, max(0, self._size - self._offset) if size < 0 else size)
        self._offset += len(data)
        return data
