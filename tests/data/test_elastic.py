"""The promise of the stream, at scale: one order of rows for every way to train, and for every way to resume."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from codeparrot_ds.data.encoder import Encoder, load_encoder
from codeparrot_ds.data.loader import BLOCK_ROWS, TrainingLoader, token_ids
from codeparrot_ds.data.shards import find_shards
from codeparrot_ds.data.stream import Dataset, LaneStates, StreamConfig
from codeparrot_ds.rows.access import LocalFile
from tests.data.conftest import make_documents, write_shard
from tests.data.streams import RowStream

STEPS, GLOBAL_BATCH = 300, 48


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """More borders of blocks in the same rows; and workers, who are six blocks ahead, make less that nobody reads."""
    monkeypatch.setattr("codeparrot_ds.data.loader.FAST_BLOCK_ROWS", BLOCK_ROWS)


@pytest.fixture(scope="module")
def encoder(tokenizer_dir: Path) -> Encoder:
    encoder = load_encoder(tokenizer_dir)
    assert encoder.prove_fast_encoding(()) is None
    return encoder


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, encoder: Encoder) -> StreamConfig:
    folder = tmp_path_factory.mktemp("corpus")
    texts = make_documents(2500)
    for number, suffix in enumerate((".jsonl", ".jsonl.gz", ".parquet", ".jsonl", ".jsonl.zst")):
        write_shard(folder / "train" / f"part-{number}{suffix}", texts[number::5])
    dataset = Dataset(name=str(folder), shards=find_shards(folder, "train"))
    return StreamConfig(datasets=[dataset], encoder=encoder, seq_length=32, num_lanes=24, shuffle_buffer=96, seed=1)


@pytest.fixture(scope="module")
def expected(config: StreamConfig) -> np.ndarray:
    """The rows of all steps, shape (STEPS, GLOBAL_BATCH, 32); every lane crosses the border of an epoch."""
    stream, rows = iter(RowStream(config)), []
    for _ in range(STEPS * GLOBAL_BATCH):
        row = next(stream)
        rows.append(row.ids)
    epochs = [next(stream).states[0].epoch for _ in range(24)]
    assert 1 <= min(epochs) <= max(epochs) <= 4
    return np.stack(rows).reshape(STEPS, GLOBAL_BATCH, 32)


@pytest.fixture(scope="module")
def expected_sets(expected: np.ndarray) -> list[str]:
    return fingerprints(expected)


def fingerprints(steps: np.ndarray) -> list[str]:
    """One hash a step over the set of its rows, whatever their order."""
    return [hashlib.sha256(b"".join(sorted(row.tobytes() for row in step))).hexdigest() for step in steps]


class Training:
    """All the ranks of a run, one after the other in this process."""

    def __init__(
        self,
        config: StreamConfig,
        *,
        world_size: int,
        num_workers: int,
        accumulation: int,
        step: int = 0,
        states: dict[int, LaneStates] | None = None,
    ) -> None:
        self._accumulation = accumulation
        self.loaders = [
            TrainingLoader(
                config,
                micro_batch_size=GLOBAL_BATCH // world_size // accumulation,
                num_workers=num_workers,
                rank=rank,
                world_size=world_size,
                start_row=step * GLOBAL_BATCH,
                lane_states=states,
            )
            for rank in range(world_size)
        ]

    def steps(self, count: int) -> Iterator[np.ndarray]:
        """The rows of each step over all ranks, shape (GLOBAL_BATCH, 32)."""
        for _ in range(count):
            batches = [next(loader) for loader in self.loaders for _ in range(self._accumulation)]
            yield token_ids(torch.cat(batches)).numpy().astype(np.uint16)

    def states(self) -> dict[int, LaneStates]:
        return {lane: states for loader in self.loaders for lane, states in loader.state().items()}

    def close(self) -> None:
        for loader in self.loaders:
            loader.close()


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("num_workers", [0, 1, 3])
@pytest.mark.parametrize("accumulation", [1, 2, 6])
def test_every_step_has_the_same_rows_however_it_is_split(
    config: StreamConfig, expected_sets: list[str], world_size: int, num_workers: int, accumulation: int
) -> None:
    training = Training(config, world_size=world_size, num_workers=num_workers, accumulation=accumulation)
    try:
        assert fingerprints(np.stack(list(training.steps(STEPS)))) == expected_sets
    finally:
        training.close()


@pytest.mark.usefixtures("small_blocks")
def test_fifty_stops_each_resumed_elsewhere(config: StreamConfig, expected: np.ndarray) -> None:
    """One run, stopped at 50 random steps, each time resumed at another world size and number of workers; and every
    stop's states also restored once more later on, far from where the run went."""
    rng = random.Random(0)
    stops = sorted(rng.sample(range(1, STEPS), 50))
    step, states = 0, None
    for stop in [*stops, STEPS]:
        layout = {"world_size": rng.choice([1, 2, 4, 8]), "num_workers": rng.choice([0, 0, 1, 3])}
        training = Training(config, **layout, accumulation=rng.choice([1, 2, 3]), step=step, states=states)
        try:
            assert np.array_equal(as_sets(training.steps(stop - step)), as_sets(expected[step:stop]))
            step, states = stop, training.states()
        finally:
            training.close()


