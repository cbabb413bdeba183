"""Each mistake gets one sentence and exit code 2 before a rank starts, and leaves what was there as it was.

Most are made in this process; those made in one of their own show that nothing else is said there.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from codeparrot_ds.checkpoint.folders import Checkpoint, list_checkpoints
from codeparrot_ds.corpus.tokenizer import train_tokenizer
from tests.needs import needs
from tests.story.stories import log, losses, run_command, run_here


def refused(process, *words):
    """The one line of a refusal, which holds all of ``words``."""
    assert process.returncode == 2, process.stderr[-2000:]
    (line,) = process.stderr.strip().splitlines()
    for word in words:
        assert word in line, line
    return line


def contents(folder):
    """Name and hash of every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--micro-batch-size", "3"), ["global_batch_size 8", "micro_batch_size"]),
        (("--num-gpus", "3"), ["num_lanes=8", "3 ranks"]),
        (("--seq-length", "2048"), ["seq_length 2048", "1024"]),
        (("--model", "gpt2-xxl"), ["gpt2-xxl", "gpt2-xl"]),
        (("--deepspeed", "zero5"), ["zero5", "zero"]),
        (("--learning-rte", "1e-3"), ["--learning-rte", "--learning-rate"]),
        (("--max-train-steps", "ten"), ["max-train-steps", "ten"]),
        (("--config", "absent.yaml"), ["absent.yaml"]),
        (("--hostfile", "absent.txt"), ["absent.txt"]),
        (("--hub", "org/name"), ["org/name", "HF_TOKEN is not set"]),
        (("--data", "https://user:hf_" + "x" * 34 + "@example.org"), ["the run config holds", "hugging face token"]),
        (("--hub", "org/name/x"), ["org/name/x", "local"]),
        (("--hub", "https://example.org/x"), ["hub: a URL is not taken"]),
        (("--hub", "https://user:secret@example.org/x"), ["the run config holds", "url password", "HF_TOKEN"]),
        (("--run-name", "a b"), ["a b"]),
        (("--data", "absent"), ["absent"]),
        (("--tokenizer", "absent"), ["absent"]),
    ],
)
def test_wrong_options(workshop, tmp_path, monkeypatch, arguments, words):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    refused(workshop.refuse(*arguments, output_dir=tmp_path / "runs"), *words)
    assert not list(tmp_path.iterdir())


def test_unknown_preset_and_unknown_field(workshop, tmp_path):
    refused(run_here("train", "smal"), "smal", "small")
    file = tmp_path / "run.yaml"
    file.write_text("max_train_steps: 5\nlearning_rte: 1.0e-3\n")
    refused(run_here("train", "small", "--config", str(file)), f"{file}:2", "learning_rte", "learning_rate")


def test_mistyped_deepspeed_key(workshop, tmp_path):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"zero_optimisation": {"stage": 2}, "bf16": {"enabled": True}}))
    process = workshop.train("--deepspeed", str(file), output_dir=tmp_path / "runs")
    refused(process, f"{file}:1", "zero_optimisation", "zero_optimization")
    assert list(tmp_path.iterdir()) == [file]


def test_a_token_in_a_deepspeed_json_is_refused_without_its_words(workshop, tmp_path, monkeypatch):
    secret = "a-token-of-no-known-form"
    monkeypatch.setenv("SOME_API_KEY", secret)
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2}, "wandb": {"team": secret}}))
    process = workshop.refuse("--deepspeed", str(file), output_dir=tmp_path / "runs")
    line = refused(process, f"{file} holds the value of SOME_API_KEY", "HF_TOKEN")
    assert secret not in line and list(tmp_path.iterdir()) == [file]


