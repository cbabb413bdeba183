"""The front door, guards and watchdog around small ranks without torch, each with a fault of its own."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import uuid
from pathlib import Path

import psutil
import pytest

from codeparrot_ds.supervision.supervise import END_FILE, run_to_the_end
from codeparrot_ds.supervision.watchdog import Verdict

REPOSITORY = Path(__file__).resolve().parents[2]
MARK = "CODEPARROT_DS_TEST_SUPERVISE"
# Two ranks that take three steps and then do what the test says; the last lines are those of a good end.
RANK = """
import json, os, signal, sys, threading, time
from pathlib import Path
from codeparrot_ds.supervision.heartbeat import beat
from codeparrot_ds.supervision.guard import asked_early, guard_this_rank, write_stacks_to

run = Path(sys.argv[1])
rank = int(os.environ["RANK"])
guard = os.getpid()
guard_this_rank()
write_stacks_to(run / f"debug_{rank}.log")
def wait():
    while not asked_early():
        time.sleep(0.01)
def record(status):
    (run / "run.json").write_text(json.dumps({"starts": [{}], "outcome": {"status": status, "step": 3}}))
for step in (1, 2, 3):
    beat("data", step=step, batch=1)
beat("backward", batch=1)
"""
LAUNCHER = """
import os, subprocess, sys
command = [sys.executable, "-c", *sys.argv[1:]]
numbers = [{"RANK": str(n), "LOCAL_RANK": str(n)} for n in range(2)]
ranks = [subprocess.Popen(command, env=os.environ | number) for number in numbers]
sys.exit(max(rank.wait() for rank in ranks))
"""


@pytest.fixture
def start(tmp_path, monkeypatch, capfd):
    """Runs the front door around two ranks; returns how it ended and what it said. No process is left then."""
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setenv(MARK, uuid.uuid4().hex)

    def run(do: str, **options):
        script = RANK + textwrap.dedent(do)
        command = [sys.executable, "-c", LAUNCHER, script, str(tmp_path)]
        began = time.monotonic()
        end = run_to_the_end(command, dict(os.environ), tmp_path, **{"hang_seconds": 1.5} | options)
        assert time.monotonic() - began < 30
        assert left_over() == []
        return end, capfd.readouterr().err

    return run


def left_over(seconds: float = 20.0) -> list[list[str]]:
    """Command lines of processes that carry this test's mark and do not end within some seconds; this one's apart."""
    deadline = time.monotonic() + seconds
    while True:
        found = []
        for process in psutil.process_iter():
            try:
                ours = process.pid != os.getpid() and process.environ().get(MARK) == os.environ[MARK]
                if ours and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process.cmdline())
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.05)


ME = re.escape(socket.gethostname())


@pytest.mark.parametrize(("do", "code"), [("", 0), ("if rank == 1: sys.exit(7)", 7)])
def test_hosts_without_rank_0_have_their_own_ranks_word(start, do, code):
    assert start(do, has_rank_0=False)[0].code == code


def test_ranks_that_finish(start):
    end, said = start("if rank == 0: record('finished')")
    assert (end.code, end.verdict, said) == (0, None, "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_reaches_every_rank(start, number, tmp_path):
    def ask():
        while len(list(tmp_path.glob("waits-*"))) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=ask).start()
    end, said = start("(run / f'waits-{rank}').touch()\nwait()\nif rank == 0: record('stopped')")
    assert (end.code, end.asked) == (0, True)
    assert "checkpointing at the next step boundary" in said


def test_a_rank_that_is_killed_is_named(start):
    end, said = start("if rank == 1: os.kill(os.getpid(), signal.SIGKILL)\nwhile True: time.sleep(1)")
    pattern = rf"rank lost: rank 1 on {ME} \(process \d+\) was killed by SIGKILL in backward of micro-batch 1, step 3; "
    assert end.code == 4 and re.search(pattern, said), said


def test_a_rank_whose_guard_is_killed_is_named_and_ends_with_it(start):
    do = "time.sleep(1)\nif rank == 1: os.kill(guard, signal.SIGKILL)\nwhile True: time.sleep(1)"  # it has said hello
    end, said = start(do, hang_seconds=10)
    assert end.code == 4, said
    assert re.search(rf"rank lost: rank 1 on {ME} \(process \d+\) disappeared without an exit code", said), said


def test_a_stopped_process_is_named(start):
    end, said = start("if rank == 1: os.kill(os.getpid(), signal.SIGSTOP)\nbeat('step', batch=1)\ntime.sleep(60)")
    pattern = (
        rf"hang: rank 1 on {ME} \(process \d+\) is a stopped process in backward of micro-batch 1, step 3, for \d s; "
    )
    assert end.code == 5 and re.search(pattern + "the others wait in step of micro-batch 1, step 3; ", said), said


def test_a_rank_that_hangs_is_named_with_every_ranks_stacks(start, tmp_path):
    end, said = start(
        """
        def stuck_in_a_lock():
            time.sleep(60)
        def waiting_for_the_others():
            time.sleep(60)
        if rank == 1: stuck_in_a_lock()
        beat("step", batch=1)
        waiting_for_the_others()
        """
    )
    assert end.code == 5
    assert re.search(rf"hang: rank 1 on {ME} \(process \d+\) hangs in backward of micro-batch 1, step 3, for ", said), (
        said
    )
    assert f"the others wait in step of micro-batch 1, step 3; every rank's Python stacks are in {tmp_path}/log" in said
    assert "waiting_for_the_others" in (tmp_path / "debug_0.log").read_text()
    assert "stuck_in_a_lock" in (tmp_path / "debug_1.log").read_text()


def test_ranks_that_all_hang_in_one_place(start):
    end, said = start("time.sleep(60)")
    assert end.code == 5 and "hang: all 2 ranks hang in backward of micro-batch 1, step 3, for " in said


def test_a_rank_that_fails_ends_the_others_and_a_file_says_so(start, tmp_path, monkeypatch):
    monkeypatch.setenv(END_FILE, str(tmp_path / "end.json"))
    end, said = start("if rank == 1: sys.exit(1)\nwhile True: time.sleep(1)")
    saved = json.loads((tmp_path / "end.json").read_text())
    assert saved["code"] == 1 and Verdict(**saved["verdict"] | {"hosts": ()}) == end.verdict
    assert end.code == 1 and re.search(rf"failed: rank 1 on {ME} .* failed in backward .* \(exit code 1\)", said), said


def test_a_killed_front_door_stops_its_ranks(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setenv(MARK, uuid.uuid4().hex)
    front_door = (
        "import os, pathlib, sys; from codeparrot_ds.supervision.supervise import run_to_the_end; "
        "run_to_the_end(sys.argv[2:], dict(os.environ), pathlib.Path(sys.argv[1]))"
    )
    do = "(run / f'waits-{rank}').touch()\nwait()\n(run / f'saved-{rank}').touch()"
    command = [
        sys.executable,
        "-c",
        front_door,
        str(tmp_path),
        sys.executable,
        "-c",
        LAUNCHER,
        RANK + do,
        str(tmp_path),
    ]
    with subprocess.Popen(command) as process:
        deadline = time.monotonic() + 20
        while len(list(tmp_path.glob("waits-*"))) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
    assert left_over() == []
    assert {path.name for path in tmp_path.glob("saved-*")} == {"saved-0", "saved-1"}


def test_a_stranger_is_not_heard(tmp_path):
    """Who does not know the token speaks for no rank."""
    from codeparrot_ds.supervision.control import ControlServer

    server = ControlServer()
    try:
        with socket.create_connection(("127.0.0.1", server.port)) as stranger:
            stranger.sendall(json.dumps({"token": "guess", "rank": "0", "host": "a", "pid": 1}).encode() + b"\n")
            for _ in range(5):
                server.turn(0.05)
            assert server.ranks == {} and not server.listening()
            assert stranger.recv(1) == b""  # hung up on
    finally:
        server.close()
