"""Hub datasets, read by the real clients from a small Hub on loopback."""

from __future__ import annotations

import logging
import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from functools import partial
from typing import Any, NamedTuple

import pytest

from codeparrot_ds.data.hub_dataset import HubFile, HubReader, resolve_hub_dataset
from codeparrot_ds.data.hub_files import first_look
from codeparrot_ds.errors import UserError
from tests.data.conftest import make_documents, write_shard
from tests.data.hub_server import Fault, HubServer, client_process, content_id, running_hub

TOKEN = "hf_secret"
CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: ["part-*.jsonl", "more/part-*.json.gz", "part-c.parquet", "part-a.jsonl"]
  - split: validation
    path: held-out.jsonl
---
"""


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with running_hub() as server:
        yield server


@pytest.fixture(autouse=True)
def healthy(request: pytest.FixtureRequest) -> None:
    if "hub" in request.fixturenames:
        server = request.getfixturevalue("hub")
        server.fault = None
        server.log.clear()


@pytest.fixture(scope="module")
def client(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    with client_process(tmp_path_factory.mktemp("hf"), HF_ENDPOINT=hub.endpoint, HF_TOKEN=TOKEN) as call:
        yield call


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A card and small files of each format; ``other.jsonl`` belongs to no split."""
    folder = tmp_path_factory.mktemp("files")
    names = ["part-a.jsonl", "part-b.jsonl", "part-c.parquet", "held-out.jsonl", "other.jsonl", "part-d.jsonl.gz"]
    for number, name in enumerate(names):
        write_shard(folder / name, make_documents(300, seed=number))
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    files["more/part-d.json.gz"] = files.pop("part-d.jsonl.gz")
    return files | {"README.md": CARD.encode(), "notes.txt": b"no data"}


@pytest.fixture(scope="module")
def mixed(hub: HubServer, files: dict[str, bytes], client: Callable[..., Any]) -> list[HubFile]:
    """The train split of the dataset team/mixed."""
    hub.commit("team/mixed", files)
    return client(resolve_hub_dataset, "team/mixed", "train")


class Report(NamedTuple):
    """What a client process saw."""

    data: list[bytes]
    log: list[tuple[str, str]]
    seconds: float
    waits: list[float]
    randomness_moved: bool


def read(file: HubFile, spans: Sequence[tuple[int, int]], patience: float = 30.0, pace: float = 1.0) -> Report:
    """Reads (offset, size) spans with one reader; waits are noted, and ``pace`` times as long as they should be."""
    log: list[tuple[str, str]] = []
    handler = logging.Handler()
    handler.emit = lambda record: log.append((record.levelname, record.getMessage()))  # type: ignore[method-assign]
    root = logging.getLogger()
    root.addHandler(handler)
    logging.getLogger("codeparrot_ds").setLevel(logging.INFO)
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        time.sleep(seconds * pace)

    reader = HubReader(file, patience_seconds=patience, sleep=sleep)
    state, start = random.getstate(), time.monotonic()
    try:
        data = [reader.read_at(offset, size) for offset, size in spans]
    finally:
        root.removeHandler(handler)
    own = [entry for entry in log if "hf://" in entry[1]]
    return Report(data, own, time.monotonic() - start, waits, random.getstate() != state)


def paths(found: list[HubFile]) -> list[str]:
    return [file.path for file in found]


def named(found: list[HubFile], path: str) -> HubFile:
    [file] = [file for file in found if file.path == path]
    return file


def test_the_card_decides_which_files_are_a_split(hub, client, files, mixed):
    assert paths(mixed) == ["more/part-d.json.gz", "part-a.jsonl", "part-b.jsonl", "part-c.parquet"]
    for file in mixed:
        data = files[file.path]
        assert file.repo == "team/mixed" and file.commit == hub.heads["team/mixed"]
        assert file.bytes == len(data) and file.content_id == content_id(file.path, data)
    assert paths(client(resolve_hub_dataset, "team/mixed", "validation")) == ["held-out.jsonl"]
    # Nothing but the card was fetched: the sizes and identities are the listing's.
    fetched = [request for request in hub.log if request.bytes and "/resolve/" in request.path]
    assert all(request.path.endswith("README.md") for request in fetched)


