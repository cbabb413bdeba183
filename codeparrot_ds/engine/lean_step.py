"""The optimizer step of stages 0 to 2 without waiting for the device: it decides itself whether to skip and to clip.

DeepSpeed asks the device for the norm before it updates anything, so that the device idles while the host then launches
the update. Here the host launches all of it, the device leaves everything as it is where the norm is not finite, and
the host learns that when it begins the next step: by then the answer has long been there. What it has counted too much
(the schedule, Adam's steps) is taken back before anything is made of it, so every step has the rates that it has
otherwise.

Beside that it moves fewer bytes: gradients are neither copied to fp64 nor, on a rank that is alone, into buckets for
ranks that are not there; cast, unscaling and clipping are one pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from codeparrot_ds.engine.fragments import (
    create_optimizer_state,
    masters_to_working_weights,
    optimizer_step_count,
    set_optimizer_step_count,
)
from codeparrot_ds.engine.private_parts import BARE, FUSED, ZERO12, wrapper_of

SMALL = 2**16
"""Elements of gradients that are put together before they are cast: a launch costs more than a copy of them."""


def step_without_waiting(engine: Any) -> None:
    """Replaces the optimizer's step, and on a rank that is alone the reduction of gradients before it."""
    lean = engine.lean_step = LeanStep(engine)
    optimizer = engine.optimizer
    optimizer.step = lean.step
    if lean.kind == BARE:
        engine.clip_fp32_gradients = lambda: None
    if lean.alone and lean.kind == ZERO12:
        for hook in optimizer._grad_acc_hooks:  # they fill buckets
            hook.remove()
        optimizer.reduce_gradients = lambda **_: None
        optimizer.overlapping_partition_gradients_reduce_epilogue = lambda: None
    elif lean.alone:
        engine.buffered_allreduce_fallback = lambda **_: None


