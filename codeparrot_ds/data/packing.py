"""The packing core: documents joined by the end-of-sequence token and cut into rows of one length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class PackedRows(NamedTuple):
    """The rows that some documents filled, and where in those documents each row ends."""

    rows: np.ndarray
    """Shape (rows, seq_length)."""
    finished: np.ndarray
    """Shape (rows,): how many of the documents end, with their end-of-sequence token, within or before the row."""
    taken: np.ndarray
    """Shape (rows,): tokens that the row and those before hold of the document after those."""


class Packer:
    """Packs documents' token ids into rows; what does not fill a row stays for the next documents."""

    def __init__(self, seq_length: int, eos_token_id: int, dtype: np.typing.DTypeLike) -> None:
        self._seq_length, self._eos_token_id, self._dtype = seq_length, eos_token_id, np.dtype(dtype)
        self.remainder = np.empty(0, self._dtype)
        """The tokens of the row that is not full yet, shape (fewer than seq_length,)."""

    def add(self, documents: Sequence[Sequence[int] | np.ndarray]) -> PackedRows:
        """Appends documents, each followed by the end-of-sequence token, and returns the rows that they fill."""
        begin = len(self.remainder)
        ends = begin + np.cumsum([len(ids) + 1 for ids in documents], dtype=np.int64)
        tokens = np.empty(int(ends[-1]) if len(ends) else begin, self._dtype)
        tokens[:begin] = self.remainder
        start = begin
        for ids in documents:
            end = start + len(ids)
            tokens[start:end] = ids
            tokens[end] = self._eos_token_id
            start = end + 1
        num_rows = len(tokens) // self._seq_length
        self.remainder = tokens[num_rows * self._seq_length :].copy()
        row_ends = self._seq_length * np.arange(1, num_rows + 1)
        finished = np.searchsorted(ends, row_ends, side="right")
        next_starts = np.concatenate([[begin], ends])[finished]
        rows = tokens[: num_rows * self._seq_length].reshape(num_rows, self._seq_length)
        return PackedRows(rows, finished, row_ends - next_starts)
