"""Fixtures of the tests of runs: a tiny tokenizer, a corpus of a few documents, and processes that train together."""

from __future__ import annotations

import concurrent.futures
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from codeparrot_ds.config.run_config import RunConfig

REPOSITORY = Path(__file__).resolve().parents[1]
EOS = "<|endoftext|>"


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer of 257 tokens as a Hugging Face folder."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=257, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([""], trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="session")
def corpus_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty documents to train on and four to validate on."""
    folder = tmp_path_factory.mktemp("corpus")
    for split, count in (("train", 40), ("validation", 4)):
        (folder / split).mkdir()
        lines = [json.dumps({"path": "a.py", "content": f"def {split}_{n}():\n    return {n}\n"}) for n in range(count)]
        (folder / split / "part-00000.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def make_config(tmp_path: Path, corpus_dir: Path, tokenizer_dir: Path) -> Callable[..., RunConfig]:
    """A run config of the demo's model on short rows, with changes."""

    def make(**changes) -> RunConfig:
        values = {
            "data": str(corpus_dir),
            "tokenizer": str(tokenizer_dir),
            "model": "demo",
            "output_dir": str(tmp_path / "runs"),
            "run_name": "brave-otter-7",
            "deepspeed": "zero2",
            "seq_length": 32,
            "global_batch_size": 8,
            "micro_batch_size": 2,
            "num_lanes": 4,
            "shuffle_buffer": 8,
            "hub": "off",
            "wandb": "off",
        }
        return RunConfig(**values | changes)

    return make


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def rank_environment() -> Callable[..., dict[str, str]]:
    """The environment that a launcher gives to a rank on this machine."""

    def variables(rank: int, world_size: int, port: int | None = None) -> dict[str, str]:
        return {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port or free_port()),
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(REPOSITORY),
        }

    return variables


@pytest.fixture(scope="session")
def process_group(rank_environment):
    """One for all tests in this process: DeepSpeed keeps its groups as long as a process lives."""
    from codeparrot_ds.engine.ranks import join_ranks, leave_ranks

    with pytest.MonkeyPatch.context() as patch:
        for name, value in rank_environment(0, 1).items():
            patch.setenv(name, value)
        ranks = join_ranks()
    yield ranks
    leave_ranks()


@pytest.fixture(scope="module")
def only_rank(process_group, rank_environment):
    """This process as the only rank of a run."""
    import torch

    from codeparrot_ds.engine.operators import build_operators

    with pytest.MonkeyPatch.context() as patch:
        for name, value in rank_environment(0, 1).items():
            patch.setenv(name, value)
        build_operators({"optimizer": {"type": "AdamW", "params": {}}}, process_group.device.type)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # what a rank has beside others; the models are too small for more
        yield process_group
        torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def run_ranks(rank_environment: Callable[..., dict[str, str]]) -> Callable[..., list[dict]]:
    """Runs a script as several ranks; each prints one JSON object as its last line. Returns them in rank order."""

    def run(script: str, world_size: int = 2, timeout: int = 120) -> list[dict]:
        port = free_port()
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", script],
                env=os.environ | rank_environment(rank, world_size, port),
                cwd=REPOSITORY,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(world_size)
        ]
        try:
            # All at once: a rank whose pipe is full waits for its reader, and the other ranks for it.
            with concurrent.futures.ThreadPoolExecutor(world_size) as pool:
                outputs = list(pool.map(lambda process: process.communicate(timeout=timeout), processes))
        finally:
            for process in processes:
                process.kill()
        for process, (_, errors) in zip(processes, outputs, strict=True):
            assert process.returncode == 0, errors
        return [json.loads(output.splitlines()[-1]) for output, _ in outputs]

    return run
