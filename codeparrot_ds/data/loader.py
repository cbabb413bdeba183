"""Micro-batches of the training stream for one rank, prepared by worker processes while the rank trains."""

from __future__ import annotations

import atexit
import logging
import math
import time
import weakref
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from codeparrot_ds.data.sources import BadDocuments, open_shard
from codeparrot_ds.data.stream import (
    STATE_FIELDS,
    LaneState,
    LaneStates,
    StreamConfig,
    lanes_in_turn,
    resume_states,
)
from codeparrot_ds.data.workers import Block, BlockMaker, Worker, block_shapes

logger = logging.getLogger(__name__)

BLOCK_ROWS, FAST_BLOCK_ROWS = 64, 512
"""Rows that a worker prepares at once, without and with the fast encoder: enough that handing them over costs nothing,
few enough that the first are there soon."""
BLOCKS_AHEAD = 6
"""Blocks that a worker may be ahead; they hold at least two micro-batches."""


class TrainingLoader:
    """Iterates over the micro-batches of one rank for ever, in the order of the run.

    Each is a tensor of token ids of shape (micro_batch_size, seq_length) on the CPU, pinned when there is a GPU, in the
    integers that ``token_ids`` widens on the device: a quarter of the bytes of torch.long. The rank's lanes are shared
    by ``num_workers`` processes (at most one a lane; 0 reads in this process). Raises a UserError for whatever is wrong
    with the data, also when a worker meets it.

    Attributes:
        wait_seconds: time spent waiting for micro-batches so far.
        bad_documents: the documents that this rank could not read.
    """

    def __init__(
        self,
        config: StreamConfig,
        *,
        micro_batch_size: int,
        num_workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        start_row: int = 0,
        lane_states: Mapping[int, LaneStates] | None = None,
    ) -> None:
        self._lanes = lanes_in_turn(config, rank=rank, world_size=world_size, start_row=start_row)
        states = resume_states(config, self._lanes, start_row, lane_states or {})
        self._config, self._micro_batch_size = config, micro_batch_size
        self.bad_documents = BadDocuments(config.max_bad_documents)
        self.wait_seconds = 0.0
        # Of each lane in turn, after the rows before the current blocks; shape (lanes, data sets, fields).
        self._states = np.stack([np.stack([state.to_array() for state in states[lane]]) for lane in self._lanes])
        self._blocks: list[Block] = []  # one of every maker, read across
        self._taken = self._available = 0  # rows of the blocks that were handed out, and that they have
        self._makers = self._start(min(num_workers, len(self._lanes)), states)
        self._stop = weakref.finalize(self, _close, self._makers)
        # Registered after other exit handlers, it runs before them: none waits for a worker.
        atexit.register(self._stop)

    @property
    def num_workers(self) -> int:
        """Worker processes."""
        return sum(isinstance(maker, Worker) for maker in self._makers)

    def _start(self, num_workers: int, states: Mapping[int, LaneStates]) -> list[Worker | BlockMaker]:
        shares = _shares(self._lanes, max(1, num_workers))
        block_rows = BLOCK_ROWS if self._config.encoder.name == "tokenizers" else FAST_BLOCK_ROWS
        self._rounds = math.ceil(block_rows / len(shares[0]))
        if not num_workers:
            lanes = self._lanes
            return [BlockMaker(self._config, lanes, [states[lane] for lane in lanes], self.bad_documents)]
        rank_rows = self._rounds * len(self._lanes)
        num_blocks = min(255, max(BLOCKS_AHEAD, 1 + math.ceil(2 * self._micro_batch_size / rank_rows)))
        for shard in {dataset.shards[0] for dataset in self._config.datasets if dataset.shards[0].remote}:
            open_shard(shard)  # imports what reading from the Hub needs: not for a child forked beside threads to do
        workers: list[Worker] = []
        for share in shares:
            own = [states[lane] for lane in share]
            workers.append(Worker(self._config, share, own, rounds=self._rounds, num_blocks=num_blocks, others=workers))
        return [*workers]

    def __iter__(self) -> TrainingLoader:
        return self

    def __next__(self) -> torch.Tensor:
        start = time.perf_counter()
        config = self._config
        shape = (self._micro_batch_size, config.seq_length)
        signed = np.dtype(f"i{config.encoder.dtype.itemsize}")
        batch = torch.empty(shape, dtype=getattr(torch, signed.name), pin_memory=torch.cuda.is_available())
        # torch knows unsigned integers in a few places only: the bits are kept, `token_ids` reads them again.
        rows = batch.numpy().view(config.encoder.dtype)
        filled = 0
        while filled < len(rows):
            if self._taken == self._available:
                self._next_blocks()
            filled += self._copy_next(rows[filled:])
        self.wait_seconds += time.perf_counter() - start
        return batch

    def _copy_next(self, rows: np.ndarray) -> int:
        """Copies consecutive rows of one block; returns how many."""
        turn, place = divmod(self._taken, len(self._lanes))
        for block in self._blocks:
            lanes = block.rows.shape[1]
            if place < lanes:
                count = min(len(rows), lanes - place)
                rows[:count] = block.rows[turn, place : place + count]
                self._taken += count
                return count
            place -= lanes
        raise AssertionError("the blocks have every lane of the rank")

    def _next_blocks(self) -> None:
        """Gives the blocks back, whose memory is their makers' again, and takes the next one of every maker."""
        self._states = self._current()
        self._blocks, self._taken, self._available = [], 0, 0  # also the truth when a maker raises
        self._blocks = [self._next_block(maker) for maker in self._makers]
        self._available = self._rounds * len(self._lanes)

    def _next_block(self, maker: Worker | BlockMaker) -> Block:
        if isinstance(maker, Worker):
            block, bad = maker.next_block()
            for document in bad:
                self.bad_documents.add(document)
        else:
            row_shape, state_shape = block_shapes(self._config, self._rounds, len(self._lanes))
            block = Block(np.empty(row_shape, self._config.encoder.dtype), np.empty(state_shape, np.int64))
            maker.fill(block)
        for document in self.bad_documents.take_new():
            logger.warning("Skipped a document: %s", document)
        return block

    def _current(self) -> np.ndarray:
        """The lanes' states after the last micro-batch handed out, shape (lanes, data sets, fields)."""
        if not self._taken:
            return self._states.copy()
        rounds, rest = divmod(self._taken, len(self._lanes))
        states = self._states_of(rounds - 1) if rounds else self._states.copy()
        if rest:
            states[:rest] = self._states_of(rounds)[:rest]
        return states

    def _states_of(self, turn: int) -> np.ndarray:
        return np.concatenate([block.states[turn] for block in self._blocks])

    def state(self) -> dict[int, LaneStates]:
        """The states of this rank's lanes after the last micro-batch handed out; what is prefetched does not count."""
        current = self._current()
        return {
            lane: tuple(map(LaneState.from_array, values)) for lane, values in zip(self._lanes, current, strict=True)
        }

    def counters(self) -> dict[str, int]:
        """Of this rank's lanes: the epoch (of the slowest) and what they have handed out since the run began.

        Documents, characters, bytes and ``tokens_of_documents`` count finished documents, ``tokens`` all.
        """
        current = self._current()
        counts = {name: current[..., STATE_FIELDS.index(name)] for name in STATE_FIELDS}
        return {
            "epoch": int(counts["epoch"].min()),
            **{name: int(counts[name].sum()) for name in ("documents", "characters", "bytes", "tokens")},
            "tokens_of_documents": int((counts["tokens"] - counts["token"]).sum()),
            "bad_documents": len(self.bad_documents),
        }

    def rows_per_lane(self) -> dict[int, int]:
        """Rows that each of this rank's lanes has handed out since the run began."""
        tokens = self._current()[..., STATE_FIELDS.index("tokens")].sum(axis=1)
        return dict(zip(self._lanes, (tokens // self._config.seq_length).tolist(), strict=True))

    def close(self) -> None:
        """Ends the workers and closes the shards."""
        self._stop()


def token_ids(batch: torch.Tensor) -> torch.Tensor:
    """Token ids as torch.long, on the batch's device, from the integers that a micro-batch travels in."""
    ids = batch.long()
    return ids & 0xFFFF if batch.dtype == torch.int16 else ids


def _shares(lanes: Sequence[int], count: int) -> list[Sequence[int]]:
    """Consecutive lanes for each worker, as equal as can be, the largest share first."""
    size, rest = divmod(len(lanes), count)
    ends = [size * (number + 1) + min(number + 1, rest) for number in range(count)]
    return [lanes[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def _close(makers: list[Worker | BlockMaker]) -> None:
    while makers:
        maker = makers.pop()
        if isinstance(maker, Worker):
            maker.close()
