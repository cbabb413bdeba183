"""Where the ranks run: the launcher's options."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass

from codeparrot_ds.config import option_types
from codeparrot_ds.config.option_types import port, real
from codeparrot_ds.paths import name_argument

_seconds = real(minimum=1, unit="seconds")
LAUNCHERS = ("pdsh", "openmpi", "mpich", "impi", "mvapich", "slurm")


@dataclass(frozen=True, kw_only=True)
class LaunchOptions:
    """Where the ranks run; handed to the ``deepspeed`` launcher."""

    num_gpus: int | None = None  # ranks on this machine, with or without GPUs; None: one per GPU, or one
    hostfile: str | None = None
    include: str | None = None
    exclude: str | None = None
    launcher: str = "pdsh"  # of DeepSpeed's, between hosts
    master_addr: str | None = None
    master_port: int | None = None
    ssh_port: int | None = None  # of the hosts' sshd; None: ssh's own choice
    no_ssh: bool = False  # every host starts its own ranks
    node_rank: int | None = None  # of this host, with no_ssh
    bind_cores: bool = False
    max_restarts: int = 0  # after a lost rank, a hang or a failure
    min_hosts: int | None = None  # continue with so many when others do not answer; None: all
    hang_seconds: float = 600.0  # the most that a rank may stay in one place of a step, an evaluation or a save
    ignore_memory_plan: bool = False  # start a run that the memory plan says does not fit


def add_launch_arguments(parser: argparse.ArgumentParser) -> None:
    """The launcher's own options; `launch_from_arguments` reads them."""
    group = parser.add_argument_group("launch")
    group.add_argument(
        "--num-gpus", "--num_gpus", "--num-ranks", "--num_ranks", type=option_types.count, metavar="N", dest="num_gpus",
        help="ranks on this machine (default: one per GPU, or one on a machine without)",
    )  # fmt: skip
    group.add_argument(
        "--hostfile", type=name_argument, metavar="FILE", help="lines of `host slots=N` (default: this machine alone)"
    )
    group.add_argument("--include", metavar="HOSTS", help="hosts and GPUs to use, as in a:0,2@b (default: all)")
    group.add_argument("--exclude", metavar="HOSTS", help="hosts and GPUs to leave out, same form (default: none)")
    group.add_argument(
        "--master-addr", "--master_addr", metavar="HOST", dest="master_addr",
        help="address of the first host (default: found by the launcher)",
    )  # fmt: skip
    group.add_argument(
        "--master-port", "--master_port", type=port, metavar="N", dest="master_port",
        help="port of the first host (default: a free one)",
    )  # fmt: skip
    group.add_argument(
        "--launcher", choices=LAUNCHERS, default="pdsh",
        help="what DeepSpeed starts the hosts with (default: pdsh, which uses ssh)",
    )  # fmt: skip
    group.add_argument(
        "--ssh-port", "--ssh_port", type=port, metavar="N", dest="ssh_port",
        help="port of the hosts' sshd (default: that of ~/.ssh/config, or 22)",
    )  # fmt: skip
    group.add_argument(
        "--no-ssh", "--no_ssh", action="store_true", dest="no_ssh",
        help="start this host's ranks alone; the same command is given on every host (default: start all)",
    )  # fmt: skip
    group.add_argument(
        "--node-rank", "--node_rank", type=option_types.index, metavar="N", dest="node_rank",
        help="place of this host in the hostfile, from 0; with --no-ssh (default: none)",
    )  # fmt: skip
    group.add_argument(
        "--bind-cores", "--bind_cores", action="store_true", dest="bind_cores",
        help="bind each rank to cores of its own with numactl (default: they share)",
    )  # fmt: skip
    group.add_argument(
        "--max-restarts", "--max_restarts", type=option_types.index, default=0, metavar="N", dest="max_restarts",
        help="start again from the newest whole checkpoint after a lost rank, a hang or a failure (default: 0)",
    )  # fmt: skip
    group.add_argument(
        "--min-hosts", "--min_hosts", type=option_types.count, metavar="N", dest="min_hosts",
        help="continue with so many hosts when others do not answer (default: all of them)",
    )  # fmt: skip
    group.add_argument(
        "--hang-seconds", "--hang_seconds", type=_seconds, default=600.0, metavar="SECONDS", dest="hang_seconds",
        help="the most that a rank may stay in one micro-batch, evaluation or save; the limit of a micro-batch is "
        "learned from the run's own and may be less (default: 600)",
    )  # fmt: skip
    group.add_argument(
        "--ignore-memory-plan", "--ignore_memory_plan", action="store_true", dest="ignore_memory_plan",
        help="start even where the memory plan says that the run does not fit the GPUs (default: refuse)",
    )  # fmt: skip


def launch_from_arguments(arguments: argparse.Namespace) -> LaunchOptions:
    """The launch options of parsed arguments."""
    return LaunchOptions(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(LaunchOptions)})
