"""Cross entropy over the next tokens, plain or some tokens at a time: the logits are the largest tensor of a step."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from codeparrot_ds.model.cpu_kernels import CACHED_ELEMENTS, OnePassCrossEntropy, by_cache
from codeparrot_ds.model.fused_loss import FusedCrossEntropy, fused_loss_works
from codeparrot_ds.model.shapes import chunk_of_tokens


def causal_lm_loss(logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, **_: Any) -> torch.Tensor:
    """Mean cross entropy in nats over the targets of (batch, tokens, vocab) logits; label -100 is left out.

    The labels are shifted instead of the logits, so the logits are not copied to drop their last position. A GPU takes
    whole passes over them in fp32; a CPU is faster with what its caches hold, so there it is `chunked_lm_loss`.
    """
    if by_cache(logits):
        return chunked_lm_loss(logits, labels, vocab_size)
    return F.cross_entropy(logits.float().view(-1, vocab_size), _next_tokens(labels), ignore_index=-100)


def chunked_lm_loss(logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, **_: Any) -> torch.Tensor:
    """`causal_lm_loss` with the fp32 softmax of some tokens at a time: what it adds to the logits is a gradient.

    The same arithmetic in another order; the plain one holds three fp32 tensors of the logits' size. A CPU that trains
    writes this gradient over the logits.
    """
    cached = by_cache(logits)
    chunk = CACHED_ELEMENTS // vocab_size if cached else chunk_of_tokens(labels.shape[1], vocab_size)
    at_once = cached and logits.requires_grad and logits.dtype != torch.float16
    cross_entropy = OnePassCrossEntropy if at_once else ChunkedCrossEntropy
    return cross_entropy.apply(logits.view(-1, vocab_size), _next_tokens(labels), max(1, chunk))


def fused_lm_loss(logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, **_: Any) -> torch.Tensor:
    """`causal_lm_loss` of a GPU by two kernels of this project's, which write the gradient over the logits.

    A CPU and a compiled model take `causal_lm_loss`: the one has its own way to the same end, the other's compiler
    fuses the passes itself.
    """
    if by_cache(logits) or torch.compiler.is_compiling():
        return causal_lm_loss(logits, labels, vocab_size)
    # Tensors without memory (of the memory plan) have no kernel to try.
    if not isinstance(logits, FakeTensor) and not fused_loss_works(logits.device, logits.dtype, vocab_size):
        return chunked_lm_loss(logits, labels, vocab_size)  # which needs little more memory; the plain one, much
    return FusedCrossEntropy.apply(logits.view(-1, vocab_size), _next_tokens(labels))


def _next_tokens(labels: torch.Tensor) -> torch.Tensor:
    """(batch, tokens) -> (batch * tokens): what follows each token; -100 at the end of a row."""
    return F.pad(labels[:, 1:], (0, 1), value=-100).reshape(-1)


class ChunkedCrossEntropy(torch.autograd.Function):
    """Mean of -log softmax(logits)[target] over the targets that are not -100: (tokens, vocab), (tokens) -> ().

    The softmax is taken again in the backward pass, with the scale of the gradient: kept in 16 bits without it, it
    would lose what lies below the smallest fp16.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor, chunk: int) -> torch.Tensor:
        known = targets != -100
        columns = targets.clamp(min=0)[:, None]
        parts = [
            torch.log_softmax(part, 1, dtype=torch.float32).gather(1, places)
            for part, places in zip(logits.split(chunk), columns.split(chunk), strict=True)
        ]
        count = known.sum()
        ctx.save_for_backward(logits, targets, count)
        ctx.chunk = chunk
        return -torch.where(known, torch.cat(parts)[:, 0], 0.0).sum() / count

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        logits, targets, count = ctx.saved_tensors
        weights = (targets != -100) * (gradient / count)
        columns = targets.clamp(min=0)[:, None]
        minus_one = torch.full((1, 1), -1.0, device=logits.device)
        found = torch.empty_like(logits)
        for begin in range(0, len(logits), ctx.chunk):
            rows = slice(begin, begin + ctx.chunk)
            softmax = torch.softmax(logits[rows], 1, dtype=torch.float32)
            softmax.scatter_add_(1, columns[rows], minus_one.expand(len(softmax), 1))
            found[rows] = softmax.mul_(weights[rows, None])
            del softmax  # before the next one is made
        return found, None, None
