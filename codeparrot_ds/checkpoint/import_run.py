"""A run of this project's that continues from a checkpoint of DeepSpeed's own.

Taken over, bit for bit: masters, both moments, Adam's step counter; and the counters of steps and rows and the loss
scale. The rest a DeepSpeed checkpoint does not have: what the run is to be comes from a run config, the schedule
continues at the same step of that config's, the data begins at its first row unless another is named, and random number
generators and evaluations begin anew. The checkpoint's ``state.json`` keeps this account under ``extra.imported``.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from codeparrot_ds import durable
from codeparrot_ds.checkpoint.deepspeed_checkpoint import DeepSpeedCheckpoint, read_deepspeed_checkpoint
from codeparrot_ds.checkpoint.export import Export, run_export
from codeparrot_ds.checkpoint.folders import Checkpoint
from codeparrot_ds.checkpoint.import_check import check_import
from codeparrot_ds.checkpoint.initial import with_kept_tokenizer
from codeparrot_ds.checkpoint.run_folder import RunFolder, package_versions
from codeparrot_ds.checkpoint.saver import begin_checkpoint, complete_checkpoint
from codeparrot_ds.checkpoint.state import EngineState, RunState
from codeparrot_ds.checkpoint.tensor_files import fragment_entries, fragment_file_name, write_tensor_file
from codeparrot_ds.config.files import save_config
from codeparrot_ds.config.run_config import RunConfig, with_absolute_paths
from codeparrot_ds.config.warnings import ConfigWarning, Continued, config_warnings, learning_rate_at
from codeparrot_ds.data.datasets import (
    StreamStart,
    open_datasets,
    pinned_names,
    run_fingerprint,
    saved_stream,
    stream_of,
)
from codeparrot_ds.data.loader import TrainingLoader
from codeparrot_ds.data.stream import StreamConfig
from codeparrot_ds.ds_config.changes import changes
from codeparrot_ds.ds_config.file import open_ds_config
from codeparrot_ds.ds_config.precision import with_precision
from codeparrot_ds.ds_config.resolve import resolve
from codeparrot_ds.errors import UserError
from codeparrot_ds.hub.identity import place_of
from codeparrot_ds.model.gpt2 import hugging_face_config
from codeparrot_ds.model.shapes import GPT2Shape, num_parameters, parameter_shapes
from codeparrot_ds.resolved_run import encoder_and_shape
from codeparrot_ds.shell import next_steps, pasteable
from codeparrot_ds.staging import staged_folder

Progress = Callable[[str, int, "int | None"], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Imported:
    """What an import made."""

    checkpoint: Checkpoint
    """In the new run."""
    source: DeepSpeedCheckpoint
    account: dict[str, Any]
    """What was taken and what was not, as in the checkpoint's ``extra.imported``."""


