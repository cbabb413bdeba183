"""What the device can do: its peak for MFU, its memory in use."""

from __future__ import annotations

import json
import re
import sys
import time

import torch

from codeparrot_ds.cpu import usable_cores
from codeparrot_ds.ds_config.file import GPU_PRECISIONS
from codeparrot_ds.ds_config.precision import WITHOUT_BF16, device_precisions

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
    known = _data_sheet(device)
    return known if known is not None else (_measured(device, precision), f"measured {precision} matrix products")


def one_peak_for_all(device: torch.device) -> tuple[float, str]:
    """The peak that runs in any precision are held against beside each other: (FLOP/s, where it comes from).

    The data sheet's for a known GPU, as for a single run. Else the fastest matrix products of this machine in any
    precision, on all its cores, measured for longer than a run may: the machine may be busy, and this number is kept.
    """
    known = _data_sheet(device)
    if known is not None:
        return known
    torch.set_num_threads(usable_cores())
    # A precision that it only pretends to have is never the fastest, and takes long to find out about.
    precisions = [name for name in ("fp32", "bf16", "fp16") if name in rank_precisions(device)]
    found = {precision: _measured(device, precision, seconds=0.5) for precision in precisions}
    fastest = max(found, key=lambda precision: found[precision])
    return found[fastest], f"fastest measured matrix products of {', '.join(precisions)}: {fastest}"


def _data_sheet(device: torch.device) -> tuple[float, str] | None:
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    for known, flops in PEAK_FLOPS.items():
        if re.search(rf"\b{known}\b", name):  # whole words: an L40 is no L4, an RTX A1000 no A100
            return flops, f"data sheet of {known}, dense bf16"
    return None


def _measured(device: torch.device, precision: str, *, seconds: float = 0.0) -> float:
    """FLOP/s of the best of a few products; of as many as fit into ``seconds``, but no fewer than three then."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    size = 1024 if device.type == "cpu" else 4096
    # A generator of its own: the global one's state was just restored, or decides the first dropout masks.
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator).to(device, dtype) for _ in range(2))
    took: list[float] = []
    while sum(took) < seconds or len(took) < (3 if seconds else 6):
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        took.append(time.perf_counter() - start)
    return 2 * size**3 / min(took)


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


def main() -> None:
    """Prints `one_peak_for_all` of ``cpu`` or ``cuda`` as the JSON of a ``run.peak.Peak``."""
    device = sys.argv[1]
    flops, source = one_peak_for_all(torch.device(device, 0) if device == "cuda" else torch.device(device))
    print(json.dumps({"flops": flops, "source": source, "whole_machine": device == "cpu"}))


if __name__ == "__main__":
    main()
