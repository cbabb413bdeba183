"""What a DeepSpeed config says: stage, precision, offloading."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from codeparrot_ds.ds_config.known_keys import KeyPath
from codeparrot_ds.errors import UserError

TORCH_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""Torch's name of each precision that weights are trained in."""
VALUE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1}
"""Bytes of one value, by `short_dtype`."""
_SHORT_DTYPES = {name: short for short, name in TORCH_DTYPES.items()} | {"half": "fp16", "float": "fp32"}


def short_dtype(name: str) -> str:
    """``bf16``, ``fp16``, ``fp32`` (or ``int8``) for each of the names that DeepSpeed knows a dtype by."""
    name = str(name).removeprefix("torch.")
    return _SHORT_DTYPES.get(name, name)


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
        set_value(config, path, value)
    return config


def offload_device(ds_config: Mapping[str, Any], what: str) -> str:
    """``"none"``, ``"cpu"`` or ``"nvme"``: where `what` (``"optimizer"`` or ``"parameters"``) lives."""
    block = {"optimizer": "offload_optimizer", "parameters": "offload_param"}[what]
    return value_at(ds_config, ("zero_optimization", block, "device")) or "none"


def steps_lean(choice: str, ds_config: Mapping[str, Any], device: str) -> bool:
    """Whether steps wait for nothing (``engine/lean_step.py``) by the run config's ``lean_step`` and a resolved config.

    Raises:
        UserError: it is ``on``, and the config has what such a step does not know.
    """
    # A CPU waits in neither way.
    if choice == "off" or (choice == "auto" and device == "cpu"):
        return False
    reason = _why_no_lean_step(ds_config)
    if reason and choice == "on":
        raise UserError(f"lean_step on does not go with {reason}, which the DeepSpeed config has; use lean_step auto")
    return not reason


def _why_no_lean_step(ds_config: Mapping[str, Any]) -> str:
    parameters = value_at(ds_config, ("optimizer", "params")) or {}
    trained, added_up = precision(ds_config), value_at(ds_config, ("data_types", "grad_accum_dtype"))
    zero = "zero_optimization"
    reasons = {
        "ZeRO stage 3": zero_stage(ds_config) == 3,
        "fp16, whose loss scale has to know of each step": trained == "fp16",
        "an optimizer other than DeepSpeed's fused AdamW": str(value_at(ds_config, ("optimizer", "type"))).lower()
        != "adamw"
        or bool(parameters.get("torch_adam")),
        "Adam without its bias correction": parameters.get("bias_correction") is False,
        "an offloaded optimizer": offload_device(ds_config, "optimizer") != "none",
        "gradients that are added up in another precision": added_up is not None and short_dtype(added_up) != trained,
        "masters or moments in bf16": any(
            value_at(ds_config, ("bf16", key)) for key in ("bf16_master_weights_and_grads", "bf16_optimizer_states")
        ),
        "torch_autocast": bool(value_at(ds_config, ("torch_autocast", "enabled"))),
        "a step without a norm": value_at(ds_config, (zero, "compute_grad_norm")) is False,
        "gradients that are added up by hand": ds_config.get("managed_gradient_accumulation") is False,
        "DeepCompile": bool(value_at(ds_config, ("compile", "deepcompile"))),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


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


def set_value(config: dict[str, Any], path: KeyPath, value: Any) -> None:
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