def test_unwritable_and_mistaken_run_folders(workshop, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    refused(workshop.refuse(output_dir=file / "runs"), "file")
    (tmp_path / "mine" / "run").mkdir(parents=True)
    (tmp_path / "mine" / "run" / "notes.txt").write_text("keep me")
    refused(workshop.refuse("--run-name", "run", output_dir=tmp_path / "mine"), "not a run")
    assert (tmp_path / "mine" / "run" / "notes.txt").read_text() == "keep me"


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a file system of so many megabytes; needs root, which CI has."""
    if os.geteuid() != 0 and not os.environ.get("CI"):
        pytest.skip("mounting a small disk needs root")
    mounted = []

    def mount(megabytes):
        disk = tmp_path / f"disk-{megabytes}"
        disk.mkdir()
        process = run_command(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(disk)])
        assert process.returncode == 0, process.stderr
        mounted.append(disk)
        return disk

    yield mount
    for disk in mounted:
        assert run_command(["umount", str(disk)]).returncode == 0


def test_a_disk_without_room_is_refused_before_a_rank_starts(workshop, small_disk):
    disk = small_disk(40)
    line = refused(workshop.train("--model", "demo", "--max-train-steps", "2", output_dir=disk / "runs"), "GB free")
    assert "--output-dir" in line and not list(disk.iterdir())


def test_a_disk_that_fills_up_leaves_the_checkpoints_before(workshop, small_disk):
    disk = small_disk(130)  # room for two checkpoints of 52 MB
    process = workshop.train(
        *("--model", "demo", "--run-name", "full", "--max-train-steps", "6", "--save-checkpoint-steps", "2"),
        output_dir=disk,
    )
    assert process.returncode == 2, process.stderr[-2000:]
    assert "checkpoint of step 6 could not be written" in process.stderr and "Traceback" not in process.stderr
    rows = list_checkpoints(disk / "full")
    assert [row.step for row in rows] == [2, 4]
    assert not [problem for row in rows for problem in Checkpoint(Path(row.path)).damage()]


@pytest.fixture
def finished(on_two_ranks):
    """A run of twenty steps."""
    return on_two_ranks["zero2"]


@needs(on_two_ranks=["zero2"])
def test_a_run_folder_of_another_config(workshop, finished):
    before = contents(finished)
    for arguments, words in (
        (("--seed", "7"), ["seed", "7"]),
        (("--model", "gpt2"), ["model", "gpt2"]),
        (("--global-batch-size", "16"), ["global_batch_size", "16"]),
        (("--resume", "never"), ["resume"]),
    ):
        refused(
            workshop.refuse("--run-name", finished.name, "--max-train-steps", "21", *arguments), "--run-name", *words
        )
    assert contents(finished) == before


@needs(on_two_ranks=["zero2"])
def test_resuming_with_another_tokenizer(workshop, finished, tmp_path):
    train_tokenizer(workshop.corpus, tmp_path / "other", vocab_size=1024, max_documents=20)
    before = contents(finished)
    refused(
        workshop.refuse("--run-name", finished.name, "--max-train-steps", "21", "--tokenizer", str(tmp_path / "other")),
        "tokenizer",
        "other data",
    )
    assert contents(finished) == before


@needs(on_two_ranks=["zero2"])
def test_resuming_on_changed_data(workshop, finished, tmp_path):
    shutil.copytree(workshop.corpus, tmp_path / "corpus")
    shard = next((tmp_path / "corpus" / "train").iterdir())
    shard.write_text(shard.read_text() + json.dumps({"content": "x = 1\n"}) + "\n")
    before = contents(finished)
    arguments = ("--run-name", finished.name, "--max-train-steps", "21", "--data", str(tmp_path / "corpus"))
    refused(workshop.train(*arguments), shard.name, "other data")
    assert contents(finished) == before


@needs(continued=["new data"])
def test_changed_data_can_begin_a_new_epoch(continued):
    run = continued["new data"]
    assert "the data begins a new epoch: num_lanes is 4" in log(run) and "shard part-00000.jsonl has" in log(run)
    assert sorted(losses(run)) == list(range(1, 23))
    data = json.loads((run / "checkpoints" / "step-00000022" / "data.json").read_text())
    assert (data["rows"], len(data["lanes"])) == (16, 4)


def test_unreadable_documents_of_all_ranks_stop_a_run_past_its_limit(workshop, tmp_path):
    """Each of two ranks meets some, neither more than the limit: together they do."""
    shutil.copytree(workshop.corpus, tmp_path / "corpus")
    for shard in (tmp_path / "corpus" / "train").iterdir():
        lines = shard.read_text().splitlines()
        shard.write_text("".join(f'{line}\n{{broken\n{{"content": null}}\n' for line in lines))
    arguments = ("--data", str(tmp_path / "corpus"), "--run-name", "bad", "--max-train-steps", "20")
    # The windows of the first rows hold 64 documents, with about twice as many between them.
    process = workshop.train(*arguments, "--num-gpus", "2", "--max-bad-documents", "90", output_dir=tmp_path)
    assert process.returncode == 2 and "Traceback" not in process.stderr, process.stderr[-3000:]
    line = next(line for line in process.stderr.splitlines() if "error:" in line)
    assert "more than max_bad_documents=90" in line and str(tmp_path / "bad" / "log") in line
    texts = [path.read_text() for path in sorted((tmp_path / "bad" / "log").iterdir())]
    assert len(texts) == 2
    for text in texts:
        assert ": broken JSON" in text and "`content` is NoneType, not a string" in text


def test_sources(tmp_path):
    out = ("--out", str(tmp_path / "c"))
    refused(run_here("corpus", str(tmp_path / "absent"), *out), "absent")
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(run_here("corpus", str(empty), *out), "empty")
    (empty / "binary.py").write_bytes(b"\0\1\2" * 100)
    refused(run_command([sys.executable, "-m", "codeparrot_ds", "corpus", str(empty), *out]), "empty")
    assert not (tmp_path / "c").exists()


def test_a_vocabulary_larger_than_the_corpus_supports(workshop, tmp_path):
    out = ("--out", str(tmp_path / "t"))
    refused(run_here("tokenizer", "--data", str(workshop.corpus), *out, "--vocab-size", "2000000"), "2", "vocab")
    assert not (tmp_path / "t").exists()
