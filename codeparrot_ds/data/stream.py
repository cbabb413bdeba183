"""The training stream: packed rows in an order that no world size, worker count or restart can change.

The stream is ``num_lanes`` independent lanes. A lane shuffles, tokenizes and packs its own share of the documents for
ever; row k of the run is the next row of lane ``k % num_lanes``. Whoever serves a lane (any rank, any worker, before or
after a restart) gets the same rows, and the few integers of its LaneStates are all that it takes to continue.

Several data sets are mixed row by row: each lane has a place in each of them, and takes its next row from the one that
is furthest behind its weight.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import islice
from typing import Any

import numpy as np

from codeparrot_ds.data.encoder import Encoder
from codeparrot_ds.data.packing import Packer
from codeparrot_ds.data.shards import BadDocuments, content_id, read_documents, read_texts
from codeparrot_ds.errors import UserError
from codeparrot_ds.rows.files import TABLES, Shard, is_splittable
from codeparrot_ds.rows.reading import START, Piece, Position

ORDER_VERSION = 2
"""Changes with whatever makes the same data give other rows: pieces, windows, permutations, reading, encoding, packing.

Version 1 lost the first document behind a byte order mark, read no bytes as text, took JSON lines for granted, and
made a border of every special token in a text. Documents without any of these have the same rows in both.
"""
ORDER_VERSIONS = (1, ORDER_VERSION)
"""Those that a run can continue with; it keeps the one that it began with."""
MIN_PIECE_BYTES, MAX_PIECE_BYTES = 1 << 15, 1 << 24
PIECES_PER_LANE = 16
"""Each epoch takes a lane's pieces in another order, which mixes further than a window does."""


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """The shards of one data set and its share of the rows."""

    name: str
    shards: Sequence[Shard]
    weight: float = 1.0
    """Relative to the other data sets' weights; rows have one length, so this is the share of the tokens."""


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """What determines the rows and their order."""

    datasets: Sequence[Dataset]
    encoder: Encoder
    seq_length: int
    num_lanes: int
    shuffle_buffer: int
    """Documents that are shuffled together, over all lanes."""
    seed: int
    max_bad_documents: int = 100
    """Unreadable documents that a rank skips before it gives up."""
    order_version: int = ORDER_VERSION
    """Of ``ORDER_VERSIONS``; shards and encoder belong to it (``datasets.stream_of``)."""

    @property
    def window_documents(self) -> int:
        """Documents that one lane shuffles together."""
        return max(1, math.ceil(self.shuffle_buffer / self.num_lanes))


@dataclass(frozen=True, kw_only=True, slots=True)
class LaneState:
    """Where a lane stands in a data set after a row: the shuffle window that it is in, and the place inside."""

    epoch: int = 0
    piece: int = 0
    """Place, in this epoch's order of the lane's pieces, of the one in which the window starts."""
    offset: int = 0
    """Position in that piece at which the window starts: see ``rows.reading.Position``."""
    line: int = 0
    frame: int = 0
    window: int = 0
    """Windows before this one in the epoch."""
    document: int = 0
    """Documents of the permuted window that are finished."""
    token: int = 0
    """Tokens of the next document that earlier rows hold (its end-of-sequence token counts as one)."""
    documents: int = 0
    """Documents finished since the start of the run."""
    characters: int = 0
    """Characters of the finished documents."""
    bytes: int = 0
    """UTF-8 bytes of the finished documents."""
    tokens: int = 0
    """Tokens in rows since the start of the run."""

    def to_json(self) -> dict[str, int]:
        return asdict(self)

    @classmethod
    def from_json(cls, saved: Mapping[str, int]) -> LaneState:
        if set(saved) != set(STATE_FIELDS) or not all(type(value) is int and value >= 0 for value in saved.values()):
            raise UserError(f"A saved lane state must hold the counts {', '.join(STATE_FIELDS)}, but is {saved}.")
        return cls(**saved)

    def to_array(self) -> np.ndarray:
        """Shape (fields,), int64, in the order of STATE_FIELDS."""
        return np.array([getattr(self, name) for name in STATE_FIELDS], dtype=np.int64)

    @classmethod
    def from_array(cls, values: np.ndarray) -> LaneState:
        return cls(**dict(zip(STATE_FIELDS, values.tolist(), strict=True)))


