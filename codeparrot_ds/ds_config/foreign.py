"""Configs that were written for other programs: what of them a comparison takes, and what it says about the rest.

A config for the Hugging Face Trainer or for DeepSpeed's autotuner holds batch sizes, a schedule and monitors as well.
In a comparison these belong to the run, which is the same for all configs: they are taken out, and each is named. The
micro-batch alone is the config's own, for the rows of a step do not depend on it. ``"auto"`` stays, for ``resolve``.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from codeparrot_ds.config.run_config import RunConfig
from codeparrot_ds.ds_config.facts import leaves, value_at
from codeparrot_ds.ds_config.known_keys import KeyPath, is_finite
from codeparrot_ds.ds_config.resolve import ACCUMULATION, LEFT_OUT, MICRO_BATCH, ROWS, RUN_OWNED_KEYS

OF_OTHER_PROGRAMS = (*LEFT_OUT, "flops_profiler")


@dataclass(frozen=True, kw_only=True)
class Imported:
    """A config as a comparison takes it."""

    config: dict[str, Any]
    """The JSON without what belongs to the run."""
    micro_batch_size: int | None
    """The config's own; None where it names none."""
    notes: list[str]
    """One sentence for each thing that was taken out and says something else than the run."""


def import_ds_config(ds_config: Mapping[str, Any], run: RunConfig) -> Imported:
    """What a comparison on the rows of ``run`` takes of a config."""
    config: dict[str, Any] = copy.deepcopy(dict(ds_config))
    notes = []
    micro_batch = value_at(config, MICRO_BATCH)
    own = micro_batch if isinstance(micro_batch, int) and not isinstance(micro_batch, bool) else None
    for path, field in RUN_OWNED_KEYS.items():
        value = value_at(config, path)
        if value is None or value == "auto":
            continue
        wanted = getattr(run, field, None)
        _remove(config, path)
        if path != MICRO_BATCH and value != wanted and path != ACCUMULATION:
            notes.append(f"{'.'.join(path)} {value!r} is left out: all configs train with {field} {wanted!r}")
    if any(value != "auto" for _, value in leaves(value_at(config, ("scheduler", "params")) or {})):
        notes.append(f"scheduler is left out: all configs train with {run.lr_scheduler_type}")
    config.pop("scheduler", None)
    for block in OF_OTHER_PROGRAMS:
        if config.pop(block, None) is not None:
            notes.append(f"{block} is left out: it logs or measures, and trains nothing")
    return Imported(config=config, micro_batch_size=own, notes=notes)


@dataclass(frozen=True, kw_only=True)
class OwnBatch:
    """What a config says of the batch; None where it leaves that to the run."""

    rows: int | None
    """Per step, of all ranks."""
    micro_batch_size: int | None
    accumulation_steps: int | None

    def size(self, rows: int | None, world_size: int) -> int | None:
        """The micro-batch that it leaves no choice of, with so many rows per step; None where there is one."""
        if self.micro_batch_size or not self.accumulation_steps or not rows:
            return self.micro_batch_size
        size, rest = divmod(rows, self.accumulation_steps * world_size)
        return None if rest else size


def own_batch(ds_config: Mapping[str, Any]) -> OwnBatch:
    """What a config says of the batch itself; what the config check refuses counts for nothing."""

    def said(path: KeyPath) -> int | None:
        value = value_at(ds_config, path)
        return int(value) if is_finite(value) and value >= 1 else None

    return OwnBatch(rows=said(ROWS), micro_batch_size=said(MICRO_BATCH), accumulation_steps=said(ACCUMULATION))


def _remove(config: dict[str, Any], path: KeyPath) -> None:
    block = value_at(config, path[:-1]) if path[:-1] else config
    del block[path[-1]]
