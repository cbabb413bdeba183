"""Collectives of DeepSpeed, replaced for a while to be counted."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from codeparrot_ds.engine.private_parts import require

# Share of the tensor's bytes that a rank sends, as a function of the ranks, where the collective is a ring.
# https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md
RING: dict[str, Callable[[int], float]] = {
    "all_reduce": lambda n: 2 * (n - 1) / n,
    "all_reduce_coalesced": lambda n: 2 * (n - 1) / n,
    "reduce": lambda n: (n - 1) / n,
    "broadcast": lambda n: (n - 1) / n,
    "reduce_scatter": lambda n: (n - 1) / n,
    "reduce_scatter_tensor": lambda n: (n - 1) / n,
    "all_gather": lambda n: (n - 1) / n,
    "all_gather_into_tensor": lambda n: (n - 1) / n,
    "all_gather_coalesced": lambda n: (n - 1) / n,
    "all_to_all_single": lambda n: (n - 1) / n,
}


def collectives_backend() -> Any:
    """DeepSpeed's backend that is in use, which has the collectives."""
    require("comm.cdb")
    from deepspeed.comm import comm

    return comm.cdb


@contextlib.contextmanager
def replaced_collectives(
    backend: Any, replacement: Callable[[str, Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Replaces the collectives of DeepSpeed's backend while the context lasts.

    Args:
        backend: the one that is in use (`collectives_backend`).
        replacement: of a collective's name and the collective.
    """
    for name in RING:
        if hasattr(backend, name):
            setattr(backend, name, replacement(name, getattr(backend, name)))
    try:
        yield
    finally:
        for name in RING:
            backend.__dict__.pop(name, None)
