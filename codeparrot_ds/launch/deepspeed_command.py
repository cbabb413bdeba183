"""What DeepSpeed's launcher is given: hosts and slots, its command line, and the environment. No torch here."""

from __future__ import annotations

import base64
import json
import os
import shutil
import sys
from pathlib import Path

from codeparrot_ds.child_process import PACKAGE_PARENT, python_path
from codeparrot_ds.config.launch_options import LaunchOptions
from codeparrot_ds.errors import UserError
from codeparrot_ds.launch.hostfile import THIS_MACHINE, Host, include_option, read_hostfile, select, write_hostfile
from codeparrot_ds.launch.ssh import PDSH_OPTIONS, ssh_options
from codeparrot_ds.secret_forms import names_a_secret

MODULE = "codeparrot_ds.train"
"""What a rank runs."""
BACKENDS = {
    "pdsh": "pdsh",
    "openmpi": "ompi_info",
    "mpich": "mpirun",
    "impi": "mpirun",
    "mvapich": "mpiname",
    "slurm": "sinfo",
}


def hosts_of(launch: LaunchOptions, devices: list[int | str]) -> list[Host]:
    """The hosts and slots of a run; one host named ``localhost`` where no other takes part.

    Args:
        launch: what the user asked for.
        devices: of this machine, for a run without a hostfile.

    Raises:
        UserError: a mistake in the hostfile or in the options.
    """
    if launch.hostfile is None:
        return _this_machine(launch, devices)
    hosts = select(
        read_hostfile(launch.hostfile), include=launch.include, exclude=launch.exclude, num_gpus=launch.num_gpus
    )
    here = [host for host in hosts if host.name in THIS_MACHINE]
    if here and len(hosts) > 1:
        raise UserError(
            f"hostfile {launch.hostfile}: {here[0].name} beside other hosts, who cannot reach it by that name: write "
            "its name in the network"
        )
    if here:
        return [Host(name="localhost", slots=here[0].slots)]
    _check_options(launch, hosts)
    return hosts


def _this_machine(launch: LaunchOptions, devices: list[int | str]) -> list[Host]:
    for option in ("min_hosts", "node_rank", "ssh_port"):
        if getattr(launch, option) is not None:
            raise UserError(f"--{option.replace('_', '-')} needs --hostfile: without it this machine trains alone")
    if launch.no_ssh:
        raise UserError("--no-ssh needs --hostfile, which says how many ranks there are before this host's")
    if launch.num_gpus is None or launch.include is not None or launch.exclude is not None:
        everything = [Host(name="localhost", slots=tuple(devices))]
        return select(everything, include=launch.include, exclude=launch.exclude, num_gpus=launch.num_gpus)
    slots = devices[: launch.num_gpus]
    if len(slots) < launch.num_gpus and not all(isinstance(slot, int) for slot in devices):
        raise UserError(f"--num-gpus {launch.num_gpus}: CUDA_VISIBLE_DEVICES shows {len(devices)} GPU(s)")
    more = range(len(slots), launch.num_gpus)  # ranks of a CPU are only numbers
    return [Host(name="localhost", slots=(*slots, *more))]


def _check_options(launch: LaunchOptions, hosts: list[Host]) -> None:
    if launch.min_hosts is not None and launch.min_hosts > len(hosts):
        raise UserError(f"--min-hosts {launch.min_hosts}: the run has {len(hosts)} host(s)")
    if launch.ssh_port is not None and (launch.no_ssh or launch.launcher not in ("pdsh", "slurm")):
        option = "--no-ssh" if launch.no_ssh else f"--launcher {launch.launcher}"
        why = "makes no connection" if launch.no_ssh else "makes connections of its own: give the port in ~/.ssh/config"
        raise UserError(f"--ssh-port does not go with {option}, which {why}")
    if launch.no_ssh:
        if launch.node_rank is None or launch.master_addr is None or launch.master_port is None:
            raise UserError("--no-ssh needs --node-rank, --master-addr and --master-port, so that the hosts meet")
        if launch.node_rank >= len(hosts):
            raise UserError(f"--node-rank {launch.node_rank}: the run has {len(hosts)} host(s), numbered from 0")
        return
    if launch.node_rank is not None:
        raise UserError("--node-rank goes with --no-ssh: otherwise every host is started from here")
    backend = BACKENDS[launch.launcher]
    if shutil.which(backend) is None:
        remedy = "install it (Debian: apt-get install pdsh), or " if launch.launcher == "pdsh" else "install it, or "
        raise UserError(
            f"--launcher {launch.launcher}: there is no {backend} on PATH: {remedy}start each host with --no-ssh"
        )
    if launch.launcher != "pdsh" and len({host.slots for host in hosts}) > 1:
        raise UserError(f"--launcher {launch.launcher} needs the same slots on every host")


