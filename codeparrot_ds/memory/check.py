"""What a run takes on its GPU beside what the memory plan said, once its memory has settled."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from codeparrot_ds.memory.workload import Memory
from codeparrot_ds.terminal import gigabytes

logger = logging.getLogger("codeparrot_ds.memory")
# Adam's moments appear in the first step, weights that stage 3 keeps gathered in the second.
SETTLED_AFTER_STEPS = 3
CLOSE = 0.05


@dataclass(frozen=True, kw_only=True)
class MeasuredMemory:
    """Bytes of one GPU as torch and the driver count them.

    Attributes:
        allocated_bytes: the most that tensors took at once.
        reserved_bytes: the most that the allocator held for them.
        reserved_at_end_bytes: what it holds now.
        used_bytes: what of the device is in use now, by this process and any other.
        device: the GPU's name.
        device_bytes: of the whole device.
    """

    allocated_bytes: int
    reserved_bytes: int
    reserved_at_end_bytes: int
    used_bytes: int
    device: str
    device_bytes: int


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


class MemoryCheck:
    """Says once, when a run's memory has settled, what was predicted and what is measured, and records both.

    Args:
        predicted: the plan's, for tensors.
        library_bytes: what libraries take through torch's allocator, as the plan's overhead has it.
        measure: gives the device's memory; `measure_gpu` of the rank's device.
        say: prints a line, ``logging`` style.
        record: keeps ``memory`` in the run's record, for ``plan --calibrate``.
        first_step: steps done before this start.
    """

    def __init__(
        self,
        predicted: Memory,
        *,
        library_bytes: int,
        measure: Callable[[], MeasuredMemory],
        say: Callable[..., None],
        record: Callable[[dict[str, Any]], None],
        first_step: int,
    ) -> None:
        self.predicted, self.library_bytes = predicted, library_bytes
        self.measure, self.say, self.record = measure, say, record
        self.first_step, self.done = first_step, False

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
