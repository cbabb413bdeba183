"""Traces what DeepSpeedExamples' ``training/bf16_master_weight`` measured on H100 GPUs; run by its test as a process.

Reads a list of points as JSON on standard input, writes a list of GiB allocated after a step and at the peak.
"""

import json
import os
import sys
import warnings

import torch
from torch import nn
from torch.nn import functional
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from codeparrot_ds.memory import fake_device as fake_ranks
from codeparrot_ds.memory.storage_counter import StorageCounter, bytes_of, find_peak

NUM_STEPS = 2
# cuBLAS takes 32 MiB for each of two streams (torch counts them; they are no tensors).
WORKSPACES = 2 * 32 * 2**20


class Block(nn.Module):
    """A post-norm transformer block of torch's own layers; the attention weights are computed whole."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = self.norms[0](hidden + self.attention(hidden, hidden, hidden)[0])
        return self.norms[1](hidden + self.mlp(hidden))


class Transformer(nn.Module):
    """Token and position embeddings, blocks, and an untied head with a bias."""

    def __init__(self, *, layers: int, width: int, heads: int, vocabulary: int, tokens: int, recompute: bool) -> None:
        super().__init__()
        self.recompute = recompute
        self.words = nn.Embedding(vocabulary, width)
        self.places = nn.Embedding(tokens, width)
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(layers)])
        self.head = nn.Linear(width, vocabulary)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        places = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        hidden = self.words(ids) + self.places(places)
        for block in self.blocks:
            hidden = checkpoint(block, hidden, use_reentrant=False) if self.recompute else block(hidden)
        return self.head(hidden)


def cast_like_cuda(kept: list) -> None:
    """Gives the pretended accelerator CUDA's autocast policy, for the operators of this model.

    ``aten/src/ATen/autocast_mode.h``; the cache of casted weights is left out: these weights are bf16 already.
    """
    key = "AutocastPrivateUse1"
    others, casts = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    kept += [others, casts]
    others.fallback(torch.library.fallthrough_kernel, key)
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def register(name: str, change) -> None:
        operator = getattr(torch.ops.aten, name.partition(".")[0])
        overload = getattr(operator, name.partition(".")[2] or "default")

        def casting(*args, **options):
            with torch._C._ExcludeDispatchKeyGuard(keys):
                return overload(*change(args), **options)

        casts.impl(name, casting, key)

    def to(dtype):
        return lambda args: tree_map_only(
            torch.Tensor, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, args
        )

    for name in ("addmm", "matmul", "mm", "bmm", "baddbmm", "linear"):
        register(name, to(torch.bfloat16))
    for name in ("layer_norm", "native_layer_norm", "nll_loss", "nll_loss_nd", "pow.Tensor_Scalar", "exp", "log"):
        register(name, to(torch.float32))
    for name in ("softmax", "log_softmax"):
        casts.impl(f"{name}.int", lambda tensor, dim, dtype=None: OneKernelSoftmax.apply(tensor), key)


class OneKernelSoftmax(torch.autograd.Function):
    """CUDA's softmax kernels under autocast read bf16 and write fp32, and back: nothing is copied between the types."""

    @staticmethod
    def forward(ctx, scores: torch.Tensor) -> torch.Tensor:
        ctx.dtype = scores.dtype
        result = torch.empty_like(scores, dtype=torch.float32)
        ctx.save_for_backward(result)
        return result

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        (result,) = ctx.saved_tensors
        return torch.empty_like(result, dtype=ctx.dtype)


def ds_config(low_precision: bool, rows: int) -> dict:
    options = {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True} if low_precision else {}
    return {
        "train_micro_batch_size_per_gpu": rows,
        "gradient_accumulation_steps": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "weight_decay": 0.01}},
        "bf16": {"enabled": True, **options},
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": True,
            "contiguous_gradients": True,
            "reduce_bucket_size": 50_000_000,
            "stage3_param_persistence_threshold": 0,
            # The figures are older than the bias sum that the memory-efficient linear got (DeepSpeed #8189).
            "memory_efficient_linear": False,
        },
        "torch_autocast": {"enabled": low_precision, "dtype": "torch.bfloat16"},
    }


def trace(point: dict, device: torch.device) -> list[float]:
    import deepspeed

    rows, vocabulary = point["rows"], 50_000
    counter = StorageCounter(granularity=512, fake=True)
    with fake_ranks.FakeTensors(), counter:
        model = Transformer(
            layers=point["layers"],
            width=point["width"],
            heads=point["heads"],
            vocabulary=vocabulary,
            tokens=512,
            recompute=point["checkpointing"],
        )
        engine, *_ = deepspeed.initialize(
            model=model, model_parameters=model.parameters(), config=ds_config(point["low_precision"], rows)
        )
        ids = torch.zeros(rows, 512, dtype=torch.long, device=device)
        for _ in range(NUM_STEPS):
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=point["low_precision"]):
                logits = engine(ids)  # stays alive until the next step, as in the script that was measured
                loss = functional.cross_entropy(logits.view(-1, vocabulary), ids.view(-1))
            loss.backward()
            engine.step()
        allocated = bytes_of(counter.storages(device.type))
        peak = find_peak([], counter.events, device.type).num_bytes
    return [(size + WORKSPACES) / 2**30 for size in (allocated, peak)]


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    points = json.loads(sys.argv[1])
    device = fake_ranks.pretend_accelerator()
    fake_ranks.join_fake_ranks(points[0]["world_size"])
    fake_ranks.use_fake_operators()
    fake_ranks.convert_modules_in_place()
    libraries: list = []
    cast_like_cuda(libraries)
    print(json.dumps([trace(point, device) for point in points]), flush=True)
    os._exit(0)
