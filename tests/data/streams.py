"""The rows of the training stream one by one, straight from its lanes: what every loader must hand out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from codeparrot_ds.config.run_config import RunConfig
from codeparrot_ds.data.datasets import open_datasets, stream_of
from codeparrot_ds.data.encoder import Encoder
from codeparrot_ds.data.shards import BadDocuments
from codeparrot_ds.data.stream import Lane, LaneState, LaneStates, StreamConfig, lanes_in_turn, resume_states


def open_stream(config: RunConfig, encoder: Encoder) -> StreamConfig:
    """The training stream of a run config, its data sets opened as they are now."""
    return stream_of(config, open_datasets(config), encoder)


class Row(NamedTuple):
    """One packed row."""

    ids: np.ndarray
    """Shape (seq_length,), the encoder's dtype."""
    lane: int
    states: LaneStates
    """The lane right after the row's last token."""


class RowStream:
    """The rows of one rank in the order of the run, for ever, one by one.

    ``start_row`` is the global index of the first row, a multiple of the world size; ``lane_states`` are the states
    after the rows before it, of this rank's lanes at least.
    """

    def __init__(
        self,
        config: StreamConfig,
        *,
        rank: int = 0,
        world_size: int = 1,
        start_row: int = 0,
        lane_states: Mapping[int, LaneStates] | None = None,
        bad: BadDocuments | None = None,
    ) -> None:
        self._config = config
        self._bad = BadDocuments(config.max_bad_documents) if bad is None else bad
        self._lanes = lanes_in_turn(config, rank=rank, world_size=world_size, start_row=start_row)
        self._states = resume_states(config, self._lanes, start_row, lane_states or {})

    def __iter__(self) -> Iterator[Row]:
        config = self._config
        lanes = [(lane, Lane(config, lane, self._states[lane], self._bad)) for lane in self._lanes]
        while True:
            for number, lane in lanes:
                ids = np.empty((1, config.seq_length), config.encoder.dtype)
                states = np.empty((1, *lane.states.shape), np.int64)
                lane.take(ids, states)
                yield Row(ids[0], number, tuple(map(LaneState.from_array, states[0])))
