"""What a checkpoint holds beside its tensors: ``state.json`` and ``data.json``. No torch here."""

from __future__ import annotations

import dataclasses
from typing import Any

from codeparrot_ds.checkpoint.folders import DATA, STATE, Checkpoint
from codeparrot_ds.json_files import parts_of
from codeparrot_ds.metrics import EvaluationRow


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunState:
    """The run after a step, apart from the engine."""

    step: int
    tokens: int
    """Trained on so far."""
    data: dict[str, Any]
    """The place of every lane and the stream's fingerprint, as `data.datasets.saved_stream` makes it."""
    layout: dict[str, Any]
    """``world_size``, ``zero_stage`` and ``precision`` of the run that saved it."""
    evaluations: list[EvaluationRow]
    """All so far."""
    config: dict[str, Any]
    """The run config's fields, in the version that saved it."""
    ds_config: dict[str, Any]
    """Resolved."""
    imported: dict[str, Any] | None = None
    """What an import of DeepSpeed's checkpoint took over and what it could not."""

    @property
    def last_evaluation(self) -> EvaluationRow | None:
        return self.evaluations[-1] if self.evaluations else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineState:
    """The engine's counters; the fields are keys of ``state.json``."""

    parameters: dict[str, list[int]]
    """Shapes by name."""
    bytes_a_parameter: int
    """Of the masters and both moments."""
    optimizer_step: int
    scheduler_step: int
    global_steps: int
    global_samples: int
    skipped_steps: int
    loss_scaler: dict[str, Any]
    """The place of fp16's dynamic loss scaling; empty without."""


def state_as_json(state: RunState, engine: EngineState) -> dict[str, Any]:
    """The content of ``state.json``."""
    extra = {
        "evaluations": [row.as_json() for row in state.evaluations],
        "config": state.config,
        "ds_config": state.ds_config,
    }
    if state.imported is not None:
        extra["imported"] = state.imported
    run = {"step": state.step, "tokens": state.tokens, "layout": state.layout, "extra": extra}
    return run | dataclasses.asdict(engine)


def read_state(checkpoint: Checkpoint) -> tuple[RunState, EngineState]:
    """The state of a verified checkpoint; raises as `json_files.read_json`."""
    data, state = (checkpoint.read_json(name) for name in (DATA, STATE))
    with parts_of(checkpoint.path / STATE):
        extra = state["extra"]
        run = RunState(
            step=state["step"],
            tokens=state["tokens"],
            data=data,
            layout=state["layout"],
            evaluations=[EvaluationRow.from_json(row) for row in extra["evaluations"]],
            config=extra["config"],
            ds_config=extra["ds_config"],
            imported=extra.get("imported"),
        )
        return run, EngineState(**{field.name: state[field.name] for field in dataclasses.fields(EngineState)})
