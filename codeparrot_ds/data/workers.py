"""Loader workers: processes that fill blocks of rows in shared memory, in lockstep with the rank that reads them.

A worker is a fork of the rank that never touches torch. Rows cross in memory that both see, so that a row costs one
copy; through a pipe go only the number of a finished block and what was skipped for it. The rank hands an emptied block
back through another pipe, whose end is also how a worker learns that the rank is gone.
"""

from __future__ import annotations

import contextlib
import mmap
import multiprocessing
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import NamedTuple, NoReturn

import numpy as np

from codeparrot_ds.data.shards import BadDocument, BadDocuments
from codeparrot_ds.data.stream import STATE_FIELDS, Lane, LaneStates, StreamConfig
from codeparrot_ds.errors import UserError
from codeparrot_ds.supervision.process_end import STOP_SIGNALS

START_SECONDS = 20.0
"""What a worker may take to run its first line; it takes milliseconds, also on a busy machine."""
START_ATTEMPTS = 5


class Block(NamedTuple):
    """Some rounds over some lanes: a row of each lane in turn, again and again."""

    rows: np.ndarray
    """Shape (rounds, lanes, seq_length), the encoder's dtype."""
    states: np.ndarray
    """The lanes after each row, shape (rounds, lanes, data sets, fields), int64."""


class BlockMaker:
    """Fills blocks with the rows of some lanes, in this process."""

    def __init__(
        self, config: StreamConfig, lanes: Sequence[int], states: Sequence[LaneStates], bad: BadDocuments
    ) -> None:
        self._lanes = [Lane(config, lane, state, bad) for lane, state in zip(lanes, states, strict=True)]

    def fill(self, block: Block) -> None:
        for place, lane in enumerate(self._lanes):
            lane.take(block.rows[:, place], block.states[:, place])


def block_shapes(config: StreamConfig, rounds: int, num_lanes: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of a block's rows and states."""
    return (rounds, num_lanes, config.seq_length), (rounds, num_lanes, len(config.datasets), len(STATE_FIELDS))


class Worker:
    """A process that serves some lanes.

    Args:
        num_blocks: blocks that it may be ahead.
    """

    def __init__(
        self,
        config: StreamConfig,
        lanes: Sequence[int],
        states: Sequence[LaneStates],
        *,
        rounds: int,
        num_blocks: int,
        others: Sequence[Worker] = (),
    ) -> None:
        self._blocks = _shared_blocks(config, rounds, len(lanes), num_blocks)
        self._read: int | None = None
        self._pid: int | None = None
        bad = BadDocuments(config.max_bad_documents)
        # A lock that another thread holds at the moment of a fork stays locked in the child for ever. Seen with Python
        # 3.11, which takes one of its own before it has made them anew (_PyThreadState_DeleteExcept): rarely, a child
        # hangs before its first line.
        for _ in range(START_ATTEMPTS):
            if self._fork(lambda: BlockMaker(config, lanes, states, bad), bad, others):
                break
            self.close()
        else:
            raise RuntimeError(f"a loader worker did not start within {START_SECONDS:g} s, {START_ATTEMPTS} times")
        for number in range(num_blocks):
            self._emptied.send_bytes(bytes([number]))

    def _fork(self, make: Callable[[], BlockMaker], bad: BadDocuments, others: Sequence[Worker]) -> bool:
        """Makes the process and its pipes; false where it has not begun in time."""
        self._finished, finished = multiprocessing.Pipe(duplex=False)
        emptied, self._emptied = multiprocessing.Pipe(duplex=False)
        # Flushed, or what Python holds back would be written by both processes.
        sys.stdout.flush()
        sys.stderr.flush()
        with warnings.catch_warnings():
            # Python warns of forks beside threads. The child runs NumPy and the encoder only, and takes no locks that
            # the rank's other threads (gloo's, NCCL's, the trackers') may hold.
            warnings.simplefilter("ignore", DeprecationWarning)
            self._pid = os.fork()
        if self._pid == 0:
            for worker in (self, *others):
                worker._finished.close()
                worker._emptied.close()
            _serve(make, bad, self._blocks, emptied, finished)
        finished.close()
        emptied.close()
        if not self._finished.poll(START_SECONDS):
            return False
        with contextlib.suppress(EOFError):  # it was killed: said where its first block is asked for
            self._finished.recv_bytes()
        return True

    def next_block(self) -> tuple[Block, list[BadDocument]]:
        """The next block, valid until the call after it, and the documents that had to be skipped for it.

        Raises a UserError where the worker met one, and a RuntimeError with the worker's traceback for anything else.
        """
        if self._read is not None:
            with contextlib.suppress(BrokenPipeError):  # the worker has ended: said below
                self._emptied.send_bytes(bytes([self._read]))
            self._read = None
        try:
            answer = self._finished.recv()
        except EOFError:
            raise UserError(f"A loader worker was killed ({self._end()}); the machine may be out of memory.") from None
        if isinstance(answer, UserError):
            raise answer
        if isinstance(answer, str):
            raise RuntimeError(f"a loader worker failed:\n{answer}")
        self._read, bad = answer
        return self._blocks[self._read], bad

    def _end(self) -> str:
        if self._pid is None:
            return "it was closed"
        # The process stays to be waited for: `kill` in another thread must not hit a stranger with its number.
        end = os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOWAIT)
        assert end is not None  # there is no WNOHANG
        code = end.si_status
        return f"exit code {code}" if end.si_code == os.CLD_EXITED else signal.Signals(code).name

    def kill(self) -> None:
        """Ends the process, and with it a wait for its next block; it holds nothing that needs an orderly end."""
        if self._pid is not None:
            os.kill(self._pid, signal.SIGKILL)

    def close(self) -> None:
        """Ends the process and forgets it; nobody may be waiting for its next block."""
        self.kill()
        if self._pid is not None:
            os.waitpid(self._pid, 0)
            self._pid = None
        self._finished.close()
        self._emptied.close()


