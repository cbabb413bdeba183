"""What each token of Python source is: indentation, keyword, identifier, literal, comment, operator."""

from __future__ import annotations

import keyword
import re
from collections.abc import Sequence

import numpy as np

TOKEN_CLASSES = ("indentation", "keyword", "identifier", "literal", "comment", "operator", "other")
"""``indentation`` are line ends and what leads a line; ``other`` are spaces alone, the end of a text, what is no
Python."""

_NUMBER = {name: number for number, name in enumerate(TOKEN_CLASSES)}
_KEYWORDS = {word.encode() for word in keyword.kwlist}
# Never fails: a string without an end goes to the end of its line, or of the text where it has three quotes.
_LEXEME = re.compile(
    rb"""
    (?P<indentation> (?:^|[\r\n])[\ \t\r\n\f]* )
  | (?P<comment> \#[^\r\n]* )
  | (?P<literal> (?:\b[bBfFrRuU]{1,2})? (?:
        '{3} (?:\\.|[^\\])*? (?:'{3}|\Z) | "{3} (?:\\.|[^\\])*? (?:"{3}|\Z)
      | ' (?:\\.|[^'\\\r\n])* '? | " (?:\\.|[^"\\\r\n])* "? )
      | \.?[0-9] (?:[eE][+-][0-9]|[0-9A-Za-z_.])* )
  | (?P<name> [A-Za-z_\x80-\xff][0-9A-Za-z_\x80-\xff]* )
  | (?P<space> [\ \t\f]+ )
  | (?P<operator> [-+*/%@&|^~<>=!:;,.()\[\]{}\\] )
    """,
    re.VERBOSE | re.DOTALL,
)
_SPACES = np.isin(np.arange(256), list(b" \t\r\n\f"))


class TokenClasses:
    """Classes of the tokens of a byte-level tokenizer."""

    def __init__(self, token_bytes: Sequence[bytes], eos_token_id: int) -> None:
        self._token_bytes, self._eos = list(token_bytes), eos_token_id

    def classify(self, ids: np.ndarray) -> np.ndarray:
        """Returns the class of each id of a packed row as an index of ``TOKEN_CLASSES``, (tokens,), uint8.

        A token is what its first visible letter is. A row may begin in the middle of a string, which is then read as
        code up to its end.
        """
        classes = np.full(len(ids), _NUMBER["other"], dtype=np.uint8)
        borders = [-1, *np.flatnonzero(ids == self._eos).tolist(), len(ids)]
        for border, following in zip(borders, borders[1:], strict=False):
            pieces = [self._token_bytes[token] for token in ids[border + 1 : following].tolist()]
            if pieces:
                classes[border + 1 : following] = _classes_of(pieces)
        return classes


def _classes_of(pieces: Sequence[bytes]) -> np.ndarray:
    text = b"".join(pieces)
    of_bytes = byte_classes(text)
    ends = np.cumsum([len(piece) for piece in pieces])
    starts = ends - [len(piece) for piece in pieces]
    visible = np.flatnonzero(~_SPACES[np.frombuffer(text, dtype=np.uint8)])
    first = np.searchsorted(visible, starts)
    place = np.append(visible, len(text))[first]  # of each token's first visible letter, if that is before its end
    blank = place >= ends
    place = np.where(blank, np.minimum(starts, len(text) - 1), place)
    found: np.ndarray = of_bytes[place]
    line_end = np.array([b"\n" in piece or b"\r" in piece for piece in pieces])
    code = ~np.isin(found, [_NUMBER["literal"], _NUMBER["comment"]])
    found[blank & line_end & code] = _NUMBER["indentation"]
    found[ends == starts] = _NUMBER["other"]
    return found


def byte_classes(text: bytes) -> np.ndarray:
    """Returns the class of each byte of a source as an index of ``TOKEN_CLASSES``, (bytes,), uint8."""
    classes = np.full(len(text), _NUMBER["other"], dtype=np.uint8)
    for lexeme in _LEXEME.finditer(text):
        kind = str(lexeme.lastgroup)
        if kind == "name":
            kind = "keyword" if lexeme.group() in _KEYWORDS else "identifier"
        if kind in _NUMBER:
            classes[lexeme.start() : lexeme.end()] = _NUMBER[kind]
    return classes