def import_deepspeed(
    folder: Path,
    run: Path,
    config: RunConfig,
    *,
    tag: str | None = None,
    first_row: int = 0,
    progress: Progress = lambda phase, done, total: None,
) -> Imported:
    """Makes a run whose one checkpoint is one of DeepSpeed's; complete or not at all.

    Args:
        folder: where ``engine.save_checkpoint`` saved, or the folder of one tag in there.
        run: folder of the run, which must not exist.
        config: what the run is; its name and place are those of ``run``.
        tag: which checkpoint; None for the one that ``latest`` names.
        first_row: the row of the run's data that it continues with; those before are read once, to find the place.
        progress: called with ``rows``, those read, and all of them.

    Raises:
        UserError: the checkpoint cannot be read (``read_deepspeed_checkpoint``) or continued with this config, the
            config has a mistake, the run exists, or the disk refuses.
    """
    config = with_absolute_paths(check_import(folder, run, config, tag))
    left_open = {name: getattr(config, name) for name in config.open_fields}  # the first start chooses for its device
    config = config.on_cpu()
    run = Path(config.output_dir) / str(config.run_name)
    encoder, shape = encoder_and_shape(config)
    source = read_deepspeed_checkpoint(folder, parameter_shapes(shape), tag=tag)
    config = with_precision(config, source.precision)
    _check_continuation(source, config, shape)
    datasets = open_datasets(config)
    stream = stream_of(config, datasets, encoder)
    start = _stream_start(stream, first_row, config, progress)
    account = _account(source, config, start)
    config = with_kept_tokenizer(config, config.tokenizer)
    state = RunState(
        step=source.step,
        tokens=source.samples * config.seq_length,
        data=saved_stream(run_fingerprint(config, stream), start),
        layout={
            "world_size": source.world_size,
            "zero_stage": source.zero_stage,
            "precision": source.precision,
        },
        evaluations=[],
        config=dataclasses.asdict(config),
        ds_config=source.ds_config,
        imported=account,
    )
    versions = package_versions()
    export = run_export(
        config,
        state,
        model_config=hugging_face_config(shape, eos_token_id=encoder.eos_token_id, dropout=config.dropout),
        name=run.name,
        num_parameters=num_parameters(shape),
        versions=versions,
    )
    with staged_folder(run, marker="run.json", overwrite=False) as staging:
        made = RunFolder(staging)
        made.checkpoints.mkdir()
        write_imported(source, made.checkpoints, state, export)
        save_config(dataclasses.replace(config, **left_open), staging / "config.yaml")
        durable.write_json(staging / "ds_config.json", source.ds_config)
        durable.write_json(staging / "ds_config_sources.json", {})
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        made.update(
            name=run.name,
            id=f"{run.name}-{os.urandom(3).hex()}",
            place=place_of(staging, path=run),
            created=now,
            versions=versions,
            parameters=num_parameters(shape),
            imported=account,
            data_pins=pinned_names(config, datasets),
            order_version=stream.order_version,
            outcome={"status": "imported", "step": source.step, "run": str(run)},
        )
    durable.sync_folder(run.parent)
    checkpoint = Checkpoint.of_step(run / "checkpoints", source.step)
    return Imported(checkpoint=checkpoint, source=source, account=account)


def write_imported(source: DeepSpeedCheckpoint, checkpoints: Path, state: RunState, export: Export) -> None:
    """Writes a checkpoint of DeepSpeed's as one of this project's, a file of fragments for each of its ranks'.

    Raises:
        UserError: the disk has no room for it; OSError: the system refused. No half of it is left visible.
    """
    itemsize = getattr(torch, export.dtype).itemsize
    num_values = sum(map(math.prod, source.shapes.values()))
    staging = begin_checkpoint(checkpoints, source.step, num_values * (source.bytes_a_parameter + itemsize))
    files = {}
    for rank, fragments in enumerate(source.shards):
        entries, tensors = fragment_entries(fragments)
        name = fragment_file_name(rank, 0)
        files[name] = write_tensor_file(staging / name, entries, (tensor.contiguous() for tensor in tensors))
    engine_state = EngineState(
        parameters=source.shapes,
        bytes_a_parameter=source.bytes_a_parameter,
        optimizer_step=source.optimizer_step,
        scheduler_step=_scheduler_step(source),
        global_steps=source.step,
        global_samples=source.samples,
        skipped_steps=source.skipped_steps,
        loss_scaler=source.loss_scaler,
    )
    complete_checkpoint(staging, state, engine_state, export, files)


def describe(imported: Imported, config: RunConfig) -> list[str]:
    """What was taken, what was not, and how to continue, a line each."""
    source, account = imported.source, imported.account
    taken = account["taken"]
    lines = [
        f"imported {source.path} (DeepSpeed {source.version or 'of an unknown version'}, ZeRO-{source.zero_stage} "
        f"{source.precision} on {source.world_size} rank(s)) as {imported.checkpoint}",
        f"taken, bit for bit: masters and both moments of {taken['parameters']:,} parameters, Adam's step "
        f"{taken['optimizer_step']:,}",
        f"taken: step {taken['step']:,}, skipped steps {taken['skipped_steps']:,}, {taken['samples']:,} rows"
        + (f", loss scale {taken['loss_scale']:g}" if taken["loss_scale"] else ""),
        *(f"not in it: {what}: {became}" for what, became in account["not_in_it"].items()),
    ]
    if source.step >= config.max_train_steps:
        lines.append(f"note: max_train_steps is {config.max_train_steps:,}, so `train` has nothing left to do")
    config_file = imported.checkpoint.run / "config.yaml"
    return [*lines, next_steps(pasteable("train", "--config", config_file))]


