"""The ranks of a GPU session: processes that import torch once and take orders, replaced when one of them breaks."""

from __future__ import annotations

import contextlib
import json
import math
import os
import selectors
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import IO, Any

from codeparrot_ds.supervision.process_end import signal_at_parents_end

START_SECONDS = 120.0  # that ranks may take to import torch, beside an item's own
OTHERS_SECONDS = 10.0  # that the other ranks have once one has failed


class Workers:
    """Processes that import torch once and take orders: one per rank, replaced together when one of them breaks."""

    def __init__(self, command: list[str], ranks: int, environment: dict[str, str], log: IO[str]) -> None:
        self._command, self._ranks, self._environment, self._log = command, ranks, environment, log
        self._processes: list[subprocess.Popen] = []
        self._results: list[int] = []
        self._pending: list[bytes] = []

    @property
    def alive(self) -> bool:
        return bool(self._processes)

    def run(
        self, order: dict[str, Any], seconds: float, part: Callable[[dict[str, Any]], None], left: float = math.inf
    ) -> str | None:
        """Has every rank work on an order; returns what went wrong, if anything.

        Args:
            order: as items.py takes it.
            seconds: after these the ranks are killed; their start, and what an order has to start anew before it can
                begin, is not counted.
            part: gets each part of rank 0's result as it comes.
            left: seconds that all of it may take.
        """
        started = time.monotonic()
        end, deadline = started + left, started + seconds
        starting: set[int] = set()
        if not self._processes:
            self._start()
            starting, deadline = set(range(self._ranks)), deadline + START_SECONDS
        for process in self._processes:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # it has ended: its results say so at once
                process.stdin.write(json.dumps(order) + "\n")
                process.stdin.flush()
        ends: dict[int, dict[str, Any]] = {}
        with selectors.DefaultSelector() as selector:
            for rank, descriptor in enumerate(self._results):
                selector.register(descriptor, selectors.EVENT_READ, rank)
            while len(ends) < self._ranks:
                ready = selector.select(max(0.0, min(end, deadline) - time.monotonic()))
                if not ready:
                    break
                for key, _ in ready:
                    rank = key.data
                    for message in self._read(rank):
                        if message is None:
                            selector.unregister(key.fd)
                            ends.setdefault(rank, {"end": "failed", "error": self._how_it_ended(rank), "leaves": True})
                        elif "end" in message:
                            ends[rank] = message
                        elif "ready" in message:
                            starting.discard(rank)
                            deadline = deadline if starting else time.monotonic() + seconds
                        elif rank == 0 and "more_seconds" in message:
                            deadline += message["more_seconds"]
                        elif rank == 0:
                            part(message["part"])
                if any(end["end"] == "failed" for end in ends.values()):  # the others may wait for it for ever
                    deadline = min(deadline, time.monotonic() + OTHERS_SECONDS)
        failed = {rank: end["error"] for rank, end in ends.items() if end["end"] == "failed"}
        if len(ends) < self._ranks or any(end.get("leaves") for end in ends.values()):
            self.stop()
        if failed:
            rank, error = min(failed.items())
            return error if self._ranks == 1 or error.startswith("rank ") else f"rank {rank}: {error}"
        return None if len(ends) == self._ranks else f"not done within {min(seconds, left):.0f} s"

    def _start(self) -> None:
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = str(probe.getsockname()[1])
        for rank in range(self._ranks):
            read, write = os.pipe()
            of_rank = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self._ranks, "LOCAL_WORLD_SIZE": self._ranks}
            environment = self._environment | {name: str(value) for name, value in of_rank.items()}
            self._processes.append(
                subprocess.Popen(
                    [*self._command, str(write)],
                    env=environment | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
                    stdin=subprocess.PIPE, stdout=self._log, stderr=self._log, text=True, pass_fds=(write,),
                    start_new_session=True, preexec_fn=signal_at_parents_end(signal.SIGKILL, os.getpid()),
                )
            )  # fmt: skip
            os.close(write)
            self._results.append(read)
            self._pending.append(b"")

    def _read(self, rank: int) -> Iterator[dict[str, Any] | None]:
        """The messages of a rank that are here; None once it has ended."""
        chunk = os.read(self._results[rank], 1 << 20)
        *lines, self._pending[rank] = (self._pending[rank] + chunk).split(b"\n")
        yield from map(json.loads, lines)
        if not chunk:
            yield None

    def _how_it_ended(self, rank: int) -> str:
        code = self._processes[rank].wait(timeout=OTHERS_SECONDS)
        if code >= 0:
            return f"its process ended with exit code {code}; the session's log has its last words"
        return f"its process was ended by {signal.Signals(-code).name}"

    def stop(self) -> None:
        """Ends the ranks and what they started; the next order starts new ones."""
        for process in self._processes:
            end_group(process)
        for descriptor in self._results:
            os.close(descriptor)
        self._processes, self._results, self._pending = [], [], []


def end_group(process: subprocess.Popen) -> None:
    """Kills a process that leads a session, with all of that, and waits for it; nothing where it has ended."""
    if process.poll() is None:  # else its number may be another's by now
        os.killpg(process.pid, signal.SIGKILL)
    if process.stdin is not None:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
    process.wait()
