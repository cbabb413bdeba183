"""Every shipped DeepSpeed config on a GPU: does it train, and is its memory what the plan said?

    python benchmarks/gpu_memory.py --data CORPUS --tokenizer TOKENIZER --num-parallel 8

Each config trains some steps through the real launcher on one GPU. The plan's peak (from the formulas) stands beside
``torch.cuda.max_memory_allocated``, which other processes on the GPU do not change: so several train at once, and no
speed is read off here.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from record import REPOSITORY, record_parser, write_record

from codeparrot_ds.ds_config.file import shipped_names

STEPS = 5  # the plan is compared after the third


def train(options: argparse.Namespace, config: str, micro_batch_size: int, output_dir: str) -> dict[str, Any]:
    """One run: its losses, what was predicted and measured, or the sentences that refused it."""
    name = f"{options.model}-{config}-{micro_batch_size}"
    command = [
        *(sys.executable, "-m", "codeparrot_ds", "train", "small", "--model", options.model, "--deepspeed", config),
        *("--data", options.data, "--tokenizer", options.tokenizer, "--num-gpus", "1"),
        *("--micro-batch-size", str(micro_batch_size), "--ignore-memory-plan"),
        *("--global-batch-size", str(micro_batch_size * options.accumulation_steps)),
        *("--max-train-steps", str(STEPS), "--num-warmup-steps", "1", "--log-steps", "1", "--max-eval-steps", "1"),
        *("--wandb", "off", "--hub", "off", "--output-dir", output_dir, "--run-name", name),
    ]
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as said:
        try:
            code: int | str = subprocess.run(
                command, stdout=said, stderr=subprocess.STDOUT, cwd=REPOSITORY, timeout=options.timeout
            ).returncode
        except subprocess.TimeoutExpired:
            code = f"not done within {options.timeout} s"
        said.seek(0)
        text = said.read()
    result: dict[str, Any] = {
        "model": options.model,
        "config": config,
        "micro_batch_size": micro_batch_size,
        "exit": code,
        "seconds": round(time.monotonic() - started, 1),
    }
    folder = Path(output_dir) / name
    if (folder / "metrics.jsonl").is_file():
        rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        result["losses"] = [row["loss"] for row in rows if "loss" in row]
        result["memory"] = json.loads((folder / "run.json").read_text()).get("memory")
    if code:
        result["said"] = text.splitlines()[-40:]
    shutil.rmtree(folder, ignore_errors=True)  # checkpoints of large models
    print(code, f"{result['seconds']:5.1f} s", name, flush=True)
    return result


def table(rows: list[dict[str, Any]]) -> str:
    """Predicted beside measured, config by config."""
    lines = [
        "| model | config | micro-batch | predicted GB | measured GB | difference | losses |",
        "|---|" + "---|" * 6,
    ]
    differences = []
    for row in rows:
        losses = row.get("losses") or []
        loss = f"{losses[0]:.3f} … {losses[-1]:.3f}" if losses else ""
        start = f"| {row['model']} | `{row['config']}` | {row['micro_batch_size']} |"
        if row["exit"]:
            said = [line for line in row["said"] if "error" in line.lower()] or row["said"] or [""]
            lines.append(f"{start} exit {row['exit']}: {said[-1][:200].replace('|', '/')} | | | {loss} |")
            continue
        if row["memory"] is None:
            lines.append(f"{start} not on a GPU | | | {loss} |")
            continue
        predicted, measured = row["memory"]["predicted_bytes"], row["memory"]["allocated_bytes"]
        differences.append(measured / predicted - 1)
        figures = f"{predicted / 1e9:.3f} | {measured / 1e9:.3f} | {differences[-1]:+.2%}"
        lines.append(f"{start} {figures} | {loss} |")
    if differences:
        within = sum(abs(difference) <= 0.02 for difference in differences)
        worst = max(differences, key=abs)
        lines += ["", f"{len(rows)} runs, {len(differences)} trained; {within} within 2%, the largest {worst:+.2%}."]
    return "\n".join(lines)


def main() -> None:
    parser = record_parser(__doc__, name="gpu-memory")
    parser.add_argument("--data", required=True, help="corpus folder")
    parser.add_argument("--tokenizer", required=True, help="tokenizer folder")
    parser.add_argument("--model", default="gpt2")
    parser.add_argument("--configs", nargs="+", default=shipped_names())
    parser.add_argument("--micro-batch-sizes", nargs="+", type=int, default=[4])
    parser.add_argument("--accumulation-steps", type=int, default=2)
    parser.add_argument("--num-parallel", type=int, default=1, help="runs at once")
    parser.add_argument("--timeout", type=float, default=240, help="seconds a run may take")
    options = parser.parse_args()
    options.data, options.tokenizer = os.path.abspath(options.data), os.path.abspath(options.tokenizer)

    points = [(config, size) for size in options.micro_batch_sizes for config in options.configs]
    rows = []
    with tempfile.TemporaryDirectory() as output_dir, ThreadPoolExecutor(options.num_parallel) as pool:
        # The first builds the operators for all. The record grows with each, so that it survives an end by force.
        for row in itertools.chain(
            [train(options, *points[0], output_dir)],
            pool.map(lambda point: train(options, *point, output_dir), points[1:]),
        ):
            rows.append(row)
            folder = write_record(
                options.name, title=f"Memory on a GPU: {options.model}, planned and measured", text=table(rows),
                raw=rows, out=options.out,
            )  # fmt: skip
    print((folder / "README.md").read_text())


if __name__ == "__main__":
    main()
