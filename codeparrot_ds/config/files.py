"""Run config files: YAML or JSON, read with line numbers."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from codeparrot_ds import durable
from codeparrot_ds.config.run_config import FIELDS, Field, RunConfig
from codeparrot_ds.errors import UserError
from codeparrot_ds.json_files import DamagedFileError, parts_of, read_bytes
from codeparrot_ds.paths import did_you_mean, did_you_mean_path

MOST_CHARACTERS, MOST_BRACKETS = 1_000_000, 1000


def load_config(path: str | os.PathLike[str]) -> RunConfig:
    """The run config of a YAML or JSON file; fields that it leaves out have their defaults."""
    fields = read_config_file(path)
    try:
        return RunConfig(**fields)
    except UserError as error:
        raise UserError(f"{path}: {str(error).removeprefix('run config: ')}") from None


def save_config(config: RunConfig, path: str | os.PathLike[str]) -> None:
    """Writes `config` as YAML that `load_config` reads back equal; a reader sees the old file or the whole new one."""
    import yaml

    durable.replace_file(Path(path), [yaml.safe_dump(dataclasses.asdict(config), sort_keys=False).encode()])


def read_config_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The fields that a YAML or JSON file sets; `UserError` with file, line and key for what is not a field's value."""
    import yaml

    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder; --config takes one YAML or JSON file")
    try:
        text = _text_of(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such run config file{did_you_mean_path(path)}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a text file; --config takes YAML or JSON") from None
    if path.suffix == ".json":
        # JSON is read as YAML, which knows line numbers; YAML forbids the tabs that may indent JSON.
        text = text.replace("\t", " ")
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise UserError(f"{path}{where}: not valid YAML or JSON: {error.problem}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML or JSON: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise UserError(f"{path}: its brackets are nested too deeply for a run config") from None
    if root is None:
        raise UserError(f"{path} is empty; write fields such as `max_train_steps: 1000`")
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{path}:{root.start_mark.line + 1}: expected `field: value` lines")
    return _fields_of_mapping(path, root)


def read_saved_fields(path: Path) -> dict[str, Any]:
    """What a run's ``config.yaml`` says, fields of other versions among it, for those who show it.

    Raises:
        DamagedFileError: it is not what `save_config` writes: a name and a plain value for each field.
        OSError: there is none, or the system refuses.
    """
    import yaml

    with parts_of(path):
        content = _text_of(path)
    try:
        fields = yaml.safe_load(content)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise DamagedFileError(path, " ".join(str(error).split())) from error
    if not isinstance(fields, dict):
        raise DamagedFileError(path, "it holds no mapping")
    for name, value in fields.items():
        if not isinstance(name, str) or not isinstance(value, (str, int, float, bool, type(None))):
            raise DamagedFileError(path, f"{name!r} is not a field with a plain value")
    return fields


def _text_of(path: Path) -> str:
    """A config file's text, which PyYAML reads in the time of its length: it takes the square for nested brackets."""
    text = read_bytes(path).decode()
    if len(text) > MOST_CHARACTERS or text.count("[") + text.count("{") > MOST_BRACKETS:
        raise DamagedFileError(path, f"it has {len(text):,} characters or more brackets than a run config has")
    return text


def _fields_of_mapping(path: Path, root: Any) -> dict[str, Any]:
    values: dict[str, Any] = {}
    problems = []
    for key_node, value_node in root.value:
        key, where = str(key_node.value), f"{path}:{key_node.start_mark.line + 1}"
        name = key.replace("-", "_")
        if name not in FIELDS:
            problems.append(f"{where}: unknown field {key!r}{did_you_mean(key, FIELDS)}")
        elif name in values:
            problems.append(f"{where}: {key} is given twice")
        else:
            value, problem = _value_of_node(FIELDS[name], value_node)
            values[name] = value
            if problem:
                problems.append(f"{where}: {key} {problem}")
    if problems:
        raise UserError("; ".join(problems))
    return values


def _value_of_node(field: Field, node: Any) -> tuple[Any, str | None]:
    """The value of one YAML node, and what is wrong with it.

    YAML 1.1 reads ``off`` as false and ``5e-4`` as text: text fields take the words as written, and number fields
    take whatever an unquoted word means as a number.
    """
    import yaml

    if not isinstance(node, yaml.ScalarNode):
        return None, f"must be {field.expected}, not a list or mapping"
    tag = node.tag.rpartition(":")[2]
    value: Any = node.value
    if tag == "null":
        value = None
        if node.value == "~" and field.is_path:
            return None, 'must be text, and YAML reads ~ as nothing: write "~" in quotes'
    elif field.kind == "bool" and tag == "bool":
        value = node.value.lower() in ("true", "yes", "on")
    elif field.kind in ("int", "float") and node.style is None and tag in ("int", "float", "str"):
        try:
            value = field.parse(node.value.replace("_", ""))
        except (ValueError, OverflowError):
            return None, f"must be {field.expected}, not {node.value!r}"
    return value, field.problem(value)
