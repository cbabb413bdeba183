"""DeepSpeed JSON files: find, read, and fill in the keys that belong to the run.

The JSON owns ZeRO, precision, optimizer kernel, activation checkpointing and communication. `resolve` is the one
place where the run config's values enter it.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from codeparrot_ds.config import RunConfig, did_you_mean
from codeparrot_ds.errors import UserError
from codeparrot_ds.paths import did_you_mean_path, expand
from codeparrot_ds.zero.known_keys import KEYS, RENAMED, KeyPath
from codeparrot_ds.zero.positions import key_lines, line_of

# DeepSpeed prints a progress line and synchronises for it every so many steps; the run has its own log.
STEPS_PER_PRINT = 1_000_000_000
# A JSON without an optimizer gets the recipe's.
DEFAULT_OPTIMIZER = {"type": "AdamW", "params": {"betas": [0.9, 0.999], "eps": 1e-8}}
# Keys, in whatever block, that hold paths.
PATH_KEYS = ("nvme_path", "output_path", "output_file")
# Each key that the run config owns, and the field that fills it.
RUN_OWNED_KEYS: Mapping[KeyPath, str] = {
    ("train_batch_size",): "global_batch_size",
    ("train_micro_batch_size_per_gpu",): "micro_batch_size",
    ("gradient_accumulation_steps",): "global_batch_size / (micro_batch_size x world_size)",
    ("gradient_clipping",): "max_grad_norm",
    ("optimizer", "params", "lr"): "learning_rate",
    ("optimizer", "params", "weight_decay"): "weight_decay",
}
AUTO = ":auto"
"""Behind a shipped name: that config in the precision that the device multiplies fastest."""
GPU_PRECISIONS, CPU_PRECISIONS = ("bf16", "fp16", "fp32"), ("bf16", "fp32")
"""What a device trains in of which nothing is known, the fastest first (`codeparrot_ds.run.precision` asks one)."""


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
    if text.endswith(AUTO):
        return find_ds_config(name_in(text, "bf16"))
    shipped = ds_configs_folder() / (text if text.endswith(".json") else text + ".json")
    if path.name == text and shipped.is_file():
        return shipped
    if path.is_dir():
        raise UserError(f"{text} is a folder; --deepspeed takes one JSON file or a shipped name such as zero2")
    hint = did_you_mean(path.name.removesuffix(".json"), shipped_names())
    if path.name != text or text.endswith(".json"):
        hint = did_you_mean_path(text) or hint
    if text == AUTO[1:]:
        hint = f"; write NAME{AUTO}, such as zero2{AUTO}"
    raise UserError(f"DeepSpeed config {text!r} is neither a file nor a shipped config{hint}")


def name_in(name: str, precision: str) -> str:
    """``zero2:auto`` in ``fp32`` → ``zero2_fp32``; a name without ``:auto`` and a path stay what they are.

    Raises:
        UserError: no such file is shipped.
    """
    if not name.endswith(AUTO) or Path(name).is_file():
        return name
    base, names = name.removesuffix(AUTO), shipped_names()
    with_auto = [other for other in names if f"{other}_fp32" in names and f"{other}_fp16" in names]
    if base in with_auto:
        return base if precision == "bf16" else f"{base}_{precision}"
    if Path(base).is_file():
        raise UserError(f'{AUTO} goes with a shipped name; in {base} write "enabled": "auto" for bf16 and fp16')
    if base not in names:
        raise UserError(f"DeepSpeed config {name!r} is no shipped config{did_you_mean(name, _with_auto(with_auto))}")
    # On this machine it may be shipped: but not on every one that the run goes to.
    raise UserError(f"{base} is not shipped in every precision: name a file, or {', '.join(_with_auto(with_auto))}")


def _with_auto(names: Sequence[str]) -> list[str]:
    """Shipped names with ``:auto``."""
    return [name + AUTO for name in names]


@dataclass(frozen=True)
class DsFile:
    """A DeepSpeed JSON as read: what it says, the line of each key, and what it is read for.

    ``precisions`` are those that the device trains in, the fastest first; None is any device. ``began`` is the
    precision of the run that goes on, which ``"enabled": "auto"`` follows before the device's.
    """

    path: Path
    config: dict[str, Any]
    lines: dict[KeyPath, int]
    precisions: Sequence[str] | None = None
    began: str | None = None

    @property
    def followed(self) -> Sequence[str]:
        """What ``"enabled": "auto"`` follows, first to last."""
        device = self.precisions or GPU_PRECISIONS
        return device if self.began is None else (self.began, *(name for name in device if name != self.began))

    def where(self, path: KeyPath) -> str:
        """``file:line`` of a key, for a reader."""
        line = line_of(self.lines, path)
        return f"{self.path}:{line}" if line else str(self.path)


def load_ds_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON object in `path`; `UserError` with line and column when it is not plain JSON."""
    return read_ds_config(path).config


