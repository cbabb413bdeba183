"""Paths as people write them: ``~`` and variables, bare names of runs, and what was meant by one that is not there.

Two doors let paths in, and both go through `expand`: the types of the command line's arguments, and the fields of the
run config. What a run keeps or hands to its ranks is made absolute on the way out.
"""

from __future__ import annotations

import argparse
import difflib
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from codeparrot_ds.errors import UserError

RUNS = "runs"
"""Folder of runs, unless a run config says otherwise."""
_VARIABLE = re.compile(r"\$(?:(\w+)|\{([^}]*)\})", re.ASCII)
_BARE_NAME = re.compile(r"\w[\w.-]*", re.ASCII)
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*(:[\w.-]+)?", re.ASCII)
SLIP = 0.75  # likeness of two names from which one is taken for the other mistyped, whatever the Hub may hold
NEAR = 0.6  # likeness from which it is offered
_MAX_SIBLINGS = 2000  # entries of a folder that are looked at for a likeness


def expand(text: str) -> str:
    """A path with ``~``, ``~user``, ``$NAME`` and ``${NAME}`` put in, as a shell does.

    Raises:
        UserError: a variable that is not set or empty, or a user who is not known.
    """

    def value_of(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if not name and not exists(text):
            raise UserError(f"{text}: ${{}} names no variable")
        value = os.environ.get(name, "")
        if value or exists(text):  # a name that holds a dollar
            return value or match[0]
        if name in os.environ:
            raise UserError(f"{text}: the variable ${name} is empty")
        raise UserError(f"{text}: the variable ${name} is not set{_quoted(nearest_of(name, os.environ), '$')}")

    expanded = os.path.expanduser(_VARIABLE.sub(value_of, text))
    if expanded.startswith("~") and not exists(expanded):
        raise UserError(f"{text}: there is no user {expanded.partition('/')[0][1:]!r} here whose home this could be")
    return expanded


def path_argument(text: str) -> Path:
    """The type of an argument that is a path."""
    return Path(name_argument(text))


def name_argument(text: str) -> str:
    """The type of an argument that is a path or a name of something else."""
    if not text:
        raise argparse.ArgumentTypeError("cannot be an empty text")
    try:
        return expand(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def exists(path: str | os.PathLike[str]) -> bool:
    """Whether there is something; a folder on the way that may not be looked into is said so, not taken for nothing."""
    try:
        os.stat(path)
    except PermissionError as error:
        raise UserError(f"{os.fspath(path)} cannot be looked at: permission denied") from error
    except (OSError, ValueError):  # too long, or with a null character: no such file either
        return False
    return True


def shown(path: str | os.PathLike[str]) -> str:
    """A path for people: from the working directory where it lies below that."""
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except ValueError:
        return os.fspath(path)


# --------------------------------------------------------------------------------------------------------------------
# What is not there


def nearest(path: str | os.PathLike[str], likeness: float = NEAR) -> str | None:
    """The existing path that is most like one that does not exist, part by part; None where none is.

    Args:
        path: of nothing.
        likeness: of each part to the name that is there, from 0 to 1.
    """
    text = os.fspath(path)
    found = "/" if text.startswith("/") else ""
    for part in filter(None, text.split("/")):
        if exists(os.path.join(found, part)):
            found = os.path.join(found, part)
            continue
        name = nearest_of(part, _names_in(found or "."), likeness)
        if name is None:
            return None
        found = os.path.join(found, name)
    return found or None


def nearest_of(name: str, choices: Iterable[str], likeness: float = NEAR) -> str | None:
    """The choice that is most like a name, whatever the case of letters; None where none is."""
    by_lower_case = {choice.lower(): choice for choice in choices}
    close = difflib.get_close_matches(name.lower(), by_lower_case, n=1, cutoff=likeness)
    return by_lower_case[close[0]] if close else None


def did_you_mean_path(path: str | os.PathLike[str], otherwise: str = "") -> str:
    """``"; did you mean 'corpus'?"`` for a path that does not exist, or ``; otherwise`` where nothing is like it.

    Nothing at all for a path that exists: what is wrong with it is not its name.
    """
    return "" if exists(path) else _quoted(nearest(path)) or (otherwise and f"; {otherwise}")


def _quoted(found: str | None, sign: str = "") -> str:
    return "" if found is None else f"; did you mean {sign + found!r}?"


def _names_in(folder: str) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in itertools.islice(entries, _MAX_SIBLINGS) if entry.name[0] != ".")
    except OSError:  # a file, or nothing that may be read
        return []


def may_be_on_hub(text: str, *, bare: bool = False, is_meant: Callable[[str], bool] = exists) -> bool:
    """Whether a text that is no path here can be the name of something on the Hugging Face Hub.

    ``org/name`` whose first part is a folder here, and what is all but the name of something here, is a path with a
    mistake, not worth a question to the Hub; ``org/name@REVISION`` is a name in any case.

    Args:
        text: as typed.
        bare: whether a name without an organisation is one, such as ``gpt2``.
        is_meant: whether a path that is there and nearly named so could have been meant.
    """
    name, at, _ = text.partition("@")
    if text.startswith(f"{RUNS}/"):
        return False
    if not _HUB_NAME.fullmatch(name) and not (bare and _BARE_NAME.fullmatch(name)):
        return False
    if at:
        return True
    near = nearest(text, SLIP)
    return not os.path.isdir(os.path.dirname(text)) and (near is None or not is_meant(near))


# --------------------------------------------------------------------------------------------------------------------
# Runs by their names


def in_runs(text: str, runs: str | os.PathLike[str] = RUNS) -> str:
    """What a text names: itself where there is such a path, else what has that name in the folder of runs.

    The latter is said on standard error. A text that names neither comes back as it is.
    """
    place = os.path.join(runs, text)
    if not text or os.path.isabs(text) or exists(text) or not exists(place):
        return text
    print(f"{text} is taken for {place}", file=sys.stderr)
    return place


def find_run(text: str | os.PathLike[str], runs: str | os.PathLike[str] = RUNS, *, what: str = "run") -> Path:
    """The path of a run, or of something in it, by its path or by its name in the folder of runs.

    Raises:
        UserError: there is neither, with the nearest that is there, or it is a file.
    """
    found = in_runs(os.fspath(text), runs)
    if not exists(found):
        raise UserError(no_run(found, runs, what=what))
    if not os.path.isdir(found):
        raise UserError(f"{found} is a file; name the folder of a {what}")
    return Path(found)


def no_run(text: str, runs: str | os.PathLike[str] = RUNS, *, what: str = "run", otherwise: str = "") -> str:
    """What to say where a text names no run, with the nearest one, or ``otherwise`` where none is like it."""
    place = os.path.join(runs, text)
    is_bare = not text.startswith((".", "/", os.path.join(runs, "")))
    within = f", and none of that name in {os.fspath(runs)}" if is_bare else ""
    near = nearest(place) if is_bare else None
    return f"there is no {what} {text}{within}{_quoted(near) or did_you_mean_path(text, otherwise)}"


def not_a_run(folder: str | os.PathLike[str]) -> UserError:
    """What to say of a path that exists and is no run, with the runs in it where it is a folder of them."""
    inside = sorted(path.parent.name for path in Path(folder).glob("*/run.json"))
    hint = f"; it holds the runs {', '.join(inside[:5])}{' …' if len(inside) > 5 else ''}" if inside else ""
    return UserError(f"{os.fspath(folder)} is not a run: it has no run.json{hint}")


def did_you_mean(word: str, choices: Iterable[str], likeness: float = NEAR) -> str:
    """``"; did you mean 'x'?"`` for the choice nearest to `word`, or the list of choices when none is near."""
    choices = sorted(set(choices))
    near = nearest_of(word, choices, likeness)
    if near is not None:
        return f"; did you mean {near!r}?"
    if 0 < len(choices) <= 12:
        return f"; choose one of {', '.join(choices)}"
    return ""
