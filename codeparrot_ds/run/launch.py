"""The front door of training: checks what needs no rank, then starts the ``deepspeed`` launcher. No torch here.

The launcher is DeepSpeed's own; what is added is that mistakes are found before any process starts, that operators are
built once, that signals reach the ranks, and that the exit code tells what became of the run.
"""

from __future__ import annotations

import base64
import dataclasses
import importlib.metadata
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from codeparrot_ds.config import LaunchOptions, RunConfig
from codeparrot_ds.data.encoder import load_encoder
from codeparrot_ds.data.opening import check_datasets, open_datasets, resume_stream, stream_of
from codeparrot_ds.data.stream import StreamConfig, check_world_size, stream_fingerprint
from codeparrot_ds.errors import UserError
from codeparrot_ds.hub.commands import prepare_branch
from codeparrot_ds.hub.hugging_face import require_token
from codeparrot_ds.hub.repository import is_remote, open_repository
from codeparrot_ds.hub.secrets import check_for_secrets
from codeparrot_ds.model.shapes import find_shape, num_parameters
from codeparrot_ds.run.checkpoint_files import checkpoint_folders
from codeparrot_ds.run.device_memory import gigabytes, smallest_gpu
from codeparrot_ds.run.folder import (
    check_continuation,
    check_ds_continuation,
    check_run_name,
    new_run_name,
    recorded_pins,
)
from codeparrot_ds.run.initial import with_initial_model
from codeparrot_ds.run.ops import are_built, needed_operators, use_operators_folder
from codeparrot_ds.run.parent_end import LEADS, signal_at_parents_end
from codeparrot_ds.run.plan import predict, why_too_large
from codeparrot_ds.run.startup import LAUNCHED_AT
from codeparrot_ds.zero.ds_config import find_ds_config, read_ds_config, resolve_ds_config
from codeparrot_ds.zero.lint import check_ds_config, libaio_installed
from codeparrot_ds.zero.memory import Memory

BYTES_A_PARAMETER = 16  # a checkpoint: three fp32 numbers for the optimizer, the export, and room for the rest
DEFAULT_CPU_RANKS = 2
RANK = "codeparrot_ds.train"


def front_door(config: RunConfig, launch: LaunchOptions, arguments: list[str], *, module: str = RANK) -> int:
    """Checks a run, starts its ranks through the ``deepspeed`` launcher, waits, and returns the exit code.

    Args:
        config: the run config, resolved from ``arguments``.
        launch: where the ranks run.
        arguments: the options of ``train`` as typed, without the launcher's own; every rank parses them again.
        module: what a rank runs.

    Raises:
        UserError: anything that can be known to be wrong before a rank starts.
    """
    started = time.time()
    if launch.hostfile and not Path(launch.hostfile).is_file():
        raise UserError(
            f"hostfile {launch.hostfile} does not exist: DeepSpeed would quietly train on this machine alone"
        )
    device = local_device()
    ranks = launch.num_gpus or local_ranks(device)
    output_dir = Path(config.output_dir)
    name = config.run_name or new_run_name(output_dir)
    config = with_initial_model(dataclasses.replace(config, run_name=name))
    if config.init_from:  # as resolved: a branch may move
        arguments = [*arguments, "--init-from", config.init_from, "--tokenizer", config.tokenizer]
    ds_config = check_run(config, device=device, world_size=None if launch.hostfile else ranks)
    if not launch.hostfile:
        check_memory(config, ds_config, device=device, ranks=ranks, refuse=not launch.ignore_memory_plan)
    environment = rank_environment(device, ranks)
    if not are_built(needed_operators(ds_config, device)):
        _build_operators(ds_config, device, environment)
    if config.hub != "off":
        outage = prepare_branch(config.hub, output_dir, name)
        if outage is not None:
            print(f"warning: {outage}; checkpoints are queued and pushed when it answers", file=sys.stderr)
    command = _launcher_command(launch, ranks, [*arguments, "--run-name", name], module)
    environment[LAUNCHED_AT] = str(started)
    environment.pop(LEADS, None)
    if "deepspeed.launcher.launch" in command:  # and not the runner, which starts it on each host
        environment[LEADS] = "1"
    return _run_to_the_end(command, environment, output_dir / name)


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
    for field in ("data", "tokenizer"):
        if not getattr(config, field):
            raise UserError(
                f"--{field} is missing: make one with `codeparrot-ds {'corpus' if field == 'data' else field}`"
            )
    file = read_ds_config(find_ds_config(config.deepspeed))
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
    run = Path(config.output_dir) / str(config.run_name)
    datasets = open_datasets(config, recorded_pins(run))
    check_datasets(config, datasets)
    if world_size is not None:
        check_world_size(config.num_lanes, world_size)
    resolved = resolve_ds_config(
        file.config,
        config,
        world_size=world_size or 1,
        model_hidden_size=shape.n_embd,
        nvme_path=run / "nvme",
        source=file.path,
    )
    check_continuation(config, run)
    changed = check_ds_continuation(config, run, resolved)
    _check_data(config, run, stream_of(config, datasets, encoder))
    if open_repository(config.hub, config.output_dir) is not None and is_remote(config.hub):
        require_token(config.hub)
    _check_space(Path(config.output_dir), num_parameters(shape), config.keep_checkpoints)
    for finding in warnings:
        print(finding, file=sys.stderr)
    if changed:
        print(f"{run} goes on with another DeepSpeed config: {'; '.join(map(str, changed))}", file=sys.stderr)
    return resolved


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