@pytest.mark.parametrize("stop", [3, 77, 150, 222, 297])
def test_the_remaining_rows_after_a_stop_are_all_the_same(
    config: StreamConfig, expected: np.ndarray, stop: int
) -> None:
    first = Training(config, world_size=4, num_workers=0, accumulation=1)
    for _ in first.steps(stop):
        pass
    resumed = Training(config, world_size=2, num_workers=0, accumulation=2, step=stop, states=first.states())
    assert np.array_equal(as_sets(resumed.steps(STEPS - stop)), as_sets(expected[stop:]))


def as_sets(steps: Iterator[np.ndarray] | np.ndarray) -> np.ndarray:
    """Each step's rows in an order of their own."""
    return np.stack([step[np.lexsort(step.T)] for step in steps])


@pytest.mark.parametrize("name", ["jsonl", "gz"])
def test_a_resumed_loader_reads_windows_and_not_the_past(
    tmp_path: Path, encoder: Encoder, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes asked of the files by the first step after a restart at 1%, 50% and 99% of an epoch."""
    words = random.Random(0)
    texts = ["".join(f"{words.getrandbits(60):x} = {n}\n" for _ in range(100)) for n in range(4000)]
    lines = [json.dumps({"content": text}).encode() + b"\n" for text in texts]  # 8 MB
    parts = [b"".join(lines[start : start + 50]) for start in range(0, 4000, 50)]
    (tmp_path / "train").mkdir()
    for number in range(8):
        data = [part if name == "jsonl" else gzip.compress(part) for part in parts[number::8]]
        (tmp_path / "train" / f"part-{number}.jsonl{'.gz' if name == 'gz' else ''}").write_bytes(b"".join(data))
    dataset = Dataset(name="mine", shards=find_shards(tmp_path, "train"))
    config = StreamConfig(datasets=[dataset], encoder=encoder, seq_length=512, num_lanes=8, shuffle_buffer=32, seed=1)
    asked: list[int] = []
    read_at: Callable[..., bytes] = LocalFile.read_at

    def count(file: LocalFile, offset: int, size: int) -> bytes:
        data = read_at(file, offset, size)
        asked.append(len(data))
        return data

    monkeypatch.setattr(LocalFile, "read_at", count)
    loader = TrainingLoader(config, micro_batch_size=8)
    total_rows = 0
    marks: dict[int, dict[int, LaneStates]] = {}
    while loader.counters()["epoch"] == 0:
        next(loader)
        total_rows += 8
        marks[total_rows] = loader.state()
    needed = []
    for share in (0.01, 0.5, 0.99):
        row = max(8, int(total_rows * share) // 8 * 8)
        resumed = TrainingLoader(config, micro_batch_size=8, start_row=row, lane_states=marks[row])
        asked.clear()
        next(resumed)
        needed.append(sum(asked))
    # Each of the 8 lanes: a block of its file, and of a compressed one the member before its window.
    assert max(needed) <= 8 * 2 * (1 << 18)
    assert max(needed) <= 2 * min(needed)
