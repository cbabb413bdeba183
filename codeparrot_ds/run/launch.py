"""The front door of training: checks what needs no rank, then starts the ``deepspeed`` launcher. No torch here.

The launcher is DeepSpeed's own; what is added is that mistakes are found before any process starts, that operators are
built once, that signals reach the ranks, and that the exit code tells what became of the run.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from codeparrot_ds.config import REQUIRED, LaunchOptions, RunConfig, with_absolute_paths, with_field
from codeparrot_ds.config_warnings import config_warnings
from codeparrot_ds.data.encoder import find_tokenizer, load_encoder
from codeparrot_ds.data.opening import check_datasets, check_local_data, open_datasets, resume_stream, stream_of
from codeparrot_ds.data.stream import StreamConfig, check_world_size, stream_fingerprint
from codeparrot_ds.errors import UserError
from codeparrot_ds.evaluation.prompts import what_to_complete
from codeparrot_ds.hub.commands import SETTLE_SECONDS, prepare_branch, settle
from codeparrot_ds.hub.hugging_face import require_token
from codeparrot_ds.hub.repository import is_remote, open_repository
from codeparrot_ds.hub.secrets import check_for_secrets
from codeparrot_ds.model.shapes import find_shape, num_parameters
from codeparrot_ds.run.checkpoint_files import verify_checkpoint
from codeparrot_ds.run.device_memory import gigabytes, smallest_gpu
from codeparrot_ds.run.doctor import Wanted, local_paths
from codeparrot_ds.run.folder import (
    check_checkpoint,
    check_continuation,
    check_ds_continuation,
    check_free,
    check_run_name,
    continued_from,
    finished_checkpoint,
    new_run_name,
    recorded_hub,
    recorded_pins,
    with_checkpoint,
)
from codeparrot_ds.run.hostfile import Host
from codeparrot_ds.run.initial import with_initial_model, with_kept_tokenizer
from codeparrot_ds.run.job import BYTES_A_PARAMETER, Job, rank_environment, run_job, shared_variables
from codeparrot_ds.run.launcher import MODULE, hosts_of, is_local
from codeparrot_ds.run.micro_batch import with_micro_batch
from codeparrot_ds.run.ops import are_built, build_apart, needed_operators
from codeparrot_ds.run.plan import predict, why_too_large
from codeparrot_ds.run.precision import began_with, describe_choice, device_precisions, open_for, with_precision
from codeparrot_ds.shell import pasteable
from codeparrot_ds.zero.ds_config import resolve
from codeparrot_ds.zero.lint import check_ds_config, libaio_installed
from codeparrot_ds.zero.memory import Memory


def front_door(
    config: RunConfig,
    launch: LaunchOptions,
    *,
    typed: Sequence[str] = (),
    module: str = MODULE,
    say: Callable[[str], None] = lambda line: None,
) -> int:
    """Checks a run, starts its ranks through the ``deepspeed`` launcher, waits, and returns the exit code.

    0 is finished, or stopped and saved; 1 something broke; 2 a mistake of the user's; 3 too many bad steps in a row;
    4 a rank or host was lost; 5 the ranks hung.

    Args:
        config: the run config.
        launch: where the ranks run.
        typed: the options of ``train`` with the launcher's own, for the command that goes on with the run.
        module: what a rank runs.
        say: told which run this is, and where its log will be, once nothing is wrong at first sight.

    Raises:
        UserError: anything that can be known to be wrong before a rank starts.
    """
    started = time.time()
    if launch.no_ssh and not config.run_name:
        raise UserError("--no-ssh needs --run-name, the same on every host: each would make a name of its own")
    output_dir = Path(config.output_dir)
    name = config.run_name or new_run_name(output_dir)
    going_on = _going_on(typed, config, name)
    check_for_secrets(json.dumps(dataclasses.asdict(config)), "the run config")  # before any of it is said
    check_named(config)
    if not launch.node_rank:  # with --no-ssh the first host's rank 0, which may have begun, holds the run
        check_free(output_dir / name)
    config = with_checkpoint(dataclasses.replace(config, run_name=name))
    steps, model = config.max_train_steps, Path(config.model).name
    say(f"run {name}: checking {steps} steps of {model}; log in {output_dir / name / 'log'}")
    device = local_device(hostfile=launch.hostfile is not None)
    hosts = hosts_of(launch, local_devices(device) if launch.hostfile is None else [])
    if launch.bind_cores and shutil.which("numactl") is None:
        raise UserError("--bind-cores needs numactl, which is not on PATH: install it, or leave the option out")
    ranks = sum(len(host.slots) for host in hosts)
    typed_tokenizer, asked = config.tokenizer, config.deepspeed
    config = with_precision(with_initial_model(config), began_with(config) or device_precisions(device)[0])
    if config.auto_micro_batch:
        check_named(config)
        config = with_micro_batch(config, world_size=ranks, device=device)
    ds_config = check_run(config, device=device, world_size=ranks)
    if (finished := finished_checkpoint(config)) is not None and _is_at_its_end(config, finished, going_on):
        return 0
    if (said := describe_choice(asked, open_for(config, device), device=device)) is not None:
        print(said, file=sys.stderr)
    for warning in config_warnings(config, continued_from(config)):
        print(f"warning: {warning.sentence}", file=sys.stderr)
    if is_local(hosts):
        check_memory(config, ds_config, device=device, ranks=ranks, refuse=not launch.ignore_memory_plan)
        if not are_built(needed_operators(ds_config, device)):
            _build_operators(ds_config, device, rank_environment(device, ranks))
    if config.hub != "off":
        outage = prepare_branch(config.hub, output_dir, name)
        if outage is not None:
            print(f"warning: {outage}; checkpoints are queued and pushed when it answers", file=sys.stderr)
    places = "this machine" if is_local(hosts) else f"{len(hosts)} host(s)"
    print(f"starting {ranks} rank(s) on {places}; importing torch and DeepSpeed takes a while", flush=True)
    job = Job(
        config=with_absolute_paths(with_kept_tokenizer(config, typed_tokenizer)),
        launch=launch,
        device=device,
        hosts=hosts,
        ds_config=ds_config,
        started=started,
        run=output_dir / name,
        going_on=going_on,
        module=module,
    )
    return run_job(job)


def _going_on(typed: Sequence[str], config: RunConfig, name: str) -> list[str]:
    """The options of ``train`` that go on with a run which was started with those typed."""
    named = list(typed) if config.run_name else with_field(typed, "run_name", name)
    return named if config.resume == "auto" else with_field(named, "resume", "auto")


def _is_at_its_end(config: RunConfig, checkpoint: Path, going_on: list[str]) -> bool:
    """Ends the start of a run that has finished, without a rank: says so, and pushes what still waits.

    False where ranks have something to do after all: the last checkpoint is damaged, so that its steps are trained
    again, or it is to be pushed to another place than the run's.
    """
    run = checkpoint.parent.parent
    repository = open_repository(config.hub, config.output_dir)
    if recorded_hub(run) != (None if repository is None else repository.spec):
        return False
    if damage := verify_checkpoint(checkpoint):
        print(f"run {run.name} finished, but its last checkpoint is damaged: {damage[0]}", file=sys.stderr)
        return False
    step = int(checkpoint.name[5:])
    print(f"run {run.name} finished at step {step} of {step}, so nothing is trained: {run}", flush=True)
    if repository is not None:
        print(settle(run, wait_seconds=SETTLE_SECONDS if is_remote(config.hub) else math.inf))
    print(_how_to_train_on(config, run, going_on))
    return True


def _how_to_train_on(config: RunConfig, run: Path, going_on: list[str]) -> str:
    """What to type after a run's end: a larger ``max_train_steps`` is right only where the learning rate stays."""
    longer = with_field(going_on, "max_train_steps", 2 * config.max_train_steps)
    if config.lr_scheduler_type == "constant":
        return f"To go on:\n  {pasteable('train', *longer)}"
    name = new_run_name(run.parent)
    begun = pasteable("train", "--config", run / "config.yaml", "--init-from", run, "--run-name", name)
    return (
        "Its learning rate has come down to 0, and more steps would make it jump. To go on with its weights and a "
        f"schedule of their own:\n  {begun}\nTo train longer from the start:\n  "
        f"{pasteable('train', *with_field(longer, 'run_name', name))}"
    )


