"""What saving in the background costs training: the step after a save, on the demo's shape.

python benchmarks/checkpoint_stall.py --data CORPUS --tokenizer TOKENIZER --saves 20

Runs the demo preset with a save every few steps, once with and once without the background, and reads what each run
says of its steps and saves. What host memory a save takes is in ``checkpoint_speed.py``.
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


def main() -> None:
    parser = record_parser(__doc__, name="checkpoint-stall-cpu")
    parser.add_argument("--data", required=True, help="corpus folder")
    parser.add_argument("--tokenizer", required=True, help="tokenizer folder")
    parser.add_argument("--deepspeed", default="zero2")
    parser.add_argument("--num-gpus", type=int, default=1, help="ranks")
    parser.add_argument("--saves", type=int, default=20)
    parser.add_argument("--every", type=int, default=8, help="steps between saves")
    options = parser.parse_args()
    steps = options.every * (options.saves + 1)
    with tempfile.TemporaryDirectory() as folder:
        runs = {
            name: train(options, Path(folder), name, steps, extra)
            for name, extra in (
                ("in the background", ["--save-checkpoint-steps", str(options.every)]),
                ("in the foreground", ["--save-checkpoint-steps", str(options.every), "--no-save-in-background"]),
            )
        }
    folder = write_record(
        options.name,
        title=f"The step after a save, demo shape, {options.deepspeed}, {options.num_gpus} rank(s)",
        text=table(runs),
        raw=runs,
        out=options.out,
    )
    print((folder / "README.md").read_text())


def train(options: argparse.Namespace, folder: Path, name: str, steps: int, extra: list[str]) -> dict[str, Any]:
    """One run; its step seconds with the wait for a save added, and its saves."""
    run = folder / name.replace(" ", "-")
    command = [
        *(sys.executable, "-m", "codeparrot_ds", "train", "demo", "--deepspeed", options.deepspeed),
        *("--data", options.data, "--tokenizer", options.tokenizer, "--max-train-steps", str(steps)),
        *("--output-dir", str(folder), "--run-name", run.name, "--log-steps", "1", "--wandb", "off", "--hub", "off"),
        *("--num-gpus", str(options.num_gpus)),
        *("--eval-steps", str(steps), "--max-eval-steps", "1", "--keep-checkpoints", "2", *extra),
    ]
    with (folder / "words").open("w") as words:
        process = subprocess.run(command, cwd=REPOSITORY, stdout=words, stderr=words, check=False)
    if process.returncode:
        sys.exit((folder / "words").read_text()[-2000:])
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    saves = json.loads((run / "run.json").read_text())["saves"]
    stalls = {save["step"] + 1: save["stall_seconds"] for save in saves}
    seconds = {row["step"]: row["step_seconds"] + stalls.get(row["step"], 0.0) for row in rows if "loss" in row}
    print(name, f"median step {statistics.median(seconds.values()):.3f} s", flush=True)
    return {"step_seconds": seconds, "saves": saves}


def table(runs: dict[str, dict[str, Any]]) -> str:
    """Steps after a save against the others of the same run."""
    lines = ["| saving | step after a save, median | other steps, median | ratio | training waited, median |"]
    lines += ["|---|---|---|---|---|"]
    for name in ("in the background", "in the foreground"):
        run = runs[name]
        after = {save["step"] + 1 for save in run["saves"]}
        steps = {int(step): seconds for step, seconds in run["step_seconds"].items() if int(step) > 2}
        one = statistics.median(seconds for step, seconds in steps.items() if step in after)
        other = statistics.median(seconds for step, seconds in steps.items() if step not in after)
        stall = statistics.median(save["stall_seconds"] for save in run["saves"])
        lines.append(f"| {name} | {one:.3f} s | {other:.3f} s | {one / other:.2f} | {stall:.3f} s |")
    saves = runs["in the background"]["saves"]
    num_bytes, seconds = saves[0]["bytes"], statistics.median(save["seconds"] for save in saves)
    lines += ["", f"A checkpoint has {num_bytes / 1e6:.1f} MB and is complete {seconds:.2f} s after its step (median)."]
    lines.append(f"Cores: {os.cpu_count()}, all busy with training.")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
