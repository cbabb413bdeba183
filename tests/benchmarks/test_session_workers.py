"""The ranks of a GPU session: whatever becomes of one of them, its item has a reason and the next one fresh ranks."""

from __future__ import annotations

import os
import sys
import time

import pytest

from benchmarks.session import workers as module
from benchmarks.session.workers import Workers

RANK = """
import json, os, signal, sys, time
def send(**fields):
    os.write(int(sys.argv[1]), (json.dumps(fields) + "\\n").encode())
rank = int(os.environ["RANK"])
time.sleep(float(os.environ.get("IMPORTS", "0")))
send(ready=True)
for line in sys.stdin:
    does = json.loads(line)["does"]
    send(part={"pid": os.getpid(), "rank": rank})
    if does == "hang" or does == "hang beside a failure" and rank:
        time.sleep(60)
    if does == "start anew":
        time.sleep(1)
        send(more_seconds=30)
        time.sleep(3)
    if does == "die" and rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    if does == "exit" and rank == 0:
        sys.exit(7)
    failed = does in ("fail", "hang beside a failure")
    send(end="failed", error="what was wrong", leaves=does == "hang beside a failure") if failed else send(end="done")
"""


@pytest.fixture
def ranks(tmp_path):
    """Makes so many ranks, which are ended with the test."""
    made = []

    def make(number: int) -> Workers:
        log = made.append((tmp_path / "log.txt").open("w")) or made[-1]
        made.append(Workers([sys.executable, "-c", RANK], number, dict(os.environ), log))
        return made[-1]

    yield make
    for each in reversed(made):
        each.stop() if isinstance(each, Workers) else each.close()


def run(workers: Workers, does: str, seconds: float = 20) -> tuple[str | None, list[dict]]:
    parts: list[dict] = []
    return workers.run({"does": does}, seconds, parts.append), parts


def test_ranks_live_from_one_order_to_the_next(ranks):
    workers = ranks(2)
    (first_error, first), (second_error, second) = run(workers, "work"), run(workers, "work")
    assert first_error is second_error is None
    assert first == second == [{"pid": first[0]["pid"], "rank": 0}]  # rank 0 alone is heard


def test_a_failure_that_leaves_nothing_keeps_the_ranks(ranks):
    workers = ranks(1)
    error, (before,) = run(workers, "fail")
    assert error == "what was wrong"
    assert run(workers, "work") == (None, [before])


@pytest.mark.parametrize(
    ("does", "reason"),
    [
        ("hang", "not done within 2 s"),
        ("die", "its process was ended by SIGKILL"),
        ("exit", "its process ended with exit code 7; the session's log has its last words"),
    ],
)
def test_a_rank_that_breaks_is_a_reason_and_the_next_order_has_another(ranks, does, reason):
    workers = ranks(1)
    error, (before,) = run(workers, does, seconds=2 if does == "hang" else 20)
    assert error == reason
    error, (after,) = run(workers, "work")
    assert error is None and after["pid"] != before["pid"]
    with pytest.raises(ProcessLookupError):
        os.kill(before["pid"], 0)


def test_ranks_do_not_wait_for_one_that_failed(ranks, monkeypatch):
    monkeypatch.setattr(module, "OTHERS_SECONDS", 1.0)
    workers, started = ranks(2), time.monotonic()
    error, _ = run(workers, "hang beside a failure", seconds=50)
    assert error == "rank 0: what was wrong" and time.monotonic() - started < 20
    assert run(workers, "work")[0] is None


def test_what_has_to_start_first_takes_nothing_of_an_orders_time(ranks, monkeypatch):
    monkeypatch.setenv("IMPORTS", "4")
    workers = ranks(2)
    assert run(workers, "start anew", seconds=3)[0] is None
    assert run(workers, "hang", seconds=0.5)[0] == "not done within 0 s"  # 0.5
    assert workers.run({"does": "work"}, 20, lambda part: None, left=0.5) == "not done within 0 s"
