"""DeepSpeed JSON files: find, read, and fill in the keys that belong to the run.

The JSON owns ZeRO, precision, optimizer kernel, activation checkpointing and communication. `resolve` is the one
place where the run config's values enter it.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codeparrot_ds.config.run_config import RunConfig
from codeparrot_ds.ds_config.facts import leaves, set_value, settled_precision, value_at
from codeparrot_ds.ds_config.file import DsFile
from codeparrot_ds.ds_config.known_keys import ANY, KEYS, RENAMED, KeyPath, Kind
from codeparrot_ds.errors import UserError
from codeparrot_ds.paths import expand

# DeepSpeed prints a progress line and synchronises for it every so many steps; the run has its own log.
STEPS_PER_PRINT = 1_000_000_000
# A JSON without an optimizer gets the recipe's.
DEFAULT_OPTIMIZER = {"type": "AdamW", "params": {"betas": [0.9, 0.999], "eps": 1e-8}}
# Keys, in whatever block, that hold paths.
PATH_KEYS = ("nvme_path", "output_file")
ACCUMULATION: KeyPath = ("gradient_accumulation_steps",)
# Blocks that work against the run, and so are left out, and why.
LEFT_OUT: Mapping[str, str] = {
    # They open runs and files of their own, whatever the run's `wandb` says.
    **dict.fromkeys(
        ("tensorboard", "wandb", "csv_monitor", "comet"),
        "it has trackers of its own (TensorBoard, wandb), which count steps",
    ),
    # ``_autotuning_exit`` in DeepSpeed's ``engine.py``.
    "autotuning": "DeepSpeed's engine would end it after a few steps",
    # Its writers begin processes and take memory for checkpoints that are never written.
    **dict.fromkeys(("checkpoint", "datastates_ckpt"), "it saves and restores its checkpoints itself"),
    # ``DeepSpeedCommsConfig`` looks for the block and not for `enabled`; where that is true the block stays.
    "comms_logger": "DeepSpeed would switch it on whatever its enabled says, and wait after every collective",
}
_ON_BY_BEING_THERE = ("checkpoint", "comms_logger")
# Each key that the run config owns, and the field that fills it.
RUN_OWNED_KEYS: Mapping[KeyPath, str] = {
    ("train_batch_size",): "global_batch_size",
    ("train_micro_batch_size_per_gpu",): "micro_batch_size",
    ACCUMULATION: "global_batch_size / (micro_batch_size x world_size)",
    ("gradient_clipping",): "max_grad_norm",
    ("optimizer", "params", "lr"): "learning_rate",
    ("optimizer", "params", "weight_decay"): "weight_decay",
}


@dataclass(frozen=True)
class Resolved:
    """A config that ``deepspeed.initialize`` can take, and where each value in it came from, in words."""

    config: dict[str, Any]
    sources: dict[KeyPath, str]


def modern(ds_config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[KeyPath, KeyPath]]:
    """A copy with every key under its present name, and present name → name in `ds_config` of what was renamed.

    DeepSpeed takes these old names too, and stage 3's keys with and without ``stage3_``. Where both names are given the
    old one stays as it is.
    """
    config = copy.deepcopy(dict(ds_config))
    renamed: dict[KeyPath, KeyPath] = {}
    names = dict(RENAMED)
    if isinstance(config.get("zero_optimization"), dict):
        for key in config["zero_optimization"]:
            if f"stage3_{key}" in KEYS[("zero_optimization",)]:
                names["zero_optimization", key] = ("zero_optimization", f"stage3_{key}")
    for old, new in names.items():
        block = value_at(config, old[:-1]) if old[:-1] else config
        if not isinstance(block, dict) or old[-1] not in block or new[-1] in block:
            continue
        value = block.pop(old[-1])
        if old[-1].startswith("cpu_offload"):
            value = {"device": "cpu"} if value is True else None
        if value is not None:
            block[new[-1]] = value
            renamed[new] = old
    return config, renamed


def left_out(ds_config: Mapping[str, Any]) -> dict[str, str]:
    """The blocks that `resolve` leaves out of a config although DeepSpeed would heed them, and why."""
    return {
        block: f"is left out of a run here: {why}"
        for block, why in LEFT_OUT.items()
        if block in ds_config and (value_at(ds_config, (block, "enabled")) is True) != (block in _ON_BY_BEING_THERE)
    }


def resolve_ds_config(
    ds_config: Mapping[str, Any],
    config: RunConfig,
    *,
    world_size: int,
    model_hidden_size: int,
    nvme_path: str | os.PathLike[str] | None = None,
    source: str | os.PathLike[str] = "DeepSpeed config",
    precisions: Sequence[str] | None = None,
) -> dict[str, Any]:
    """The config of `resolve`, for those who do not ask where its values came from."""
    file = DsFile(Path(source), dict(ds_config), {}, precisions)
    return resolve(file, config, world_size=world_size, model_hidden_size=model_hidden_size, nvme_path=nvme_path).config


def resolve(
    file: DsFile,
    config: RunConfig,
    *,
    world_size: int,
    model_hidden_size: int,
    nvme_path: str | os.PathLike[str] | None = None,
    origins: Mapping[str, str] | None = None,
) -> Resolved:
    """A copy of a file's config that ``deepspeed.initialize`` can take: the run's keys filled in, no ``"auto"`` left.

    Args:
        file: the DeepSpeed JSON.
        config: the run config.
        world_size: number of ranks.
        model_hidden_size: the width that ``"auto"`` bucket sizes follow.
        nvme_path: the folder that an ``"auto"`` ``nvme_path`` becomes.
        origins: where fields of the run config came from (``option``, ``preset large`` …), for `Resolved.sources`.

    ``"auto"`` has the meaning that the Hugging Face Trainer gives it; old names of keys become the present ones.

    Raises:
        UserError: a key of the run that the JSON sets to another value, or an ``"auto"`` that nothing can fill.
    """
    resolved, renamed = modern(file.config)
    filled = _Filled(resolved, file, {})
    for path, _ in leaves(resolved):
        old = next((old for new, old in renamed.items() if path[: len(new)] == new), None)
        filled.sources[path] = file.where(old or path) + (f", as {'.'.join(old)}" if old else "")
    if "optimizer" not in resolved:
        for path, value in leaves(DEFAULT_OPTIMIZER):
            filled.set(("optimizer", *path), copy.deepcopy(value), "the recipe's: the file names no optimizer")
    blocks = ("optimizer", "scheduler", "zero_optimization", "timers")
    problems = [f"{key} must be an object {{...}}" for key in blocks if not isinstance(resolved.get(key, {}), dict)]
    problems = problems or _fill_run_values(filled, config, world_size, origins or {})
    if problems:
        raise UserError(f"{file.path}: " + "; ".join(problems))

    for block in LEFT_OUT:
        if block != "comms_logger" or value_at(resolved, (block, "enabled")) is not True:
            resolved.pop(block, None)
    for path, value in list(leaves(resolved)):
        if isinstance(value, float) and _kind(path).name == "int" and value.is_integer():
            set_value(resolved, path, int(value))  # 5e8, as DeepSpeed reads it
        elif path[-1] in PATH_KEYS and isinstance(value, str) and value not in ("", "auto"):
            try:
                set_value(resolved, path, str(Path(expand(value)).absolute()))
            except UserError as error:
                problems.append(f"{'.'.join(path)} cannot be {error}")
    filled.default(("zero_optimization", "stage"), 0, "DeepSpeed's default")
    # The throughput timer synchronises the device twice a micro-step; the wall clock breakdown more often still.
    filled.default(("timers", "throughput", "enabled"), False, "set here: DeepSpeed's own default costs time")
    filled.default(("wall_clock_breakdown",), False, "DeepSpeed's default")
    filled.set(("steps_per_print",), STEPS_PER_PRINT, "set here: the run has its own log, and DeepSpeed's costs time")

    for path, (chosen, why) in settled_precision(resolved, file.followed).items():
        filled.set(path, chosen, f'"auto" at {file.where(path)}: {why}')
    for path, (value, why) in auto_meanings(model_hidden_size, nvme_path).items():
        if value_at(resolved, path) == "auto":
            filled.set(path, value, f'"auto" at {file.where(path)}: {why}')
    # Here "auto" is DeepSpeed's own word and its default.
    if value_at(resolved, ("data_types", "keep_in_fp32_modules")) == "auto":
        del resolved["data_types"]["keep_in_fp32_modules"]
        if not resolved["data_types"]:
            del resolved["data_types"]
    for path, value in leaves(resolved):
        if value == "auto" and not _kind(path).takes_auto:
            problems.append(f'{".".join(path)} is "auto" and the run has no value for it; write one or remove the key')
    if problems:
        raise UserError(f"{file.path}: " + "; ".join(problems))
    return Resolved(resolved, {path: filled.sources[path] for path, _ in leaves(resolved)})


@dataclass(frozen=True)
class _Filled:
    """A config while it is filled in, with the source of each value."""

    config: dict[str, Any]
    file: DsFile
    sources: dict[KeyPath, str]

    def set(self, path: KeyPath, value: Any, source: str) -> None:
        set_value(self.config, path, value)
        self.sources[path] = source

    def default(self, path: KeyPath, value: Any, source: str) -> None:
        if value_at(self.config, path) is None:
            self.set(path, value, source)


def _fill_run_values(filled: _Filled, config: RunConfig, world_size: int, origins: Mapping[str, str]) -> list[str]:
    """Sets the run's keys; returns the conflicts with values that are already there."""
    problems = []
    accumulation = config.gradient_accumulation_steps(world_size)
    for path, field in RUN_OWNED_KEYS.items():
        value = accumulation if path == ACCUMULATION else getattr(config, field)
        present = value_at(filled.config, path)
        if present not in (None, "auto", value) or isinstance(present, bool):
            problems.append(
                f"{'.'.join(path)} is {present!r} but the run config's {field} says {value!r}; "
                f"remove the key from the JSON"
            )
        else:
            source = f"run config: {field}" + (f" ({origins[field]})" if field in origins else "")
            if path == ACCUMULATION:
                source += f" = {config.global_batch_size} / ({config.micro_batch_size} x {world_size})"
            filled.set(path, value, source)
    scheduler = filled.config.get("scheduler")
    if scheduler is not None:
        if any(value != "auto" for path, value in leaves(scheduler) if path[0] == "params"):
            problems.append(
                "scheduler belongs to the run config (lr_scheduler_type, num_warmup_steps); remove the block"
            )
        del filled.config["scheduler"]
    return problems


