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

import numpy as np
import pytest
import torch

from codeparrot_ds.data import workers
from codeparrot_ds.data.encoder import Encoder
from codeparrot_ds.data.loader import BATCHES_AHEAD, TrainingLoader, token_ids
from codeparrot_ds.data.shards import find_shards
from codeparrot_ds.data.stream import Dataset, LaneState, LaneStates, StreamConfig
from codeparrot_ds.errors import UserError
from tests.data.conftest import make_documents
from tests.data.streams import RowStream

ROWS = 24 * 48


@pytest.fixture
def config(make_corpus: Callable[..., Path], encoder: Encoder) -> StreamConfig:
    folder = make_corpus(make_documents(160), num_shards=3)
    dataset = Dataset(name=str(folder), shards=find_shards(folder, "train"))
    return StreamConfig(datasets=[dataset], encoder=encoder, seq_length=32, num_lanes=24, shuffle_buffer=48, seed=1)


def spoil(config: StreamConfig) -> StreamConfig:
    """The same with two unreadable documents at the end of the first shard."""
    [dataset] = config.datasets
    with open(dataset.shards[0].path, "a") as file:
        file.write('{"content": null}\n{"content": 1}\n')
    return replace(config, datasets=[replace(dataset, shards=find_shards(dataset.name, "train"))])


@pytest.fixture
def rows(config: StreamConfig) -> torch.Tensor:
    """The first rows of the run, over two epoch borders at least, shape (ROWS, seq_length)."""
    stream = list(islice(RowStream(config), ROWS))
    assert min(row.states[0].epoch for row in stream[-24:]) >= 2
    return torch.tensor([row.ids.tolist() for row in stream])


