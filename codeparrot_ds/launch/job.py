"""A checked run from its first start to its last: the hosts are asked, the launcher is started, and again if need be.

No torch here.
"""

from __future__ import annotations

import dataclasses
import os
import secrets
import socket
import sys
import tempfile
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from codeparrot_ds.checkpoint.folders import newest_checkpoint
from codeparrot_ds.checkpoint.run_folder import recorded_outcome
from codeparrot_ds.child_process import python_path
from codeparrot_ds.config.launch_options import LaunchOptions
from codeparrot_ds.cpu import usable_cores
from codeparrot_ds.engine.operators import needed_operators, use_operators_folder
from codeparrot_ds.errors import UserError
from codeparrot_ds.launch.deepspeed_command import MODULE, is_local, node_command, runner_command, runner_environment
from codeparrot_ds.launch.doctor import Examination, Wanted, examine, local_paths
from codeparrot_ds.launch.hostfile import Host
from codeparrot_ds.launch.preflight import BYTES_A_PARAMETER, check_run
from codeparrot_ds.launch.ssh import ask_all
from codeparrot_ds.resolved_run import ResolvedRun
from codeparrot_ds.shell import pasteable
from codeparrot_ds.supervision.control import ADDRESS, TOKEN, ControlServer
from codeparrot_ds.supervision.deepspeed_env import Value, read_deepspeed_env
from codeparrot_ds.supervision.forwarded_env import FILE, RESOLVED_RUN, carried, in_memory
from codeparrot_ds.supervision.process_end import LEADS
from codeparrot_ds.supervision.supervise import End, run_to_the_end
from codeparrot_ds.supervision.watchdog import FAILED, HUNG, LOST
from codeparrot_ds.telemetry.startup import LAUNCHED_AT

RETURN_SECONDS = 120.0
"""That a restart waits for a host that does not answer, unless ``--min-hosts`` lets it continue without."""
ASK_AGAIN_SECONDS = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A checked run, and where it is to run."""

    run: ResolvedRun
    """For as many ranks as ``hosts`` have slots; what every rank is given."""
    launch: LaunchOptions
    hosts: list[Host]
    started: float
    """When the command was entered, in seconds since the epoch."""
    folder: Path
    """Of the run."""
    going_on: list[str]
    """Options of ``train`` that continue it."""
    module: str = MODULE
    """What a rank runs."""


def run_job(job: Job) -> int:
    """Starts a run's ranks, again after a loss as often as it may; returns the exit code."""
    end = End(code=FAILED)
    for start in range(job.launch.max_restarts + 1):
        try:
            end, job = _start(job, again=start > 0)
        except UserError as error:
            if start == 0:
                raise
            print(f"codeparrot-ds train: it cannot start again: {error}", file=sys.stderr, flush=True)
            break
        if end.asked or end.code not in (FAILED, LOST, HUNG) or start == job.launch.max_restarts:
            break
        print(
            f"codeparrot-ds train: restart {start + 1} of {job.launch.max_restarts}, from the newest checkpoint that "
            "is whole",
            file=sys.stderr,
            flush=True,
        )
    _say_how_to_go_on(job, end)
    return end.code


def _say_how_to_go_on(job: Job, end: End) -> None:
    """The command that continues a run which was stopped, by somebody or by ``max_hours``."""
    stopped = end.code == 0 and recorded_outcome(job.folder).get("status") == "stopped"
    if not stopped and not (end.asked and end.code):
        return
    newest = newest_checkpoint(job.folder / "checkpoints")
    what = "Stopped and saved." if stopped else "Stopped without saving."
    if newest is None:
        what = "Stopped before anything was saved."
    elif not stopped:
        what += f" The newest checkpoint is {newest}."
    print(f"\n{what} Continue with:\n  {pasteable('train', *job.going_on)}", flush=True)


