"""Causal attention over whole rows: without a mask, so that fused kernels take it, and a faster way on a CPU.

PyTorch's flash kernel leads wherever it can: on a GPU, in fp32, under ``torch.compile``. A CPU's multiplies small tiles
and leaves the units for 16-bit products idle; there `BlockedAttention` trains in a third of its time, at as small an
error.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from codeparrot_ds.model.cpu_kernels import BlockedAttention, blocks_are_faster

CAUSAL_ATTENTION = "codeparrot_causal"


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
    if module.training and attention_mask is None and probability == 0.0 and blocks_are_faster(query, key):
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


def document_inputs(input_ids: torch.Tensor, eos_token_id: int) -> dict[str, torch.Tensor]:
    """Restricts attention in packed rows to the same document: restarted position ids, and a mask.

    Args:
        input_ids: (batch, tokens); a document ends with its end-of-sequence token.

    Returns:
        ``position_ids`` (batch, tokens), counted from each document's first token in the row, and ``attention_mask``
        (batch, 1, tokens, tokens), boolean: tokens squared bytes per row, 1 MiB for 1024, where otherwise no mask is
        needed; the fused kernels that take a mask are slower than those that know causality.
    """
    tokens = input_ids.shape[1]
    places = torch.arange(tokens, device=input_ids.device)
    begins = F.pad(input_ids[:, :-1] == eos_token_id, (1, 0), value=True)
    documents = begins.long().cumsum(1)
    first_places = torch.where(begins, places, 0).cummax(1).values
    same = documents[:, None, :, None] == documents[:, None, None, :]
    return {"position_ids": places - first_places, "attention_mask": same & (places[:, None] >= places)}
