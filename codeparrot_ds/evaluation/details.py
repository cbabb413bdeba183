"""Where a model's loss comes from: by position in the context and by class of token, and how often it guesses right."""

from __future__ import annotations

import keyword
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

_FIGURES = 4  # of each position or class: loss in nats, targets, targets guessed first, targets among the first five


class Details:
    """Sums over the targets of an evaluation, kept on the device in float64.

    ``sums`` has a row for each position, then one for each class of token: loss in nats, targets, and the targets that
    were the model's first guess or among its first five. Ranks add theirs by summing it.
    """

    def __init__(self, seq_length: int, token_classes: TokenClasses | None, device: torch.device | str) -> None:
        self.seq_length, self.token_classes = seq_length, token_classes
        self.sums = torch.zeros((seq_length + len(TOKEN_CLASSES), _FIGURES), dtype=torch.float64, device=device)

    def add(self, input_ids: torch.Tensor, is_target: torch.Tensor, losses: torch.Tensor, ranks: torch.Tensor) -> None:
        """Adds a batch.

        Args:
            input_ids: (batch, tokens).
            is_target: whether the token after each position is a target, (batch, tokens).
            losses: of the token after each position, (batch, tokens).
            ranks: the number of tokens that the model holds more probable than it, (batch, tokens).
        """
        columns = (losses, torch.ones_like(losses), ranks < 1, ranks < 5)
        figures = torch.stack([column.double() * is_target for column in columns], dim=-1)
        tokens = input_ids.shape[1]
        # Position n is that of the target: it has n tokens before it.
        self.sums[1:tokens] += figures[:, :-1].sum(dim=0)
        if self.token_classes is not None:
            classes = np.stack([self.token_classes.classify(row) for row in input_ids.cpu().numpy()])
            of_targets = torch.from_numpy(classes[:, 1:].astype(np.int64)).to(losses.device).flatten()
            self.sums[self.seq_length :].index_add_(0, of_targets, figures[:, :-1].flatten(0, 1))

    def result(self) -> dict[str, Any]:
        """Returns ``top_1_accuracy`` and ``top_5_accuracy``, ``loss_by_position`` (``first`` and ``last`` number of
        tokens before the target, each range twice as long as the one before) and, for a byte-level tokenizer,
        ``loss_by_class``; loss in nats per token."""
        positions, classes = self.sums.cpu().split([self.seq_length, len(TOKEN_CLASSES)])
        everything = positions.sum(dim=0)
        by_position = []
        for power in range(int(math.log2(max(1, self.seq_length - 1))) + 1):
            first, last = 2**power, min(2 ** (power + 1), self.seq_length) - 1
            by_position.append({"first": first, "last": last, **_figures(positions[first : last + 1].sum(dim=0))})
        return {
            "top_1_accuracy": (everything[2] / everything[1]).item(),
            "top_5_accuracy": (everything[3] / everything[1]).item(),
            "loss_by_position": [row for row in by_position if row["tokens"]],
            "loss_by_class": None
            if self.token_classes is None
            else {name: _figures(row) for name, row in zip(TOKEN_CLASSES, classes, strict=True) if row[1] > 0},
        }


def _figures(sums: torch.Tensor) -> dict[str, Any]:
    loss, tokens, first, five = sums.tolist()
    if not tokens:
        return {"tokens": 0}
    return {"tokens": round(tokens), "loss": loss / tokens, "top_1": first / tokens, "top_5": five / tokens}


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