def _start(job: Job, *, again: bool) -> tuple[End, Job]:
    """One start; returns how it ended, and the job with the hosts that took part."""
    if again and newest_checkpoint(job.folder / "checkpoints"):
        job = dataclasses.replace(job, run=job.run.with_config(resume="auto"))
    server = ControlServer()
    options: dict[str, Any] = {"server": server, "hang_seconds": job.launch.hang_seconds}
    if is_local(job.hosts) or job.launch.no_ssh:
        with in_memory(job.run.as_json()) as file:
            command, environment = _on_this_host(job, file)
            options["has_rank_0"] = not job.launch.node_rank
            return run_to_the_end(command, environment, job.folder, **options), job
    with tempfile.TemporaryDirectory(prefix="codeparrot-ds-") as private:
        base = f"/tmp/codeparrot-ds-{os.getuid()}-{secrets.token_hex(8)}"
        patience = RETURN_SECONDS if again and job.launch.min_hosts is None else 0.0
        examination, job = _ask_hosts(job, server, base, patience)
        addr, port = examination.master_addr, examination.master_port
        assert addr is not None and port is not None
        try:
            command = runner_command(job.hosts, job.launch, Path(private), addr=addr, port=port, module=job.module)
            exported = {FILE: base} | ({"DS_ACCELERATOR": "cpu"} if job.run.device == "cpu" else {})
            if job.launch.launcher != "pdsh":  # srun and Open MPI do not tell the ranks where to meet
                exported |= {"MASTER_ADDR": addr, "MASTER_PORT": str(port)}
            environment = runner_environment(Path(private), exported, ssh_port=job.launch.ssh_port)
            end = run_to_the_end(command, environment, job.folder, num_ranks=job.run.world_size, **options)
        finally:
            if len(server.ranks) < job.run.world_size:
                _forget(_paths(job.hosts, base, job.launch), job.launch)  # else the guards have
    return end, job


def _on_this_host(job: Job, file: Path) -> tuple[list[str], dict[str, str]]:
    """The launcher's command for this host and its environment; the ranks read the run from a file."""
    launch = job.launch
    node_rank = launch.node_rank or 0
    environment = rank_environment(job.run.device, len(job.hosts[node_rank].slots))
    environment[LAUNCHED_AT] = str(job.started)
    environment[LEADS] = "1"
    port = launch.master_port or _free_port()
    addr = launch.master_addr or "127.0.0.1"
    arguments = [RESOLVED_RUN, str(file)]
    command = node_command(job.hosts, launch, arguments, addr=addr, port=port, node_rank=node_rank, module=job.module)
    return command, environment


def _ask_hosts(job: Job, server: ControlServer, base: str, patience_seconds: float = 0.0) -> tuple[Examination, Job]:
    """Asks the hosts whether all is well there and brings them environment and run; leaves out who may be missing.

    Asks again for so long while hosts do not answer.

    Returns:
        What they answered, and the job on those that take part.

    Raises:
        UserError: what is wrong on which host, with the remedy.
    """
    launch, run, hosts = job.launch, job.run, job.hosts
    config = run.config
    wanted = Wanted(
        device=run.device,
        output_dir=Path(config.output_dir),
        data=local_paths(config.data, config.validation_data or "", config.tokenizer, config.deepspeed),
        operators=needed_operators(run.ds_config, run.device),
        build=run.ds_config,
        needed_bytes=2 * BYTES_A_PARAMETER * run.parameters,
        master_addr=launch.master_addr,
        master_port=launch.master_port,
        ssh_port=launch.ssh_port,
        environments=_environments(job, server, base),
        variables=shared_variables(run.device),
    )
    try:
        examination = examine(hosts, wanted)
        deadline = time.monotonic() + patience_seconds
        while examination.unreachable and time.monotonic() < deadline:
            time.sleep(ASK_AGAIN_SECONDS)
            examination = examine(hosts, wanted)
    except BaseException:
        _forget(_paths(hosts, base, launch), launch)
        raise
    missing = examination.unreachable
    left = {name: path for name, path in _paths(hosts, base, launch).items() if name not in missing}
    errors = [finding for finding in examination.findings if not finding.warning]
    if missing and launch.min_hosts is not None and len(hosts) - len(missing) >= launch.min_hosts:
        for finding in errors:
            if finding.host in missing:
                print(f"warning: continuing without {finding}", file=sys.stderr)
        _forget(left, launch)
        return _ask_hosts(_without(job, missing), server, base)
    if errors:
        _forget(left, launch)
        raise UserError("; ".join(map(str, errors)))
    for finding in examination.findings:
        print(f"warning: {finding}", file=sys.stderr)
    return examination, job


