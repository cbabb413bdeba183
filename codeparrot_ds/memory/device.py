"""Sizes of memory: as a user writes them, as a GPU has them, and the overhead per rank in addition to tensors.

Nothing here imports torch. The overhead (the allocator's rounding, the CUDA context, the libraries of communication)
is assumed until one measured run calibrates it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codeparrot_ds.errors import UserError
from codeparrot_ds.json_files import DamagedFileError, parts_of, read_object
from codeparrot_ds.paths import not_a_run
from codeparrot_ds.terminal import gigabytes

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
BINARY_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
EXAMPLES = "80GB (80 x 10^9 bytes), 80GiB (80 x 2^30), 24 gb or 40960MiB"
# cuBLAS workspaces of forward and backward pass: 32 MiB each on Hopper, as measured on an H200.
ASSUMED_FIXED_BYTES = 64 * 2**20
ASSUMED_RATIO = 1.02  # memory that the allocator holds over what is in use
ASSUMED_CONTEXT_BYTES = 1_300_000_000  # CUDA context with the kernels of torch
ASSUMED_COMMUNICATION_BYTES = 500_000_000  # NCCL's buffers, where there is more than one rank


def parse_memory(text: str) -> int:
    """Bytes of a size such as ``80GB``, ``80 gb`` or ``80GiB``; a number alone says no unit and is refused.

    Raises:
        UserError: with examples.
    """
    match = re.fullmatch(r"\s*([+-]?[0-9][0-9_]*(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*", text)
    if match is None:
        raise UserError(f"memory {text!r} is not a size; write {EXAMPLES}")
    number, unit = float(match[1].replace("_", "")), match[2].upper()
    if not unit:
        raise UserError(f"memory {text!r} has no unit: write {text.strip()}GB (10^9 bytes) or {text.strip()}GiB (2^30)")
    prefix = unit.removesuffix("B").removesuffix("I")
    binary = unit.removesuffix("B").endswith("I")
    scale = (BINARY_UNITS if binary else UNITS).get(prefix)
    if scale is None:
        raise UserError(f"memory {text!r} has an unknown unit {match[2]!r}; write {EXAMPLES}")
    size = int(number * scale)
    if size <= 0:
        raise UserError(f"memory must be more than nothing, not {text!r}; write {EXAMPLES}")
    return size


@dataclass(frozen=True, kw_only=True)
class Overhead:
    """What a rank's device holds beside the tensors of a prediction."""

    fixed_bytes: int = ASSUMED_FIXED_BYTES
    """Allocated by libraries through torch's allocator."""
    ratio: float = ASSUMED_RATIO
    """Memory that the allocator reserves over what is allocated."""
    outside_bytes: int = ASSUMED_CONTEXT_BYTES
    """Not the allocator's: CUDA context, communication."""
    communication_bytes: int = ASSUMED_COMMUNICATION_BYTES
    """Of `outside_bytes`' kind, with more than one rank; 0 once measured together."""
    source: str = "assumed; `plan --calibrate RUN` measures it"

    def total(self, tensor_bytes: int, world_size: int) -> int:
        """Bytes that a device must have for tensors of ``tensor_bytes``."""
        outside = self.outside_bytes + (self.communication_bytes if world_size > 1 else 0)
        return math.ceil((tensor_bytes + self.fixed_bytes) * self.ratio) + outside

    def __str__(self) -> str:
        outside = gigabytes(self.outside_bytes)
        if self.communication_bytes:
            outside += f" (and {gigabytes(self.communication_bytes)} for communication)"
        return (
            f"{gigabytes(self.fixed_bytes)} of libraries' buffers, {self.ratio:.3f} x for the allocator, {outside} "
            f"outside it ({self.source})"
        )


def calibration_file() -> Path:
    """Where the newest calibration of this user on this machine lies."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "codeparrot-ds" / "memory-calibration.json"


def load_overhead() -> Overhead:
    """The calibrated overhead, or the assumed one where none was measured.

    Raises:
        UserError: the file is damaged.
    """
    path = calibration_file()
    try:
        with parts_of(path):
            saved = read_object(path)["overhead"]
            kinds = {name: type(value) for name, value in vars(Overhead()).items()}
            overhead = Overhead(**{name: kinds[name](value) for name, value in saved.items()})
            if not math.isfinite(overhead.ratio):
                raise ValueError(f"ratio is {overhead.ratio}")
            return overhead
    except FileNotFoundError:
        return Overhead()
    except (OSError, DamagedFileError) as error:
        reason = error.reason if isinstance(error, DamagedFileError) else error.strerror
        raise UserError(f"{path} is damaged ({reason}); remove it, or calibrate again") from None


def save_overhead(overhead: Overhead, details: dict[str, Any]) -> Path:
    """Keeps an overhead for later plans; returns the file."""
    path = calibration_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    content = {"overhead": dataclasses.asdict(overhead), "measured": details}
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)
    return path


def calibrate(run: Path) -> tuple[Overhead, dict[str, Any]]:
    """The overhead that a GPU run measured (``memory`` in its run.json), and the measurement.

    Raises:
        UserError: the folder is no run, or nothing was measured there.
    """
    try:
        record = read_object(run / "run.json")
    except FileNotFoundError:
        raise not_a_run(run) from None
    measured = record.get("memory")
    if not isinstance(measured, dict) or "allocated_bytes" not in measured:
        raise UserError(
            f"run {run} has no measured GPU memory: it ran on CPUs, where a rank's memory is its process's, or ended "
            "before its first logged step; calibrate with a run on a GPU"
        )
    with parts_of(run / "run.json"):
        tensor_bytes = measured["predicted_bytes"] - measured.get("library_bytes", 0)
        overhead = Overhead(
            fixed_bytes=max(0, measured["allocated_bytes"] - tensor_bytes),
            ratio=max(1.0, measured["reserved_bytes"] / measured["allocated_bytes"]),
            outside_bytes=max(0, measured["used_bytes"] - measured["reserved_at_end_bytes"]),
            communication_bytes=0,
            source=f"measured by run {record.get('name', run.name)} on {measured['device']}",
        )
    return overhead, measured
