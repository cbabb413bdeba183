"""DeepSpeed JSON files: found by name or path, and read with the line of each key."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from hjson.decoder import HjsonDecodeError, HjsonDecoder, JSONObject, getNext, make_scanner, scantfnns

from codeparrot_ds.ds_config.known_keys import ANY, IGNORES_UNKNOWN, KEYS, KeyPath, Said
from codeparrot_ds.errors import UserError
from codeparrot_ds.json_files import TOO_DEEP, is_too_deep, read_bytes
from codeparrot_ds.paths import did_you_mean, did_you_mean_path
from codeparrot_ds.secret_check import check_settings

AUTO = ":auto"
"""Behind a shipped name: that config in the precision that the device multiplies fastest."""
GPU_PRECISIONS, CPU_PRECISIONS = ("bf16", "fp16", "fp32"), ("bf16", "fp32")
"""What a device trains in of which nothing is known, the fastest first (``ds_config/precision.py`` asks one)."""


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
    precision of the run that resumes, which ``"enabled": "auto"`` follows before the device's. ``converted`` says which
    values have another type in the file, for the config check.
    """

    path: Path
    config: dict[str, Any]
    lines: dict[KeyPath, int]
    precisions: Sequence[str] | None = None
    began: str | None = None
    converted: tuple[Said, ...] = ()

    @property
    def followed(self) -> Sequence[str]:
        """What ``"enabled": "auto"`` follows, first to last."""
        device = self.precisions or GPU_PRECISIONS
        return device if self.began is None else (self.began, *(name for name in device if name != self.began))

    def where(self, path: KeyPath) -> str:
        """``file:line`` of a key, for a reader."""
        line = line_of(self.lines, path)
        return f"{self.path}:{line}" if line else str(self.path)


def open_ds_config(
    name_or_path: str, precisions: Sequence[str] = GPU_PRECISIONS, *, began: str | None = None
) -> DsFile:
    """The file that a name, ``NAME:auto`` or a path means, as read.

    Args:
        name_or_path: as in the run config.
        precisions: that the device trains in, the fastest first.
        began: the precision of a run that resumes.
    """
    file = read_ds_config(find_ds_config(name_in(name_or_path, began or precisions[0])))
    return dataclasses.replace(file, precisions=precisions, began=began)


def read_ds_config(path: str | os.PathLike[str]) -> DsFile:
    """The object in `path` as DeepSpeed reads it, with its keys' lines; `UserError` with the place where it cannot.

    DeepSpeed takes Hjson: JSON with comments, trailing commas and texts without quotes. Values of another type are
    converted where it converts them, and notes (keys that begin with ``_``) left out where it ignores unknown keys.
    """
    path = Path(path)
    if path.suffix in (".yaml", ".yml"):
        raise UserError(f"{path} is YAML; a DeepSpeed config is a JSON file")
    if path.is_dir():
        raise UserError(f"{path} is a folder; a DeepSpeed config is one JSON file")
    try:
        text = read_bytes(path).decode()
    except FileNotFoundError:
        raise UserError(f"{path}: no such DeepSpeed config") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a text file; a DeepSpeed config is a JSON file") from None
    if not text.strip():
        raise UserError(f'{path} is empty; the smallest DeepSpeed config is {{"zero_optimization": {{"stage": 2}}}}')
    try:
        config, lines = read_hjson(text)
    except (json.JSONDecodeError, HjsonDecodeError) as error:
        raise UserError(f"{path}:{error.lineno}:{error.colno}: {_why_not_json(text, error)}") from None
    except RecursionError:
        raise UserError(f"{path}: {TOO_DEEP}") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    if is_too_deep(config):
        raise UserError(f"{path}: {TOO_DEEP}")
    if not isinstance(config, dict):
        raise UserError(f"{path}: a DeepSpeed config is a JSON object {{...}}, not {type(config).__name__}")
    check_settings(config, str(path))
    converted: list[Said] = []
    return DsFile(path, _as_taken(config, (), converted), lines, converted=tuple(converted))


# --------------------------------------------------------------------------------------------------------------------
# Text


def read_hjson(text: str) -> tuple[Any, dict[KeyPath, int]]:
    """What a JSON or Hjson text says, and the line, from 1, of each key; items of lists are keys by their number.

    Raises:
        json.JSONDecodeError: it is neither; so is `HjsonDecodeError`, where it is Hjson up to there.
        ValueError: a key is given twice, or a number is none.
    """
    try:
        config = json.loads(
            text, object_pairs_hook=_refuse_duplicates, parse_constant=_refuse_constant, parse_float=_finite
        )
    except json.JSONDecodeError as error:
        try:
            return _with_lines(text)
        except HjsonDecodeError as other:
            # What is before the error further down is Hjson; of two at one place the JSON's is the plainer.
            raise (other if other.pos > error.pos else error) from None
    return config, _with_lines(text)[1]


