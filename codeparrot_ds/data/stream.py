"""The training stream: packed rows in an order that no world size, worker count or restart can change.

The stream is ``num_lanes`` independent lanes. A lane shuffles, tokenizes and packs its own share of the documents for
ever; row k of the run is the next row of lane ``k % num_lanes``. Whoever serves a lane (any rank, any worker, before or
after a restart) gets the same rows, and the few integers of a LaneState are all that it takes to go on.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from codeparrot_ds.config import RunConfig
from codeparrot_ds.data.encoder import Encoder
from codeparrot_ds.data.packing import Packer
from codeparrot_ds.data.sources import START, BadDocuments, Position, Shard, find_shards, read_documents
from codeparrot_ds.errors import UserError


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """What determines the rows and their order."""

    shards: Sequence[Shard]
    encoder: Encoder
    seq_length: int
    num_lanes: int
    shuffle_buffer: int
    """Documents that are shuffled together, over all lanes."""
    seed: int
    max_bad_documents: int = 100
    """Unreadable documents that a rank skips before it gives up."""

    @property
    def window_documents(self) -> int:
        """Documents that one lane shuffles together."""
        return max(1, math.ceil(self.shuffle_buffer / self.num_lanes))


@dataclass(frozen=True, kw_only=True, slots=True)
class LaneState:
    """Where a lane stands after a row: the shuffle window that it is in, and the place inside."""

    epoch: int = 0
    shard: int = 0
    """Place in this epoch's order of the lane's shards at which the window starts."""
    offset: int = 0
    """Position in that shard at which the window starts: see sources.Position."""
    line: int = 0
    window: int = 0
    """Windows before this one in the epoch."""
    document: int = 0
    """Documents of the permuted window that are finished."""
    token: int = 0
    """Tokens of the next document that earlier rows hold (its end-of-sequence token counts as one)."""
    documents: int = 0
    """Documents finished since the start of the run."""
    tokens: int = 0
    """Tokens in rows since the start of the run."""
    bytes: int = 0
    """UTF-8 bytes of the finished documents."""

    def to_json(self) -> dict[str, int]:
        return asdict(self)

    @classmethod
    def from_json(cls, saved: Mapping[str, int]) -> LaneState:
        names = {field.name for field in fields(cls)}
        if set(saved) != names or not all(type(value) is int and value >= 0 for value in saved.values()):
            raise UserError(f"A saved lane state must hold the counts {', '.join(sorted(names))}, but is {saved}.")
        return cls(**saved)


class Row(NamedTuple):
    """One packed row."""

    ids: np.ndarray
    """Shape (seq_length,), the encoder's dtype."""
    lane: int
    state: LaneState
    """The lane right after the row's last token."""


class LaneShare(NamedTuple):
    """The documents of one lane: those of ``shards`` whose line number (from 0) is ``phase`` modulo ``stride``."""

    shards: Sequence[Shard]
    phase: int
    stride: int


