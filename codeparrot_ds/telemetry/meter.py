"""Throughput, waiting and memory between two logged steps."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from typing import Any

from codeparrot_ds.engine.engine import loss_scale
from codeparrot_ds.engine.hardware import peak_memory_bytes
from codeparrot_ds.memory.check import MemoryCheck
from codeparrot_ds.metrics import TrainingRow
from codeparrot_ds.telemetry.rank_times import RankTimes


@dataclasses.dataclass(kw_only=True)
class Meter:
    """Turns the clock into a training row."""

    loader: Any
    """The training loader, for the time that the rank waited for it and the epoch."""
    tokens_per_step: int
    """Over all ranks."""
    flops_per_token: float
    """Forward and backward (6N + 12·L·d·s)."""
    peak_flops: float
    """Of all ranks' devices together, FLOP/s."""
    device: Any
    tokens: int
    """Trained on so far."""
    step: int
    """That the last row was for; at first the step that this start begins after."""
    max_train_steps: int
    memory_check: MemoryCheck | None = None
    """On rank 0 of a GPU run."""
    rank_times: RankTimes | None = None
    """Compares the ranks; None on a single one."""

    def __post_init__(self) -> None:
        self._mark = time.perf_counter()
        self._waited = self.loader.wait_seconds
        self._paused = 0.0
        self._step_seconds = float("nan")

    def pause(self, seconds: float) -> None:
        """Leaves time that went into an evaluation or a save out of the throughput."""
        self._paused += seconds

    def row(self, step: int, loss: float, engine: Any) -> TrainingRow:
        """The training row for the steps since the last one; call it after waiting for the device.

        Collective where the ranks are compared.

        ``step_seconds``, ``data_wait_seconds`` and the throughput are means over those steps on this rank; ``loss`` and
        ``grad_norm`` are the last step's.
        """
        now, waited, steps = time.perf_counter(), self.loader.wait_seconds, step - self.step
        self._step_seconds = (now - self._mark - self._paused) / steps
        data_wait = (waited - self._waited) / steps
        self._mark, self._waited, self._paused = now, waited, 0.0
        self.step = step
        self.tokens += steps * self.tokens_per_step
        tokens_per_second = self.tokens_per_step / self._step_seconds
        norm = engine.get_global_grad_norm()
        if self.memory_check is not None:
            self.memory_check.after(step)
        compared = {}
        if self.rank_times is not None:
            compared = self.rank_times.row(steps, data_wait=data_wait, step_seconds=self._step_seconds)
        return TrainingRow(
            step=step,
            tokens=self.tokens,
            epoch=self.loader.counters()["epoch"],
            loss=loss,
            learning_rate=engine.get_lr()[0],
            grad_norm=None if norm is None else float(norm),
            tokens_per_second=tokens_per_second,
            mfu=tokens_per_second * self.flops_per_token / self.peak_flops,
            step_seconds=self._step_seconds,
            data_wait_seconds=data_wait,
            memory_bytes=peak_memory_bytes(self.device),
            skipped_steps=engine.skipped_steps,
            loss_scale=loss_scale(engine),
            **compared,
        )

    def forward(self) -> contextlib.AbstractContextManager[None]:
        """Around each forward pass of training."""
        return contextlib.nullcontext() if self.rank_times is None else self.rank_times.forward()

    def tokens_at(self, step: int) -> int:
        """Tokens trained on after ``step``."""
        return self.tokens + (step - self.step) * self.tokens_per_step

    def seconds_left(self, step: int) -> float:
        """Time to the end at the pace of the last steps; evaluations and saves come on top."""
        return (self.max_train_steps - step) * self._step_seconds
