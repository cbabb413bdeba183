"""The configs around a config: one change each of stage, micro-batch, checkpointing, offload and bucket. Pure.

A search starts from what the user has and from the fastest way to fit at each stage, and then climbs: from the fastest
config so far to its neighbours, as long as one is faster.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from codeparrot_ds.zero.ds_config import activation_checkpointing, offload_device, precision, value_at, zero_stage

OFFLOADS = ("none", "optimizer", "parameters")
"""What is offloaded to the host's memory; parameters only together with the optimizer, and only at stage 3."""
DEFAULT_BUCKET = 500_000_000
BUCKET_FACTOR, SMALLEST_BUCKET = 4, 1_000_000
_CHECKPOINTING = {"partition_activations": False, "cpu_checkpointing": False}
_OFFLOAD = {"device": "cpu", "pin_memory": True}


@dataclass(frozen=True, kw_only=True)
class Point:
    """What a search changes of a config.

    Attributes:
        stage: of ZeRO, 0 to 3.
        micro_batch_size: rows a rank a forward pass.
        checkpointing: activations are computed again in the backward pass.
        offload: one of `OFFLOADS`.
        bucket: ``reduce_bucket_size``, in numbers.
    """

    stage: int
    micro_batch_size: int
    checkpointing: bool = False
    offload: str = "none"
    bucket: int = DEFAULT_BUCKET

    def __str__(self) -> str:
        parts = [f"stage {self.stage}", f"micro-batch {self.micro_batch_size}"]
        parts += ["checkpointing"] * self.checkpointing
        parts += [f"offload {self.offload}"] * (self.offload != "none")
        parts += [f"bucket {self.bucket:.3g}"] * (self.stage > 0)
        return ", ".join(parts)


@dataclass(frozen=True, kw_only=True)
class Move:
    """One change of a point, in words."""

    words: str
    point: Point


Fits = Callable[[Point], bool]


def point_of(ds_config: Mapping[str, Any], micro_batch_size: int) -> Point:
    """Where a config lies."""
    offload = "none"
    if offload_device(ds_config, "optimizer") != "none":
        offload = "parameters" if offload_device(ds_config, "parameters") != "none" else "optimizer"
    bucket = value_at(ds_config, ("zero_optimization", "reduce_bucket_size"))
    return Point(
        stage=zero_stage(ds_config),
        micro_batch_size=micro_batch_size,
        checkpointing=activation_checkpointing(ds_config),
        offload=offload,
        bucket=bucket if isinstance(bucket, int) and not isinstance(bucket, bool) else DEFAULT_BUCKET,
    )


def config_at(base: Mapping[str, Any], point: Point) -> dict[str, Any]:
    """The config of a point; what the point does not say (precision, optimizer, dtypes, …) is the base's."""
    config = copy.deepcopy(dict(base))
    zero: dict[str, Any] = dict(config.get("zero_optimization") or {})
    zero["stage"] = point.stage
    for key in ("offload_optimizer", "offload_param"):
        zero.pop(key, None)
    if point.stage == 0:
        zero = {"stage": 0}
    else:
        zero["reduce_bucket_size"] = point.bucket
    if point.stage < 3:
        zero = {key: value for key, value in zero.items() if not key.startswith("stage3_")}
    if point.offload != "none":
        zero["offload_optimizer"] = dict(_OFFLOAD)
    if point.offload == "parameters":
        zero["offload_param"] = dict(_OFFLOAD)
    config["zero_optimization"] = zero
    if not point.checkpointing:
        config.pop("activation_checkpointing", None)
    elif config.get("activation_checkpointing") is None:
        config["activation_checkpointing"] = dict(_CHECKPOINTING)
    return config


