"""Runs on the cluster, and on one host to compare with: started in the background, watched, stopped, broken."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from codeparrot_ds.checkpoint import folders as checkpoint_files
from tests.cluster.cluster import OF_A_LAUNCHER, REPOSITORY, Cluster

OF_THE_CLOCK = {"time", "tokens_per_second", "mfu", "step_seconds", "data_wait_seconds", "memory_bytes"}
OF_THE_CLOCK |= {"rank_seconds_median", "rank_seconds_max", "slowest_rank"}
HUNG_SECONDS = 240
EVERY = 10
"""Steps between two evaluations, and between two checkpoints."""


def options(course: Path, *extra: str) -> list[str]:
    """Of ``train``: ZeRO-2 on a course of `kills.lay_course`, a checkpoint and an evaluation every ten steps."""
    return [
        *("demo", "--model", str(course / "config.json"), "--data", str(course / "corpus"), "--deepspeed", "zero2"),
        *("--tokenizer", str(course / "tokenizer"), "--seq-length", "32", "--dropout", "0.1", "--num-lanes", "6"),
        *("--global-batch-size", "12", "--micro-batch-size", "2", "--shuffle-buffer", "8", "--num-workers", "1"),
        *(
            "--learning-rate",
            "5e-4",
            "--num-warmup-steps",
            "4",
            "--save-checkpoint-steps",
            str(EVERY),
            "--log-steps",
            "1",
        ),
        *("--max-eval-steps", "-1", "--keep-checkpoints", "2", "--wandb", "off", "--hub", "off", *extra),
    ]


class Training:
    """``codeparrot-ds train`` on the cluster's login node, in the background.

    Args:
        cluster: where it runs.
        run: folder of the run.
        arguments: of ``train``.
        variables: of its environment.
    """

    def __init__(
        self, cluster: Cluster, run: Path, arguments: list[str], variables: dict[str, str] | None = None
    ) -> None:
        self.cluster, self.run = cluster, run
        self.output = cluster.folder / f"output-{secrets.token_hex(4)}.txt"
        self._rows_before = self.metrics()
        place = ["--output-dir", str(run.parent), "--run-name", run.name]
        command = [sys.executable, "-m", "codeparrot_ds", "train", *arguments, *place]
        with self.output.open("w") as file:
            streams = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": subprocess.STDOUT}
            self.process = cluster.popen(command, env=variables, **streams)

    def said(self) -> str:
        return self.output.read_text(errors="replace")

    def until(self, condition: Callable[[], Any], seconds: float = HUNG_SECONDS) -> Any:
        """Waits until a condition holds, and returns what it says; the run must not end before."""
        deadline = time.monotonic() + seconds
        while not (value := condition()):
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.said()}"
            assert time.monotonic() < deadline, f"nothing happened within {seconds} s:\n{self.said()}"
            time.sleep(0.005)
        return value

    def until_said(self, words: str, seconds: float = HUNG_SECONDS) -> str:
        """Waits for a line with these words (a regular expression); returns it."""
        pattern = re.compile(f".*(?:{words}).*")
        return self.until(lambda: pattern.search(self.said()), seconds)[0]

    def until_step(self, step: int) -> None:
        """Waits until this start has logged a training step."""
        self.until(lambda: self.metrics() != self._rows_before and self.last_step() >= step)

    def last_step(self) -> int:
        """The last step logged."""
        steps = re.findall(rb'^\{"step": (\d+).*"loss"', self.metrics(), re.MULTILINE)
        return int(steps[-1]) if steps else 0

    def metrics(self) -> bytes:
        """What ``metrics.jsonl`` holds."""
        try:
            return (self.run / "metrics.jsonl").read_bytes()
        except FileNotFoundError:
            return b""

    def saving(self) -> bool:
        """Whether a checkpoint is being written."""
        with contextlib.suppress(FileNotFoundError):
            return any(name.startswith(".staging-") for name in os.listdir(self.run / "checkpoints"))
        return False

    def evaluating(self) -> bool:
        """Whether a step's training row is there and the evaluation that is due then is not."""
        rows = self.metrics().splitlines()
        return bool(rows) and b'"loss"' in rows[-1] and self.last_step() % EVERY == 0

    def wait(self, seconds: float = HUNG_SECONDS) -> int:
        """The exit code."""
        try:
            return self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"did not end within {seconds} s:\n{self.said()}") from None

    def ranks(self) -> dict[int, int]:
        """Process ids by rank, of those that train and not of their guards."""
        found = {}
        for host in self.cluster.names:
            here = set(self.cluster.of_the_run(host))
            for pid in here:
                with contextlib.suppress(OSError, ValueError):
                    variables = dict(
                        part.split("=", 1) for part in _read(f"/proc/{pid}/environ").split("\0") if "=" in part
                    )
                    parent = int(_read(f"/proc/{pid}/stat").rpartition(")")[2].split()[1])
                    same = parent in here and _read(f"/proc/{parent}/cmdline") == _read(f"/proc/{pid}/cmdline")
                    if same and "codeparrot_ds.train" in _read(f"/proc/{pid}/cmdline") and "RANK" in variables:
                        found.setdefault(int(variables["RANK"]), []).append((parent, pid))
        # A rank's loader workers have the same words: the rank is the child of the guard, who is nobody's among these.
        # After a cut the ranks of the start before may not be gone yet: the newer ones count.
        return {
            rank: max(pid for parent, pid in pairs if parent not in {child for _, child in pairs})
            for rank, pairs in found.items()
        }

    def end(self) -> None:
        """Leaves nothing running, whatever went wrong."""
        self.process.kill()
        self.process.wait()


def _read(path: str) -> str:
    return Path(path).read_bytes().decode(errors="replace")


def train_on_one_host(run: Path, arguments: list[str], ranks: int, seconds: float = HUNG_SECONDS) -> None:
    """The same run on this machine alone."""
    kept = {key: value for key, value in os.environ.items() if key not in OF_A_LAUNCHER}
    command = [sys.executable, "-m", "codeparrot_ds", "train", *arguments, "--num-gpus", str(ranks)]
    command += ["--output-dir", str(run.parent), "--run-name", run.name]
    said = subprocess.run(
        command,
        cwd=REPOSITORY,
        env=kept | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=seconds,
    )
    assert said.returncode == 0, said.stderr


def rows(run: Path) -> list[dict[str, Any]]:
    """Of ``metrics.jsonl``, without what the clock says."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in OF_THE_CLOCK} for row in lines]


def newest_valid_step(run: Path) -> int:
    """The step of the newest checkpoint, whose every byte is checked; 0 without one."""
    folders = checkpoint_files.checkpoint_folders(run / "checkpoints")
    if not folders:
        return 0
    assert folders[0].damage() == []
    return folders[0].step


def outcome(run: Path) -> dict[str, Any]:
    """What the run's record says of its end."""
    return json.loads((run / "run.json").read_text())["outcome"]
