"""The resolved DeepSpeed config as one can read it: where each value came from, and what a resumed run changes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codeparrot_ds.config.files import read_config_file
from codeparrot_ds.config.run_config import FIELDS, PRESETS
from codeparrot_ds.ds_config.facts import leaves, value_at
from codeparrot_ds.ds_config.known_keys import KeyPath
from codeparrot_ds.ds_config.resolve import Resolved
from codeparrot_ds.json_files import DamagedFileError, read_object

# Optimizers whose state is the same two moments; the names mean the same update unless adam_w_mode says otherwise.
_ADAMS = ("adam", "adamw")
# What the saved optimizer state means: with another value it would be continued as something that it is not.
_MEANING = (
    ("optimizer", "params", "adam_w_mode"),
    ("optimizer", "params", "amsgrad"),
    ("optimizer", "params", "bias_correction"),
)
# Settled by the run config, which is compared by itself; and where on the disk something is kept.
_NOT_COMPARED = frozenset(
    {
        ("train_batch_size",),
        ("zero_optimization", "offload_optimizer", "nvme_path"),
        ("zero_optimization", "offload_param", "nvme_path"),
    }
)


def field_origins(
    preset: str | None, config_file: str | os.PathLike[str] | None, options: Mapping[str, Any]
) -> dict[str, str]:
    """Where each field of a run config came from: ``default``, ``preset NAME``, the file, or ``option``."""
    origins = dict.fromkeys(FIELDS, "default")
    if preset is not None:
        origins |= dict.fromkeys(PRESETS[preset], f"preset {preset}")
    if config_file is not None:
        origins |= dict.fromkeys(read_config_file(config_file), os.fspath(config_file))
    return origins | dict.fromkeys((name for name in options if name in FIELDS), "option")


def explain(resolved: Resolved) -> list[str]:
    """One line per value: key, value, and where it came from, in columns."""
    rows = [(".".join(path), json.dumps(value), resolved.sources[path]) for path, value in leaves(resolved.config)]
    widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
    return [f"{key:{widths[0]}}  {value:{widths[1]}}  {source}" for key, value, source in rows]


def sources_as_json(resolved: Resolved) -> dict[str, str]:
    """Dotted key → where its value came from, for a file."""
    return {".".join(path): resolved.sources[path] for path, _ in leaves(resolved.config)}


@dataclass(frozen=True)
class Change:
    """A value that a resumed run has otherwise than the saved config."""

    key: str
    before: Any  # None: the key was not there
    after: Any
    refused: str | None  # why the saved state cannot be continued so; None for a change that is safe

    def __str__(self) -> str:
        return f"{self.key} {_shown(self.before)} -> {_shown(self.after)}" + (
            f" ({self.refused})" if self.refused else ""
        )


def changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """What differs between a run's saved resolved config and the one that would continue it.

    Safe: whatever says how the state is spread, moved and computed with (stage, precision, offload, buckets,
    overlap, activation checkpointing) and the rates of the run config; checkpoints hold weights and moments by name
    and offset and fit them all; fp16 after another precision begins with its initial loss scale. Refused: another
    optimizer, and another meaning of its moments.
    """
    before, after = dict(leaves(saved)), dict(leaves(now))
    found = []
    for path in [*before, *(path for path in after if path not in before)]:
        old, new = before.get(path), after.get(path)
        if old != new and path not in _NOT_COMPARED:
            found.append(Change(".".join(path), old, new, _why_unsafe(path, saved, now)))
    return found


def saved_ds_config(path: Path) -> dict[str, Any] | None:
    """The resolved config that a run saved; None where it has none that can be read (it then began without)."""
    try:
        return read_object(path)
    except (OSError, DamagedFileError):
        return None


def _why_unsafe(path: KeyPath, saved: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    if path == ("optimizer", "type"):
        names = [str(value_at(config, path)).lower() for config in (saved, now)]
        if names[0] == names[1] or (set(names) == set(_ADAMS) and _decays_alike(saved, now)):
            return None
        return "the checkpoint has the other optimizer's state"
    if path in _MEANING and not (path[-1] == "adam_w_mode" and _decays_alike(saved, now)):
        return "the checkpoint's moments belong to the other update"
    return None


def _decays_alike(saved: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    return _is_adamw(saved) == _is_adamw(now)


def _is_adamw(config: Mapping[str, Any]) -> bool:
    """DeepSpeed's ``_configure_basic_optimizer``: Adam decays as AdamW too, unless adam_w_mode is false."""
    is_named = str(value_at(config, ("optimizer", "type"))).lower() == "adamw"
    return is_named or value_at(config, ("optimizer", "params", "adam_w_mode")) is not False


def _shown(value: Any) -> str:
    return "unset" if value is None else json.dumps(value)


def run_of(checkpoint: str) -> Path:
    """The run's folder of a checkpoint, which is <run>/checkpoints/step-…"""
    return Path(checkpoint).absolute().parent.parent
