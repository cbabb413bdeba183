"""What a rule of the config check looks at, and the form of a rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from codeparrot_ds.config.run_config import RunConfig
from codeparrot_ds.ds_config.facts import (
    activation_checkpointing,
    offload_device,
    short_dtype,
    value_at,
    zero_stage,
)
from codeparrot_ds.ds_config.file import GPU_PRECISIONS
from codeparrot_ds.ds_config.known_keys import KeyPath


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A resolved DeepSpeed config, as far as the run is known, and what is known around it."""

    config: Mapping[str, Any]
    written: Mapping[str, Any]
    """What the file has of it: under the keys' present names, without values of a wrong type, with ``"auto"``."""
    autos: Mapping[KeyPath, str] = field(default_factory=dict)
    """Each key of ``config`` that an ``"auto"`` filled, and a sentence on what it became."""
    looked_at: set[KeyPath] = field(default_factory=set)
    """The keys that `get` was asked for since this was emptied: what the answer of a rule comes of."""
    run: RunConfig | None = None
    device: str = "cuda"
    world_size: int | None = None
    parameters: int | None = None  # of the model
    model_hidden_size: int | None = None
    libaio: bool | None = None  # whether this machine has what NVMe offloading is built with
    precisions: Sequence[str] = GPU_PRECISIONS  # that the device trains in, the fastest first

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a dotted key; `default` where there is none, or an ``"auto"`` that only a run knows.

        A rule that looked at such an ``"auto"`` says nothing, whatever it answers.
        """
        self.looked_at.add(path_of(key))
        value = value_at(self.config, path_of(key))
        return default if value is None or value == "auto" else value

    @property
    def stage(self) -> int:
        """ZeRO stage."""
        return zero_stage(self.config)

    @property
    def precision(self) -> str:
        """``bf16``, ``fp16`` or ``fp32``."""
        # As ``facts.precision``, by `get`: an "auto" that chose it is named.
        return next((name for name in ("bf16", "fp16") if self.get(f"{name}.enabled") is True), "fp32")

    @property
    def optimizer(self) -> str:
        """The optimizer's name in lower case; the recipe's where the file names none."""
        return str(self.get("optimizer.type", "AdamW")).lower()

    @property
    def is_adam(self) -> bool:
        """Whether the optimizer is one of the two whose moments a run here saves."""
        return self.optimizer in ("adam", "adamw")

    @property
    def has_bf16_optimizer(self) -> bool:
        """Whether DeepSpeed takes its ``BF16_Optimizer`` (``_do_optimizer_sanity_check`` in ``engine.py``)."""
        adds_up_in_fp32 = self.precision == "bf16" and self.accumulation == "fp32"
        return self.stage == 1 and adds_up_in_fp32 and not self.offloads("optimizer")

    @property
    def accumulation(self) -> str:
        """The precision that micro-batches are added up in."""
        return short_dtype(self.get("data_types.grad_accum_dtype", self.precision))

    def counterpart(self, precision: str) -> str:
        """What a reader chooses for the same in another precision: a shipped file where one keeps what saves memory."""
        suffix = {"bf16": ".json (bf16)"}.get(precision, f"_{precision}.json")
        if not self.offloads("optimizer") and not self.offloads("parameters"):
            if not activation_checkpointing(self.config):
                return f"zero{self.stage}{suffix}"
            if self.stage == 2 and self.get("activation_checkpointing.cpu_checkpointing") is not True:
                return f"zero2_activation_checkpointing{suffix}"
        on = "" if precision == "fp32" else f"{precision} on and "
        return f"the same with {on}{self.precision} off"

    def offloads(self, what: str) -> bool:
        """Whether the ``optimizer`` or the ``parameters`` live outside the device."""
        return offload_device(self.config, what) in ("cpu", "nvme")

    def on_nvme(self, what: str) -> bool:
        """Whether the ``optimizer`` or the ``parameters`` live on NVMe."""
        return offload_device(self.config, what) == "nvme"


# Whether a rule speaks of a subject and the value that its key has there.
Applies = Callable[[Subject, Any], bool]


@dataclass(frozen=True)
class Rule:
    """Something that is wrong with a key that has a value, when `applies` says so of the subject and that value.

    Made by `error`, `warning` and `error_in_run`. ``{value}``, ``{stage}``, ``{precision}`` and ``{in_fp32}``
    (`Subject.counterpart`) in the message are filled in.
    """

    key: str
    severity: str
    applies: Applies
    message: str


def error(key: str, applies: Applies, message: str) -> Rule:
    """What fails, or trains something else than the file says."""
    return Rule(key, "error", applies, message)


def warning(key: str, applies: Applies, message: str) -> Rule:
    """What does nothing, or costs more than it gives."""
    return Rule(key, "warning", applies, message)


def error_in_run(key: str, applies: Applies, message: str) -> Rule:
    """An error where a run config is known, a warning for a file alone, which other programs may well use."""
    return Rule(key, "run", applies, message)


def path_of(key: str) -> KeyPath:
    """The path of a dotted key."""
    return tuple(key.split("."))
