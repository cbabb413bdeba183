"""What a rank of a trial broke of, told apart: no memory, a user's mistake, anything else."""

from __future__ import annotations

import traceback
from typing import Any

import torch

from codeparrot_ds.errors import UserError

_NO_MEMORY = ("can't allocate memory", "out of memory", "not enough memory", "Cannot allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device or the host has no more memory."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, (RuntimeError, OSError)) and any(words in str(error) for words in _NO_MEMORY)


def describe_failure(error: BaseException, phase: str, step: int, resident_peak_bytes: int) -> dict[str, Any]:
    """A failure for ``failure-<rank>.json``: its kind, one sentence, the phase, and memory at that moment.

    Args:
        error: what was raised.
        phase: of the trial.
        step: the last step that was begun.
        resident_peak_bytes: of this process.
    """
    kind = "error"
    if is_out_of_memory(error):
        kind = "out of memory"
    elif isinstance(error, UserError):
        kind = "refused"
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return {
        "kind": kind,
        "message": lines[0] if lines else type(error).__name__,
        "type": type(error).__name__,
        "phase": phase,
        "step": step,
        "device_peak_bytes": peak,
        "resident_peak_bytes": resident_peak_bytes,
        "traceback": "".join(traceback.format_exception(error)[-4:]),
    }
