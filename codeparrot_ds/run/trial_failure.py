"""What a rank of a trial broke of, told apart: no memory, a user's mistake, anything else. No torch here."""

from __future__ import annotations

import errno
import traceback
from pathlib import Path
from typing import Any

from codeparrot_ds.errors import UserError

OUT_OF_MEMORY, REFUSED, ERROR = "out of memory", "refused", "error"
# Of torch's allocators, CUDA, cuBLAS, NCCL and the C library.
_NO_MEMORY = ("can't allocate memory", "out of memory", "not enough memory", "cannot allocate memory", "alloc_failed")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device or the host has no more memory."""
    if isinstance(error, MemoryError) or any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__):
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError | OSError) and any(words in str(error).lower() for words in _NO_MEMORY)


def describe_failure(
    error: BaseException, phase: str, step: int, *, resident_peak_bytes: int, device_peak_bytes: int | None
) -> dict[str, Any]:
    """A failure for ``failure-<rank>.json``: its kind, one sentence, the phase, and memory at that moment.

    Args:
        error: what was raised.
        phase: of the trial.
        step: the last step that was begun.
        resident_peak_bytes: of this process.
        device_peak_bytes: tensors on this rank's GPU; None on a CPU.
    """
    kind = ERROR
    if is_out_of_memory(error):
        kind = OUT_OF_MEMORY
    elif isinstance(error, UserError):
        kind = REFUSED
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return {
        "kind": kind,
        "message": lines[0] if lines else type(error).__name__,
        "type": type(error).__name__,
        "phase": phase,
        "step": step,
        "device_peak_bytes": device_peak_bytes,
        "resident_peak_bytes": resident_peak_bytes,
        "traceback": "".join(traceback.format_exception(error)[-4:]),
    }


def processes_killed_for_memory(counters: Path = Path("/proc/vmstat")) -> int:
    """How many processes the system has killed since it started because memory ran out; 0 where it does not say."""
    try:
        lines = counters.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))
