"""Which rank a process is that srun, mpirun or torchrun started, and where the ranks meet."""

import os
import socket

import pytest

from codeparrot_ds.cli.main import main
from codeparrot_ds.errors import UserError
from codeparrot_ds.launch import starters
from codeparrot_ds.launch.starters import find_starter, first_and_last_node, name_rank
from tests.slurm import batch, step

OMPI = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4"}
MVAPICH = {"MV2_COMM_WORLD_RANK": "3", "MV2_COMM_WORLD_LOCAL_RANK": "1", "MV2_COMM_WORLD_SIZE": "4"}
HYDRA = {"PMI_RANK": "3", "MPI_LOCALRANKID": "1", "PMI_SIZE": "4"}
CRAY = {"PMI_RANK": "3", "PMI_LOCAL_RANK": "1", "PMI_SIZE": "4"}
TORCHRUN = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "node-0", "MASTER_PORT": "29400"}
SRUN = step("node[01-02]", (2, 2), job=7)[3]
HELPER = step("node[01-02]", (1, 1), job=7)[1]
"""Of what mpirun starts on each node of a Slurm job to start its ranks there."""


@pytest.mark.parametrize(
    ("environment", "command"),
    [
        (SRUN, "srun"),
        (OMPI, "mpirun"),
        (MVAPICH, "mpirun"),
        (HYDRA, "mpiexec"),
        (CRAY, "mpiexec"),
        (TORCHRUN, "torchrun"),
        (SRUN | {"PMI_RANK": "3", "PMI_SIZE": "4"}, "srun"),  # --mpi=pmi2
        (HELPER | OMPI, "mpirun"),
        (HELPER | HYDRA, "mpiexec"),
    ],
)
def test_one_of_several_knows_its_number(environment, command):
    environment = {"SLURM_JOB_NODELIST": "node[01-02]"} | environment
    starter = find_starter(environment)
    assert starter.command == command
    name_rank(environment, starter)
    assert (environment["RANK"], environment["LOCAL_RANK"], environment["WORLD_SIZE"]) == ("3", "1", "4")
    assert environment["MASTER_ADDR"] == ("node-0" if command == "torchrun" else "node01")


