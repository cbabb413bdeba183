"""What all groups of commands share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

from codeparrot_ds.config import option_types as types
from codeparrot_ds.config.arguments import ArgumentParser
from codeparrot_ds.config.run_config import FIELDS
from codeparrot_ds.errors import UserError
from codeparrot_ds.layouts import parse_columns
from codeparrot_ds.paths import expand, name_argument

PROGRAM = "codeparrot-ds"
KINDS = ("error", "warning")  # of what a check finds
SEED, TEMPERATURE, SHARE = types.whole(), types.real(minimum=0), types.real(above=0, maximum=1)
RUN_HELP = "folder of the run, or its name in runs"


def add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int] | None, text: str, **kwargs: Any
) -> ArgumentParser:
    parser: ArgumentParser = commands.add_parser(
        name, help=text, description=text[0].upper() + text[1:] + ".", **kwargs
    )
    parser.set_defaults(parser=parser, run=run)
    if run is not None:  # else its actions are
        _take_positionals_anywhere(parser)
    return parser


def _take_positionals_anywhere(parser: ArgumentParser) -> None:
    """Lets a parser find its positional arguments between and behind its options, which argparse does not by itself."""
    plain = parser.parse_known_args

    def parse(args: Any = None, namespace: Any = None) -> Any:
        args = list(args or ())
        for index in reversed(range(len(args) - 1)):
            if args[index] == "--device-memory":  # a size below zero would pass for an option
                args[index : index + 2] = [f"--device-memory={args[index + 1]}"]
        parser.parse_known_args = plain  # type: ignore[method-assign]
        try:
            return parser.parse_known_intermixed_args(args, namespace)
        finally:
            parser.parse_known_args = parse  # type: ignore[method-assign]

    parser.parse_known_args = parse  # type: ignore[method-assign]


def say(line: str) -> None:
    print(line, flush=True)


def say_aside(line: str) -> None:
    """A line for the user of a command whose standard output is its result."""
    print(line, file=sys.stderr, flush=True)


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        type=name_argument,
        metavar="MODEL",
        help="a run (its path, or its name in runs), a checkpoint, an exported folder, a Hub model's name "
        "(org/name@BRANCH), or REPO.git@BRANCH",
    )
    group = parser.add_argument_group("device")
    group.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
        help=default_of("precision; auto: that of the weights", "auto"),
    )  # fmt: skip
    group.add_argument("--device", metavar="NAME", help="torch device (default: the GPU where there is one)")


def default_of(text: str, value: Any) -> str:
    return f"{text} (default: {value})"


def add_columns(group: Any) -> None:
    group.add_argument(
        "--columns", type=columns_name, default="", metavar="WHAT=COLUMN,…",
        help="columns of rows, as content=text (default: those that published data sets of code have)",
    )  # fmt: skip


def columns_name(text: str) -> str:
    """The type of an argument that means what the run config's ``columns`` means."""
    try:
        parse_columns(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("columns: ")) from None
    return text


def data_name(text: str) -> str:
    """The type of an argument that means what the run config's ``data`` means."""
    try:
        return FIELDS["data"].each_path(text, expand)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
