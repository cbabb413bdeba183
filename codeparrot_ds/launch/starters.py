"""Which rank this process is where Slurm, MPI or torchrun started several, and where they meet. No torch here.

All of them have one command line: a command that started ranks of its own in each would train as many runs.
"""

from __future__ import annotations

import os
import re
import socket
import sys
import zlib
from collections.abc import Mapping, MutableMapping, Sequence
from typing import NamedTuple

from codeparrot_ds.child_process import python_path
from codeparrot_ds.config.launch_options import LaunchOptions
from codeparrot_ds.errors import UserError

FIRST_PORT, NUM_PORTS = 10_000, 20_000  # below those that systems give away for a moment
PLACES = ("hostfile", "include", "exclude", "num_gpus", "bind_cores")
SUPERVISION = ("max_restarts", "hang_seconds")


class Starter(NamedTuple):
    """A program that starts processes and numbers them in environment variables, whose names these are."""

    command: str
    """What a user types."""
    rank: str
    local_rank: str
    world_size: str
    ranks_here: str = ""
    """How many of them are on this host."""
    hosts: tuple[str, ...] = ("SLURM_JOB_NODELIST",)
    """Lists of nodes, the first of which has rank 0; the first that is set counts."""
    job: tuple[str, ...] = ("PMIX_NAMESPACE", "SLURM_JOB_ID")
    """What together is the same for all its processes, and another for the next job."""


