"""What is checked of a run before a rank starts."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from codeparrot_ds.checkpoint.folders import DATA, Checkpoint
from codeparrot_ds.checkpoint.initial import with_initial_model, with_kept_tokenizer
from codeparrot_ds.checkpoint.run_folder import (
    began_data,
    check_checkpoint,
    check_continuation,
    check_ds_continuation,
    check_run_name,
    order_version_of,
    recorded_pins,
)
from codeparrot_ds.config.run_config import REQUIRED, RunConfig, with_absolute_paths
from codeparrot_ds.data.datasets import (
    check_datasets,
    check_local_data,
    describe_data,
    open_datasets,
    resume_stream,
    run_fingerprint,
    stream_of,
)
from codeparrot_ds.data.stream import StreamConfig, check_world_size
from codeparrot_ds.devices import smallest_gpu
from codeparrot_ds.ds_config.facts import steps_lean
from codeparrot_ds.ds_config.file import open_ds_config
from codeparrot_ds.ds_config.lint import check_ds_config, libaio_installed
from codeparrot_ds.ds_config.precision import began_with, device_precisions, with_precision
from codeparrot_ds.engine.operators import are_built, build_apart, needed_operators
from codeparrot_ds.errors import UserError
from codeparrot_ds.evaluation.prompts import what_to_complete
from codeparrot_ds.hub.hugging_face import require_token
from codeparrot_ds.hub.places import is_remote, open_repository
from codeparrot_ds.json_files import DamagedFileError, parts_of
from codeparrot_ds.memory.choice import as_begun, with_choices
from codeparrot_ds.memory.plan import predict, why_too_large
from codeparrot_ds.memory.workload import Memory
from codeparrot_ds.model.shapes import num_parameters
from codeparrot_ds.resolved_run import ResolvedRun, encoder_and_shape, resolve_run
from codeparrot_ds.secret_check import check_for_secrets
from codeparrot_ds.terminal import gigabytes

BYTES_A_PARAMETER = 16
"""Of a checkpoint: three fp32 numbers for the optimizer, the export, and room for the rest."""


def preflight(
    config: RunConfig, *, device: str, world_size: int, precisions: Sequence[str] | None = None
) -> ResolvedRun:
    """Decides every value of a run and checks it; nothing is written. Made once per start.

    The command does it before any rank starts. Rank 0 does it where ranks are started without the command.

    Args:
        config: with a name, and a ``resume`` as `with_checkpoint` leaves it.
        device: ``cpu`` or ``cuda``.
        world_size: number of ranks.
        precisions: what the device trains in, the fastest first; None asks this machine without torch.

    Raises:
        UserError: as `check_run`, or what ``init_from`` and `with_choices` refuse.
    """
    precisions = tuple(precisions or device_precisions(device))
    config = as_begun(with_initial_model(config), world_size=world_size, device=device)
    if device == "cpu":
        config = config.on_cpu()
    followed = began_with(config) or precisions[0]
    config = with_precision(config, followed)
    if config.is_left_to_plan:
        check_named(config)
        config = with_choices(config, world_size=world_size, device=device, precision=followed)
    return check_run(config, device=device, world_size=world_size, precisions=precisions)


def check_run(
    config: RunConfig, *, device: str, world_size: int, precisions: Sequence[str] | None = None
) -> ResolvedRun:
    """Checks config, DeepSpeed JSON, tokenizer, model, data, folder and disk without a rank; returns the resolved run.

    Warnings about the JSON, and what it changes for a run that resumes, are printed to stderr once nothing is wrong.

    Args: as for `preflight`; nothing in ``config`` is left to the device.

    Raises:
        UserError: the first thing that is wrong, or all findings of the config check.
    """
    check_for_secrets(json.dumps(dataclasses.asdict(config)), "the run config")
    check_run_name(str(config.run_name))
    check_named(config)
    path = Path(config.output_dir) / str(config.run_name)
    file = open_ds_config(config.deepspeed, precisions or device_precisions(device), began=began_with(config))
    model = encoder_and_shape(config)
    warnings = check_ds_config(
        file,
        config=config,
        device=device,
        world_size=world_size,
        parameters=num_parameters(model[1]),
        model_hidden_size=model[1].n_embd,
        libaio=libaio_installed() or are_built(["async_io"]),
    )
    what_to_complete(config, lambda line: print(line, file=sys.stderr))
    began = began_data(config)
    datasets = open_datasets(config, recorded_pins(path), began)
    validation = check_datasets(config, datasets, began)
    check_world_size(config.num_lanes, world_size)
    run = resolve_run(config, file, world_size=world_size, device=device, model=model)
    steps_lean(config.lean_step, run.ds_config, device)
    check_continuation(config, path)
    changed = check_ds_continuation(config, path, run.ds_config)
    checkpoint = check_checkpoint(config, path, run.shape)
    stream = stream_of(config, datasets, run.encoder, order_version_of(path, config.resume))
    _check_data(config, path, checkpoint, stream, began)
    if open_repository(config.hub, config.output_dir) is not None and is_remote(config.hub):
        require_token(config.hub)
    _check_space(Path(config.output_dir), run.parameters, config.keep_checkpoints)
    for finding in [*warnings, *describe_data(config, datasets, validation, began)]:
        print(finding, file=sys.stderr)
    if changed:
        print(f"{path} resumes with another DeepSpeed config: {'; '.join(map(str, changed))}", file=sys.stderr)
    return run


def for_ranks(run: ResolvedRun, typed_tokenizer: str) -> ResolvedRun:
    """The run as its ranks are given it, once nothing can refuse it: the tokenizer kept, every path absolute.

    Args:
        run: as `preflight` returned it.
        typed_tokenizer: ``tokenizer`` as the user named it.
    """
    return dataclasses.replace(run, config=with_absolute_paths(with_kept_tokenizer(run.config, typed_tokenizer)))


def check_named(config: RunConfig) -> None:
    """Refuses a run without data or tokenizer, or whose data is neither here nor on the Hub, which is not asked."""
    for field in REQUIRED:
        if not getattr(config, field) and not (field == "tokenizer" and config.init_from):  # which brings its own
            raise UserError(
                f"--{field} is missing: make one with `codeparrot-ds {'corpus' if field == 'data' else field}`"
            )
    check_local_data(config.data, "train", named=True, began=began_data(config))


def check_memory(run: ResolvedRun, *, refuse: bool = True) -> None:
    """Refuses a run that the memory plan says no GPU here can hold; on CPUs and without ``refuse`` it only warns.

    GPUs are those of this machine: with a hostfile they may be others, and nothing is judged. On CPUs the ranks share
    the machine's memory with everything else and can swap, and a process takes more than its tensors, so a plan says
    too little to refuse on: a run that is over all of the memory by its tensors alone is worth a word, no more.

    Raises:
        UserError: the shortfall, and what would fit.
    """
    of_run = (run.config, run.shape, run.ds_config, run.world_size)
    if run.device == "cpu":
        _warn_of_little_memory(predict(*of_run), run.world_size)
        return
    gpu = smallest_gpu()
    if gpu is None:
        return  # nvidia-smi does not say
    problem = why_too_large(*of_run, gpu[1], gpu[0])
    if problem is not None and refuse:
        raise UserError(problem)
    if problem is not None:
        print(f"warning: {problem}", file=sys.stderr)


def _warn_of_little_memory(memory: Memory, ranks: int) -> None:
    """Says when the ranks' tensors alone are more than this machine's memory."""
    import psutil

    total, needed = psutil.virtual_memory().total, ranks * (memory.peak_bytes + memory.host_bytes)
    if needed > total:
        print(
            f"warning: the tensors of {ranks} rank(s) take {gigabytes(needed)} at their peak and this machine has "
            f"{gigabytes(total)} of memory; see `codeparrot-ds plan`",
            file=sys.stderr,
        )


def _check_data(
    config: RunConfig,
    run: Path,
    checkpoint: Checkpoint | None,
    stream: StreamConfig,
    began: Mapping[str, Any] | None,
) -> None:
    """Refuses to resume on other data than the checkpoint's."""
    if checkpoint is None:
        return
    try:
        saved = checkpoint.read_json(DATA)
    except (OSError, DamagedFileError):
        return  # The ranks verify it, name the damage and look for an older one.
    if isinstance(saved, dict) and "fingerprint" in saved:
        try:
            with parts_of(checkpoint.path / DATA):
                resume_stream(saved, run_fingerprint(config, stream, began), on_data_change=config.on_data_change)
        except UserError as error:
            raise UserError(f"{run}: {error}") from None


def existing_folder(output_dir: Path) -> Path:
    """The part of a path that exists; `UserError` where it is a file."""
    existing = output_dir.absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise UserError(f"output_dir {output_dir} cannot be made: {existing} is a file")
    return existing


def _check_space(output_dir: Path, parameters: int, keep: int) -> None:
    """Refuses a run whose first checkpoints cannot fit, and a folder that cannot be written."""
    existing = existing_folder(output_dir)
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"output_dir {output_dir} cannot be written: no permission in {existing}")
    needed = parameters * BYTES_A_PARAMETER * (min(keep, 1) + 1)
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(
            f"output_dir {output_dir} has {free / 1e9:.1f} GB free and a checkpoint beside the one before it takes "
            f"{needed / 1e9:.1f} GB: free some space or choose another --output-dir"
        )


def build_operators(ds_config: dict[str, Any], device: str, environment: dict[str, str]) -> None:
    names = ", ".join(needed_operators(ds_config, device))
    print(f"building DeepSpeed's operators ({names}), once for this environment; a minute or two", file=sys.stderr)
    problem = build_apart(ds_config, device, environment)
    if problem is not None:
        raise UserError(problem)
