"""The JSON values of a text that is no JSON lines: an array's elements, or objects over several lines each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

_GAP = re.compile(rb"(?:[\s,\]]|\xef\xbb\xbf)*")  # with byte order marks
_REST_OF_STRING = re.compile(rb'[^"\\]*(?:\\.[^"\\]*)*', re.DOTALL)
_MARK = re.compile(rb'["{}\[\]]')
_MARK_OR_END = re.compile(rb'["{}\[\],\s]')


def split_values(chunks: Iterable[bytes], *, at_start: bool, max_bytes: int) -> Iterator[tuple[bytes | None, int]]:
    """Each value with the byte of the text behind it; None for one of more than ``max_bytes``, which is not held.

    Args:
        chunks: of the text, from its start or from behind a value on.
        at_start: whether an array may begin here.

    Raises:
        EOFError: the text ends inside a value.
    """
    held = bytearray()
    offset = depth = 0
    inside = in_string = escaped = too_long = False
    for chunk in chunks:
        place = begin = 0
        while place < len(chunk):
            if not inside:
                place = begin = _end(_GAP, chunk, place)
                if place == len(chunk):
                    break
                if at_start and chunk[place] == ord("["):
                    place += 1
                else:
                    inside = True
                at_start = False
                continue
            ended = False
            if escaped:
                place, escaped = place + 1, False
            elif in_string:
                place = _end(_REST_OF_STRING, chunk, place)
                if place < len(chunk):
                    escaped = chunk[place] == ord("\\")  # the last byte of the chunk
                    in_string = escaped
                    place += 1
                    ended = depth == 0 and not in_string
            else:
                mark = (_MARK if depth else _MARK_OR_END).search(chunk, place)
                place = mark.end() if mark else len(chunk)
                sign = mark[0] if mark else b""
                if sign == b'"':
                    in_string = True
                elif sign and sign in b"{[":
                    depth += 1
                elif sign and sign in b"}]" and depth:
                    depth -= 1
                    ended = depth == 0
                elif sign:  # behind a number or a word
                    ended = True
                    place -= place - 1 > begin or bool(held)
            if ended:
                held += chunk[begin:place]
                yield None if too_long or len(held) > max_bytes else bytes(held), offset + place
                held.clear()
                inside = too_long = False
        if inside:
            held += chunk[begin:]
            if len(held) > max_bytes:
                too_long = True
                held.clear()
        offset += len(chunk)
    if in_string or depth:
        raise EOFError("the file ended inside a JSON value")
    if inside:
        yield None if too_long else bytes(held), offset


def _end(pattern: re.Pattern[bytes], chunk: bytes, place: int) -> int:
    found = pattern.match(chunk, place)
    assert found is not None  # the pattern matches nothing, too
    return found.end()
