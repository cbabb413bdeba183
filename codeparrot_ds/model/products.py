"""16-bit matrix products on a CPU that has no instructions for them: made in fp32 and rounded once.

There PyTorch falls to scalar code, 30 to 50 times slower than its fp32 products. The sums of its 16-bit products are in
fp32 as well, so the results agree to the last rounding; only the operands are copied. The commands and ranks of this
project call `multiply_in_fp32_where_needed`; importing the package never changes PyTorch.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch

HALVES = (torch.bfloat16, torch.float16)
FLASH = "_scaled_dot_product_flash_attention_for_cpu"
# The functional form of each, by which its in-place and out= forms are computed too.
PRODUCTS = {
    "mm": ("mm", "mm.out"),
    "addmm": ("addmm", "addmm_", "addmm.out"),
    "_addmm_activation": ("_addmm_activation", "_addmm_activation.out"),
    "bmm": ("bmm", "bmm.out"),
    "baddbmm": ("baddbmm", "baddbmm_", "baddbmm.out"),
    "addbmm": ("addbmm", "addbmm_", "addbmm.out"),
    "addmv": ("addmv", "addmv_", "addmv.out"),
    FLASH: (FLASH,),
    f"{FLASH}_backward": (f"{FLASH}_backward",),
}
BACKWARD = getattr(torch.ops.aten, f"{FLASH}_backward").default  # which takes fp32 sums beside 16-bit tensors
_library: torch.library.Library | None = None
_replaced: set[torch.dtype] = set()


def has_bf16_products() -> bool:
    """Whether this CPU multiplies bf16 matrices with more than scalar code, as PyTorch's own library says."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def without_products() -> set[torch.dtype]:
    """The 16-bit precisions that this CPU multiplies with scalar code; fp16 is one on most that have bf16."""
    has = {torch.bfloat16: has_bf16_products(), torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported()}
    return {dtype for dtype, there in has.items() if not there}


def multiply_in_fp32_where_needed(*wanted: torch.dtype) -> set[torch.dtype]:
    """Replaces this process's products in the `wanted` precisions that its CPU has none of; returns what is replaced.

    Matrix products and attention, forwards and backwards, whoever calls them. What the CPU has products of stays as it
    is; while anything is replaced, each call of these operators takes some microseconds more.
    """
    global _library
    _replaced.update(without_products() & set(wanted or HALVES))
    if _replaced and _library is None:
        _library = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():
            # It is what is wanted here, and PyTorch says it of the first operator alone.
            warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)
            for functional, forms in PRODUCTS.items():
                for form in forms:
                    _replace(_library, form, getattr(torch.ops.aten, functional).default)
    return set(_replaced)


def _replace(library: torch.library.Library, form: str, compute: Callable) -> None:
    original = torch.library.get_kernel(f"aten::{form}", "CPU")
    product = functools.partial(_product, original, compute, form.endswith("_"))
    library.impl(form, product, "CPU", with_keyset=True, allow_override=True)


def _product(original: Any, compute: Callable, in_place: bool, keys: Any, *args: Any, **kwargs: Any) -> Any:
    """One call of a replaced operator; what is in another precision goes to PyTorch's own kernel."""
    dtype, out = args[0].dtype, kwargs.get("out")
    dtypes = {value.dtype for value in (*args, out) if isinstance(value, torch.Tensor)}
    if dtype not in _replaced or dtypes - {dtype, torch.float32 if compute is BACKWARD else dtype}:
        return original.call_boxed(keys, *args, **kwargs)  # which refuses a mixture
    options = {key: _widened(value) for key, value in kwargs.items() if key != "out"}
    result = compute(*map(_widened, args), **options)
    if isinstance(result, torch.Tensor):
        if in_place:
            return args[0].copy_(result)
        if out is not None:
            return out.resize_(result.shape).copy_(result)
        return result.to(dtype)
    # Attention: its output or gradients, and the logarithms of its sums, which are fp32 in PyTorch's kernel as well.
    return tuple(part if part.dim() == 3 else part.to(dtype) for part in result)


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.dtype in HALVES else value
