"""Python source in a terminal's colours."""

from __future__ import annotations

from codeparrot_ds.data.inspect import visible
from codeparrot_ds.evaluation.token_classes import TOKEN_CLASSES, byte_classes

_COLOURS = {"keyword": "\x1b[1;34m", "literal": "\x1b[32m", "comment": "\x1b[2m"}
_PLAIN = "\x1b[0m"


def coloured(text: str, before: str = "") -> str:
    """Returns source with colours, and with what a terminal would obey made visible.

    Args:
        text: any part of a source.
        before: what it follows: a string or comment that begins there goes on here.
    """
    start = before.encode("utf-8", "replace")
    data = text.encode("utf-8", "replace")
    classes = byte_classes(start + data)[len(start) :].tolist()
    parts, begin = [], 0
    for end in range(1, len(data) + 1):
        if end == len(data) or classes[end] != classes[begin]:
            piece = visible(data[begin:end].decode("utf-8", "replace"))
            colour = _COLOURS.get(TOKEN_CLASSES[classes[begin]], "")
            parts.append(f"{colour}{piece}{_PLAIN}" if colour else piece)
            begin = end
    return "".join(parts)