def test_without_a_card_the_default_patterns_do(hub, client, files):
    shards = {f"data/{split}-0000{n}-of-00002.parquet": b"%d" % n for split in ("train", "test") for n in (0, 1)}
    hub.commit("team/plain", shards)
    held_out = sorted(name for name in shards if "test" in name)
    assert paths(client(resolve_hub_dataset, "team/plain", "test")) == held_out
    # Named to evaluate on it is that; on its own rows a run is not evaluated.
    assert paths(client(partial(resolve_hub_dataset, named=True), "team/plain", "validation")) == held_out
    with pytest.raises(UserError, match="no split 'validation'; it has train, test"):
        client(resolve_hub_dataset, "team/plain", "validation")


def test_a_folder_of_the_same_name_is_not_taken_for_the_dataset(hub, client, mixed, tmp_path):
    (tmp_path / "team" / "mixed").mkdir(parents=True)
    (tmp_path / "team" / "mixed" / "train.jsonl").write_text("{}")
    client(os.chdir, tmp_path)
    assert client(resolve_hub_dataset, "team/mixed", "train") == mixed


def test_a_config_can_be_chosen(hub, client):
    card = "---\nconfigs:\n" + "".join(
        f"- {{config_name: {name}, data_files: {name}.jsonl}}\n" for name in ("python", "rust")
    )
    hub.commit("team/languages", {"README.md": f"{card}---\n".encode(), "python.jsonl": b"{}\n", "rust.jsonl": b"{}\n"})
    assert paths(client(resolve_hub_dataset, "team/languages:rust", "train")) == ["rust.jsonl"]
    for name in ("team/languages", "team/languages:cobol"):
        with pytest.raises(UserError, match=r"name one as team/languages:CONFIG, of 'python', 'rust'\.$"):
            client(resolve_hub_dataset, name, "train")


def test_main_moves_on_and_the_reader_stays(hub, client):
    first = hub.commit("team/moving", {"train.jsonl": b"old text\n"})
    old = client(resolve_hub_dataset, "team/moving", "train")
    hub.commit("team/moving", {"train.jsonl": b"new and longer text\n"})
    [file] = client(resolve_hub_dataset, "team/moving", "train")
    assert file.commit != first and file.content_id != old[0].content_id
    assert client(resolve_hub_dataset, f"team/moving@{first}", "train") == old
    assert client(read, old[0], [(0, 100)]).data == [b"old text\n"]
    assert client(read, file, [(0, 100)]).data == [b"new and longer text\n"]


@pytest.mark.parametrize(
    ("name", "split", "sentence"),
    [
        ("team/absent", "train", r"The Hub has no dataset team/absent that you can see; .*folder.*hf auth login"),
        ("team/mixed@v9", "train", "The Hub dataset team/mixed has no branch, tag or commit 'v9'"),
        ("team/mixed", "test", "The Hub dataset team/mixed has no split 'test'; it has train, validation"),
        (
            "team/tables",
            "train",
            "The split 'train' of team/tables has train.csv, whose format is not read; .*.parquet",
        ),
        ("team/prose", "train", "The Hub dataset team/prose has no files that can be read; .*.jsonl"),
        ("team/gated", "train", "The Hub dataset team/gated is gated: .*hf auth login"),
        ("team/script", "train", "team/script is a script, .* try team/script@refs/convert/parquet"),
        ("./team/mixed", "train", "'./team/mixed' is neither an existing folder nor the name of a Hub dataset"),
        ("mixed", "train", "'mixed' is neither an existing folder nor the name of a Hub dataset"),
    ],
)
def test_a_mistake_gets_one_sentence(hub, client, mixed, name, split, sentence):
    hub.commit("team/tables", {"train.csv": b"a,b\n"})
    hub.commit("team/prose", {"letter.doc": b"Dear"})
    hub.commit("team/script", {"script.py": b"", "train.jsonl": b"{}\n"})
    hub.commit("team/gated", {"train.jsonl": b"{}\n"})
    hub.refusals["team/gated"] = (403, "GatedRepo")
    with pytest.raises(UserError, match=f"{sentence}.*\\.$") as caught:
        client(resolve_hub_dataset, name, split)
    assert "\n" not in str(caught.value)


