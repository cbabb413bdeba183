"""Causal attention over whole rows: without a mask, so that fused kernels take it, and a faster way on a CPU.

PyTorch's flash kernel leads wherever it can: on a GPU, in fp32, under ``torch.compile``. A CPU's multiplies small tiles
and leaves the units for 16-bit products idle; there `BlockedAttention` trains in a third of its time, at as small an
error.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from codeparrot_ds.model.products import has_bf16_products

CAUSAL_ATTENTION = "codeparrot_causal"
# Tokens whose scores are one product. Small blocks skip more of what lies after a token, large ones multiply faster.
BLOCK = 128


def register_causal_attention() -> str:
    """Makes `causal_attention` known to ``transformers``; the name to give to a config."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    # A name without a mask function: transformers then builds no mask at all, so the fused kernel stays in eager mode
    # and under torch.compile (where the packed-sequence check would otherwise turn into a dense mask).
    ALL_ATTENTION_FUNCTIONS.register(CAUSAL_ATTENTION, causal_attention)
    return CAUSAL_ATTENTION


def causal_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention over whole rows: (batch, heads, tokens, head size) in, (batch, tokens, heads, head size) out.

    ``attention_mask`` is None or that of ``document_inputs``, which is causal itself.
    """
    probability = dropout if module.training else 0.0
    # In evaluation the kernel of whoever loads the export: the same loss to the last bit.
    if module.training and attention_mask is None and probability == 0.0 and _blocks_are_faster(query, key):
        return BlockedAttention.apply(query, key, value, scaling).transpose(1, 2), None
    output = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        dropout_p=probability,
        is_causal=attention_mask is None,
        scale=scaling,
    )
    return output.transpose(1, 2), None


def _blocks_are_faster(query: torch.Tensor, key: torch.Tensor) -> bool:
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


def document_inputs(input_ids: torch.Tensor, eos_token_id: int) -> dict[str, torch.Tensor]:
    """What keeps attention inside the documents of packed rows: positions that restart, and a mask.

    Args:
        input_ids: (batch, tokens); a document ends with its end-of-sequence token.

    Returns:
        ``position_ids`` (batch, tokens), counted from each document's first token in the row, and ``attention_mask``
        (batch, 1, tokens, tokens), boolean: tokens squared bytes a row, 1 MiB for 1024, where no mask is needed without
        it; the fused kernels that take a mask are slower than those that know causality.
    """
    tokens = input_ids.shape[1]
    places = torch.arange(tokens, device=input_ids.device)
    begins = F.pad(input_ids[:, :-1] == eos_token_id, (1, 0), value=True)
    documents = begins.long().cumsum(1)
    first_places = torch.where(begins, places, 0).cummax(1).values
    same = documents[:, None, :, None] == documents[:, None, None, :]
    return {"position_ids": places - first_places, "attention_mask": same & (places[:, None] >= places)}
