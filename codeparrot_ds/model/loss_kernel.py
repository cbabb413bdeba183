"""Cross entropy as two Triton kernels over (tokens, vocab) logits, one program per token; imported where one runs.

The first reads the logits once; the second reads them and writes their gradient in their place: 6 bytes per 16-bit
logit, where PyTorch's fp32 copy, log-softmax and their backward passes move 36.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 4096
"""Logits that a program holds at a time: 16 for each of its threads, two loads of 16 bytes where they are 16 bits."""
WARPS = 8


# Addresses are 64 bits wide: 64 rows of 1,024 tokens have 2^31 logits. Annotations would be taken for Triton's types.
@triton.jit
def _losses(logits, targets, losses, statistics, stride, vocab_size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    token = tl.program_id(0).to(tl.int64)
    row = logits + token * stride
    target = tl.load(targets + token)
    columns = tl.arange(0, BLOCK)
    largest = -3.4028234663852886e38  # finite: a difference of two infinities is no number
    total = 0.0
    for begin in range(0, vocab_size, BLOCK):
        part = tl.load(row + begin + columns, mask=begin + columns < vocab_size, other=-float("inf")).to(tl.float32)
        before = largest
        largest = tl.maximum(before, tl.max(part, 0))
        total = total * tl.exp(before - largest) + tl.sum(tl.exp(part - largest), 0)
    log_total = tl.log(total)
    # A target that is in no vocabulary has NaN for its loss: what lies there is not read.
    is_inside = (target >= 0) & (target < vocab_size)
    logit = tl.load(row + target, mask=is_inside, other=float("nan")).to(tl.float32)
    # The largest is subtracted from the logit before the rest: their sum would lose the digits of the small one.
    tl.store(losses + token, tl.where(target == -100, 0.0, log_total - (logit - largest)))
    tl.store(statistics + 2 * token, largest)
    tl.store(statistics + 2 * token + 1, log_total)


@triton.jit
def _gradient_in_place(logits, targets, statistics, scale, stride, vocab_size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    token = tl.program_id(0).to(tl.int64)
    row = logits + token * stride
    target = tl.load(targets + token)
    columns = tl.arange(0, BLOCK)
    largest = tl.load(statistics + 2 * token)
    log_total = tl.load(statistics + 2 * token + 1)
    weight = tl.where(target == -100, 0.0, tl.load(scale))
    for begin in range(0, vocab_size, BLOCK):
        is_inside = begin + columns < vocab_size
        part = tl.load(row + begin + columns, mask=is_inside, other=-float("inf")).to(tl.float32)
        softmax = tl.exp(part - largest - log_total)
        gradient = tl.where(begin + columns == target, softmax - 1.0, softmax) * weight
        tl.store(row + begin + columns, gradient.to(logits.dtype.element_ty), mask=is_inside)


def losses_of(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, vocab), (tokens) -> the loss of each token in nats, fp32, 0 where its target is -100; (tokens, 2) of
    each row: its largest logit, and the log of the sum of what follows it, for `gradient_in_place`."""
    tokens, vocab_size = logits.shape
    losses = torch.empty(tokens, dtype=torch.float32, device=logits.device)
    statistics = torch.empty(tokens, 2, dtype=torch.float32, device=logits.device)
    _losses[(tokens,)](
        logits, targets, losses, statistics, logits.stride(0), vocab_size, BLOCK=_block(vocab_size), num_warps=WARPS
    )
    return losses, statistics


def gradient_in_place(
    logits: torch.Tensor, targets: torch.Tensor, statistics: torch.Tensor, scale: torch.Tensor
) -> None:
    """Writes (softmax - the target) x ``scale`` over the logits, rounded once; 0 where the target is -100."""
    tokens, vocab_size = logits.shape
    _gradient_in_place[(tokens,)](
        logits, targets, statistics, scale, logits.stride(0), vocab_size, BLOCK=_block(vocab_size), num_warps=WARPS
    )


def _block(vocab_size: int) -> int:
    return min(BLOCK, triton.next_power_of_2(vocab_size))