def test_an_unwell_hub_gets_one_sentence(hub, client, mixed):
    hub.fault = Fault("status", status=500, matching="/api/")
    with pytest.raises(UserError, match=r"cannot list the dataset team/mixed \(HTTP 500\); try again later\.$"):
        client(resolve_hub_dataset, "team/mixed", "train")
    hub.fault = Fault("drop")
    with pytest.raises(UserError, match=r"team/mixed cannot be looked up: http://127.* cannot be reached \(.*\.$"):
        client(resolve_hub_dataset, "team/mixed", "train")


def load_for_problems(name: str) -> int:
    """Rows of the train split, as ``humaneval --problems`` loads it."""
    import datasets

    with first_look(name, "name a file"):
        return len(datasets.load_dataset(name, split="train"))


@pytest.mark.parametrize("kind", ["drop", "status"])
def test_a_command_asks_once_and_then_takes_what_the_cache_holds(hub, client, kind):
    hub.commit(f"team/{kind}", {"train.jsonl": b'{"a": 1}\n{"a": 2}\n'})
    assert client(load_for_problems, f"team/{kind}") == 2
    hub.fault = Fault(kind, status=503) if kind == "status" else Fault(kind)
    hub.log.clear()
    started = time.monotonic()
    assert client(load_for_problems, f"team/{kind}") == 2
    with pytest.raises(UserError, match=r"no folder team/new here, and the Hub at http://127.* name a file, or try"):
        client(load_for_problems, "team/new")
    assert len(hub.log) <= 2 and time.monotonic() - started < 5


def test_offline_and_without_a_network_get_one_sentence(tmp_path, mixed):
    with client_process(tmp_path, HF_HUB_OFFLINE="1") as call:
        with pytest.raises(UserError, match=r"team/mixed cannot be read offline; unset HF_HUB_OFFLINE.*folder\.$"):
            call(resolve_hub_dataset, "team/mixed", "train")
        with pytest.raises(UserError, match=r"part-a.jsonl cannot be read offline; unset HF_HUB_OFFLINE"):
            call(read, mixed[1], [(0, 10)])
    with client_process(tmp_path, HF_ENDPOINT="http://127.0.0.1:9") as call:
        with pytest.raises(UserError, match=r"http://127.0.0.1:9 cannot be reached \(.*refused\); check the network"):
            call(resolve_hub_dataset, "team/mixed", "train")
        with pytest.raises(UserError, match=r"part-a.jsonl could not be read for 1.*refused\); start again when "):
            call(read, mixed[1], [(0, 10)], 1.0)


def test_exact_bytes_at_any_offset_and_no_more_than_asked_for(hub, client, files, mixed):
    rng = random.Random(0)
    for file in mixed:
        data = files[file.path]
        spans = [(rng.randrange(len(data)), rng.randrange(1, 3000)) for _ in range(20)]
        spans += [(0, len(data)), (len(data) - 3, 100)]
        hub.log.clear()
        report = client(read, file, [*spans, (len(data), 5), (len(data) + 9, 5), (0, 0)])
        expected = [data[offset : offset + size] for offset, size in spans]
        assert report.data == [*expected, b"", b"", b""]
        assert report.log == [] and report.waits == []
        # One request for each span (and its redirect), and not a byte beyond.
        assert sum(request.bytes for request in hub.log) == sum(map(len, expected))
        assert sum("/resolve/" in request.path for request in hub.log) == len(spans)
        assert all(request.range for request in hub.log)


