"""What `--init-from` takes and refuses, before a rank starts; the weights themselves in tests/story/test_hub.py."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file, save_model

from codeparrot_ds.checkpoint.initial import (
    initial_weights,
    load_initial_weights,
    with_initial_model,
    with_kept_tokenizer,
)
from codeparrot_ds.config.files import save_config
from codeparrot_ds.ds_config.file import name_in
from codeparrot_ds.errors import UserError
from codeparrot_ds.hub.local_git import LocalRepository
from codeparrot_ds.hub.revision import Revision, parse_revision
from codeparrot_ds.model.gpt2 import build_model, load_weights
from codeparrot_ds.model.shapes import find_shape

BRANCH = "calm-owl-3"


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tokenizer_dir):
    """A model folder as a run exports it."""
    folder = tmp_path_factory.mktemp("exported")
    shutil.copytree(tokenizer_dir, folder, dirs_exist_ok=True)
    model = build_model(find_shape("demo", vocab_size=257, seq_length=32), eos_token_id=0, seed=5)
    model.config.save_pretrained(folder)
    save_file({name: p.detach().contiguous() for name, p in model.named_parameters()}, folder / "model.safetensors")
    return folder


@pytest.fixture
def repository(tmp_path, exported):
    repository = LocalRepository(tmp_path / "hub.git")
    repository.create()
    repository.create_branch(BRANCH)
    repository.commit_folder(BRANCH, exported, "step 1")
    return repository


def test_a_branch_is_pinned_and_its_tokenizer_kept(make_config, repository, exported):
    config = with_initial_model(make_config(init_from=f"{repository.path}@{BRANCH}", tokenizer=""))
    assert config.init_from == f"{repository.path}@{repository.head(BRANCH)}"
    assert not Path(config.output_dir).exists()  # nothing is kept of a start that may be refused yet
    config = with_kept_tokenizer(config, "")
    kept = Path(config.tokenizer)
    assert kept.parent == Path(config.output_dir) / "tokenizers"
    assert (kept / "tokenizer.json").read_bytes() == (exported / "tokenizer.json").read_bytes()
    assert with_kept_tokenizer(with_initial_model(config), config.tokenizer) == config
    shutil.rmtree(repository.path)  # what is pinned is not asked for again
    assert with_initial_model(config) == config


def test_a_folder_is_taken_as_it_is(make_config, exported, tokenizer_dir):
    config = with_initial_model(make_config(init_from=str(exported), tokenizer=""))
    assert config.init_from == config.tokenizer == str(exported) and with_kept_tokenizer(config, "") == config
    assert with_initial_model(make_config(init_from=str(exported))).tokenizer == str(tokenizer_dir)  # it is equal


def test_a_run_that_goes_on_keeps_what_it_began_with(make_config, repository):
    config = with_kept_tokenizer(
        with_initial_model(make_config(init_from=f"{repository.path}@{BRANCH}", tokenizer="")), ""
    )
    run = Path(config.output_dir) / str(config.run_name)
    (run / "checkpoints" / "step-00000004").mkdir(parents=True)
    save_config(config, run / "config.yaml")
    shutil.rmtree(repository.path)
    again = make_config(init_from=f"{repository.path}@{BRANCH}", tokenizer="")
    assert with_initial_model(again) == config
    load_initial_weights(None, again, _OnlyRank(), partitioned=False)  # asks nothing either


def test_a_rank_that_was_started_without_the_front_door_keeps_absolute_paths(
    make_config, exported, corpus_dir, tmp_path, monkeypatch
):
    from codeparrot_ds.training.process import agree_on_run

    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus").symlink_to(corpus_dir)
    shutil.copytree(exported, tmp_path / "runs" / "first" / "checkpoints" / "step-00000004" / "export")
    (tmp_path / "runs" / "first" / "checkpoints" / "step-00000004" / "manifest.json").write_text("{}")
    config = make_config(
        data="corpus", tokenizer="", init_from="first", output_dir="runs", run_name=None, deepspeed="zero2:auto"
    )
    run = agree_on_run(config, _OnlyRank())
    ready, export = run.config, tmp_path / "runs" / "first" / "checkpoints" / "step-00000004" / "export"
    assert (ready.data, ready.output_dir) == (f"{tmp_path}/corpus", f"{tmp_path}/runs")
    assert ready.init_from == ready.tokenizer == str(export) and ready.run_name
    assert ready.deepspeed == name_in("zero2:auto", run.precision)
    assert agree_on_run(ready, _OnlyRank()).as_json() == run.as_json()


class _OnlyRank:
    is_main, world_size, device = True, 1, torch.device("cpu")

    def on_main(self, ask):
        return ask()

    together = on_main


def test_the_weights_are_those_of_the_branch(make_config, repository, exported):
    config = with_initial_model(make_config(init_from=f"{repository.path}@{BRANCH}", tokenizer=""))
    shape = find_shape("demo", vocab_size=257, seq_length=32)
    wanted = build_model(shape, eos_token_id=0, seed=5)
    for dtype in (torch.float32, torch.bfloat16):
        model = build_model(shape, eos_token_id=0, seed=6).to(dtype)
        assert not torch.equal(model.transformer.wte.weight, wanted.transformer.wte.weight.to(dtype))
        load_initial_weights(model, config, _OnlyRank(), partitioned=False)
        for (name, got), want in zip(model.named_parameters(), wanted.parameters(), strict=True):
            assert torch.equal(got, want.to(dtype)), name
    names = [name for name, _ in model.named_parameters()]
    load_weights(model, initial_weights(str(exported), names), partitioned=False)


def in_shards(model, folder):
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="2MB")
    assert len(list(folder.glob("model-*.safetensors"))) > 3


def without_its_head(model, folder):
    """As the Hub's gpt2 is: names without "transformer."."""
    model.transformer.save_pretrained(folder)


