"""``evaluate``, ``complete`` and ``humaneval``: how good a model is."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from typing import Any

from codeparrot_ds.cli.common import (
    SEED,
    SHARE,
    TEMPERATURE,
    add_columns,
    add_command,
    add_model,
    data_name,
    default_of,
    say_aside,
)
from codeparrot_ds.config import option_types as types
from codeparrot_ds.errors import UserError
from codeparrot_ds.paths import name_argument, path_argument
from codeparrot_ds.shell import next_steps, pasteable
from codeparrot_ds.terminal import progress_line


def add_evaluate(commands: Any) -> None:
    parser = add_command(
        commands, "evaluate", _run_evaluate, "loss, perplexity and bits per byte of a model on a split"
    )
    add_model(parser)
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data", type=data_name, metavar="DIR", help="corpus, shards, mixture or Hub name (default: the run's own)"
    )
    group.add_argument(
        "--split",
        choices=("validation", "train", "test"),
        default="validation",
        help=default_of("part of it", "validation"),
    )
    add_columns(group)
    group.add_argument(
        "--seq-length", type=types.count, metavar="N", help="tokens per row (default: the run's, or the model's)"
    )
    group.add_argument(
        "--num-lanes", type=types.count, metavar="N", help="lanes that fix the rows (default: the run's, or 64)"
    )
    group.add_argument("--batch-size", type=types.count, metavar="N", help="rows at once (default: the run's, or 8)")
    group.add_argument(
        "--max-eval-steps", type=types.batches, metavar="N", help="batches; -1 for all (default: the run's, or -1)"
    )
    parser.add_argument(
        "--num-gpus", "--num-processes", type=types.count, dest="num_processes", metavar="N",
        help="processes that share the rows, a GPU each (default: all GPUs, or one process without)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _run_evaluate(arguments: argparse.Namespace) -> int:
    from codeparrot_ds.data.datasets import describe_layouts
    from codeparrot_ds.evaluation.models import data_of, named_model

    source = named_model(arguments.source, device=arguments.device, seq_length=arguments.seq_length)
    data = data_of(source, arguments.split, arguments.data, arguments.columns)
    for line in describe_layouts(data.name, began=data.began):
        say_aside(line)
    say_aside(f"importing torch, then reading {arguments.source}")

    from codeparrot_ds.evaluation.perplexity import evaluate_in_processes
    from codeparrot_ds.model.products import multiply_in_fp32_where_needed

    multiply_in_fp32_where_needed()
    result = evaluate_in_processes(
        source,
        num_processes=arguments.num_processes,
        data=arguments.data,
        columns=arguments.columns,
        split=arguments.split,
        seq_length=arguments.seq_length,
        batch_size=arguments.batch_size,
        max_eval_steps=arguments.max_eval_steps,
        num_lanes=arguments.num_lanes,
        dtype=arguments.dtype,
        device=arguments.device,
    )
    if arguments.json:
        print(json.dumps(result, indent=2))
        return 0
    print(f"{result['model']} ({result['dtype']}) on {result['split']} of {result['data']}")
    print(f"loss            {result['loss']:.6f}")
    print(f"perplexity      {result['perplexity']:,.3f}")
    if result["bits_per_byte"] is not None:
        print(f"bits per byte   {result['bits_per_byte']:.4f}")
    print(f"tokens          {result['eval_tokens']:,} in {result['seconds']:.1f} s")
    print(f"next token      {result['top_1_accuracy']:.2%} right, {result['top_5_accuracy']:.2%} among the first five")
    rows = [(f"{row['first']:,} - {row['last']:,}", row) for row in result["loss_by_position"]]
    sections = [("tokens before it", rows), ("class of token", list((result["loss_by_class"] or {}).items()))]
    for title, rows in sections:
        if rows:
            print(f"\n{title:<17}{'loss':>8}{'right':>9}{'in five':>9}{'tokens':>14}")
        for name, row in rows:
            print(f"{name:<17}{row['loss']:>8.4f}{row['top_1']:>9.2%}{row['top_5']:>9.2%}{row['tokens']:>14,}")
    model = arguments.source
    print(next_steps(pasteable("complete", model, "import os"), pasteable("humaneval", model, "--allow-execution")))
    return 0


def add_complete(commands: Any) -> None:
    parser = add_command(commands, "complete", _run_complete, "completions of prompts, each cut where its block ends")
    add_model(parser)
    parser.add_argument(
        "prompts",
        nargs="*",
        default=[],
        metavar="PROMPT",
        help="start of some code; - reads it (default: the recipe's four)",
    )
    parser.add_argument(
        "--file", action="append", default=[], type=path_argument, dest="files", metavar="FILE",
        help="a prompt, or a file of rows (.jsonl, .parquet) with one per row; may be repeated (default: none)",
    )  # fmt: skip
    parser.add_argument("--interactive", action="store_true", help="ask for prompts (default: off)")
    parser.add_argument("--json", action="store_true", help="print an object a line, with log-probabilities")
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--max-length",
        type=types.count,
        default=64,
        metavar="N",
        help=default_of("tokens of prompt and completion", 64),
    )
    group.add_argument(
        "--num-completions", type=types.count, default=4, metavar="N", help=default_of("of each prompt", 4)
    )
    group.add_argument(
        "--temperature", type=TEMPERATURE, default=0.4, metavar="T", help=default_of("0 takes the likeliest token", 0.4)
    )
    group.add_argument("--top-p", type=SHARE, default=0.95, metavar="X", help=default_of("of the probability", 0.95))
    group.add_argument("--seed", type=SEED, default=1, metavar="N", help=default_of("of the sampling", 1))
    group.add_argument("--batch-size", type=types.count, default=32, metavar="N", help=default_of("rows at once", 32))


def _run_complete(arguments: argparse.Namespace) -> int:
    from codeparrot_ds.evaluation.models import named_model
    from codeparrot_ds.evaluation.prompts import gather_prompts
    from codeparrot_ds.terminal import uses_colour

    source = named_model(arguments.source, device=arguments.device)
    prompts = gather_prompts(arguments.prompts, arguments.files)
    say_aside(f"importing torch, then reading {arguments.source}")

    from codeparrot_ds.evaluation.completions import CompleteSettings, run_complete
    from codeparrot_ds.model.products import multiply_in_fp32_where_needed

    multiply_in_fp32_where_needed()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a model writes letters that some encodings lack
    run_complete(
        source,
        prompts,
        settings=CompleteSettings(
            max_length=arguments.max_length,
            num_completions=arguments.num_completions,
            temperature=arguments.temperature,
            top_p=arguments.top_p,
            seed=arguments.seed,
        ),
        interactive=arguments.interactive,
        as_json=arguments.json,
        batch_size=arguments.batch_size,
        dtype=arguments.dtype,
        device=arguments.device,
        colour=uses_colour(sys.stdout.isatty(), os.environ),
    )
    return 0


def add_humaneval(commands: Any) -> None:
    parser = add_command(
        commands, "humaneval", _run_humaneval, "share of programming problems that a model's programs solve (pass@k)"
    )
    add_model(parser)
    parser.add_argument(
        "--allow-execution", action="store_true",
        help="run the programs that the model writes, in a sandbox; without it nothing is run (default: off)",
    )  # fmt: skip
    parser.add_argument(
        "--generate-only", action="store_true", help="keep the completions and run none of them (default: off)"
    )
    group = parser.add_argument_group("problems")
    group.add_argument(
        "--problems", type=name_argument, default="humaneval", metavar="SRC",
        help=default_of(
            "humaneval, humaneval+, mbpp, mbpp+, a file of rows (.jsonl, .json, .parquet …) in the schema of one, or "
            "org/name[:split]", "humaneval"
        ),
    )  # fmt: skip
    group.add_argument("--limit", type=types.count, metavar="N", help="only the first N problems (default: all)")
    group.add_argument(
        "--accept-failing-references", action="store_true",
        help="judge although some of the problems' own solutions do not pass; the results say so (default: off)",
    )  # fmt: skip
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--num-samples", type=types.count, default=20, metavar="N", help=default_of("completions of each problem", 20)
    )
    group.add_argument(
        "--temperatures", type=TEMPERATURE, nargs="+", default=(0.2, 0.6, 0.8), metavar="T",
        help=default_of("temperatures, of which the best counts; 0 is greedy", "0.2 0.6 0.8"),
    )  # fmt: skip
    group.add_argument("--top-p", type=SHARE, default=0.95, metavar="X", help=default_of("of the probability", 0.95))
    group.add_argument("--max-new-tokens", type=types.count, default=256, metavar="N", help=default_of("at most", 256))
    group.add_argument("--seed", type=SEED, default=1, metavar="N", help=default_of("of the sampling", 1))
    group.add_argument("--batch-size", type=types.count, default=32, metavar="N", help=default_of("rows at once", 32))
    group.add_argument(
        "--num-gpus", "--num-processes", type=types.count, dest="num_processes", metavar="N",
        help="processes that generate, a GPU each (default: all GPUs, or one process without)",
    )  # fmt: skip
    group = parser.add_argument_group("judging")
    group.add_argument(
        "--k", type=types.counts, default=(1, 10, 100), metavar="K,K", help=default_of("of pass@k", "1,10,100")
    )
    group.add_argument(
        "--seconds",
        type=types.real(above=0),
        default=5.0,
        metavar="X",
        help=default_of("a program may take with its tests", 5),
    )
    group.add_argument(
        "--memory-mb", type=types.count, default=512, metavar="N", help=default_of("a program's process may take", 512)
    )
    group.add_argument(
        "--imports", choices=("standard", "numpy"), default="standard",
        help=default_of("what programs may import: Python's standard library, or numpy as well", "standard"),
    )  # fmt: skip
    group.add_argument("--num-workers", type=types.count, metavar="N", help="programs at once (default: cores + 1)")
    group = parser.add_argument_group("results")
    group.add_argument(
        "--out", type=path_argument, metavar="DIR",
        help="folder, where the same command continues (default: RUN/humaneval/CHECKPOINT-PROBLEMS)",
    )  # fmt: skip
    group.add_argument("--overwrite", action="store_true", help="begin again in a folder that holds completions")
    group.add_argument("--json", action="store_true", help="print one JSON object")


def _run_humaneval(arguments: argparse.Namespace) -> int:
    if arguments.allow_execution == arguments.generate_only:
        raise UserError(
            "humaneval runs programs that a model wrote, in a sandbox; allow that with --allow-execution, or only keep "
            "the completions with --generate-only"
        )
    from codeparrot_ds.evaluation.humaneval import Settings, default_folder, describe, humaneval
    from codeparrot_ds.evaluation.models import named_model
    from codeparrot_ds.sandbox.judge import Limits

    source = named_model(arguments.source, device=arguments.device)
    settings = Settings(
        problems=arguments.problems,
        limit=arguments.limit,
        num_samples=arguments.num_samples,
        temperatures=tuple(arguments.temperatures),
        top_p=arguments.top_p,
        max_new_tokens=arguments.max_new_tokens,
        seed=arguments.seed,
        dtype=arguments.dtype,
    )
    folder = arguments.out or default_folder(source, arguments.problems)
    with progress_line("samples") as progress:
        results = humaneval(
            source,
            folder,
            settings=settings,
            k=arguments.k,
            judge=arguments.allow_execution,
            limits=Limits(
                seconds=arguments.seconds,
                memory_bytes=arguments.memory_mb << 20,
                numpy=arguments.imports == "numpy",
            ),
            num_workers=arguments.num_workers,
            batch_size=arguments.batch_size,
            device=arguments.device,
            num_processes=arguments.num_processes,
            overwrite=arguments.overwrite,
            accept_failing_references=arguments.accept_failing_references,
            progress=progress,
            say=say_aside,
        )
    if arguments.json and results:
        print(json.dumps(results, indent=2))
        return 0
    print(describe(results) if results else "nothing was run")
    print(f"results in {folder}")
    if arguments.generate_only:
        judge = ("--allow-execution" if part == "--generate-only" else part for part in arguments.arguments)
        print(next_steps(pasteable("humaneval", *judge)))
    return 0
