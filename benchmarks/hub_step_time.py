"""What pushing costs training: step times while checkpoints are pushed and while they wait, within one run.

python benchmarks/hub_step_time.py --data CORPUS --tokenizer TOKENIZER

One run saves a checkpoint every few steps. After every other one the uploader is held still, and let go after the next:
so windows of steps in which two checkpoints are pushed alternate with windows in which none is, a few seconds apart,
and all else is the same. Once with a branch in a bare git repository, once with a model repository on a Hub that runs
on this machine, outside the processes of the run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from record import REPOSITORY, record_parser, write_record

sys.path[:0] = [str(REPOSITORY)]

from tests.hub.model_hub import TOKEN, running_hub  # noqa: E402

HUBS = {"bare git repository": "local", "Hub on this machine": "org/parrot"}


def main() -> None:
    parser = record_parser(__doc__, name="hub-step-time-2-cores")
    parser.add_argument("--data", required=True, help="corpus folder")
    parser.add_argument("--tokenizer", required=True, help="tokenizer folder")
    parser.add_argument("--pairs", type=int, default=25, help="of windows, a run")
    parser.add_argument("--every", type=int, default=8, help="steps between checkpoints: a window")
    options = parser.parse_args()
    runs = {}
    with tempfile.TemporaryDirectory() as name, running_hub(Path(name) / "hub") as hub:
        hub.create(HUBS["Hub on this machine"])
        environment = os.environ | {
            "HF_ENDPOINT": hub.endpoint,
            "HF_TOKEN": TOKEN,
            "HF_HOME": f"{name}/hf",
            "HF_HUB_DISABLE_XET": "1",
        }
        for number, (kind, place) in enumerate(HUBS.items()):
            runs[kind] = train(options, Path(name), f"run-{number}", place, environment)
            print(kind, [round(ratio, 3) for ratio in ratios(runs[kind], statistics.median)], flush=True)
    folder = write_record(
        options.name,
        title="Step times with and without pushing, demo shape, 2 ranks",
        text=report(runs, options.every),
        raw=runs,
        out=options.out,
    )
    print((folder / "README.md").read_text())


def train(options: argparse.Namespace, folder: Path, name: str, hub: str, environment: dict[str, str]) -> Any:
    """One run whose uploader is held in every other window: the seconds of the steps of each window, by kind."""
    run = folder / name
    steps = options.every * (2 * options.pairs + 1)  # nothing is pushed before the first checkpoint
    command = [
        *(sys.executable, "-m", "codeparrot_ds", "train", "demo", "--num-gpus", "2", "--hub", hub, "--wandb", "off"),
        *("--data", options.data, "--tokenizer", options.tokenizer, "--max-train-steps", str(steps)),
        *("--save-checkpoint-steps", str(options.every), "--keep-checkpoints", "1", "--log-steps", "1"),
        *("--output-dir", str(folder), "--run-name", name, "--eval-steps", str(steps), "--max-eval-steps", "1"),
    ]
    with (folder / f"{name}.log").open("w+") as words:
        process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=words, stderr=words)
        while process.poll() is None:
            done = len(training_rows(run))
            held = (done // options.every) % 2 == 1 and done < steps
            for worker in uploaders(run):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker, signal.SIGSTOP if held else signal.SIGCONT)
            time.sleep(0.05)
        words.seek(0)
        said = words.read()
    if process.returncode:
        sys.exit(said[-2000:])
    seconds = [row["step_seconds"] for row in training_rows(run)][options.every :]
    windows = [seconds[start : start + options.every] for start in range(0, len(seconds), options.every)]
    return {"held": windows[::2], "pushing": windows[1::2], "all_pushed": "has every checkpoint" in said}


def training_rows(run: Path) -> list[dict[str, Any]]:
    """What the run has logged of its steps so far."""
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.endswith("\n") and '"loss"' in line]


def uploaders(run: Path) -> list[int]:
    """Process ids of what pushes this run's checkpoints, git below it included."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if "codeparrot_ds.hub.worker" in (process.info["cmdline"] or ()) and str(run) in process.info["cmdline"]:
            with contextlib.suppress(psutil.NoSuchProcess):
                found += [process.pid, *(child.pid for child in process.children(recursive=True))]
    return found


def ratios(run: dict[str, Any], average: Any) -> list[float]:
    """Of each pair of neighbouring windows: a step while two checkpoints are pushed, against one while none is."""
    return [average(pushing) / average(held) for held, pushing in zip(run["held"], run["pushing"], strict=True)]


def report(runs: dict[str, Any], every: int) -> str:
    """Medians of all steps, and the ratios within the pairs."""
    lines = ["| pushed to | | step without | step while pushing | ratio in a pair, median (quartiles) | all pushed |"]
    lines += ["|---|---|---|---|---|---|"]
    for kind, run in runs.items():
        for word, average in (("median", statistics.median), ("mean", statistics.mean)):
            held, pushing = (average([s for window in run[key] for s in window]) for key in ("held", "pushing"))
            low, middle, high = statistics.quantiles(ratios(run, average), n=4)
            cells = [kind, word, f"{held:.4f} s", f"{pushing:.4f} s", f"{middle:.3f} ({low:.3f} to {high:.3f})"]
            lines.append(f"| {' | '.join(cells)} | {run['all_pushed']} |")
    pairs = len(next(iter(runs.values()))["held"])
    lines += [
        "",
        f"{pairs} pairs of windows of {every} steps a run; in a window with pushing two checkpoints are pushed,",
    ]
    lines[-1] += f" twice what training asks for. Both ranks and the uploader share {os.cpu_count()} cores."
    return "\n".join(lines)


if __name__ == "__main__":
    main()