def can_be(base: Mapping[str, Any], point: Point) -> bool:
    """Whether DeepSpeed has such a config: offloading needs a stage, offloaded parameters stage 3."""
    lowest = {"none": 0, "optimizer": 1, "parameters": 3}[point.offload]
    keeps_masters_in_bf16 = value_at(base, (precision(base), "bf16_master_weights_and_grads")) is True
    return point.stage >= max(lowest, 1 if keeps_masters_in_bf16 else 0)


def micro_batch_sizes(global_batch_size: int, world_size: int) -> list[int]:
    """Every number of rows a rank a forward pass that divides a step."""
    rows = global_batch_size // world_size
    return [size for size in range(1, rows + 1) if rows % size == 0] if global_batch_size % world_size == 0 else []


def starts(base: Point, sizes: list[int], fits: Fits) -> Iterator[Move]:
    """The fastest way to fit at each stage, as far as the plan tells: without recomputing and offloading where it can.

    Args:
        base: where the user's config lies; its bucket is kept.
        sizes: micro-batches that divide a step.
        fits: whether the plan says that a point fits.
    """
    for stage in range(4):
        ways = [
            Point(stage=stage, micro_batch_size=1, checkpointing=checkpointing, offload=offload, bucket=base.bucket)
            for offload in OFFLOADS
            for checkpointing in (False, True)
        ]
        for way in ways:
            size = largest(way, sizes, fits, at_most=max(base.micro_batch_size, sizes[0]))
            if size is not None:
                yield Move(words=f"stage {stage}", point=replace(way, micro_batch_size=size))
                break


def largest(way: Point, sizes: list[int], fits: Fits, at_most: int) -> int | None:
    """The largest micro-batch up to a size that fits; None where none does."""
    fitting = [size for size in sizes if size <= at_most and fits(replace(way, micro_batch_size=size))]
    return max(fitting, default=None)


def moves(point: Point, sizes: list[int], *, world_size: int, parameters: int, fits: Fits) -> list[Move]:
    """The neighbours of a point, those first that gain most where they gain.

    Recomputing and offloading cost time and give memory. They are taken back where they are on, and begun only where
    they make room for a larger micro-batch that does not fit otherwise. A bucket larger than the model changes nothing.
    """
    found = []
    larger = next((size for size in sizes if size >= 2 * point.micro_batch_size), None)
    smaller = next((size for size in reversed(sizes) if 2 * size <= point.micro_batch_size), None)
    if larger is not None:
        found.append(Move(words=f"micro-batch {larger}", point=replace(point, micro_batch_size=larger)))
    if point.checkpointing:
        found.append(Move(words="no checkpointing", point=replace(point, checkpointing=False)))
    if point.offload != "none":
        less = OFFLOADS[OFFLOADS.index(point.offload) - 1]
        found.append(Move(words=f"offload {less}", point=replace(point, offload=less)))
    for stage in (point.stage - 1, point.stage + 1):
        if 0 <= stage <= 3:
            found.append(Move(words=f"stage {stage}", point=replace(point, stage=stage)))
    if smaller is not None:
        found.append(Move(words=f"micro-batch {smaller}", point=replace(point, micro_batch_size=smaller)))
    if point.stage > 0 and world_size > 1:
        buckets = [point.bucket // BUCKET_FACTOR] if point.bucket >= BUCKET_FACTOR * SMALLEST_BUCKET else []
        buckets += [point.bucket * BUCKET_FACTOR] if point.bucket < parameters else []
        found += [Move(words=f"bucket {bucket:.3g}", point=replace(point, bucket=bucket)) for bucket in buckets]
    if larger is not None and not fits(replace(point, micro_batch_size=larger)):
        room = replace(point, micro_batch_size=larger)
        if not point.checkpointing:
            words = f"checkpointing and micro-batch {larger}"
            found.append(Move(words=words, point=replace(room, checkpointing=True)))
        if point.offload != OFFLOADS[-1]:
            more = OFFLOADS[OFFLOADS.index(point.offload) + 1]
            words = f"offload {more} and micro-batch {larger}"
            found.append(Move(words=words, point=replace(room, offload=more)))
    return found
