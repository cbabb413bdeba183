"""The packing core: documents joined by the end-of-sequence token and cut into rows of one length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np


class Packer:
    """Packs documents' token ids into rows; what does not fill a row stays for the next document."""

    def __init__(self, seq_length: int, eos_token_id: int, dtype: np.typing.DTypeLike) -> None:
        self._eos_token_id = eos_token_id
        self._row = np.empty(seq_length, dtype)
        self._filled = 0

    @property
    def remainder(self) -> np.ndarray:
        """The tokens of the row that is not full yet, shape (fewer than seq_length,)."""
        return self._row[: self._filled].copy()

    def add(self, ids: Sequence[int] | np.ndarray, start: int = 0) -> Iterator[tuple[np.ndarray, int]]:
        """Appends one document, from token ``start`` on, and the end-of-sequence token after it.

        Yields every row that it fills, shape (seq_length,), with the number of the document's tokens (counting its
        end-of-sequence token) up to the row's end. The iterator must be exhausted before the next document.
        """
        ids = np.asarray(ids, dtype=self._row.dtype)
        taken, total = start, len(ids) + 1
        while taken < total:
            count = min(total - taken, len(self._row) - self._filled)
            piece = ids[taken : taken + count]
            self._row[self._filled : self._filled + len(piece)] = piece
            taken, self._filled = taken + count, self._filled + count
            if taken == total:
                self._row[self._filled - 1] = self._eos_token_id
            if self._filled == len(self._row):
                row, self._row, self._filled = self._row, np.empty_like(self._row), 0
                yield row, taken
