"""DeepSpeed JSON files: find, read, and fill in the keys that belong to the run.

The JSON owns ZeRO, precision, optimizer kernel, activation checkpointing and communication. `resolve` is the one
place where the run config's values enter it.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
ROWS: KeyPath = ("train_batch_size",)
ACCUMULATION: KeyPath = ("gradient_accumulation_steps",)
MICRO_BATCH: KeyPath = ("train_micro_batch_size_per_gpu",)
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
    ROWS: "global_batch_size",
    MICRO_BATCH: "micro_batch_size",
    ACCUMULATION: "global_batch_size / (micro_batch_size x world_size)",
    ("gradient_clipping",): "max_grad_norm",
    ("optimizer", "params", "lr"): "learning_rate",
    ("optimizer", "params", "weight_decay"): "weight_decay",
}


@dataclass(frozen=True)
class Auto:
    """Where a value stands as ``"auto"`` in the file: the key, under its present name, and why it became what it is."""

    key: KeyPath
    why: str


@dataclass(frozen=True)
class Resolved:
    """A config that ``deepspeed.initialize`` can take, and where each value in it came from, in words."""

    config: dict[str, Any]
    sources: dict[KeyPath, str]
    autos: dict[KeyPath, Auto] = field(default_factory=dict)
    """Of each value that an ``"auto"`` became."""


# What keeps a config from being resolved: a key under its present name, and what is wrong with it.
Problem = tuple[KeyPath, str]


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


def present_name(path: KeyPath) -> KeyPath:
    """The name that `modern` gives a key."""
    for old, new in RENAMED.items():
        if path[: len(old)] == old:
            return (*new, *path[len(old) :])
    longer = f"stage3_{path[-1]}"
    return (*path[:-1], longer) if path[:-1] == ("zero_optimization",) and longer in KEYS[path[:-1]] else path


def fills_auto(path: KeyPath) -> bool:
    """Whether ``"auto"`` means something at a key: DeepSpeed's own word, or what a run fills in."""
    now = present_name(path)
    meant = now in RUN_OWNED_KEYS or now in _AUTO or now[0] == "scheduler"
    return meant or _kind(path).takes_auto


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
    blocks = ("optimizer", "scheduler", "zero_optimization", "timers")
    problems: list[Problem] = [
        ((key,), "must be an object {...}") for key in blocks if not isinstance(file.config.get(key, {}), dict)
    ]
    if not problems:
        config.gradient_accumulation_steps(world_size)  # refuses ranks that cannot share the rows of a step
        resolved, problems = fill(
            file,
            config,
            world_size=world_size,
            model_hidden_size=model_hidden_size,
            nvme_path=nvme_path,
            origins=origins or {},
        )
        problems += [
            (path, 'is "auto" and the run has no value for it; write one or remove the key')
            for path, value in leaves(resolved.config)
            if value == "auto" and not _kind(path).takes_auto
        ]
    if problems:
        raise UserError(f"{file.path}: " + "; ".join(f"{'.'.join(path)} {what}" for path, what in problems))
    return resolved


def fill(
    file: DsFile,
    config: RunConfig | None,
    *,
    world_size: int | None,
    model_hidden_size: int | None,
    nvme_path: str | os.PathLike[str] | None = None,
    origins: Mapping[str, str] | None = None,
) -> tuple[Resolved, list[Problem]]:
    """`resolve` as far as the run is known, for the config check: what is not known stays ``"auto"``.

    Where the file contradicts the run, the run's value stands in the result and the problem is returned.
    """
    resolved, renamed = modern(file.config)
    for block in LEFT_OUT:
        if block != "comms_logger" or value_at(resolved, (block, "enabled")) is not True:
            resolved.pop(block, None)
    filled = _Filled(resolved, file, renamed)
    for path, _ in leaves(resolved):
        old = filled.written(path)
        filled.sources[path] = filled.where(path) + (f", as {'.'.join(old)}" if old != path else "")
    if "optimizer" not in resolved:
        for path, value in leaves(DEFAULT_OPTIMIZER):
            filled.set(("optimizer", *path), copy.deepcopy(value), "the recipe's: the file names no optimizer")
    problems = [] if config is None else _fill_run_values(filled, config, world_size, origins or {})
    filled.default(("zero_optimization", "stage"), 0, "DeepSpeed's default")
    # The throughput timer synchronises the device twice a micro-step; the wall clock breakdown more often still.
    filled.default(("timers", "throughput", "enabled"), False, "set here: DeepSpeed's own default costs time")
    filled.default(("wall_clock_breakdown",), False, "DeepSpeed's default")
    filled.set(("steps_per_print",), STEPS_PER_PRINT, "set here: the run has its own log, and DeepSpeed's costs time")

    settled = settled_precision(resolved, file.followed)
    left_open = [path for path in settled if value_at(resolved, path) == "auto"]
    for path, (chosen, why) in settled.items():
        filled.settle(path, chosen, why, path if path in left_open else left_open[0])
    for path, (value, why) in auto_meanings(model_hidden_size, nvme_path).items():
        if value_at(resolved, path) == "auto":
            filled.settle(path, value, why, path)
    # Here "auto" is DeepSpeed's own word and its default.
    if value_at(resolved, ("data_types", "keep_in_fp32_modules")) == "auto":
        del resolved["data_types"]["keep_in_fp32_modules"]
        if not resolved["data_types"]:
            del resolved["data_types"]
    for path, value in list(leaves(resolved)):
        if isinstance(value, float) and _kind(path).name == "int" and value.is_integer():
            set_value(resolved, path, int(value))  # 5e8, as DeepSpeed reads it
        elif path[-1] in PATH_KEYS and isinstance(value, str) and value not in ("", "auto"):
            try:
                set_value(resolved, path, str(Path(expand(value)).absolute()))
            except UserError as error:
                problems.append((path, f"cannot be {error}"))
    sources = {path: filled.sources[path] for path, _ in leaves(resolved)}
    return Resolved(resolved, sources, filled.autos), problems


