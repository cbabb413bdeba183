"""Ours against other loops, in turn: tokens/s of ``codeparrot-ds train`` and of the loops in ``peer_loops.py``.

    python benchmarks/training_speed.py --data CORPUS --tokenizer TOKENIZER --rounds 3
    python benchmarks/training_speed.py --data CORPUS --tokenizer TOKENIZER --model demo --seq-length 256 --rows 16
    python benchmarks/training_speed.py --data CORPUS --tokenizer TOKENIZER --peers --ranks 1 2   # how it scales
    python benchmarks/training_speed.py --data CORPUS --tokenizer TOKENIZER --peers ddp fsdp2 --ranks 2
    python benchmarks/training_speed.py --data CORPUS --tokenizer TOKENIZER --rows 192 --micro-batch 64 \\
        --peer-micro-batches recipe=32 --log-steps 4 --peer-steps 8 --deepspeed zero1                  # a GPU

Each round runs every loop as its users would, in a fresh process, on the same rows from the same initial weights:

- the recipe's loop on Accelerate, fp32 and bf16 autocast, one process on all cores (or one GPU);
- ``transformers.Trainer`` with DeepSpeed ZeRO-2 in bf16, in as many processes as ours has ranks;
- a compiled module in the manner of nanoGPT; our model and its arithmetic in bare torch, without an engine;
- the same model under DDP and FSDP2, in as many processes as ours has ranks, where these are several;
- ours through the real launcher, with each number of ranks.

A step has the same rows for each; a loop that needs more memory takes smaller micro-batches and more of them. Before
and after each of them products of bf16 matrices are measured: what the cores (or the GPU) can do at that time. The
record grows with each result; a run that fails is a line of it with its reason.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from record import REPOSITORY, ask_gpus, last_words, record_parser, write_record

PEERS = ("recipe fp32", "recipe bf16", "trainer", "nanogpt", "bare", "bare lean", "ddp", "fsdp2")
DEFAULT_PEERS = ("recipe fp32", "recipe bf16", "trainer", "nanogpt", "bare")
SEVERAL = ("trainer", "ddp", "fsdp2")  # in as many processes as ours has ranks
LOSS_BAND = 0.005  # nats, of loops whose weights are bf16 and whose masters begin as these weights
MATMUL = """
import json, sys, time, torch
threads, device = int(sys.argv[1]), "cuda" if torch.cuda.is_available() else "cpu"
torch.set_num_threads(threads)
if device == "cuda":
    torch.cuda.set_device(int(sys.argv[2]))
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
    started = [
        subprocess.Popen([*command, str(number)], stdout=subprocess.PIPE, text=True) for number in range(processes)
    ]
    return sum(statistics.median(json.loads(process.communicate()[0])) for process in started)


