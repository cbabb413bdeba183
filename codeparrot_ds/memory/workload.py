"""What a memory prediction is about and what it says; shared by the formulas and the traced engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from codeparrot_ds.model.shapes import GPT2Shape

# What lies on the device at the peak, in the order in which a bar is stacked.
CATEGORIES = ("parameters", "gradients", "optimizer", "buckets", "activations", "logits", "temporary")


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One rank's training steps.

    ``ds_config`` is resolved: ``train_micro_batch_size_per_gpu`` and ``gradient_accumulation_steps`` stand in it.
    """

    shape: GPT2Shape
    ds_config: Mapping[str, Any]
    world_size: int
    seq_length: int
    attention: str = "flash"  # or "math": whole (tokens x tokens) scores
    dropout: float = 0.0
    chunked_loss: bool = False
    lean_step: bool = False  # whether steps wait for nothing: ``ds_config.facts.steps_lean``
    fused_loss: bool = False  # unless it is chunked

    @property
    def micro_batch_size(self) -> int:
        """Rows per rank and forward pass."""
        return int(self.ds_config["train_micro_batch_size_per_gpu"])

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches an optimizer step."""
        return int(self.ds_config["gradient_accumulation_steps"])


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes that one rank needs; tensors only: neither the library's own memory nor the allocator's.

    ``peak_bytes`` is the largest of the phases and the sum of ``device``.
    """

    depth: str  # "quick": formulas, or "traced": DeepSpeed's own engine on tensors without memory
    device: Mapping[str, int]  # bytes on the device at the peak, by CATEGORIES
    resident_bytes: int  # on the device between two steps
    phases: Mapping[str, int]  # peak of each of "initialization", "forward_backward" and "step"
    host_bytes: int  # of offloaded tensors and their pinned buffers
    nvme_bytes: int
    checkpoint_bytes: int  # a checkpoint of all ranks together

    @property
    def peak_bytes(self) -> int:
        """The most that is on the device at once in a training step (initialization is not counted)."""
        return max(self.phases["forward_backward"], self.phases["step"])

    @property
    def peak_phase(self) -> str:
        """``forward_backward`` or ``step``: where the peak falls."""
        return max(("forward_backward", "step"), key=lambda phase: self.phases[phase])