def lane_share(shards: Sequence[Shard], num_lanes: int, lane: int) -> LaneShare:
    """Gives every document to exactly one lane: whole shards, or strides of a shard when there are fewer than lanes."""
    if len(shards) >= num_lanes:
        return LaneShare(shards[lane::num_lanes], 0, 1)
    first = lane % len(shards)
    num_sharers = len(range(first, num_lanes, len(shards)))
    return LaneShare([shards[first]], lane // len(shards), num_sharers)


def lane_rows(config: StreamConfig, lane: int, state: LaneState, bad: BadDocuments) -> Iterator[Row]:
    """The rows of one lane after ``state``, for ever. Reads from the start of the state's window on, nothing before."""
    share = lane_share(config.shards, config.num_lanes, lane)
    packer = Packer(config.seq_length, config.encoder.eos_token_id, config.encoder.dtype)
    while True:
        documents = _epoch_documents(config, share, lane, state, bad)
        while window := list(islice(documents, config.window_documents)):
            state = yield from _window_rows(config, lane, state, packer, [text for text, _, _ in window])
            _, shard, position = window[-1]
            state = replace(
                state,
                shard=shard,
                offset=position.offset,
                line=position.line,
                window=state.window + 1,
                document=0,
            )
        if state.window == 0:
            raise _empty_lane(config.shards, config.num_lanes, lane)
        state = replace(state, epoch=state.epoch + 1, shard=0, offset=0, line=0, window=0)


def _epoch_documents(
    config: StreamConfig, share: LaneShare, lane: int, state: LaneState, bad: BadDocuments
) -> Iterator[tuple[str, int, Position]]:
    """The lane's documents from its window to the end of the epoch, with the place of each one's end."""
    order = _permutation(len(share.shards), config.seed, lane, state.epoch, 0)
    position = Position(state.offset, state.line)
    for place in range(state.shard, len(order)):
        shard = share.shards[order[place]]
        for text, after in read_documents(shard, position, phase=share.phase, stride=share.stride, bad=bad):
            yield text, place, after
        position = START


def _window_rows(
    config: StreamConfig, lane: int, state: LaneState, packer: Packer, window: list[str]
) -> Generator[Row, None, LaneState]:
    """The rows that end in a window of documents; returns the state at its end.

    Documents are encoded one by one: a batch is no faster on one core, and the first row would wait for all of it.
    """
    order = _permutation(len(window), config.seed, lane, state.epoch, 1 + state.window)
    for place in order[state.document :]:
        text = window[place]
        [ids] = config.encoder.encode_batch([text])
        finished = replace(
            state,
            document=state.document + 1,
            token=0,
            documents=state.documents + 1,
            bytes=state.bytes + (len(text) if text.isascii() else len(text.encode())),
        )
        for row, taken in packer.add(ids, start=state.token):
            tokens = finished.tokens + config.seq_length
            finished = replace(finished, tokens=tokens)
            state = finished if taken > len(ids) else replace(state, token=taken, tokens=tokens)
            yield Row(row, lane, state)
        state = finished
    return state


def _permutation(length: int, *key: int) -> np.ndarray:
    """A permutation that depends on nothing but ``key``: NumPy promises stable raw bits, not a stable shuffle."""
    return np.argsort(np.random.PCG64(np.random.SeedSequence(key)).random_raw(length), kind="stable")


class TrainingStream:
    """The rows of one rank (or of one loader worker of it) in the order of the run, for ever.

    Args:
        worker: (index, count) of the loader worker; it serves every count-th row of the rank. ``world_size * count``
            must divide ``num_lanes``, which keeps the lanes of all workers of all ranks apart.
        start_row: global index of the first row, a multiple of the world size.
        lane_states: the states after the rows before ``start_row``, of this rank's lanes at least.
    """

    def __init__(
        self,
        config: StreamConfig,
        *,
        rank: int = 0,
        world_size: int = 1,
        worker: tuple[int, int] = (0, 1),
        start_row: int = 0,
        lane_states: Mapping[int, LaneState] | None = None,
        bad: BadDocuments | None = None,
    ) -> None:
        check_world_size(config.num_lanes, world_size)
        if start_row % world_size or config.num_lanes % (world_size * worker[1]):
            raise ValueError(f"{start_row=}, {world_size=}, {worker=} do not fit {config.num_lanes} lanes")
        self._config = config
        self._bad = BadDocuments(config.max_bad_documents) if bad is None else bad
        self._first_row = start_row + rank + world_size * worker[0]
        self._row_step = world_size * worker[1]
        lanes = range(self._first_row % self._row_step, config.num_lanes, self._row_step)
        self._states = resume_states(config, lanes, start_row, lane_states or {})

    def __iter__(self) -> Iterator[Row]:
        config = self._config
        lanes = {lane: lane_rows(config, lane, state, self._bad) for lane, state in self._states.items()}
        row = self._first_row
        while True:
            yield next(lanes[row % config.num_lanes])
            row += self._row_step


def resume_states(
    config: StreamConfig, lanes: Iterable[int], start_row: int, saved: Mapping[int, LaneState]
) -> dict[int, LaneState]:
    """The states of ``lanes`` at ``start_row``. Raises a UserError when the saved ones belong to another row."""
    states = {}
    for lane in lanes:
        state = states[lane] = saved.get(lane, LaneState())
        num_rows = len(range(lane, start_row, config.num_lanes))
        if state.tokens != num_rows * config.seq_length:
            raise UserError(
                f"The saved data state does not belong to row {start_row} of the run: lane {lane} stands after "
                f"{state.tokens} tokens, not {num_rows * config.seq_length}; resume from another checkpoint."
            )
    return states


def check_world_size(num_lanes: int, world_size: int) -> None:
    """Raises a UserError unless the ranks can share the lanes evenly."""
    if num_lanes % world_size == 0:
        return
    divisors = [count for count in range(1, num_lanes + 1) if num_lanes % count == 0]
    below, above = max(n for n in divisors if n < world_size), min((n for n in divisors if n > world_size), default=0)
    ranks = f"{below} or {above}" if above else f"{below}"
    lanes = math.ceil(num_lanes / world_size) * world_size
    raise UserError(
        f"num_lanes={num_lanes} cannot be shared by {world_size} ranks; use {ranks} ranks, "
        f"or start a new run with num_lanes={lanes}."
    )


def check_lanes(shards: Sequence[Shard], num_lanes: int) -> None:
    """Raises a UserError when a lane has no document. Reads a few documents of each shard only."""
    lane = _find_empty_lane(shards, num_lanes)
    if lane is not None:
        raise _empty_lane(shards, num_lanes, lane)


def _empty_lane(shards: Sequence[Shard], num_lanes: int, lane: int) -> UserError:
    largest = next((n for n in range(num_lanes - 1, 0, -1) if _find_empty_lane(shards, n) is None), None)
    if largest is None:
        return UserError(f"No document can be read from the {len(shards)} shards in {shards[0].path.parent}.")
    return UserError(
        f"Lane {lane} of num_lanes={num_lanes} has no document: the corpus in {shards[0].path.parent} is too small; "
        f"the largest num_lanes that works is {largest}."
    )


def _find_empty_lane(shards: Sequence[Shard], num_lanes: int) -> int | None:
    bad = BadDocuments(limit=None)
    for first in range(min(len(shards), num_lanes)):
        share = lane_share(shards, num_lanes, first)
        phases: set[int] = set()  # the sharers of the shard that have a document
        for shard in share.shards:
            for _, after in read_documents(shard, bad=bad):
                phases.add((after.line - 1) % share.stride)
                if len(phases) == share.stride:
                    break
            if len(phases) == share.stride:
                break
        else:
            phase = min(set(range(share.stride)) - phases)
            return first + phase * len(shards)
    return None


def open_stream(config: RunConfig, encoder: Encoder) -> StreamConfig:
    """The training stream of a run config, after checking that both splits exist and that every lane has a document."""
    shards = find_shards(config.data, "train")
    check_lanes(shards, config.num_lanes)
    find_shards(config.data, "validation")  # said now, not at the first evaluation
    return StreamConfig(
        shards=shards,
        encoder=encoder,
        seq_length=config.seq_length,
        num_lanes=config.num_lanes,
        shuffle_buffer=config.shuffle_buffer,
        seed=config.seed,
    )


def stream_fingerprint(config: StreamConfig) -> dict[str, Any]:
    """What must be equal for saved lane states to mean the same documents, as JSON."""
    return {
        "shards": {shard.name: shard.bytes for shard in config.shards},
        "tokenizer": config.encoder.fingerprint,
        "seq_length": config.seq_length,
        "num_lanes": config.num_lanes,
        "shuffle_buffer": config.shuffle_buffer,
        "seed": config.seed,
    }


def fingerprint_differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """What has changed since ``saved``, a sentence each; empty when the stream can be resumed."""
    differences = []
    for key in ("seq_length", "num_lanes", "shuffle_buffer", "seed"):
        if saved.get(key) != current[key]:
            differences.append(f"{key} is {current[key]}, but the run was started with {saved.get(key)}.")
    if saved.get("tokenizer") != current["tokenizer"]:
        differences.append("The tokenizer is not the one that the run was started with (tokenizer.json differs).")
    before, now = saved.get("shards", {}), current["shards"]
    for name in sorted(before.keys() | now.keys()):
        if name not in now:
            differences.append(f"The shard {name} is gone.")
        elif name not in before:
            differences.append(f"The shard {name} is new.")
        elif before[name] != now[name]:
            differences.append(f"The shard {name} has {now[name]} bytes, but had {before[name]}.")
    return differences
