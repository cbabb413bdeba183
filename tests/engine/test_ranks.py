"""How ranks agree: two real processes on gloo."""

import subprocess
import sys

import pytest

SCRIPT = """
import json, os, sys, traceback
import torch
from codeparrot_ds.errors import UserError
from codeparrot_ds.engine.ranks import SharedError, join_ranks, leave_ranks

ranks = join_ranks()
answers = {"rank": ranks.rank, "world_size": ranks.world_size, "is_main": ranks.is_main, "device": str(ranks.device)}
answers["broadcast"] = ranks.broadcast({"from": ranks.rank})
answers["gather"] = ranks.gather(f"rank {ranks.rank}")
answers["sum"] = ranks.sum(torch.tensor([1.0, float(ranks.rank)])).tolist()
answers["together"] = ranks.together(lambda: ranks.rank * 10)
ran = []
answers["on_main"] = ranks.on_main(lambda: ran.append(ranks.rank) or f"made by {ranks.rank}")
answers["ran"] = ran

def fail(on, error):
    if ranks.rank in on:
        raise error
    return "fine"

def outcome(work):
    try:
        return [type(work()).__name__]
    except BaseException as error:
        return [type(error).__name__, str(error)]

answers["user error on 1"] = outcome(lambda: ranks.together(lambda: fail([1], UserError("no such tokenizer"))))
answers["user error on all"] = outcome(lambda: ranks.together(lambda: fail([0, 1], UserError("no such tokenizer"))))
answers["disk full on 1"] = outcome(lambda: ranks.together(lambda: fail([1], OSError(28, "No space left on device"))))
answers["bug on 1"] = outcome(lambda: ranks.together(lambda: fail([1], KeyError("x"))))
answers["bug without words on 0"] = outcome(lambda: ranks.together(lambda: fail([0], AssertionError())))
answers["on_main fails"] = outcome(lambda: ranks.on_main(lambda: fail([0], UserError("no permission"))))
answers["still in step"] = ranks.gather(ranks.rank)
leave_ranks()
leave_ranks()
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers(run_ranks):
    return run_ranks(SCRIPT)


def test_who_is_who(answers):
    assert [answer["rank"] for answer in answers] == [0, 1]
    assert [answer["is_main"] for answer in answers] == [True, False]
    assert {answer["world_size"] for answer in answers} == {2} and {answer["device"] for answer in answers} == {"cpu"}


def test_messages(answers):
    for answer in answers:
        assert answer["broadcast"] == {"from": 0}
        assert answer["gather"] == ["rank 0", "rank 1"]
        assert answer["sum"] == [2.0, 1.0]
    assert [answer["together"] for answer in answers] == [0, 10]


def test_on_main_runs_once_and_tells_everyone(answers):
    assert [answer["on_main"] for answer in answers] == ["made by 0", "made by 0"]
    assert [answer["ran"] for answer in answers] == [[0], []]


@pytest.mark.parametrize(
    ("case", "on_rank_0", "on_rank_1"),
    [
        ("user error on 1", ["SharedError", "rank 1: no such tokenizer"], ["SharedError", "rank 1: no such tokenizer"]),
        ("user error on all", ["SharedError", "no such tokenizer"], ["SharedError", "no such tokenizer"]),
        (
            "disk full on 1",
            ["SharedError", "rank 1: [Errno 28] No space left on device"],
            ["SharedError", "rank 1: [Errno 28] No space left on device"],
        ),
        ("bug on 1", ["SharedError", "rank 1: 'x'"], ["KeyError", "'x'"]),
        ("bug without words on 0", ["AssertionError", ""], ["SharedError", "rank 0: AssertionError"]),
        ("on_main fails", ["SharedError", "rank 0: no permission"], ["SharedError", "rank 0: no permission"]),
    ],
)
def test_a_failure_reaches_every_rank(answers, case, on_rank_0, on_rank_1):
    assert [answer[case] for answer in answers] == [on_rank_0, on_rank_1]


def test_nobody_is_out_of_step_after_a_failure(answers):
    assert [answer["still in step"] for answer in answers] == [[0, 1], [0, 1]]


BUSY_THREAD = """
import atexit, concurrent.futures, sys, threading, torch

def work():
    a = torch.randn(100)
    while True:
        a + a

threading.Thread(target=work, daemon=True).start()
threading.Thread(target=lambda: (threading.Event().wait(0.2), print("joined")), daemon=False).start()
atexit.register(lambda: print("exit handler"))
idle = concurrent.futures.ThreadPoolExecutor(1)  # as inductor leaves one: its thread waits for work, and is no daemon
idle.submit(int).result()
from codeparrot_ds.supervision.process_end import end_process
print("last words", end="")
end_process(3)
"""


def test_neither_a_thread_in_torch_aborts_the_end_nor_does_an_idle_pool_hold_it_up():
    # Python's own end aborts here.
    end = subprocess.run([sys.executable, "-c", BUSY_THREAD], capture_output=True, text=True, timeout=60)
    assert (end.returncode, end.stdout, end.stderr) == (3, "last wordsjoined\nexit handler\n", "")
