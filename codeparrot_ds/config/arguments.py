"""The command line of the run config: one option for each field."""

from __future__ import annotations

import argparse
import json
import math
import re
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from codeparrot_ds.config.files import read_config_file
from codeparrot_ds.config.run_config import (
    FIELDS,
    OPTIONS_ELSEWHERE,
    PRESET_HELP,
    PRESETS,
    REQUIRED,
    Field,
    RunConfig,
    what_for_preset,
)
from codeparrot_ds.errors import UserError
from codeparrot_ds.paths import SLIP, did_you_mean, name_argument
from codeparrot_ds.secret_check import check_for_secrets
from codeparrot_ds.secret_forms import hide_secrets


class ArgumentParser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, with the nearest option for an unknown one, and exits 2."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", HelpFormatter)
        super().__init__(*args, **kwargs)
        # argparse takes -5 for a value and -1e-4 for an option; both are numbers that an option may refuse.
        self._negative_number_matcher = re.compile(r"-(\d[\d_]*\.?\d*|\.\d+)(e[+-]?\d+)?$|-(inf|nan)$", re.IGNORECASE)

    def _match_argument(self, action: argparse.Action, arg_strings_pattern: str) -> int:
        try:
            return super()._match_argument(action, arg_strings_pattern)
        except argparse.ArgumentError:
            if not action.option_strings:
                raise
            raise argparse.ArgumentError(action, f"needs {_needed(action)}") from None

    def parse_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def, override]
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            # A sub-command's leftovers reach the top parser, which does not know the sub-command's options.
            parser = getattr(parsed, "parser", self)
            parser.error(parser.describe_unknown(unknown[0]))
        return parsed

    def describe_unknown(self, argument: str) -> str:
        if not argument.startswith("-"):
            return f"unexpected argument {argument!r}"
        option = argument.partition("=")[0]
        options = {name for action in self._actions for name in action.option_strings}
        # An option with two spellings is offered in the one that the help shows.
        options = {name for name in options if "_" not in name or name.replace("_", "-") not in options}
        dashed = option.replace("_", "-")
        here = OPTIONS_ELSEWHERE.get(dashed, "")
        if here.partition(" ")[0] in options:
            return f"unknown option {option}; here it is {here}"
        return f"unknown option {option}{did_you_mean(dashed, options - {'--help', '-h'}, SLIP)}"

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            hint = did_you_mean(str(value), action.choices, SLIP)
            raise argparse.ArgumentError(action, f"cannot be {value!r}{hint}")

    def error(self, message: str) -> NoReturn:
        # argparse's "argument --a/--b: …" as a sentence about the option in the spelling that the help shows.
        message = re.sub(r"^argument (-[\w-]+)(?:/-[\w-]+)*: (?=must|cannot|needs)", r"\1 ", message)
        self.exit(2, f"{self.prog}: error: {hide_secrets(message)} (see {self.prog} --help)\n")


# What an option needs, by what the help calls it.
VALUES = {
    **dict.fromkeys(("N", "K"), "a whole number"),
    **dict.fromkeys(("X", "T"), "a number"),
    **dict.fromkeys(("N,...", "K,K"), "whole numbers, such as 1,2,4"),
    **{"SECONDS": "a number of seconds", "SIZE": "a size, such as 80GB", "DIR": "a folder", "FILE": "a file"},
    **{"JSON": "the name of a shipped file or a path", "NAME": "a name", "TEXT": "a value"},
}


def _needed(action: argparse.Action) -> str:
    """What an option that was given nothing needs."""
    shown = str(action.metavar or "")
    if action.choices or shown.startswith("{"):
        return f"one of {', '.join(map(str, action.choices or shown.strip('{}').split(',')))}"
    return VALUES.get(shown, f"a value ({shown})" if shown else "a value")


class HelpFormatter(argparse.HelpFormatter):
    """Wide enough for the long option names, and silent about an option's second spelling."""

    def __init__(self, prog: str, **kwargs: Any) -> None:
        kwargs.setdefault("max_help_position", 34)
        super().__init__(prog, **kwargs)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        hidden = [name for name in action.option_strings if "_" in name]
        if not hidden:
            return super()._format_action_invocation(action)
        shown = [name for name in action.option_strings if "_" not in name]
        if action.nargs == 0:
            return ", ".join(shown)
        return f"{', '.join(shown)} {self._format_args(action, self._get_default_metavar_for_optional(action))}"


def _spellings(name: str) -> list[str]:
    dashed = "--" + name.replace("_", "-")
    return [dashed] if "_" not in name else [dashed, "--" + name]


