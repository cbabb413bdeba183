"""GELU in its tanh form, GPT-2's activation, and a faster way to train with it on a CPU."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

# GELU's tanh form is x·σ(k·(x + c·x³)): (1 + tanh u) / 2 = σ(2u).
K = 2 * math.sqrt(2 / math.pi)
C = 0.044715
# A thread's share of the elements that pass through the operations below together: smaller ones are done sooner than
# the threads are called, larger ones leave the caches.
CHUNK = 2**18


class TanhGELU(nn.Module):
    """``gelu_pytorch_tanh``, which is ``gelu_new`` with fewer activations kept."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Any shape -> the same."""
        # In evaluation the kernel of whoever loads the export: the same loss to the last bit.
        if self.training and _sigmoid_is_faster(values):
            return SigmoidGELU.apply(values)
        return F.gelu(values, approximate="tanh")


def _sigmoid_is_faster(values: torch.Tensor) -> bool:
    """A CPU's tanh takes five times as long as its sigmoid; in 16 bits the derivative may be kept for the values."""
    return (
        values.device.type == "cpu"
        and values.element_size() == 2
        and values.requires_grad
        and values.is_contiguous()
        and not torch.compiler.is_compiling()
    )


class SigmoidGELU(torch.autograd.Function):
    """`TanhGELU` of 16-bit values, computed in fp32 by its sigmoid.

    The forward pass keeps the derivative, rounded to the values' precision, instead of the values: one sigmoid is taken
    where PyTorch takes two tanh.
    """

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        results, slopes = torch.empty_like(values), torch.empty_like(values)
        k = torch.tensor(K)
        chunk = CHUNK * torch.get_num_threads()
        for part, result, slope in zip(*(x.view(-1).split(chunk) for x in (values, results, slopes)), strict=True):
            x = part.float()
            inner = torch.add(k, x * x, alpha=K * C).mul_(x)  # k·(x + c·x³)
            sigmoid = inner.sigmoid()
            inner.mul_(3).add_(x, alpha=-2 * K)  # x times inner's derivative: k·(x + 3c·x³)
            slope.copy_(torch.ops.aten.sigmoid_backward(inner, sigmoid).add_(sigmoid))
            result.copy_(x.mul_(sigmoid))
        ctx.save_for_backward(slopes)
        return results

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (slopes,) = ctx.saved_tensors
        return gradient * slopes