def test_the_login_goes_to_the_hub_and_not_to_its_store(hub, client, mixed):
    client(read, named(mixed, "part-c.parquet"), [(0, 10)])
    resolve, store = hub.log
    assert resolve.authorization == f"Bearer {TOKEN}"
    assert store.path.startswith("/store/") and store.authorization is None


def test_an_outage_is_survived_with_one_warning(hub, client, files, mixed):
    file = named(mixed, "part-a.jsonl")
    spans = [(offset, 1000) for offset in range(0, file.bytes, 1000)]
    hub.fault = Fault("drop", until=time.monotonic() + 3)
    report = client(read, file, spans)
    assert b"".join(report.data) == files[file.path]
    assert 3 <= report.seconds < 10 and not report.randomness_moved
    (warned, start), (informed, end) = report.log
    assert (warned, informed) == ("WARNING", "INFO")
    assert start.startswith(f"hf://datasets/team/mixed@{file.commit[:8]}/part-a.jsonl cannot be read (")
    assert "disconnected" in start and "for up to 30 s" in start
    assert "can be read again after" in end


@pytest.mark.parametrize("kind", ["truncate", "scant", "short", "shift", "hang"])
@pytest.mark.parametrize("path", ["part-a.jsonl", "part-c.parquet"])
def test_a_wrong_answer_is_asked_for_again(hub, client, files, mixed, kind, path):
    store = "/store/" if path.endswith(".parquet") else "/resolve/"
    hub.fault = Fault(kind, requests=2, matching=store)
    report = client(read, named(mixed, path), [(500, 1000)], 30.0, 0.01)
    assert report.data == [files[path][500:1500]]
    assert [level for level, _ in report.log] == ["WARNING", "INFO"]
    assert 0.5 <= report.waits[0] <= 1 <= report.waits[1] <= 2


def test_a_small_file_may_come_whole_but_no_large_one(hub, client, files, mixed):
    hub.fault = Fault("whole", requests=1, matching="/resolve/")
    report = client(read, named(mixed, "part-a.jsonl"), [(500, 1000)])
    assert report.data == [files["part-a.jsonl"][500:1500]] and not report.log

    large = random.Random(0).randbytes(100) + bytes(64 << 20)
    commit = hub.commit("team/large", {"train.jsonl": large})
    file = HubFile(repo="team/large", commit=commit, path="train.jsonl", bytes=len(large), content_id="")
    hub.fault = Fault("whole", requests=1)
    report = client(read, file, [(50, 100)], 30.0, 0.01)
    assert report.data == [large[50:150]]
    assert "(HTTP 200 in answer to a byte range)" in report.log[0][1]


@pytest.mark.parametrize(
    "headers",
    [
        {"Retry-After": "20"},
        {"Retry-After": format_datetime(datetime.now(timezone.utc) + timedelta(days=1), usegmt=True)},
        {"RateLimit": '"resolvers";r=0;t=20'},
    ],
    ids=["seconds", "date", "ratelimit"],
)
def test_a_busy_hub_says_how_long_to_wait(hub, client, mixed, headers):
    hub.fault = Fault("status", status=429, headers=headers, requests=1)
    report = client(read, mixed[0], [(0, 10)], 20.0, 0.01)
    assert report.waits == [pytest.approx(20, abs=0.2)]  # no longer than patience lasts
    assert "HTTP 429" in report.log[0][1]


def test_waits_grow_up_to_a_minute(hub, client, mixed):
    hub.fault = Fault("status", requests=9)
    with pytest.raises(_GaveUp) as caught:
        client(wait_times, mixed[0])
    waits = caught.value.args[0]
    assert all(2**n / 2 <= wait <= 2**n for n, wait in enumerate(waits[:6]))
    assert all(30 <= wait <= 60 for wait in waits[6:]) and len(set(waits)) == len(waits)


class _GaveUp(Exception):
    pass


def wait_times(file: HubFile) -> None:
    """Raises the first nine waits; `sleep` is how a run that is asked to stop leaves an outage."""
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 9:
            raise _GaveUp(waits)

    HubReader(file, sleep=sleep).read_at(0, 10)