def under_the_other_name(model, folder):
    """Of two tied parameters this writes the one whose name comes first."""
    save_model(model, str(folder / "model.safetensors"))


def in_half_precision(model, folder):
    model.to(torch.float16).save_pretrained(folder)


@pytest.mark.parametrize("write", [in_shards, without_its_head, under_the_other_name, in_half_precision])
def test_weights_are_read_however_they_are_named_and_cut(make_config, exported, tmp_path, write):
    folder = shutil.copytree(exported, tmp_path / "model")
    shape = find_shape("demo", vocab_size=257, seq_length=32)
    wanted = build_model(shape, eos_token_id=0, seed=7)
    write(wanted, folder)
    config = with_initial_model(make_config(init_from=str(folder), tokenizer=""))
    model = build_model(shape, eos_token_id=0, seed=6)
    load_initial_weights(model, config, _OnlyRank(), partitioned=False)
    for (name, got), want in zip(model.named_parameters(), wanted.parameters(), strict=True):
        assert torch.equal(got, want.float()), name


def test_weights_in_shards_that_are_not_whole(make_config, exported, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "model")
    in_shards(build_model(find_shape("demo", vocab_size=257, seq_length=32), eos_token_id=0, seed=7), folder)
    index = folder / "model.safetensors.index.json"
    shard = folder / json.loads(index.read_text())["weight_map"]["transformer.wpe.weight"]

    def refuse(words):
        with pytest.raises(UserError, match=words):
            with_initial_model(make_config(init_from=str(folder), tokenizer=""))

    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    refuse(f"{shard.name} cannot be read: it is no safetensors file, or damaged")
    shard.unlink()
    refuse(f"{shard.name} cannot be read: No such file")
    for text in ("{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "{}"):
        index.write_text(text)
        refuse("index.json cannot be read: it is no index of safetensors files, or damaged")
    index.write_text('{"weight_map": {}}')
    refuse("has no weights for transformer.h.0.attn.c_attn.bias")


def test_what_does_not_fit_is_refused(make_config, repository, exported, tmp_path, corpus_dir):
    def refuse(words: str, **changes) -> None:
        with pytest.raises(UserError, match=words):
            with_initial_model(make_config(**{"init_from": str(exported), "tokenizer": "", **changes}))

    refuse("no branch, tag or commit 'absent'; branches: calm-owl-3", init_from=f"{repository.path}@absent")
    refuse("no such repository", init_from=f"{tmp_path / 'absent.git'}@main")
    refuse("there is no run or model folder .*absent", init_from=str(tmp_path / "absent"))
    refuse("named with its branch, as in org/name@main", init_from="org/name")
    refuse("another model than --model gpt2 .*n_layer is 4 there and 12 here", model="gpt2")
    other = shutil.copytree(exported, tmp_path / "other")
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text + " ")
    refuse("is not the one that --init-from", tokenizer=str(other))
    weights = (other / "model.safetensors").read_bytes()
    header = json.dumps({"a": {"dtype": "line\nline", "shape": [1], "data_offsets": [0, 4]}}).encode()
    of_two_lines = len(header).to_bytes(8, "little") + header + b"\0" * 4
    for content in (b"", b"\xff" * 100, weights[:100], weights[:-1], weights + b"x", of_two_lines):
        (other / "model.safetensors").write_bytes(content)
        refuse(r"model.safetensors cannot be read: it is no safetensors file, or damaged[^\n]*$", init_from=str(other))
    (other / "model.safetensors").unlink()
    refuse("has no model.safetensors, the only format of weights that is read", init_from=str(other))
    (other / "tokenizer.json").unlink()
    refuse("has no tokenizer.json", init_from=str(other))


