"""DeepSpeed JSON files: find, read, and fill in the keys that belong to the run.

The JSON owns ZeRO, precision, optimizer kernel, activation checkpointing and communication. `resolve_ds_config` is the
one place where the run config's values enter it.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from codeparrot_ds.config import RunConfig, did_you_mean
from codeparrot_ds.errors import UserError

KeyPath = tuple[str, ...]

# DeepSpeed prints a progress line and synchronises for it every so many steps; the run has its own log.
STEPS_PER_PRINT = 1_000_000_000
# A JSON without an optimizer gets the recipe's.
DEFAULT_OPTIMIZER = {"type": "AdamW", "params": {"betas": [0.9, 0.999], "eps": 1e-8}}
# Each key that the run config owns, and the field that fills it.
RUN_OWNED_KEYS: Mapping[KeyPath, str] = {
    ("train_batch_size",): "global_batch_size",
    ("train_micro_batch_size_per_gpu",): "micro_batch_size",
    ("gradient_accumulation_steps",): "global_batch_size / (micro_batch_size x world_size)",
    ("gradient_clipping",): "max_grad_norm",
    ("optimizer", "params", "lr"): "learning_rate",
    ("optimizer", "params", "weight_decay"): "weight_decay",
}


# --------------------------------------------------------------------------------------------------------------------
# Files


def ds_configs_folder() -> Path:
    """The folder of the shipped files: the repository's in a checkout, the package's in an installed wheel."""
    package = Path(__file__).resolve().parents[1]
    in_package = package / "ds_configs"
    return in_package if in_package.is_dir() else package.parent / "ds_configs"


def shipped_names() -> list[str]:
    """Names that `find_ds_config` knows without a path."""
    return sorted(path.stem for path in ds_configs_folder().glob("*.json"))


def find_ds_config(name_or_path: str | os.PathLike[str]) -> Path:
    """The file that ``zero2``, ``zero2.json`` or a path means; `UserError` with the nearest shipped name otherwise."""
    text = os.fspath(name_or_path)
    path = Path(text)
    if path.is_file():
        return path
    if path.is_dir():
        raise UserError(f"{text} is a folder; --deepspeed takes one JSON file or a shipped name such as zero2")
    shipped = ds_configs_folder() / (text if text.endswith(".json") else text + ".json")
    if path.name == text and shipped.is_file():
        return shipped
    hint = did_you_mean(path.name.removesuffix(".json"), shipped_names())
    raise UserError(f"DeepSpeed config {text!r} is neither a file nor a shipped config{hint}")


def load_ds_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON object in `path`; `UserError` with line and column when it is not plain JSON."""
    path = Path(path)
    if path.suffix in (".yaml", ".yml"):
        raise UserError(f"{path} is YAML; a DeepSpeed config is a JSON file")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such DeepSpeed config") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; a DeepSpeed config is one JSON file") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a text file; a DeepSpeed config is a JSON file") from None
    if not text.strip():
        raise UserError(f'{path} is empty; the smallest DeepSpeed config is {{"zero_optimization": {{"stage": 2}}}}')
    try:
        config = json.loads(text, object_pairs_hook=_refuse_duplicates, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}:{error.colno}: {_why_not_json(text, error)}") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: a DeepSpeed config is a JSON object {{...}}, not {type(config).__name__}")
    return config


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    config: dict[str, Any] = {}
    for key, value in pairs:
        if key in config:
            raise ValueError(f"key {key!r} is given twice in one object")
        config[key] = value
    return config


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _why_not_json(text: str, error: json.JSONDecodeError) -> str:
    rest = text[error.pos :].lstrip()
    before = text[: error.pos].rstrip()
    if rest.startswith(("//", "/*", "#")):
        return "not JSON: JSON has no comments; remove it"
    if (rest.startswith(("}", "]")) and before.endswith(",")) or "trailing comma" in error.msg:
        return "not JSON: a comma before the closing bracket; remove it"
    if rest.startswith("'"):
        return "not JSON: text needs double quotes"
    return f"not JSON: {error.msg}"


# --------------------------------------------------------------------------------------------------------------------
# What a config says


def zero_stage(ds_config: Mapping[str, Any]) -> int:
    """ZeRO stage 0-3; 0 when the config names none."""
    zero = ds_config.get("zero_optimization")
    return int(zero.get("stage", 0)) if isinstance(zero, Mapping) else int(bool(zero))


def precision(ds_config: Mapping[str, Any]) -> str:
    """``"bf16"``, ``"fp16"`` or ``"fp32"``: what the weights are trained in."""
    for name, keys in (("bf16", ("bf16", "bfloat16")), ("fp16", ("fp16",))):
        if any(value_at(ds_config, (key, "enabled")) is True for key in keys):
            return name
    return "fp32"


def offload_device(ds_config: Mapping[str, Any], what: str) -> str:
    """``"none"``, ``"cpu"`` or ``"nvme"``: where `what` (``"optimizer"`` or ``"parameters"``) lives."""
    block = {"optimizer": "offload_optimizer", "parameters": "offload_param"}[what]
    return value_at(ds_config, ("zero_optimization", block, "device")) or "none"


def activation_checkpointing(ds_config: Mapping[str, Any]) -> bool:
    """Whether the ``activation_checkpointing`` block is there: DeepSpeed itself has no key that switches it on."""
    return ds_config.get("activation_checkpointing") is not None


def uses_nvme(ds_config: Mapping[str, Any]) -> bool:
    """Whether anything is offloaded to NVMe."""
    return "nvme" in (offload_device(ds_config, "optimizer"), offload_device(ds_config, "parameters"))


