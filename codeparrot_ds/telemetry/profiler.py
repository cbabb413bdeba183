"""``train --profile STEPS``: a trace of some steps of rank 0, and a table of where they went.

Profiled steps are slower than others (each operator is noted), and the more so the smaller the model; what the table
says of shares holds better than its seconds.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from codeparrot_ds.engine.collectives import collectives_backend, replaced_collectives
from codeparrot_ds.supervision.heartbeat import beat
from codeparrot_ds.telemetry.profile_table import COMMUNICATION, STEP, read_profile, table

# The engine's methods and the phase of a step that each is.
METHODS = {"forward": "forward", "backward": "backward", "step": "optimizer"}
# Steps of a start before the first profiled one: the first makes Adam's states, the second stage 3's prefetch plan.
WARMUP_STEPS = 3


class StepProfiler:
    """Profiles `num_steps` steps from the fourth of a start on.

    Args:
        engine: DeepSpeed's; its methods are marked while steps are profiled.
        loader: whose ``wait_seconds`` say how long a step waited for data.
        folder: the run's; ``profile/`` in it gets ``trace.json.gz`` and ``profile.json``.
        first_step: of this start.
        pause: gets the seconds that writing it all took, which are not training.
    """

    def __init__(
        self,
        *,
        engine: Any,
        loader: Any,
        device: torch.device,
        folder: Path,
        num_steps: int,
        first_step: int,
        say: Callable[..., None],
        pause: Callable[[float], None],
    ) -> None:
        self._engine, self._loader, self._device, self._say, self._pause = engine, loader, device, say, pause
        self._folder = folder / "profile"
        self._backend = collectives_backend()
        self._first = first_step + WARMUP_STEPS
        self._last = self._first + num_steps - 1
        self._stack = contextlib.ExitStack()
        self._profile: Any = None
        self._waited = 0.0

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around each step of training; notes those that are to be profiled, and says the table after the last."""
        if not self._first <= step <= self._last:
            yield
            return
        if self._profile is None:
            self._begin()
        waited = self._loader.wait_seconds
        with record_function(STEP):
            yield
            self._wait()
        self._waited += self._loader.wait_seconds - waited
        if step == self._last:
            self._end()

    def close(self) -> None:
        """Ends a profile that the run's end cut short, with the steps that it has."""
        if self._profile is not None:
            self._end()

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _begin(self) -> None:
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._wait()
        self._profile = self._stack.enter_context(profile(activities=activities))
        for method, phase in METHODS.items():
            self._stack.enter_context(_marked(self._engine, method, phase))
        self._stack.enter_context(replaced_collectives(self._backend, functools.partial(_in_range, COMMUNICATION)))

    def _end(self) -> None:
        started = time.perf_counter()
        beat("log")
        recorded, self._profile = self._profile, None
        self._stack.close()
        self._folder.mkdir(exist_ok=True)
        trace = self._folder / "trace.json.gz"
        recorded.export_chrome_trace(str(trace))
        with gzip.open(trace, "rt", encoding="utf-8") as file:
            events = json.load(file)["traceEvents"]
        found = read_profile(events, data_seconds=self._waited)
        (self._folder / "profile.json").write_text(json.dumps(found.as_json(), indent=2) + "\n", encoding="utf-8")
        self._say("profile of rank 0, %d steps from step %d: %s\n%s", found.steps, self._first, trace, table(found))
        self._pause(time.perf_counter() - started)


@contextlib.contextmanager
def _marked(owner: Any, method: str, phase: str) -> Iterator[None]:
    """Marks every call of a method while the context lasts."""
    own = vars(owner).get(method)
    setattr(owner, method, _in_range(phase, method, getattr(owner, method)))
    try:
        yield
    finally:
        if own is None:
            delattr(owner, method)
        else:
            setattr(owner, method, own)


def _in_range(phase: str, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with record_function(phase):
            return function(*args, **kwargs)

    return call
