"""Real runs over ssh and pdsh: the same losses as on one host, and a true word for whatever ends them."""

import json
import signal
import time

from trainings import newest_valid_step, outcome, rows

TWO = "alpha slots=1\nbeta slots=1\n"
THREE = "alpha slots=1\nbeta slots=1\ngamma slots=1  # a comment\n"
GONE_SECONDS = 30


def all_gone(cluster, seconds: float = GONE_SECONDS) -> None:
    """No process of a run is left on any host."""
    deadline = time.monotonic() + seconds
    while left := {name: cluster.of_the_run(name) for name in cluster.names if cluster.of_the_run(name)}:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def test_three_hosts_train_as_one_does(cluster, train, on_one_host):
    training = train(THREE)
    assert training.wait() == 0, training.said()
    all_gone(cluster)
    assert outcome(training.run)["status"] == "finished"
    record = json.loads((training.run / "run.json").read_text())
    assert record["world_size"] == 3
    assert rows(training.run) == rows(on_one_host(3))


def test_two_hosts_stop_and_go_on_and_lose_one_another(cluster, train, on_one_host):
    """SIGTERM in an evaluation, the same command again, and a cut in the network: the losses are one host's."""
    training = train(TWO)
    training.until_step(10)
    training.process.send_signal(signal.SIGTERM)  # the evaluation at step 10 has begun
    asked = time.monotonic()
    assert training.wait() == 0, training.said()
    all_gone(cluster, asked + 30 - time.monotonic())
    stopped = outcome(training.run)
    assert stopped["status"] == "stopped" and 10 <= stopped["step"] < 40
    assert newest_valid_step(training.run) == stopped["step"] == training.last_step()

    training = train(TWO, "--max-restarts", "1", "--hang-seconds", "6")
    training.until_step(stopped["step"] + 3)
    cluster.cut("beta")
    try:
        line = training.until_said("rank lost: ")
    finally:
        cluster.mend("beta")
    assert "host beta (rank 1) has not been heard of" in line
    assert training.wait() == 0, training.said()
    assert "restart 1 of 1" in training.said()
    all_gone(cluster)
    assert rows(training.run) == rows(on_one_host(2))