SRUN = Starter(
    *("srun", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS"),
    hosts=("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"),
    job=("SLURM_JOB_ID", "SLURM_STEP_ID"),
)
STARTERS = (
    # The innermost first: in a Slurm job mpirun starts its helpers with srun, and ranks inherit the helpers' variables.
    Starter("torchrun", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
    Starter(
        *("mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE"),
        ranks_here="OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    Starter(
        *("mpirun", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_SIZE"),
        ranks_here="MV2_COMM_WORLD_LOCAL_SIZE",
    ),
    Starter("mpiexec", "PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE", "MPI_LOCALNRANKS"),
    SRUN,  # behind PMI, which it sets as well with --mpi=pmi2, but for the local rank
    Starter("mpiexec", "PMI_RANK", "PMI_LOCAL_RANK", "PMI_SIZE", "PMI_LOCAL_SIZE"),
)


def find_starter(environment: Mapping[str, str]) -> Starter | None:
    """Who started this process as one of several; None where it is alone, as a shell of a Slurm job is.

    Raises:
        UserError: it is one of several, and nothing says which.
    """
    several = [starter for starter in STARTERS if _count(environment, starter.world_size) > 1]
    if "SLURM_STEP_ID" not in environment:  # a batch script, whatever it inherited
        several = [starter for starter in several if starter is not SRUN]
    for starter in several:
        if starter.rank in environment and starter.local_rank in environment:
            return starter
    for starter in several:
        if starter.command != "torchrun":  # whose names are anybody's: a cluster may number its containers by them
            raise UserError(
                f"{starter.command} has started {environment[starter.world_size]} processes without {starter.rank} and "
                f"{starter.local_rank}: set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT for each of them"
            )
    return None


def name_rank(
    environment: MutableMapping[str, str], starter: Starter, *, addr: str | None = None, port: int | None = None
) -> None:
    """Sets what a rank is told by: ``RANK``, ``LOCAL_RANK``, ``WORLD_SIZE``, ``MASTER_ADDR``, ``MASTER_PORT``.

    Args:
        environment: of this process.
        starter: who started it.
        addr: where the ranks meet, if the user said it; else as in the environment, else the first host.
        port: there; else as in the environment, else one that the job's id gives, the same for all ranks.

    Raises:
        UserError: nothing says where rank 0 is, or its port is taken.
    """
    names = {"RANK": starter.rank, "LOCAL_RANK": starter.local_rank, "WORLD_SIZE": starter.world_size}
    environment.update({name: environment[source] for name, source in names.items()})
    if addr is not None:
        environment["MASTER_ADDR"] = addr
    elif not environment.get("MASTER_ADDR"):
        environment["MASTER_ADDR"] = _host_of_rank_0(environment, starter)
    if port is not None:
        environment["MASTER_PORT"] = str(port)
    elif not environment.get("MASTER_PORT"):
        environment["MASTER_PORT"] = str(_port_of_job(environment, starter))


def train_as_rank(launch: LaunchOptions, typed: Sequence[str]) -> None:
    """Becomes a rank of the one run that this process and its likes train; returns where it is alone.

    Args:
        launch: options of the launcher, which has nothing to start then.
        typed: all options of ``train``.

    Raises:
        UserError: options that say which ranks there are, or nothing says where they meet.
    """
    starter = find_starter(os.environ)
    if starter is None or launch.no_ssh:  # with it each process starts the ranks of its own host, and they meet
        return
    default, count = LaunchOptions(), os.environ[starter.world_size]
    for field in PLACES:
        if getattr(launch, field) != getattr(default, field):
            raise UserError(
                f"{_option(field)} does not go with {starter.command}, which has started {count} processes, each of "
                f"them a rank: leave it out, or have {starter.command} start one process"
            )
    name_rank(os.environ, starter, addr=launch.master_addr, port=launch.master_port)
    if os.environ["RANK"] == "0":
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        print(f"{starter.command} has started {count} ranks: they train one run and meet at {place}", file=sys.stderr)
        for field in SUPERVISION:
            if getattr(launch, field) != getattr(default, field):
                print(f"warning: {_option(field)} does nothing: {starter.command} watches the ranks", file=sys.stderr)
        sys.stderr.flush()
    os.environ["PYTHONPATH"] = python_path()
    os.execv(sys.executable, [sys.executable, "-m", "codeparrot_ds.train", *typed])


def refuse_several(command: str) -> None:
    """Refuses a command that starts ranks itself where each of several processes would do the same work."""
    starter = find_starter(os.environ)
    if starter is not None:
        raise UserError(
            f"{starter.command} has started {os.environ[starter.world_size]} processes, and {command} starts its ranks "
            f"itself: have {starter.command} start one"
        )


def first_and_last_node(nodes: str) -> tuple[str, str]:
    """Of a list of nodes as Slurm writes it: ``rack[0-1]n[03-10,12],login`` is ``rack0n03`` to ``login``."""
    names = re.findall(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    first = re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", names[0])
    return first, re.sub(r"\[[^\]]*?([^\[\],-]+)\]", r"\1", names[-1])


def _host_of_rank_0(environment: Mapping[str, str], starter: Starter) -> str:
    count = environment[starter.world_size]
    if _count(environment, starter.ranks_here) == int(count):
        return "127.0.0.1"
    for name in starter.hosts:
        if environment.get(name):
            return first_and_last_node(environment[name])[0]
    raise UserError(
        f"{starter.command} has started {count} processes and does not say on which hosts: set MASTER_ADDR to the host "
        "of rank 0, the same for all of them"
    )


def _port_of_job(environment: Mapping[str, str], starter: Starter) -> int:
    """A port that all ranks come to alike; on rank 0's host it must be free."""
    identity = ".".join(environment.get(name, "") for name in starter.job)
    port = FIRST_PORT + zlib.crc32(identity.encode()) % NUM_PORTS
    if environment["RANK"] == "0":
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the ranks do
            try:
                probe.bind(("", port))
            except OSError:
                raise UserError(
                    f"port {port}, which follows from the job's id, is taken on rank 0's host: set MASTER_PORT to a "
                    "free one"
                ) from None
    return port


def _count(environment: Mapping[str, str], name: str) -> int:
    value = environment.get(name, "")
    return int(value) if value.isdecimal() else 0  # not isdigit, which is true of ² and of other signs that int refuses


def _option(field: str) -> str:
    return "--" + field.replace("_", "-")
