"""GPT-2 from a config: the same initial weights at every ZeRO stage.

The module is ``transformers``' own ``GPT2LMHeadModel``, so that a checkpoint is a plain Hugging Face model. Three
things are set for training: attention without a mask (:mod:`codeparrot_ds.model.attention`), GELU in PyTorch's own tanh
form (the same function as ``gelu_new``, 40% fewer activation bytes; :mod:`codeparrot_ds.model.activation`), and the
loss (:mod:`codeparrot_ds.model.loss`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from codeparrot_ds.model.activation import TanhGELU
from codeparrot_ds.model.attention import register_causal_attention
from codeparrot_ds.model.loss import causal_lm_loss, chunked_lm_loss, fused_lm_loss
from codeparrot_ds.model.shapes import GPT2Shape


def hugging_face_config(shape: GPT2Shape, *, eos_token_id: int, dropout: float = 0.0) -> Any:
    """Returns the ``transformers.GPT2Config`` of a shape, as it is saved beside the weights."""
    from transformers import GPT2Config

    values = dataclasses.asdict(shape)
    if shape.activation_function == "gelu_new":
        values["activation_function"] = "gelu_pytorch_tanh"
    return GPT2Config(
        **values,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=eos_token_id,
        eos_token_id=eos_token_id,
        use_cache=False,
    )


def build_model(
    shape: GPT2Shape,
    *,
    eos_token_id: int,
    seed: int,
    dropout: float = 0.0,
    chunked_loss: bool = False,
    fused_loss: bool = False,
    zero3_config: dict[str, Any] | None = None,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """Builds a GPT-2 with tied embeddings and freshly initialized weights.

    Args:
        shape: the architecture.
        eos_token_id: the tokenizer's end-of-sequence token.
        seed: the run's seed: every parameter's initial values follow from it and from the parameter's name alone, so
            they are equal at every ZeRO stage and world size.
        dropout: probability for residual, embedding and attention dropout.
        chunked_loss: whether the loss is `chunked_lm_loss` instead of `causal_lm_loss`.
        fused_loss: whether it is `fused_lm_loss`, unless it is chunked.
        zero3_config: the resolved DeepSpeed config of a stage 3 run: the model is then built under ``zero.Init``, each
            parameter partitioned as soon as it exists.
        device: where the weights of the other stages are created.
    """
    from transformers import GPT2LMHeadModel

    config = hugging_face_config(shape, eos_token_id=eos_token_id, dropout=dropout)
    config._attn_implementation = register_causal_attention()
    if zero3_config is not None:
        import deepspeed

        with deepspeed.zero.Init(config_dict_or_path=zero3_config):
            model = GPT2LMHeadModel(config)
    else:
        # On the meta device nothing is allocated or drawn twice: the values come from initialize_weights below.
        with torch.device("meta"):
            model = GPT2LMHeadModel(config)
        buffers = [name for name, _ in model.named_buffers()]
        if buffers:
            raise RuntimeError(f"GPT-2 of this transformers version has buffers that need values: {buffers}")
        model.to_empty(device=device)
    if shape.tie_word_embeddings:
        model.tie_weights()
    initialize_weights(model, seed, partitioned=zero3_config is not None)
    if config.activation_function == "gelu_pytorch_tanh":
        for block in model.transformer.h:
            block.mlp.act = TanhGELU()
    model.loss_function = chunked_lm_loss if chunked_loss else fused_lm_loss if fused_loss else causal_lm_loss
    return model


@torch.no_grad()
def initialize_weights(model: nn.Module, seed: int, *, partitioned: bool = False) -> None:
    """Draws GPT-2's initial weights: normal(0, 0.02), residual projections / sqrt(2 * layers), LayerNorms 1, biases 0.

    Each parameter has a generator of its own, seeded by the run's seed and its name.
    """
    config = model.config
    norms = {id(p) for module in model.modules() if isinstance(module, nn.LayerNorm) for p in module.parameters()}
    for name, parameter in model.named_parameters():
        with _whole(parameter, partitioned) as writable:
            if not writable:
                continue
            if name.endswith(".bias"):
                parameter.zero_()
            elif id(parameter) in norms:
                parameter.fill_(1.0)
            else:
                scale = math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else 1.0
                parameter.copy_(_normal(parameter, config.initializer_range / scale, seed, name))


def _normal(parameter: torch.Tensor, std: float, seed: int, name: str) -> torch.Tensor:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator(device=parameter.device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    # Drawn in fp32 and then rounded: a bf16 stage 3 parameter gets what casting an fp32 model to bf16 gives.
    return torch.empty(parameter.shape, dtype=torch.float32, device=parameter.device).normal_(
        0.0, std, generator=generator
    )


@torch.no_grad()
def load_weights(model: nn.Module, weights: Mapping[str, tuple[Path, str]] | None, *, partitioned: bool) -> None:
    """Fills a model from safetensors files, one parameter at a time, rounded to the model's precision; collective.

    Args:
        model: on every rank of the process group, if there is one.
        weights: the file of each of ``model.named_parameters()``, and the tensor's name in it; None on all ranks but
            rank 0, who hands the values to them.
        partitioned: whether the parameters are ZeRO-3's.
    """
    from safetensors import safe_open

    is_distributed = torch.distributed.is_initialized()
    with contextlib.ExitStack() as stack:
        paths = {path for path, _ in (weights or {}).values()}
        files = {path: stack.enter_context(safe_open(path, framework="pt")) for path in paths}
        for name, parameter in model.named_parameters():
            with _whole(parameter, partitioned) as writable:
                if writable and weights is not None:
                    path, stored = weights[name]
                    parameter.copy_(files[path].get_tensor(stored))
            if is_distributed and not partitioned:
                torch.distributed.broadcast(parameter.data, 0)


@contextlib.contextmanager
def _whole(parameter: nn.Parameter, partitioned: bool):
    """Yields whether this rank may write the whole parameter; a partitioned one is gathered and handed back after."""
    if not partitioned:
        yield True
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameter, modifier_rank=0):
        yield deepspeed.comm.get_rank() == 0


def get_grouped_params(model: nn.Module, weight_decay: float = 0.1) -> list[dict[str, Any]]:
    """Splits the parameters for AdamW: matrices decay, biases and LayerNorm weights do not.

    Decided by module type and by the name ``bias``, not by a list of name fragments (which misses GPT-2's ``ln_1``,
    ``ln_2`` and ``ln_f``) and not by the number of dimensions (a ZeRO-3 parameter has one). A tied weight appears once.
    """
    norms = {id(p) for module in model.modules() if isinstance(module, nn.LayerNorm) for p in module.parameters()}
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (others if name.endswith("bias") or id(parameter) in norms else decayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay, "name": "decayed"},
        {"params": others, "weight_decay": 0.0, "name": "not decayed"},
    ]


def enable_activation_checkpointing(model: nn.Module, ds_config: dict[str, Any]) -> None:
    """Recomputes each block in the backward pass through DeepSpeed's checkpointing, as the DeepSpeed config says."""
    import deepspeed

    deepspeed.checkpointing.configure(mpu_=None, deepspeed_config=ds_config)
    model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=deepspeed.checkpointing.checkpoint)
