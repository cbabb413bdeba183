"""Learning-rate schedules as pure functions of the optimizer step."""

from __future__ import annotations

import math


def learning_rate_factor(kind: str, step: int, num_warmup_steps: int, max_train_steps: int) -> float:
    """Factor on the learning rate for the update that follows ``step`` finished steps.

    Linear warm-up from 0, then cosine to 0, linear to 0, or constant: the recipe's schedule, with the values of
    ``transformers.get_scheduler`` (so the first update of a warm-up has rate 0).

    Args:
        kind: ``cosine``, ``linear`` or ``constant``.
        step: optimizer steps done.
        num_warmup_steps: steps of linear warm-up.
        max_train_steps: the step at which cosine and linear reach 0.
    """
    if step < num_warmup_steps:
        return step / max(1, num_warmup_steps)
    if kind == "constant":
        return 1.0
    progress = min(1.0, (step - num_warmup_steps) / max(1, max_train_steps - num_warmup_steps))
    return 1.0 - progress if kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