def check_run(config: RunConfig, *, device: str, world_size: int | None) -> dict[str, Any]:
    """Checks config, DeepSpeed JSON, tokenizer, model, data, folder and disk without a rank; returns the resolved JSON.

    Warnings about the JSON, and what it changes for a run that goes on, are printed to stderr once nothing is wrong.

    Args:
        config: a run config with a name.
        device: ``cpu`` or ``cuda``, for what DeepSpeed refuses there.
        world_size: number of ranks; None when a hostfile decides.

    Raises:
        UserError: the first thing that is wrong, or all findings of the config check.
    """
    check_for_secrets(json.dumps(dataclasses.asdict(config)), "the run config")
    check_run_name(str(config.run_name))
    check_named(config)
    run = Path(config.output_dir) / str(config.run_name)
    file = open_for(config, device)
    check_for_secrets(json.dumps(file.config), str(file.path))
    encoder = load_encoder(config.tokenizer)
    shape = find_shape(config.model, vocab_size=encoder.vocab_size, seq_length=config.seq_length)
    warnings = check_ds_config(
        file,
        config=config,
        device=device,
        world_size=world_size,
        parameters=num_parameters(shape),
        libaio=libaio_installed() or are_built(["async_io"]),
    )
    what_to_complete(config)
    datasets = open_datasets(config, recorded_pins(run))
    check_datasets(config, datasets)
    if world_size is not None:
        check_world_size(config.num_lanes, world_size)
    resolved = resolve(
        file,
        config,
        world_size=world_size or 1,
        model_hidden_size=shape.n_embd,
        nvme_path=run / "nvme",
    ).config
    check_continuation(config, run)
    changed = check_ds_continuation(config, run, resolved)
    checkpoint = check_checkpoint(config, run, shape)
    _check_data(config, run, checkpoint, stream_of(config, datasets, encoder))
    if open_repository(config.hub, config.output_dir) is not None and is_remote(config.hub):
        require_token(config.hub)
    _check_space(Path(config.output_dir), num_parameters(shape), config.keep_checkpoints)
    for finding in warnings:
        print(finding, file=sys.stderr)
    if changed:
        print(f"{run} goes on with another DeepSpeed config: {'; '.join(map(str, changed))}", file=sys.stderr)
    return resolved


