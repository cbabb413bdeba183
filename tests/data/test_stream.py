import json
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from codeparrot_ds.data.encoder import Encoder
from codeparrot_ds.data.shards import BadDocuments, Piece, find_shards, read_documents
from codeparrot_ds.data.stream import (
    Dataset,
    LaneState,
    LaneStates,
    StreamConfig,
    check_lanes,
    check_world_size,
    describe_place,
    fingerprint_differences,
    lane_pieces,
    stream_fingerprint,
)
from codeparrot_ds.errors import UserError
from codeparrot_ds.rows import files
from tests.data.conftest import EOS, make_documents, write_shard
from tests.data.streams import Row, RowStream

SUFFIXES = [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"]
ConfigMaker = Callable[..., StreamConfig]


@pytest.fixture
def make_config(make_corpus: Callable[..., Path], encoder: Encoder) -> ConfigMaker:
    def make(texts: list[str], *, num_shards: int = 3, suffix: str = ".jsonl", **fields: Any) -> StreamConfig:
        folder = make_corpus(texts, num_shards=num_shards, suffix=suffix)
        settings = {"seq_length": 32, "num_lanes": 8, "shuffle_buffer": 30, "seed": 1, **fields}
        dataset = Dataset(name=str(folder), shards=find_shards(folder, "train"))
        return StreamConfig(datasets=[dataset], encoder=encoder, **settings)

    return make


def take(stream: Iterable[Row], count: int) -> list[Row]:
    return list(islice(stream, count))


def assert_same_rows(rows: list[Row], expected: list[Row]) -> None:
    assert [row.lane for row in rows] == [row.lane for row in expected]
    assert np.array_equal(np.stack([row.ids for row in rows]), np.stack([row.ids for row in expected]))
    assert [row.states for row in rows] == [row.states for row in expected]


def saved_states(rows: list[Row]) -> dict[int, LaneStates]:
    """The last states of each lane, by way of JSON, as a checkpoint keeps them."""
    states = {row.lane: [state.to_json() for state in row.states] for row in rows}
    return {
        int(lane): tuple(LaneState.from_json(state) for state in lane_states)
        for lane, lane_states in json.loads(json.dumps(states)).items()
    }


def texts_of_lane(config: StreamConfig, lane: int) -> list[str]:
    """All the documents of a lane."""
    pieces = lane_pieces(config.datasets[0].shards, config.num_lanes, lane)
    return [text for piece in pieces for text, _ in read_documents(piece, bad=BadDocuments())]


def documents_of_lane(rows: list[Row], lane: int, eos_token_id: int) -> list[tuple[int, ...]]:
    """The finished documents of a lane's rows, in order."""
    ids = np.concatenate([row.ids for row in rows if row.lane == lane])
    pieces = np.split(ids, np.flatnonzero(ids == eos_token_id) + 1)[:-1]
    return [tuple(piece[:-1].tolist()) for piece in pieces]


def test_row_k_comes_from_lane_k_modulo_num_lanes(make_config: ConfigMaker) -> None:
    config = make_config(make_documents(100))
    rows = take(RowStream(config), 50)
    assert [row.lane for row in rows] == [k % 8 for k in range(50)]
    assert all(row.ids.shape == (32,) and row.ids.dtype == np.uint16 for row in rows)


@pytest.mark.parametrize(
    ("suffix", "num_shards", "unit"),
    [(".jsonl", 1, "byte"), (".parquet", 1, "row"), (".jsonl.gz", 3, "line"), (".jsonl.zst", 3, "line")],
)
def test_a_rows_place_is_the_window_that_it_ends_in(
    make_config: ConfigMaker, suffix: str, num_shards: int, unit: str
) -> None:
    config = make_config(make_documents(120), suffix=suffix, num_shards=num_shards, num_lanes=3, seq_length=64)
    shards = {shard.name: shard for shard in config.datasets[0].shards}
    before = {lane: np.zeros((1, 12), np.int64) for lane in range(3)}
    places = set()
    for row in take(RowStream(config), 90):
        after = np.stack([state.to_array() for state in row.states])
        place = describe_place(config, row.lane, before[row.lane], after)
        before[row.lane] = after
        places.add(place)
        name, _, here, number = place.split()
        # In parquet a piece's first window is known by its byte alone.
        assert here == unit or (suffix, here) == (".parquet", "byte")
        begin, number = (int(number), 0) if here == "byte" else (0, int(number))
        documents = read_documents(Piece(shards[name], begin, shards[name].bytes), bad=BadDocuments())
        after_it = [text for text, end in documents if (end.line if here == "line" else end.offset) > number]
        window = after_it[: config.window_documents]
        last_document = config.encoder.decode(row.ids).split(EOS)[-1]
        assert any(last_document in text for text in window), place
    assert len(places) > 6


def test_a_rows_place_in_a_mixture_is_in_the_data_set_that_it_comes_from(make_config: ConfigMaker) -> None:
    config = make_config(make_documents(60), num_shards=1, num_lanes=1)
    [dataset] = config.datasets
    other = replace(dataset, name="other", shards=[replace(dataset.shards[0], name="other.jsonl")])
    config = replace(config, datasets=[dataset, other])
    before, named = np.zeros((2, 12), np.int64), Counter()
    for row in take(RowStream(config), 20):
        after = np.stack([state.to_array() for state in row.states])
        chosen = int(np.flatnonzero((after != before).any(axis=1))[0])
        assert describe_place(config, 0, before, after).startswith(("part-00000.jsonl ", "other.jsonl ")[chosen])
        named[chosen] += 1
        before = after
    assert named[0] == named[1] == 10


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_the_order_is_the_same_at_every_world_size(make_config: ConfigMaker, world_size: int) -> None:
    config = make_config(make_documents(80), num_lanes=8)
    num_rows = 8 * 60
    expected = take(RowStream(config), num_rows)
    assert min(row.states[0].epoch for row in expected[-8:]) >= 2  # epoch borders are crossed
    rows: list[Any] = [None] * num_rows
    for rank in range(world_size):
        stream = RowStream(config, rank=rank, world_size=world_size)
        rows[rank::world_size] = take(stream, num_rows // world_size)
    assert_same_rows(rows, expected)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_resumes_anywhere_at_any_world_size(make_config: ConfigMaker, suffix: str) -> None:
    config = make_config(make_documents(120), suffix=suffix, num_lanes=8)
    num_rows = 8 * 80
    expected = take(RowStream(config), num_rows)
    assert min(row.states[0].epoch for row in expected[-8:]) >= 3
    rng = random.Random(0)
    for _ in range(15):
        world_size = rng.choice([1, 2, 4, 8])
        start_row = 8 * rng.randrange(1, num_rows // 8 - 2)
        states = saved_states(expected[:start_row])
        rows: list[Any] = [None] * (num_rows - start_row)
        for rank in range(world_size):
            stream = RowStream(config, rank=rank, world_size=world_size, start_row=start_row, lane_states=states)
            rows[rank::world_size] = take(stream, len(rows[rank::world_size]))
        assert_same_rows(rows, expected[start_row:])


@pytest.mark.parametrize("start_row", [4, 12, 20])
def test_resumes_inside_a_round_of_lanes(make_config: ConfigMaker, start_row: int) -> None:
    config = make_config(make_documents(100), num_lanes=8)
    expected = take(RowStream(config), 60)
    stream = RowStream(config, start_row=start_row, lane_states=saved_states(expected[:start_row]))
    assert_same_rows(take(stream, 60 - start_row), expected[start_row:])


@pytest.mark.parametrize(("num_shards", "suffix"), [(1, ".jsonl"), (3, ".parquet"), (3, ".jsonl"), (13, ".jsonl.gz")])
def test_every_document_once_an_epoch_over_resumes(make_config: ConfigMaker, num_shards: int, suffix: str) -> None:
    config = make_config(make_documents(61), num_shards=num_shards, suffix=suffix, num_lanes=5, shuffle_buffer=20)
    corpus: Counter[tuple[int, ...]] = Counter()
    rows: list[Row] = []
    for _ in range(4):  # stopped and resumed four times
        rows += take(RowStream(config, start_row=len(rows), lane_states=saved_states(rows)), 5 * 30)
    for lane in range(5):
        texts = texts_of_lane(config, lane)
        owned = Counter(tuple(ids.tolist()) for ids in config.encoder.encode_batch(texts))
        seen = documents_of_lane(rows, lane, config.encoder.eos_token_id)
        epochs = [seen[start : start + len(texts)] for start in range(0, len(seen), len(texts))]
        assert len(epochs) > 3
        assert all(Counter(epoch) == owned for epoch in epochs[:-1])
        assert len({tuple(epoch) for epoch in epochs[:-1]}) == len(epochs) - 1, "each epoch has another order"
        last = rows[-5 + lane].states[0]
        assert (last.documents, last.epoch) == (len(seen), (len(seen) - (last.token == 0)) // len(texts))
        corpus += owned
    all_ids = config.encoder.encode_batch(make_documents(61))
    assert corpus == Counter(tuple(ids.tolist()) for ids in all_ids)


def test_counters_are_of_finished_documents(make_config: ConfigMaker) -> None:
    texts = make_documents(50)
    config = make_config(texts, num_shards=1, num_lanes=1, seq_length=8)
    rows = take(RowStream(config), 2000)
    assert rows[-1].states[0].epoch > 2
    all_ids = config.encoder.encode_batch(texts)
    sizes = {tuple(ids.tolist()): len(text.encode()) for text, ids in zip(texts, all_ids, strict=True)}
    seen = documents_of_lane(rows, 0, config.encoder.eos_token_id)
    num_finished = np.cumsum([np.count_nonzero(row.ids == config.encoder.eos_token_id) for row in rows])
    num_bytes = np.cumsum([0, *(sizes[ids] for ids in seen)])
    for place, row in enumerate(rows):
        expected = (num_finished[place], 8 * (place + 1), num_bytes[num_finished[place]])
        assert (row.states[0].documents, row.states[0].tokens, row.states[0].bytes) == expected


def test_each_epoch_has_its_own_order_of_shards(make_config: ConfigMaker) -> None:
    config = make_config(make_documents(26), num_shards=13, num_lanes=1, shuffle_buffer=1)
    rows = take(RowStream(config), 300)
    seen = documents_of_lane(rows, 0, config.encoder.eos_token_id)
    epochs = {tuple(seen[start : start + 26]) for start in range(0, 26 * 4, 26)}
    assert len(epochs) == 4


def test_seed_and_buffer_change_the_order(make_config: ConfigMaker) -> None:
    config = make_config(make_documents(100))
    first = np.stack([row.ids for row in take(RowStream(config), 40)])
    for other in (replace(config, seed=2), replace(config, shuffle_buffer=80), replace(config, shuffle_buffer=1)):
        assert not np.array_equal(first, np.stack([row.ids for row in take(RowStream(other), 40)]))


def test_the_order_is_pinned(make_config: ConfigMaker) -> None:
    """A checkpoint resumed with another version of NumPy or of this project must go on with the same rows."""
    config = make_config([f"{number}" for number in range(12)], num_shards=1, num_lanes=1, shuffle_buffer=5)
    rows = take(RowStream(config), 10)
    ids = np.concatenate([row.ids for row in rows])
    pieces = np.split(ids, np.flatnonzero(ids == config.encoder.eos_token_id) + 1)
    digits = {tuple(e.tolist()): n for n, e in enumerate(config.encoder.encode_batch([f"{n}" for n in range(12)]))}
    order = [digits[tuple(piece[:-1].tolist())] for piece in pieces[:24]]
    windows = [[3, 2, 0, 1, 4], [6, 5, 7, 8, 9], [10, 11], [1, 2, 3, 4, 0], [7, 8, 5, 6, 9], [10, 11]]
    assert order == [number for window in windows for number in window]


def bytes_read() -> int:
    """Bytes that this process has asked the system for."""
    return int(Path("/proc/self/io").read_text().split()[1])


def test_resume_reads_a_window_a_lane_wherever_it_stands(
    make_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "READ_BYTES", 4096)
    texts = [f"# {number}\n" + "x = 1\n" * 200 for number in range(800)]  # 1.2 kB each, 1 MB in all
    config = make_config(texts, num_shards=2, num_lanes=4, shuffle_buffer=16, seq_length=256)
    rows = [row for row in take(RowStream(config), 6000) if row.states[0].epoch == 0]
    window_bytes = 4 * 2 * 1300  # 4 documents of a lane, and those of the other lane in between
    for share in (0.01, 0.5, 0.99):
        start_row = int(len(rows) * share) // 4 * 4
        states = saved_states(rows[:start_row])
        before = bytes_read()
        resumed = take(RowStream(config, start_row=start_row, lane_states=states), 4)
        assert bytes_read() - before < 4 * (2 * window_bytes + 2 * 4096) < 0.15 * sum(map(len, texts))
        assert_same_rows(resumed, rows[start_row : start_row + 4])


@pytest.mark.parametrize("num_shards", [1, 3, 8, 20])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_lanes_share_the_documents(make_config: ConfigMaker, num_shards: int, suffix: str) -> None:
    texts = make_documents(197)
    config = make_config(texts, num_shards=num_shards, suffix=suffix)
    assert sorted(text for lane in range(8) for text in texts_of_lane(config, lane)) == sorted(texts)


def test_lanes_share_shards_of_all_kinds(make_config: ConfigMaker, make_corpus: Callable[..., Path]) -> None:
    texts = make_documents(400)
    config = make_config(texts[:100])
    for number, suffix in enumerate(SUFFIXES[1:]):
        write_shard(Path(config.datasets[0].name) / "train" / f"more{suffix}", texts[100 * (number + 1) :][:100])
    shards = find_shards(config.datasets[0].name, "train")
    config = replace(config, datasets=[Dataset(name="all", shards=shards)], num_lanes=7)
    assert sorted(text for lane in range(7) for text in texts_of_lane(config, lane)) == sorted(texts)


def test_shares_are_equal_where_shards_can_be_cut(make_config: ConfigMaker) -> None:
    config = make_config([f"{number:05d}" + "x" * 995 for number in range(4000)], num_shards=3)
    shares = [sum(map(len, texts_of_lane(config, lane))) for lane in range(8)]
    assert max(shares) - min(shares) <= 16 * 1000  # a document a piece


def test_a_huge_document_leaves_no_lane_empty(make_config: ConfigMaker) -> None:
    config = make_config([*make_documents(3000), "x = 1\n" * 2_000_000, *make_documents(3000)], num_shards=1)
    check_lanes(config.datasets[0], 16)


@pytest.mark.parametrize(("num_documents", "num_shards", "fitting"), [(5, 1, 3), (11, 3, 6), (2, 1, 1)])
def test_an_empty_lane_names_a_number_that_works(
    make_config: ConfigMaker, num_documents: int, num_shards: int, fitting: int
) -> None:
    config = make_config([f"{number}" for number in range(num_documents)], num_shards=num_shards, num_lanes=24)
    message = f"of num_lanes=24 has no document: .*; num_lanes={fitting} works\\."
    with pytest.raises(UserError, match=message):
        check_lanes(config.datasets[0], 24)
    with pytest.raises(UserError, match=message):
        take(RowStream(config), 24)
    check_lanes(config.datasets[0], fitting)
    take(RowStream(replace(config, num_lanes=fitting)), 3 * fitting)


def test_empty_shards_count(tmp_path: Path) -> None:
    write_shard(tmp_path / "train" / "part-0.jsonl.gz", make_documents(1))
    (tmp_path / "train" / "part-1.jsonl").touch()
    dataset = Dataset(name="mine", shards=find_shards(tmp_path, "train"))
    check_lanes(dataset, 1)
    with pytest.raises(UserError, match="Lane 1 of num_lanes=2 .* num_lanes=1 works"):
        check_lanes(dataset, 2)
    (tmp_path / "train" / "part-0.jsonl.gz").unlink()
    (tmp_path / "train" / "part-0.jsonl").write_text("{\n")
    with pytest.raises(UserError, match="No document can be read from the 2 shards of mine: .*jsonl"):
        check_lanes(Dataset(name="mine", shards=find_shards(tmp_path, "train")), 2)


def test_bad_documents_are_counted_once_however_many_epochs(make_config: ConfigMaker) -> None:
    config = make_config(make_documents(10), num_shards=1, num_lanes=2, max_bad_documents=2)
    with open(config.datasets[0].shards[0].path, "a") as file:
        file.write('{"content": null}\n{"text": "x"}\n')
    shards = find_shards(config.datasets[0].name, "train")
    config = replace(config, datasets=[replace(config.datasets[0], shards=shards)])
    bad = BadDocuments(2)
    rows = take(RowStream(config, bad=bad), 200)
    assert rows[-1].states[0].epoch > 3
    assert sorted(found.line for found in bad) == [11, 12]
    with pytest.raises(UserError, match="max_bad_documents=1"):
        take(RowStream(replace(config, max_bad_documents=1)), 200)


def test_world_size_must_divide_the_lanes() -> None:
    for world_size in (1, 2, 16, 64):
        check_world_size(64, world_size)
    with pytest.raises(UserError, match="shared by 6 ranks; use 4 or 8 ranks, or start a new run with num_lanes=66"):
        check_world_size(64, 6)
    with pytest.raises(UserError, match="shared by 100 ranks; use 64 ranks, or start a new run with num_lanes=100"):
        check_world_size(64, 100)


def test_states_of_another_row_are_refused(make_config: ConfigMaker) -> None:
    config = make_config(make_documents(50))
    states = saved_states(take(RowStream(config), 16))
    with pytest.raises(UserError, match="does not belong to row 24 of the run: lane 0 stands after 64 tokens, not 96"):
        RowStream(config, start_row=24, lane_states=states)
    with pytest.raises(UserError, match="lane 0 stands after 0 tokens"):
        RowStream(config, start_row=16)
    with pytest.raises(UserError, match="lane 0 stands after 64 tokens, not 0"):
        RowStream(config, lane_states=states)
    with pytest.raises(UserError, match="saved lane state must hold the counts .*epoch"):
        LaneState.from_json({"epoch": 1})


def test_fingerprint_differences_are_spelled_out(make_config: ConfigMaker) -> None:
    config = make_config(make_documents(50), num_shards=3)
    saved = json.loads(json.dumps(stream_fingerprint(config)))
    assert fingerprint_differences(saved, stream_fingerprint(config)) == []
    whole = config.datasets[0]
    shards = [whole.shards[0], replace(whole.shards[1], bytes=7), replace(whole.shards[2], name="part-9.jsonl")]
    changed = replace(config, datasets=[replace(whole, shards=shards, weight=2.0)], seq_length=16, seed=2)
    assert fingerprint_differences({**saved, "tokenizer": "0"}, stream_fingerprint(changed)) == [
        "seq_length is 16, but the run was started with 32.",
        "seed is 2, but the run was started with 1.",
        "The tokenizer is not the one that the run was started with (tokenizer.json differs).",
        f"The weight of {whole.name} is 2.0, but was 1.0.",
        f"The shard part-00001.jsonl has 7 bytes, but had {whole.shards[1].bytes}.",
        "The shard part-00002.jsonl is gone.",
        "The shard part-9.jsonl is new.",
    ]
    older = {**saved, "order_version": 0}
    assert fingerprint_differences(older, stream_fingerprint(config)) == [
        "order_version is 2, but the run was started with 0."
    ]
    data = whole.shards[0].path.read_bytes()
    whole.shards[0].path.write_bytes(data.replace(b"document", b"DOCUMENT"))
    assert fingerprint_differences(saved, stream_fingerprint(config)) == [
        f"The shard part-00000.jsonl has its {len(data)} bytes, but their content has changed."
    ]
    assert fingerprint_differences(saved, stream_fingerprint(replace(config, datasets=[whole, whole]))) == [
        "The stream mixes 2 data sets, but the run was started with 1."
    ]


@pytest.fixture
def mixture(make_config: ConfigMaker, tmp_path: Path) -> StreamConfig:
    """Three data sets in the ratio 5 : 2 : 1, whose documents say which they belong to."""
    config = make_config(["x"])
    datasets = []
    for name, weight, count in (("a", 5.0, 90), ("b", 2.0, 120), ("c", 1.0, 60)):
        for number in range(2):
            texts = [f"{name} {n}\n" * (3 + n % 5) for n in range(number, count, 2)]
            write_shard(tmp_path / name / "train" / f"part-{number}.jsonl", texts)
        datasets.append(Dataset(name=name, shards=find_shards(tmp_path / name, "train"), weight=weight))
    return replace(config, datasets=datasets)


def test_a_mixture_keeps_its_weights_from_the_first_rows_on(mixture: StreamConfig) -> None:
    rows = take(RowStream(mixture), 8 * 200)
    for count in (8 * 8, 8 * 50, 8 * 200):
        last = {row.lane: row.states for row in rows[:count]}
        tokens = [sum(states[number].tokens for states in last.values()) for number in range(3)]
        assert sum(tokens) == 32 * count
        for weight, share in zip((5, 2, 1), tokens, strict=True):
            assert share / 32 == pytest.approx(count * weight / 8, abs=8)
    # The rare rows are spread over the steps, not all in one.
    changes = np.array([[row.states[2].tokens for row in rows[lane::8]] for lane in range(8)])
    steps_with_c = (np.diff(changes, axis=1) > 0).sum(axis=0)
    assert steps_with_c.max() <= 4


def test_a_mixture_is_elastic_and_resumes_exactly(mixture: StreamConfig) -> None:
    num_rows = 8 * 150
    expected = take(RowStream(mixture), num_rows)
    assert min(states.epoch for row in expected[-8:] for states in row.states) >= 1
    rng = random.Random(0)
    for _ in range(8):
        world_size = rng.choice([1, 2, 4, 8])
        start_row = 8 * rng.randrange(1, num_rows // 8 - 2)
        states = saved_states(expected[:start_row])
        rows: list[Any] = [None] * (num_rows - start_row)
        for rank in range(world_size):
            place = {"rank": rank, "world_size": world_size, "start_row": start_row, "lane_states": states}
            rows[rank::world_size] = take(RowStream(mixture, **place), len(rows[rank::world_size]))
        assert_same_rows(rows, expected[start_row:])


def test_the_stream_needs_no_torch() -> None:
    code = (
        "import sys, codeparrot_ds.data.stream, codeparrot_ds.data.validation; "
        "assert not {'torch', 'transformers', 'pyarrow', 'datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
