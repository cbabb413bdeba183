"""Micro-batches of the training stream for one rank, prepared beside it while it trains."""

from __future__ import annotations

import atexit
import logging
import math
import queue
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from codeparrot_ds.data.shards import BadDocuments, open_shard
from codeparrot_ds.data.stream import STATE_FIELDS, LaneState, LaneStates, StreamConfig, lanes_in_turn, resume_states
from codeparrot_ds.data.workers import Block, BlockMaker, Worker, block_shapes

logger = logging.getLogger(__name__)

BLOCK_ROWS, FAST_BLOCK_ROWS = 64, 512
"""Rows that a worker prepares at once, without and with the fast encoder: enough that handing them over costs nothing,
few enough that the first are there soon."""
BLOCKS_AHEAD = 6
"""Blocks that a worker may be ahead; they hold at least two micro-batches."""
BATCHES_AHEAD = 8
"""Micro-batches put together in advance: some milliseconds of the fastest steps, in which a busy machine may let this
process wait for a core."""


class TrainingLoader:
    """Iterates over the micro-batches of one rank for ever, in the order of the run.

    Each is a tensor of token ids of shape (micro_batch_size, seq_length) on the CPU, pinned when there is a GPU, in the
    integers that ``token_ids`` widens on the device: a quarter of the bytes of torch.long. The rank's lanes are shared
    by ``num_workers`` processes (at most one per lane; 0: this process reads when a micro-batch is asked for), and a
    thread puts their rows together ahead of the rank. Raises a UserError for whatever is wrong with the data, also when
    a worker meets it.
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
        self._seq_length = config.seq_length
        # Of each lane in turn, after the last micro-batch handed out; shape (lanes, data sets, fields).
        self._states = np.stack([np.stack([state.to_array() for state in states[lane]]) for lane in self._lanes])
        self.bad_documents = BadDocuments(config.max_bad_documents)
        self.num_workers = min(num_workers, len(self._lanes))
        self.wait_seconds = 0.0
        """Spent waiting for micro-batches so far."""
        self._failure: Exception | None = None
        rows = _RankRows(config, self._lanes, states, self.bad_documents, self.num_workers, micro_batch_size)
        self._batches = _BatchesAhead(rows) if self.num_workers else rows
        self._stop = weakref.finalize(self, self._batches.close)
        # Registered after other exit handlers, it runs before them: none waits for a worker.
        atexit.register(self._stop)

    def __iter__(self) -> TrainingLoader:
        return self

    def __next__(self) -> torch.Tensor:
        if self._failure is not None:
            raise self._failure
        start = time.perf_counter()
        try:
            batch, self._states = self._batches.next_batch()
        except Exception as error:
            self._failure = error  # and whoever asks again gets it again, not the end of an iterator
            raise
        self.wait_seconds += time.perf_counter() - start
        return batch

    @property
    def lanes(self) -> Sequence[int]:
        """This rank's lanes in turn: its t-th row since the start comes from the (t modulo count)-th."""
        return self._lanes

    def places(self) -> np.ndarray:
        """The states of ``state()`` as one array, shape (lanes, data sets, fields), for ``stream.describe_place``.

        It costs nothing and stays what it is: the next micro-batch brings another.
        """
        return self._states

    def state(self) -> dict[int, LaneStates]:
        """The states of this rank's lanes after the last micro-batch handed out; what is prefetched does not count."""
        return {
            lane: tuple(map(LaneState.from_array, values))
            for lane, values in zip(self._lanes, self._states, strict=True)
        }

    def counters(self) -> dict[str, int]:
        """Of this rank's lanes: the epoch (of the slowest) and what they have handed out since the run began.

        Documents, characters, bytes and ``tokens_of_documents`` count finished documents, ``tokens`` all.
        """
        counts = {name: self._states[..., STATE_FIELDS.index(name)] for name in STATE_FIELDS}
        return {
            "epoch": int(counts["epoch"].min()),
            **{name: int(counts[name].sum()) for name in ("documents", "characters", "bytes", "tokens")},
            "tokens_of_documents": int((counts["tokens"] - counts["token"]).sum()),
            "bad_documents": len(self.bad_documents),
        }

    def rows_per_lane(self) -> dict[int, int]:
        """Rows that each of this rank's lanes has handed out since the run began."""
        tokens = self._states[..., STATE_FIELDS.index("tokens")].sum(axis=1)
        return dict(zip(self._lanes, (tokens // self._seq_length).tolist(), strict=True))

    def close(self) -> None:
        """Ends the workers and closes the shards."""
        self._stop()
        self._failure = self._failure or RuntimeError("the loader is closed")


class _Batch(NamedTuple):
    rows: torch.Tensor
    states: np.ndarray
    """The rank's lanes in turn after these rows, shape (lanes, data sets, fields)."""


class _RankRows:
    """Puts the rows of all lanes of a rank together, from the blocks that workers fill, or fills them itself."""

    def __init__(
        self,
        config: StreamConfig,
        lanes: Sequence[int],
        states: Mapping[int, LaneStates],
        bad: BadDocuments,
        num_workers: int,
        micro_batch_size: int,
    ) -> None:
        self._config, self._lanes, self._bad, self._micro_batch_size = config, lanes, bad, micro_batch_size
        # After the rows before the current blocks.
        self._states = np.stack([np.stack([state.to_array() for state in states[lane]]) for lane in lanes])
        self._blocks: list[Block] = []  # one of every maker, read across
        self._taken = self._available = 0  # rows of the blocks that were handed out, and that they have
        shares = _shares(lanes, max(1, num_workers))
        block_rows = BLOCK_ROWS if config.encoder.name == "tokenizers" else FAST_BLOCK_ROWS
        self._rounds = math.ceil(block_rows / len(shares[0]))
        self._makers: list[Worker | BlockMaker] = []
        if num_workers:
            self._start_workers(shares, states)
        else:
            self._makers.append(BlockMaker(config, lanes, [states[lane] for lane in lanes], bad))

    def _start_workers(self, shares: Sequence[Sequence[int]], states: Mapping[int, LaneStates]) -> None:
        rank_rows = self._rounds * len(self._lanes)
        # At most 255: a block's number crosses the pipe in one byte.
        num_blocks = min(255, max(BLOCKS_AHEAD, 1 + math.ceil(2 * self._micro_batch_size / rank_rows)))
        for shard in {dataset.shards[0] for dataset in self._config.datasets if dataset.shards[0].remote}:
            open_shard(shard)  # imports what reading from the Hub needs: not for a child forked beside threads to do
        workers: list[Worker] = []
        for share in shares:
            own = [states[lane] for lane in share]
            workers.append(Worker(self._config, share, own, rounds=self._rounds, num_blocks=num_blocks, others=workers))
        self._makers += workers

    def next_batch(self) -> _Batch:
        """The next micro-batch, in memory of its own."""
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
        return _Batch(batch, self._current())

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
                self._bad.add(document)
        else:
            row_shape, state_shape = block_shapes(self._config, self._rounds, len(self._lanes))
            block = Block(np.empty(row_shape, self._config.encoder.dtype), np.empty(state_shape, np.int64))
            maker.fill(block)
        for document in self._bad.take_new():
            logger.warning("Skipped a document: %s", document)
        return block

    def _current(self) -> np.ndarray:
        """The lanes' states after the last rows taken, shape (lanes, data sets, fields)."""
        if not self._taken:
            return self._states.copy()
        rounds, rest = divmod(self._taken, len(self._lanes))
        states = self._states_of(rounds - 1) if rounds else self._states.copy()
        if rest:
            states[:rest] = self._states_of(rounds)[:rest]
        return states

    def _states_of(self, turn: int) -> np.ndarray:
        return np.concatenate([block.states[turn] for block in self._blocks])

    def kill_workers(self) -> None:
        """Ends the worker processes, and with them a wait for their rows."""
        for maker in self._makers:
            if isinstance(maker, Worker):
                maker.kill()

    def close(self) -> None:
        """Ends the workers and closes the shards."""
        while self._makers:
            maker = self._makers.pop()
            if isinstance(maker, Worker):
                maker.close()


class _BatchesAhead:
    """Up to ``BATCHES_AHEAD`` micro-batches that a thread has put together, each with the states after it."""

    def __init__(self, rows: _RankRows) -> None:
        self._rows = rows
        self._ready: queue.SimpleQueue[_Batch | Exception] = queue.SimpleQueue()
        self._free = threading.Semaphore(BATCHES_AHEAD)
        self._closing = False
        self._device = torch.cuda.current_device() if torch.cuda.is_available() else None
        self._thread = threading.Thread(target=self._work, name="batches-ahead", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        if self._device is not None:
            torch.cuda.set_device(self._device)  # or pinned memory would open the first GPU for every rank
        try:
            while self._free.acquire() and not self._closing:
                self._ready.put(self._rows.next_batch())
        except Exception as error:  # the rank's to raise, whatever it is
            self._ready.put(error)

    def next_batch(self) -> _Batch:
        """The next micro-batch. Raises what went wrong while it was made."""
        ready = self._ready.get()
        if isinstance(ready, Exception):
            raise ready
        self._free.release()
        return ready

    def close(self) -> None:
        """Ends thread and workers."""
        self._closing = True
        self._free.release()
        self._rows.kill_workers()
        self._thread.join()
        self._rows.close()


def token_ids(batch: torch.Tensor) -> torch.Tensor:
    """Token ids as torch.long, on the batch's device, from the integers that a micro-batch travels in."""
    ids = batch.long()
    return ids & 0xFFFF if batch.dtype == torch.int16 else ids


def _shares(lanes: Sequence[int], count: int) -> list[Sequence[int]]:
    """Consecutive lanes for each worker, as equal as can be, the largest share first."""
    size, rest = divmod(len(lanes), count)
    ends = [size * (number + 1) + min(number + 1, rest) for number in range(count)]
    return [lanes[start:end] for start, end in zip([0, *ends], ends, strict=False)]