def check_named(config: RunConfig) -> None:
    """Refuses a run without data or tokenizer, or whose data is neither here nor on the Hub, which is not asked."""
    for field in REQUIRED:
        if not getattr(config, field) and not (field == "tokenizer" and config.init_from):  # which brings its own
            raise UserError(
                f"--{field} is missing: make one with `codeparrot-ds {'corpus' if field == 'data' else field}`"
            )
    check_local_data(config.data, "train")


def check_memory(config: RunConfig, ds_config: dict[str, Any], *, device: str, ranks: int, refuse: bool = True) -> None:
    """Refuses a run that the memory plan says no GPU here can hold; on CPUs and without ``refuse`` it only warns.

    GPUs are those of this machine: with a hostfile they may be others, and nothing is judged. On CPUs the ranks share
    the machine's memory with everything else and can swap, and a process takes more than its tensors, so a plan says
    too little to refuse on: a run that is over all of the memory by its tensors alone is worth a word, no more.

    Raises:
        UserError: the shortfall, and what would fit.
    """
    encoder = load_encoder(config.tokenizer)
    shape = find_shape(config.model, vocab_size=encoder.vocab_size, seq_length=config.seq_length)
    if device == "cpu":
        _warn_of_little_memory(predict(config, shape, ds_config, ranks), ranks)
        return
    gpu = smallest_gpu()
    if gpu is None:
        return  # nvidia-smi does not say
    problem = why_too_large(config, shape, ds_config, ranks, gpu[1], gpu[0])
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