def peer(options: argparse.Namespace, name: str, processes: int) -> dict:
    """One run of a peer: tokens/s of the logged steps after the warm-up, and the losses; or why there are none."""
    loop, _, kind = name.partition(" ")
    micro_batch = options.peer_micro_batches.get(loop, options.micro_batch or options.rows // processes)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [
        *(
            sys.executable,
            *(launcher if loop in SEVERAL else ()),
            str(REPOSITORY / "benchmarks" / "peer_loops.py"),
            loop,
        ),
        *("--shape", options.model, "--micro-batch", str(micro_batch)),
        *("--accumulation", str(options.rows // processes // micro_batch), "--log-steps", str(options.log_steps)),
        *("--seq-length", str(options.seq_length), "--steps", str(options.peer_steps), "--warmup", str(options.warmup)),
        *("--data", options.data, "--tokenizer", options.tokenizer),
        *(("--precision", kind) if loop == "recipe" else ("--lean",) if kind == "lean" else ()),
        *(() if options.dropout is None else ("--dropout", str(options.dropout))),
    ]
    answer = run_quietly(command, options.timeout)
    if isinstance(answer, str):
        return {"failure": answer}
    result = json.loads(answer.stdout.splitlines()[-1])
    return {"tokens_per_second": result["step_tokens_per_second"], "losses": result["losses"]}


def ours(options: argparse.Namespace, ranks: int, run_name: str, output_dir: str) -> dict:
    """One run of ``codeparrot-ds train``; tokens/s of the logged steps after the warm-up, and the losses."""
    micro_batch = options.micro_batch or options.rows // ranks
    command = [
        *(sys.executable, "-m", "codeparrot_ds", "train", "small", "--model", options.model),
        *("--data", options.data, "--tokenizer", options.tokenizer, "--deepspeed", options.deepspeed),
        *("--seq-length", str(options.seq_length), "--global-batch-size", str(options.rows)),
        *("--micro-batch-size", str(micro_batch), "--num-gpus", str(ranks)),
        *("--max-train-steps", str(options.our_steps + options.warmup), "--log-steps", str(options.log_steps)),
        *("--max-eval-steps", "1"),
        *("--wandb", "off", "--hub", "off", "--output-dir", output_dir, "--run-name", run_name, *options.train),
    ]
    answer = run_quietly(command, options.timeout)
    metrics = Path(output_dir) / run_name / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.is_file() else []
    shutil.rmtree(Path(output_dir) / run_name, ignore_errors=True)  # its final checkpoint is 24 GB of 1.5B parameters
    if isinstance(answer, str):
        return {"failure": answer}
    rows = [row for row in map(json.loads, lines) if "loss" in row]
    counted = rows[options.warmup // options.log_steps :]
    return {
        "tokens_per_second": [row["tokens_per_second"] for row in counted],
        "data_wait_share": [row["data_wait_seconds"] / row["step_seconds"] for row in counted],
        "losses": [row["loss"] for row in rows],
    }


def run_quietly(command: list[str], timeout: float) -> subprocess.CompletedProcess | str:
    """The finished process, or the last words of one that failed."""
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=REPOSITORY, timeout=timeout
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"not done within {timeout:.0f} s"
    return answer if answer.returncode == 0 else f"exit {answer.returncode}: {last_words(answer.stderr)}"


def plan_of(options: argparse.Namespace) -> dict[str, tuple[str, int]]:
    """The runs of a round: their names, with what runs and in how many processes."""
    runs: dict[str, tuple[str, int]] = {}
    for name in options.peers:
        for processes in options.ranks if name in SEVERAL else [1]:
            if processes > 1 or name not in ("ddp", "fsdp2"):
                runs[f"{name}, {processes} process{'es' * (processes > 1)}"] = (name, processes)
    return runs | {f"ours, {ranks} rank{'s' * (ranks > 1)}": ("ours", ranks) for ranks in options.ranks}


def main() -> None:
    options = parse_arguments()
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
                said = raw[name][-1].get("failure") or (
                    f"{statistics.median(raw[name][-1]['tokens_per_second']):,.1f} tokens/s"
                )
                print(f"{number} {name} {said}, products {after / 1e9:,.0f} GFLOP/s after it", flush=True)
                folder = write_record(
                    options.name, title=f"Training speed: {options.model} against other loops",
                    text=text(options, raw, rates), raw={"runs": raw, "matmul_flops": rates}, out=options.out,
                )  # fmt: skip
    print((folder / "README.md").read_text())


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    gpus = len(ask_gpus("name"))
    parser = record_parser(__doc__, name="training")
    parser.add_argument("--data", required=True, help="corpus folder")
    parser.add_argument("--tokenizer", required=True, help="tokenizer folder")
    parser.add_argument("--model", default="gpt2")
    parser.add_argument("--seq-length", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=2, help="rows per step of each")
    parser.add_argument("--micro-batch", type=int, help="rows per rank and forward pass (default: all of a rank's)")
    parser.add_argument(
        "--peer-micro-batches", type=pair, nargs="*", default=[], metavar="LOOP=ROWS", help="of peers with their own"
    )
    ranks = sorted({1, gpus or 2})
    parser.add_argument("--ranks", type=int, nargs="+", default=ranks, help="of ours, the Trainer's, DDP's and FSDP2's")
    parser.add_argument("--deepspeed", default="zero2")
    parser.add_argument("--dropout", type=float, help="of the recipe's loop and the Trainer's (default: GPT-2's 0.1)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warmup", type=int, help="steps of each run that do not count (default: 2, or --log-steps)")
    parser.add_argument("--peer-steps", type=int, default=5, help="counted steps of a peer a round")
    parser.add_argument("--our-steps", type=int, default=8, help="counted steps of ours a round")
    parser.add_argument("--log-steps", type=int, default=1, help="steps between two that wait for the device")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds that a run may take")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(DEFAULT_PEERS))
    parser.add_argument("--train", nargs=argparse.REMAINDER, default=[], help="more options of train, last")
    options = parser.parse_args(arguments)
    options.peer_micro_batches = dict(options.peer_micro_batches)
    options.warmup = options.warmup or (2 if options.log_steps == 1 else options.log_steps)
    for name in ("warmup", "peer_steps", "our_steps"):
        if getattr(options, name) % options.log_steps:
            parser.error(f"--{name.replace('_', '-')} is a multiple of --log-steps")
    if gpus and max(options.ranks) > gpus:
        parser.error(f"--ranks {max(options.ranks)} and {gpus} GPU(s)")
    for rows in filter(None, (options.micro_batch, *options.peer_micro_batches.values())):
        if any(options.rows % (ranks * rows) for ranks in options.ranks):
            parser.error(f"--rows {options.rows} does not divide by micro-batches of {rows} on {options.ranks} ranks")
    return options


def pair(text: str) -> tuple[str, int]:
    """``recipe=16``."""
    loop, _, rows = text.partition("=")
    if loop not in {name.split()[0] for name in PEERS} or not rows.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a peer and its rows, such as recipe=16")
    return loop, int(rows)


def good(rounds: list[dict]) -> list[dict]:
    """Those that have figures."""
    return [one for one in rounds if "failure" not in one]


def median(one: dict) -> float:
    """Of a round's speeds."""
    return statistics.median(one["tokens_per_second"])


def text(options: argparse.Namespace, raw: dict[str, list[dict]], rates: dict[str, list[float]]) -> str:
    """The medians over all rounds, ours against each round by round, and whether the losses are equal."""
    failures = [f"- {name}: {one['failure']}" for name, rounds in raw.items() for one in rounds if "failure" in one]
    with_figures = {name: good(rounds) for name, rounds in raw.items() if good(rounds)}
    if not with_figures:
        return "\n".join(["No run has figures.", "", *failures])
    from codeparrot_ds.data.encoder import load_encoder
    from codeparrot_ds.model.shapes import find_shape, flops_per_token

    mine = [name for name in with_figures if name.startswith("ours")]
    vocab_size = load_encoder(options.tokenizer).vocab_size
    shape = find_shape(options.model, vocab_size=vocab_size, seq_length=options.seq_length)
    flops = flops_per_token(shape, options.seq_length)
    lines = [
        "| loop | tokens/s, median | min - max | steps | of the matmul rate | "
        + "".join(f"{name}: faster by | " for name in mine)
        + "losses |",
        "|---" * (6 + len(mine)) + "|",
    ]
    for name, rounds in with_figures.items():
        speeds = [speed for one in rounds for speed in one["tokens_per_second"]]
        of_rounds = zip(raw[name], rates[name], strict=True)
        shares = [median(one) * flops / rate for one, rate in of_rounds if "failure" not in one]
        cells = [
            name, f"{statistics.median(speeds):,.1f}", f"{min(speeds):,.1f} - {max(speeds):,.1f}", str(len(speeds)),
            f"{statistics.median(shares):.0%} ({min(shares):.0%} - {max(shares):.0%})",
            *(against(raw[ours], raw[name]) if ours != name else "1" for ours in mine),
            f"{rounds[0]['losses'][0]:.4f} … {rounds[0]['losses'][-1]:.4f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    waits = [share for name in mine for one in with_figures[name] for share in one["data_wait_share"]] or [float("nan")]
    measured = [rate / 1e9 for of_runs in rates.values() for rate in of_runs]
    lines += [
        "",
        f"bf16 products of matrices before and after each run: {statistics.median(measured):,.0f} GFLOP/s "
        f"({min(measured):,.0f} - {max(measured):,.0f}); a token is {flops / 1e9:.3f} GFLOP (6N + 12·L·d·s). "
        f"Ours waited for data for {statistics.median(waits):.2%} of a step.",
        "",
        loss_gate(with_figures, dropout=options.dropout, log_steps=options.log_steps),
        *(["", "Failed:", "", *failures] if failures else []),
    ]
    return "\n".join(lines)


def against(ours: list[dict], theirs: list[dict]) -> str:
    """Round by round, of those in which both have figures."""
    both = [pair for pair in zip(ours, theirs, strict=False) if len(good(list(pair))) == 2]
    ratios = [median(mine) / median(their) for mine, their in both]
    return f"{statistics.median(ratios):.2f}x ({min(ratios):.2f} - {max(ratios):.2f})" if ratios else ""


def loss_gate(raw: dict[str, list[dict]], *, dropout: float | None, log_steps: int = 1) -> str:
    """The largest difference of the loops' losses, step by step, to ours, and why it may be more than rounding."""
    reference = next((rounds[0]["losses"] for name, rounds in raw.items() if name.startswith("ours")), None)
    if reference is None:
        return "Losses are compared with ours, which has none yet."
    lines = []
    for name, rounds in raw.items():
        gap = max(abs(a - b) for one in rounds for a, b in zip(one["losses"], reference, strict=False))
        loop = name.replace(",", "").split()[0]
        if loop in ("recipe", "trainer") and dropout != 0:
            verdict = "dropout"
        elif loop == "trainer" and log_steps > 1:
            verdict = "a mean over steps"
        elif loop in ("recipe", "nanogpt", "fsdp2"):
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
