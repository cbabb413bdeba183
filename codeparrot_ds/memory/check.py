"""What a run takes on its GPU beside what the memory plan said, once its memory has settled."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import KW_ONLY, asdict, dataclass
from typing import Any

from codeparrot_ds.memory.workload import Memory
from codeparrot_ds.terminal import gigabytes

logger = logging.getLogger("codeparrot_ds.memory")
# Adam's moments appear in the first step, weights that stage 3 keeps gathered in the second.
SETTLED_AFTER_STEPS = 3
CLOSE = 0.05


@dataclass(frozen=True, kw_only=True)
class MeasuredMemory:
    """Bytes of one GPU as torch and the driver count them."""

    allocated_bytes: int
    """The most that tensors took at once."""
    reserved_bytes: int
    """The most that the allocator held for them."""
    reserved_at_end_bytes: int
    """What it holds now."""
    used_bytes: int
    """What of the device is in use now, by this process and any other."""
    device: str
    """The GPU's name."""
    device_bytes: int
    """Of the whole device."""


def measure_gpu(device: Any) -> MeasuredMemory:
    """The memory of a CUDA device since `forget_peak`."""
    import torch

    free, total = torch.cuda.mem_get_info(device)
    return MeasuredMemory(
        allocated_bytes=torch.cuda.max_memory_allocated(device),
        reserved_bytes=torch.cuda.max_memory_reserved(device),
        reserved_at_end_bytes=torch.cuda.memory_reserved(device),
        used_bytes=total - free,
        device=torch.cuda.get_device_name(device),
        device_bytes=total,
    )


def forget_peak(device: Any) -> None:
    """Begins the count of peaks anew: what building the engine took is not a step's."""
    import torch

    torch.cuda.reset_peak_memory_stats(device)


@dataclass
class MemoryCheck:
    """Says once, when a run's memory has settled, what was predicted and what is measured, and records both."""

    predicted: Memory
    """The plan's, for tensors."""
    _: KW_ONLY
    library_bytes: int
    """What libraries take through torch's allocator, as the plan's overhead has it."""
    measure: Callable[[], MeasuredMemory]
    """Gives the device's memory: `measure_gpu` of the rank's device."""
    say: Callable[..., None]
    """Prints a line, ``logging`` style."""
    record: Callable[[dict[str, Any]], None]
    """Keeps ``memory`` in the run's record, for ``plan --calibrate``."""
    first_step: int
    """Steps done before this start."""
    done: bool = False

    def after(self, step: int) -> None:
        """Call it after each logged step."""
        if self.done or step < self.first_step + SETTLED_AFTER_STEPS:
            return
        self.done = True
        measured, predicted = self.measure(), self.predicted.peak_bytes + self.library_bytes
        difference = measured.allocated_bytes / predicted - 1
        self.say(
            "memory: %s predicted (%s), %s measured (%+.1f%%); %s reserved, %s of %s in use on %s",
            gigabytes(predicted),
            self.predicted.depth,
            gigabytes(measured.allocated_bytes),
            100 * difference,
            gigabytes(measured.reserved_bytes),
            gigabytes(measured.used_bytes),
            gigabytes(measured.device_bytes),
            measured.device,
        )
        if abs(difference) > CLOSE:
            logger.warning(
                "the memory plan was off by %+.1f%%: `codeparrot-ds plan --trace` is exact, --calibrate learns from "
                "this run",
                100 * difference,
            )
        self.record(
            {
                "predicted_bytes": predicted,
                "library_bytes": self.library_bytes,
                "predicted_phases": dict(self.predicted.phases),
                "depth": self.predicted.depth,
                "step": step,
                **asdict(measured),
            }
        )
