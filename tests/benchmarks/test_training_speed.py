"""What ``training_speed.py`` makes of runs that fail, and of loops with micro-batches of their own; nothing trains."""

from __future__ import annotations

import argparse
import json

import pytest

from tests.story.stories import REPOSITORY


@pytest.fixture
def training_speed(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    import training_speed

    return training_speed


@pytest.fixture
def tokenizer(tmp_path):
    from tokenizers import Tokenizer, models

    folder = tmp_path / "tokenizer"
    folder.mkdir()
    Tokenizer(models.BPE({"<|endoftext|>": 0, "a": 1}, [])).save(str(folder / "tokenizer.json"))
    words = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(words))
    return folder


def good(*speeds: float) -> dict:
    return {"tokens_per_second": list(speeds), "losses": [6.0, 5.5], "data_wait_share": [0.0]}


def test_a_run_that_failed_is_a_line_and_the_others_are_compared_round_by_round(training_speed, tokenizer):
    options = argparse.Namespace(tokenizer=str(tokenizer), model="demo", seq_length=64, dropout=0.0, log_steps=1)
    raw = {
        "bare, 1 process": [{"failure": "exit 1: CUDA out of memory"}, good(100.0)],
        "recipe fp32, 1 process": [good(10.0), {"failure": "not done within 9 s"}],
        "nanogpt, 1 process": [{"failure": "exit 1: no compiler"}] * 2,
        "ours, 1 rank": [good(40.0), good(80.0)],
    }
    text = training_speed.text(options, raw, {name: [1e9, 1e9] for name in raw})
    rows = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if line.startswith("| ")}
    assert "0.80x (0.80 - 0.80)" in rows["bare, 1 process"]  # of the second round alone
    assert "4.00x (4.00 - 4.00)" in rows["recipe fp32, 1 process"]
    assert "nanogpt, 1 process" not in rows
    assert "- bare, 1 process: exit 1: CUDA out of memory" in text and "exit 1: no compiler" in text


def test_before_anything_of_ours_is_there_the_record_says_so(training_speed, tokenizer):
    options = argparse.Namespace(tokenizer=str(tokenizer), model="demo", seq_length=64, dropout=None, log_steps=1)
    text = training_speed.text(
        options, {"bare, 1 process": [good(1.0)], "ours, 1 rank": []}, {"bare, 1 process": [1e9]}
    )
    assert "which has none yet" in text


def test_a_loop_has_a_micro_batch_of_its_own_and_the_rows_of_all(training_speed, monkeypatch):
    commands = []
    monkeypatch.setattr(
        training_speed, "run_quietly", lambda command, timeout: commands.append(command) or "exit 1: no"
    )
    wanted = ["--data", "c", "--tokenizer", "t", "--rows", "192", "--micro-batch", "64", "--ranks", "1"]
    options = training_speed.parse_arguments([*wanted, "--peer-micro-batches", "recipe=32"])
    assert training_speed.peer(options, "recipe bf16", 1) == {"failure": "exit 1: no"}
    training_speed.peer(options, "bare", 1)
    split = [(c[c.index("--micro-batch") + 1], c[c.index("--accumulation") + 1]) for c in commands]
    assert split == [("32", "6"), ("64", "3")]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--peer-micro-batches", "recipe=5"], "does not divide by micro-batches of 5"),
        (["--peer-micro-batches", "recipes=4"], "'recipes=4' is not a peer and its rows"),
        (["--log-steps", "3", "--peer-steps", "5"], "--peer-steps is a multiple of --log-steps"),
    ],
)
def test_what_does_not_go_together_is_refused(training_speed, capsys, options, words):
    with pytest.raises(SystemExit):
        training_speed.parse_arguments(["--data", "c", "--tokenizer", "t", "--rows", "8", "--ranks", "1", *options])
    assert words in capsys.readouterr().err
