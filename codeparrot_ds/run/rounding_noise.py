"""Rounding errors put into a model on purpose: how far they carry is what a comparison's bands are made of.

Monte Carlo arithmetic (D. S. Parker, 1997): the result of an operation is moved at random within its rounding error,
and what comes out tells how sure the result is. Here an operation is a layer: what each hands on, forwards and
backwards, is multiplied by a random number within one spacing of the precision around 1, afresh at every step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

SPACING = {"fp32": 2.0**-23, "fp16": 2.0**-10, "bf16": 2.0**-7}
"""Distance of neighbouring numbers, relative to them: twice the largest error of one rounding."""


class _Noise(torch.autograd.Function):
    """Multiplies values by 1 ± ``relative``, uniform, and their gradients by other such numbers."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, relative: float, generator: torch.Generator) -> torch.Tensor:
        ctx.relative, ctx.generator = relative, generator
        return (values.float() * factors(values, relative, generator)).to(values.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        return (gradient.float() * factors(gradient, ctx.relative, ctx.generator)).to(gradient.dtype), None, None


def factors(like: torch.Tensor, relative: float, generator: torch.Generator) -> torch.Tensor:
    """Numbers uniform in 1 ± ``relative``, in fp32, shaped as a tensor."""
    noise = torch.rand(like.shape, generator=generator, device=like.device, dtype=torch.float32)
    return (noise * 2 - 1) * relative + 1


def inject_rounding_noise(model: nn.Module, precision: str, seed: int) -> None:
    """Makes every layer of a model that has no layers of its own round at random as in a precision, from now on."""
    device = next(model.parameters()).device
    generator = torch.Generator(device=device).manual_seed(seed)
    relative = SPACING[precision]

    def round_at_random(module: nn.Module, inputs: Any, output: Any) -> Any:
        if torch.is_tensor(output) and output.is_floating_point():
            return _Noise.apply(output, relative, generator)
        return output

    for module in model.modules():
        if not any(True for _ in module.children()):
            module.register_forward_hook(round_at_random)
