"""Saving a run and bringing it back, at the same layout bit for bit and at another one with the same state.

Every rank writes the optimizer fragments that it owns and its random number generators' state; rank 0 adds the step,
the schedule, the loss scaler, the counters and the position of every data lane. All of it is JSON and safetensors:
nothing that is loaded can run code. Which folders exist and whether they are whole is
:mod:`codeparrot_ds.run.checkpoint_files`.
"""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from codeparrot_ds.errors import UserError
from codeparrot_ds.run import checkpoint_files
from codeparrot_ds.run.export import save_tensors
from codeparrot_ds.run.fragments import (
    MASTER,
    MOMENTS,
    create_optimizer_state,
    forget_beta_powers,
    masters_to_working_weights,
    optimizer_step_count,
    owned_fragments,
    parameter_shapes,
    set_optimizer_step_count,
)
from codeparrot_ds.run.ranks import Ranks

STATE = "state.json"
DATA = "data.json"
LOSS_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RestoredRun:
    """What a checkpoint says about the run, apart from the tensors that went into the engine.

    Attributes:
        step: optimizer steps done.
        tokens: tokens trained on.
        data: what the caller saved about the data stream (lane states, fingerprint).
        layout: ``world_size``, ``zero_stage``, ``precision`` of the run that saved it.
        extra: what the caller saved beside it (last losses, for instance).
    """

    step: int
    tokens: int
    data: dict[str, Any]
    layout: dict[str, Any]
    extra: dict[str, Any]


def save_checkpoint(
    engine: Any,
    ranks: Ranks,
    checkpoints: Path,
    *,
    step: int,
    tokens: int,
    data: dict[str, Any],
    layout: dict[str, Any],
    extra: dict[str, Any],
    write_export: Callable[[Path], None],
) -> Path:
    """Saves the run after an optimizer step; collective. Returns the checkpoint's folder once it is complete.

    Args:
        engine: the DeepSpeed engine, at an accumulation boundary.
        ranks: this process among the others.
        checkpoints: the run's folder of checkpoints, seen by all ranks.
        step: optimizer steps done.
        tokens: tokens trained on.
        data: the data stream's state, JSON (rank 0's is written; it must already hold every rank's lanes).
        layout: world size, ZeRO stage and precision, JSON.
        extra: anything else worth keeping, JSON.
        write_export: called on rank 0 with the folder to create the Hugging Face export in.

    Raises:
        UserError: a rank could not write (disk full, no permission); what was there before is untouched.
    """
    staging = checkpoint_files.staging_folder(checkpoints, step)
    final = checkpoint_files.step_folder(checkpoints, step)

    def prepare() -> None:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)

    def write_own_files() -> dict[str, dict[str, Any]]:
        names = [_write_fragments(engine, staging, ranks.rank), _write_rng(staging, ranks)]
        return {name: checkpoint_files.file_entry(staging / name) for name in names if name}

    def write_main_files() -> dict[str, dict[str, Any]]:
        if not ranks.is_main:
            return {}
        state = {"step": step, "tokens": tokens, "layout": layout, "extra": extra, **_engine_state(engine)}
        checkpoint_files.write_json(staging / STATE, state)
        checkpoint_files.write_json(staging / DATA, data)
        write_export(staging / "export")
        names = [STATE, DATA, *(str(path.relative_to(staging)) for path in (staging / "export").rglob("*"))]
        return {name: checkpoint_files.file_entry(staging / name) for name in names if (staging / name).is_file()}

    def publish(entries: list[dict[str, dict[str, Any]]]) -> None:
        files = {name: entry for table in entries for name, entry in table.items()}
        checkpoint_files.publish(staging, final, step, files)

    try:
        ranks.on_main(prepare)
        own = ranks.together(write_own_files)
        main = ranks.together(write_main_files)
        entries = ranks.gather(own | main)
        ranks.on_main(lambda: publish(entries))
    except UserError as error:
        if ranks.is_main:
            shutil.rmtree(staging, ignore_errors=True)
        raise UserError(
            f"the checkpoint of step {step} could not be written ({error}); the one before it is untouched"
        ) from error
    forget_beta_powers(engine)
    return final


def load_checkpoint(engine: Any, ranks: Ranks, checkpoint: Path) -> RestoredRun:
    """Fills the engine from a verified checkpoint of any world size, ZeRO stage and precision; collective.

    Raises:
        UserError: the checkpoint belongs to another model.
    """
    state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    ranks.together(lambda: _load_fragments(engine, checkpoint, state["parameters"]))
    masters_to_working_weights(engine)
    set_optimizer_step_count(engine, state["optimizer_step"])
    _restore_engine_state(engine, state)
    same_layout = state["layout"]["world_size"] == ranks.world_size
    ranks.together(lambda: _load_rng(checkpoint, ranks, state["step"], same_layout))
    forget_beta_powers(engine)
    return RestoredRun(
        step=state["step"],
        tokens=state["tokens"],
        data=json.loads((checkpoint / DATA).read_text(encoding="utf-8")),
        layout=state["layout"],
        extra=state["extra"],
    )