def test_weights_of_another_vocabulary_and_missing_ones(make_config, exported, tmp_path):
    other = shutil.copytree(exported, tmp_path / "other")
    shape = find_shape("demo", vocab_size=300, seq_length=32)
    model = build_model(shape, eos_token_id=0, seed=5)
    save_file({name: p.detach() for name, p in model.named_parameters()}, other / "model.safetensors")
    with pytest.raises(UserError, match="not for 257 tokens"):
        with_initial_model(make_config(init_from=str(other), tokenizer=""))
    weights = {
        name: p.detach()
        for name, p in build_model(
            dataclasses.replace(shape, vocab_size=257), eos_token_id=0, seed=5
        ).named_parameters()
    }
    del weights["transformer.ln_f.bias"]
    save_file(weights, other / "model.safetensors")
    config = make_config(init_from=str(other))
    with pytest.raises(UserError, match="no weights for transformer.ln_f.bias"):
        with_initial_model(config)
    with pytest.raises(UserError, match="no weights for transformer.ln_f.bias"):
        load_initial_weights(
            build_model(dataclasses.replace(shape, vocab_size=257), eos_token_id=0, seed=1),
            config,
            _OnlyRank(),
            partitioned=False,
        )


def test_weights_that_are_not_those_of_the_config(make_config, exported, tmp_path):
    other = shutil.copytree(exported, tmp_path / "other")
    model = build_model(find_shape("demo", vocab_size=257, seq_length=32), eos_token_id=0, seed=5)
    weights = {name: p.detach().contiguous() for name, p in model.named_parameters()}
    save_file(weights | {"transformer.ln_f.bias": torch.zeros(7)}, other / "model.safetensors")
    with pytest.raises(UserError, match=r"not those of its config.json: transformer.ln_f.bias has shape \[7\] there"):
        with_initial_model(make_config(init_from=str(other), tokenizer=""))
    save_file(weights | {"transformer.ln_f.bias": torch.zeros(256, dtype=torch.int8)}, other / "model.safetensors")
    with pytest.raises(UserError, match=r"transformer.ln_f.bias in I8: quantized weights cannot be trained"):
        with_initial_model(make_config(init_from=str(other), tokenizer=""))


def test_names_of_revisions():
    assert parse_revision("org/name@run-1") == Revision("org/name", "run-1")
    assert parse_revision("runs/hub.git@run-1") == Revision("runs/hub.git", "run-1")
    assert parse_revision("runs/hub.git/") == Revision("runs/hub.git", "main")
    for source in ("org/name", "runs/brave-fox-1", "a/b/c@d", "x@y"):
        assert parse_revision(source) is None
    for revision in ("-x", "a b", ""):
        with pytest.raises(UserError, match="no branch, tag or commit"):
            parse_revision(f"org/name@{revision}")
    assert Revision("org/name", "a" * 40).is_pinned and not Revision("org/name", "main").is_pinned
