"""Verdicts on what guards report."""

import dataclasses
import itertools
import os
import signal
import time

import pytest

from codeparrot_ds.supervision.control import RankView
from codeparrot_ds.supervision.heartbeat import Beats, Place
from codeparrot_ds.supervision.watchdog import FLOOR_SECONDS, HUNG, LOST, START_SECONDS, Watchdog

NOW = 1000.0


def view(host="a", *, phase="backward", seconds=0.0, changes=50, steps_done=9, longest=1.0, **values) -> RankView:
    place = Place(
        changes=changes, phase=phase, step=10, batch=2, steps_done=steps_done, seconds=seconds, longest_seconds=longest
    )
    return RankView(**{"host": host, "pid": 7, "place": place, "state": "S", "heard": NOW} | values)


def judge(ranks, ceiling=600.0, now=NOW):
    return Watchdog(ceiling).judge(ranks, now)


def test_ranks_that_are_well():
    assert judge({0: view(), 1: view(seconds=29)}) is None
    assert judge({}) is None


@pytest.mark.parametrize(
    ("values", "limit"),
    [
        ({"longest": 1.0}, FLOOR_SECONDS),
        ({"longest": 8.0}, 80),  # ten times the longest
        ({"longest": 100.0}, 600),  # the ceiling
        ({"phase": "evaluate"}, 600),
        ({"phase": "save"}, 600),
        ({"phase": "start"}, START_SECONDS),
        ({"steps_done": 1}, START_SECONDS),  # compiles and warms up
    ],
)
def test_limits_are_learned(values, limit):
    assert judge({0: view(seconds=limit - 1, **values), 1: view(**values)}) is None
    found = judge({0: view(seconds=limit + 1, **values), 1: view(**values)})
    assert found is not None and found.code == HUNG and found.dump


def test_the_one_that_is_furthest_behind_is_named_and_not_the_one_that_waits_longest():
    ranks = {0: view("a", seconds=40, phase="step", changes=52), 1: view("b", seconds=35, phase="data", changes=51)}
    found = judge(ranks)
    assert found.sentence == (
        "rank 1 on b (process 7) hangs in data of micro-batch 2, step 10, for 40 s; the others wait in step of "
        "micro-batch 2, step 10"
    )


def test_a_process_that_somebody_stopped_has_no_patient_phases():
    stopped = view("b", phase="start", seconds=300, state="T", stopped=NOW - 31)
    found = judge({0: view("a", phase="start", seconds=300), 1: stopped})
    assert found.code == HUNG and found.sentence.startswith(
        "rank 1 on b (process 7) is a stopped process while starting"
    )
    assert judge({0: view(phase="start"), 1: dataclasses.replace(stopped, stopped=NOW - 2)}) is None


def test_a_silent_host_is_lost():
    found = judge({0: view("a"), 1: view("b", heard=NOW - 16), 2: view("b", heard=NOW - 17)})
    assert found.code == LOST and found.hosts == ("b",)
    assert "host b (rank 1, 2) has not responded for 16 s, last in backward of micro-batch 2" in found.sentence
    assert judge({0: view("a"), 1: view("b", heard=NOW - 14)}) is None
    assert judge({0: view("a"), 1: view("b", heard=NOW - 14)}, ceiling=10).code == LOST


def test_one_silent_guard_is_not_a_lost_host():
    found = judge({0: view("a"), 1: view("b", heard=NOW - 16), 2: view("b")})
    assert found.code == LOST and found.hosts == ()
    assert "the guard of rank 1 on b" in found.sentence


def test_a_signal_that_ended_a_rank():
    found = judge({0: view(), 1: view("b", exit_code=-11)})
    assert found.code == LOST and "rank 1 on b (process 7) was killed by SIGSEGV in backward" in found.sentence
    assert "memory" in judge({0: view(exit_code=-9)}).sentence


def test_a_failed_rank_gives_the_others_time_to_say_why():
    watchdog = Watchdog(600)
    ranks = {0: view("a"), 1: view("b", exit_code=1)}
    assert watchdog.judge(ranks, NOW) is None
    assert watchdog.judge(ranks, NOW + 2) is None
    assert watchdog.judge(ranks, NOW + 4).sentence.startswith("rank 1 on b (process 7) failed in backward")
    # All of them say it: the launcher's exit code is theirs.
    assert Watchdog(600).judge({0: view(exit_code=2), 1: view(exit_code=2)}, NOW + 60) is None


def test_beats_are_read_without_asking():
    beats = Beats()
    for step in (1, 2, 3):
        for batch in (1, 2):
            beats.beat("forward", step=step if batch == 1 else None, batch=batch)
    beats.beat("evaluate", step=3, batch=4)
    place = beats.read()
    assert (place.phase, place.step, place.batch, place.steps_done, place.changes) == ("evaluate", 3, 4, 2, 7)
    assert str(place) == "in evaluate, batch 4, step 3"
    assert 0 <= place.seconds < 10 and place.longest_seconds < 10
    assert str(Beats().read()) == "while starting"


def test_what_is_read_while_it_is_written_is_whole():
    """A record of zeros would be of a rank that has hung since the machine was started."""
    beats = Beats()
    writer = os.fork()
    if writer == 0:
        for step in itertools.count(1):
            beats.beat("forward", step=step, batch=step % 7 + 1)
    try:
        deadline = time.monotonic() + 1
        while time.monotonic() < deadline:
            place = beats.read()
            assert place.seconds < 60 and (place.step == 0 or place.batch == place.step % 7 + 1), place
        assert place.step > 1000
    finally:
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