def _write_fragments(engine: Any, folder: Path, rank: int) -> str | None:
    create_optimizer_state(engine)
    tensors: dict[str, torch.Tensor] = {}
    for fragment in owned_fragments(engine):
        for kind, tensor in fragment.tensors.items():
            tensors[f"{fragment.name}|{kind}|{fragment.start}"] = tensor.detach().to("cpu", copy=True)
    if not tensors:  # Stage 0: rank 0 has written everything.
        return None
    name = f"fragments-{rank:05d}.safetensors"
    save_tensors(tensors, folder / name)
    return name


def _load_fragments(engine: Any, checkpoint: Path, saved_shapes: dict[str, list[int]]) -> None:
    shapes = parameter_shapes(engine)
    if shapes != saved_shapes:
        different = sorted(
            name for name in shapes.keys() | saved_shapes.keys() if shapes.get(name) != saved_shapes.get(name)
        )
        first = different[0]
        raise UserError(
            f"{checkpoint} belongs to another model: {first} has shape {saved_shapes.get(first)} there and "
            f"{shapes.get(first)} here ({len(different)} parameters differ)"
        )
    from safetensors import safe_open

    create_optimizer_state(engine)
    pieces: dict[tuple[str, str], list[tuple[int, Any, str]]] = {}
    for path in sorted(checkpoint.glob("fragments-*.safetensors")):
        file = safe_open(path, "pt")
        for key in file.keys():  # noqa: SIM118 (not a mapping)
            name, kind, start = key.rsplit("|", 2)
            pieces.setdefault((name, kind), []).append((int(start), file, key))
    with torch.no_grad():
        for fragment in owned_fragments(engine, every_copy=True):
            for kind in (MASTER, *MOMENTS):
                _fill(fragment.tensors[kind], fragment.start, pieces[fragment.name, kind], fragment.name)


def _fill(target: torch.Tensor, start: int, pieces: list[tuple[int, Any, str]], name: str) -> None:
    """Copies [start, start + numel) of a parameter from the saved pieces that overlap it."""
    filled = 0
    for piece_start, file, key in pieces:
        piece = file.get_slice(key)
        low = max(start, piece_start)
        high = min(start + target.numel(), piece_start + piece.get_shape()[0])
        if low < high:
            target[low - start : high - start].copy_(piece[low - piece_start : high - piece_start])
            filled += high - low
    if filled != target.numel():
        raise UserError(f"the checkpoint holds {filled} of {target.numel()} values of {name} from offset {start}")


def _engine_state(engine: Any) -> dict[str, Any]:
    scaler = _loss_scaler(engine)
    return {
        "parameters": parameter_shapes(engine),
        "optimizer_step": optimizer_step_count(engine),
        "scheduler_step": engine.lr_scheduler.last_epoch,
        "global_steps": engine.global_steps,
        "global_samples": engine.global_samples,
        "skipped_steps": engine.skipped_steps,
        "loss_scaler": {key: getattr(scaler, key) for key in LOSS_SCALER_FIELDS if hasattr(scaler, key)},
    }


def _restore_engine_state(engine: Any, state: dict[str, Any]) -> None:
    for key in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, key, state[key])
    # Only the position is restored: rates and lengths follow the run's config, which the user may have changed.
    scheduler = engine.lr_scheduler
    scheduler.last_epoch = state["scheduler_step"]
    rates = [
        base * factor(scheduler.last_epoch)
        for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    for group, rate in zip(engine.basic_optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates
    scaler = _loss_scaler(engine)
    for key, value in state["loss_scaler"].items():
        if hasattr(scaler, key):
            setattr(scaler, key, value)


def _loss_scaler(engine: Any) -> Any:
    """The object that counts and scales for fp16: ``loss_scaler`` in ZeRO, ``loss_scale_config`` at stage 0."""
    for attribute in ("loss_scaler", "loss_scale_config"):
        scaler = getattr(engine.optimizer, attribute, None)
        if scaler is not None:
            return scaler
    return None


def _write_rng(folder: Path, ranks: Ranks) -> str:
    states = {"torch": torch.get_rng_state()}
    if ranks.device.type == "cuda":
        states["device"] = torch.cuda.get_rng_state(ranks.device)
    version, numbers, gauss = random.getstate()
    name = f"rng-{ranks.rank:05d}.safetensors"
    save_tensors(states, folder / name, {"python": json.dumps([version, list(numbers), gauss])})
    return name


def _load_rng(checkpoint: Path, ranks: Ranks, step: int, same_world_size: bool) -> None:
    from safetensors import safe_open

    path = checkpoint / f"rng-{ranks.rank:05d}.safetensors"
    if not same_world_size or not path.is_file():
        # There is no true continuation of n generators in m others: start new ones that depend on step and rank.
        torch.manual_seed(step * 1_000_003 + ranks.rank)
        return
    with safe_open(path, "pt") as file:
        torch.set_rng_state(file.get_tensor("torch"))
        if ranks.device.type == "cuda" and "device" in file.keys():  # noqa: SIM118
            torch.cuda.set_rng_state(file.get_tensor("device"), ranks.device)
        version, numbers, gauss = json.loads(file.metadata()["python"])
        random.setstate((version, tuple(numbers), gauss))
