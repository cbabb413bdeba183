"""Stopping: real signals set a flag, and one rank's flag stops all."""

import os
import signal
import time

import pytest
import torch

from codeparrot_ds.engine.ranks import Ranks
from codeparrot_ds.supervision.process_end import STOP_SIGNALS
from codeparrot_ds.training.stopping import StopSignal


@pytest.fixture
def stop():
    previous = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    alone = Ranks(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"), control=None)
    yield StopSignal(alone)
    for number, handler in previous.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_asks_and_nothing_more(stop, number):
    assert not stop.agreed()
    os.kill(os.getpid(), number)
    assert stop.agreed()
    os.kill(os.getpid(), number)  # the launcher may repeat it
    assert stop.agreed()


def test_a_limit_of_hours_asks_once_it_is_over(monkeypatch, stop):
    now = time.monotonic()
    limited = StopSignal(stop._ranks, max_hours=0.5)
    assert not limited.agreed()
    monkeypatch.setattr(time, "monotonic", lambda: now + 1900)
    assert limited.agreed() and not stop.agreed()


SCRIPT = """
import json, os, signal
import torch
import torch.distributed as dist
from codeparrot_ds.engine.ranks import Ranks
from codeparrot_ds.training.stopping import StopSignal

dist.init_process_group("gloo")
rank = dist.get_rank()
control = dist.new_group(backend="gloo")
ranks = Ranks(rank=rank, world_size=2, local_rank=rank, device=torch.device("cpu"), control=control)
stop = StopSignal(ranks)
answers = []
for step in range(4):
    if rank == 1 and step == 2:
        os.kill(os.getpid(), signal.SIGTERM)
    answers.append(stop.agreed())
dist.destroy_process_group()
print(json.dumps(answers))
"""


def test_all_ranks_stop_at_the_same_step_when_one_was_asked(run_ranks):
    assert run_ranks(SCRIPT) == [[False, False, True, True]] * 2
