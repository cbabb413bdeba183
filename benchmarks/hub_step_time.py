"""What pushing costs training: step times with and without it, run after run in turns, on the demo's shape.

python benchmarks/hub_step_time.py --data CORPUS --tokenizer TOKENIZER

Three kinds of the same short run, one after another and round after round: no branch, a branch in a bare git
repository, and a model repository on a Hub that runs on this machine, outside the processes of the run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from record import REPOSITORY, record_parser, write_record

sys.path[:0] = [str(REPOSITORY)]

from tests.hub.model_hub import TOKEN, running_hub  # noqa: E402

HUBS = {"no branch": "off", "bare git repository": "local", "Hub on this machine": "org/parrot"}
WARM_UP_STEPS = 3


def main() -> None:
    parser = record_parser(__doc__, name="hub-step-time-2-cores")
    parser.add_argument("--data", required=True, help="corpus folder")
    parser.add_argument("--tokenizer", required=True, help="tokenizer folder")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=40, help="of each run")
    parser.add_argument("--every", type=int, default=8, help="steps between checkpoints, each of which is pushed")
    options = parser.parse_args()
    rounds: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name, running_hub(Path(name) / "hub") as hub:
        hub.create(HUBS["Hub on this machine"])
        environment = os.environ | {
            "HF_ENDPOINT": hub.endpoint,
            "HF_TOKEN": TOKEN,
            "HF_HOME": f"{name}/hf",
            "HF_HUB_DISABLE_XET": "1",
        }
        for number in range(options.rounds):
            kinds = list(HUBS) if number % 2 == 0 else list(reversed(HUBS))
            done = {kind: train(options, Path(name) / f"round-{number}", HUBS[kind], environment) for kind in kinds}
            rounds.append({kind: done[kind] for kind in HUBS})
            print({kind: round(statistics.median(run["step_seconds"]), 4) for kind, run in done.items()}, flush=True)
    folder = write_record(
        options.name,
        title="Step times with and without pushing, demo shape, 2 ranks",
        text=report(rounds, options.every),
        raw=rounds,
        out=options.out,
    )
    print((folder / "README.md").read_text())


def train(options: argparse.Namespace, folder: Path, hub: str, environment: dict[str, str]) -> dict[str, Any]:
    """One run; the seconds of its steps after the first few, and how many checkpoints its branch got."""
    run = folder / f"{folder.name}-kind-{list(HUBS.values()).index(hub)}"
    command = [
        *(sys.executable, "-m", "codeparrot_ds", "train", "demo", "--num-gpus", "2", "--hub", hub, "--wandb", "off"),
        *("--data", options.data, "--tokenizer", options.tokenizer, "--max-train-steps", str(options.steps)),
        *("--save-checkpoint-steps", str(options.every), "--keep-checkpoints", "1", "--log-steps", "1"),
        *("--output-dir", str(folder), "--run-name", run.name),
        *("--eval-steps", str(options.steps), "--max-eval-steps", "1"),
    ]
    process = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    if process.returncode:
        sys.exit(process.stderr[-2000:])
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seconds = [row["step_seconds"] for row in rows if "loss" in row and row["step"] > WARM_UP_STEPS]
    pushed = sum("branch" in line and "has every checkpoint" in line for line in process.stdout.splitlines())
    return {"step_seconds": seconds, "every_checkpoint_pushed": bool(pushed)}


def report(rounds: list[dict[str, Any]], every: int) -> str:
    """Medians of all steps, and each round's ratio to the run without a branch beside it."""
    lines = ["| pushed to | median step | mean step | median of a round against no branch, rounds | all pushed |"]
    lines += ["|---|---|---|---|---|"]
    for kind in HUBS:
        steps = [seconds for one in rounds for seconds in one[kind]["step_seconds"]]
        ratios = [
            statistics.median(one[kind]["step_seconds"]) / statistics.median(one["no branch"]["step_seconds"])
            for one in rounds
        ]
        spread = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        pushed = "" if kind == "no branch" else str(all(one[kind]["every_checkpoint_pushed"] for one in rounds))
        line = f"| {kind} | {statistics.median(steps):.4f} s | {statistics.mean(steps):.4f} s | {spread} | {pushed} |"
        lines.append(line)
    steps = len(rounds[0]["no branch"]["step_seconds"])
    lines += ["", f"{len(rounds)} rounds of {steps} timed steps a run, a checkpoint every {every} steps; both ranks"]
    lines[-1] += f" and the uploader share {os.cpu_count()} cores."
    return "\n".join(lines)


if __name__ == "__main__":
    main()
