"""Configs that train otherwise than fp32 at stage 0 by one setting each, and some that only look different."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from codeparrot_ds.ds_config.file import open_ds_config

# A small model on short rows, with steps large enough that every setting does something, and clipping at work.
SMALL = [
    *("--preset", "demo", "--model", str(Path(__file__).with_name("model.json")), "--seq-length", "64"),
    *("--global-batch-size", "8", "--micro-batch-size", "2", "--num-warmup-steps", "4", "--learning-rate", "1e-3"),
    *("--num-lanes", "8", "--shuffle-buffer", "64", "--num-workers", "1", "--max-train-steps", "60"),
]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A config with one thing changed.

    Attributes:
        name: what is wrong, for a reader.
        base: the shipped config.
        fields: ``field=value`` of the run config.
        keys: changes of the DeepSpeed config.
        reason: what its verdict should say; None where it should be called the same.
    """

    name: str
    reason: str | None
    base: str = "zero1_fp32"
    fields: str = ""
    keys: Mapping[str, Any] = field(default_factory=dict)


def adam(**params: Any) -> dict[str, Any]:
    """Parameters of the optimizer beside the shipped ones."""
    return {"optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.999], "eps": 1e-8, **params}}}


CASES = [
    Case(name="clipping off", fields="max_grad_norm=0", reason="clipping 0.0, reference 1.0"),
    Case(name="clipping at 0.5", fields="max_grad_norm=0.5", reason="clipping 0.5, reference 1.0"),
    Case(
        name="gradients accumulated in bf16",
        keys={"data_types": {"grad_accum_dtype": "bf16"}},
        reason="accumulation dtype bf16",
    ),
    Case(name="another seed", fields="seed=2", reason="data order: it read other rows (seed 2, reference 1)"),
    Case(name="dropout", fields="dropout=0.1", reason="dropout 0.1, reference 0.0"),
    Case(name="another shuffle buffer", fields="shuffle_buffer=8", reason="data order: it read other rows (shuffle"),
    Case(name="another number of lanes", fields="num_lanes=4", reason="data order: it read other rows (lanes"),
    Case(name="no weight decay", fields="weight_decay=0", reason="weight decay 0.0, reference 0.1"),
    Case(name="learning rate 5% too high", fields="learning_rate=1.05e-3", reason="learning rate 0.00105"),
    Case(name="no warm-up", fields="num_warmup_steps=0", reason="warm-up 0, reference 4"),
    Case(name="linear decay", fields="lr_scheduler_type=linear", reason="schedule linear, reference cosine"),
    Case(name="beta2 0.95", keys=adam(betas=[0.9, 0.95]), reason="betas [0.9, 0.95], reference [0.9, 0.999]"),
    Case(name="epsilon 1e-6", keys=adam(eps=1e-6), reason="epsilon 1e-06, reference 1e-08"),
    Case(name="no bias correction", keys=adam(bias_correction=False), reason="bias correction"),
    Case(name="masked between documents", fields="intra_document_masking=yes", reason="masking between documents"),
    Case(name="bf16 master weights", base="zero2_bf16_states", reason="master weights' dtype"),
    Case(name="control: stage 2", base="zero2_fp32", reason=None),
    Case(name="control: stage 3, micro-batch 4", base="zero3_fp32", fields="micro_batch_size=4", reason=None),
    Case(name="control: bf16", base="zero2", reason=None),
    Case(name="control: bf16 at stage 0, micro-batch 8", base="zero0", fields="micro_batch_size=8", reason=None),
    Case(name="control: bf16, fp32 accumulation", base="zero2_fp32_accumulation", reason=None),
]
# Communication is between ranks.
CASES_ON_2 = [
    Case(
        name="gradients sent in bf16",
        keys={"communication_data_type": "bf16"},
        reason="communication dtype bf16, reference fp32",
    ),
    Case(name="clipping off, 2 ranks", fields="max_grad_norm=0", base="zero2_fp32", reason="clipping 0.0"),
    Case(name="control: stage 3, 2 ranks", base="zero3_fp32", reason=None),
]


def write_cases(cases: Sequence[Case], folder: Path) -> list[str]:
    """Writes the JSON of each case, and returns what is typed for it."""
    typed = []
    for number, case in enumerate(cases):
        path = folder / f"case{number}.json"
        path.write_text(json.dumps(merged(open_ds_config(case.base).config, case.keys)))
        typed.append(f"{path},{case.fields}" if case.fields else str(path))
    return typed


def is_right(case: Case, kind: str | None, reason: str | None) -> bool:
    """Whether a verdict says of a case what it should: the same, or different with the reason."""
    if case.reason is None:
        return kind is not None and kind.startswith("equal")
    return kind == "different" and case.reason in str(reason)


def merged(config: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A config with the keys of another; blocks are merged."""
    for key, value in changes.items():
        config[key] = merged(config.get(key, {}), value) if isinstance(value, Mapping) else value
    return config
