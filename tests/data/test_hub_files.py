"""Tokenizers by their names on the Hub: the real client against the local Hub, its cache, and a Hub that is away."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from codeparrot_ds.data.encoder import find_tokenizer, load_encoder
from codeparrot_ds.data.hub_files import hub_file, hub_tokenizer
from codeparrot_ds.errors import UserError
from tests.hub.model_hub import TOKEN, Fault, ModelHub, running_hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelHub]:
    with running_hub(tmp_path / "root") as server:
        for name in ("HF_HUB_OFFLINE", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", os.environ.get("NO_PROXY", "") + ",127.0.0.1,localhost")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.chdir(tmp_path)
        hub_tokenizer.cache_clear()
        yield server
        hub_tokenizer.cache_clear()


def put(hub: ModelHub, repo: str, folder: Path, *names: str) -> str:
    """Makes a repository with files of a folder; returns its commit."""
    hub.create(repo)
    files = [(name, (folder / name).read_bytes()) for name in names]
    return hub.write_commit(repo, "main", hub.find(repo, "main"), "a tokenizer", files, [])


@pytest.mark.parametrize("name", ["org/model", "gpt2"])
def test_a_name_that_is_no_folder_is_the_hubs(
    hub: ModelHub, tokenizer_dir: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    commit = put(hub, name, tokenizer_dir, "tokenizer.json", "tokenizer_config.json")
    for _ in range(2):
        encoder = load_encoder(name)
        assert encoder.fingerprint == load_encoder(tokenizer_dir).fingerprint
    assert capsys.readouterr().err == f"tokenizer {name} is taken from the Hugging Face Hub\n"
    folder = find_tokenizer(f"{name}@{commit}")
    assert folder.name == commit and (folder / "tokenizer_config.json").is_file()


def test_a_folder_of_that_name_comes_first(hub: ModelHub, tokenizer_dir: Path, tmp_path: Path) -> None:
    put(hub, "org/model", tokenizer_dir, "tokenizer.json")
    (tmp_path / "org" / "model").mkdir(parents=True)
    (tmp_path / "org" / "model" / "tokenizer.json").write_bytes((tokenizer_dir / "tokenizer.json").read_bytes())
    assert find_tokenizer("org/model") == Path("org/model") and hub.log == []


@pytest.mark.parametrize("kind", ["status", "reset"])
def test_a_hub_that_is_away_is_asked_once(hub: ModelHub, tokenizer_dir: Path, kind: str) -> None:
    put(hub, "org/model", tokenizer_dir, "tokenizer.json")
    hub.faults = [Fault(kind)]
    started = time.monotonic()
    with pytest.raises(UserError, match="there is no folder org/model here, and the Hub .*(503|cannot be reached)"):
        load_encoder("org/model")
    assert time.monotonic() - started < 5 and len(hub.log) <= 1
    hub.faults = []
    load_encoder("org/model")
    hub_tokenizer.cache_clear()
    hub.faults = [Fault(kind)]
    load_encoder("org/model")  # from the cache


def test_offline_the_cache_is_taken(hub: ModelHub, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(hub, "org/model", tokenizer_dir, "tokenizer.json")
    load_encoder("org/model")
    hub_tokenizer.cache_clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    load_encoder("org/model")
    with pytest.raises(UserError, match="there is no folder org/other here, and the Hub is not asked offline"):
        load_encoder("org/other")


def test_what_the_hub_does_not_have(hub: ModelHub, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(hub, "org/model", tokenizer_dir, "tokenizer_config.json")
    for name, words in (
        ("org/absent", "the Hub has no model org/absent that you can see: correct the name of the tokenizer"),
        ("absent", "there is no folder absent here, and the Hub has no model absent"),
        ("org/model", "the Hub's org/model has no tokenizer.json: it cannot be used as a tokenizer"),
        ("org/model@absent", "the Hub's org/model has no branch, tag or commit absent"),
        ("org/a--b", "no model on the Hub can be named so"),
    ):
        with pytest.raises(UserError, match=words):
            load_encoder(name)
    assert hub_file("org/model", "tokenizer_config.json", what="model").is_file()
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match="does not give org/model .HTTP 401.: log in"):
        load_encoder("org/model")


def test_todays_checks_hold_for_the_hubs(hub: ModelHub, tokenizer_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    (tmp_path / "tokenizer.json").write_bytes((tokenizer_dir / "tokenizer.json").read_bytes())
    put(hub, "org/model", tmp_path, "tokenizer.json", "tokenizer_config.json")
    with pytest.raises(UserError, match="no end-of-sequence token '</s>'"):
        load_encoder("org/model")