def test_patience_ends_with_one_sentence(hub, client, mixed):
    hub.fault = Fault("status")
    start = time.monotonic()
    with pytest.raises(UserError, match=r"^hf://datasets/team/mixed@\w+/part-a.jsonl could not be read for .*503.*\.$"):
        client(read, named(mixed, "part-a.jsonl"), [(0, 10)], 1.5)
    assert 1.5 <= time.monotonic() - start < 4


@pytest.mark.parametrize(
    ("status", "sentence"),
    [
        (401, "may not be read (HTTP 401); log in with `hf auth login`"),
        (403, "may not be read (HTTP 403); log in with `hf auth login`"),
        (404, "is no longer on the Hub (HTTP 404); start a new run"),
        (410, "cannot be read: the Hub refuses the request (HTTP 410)"),
        (416, "does not have the bytes 0-9/"),
    ],
)
def test_a_refusal_is_final(hub, client, mixed, status, sentence):
    hub.fault = Fault("status", status=status)
    with pytest.raises(UserError) as caught:
        client(read, mixed[0], [(0, 10)])
    assert sentence in str(caught.value) and len(hub.log) == 1


def test_an_interrupt_gets_through_a_wait(hub, client, mixed):
    hub.fault = Fault("drop")
    assert client(interrupted_seconds, mixed[0]) < 2


def interrupted_seconds(file: HubFile) -> float:
    """How long a read into an outage lasts when a signal's handler raises after a second."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, interrupt)
    signal.alarm(1)
    start = time.monotonic()
    try:
        HubReader(file).read_at(0, 10)
    except KeyboardInterrupt:
        return time.monotonic() - start
    raise AssertionError("the read came to an end")


def test_a_forked_child_opens_a_connection_of_its_own(hub, client, files, mixed):
    file = named(mixed, "part-a.jsonl")
    assert client(read_on_both_sides_of_a_fork, file) == [files[file.path][:10], 0, files[file.path][:10]]
    parent, child, parent_again = (request.port for request in hub.log)
    assert child != parent == parent_again


def read_on_both_sides_of_a_fork(file: HubFile) -> list[bytes | int | None]:
    """What this process reads before a fork, how its child fares, and what this process reads after it."""
    reader = HubReader(file)
    before = reader.read_at(0, 10)
    child = multiprocessing.get_context("fork").Process(target=reader.read_at, args=(20, 10))
    child.start()
    child.join(timeout=20)
    return [before, child.exitcode, reader.read_at(0, 10)]


def test_children_are_forked_while_threads_read(hub, client, files, mixed):
    file = named(mixed, "part-c.parquet")
    assert client(fork_beside_threads, file, files[file.path]) == [0] * 30


def fork_beside_threads(file: HubFile, expected: bytes) -> list[int | None]:
    """Exit codes of children that are forked while threads of this process read with the same reader."""
    reader = HubReader(file)
    done = threading.Event()

    def keep_reading() -> None:
        while not done.is_set():
            assert reader.read_at(7, 500) == expected[7:507]

    def read_once(number: int) -> None:
        assert reader.read_at(number, 500) == expected[number : number + 500]

    threads = [threading.Thread(target=keep_reading) for _ in range(4)]
    for thread in threads:
        thread.start()
    codes = []
    for number in range(30):
        child = multiprocessing.get_context("fork").Process(target=read_once, args=(number,))
        child.start()
        child.join(timeout=20)
        codes.append(child.exitcode)
        if child.exitcode is None:  # it waits for what nobody will release
            child.kill()
            break
    done.set()
    for thread in threads:
        thread.join()
    return codes


def test_a_reader_opens_nothing_when_it_is_made():
    file = HubFile(repo="a/b", commit="0" * 40, path="c.jsonl", bytes=7, content_id="0")
    assert HubReader(file).read_at(7, 1) == b""
    with pytest.raises(ValueError):
        HubReader(file).read_at(-1, 1)
