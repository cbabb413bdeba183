"""DeepSpeed JSON files: found by name or path, and read with the line of each key."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from codeparrot_ds.ds_config.known_keys import KeyPath
from codeparrot_ds.errors import UserError
from codeparrot_ds.paths import did_you_mean, did_you_mean_path

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
    precision of the run that resumes, which ``"enabled": "auto"`` follows before the device's.
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


_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\],]|[^\s{}\[\],":]+')


def key_lines(text: str) -> dict[KeyPath, int]:
    """Line, from 1, of every key of a valid JSON text; items of lists are keys by their number ("0", "1" …)."""
    lines: dict[KeyPath, int] = {}
    path: list[str] = []  # the key, or the number, that each open object or list is at
    kinds: list[str] = []  # "{" or "[" of each
    expects_key = False
    line, last = 1, 0
    for token in _TOKEN.finditer(text):
        line += text.count("\n", last, token.start())
        last = token.start()
        mark = token.group()
        if mark in "{[":
            kinds.append(mark)
            path.append("0" if mark == "[" else "")
            expects_key = mark == "{"
        elif mark in "}]":
            kinds.pop()
            path.pop()
            expects_key = False
        elif mark == ",":
            expects_key = kinds[-1] == "{"
            if not expects_key:
                path[-1] = str(int(path[-1]) + 1)
        elif expects_key:
            path[-1] = json.loads(mark)
            lines.setdefault(tuple(path), line)
            expects_key = False
    return lines


def line_of(lines: dict[KeyPath, int], path: KeyPath) -> int | None:
    """The line of a key, or of the innermost block around it that the file has; None when it has none of them."""
    for length in range(len(path), 0, -1):
        if path[:length] in lines:
            return lines[path[:length]]
    return None
