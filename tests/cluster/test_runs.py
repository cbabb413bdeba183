"""Real runs over ssh and pdsh: the same losses as on one host, and a true word for whatever ends them."""

import json
import os
import signal
import sys
import time

import pytest

from tests.cluster.conftest import OTHER_PORT, STEPS
from tests.cluster.trainings import newest_valid_step, options, outcome, rows
from tests.slurm import step

THREE = "alpha slots=1\nbeta slots=1\ngamma slots=1  # a comment\n"
GONE_SECONDS = 30


def all_gone(cluster, seconds: float = GONE_SECONDS) -> None:
    """No process of a run is left on any host."""
    deadline = time.monotonic() + seconds
    while left := {name: cluster.of_the_run(name) for name in cluster.names if cluster.of_the_run(name)}:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def test_three_hosts_train_as_one_does(on_another_port, train, on_one_host):
    """Over ssh as the user has pdsh call it."""
    cluster = on_another_port
    training = train(cluster, THREE, PDSH_SSH_ARGS_APPEND=f"-p {OTHER_PORT}")
    assert training.wait() == 0, training.said()
    all_gone(cluster)
    assert outcome(training.run)["status"] == "finished"
    record = json.loads((training.run / "run.json").read_text())
    assert record["world_size"] == 3
    assert rows(training.run) == rows(on_one_host(3))


def test_three_hosts_lose_one_and_stop(on_another_port, train, on_one_host):
    """A cut in the network, a restart from the checkpoint, SIGTERM in an evaluation: the losses are one host's.

    And every ssh that this takes has the port that was asked for.
    """
    cluster = on_another_port
    training = train(cluster, THREE, "--ssh-port", str(OTHER_PORT), "--max-restarts", "1", "--hang-seconds", "20")
    training.until_step(13)
    cluster.cut("beta")
    try:
        line = training.until_said("rank lost: ")
    finally:
        cluster.mend("beta")
    assert "host beta (rank 1) has not responded" in line
    assert "restart 1 of 1" in training.until_said("restart")
    training.until_said("resumed from step 10")

    before = training.last_step()
    training.until(lambda: training.last_step() >= 20 and training.last_step() != before)
    training.process.send_signal(signal.SIGTERM)  # the evaluation at step 20 has begun
    asked = time.monotonic()
    assert training.wait() == 0, training.said()
    all_gone(cluster, asked + GONE_SECONDS - time.monotonic())
    stopped = outcome(training.run)
    assert stopped["status"] == "stopped" and 20 <= stopped["step"] < 40
    assert newest_valid_step(training.run) == stopped["step"] == training.last_step()
    alone = [row for row in rows(on_one_host(3)) if row["step"] <= stopped["step"]]
    evaluations = [row["step"] for row in rows(training.run) if "eval_loss" in row]
    assert evaluations == sorted({*range(0, stopped["step"] + 1, 10)})
    assert rows(training.run) == alone


def test_a_host_that_stays_away_is_gone_on_without(cluster, train, on_one_host):
    """Two of three hosts finish what three began: the same rows at another world size."""
    same_masks = ("--dropout", "0")  # at any number of ranks
    training = train(cluster, THREE, "--max-restarts", "1", "--min-hosts", "2", "--hang-seconds", "20", *same_masks)
    training.until_step(13)
    cluster.cut("gamma")
    try:
        assert "host gamma (rank 2) has not responded" in training.until_said("rank lost: ")
        assert "gamma" in training.until_said("continuing without ")
        training.until_said("resumed from step 10")
        assert training.wait() == 0, training.said()
    finally:
        cluster.mend("gamma")
    all_gone(cluster)
    record = json.loads((training.run / "run.json").read_text())
    assert [start["world_size"] for start in record["starts"]] == [3, 2]
    assert outcome(training.run)["status"] == "finished"
    reference = on_one_host(3, *same_masks)
    whole = json.loads((reference / "run.json").read_text())["data"]
    assert record["data"]["rows_per_lane"] == whole["rows_per_lane"]
    mine, alone = rows(training.run), rows(reference)
    assert [row["step"] for row in mine] == [row["step"] for row in alone]
    for row, other in zip(mine, alone, strict=True):
        name = "loss" if "loss" in row else "eval_loss"
        # Up to the checkpoint bit for bit; then gradients are added in another order, in bf16.
        assert row[name] == pytest.approx(other[name], abs=0 if row["step"] <= 10 else 5e-3), row["step"]


def test_two_hosts_of_a_slurm_step_train_as_one_does(cluster, course, on_one_host, tmp_path):
    """Two tasks, which find each other and their network by what srun sets.

    Each host knows its own name by an address that leads no further, as many a Debian does.
    """
    arguments = options(course, "--max-train-steps", str(STEPS), "--output-dir", str(tmp_path / "runs"))
    tasks = []
    for name, variables in zip(("alpha", "beta"), step("alpha,beta", (1, 1), job=os.getpid()), strict=True):
        lines = [
            f"127.0.1.1 {name}",
            *(f"{cluster.address(other)} {other}" for other in cluster.names if other != name),
        ]
        (tmp_path / f"{name}-hosts").write_text("127.0.0.1 localhost\n" + "".join(line + "\n" for line in lines))
        command = f'mount --bind {tmp_path}/{name}-hosts /etc/hosts && exec "$0" "$@"'
        command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", command, sys.executable]
        tasks.append(cluster.popen([*command, "-m", "codeparrot_ds", "train", *arguments], on=name, env=variables))
    try:
        said = [task.communicate(timeout=240) for task in tasks]
    finally:
        for task in tasks:
            task.kill()
    assert [task.returncode for task in tasks] == [0, 0], said
    all_gone(cluster)
    (run,) = (tmp_path / "runs").iterdir()
    assert rows(run) == rows(on_one_host(2))


def test_the_first_host_of_a_slurm_step_takes_the_network_and_not_the_way_to_itself(cluster):
    task = step(f"127.0.1.1,{cluster.address('beta')}", (1, 1), job=1)[0] | {"MASTER_ADDR": "127.0.1.1"}
    said = cluster.run([sys.executable, "-c", CHOOSE], on="alpha", env=task)
    assert said.stdout == "eth0\n", said.stderr


CHOOSE = """
import os
from codeparrot_ds.launch.interface import choose_interface
choose_interface(os.environ)
print(os.environ["GLOO_SOCKET_IFNAME"])
"""
