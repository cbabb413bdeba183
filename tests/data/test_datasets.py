"""From a run config to its data: mixtures, validation, resuming on changed data, and the Hub from end to end."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from codeparrot_ds.config.run_config import RunConfig
from codeparrot_ds.data.datasets import (
    StreamStart,
    check_datasets,
    data_account,
    describe_data,
    open_datasets,
    parse_mixture,
    pinned_names,
    proof_texts,
    resume_stream,
    run_fingerprint,
    saved_stream,
    split_shards,
    stream_of,
    validation_shards,
)
from codeparrot_ds.data.encoder import load_encoder
from codeparrot_ds.data.loader import TrainingLoader, token_ids
from codeparrot_ds.data.shards import find_shards
from codeparrot_ds.data.stream import Dataset, stream_fingerprint
from codeparrot_ds.errors import UserError
from tests.data.conftest import make_documents, write_shard
from tests.data.hub_server import Fault, HubServer, client_process, running_hub
from tests.data.streams import open_stream


@pytest.fixture
def make_config(tmp_path: Path, tokenizer_dir: Path) -> Callable[..., RunConfig]:
    def make(**fields: Any) -> RunConfig:
        settings = {"seq_length": 32, "num_lanes": 8, "shuffle_buffer": 30, "global_batch_size": 8}
        settings |= {"micro_batch_size": 2, "tokenizer": str(tokenizer_dir)}
        return RunConfig(**{**settings, **fields})

    return make


@pytest.fixture
def corpora(tmp_path: Path) -> tuple[Path, Path]:
    for name, split, seed in (("a", "train", 0), ("a", "validation", 1), ("b", "train", 2)):
        write_shard(tmp_path / name / split / "part-0.jsonl", make_documents(90, seed=seed))
    return tmp_path / "a", tmp_path / "b"


def test_mixtures_are_parsed(tmp_path: Path) -> None:
    assert parse_mixture("corpus") == [("corpus", 1.0)]
    assert parse_mixture("org/name@main=0.7, b=.3") == [("org/name@main", 0.7), ("b", 0.3)]
    (tmp_path / "odd=1").mkdir()
    assert parse_mixture(str(tmp_path / "odd=1")) == [(str(tmp_path / "odd=1"), 1.0)]
    for data, words in (("a=0.5,b", "'b' is not NAME=WEIGHT"), ("a=x,b=1", "'a=x'"), ("a=0,b=1", "above 0")):
        with pytest.raises(UserError, match=words):
            parse_mixture(data)
    with pytest.raises(UserError, match="a is named twice"):
        parse_mixture("a=1,a=2")


def test_one_shard_needs_other_data_to_evaluate_on(
    corpora: tuple[Path, Path], make_config: Callable[..., RunConfig]
) -> None:
    a, shard = corpora[0], corpora[1] / "train" / "part-0.jsonl"
    for data in (str(shard), f"{a}=1,{shard}=1"):
        with pytest.raises(UserError, match="part-0.jsonl is one shard, without a validation split.*--validation-data"):
            validation_shards(make_config(data=data))
        config = make_config(data=data, validation_data=str(a))
        check_datasets(config, open_datasets(config))
    assert validation_shards(make_config(data=str(a), validation_data=str(shard))) == split_shards(str(shard), "train")


def test_a_mixture_opens_each_corpus(corpora: tuple[Path, Path], make_config: Callable[..., RunConfig]) -> None:
    a, b = corpora
    config = make_config(data=f"{a}=3,{b}=1", validation_data=str(a))
    datasets = open_datasets(config)
    assert [(dataset.name, dataset.weight) for dataset in datasets] == [(str(a), 3.0), (str(b), 1.0)]
    check_datasets(config, datasets)
    assert validation_shards(config) == split_shards(str(a), "validation")
    with pytest.raises(UserError, match=r"no split 'validation'; it has train.* --validation-data"):
        validation_shards(make_config(data=str(b)))
    with pytest.raises(UserError, match="has no document"):
        check_datasets(replace(config, num_lanes=512), datasets)


def test_a_folder_of_shards_is_split_by_its_names(tmp_path: Path, make_config: Callable[..., RunConfig]) -> None:
    for number, name in enumerate(["train-0.jsonl", "train-1.jsonl", "validation-0.jsonl", "test-0.jsonl"]):
        write_shard(tmp_path / "clone" / "data" / name, make_documents(40, seed=number))
    config = make_config(data=str(tmp_path / "clone"))
    (dataset,) = open_datasets(config)
    assert [shard.name for shard in dataset.shards] == ["data/train-0.jsonl", "data/train-1.jsonl"]
    validation = check_datasets(config, [dataset])
    assert [shard.name for shard in validation] == ["data/validation-0.jsonl"]
    assert describe_data(config, [dataset], validation) == [
        f"{tmp_path}/clone: shards by their names: train 2, validation 1, test 1 (test is not trained on)"
    ]


def test_nobody_evaluates_on_training_rows_without_being_told(
    tmp_path: Path, make_config: Callable[..., RunConfig]
) -> None:
    for number in range(2):
        write_shard(tmp_path / "flat" / f"part-{number}.jsonl", make_documents(40, seed=number))
    config = make_config(data=str(tmp_path / "flat"))
    with pytest.raises(
        UserError, match=r"no name tells any of its 2 shard\(s\).*to evaluate on with --validation-data"
    ):
        check_datasets(config, open_datasets(config))
    told = replace(config, validation_data=config.data)
    (dataset,) = open_datasets(told)
    validation = check_datasets(told, [dataset])
    assert validation == dataset.shards
    assert describe_data(told, [dataset], validation)[1] == (
        "2 of the 2 shard(s) to evaluate on are trained on as well"
    )


def test_a_run_keeps_the_shards_that_it_began_with(
    tmp_path: Path, make_config: Callable[..., RunConfig], tokenizer_dir: Path
) -> None:
    """Version 0.1 took all of a folder for each split, and read `content` alone."""
    for number, name in enumerate(["train-0.jsonl", "validation-0.jsonl", "test-0.jsonl", "state.json"]):
        write_shard(tmp_path / "flat" / name, make_documents(40, seed=number))
    config, encoder = make_config(data=str(tmp_path / "flat")), load_encoder(tokenizer_dir)
    names = ["state.json", "test-0.jsonl", "train-0.jsonl", "validation-0.jsonl"]
    old = [shard for shard in find_shards(config.data, "train", by_names=False)]
    assert [shard.name for shard in old] == names
    began = stream_fingerprint(stream_of(config, [Dataset(name=config.data, shards=old)], encoder))
    saved = saved_stream(began, StreamStart(row=8))

    datasets = open_datasets(config, began=began)
    assert [shard.name for shard in datasets[0].shards] == names
    assert [shard.name for shard in validation_shards(config, began)] == names
    fingerprint = run_fingerprint(config, stream_of(config, datasets, encoder), began)
    assert resume_stream(saved, fingerprint, on_data_change="refuse") == (StreamStart(row=8), [])
    assert describe_data(config, datasets, [], began) == [
        "the run keeps the shards that it began with, whatever their names say now"
    ]
    # One that begins today goes by the names, also after a shard to test on has come.
    begun = run_fingerprint(config, stream_of(config, open_datasets(config), encoder))
    write_shard(tmp_path / "flat" / "test-1.jsonl", make_documents(40, seed=9))
    again = open_datasets(config, began=begun)
    assert [shard.name for shard in again[0].shards] == ["train-0.jsonl"]
    assert run_fingerprint(config, stream_of(config, again, encoder), begun) == begun
    with pytest.raises(UserError, match="The shard test-1.jsonl is new"):
        now = stream_of(config, open_datasets(config, began=began), encoder)
        resume_stream(saved, run_fingerprint(config, now, began), on_data_change="refuse")


def test_columns_are_part_of_what_a_run_began_with(
    tmp_path: Path, make_config: Callable[..., RunConfig], tokenizer_dir: Path
) -> None:
    write_shard(tmp_path / "train.jsonl", ["not this"], {"content": "a summary", "body": "x = 1\n" * 500})
    config = make_config(data=str(tmp_path / "train.jsonl"), columns="content=body")
    stream = open_stream(config, load_encoder(tokenizer_dir))
    assert list(proof_texts(stream)) == ["x = 1\n" * 500]
    saved = saved_stream(run_fingerprint(config, stream), StreamStart())
    other = run_fingerprint(replace(config, columns=""), stream)
    with pytest.raises(UserError, match="columns is '', but the run was started with 'content=body'"):
        resume_stream(saved, other, on_data_change="refuse")


def test_the_encoder_is_proved_on_the_corpus(
    corpora: tuple[Path, Path], make_config: Callable[..., RunConfig], tokenizer_dir: Path, monkeypatch: Any
) -> None:
    config = make_config(data=str(corpora[0]))
    stream = open_stream(config, load_encoder(tokenizer_dir))
    texts = list(proof_texts(stream))
    assert len(texts) >= 16 and set(texts) <= set(make_documents(90, seed=0))
    assert stream.encoder.name == "tokenizers"
    assert stream.encoder.prove_fast_encoding(texts) is None and stream.encoder.name == "gigatoken"
    other = load_encoder(tokenizer_dir)
    encode = other._encode
    monkeypatch.setattr(
        other, "_encode", lambda some, **kwargs: encode(["x" if t == texts[3] else t for t in some], **kwargs)
    )
    reason = other.prove_fast_encoding(texts)
    assert reason is not None and "differently from the tokenizers library" in reason and other.name == "tokenizers"


def test_a_stream_goes_on_or_begins_anew(
    corpora: tuple[Path, Path], make_config: Callable[..., RunConfig], tokenizer_dir: Path
) -> None:
    encoder = load_encoder(tokenizer_dir)
    config = make_config(data=str(corpora[0]))
    stream = open_stream(config, encoder)
    loader = TrainingLoader(stream, micro_batch_size=8)
    next(loader)
    start = StreamStart(row=8, lane_states=loader.state())
    saved = json.loads(json.dumps(saved_stream(stream_fingerprint(stream), start)))
    assert resume_stream(saved, stream_fingerprint(stream), on_data_change="refuse") == (start, [])
    other = stream_fingerprint(open_stream(make_config(data=str(corpora[1]), seq_length=16), encoder))
    with pytest.raises(UserError, match=r"other data: seq_length is 16.* The shard part-0.*--on-data-change restart"):
        resume_stream(saved, other, on_data_change="refuse")
    anew, differences = resume_stream(saved, other, on_data_change="restart")
    assert anew == StreamStart() and len(differences) == 2


def test_the_account_adds_up_over_ranks() -> None:
    counters = [
        {"epoch": 1, "documents": 10, "characters": 300, "bytes": 310, "tokens": 100, "tokens_of_documents": 90},
        {"epoch": 0, "documents": 20, "characters": 600, "bytes": 610, "tokens": 100, "tokens_of_documents": 90},
    ]
    account = data_account(counters, bad_documents=["x.jsonl, line 3: broken"], rows_per_lane={1: 5, 0: 4}, encoder="e")
    assert account["epoch"] == 0 and account["bytes"] == 920 and account["rows_per_lane"] == [4, 5]
    assert account["summary"] == (
        "epoch 0, 200 tokens, 30 documents finished (920 bytes, 6 tokens per document, 5.00 characters per token); "
        "1 unreadable documents skipped, the first: x.jsonl, line 3: broken"
    )
    nothing_but_tokens = dict.fromkeys(counters[0], 0) | {"tokens": 64}
    nothing = data_account([dict.fromkeys(counters[0], 0)], bad_documents=[], rows_per_lane={0: 0}, encoder="e")
    assert nothing["tokens_per_document"] is None and nothing["chars_per_token"] is None
    assert nothing["summary"] == "epoch 0, 0 tokens"
    begun = data_account([nothing_but_tokens], bad_documents=[], rows_per_lane={0: 1}, encoder="e")
    assert begun["summary"] == "epoch 0, 64 tokens, no document read to its end yet"


# --------------------------------------------------------------------------------------------------------------------
# The Hub


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with running_hub() as server:
        yield server


def stream_of_the_hub(config: RunConfig, tokenizer: str, pins: dict[str, str], workers: int) -> tuple[Any, ...]:
    """The first rows of a run on a Hub data set, its fingerprint, and the pins that it records."""
    datasets = open_datasets(config, pins)
    stream = stream_of(config, datasets, load_encoder(tokenizer))
    loader = TrainingLoader(stream, micro_batch_size=8, num_workers=workers)
    rows = torch.cat([token_ids(next(loader)) for _ in range(60)])
    epoch = loader.counters()["epoch"]
    loader.close()
    return rows.tolist(), epoch, stream_fingerprint(stream), pinned_names(config, datasets)


def test_a_hub_data_set_streams_as_its_files_do_on_disk(
    hub: HubServer, tmp_path: Path, make_config: Callable[..., RunConfig], tokenizer_dir: Path
) -> None:
    names = ["train/part-0.jsonl", "train/part-1.json.gz", "train/part-2.jsonl", "validation/part-0.jsonl"]
    for number, name in enumerate(names):
        write_shard(tmp_path / "corpus" / name, make_documents(60, seed=number))
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n"
    card += "  - {split: train, path: 'train/*'}\n  - {split: validation, path: 'validation/*'}\n---\n"
    files = {name: (tmp_path / "corpus" / name).read_bytes() for name in names} | {"README.md": card.encode()}
    commit = hub.commit("org/code", files)
    local = make_config(data=str(tmp_path / "corpus"))
    loader = TrainingLoader(open_stream(local, load_encoder(tokenizer_dir)), micro_batch_size=8)
    expected = torch.cat([token_ids(next(loader)) for _ in range(60)]).tolist()

    config = make_config(data="org/code")
    with client_process(tmp_path / "hf", HF_ENDPOINT=hub.endpoint) as call:
        rows, epoch, fingerprint, pins = call(stream_of_the_hub, config, str(tokenizer_dir), {}, 0)
        assert rows == expected and epoch >= 1
        assert pins == {"org/code": f"org/code@{commit}"}
        # The data set moves on; a run that began before does not. The Hub is away for a while meanwhile.
        hub.commit("org/code", files | {"train/part-0.jsonl": files["train/part-0.jsonl"].upper()})
        threading.Timer(1.0, setattr, (hub, "fault", Fault("status", until=time.monotonic() + 2))).start()
        rows, _, again, pins = call(stream_of_the_hub, config, str(tokenizer_dir), pins, 1)
        assert rows == expected and again == fingerprint and pins == {"org/code": f"org/code@{commit}"}
        changed = call(stream_of_the_hub, config, str(tokenizer_dir), {}, 0)
        assert changed[0] != expected and changed[2] != fingerprint
