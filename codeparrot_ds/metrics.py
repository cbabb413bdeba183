"""The rows of ``metrics.jsonl``: meters and evaluations make them; trackers, checkpoints and model cards keep them."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Row:
    step: int
    tokens: int
    """Trained on so far, over all ranks."""

    def as_json(self) -> dict[str, Any]:
        """By key, as the file has it. A field with a default is absent from a run that does not measure it."""
        values = {field: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {
            field.name: value
            for field, value in values.items()
            if value is not None or field.default is dataclasses.MISSING
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingRow(_Row):
    """One logged step; the throughput and the seconds are means per step since the row before, on rank 0."""

    epoch: int
    loss: float
    """Nats per token, of the last step."""
    learning_rate: float
    grad_norm: float | None
    tokens_per_second: float
    mfu: float
    step_seconds: float
    data_wait_seconds: float
    memory_bytes: int
    skipped_steps: int
    loss_scale: float
    rank_seconds_median: float | None = None
    """Of the ranks' own seconds per step, where there are several."""
    rank_seconds_max: float | None = None
    slowest_rank: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationRow(_Row):
    """One evaluation on the validation split."""

    eval_loss: float
    """Nats per token."""
    perplexity: float
    bits_per_byte: float | None
    eval_tokens: int
    parsing_share: float | None = None
    """Of the completions, where the run makes any."""
    pass_at_1: float | None = None

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> EvaluationRow:
        """A row out of a checkpoint; keys that this version does not know are left out."""
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{key: value for key, value in row.items() if key in known})


def read_row(line: bytes) -> dict[str, Any] | None:
    """A line of the file as a row, or None for one that a crash left half-written; NaN and infinity are floats."""
    try:
        # json, unlike orjson, reads a bare NaN, in case another program wrote the row.
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int or not 0 <= row["step"] <= _MOST:
        return None
    return {key: _number(value) for key, value in row.items()}


_MOST = 2**62


def _number(value: Any) -> Any:
    """``"nan"`` and ``"inf"`` are how the run writes what JSON has no word for; no number is too large for a float."""
    if isinstance(value, int) and abs(value) > _MOST:
        return math.copysign(math.inf, value)
    return float(value) if value in ("nan", "inf", "-inf") else value
