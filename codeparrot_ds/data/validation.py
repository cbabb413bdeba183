"""Validation: one exact pass over the documents, with the same rows at any world size.

Lanes as in the training stream, but unshuffled and with an end: a lane packs its documents in order, and its last
partial row is padded. Row i of lane l has the global index ``i * num_lanes + l``; lanes that have ended leave gaps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from codeparrot_ds.data.encoder import Encoder
from codeparrot_ds.data.packing import Packer
from codeparrot_ds.data.shards import BadDocuments, Shard, read_documents
from codeparrot_ds.data.stream import lane_pieces

if TYPE_CHECKING:
    import torch


IGNORED_LABEL = -100
ENCODE_BATCH = 16
"""Documents of a lane encoded at once, over all cores that the tokenizer may use."""


class ValidationRow(NamedTuple):
    """One packed row of validation text."""

    ids: np.ndarray
    """Shape (seq_length,), the encoder's dtype; padded with the end-of-sequence token."""
    num_valid_tokens: int
    """Tokens before the padding."""


class ValidationLoader:
    """One pass over this rank's share of the validation documents, each time that it is iterated.

    Yields (input_ids, labels), both torch.long of shape (rows, seq_length) with at most ``batch_size`` rows; labels are
    the ids (a Hugging Face model shifts them itself) with -100 where a row is padded. Rank r has the lanes l with
    ``l % world_size == r``: ranks may have different numbers of batches, even none.

    Args:
        max_rows: only rows with a global index below it, the same ones at any world size; None or -1 for all.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        encoder: Encoder,
        *,
        seq_length: int,
        num_lanes: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        max_rows: int | None = None,
        max_bad_documents: int = 100,
    ) -> None:
        self._shards = shards
        self._encoder = encoder
        self._seq_length = seq_length
        self._num_lanes = num_lanes
        self._batch_size = batch_size
        self._rank, self._world_size = rank, world_size
        self._max_rows = None if max_rows == -1 else max_rows
        self.bad_documents = BadDocuments(max_bad_documents)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        import torch

        rows = self.rows()
        while batch := list(islice(rows, self._batch_size)):
            input_ids = torch.from_numpy(np.stack([row.ids for row in batch]).astype(np.int64))
            num_valid_tokens = torch.tensor([row.num_valid_tokens for row in batch])
            padding = torch.arange(self._seq_length) >= num_valid_tokens[:, None]
            yield input_ids, input_ids.masked_fill(padding, IGNORED_LABEL)

    def rows(self) -> Iterator[ValidationRow]:
        """This rank's rows in the order of their global index."""
        lanes = {lane: self._lane_rows(lane) for lane in range(self._rank, self._num_lanes, self._world_size)}
        first_index = 0
        while lanes:
            for lane in list(lanes):
                if self._max_rows is not None and first_index + lane >= self._max_rows:
                    return
                row = next(lanes[lane], None)
                if row is None:
                    del lanes[lane]
                else:
                    yield row
            first_index += self._num_lanes

    def _lane_rows(self, lane: int) -> Iterator[ValidationRow]:
        packer = Packer(self._seq_length, self._encoder.eos_token_id, self._encoder.dtype)
        documents = self._lane_documents(lane)
        while texts := list(islice(documents, ENCODE_BATCH)):
            for row in packer.add(self._encoder.encode_batch(texts)).rows:
                yield ValidationRow(row, self._seq_length)
        if len(remainder := packer.remainder):
            padding = (0, self._seq_length - len(remainder))
            yield ValidationRow(np.pad(remainder, padding, constant_values=self._encoder.eos_token_id), len(remainder))

    def _lane_documents(self, lane: int) -> Iterator[str]:
        for piece in lane_pieces(self._shards, self._num_lanes, lane):
            for text, _ in read_documents(piece, bad=self.bad_documents):
                yield text
