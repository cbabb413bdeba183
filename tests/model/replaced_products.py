"""A process on a CPU without 16-bit products (or one that was made so): what its products do, as JSON to a file."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from functools import partial

import torch
from torch.nn import functional as F

from codeparrot_ds.config.run_config import RunConfig
from codeparrot_ds.cpu import cpu_precisions
from codeparrot_ds.ds_config.file import open_ds_config
from codeparrot_ds.ds_config.resolve import resolve_ds_config
from codeparrot_ds.engine.engine import create_engine
from codeparrot_ds.engine.operators import build_operators
from codeparrot_ds.engine.ranks import join_ranks
from codeparrot_ds.model.gpt2 import build_model
from codeparrot_ds.model.products import HALVES, PRODUCTS, has_bf16_products, multiply_in_fp32_where_needed
from tests.model.tiny_gpt2 import TINY

answer: dict = {"has_bf16_products": has_bf16_products(), "cpu_precisions": cpu_precisions()}
native: Counter[str] = Counter()
"""Calls that reach PyTorch's own kernels, by operator and whether they are 16-bit."""


def count_native_calls() -> torch.library.Library:
    """Counts below whatever replaces the kernels later."""
    library = torch.library.Library("aten", "IMPL")

    def counted(form, original, keys, *args, **kwargs):
        native[f"{form} {'16-bit' if args[0].dtype in HALVES else 'fp32'}"] += 1
        return original.call_boxed(keys, *args, **kwargs)

    for forms in PRODUCTS.values():
        for form in forms:
            original = torch.library.get_kernel(f"aten::{form}", "CPU")
            library.impl(form, partial(counted, form, original), "CPU", with_keyset=True, allow_override=True)
    return library


def gradients(query, key, value):
    """Attention's output and gradients."""
    leaves = [x.clone().requires_grad_() for x in (query, key, value)]
    output = F.scaled_dot_product_attention(*leaves, is_causal=True)
    return [output.detach(), *torch.autograd.grad(output.float().square().sum(), leaves)]


def refusal(work) -> str:
    try:
        work()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return "taken"


def difference(ours, exact) -> float:
    return ((ours.float() - exact).norm() / exact.norm()).item()


def compare_with_fp32(dtype) -> dict[str, float]:
    """The relative difference to fp32 of each form."""
    torch.manual_seed(0)
    a, b, c = (torch.randn(*shape).to(dtype) for shape in ((64, 48), (48, 32), (64, 32)))
    x, y, z = (torch.randn(4, *shape).to(dtype) for shape in ((16, 24), (24, 8), (16, 8)))
    wide = [t.float() for t in (a, b, c, x, y, z)]
    A, B, C, X, Y, Z = wide
    scaled = {"beta": 0.5, "alpha": 2.0}
    vector = torch.randn(48).to(dtype)
    found = {
        "mm": (a @ b, A @ B),
        "mm transposed": (b.t() @ a.t(), B.t() @ A.t()),
        "mm out": (torch.mm(a, b, out=torch.empty(0, dtype=dtype)), A @ B),
        "addmm": (torch.addmm(c, a, b, **scaled), torch.addmm(C, A, B, **scaled)),
        "addmm bias": (F.linear(a, b.t(), c[0]), F.linear(A, B.t(), C[0])),
        "addmm_": (c.clone().addmm_(a, b, **scaled), C.clone().addmm_(A, B, **scaled)),
        "bmm": (torch.bmm(x, y), torch.bmm(X, Y)),
        "baddbmm": (torch.baddbmm(z, x, y, **scaled), torch.baddbmm(Z, X, Y, **scaled)),
        "baddbmm_": (z.clone().baddbmm_(x, y), Z.clone().baddbmm_(X, Y)),
        "gelu": (
            torch._addmm_activation(c[0], a, b, use_gelu=True),
            torch._addmm_activation(C[0], A, B, use_gelu=True),
        ),
        "mv": (a @ vector, A @ vector.float()),
        "einsum": (torch.einsum("bij,bjk->bik", x, y), torch.bmm(X, Y)),
    }
    heads = [torch.randn(2, 4, 40, 16).to(dtype) for _ in range(3)]
    exact = gradients(*(x.float() for x in heads))
    found |= {f"attention {i}": pair for i, pair in enumerate(zip(gradients(*heads), exact, strict=True))}
    assert all(ours.dtype == dtype for ours, _ in found.values())
    return {name: difference(*pair) for name, pair in found.items()}


def train_and_evaluate(name: str) -> dict[str, int]:
    """A step of two micro-batches and an evaluation; calls by kind."""
    config = RunConfig(seq_length=32, global_batch_size=4, micro_batch_size=2, num_warmup_steps=0)
    file = open_ds_config(name).config
    ds_config = resolve_ds_config(file, config, world_size=1, model_hidden_size=TINY.n_embd)
    zero3 = ds_config if "zero3" in name else None
    engine = create_engine(build_model(TINY, eos_token_id=0, seed=1, zero3_config=zero3), ds_config, config)
    ids = torch.arange(64).reshape(2, 32) % TINY.vocab_size
    native.clear()
    for _ in range(2):
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
    engine.eval()
    with torch.no_grad():
        engine(input_ids=ids)
    return dict(native)


library = count_native_calls()
a = torch.ones(2, 2, dtype=torch.bfloat16)
answer["before"] = (a @ a, dict(native))[1]
answer["replaced"] = [sorted(map(str, multiply_in_fp32_where_needed(*wanted))) for wanted in ((torch.bfloat16,), ())]
answer["bf16"], answer["fp16"] = compare_with_fp32(torch.bfloat16), compare_with_fp32(torch.float16)
answer["refused"] = {
    "another precision": refusal(lambda: a @ a.float()),
    "another precision's out": refusal(lambda: torch.mm(a, a, out=torch.empty(2, 2))),
    "shapes": refusal(lambda: torch.mm(a, torch.ones(3, 2, dtype=torch.bfloat16))),
}
build_operators(open_ds_config("zero2").config, "cpu")
join_ranks()
answer["calls"] = {name: train_and_evaluate(name) for name in ("zero0", "zero2", "zero3", "zero2_fp32")}
with open(sys.argv[1], "w") as file:
    json.dump(answer, file)
sys.stdout.flush()
os._exit(0)
