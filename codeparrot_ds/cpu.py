"""What this machine's CPU multiplies fast. Imports no torch: checks, plans and presets ask it in microseconds.

A CPU with bf16 instructions (AVX512-BF16, AMX, Arm's BF16) trains in bf16 two to three times as fast as in fp32. One
without them gains nothing; with AVX2 alone PyTorch has no bf16 products at all and multiplies number by number, 30 to
50 times slower than in fp32 (:mod:`codeparrot_ds.model.products` replaces them there). fp16 is never the fastest: few
CPUs have it, and DeepSpeed refuses it on all others.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

# Names of /proc/cpuinfo: x86's `flags`, and Arm's `Features` (`bf16`; SVE's are beside it).
BF16_INSTRUCTIONS = frozenset({"avx512_bf16", "amx_bf16", "bf16", "svebf16"})
FP16_INSTRUCTIONS = frozenset({"avx512_fp16", "amx_fp16"})
# Settings of oneDNN's own variable that leave it without these instructions. PyTorch's answer to "are there bf16
# products" follows that variable too, so that a newer CPU can be made to behave like an older one (CONTRIBUTING.md).
WITHOUT_BF16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI")
WITHOUT_FP16 = (*WITHOUT_BF16, "AVX2_VNNI_2", "AVX512_CORE_BF16")
NEWEST_FIRST = (("avx512f", "AVX-512"), ("avx2", "AVX2"), ("avx", "AVX"), ("asimd", "NEON"))


def usable_cores() -> int:
    """Cores that this process may use: those of its affinity mask, which ``taskset`` and schedulers set."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_precisions() -> tuple[str, ...]:
    """What this CPU trains in, the fastest first: ``bf16`` and ``fp16`` where it has products of them, and ``fp32``."""
    has, limit = instructions(), _limit()
    bf16 = ("bf16",) if has & BF16_INSTRUCTIONS and limit not in WITHOUT_BF16 else ()
    fp16 = ("fp16",) if has & FP16_INSTRUCTIONS and limit not in WITHOUT_FP16 else ()
    return (*bf16, "fp32", *fp16)


def why_not_bf16() -> str:
    """Why ``bf16`` is not among `cpu_precisions`, for a message."""
    if _limit() in WITHOUT_BF16:
        return f"ONEDNN_MAX_CPU_ISA={_limit()} leaves this CPU no bf16 instructions"
    newest = next((name for flag, name in NEWEST_FIRST if flag in instructions()), "")
    return "this CPU has no bf16 instructions" + (f" ({newest} without them)" if newest else "")


def _limit() -> str:
    return (os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "").upper()


@functools.cache
def instructions(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """The instruction sets of the first processor, as Linux names them; none where there is no such file."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return frozenset()  # not Linux: fp32 is never wrong
    pairs = (line.partition(":") for line in lines)
    found = next((value for key, _, value in pairs if key.strip() in ("flags", "Features")), "")
    return frozenset(found.split())
