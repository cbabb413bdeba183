"""Comparing ranks: own times, and who is named."""

import dataclasses
import logging
import time

import pytest
import torch

from codeparrot_ds.engine.ranks import Ranks
from codeparrot_ds.telemetry.rank_times import SLOW_ROWS, RankTimes

ALONE = Ranks(rank=0, world_size=4, local_rank=0, device=torch.device("cpu"), control=None)
HOSTS = ["a", "a", "b", "b"]


def test_own_time_is_the_wait_for_data_and_the_forward_passes(only_rank):
    for stage, least, most in ((2, 0.125, 0.5), (3, 0.1, 0.1)):
        times = RankTimes(only_rank, ["a"], stage)
        for _ in range(4):
            with times.forward():
                time.sleep(0.0125)
        row = times.row(2, data_wait=0.1, step_seconds=1.0)
        assert row["slowest_rank"] == 0 and row["rank_seconds_median"] == row["rank_seconds_max"]
        assert least <= row["rank_seconds_max"] <= most
        assert times.row(2, data_wait=0.1, step_seconds=1.0)["rank_seconds_max"] == 0.1  # of the steps since then


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.WARNING, logger="codeparrot_ds.ranks")
    logging.getLogger("codeparrot_ds.ranks").addHandler(caplog.handler)  # whatever else was set up before
    yield lambda: list(dict.fromkeys(record.getMessage() for record in caplog.records))
    logging.getLogger("codeparrot_ds.ranks").removeHandler(caplog.handler)


def judge(times, *rows):
    for rank, seconds, median in rows:
        times._judge(rank, seconds, median, 2.0)


def test_a_rank_that_is_slow_all_the_time_is_named_once(said):
    times = RankTimes(ALONE, HOSTS, 2)
    judge(times, *[(2, 1.5, 1.0)] * (SLOW_ROWS - 1))
    assert said() == []
    judge(times, *[(2, 1.5, 1.0)] * (3 * SLOW_ROWS))
    assert said() == [
        "rank 2 on b is slow: it takes 1.500 s per step for its data and forward passes, the median rank 1.000 s; "
        "the others wait for it"
    ]


@pytest.mark.parametrize(
    "rows",
    [
        [(2, 1.5, 1.0), (1, 1.5, 1.0)] * SLOW_ROWS,  # in turn
        [(2, 1.2, 1.0)] * 2 * SLOW_ROWS,  # by a little
        [(2, 0.09, 0.01)] * 2 * SLOW_ROWS,  # by what a step does not feel
        ([(2, 1.5, 1.0)] * (SLOW_ROWS - 1) + [(2, 1.0, 1.0)]) * 3,  # now and then
    ],
)
def test_ranks_that_are_not_named(said, rows):
    times = RankTimes(ALONE, HOSTS, 2)
    judge(times, *rows)
    assert said() == []


def test_rank_0_alone_speaks(said):
    judge(RankTimes(dataclasses.replace(ALONE, rank=1), HOSTS, 2), *[(2, 1.5, 1.0)] * 2 * SLOW_ROWS)
    assert said() == []
