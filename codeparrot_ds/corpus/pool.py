"""Runs tasks in worker processes that die with their parent, or in this process where one worker is asked for."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import Any

from codeparrot_ds.staging import UnfinishedError

TASKS_IN_FLIGHT_PER_WORKER = 3


class WorkerPool:
    """Processes are started afresh rather than forked, because a caller may run threads (torch's, a library's pool).

    A script that builds with more than one worker therefore needs the usual ``if __name__ == "__main__":``.
    """

    def __init__(self, num_workers: int) -> None:
        self._pool: ProcessPoolExecutor | None = None
        self._num_workers = num_workers
        self._before = set(multiprocessing.active_children())

    def __enter__(self) -> WorkerPool:
        if self._num_workers > 1:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self._num_workers, mp_context=context, initializer=_start_worker)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._pool is None:
            return
        if kind is not None:
            # What is half done is worth nothing, and nobody who pressed Ctrl-C wants to wait for it.
            for process in set(multiprocessing.active_children()) - self._before:
                process.kill()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def run(self, function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        """Yield (number of the task, result) as tasks finish, in any order.

        Raises:
            UnfinishedError: a worker died.
        """
        if self._pool is None:
            for number, task in enumerate(tasks):
                yield number, function(*task)
            return
        waiting: dict[Future[Any], int] = {}
        todo = iter(enumerate(tasks))
        try:
            while True:
                while len(waiting) < self._num_workers * TASKS_IN_FLIGHT_PER_WORKER and (each := next(todo, None)):
                    waiting[self._pool.submit(function, *each[1])] = each[0]
                if not waiting:
                    return
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    yield waiting.pop(future), future.result()
        except BrokenProcessPool as error:
            raise UnfinishedError(
                "a worker process was killed, most often because memory ran out; use fewer --num-workers"
            ) from error


def _start_worker() -> None:
    """Ctrl-C reaches the whole group and ends workers at once; a parent that was killed takes them along."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.environ["RAYON_NUM_THREADS"] = "1"  # each worker has a core already
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)
