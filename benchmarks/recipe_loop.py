"""The peer: the recipe's plain training loop (NLP with Transformers, chapter 10), timed.

accelerate as its users run it: fp32 (or bf16 autocast), eager attention, GPT-2's defaults (dropout 0.1, ``gelu_new``),
torch's AdamW, no accumulation, and a log line with ``loss.item()`` in every step. Prints one JSON object:

    python benchmarks/recipe_loop.py --shape gpt2 --micro-batch 1 --steps 6 --warmup 1 --threads 2
    python benchmarks/recipe_loop.py --shape demo --data CORPUS --tokenizer TOKENIZER --seq-length 256 --micro-batch 16

Rows are prepared before the clock starts, which spares this loop the recipe's tokenizing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from codeparrot_ds.model.shapes import find_shape

logger = logging.getLogger("recipe")


class Step(NamedTuple):
    """One optimizer step: its time with the device waited for, and its loss before the update."""

    seconds: float
    loss: float


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--shape", default="gpt2", help="gpt2, demo or another known shape")
    parser.add_argument("--vocab-size", type=int, default=32_768, help="with --data it is the tokenizer's")
    parser.add_argument("--seq-length", type=int, default=1024)
    parser.add_argument("--micro-batch", type=int, default=1, help="rows a step")
    parser.add_argument("--steps", type=int, default=10, help="steps that count")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them that do not")
    parser.add_argument("--window", type=int, default=1, help="steps whose tokens/s are one sample of the median")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, help="of torch on the CPU; all cores by default")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--num-warmup-steps", type=int, default=2000, help="of the learning rate")
    parser.add_argument("--max-train-steps", type=int, default=150_000, help="of the schedule")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rows", metavar="FILE.npy", help="token ids, (rows, seq_length); random ones by default")
    parser.add_argument("--data", metavar="DIR", help="rows of a training run on this corpus, in its order")
    parser.add_argument("--tokenizer", metavar="DIR", help="with --data")
    options = parser.parse_args(arguments)
    if bool(options.data) != bool(options.tokenizer):
        parser.error("--data and --tokenizer go together")
    return options


def load_rows(options: argparse.Namespace) -> torch.Tensor:
    """Returns the token ids of all steps, (steps, micro_batch, seq_length); sets the vocabulary to the tokenizer's."""
    num_rows = (options.warmup + options.steps) * options.micro_batch
    if options.data:
        rows = corpus_rows(options, num_rows)
    elif options.rows:
        rows = np.load(options.rows)[:num_rows]
    else:
        rows = np.random.default_rng(options.seed).integers(options.vocab_size, size=(num_rows, options.seq_length))
    return torch.from_numpy(rows.astype(np.int64)).view(-1, options.micro_batch, options.seq_length)


def corpus_rows(options: argparse.Namespace, num_rows: int) -> np.ndarray:
    """Returns the first rows of a training run with the same seed and the default lanes and shuffle buffer."""
    from codeparrot_ds.config import RunConfig
    from codeparrot_ds.data.encoder import load_encoder
    from codeparrot_ds.data.sources import find_shards
    from codeparrot_ds.data.stream import Dataset, StreamConfig, TrainingStream

    encoder, defaults = load_encoder(options.tokenizer), RunConfig()
    options.vocab_size = encoder.vocab_size
    config = StreamConfig(
        datasets=[Dataset(name=str(options.data), shards=find_shards(options.data, "train"))],
        encoder=encoder,
        seq_length=options.seq_length,
        num_lanes=defaults.num_lanes,
        shuffle_buffer=defaults.shuffle_buffer,
        seed=options.seed,
    )
    return np.stack([row.ids for row in itertools.islice(TrainingStream(config), num_rows)])


def build_model(options: argparse.Namespace) -> torch.nn.Module:
    """Returns the shape with transformers' own GPT-2 defaults for everything that is not a size."""
    from transformers import AutoModelForCausalLM, GPT2Config

    shape = find_shape(options.shape, vocab_size=options.vocab_size, seq_length=options.seq_length)
    config = GPT2Config(**asdict(shape), bos_token_id=0, eos_token_id=0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def grouped_params(model: torch.nn.Module, weight_decay: float = 0.1) -> list[dict]:
    """Returns the recipe's groups, by its match of names."""
    decayed: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (others if any(part in name for part in ("bias", "LayerNorm.weight")) else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def train_steps(options: argparse.Namespace, rows: torch.Tensor, log_dir: str) -> Iterator[Step]:
    """Trains and yields each step as it ends, so that a caller may alternate with another loop."""
    from accelerate import Accelerator
    from torch.utils.data import DataLoader
    from torch.utils.tensorboard import SummaryWriter
    from transformers import get_scheduler, set_seed

    set_seed(options.seed)
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(), mixed_precision="bf16" if options.precision == "bf16" else "no"
    )
    logging.basicConfig(filename=f"{log_dir}/debug_0.log", level=logging.INFO, force=True)
    writer = SummaryWriter(log_dir)
    model = build_model(options)
    optimizer = torch.optim.AdamW(grouped_params(model), lr=options.learning_rate)
    scheduler = get_scheduler("cosine", optimizer, options.num_warmup_steps, options.max_train_steps)
    loader: DataLoader = DataLoader(list(rows.flatten(0, 1)), batch_size=options.micro_batch)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    model.train()
    started = time.perf_counter()
    for step, batch in enumerate(loader, start=1):
        loss = model(batch, labels=batch).loss
        metrics = {"lr": optimizer.param_groups[0]["lr"], "loss/train": loss.item()}
        logger.info(f"Step {step}: {metrics}")
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        yield Step(time.perf_counter() - started, metrics["loss/train"])
        started = time.perf_counter()  # what the caller did in between is not ours


def summarize(options: argparse.Namespace, steps: list[Step]) -> dict:
    """Returns the run's settings and figures; the steps of the warm-up count in the losses only."""
    tokens = options.micro_batch * options.seq_length
    seconds = [step.seconds for step in steps[options.warmup :]]
    windows = [seconds[i : i + options.window] for i in range(0, len(seconds) - options.window + 1, options.window)]
    samples = [tokens * len(window) / sum(window) for window in windows]
    return {
        "loop": "recipe",
        **{name: getattr(options, name) for name in ("shape", "vocab_size", "seq_length", "micro_batch", "precision")},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "tokens_per_second": statistics.median(samples),
        "window_tokens_per_second": samples,
        "step_seconds": seconds,
        "losses": [step.loss for step in steps],
    }


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    rows = load_rows(options)
    with tempfile.TemporaryDirectory() as log_dir:
        print(json.dumps(summarize(options, list(train_steps(options, rows, log_dir)))))


if __name__ == "__main__":
    main()
