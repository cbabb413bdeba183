"""Whole stories: the real command line, the real launcher, real ranks on gloo, on a small corpus of real code."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
# The demo's model on short rows: a run is mostly start-up. The learning rate is a small batch's: at the demo's 2e-3 a
# rare token's first appearance in 8 short rows gives a gradient norm of 100, which amplifies rounding differences.
SMALL = [
    *("demo", "--seq-length", "64", "--global-batch-size", "8", "--micro-batch-size", "2", "--num-warmup-steps", "4"),
    # Seed 1 has a batch with a gradient norm of 12 in its first 20 steps, which amplifies rounding fortyfold in bf16.
    *("--learning-rate", "5e-4", "--seed", "3"),
    *("--max-eval-steps", "4", "--log-steps", "1", "--num-lanes", "8", "--shuffle-buffer", "64", "--num-workers", "1"),
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workshop:
    """A corpus, a tokenizer, and the command line to train on them."""

    corpus: Path
    tokenizer: Path
    runs: Path

    def command(self, *arguments: str, output_dir: Path | None = None) -> list[str]:
        """``codeparrot-ds train`` with the small settings; wandb and hub are off unless asked for."""
        return [
            *(sys.executable, "-m", "codeparrot_ds", "train", *SMALL),
            *("--data", str(self.corpus), "--tokenizer", str(self.tokenizer), "--wandb", "off", "--hub", "off"),
            *("--output-dir", str(output_dir or self.runs), *arguments),
        ]

    def train(self, *arguments: str, output_dir: Path | None = None, **kwargs) -> subprocess.CompletedProcess:
        """Trains to the end and returns the finished process, whatever its exit code."""
        return run_command(self.command(*arguments, output_dir=output_dir), **kwargs)


def run_command(command: list[str], *, timeout: int = 300, **kwargs) -> subprocess.CompletedProcess:
    """Runs a command from the repository and returns it with its output."""
    kwargs.setdefault("cwd", REPOSITORY)
    kwargs.setdefault("env", clean_environment())
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, **kwargs)


def clean_environment(**extra: str) -> dict[str, str]:
    """The environment of a user: nothing that another test's launcher may have set."""
    ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_SIZE", "OMP_NUM_THREADS")
    kept = {key: value for key, value in os.environ.items() if key not in ours}
    return kept | {"PYTHONPATH": str(REPOSITORY)} | extra


def metrics(run: Path) -> list[dict]:
    """All rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> dict[int, float]:
    """Training loss by step."""
    return {row["step"]: row["loss"] for row in metrics(run) if "loss" in row}


def evaluations(run: Path) -> dict[int, float]:
    """Validation loss by step."""
    return {row["step"]: row["eval_loss"] for row in metrics(run) if "eval_loss" in row}
