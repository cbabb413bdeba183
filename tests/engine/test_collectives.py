"""The parts of a step: what is counted as communication, what it would send, and that nothing stays installed."""

import time

import pytest
import torch

from codeparrot_ds.engine.collectives import RING
from codeparrot_ds.telemetry.step_parts import PARTS, Communication, StepParts


class Handle:
    def __init__(self, seconds):
        self.seconds = seconds

    def wait(self):
        time.sleep(self.seconds)


class Backend:
    """Collectives as DeepSpeed's backend has them."""

    def all_reduce(self, tensor, group=None, async_op=False):
        return Handle(0.02)

    def reduce_scatter_tensor(self, output, inputs, group=None):
        self.all_reduce(inputs)  # one made of another
        return Handle(0.0)

    def barrier(self):
        return None


@pytest.fixture
def two_ranks(monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 2)


def test_collectives_are_counted_with_their_bytes_and_finished_at_once(two_ranks):
    backend = Backend()
    communication = Communication(backend, lambda: None)
    with communication.installed():
        backend.all_reduce(torch.zeros(100), async_op=True)
        backend.reduce_scatter_tensor(torch.zeros(50), inputs=torch.zeros(100))
        backend.barrier()
    assert communication.calls == {"all_reduce": 1, "reduce_scatter_tensor": 1}
    assert communication.payload_bytes == {"all_reduce": 400, "reduce_scatter_tensor": 400}
    assert communication.sent_bytes == 400 * 2 * (1 / 2) + 400 * (1 / 2)
    assert communication.seconds >= 0.02
    backend.all_reduce(torch.zeros(100))
    assert communication.calls["all_reduce"] == 1 and "all_reduce" not in vars(backend)


def test_on_one_rank_nothing_is_sent():
    assert all(share(1) == 0 for share in RING.values())
    assert RING["all_reduce"](4) == pytest.approx(1.5) and RING["all_gather_into_tensor"](4) == pytest.approx(0.75)


def test_communication_inside_a_part_is_its_own_part(process_group, two_ranks, monkeypatch):
    import deepspeed.comm.comm as deepspeed_comm

    backend = Backend()
    monkeypatch.setattr(deepspeed_comm, "cdb", backend)
    parts = StepParts(torch.device("cpu"))
    for _ in range(2):
        with parts.step():
            with parts.part("forward"):
                time.sleep(0.01)
            with parts.part("backward"):
                time.sleep(0.03)
                backend.all_reduce(torch.zeros(10))
    found = parts.as_json()
    assert found["steps"] == 2 and set(found["seconds"]) == set(PARTS)
    assert found["seconds"]["forward"] >= 0.01 and found["seconds"]["backward"] >= 0.03
    assert found["seconds"]["communication"] >= 0.02 and found["seconds"]["optimizer"] == 0
    assert found["calls"] == {"all_reduce": 1} and found["sent_bytes"] == 40
    assert sum(found["seconds"].values()) <= found["total_seconds"]  # nothing is counted twice
