"""The user's own ``.deepspeed_env``, one variable per line, as DeepSpeed and a shell read it. No torch here.

DeepSpeed puts ``export NAME="VALUE"`` into the command of each host's shell. So ``$OTHER`` is what it is on that host,
and quotes and backslashes mean what they mean there. A line that the two would read differently is refused.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from codeparrot_ds.errors import UserError
from codeparrot_ds.secret_forms import names_a_secret

Value = str | list[str]
"""Of a variable; a list where only the host knows it: text and names of its variables by turns, text at both ends."""
_LINE = re.compile(r"(?:export\s+)?([A-Za-z_][A-Za-z0-9_]*)\s*=\s*(.*)")
_PIECE = re.compile(r"""'(?P<literal>[^']*)'|"(?P<quoted>(?:[^"\\]|\\.)*)"|(?P<bare>(?:[^'"\\]|\\.)+)""")
_SPECIAL = re.compile(
    r"\\(?P<itself>[$\"`\\])|\$(?:(?P<name>[A-Za-z_]\w*)|\{(?P<braced>[A-Za-z_]\w*)\})|[$`\\]", re.ASCII
)
_REFUSED_BARE = (
    # What a shell reads in another way than DeepSpeed, outside of quotes.
    (r"(^|\s)#", "has a # outside of quotes: give a comment a line of its own, or put the value in quotes"),
    (r"(^|:)~", "has a ~, which is left as it is there: write $HOME"),
    (r";(\s|$)", "has a ; outside of quotes: leave it out, or put the value in quotes"),
    (r"\s[A-Za-z_]\w*=", "is followed by another variable: give it a line of its own, or put the value in quotes"),
)


def read_deepspeed_env(folders: list[Path], known: Mapping[str, str]) -> dict[str, Value]:
    """What ``.deepspeed_env`` files set over ``known``; later folders win. Blank lines and comments are skipped.

    Args:
        folders: where they may be.
        known: variables that the hosts get anyway; what is neither there nor further up in a file is left to the host.

    Raises:
        UserError: a file or a line that cannot be read.
    """
    name = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
    variables: dict[str, Value] = dict(known)
    for path in dict.fromkeys(folder / name for folder in folders):
        if not path.is_file():
            continue
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read: {error}") from error
        for number, line in enumerate(lines, start=1):
            text = line.strip()
            if not text or text.startswith("#"):
                continue
            match = _LINE.fullmatch(text)
            if match is None:
                raise UserError(f"{path}, line {number}: {_up_to_a_secret(text)!r} is not NAME=value")
            try:
                parts = _parts(match[2])
            except ValueError as problem:  # without the value, which may be a secret
                raise UserError(f"{path}, line {number}: the value of {match[1]} {problem}") from None
            variables[match[1]] = _with_known(parts, variables)
    return variables


def _up_to_a_secret(line: str) -> str:
    """A line that was not understood, as far as the first name in it whose value would be a secret."""
    ends = (word.end() for word in re.finditer(r"\w+", line) if names_a_secret(word[0]) and word.end() < len(line))
    end = next(ends, None)
    return line if end is None else f"{line[:end]} …"


def on_this_host(variables: Mapping[str, Value], environment: Mapping[str, str]) -> dict[str, str]:
    """The variables with this host's own put in; one that is not set is empty, as in a shell."""
    return {
        name: value if isinstance(value, str) else "".join(_filled(value, environment))
        for name, value in variables.items()
    }


def _filled(parts: list[str], environment: Mapping[str, str]) -> list[str]:
    return [environment.get(part, "") if index % 2 else part for index, part in enumerate(parts)]


def _with_known(parts: list[str], variables: Mapping[str, Value]) -> Value:
    """The parts with the variables that are known in their places."""
    filled = [parts[0]]
    for name, text in zip(parts[1::2], parts[2::2], strict=True):
        value = variables.get(name, ["", name, ""])
        first, *others = [value] if isinstance(value, str) else value
        filled[-1] += first
        filled += others
        filled[-1] += text
    return filled[0] if len(filled) == 1 else filled


def _parts(value: str) -> list[str]:
    """Text and names of variables by turns; ``ValueError`` with what is wrong, to follow "the value of NAME"."""
    pieces = list(_PIECE.finditer(value))
    if sum(len(piece[0]) for piece in pieces) != len(value):
        raise ValueError(
            "has a quote that is not closed, or ends in a backslash: put the whole value in quotes, on one line"
        )
    parts = [""]
    for piece in pieces:
        if piece["literal"] is not None:
            parts[-1] += piece["literal"]
            continue
        if piece["bare"] is not None:
            _check_bare(piece["bare"], alone=len(pieces) == 1)
        _add(parts, piece["bare"] or piece["quoted"] or "", quoted=piece["bare"] is None)
    return parts


def _check_bare(text: str, *, alone: bool) -> None:
    for pattern, problem in _REFUSED_BARE:
        if re.search(pattern, text):
            raise ValueError(problem)
    if not alone and re.search(r"\s", text):  # alone, DeepSpeed keeps it
        raise ValueError("has a space outside of its quotes: put the whole value in quotes")


def _add(parts: list[str], text: str, *, quoted: bool) -> None:
    """Adds a piece in which a backslash and a dollar mean something."""
    end = 0
    for match in _SPECIAL.finditer(text):
        parts[-1] += text[end : match.start()]
        end = match.end()
        if match["itself"] is not None:
            parts[-1] += match["itself"]
        elif (name := match["name"] or match["braced"]) is not None:
            parts += [name, ""]
        elif match[0] == "\\" and quoted:
            parts[-1] += "\\"
        elif match[0] == "\\":
            raise ValueError("has a backslash outside of quotes: put the value in single quotes")
        else:
            raise ValueError("has a ` or a $ that is neither $NAME nor ${NAME}: write \\` or \\$ for the sign itself")
    parts[-1] += text[end:]
