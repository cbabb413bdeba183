"""GELU in its tanh form, GPT-2's activation, and a faster way to train with it on a CPU."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from codeparrot_ds.model.cpu_kernels import SigmoidGELU, sigmoid_is_faster


class TanhGELU(nn.Module):
    """``gelu_pytorch_tanh``, which is ``gelu_new`` with fewer activations kept."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Any shape -> the same."""
        # In evaluation the kernel of whoever loads the export: the same loss to the last bit.
        if self.training and sigmoid_is_faster(values):
            return SigmoidGELU.apply(values)
        return F.gelu(values, approximate="tanh")
