"""completion: scripts by which shells complete the command line, written out of the parsers."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from codeparrot_ds.cli.common import PROGRAM, add_command
from codeparrot_ds.config.run_config import MODEL_NAMES, PRESETS
from codeparrot_ds.shell import COMMAND

SHELLS = ("bash", "zsh", "fish")
HOW_TO_INSTALL = """\
to have it in every new shell:
  bash  codeparrot-ds completion bash > \\
          ~/.local/share/bash-completion/completions/codeparrot-ds
  zsh   codeparrot-ds completion zsh > ~/.codeparrot-ds.zsh
        echo 'source ~/.codeparrot-ds.zsh' >> ~/.zshrc
  fish  codeparrot-ds completion fish > \\
          ~/.config/fish/completions/codeparrot-ds.fish
"""
RUNS_HERE = "@runs"
"""Stands for the names of the runs in ./runs, which the shell looks up when it completes."""


def add_completion(commands: Any) -> None:
    parser = add_command(
        commands,
        "completion",
        _run_completion,
        "prints a script by which bash, zsh or fish completes commands, options and their values",
        epilog=HOW_TO_INSTALL,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help="bash, zsh or fish")
    parser.set_defaults(commands=commands)


def _run_completion(arguments: argparse.Namespace) -> int:
    names = dict.fromkeys([PROGRAM, os.path.basename(os.environ.get(COMMAND) or PROGRAM)])  # also as launch.sh
    parts = list(_parts((), arguments.commands))
    write = _fish if arguments.shell == "fish" else _bash
    print(write(parts, list(names), arguments.shell))
    return 0


class Option(NamedTuple):
    """What completion has to know of an option."""

    name: str
    help: str
    takes_value: bool
    values: list[str]
    """That it may have; empty for a path or a number, where the shell offers files."""


class Part(NamedTuple):
    """A command, an action of one, or the program itself."""

    path: tuple[str, ...]
    words: Mapping[str, str]
    """What may stand there without a dash, each with its help."""
    options: list[Option]


def _parts(path: tuple[str, ...], commands: Any) -> Iterator[Part]:
    """A parser of commands with all below it."""
    helps = {action.dest: action.help for action in commands._choices_actions}
    options = [Option("--help", "show the help", False, [])]
    if not path:
        options.append(Option("--version", "show the version", False, []))
    yield Part(path, {name: helps[name] for name in commands.choices}, options)
    for name, parser in commands.choices.items():
        below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        if below:
            yield from _parts((*path, name), below[0])
        else:
            positionals = [action for action in parser._actions if not action.option_strings]
            words = dict.fromkeys((value for action in positionals for value in _values(action)), "")
            yield Part((*path, name), words, list(_options(parser)))


def _options(parser: argparse.ArgumentParser) -> Iterator[Option]:
    for action in parser._actions:
        for name in action.option_strings:
            # An option with two spellings is offered in the one that the help shows.
            if name.startswith("--") and "_" not in name and action.help != argparse.SUPPRESS:
                yield Option(name, action.help or "", action.nargs != 0, _values(action))


def _values(action: argparse.Action) -> list[str]:
    """The words that an argument may be."""
    from codeparrot_ds.ds_config.file import shipped_names

    if action.choices is not None:
        return [str(choice) for choice in action.choices]
    shown = str(action.metavar or "")
    if shown.startswith("{"):  # a field of the run config
        return shown.strip("{}").split(",")
    if action.dest == "model":
        return [*PRESETS, *MODEL_NAMES] if not action.option_strings else list(MODEL_NAMES)
    known = {"PRESET": PRESETS, "JSON": shipped_names(), "DS_JSON": shipped_names()}
    if shown == "RUN" or action.dest in ("source", "place"):
        return [RUNS_HERE]
    return list(PRESETS) if action.dest == "preset" else list(known.get(shown, ()))


# --------------------------------------------------------------------------------------------------------------------
# bash, which zsh reads too

BASH = """\
# Completion of {program} for {shell}; written by `{program} completion {shell}`.
_codeparrot_ds_runs() {{
    local run
    for run in runs/*/run.json; do
        run="${{run%/run.json}}"
        [ -e "$run/run.json" ] && echo "${{run#runs/}}"
    done
}}
_codeparrot_ds() {{
    local current="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" at="" words="" word
    # --option=value comes as three words.
    if [ "$current" = "=" ]; then current=""
    elif [ "$before" = "=" ]; then before="${{COMP_WORDS[COMP_CWORD-2]}}"
    fi
    for word in "${{COMP_WORDS[@]:1:$((COMP_CWORD-1))}}"; do
        case "$at/$word" in
            {paths}) at="$at/$word" ;;
        esac
    done
    case "$at $before" in
{values}
        *) case "$current" in
            -*) case "$at" in
{options}
            esac ;;
            *) case "$at" in
{words}
            esac ;;
        esac ;;
    esac
    # Where no word fits, the shell offers files.
    COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o default -F _codeparrot_ds {names}
"""
ZSH = """\
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }
autoload -Uz bashcompinit && bashcompinit
"""


def _bash(parts: list[Part], names: list[str], shell: str) -> str:
    def words(found: list[str]) -> str:
        return f"words='{' '.join(found)}'".replace(RUNS_HERE, "'\"$(_codeparrot_ds_runs)\"'")

    def at(part: Part) -> str:
        return "".join(f"/{name}" for name in part.path)

    def case(indent: int, patterns: list[str], command: str) -> str:
        return f"{'':{indent}}{'|'.join(patterns)}) {command} ;;"

    values: dict[str, list[str]] = {}
    files: list[str] = []
    for part in parts:
        for option in part.options:
            if option.values:
                values.setdefault(words(option.values), []).append(f'"{at(part)} {option.name}"')
            elif option.takes_value:
                files.append(f'"{at(part)} {option.name}"')
    script = BASH.format(
        program=PROGRAM,
        shell=shell,
        names=" ".join(names),
        paths="|".join(at(part) for part in parts[1:]),
        values="\n".join(case(8, where, found) for found, where in [*values.items(), ("", files)]),
        options="\n".join(case(16, [f'"{at(part)}"'], words([each.name for each in part.options])) for part in parts),
        words="\n".join(case(16, [f'"{at(part)}"'], words(list(part.words))) for part in parts),
    )
    return (ZSH if shell == "zsh" else "") + script.rstrip("\n")


# --------------------------------------------------------------------------------------------------------------------
# fish

FISH = """\
# Completion of {program} for fish; written by `{program} completion fish`.
function __codeparrot_ds_at
    set -l words (commandline -opc)
    set -e words[1]
    if test (count $argv) -eq 0
        test (count $words) -eq 0
    else
        set -l last (count $argv)
        test "$words[1..$last]" = "$argv"
    end
end
function __codeparrot_ds_runs
    for run in runs/*/run.json
        string replace -r '^runs/(.*)/run.json$' '$1' $run
    end
end
"""


def _fish(parts: list[Part], names: list[str], shell: str) -> str:
    lines = [FISH.format(program=PROGRAM)]
    for name, part in ((name, part) for name in names for part in parts):
        begin = f"complete -c {name} -n {_quoted(' '.join(['__codeparrot_ds_at', *part.path]))}"
        inner = any(other.path[:-1] == part.path for other in parts if other.path)
        for word, text in part.words.items():
            flags = " -f" if inner else ""
            lines.append(f"{begin}{flags} -a {_word(word)}" + (f" -d {_quoted(_first(text))}" if text else ""))
        for option in part.options:
            line = f"{begin} -l {option.name[2:]} -d {_quoted(_first(option.help))}"
            if option.takes_value:
                line += " -r"
            if option.values:
                line += f" -f -a {_quoted(' '.join(map(_in_fish, option.values)))}"
            lines.append(line)
    return "\n".join(lines)


def _in_fish(word: str) -> str:
    return "(__codeparrot_ds_runs)" if word == RUNS_HERE else word


def _word(word: str) -> str:
    return _quoted(_in_fish(word))


def _quoted(text: str) -> str:
    """In single quotes, in which fish reads two escapes."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _first(text: str) -> str:
    """What of a help fits beside a completion."""
    return re.split(r"[;(]", text.replace("%%", "%"))[0].strip()
