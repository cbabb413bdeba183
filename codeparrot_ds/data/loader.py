"""Micro-batches of the training stream for one rank, prepared ahead of the step by worker processes."""

from __future__ import annotations

import atexit
import logging
import math
import multiprocessing
import os
import signal
import time
import weakref
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from codeparrot_ds.data.sources import BadDocument, BadDocuments
from codeparrot_ds.data.stream import LaneState, Row, StreamConfig, TrainingStream, check_world_size, resume_states
from codeparrot_ds.errors import UserError

logger = logging.getLogger(__name__)

PREFETCH_CHUNKS = 4
"""Chunks that a worker prepares ahead; a round of chunks is at least one micro-batch."""


class TrainingLoader:
    """Iterates over the micro-batches of one rank for ever, in the order of the run.

    Each is a torch.long tensor of shape (micro_batch_size, seq_length) on the CPU, pinned when there is a GPU. Row t
    of the rank comes from worker t modulo the number of workers, which is the largest one up to ``num_workers`` that
    divides the rank's lanes, so that no lane is read twice; 0 reads in this process. Raises a UserError for whatever
    is wrong with the data, also when a worker meets it.

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
        lane_states: Mapping[int, LaneState] | None = None,
    ) -> None:
        check_world_size(config.num_lanes, world_size)
        lanes = range(rank, config.num_lanes, world_size)
        self._states = resume_states(config, lanes, start_row, lane_states or {})
        self._micro_batch_size = micro_batch_size
        self.num_workers = max((n for n in range(1, num_workers + 1) if len(lanes) % n == 0), default=0)
        self.bad_documents = BadDocuments(config.max_bad_documents)
        self.wait_seconds = 0.0
        dataset = _ChunkDataset(
            config=config,
            num_rows=math.ceil(micro_batch_size / max(1, self.num_workers)),
            rank=rank,
            world_size=world_size,
            start_row=start_row,
            lane_states=self._states.copy(),
        )
        stopping = multiprocessing.RawValue("b", 0)
        self._chunks = [_start_workers(dataset, self.num_workers, stopping) if self.num_workers else iter(dataset)]
        self._stop = weakref.finalize(self, _stop_workers, self._chunks, stopping)
        # Registered after the exit handlers of DataLoader and multiprocessing, it runs before they wait for workers.
        atexit.register(self._stop)
        self._rows = self._ordered_rows()

    def __iter__(self) -> TrainingLoader:
        return self

    def __next__(self) -> torch.Tensor:
        start = time.perf_counter()
        rows = [next(self._rows) for _ in range(self._micro_batch_size)]
        self._states.update((row.lane, row.state) for row in rows)
        batch = torch.from_numpy(np.stack([row.ids for row in rows]).astype(np.int64))
        if torch.cuda.is_available():
            batch = batch.pin_memory()
        self.wait_seconds += time.perf_counter() - start
        return batch

    def _ordered_rows(self) -> Iterator[Row]:
        """The rank's rows: one chunk of every worker, read across."""
        while True:
            chunks = [self._next_chunk() for _ in range(max(1, self.num_workers))]
            for rows in zip(*(chunk.rows() for chunk in chunks), strict=True):
                yield from rows

    def _next_chunk(self) -> _Chunk:
        chunk = next(self._chunks[0])
        if isinstance(chunk, UserError):
            raise chunk
        for document in chunk.bad:
            self.bad_documents.add(document)
        for document in self.bad_documents.take_new():
            logger.warning("Skipped a document: %s", document)
        return chunk

    def state(self) -> dict[int, LaneState]:
        """The states of this rank's lanes after the last micro-batch handed out; what is prefetched does not count."""
        return self._states.copy()

    def counters(self) -> dict[str, int]:
        """Of this rank's lanes: the epoch (of the slowest) and documents, tokens and bytes since the run began."""
        states = self._states.values()
        return {
            "epoch": min(state.epoch for state in states),
            "documents": sum(state.documents for state in states),
            "tokens": sum(state.tokens for state in states),
            "bytes": sum(state.bytes for state in states),
            "bad_documents": len(self.bad_documents),
        }

    def close(self) -> None:
        """Ends the workers and closes the shards."""
        self._rows = iter(())
        self._stop()


class _Chunk(NamedTuple):
    """Consecutive rows of one worker, and the documents that it had to skip for them."""

    ids: np.ndarray
    lanes: list[int]
    states: list[LaneState]
    bad: list[BadDocument]

    def rows(self) -> Iterator[Row]:
        return map(Row, self.ids, self.lanes, self.states)


class _ChunkDataset(IterableDataset):
    """Chunks of ``num_rows`` rows of this worker (or of the whole rank outside a worker)."""

    def __init__(
        self,
        *,
        config: StreamConfig,
        num_rows: int,
        rank: int,
        world_size: int,
        start_row: int,
        lane_states: Mapping[int, LaneState],
    ) -> None:
        self._config = config
        self._num_rows = num_rows
        self._place: dict[str, Any] = {
            "rank": rank,
            "world_size": world_size,
            "start_row": start_row,
            "lane_states": lane_states,
        }

    def __iter__(self) -> Iterator[_Chunk | UserError]:
        worker = get_worker_info()
        bad = BadDocuments(self._config.max_bad_documents)
        share = (worker.id, worker.num_workers) if worker else (0, 1)
        try:
            rows = iter(TrainingStream(self._config, **self._place, worker=share, bad=bad))
            while True:
                chunk = [next(rows) for _ in range(self._num_rows)]
                ids, lanes, states = zip(*chunk, strict=True)
                yield _Chunk(np.stack(ids), list(lanes), list(states), bad.take_new())
        except UserError as error:
            # As a value: a DataLoader would wrap an exception in the text of a traceback.
            yield error


def _start_workers(dataset: _ChunkDataset, num_workers: int, stopping: Any) -> Iterator[_Chunk | UserError]:
    # Each worker is one core's worth of tokenizing, and the library warns at a fork unless this is set before.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    loader = DataLoader(
        dataset,
        batch_size=None,
        num_workers=num_workers,
        prefetch_factor=PREFETCH_CHUNKS,
        collate_fn=_unchanged,
        worker_init_fn=partial(_handle_signals, stopping),
        multiprocessing_context="fork",
        # Its own generator: otherwise starting workers draws from the random state that a resumed run restores.
        generator=torch.Generator(),
    )
    return iter(loader)


def _stop_workers(chunks: list[Any], stopping: Any) -> None:
    stopping.value = 1
    chunks.clear()  # the DataLoader's iterator ends its workers when the last reference to it goes


def _unchanged(chunk: Any) -> Any:
    return chunk


def _handle_signals(stopping: Any, worker: int) -> None:
    """Keeps a worker at work when Ctrl-C or a SIGTERM reaches all of a job: the rank needs its rows until it has saved.

    Once the loader is stopping, a SIGTERM ends the worker: at exit multiprocessing sends one and waits without limit.
    """

    def terminate(number: int, frame: Any) -> None:
        if stopping.value:
            os._exit(0)

    signal.signal(signal.SIGTERM, terminate)
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
