"""Cross entropy that writes the gradient over the logits: two operators of PyTorch's, whose kernels are Triton's.

As operators they have a form for tensors without memory, so that the memory plan and the counted step see them.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch.nn import functional as F

logger = logging.getLogger("codeparrot_ds.loss")
_library = torch.library.Library("codeparrot_ds", "DEF")
_library.define("token_losses(Tensor logits, Tensor targets) -> (Tensor losses, Tensor statistics)")
_library.define("logits_gradient_(Tensor(a!) logits, Tensor targets, Tensor statistics, Tensor scale) -> ()")


@torch.library.impl(_library, "token_losses", "CUDA")
def _losses_by_triton(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from codeparrot_ds.model.loss_kernel import losses_of

    return losses_of(logits, targets)


@torch.library.impl(_library, "logits_gradient_", "CUDA")
def _gradient_by_triton(
    logits: torch.Tensor, targets: torch.Tensor, statistics: torch.Tensor, scale: torch.Tensor
) -> None:
    from codeparrot_ds.model.loss_kernel import gradient_in_place

    gradient_in_place(logits, targets, statistics, scale)


@torch.library.register_fake("codeparrot_ds::token_losses", lib=_library)
def _losses_without_memory(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = logits.shape[0]
    return logits.new_empty(tokens, dtype=torch.float32), logits.new_empty(tokens, 2, dtype=torch.float32)


@torch.library.register_fake("codeparrot_ds::logits_gradient_", lib=_library)
def _gradient_without_memory(*_: Any) -> None:
    return None


class FusedCrossEntropy(torch.autograd.Function):
    """Mean of -log softmax(logits)[target] over the targets that are not -100: (tokens, vocab), (tokens) -> ().

    The backward pass puts the gradient in the logits' place, scaled by what arrives before it is rounded, so that a
    loss scale keeps small gradients of fp16. The logits are gone then: autograd raises where something else had kept
    them for its own gradient, and a second backward pass raises here.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        losses, statistics = torch.ops.codeparrot_ds.token_losses(logits, targets)
        count = (targets != -100).sum()
        ctx.save_for_backward(logits, targets, statistics, count)
        ctx.is_spent = False
        return losses.sum() / count

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        if ctx.is_spent:
            raise RuntimeError(
                "a second backward pass through the fused loss: its logits became their gradient in the first; call "
                "the model again, or build it with fused_loss=False"
            )
        if torch.is_grad_enabled():
            raise RuntimeError("the fused loss has no second derivative (create_graph): build with fused_loss=False")
        logits, targets, statistics, count = ctx.saved_tensors
        ctx.is_spent = True
        torch.ops.codeparrot_ds.logits_gradient_(logits, targets, statistics, gradient / count)
        torch.autograd.graph.increment_version(logits)  # a kernel's writes are not seen
        return logits.detach(), None


@functools.cache
def fused_loss_works(device: torch.device, dtype: torch.dtype, vocab_size: int) -> bool:
    """Whether the kernels can be used here; where not, the log says so once, and why."""
    problem = _problem(device, dtype, vocab_size)
    if problem is not None:
        logger.warning(
            "the fused loss cannot be used here, and PyTorch's in chunks, which is slower, takes its place: %s",
            problem,
        )
    return problem is None


@torch.enable_grad()
def _problem(device: torch.device, dtype: torch.dtype, vocab_size: int) -> str | None:
    """Builds the kernels, as training will call them, and holds them against PyTorch's loss of three tokens."""
    logits = torch.linspace(-8, 8, 3 * vocab_size, device=device).view(3, vocab_size).to(dtype)
    targets = torch.tensor([0, -100, vocab_size - 1], device=device)
    plain, fused = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    expected = F.cross_entropy(plain.float(), targets)
    expected.backward()
    try:
        found = FusedCrossEntropy.apply(fused, targets)
        found.backward()
    except Exception as error:  # whatever a compiler meets: no Triton, no C compiler, a GPU or driver unknown to it
        logger.debug("the fused loss", exc_info=True)
        return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    assert plain.grad is not None and fused.grad is not None
    rounding = 1e-4 if dtype == torch.float32 else 2**-7
    is_equal = torch.allclose(found, expected, rtol=1e-5) and torch.allclose(
        fused.grad.float(), plain.grad.float(), rtol=rounding, atol=1e-7
    )
    return None if is_equal else "its result differs from PyTorch's"
