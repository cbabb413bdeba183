"""Ours against four other loops, in turn: tokens/s of ``codeparrot-ds train`` and of the loops in ``peer_loops.py``.

    python benchmarks/training_speed.py --data CORPUS --tokenizer TOKENIZER --rounds 3
    python benchmarks/training_speed.py --data CORPUS --tokenizer TOKENIZER --model demo --seq-length 256 --rows 16
    python benchmarks/training_speed.py --data CORPUS --tokenizer TOKENIZER --peers --ranks 1 2   # how it scales

Each round runs every loop as its users would, in a fresh process, on the same rows from the same initial weights:

- the recipe's loop on Accelerate, fp32 and bf16 autocast, one process on all cores (or one GPU);
- ``transformers.Trainer`` with DeepSpeed ZeRO-2 in bf16, in as many processes as ours has ranks;
- a compiled module in the manner of nanoGPT; our model and its arithmetic in bare torch, without an engine;
- ours through the real launcher, with each number of ranks.

Before and after each of them products of bf16 matrices are measured: what the cores (or the GPU) can do at that time.
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

from record import REPOSITORY, record_parser, write_record

PEERS = ("recipe fp32", "recipe bf16", "trainer", "nanogpt", "bare")
LOSS_BAND = 0.005  # nats, of loops whose weights are bf16 and whose masters begin as these weights
MATMUL = """
import json, sys, time, torch
threads, device = int(sys.argv[1]), "cuda" if torch.cuda.is_available() else "cpu"
torch.set_num_threads(threads)
size = 8192 if device == "cuda" else 1024
a, b, product = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(3))
rates, begun = [], time.perf_counter()
while time.perf_counter() - begun < 3:
    start = time.perf_counter()
    for _ in range(4):
        torch.mm(a, b, out=product)
    if device == "cuda":
        torch.cuda.synchronize()
    rates.append(4 * 2 * size**3 / (time.perf_counter() - start))
