"""Saving a run and bringing it back, at the same layout bit for bit and at another one with the same state.

Every rank writes the optimizer fragments that it owns and its random number generators' state; rank 0 adds the step,
the schedule, the loss scaler, the counters and the position of every data lane. All of it is JSON and safetensors:
nothing that is loaded can run code. Training waits for a copy of the fragments in host memory; a thread writes, hashes
and publishes them, and builds the export from the written fragments. Which folders exist and whether they are whole is
:mod:`codeparrot_ds.checkpoint.folders`; ``docs/checkpoints.md`` says why the format is what it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import random
import shutil
import threading
import time
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import Any

import torch

from codeparrot_ds import durable
from codeparrot_ds.checkpoint.export import Export, write_export
from codeparrot_ds.checkpoint.folders import DATA, EXPORT, STATE, Checkpoint, publish, recover, staging_folder
from codeparrot_ds.checkpoint.state import EngineState, RunState, read_state, state_as_json
from codeparrot_ds.checkpoint.tensor_files import (
    FragmentReader,
    TensorEntry,
    fragment_entries,
    fragment_file_name,
    save_tensors,
    tensors_of,
    write_tensor_file,
)
from codeparrot_ds.durable import WrittenFile
from codeparrot_ds.engine.engine import loss_scaler_state, restore_loss_scaler
from codeparrot_ds.engine.fragments import (
    MOMENTS,
    create_optimizer_state,
    masters_to_working_weights,
    on_nvme,
    optimizer_step_count,
    owned_fragments,
    parameter_shapes,
    set_optimizer_step_count,
)
from codeparrot_ds.engine.ranks import Ranks
from codeparrot_ds.errors import UserError
from codeparrot_ds.model.shapes import differing_parameters

logger = logging.getLogger("codeparrot_ds.checkpoint")

BYTES_BESIDE = 1 << 20  # of JSON, RNG states and tokenizer, generously


@dataclasses.dataclass(frozen=True, kw_only=True)
class SaveOutcome:
    """What became of one save."""

    step: int
    checkpoint: Checkpoint | None
    """Once it was complete; None for a save that failed."""
    error: UserError | None
    """What went wrong, in a sentence that is the same on every rank: the save, or what was to be done with the complete
    checkpoint (removing older ones, queuing its export)."""
    num_bytes: int
    """Of all files of all ranks; 0 where it failed."""
    stall_seconds: float
    """How long training waited for it."""
    seconds: float
    """From the start of the save to the complete checkpoint."""


class CheckpointSaver:
    """Saves a run's checkpoints one after another: the step waits for a copy, the rest happens behind it.

    Every method is collective. A save that fails leaves the checkpoints before it untouched; ``report`` gets it and
    training continues.

    Args:
        engine: the DeepSpeed engine.
        ranks: this process among the others.
        checkpoints: the run's folder of checkpoints, seen by all ranks.
        in_background: whether a thread writes; without, training waits until a checkpoint is complete. State on NVMe
            is always written while training waits: a copy of it would need the memory that NVMe was to save.
        published: called on rank 0 with each complete checkpoint before the next save can start.
        report: called on rank 0 with each outcome, as soon as there is one; in the background from the thread.
    """

    def __init__(
        self,
        engine: Any,
        ranks: Ranks,
        checkpoints: Path,
        *,
        in_background: bool,
        published: Callable[[Checkpoint, RunState], None],
        report: Callable[[SaveOutcome], None],
    ) -> None:
        self._engine, self._checkpoints = engine, checkpoints
        self._in_background = in_background and not on_nvme(engine)
        # The thread's messages must not mix with training's: it has a group of its own.
        self._ranks = ranks.with_own_group() if self._in_background else ranks
        self._published, self._report = published, report
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._thread: threading.Thread | None = None
        self._crash: BaseException | None = None
        self.outcomes: list[SaveOutcome] = []

    def save(self, state: RunState, export: Export) -> None:
        """Saves the run after an optimizer step, at an accumulation boundary; waits for the save before it.

        Rank 0's ``state`` is written and must already hold every rank's lanes.
        """
        self.wait()
        started = time.perf_counter()
        engine, rank = self._engine, self._ranks.rank
        create_optimizer_state(engine)
        copy = self._copy(rank) if self._in_background else None
        live = _live_parts(engine, rank)
        saved = _Save(
            state=state,
            export=export,
            engine_state=_engine_state(engine),
            rng=_rng_state(self._ranks.device),
            parts=live if copy is None else copy,
            started=started,
        )
        if copy is None:
            with contextlib.closing(live):  # A failed write must not leave a group of NVMe's in memory.
                self._write(saved, None)
            return
        stall = time.perf_counter() - started
        self._thread = threading.Thread(
            target=self._write_behind, args=(saved, stall), name=f"save-step-{state.step}", daemon=True
        )
        self._thread.start()

    def wait(self) -> SaveOutcome | None:
        """Waits for the save under way and returns the last one's outcome; None before the first."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._crash is not None:
            raise self._crash
        return self.outcomes[-1] if self.outcomes else None

    def _copy(self, rank: int) -> list[_Part] | None:
        """All fragments of this rank, copied into one buffer of host memory that is kept for the next save.

        None where there is no memory for it: this rank then writes while it waits, and the others wait for it at the
        next step.
        """
        (fragments,) = list(owned_fragments(self._engine)) or [[]]
        entries, tensors = fragment_entries(fragments)
        if not entries:  # Stage 0: rank 0 has everything.
            return []
        size = sum(entry.num_bytes for entry in entries)
        if self._buffer.numel() < size:
            try:
                self._buffer = torch.empty(size, dtype=torch.uint8, pin_memory=self._ranks.device.type == "cuda")
            except RuntimeError as error:  # torch has no narrower one for an allocation on the host
                logger.warning(
                    "no %.1f GB of host memory for a copy of the optimizer's state (%s): training waits while it is "
                    "written",
                    size / 1e9,
                    str(error).splitlines()[0],
                )
                return None
        end = 0
        for entry, tensor in zip(entries, tensors, strict=True):
            start, end = end, end + entry.num_bytes
            # As bytes: an odd number of 16-bit values may stand before 32-bit ones.
            self._buffer[start:end].copy_(tensor.detach().view(torch.uint8), non_blocking=True)
        if self._ranks.device.type == "cuda":
            torch.cuda.current_stream(self._ranks.device).synchronize()
        return [_Part(name=fragment_file_name(rank, 0), entries=entries, values=[self._buffer[:end]])]

    def _write_behind(self, saved: _Save, stall: float) -> None:
        try:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 15)  # of this thread alone: training goes first
            # Setting it for a thread is for that thread: a second set of compute threads would fight with training's.
            torch.set_num_threads(1)
            self._write(saved, stall)
        except BaseException as error:  # a defect, raised where training next asks
            self._crash = error  # before it is logged, which may fail for the same reason, such as no memory
            logger.exception("saving step %d failed", saved.state.step)

    def _write(self, saved: _Save, stall: float | None) -> None:
        step, checkpoint, error, size = saved.state.step, None, None, 0
        try:
            size = write_checkpoint(self._ranks, self._checkpoints, saved)
            checkpoint = Checkpoint.of_step(self._checkpoints, step)
            self._ranks.on_main(lambda: self._published(checkpoint, saved.state))
        except UserError as problem:
            whole = checkpoint is not None
            error = UserError(f"the checkpoint of step {step} is whole, but {problem}") if whole else problem
        seconds = time.perf_counter() - saved.started
        outcome = SaveOutcome(
            step=step,
            checkpoint=checkpoint,
            error=error,
            num_bytes=size,
            stall_seconds=seconds if stall is None else stall,
            seconds=seconds,
        )
        self.outcomes.append(outcome)
        if self._ranks.is_main:
            self._report(outcome)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Part:
    """One file of fragments."""

    name: str
    entries: list[TensorEntry]
    values: list[torch.Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Save:
    """Everything that one rank writes for one checkpoint."""

    state: RunState
    export: Export
    engine_state: EngineState
    rng: tuple[dict[str, torch.Tensor], dict[str, str]]
    parts: Iterable[_Part]
    started: float


def _live_parts(engine: Any, rank: int) -> Generator[_Part, None, None]:
    """The fragments as they lie in the optimizer; a group on NVMe is in memory while its part is written."""
    with contextlib.closing(owned_fragments(engine)) as groups:
        for number, fragments in enumerate(groups):
            entries, tensors = fragment_entries(fragments)
            if entries:
                values = [tensor.detach().cpu() for tensor in tensors]
                yield _Part(name=fragment_file_name(rank, number), entries=entries, values=values)


def write_checkpoint(ranks: Ranks, checkpoints: Path, saved: _Save) -> int:
    """Writes all ranks' files into a hidden folder and makes it a checkpoint; collective. Returns all files' bytes.

    Raises:
        UserError: a rank could not write (disk full, no permission); what was there before is untouched.
    """
    step = saved.state.step

    def prepare() -> Path:
        parameters = sum(torch.Size(shape).numel() for shape in saved.engine_state.parameters.values())
        itemsize = getattr(torch, saved.export.dtype).itemsize
        return begin_checkpoint(checkpoints, step, parameters * (saved.engine_state.bytes_a_parameter + itemsize))

    def write_own_files() -> dict[str, WrittenFile]:
        entries = {}
        for part in saved.parts:
            entries[part.name] = write_tensor_file(staging / part.name, part.entries, part.values)
        tensors, metadata = saved.rng
        name = f"rng-{ranks.rank:05d}.safetensors"
        entries[name] = save_tensors(staging / name, tensors, metadata)
        return entries

    def complete(tables: list[dict[str, WrittenFile]]) -> int:
        files = {name: entry for table in tables for name, entry in table.items()}
        return complete_checkpoint(staging, saved.state, saved.engine_state, saved.export, files)

    try:
        staging = ranks.on_main(prepare)
        tables = ranks.gather(ranks.together(write_own_files))
        return ranks.on_main(lambda: complete(tables))
    except UserError as error:
        if ranks.is_main:
            with contextlib.suppress(OSError):  # the next save and the next start try again
                recover(checkpoints)
        raise UserError(
            f"the checkpoint of step {step} could not be written ({error}); the one before it is untouched"
        ) from error


def begin_checkpoint(checkpoints: Path, step: int, num_bytes: int) -> Path:
    """Puts the folder in order and makes the hidden one that a checkpoint is written into.

    Raises:
        UserError: the disk has no room for it: refused before it is filled for everybody else.
    """
    recover(checkpoints)  # from a save or a removal that failed
    needed, free = num_bytes + BYTES_BESIDE, shutil.disk_usage(checkpoints).free
    if free < needed:
        raise UserError(f"{checkpoints} has {free / 1e9:.2f} GB free and it takes {needed / 1e9:.2f} GB")
    staging = staging_folder(checkpoints, step)
    durable.make_folder(staging)
    return staging


def complete_checkpoint(
    staging: Path, state: RunState, engine_state: EngineState, export: Export, files: dict[str, WrittenFile]
) -> int:
    """Writes what one process writes beside the fragments, and makes the hidden folder a checkpoint.

    Args:
        staging: from ``begin_checkpoint``, with the files of fragments and generators in it.
        state: of the run.
        engine_state: of the engine.
        export: what the Hugging Face folder is made of, but for the weights.
        files: those that are there.

    Returns:
        The bytes of all files.
    """
    files[DATA] = durable.write_file(staging / DATA, [durable.json_bytes(state.data)])
    files[STATE] = durable.write_file(staging / STATE, [durable.json_bytes(state_as_json(state, engine_state))])
    shapes = engine_state.parameters
    durable.make_folder(staging / EXPORT)
    weights = FragmentReader(staging, files).weights(shapes, getattr(torch, export.dtype))
    exported = write_export(staging / EXPORT, export, shapes, weights)
    files |= {f"{EXPORT}/{name}": file for name, file in exported.items()}
    publish(staging, state.step, files)
    return sum(file.num_bytes for file in files.values())


def load_checkpoint(engine: Any, ranks: Ranks, checkpoint: Checkpoint) -> RunState:
    """Fills the engine from a verified checkpoint of any world size, ZeRO stage and precision; collective.

    Raises:
        UserError: the checkpoint belongs to another model.
    """
    state, engine_state = read_state(checkpoint)
    ranks.together(lambda: _load_fragments(engine, checkpoint, engine_state.parameters))
    masters_to_working_weights(engine)
    set_optimizer_step_count(engine, engine_state.optimizer_step)
    _restore_engine_state(engine, engine_state)
    same_world_size = state.layout["world_size"] == ranks.world_size
    ranks.together(lambda: _load_rng(checkpoint.path, ranks, state.step, same_world_size))
    return state


def _load_fragments(engine: Any, checkpoint: Checkpoint, saved_shapes: dict[str, list[int]]) -> None:
    shapes = parameter_shapes(engine)
    if problem := differing_parameters(saved_shapes, shapes):
        raise UserError(f"{checkpoint} belongs to another model: {problem}")
    create_optimizer_state(engine)
    reader = FragmentReader(checkpoint.path, checkpoint.manifest().files)
    with torch.no_grad():
        for fragments in owned_fragments(engine, every_copy=True):
            for fragment in fragments:
                reader.load(fragment)


def _engine_state(engine: Any) -> EngineState:
    return EngineState(
        parameters=parameter_shapes(engine),
        bytes_a_parameter=_bytes_a_parameter(engine),
        optimizer_step=optimizer_step_count(engine),
        scheduler_step=engine.lr_scheduler.last_epoch,
        global_steps=engine.global_steps,
        global_samples=engine.global_samples,
        skipped_steps=engine.skipped_steps,
        loss_scaler=loss_scaler_state(engine),
    )


def _restore_engine_state(engine: Any, state: EngineState) -> None:
    engine.global_steps = state.global_steps
    engine.global_samples = state.global_samples
    engine.skipped_steps = state.skipped_steps
    # Only the position is restored: rates and lengths follow the run's config, which the user may have changed.
    scheduler = engine.lr_scheduler
    scheduler.last_epoch = state.scheduler_step
    rates = [
        base * factor(scheduler.last_epoch)
        for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    for group, rate in zip(engine.basic_optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates
    restore_loss_scaler(engine, state.loss_scaler)


def _bytes_a_parameter(engine: Any) -> int:
    """Of the masters and both moments; bf16 states take half of fp32's."""
    for master, state in engine.basic_optimizer.state.items():
        if all(torch.is_tensor(state.get(moment)) for moment in MOMENTS):
            return master.element_size() + sum(state[moment].element_size() for moment in MOMENTS)
    return 3 * torch.float32.itemsize  # on NVMe


def _rng_state(device: torch.device) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The random number generators of this rank: torch's as tensors, Python's as JSON for a file's metadata."""
    states = {"torch": torch.get_rng_state()}
    if device.type == "cuda":
        states["device"] = torch.cuda.get_rng_state(device)
    version, numbers, gauss = random.getstate()
    return states, {"python": json.dumps([version, list(numbers), gauss])}


def _load_rng(checkpoint: Path, ranks: Ranks, step: int, same_world_size: bool) -> None:
    path = checkpoint / f"rng-{ranks.rank:05d}.safetensors"
    if not same_world_size or not path.is_file():
        # There is no true continuation of n generators in m others: start new ones that depend on step and rank.
        torch.manual_seed(step * 1_000_003 + ranks.rank)
        return
    with tensors_of(path) as file:
        torch.set_rng_state(file.get_tensor("torch"))
        if ranks.device.type == "cuda" and "device" in file.keys():  # noqa: SIM118
            torch.cuda.set_rng_state(file.get_tensor("device"), ranks.device)
        version, numbers, gauss = json.loads(file.metadata()["python"])
        random.setstate((version, tuple(numbers), gauss))
