"""``micro_batch_size: auto``: what divides the rows, what fits, and what is said when nothing does."""

import dataclasses
import json

import pytest
from tokenizers import Tokenizer, models

from codeparrot_ds.config.run_config import RunConfig
from codeparrot_ds.errors import UserError
from codeparrot_ds.memory import micro_batch
from codeparrot_ds.memory.micro_batch import config_fitting, memory_budget, micro_batch_sizes, with_micro_batch

GB = 10**9


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """A tokenizer with as many tokens as the recipe's vocabulary has."""
    folder = tmp_path_factory.mktemp("tokenizer")
    vocabulary = {"<|endoftext|>": 0} | {f"token{number}": number for number in range(1, 32_768)}
    Tokenizer(models.WordLevel(vocabulary, unk_token="<|endoftext|>")).save(str(folder / "tokenizer.json"))
    return str(folder)


@pytest.fixture
def config(tokenizer):
    return RunConfig(micro_batch_size="auto", tokenizer=tokenizer, deepspeed="zero2")


def test_it_is_a_word_and_no_number():
    config = RunConfig(micro_batch_size="auto")
    assert config.auto_micro_batch and dataclasses.replace(config, seed=2).auto_micro_batch
    assert not RunConfig(micro_batch_size=12).auto_micro_batch
    for wrong in (0, -1):
        with pytest.raises(UserError, match=f"micro_batch_size must be at least 1, not {wrong}"):
            RunConfig(micro_batch_size=wrong)
    with pytest.raises(UserError, match="micro_batch_size must be a whole number or auto, not 'many'"):
        RunConfig(micro_batch_size="many")
    with pytest.raises(UserError, match="seed must be a whole number, not 'auto'"):
        RunConfig(seed="auto")
    with pytest.raises(UserError, match="chosen when a run starts"):
        config.gradient_accumulation_steps(2)
    assert RunConfig(micro_batch_size="auto").micro_batch_size == "auto"


def test_sizes_divide_the_rows_and_end_where_a_device_is_full(config):
    assert micro_batch_sizes(config, 2, "cuda") == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48]
    assert micro_batch_sizes(config, 2, "cpu") == [1, 2, 3, 4, 6, 8]
    long_rows = dataclasses.replace(config, seq_length=100_000)
    assert micro_batch_sizes(long_rows, 2, "cuda") == [1]
    with pytest.raises(UserError, match="192 is not divisible by micro_batch_size x world_size = 1 x 7"):
        micro_batch_sizes(config, 7, "cuda")


def test_the_largest_that_fits_is_taken(config):
    sizes = micro_batch_sizes(config, 2, "cuda")
    chosen = {
        gb: config_fitting(config, sizes, world_size=2, device="cuda", budget=(gb * GB, "a GPU")).micro_batch_size
        for gb in (8, 16, 40, 80)
    }
    assert list(chosen.values()) == sorted(chosen.values()) and chosen[8] < chosen[16] < chosen[80] == 48
    # The one above it does not fit, by the plan that refuses a run.
    above = sizes[sizes.index(chosen[16]) + 1]
    with pytest.raises(UserError, match=r"one row needs .* GB a rank and a GPU gives 16.0 GB; .*plan"):
        config_fitting(config, [above], world_size=2, device="cuda", budget=(16 * GB, "a GPU"))


def test_a_size_that_was_given_stays(config, monkeypatch):
    monkeypatch.setattr(micro_batch, "memory_budget", lambda *_: pytest.fail("nothing to choose"))
    given = dataclasses.replace(config, micro_batch_size=3)
    assert with_micro_batch(given, world_size=2, device="cuda") is given


def test_what_is_chosen_is_said(config, monkeypatch, capsys):
    monkeypatch.setattr(micro_batch, "memory_budget", lambda *_: (16 * GB, "a GPU"))
    chosen = with_micro_batch(config, world_size=2, device="cuda")
    steps = chosen.gradient_accumulation_steps(2)
    assert f"micro-batch {chosen.micro_batch_size}, the largest of 1, 2, 3" in capsys.readouterr().err
    assert chosen.micro_batch_size * steps * 2 == 192


@pytest.mark.parametrize(
    ("keys", "size"),
    [({"train_micro_batch_size_per_gpu": 6}, 6), ({"gradient_accumulation_steps": 4}, 24), ({}, None)],
)
def test_what_the_deepspeed_json_says_is_taken(config, tmp_path, monkeypatch, capsys, keys, size):
    monkeypatch.setattr(micro_batch, "memory_budget", lambda *_: (80 * GB, "a GPU"))
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}} | keys))
    chosen = with_micro_batch(dataclasses.replace(config, deepspeed=str(path)), world_size=2, device="cuda")
    said = capsys.readouterr().err
    assert chosen.micro_batch_size == (size or 48)
    assert said.startswith(
        f"micro-batch {size}, as {path} says, and " if size else "micro-batch 48, the largest of 1, 2"
    )


def test_without_nvidia_smi_a_gpu_needs_a_number(monkeypatch):
    monkeypatch.setattr(micro_batch, "smallest_gpu", lambda: None)
    with pytest.raises(UserError, match="nvidia-smi does not say: give it a number"):
        memory_budget("cuda", 2)
    monkeypatch.setattr(micro_batch, "smallest_gpu", lambda: ("NVIDIA L4", 24 * GB))
    assert memory_budget("cuda", 2) == (24 * GB, "NVIDIA L4")
    assert memory_budget("cpu", 2)[0] == pytest.approx(memory_budget("cpu", 1)[0] / 2, rel=1e-6)
