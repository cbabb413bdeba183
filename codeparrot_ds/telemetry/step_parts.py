"""Where the time of a step goes: forward, backward, communication, optimizer and data, in steps that are not scored.

To tell the parts apart the device is waited for after each, and every collective of DeepSpeed's is made to finish
before it returns. That takes away what a config gains by overlapping: the parts of such a step add up to more than a
step takes otherwise, and the difference is what overlapping hides.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from codeparrot_ds.engine.collectives import RING, collectives_backend, replaced_collectives

PARTS = ("data", "forward", "backward", "communication", "optimizer")


class Communication:
    """Counts and times the collectives that DeepSpeed calls while it is installed, each made to finish at once."""

    def __init__(self, backend: Any, wait: Callable[[], None]) -> None:
        self._backend, self._wait = backend, wait
        self._inside = False
        self.seconds = 0.0
        self.calls: dict[str, int] = {}
        self.payload_bytes: dict[str, int] = {}
        """Of the largest side of each collective (what is reduced, gathered or scattered), by name."""
        self.sent_bytes = 0.0
        """What a rank sends where each collective is a ring; counted from the tensors, not on the wire."""

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Puts the counter into DeepSpeed's backend, and takes it out again."""
        with replaced_collectives(self._backend, self._counted):
            yield

    def _counted(self, name: str, collective: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(collective)
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._inside:  # one collective made of others
                return collective(*args, **kwargs)
            self._inside = True
            try:
                self._wait()
                started = time.perf_counter()
                handle = collective(*args, **kwargs)
                if hasattr(handle, "wait"):
                    handle.wait()
                self._wait()
                self.seconds += time.perf_counter() - started
            finally:
                self._inside = False
            size = max((_bytes_of(value) for value in (*args, *kwargs.values())), default=0)
            ranks = torch.distributed.get_world_size(_group_of(args, kwargs))
            self.calls[name] = self.calls.get(name, 0) + 1
            self.payload_bytes[name] = self.payload_bytes.get(name, 0) + size
            self.sent_bytes += size * RING[name](ranks)
            return handle

        return call


def _bytes_of(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, (list, tuple)):
        return sum(map(_bytes_of, value))
    return 0


def _group_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    group = kwargs.get("group")
    found = [value for value in args if isinstance(value, torch.distributed.ProcessGroup)]
    return group if group is not None else next(iter(found), None)


class StepParts:
    """The seconds of each of `PARTS`, added up over steps on this rank; collectives inside a part belong to their own.

    A GPU is waited for around each part.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.communication = Communication(collectives_backend(), self._wait)
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.total_seconds = 0.0
        self.steps = 0

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Counts what happens inside to a part, less what of it is communication."""
        self._wait()
        started, communicated = time.perf_counter(), self.communication.seconds
        yield
        self._wait()
        inside = self.communication.seconds - communicated
        self.seconds[name] += time.perf_counter() - started - inside
        self.seconds["communication"] += inside

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """One optimizer step, with the counters installed."""
        self._wait()
        started = time.perf_counter()
        with self.communication.installed():
            yield
        self._wait()
        self.total_seconds += time.perf_counter() - started
        self.steps += 1

    def as_json(self) -> dict[str, Any]:
        """Means per step on this rank: seconds by part, and what was communicated."""
        steps, communication = max(1, self.steps), self.communication
        return {
            "steps": self.steps,
            "seconds": {name: seconds / steps for name, seconds in self.seconds.items()},
            "total_seconds": self.total_seconds / steps,
            "sent_bytes": communication.sent_bytes / steps,
            "payload_bytes": {name: size / steps for name, size in communication.payload_bytes.items()},
            "calls": {name: calls / steps for name, calls in communication.calls.items()},
        }
