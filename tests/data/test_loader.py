import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from codeparrot_ds.data.encoder import Encoder
from codeparrot_ds.data.loader import TrainingLoader
from codeparrot_ds.data.sources import find_shards
from codeparrot_ds.data.stream import LaneState, StreamConfig, TrainingStream
from codeparrot_ds.errors import UserError
from tests.data.conftest import make_documents

ROWS = 24 * 24

# The machine of a test may have fewer cores than three workers want.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@pytest.fixture
def config(make_corpus: Callable[..., Path], encoder: Encoder) -> StreamConfig:
    folder = make_corpus(make_documents(80), num_shards=3)
    return StreamConfig(
        shards=find_shards(folder, "train"), encoder=encoder, seq_length=32, num_lanes=24, shuffle_buffer=48, seed=1
    )


@pytest.fixture
def rows(config: StreamConfig) -> torch.Tensor:
    """The first rows of the run, over two epoch borders at least, shape (ROWS, seq_length)."""
    stream = list(islice(TrainingStream(config), ROWS))
    assert min(row.state.epoch for row in stream[-24:]) >= 2
    return torch.tensor([row.ids.tolist() for row in stream])


def read(config: StreamConfig, num_rows: int, **place: Any) -> tuple[torch.Tensor, dict[int, LaneState]]:
    """All the rows of a rank, and its state after them."""
    loader = TrainingLoader(config, **place)
    size = place["micro_batch_size"]
    batches = [next(loader) for _ in range(num_rows // size)]
    assert all(batch.shape == (size, 32) and batch.dtype == torch.long for batch in batches)
    loader.close()
    return torch.cat(batches), loader.state()


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize(("num_workers", "micro_batch_size"), [(0, 1), (0, 4), (0, 12), (1, 3), (3, 2), (3, 4)])
def test_micro_batches_are_the_runs_rows(
    config: StreamConfig, rows: torch.Tensor, world_size: int, num_workers: int, micro_batch_size: int
) -> None:
    # With workers the last rank stands for all: what it reads depends on every other rank's share.
    ranks = range(world_size) if num_workers == 0 else [world_size - 1]
    for rank in ranks:
        place = {"rank": rank, "world_size": world_size, "num_workers": num_workers}
        read_rows, _ = read(config, ROWS // world_size, micro_batch_size=micro_batch_size, **place)
        assert torch.equal(read_rows, rows[rank::world_size])


@pytest.mark.parametrize(("num_workers", "next_world_size", "next_workers"), [(0, 1, 2), (3, 2, 0), (1, 4, 3)])
def test_resumes_after_the_last_batch_handed_out(
    config: StreamConfig, rows: torch.Tensor, num_workers: int, next_world_size: int, next_workers: int
) -> None:
    states: dict[int, LaneState] = {}
    for rank in range(2):
        place = {"rank": rank, "world_size": 2, "num_workers": num_workers}
        states |= read(config, 44, micro_batch_size=4, **place)[1]
    assert sorted(states) == list(range(24))
    assert sum(state.tokens for state in states.values()) == 88 * 32
    for rank in range(next_world_size):
        read_rows, _ = read(
            config,
            (ROWS - 88) // next_world_size,
            micro_batch_size=2,
            rank=rank,
            world_size=next_world_size,
            num_workers=next_workers,
            start_row=88,
            lane_states=states,
        )
        assert torch.equal(read_rows, rows[88 + rank :: next_world_size])


def test_the_number_of_workers_divides_the_lanes(config: StreamConfig) -> None:
    for num_workers, world_size, expected in [(0, 1, 0), (5, 1, 4), (5, 8, 3), (2, 8, 1)]:
        loader = TrainingLoader(config, micro_batch_size=1, num_workers=num_workers, world_size=world_size)
        assert loader.num_workers == expected
        loader.close()


def test_counters_and_wait(config: StreamConfig) -> None:
    loader = TrainingLoader(config, micro_batch_size=6)
    assert loader.counters() == {"epoch": 0, "documents": 0, "tokens": 0, "bytes": 0, "bad_documents": 0}
    start = time.perf_counter()
    for _ in range(40):
        next(loader)
    assert 0 < loader.wait_seconds <= time.perf_counter() - start
    counters, saved = loader.counters(), loader.state()
    states = list(saved.values())
    next(loader)
    assert states == list(saved.values()), "a state that was asked for stays as it is"
    assert counters["tokens"] == 40 * 6 * 32
    assert counters["epoch"] == min(state.epoch for state in states) > 0
    assert counters["documents"] == sum(state.documents for state in states) > 80
    assert counters["bytes"] == sum(state.bytes for state in states) > 0


@pytest.mark.parametrize("num_workers", [0, 3])
def test_a_users_error_reaches_the_rank(config: StreamConfig, num_workers: int) -> None:
    with open(config.shards[0].path, "a") as file:
        file.write('{"content": null}\n{"content": 1}\n')
    loader = TrainingLoader(replace(config, max_bad_documents=1), micro_batch_size=4, num_workers=num_workers)
    with pytest.raises(UserError, match="2 documents cannot be read") as raised:
        for _ in range(100):
            next(loader)
    assert "Traceback" not in str(raised.value)
    loader.close()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_documents_are_reported_once(
    config: StreamConfig, num_workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    with open(config.shards[0].path, "a") as file:
        file.write('{"content": null}\n{"content": 1}\n')
    loader = TrainingLoader(config, micro_batch_size=24, num_workers=num_workers)
    while loader.counters()["epoch"] < 3:
        next(loader)
    loader.close()
    assert loader.counters()["bad_documents"] == 2
    assert sum("part-00000.jsonl, line" in record.getMessage() for record in caplog.records) == 2


def test_starting_workers_leaves_the_random_state_alone(config: StreamConfig) -> None:
    before = torch.get_rng_state()
    read(config, 8, micro_batch_size=4, num_workers=2)
    assert torch.equal(before, torch.get_rng_state())


def children() -> list[int]:
    path = Path(f"/proc/self/task/{os.getpid()}/children")
    return [int(pid) for pid in path.read_text().split()]


def test_workers_outlive_a_signal_to_the_group_and_end_with_the_loader(
    config: StreamConfig, rows: torch.Tensor
) -> None:
    before = children()
    loader = TrainingLoader(config, micro_batch_size=24, num_workers=2)
    first = next(loader)
    workers = set(children()) - set(before)
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker, signal.SIGTERM)
        os.kill(worker, signal.SIGINT)
    batches = [first, *(next(loader) for _ in range(23))]  # far past what was prefetched
    assert torch.equal(torch.cat(batches), rows)
    loader.close()
    assert not workers & set(children())


SCRIPT = """
import sys
import weakref
weakref.finalize(weakref.WeakSet(), int)  # weakref's own exit handler comes before multiprocessing's, so runs after it
from codeparrot_ds.data.encoder import load_encoder
from codeparrot_ds.data.loader import TrainingLoader
from codeparrot_ds.data.sources import find_shards
from codeparrot_ds.data.stream import StreamConfig
corpus, tokenizer = sys.argv[1:]
config = StreamConfig(shards=find_shards(corpus, "train"), encoder=load_encoder(tokenizer),
                      seq_length=32, num_lanes=24, shuffle_buffer=48, seed=1)
loader = TrainingLoader(config, micro_batch_size=4, num_workers=2)
next(loader)
raise SystemExit(7)
"""

BREAK = """
def fail(texts):
    raise RuntimeError("the encoder is broken")
config.encoder.encode_batch = fail
loader ="""


@pytest.mark.parametrize(
    ("script", "exit_code", "message"),
    [(SCRIPT, 7, ""), (SCRIPT.replace("loader =", BREAK), 1, "RuntimeError: the encoder is broken\n\n")],
)
def test_a_process_ends_without_closing_its_loader(
    config: StreamConfig, tokenizer_dir: Path, script: str, exit_code: int, message: str
) -> None:
    arguments = [str(config.shards[0].path.parent.parent), str(tokenizer_dir)]
    done = subprocess.run([sys.executable, "-c", script, *arguments], timeout=60, capture_output=True, text=True)
    assert done.returncode == exit_code
    assert done.stderr.endswith(message) and bool(done.stderr) == bool(message)