def _with_lines(text: str) -> tuple[Any, dict[KeyPath, int]]:
    decoder = _PlacedDecoder()
    try:
        config = decoder.decode(text)
    except IndexError:  # what the library raises at the end of a comment or text that nothing closes
        raise HjsonDecodeError("a comment or text that does not end", text, len(text)) from None
    lines: dict[KeyPath, int] = {}

    def note(value: Any, path: KeyPath) -> None:
        if isinstance(value, list):
            for number, item in enumerate(value):
                note(item, (*path, str(number)))
        elif isinstance(value, dict):
            for key, inner in value.items():
                inside = (*path, key)
                lines[inside] = text.count("\n", 0, decoder.places[id(value)][key]) + 1
                note(inner, inside)

    note(config, ())
    return config, lines


class _PlacedDecoder(HjsonDecoder):
    """DeepSpeed's reader, which also notes where each key stands."""

    def __init__(self) -> None:
        super().__init__(object_pairs_hook=_refuse_duplicates, parse_float=_finite)
        self.places: dict[int, dict[str, int]] = {}  # by the object's id: the offset of each of its keys
        self.parse_object, self.parse_tfnns = self._object, self._unquoted
        self.scan_once, self.scan_object_once = make_scanner(self)

    def _object(self, state: tuple[str, int], encoding: str, strict: bool, scan: Any, *hooks: Any) -> tuple[Any, int]:
        starts: list[int] = []
        end = state[1]

        def value_at(text: str, start: int) -> tuple[Any, int]:
            nonlocal end
            mark, key = getNext(text, end)
            starts.append(getNext(text, key + 1)[1] if mark == "," else key)
            value, end = scan(text, start)
            return value, end

        found, after = JSONObject(state, encoding, strict, value_at, *hooks)
        self.places[id(found)] = dict(zip(found, starts, strict=True))
        return found, after

    def _unquoted(self, context: Any, text: str, start: int) -> tuple[Any, int]:
        value, end = scantfnns(context, text, start)
        # It runs to the end of its line, and has swallowed what was meant to follow.
        if isinstance(value, str) and re.search(r"""[,:{}\[\]"'#]|\s//|/\*""", value):
            raise HjsonDecodeError(f"text without quotes, which runs to the end of its line: {value!r}", text, start)
        return value, end


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    config: dict[str, Any] = {}
    for key, value in pairs:
        if key in config:
            raise ValueError(f"key {key!r} is given twice in one object")
        config[key] = value
    return config


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _finite(number: str) -> float:
    if not math.isfinite(float(number)):
        raise ValueError(f"{number} is too large for a number")
    return float(number)


def _why_not_json(text: str, error: json.JSONDecodeError | HjsonDecodeError) -> str:
    if not text.lstrip().startswith(("{", "/", "#")) and re.search(r"^[\w.-]+:\s*$", text, re.MULTILINE):
        return "not JSON: this looks like YAML; a DeepSpeed config is a JSON file"
    return f"not JSON: {error.msg.replace(' %r', '')}"


# --------------------------------------------------------------------------------------------------------------------
# Values


def _as_taken(present: dict[str, Any], block: KeyPath, said: list[Said]) -> dict[str, Any]:
    """A block without the notes in it, with values of the types that DeepSpeed converts them to; says which."""
    taken: dict[str, Any] = {}
    for key, value in present.items():
        path = (*block, key)
        if key.startswith("_") and block in IGNORES_UNKNOWN:
            continue
        better = _conversion(block, key, value)
        if better is not None:
            said.append(
                (path, "warning", f"is {json.dumps(value)}, which DeepSpeed takes for {json.dumps(better)}; write that")
            )
            value = better
        taken[key] = _as_taken(value, path, said) if isinstance(value, dict) else value
    return taken


def _conversion(block: KeyPath, key: str, value: Any) -> Any:
    """What DeepSpeed takes a value of another type than the key's for; None where it takes it as it stands."""
    if (*block, key) == ("zero_optimization",) and isinstance(value, bool):
        return {"stage": int(value)}  # ``read_zero_config_deprecated``
    if block[-1:] == ("leaf_module",) and isinstance(value, str):
        return [value]
    # Without a model it takes a value as it stands: Python takes 0 and 1 for truth values, and any text for true.
    if block in IGNORES_UNKNOWN and value not in (0, 1):
        return None
    return KEYS.get(block, {}).get(key, ANY).converted(value)


def line_of(lines: dict[KeyPath, int], path: KeyPath) -> int | None:
    """The line of a key, or of the innermost block around it that the file has; None when it has none of them."""
    for length in range(len(path), 0, -1):
        if path[:length] in lines:
            return lines[path[:length]]
    return None
