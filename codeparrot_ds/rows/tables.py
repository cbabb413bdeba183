"""Rows of parquet and Arrow files: groups of rows that are read one at a time, with their texts as Python strings."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator, Sequence
from typing import Any

from codeparrot_ds.rows.access import RandomAccess
from codeparrot_ds.rows.files import Shard

_BATCH_ROWS = 64


class ParquetTable:
    """A parquet file; its groups are its row groups."""

    def __init__(self, file: RandomAccess, shard: Shard) -> None:
        import pyarrow
        import pyarrow.parquet

        source = pyarrow.PythonFile(_SeekableFile(file, shard.bytes), mode="r")
        # Small buffers and no Arrow threads: many lanes have a shard open at once, and a forked loader worker must not
        # depend on its parent's thread pool.
        self._file = pyarrow.parquet.ParquetFile(source, buffer_size=shard.read_bytes, pre_buffer=False)
        self.names: list[str] = self._file.schema_arrow.names
        metadata = self._file.metadata
        self.group_rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self.damage = ""

    def batches(self, group: int, columns: Sequence[str]) -> Iterator[Any]:
        """The record batches of a group. Raises ArrowException or OSError where it is damaged."""
        return self._file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=list(columns), use_threads=False)

    def close(self) -> None:
        self._file.close()


class ArrowTable:
    """An Arrow file, as a stream (which `datasets` writes) or with a directory; its groups are its record batches.

    It is mapped into memory, so that a batch that is passed over costs nothing where it is not compressed.
    """

    def __init__(self, shard: Shard) -> None:
        import pyarrow

        with contextlib.ExitStack() as stack:
            self._source = stack.enter_context(pyarrow.memory_map(str(shard.path)))
            self._has_directory = self._source.read(6) == b"ARROW1"
            self._begin()
            self.names: list[str] = self._reader.schema.names
            self.group_rows: list[int] = []
            self.damage = ""
            """Why the file ends behind these groups, where it is not whole."""
            try:
                while (batch := self._next_batch()) is not None:
                    self.group_rows.append(batch.num_rows)
            except (OSError, pyarrow.ArrowException) as error:
                if self._has_directory:
                    raise
                self.damage = str(error)
            self._begin()
            stack.pop_all()

    def _begin(self) -> None:
        from pyarrow import ipc

        self._source.seek(0)
        self._reader = ipc.open_file(self._source) if self._has_directory else ipc.open_stream(self._source)
        self._next = 0

    def _next_batch(self) -> Any:
        number = self._next
        self._next += 1
        if self._has_directory:
            return self._reader.get_batch(number) if number < self._reader.num_record_batches else None
        try:
            return self._reader.read_next_batch()
        except StopIteration:
            return None

    def batches(self, group: int, columns: Sequence[str]) -> Iterator[Any]:
        """The one record batch that is a group. Raises ArrowException or OSError where it is damaged."""
        if self._has_directory:
            self._next = group
        elif group < self._next:
            self._begin()
        while self._next < group:
            self._next_batch()
        yield self._next_batch().select(columns)

    def close(self) -> None:
        self._source.close()


Table = ParquetTable | ArrowTable


@contextlib.contextmanager
def open_table(file: RandomAccess, shard: Shard) -> Iterator[Table]:
    """The table that a shard is. Raises ArrowException or OSError where it is none, or damaged."""
    table = ParquetTable(file, shard) if shard.format == "parquet" else ArrowTable(shard)
    with contextlib.closing(table):
        yield table


def cells(column: Any, *, as_text: bool = True) -> list[Any]:
    """The values of an Arrow array: texts, and bytes that are UTF-8, as strings; other bytes as they are.

    Args:
        as_text: without it, what the column's type calls bytes stays bytes.
    """
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    binary = {pyarrow.string(): pyarrow.binary(), pyarrow.large_string(): pyarrow.large_binary()}
    binary[pyarrow.string_view()] = pyarrow.binary_view()
    try:
        values = column.to_pylist()
        as_text = as_text and column.type not in binary  # most are, with nothing left to do
    except UnicodeDecodeError as error:  # Arrow does not check that its strings are UTF-8
        if column.type not in binary:
            raise pyarrow.ArrowInvalid(str(error)) from error
        values, as_text = column.cast(binary[column.type]).to_pylist(), True
    return [_decoded(value) for value in values] if as_text else values


def _decoded(value: Any) -> Any:
    if not isinstance(value, bytes):
        return value
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value


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
