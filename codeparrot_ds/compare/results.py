"""What a comparison keeps on disk, typed: the results of its trials, and the peak that MFU is held against. No torch.

The files are those of version 0.1.0. Keys that are not known are ignored; what a file lacks has its default.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from codeparrot_ds import durable
from codeparrot_ds.child_process import last_words, run_module
from codeparrot_ds.errors import UserError
from codeparrot_ds.json_files import parts_of, read_object

COMPARISON = "comparison.json"
RESULT, FOUND, FINGERPRINTS = "result.json", "found.json", "fingerprints.json"
FINISHED, OUT_OF_MEMORY, CRASHED, HUNG, REFUSED = "finished", "out of memory", "crashed", "hung", "refused"
T = TypeVar("T")


def _from_json(kind: type[T], saved: Mapping[str, Any]) -> T:
    known = {each.name for each in dataclasses.fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in saved.items() if name in known})


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file; None where there is none."""
    try:
        return read_object(path)
    except FileNotFoundError:
        return None


# --------------------------------------------------------------------------------------------------------------------
# What a trial measured: found.json


@dataclass(frozen=True, kw_only=True)
class Weights:
    """What a trial began with."""

    dtype: str
    """By torch's name."""
    sha256: str


@dataclass(frozen=True, kw_only=True)
class SavedCheckpoint:
    """The checkpoint of a trial, with its export."""

    bytes: int
    stall_seconds: float
    """That training waited, on the slowest rank."""
    seconds: float
    error: str | None


@dataclass(frozen=True, kw_only=True)
class PartsOfStep:
    """Where the time of a step goes: means over steps and ranks, as `StepParts` counts them."""

    steps: int
    seconds: dict[str, float]
    """By part."""
    total_seconds: float
    sent_bytes: float
    payload_bytes: dict[str, float]
    """By collective, as are ``calls``."""
    calls: dict[str, float]


@dataclass(kw_only=True)
class Found:
    """What a trial measured, as far as it came; a list of memory has an entry for each rank."""

    world_size: int
    weights: Weights
    data: dict[str, Any] | None = None
    """Fingerprint of the data stream."""
    device: str = ""
    flops_per_token: float | None = None
    peak_flops: float | None = None
    """Of all ranks together."""
    resident_before_bytes: list[int] = field(default_factory=list)
    """With the libraries alone."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Training rows, as in ``metrics.jsonl``."""
    row_hashes: list[str] = field(default_factory=list)
    """Of the data rows of every step, over all ranks."""
    startup_seconds: dict[str, float] = field(default_factory=dict)
    device_peak_bytes: list[int] | None = None
    """Of tensors; None on CPUs."""
    resident_peak_bytes: list[int] = field(default_factory=list)
    skipped_steps: int = 0
    checkpoint: SavedCheckpoint | None = None
    parts: PartsOfStep | None = None

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Found:
        found = _from_json(cls, {**saved, "weights": _from_json(Weights, saved["weights"])})
        if saved.get("checkpoint") is not None:
            found.checkpoint = _from_json(SavedCheckpoint, saved["checkpoint"])
        if saved.get("parts") is not None:
            found.parts = _from_json(PartsOfStep, saved["parts"])
        return found

    @classmethod
    def read(cls, path: Path) -> Found | None:
        """What is in a file; None where there is none."""
        saved = read_json(path)
        with parts_of(path):
            return None if saved is None else cls.from_json(saved)

    def as_json(self) -> dict[str, Any]:
        """Without a checkpoint or parts that were not measured."""
        unmeasured = [name for name in ("checkpoint", "parts") if getattr(self, name) is None]
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in unmeasured}


# --------------------------------------------------------------------------------------------------------------------
# What became of a trial: failure-<rank>.json, result.json


@dataclass(frozen=True, kw_only=True)
class Failure:
    """What one rank broke of."""

    kind: str
    """`OUT_OF_MEMORY`, `REFUSED` or ``error``."""
    message: str
    """One line."""
    type: str
    """Of the exception."""
    phase: str
    step: int
    """The last that was begun."""
    device_peak_bytes: int | None
    resident_peak_bytes: int
    traceback: str = ""

    @property
    def peak_bytes(self) -> int:
        """On the device where there is one, else resident."""
        return self.device_peak_bytes or self.resident_peak_bytes

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Failure:
        return _from_json(cls, saved)


@dataclass(frozen=True, kw_only=True)
class TrialResult:
    """What became of a trial."""

    status: str
    """`FINISHED`, `OUT_OF_MEMORY`, `CRASHED`, `HUNG` or `REFUSED`."""
    reason: str | None = None
    """Why it did not finish, in one sentence."""
    phase: str = "start"
    """The last that it entered."""
    step: int | None = None
    """Where it broke, as with ``peak_bytes``."""
    peak_bytes: int | None = None
    name: str = ""
    repeat: int = 0
    seconds: float = 0.0
    found: Found | None = None

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Its training rows."""
        return [] if self.found is None else self.found.rows

    @classmethod
    def read(cls, path: Path) -> TrialResult | None:
        """The result in a file; None where there is none."""
        saved = read_json(path)
        if saved is None:
            return None
        with parts_of(path):
            found = saved.get("found")
            return _from_json(cls, saved | {"found": None if found is None else Found.from_json(found)})

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"found": None if self.found is None else self.found.as_json()}


def fingerprints(place: Path) -> dict[str, str] | None:
    """The hash of a folder's weights by dtype (``float32``, ``bfloat16``, ``float16``); None where it is not whole."""
    return read_json(place / FINGERPRINTS)


# --------------------------------------------------------------------------------------------------------------------
# The one peak


@dataclass(frozen=True, kw_only=True)
class Peak:
    """FLOP/s of dense matrix products that all trials of a comparison are held against.

    A trial that measured its own would be held against what the machine had to spare at that moment, in its own
    precision: then of two configs the faster one could have the lower MFU.
    """

    flops: float
    """Of a device, or of all cores of a machine without any."""
    source: str
    whole_machine: bool
    """Whether it is all cores', however many ranks share them."""

    def of_ranks(self, world_size: int) -> float:
        """What so many ranks have together."""
        return self.flops if self.whole_machine else self.flops * world_size


def peak_of_comparison(file: Path, device: str) -> Peak:
    """The peak that a comparison's ``comparison.json`` has, measured and written there first where it has none.

    Raises:
        UserError: it could not be measured.
    """
    known = recorded_peak(file)
    if known is not None:
        return known
    process = run_module("codeparrot_ds.engine.hardware", device)
    if process.returncode != 0:
        raise UserError(f"the peak of this machine could not be measured: {last_words(process)}")
    peak = Peak(**json.loads(process.stdout))
    durable.write_json(file, read_object(file) | {"peak": dataclasses.asdict(peak)})
    return peak


def recorded_peak(file: Path) -> Peak | None:
    """The peak that a ``comparison.json`` has; None where there is none."""
    found = (read_json(file) or {}).get("peak")
    with parts_of(file):
        return None if found is None else Peak(**found)
