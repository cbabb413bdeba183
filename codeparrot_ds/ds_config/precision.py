"""The precision of a run that names none: what its device multiplies fastest, and ever after what it began with.

No torch: the command, `check` and `plan` ask it too. A rank asks its own torch (`codeparrot_ds.engine.hardware`).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from codeparrot_ds.config.run_config import RunConfig
from codeparrot_ds.cpu import cpu_precisions, why_not_bf16
from codeparrot_ds.devices import oldest_gpu
from codeparrot_ds.ds_config.changes import run_of, saved_ds_config
from codeparrot_ds.ds_config.facts import precision, settled_precision, with_settled_precision
from codeparrot_ds.ds_config.file import AUTO, GPU_PRECISIONS, DsFile, name_in, open_ds_config

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


def begun_run(config: RunConfig) -> Path | None:
    """The folder of the run that this config continues, or whose checkpoint it begins from; None for a new one."""
    if config.resume == "never" or config.run_name is None:
        return None
    return Path(config.output_dir) / config.run_name if config.resume == "auto" else run_of(config.resume)


def began_with(config: RunConfig) -> str | None:
    """The precision of the run that this config continues, or whose checkpoint it begins from; None for a new one.

    ``auto`` follows it: another machine may be faster in another precision, but the losses of a run that changes it
    would part.
    """
    run = begun_run(config)
    saved = None if run is None else saved_ds_config(run / "ds_config.json")
    return None if saved is None else precision(saved)


def open_for(config: RunConfig, device: str) -> DsFile:
    """The DeepSpeed JSON of a run on this machine's ``cpu`` or ``cuda``, as read."""
    return open_ds_config(config.ds_config_name, device_precisions(device), began=began_with(config))


def with_precision(config: RunConfig, followed: str) -> RunConfig:
    """The config with a shipped file's name in place of ``NAME:auto``; what is left to the memory plan stays so."""
    if config.deepspeed == "auto" or "deepspeed" in config.open_fields:
        return config
    return dataclasses.replace(config, deepspeed=name_in(config.deepspeed, followed))


def describe_choice(asked: str, file: DsFile, *, device: str) -> str | None:
    """One line on what ``NAME:auto`` (`asked`) or a file's ``"auto"`` became; None where it is bf16, or was named."""
    if not asked.endswith(AUTO) and not settled_precision(file.config, file.followed):
        return None
    chosen = precision(with_settled_precision(file.config, file.followed))
    fastest = (file.precisions or GPU_PRECISIONS)[0]
    said = f"training in {chosen} ({file.path.stem if asked.endswith(AUTO) else file.path})"
    if chosen == file.began != fastest:
        return f"{said}, as the run began; this machine is faster in {fastest}"
    if fastest == "bf16":  # what else the file left open is its own doing
        return None
    why = why_not_bf16() if device == "cpu" else "a GPU here is older than Ampere and has no bf16 products"
    also = f"; --deepspeed {asked.removesuffix(AUTO)} trains in bf16 all the same, no faster"
    return f"{said}: {why}" + (also if device == "cpu" and asked.endswith(AUTO) else "")
