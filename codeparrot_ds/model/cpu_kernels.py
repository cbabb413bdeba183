"""What a CPU trains faster with: attention in blocks, GELU by its sigmoid, cross entropy in one pass."""

from __future__ import annotations

import math
from typing import Any

import torch

from codeparrot_ds.model.products import has_bf16_products

# GELU's tanh form is x·σ(k·(x + c·x³)): (1 + tanh u) / 2 = σ(2u).
K = 2 * math.sqrt(2 / math.pi)
C = 0.044715
# A thread's share of the elements that pass through the operations below together: smaller ones are done sooner than
# the threads are called, larger ones leave the caches.
CHUNK = 2**18


def sigmoid_is_faster(values: torch.Tensor) -> bool:
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


# Tokens whose scores are one product. Small blocks skip more of what lies after a token, large ones multiply faster.
BLOCK = 128


def blocks_are_faster(query: torch.Tensor, key: torch.Tensor) -> bool:
    return (
        query.device.type == "cpu"
        and query.dtype == torch.bfloat16
        and query.shape == key.shape
        and not torch.compiler.is_compiling()
        and has_bf16_products()
    )


class BlockedAttention(torch.autograd.Function):
    """Causal attention as batched products: the scores of some queries against all keys up to the last of them.

    Scores and probabilities are kept and rounded to the precision of the queries, sums are in fp32. The backward pass
    gets the probabilities: a little over half of (batch, heads, tokens, tokens).
    """

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None
    ) -> torch.Tensor:
        """(batch, heads, tokens, head size) each -> the same; `scaling` of the scores is 1/sqrt(head size) if None."""
        batch, heads, tokens, size = query.shape
        scale = 1 / math.sqrt(size) if scaling is None else scaling
        query, key, value = (x.reshape(batch * heads, tokens, size) for x in (query * scale, key, value))
        later = torch.full((BLOCK, BLOCK), -math.inf, dtype=query.dtype, device=query.device).triu_(1)
        probabilities, outputs = [], []
        for begin, end in _blocks(tokens):
            scores = torch.bmm(query[:, begin:end], _transposed(key[:, :end]))
            scores[:, :, begin:end] += later[: end - begin, : end - begin]
            probabilities.append(scores.softmax(-1))
            outputs.append(torch.bmm(probabilities[-1], value[:, :end]))
        ctx.save_for_backward(query, key, value, *probabilities)
        ctx.scale = scale
        return torch.cat(outputs, 1).view(batch, heads, tokens, size)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        """The gradients of query, key and value."""
        query, key, value, *probabilities = ctx.saved_tensors
        shape = gradient.shape
        gradient = gradient.reshape(query.shape)
        blocks = list(zip(_blocks(query.shape[1]), probabilities, strict=True))
        of_queries = []
        of_key = of_value = torch.empty(0)
        for (begin, end), probability in reversed(blocks):  # the last one saw every key
            arrived = gradient[:, begin:end]
            of_probability = torch.bmm(arrived, _transposed(value[:, :end]))
            of_scores = torch._softmax_backward_data(of_probability, probability, -1, probability.dtype)
            of_queries.append(torch.bmm(of_scores, key[:, :end]))
            if len(of_queries) == 1:
                of_key = torch.bmm(of_scores.transpose(1, 2), query[:, begin:end])
                of_value = torch.bmm(probability.transpose(1, 2), arrived)
            else:
                of_key[:, :end].baddbmm_(of_scores.transpose(1, 2), query[:, begin:end])
                of_value[:, :end].baddbmm_(probability.transpose(1, 2), arrived)
        of_query = torch.cat(of_queries[::-1], 1).mul_(ctx.scale)
        return of_query.view(shape), of_key.view(shape), of_value.view(shape), None


def _transposed(some_tokens: torch.Tensor) -> torch.Tensor:
    """(heads, tokens, head size) -> (heads, head size, tokens), as products take it without a transposing copy."""
    return some_tokens.contiguous().transpose(1, 2)


def _blocks(tokens: int) -> list[tuple[int, int]]:
    return [(begin, min(begin + BLOCK, tokens)) for begin in range(0, tokens, BLOCK)]


# Logits whose fp32 copy and softmax stay in a CPU's cache between the passes over them: 2 MiB each.
CACHED_ELEMENTS = 2**19


def by_cache(logits: torch.Tensor) -> bool:
    """Whether chunks are sized for a CPU's cache; a compiler would write each of the many into its graph."""
    return logits.device.type == "cpu" and not torch.compiler.is_compiling()


class OnePassCrossEntropy(torch.autograd.Function):
    """`ChunkedCrossEntropy` with one softmax instead of two: the forward pass puts the gradient in the logits' place.

    For a CPU, where looking at a value stops nothing and fresh memory costs more than the arithmetic, and for what
    needs no loss scale: the gradient is kept divided by the number of targets. The logits are gone; autograd raises
    where something else had kept them for its own gradient.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor, chunk: int) -> torch.Tensor:
        known = targets != -100
        columns = targets.clamp(min=0)[:, None]
        count = known.sum()
        weights = (known / count)[:, None]
        minus_one = torch.full((1, 1), -1.0)
        found, parts = logits.detach(), []
        for begin in range(0, len(logits), chunk):
            rows = slice(begin, begin + chunk)
            softmax = torch.softmax(logits[rows], 1, dtype=torch.float32)
            probability = softmax.gather(1, columns[rows])
            if probability.min() < torch.finfo(torch.float32).tiny:  # from 87 nats on
                parts.append(torch.log_softmax(logits[rows], 1, dtype=torch.float32).gather(1, columns[rows]))
            else:
                parts.append(probability.log())
            softmax.scatter_add_(1, columns[rows], minus_one.expand(len(softmax), 1))
            found[rows] = softmax.mul_(weights[rows])
        ctx.save_for_backward(found)
        return -torch.where(known, torch.cat(parts)[:, 0], 0.0).sum() / count

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (found,) = ctx.saved_tensors
        return (found if gradient == 1 else found * gradient), None, None
