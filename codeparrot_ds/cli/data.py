"""``corpus``, ``tokenizer`` and ``data``: what a run is trained on."""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from codeparrot_ds.cli.common import (
    PROGRAM,
    SEED,
    SHARE,
    add_columns,
    add_command,
    data_name,
    default_of,
    say_aside,
)
from codeparrot_ds.config import option_types as types
from codeparrot_ds.config.run_config import FIELDS
from codeparrot_ds.cpu import usable_cores
from codeparrot_ds.layouts import SPLITS, parse_columns
from codeparrot_ds.paths import in_runs, name_argument, path_argument
from codeparrot_ds.shell import next_steps, pasteable
from codeparrot_ds.terminal import progress_line, size_text


def add_corpus(commands: Any) -> None:
    parser = add_command(
        commands, "corpus", _run_corpus, "cleaned, deduplicated shards from source trees, files of rows or data sets"
    )
    parser.add_argument(
        "sources", nargs="+", type=name_argument, metavar="SRC",
        help="folders, git checkouts, row files (.jsonl or .json, plain, .gz or .zst; .parquet; .arrow), data sets of "
        "the datasets library (org/name or org/name:split) and what they save to disk",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=path_argument, required=True, metavar="DIR", help="folder of the corpus (required)"
    )
    group = parser.add_argument_group("reading")
    group.add_argument(
        "--suffixes", nargs="+", default=[".py"], metavar="SUFFIX", help=default_of("files to read", ".py")
    )
    group.add_argument(
        "--content-column", metavar="NAME", help="column of the text, as --columns content=NAME (default: see there)"
    )
    add_columns(group)
    group.add_argument("--num-workers", type=types.count, metavar="N", help="processes (default: one a core)")
    group = parser.add_argument_group("cleaning")
    group.add_argument(
        "--filters", nargs="*", metavar="NAME", help="published filters to apply; none after it: none (default: all)"
    )
    group.add_argument(
        "--tokenizer",
        type=name_argument,
        metavar="DIR",
        help="also drop files under 1.5 characters per token (default: off)",
    )
    group.add_argument(
        "--near-duplicates", action=argparse.BooleanOptionalAction, default=True,
        help="drop files that are nearly equal to one that stays (default: on)",
    )  # fmt: skip
    group.add_argument(
        "--near-duplicate-threshold", type=SHARE, default=0.85, metavar="X",
        help=default_of("Jaccard similarity of two files' sets of tokens that is nearly equal", 0.85)
    )  # fmt: skip
    group.add_argument(
        "--redact", action="store_true",
        help="put placeholders for e-mail addresses, public IP addresses, credentials in URLs and secret keys in "
        "well-known formats, in every column; finds no other personal data (default: off)",
    )  # fmt: skip
    group = parser.add_argument_group("writing")
    group.add_argument(
        "--validation-fraction", type=SHARE, default=0.05, metavar="X", help=default_of("share of bytes held out", 0.05)
    )
    group.add_argument(
        "--compress", choices=("none", "gz", "zst"), default="none", help=default_of("of shards", "none")
    )
    group.add_argument(
        "--shard-bytes", type=types.count, default=128 << 20, metavar="N", help=default_of("bytes per shard", 134217728)
    )
    group.add_argument("--seed", type=SEED, default=1, metavar="N", help=default_of("of split, order and filters", 1))
    group.add_argument("--overwrite", action="store_true", help="replace a corpus that is there")