STATE_FIELDS = tuple(field.name for field in fields(LaneState))
_FIELD = {name: place for place, name in enumerate(STATE_FIELDS)}
LaneStates = tuple[LaneState, ...]
"""A lane's state in every data set, in the order of StreamConfig.datasets."""


# --------------------------------------------------------------------------------------------------------------------
# Who reads what


def lane_pieces(shards: Sequence[Shard], num_lanes: int, lane: int) -> list[Piece]:
    """The lane's share of a data set; every document is in exactly one piece of one lane.

    Shards in which a reader can start anywhere are laid end to end and cut into pieces of one size, dealt to the lanes
    in turn: the lanes' shares differ by one document per piece at most. Other shards, such as compressed ones, go whole
    to the lane that has least so far or, when there are fewer than lanes, line by line to several lanes, each of which
    reads it all.
    """
    pieces = _dealt_pieces(list(filter(is_splittable, shards)), num_lanes, lane)
    return pieces + _whole_pieces([shard for shard in shards if not is_splittable(shard)], num_lanes, lane)


def _dealt_pieces(shards: Sequence[Shard], num_lanes: int, lane: int) -> list[Piece]:
    total = sum(shard.bytes for shard in shards)
    piece_bytes = min(max(total // num_lanes // PIECES_PER_LANE, MIN_PIECE_BYTES), MAX_PIECE_BYTES)
    # Whole rounds: every lane gets equally many pieces, of nearly equal size.
    rounds = max(1, round(total / num_lanes / piece_bytes))
    count = rounds * num_lanes
    pieces = []
    shard_ends = np.cumsum([0, *(shard.bytes for shard in shards)]).tolist()
    for number in range(lane, count, num_lanes):
        begin, end = total * number // count, total * (number + 1) // count
        first = int(np.searchsorted(shard_ends, begin, side="right")) - 1
        for shard, start in zip(shards[first:], shard_ends[first:-1], strict=True):
            if start >= end:
                break
            inside = max(0, begin - start), min(shard.bytes, end - start)
            if inside[0] < inside[1]:
                pieces.append(Piece(shard, *inside))
    return pieces


def _whole_pieces(shards: Sequence[Shard], num_lanes: int, lane: int) -> list[Piece]:
    shards = [shard for shard in shards if shard.bytes]
    if not shards:
        return []
    if len(shards) < num_lanes:
        shard = shards[lane % len(shards)]
        sharers = len(range(lane % len(shards), num_lanes, len(shards)))
        return [Piece(shard, 0, shard.bytes, lane // len(shards), sharers)]
    shares: list[tuple[int, int]] = [(0, number) for number in range(num_lanes)]  # (bytes, lane), a heap
    mine = []
    for shard in sorted(shards, key=lambda shard: -shard.bytes):
        size, owner = heapq.heappop(shares)
        heapq.heappush(shares, (size + shard.bytes, owner))
        if owner == lane:
            mine.append(Piece(shard, 0, shard.bytes))
    return mine


def describe_place(config: StreamConfig, lane: int, before: np.ndarray, after: np.ndarray) -> str:
    """Where in the shards the rows of a lane come from, for people: the shuffle window in which they end.

    Args:
        config: the stream.
        lane: the lane.
        before: its states before the rows, shape (data sets, fields).
        after: its states after them.
    """
    number = int(np.argmax((after - before)[:, _FIELD["tokens"]]))
    state = LaneState.from_array(after[number])
    pieces = lane_pieces(config.datasets[number].shards, config.num_lanes, lane)
    order = _permutation(len(pieces), config.seed, number, lane, state.epoch, 0)
    piece = pieces[order[state.piece]]
    if not is_splittable(piece.shard):
        place = f"line {state.line}"
    elif piece.shard.format in TABLES and state.offset:
        place = f"row {state.offset}"
    else:
        place = f"byte {max(piece.begin, state.offset)}"
    return f"{piece.shard.name} near {place}"


# --------------------------------------------------------------------------------------------------------------------
# One lane


class Lane:
    """The rows of one lane after some states, for ever.

    Reads from the start of the states' windows on, nothing before.
    """

    def __init__(self, config: StreamConfig, lane: int, states: LaneStates, bad: BadDocuments) -> None:
        self.states = np.stack([state.to_array() for state in states])
        """After the last row taken, shape (data sets, fields)."""
        self._sources = [_Source(config, number, lane, state, bad) for number, state in enumerate(states)]
        weights = np.array([dataset.weight for dataset in config.datasets])
        self._seq_length, self._weights = config.seq_length, weights
        # Lanes differ in where they begin, or all would take their rare rows in the same step.
        draws = np.random.PCG64(np.random.SeedSequence((config.seed, lane))).random_raw(len(weights))
        self._starts = draws / 2.0**64

    def take(self, rows: np.ndarray, states: np.ndarray) -> None:
        """Fills ``rows``, shape (count, seq_length), and the states after each, shape (count, data sets, fields)."""
        if len(self._sources) == 1:
            self._sources[0].take(rows, states[:, 0])
            self.states[:] = states[-1]
            return
        for number in range(len(rows)):
            taken = self.states[:, _FIELD["tokens"]] // self._seq_length
            chosen = int(np.argmin((taken + self._starts) / self._weights))
            self._sources[chosen].take(rows[number : number + 1], self.states[chosen : chosen + 1])
            states[number] = self.states


class _Source:
    """One data set in one lane: hands out the rows of its groups."""

    def __init__(self, config: StreamConfig, number: int, lane: int, state: LaneState, bad: BadDocuments) -> None:
        self._groups = _row_groups(config, number, lane, state, bad)
        self._rows = self._states = np.empty((0, 0))
        self._next = 0

    def take(self, rows: np.ndarray, states: np.ndarray) -> None:
        filled = 0
        while filled < len(rows):
            if self._next == len(self._rows):
                self._rows, self._states = next(self._groups)
                self._next = 0
            count = min(len(rows) - filled, len(self._rows) - self._next)
            rows[filled : filled + count] = self._rows[self._next : self._next + count]
            states[filled : filled + count] = self._states[self._next : self._next + count]
            filled, self._next = filled + count, self._next + count


_RowGroup = tuple[np.ndarray, np.ndarray]
"""Rows, shape (rows, seq_length), and the state after each, shape (rows, fields)."""


def _row_groups(
    config: StreamConfig, number: int, lane: int, state: LaneState, bad: BadDocuments
) -> Iterator[_RowGroup]:
    """The rows of one data set in one lane after ``state``, for ever, in groups of at least one row."""
    pieces = lane_pieces(config.datasets[number].shards, config.num_lanes, lane)
    packer = Packer(config.seq_length, config.encoder.eos_token_id, config.encoder.dtype)
    key = (config.seed, number, lane)
    while True:
        documents = _epoch_documents(pieces, key, state, bad)
        while window := list(islice(documents, config.window_documents)):
            order = _permutation(len(window), *key, state.epoch, 1 + state.window)
            texts = [window[place][0] for place in order[state.document :]]
            for group in _groups_of(texts, config.encoder.batch_characters):
                state, rows, states = _pack_group(config, packer, state, group)
                if len(rows):
                    yield rows, states
            _, piece, position = window[-1]
            state = replace(state, piece=piece, **position._asdict(), window=state.window + 1, document=0)
        if state.window == 0:
            raise _empty_lane(config.datasets[number], config.num_lanes, lane)
        state = replace(state, epoch=state.epoch + 1, piece=0, **START._asdict(), window=0)


def _epoch_documents(
    pieces: Sequence[Piece], key: tuple[int, ...], state: LaneState, bad: BadDocuments
) -> Iterator[tuple[str, int, Position]]:
    """The lane's documents from its window to the end of the epoch, with the place of each one's end."""
    order = _permutation(len(pieces), *key, state.epoch, 0)
    position = Position(state.offset, state.line, state.frame)
    for place in range(state.piece, len(order)):
        for text, after in read_documents(pieces[order[place]], position, bad=bad):
            yield text, place, after
        position = START


def _groups_of(texts: Sequence[str], characters: int) -> Iterator[list[str]]:
    """Consecutive texts of at least so many characters together; the last group may have fewer."""
    group, size = [], 0
    for text in texts:
        group.append(text)
        size += len(text)
        if size >= characters:
            yield group
            group, size = [], 0
    if group:
        yield group


def _pack_group(
    config: StreamConfig, packer: Packer, state: LaneState, texts: list[str]
) -> tuple[LaneState, np.ndarray, np.ndarray]:
    """Encodes and packs the next documents of a window; returns the state after them, the rows, and theirs."""
    ids = config.encoder.encode_batch(texts)
    # Documents that are wholly or partly in rows before a restart: the end-of-sequence token is the one after the last.
    ids[0] = ids[0][state.token :]
    packed = packer.add(ids)
    characters = np.cumsum([0, *map(len, texts)])
    num_bytes = np.cumsum([0, *(len(text) if text.isascii() else len(text.encode()) for text in texts)])
    num_rows, finished = len(packed.rows), packed.finished
    states = np.tile(state.to_array(), (num_rows, 1))
    states[:, _FIELD["document"]] += finished
    states[:, _FIELD["documents"]] += finished
    states[:, _FIELD["characters"]] += characters[finished]
    states[:, _FIELD["bytes"]] += num_bytes[finished]
    states[:, _FIELD["tokens"]] += config.seq_length * np.arange(1, num_rows + 1)
    states[:, _FIELD["token"]] = packed.taken + np.where(finished == 0, state.token, 0)
    after = replace(
        state,
        document=state.document + len(texts),
        token=0,
        documents=state.documents + len(texts),
        characters=state.characters + int(characters[-1]),
        bytes=state.bytes + int(num_bytes[-1]),
        tokens=state.tokens + num_rows * config.seq_length,
    )
    return after, packed.rows, states


def _permutation(length: int, *key: int) -> np.ndarray:
    """A permutation that depends on nothing but ``key``: NumPy promises stable raw bits, not a stable shuffle."""
    return np.argsort(np.random.PCG64(np.random.SeedSequence(key)).random_raw(length), kind="stable")


# --------------------------------------------------------------------------------------------------------------------
# The lanes of a rank


def lanes_in_turn(config: StreamConfig, *, rank: int, world_size: int, start_row: int) -> list[int]:
    """The lanes of a rank's rows from ``start_row`` on, in turn: its t-th row comes from the (t modulo count)-th."""
    check_world_size(config.num_lanes, world_size)
    if start_row % world_size:
        raise ValueError(f"{start_row=} is no multiple of {world_size=}")
    count = config.num_lanes // world_size
    return [(start_row + rank + world_size * turn) % config.num_lanes for turn in range(count)]


def resume_states(
    config: StreamConfig, lanes: Iterable[int], start_row: int, saved: Mapping[int, LaneStates]
) -> dict[int, LaneStates]:
    """The states of ``lanes`` at ``start_row``. Raises a UserError when the saved ones belong to another row."""
    states = {}
    fresh = (LaneState(),) * len(config.datasets)
    for lane in lanes:
        states[lane] = saved.get(lane, fresh)
        tokens = sum(state.tokens for state in states[lane])
        num_rows = len(range(lane, start_row, config.num_lanes))
        if tokens != num_rows * config.seq_length or len(states[lane]) != len(fresh):
            raise UserError(
                f"The saved data state does not belong to row {start_row} of the run: lane {lane} stands after "
                f"{tokens} tokens, not {num_rows * config.seq_length}; resume from another checkpoint."
            )
    return states


# --------------------------------------------------------------------------------------------------------------------
# Checks


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


def check_lanes(dataset: Dataset, num_lanes: int) -> None:
    """Raises a UserError when a lane has no document. Reads the first document of each lane only."""
    lane = _find_empty_lane(dataset.shards, num_lanes)
    if lane is not None:
        raise _empty_lane(dataset, num_lanes, lane)


def _empty_lane(dataset: Dataset, num_lanes: int, lane: int) -> UserError:
    halved = (num_lanes >> shift for shift in range(1, num_lanes.bit_length()))
    fitting = next((count for count in halved if _find_empty_lane(dataset.shards, count) is None), None)
    if fitting is None:
        bad = BadDocuments(limit=None)
        next(read_texts(dataset.shards, bad), None)
        why = f": {next(iter(bad))}" if len(bad) else ""
        return UserError(f"No document can be read from the {len(dataset.shards)} shards of {dataset.name}{why}.")
    return UserError(
        f"Lane {lane} of num_lanes={num_lanes} has no document: the corpus {dataset.name} is too small; "
        f"num_lanes={fitting} works."
    )


def _find_empty_lane(shards: Sequence[Shard], num_lanes: int) -> int | None:
    bad = BadDocuments(limit=None)
    for lane in range(num_lanes):
        pieces = lane_pieces(shards, num_lanes, lane)
        if not any(True for piece in pieces for _ in islice(read_documents(piece, bad=bad), 1)):
            return lane
    return None


# --------------------------------------------------------------------------------------------------------------------
# The fingerprint


def stream_fingerprint(config: StreamConfig) -> dict[str, Any]:
    """What must be equal for saved lane states to mean the same documents, as JSON."""
    return {
        "order_version": config.order_version,
        "datasets": [
            {
                "name": dataset.name,
                "weight": dataset.weight,
                "shards": {shard.name: [shard.bytes, content_id(shard)] for shard in dataset.shards},
            }
            for dataset in config.datasets
        ],
        "tokenizer": config.encoder.fingerprint,
        "seq_length": config.seq_length,
        "num_lanes": config.num_lanes,
        "shuffle_buffer": config.shuffle_buffer,
        "seed": config.seed,
    }


def fingerprint_differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """What has changed since ``saved``, a sentence each; empty when the stream can be resumed.

    Where a corpus lies is its user's business: names of data sets may change, their shards may not.
    """
    differences = []
    for key in ("order_version", "seq_length", "num_lanes", "shuffle_buffer", "seed"):
        if saved.get(key) != current[key]:
            differences.append(f"{key} is {current[key]}, but the run was started with {saved.get(key)}.")
    if saved.get("tokenizer") != current["tokenizer"]:
        differences.append("The tokenizer is not the one that the run was started with (tokenizer.json differs).")
    before, now = saved.get("datasets", []), current["datasets"]
    if len(before) != len(now):
        return [*differences, f"The stream mixes {len(now)} data sets, but the run was started with {len(before)}."]
    for old, new in zip(before, now, strict=True):
        if old["weight"] != new["weight"]:
            differences.append(f"The weight of {new['name']} is {new['weight']}, but was {old['weight']}.")
        differences += _shard_differences(old["shards"], new["shards"])
    return differences


def _shard_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    differences = []
    for name in sorted(before.keys() | now.keys()):
        if name not in now:
            differences.append(f"The shard {name} is gone.")
        elif name not in before:
            differences.append(f"The shard {name} is new.")
        elif before[name][0] != now[name][0]:
            differences.append(f"The shard {name} has {now[name][0]} bytes, but had {before[name][0]}.")
        elif before[name] != now[name]:
            differences.append(f"The shard {name} has its {now[name][0]} bytes, but their content has changed.")
    return differences