def add_config_arguments(
    parser: argparse.ArgumentParser, *, preset: str = "preset", without: Iterable[str] = ()
) -> None:
    """PRESET, ``--config FILE`` and one option a field; `config_from_arguments` reads them.

    Args:
        parser: gets the arguments.
        preset: ``preset`` for a positional argument, ``--preset`` for an option.
        without: fields that get no option.
    """
    optional: dict[str, Any] = {} if preset.startswith("-") else {"nargs": "?"}
    parser.add_argument(preset, metavar="PRESET", help=f"starting values: {PRESET_HELP}", **optional)
    parser.add_argument(
        "--config", type=name_argument, metavar="FILE", help="YAML or JSON file of fields; options win over it"
    )
    # The deepspeed launcher hands this to every rank.
    parser.add_argument("--local_rank", type=int, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    groups: dict[str, Any] = {}
    for field in FIELDS.values():
        if field.name in without:
            continue
        group = groups.get(field.group)
        if group is None:
            group = groups[field.group] = parser.add_argument_group(field.group)
        _add_field(group, field)


def _add_field(group: Any, field: Field) -> None:
    text = _help_of(field).replace("%", "%%")
    if field.kind == "bool":
        group.add_argument(
            *_spellings(field.name), dest=field.name, action=argparse.BooleanOptionalAction,
            default=argparse.SUPPRESS, help=text,
        )  # fmt: skip
        return

    def parse(value: str) -> Any:
        try:
            parsed = field.parse(value)
        except (ValueError, OverflowError):
            raise argparse.ArgumentTypeError(f"must be {field.expected}, not {value!r}") from None
        problem = field.problem(parsed)
        if problem:
            raise argparse.ArgumentTypeError(problem)
        return parsed

    metavar = {"int": "N", "float": "X", "str": "{" + ",".join(field.choices) + "}" if field.choices else "TEXT"}
    group.add_argument(
        *_spellings(field.name), dest=field.name, type=parse, default=argparse.SUPPRESS,
        metavar="JSON" if field.name == "deepspeed" else metavar[field.kind], help=text,
    )  # fmt: skip


def _help_of(field: Field) -> str:
    """What the field is, with its default or that it is required."""
    if field.help.endswith(")") and "(default: " in field.help:
        return field.help
    stated = "(required)" if field.name in REQUIRED else f"(default: {shown_value(field.default)})"
    return f"{field.help} {stated}"


def shown_value(value: Any) -> str:
    """A field's value for people, as an option takes it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value in (None, "") else str(value)


def commented_yaml(config: RunConfig) -> str:
    """A config as YAML to start from: each field below its help; ``--config`` reads it back equal."""
    import yaml

    lines, group = ["# Run config, for: codeparrot-ds train --config FILE (options win over it)"], ""
    for name, field in FIELDS.items():
        if field.group != group:
            group = field.group
            lines += ["", f"# ---- {group} ".ljust(80, "-")]
        choices = f"; one of {', '.join(field.choices)}" if field.choices else ""
        lines += ["", *textwrap.wrap(_help_of(field) + choices, 78, initial_indent="# ", subsequent_indent="# ")]
        # A line of its own whatever its length, and letters as they are: this is for people.
        line = yaml.safe_dump({name: getattr(config, name)}, width=math.inf, allow_unicode=True)
        lines.append(line.rstrip("\n"))
    return "\n".join(lines)


def config_from_arguments(arguments: argparse.Namespace) -> RunConfig:
    """The run config of parsed arguments: defaults < preset < file < options; without secrets, before any is said."""
    values: dict[str, Any] = {}
    preset = getattr(arguments, "preset", None)
    if preset is not None:
        if preset not in PRESETS:
            raise UserError(f"unknown preset {preset!r}{what_for_preset(preset)}")
        values.update(PRESETS[preset])
    if getattr(arguments, "config", None) is not None:
        values.update(read_config_file(arguments.config))
    values.update({name: value for name, value in vars(arguments).items() if name in FIELDS})
    check_for_secrets(json.dumps(values), "the run config")
    return RunConfig(**values)


def options_of(config: RunConfig, base: RunConfig) -> list[str]:
    """The options that make ``base`` into ``config``; `config_from_arguments` reads them."""
    options = []
    for name, field in FIELDS.items():
        value = getattr(config, name)
        if value == getattr(base, name):
            continue
        dashed = name.replace("_", "-")
        if field.kind == "bool":
            options.append(f"--{dashed}" if value else f"--no-{dashed}")
        else:
            text = "none" if value is None else str(value)
            # A value like an option is one only behind "=".
            options += [f"--{dashed}={text}"] if text.startswith("-") else [f"--{dashed}", text]
    return options


def with_field(arguments: Sequence[str], name: str, value: object) -> list[str]:
    """`arguments` with another value of a field of the run config."""
    parser = ArgumentParser(add_help=False)
    parser.add_argument(*_spellings(name))
    return [*parser.parse_known_args(list(arguments))[1], _spellings(name)[0], str(value)]