def _run_corpus(arguments: argparse.Namespace) -> int:
    from codeparrot_ds.corpus.build import build_corpus, describe
    from codeparrot_ds.corpus.filters import FILTER_NAMES
    from codeparrot_ds.data.encoder import find_tokenizer
    from codeparrot_ds.staging import working_folder

    text = f"content={arguments.content_column}" if arguments.content_column else ""
    columns = ",".join(filter(None, (text, arguments.columns)))
    parse_columns(columns)
    try:
        with progress_line() as progress:
            card = build_corpus(
                arguments.sources,
                arguments.out,
                validation_fraction=arguments.validation_fraction,
                compress=arguments.compress,
                shard_bytes=arguments.shard_bytes,
                seed=arguments.seed,
                filters=FILTER_NAMES if arguments.filters is None else arguments.filters,
                tokenizer=None if arguments.tokenizer is None else find_tokenizer(arguments.tokenizer),
                near_duplicates=arguments.near_duplicates,
                near_duplicate_threshold=arguments.near_duplicate_threshold,
                redact=arguments.redact,
                suffixes=arguments.suffixes,
                columns=columns,
                num_workers=arguments.num_workers,
                overwrite=arguments.overwrite,
                progress=progress,
            )
    except KeyboardInterrupt:
        if (folder := working_folder(arguments.out)).is_dir():
            print(f"\nfinished work is kept in {folder}, and the same command continues from there", file=sys.stderr)
        raise
    lines, warnings = describe(card)
    for warning in warnings:
        print(f"{PROGRAM}: warning: {warning}", file=sys.stderr)
    print("\n".join([*lines, f"{card['documents']:,} documents, {size_text(card['bytes'])} in {arguments.out}"]))
    beside = arguments.out.parent / "tokenizer"
    if arguments.tokenizer or (beside / "tokenizer.json").is_file():
        print(_how_to_train(arguments.out, arguments.tokenizer or beside))
    else:
        print(next_steps(pasteable("tokenizer", "--data", arguments.out, "--out", beside)))
    return 0