class LeanStep:
    """Steps of one engine whose outcome is known a step late."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.kind = wrapper_of(engine)
        self.alone = torch.distributed.get_world_size() == 1
        self._has_states = False
        self._open: _Open | None = None
        self._outcomes: list[bool] = []

    @torch.no_grad()
    def step(self, *_: Any, **__: Any) -> None:
        """Launches the update by this step's gradients, which the device leaves out where they are not finite."""
        self.settle()
        engine, optimizer, groups = self.engine, self.engine.optimizer, self.engine.basic_optimizer.param_groups
        if not self._has_states:
            create_optimizer_state(engine)
            self._has_states = True
        count = optimizer_step_count(engine)
        before = _Counted(engine.lr_scheduler.state_dict(), [group["lr"] for group in groups], count)
        gradients = [self._gradients(number) for number in range(len(groups))]
        norm = self._norm([gradient for pieces in gradients for _, gradient in pieces])
        skip = ~torch.isfinite(norm)
        factor = torch.ones_like(norm)
        if engine.gradient_clipping() > 0:
            factor = torch.clamp((norm + 1e-6) / engine.gradient_clipping(), min=1.0).reciprocal()
        steps, skipped = torch.full_like(norm, count + 1), skip.float()
        for number, group in enumerate(groups):
            masters = group["params"]
            if self.kind == BARE:
                clipped = [gradient for _, gradient in gradients[number]]
                torch._foreach_mul_(clipped, factor)
            else:
                clipped = [_flat(gradients[number], factor.view(1), masters[0])]
            gradients[number].clear()
            self._drop(number)
            states = [engine.basic_optimizer.state[master] for master in masters]
            beta1, beta2 = group["betas"]
            torch._fused_adamw_(
                masters,
                clipped,
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [steps] * len(masters),
                lr=group["lr"],
                beta1=beta1,
                beta2=beta2,
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
                found_inf=skipped,
            )
            del clipped
        masters_to_working_weights(engine)
        set_optimizer_step_count(engine, count + 1)
        engine.basic_optimizer._opt_called = True  # else torch warns of a schedule without steps
        optimizer._global_grad_norm, optimizer.overflow = norm, False
        self._open = _Open.of(skip, before)

    def settle(self) -> None:
        """Learns whether the last step was made, and takes back what was counted of one that was not; waits for it."""
        if self._open is None:
            return
        skipped, before = self._open.skipped(), self._open.before
        self._open = None
        self._outcomes.append(not skipped)
        if skipped:
            engine = self.engine
            engine.lr_scheduler.load_state_dict(before.schedule)
            for group, rate in zip(engine.basic_optimizer.param_groups, before.rates, strict=True):
                group["lr"] = rate
            set_optimizer_step_count(engine, before.steps)
            engine.skipped_steps += 1
            engine.optimizer.overflow = True

    def outcomes(self) -> list[bool]:
        """Whether each step was made that has been settled since the last call."""
        known, self._outcomes = self._outcomes, []
        return known

    def _gradients(self, number: int) -> list[tuple[int, torch.Tensor]]:
        """What this rank's part of a group's flat masters is updated by, each with its offset there; averaged."""
        optimizer = self.engine.optimizer
        if self.kind == ZERO12 and not self.alone:
            tensors = optimizer.averaged_gradients[number]
        else:
            parameters = {
                BARE: lambda: self.engine.basic_optimizer.param_groups[number]["params"],
                FUSED: lambda: optimizer.fp16_groups[number],
                ZERO12: lambda: optimizer.round_robin_bit16_groups[number],
            }[self.kind]()
            tensors = [torch.zeros_like(each) if each.grad is None else each.grad for each in parameters]
            if self.kind == ZERO12:
                return list(zip(optimizer.round_robin_bit16_offsets[number], tensors, strict=True))
        offsets, end = [], 0
        for tensor in tensors:
            offsets.append(end)
            end += tensor.numel()
        return list(zip(offsets, tensors, strict=True))

    def _drop(self, number: int) -> None:
        """Lets go of a group's gradients, which have been cast: Adam's step is where the most is held."""
        optimizer = self.engine.optimizer
        if self.kind == ZERO12:
            optimizer.averaged_gradients[number] = optimizer.all_grad_tensors[number] = None
            for parameter in optimizer.bit16_groups[number]:
                parameter.grad = None
        elif self.kind == FUSED:
            for parameter in optimizer.fp16_groups[number]:
                parameter.grad = None

    def _norm(self, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
        """The norm of the whole gradient, on the device; infinite where fp32 cannot hold its square."""
        from deepspeed import comm as dist

        if gradients[0].device.type == "cpu":
            # There fp32 loses digits over millions of squares; a GPU adds them up in blocks.
            norms = [torch.linalg.vector_norm(norms_of_rows(each), dtype=torch.float64) for each in gradients]
        else:
            norms = torch._foreach_norm(list(gradients), 2, dtype=torch.float32)
        total = torch.stack(list(norms)).square().sum().float()
        if self.kind == ZERO12 and not self.alone:
            dist.all_reduce(total, group=self.engine.optimizer.dp_process_group)
        return total.sqrt()


@dataclasses.dataclass(frozen=True)
class _Counted:
    """What the host had counted before a step."""

    schedule: dict[str, Any]
    rates: list[float]
    steps: int


@dataclasses.dataclass(frozen=True)
class _Open:
    """A step that has been launched and may have been skipped."""

    flag: torch.Tensor
    """On the host, once the event has come."""
    event: Any
    before: _Counted

    @classmethod
    def of(cls, skip: torch.Tensor, before: _Counted) -> _Open:
        from deepspeed.accelerator import get_accelerator

        flag, event = skip.to("cpu", non_blocking=True), None
        if skip.device.type != "cpu":
            event = get_accelerator().Event()
            event.record()
        return cls(flag, event, before)

    def skipped(self) -> bool:
        """Whether the device left the step out; waits for the device to know it."""
        if self.event is not None:
            self.event.synchronize()
        return bool(self.flag)


def _flat(pieces: list[tuple[int, torch.Tensor]], factor: torch.Tensor, master: torch.Tensor) -> torch.Tensor:
    """Gradients times a factor, shape (1,), where they belong in a tensor like the flat master; padding is zeros."""
    flat = torch.empty_like(master)
    runs: list[tuple[int, list[torch.Tensor]]] = []
    end = 0
    for offset, tensor in pieces:
        if offset > end:
            flat[end:offset].zero_()
        if not (runs and offset == end and max(tensor.numel(), runs[-1][1][-1].numel()) < SMALL):
            runs.append((offset, []))
        runs[-1][1].append(tensor.reshape(-1))
        end = offset + tensor.numel()
    if end < flat.numel():
        flat[end:].zero_()
    for offset, tensors in runs:
        source = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        # The factor has a dimension: then the product is in its fp32 and the cast needs no pass of its own.
        torch.mul(source, factor, out=flat[offset : offset + source.numel()])
    return flat


def norms_of_rows(tensor: torch.Tensor, width: int = 1024) -> torch.Tensor:
    """The fp32 norms of each `width` numbers of a tensor, and the last few numbers themselves."""
    numbers = tensor.detach().reshape(-1)
    whole = numbers.numel() // width * width
    norms = torch.linalg.vector_norm(numbers[:whole].view(-1, width), dim=1, dtype=torch.float32)
    return torch.cat([norms, numbers[whole:].float()])