def _without(job: Job, missing: Collection[str]) -> Job:
    """The job on the hosts that are left: the run is resolved again, since another number of ranks is another run."""
    hosts = [host for host in job.hosts if host.name not in missing]
    ranks = sum(len(host.slots) for host in hosts)
    try:
        run = check_run(job.run.config, device=job.run.device, world_size=ranks, precisions=job.run.precisions)
    except UserError as error:
        names = ", ".join(host.name for host in hosts)
        raise UserError(f"the run cannot continue with {names} alone: {error}") from error
    return dataclasses.replace(job, hosts=hosts, run=run)


def shared_variables(device: str) -> dict[str, Value]:
    """What every rank gets of this process's environment, and what the user's ``.deepspeed_env`` sets.

    Raises:
        UserError: a line of ``.deepspeed_env`` cannot be read.
    """
    variables = read_deepspeed_env([Path.home(), Path.cwd()], carried(os.environ))
    variables.setdefault("TOKENIZERS_PARALLELISM", "false")
    if "TORCH_EXTENSIONS_DIR" in os.environ:
        variables["TORCH_EXTENSIONS_DIR"] = os.environ["TORCH_EXTENSIONS_DIR"]
    if device == "cpu":
        variables["DS_ACCELERATOR"] = "cpu"
    for name in ("PYTHONPATH", "PYTHONHOME"):  # the launcher exports them
        variables.pop(name, None)
    return variables


def _environments(job: Job, server: ControlServer, base: str) -> dict[str, dict[str, Any]]:
    """The file with environment and run, for each host."""
    variables = shared_variables(job.run.device) | {TOKEN: server.token, LAUNCHED_AT: str(job.started)}
    variables[ADDRESS] = f"{socket.gethostname()}:{server.port}"
    run = job.run.as_json()
    return {
        name: {
            "path": path,
            "content": {"variables": variables, "run": run},
            "control_port": server.port,
        }
        for name, path in _paths(job.hosts, base, job.launch).items()
    }


def _paths(hosts: list[Host], base: str, launch: LaunchOptions) -> dict[str, str]:
    """Where the file is on each host."""
    # DeepSpeed's own starter numbers the hosts for their ranks; with the others each reads a file of the same name.
    return {host.name: f"{base}.{number if launch.launcher == 'pdsh' else 0}" for number, host in enumerate(hosts)}


def _forget(paths: dict[str, str], launch: LaunchOptions) -> None:
    """Takes the environment away from the hosts, where no rank did."""
    if paths:
        ask_all({name: {"forget": path} for name, path in paths.items()}, seconds=20.0, ssh_port=launch.ssh_port)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def rank_environment(device: str, ranks: int) -> dict[str, str]:
    """The environment that launcher and ranks get: device, threads, operators' folder, this interpreter first."""
    environment = dict(os.environ)
    use_operators_folder(environment)
    if device == "cpu":
        environment["DS_ACCELERATOR"] = "cpu"
        environment.pop("CUDA_VISIBLE_DEVICES", None)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // ranks)))
    environment.setdefault("TOKENIZERS_PARALLELISM", "false")
    # The package may be used from a checkout; the ranks import the same one.
    environment["PYTHONPATH"] = python_path(environment)
    return environment
