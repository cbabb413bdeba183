"""This machine's devices, without torch: what nvidia-smi says, and which of them a run takes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess


def local_device(*, hostfile: bool = False) -> str:
    """``cuda`` when there are GPUs and a torch that can use them, else ``cpu``; found without importing torch.

    Args:
        hostfile: other hosts train; this one may have no GPU, and they are taken to have what its torch is made for.
    """
    import importlib.metadata  # costs a fifth of `--help`, which needs no device

    if os.environ.get("DS_ACCELERATOR") == "cpu" or importlib.metadata.version("torch").endswith("+cpu"):
        return "cpu"
    return "cuda" if hostfile or _count_gpus() else "cpu"


def local_devices(device: str) -> list[int | str]:
    """What ``CUDA_VISIBLE_DEVICES`` lists, or the numbers of this machine's devices."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if device == "cuda" and visible is not None:
        parts = [part.strip() for part in visible.split(",") if part.strip() and part.strip() != "-1"]
        return [int(part) if part.isdecimal() else part for part in parts]
    return list(range(local_ranks(device)))


def local_ranks(device: str) -> int:
    """How many ranks a run has on this machine by default: one per visible GPU, or one on a CPU, on all its cores.

    More ranks on a CPU only add what they say to each other: two of one core are slower than one of two
    (``docs/performance.md``).
    """
    return _count_gpus() if device == "cuda" else 1


def _count_gpus() -> int:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([part for part in visible.split(",") if part.strip() and part.strip() != "-1"])
    if not shutil.which("nvidia-smi"):
        return 0
    answer = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False)
    return len(answer.stdout.splitlines()) if answer.returncode == 0 else 0


def smallest_gpu() -> tuple[str, int] | None:
    """Name and bytes of the visible GPU with the least memory, from ``nvidia-smi``; None where there is none."""
    gpus = _query_gpus("name", "memory.total")
    found = [(name, int(mebibytes) * 2**20) for name, mebibytes in gpus if mebibytes.isdecimal()]
    return min(found, key=lambda gpu: gpu[1], default=None)


def oldest_gpu() -> tuple[str, float] | None:
    """Name and CUDA compute capability of the visible GPU with the least; None where there is none, or none says."""
    gpus = _query_gpus("name", "compute_cap")
    found = [(name, float(version)) for name, version in gpus if re.fullmatch(r"\d+\.\d+", version)]
    return min(found, key=lambda gpu: gpu[1], default=None)


def _query_gpus(*fields: str) -> list[list[str]]:
    """What ``nvidia-smi`` says in these fields of each GPU that ``CUDA_VISIBLE_DEVICES`` shows."""
    if not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", f"--query-gpu=index,uuid,{','.join(fields)}", "--format=csv,noheader,nounits"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    wanted = None if visible is None else [part.strip() for part in visible.split(",") if part.strip()]
    found = []
    for line in answer.stdout.splitlines():
        index, uuid, *values = (part.strip() for part in line.split(","))
        if wanted is None or index in wanted or any(uuid.startswith(part) for part in wanted):
            found.append(values)
    return found