def _check_data(config: RunConfig, run: Path, checkpoint: Path | None, stream: StreamConfig) -> None:
    """Refuses to resume on other data than the checkpoint's."""
    if checkpoint is None:
        return
    try:
        saved = json.loads((checkpoint / "data.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # A damaged checkpoint: the ranks verify it, name the damage and look for an older one.
    if isinstance(saved, dict) and "fingerprint" in saved:
        try:
            resume_stream(saved, stream_fingerprint(stream), on_data_change=config.on_data_change)
        except UserError as error:
            raise UserError(f"{run}: {error}") from None


def wanted_of(config: RunConfig, launch: LaunchOptions, *, build: bool, clear_locks: bool) -> tuple[list[Host], Wanted]:
    """What ``doctor`` looks at: the hosts, and what a run of this config would need of them.

    Args:
        config: of the run; any field may be at its default.
        launch: where it would run.
        build: build missing operators.
        clear_locks: remove the locks of killed builds.

    Raises:
        UserError: what the config names is not there, or cannot be made.
    """
    for data, split in ((config.data, "train"), (config.validation_data, "validation")):
        if data:
            check_local_data(data, split)
    if config.tokenizer:
        find_tokenizer(config.tokenizer)
    _existing_folder(Path(config.output_dir))
    device = local_device(hostfile=launch.hostfile is not None)
    hosts = hosts_of(launch, local_devices(device) if launch.hostfile is None else [])
    file = open_for(config, device)
    wanted = Wanted(
        device=device,
        output_dir=Path(config.output_dir),
        data=local_paths(config.data, config.validation_data or "", config.tokenizer),
        operators=needed_operators(file.config, device),
        build=file.config if build else None,
        clear_locks=clear_locks,
        master_addr=launch.master_addr,
        master_port=launch.master_port,
        links=not is_local(hosts),
        variables={} if is_local(hosts) else shared_variables(device),
    )
    return hosts, wanted


def local_device(*, hostfile: bool = False) -> str:
    """``cuda`` when there are GPUs and a torch that can use them, else ``cpu``; found without importing torch.

    Args:
        hostfile: other hosts train; this one may have no GPU, and they are taken to have what its torch is made for.
    """
    if os.environ.get("DS_ACCELERATOR") == "cpu" or importlib.metadata.version("torch").endswith("+cpu"):
        return "cpu"
    return "cuda" if hostfile or _visible_gpus() else "cpu"


def local_devices(device: str) -> list[int | str]:
    """What ``CUDA_VISIBLE_DEVICES`` lists, or the numbers of this machine's devices."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if device == "cuda" and visible is not None:
        parts = [part.strip() for part in visible.split(",") if part.strip() and part.strip() != "-1"]
        return [int(part) if part.isdigit() else part for part in parts]
    return list(range(local_ranks(device)))


def local_ranks(device: str) -> int:
    """How many ranks a run has on this machine unless told: one a visible GPU, or one on a CPU, on all its cores.

    More ranks on a CPU only add what they say to each other: two of one core are slower than one of two
    (``docs/performance.md``).
    """
    return _visible_gpus() if device == "cuda" else 1


def _visible_gpus() -> int:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([part for part in visible.split(",") if part.strip() and part.strip() != "-1"])
    if not shutil.which("nvidia-smi"):
        return 0
    answer = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False)
    return len(answer.stdout.splitlines()) if answer.returncode == 0 else 0


def _existing_folder(output_dir: Path) -> Path:
    """The part of a path that exists; `UserError` where it is a file."""
    existing = output_dir.absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise UserError(f"output_dir {output_dir} cannot be made: {existing} is a file")
    return existing


def _check_space(output_dir: Path, parameters: int, keep: int) -> None:
    """Refuses a run whose first checkpoints cannot fit, and a folder that cannot be written."""
    existing = _existing_folder(output_dir)
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"output_dir {output_dir} cannot be written: no permission in {existing}")
    needed = parameters * BYTES_A_PARAMETER * (min(keep, 1) + 1)
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(
            f"output_dir {output_dir} has {free / 1e9:.1f} GB free and a checkpoint beside the one before it takes "
            f"{needed / 1e9:.1f} GB: free some space or choose another --output-dir"
        )


def _build_operators(ds_config: dict[str, Any], device: str, environment: dict[str, str]) -> None:
    names = ", ".join(needed_operators(ds_config, device))
    print(f"building DeepSpeed's operators ({names}), once for this environment; a minute or two", file=sys.stderr)
    problem = build_apart(ds_config, device, environment)
    if problem is not None:
        raise UserError(problem)
