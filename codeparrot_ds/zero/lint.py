"""Checks a DeepSpeed JSON before anything runs: DeepSpeed itself ignores a mistyped key and trains on.

No torch and no DeepSpeed is imported; what DeepSpeed knows stands in ``known_keys``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from codeparrot_ds.config import RunConfig, did_you_mean
from codeparrot_ds.zero.ds_config import (
    RUN_OWNED_KEYS,
    KeyPath,
    leaves,
    offload_device,
    precision,
    value_at,
    zero_stage,
)
from codeparrot_ds.zero.known_keys import (
    ADAM_PARAMS,
    CPU_OPTIMIZERS,
    KNOWN_KEYS,
    REMOVED_KEYS,
    REMOVED_ZERO_KEYS,
)


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong (``error``) or does not do what it seems to (``warning``)."""

    file: str
    key: str
    severity: str
    message: str

    def __str__(self) -> str:
        return f"{self.file}: {self.severity}: {self.key}: {self.message}"


# A rule yields (key path, severity, message).
Rule = Callable[["_Subject"], Iterator[tuple[KeyPath, str, str]]]


@dataclass(frozen=True)
class _Subject:
    ds_config: Mapping[str, Any]
    config: RunConfig | None
    device: str


def lint(
    ds_config: Mapping[str, Any],
    path: str | os.PathLike[str],
    *,
    config: RunConfig | None = None,
    device: str = "cuda",
) -> list[Finding]:
    """Everything wrong with `ds_config`, all at once.

    With `config`, keys of the run are compared with its values. `device` is what the ranks will have, ``"cpu"`` or
    ``"cuda"``.
    """
    subject = _Subject(ds_config, config, device)
    # The other rules read blocks, so a block that is not one is all that can be said.
    rules: tuple[Rule, ...] = (_blocks,) if any(_blocks(subject)) else RULES
    return [
        Finding(os.fspath(path), ".".join(key), severity, message)
        for rule in rules
        for key, severity, message in rule(subject)
    ]


def _blocks(subject: _Subject) -> Iterator[tuple[KeyPath, str, str]]:
    for path in (*KNOWN_KEYS, ("optimizer", "params"), ("scheduler", "params")):
        value = value_at(subject.ds_config, path)
        if path and value is not None and not isinstance(value, Mapping):
            example = ', such as {"stage": 2}' if path == ("zero_optimization",) else ""
            yield path, "error", f"must be an object {{...}}{example}, not {value!r}"
    stage = value_at(subject.ds_config, ("zero_optimization", "stage"))
    if stage is not None and (isinstance(stage, bool) or stage not in (0, 1, 2, 3)):
        yield ("zero_optimization", "stage"), "error", f"must be 0, 1, 2 or 3, not {stage!r}"


def _unknown_keys(subject: _Subject) -> Iterator[tuple[KeyPath, str, str]]:
    known_blocks = dict(KNOWN_KEYS)
    if str(value_at(subject.ds_config, ("optimizer", "type"))).lower() in ("adam", "adamw"):
        known_blocks[("optimizer", "params")] = ADAM_PARAMS
    for block, known in known_blocks.items():
        removed = {(): REMOVED_KEYS, ("zero_optimization",): REMOVED_ZERO_KEYS}.get(block, frozenset())
        for key in value_at(subject.ds_config, block) or {}:
            if key in removed:
                yield (*block, key), "error", "DeepSpeed has removed this feature; remove the key"
            elif block == ("optimizer", "params") and key == "max_grad_norm":
                yield (*block, key), "error", "clipping is set by the run config's max_grad_norm; remove the key"
            elif key not in known:
                elsewhere = sorted(".".join((*other, key)) for other, keys in known_blocks.items() if key in keys)
                hint = f"; it belongs at {elsewhere[0]}" if len(elsewhere) == 1 else did_you_mean(key, known)
                yield (*block, key), "error", f"unknown key, which DeepSpeed would ignore or refuse{hint}"