def value_at(config: Mapping[str, Any], path: KeyPath) -> Any:
    """The value at a key path, or None where the path does not lead anywhere."""
    value: Any = config
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _set(config: dict[str, Any], path: KeyPath, value: Any) -> None:
    for key in path[:-1]:
        config = config.setdefault(key, {})
    config[path[-1]] = value


def leaves(config: Mapping[str, Any], prefix: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Every key path of a config that does not lead to another block, and its value."""
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, (*prefix, key))
        else:
            yield (*prefix, key), value


# --------------------------------------------------------------------------------------------------------------------
# Resolution


def run_values(config: RunConfig, world_size: int) -> dict[KeyPath, Any]:
    """The values of `RUN_OWNED_KEYS` for a run on `world_size` ranks."""
    return {
        ("train_batch_size",): config.global_batch_size,
        ("train_micro_batch_size_per_gpu",): config.micro_batch_size,
        ("gradient_accumulation_steps",): config.gradient_accumulation_steps(world_size),
        ("gradient_clipping",): config.max_grad_norm,
        ("optimizer", "params", "lr"): config.learning_rate,
        ("optimizer", "params", "weight_decay"): config.weight_decay,
    }


def resolve_ds_config(
    ds_config: Mapping[str, Any],
    config: RunConfig,
    *,
    world_size: int,
    model_hidden_size: int,
    nvme_path: str | os.PathLike[str] | None = None,
    source: str | os.PathLike[str] = "DeepSpeed config",
) -> dict[str, Any]:
    """A copy of `ds_config` that ``deepspeed.initialize`` can take: the run's keys filled in, nothing ``"auto"`` left.

    ``"auto"`` has the meaning that the Hugging Face Trainer gives it. `nvme_path` is the folder that an ``"auto"``
    ``nvme_path`` becomes. `source` names the file in errors. `UserError` for a key of the run that the JSON sets to
    another value, and for an ``"auto"`` that nothing can fill.
    """
    resolved = copy.deepcopy(dict(ds_config))
    resolved.setdefault("optimizer", copy.deepcopy(DEFAULT_OPTIMIZER))
    blocks = ("optimizer", "zero_optimization", "timers")
    problems = [f"{key} must be an object {{...}}" for key in blocks if not isinstance(resolved.get(key, {}), dict)]
    problems = problems or _fill_run_values(resolved, config, world_size)
    if problems:
        raise UserError(f"{source}: " + "; ".join(problems))

    resolved.setdefault("zero_optimization", {}).setdefault("stage", 0)
    # The throughput timer synchronises the device twice a micro-step; the wall clock breakdown more often still.
    resolved.setdefault("timers", {}).setdefault("throughput", {}).setdefault("enabled", False)
    resolved.setdefault("wall_clock_breakdown", False)
    resolved["steps_per_print"] = STEPS_PER_PRINT

    _fill_auto(resolved, model_hidden_size=model_hidden_size, nvme_path=nvme_path)
    for path, value in leaves(resolved):
        if value == "auto":
            problems.append(f'{".".join(path)} is "auto" and the run has no value for it; write one or remove the key')
    if problems:
        raise UserError(f"{source}: " + "; ".join(problems))
    return resolved


def _fill_run_values(resolved: dict[str, Any], config: RunConfig, world_size: int) -> list[str]:
    """Sets the run's keys; returns the conflicts with values that are already there."""
    problems = []
    for path, value in run_values(config, world_size).items():
        present = value_at(resolved, path)
        if present not in (None, "auto", value) or isinstance(present, bool):
            problems.append(
                f"{'.'.join(path)} is {present!r} but the run config's {RUN_OWNED_KEYS[path]} says {value!r}; "
                f"remove the key from the JSON"
            )
        else:
            _set(resolved, path, value)
    scheduler = resolved.get("scheduler")
    if scheduler is not None:
        if any(value != "auto" for path, value in leaves(scheduler) if path[0] == "params"):
            problems.append(
                "scheduler belongs to the run config (lr_scheduler_type, num_warmup_steps); remove the block"
            )
        del resolved["scheduler"]
    return problems


def _fill_auto(resolved: dict[str, Any], *, model_hidden_size: int, nvme_path: str | os.PathLike[str] | None) -> None:
    """Replaces each ``"auto"`` that has a meaning: those of the Trainer's DeepSpeed integration, and NVMe paths."""
    hidden = model_hidden_size
    zero = "zero_optimization"
    # Sizes as in transformers/integrations/deepspeed.py, HfTrainerDeepSpeedConfig.trainer_config_finalize.
    meanings: dict[KeyPath, Any] = {
        ("optimizer", "params", "betas"): [0.9, 0.999],
        ("optimizer", "params", "eps"): 1e-8,
        (zero, "reduce_bucket_size"): hidden * hidden,
        (zero, "stage3_prefetch_bucket_size"): int(0.9 * hidden * hidden),
        (zero, "stage3_param_persistence_threshold"): 10 * hidden,
        (zero, "stage3_gather_16bit_weights_on_model_save"): False,
        ("wall_clock_breakdown",): False,
        ("timers", "throughput", "enabled"): False,
        # The Trainer's switch is a flag; here a file that leaves it open trains in bf16.
        ("bf16", "enabled"): value_at(resolved, ("fp16", "enabled")) is not True,
        ("fp16", "enabled"): "bf16" not in resolved,
    }
    if nvme_path is not None:
        for block in ("offload_optimizer", "offload_param"):
            meanings[(zero, block, "nvme_path")] = os.fspath(nvme_path)
    for path, value in meanings.items():
        if value_at(resolved, path) == "auto":
            _set(resolved, path, value)
    # Here "auto" is DeepSpeed's own word and its default.
    if value_at(resolved, ("data_types", "keep_in_fp32_modules")) == "auto":
        del resolved["data_types"]["keep_in_fp32_modules"]