def warnings_of(imported: Imported, config: RunConfig) -> list[ConfigWarning]:
    """What of the config can hardly be meant for a run that continues from there."""
    source = imported.source
    place = Continued(
        name=str(source.path),
        step=source.step,
        schedule_step=_scheduler_step(source),
        learning_rate=source.learning_rate,
    )
    return config_warnings(config, place)


def _account(source: DeepSpeedCheckpoint, config: RunConfig, start: StreamStart) -> dict[str, Any]:
    """What was taken and what was not, for people and for ``state.json``."""
    schedule_step = _scheduler_step(source)
    rate = learning_rate_at(config, schedule_step)
    theirs = "" if source.learning_rate is None else f" (it was {source.learning_rate:.4g} in DeepSpeed's)"
    rows = f"{source.samples / source.step:g}"
    return {
        "from": str(source.path.absolute()),
        "tag": source.path.name,
        "deepspeed": source.version,
        "zero_stage": source.zero_stage,
        "world_size": source.world_size,
        "precision": source.precision,
        "taken": {
            "parameters": sum(map(math.prod, source.shapes.values())),
            "optimizer_step": source.optimizer_step,
            "step": source.step,
            "skipped_steps": source.skipped_steps,
            "samples": source.samples,
            "loss_scale": source.loss_scaler.get("cur_scale"),
            "prefix": source.prefix,
        },
        "not_in_it": {
            "place in the data": f"the run continues with row {start.row:,} of its own (--first-row), "
            f"{config.global_batch_size} per step where DeepSpeed had {rows}",
            "schedule": f"the config's at step {schedule_step:,}, learning rate {rate:.4g}{theirs}",
            "tokens": f"counted as rows x seq_length {config.seq_length}",
            "random number generators, evaluations, metrics": "begun anew",
        },
    }


def _scheduler_step(source: DeepSpeedCheckpoint) -> int:
    """Steps of the schedule: it stands still where a step is skipped."""
    return source.step - source.skipped_steps


def _check_continuation(source: DeepSpeedCheckpoint, config: RunConfig, shape: GPT2Shape) -> None:
    """Refuses a DeepSpeed JSON whose optimizer means something else by the same moments, as ``train`` would."""
    file = open_ds_config(config.deepspeed, began=source.precision)
    resolved = resolve(
        file,
        config,
        world_size=1,
        model_hidden_size=shape.n_embd,
        nvme_path=Path(config.output_dir) / "nvme",
    ).config
    refused = [str(change) for change in changes(source.ds_config, resolved) if change.refused]
    if refused:
        raise UserError(f"{source.path} cannot be continued with {file.path}: {'; '.join(refused)}")


def _stream_start(stream: StreamConfig, first_row: int, config: RunConfig, progress: Progress) -> StreamStart:
    """The state of every lane before a row, by reading the rows before it."""
    if first_row == 0:
        return StreamStart()
    size = config.global_batch_size
    if first_row % size:
        nearest = max(size, round(first_row / size) * size)
        raise UserError(f"--first-row {first_row} is in the middle of a step of {size} rows; the nearest is {nearest}")
    rows_per_batch = config.micro_batch_rows  # which divides the rows of a step
    loader = TrainingLoader(stream, micro_batch_size=rows_per_batch, num_workers=config.num_workers)
    try:
        for done in range(0, first_row, rows_per_batch):
            next(loader)
            progress("rows", done + rows_per_batch, first_row)
        return StreamStart(row=first_row, lane_states=loader.state())
    finally:
        loader.close()