def _run_owned_keys(subject: _Subject) -> Iterator[tuple[KeyPath, str, str]]:
    for path, field in RUN_OWNED_KEYS.items():
        value = value_at(subject.ds_config, path)
        if value is None or value == "auto":
            continue
        wanted = getattr(subject.config, field, None) if subject.config else None
        if wanted is not None and (value != wanted or isinstance(value, bool)):
            yield path, "error", f"is {value!r} but the run config's {field} says {wanted!r}; remove the key"
        elif wanted is None:
            yield path, "warning", f"belongs to the run config ({field}); a run with another value refuses this file"
    scheduler = value_at(subject.ds_config, ("scheduler", "params")) or {}
    if any(value != "auto" for _, value in leaves(scheduler)):
        yield ("scheduler",), "error", "belongs to the run config (lr_scheduler_type, num_warmup_steps); remove it"
    for monitor in ("tensorboard", "wandb", "csv_monitor", "comet"):
        if value_at(subject.ds_config, (monitor, "enabled")) is True:
            yield (monitor,), "warning", "the run writes its own logs; DeepSpeed's monitor counts samples, not steps"


def _text_for_values(subject: _Subject) -> Iterator[tuple[KeyPath, str, str]]:
    for path, value in leaves(subject.ds_config):
        if not isinstance(value, str):
            continue
        if value.lower() in ("true", "false"):
            yield path, "error", f"is the text {value!r}; write {value.lower()} without quotes"
        elif _is_number(value):
            yield path, "error", f"is the text {value!r}; write the number without quotes"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _precision(subject: _Subject) -> Iterator[tuple[KeyPath, str, str]]:
    fp16 = value_at(subject.ds_config, ("fp16", "enabled")) is True
    if fp16 and precision(subject.ds_config) == "bf16":
        yield ("fp16", "enabled"), "error", "fp16 and bf16 are both on; keep one"
    elif fp16 and subject.device == "cpu":
        stage = zero_stage(subject.ds_config)
        choice = f"choose zero{stage}.json (bf16) or zero{stage}_fp32.json"
        yield ("fp16", "enabled"), "error", f"fp16 needs a GPU: DeepSpeed refuses it on the CPU; {choice}"
    accumulation = value_at(subject.ds_config, ("data_types", "grad_accum_dtype"))
    names = {"bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float32": "fp32", "float": "fp32"}
    accumulation = names.get(accumulation, accumulation)
    if accumulation is not None and zero_stage(subject.ds_config) == 0 and accumulation != precision(subject.ds_config):
        dtype = precision(subject.ds_config)
        message = f"stage 0 adds gradients up in the training precision only; write {dtype!r} or use stages 1-3"
        yield ("data_types", "grad_accum_dtype"), "error", message


def _offload(subject: _Subject) -> Iterator[tuple[KeyPath, str, str]]:
    zero, stage = ("zero_optimization",), zero_stage(subject.ds_config)
    optimizer = offload_device(subject.ds_config, "optimizer")
    parameters = offload_device(subject.ds_config, "parameters")
    for key in ("cpu_offload", "cpu_offload_param", "cpu_offload_use_pin_memory"):
        if value_at(subject.ds_config, (*zero, key)) is not None:
            yield (*zero, key), "error", 'is out of date; write "offload_optimizer": {"device": "cpu"}'
    for block, device in (("offload_optimizer", optimizer), ("offload_param", parameters)):
        path = (*zero, block)
        if device not in ("none", "cpu", "nvme"):
            yield (*path, "device"), "error", f"cannot be {device!r}; choose none, cpu or nvme"
        needed = 3 if device == "nvme" or block == "offload_param" else 1
        if device in ("cpu", "nvme") and stage < needed:
            stages = "stage 3" if needed == 3 else "stages 1-3"
            yield path, "error", f"offloading to {device} works at {stages}, and this is stage {stage}"
        if device == "nvme" and not value_at(subject.ds_config, (*path, "nvme_path")):
            yield (*path, "nvme_path"), "error", 'is missing; write a folder, or "auto" for one in the run\'s folder'
    kernel = str(value_at(subject.ds_config, ("optimizer", "type")) or "AdamW")
    if optimizer in ("cpu", "nvme") and kernel.lower() not in CPU_OPTIMIZERS:
        yield ("optimizer", "type"), "error", f"{kernel} has no CPU kernel, which offloading needs; write AdamW"
    if optimizer in ("cpu", "nvme") and value_at(subject.ds_config, ("optimizer", "params", "torch_adam")) is True:
        yield ("optimizer", "params", "torch_adam"), "error", "offloading needs DeepSpeed's CPU Adam; remove the key"


RULES: tuple[Rule, ...] = (_unknown_keys, _run_owned_keys, _text_for_values, _precision, _offload)