def _check_data(config: RunConfig, run: Path, stream: StreamConfig) -> None:
    """Refuses to resume on other data than the newest checkpoint's."""
    newest = next(iter(checkpoint_folders(run / "checkpoints")), None)
    if config.resume != "auto" or newest is None:
        return
    try:
        saved = json.loads((newest / "data.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # A damaged checkpoint: the ranks verify it, name the damage and look for an older one.
    if isinstance(saved, dict) and "fingerprint" in saved:
        try:
            resume_stream(saved, stream_fingerprint(stream), on_data_change=config.on_data_change)
        except UserError as error:
            raise UserError(f"{run}: {error}") from None


def local_device() -> str:
    """``cuda`` when there are GPUs and a torch that can use them, else ``cpu``; found without importing torch."""
    if os.environ.get("DS_ACCELERATOR") == "cpu" or importlib.metadata.version("torch").endswith("+cpu"):
        return "cpu"
    return "cuda" if _visible_gpus() else "cpu"


def local_ranks(device: str) -> int:
    """How many ranks this machine offers: its visible GPUs, or two on a CPU with two cores."""
    if device == "cuda":
        return _visible_gpus()
    return min(DEFAULT_CPU_RANKS, _cores())


def rank_environment(device: str, ranks: int) -> dict[str, str]:
    """The environment that launcher and ranks get: device, threads, operators' folder, this interpreter first."""
    environment = dict(os.environ)
    use_operators_folder(environment)
    if device == "cpu":
        environment["DS_ACCELERATOR"] = "cpu"
        environment.pop("CUDA_VISIBLE_DEVICES", None)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // ranks)))
    environment.setdefault("TOKENIZERS_PARALLELISM", "false")
    # The package may be used from a checkout; the ranks import the same one.
    package_parent = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [package_parent, environment.get("PYTHONPATH")]))
    return environment


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _visible_gpus() -> int:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([part for part in visible.split(",") if part.strip() and part.strip() != "-1"])
    if not shutil.which("nvidia-smi"):
        return 0
    answer = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False)
    return len(answer.stdout.splitlines()) if answer.returncode == 0 else 0


