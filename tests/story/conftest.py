"""A small corpus of real code for the whole-story tests, and runs on it that several of them look at."""

from __future__ import annotations

import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
from stories import Workshop, clean_environment

from codeparrot_ds.data.corpus import build_corpus
from codeparrot_ds.data.tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def workshop(tmp_path_factory) -> Workshop:
    """Some packages of the standard library as a corpus, and a tokenizer of 1,024 tokens."""
    base = tmp_path_factory.mktemp("workshop")
    tree = base / "tree"
    for package in ("asyncio", "email", "http", "json", "logging", "unittest", "xml"):
        shutil.copytree(Path(sysconfig.get_path("stdlib")) / package, tree / package)
    build_corpus([str(tree)], base / "corpus")
    train_tokenizer(base / "corpus", base / "tokenizer", vocab_size=1024)
    return Workshop(corpus=base / "corpus", tokenizer=base / "tokenizer", runs=base / "runs")


@pytest.fixture(scope="session")
def trained(workshop) -> Callable[..., Path]:
    """Trains a config once a session and returns its run: 20 steps of the plain stages, 5 of others; saved every 10."""
    done = {}

    def run(name: str, ranks: int = 2) -> Path:
        key = f"{name}-on-{ranks}"
        if key not in done:
            # Runs of one rank are started two at a time: a core for each.
            environment = clean_environment(OMP_NUM_THREADS="1") if ranks == 1 else clean_environment()
            steps = "20" if name.removesuffix("_fp32") in ("zero0", "zero1", "zero2", "zero3") else "5"
            process = workshop.train(
                *("--deepspeed", name, "--num-gpus", str(ranks), "--run-name", key, "--max-train-steps", steps),
                *("--save-checkpoint-steps", "10"),
                env=environment,
            )
            assert process.returncode == 0, process.stderr[-3000:]
            done[key] = workshop.runs / key
        return done[key]

    return run
