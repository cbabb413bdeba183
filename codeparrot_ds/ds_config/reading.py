"""Reads a DeepSpeed config key by key: which are unknown or of another version, and which values cannot be meant."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from codeparrot_ds.ds_config.known_keys import (
    ANY,
    DEEPSPEED_VERSION,
    IGNORES_UNKNOWN,
    KEYS,
    OPTIMIZER_PARAMS,
    OTHER_VERSIONS,
    REMOVED_KEYS,
    REMOVED_OPTIMIZERS,
    REMOVED_ZERO_KEYS,
    RENAMED,
    SCHEDULER_PARAMS,
    KeyPath,
    Kind,
    Said,
    is_number,
)
from codeparrot_ds.ds_config.resolve import fills_auto
from codeparrot_ds.paths import did_you_mean

_NEAR = 0.8  # likeness of two names from which a slip of the hand is likelier than a key in the wrong block


@dataclass
class Reading:
    """A config as it was probably meant, and what is wrong with how it was written.

    ``config`` has mistyped keys under the nearest known name and numbers that were written as text, so that rules
    between keys judge what was meant; what cannot be guessed is left out.
    """

    config: dict[str, Any] = field(default_factory=dict)
    said: list[Said] = field(default_factory=list)
    written: dict[KeyPath, KeyPath] = field(default_factory=dict)

    def as_written(self, path: KeyPath) -> KeyPath:
        """The path in the file of a path in ``config``."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.written:
                return (*self.written[path[:length]], *path[length:])
        return path


def read_keys(ds_config: Mapping[str, Any]) -> Reading:
    """Compares every key and value of a config with what DeepSpeed knows."""
    reading = Reading()
    reading.config = _read_block(reading, ds_config, (), (), KEYS[()])
    return reading


def _read_block(
    reading: Reading, present: Mapping[str, Any], block: KeyPath, written: KeyPath, known: Mapping[str, Kind] | None
) -> dict[str, Any]:
    """What a block meant; ``known`` is None for one whose keys are not judged."""
    meant: dict[str, Any] = {}
    for key, value in present.items():
        path = (*written, key)
        name = key if known is None else _read_name(reading, key, value, block, written, known, present)
        if name is None or name in meant:
            continue
        kind = ANY if known is None else known[name]
        inner = (*block, name)
        reading.written[inner] = path
        if isinstance(value, Mapping) and kind.name == "block":
            meant[name] = _read_block(reading, value, inner, path, _keys_of(inner, present))
            continue
        problem = _problem(inner, kind, value)
        if problem:
            reading.said.append((path, "error", problem))
            value = _guess(kind, value)
        if value is not None or not problem:
            meant[name] = value
    return meant


def _keys_of(block: KeyPath, around: Mapping[str, Any]) -> Mapping[str, Kind] | None:
    if block == ("optimizer", "params"):
        return OPTIMIZER_PARAMS.get(str(around.get("type")).lower())
    if block == ("scheduler", "params"):
        return SCHEDULER_PARAMS.get(str(around.get("type")))
    return KEYS.get(block)


# --------------------------------------------------------------------------------------------------------------------
# Names


def _read_name(
    reading: Reading,
    key: str,
    value: Any,
    block: KeyPath,
    written: KeyPath,
    known: Mapping[str, Kind],
    present: Mapping[str, Any],
) -> str | None:
    """The key that was meant, or None where that cannot be guessed; says what is wrong with the one written."""
    path, meant = (*written, key), (*block, key)
    if meant in OTHER_VERSIONS:
        reading.said.append((path, *_of_another_version(meant)))
        return key if key in known else None
    if meant in RENAMED:
        new = ".".join(RENAMED[meant])
        reading.said.append((path, "warning", f"is an old name, which DeepSpeed {DEEPSPEED_VERSION} takes for {new}"))
        return key
    if meant == ("optimizer", "params", "max_grad_norm"):
        reading.said.append((path, "error", "clipping is set by the run config's max_grad_norm; remove the key"))
        return None
    if key in known:
        return key
    near = _nearest(key, known)
    reading.said.append((path, "error", _unknown(key, block, known, near)))
    if near is None or near in present or known[near].problem(value):
        return None
    return near


def _of_another_version(path: KeyPath) -> tuple[str, str]:
    block, key = path[:-1], path[-1]
    advice = OTHER_VERSIONS[path]
    what = f"is a key of another DeepSpeed version, which {DEEPSPEED_VERSION}"
    if key in (REMOVED_ZERO_KEYS if block else REMOVED_KEYS):
        return "error", f"{what} refuses: DeepSpeed has removed the feature; remove the key"
    if block in IGNORES_UNKNOWN:
        return "warning", f"{what} ignores: {advice}"
    if key in KEYS.get(block, {}):
        return "warning", f"{what} takes and ignores: {advice}"
    return "error", f"{what} refuses: {advice}"


def _nearest(key: str, known: Mapping[str, Kind]) -> str | None:
    by_lower_case = {name.lower(): name for name in known}
    close = difflib.get_close_matches(key.lower(), by_lower_case, n=1, cutoff=0.6)
    return by_lower_case[close[0]] if close else None


def _unknown(key: str, block: KeyPath, known: Mapping[str, Kind], near: str | None) -> str:
    does = "ignores" if block in IGNORES_UNKNOWN else "refuses"
    what = f"unknown key, which DeepSpeed {DEEPSPEED_VERSION} {does}"
    likeness = difflib.SequenceMatcher(None, key.lower(), near.lower()).ratio() if near else 0
    places = {block: names for block, names in KEYS.items()} | {("optimizer", "params"): OPTIMIZER_PARAMS["adamw"]}
    elsewhere = [".".join((*other, key)) for other, names in places.items() if key in names]
    if likeness < _NEAR and len(elsewhere) == 1:
        return f"{what}; it belongs at {elsewhere[0]}"
    return what + did_you_mean(key, known)


# --------------------------------------------------------------------------------------------------------------------
# Values


def _problem(path: KeyPath, kind: Kind, value: Any) -> str | None:
    if path == ("optimizer", "type") and str(value).lower() in REMOVED_OPTIMIZERS:
        return f"{value} is of another DeepSpeed version: {DEEPSPEED_VERSION} has no 1-bit optimizers; write AdamW"
    if value == "auto" and kind.name != "block":
        return None if fills_auto(path) else 'is "auto", which means nothing here; write a value or remove the key'
    problem = kind.problem(value)
    if problem and path == ("zero_optimization",):
        problem += ', such as {"stage": 2}'
    return problem


def _guess(kind: Kind, value: Any) -> Any:
    """The number or truth value that a text stands for, or None."""
    if not isinstance(value, str):
        return None
    guess: Any = {"true": True, "false": False}.get(value.lower())
    if guess is None and is_number(value):
        guess = float(value)
        guess = int(guess) if guess.is_integer() else guess
    return guess if guess is not None and kind.problem(guess) is None else None
