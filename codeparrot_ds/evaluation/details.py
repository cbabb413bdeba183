"""Where a model's loss comes from: by position in the context and by class of token, and how often it guesses right."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from codeparrot_ds.evaluation.token_classes import TOKEN_CLASSES, TokenClasses

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
        ``loss_by_class``; loss in nats a token."""
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