def _shared_blocks(config: StreamConfig, rounds: int, num_lanes: int, num_blocks: int) -> list[Block]:
    row_shape, state_shape = block_shapes(config, rounds, num_lanes)
    row_bytes = int(np.prod(row_shape)) * config.encoder.dtype.itemsize
    state_bytes = int(np.prod(state_shape)) * 8
    row_bytes += -row_bytes % 64
    memory = mmap.mmap(-1, num_blocks * (row_bytes + state_bytes))
    blocks = []
    for number in range(num_blocks):
        offset = number * (row_bytes + state_bytes)
        rows = np.ndarray(row_shape, config.encoder.dtype, buffer=memory, offset=offset)
        states = np.ndarray(state_shape, np.int64, buffer=memory, offset=offset + row_bytes)
        blocks.append(Block(rows, states))
    return blocks


def _serve(
    make: Callable[[], BlockMaker],
    bad: BadDocuments,
    blocks: Sequence[Block],
    emptied: Connection,
    finished: Connection,
) -> NoReturn:
    """The life of a worker process."""
    try:
        finished.send_bytes(b"here")
        # A signal to all of a job is the rank's to answer: it needs rows until it has saved; then it ends this process.
        for each in (*STOP_SIGNALS, signal.SIGHUP):
            signal.signal(each, signal.SIG_IGN)
        # One core's worth of work; and the tokenizers library warns of a fork unless this is set.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        maker = make()
        while True:
            number = emptied.recv_bytes()[0]
            maker.fill(blocks[number])
            finished.send((number, bad.take_new()))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the rank is gone
    except UserError as error:
        _tell(finished, error)
    except BaseException:
        _tell(finished, traceback.format_exc())
    finally:
        # Not sys.exit: the exit handlers, threads and buffers are the rank's.
        os._exit(0)


def _tell(finished: Connection, answer: UserError | str) -> None:
    with contextlib.suppress(OSError):  # the rank is gone
        finished.send(answer)