@pytest.mark.parametrize(
    "environment",
    [
        {},
        batch("node[01-02]", 4, job=7),
        batch("node[01-02]", 4, job=7) | {"SLURM_STEP_NUM_TASKS": "4"},  # left by whoever submitted it from a step
        batch("node[01-02]", 4, job=7) | {"MASTER_ADDR": "node01", "MASTER_PORT": "29500"},  # exported for srun
        step("node01", (1,), job=7)[0],  # srun --pty bash, or a launcher for each node
        OMPI | {"OMPI_COMM_WORLD_SIZE": "1"},
        {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "pod-0"},  # of containers, not of ranks
        {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"},
    ],
)
def test_one_alone_starts_its_own_ranks(environment):
    assert find_starter(environment) is None


def test_who_cannot_know_its_number_is_refused():
    with pytest.raises(
        UserError, match="mpiexec has started 4 processes without PMI_RANK and .*: set RANK, LOCAL_RANK"
    ):
        find_starter({"PMI_RANK": "3", "PMI_SIZE": "4"})


def meeting(environment, **given):
    environment = dict(environment)
    name_rank(environment, find_starter(environment), **given)
    return environment["MASTER_ADDR"], environment["MASTER_PORT"]


def test_ranks_of_a_job_meet_at_one_place_and_other_jobs_elsewhere():
    places = [{meeting(task) for task in step("node[01-02]", (2, 2), job=job, number=n)} for job, n in ((7, 0), (7, 1))]
    places += [{meeting(OMPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4", "PMIX_NAMESPACE": name})} for name in ("a@1", "b@1")]
    assert all(len(place) == 1 for place in places)
    (first, second, third, fourth) = (place.pop() for place in places)
    assert len({port for _, port in (first, second, third, fourth)}) == 4
    assert all(10_000 <= int(port) < 30_000 for _, port in (first, second, third, fourth))
    assert first[0] == second[0] == "node01" and third[0] == "127.0.0.1"


def test_what_the_user_says_of_the_meeting_place_counts():
    port = meeting(SRUN)[1]
    assert meeting(SRUN | {"MASTER_ADDR": "ib01"}) == ("ib01", port)
    assert meeting(SRUN | {"MASTER_PORT": "29500"}) == ("node01", "29500")
    both = {"MASTER_ADDR": "ib01", "MASTER_PORT": "29500"}
    assert meeting(SRUN | both) == ("ib01", "29500")
    assert meeting(SRUN | both, addr="ib02", port=29501) == ("ib02", "29501")


def test_a_meeting_place_that_nobody_can_know():
    with pytest.raises(
        UserError, match="mpirun has started 4 processes and does not say on which hosts: set MASTER_AD"
    ):
        meeting(OMPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"})


def test_a_port_that_is_taken():
    task = step("node01", (2,), job=7)[0]
    port = meeting(task)[1]
    with socket.create_server(("", int(port))), pytest.raises(UserError, match=f"port {port}, which follows from the"):
        meeting(task)


@pytest.mark.parametrize(
    ("nodes", "ends"),
    [
        ("node1", ("node1", "node1")),
        ("node1,node2", ("node1", "node2")),
        ("node[01-04,07],login", ("node01", "login")),
        ("node[7,9-12]", ("node7", "node12")),
        ("node[7]", ("node7", "node7")),
        ("a1,rack[0-1]n[03-10,12]", ("a1", "rack1n12")),
        ("gpu[2-3]-ib", ("gpu2-ib", "gpu3-ib")),
        ("a-b.lab[1-2].org", ("a-b.lab1.org", "a-b.lab2.org")),
        ("10.0.0.[1-2]", ("10.0.0.1", "10.0.0.2")),
    ],
)
def test_the_ends_of_a_list_of_nodes(nodes, ends):
    assert first_and_last_node(nodes) == ends


@pytest.fixture
def task(monkeypatch):
    """This process is a task of srun, and another program in its place would be this one."""
    for name, value in step("node[01-02]", (1, 1), job=os.getpid())[0].items():
        monkeypatch.setenv(name, value)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PYTHONPATH"):
        monkeypatch.setenv(name, "")  # so that what is set here is taken back
        monkeypatch.delenv(name)
    became = []
    monkeypatch.setattr(starters.os, "execv", lambda program, words: became.append(words))
    return became


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (
            "train demo --num-gpus 2",
            "--num-gpus does not go with srun, which has started 2 processes, each of them a rank",
        ),
        ("train demo --hostfile hosts", "--hostfile does not go with srun"),
        ("train demo --include localhost:0", "--include does not go with srun"),
        ("demo", "srun has started 2 processes, and demo starts its ranks itself: have srun start one"),
        ("compare zero1 zero2", "srun has started 2 processes, and compare starts its ranks itself"),
    ],
)
def test_several_runs_are_refused(task, capsys, command, words):
    assert main(command.split()) == 2
    assert words in capsys.readouterr().err and not task


def test_options_that_srun_stands_in_for_are_warned_of(task, capsys, monkeypatch):
    monkeypatch.setattr("codeparrot_ds.launch.start.front_door", lambda *args, **options: 0)  # behind execv
    assert main("train demo --max-restarts 2 --master-port 29512".split()) == 0
    said = capsys.readouterr().err
    assert "srun has started 2 ranks: they train one run and meet at node01:29512" in said
    assert "warning: --max-restarts does nothing: srun watches the ranks" in said
    assert task[0][1:] == "-m codeparrot_ds.train demo --max-restarts 2 --master-port 29512".split()


def test_a_launcher_for_each_host_may_be_started_by_srun(task, monkeypatch):
    """``srun --ntasks-per-node 1 codeparrot-ds train --no-ssh --node-rank …``: hosts that meet in one run."""
    seen = []
    monkeypatch.setattr(
        "codeparrot_ds.launch.start.front_door", lambda config, launch, **options: seen.append(launch) or 0
    )
    meet = "--no-ssh --node-rank 0 --master-addr node01 --master-port 29500"
    assert main(f"train demo --hostfile hosts --run-name one {meet}".split()) == 0
    assert seen[0].no_ssh and not task
