"""Whole stories: the real command line, the real launcher, real ranks on gloo, on a small corpus of real code."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import io
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from codeparrot_ds.cli import main as cli
from codeparrot_ds.config.arguments import ArgumentParser, add_config_arguments, config_from_arguments
from codeparrot_ds.launch.preflight import preflight

REPOSITORY = Path(__file__).resolve().parents[2]
# The demo with a smaller model on short rows: a run is mostly start-up. The learning rate is a small batch's: at the
# demo's 2e-3 gradient norms reach 14, which amplifies rounding differences twentyfold in bf16.
SMALL = [
    *("demo", "--model", str(Path(__file__).with_name("model.json")), "--seq-length", "64"),
    *("--global-batch-size", "8", "--micro-batch-size", "2", "--num-warmup-steps", "4", "--learning-rate", "5e-4"),
    *("--max-eval-steps", "4", "--log-steps", "1", "--num-lanes", "8", "--shuffle-buffer", "64", "--num-workers", "1"),
]
STEPS = ("--max-train-steps", "20", "--save-checkpoint-steps", "10")
COMPARED = [f"zero{stage}{precision}" for precision in ("", "_fp32") for stage in range(4)]
OTHERS = ["zero2_offload", "zero3_nvme"]  # Adam's states in the host's memory, and on the disk


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workshop:
    """A corpus, a tokenizer, and the command line to train on them."""

    corpus: Path
    tokenizer: Path
    runs: Path

    def options(self, *arguments: str, output_dir: Path | None = None) -> list[str]:
        """Options of ``train`` with the small settings; wandb and hub are off unless asked for."""
        return [
            *SMALL,
            *("--data", str(self.corpus), "--tokenizer", str(self.tokenizer), "--wandb", "off", "--hub", "off"),
            *("--output-dir", str(output_dir or self.runs), *arguments),
        ]

    def command(self, *arguments: str, output_dir: Path | None = None) -> list[str]:
        """``codeparrot-ds train`` with these options."""
        return [sys.executable, "-m", "codeparrot_ds", "train", *self.options(*arguments, output_dir=output_dir)]

    def train(self, *arguments: str, output_dir: Path | None = None, **kwargs) -> subprocess.CompletedProcess:
        """Trains to the end and returns the finished process, whatever its exit code."""
        return run_command(self.command(*arguments, output_dir=output_dir), **kwargs)

    def refuse(self, *arguments: str, output_dir: Path | None = None) -> subprocess.CompletedProcess:
        """``train`` in this process, for what is refused before the launcher starts: a start of Python less."""
        return run_here("train", *self.options(*arguments, output_dir=output_dir))


def train_in_turn(runs: list[list[str]], *, ranks: int, device: str = "cpu", **variables: str) -> list[dict]:
    """Trains runs one after the other in one launch of ``train_in_turn.py``; most of a small run is its start.

    Each run passes the command's checks first. Without a run nothing is launched.

    Args:
        runs: the options of each; their paths are relative to the working folder.
        ranks: processes, each with its share of the cores.
        device: ``cpu`` or ``cuda``.
        variables: of the ranks' environment.

    Returns:
        What ``train`` returns for each.
    """
    if not runs:
        return []
    parser = ArgumentParser()
    add_config_arguments(parser)
    for options in runs:
        config = config_from_arguments(parser.parse_args(options))
        preflight(config, device=device, world_size=ranks)
    world = base64.urlsafe_b64encode(json.dumps({"localhost": list(range(ranks))}).encode()).decode()
    node = [f"--world_info={world}", "--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "runs.json"
        file.write_text(json.dumps(runs))
        script = [str(Path(__file__).with_name("train_in_turn.py")), str(file)]
        launcher = [sys.executable, "-m", "deepspeed.launcher.launch", *node, "--quiet", "--no_local_rank"]
        threads = str(max(1, len(os.sched_getaffinity(0)) // 2))
        environment = clean_environment(DS_ACCELERATOR=device, OMP_NUM_THREADS=threads, **variables)
        process = run_command([*launcher, *script], cwd=Path.cwd(), env=environment, timeout=540)
        assert process.returncode == 0, process.stderr[-3000:]
        return json.loads(file.with_suffix(".outcomes.json").read_text())


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def run_command(command: list[str], *, timeout: int = 300, **kwargs) -> subprocess.CompletedProcess:
    """Runs a command from the repository and returns it with its output."""
    kwargs.setdefault("cwd", REPOSITORY)
    kwargs.setdefault("env", clean_environment())
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, **kwargs)


def run_here(*arguments: str) -> subprocess.CompletedProcess:
    """``codeparrot-ds`` with these arguments in this process: its exit code and what it said."""
    said, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors):
        try:
            code = cli.main(arguments)
        except SystemExit as end:  # the parser's
            code = end.code
    return subprocess.CompletedProcess(arguments, code, said.getvalue(), errors.getvalue())


def clean_environment(**extra: str) -> dict[str, str]:
    """The environment of a user: nothing that another test's launcher may have set."""
    ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_SIZE", "OMP_NUM_THREADS")
    kept = {key: value for key, value in os.environ.items() if key not in ours}
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    return kept | {"PYTHONPATH": os.pathsep.join(paths)} | extra


def metrics(run: Path) -> list[dict]:
    """All rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> dict[int, float]:
    """Training loss by step."""
    return {row["step"]: row["loss"] for row in metrics(run) if "loss" in row}


def log(run: Path) -> str:
    """What rank 0 of a run said on the console, and more."""
    return (run / "log" / "debug_0.log").read_text()


def evaluations(run: Path) -> dict[int, float]:
    """Validation loss by step."""
    return {row["step"]: row["eval_loss"] for row in metrics(run) if "eval_loss" in row}
