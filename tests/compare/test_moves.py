"""The neighbours of a config in a search: what is proposed, what can be, and the JSON of it."""

import dataclasses

import pytest

from codeparrot_ds.compare.search import Point, can_be, config_at, micro_batch_sizes, moves, point_of, starts
from codeparrot_ds.ds_config.file import open_ds_config

HERE = Point(stage=2, micro_batch_size=4, bucket=50_000_000)
SIZES = [1, 2, 4, 8]


def words(point, fits=lambda point: True, world_size=2, parameters=10**9):
    return [move.words for move in moves(point, SIZES, world_size=world_size, parameters=parameters, fits=fits)]


@pytest.mark.parametrize(
    "name", ["zero0", "zero1_fp32", "zero2_activation_checkpointing", "zero2_offload", "zero3_offload", "zero3"]
)
def test_the_point_of_a_config_gives_the_config_back(name):
    config = open_ds_config(name).config
    again = config_at(config, point_of(config, 4))
    for block in ("offload_optimizer", "offload_param"):
        assert again["zero_optimization"].get(block) == config["zero_optimization"].get(block)
    assert point_of(again, 4) == point_of(config, 4)
    assert {key: value for key, value in again.items() if key != "zero_optimization"} == {
        key: value for key, value in config.items() if key != "zero_optimization"
    }


def test_a_config_at_another_point_keeps_what_the_point_does_not_say():
    base = open_ds_config("zero3_offload").config
    there = config_at(base, Point(stage=1, micro_batch_size=2, checkpointing=True, bucket=7_000_000))
    assert there["zero_optimization"] == {"stage": 1, "reduce_bucket_size": 7_000_000, "overlap_comm": True}
    assert there["activation_checkpointing"] == {} and there["bf16"] == base["bf16"]
    assert there["optimizer"] == base["optimizer"]
    assert base["zero_optimization"]["stage"] == 3  # and the base is as it was
    assert config_at(base, Point(stage=0, micro_batch_size=2))["zero_optimization"] == {"stage": 0}
    offloaded = config_at(there, Point(stage=3, micro_batch_size=2, offload="parameters"))["zero_optimization"]
    assert offloaded["offload_optimizer"]["device"] == offloaded["offload_param"]["device"] == "cpu"


def test_micro_batches_divide_a_step():
    assert micro_batch_sizes(12, 2) == [1, 2, 3, 6]
    assert micro_batch_sizes(9, 2) == []


def test_where_all_fits_neighbours_change_one_thing_and_save_no_memory_for_nothing():
    assert words(HERE) == [
        "micro-batch 8", "stage 1", "stage 3", "micro-batch 2", "bucket 1.25e+07", "bucket 2e+08",
    ]  # fmt: skip
    assert words(HERE, world_size=1) == ["micro-batch 8", "stage 1", "stage 3", "micro-batch 2"]
    assert "bucket 2e+08" not in words(HERE, parameters=5_000_000)


def test_recomputing_and_offloading_are_taken_back_first():
    costly = dataclasses.replace(HERE, stage=3, checkpointing=True, offload="parameters", micro_batch_size=8)
    assert words(costly)[:2] == ["no checkpointing", "offload optimizer"]


def test_room_is_made_only_where_a_larger_micro_batch_does_not_fit():
    def fits(point):
        return point.micro_batch_size <= 4 or point.checkpointing or point.offload != "none"

    assert words(HERE, fits)[-2:] == ["checkpointing and micro-batch 8", "offload optimizer and micro-batch 8"]


@pytest.mark.parametrize(
    ("offload", "lowest"), [("none", 0), ("optimizer", 1), ("parameters", 3)]
)  # fmt: skip
def test_what_deepspeed_has(offload, lowest):
    stages = [stage for stage in range(4) if can_be({}, Point(stage=stage, micro_batch_size=1, offload=offload))]
    assert stages == list(range(lowest, 4))
    states = open_ds_config("zero2_bf16_states").config
    assert not can_be(states, Point(stage=0, micro_batch_size=1))


def test_a_start_at_each_stage_costs_as_little_time_as_fits():
    def fits(point):  # stage 0 does not, 1 only with an offloaded optimizer, 2 only with checkpointing or small rows
        needed = {0: 100, 1: 12, 2: 6, 3: 2}[point.stage] + point.micro_batch_size * (1 if point.checkpointing else 3)
        return needed - 8 * (point.offload != "none") <= 10 and can_be({}, point)

    found = {move.point.stage: move.point for move in starts(HERE, SIZES, fits)}
    assert found == {
        1: Point(stage=1, micro_batch_size=2, offload="optimizer", bucket=HERE.bucket),
        2: Point(stage=2, micro_batch_size=1, bucket=HERE.bucket),
        3: Point(stage=3, micro_batch_size=2, bucket=HERE.bucket),
    }