def add_tokenizer(commands: Any) -> None:
    parser = add_command(commands, "tokenizer", _run_tokenizer, "trains the byte-level BPE tokenizer on a corpus")
    parser.add_argument(
        "--data", type=data_name, required=True, metavar="DIR", help="corpus, shards, mixture or Hub name (required)"
    )
    parser.add_argument(
        "--out", type=path_argument, required=True, metavar="DIR", help="folder of the tokenizer (required)"
    )
    parser.add_argument(
        "--vocab-size", type=types.count, default=32_768, metavar="N", help=default_of("tokens in all", 32768)
    )
    parser.add_argument("--max-documents", type=types.count, metavar="N", help="documents to train on (default: all)")
    parser.add_argument("--max-bytes", type=types.count, metavar="N", help="bytes of text to train on (default: all)")
    parser.add_argument(
        "--seed", type=SEED, default=1, metavar="N", help=default_of("order of shards under a limit", 1)
    )
    add_columns(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace a tokenizer that is there")


def _run_tokenizer(arguments: argparse.Namespace) -> int:
    from codeparrot_ds.corpus.tokenizer import train_tokenizer
    from codeparrot_ds.data.datasets import describe_layouts

    for line in describe_layouts(arguments.data):
        say_aside(line)
    with progress_line() as progress:
        result = train_tokenizer(
            arguments.data,
            arguments.out,
            vocab_size=arguments.vocab_size,
            seed=arguments.seed,
            max_documents=arguments.max_documents,
            max_bytes=arguments.max_bytes,
            columns=arguments.columns,
            overwrite=arguments.overwrite,
            progress=progress,
        )
    print(
        f"{result['vocab_size']:,} tokens from {result['documents']:,} documents, "
        f"{result['chars_per_token']:.2f} characters per token, in {arguments.out}"
    )
    print(_how_to_train(arguments.data, arguments.out))
    return 0


def _how_to_train(data: object, tokenizer: object) -> str:
    train = ("train", "small", "--data", data, "--tokenizer", tokenizer)
    return next_steps(pasteable(*train, "--dry-run"), pasteable(*train))


def add_data(commands: Any) -> None:
    parser = add_command(commands, "data", None, "shows the data as a model sees it")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    action = add_command(
        actions, "inspect", _run_data_inspect, "packed rows as text, in the order of training, with documents' borders"
    )
    action.add_argument(
        "source", type=data_name, metavar="SRC", help="a run, or its data: corpus, shards, mixture, Hub name"
    )
    action.add_argument(
        "--tokenizer",
        type=name_argument,
        metavar="DIR",
        help="folder or Hub name of the tokenizer (default: the run's)",
    )
    action.add_argument("--split", choices=SPLITS, default="train", help=default_of("part", "train"))
    add_columns(action)
    action.add_argument("--rows", type=types.count, default=3, metavar="N", help=default_of("rows to show", 3))
    action.add_argument(
        "--start-row", type=types.index, default=0, metavar="K",
        help=default_of("first row to show; its lanes are read up to it", 0),
    )  # fmt: skip
    action.add_argument("--ids", action="store_true", help="show the token ids as well")
    group = action.add_argument_group("stream")
    for name, text in (
        ("seq_length", "tokens per row"),
        ("num_lanes", "lanes that fix the rows"),
        ("shuffle_buffer", "documents a shuffle window holds"),
        ("seed", "seed of the order"),
    ):
        default = f"{text} (default: the run's, or {FIELDS[name].default})"
        group.add_argument("--" + name.replace("_", "-"), dest=name, type=types.index, metavar="N", help=default)
    action = add_command(
        actions, "contamination", _run_data_contamination, "problems whose solutions occur in a corpus, by name"
    )
    action.add_argument("data", type=data_name, metavar="DATA", help="corpus, shards, mixture, or Hub name")
    action.add_argument(
        "--problems",
        type=name_argument,
        default="humaneval",
        metavar="SRC",
        help=default_of("as for humaneval", "humaneval"),
    )
    action.add_argument("--split", choices=SPLITS, default="train", help=default_of("part", "train"))
    add_columns(action)
    action.add_argument(
        "--ngram-tokens", type=types.count, default=10, metavar="N", help=default_of("of an n-gram", 10)
    )
    action.add_argument(
        "--threshold", type=types.real(minimum=0, maximum=1), default=0.5, metavar="X",
        help=default_of("share of a solution's n-grams in one document from which it is named", 0.5)
    )  # fmt: skip
    action.add_argument("--num-workers", type=types.count, metavar="N", help="processes (default: one a core)")
    action.add_argument("--json", action="store_true", help="print one JSON object, with every problem")


def _run_data_contamination(arguments: argparse.Namespace) -> int:
    from codeparrot_ds.data.datasets import describe_layouts, split_shards
    from codeparrot_ds.evaluation.contamination import as_json, describe, find_contamination
    from codeparrot_ds.evaluation.problems import load_problems

    shards = split_shards(arguments.data, arguments.split, columns=arguments.columns)
    for line in describe_layouts(arguments.data):
        say_aside(line)
    problems = load_problems(arguments.problems, say_aside)
    with progress_line("shards") as progress:
        found = find_contamination(
            problems,
            shards,
            ngram_tokens=arguments.ngram_tokens,
            num_workers=arguments.num_workers or usable_cores(),
            progress=progress,
        )
    settings = {"threshold": arguments.threshold, "ngram_tokens": arguments.ngram_tokens, "data": arguments.data}
    print(json.dumps(as_json(found, **settings), indent=2) if arguments.json else describe(found, **settings))
    return 0


def _run_data_inspect(arguments: argparse.Namespace) -> int:
    from codeparrot_ds.checkpoint.run_folder import order_version_of, recorded_fingerprint, recorded_pins
    from codeparrot_ds.data.datasets import describe_layouts
    from codeparrot_ds.data.inspect import RowPrinter, RowReader, inspection_config
    from codeparrot_ds.terminal import uses_colour

    stream = {name: getattr(arguments, name) for name in ("seq_length", "num_lanes", "shuffle_buffer", "seed")}
    source = in_runs(arguments.source)
    config = inspection_config(source, tokenizer=arguments.tokenizer, columns=arguments.columns or None, **stream)
    run = Path(source)
    began = recorded_fingerprint(run)
    reader = RowReader(config, arguments.split, recorded_pins(run), began, order_version_of(run))
    for line in describe_layouts(config.data, config.validation_data, began=began):
        say_aside(line)
    with progress_line("rows") as progress:
        rows = reader.rows(arguments.start_row, arguments.rows, progress)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a corpus has letters that some encodings lack
    is_terminal = sys.stdout.isatty()
    printer = RowPrinter(
        reader,
        width=min(shutil.get_terminal_size().columns, 120) if is_terminal else 80,
        colour=uses_colour(is_terminal, os.environ),
        ids=arguments.ids,
    )
    for row in rows:
        print(printer.row(row), flush=True)
    print(printer.summary())
    return 0