def open_ds_config(
    name_or_path: str, precisions: Sequence[str] = GPU_PRECISIONS, *, began: str | None = None
) -> DsFile:
    """The file that a name, ``NAME:auto`` or a path means, as read.

    Args:
        name_or_path: as in the run config.
        precisions: that the device trains in, the fastest first.
        began: the precision of a run that goes on.
    """
    file = read_ds_config(find_ds_config(name_in(name_or_path, began or precisions[0])))
    return dataclasses.replace(file, precisions=precisions, began=began)


def read_ds_config(path: str | os.PathLike[str]) -> DsFile:
    """The JSON object in `path` with its keys' lines; `UserError` with line and column when it is not plain JSON."""
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
    return DsFile(path, config, key_lines(text))


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
    if error.pos == len(text) - len(text.lstrip()) and re.match(r"[\w.-]+\s*:(\s|$)", rest):
        return "not JSON: this looks like YAML; a DeepSpeed config is a JSON file"
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


def settled_precision(ds_config: Mapping[str, Any], precisions: Sequence[str]) -> dict[KeyPath, tuple[bool, str]]:
    """What each ``"enabled": "auto"`` of bf16 and fp16 becomes on a device that trains in `precisions`, and why.

    As the Hugging Face Trainer's flags would, it switches one of them on: the fastest of the device's that the file
    leaves open. A file that knows bf16 alone, as most that are published, gets fp16 on a GPU without bf16.
    """
    old = "bfloat16" in ds_config and "bf16" not in ds_config
    blocks = {"bf16": "bfloat16" if old else "bf16", "fp16": "fp16"}
    said = {name: value_at(ds_config, (block, "enabled")) for name, block in blocks.items()}
    left_open = [name for name, value in said.items() if value == "auto"]
    if not left_open:
        return {}
    chosen = next((name for name, value in said.items() if value is True), None)
    if chosen is not None:
        return {(blocks[name], "enabled"): (False, f"{chosen} is on") for name in left_open}
    possible = [*left_open, "fp32", *(["fp16"] if "fp16" not in ds_config else [])]
    chosen = next((name for name in precisions if name in possible), "fp32")
    why = f"the device trains in {' or '.join(precisions)}"
    return {(blocks[name], "enabled"): (name == chosen, why) for name in said if name in left_open or name == chosen}


def with_settled_precision(ds_config: Mapping[str, Any], precisions: Sequence[str]) -> dict[str, Any]:
    """A copy of a config in which `settled_precision` stands for ``"auto"``."""
    config = copy.deepcopy(dict(ds_config))
    for path, (value, _) in settled_precision(config, precisions).items():
        _set(config, path, value)
    return config


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
        if not isinstance(config.get(key), dict):
            config[key] = {}
        config = config[key]
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


@dataclass(frozen=True)
class Resolved:
    """A config that ``deepspeed.initialize`` can take, and where each value in it came from, in words."""

    config: dict[str, Any]
    sources: dict[KeyPath, str]


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

    for path, value in list(leaves(resolved)):
        if isinstance(value, float) and _kind(path) == "int" and value.is_integer():
            _set(resolved, path, int(value))  # 5e8, as DeepSpeed reads it
        elif path[-1] in PATH_KEYS and isinstance(value, str) and value not in ("", "auto"):
            try:
                _set(resolved, path, str(Path(expand(value)).absolute()))
            except UserError as error:
                problems.append(f"{'.'.join(path)} cannot be {error}")
    mended = "set here: DeepSpeed's own default costs time"
    filled.default(("zero_optimization", "stage"), 0, "DeepSpeed's default")
    # The throughput timer synchronises the device twice a micro-step; the wall clock breakdown more often still.
    filled.default(("timers", "throughput", "enabled"), False, mended)
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
        if value == "auto" and not _takes_auto(path):
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
        _set(self.config, path, value)
        self.sources[path] = source

    def default(self, path: KeyPath, value: Any, source: str) -> None:
        if value_at(self.config, path) is None:
            self.set(path, value, source)


def _fill_run_values(filled: _Filled, config: RunConfig, world_size: int, origins: Mapping[str, str]) -> list[str]:
    """Sets the run's keys; returns the conflicts with values that are already there."""
    problems = []
    for path, value in run_values(config, world_size).items():
        present, field = value_at(filled.config, path), RUN_OWNED_KEYS[path]
        if present not in (None, "auto", value) or isinstance(present, bool):
            problems.append(
                f"{'.'.join(path)} is {present!r} but the run config's {field} says {value!r}; "
                f"remove the key from the JSON"
            )
        else:
            source = f"run config: {field}" + (f" ({origins[field]})" if field in origins else "")
            if path == ("gradient_accumulation_steps",):
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


def _kind(path: KeyPath) -> str | None:
    kind = KEYS.get(path[:-1], {}).get(path[-1])
    return None if kind is None else kind.name


def _takes_auto(path: KeyPath) -> bool:
    kind = KEYS.get(path[:-1], {}).get(path[-1])
    return kind is not None and kind.takes_auto