def _check_space(output_dir: Path, parameters: int, keep: int) -> None:
    """Refuses a run whose first checkpoints cannot fit, and a folder that cannot be written."""
    existing = output_dir.absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise UserError(f"output_dir {output_dir} cannot be made: {existing} is a file")
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
    script = (
        "import json, sys\n"
        "from codeparrot_ds.errors import UserError\n"
        "from codeparrot_ds.run.ops import build_operators\n"
        "try:\n"
        "    build_operators(json.loads(sys.stdin.read()), sys.argv[1])\n"
        "except UserError as error:\n"
        "    sys.exit(f'codeparrot-ds: error: {error}')\n"
    )
    command = [sys.executable, "-c", script, device]
    built = subprocess.run(
        command, input=json.dumps(ds_config), text=True, capture_output=True, env=environment, check=False
    )
    if built.returncode != 0:
        lines = [line for line in built.stderr.splitlines() if line.strip()]
        raise UserError(lines[-1].removeprefix("codeparrot-ds: error: ") if lines else "building operators failed")


def _launcher_command(launch: LaunchOptions, ranks: int, arguments: list[str], module: str = RANK) -> list[str]:
    """The command of DeepSpeed's launcher: the whole of it for hosts and filters, its per-node half for this machine.

    On one machine the first half (``deepspeed``, the runner) only starts the second; it costs an import of torch, and
    it reports success when the second is killed.
    """
    port = str(launch.master_port or _free_port())
    ranks_command = ["--module", module, *arguments]
    if not (launch.hostfile or launch.include or launch.exclude):
        world = base64.urlsafe_b64encode(json.dumps({"localhost": list(range(ranks))}).encode()).decode()
        node = [f"--world_info={world}", f"--master_addr={launch.master_addr or '127.0.0.1'}", f"--master_port={port}"]
        return [sys.executable, "-m", "deepspeed.launcher.launch", *node, "--quiet", *ranks_command]
    # An empty name: the runner's default is /job/hostfile, which nobody here asked for.
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet", "--hostfile", launch.hostfile or ""]
    for option in ("include", "exclude", "master_addr"):
        if getattr(launch, option):
            command += [f"--{option}", getattr(launch, option)]
    if launch.num_gpus and not (launch.include or launch.exclude):
        command += ["--num_gpus", str(ranks)]
    return [*command, "--master_port", port, *ranks_command]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def _run_to_the_end(command: list[str], environment: dict[str, str], run: Path) -> int:
    """Runs the launcher in a session of its own and passes stop signals to the ranks alone, who save and then end."""
    starts_before = _starts_and_status(run)[0]
    # Its ranks save and end when it is gone (`train.run_rank`); the launcher itself would stop them without.
    follow = signal_at_parents_end(signal.SIGKILL, os.getpid())
    process = subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=follow)
    asked: list[int] = []

    def pass_on(number: int, frame: object) -> None:
        asked.append(number)
        if len(asked) == 1:
            print("stopping: the ranks save at the next step boundary; again to stop without", file=sys.stderr)
            _signal_ranks(process.pid, signal.SIGTERM)
        else:
            os.killpg(process.pid, signal.SIGKILL)

    previous = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        code = process.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if code != 0:
        return code if code > 0 else 128 - code
    # A launcher whose ranks died of a signal reports success all the same: rank 0 must have recorded this start's end.
    starts, status = _starts_and_status(run)
    return 0 if starts > starts_before and status in ("finished", "stopped") else 1


def _signal_ranks(launcher: int, number: int) -> None:
    """Signals the processes that DeepSpeed's per-node launcher started, and neither it nor their own children."""
    import psutil

    try:
        processes = psutil.Process(launcher).children(recursive=True)
    except psutil.NoSuchProcess:
        return
    for process in processes:
        try:
            parent = process.parent()
            if parent is not None and "deepspeed.launcher.launch" in parent.cmdline():
                process.send_signal(number)
        except psutil.NoSuchProcess:
            continue


def _starts_and_status(run: Path) -> tuple[int, str | None]:
    """How often a run was started, and how the last start ended; no clock is asked, it may be set back in between."""
    try:
        record = json.loads((run / "run.json").read_text(encoding="utf-8"))
        return len(record["starts"]), record["outcome"]["status"]
    except (OSError, ValueError, KeyError):
        return 0, None