@dataclass(frozen=True)
class _Filled:
    """A config while it is filled in, with the source of each value."""

    config: dict[str, Any]
    file: DsFile
    renamed: Mapping[KeyPath, KeyPath]
    sources: dict[KeyPath, str] = field(default_factory=dict)
    autos: dict[KeyPath, Auto] = field(default_factory=dict)

    def set(self, path: KeyPath, value: Any, source: str) -> None:
        set_value(self.config, path, value)
        self.sources[path] = source

    def default(self, path: KeyPath, value: Any, source: str) -> None:
        if value_at(self.config, path) is None:
            self.set(path, value, source)

    def settle(self, path: KeyPath, value: Any, why: str, auto: KeyPath) -> None:
        """Sets what the ``"auto"`` at a key became."""
        self.autos[path] = Auto(auto, why)
        self.set(path, value, f'"auto" at {self.where(auto)}: {why}')

    def written(self, path: KeyPath) -> KeyPath:
        """The old name in the file of a key, or of the block around it; `path` where it has the present one."""
        return next((old for new, old in self.renamed.items() if path[: len(new)] == new), path)

    def where(self, path: KeyPath) -> str:
        return self.file.where(self.written(path))


def run_values(config: RunConfig, world_size: int | None) -> dict[KeyPath, Any]:
    """What the run config says of each of its keys, but for what is not decided yet: a micro-batch, or the ranks."""
    values = {path: getattr(config, name) for path, name in RUN_OWNED_KEYS.items() if path != ACCUMULATION}
    if config.auto_micro_batch:
        del values[MICRO_BATCH]
        return values
    values[MICRO_BATCH] = config.micro_batch_rows
    if world_size is not None and config.global_batch_size % (rows := config.micro_batch_rows * world_size) == 0:
        values[ACCUMULATION] = config.global_batch_size // rows
    return values


def nvme_folder(config: RunConfig) -> Path:
    """What an ``"auto"`` ``nvme_path`` becomes in a run."""
    return Path(config.output_dir) / (config.run_name or "RUN") / "nvme"


def _fill_run_values(
    filled: _Filled, config: RunConfig, world_size: int | None, origins: Mapping[str, str]
) -> list[Problem]:
    """Sets the run's keys; returns the conflicts with values that are already there."""
    problems: list[Problem] = []
    for path, value in run_values(config, world_size).items():
        name = RUN_OWNED_KEYS[path]
        source = f"run config: {name}" + (f" ({origins[name]})" if name in origins else "")
        if path == ACCUMULATION:
            source += f" = {config.global_batch_size} / ({config.micro_batch_rows} x {world_size})"
        present = value_at(filled.config, path)
        if present == "auto":
            filled.autos[path] = Auto(path, source)
        elif present not in (None, value) or isinstance(present, bool):
            problems.append((path, f"is {present!r} but the run config's {name} says {value!r}; remove the key"))
        filled.set(path, value, source)
    scheduler = filled.config.pop("scheduler", None)
    if scheduler is not None and any(value != "auto" for path, value in leaves(scheduler) if path[0] == "params"):
        problems.append(
            (("scheduler",), "belongs to the run config (lr_scheduler_type, num_warmup_steps); remove the block")
        )
    return problems


def auto_meanings(hidden: int | None, nvme_path: str | os.PathLike[str] | None) -> dict[KeyPath, tuple[Any, str]]:
    """What each ``"auto"`` but the run's and a precision's means and why, as far as width and folder are known.

    They are those of the Trainer's integration, and NVMe paths.
    """
    zero, adam = "zero_optimization", "the recipe's"
    meanings: dict[KeyPath, tuple[Any, str]] = {
        ("optimizer", "params", "betas"): ([0.9, 0.999], adam),
        ("optimizer", "params", "eps"): (1e-8, adam),
        (zero, "stage3_gather_16bit_weights_on_model_save"): (False, "the run writes its own export"),
        ("wall_clock_breakdown",): (False, "DeepSpeed's default"),
        ("timers", "throughput", "enabled"): (False, "the timer costs time"),
    }
    if hidden is not None:
        # Sizes as in transformers/integrations/deepspeed.py, HfTrainerDeepSpeedConfig.trainer_config_finalize.
        meanings |= {
            (zero, "reduce_bucket_size"): (hidden * hidden, "the model's width squared"),
            (zero, "stage3_prefetch_bucket_size"): (int(0.9 * hidden * hidden), "0.9 x the model's width squared"),
            (zero, "stage3_param_persistence_threshold"): (10 * hidden, "10 x the model's width"),
        }
    if nvme_path is not None:
        for block in ("offload_optimizer", "offload_param"):
            meanings[(zero, block, "nvme_path")] = (os.fspath(nvme_path), "in the run's folder")
    return meanings


def _kind(path: KeyPath) -> Kind:
    return KEYS.get(path[:-1], {}).get(path[-1], ANY)


_AUTO = frozenset({*auto_meanings(1, ""), ("bf16", "enabled"), ("fp16", "enabled")})
