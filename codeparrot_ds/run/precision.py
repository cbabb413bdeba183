"""The precision of a run that names none: what its device multiplies fastest, and ever after what it began with.

No torch: the command, `check` and `plan` ask it too. A rank asks its own torch (`codeparrot_ds.run.hardware`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from codeparrot_ds.config import RunConfig
from codeparrot_ds.cpu import cpu_precisions, why_not_bf16
from codeparrot_ds.run.device_memory import oldest_gpu
from codeparrot_ds.run.folder import run_of
from codeparrot_ds.zero.ds_config import AUTO, GPU_PRECISIONS, DsFile, name_in, open_ds_config, precision
from codeparrot_ds.zero.resolution import saved_ds_config

WITHOUT_BF16 = ("fp16", "fp32")
"""What a GPU before Ampere trains in, the fastest first."""
AMPERE = 8.0
"""The compute capability that brought bf16."""


def device_precisions(device: str) -> tuple[str, ...]:
    """What this machine's ``cpu`` or ``cuda`` trains in, the fastest first; a GPU that cannot be asked has bf16."""
    if device == "cpu":
        return cpu_precisions()
    oldest = oldest_gpu()
    return WITHOUT_BF16 if oldest is not None and oldest[1] < AMPERE else GPU_PRECISIONS


def run_precisions(config: RunConfig, device: Sequence[str]) -> tuple[str, ...]:
    """What ``auto`` follows in a run, first to last: `device`'s precisions, in one that has begun its own before them.

    Another machine may be faster in another precision; the losses of a run that changes it would part. A run that
    begins from a checkpoint of another takes that one's.
    """
    began = _began_with(config)
    own = () if began is None else (precision(began),)
    return (*own, *(name for name in device if name not in own))


def _began_with(config: RunConfig) -> dict[str, Any] | None:
    if config.resume == "never" or config.run_name is None:
        return None
    run = Path(config.output_dir) / config.run_name
    return saved_ds_config((run if config.resume == "auto" else run_of(config.resume)) / "ds_config.json")


def open_for(config: RunConfig, device: str) -> DsFile:
    """The DeepSpeed JSON of a run on this machine's ``cpu`` or ``cuda``, as read."""
    return open_ds_config(config.deepspeed, run_precisions(config, device_precisions(device)))


def with_precision(config: RunConfig, precisions: Sequence[str]) -> RunConfig:
    """The config with a shipped file's name in place of ``NAME:auto``."""
    return dataclasses.replace(config, deepspeed=name_in(config.deepspeed, precisions[0]))


def describe_choice(asked: str, chosen: str, precisions: Sequence[str], *, device: str) -> str | None:
    """One line on what ``NAME:auto`` (`asked`) became; None where it is the fastest of a device that has bf16."""
    fastest = device_precisions(device)[0]
    if asked == chosen or precisions[0] == fastest == "bf16":
        return None
    if precisions[0] != fastest:
        return f"training in {precisions[0]} ({chosen}), as this run began; this machine is faster in {fastest}"
    why = why_not_bf16() if device == "cpu" else "a GPU here is older than Ampere and has no bf16 products"
    also = f"; --deepspeed {asked.removesuffix(AUTO)} trains in bf16 all the same, no faster" if device == "cpu" else ""
    return f"training in {precisions[0]} ({chosen}): {why}{also}"
