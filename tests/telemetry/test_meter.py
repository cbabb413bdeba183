"""The arithmetic of a training row, with a clock that the test turns."""

import math

import pytest
import torch

from codeparrot_ds.telemetry import meter as meter_module
from codeparrot_ds.telemetry.meter import Meter


class Clock:
    """Stands in for the ``time`` module of the meter."""

    now = 1000.0

    def perf_counter(self) -> float:
        return self.now


class Loader:
    wait_seconds = 2.0

    def counters(self):
        return {"epoch": 3, "documents": 5}


class Engine:
    skipped_steps = 1
    optimizer = None

    def __init__(self, norm):
        self.norm = norm

    def get_global_grad_norm(self):
        return self.norm

    def get_lr(self):
        return [1e-3, 1e-3]


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(meter_module, "time", clock)
    return clock


@pytest.fixture
def meter(clock):
    return Meter(
        loader=Loader(),
        tokens_per_step=1000,
        flops_per_token=50.0,
        peak_flops=1e6,
        device=torch.device("cpu"),
        tokens=20_000,
        step=20,
        max_train_steps=100,
    )


def test_a_row(meter, clock):
    clock.now += 10.0
    meter.loader.wait_seconds += 1.0
    row = meter.row(25, 3.5, Engine(norm=torch.tensor(0.75)))
    assert row.memory_bytes > 1e6
    assert row.as_json() == {
        "step": 25,
        "tokens": 25_000,
        "epoch": 3,
        "loss": 3.5,
        "learning_rate": 1e-3,
        "grad_norm": 0.75,
        "tokens_per_second": 500.0,
        "mfu": 500.0 * 50.0 / 1e6,
        "step_seconds": 2.0,
        "data_wait_seconds": 0.2,
        "memory_bytes": row.memory_bytes,
        "skipped_steps": 1,
        "loss_scale": 1.0,
    }


def test_a_row_is_of_the_steps_since_the_last_one(meter, clock):
    clock.now += 50.0
    meter.loader.wait_seconds += 7.0
    meter.pause(40.0)
    assert meter.row(25, 3.5, Engine(norm=None)).step_seconds == 2.0  # the evaluation is left out
    clock.now += 3.0
    meter.loader.wait_seconds += 0.5
    row = meter.row(26, 3.25, Engine(norm=None))
    assert (row.tokens, row.step_seconds, row.data_wait_seconds) == (26_000, 3.0, 0.5)
    assert row.tokens_per_second == pytest.approx(1000 / 3) and row.grad_norm is None


def test_the_first_step_of_a_start_counts_from_its_own_construction(clock):
    loader = Loader()
    loader.wait_seconds = 99.0  # of the time before
    meter = Meter(
        loader=loader, tokens_per_step=10, flops_per_token=1.0, peak_flops=1.0, device=torch.device("cpu"),
        tokens=0, step=0, max_train_steps=10,
    )  # fmt: skip
    clock.now += 1.0
    row = meter.row(1, 3.5, Engine(norm=None))
    assert (row.tokens, row.step_seconds, row.data_wait_seconds) == (10, 1.0, 0.0)


def test_tokens_at_a_step_that_has_no_row(meter, clock):
    assert (meter.tokens_at(20), meter.tokens_at(23)) == (20_000, 23_000)
    clock.now += 1.0
    meter.row(25, 3.5, Engine(norm=None))
    assert meter.tokens_at(25) == 25_000 and meter.tokens_at(30) == 30_000


def test_time_left(meter, clock):
    assert math.isnan(meter.seconds_left(20))  # nothing is known yet
    clock.now += 10.0
    meter.row(25, 3.5, Engine(norm=None))
    assert meter.seconds_left(25) == 75 * 2.0 and meter.seconds_left(100) == 0.0