def read(config: StreamConfig, num_rows: int, **place: Any) -> tuple[torch.Tensor, dict[int, LaneStates]]:
    """All the rows of a rank, and its state after them."""
    loader = TrainingLoader(config, **place)
    size = place["micro_batch_size"]
    batches = [next(loader) for _ in range(num_rows // size)]
    assert all(batch.shape == (size, 32) and batch.dtype == torch.int16 for batch in batches)
    loader.close()
    return token_ids(torch.cat(batches)), loader.state()


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
    states: dict[int, LaneStates] = {}
    for rank in range(2):
        place = {"rank": rank, "world_size": 2, "num_workers": num_workers}
        states |= read(config, 44, micro_batch_size=4, **place)[1]
    assert sorted(states) == list(range(24))
    assert sum(state.tokens for [state] in states.values()) == 88 * 32
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


@pytest.mark.parametrize("num_workers", [0, 2])
def test_places_are_the_states_and_stay_what_they_are(config: StreamConfig, num_workers: int) -> None:
    loader = TrainingLoader(config, micro_batch_size=5, num_workers=num_workers, rank=1, world_size=2)
    kept, copies, states = [loader.places()], [loader.places().copy()], [loader.state()]
    for _ in range(40):
        next(loader)
        kept.append(loader.places())
        copies.append(loader.places().copy())
        states.append(loader.state())
    loader.close()
    assert loader.lanes == list(range(1, 24, 2))
    for place, copy, state in zip(kept, copies, states, strict=True):
        assert np.array_equal(place, copy)
        assert [tuple(map(LaneState.from_array, values)) for values in place] == [state[lane] for lane in loader.lanes]


def test_any_number_of_workers_up_to_one_a_lane(config: StreamConfig) -> None:
    for num_workers, world_size, expected in [(0, 1, 0), (5, 1, 5), (5, 8, 3), (2, 8, 2)]:
        loader = TrainingLoader(config, micro_batch_size=1, num_workers=num_workers, world_size=world_size)
        assert loader.num_workers == expected
        loader.close()


def test_token_ids_of_large_vocabularies() -> None:
    ids = np.array([0, 1, 32767, 32768, 65535], dtype=np.uint16)
    assert token_ids(torch.from_numpy(ids.view(np.int16))).tolist() == [0, 1, 32767, 32768, 65535]
    assert token_ids(torch.tensor([70_000], dtype=torch.int32)).tolist() == [70_000]


def test_counters_and_wait(config: StreamConfig) -> None:
    loader = TrainingLoader(config, micro_batch_size=6)
    assert loader.counters() == {
        "epoch": 0, "documents": 0, "characters": 0, "bytes": 0, "tokens": 0, "tokens_of_documents": 0,
        "bad_documents": 0
    }  # fmt: skip
    assert loader.rows_per_lane() == dict.fromkeys(range(24), 0)
    start = time.perf_counter()
    for _ in range(80):
        next(loader)
    assert 0 < loader.wait_seconds <= time.perf_counter() - start
    counters, saved = loader.counters(), loader.state()
    states = [state for [state] in saved.values()]
    next(loader)
    assert states == [state for [state] in saved.values()], "a state that was asked for stays as it is"
    assert counters["tokens"] == 80 * 6 * 32
    assert loader.rows_per_lane()[0] in (20, 21)
    assert counters["epoch"] == min(state.epoch for state in states) > 0
    assert counters["documents"] == sum(state.documents for state in states) > 80
    assert counters["tokens_of_documents"] == counters["tokens"] - sum(state.token for state in states)
    assert counters["bytes"] == sum(state.bytes for state in states) > 0


@pytest.mark.parametrize("num_workers", [0, 3])
def test_a_users_error_reaches_the_rank(config: StreamConfig, num_workers: int) -> None:
    loader = TrainingLoader(replace(spoil(config), max_bad_documents=1), micro_batch_size=4, num_workers=num_workers)
    with pytest.raises(UserError, match="2 documents cannot be read") as raised:
        for _ in range(100):
            next(loader)
    assert "Traceback" not in str(raised.value)
    loader.close()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_documents_are_reported_once(
    config: StreamConfig, num_workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    loader = TrainingLoader(spoil(config), micro_batch_size=24, num_workers=num_workers)
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
    batches = [first, *(next(loader) for _ in range(47))]  # far past what was prefetched
    assert torch.equal(token_ids(torch.cat(batches)), rows)
    loader.close()
    assert not workers & set(children())


SCRIPT = """
import sys
import weakref
weakref.finalize(weakref.WeakSet(), int)  # weakref's own exit handler comes before multiprocessing's, so runs after it
from codeparrot_ds.data.encoder import load_encoder
from codeparrot_ds.data.loader import TrainingLoader
from codeparrot_ds.data.shards import find_shards
from codeparrot_ds.data.stream import Dataset, StreamConfig
corpus, tokenizer = sys.argv[1:]
dataset = Dataset(name=corpus, shards=find_shards(corpus, "train"))
config = StreamConfig(datasets=[dataset], encoder=load_encoder(tokenizer),
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
    arguments = [config.datasets[0].name, str(tokenizer_dir)]
    done = subprocess.run([sys.executable, "-c", script, *arguments], timeout=60, capture_output=True, text=True)
    assert done.returncode == exit_code
    assert done.stderr.endswith(message) and bool(done.stderr) == bool(message)


def test_a_killed_worker_is_named(config: StreamConfig) -> None:
    before = children()
    loader = TrainingLoader(config, micro_batch_size=24, num_workers=1)
    next(loader)
    [worker] = set(children()) - set(before)
    os.kill(worker, signal.SIGKILL)
    with pytest.raises(UserError, match="loader worker was killed .SIGKILL.; the machine may be out of memory"):
        for _ in range(100):
            next(loader)
    loader.close()


def test_workers_end_with_a_killed_rank(config: StreamConfig, tokenizer_dir: Path) -> None:
    script = SCRIPT.replace("raise SystemExit(7)", "print('ready', flush=True)\nimport time\ntime.sleep(60)")
    arguments = [config.datasets[0].name, str(tokenizer_dir)]
    with subprocess.Popen([sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, text=True) as rank:
        assert rank.stdout is not None and rank.stdout.readline() == "ready\n"
        workers = [int(pid) for pid in Path(f"/proc/{rank.pid}/task/{rank.pid}/children").read_text().split()]
        assert len(workers) == 2
        rank.kill()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{worker}").exists() and "Z" not in state_of(worker) for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def state_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "Z"


def test_batches_wait_ready(config: StreamConfig) -> None:
    loader = TrainingLoader(config, micro_batch_size=4, num_workers=1)
    next(loader)
    time.sleep(2)  # pretended compute, in which the next ones are put together
    waited = loader.wait_seconds
    for _ in range(BATCHES_AHEAD):
        next(loader)
    assert loader.wait_seconds - waited < 0.1  # a busy machine needs some time to hand over even what is ready
    loader.close()


@pytest.mark.parametrize("stuck", [False, True])
def test_a_close_waits_for_nothing(config: StreamConfig, stuck: bool) -> None:
    before = children()
    loader = TrainingLoader(config, micro_batch_size=24, num_workers=1)
    [worker] = set(children()) - set(before)
    if stuck:
        os.kill(worker, signal.SIGSTOP)
    else:
        next(loader)
        time.sleep(0.2)  # every batch is ready and the thread waits for room
    start = time.perf_counter()
    loader.close()
    assert time.perf_counter() - start < 2
    assert worker not in children()
    with pytest.raises(RuntimeError, match="the loader is closed"):
        next(loader)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_is_raised_again(config: StreamConfig, num_workers: int) -> None:
    loader = TrainingLoader(replace(spoil(config), max_bad_documents=0), micro_batch_size=24, num_workers=num_workers)
    for _ in range(2):
        with pytest.raises(UserError, match="cannot be read"):
            for _ in range(100):
                next(loader)
    loader.close()


def forks_that_hang(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Makes the next children hang before their first line, as one does that inherits a lock which nobody will free."""
    monkeypatch.setattr(workers, "START_SECONDS", 0.3)
    fork, left = os.fork, [number]

    def hang() -> int:
        left[0] -= 1
        pid = fork()
        if pid == 0 and left[0] >= 0:
            signal.pause()
        return pid

    monkeypatch.setattr(os, "fork", hang)


def test_a_worker_that_hangs_at_its_start_is_started_again(
    config: StreamConfig, rows: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    forks_that_hang(monkeypatch, 2)
    taken, _ = read(config, 24, num_workers=2, micro_batch_size=4)
    assert torch.equal(taken, rows[:24])


def test_workers_that_never_start_are_an_error(config: StreamConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    forks_that_hang(monkeypatch, workers.START_ATTEMPTS)
    with pytest.raises(RuntimeError, match="did not start within 0.3 s, 5 times"):
        next(TrainingLoader(config, num_workers=1, micro_batch_size=4))
