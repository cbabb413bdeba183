"""A byte-level tokenizer and a tiny GPT-2 with random weights, saved as Hugging Face folders."""

import json
from pathlib import Path

import pytest

CORPUS = [
    "import os\n\n\ndef area(a, b):\n    return a * b\n\n\nclass Box:\n    def __init__(self):\n        self.n = 1\n",
    "def greet(name):\n    # greets\n    print(f'hello {name}')\n\n\nif __name__ == '__main__':\n    greet('ö')",
] * 6


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """A tiny model's threads only wait for each other, and for ever so long on a busy machine."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def save_model():
    return _save_model


@pytest.fixture(scope="session")
def texts():
    return CORPUS


def _save_model(folder: Path, *, vocab_size: int | None = None, dtype: str = "float32") -> Path:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>")
    wrapped.save_pretrained(folder)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocab_size or len(wrapped), n_positions=256, n_embd=32, n_layer=2, n_head=2, bos_token_id=0,
        eos_token_id=0, initializer_range=0.3, use_cache=False,
    )  # fmt: skip
    GPT2LMHeadModel(config).to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    return _save_model(tmp_path_factory.mktemp("model") / "export")


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for split in ("train", "validation"):
        (folder / split).mkdir()
        rows = "".join(json.dumps({"content": text}) + "\n" for text in CORPUS)
        (folder / split / "part-00000.jsonl").write_text(rows)
    return folder


@pytest.fixture
def run_folder(tmp_path, model_folder, corpus_folder):
    """A run with two complete checkpoints and a third that is not."""
    import shutil

    run = tmp_path / "runs" / "brave-fox-1"
    for step in (500, 1000, 1500):
        export = run / "checkpoints" / f"step-{step:08d}" / "export"
        shutil.copytree(model_folder, export)
        (export / "training_state.json").write_text('{"evaluated_with": {"seq_length": 64, "num_lanes": 2}}')
        if step != 1500:
            (run / "checkpoints" / f"step-{step:08d}" / "manifest.json").write_text("{}")
    (run / "run.json").write_text(json.dumps({"name": run.name, "hub": "local"}))
    (run / "config.yaml").write_text(
        f"data: {corpus_folder}\ntokenizer: {model_folder}\nseq_length: 64\nnum_lanes: 2\n"
    )
    return run