def auto_meanings(hidden: int, nvme_path: str | os.PathLike[str] | None) -> dict[KeyPath, tuple[Any, str]]:
    """What each ``"auto"`` but a precision's means and why: those of the Trainer's integration, and NVMe paths."""
    zero, adam = "zero_optimization", "the recipe's"
    # Sizes as in transformers/integrations/deepspeed.py, HfTrainerDeepSpeedConfig.trainer_config_finalize.
    meanings: dict[KeyPath, tuple[Any, str]] = {
        ("optimizer", "params", "betas"): ([0.9, 0.999], adam),
        ("optimizer", "params", "eps"): (1e-8, adam),
        (zero, "reduce_bucket_size"): (hidden * hidden, "the model's width squared"),
        (zero, "stage3_prefetch_bucket_size"): (int(0.9 * hidden * hidden), "0.9 x the model's width squared"),
        (zero, "stage3_param_persistence_threshold"): (10 * hidden, "10 x the model's width"),
        (zero, "stage3_gather_16bit_weights_on_model_save"): (False, "the run writes its own export"),
        ("wall_clock_breakdown",): (False, "DeepSpeed's default"),
        ("timers", "throughput", "enabled"): (False, "the timer costs time"),
    }
    if nvme_path is not None:
        for block in ("offload_optimizer", "offload_param"):
            meanings[(zero, block, "nvme_path")] = (os.fspath(nvme_path), "in the run's folder")
    return meanings


def _kind(path: KeyPath) -> Kind:
    return KEYS.get(path[:-1], {}).get(path[-1], ANY)
