"""What the device can do: its peak for MFU, its memory in use."""

from __future__ import annotations

import re
import time

import torch

from codeparrot_ds.run.precision import WITHOUT_BF16, device_precisions
from codeparrot_ds.zero.ds_config import GPU_PRECISIONS

# Dense bf16/fp16 tensor-core peaks in FLOP/s, from the vendors' data sheets (no sparsity). First match wins.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989.5e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989.5e12,
    "A100": 312e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L4": 121e12,
    "V100": 125e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
}


def peak_flops(device: torch.device, precision: str) -> tuple[float, str]:
    """The device's dense matrix peak in FLOP/s and where the number comes from.

    A known GPU has its data sheet's; anything else is measured: the best of a few 1024-cubed products in the run's
    precision, on the threads that this rank has. All ranks of a CPU measure at once, as they will train.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for known, flops in PEAK_FLOPS.items():
            if re.search(rf"\b{known}\b", name):  # whole words: an L40 is no L4, an RTX A1000 no A100
                return flops, f"data sheet of {known}, dense bf16"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    size = 1024 if device.type == "cpu" else 4096
    # A generator of its own: the global one's state was just restored, or decides the first dropout masks.
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator).to(device, dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best, f"measured {precision} matrix products"


def rank_precisions(device: torch.device) -> tuple[str, ...]:
    """What this rank's device trains in, the fastest first."""
    if device.type == "cuda":
        return GPU_PRECISIONS if torch.cuda.is_bf16_supported(including_emulation=False) else WITHOUT_BF16
    return device_precisions("cpu")


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory this rank has held: allocated on the GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with open(
        "/proc/self/status", encoding="ascii"
    ) as status:  # getrusage would count what the parent held at the fork
        high_water = next(line for line in status if line.startswith("VmHWM"))
    return int(high_water.split()[1]) * 1024