print(json.dumps(rates[len(rates) // 4 :]))
"""


def matmul_rate(processes: int) -> float:
    """FLOP/s of bf16 products in as many processes at once, together; the median of a few seconds of each."""
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    command = [sys.executable, "-c", MATMUL, str(threads)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(processes)]
    return sum(statistics.median(json.loads(process.communicate()[0])) for process in started)


def peer(options: argparse.Namespace, name: str, processes: int) -> dict:
    """One run of a peer: tokens/s of every step after the warm-up, and the losses."""
    loop, _, precision = name.partition(" ")
    launched = loop == "trainer"  # DeepSpeed wants a launcher's environment for one process too
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if launched else []
    command = [
        *(sys.executable, *launcher, str(REPOSITORY / "benchmarks" / "peer_loops.py"), loop),
        *("--shape", options.model, "--micro-batch", str(options.rows // processes)),
        *("--seq-length", str(options.seq_length), "--steps", str(options.peer_steps), "--warmup", str(options.warmup)),
        *("--data", options.data, "--tokenizer", options.tokenizer),
        *(("--precision", precision) if precision else ()),
        *(() if options.dropout is None else ("--dropout", str(options.dropout))),
    ]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        raise SystemExit(f"{name} failed:\n{answer.stderr[-3000:]}")
    result = json.loads(answer.stdout.splitlines()[-1])
    return {"tokens_per_second": result["step_tokens_per_second"], "losses": result["losses"]}


def ours(options: argparse.Namespace, ranks: int, run_name: str, output_dir: str) -> dict:
    """One run of ``codeparrot-ds train``; tokens/s of every step after the warm-up, and the losses."""
    command = [
        *(sys.executable, "-m", "codeparrot_ds", "train", "small", "--model", options.model),
        *("--data", options.data, "--tokenizer", options.tokenizer, "--deepspeed", options.deepspeed),
        *("--seq-length", str(options.seq_length), "--global-batch-size", str(options.rows)),
        *("--micro-batch-size", str(options.rows // ranks), "--num-gpus", str(ranks)),
        *("--max-train-steps", str(options.our_steps + options.warmup), "--log-steps", "1", "--max-eval-steps", "1"),
        *("--wandb", "off", "--hub", "off", "--output-dir", output_dir, "--run-name", run_name, *options.train),
    ]
    subprocess.run(command, check=True, capture_output=True, text=True, cwd=REPOSITORY)
    lines = (Path(output_dir) / run_name / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "loss" in row]
    counted = rows[options.warmup :]
    return {
        "tokens_per_second": [row["tokens_per_second"] for row in counted],
        "data_wait_share": [row["data_wait_seconds"] / row["step_seconds"] for row in counted],
        "losses": [row["loss"] for row in rows],
    }


def plan_of(options: argparse.Namespace) -> dict[str, tuple[str, int]]:
    """The runs of a round: their names, with what runs and in how many processes."""
    runs: dict[str, tuple[str, int]] = {}
    for name in options.peers:
        for processes in options.ranks if name == "trainer" else [1]:
            runs[f"{name}, {processes} process{'es' * (processes > 1)}"] = (name, processes)
    return runs | {f"ours, {ranks} rank{'s' * (ranks > 1)}": ("ours", ranks) for ranks in options.ranks}


def main() -> None:
    parser = record_parser(__doc__, name="training")
    parser.add_argument("--data", required=True, help="corpus folder")
    parser.add_argument("--tokenizer", required=True, help="tokenizer folder")
    parser.add_argument("--model", default="gpt2")
    parser.add_argument("--seq-length", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=2, help="rows per step of each")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="of ours and of the Trainer's")
    parser.add_argument("--deepspeed", default="zero2")
    parser.add_argument("--dropout", type=float, help="of the recipe's loop and the Trainer's (default: GPT-2's 0.1)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=2, help="steps of each run that do not count")
    parser.add_argument("--peer-steps", type=int, default=5, help="counted steps of a peer a round")
    parser.add_argument("--our-steps", type=int, default=8, help="counted steps of ours a round")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--train", nargs=argparse.REMAINDER, default=[], help="more options of train, last")
    options = parser.parse_args()

    runs = plan_of(options)
    raw: dict[str, list[dict]] = {name: [] for name in runs}
    rates: dict[str, list[float]] = {name: [] for name in runs}  # the mean of before and after each run
    with tempfile.TemporaryDirectory() as output_dir:
        for number in range(options.rounds):
            before = matmul_rate(max(options.ranks))
            for index, (name, (what, processes)) in enumerate(runs.items()):
                if what == "ours":
                    raw[name].append(ours(options, processes, f"round-{number}-{index}", output_dir))
                else:
                    raw[name].append(peer(options, what, processes))
                after = matmul_rate(max(options.ranks))
                rates[name].append((before + after) / 2)
                before = after
                speed = statistics.median(raw[name][-1]["tokens_per_second"])
                print(
                    f"{number} {name} {speed:,.1f} tokens/s, products {after / 1e9:,.0f} GFLOP/s after it", flush=True
                )
    folder = write_record(
        options.name, title=f"Training speed: {options.model} against four other loops", text=text(options, raw, rates),
        raw={"runs": raw, "matmul_flops": rates}, out=options.out,
    )  # fmt: skip
    print((folder / "README.md").read_text())


def medians(rounds: list[dict]) -> list[float]:
    """The median speed of each round."""
    return [statistics.median(one["tokens_per_second"]) for one in rounds]


def text(options: argparse.Namespace, raw: dict[str, list[dict]], rates: dict[str, list[float]]) -> str:
    """The medians over all rounds, ours against each round by round, and whether the losses are equal."""
    from codeparrot_ds.data.encoder import load_encoder
    from codeparrot_ds.model.shapes import find_shape, flops_per_token

    mine = [name for name in raw if name.startswith("ours")]
    vocab_size = load_encoder(options.tokenizer).vocab_size
    shape = find_shape(options.model, vocab_size=vocab_size, seq_length=options.seq_length)
    flops = flops_per_token(shape, options.seq_length)
    lines = [
        "| loop | tokens/s, median | min - max | steps | of the matmul rate | "
        + "".join(f"{name}: faster by | " for name in mine)
        + "losses |",
        "|---" * (6 + len(mine)) + "|",
    ]
    for name, rounds in raw.items():
        speeds = [speed for one in rounds for speed in one["tokens_per_second"]]
        shares = [speed * flops / rate for speed, rate in zip(medians(rounds), rates[name], strict=True)]
        cells = [
            name, f"{statistics.median(speeds):,.1f}", f"{min(speeds):,.1f} - {max(speeds):,.1f}", str(len(speeds)),
            f"{statistics.median(shares):.0%} ({min(shares):.0%} - {max(shares):.0%})",
            *(against(raw[ours], rounds) if ours != name else "1" for ours in mine),
            f"{rounds[0]['losses'][0]:.4f} … {rounds[0]['losses'][-1]:.4f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    waits = [share for name in mine for one in raw[name] for share in one["data_wait_share"]]
    measured = [rate / 1e9 for of_runs in rates.values() for rate in of_runs]
    lines += [
        "",
        f"bf16 products of matrices before and after each run: {statistics.median(measured):,.0f} GFLOP/s "
        f"({min(measured):,.0f} - {max(measured):,.0f}); a token is {flops / 1e9:.3f} GFLOP (6N + 12·L·d·s). "
        f"Ours waited for data for {statistics.median(waits):.2%} of a step.",
        "",
        loss_gate(raw, dropout=options.dropout),
    ]
    return "\n".join(lines)


def against(ours: list[dict], theirs: list[dict]) -> str:
    ratios = [mine / their for mine, their in zip(medians(ours), medians(theirs), strict=True)]
    return f"{statistics.median(ratios):.2f}x ({min(ratios):.2f} - {max(ratios):.2f})"


def loss_gate(raw: dict[str, list[dict]], *, dropout: float | None) -> str:
    """The largest difference of the loops' losses, step by step, to ours, and why it may be more than rounding."""
    reference = next(rounds[0]["losses"] for name, rounds in raw.items() if name.startswith("ours"))
    lines = []
    for name, rounds in raw.items():
        gap = max(abs(a - b) for one in rounds for a, b in zip(one["losses"], reference, strict=False))
        loop = name.replace(",", "").split()[0]
        if loop in ("recipe", "trainer") and dropout != 0:
            verdict = "dropout"
        elif loop in ("recipe", "nanogpt"):
            verdict = "fp32 weights"
        else:
            verdict = "equal" if gap <= LOSS_BAND else "NOT EQUAL"
        lines.append(f"{name} {gap:.4f} ({verdict})")
    return (
        f"Largest difference to ours of a step's loss, nats: {'; '.join(lines)}. Equal is up to {LOSS_BAND}. "
        "Loops with fp32 weights move from the second step on; of bf16 weights, whose masters begin on its grid, few "
        "change while the warm-up's steps are a small part of that grid."
    )


if __name__ == "__main__":
    main()