def is_local(hosts: list[Host]) -> bool:
    """Whether this machine trains alone."""
    return [host.name for host in hosts] == ["localhost"]


def node_command(
    hosts: list[Host],
    launch: LaunchOptions,
    arguments: list[str],
    *,
    addr: str,
    port: int,
    node_rank: int = 0,
    module: str = MODULE,
) -> list[str]:
    """The command of the launcher's half for one node.

    On one machine the other half (``deepspeed``, the runner) only starts this one; it costs an import of torch, and it
    reports success when this one is killed.
    """
    world = base64.urlsafe_b64encode(json.dumps({host.name: list(host.slots) for host in hosts}).encode()).decode()
    node = [f"--world_info={world}", f"--master_addr={addr}", f"--master_port={port}"]
    node += [f"--node_rank={node_rank}"] if len(hosts) > 1 else []
    node += ["--bind_cores_to_rank"] if launch.bind_cores else []
    return [sys.executable, "-m", "deepspeed.launcher.launch", *node, "--quiet", "--module", module, *arguments]


def runner_command(
    hosts: list[Host], launch: LaunchOptions, folder: Path, *, addr: str, port: int, module: str = MODULE
) -> list[str]:
    """The command of the launcher's first half, which starts every host; the ranks' arguments travel otherwise.

    Through ssh a shell on each host reads them again, and JSON, quotes and dollars would not survive.

    Args:
        hosts: that train.
        launch: what the user asked for.
        folder: a private one for the hostfile that it reads.
        addr: address of the first host.
        port: there.
        module: what a rank runs.
    """
    hostfile = folder / "hostfile"
    write_hostfile(hosts, hostfile)
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet", "--hostfile", str(hostfile)]
    command += ["--launcher", launch.launcher, "--master_addr", addr, "--master_port", str(port)]
    # Every host has been asked before; and one host that is not this one is no reason to train here.
    command += ["--no_ssh_check", "--force_multi"]
    if launch.launcher == "pdsh":
        command += ["--include", include_option(hosts)]
    if launch.bind_cores:
        command.append("--bind_cores_to_rank")
    if launch.launcher == "slurm":  # its runner knows no modules
        return [*command, str(PACKAGE_PARENT / f"{module.replace('.', '/')}.py")]
    return [*command, "--module", module]


_EXPORTED = ("PYTHON", "MV2", "UCX")  # EXPORT_ENVS of DeepSpeed's launcher, with MLFLOW


def runner_environment(folder: Path, exported: dict[str, str], *, ssh_port: int | None = None) -> dict[str, str]:
    """The environment of the launcher's first half, which writes some of it into the command line of ssh.

    Args:
        folder: a private one, for the file of what it is to export.
        exported: variables without secrets that even the launcher's second half needs.
        ssh_port: of the hosts' sshd; not an option of the runner, which puts it behind a port of the user's own.
    """
    file = folder / "exported"
    file.write_text("".join(f"{name}={value}\n" for name, value in exported.items()), encoding="utf-8")
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("MLFLOW") and not (name.startswith(_EXPORTED) and names_a_secret(name))
    }
    environment["PYTHONPATH"] = python_path(environment)
    return environment | {"DS_ENV_FILE": str(file), PDSH_OPTIONS: " ".join(ssh_options(ssh_port))}
