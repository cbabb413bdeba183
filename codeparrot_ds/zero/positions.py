"""Where the keys of a JSON text stand, so that a finding can name the line."""

from __future__ import annotations

import json
import re

KeyPath = tuple[str, ...]
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
