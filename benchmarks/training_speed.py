"""Ours against the recipe's plain loop, in turn: tokens/s of ``codeparrot-ds train`` and of ``recipe_loop.py``.

    python benchmarks/training_speed.py --data CORPUS --tokenizer TOKENIZER --rounds 3

Each round runs both as their users would, in fresh processes: the recipe's loop (fp32, eager attention, dropout 0.1,
``.item()`` every step) on all cores or one GPU, then ours through the real launcher with as many rows a step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from record import REPOSITORY, record_parser, write_record

PEERS = ("fp32", "bf16")


def recipe(options: argparse.Namespace, precision: str) -> dict:
    """One run of the recipe's loop; tokens/s of every step after the warm-up, and the losses."""
    command = [
        *(sys.executable, str(REPOSITORY / "benchmarks" / "recipe_loop.py"), "--shape", options.model),
        *("--precision", precision, "--micro-batch", str(options.rows), "--seq-length", str(options.seq_length)),
        *("--steps", str(options.recipe_steps), "--warmup", "1"),
        *("--data", options.data, "--tokenizer", options.tokenizer),
    ]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    result = json.loads(answer.stdout.splitlines()[-1])
    return {"tokens_per_second": result["window_tokens_per_second"], "losses": result["losses"]}


def ours(options: argparse.Namespace, run_name: str, output_dir: str) -> dict:
    """One run of ``codeparrot-ds train``; tokens/s of every step after the first two, and the losses."""
    command = [
        *(sys.executable, "-m", "codeparrot_ds", "train", "small", "--model", options.model),
        *("--data", options.data, "--tokenizer", options.tokenizer, "--deepspeed", options.deepspeed),
        *("--seq-length", str(options.seq_length), "--global-batch-size", str(options.rows)),
        *("--micro-batch-size", str(options.rows // options.ranks), "--num-gpus", str(options.ranks)),
        *("--max-train-steps", str(options.our_steps + 2), "--log-steps", "1", "--max-eval-steps", "1"),
        *("--wandb", "off", "--hub", "off", "--output-dir", output_dir, "--run-name", run_name),
    ]
    subprocess.run(command, check=True, capture_output=True, text=True, cwd=REPOSITORY)
    lines = (Path(output_dir) / run_name / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "loss" in row]
    return {
        "tokens_per_second": [row["tokens_per_second"] for row in rows[2:]],
        "mfu": [row["mfu"] for row in rows[2:]],
        "data_wait_share": [row["data_wait_seconds"] / row["step_seconds"] for row in rows[2:]],
        "losses": [row["loss"] for row in rows],
    }


def main() -> None:
    parser = record_parser(__doc__, name="training-cpu")
    parser.add_argument("--data", required=True, help="corpus folder")
    parser.add_argument("--tokenizer", required=True, help="tokenizer folder")
    parser.add_argument("--model", default="gpt2")
    parser.add_argument("--seq-length", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=2, help="rows a step of both")
    parser.add_argument("--ranks", type=int, default=2, help="of ours; the recipe's is one process on all cores")
    parser.add_argument("--deepspeed", default="zero2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--recipe-steps", type=int, default=3, help="counted steps of the recipe's loop a round")
    parser.add_argument("--our-steps", type=int, default=8, help="counted steps of ours a round")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=["fp32"], help="precisions of the recipe's loop")
    options = parser.parse_args()

    raw: dict[str, list[dict]] = {f"recipe {precision}": [] for precision in options.peers} | {"ours": []}
    with tempfile.TemporaryDirectory() as output_dir:
        for number in range(options.rounds):
            for precision in options.peers:
                raw[f"recipe {precision}"].append(recipe(options, precision))
            raw["ours"].append(ours(options, f"round-{number}", output_dir))
            speeds = {name: statistics.median(rounds[-1]["tokens_per_second"]) for name, rounds in raw.items()}
            print(number, {name: round(speed, 1) for name, speed in speeds.items()}, flush=True)
    folder = write_record(
        options.name, title=f"Training speed: {options.model} against the recipe's loop", text=table(raw), raw=raw,
        out=options.out,
    )  # fmt: skip
    print((folder / "README.md").read_text())


def table(raw: dict[str, list[dict]]) -> str:
    """The medians over all rounds, the ratio round by round, and the losses."""
    speeds = {name: [s for one in rounds for s in one["tokens_per_second"]] for name, rounds in raw.items()}
    lines = [
        "| loop | tokens/s, median | min - max | windows | ours is faster by | losses |",
        "|---|---|---|---|---|---|",
    ]
    for name, values in speeds.items():
        ratios = [
            statistics.median(mine["tokens_per_second"]) / statistics.median(theirs["tokens_per_second"])
            for mine, theirs in zip(raw["ours"], raw[name], strict=True)
        ]
        ratio = f"{statistics.median(ratios):.2f}x ({min(ratios):.2f} - {max(ratios):.2f})"
        losses = raw[name][0]["losses"]
        lines.append(
            f"| {name} | {statistics.median(values):,.1f} | {min(values):,.1f} - {max(values):,.1f} | {len(values)} | "
            f"{'1' if name == 'ours' else ratio} | {losses[0]:.3f} … {losses[-1]:.3f} ({len(losses)} steps) |"
        )
    mfu = statistics.median(value for one in raw["ours"] for value in one["mfu"])
    wait = statistics.median(value for one in raw["ours"] for value in one["data_wait_share"])
    lines += [
        "",
        f"Ours: {mfu:.0%} of the measured peak (6N + 12·L·d·s FLOPs a token), {wait:.2%} of a step waiting for data.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
