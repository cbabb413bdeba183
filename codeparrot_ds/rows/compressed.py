"""The text of a compressed file, in steps of bounded size, from any of its gzip members or zstd frames on."""

from __future__ import annotations

import contextlib
import io
import zlib
from typing import Any

import zstandard

from codeparrot_ds.rows.access import RandomAccess

DAMAGE = (EOFError, zlib.error, zstandard.ZstdError)
"""What reading raises where a file cannot be decompressed."""
_GZIP_STEP_BYTES = 1 << 20
_ZSTD_STEP_BYTES, _MAX_ZSTD_STEP_BYTES = 1 << 10, 1 << 12
"""Of the file: the larger where the text is like any text. A zstd block of 4 bytes may stand for 128 KiB, and its
library returns at once all that it is given, which is 128 MiB at most."""
_USUAL_RATIO = 64


class Frames(io.RawIOBase):
    """The text of a compressed file from one gzip member or zstd frame on, which knows where each one began.

    The zstandard package's own ``stream_reader`` ends a truncated frame without an error, as nothing here may.

    Args:
        frame: byte of the file at which to begin.
        format_: ``gz`` or ``zst``.
        read_bytes: asked of the file at once.
    """

    def __init__(self, file: RandomAccess, frame: int, format_: str, read_bytes: int) -> None:
        self._file, self._format, self._read_bytes = file, format_, read_bytes
        self._next_read = frame  # byte of the file
        self._text_bytes = 0
        self._starts = [(0, frame)]  # (byte of the text, byte of the file) of the frames that are still needed
        self._frame: Any = None
        self._has_more = False  # text that the frame holds back, because a step was full
        self._input = self._output = memoryview(b"")
        self._step_bytes = _ZSTD_STEP_BYTES
        if format_ == "zst":
            decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
            self._new_frame: Any = decompressor.decompressobj
        else:
            self._new_frame = lambda: zlib.decompressobj(wbits=31)

    def readable(self) -> bool:
        return True

    def frame_at(self, text_byte: int) -> tuple[int, int]:
        """Where the frame that holds a byte of the text begins: in the text and in the file. Must not go backwards."""
        if text_byte == self._text_bytes and not self._output:
            # At the end of a frame: the next one is named whatever was read ahead, so that a position is one position.
            with contextlib.suppress(*DAMAGE):  # raised again by the next read
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
            if self._frame is None:
                # Zeros after a gzip member are padding.
                self._input = memoryview(bytes(self._input).lstrip(b"\0"))
            if not self._input and not self._has_more and not self._read_more():
                if self._frame is not None:
                    raise EOFError(f"the file ended inside a {self._format} frame")
                return False
            if self._frame is None:
                if self._input[0] == 0:
                    continue
                self._frame = self._new_frame()
                self._starts.append((self._text_bytes, self._next_read - len(self._input)))
            self._step()
        return True

    def _step(self) -> None:
        """Decompresses a little of the input."""
        if self._format == "zst":
            step = self._input[: self._step_bytes]
            output = self._frame.decompress(step)
            usual = len(output) < _USUAL_RATIO * len(step)
            self._step_bytes = min(2 * self._step_bytes, _MAX_ZSTD_STEP_BYTES) if usual else _ZSTD_STEP_BYTES
            unused = len(self._frame.unused_data) + len(self._input) - len(step)
        else:
            output = self._frame.decompress(self._input, _GZIP_STEP_BYTES)
            unused = len(self._frame.unused_data if self._frame.eof else self._frame.unconsumed_tail)
        self._has_more = self._format == "gz" and len(output) == _GZIP_STEP_BYTES and not self._frame.eof
        self._output = memoryview(output)
        self._text_bytes += len(output)
        self._input = self._input[len(self._input) - unused :]
        self._frame = None if self._frame.eof else self._frame

    def _read_more(self) -> bool:
        data = self._file.read_at(self._next_read, self._read_bytes >> 2)
        self._next_read += len(data)
        self._input = memoryview(data)
        return bool(data)
