"""The command line: ``codeparrot-ds COMMAND``. Each command imports its work when it runs, so that help is instant."""

from __future__ import annotations

import argparse
import errno
import io
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from codeparrot_ds import __version__
from codeparrot_ds.config import (
    FIELDS,
    PRESETS,
    SET_BY_COMPARE,
    ArgumentParser,
    HelpFormatter,
    LaunchOptions,
    RunConfig,
    add_config_arguments,
    add_launch_arguments,
    config_from_arguments,
    launch_from_arguments,
    read_config_file,
)
from codeparrot_ds.errors import UserError
from codeparrot_ds.option_types import batches as _batches
from codeparrot_ds.option_types import count as _count
from codeparrot_ds.option_types import counts as _counts
from codeparrot_ds.option_types import index as _index
from codeparrot_ds.option_types import port as _port
from codeparrot_ds.option_types import real as _real
from codeparrot_ds.option_types import whole as _whole
from codeparrot_ds.paths import expand, find_run, in_runs, name_argument, not_a_run, path_argument
from codeparrot_ds.shell import TerminatedError, interrupted_by_sigterm, pasteable
from codeparrot_ds.units import size_text

PROGRAM = "codeparrot-ds"
INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it
TERMINATED = 143  # 128 + SIGTERM
BROKEN_PIPE = 141  # 128 + SIGPIPE
KINDS = ("error", "warning")  # of what a check finds
_seed, _temperature, _share = _whole(), _real(minimum=0), _real(above=0, maximum=1)
RUN_HELP = "folder of the run, or its name in runs"
# What the user can mend when the operating system refuses; anything else is a fault of ours and keeps its traceback.
REFUSALS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EROFS: "the file system is read-only",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code (0 done, 1 found something wrong, 2 a mistake of the user's)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        parser = build_parser()
        if not arguments:
            parser.print_help()
            return 0
        parsed = parser.parse_args(arguments)
        parsed.arguments = arguments[1:]
        code = parsed.run(parsed)
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt as interrupt:
        print(f"{PROGRAM}: interrupted", file=sys.stderr)
        return TERMINATED if isinstance(interrupt, TerminatedError) else INTERRUPTED
    except BrokenPipeError:
        # The reader of a pipe has left (`| head`); the interpreter's own flush at exit must not complain either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        where = f": {error.filename}" if error.filename else ""
        print(f"{PROGRAM}: error: {REFUSALS[error.errno]}{where}", file=sys.stderr)
        try:
            sys.stdout.flush()
        except OSError:  # it was the output: the interpreter's own flush at exit must not complain once more
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return UserError.exit_code


WHERE_TO_START = """\
where to start:
  codeparrot-ds demo                       the whole story in minutes
then with code of yours:
  codeparrot-ds corpus ~/src/project --out corpus
  codeparrot-ds tokenizer --data corpus --out tokenizer
  codeparrot-ds train small --data corpus --tokenizer tokenizer
"""


class _AsWritten(argparse.RawDescriptionHelpFormatter, HelpFormatter):
    """Keeps the lines of a parser's epilog."""


def build_parser() -> ArgumentParser:
    """The parser of all commands."""
    parser = ArgumentParser(
        prog=PROGRAM,
        description="Trains code models from scratch with DeepSpeed.",
        epilog=WHERE_TO_START,
        formatter_class=_AsWritten,
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (
        _add_demo,
        _add_corpus,
        _add_tokenizer,
        _add_data,
        _add_train,
        _add_doctor,
        _add_evaluate,
        _add_complete,
        _add_humaneval,
        _add_check,
        _add_plan,
        _add_compare,
        _add_checkpoint,
        _add_hub,
        _add_report,
    ):
        add(commands)
    return parser


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int] | None, text: str, **kwargs: Any
) -> ArgumentParser:
    parser: ArgumentParser = commands.add_parser(
        name, help=text, description=text[0].upper() + text[1:] + ".", **kwargs
    )
    parser.set_defaults(parser=parser, run=run)
    if run is not None:  # else its actions are
        _take_positionals_anywhere(parser)
    return parser


@contextmanager
def _progress(unit: str = "documents") -> Iterator[Callable[[str, int, int | None], None]]:
    """A callback ``(phase, done, total)``: a bar on a terminal, a line every ten seconds elsewhere."""
    bar: Any = None
    last = time.monotonic()

    def report(phase: str, done: int, total: int | None) -> None:
        nonlocal bar, last
        if sys.stderr.isatty():
            if bar is None or bar.desc != f"{phase}: ":
                from tqdm import tqdm

                if bar is not None:
                    bar.close()
                bar = tqdm(desc=phase, total=total, unit=f" {unit}", unit_scale=True)
            bar.update(done - bar.n)
        elif time.monotonic() - last > 10:
            last = time.monotonic()
            print(f"{phase}: {done:,}" + (f" of {total:,}" if total else "") + f" {unit}", file=sys.stderr)

    try:
        yield report
    finally:
        if bar is not None:
            bar.close()


# --------------------------------------------------------------------------------------------------------------------
# demo


def _add_demo(commands: Any) -> None:
    parser = _command(
        commands, "demo", _run_demo, "the whole story on the standard library's source, in minutes, on any machine"
    )
    parser.add_argument(
        "--workdir", type=path_argument, default=Path("demo"), metavar="DIR", help=_default("folder", "./demo")
    )
    parser.add_argument("--max-train-steps", type=_count, metavar="N", help="optimizer steps (default: the preset's)")
    parser.add_argument(
        "--num-gpus", "--num-ranks", type=_count, dest="num_gpus", metavar="N",
        help="ranks (default: one a GPU, or one without)",
    )  # fmt: skip
    parser.add_argument("--deepspeed", metavar="JSON", help="DeepSpeed JSON (default: the preset's)")
    parser.add_argument(
        "--hub", metavar="PLACE", help="of the branch: org/name on the Hub, or a REPO.git (default: DIR/runs/hub.git)"
    )
    parser.add_argument("--overwrite", action="store_true", help="start afresh in a folder that holds a demo")


def _run_demo(arguments: argparse.Namespace) -> int:
    print(f"demo in {arguments.workdir}: corpus, tokenizer, training, evaluation, branch, completions", flush=True)

    from codeparrot_ds.demo import run_demo

    return run_demo(
        workdir=arguments.workdir,
        max_train_steps=arguments.max_train_steps,
        num_gpus=arguments.num_gpus,
        deepspeed=arguments.deepspeed,
        hub=arguments.hub,
        overwrite=arguments.overwrite,
    )


# --------------------------------------------------------------------------------------------------------------------
# corpus and tokenizer


def _add_corpus(commands: Any) -> None:
    parser = _command(
        commands, "corpus", _run_corpus, "cleaned, deduplicated shards from source trees, files of rows or data sets"
    )
    parser.add_argument(
        "sources", nargs="+", type=name_argument, metavar="SRC",
        help="folders, git checkouts, row files (.jsonl or .json, plain, .gz or .zst; .parquet), and data sets of the "
        "datasets library (org/name or org/name:split)",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=path_argument, required=True, metavar="DIR", help="folder of the corpus (required)"
    )
    group = parser.add_argument_group("reading")
    group.add_argument(
        "--suffixes", nargs="+", default=[".py"], metavar="SUFFIX", help=_default("files to read", ".py")
    )
    group.add_argument(
        "--content-column", default="content", metavar="NAME", help=_default("column of text", "content")
    )
    group.add_argument("--num-workers", type=_count, metavar="N", help="processes (default: one a core)")
    group = parser.add_argument_group("cleaning")
    group.add_argument(
        "--filters", nargs="*", metavar="NAME", help="published filters to apply; none after it: none (default: all)"
    )
    group.add_argument(
        "--tokenizer",
        type=name_argument,
        metavar="DIR",
        help="also drop files under 1.5 characters a token (default: off)",
    )
    group.add_argument(
        "--near-duplicates", action=argparse.BooleanOptionalAction, default=True,
        help="drop files that are nearly equal to one that stays (default: on)",
    )  # fmt: skip
    group.add_argument(
        "--near-duplicate-threshold", type=_share, default=0.85, metavar="X",
        help=_default("Jaccard similarity of two files' sets of tokens that is nearly equal", 0.85)
    )  # fmt: skip
    group.add_argument(
        "--redact", action="store_true",
        help="put placeholders for e-mail addresses, public IP addresses and secret keys in well-known formats; "
        "finds no other personal data (default: off)",
    )  # fmt: skip
    group = parser.add_argument_group("writing")
    group.add_argument(
        "--validation-fraction", type=_share, default=0.05, metavar="X", help=_default("share of bytes held out", 0.05)
    )
    group.add_argument("--compress", choices=("none", "gz", "zst"), default="none", help=_default("of shards", "none"))
    group.add_argument(
        "--shard-bytes", type=_count, default=128 << 20, metavar="N", help=_default("bytes a shard", "134217728")
    )
    group.add_argument("--seed", type=_seed, default=1, metavar="N", help=_default("of split, order and filters", 1))
    group.add_argument("--overwrite", action="store_true", help="replace a corpus that is there")


def _run_corpus(arguments: argparse.Namespace) -> int:
    from codeparrot_ds.data.corpus import build_corpus, describe
    from codeparrot_ds.data.encoder import find_tokenizer
    from codeparrot_ds.data.filters import FILTER_NAMES
    from codeparrot_ds.data.staging import working_folder

    try:
        with _progress() as progress:
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
                content_column=arguments.content_column,
                num_workers=arguments.num_workers,
                overwrite=arguments.overwrite,
                progress=progress,
            )
    except KeyboardInterrupt:
        if (folder := working_folder(arguments.out)).is_dir():
            print(f"\nfinished work is kept in {folder}, and the same command goes on from there", file=sys.stderr)
        raise
    lines, warnings = describe(card)
    for warning in warnings:
        print(f"{PROGRAM}: warning: {warning}", file=sys.stderr)
    print("\n".join([*lines, f"{card['documents']:,} documents, {size_text(card['bytes'])} in {arguments.out}"]))
    return 0


def _add_tokenizer(commands: Any) -> None:
    parser = _command(commands, "tokenizer", _run_tokenizer, "trains the byte-level BPE tokenizer on a corpus")
    parser.add_argument(
        "--data", type=_data, required=True, metavar="DIR", help="corpus, shards, mixture or Hub name (required)"
    )
    parser.add_argument(
        "--out", type=path_argument, required=True, metavar="DIR", help="folder of the tokenizer (required)"
    )
    parser.add_argument("--vocab-size", type=_count, default=32_768, metavar="N", help=_default("tokens in all", 32768))
    parser.add_argument("--max-documents", type=_count, metavar="N", help="documents to train on (default: all)")
    parser.add_argument("--max-bytes", type=_count, metavar="N", help="bytes of text to train on (default: all)")
    parser.add_argument("--seed", type=_seed, default=1, metavar="N", help=_default("order of shards under a limit", 1))
    parser.add_argument("--overwrite", action="store_true", help="replace a tokenizer that is there")


def _run_tokenizer(arguments: argparse.Namespace) -> int:
    from codeparrot_ds.data.tokenizer import train_tokenizer

    with _progress() as progress:
        result = train_tokenizer(
            arguments.data,
            arguments.out,
            vocab_size=arguments.vocab_size,
            seed=arguments.seed,
            max_documents=arguments.max_documents,
            max_bytes=arguments.max_bytes,
            overwrite=arguments.overwrite,
            progress=progress,
        )
    print(
        f"{result['vocab_size']:,} tokens from {result['documents']:,} documents, "
        f"{result['chars_per_token']:.2f} characters a token, in {arguments.out}"
    )
    return 0


# --------------------------------------------------------------------------------------------------------------------
# data


def _add_data(commands: Any) -> None:
    parser = _command(commands, "data", None, "shows the data as a model sees it")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    action = _command(
        actions, "inspect", _run_data_inspect, "packed rows as text, in the order of training, with documents' borders"
    )
    action.add_argument(
        "source", type=_data, metavar="SRC", help="a run, or its data: corpus, shards, mixture, Hub name"
    )
    action.add_argument(
        "--tokenizer",
        type=name_argument,
        metavar="DIR",
        help="folder or Hub name of the tokenizer (default: the run's)",
    )
    action.add_argument("--split", choices=("train", "validation"), default="train", help=_default("part", "train"))
    action.add_argument("--rows", type=_count, default=3, metavar="N", help=_default("rows to show", 3))
    action.add_argument(
        "--start-row", type=_index, default=0, metavar="K",
        help=_default("first row to show; its lanes are read up to it", 0),
    )  # fmt: skip
    action.add_argument("--ids", action="store_true", help="show the token ids as well")
    group = action.add_argument_group("stream")
    for name, text in (
        ("seq_length", "tokens a row"),
        ("num_lanes", "lanes that fix the rows"),
        ("shuffle_buffer", "documents a shuffle window holds"),
        ("seed", "seed of the order"),
    ):
        default = f"{text} (default: the run's, or {FIELDS[name].default})"
        group.add_argument("--" + name.replace("_", "-"), dest=name, type=_index, metavar="N", help=default)
    action = _command(
        actions, "contamination", _run_data_contamination, "problems whose solutions occur in a corpus, by name"
    )
    action.add_argument("data", type=_data, metavar="DATA", help="corpus, shards, mixture, or Hub name")
    action.add_argument(
        "--problems",
        type=name_argument,
        default="humaneval",
        metavar="SRC",
        help=_default("as for humaneval", "humaneval"),
    )
    action.add_argument("--split", choices=("train", "validation"), default="train", help=_default("part", "train"))
    action.add_argument("--ngram-tokens", type=_count, default=10, metavar="N", help=_default("of an n-gram", 10))
    action.add_argument(
        "--threshold", type=_real(minimum=0, maximum=1), default=0.5, metavar="X",
        help=_default("share of a solution's n-grams in one document from which it is named", 0.5)
    )  # fmt: skip
    action.add_argument("--num-workers", type=_count, metavar="N", help="processes (default: one a core)")
    action.add_argument("--json", action="store_true", help="print one JSON object, with every problem")


def _run_data_contamination(arguments: argparse.Namespace) -> int:
    from codeparrot_ds.data.opening import split_shards
    from codeparrot_ds.evaluation.contamination import as_json, describe, find_contamination
    from codeparrot_ds.evaluation.problems import load_problems

    shards = split_shards(arguments.data, arguments.split)
    problems = load_problems(arguments.problems, _say_aside)
    with _progress("shards") as progress:
        found = find_contamination(
            problems,
            shards,
            ngram_tokens=arguments.ngram_tokens,
            num_workers=arguments.num_workers or len(os.sched_getaffinity(0)),
            progress=progress,
        )
    settings = {"threshold": arguments.threshold, "ngram_tokens": arguments.ngram_tokens, "data": arguments.data}
    print(json.dumps(as_json(found, **settings), indent=2) if arguments.json else describe(found, **settings))
    return 0


def _run_data_inspect(arguments: argparse.Namespace) -> int:
    from codeparrot_ds.data.inspect import RowPrinter, RowReader, inspection_config, uses_colour
    from codeparrot_ds.run.folder import recorded_pins

    stream = {name: getattr(arguments, name) for name in ("seq_length", "num_lanes", "shuffle_buffer", "seed")}
    source = in_runs(arguments.source)
    config = inspection_config(source, tokenizer=arguments.tokenizer, **stream)
    reader = RowReader(config, arguments.split, recorded_pins(Path(source)))
    with _progress("rows") as progress:
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


# --------------------------------------------------------------------------------------------------------------------
# train and check


def _add_train(commands: Any) -> None:
    parser = _command(
        commands,
        "train",
        _run_train,
        "checks a run's settings, then trains it with the deepspeed launcher",
        usage=f"{PROGRAM} train [PRESET] [--config FILE] [--deepspeed JSON] [options]",
        epilog="Values: defaults < preset < file < options. Both --max-train-steps and --max_train_steps work.",
    )
    add_config_arguments(parser)
    add_launch_arguments(parser)


def _run_train(arguments: argparse.Namespace) -> int:
    config, launch = config_from_arguments(arguments), launch_from_arguments(arguments)

    from codeparrot_ds.run.launch import front_door

    return front_door(config, launch, typed=arguments.arguments, say=_say)


def _add_doctor(commands: Any) -> None:
    parser = _command(
        commands,
        "doctor",
        _run_doctor,
        "checks this machine, or every host of a hostfile, before a run; exit code 1 when something is wrong",
    )
    group = parser.add_argument_group("hosts")
    group.add_argument(
        "--hostfile", type=name_argument, metavar="FILE", help="lines of `host slots=N` (default: this machine alone)"
    )
    group.add_argument("--include", metavar="HOSTS", help="hosts and GPUs to look at, as in a:0,2@b (default: all)")
    group.add_argument("--exclude", metavar="HOSTS", help="hosts and GPUs to leave out, same form (default: none)")
    group.add_argument(
        "--master-addr", metavar="HOST", help="address of the first host (default: that which ssh reaches it by)"
    )
    group.add_argument("--master-port", type=_port, metavar="N", help="port there (default: any free one)")
    group = parser.add_argument_group("the run")
    group.add_argument(
        "--config", type=name_argument, metavar="FILE", help="run config with the four below (default: none)"
    )
    group.add_argument("--data", metavar="DIR", help="corpus that every host must see (default: none)")
    group.add_argument("--tokenizer", metavar="DIR", help="tokenizer that every host must see (default: none)")
    group.add_argument("--output-dir", metavar="DIR", help="folder of runs that hosts share (default: runs)")
    group.add_argument("--deepspeed", metavar="JSON", help="whose operators must be built (default: zero2:auto)")
    group = parser.add_argument_group("mending")
    group.add_argument("--build", action="store_true", help="build operators that are missing, on all hosts at once")
    group.add_argument("--clear-locks", action="store_true", help="remove the locks of killed builds")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _run_doctor(arguments: argparse.Namespace) -> int:
    from codeparrot_ds.run.doctor import describe, examine
    from codeparrot_ds.run.launch import wanted_of

    given = {name: getattr(arguments, name) for name in ("data", "tokenizer", "output_dir", "deepspeed")}
    values = read_config_file(arguments.config) if arguments.config else {}
    config = RunConfig(**values | {name: value for name, value in given.items() if value is not None})
    options = ("hostfile", "include", "exclude", "master_addr", "master_port")
    launch = LaunchOptions(**{name: getattr(arguments, name) for name in options})
    hosts, wanted = wanted_of(config, launch, build=arguments.build, clear_locks=arguments.clear_locks)
    examination = examine(hosts, wanted)
    print(json.dumps(examination.as_json(), indent=2) if arguments.json else describe(examination))
    return 1 if examination.findings else 0


def _add_check(commands: Any) -> None:
    parser = _command(
        commands,
        "check",
        _run_check,
        "checks DeepSpeed JSONs and the run config together; exit code 1 when something is wrong",
    )
    parser.add_argument(
        "ds_configs", nargs="*", type=name_argument, metavar="DS_JSON",
        help="files or shipped names (default: the run config's own)",
    )  # fmt: skip
    parser.add_argument(
        "--config", type=name_argument, metavar="FILE", help="run config to check against (default: none)"
    )
    parser.add_argument("--preset", metavar="NAME", help=f"run preset to check against: {', '.join(PRESETS)}")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help=_default("what the ranks will have", "auto")
    )
    parser.add_argument(
        "--world-size", type=_count, metavar="N",
        help="ranks that share the batch and the lanes (default: any; for --explain those of a run here)",
    )  # fmt: skip
    parser.add_argument(
        "--explain", action="store_true",
        help="also print the config that a run would hand to DeepSpeed, and where each value came from",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _run_check(arguments: argparse.Namespace) -> int:
    from codeparrot_ds.zero.lint import version_notice

    has_config = arguments.config or arguments.preset
    if not has_config and not arguments.ds_configs:
        raise UserError("nothing to check: name a DeepSpeed JSON, --config FILE or --preset NAME")
    config = config_from_arguments(arguments) if has_config else None
    run = config or RunConfig()
    shape, model = _model_of(run) if config or arguments.explain else (None, None)
    names = arguments.ds_configs or [run.deepspeed]
    of_run = [] if config is None else _check_run_config(config, arguments)
    # Of a run that cannot start nothing is handed to DeepSpeed.
    explain = arguments.explain and all(finding["severity"] != "error" for finding in of_run)
    files = [_check_file(name, arguments, config, shape, explain=explain) for name in names]
    notice = version_notice()
    findings = [*of_run, *(finding for file in files for finding in file["findings"])]
    num = {kind: sum(finding["severity"] == kind for finding in findings) for kind in KINDS}
    if arguments.json:
        report = {"errors": num["error"], "warnings": num["warning"], "notice": notice, "model": model}
        print(json.dumps(report | {"run_config": of_run, "files": files}, indent=2))
    else:
        lines = [line for line in (model, notice) if line]
        lines += [f"{finding['file']}: {finding['severity']}: {finding['message']}" for finding in of_run]
        for file in files:
            lines += file.pop("text")
        print("\n".join(lines))
    return 1 if num["error"] else 0


def _check_run_config(config: RunConfig, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """What of the run config does not go with the ranks or can hardly be meant, in the form of the JSONs' findings."""
    from codeparrot_ds.config_warnings import config_warnings
    from codeparrot_ds.data.stream import check_world_size
    from codeparrot_ds.run.folder import continued_from
    from codeparrot_ds.zero.lint import Finding

    place = arguments.config or f"preset {arguments.preset}"
    findings = [
        Finding(place, warning.field, "warning", warning.sentence)
        for warning in config_warnings(config, continued_from(config))
    ]
    if (ranks := arguments.world_size) is not None:
        checks: dict[str, Callable[[], Any]] = {"num_lanes": lambda: check_world_size(config.num_lanes, ranks)}
        if not config.auto_micro_batch:
            checks["global_batch_size"] = lambda: config.gradient_accumulation_steps(ranks)
        for field, check in checks.items():
            try:
                check()
            except UserError as error:
                findings.append(Finding(place, field, "error", str(error)))
    return [finding.as_json() for finding in findings]


def _check_file(
    name: str, arguments: argparse.Namespace, config: RunConfig | None, shape: Any, *, explain: bool
) -> dict[str, Any]:
    """The findings of one DeepSpeed JSON, and what it resolves to when asked."""
    from codeparrot_ds.model.shapes import num_parameters
    from codeparrot_ds.run.ops import are_built
    from codeparrot_ds.run.precision import device_precisions
    from codeparrot_ds.zero.ds_config import CPU_PRECISIONS, GPU_PRECISIONS, find_ds_config, name_in, open_ds_config
    from codeparrot_ds.zero.lint import Finding, libaio_installed, lint_file

    # Only what is asked about this machine is judged by this machine.
    is_here = arguments.device == "auto"
    other = GPU_PRECISIONS if arguments.device == "cuda" else CPU_PRECISIONS
    precisions = device_precisions(_local_device()) if is_here else other
    path = name
    try:
        path = str(find_ds_config(name_in(name, precisions[0])))
        file = open_ds_config(path, precisions)
        findings = lint_file(
            file,
            config=config,
            device=_local_device() if is_here else arguments.device,
            world_size=arguments.world_size,
            parameters=num_parameters(shape) if shape else None,
            libaio=(libaio_installed() or are_built(["async_io"])) if is_here else None,
        )
    except UserError as error:
        findings = [Finding(path, "", "error", str(error))]
        text = [f"error: {error}"]
    else:
        text = [str(finding) for finding in findings] or [f"{path}: nothing wrong"]
    report: dict[str, Any] = {"file": path, "findings": [finding.as_json() for finding in findings]}
    if explain and not any(finding.severity == "error" for finding in findings):
        try:
            resolved = _resolve_file(file, arguments, config, shape)
        except UserError as error:
            report["findings"].append(Finding(path, "", "error", str(error)).as_json())
            text.append(f"error: {error}")
        else:
            text += resolved.pop("text")
            report |= resolved
    return report if arguments.json else report | {"text": text}


def _resolve_file(file: Any, arguments: argparse.Namespace, config: RunConfig | None, shape: Any) -> dict[str, Any]:
    from codeparrot_ds.run.launch import local_ranks
    from codeparrot_ds.zero.ds_config import resolve
    from codeparrot_ds.zero.resolution import explain, field_origins, sources_as_json

    world_size = arguments.world_size or local_ranks(_local_device())
    run = config or RunConfig()
    nvme_path = Path(run.output_dir) / (run.run_name or "RUN") / "nvme"
    resolved = resolve(
        file,
        run,
        world_size=world_size,
        model_hidden_size=shape.n_embd,
        nvme_path=nvme_path,
        origins=field_origins(arguments.preset, arguments.config, {}),
    )
    lines = [f"resolved for {world_size} rank(s):", *("  " + line for line in explain(resolved))]
    values = {"world_size": world_size, "resolved": resolved.config, "sources": sources_as_json(resolved)}
    return values | {"text": lines}


def _local_device() -> str:
    from codeparrot_ds.run.launch import local_device

    return local_device()


def _model_of(config: RunConfig) -> tuple[Any, str]:
    """The shape of a run's model, and a line about it."""
    from codeparrot_ds.model.shapes import find_shape, flops_per_token, num_parameters

    vocab_size, source = 32_768, "the recipe's vocabulary"
    if config.tokenizer:
        from codeparrot_ds.data.encoder import load_encoder

        vocab_size, source = load_encoder(config.tokenizer).vocab_size, config.tokenizer
    shape = find_shape(config.model, vocab_size=vocab_size, seq_length=config.seq_length)
    return shape, (
        f"model {config.model}: {num_parameters(shape):,} parameters, "
        f"{flops_per_token(shape, config.seq_length) / 1e9:.3f} GFLOP a token (vocabulary {vocab_size:,}: {source})"
    )


# --------------------------------------------------------------------------------------------------------------------
# plan


def _add_plan(commands: Any) -> None:
    parser = _command(
        commands,
        "plan",
        _run_plan,
        "predicts the memory of DeepSpeed configs for a model, before a GPU is touched",
        usage=f"{PROGRAM} plan MODEL [DS_JSON ...] [options]",
        epilog="By formulas, in under a second; --trace runs DeepSpeed's own engine on tensors without memory, "
        "and replaces the formulas from then on (marked *). Several numbers have commas: 1,8,64.",
    )
    parser.add_argument(
        "model", nargs="?", type=name_argument, metavar="MODEL",
        help=f"preset ({', '.join(PRESETS)}), known shape (gpt2, gpt2-xl ...) or a GPT-2 config.json",
    )  # fmt: skip
    parser.add_argument(
        "ds_configs", nargs="*", type=name_argument, metavar="DS_JSON",
        help="files or shipped names (default: all that are shipped)",
    )  # fmt: skip
    group = parser.add_argument_group("run")
    group.add_argument("--world-size", type=_counts, default=(1,), metavar="N,...", help=_default("ranks", 1))
    group.add_argument(
        "--micro-batch-sizes", type=_counts, metavar="N,...", help="rows a rank a forward pass (default: the preset's)"
    )
    group.add_argument(
        "--global-batch-size", type=_count, metavar="N", help="rows a step over all ranks (default: the preset's)"
    )
    group.add_argument("--seq-length", type=_count, metavar="N", help="tokens a row (default: the preset's)")
    group.add_argument("--vocab-size", type=_count, metavar="N", help=_default("tokens of the vocabulary", 32768))
    group.add_argument(
        "--attention", choices=("flash", "math"), default="flash",
        help=_default("kernel: fused, or one that keeps whole scores", "flash"),
    )  # fmt: skip
    group.add_argument("--dropout", type=_real(minimum=0), metavar="X", help="probability (default: the preset's)")
    group.add_argument(
        "--chunked-loss",
        action="store_true",
        default=None,
        help="as the run config's chunked_loss (default: the preset's)",
    )
    group = parser.add_argument_group("device")
    group.add_argument(
        "--device-memory", metavar="SIZE", help="of one device, as 80GB or 80GiB (default: this machine's smallest GPU)"
    )
    group.add_argument(
        "--calibrate", type=name_argument, metavar="RUN",
        help="take what a run needs beside its tensors from this GPU run, and keep it for later plans (default: none)",
    )  # fmt: skip
    group = parser.add_argument_group("output")
    group.add_argument("--trace", action="store_true", help="trace every row that is shown: exact, minutes")
    group.add_argument("--num-workers", type=_count, metavar="N", help="traces at a time (default: one a core)")
    group.add_argument("--json", action="store_true", help="print one JSON object, with every micro-batch")
    group.add_argument(
        "--out", type=path_argument, metavar="PNG", help="draw stacked bars into this file (default: none)"
    )


def _take_positionals_anywhere(parser: ArgumentParser) -> None:
    """Lets a parser find its positional arguments between and behind its options, which argparse does not by itself."""
    plain = parser.parse_known_args

    def parse(args: Any = None, namespace: Any = None) -> Any:
        args = list(args or ())
        for index in reversed(range(len(args) - 1)):
            if args[index] == "--device-memory":  # a size below zero would pass for an option
                args[index : index + 2] = [f"--device-memory={args[index + 1]}"]
        parser.parse_known_args = plain  # type: ignore[method-assign]
        try:
            return parser.parse_known_intermixed_args(args, namespace)
        finally:
            parser.parse_known_args = parse  # type: ignore[method-assign]

    parser.parse_known_args = parse  # type: ignore[method-assign]


def _check_picture(path: Path) -> None:
    """Refuses the path of a picture that could not be written, or would be one under another kind's name."""
    if path.is_dir():
        raise UserError(f"--out {path} is a folder: name a file in it, such as {path / 'plan.png'}")
    if path.suffix.lower() != ".png":
        raise UserError(f"--out {path}: the picture is a PNG, so its name ends in .png")
    if not path.parent.is_dir():
        raise UserError(f"--out {path}: there is no folder {path.parent}")


def _run_plan(arguments: argparse.Namespace) -> int:
    from codeparrot_ds.run import device_memory
    from codeparrot_ds.run.plan import as_json, describe, plan_of

    if arguments.out is not None:
        _check_picture(arguments.out)
    device = device_memory.smallest_gpu() if arguments.device_memory is None else None
    memory = device[1] if device else None
    if arguments.device_memory is not None:
        memory = device_memory.parse_memory(arguments.device_memory)
    if arguments.calibrate is not None:
        overhead, measured = device_memory.calibrate(find_run(arguments.calibrate))
        path = device_memory.save_overhead(overhead, measured)
        said = f"calibrated: beside its tensors a rank takes {overhead}; kept in {path}, remove it to go back"
        print(said, file=sys.stderr if arguments.json else sys.stdout)
    if arguments.model is None:
        if arguments.calibrate is not None:
            return 0
        raise UserError(f"nothing to plan: name a model, such as {PROGRAM} plan large --world-size 8")
    with _progress("traces") as progress:
        plan = plan_of(arguments, memory, device_memory.load_overhead(), lambda done, all_: progress("", done, all_))
    print(json.dumps(as_json(plan), indent=2) if arguments.json else describe(plan))
    if arguments.out is not None:
        from codeparrot_ds.run.plan_chart import draw_plan

        arguments.out.write_bytes(draw_plan(plan))
    return 0


# --------------------------------------------------------------------------------------------------------------------
# compare


def _add_compare(commands: Any) -> None:
    parser = _command(
        commands,
        "compare",
        _run_compare,
        "trains several DeepSpeed configs on the same weights and rows, and says which serves best",
        usage=f"{PROGRAM} compare DS_JSON[,FIELD=VALUE ...] ... [--preset NAME] [options]",
        epilog="Each config runs in fresh processes through the deepspeed launcher. The same command goes on where an "
        "interrupted one stopped. The report is DIR/report.html, .md and .json.",
    )
    parser.add_argument(
        "ds_configs", nargs="*", type=name_argument, metavar="DS_JSON",
        help="files or shipped names; zero2,micro_batch_size=4 changes a field of the run config for this one",
    )  # fmt: skip
    group = parser.add_argument_group("comparison")
    group.add_argument(
        "--world-sizes", type=_counts, metavar="N,...", help="numbers of ranks (default: all GPUs, or two on a CPU)"
    )
    group.add_argument(
        "--micro-batches", type=_counts, metavar="N,...", help="rows a rank a forward pass (default: each config's own)"
    )
    group.add_argument("--steps", type=_count, default=30, metavar="N", help=_default("optimizer steps a trial", 30))
    group.add_argument(
        "--warmup-steps", type=_index, default=5, metavar="N", help=_default("of them, not scored for speed", 5)
    )
    group.add_argument(
        "--repeats", type=_count, default=2, metavar="N", help=_default("trials of each config, in turn", 2)
    )
    group.add_argument(
        "--parts-steps", type=_index, default=3, metavar="N",
        help=_default("further steps that are taken apart; 0 for none", 3),
    )  # fmt: skip
    group.add_argument(
        "--checkpoint", action=argparse.BooleanOptionalAction, default=True,
        help="also measure a checkpoint of each (default: on)",
    )  # fmt: skip
    group.add_argument(
        "--search", action="store_true",
        help="go on to other stages, micro-batches, buckets, checkpointing and offloading as long as that is faster",
    )  # fmt: skip
    group.add_argument(
        "--minutes", type=_count, default=60, metavar="N", help=_default("of trials that a search may take", 60)
    )
    group.add_argument(
        "--hang-limit", type=_count, default=300, metavar="SECONDS",
        help=_default("the most that a rank of a trial may stay in one place", 300),
    )  # fmt: skip
    group.add_argument("--retry-failed", action="store_true", help="when going on, run again what did not finish")
    group.add_argument(
        "--out", type=path_argument, default=Path("comparison"), metavar="DIR", help=_default("folder", "./comparison")
    )
    add_config_arguments(parser, preset="--preset", without=SET_BY_COMPARE)


def _run_compare(arguments: argparse.Namespace) -> int:
    config = config_from_arguments(arguments)
    if not arguments.ds_configs and not arguments.search:
        raise UserError("nothing to compare: name DeepSpeed JSONs, such as zero1 zero2 zero3")
    if arguments.search and len(arguments.world_sizes or ()) > 1:
        raise UserError("--search looks for the best config of one number of ranks: give one with --world-sizes")
    _say(f"comparison in {arguments.out}: checking the configs first")

    from codeparrot_ds.compare import run_comparison
    from codeparrot_ds.run.comparison import Request, local_world_size
    from codeparrot_ds.run.precision import describe_choice, device_precisions, with_precision
    from codeparrot_ds.zero.ds_config import name_in, open_ds_config

    device = _local_device()
    precisions = device_precisions(device)
    fastest = precisions[0]
    asked = config.deepspeed if not arguments.ds_configs else ""
    config = with_precision(config, fastest)
    named = [text.partition(",") for text in arguments.ds_configs]
    for name in filter(None, [asked, *(name for name, _, _ in named)]):
        if (said := describe_choice(name, open_ds_config(name, precisions), device=device)) is not None:
            _say_aside(said)
    request = Request(
        configs=[name_in(name, fastest) + comma + fields for name, comma, fields in named] or [config.deepspeed],
        config=config,
        world_sizes=arguments.world_sizes or (local_world_size(device),),
        micro_batch_sizes=arguments.micro_batches,
        steps=arguments.steps,
        warmup_steps=arguments.warmup_steps,
        repeats=arguments.repeats,
        parts_steps=arguments.parts_steps,
        checkpoint=arguments.checkpoint,
    )
    try:
        with interrupted_by_sigterm():
            return run_comparison(
                request,
                arguments.out,
                hang_seconds=arguments.hang_limit,
                retry_failed=arguments.retry_failed,
                search_minutes=arguments.minutes if arguments.search else None,
                say=_say,
            )
    except KeyboardInterrupt:
        _say(f"Go on with:\n  {pasteable('compare', *arguments.arguments)}")
        raise


def _say(line: str) -> None:
    print(line, flush=True)


# --------------------------------------------------------------------------------------------------------------------
# evaluate and complete


def _add_evaluate(commands: Any) -> None:
    parser = _command(commands, "evaluate", _run_evaluate, "loss, perplexity and bits per byte of a model on a split")
    _add_model(parser)
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data", type=_data, metavar="DIR", help="corpus, shards, mixture or Hub name (default: the run's own)"
    )
    group.add_argument(
        "--split", choices=("validation", "train"), default="validation", help=_default("part of it", "validation")
    )
    group.add_argument(
        "--seq-length", type=_count, metavar="N", help="tokens a row (default: the run's, or the model's)"
    )
    group.add_argument(
        "--num-lanes", type=_count, metavar="N", help="lanes that fix the rows (default: the run's, or 64)"
    )
    group.add_argument("--batch-size", type=_count, metavar="N", help="rows at once (default: the run's, or 8)")
    group.add_argument(
        "--max-eval-steps", type=_batches, metavar="N", help="batches; -1 for all (default: the run's, or -1)"
    )
    parser.add_argument(
        "--num-gpus", "--num-processes", type=_count, dest="num_processes", metavar="N",
        help="processes that share the rows, a GPU each (default: all GPUs, or one process without)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _run_evaluate(arguments: argparse.Namespace) -> int:
    from codeparrot_ds.evaluation.source import data_of, named_model

    source = named_model(arguments.source, device=arguments.device, seq_length=arguments.seq_length)
    data = data_of(source, arguments.split, arguments.data)
    _say_aside(f"importing torch, then reading {arguments.source}")

    from codeparrot_ds.evaluation.perplexity import evaluate_in_processes
    from codeparrot_ds.model.products import multiply_in_fp32_where_needed

    multiply_in_fp32_where_needed()
    result = evaluate_in_processes(
        source,
        num_processes=arguments.num_processes,
        data=data,
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
    return 0


def _add_complete(commands: Any) -> None:
    parser = _command(commands, "complete", _run_complete, "completions of prompts, each cut where its block ends")
    _add_model(parser)
    parser.add_argument(
        "prompts",
        nargs="*",
        default=[],
        metavar="PROMPT",
        help="start of some code; - reads it (default: the recipe's four)",
    )
    parser.add_argument(
        "--file", action="append", default=[], type=path_argument, dest="files", metavar="FILE",
        help="a prompt, or a .jsonl file with one a line; may be repeated (default: none)",
    )  # fmt: skip
    parser.add_argument("--interactive", action="store_true", help="ask for prompts (default: off)")
    parser.add_argument("--json", action="store_true", help="print an object a line, with log-probabilities")
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--max-length", type=_count, default=64, metavar="N", help=_default("tokens of prompt and completion", 64)
    )
    group.add_argument("--num-completions", type=_count, default=4, metavar="N", help=_default("of each prompt", 4))
    group.add_argument(
        "--temperature", type=_temperature, default=0.4, metavar="T", help=_default("0 takes the likeliest token", 0.4)
    )
    group.add_argument("--top-p", type=_share, default=0.95, metavar="X", help=_default("of the probability", 0.95))
    group.add_argument("--seed", type=_seed, default=1, metavar="N", help=_default("of the sampling", 1))
    group.add_argument("--batch-size", type=_count, default=32, metavar="N", help=_default("rows at once", 32))


def _run_complete(arguments: argparse.Namespace) -> int:
    from codeparrot_ds.data.inspect import uses_colour
    from codeparrot_ds.evaluation.prompts import gather_prompts
    from codeparrot_ds.evaluation.source import named_model

    source = named_model(arguments.source, device=arguments.device)
    prompts = gather_prompts(arguments.prompts, arguments.files)
    _say_aside(f"importing torch, then reading {arguments.source}")

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


def _add_humaneval(commands: Any) -> None:
    parser = _command(
        commands, "humaneval", _run_humaneval, "share of programming problems that a model's programs solve (pass@k)"
    )
    _add_model(parser)
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
        help=_default(
            "humaneval, mbpp, a .jsonl or .jsonl.gz file in the schema of either, or org/name[:split]", "humaneval"
        ),
    )  # fmt: skip
    group.add_argument("--limit", type=_count, metavar="N", help="only the first N problems (default: all)")
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--num-samples", type=_count, default=20, metavar="N", help=_default("completions of each problem", 20)
    )
    group.add_argument(
        "--temperatures", type=_temperature, nargs="+", default=(0.2, 0.6, 0.8), metavar="T",
        help=_default("temperatures, of which the best counts; 0 is greedy", "0.2 0.6 0.8"),
    )  # fmt: skip
    group.add_argument("--top-p", type=_share, default=0.95, metavar="X", help=_default("of the probability", 0.95))
    group.add_argument("--max-new-tokens", type=_count, default=256, metavar="N", help=_default("at most", 256))
    group.add_argument("--seed", type=_seed, default=1, metavar="N", help=_default("of the sampling", 1))
    group.add_argument("--batch-size", type=_count, default=32, metavar="N", help=_default("rows at once", 32))
    group.add_argument(
        "--num-gpus", "--num-processes", type=_count, dest="num_processes", metavar="N",
        help="processes that generate, a GPU each (default: all GPUs, or one process without)",
    )  # fmt: skip
    group = parser.add_argument_group("judging")
    group.add_argument("--k", type=_counts, default=(1, 10, 100), metavar="K,K", help=_default("of pass@k", "1,10,100"))
    group.add_argument(
        "--seconds",
        type=_real(above=0),
        default=5.0,
        metavar="X",
        help=_default("a program may take with its tests", 5),
    )
    group.add_argument(
        "--memory-mb", type=_count, default=512, metavar="N", help=_default("a program's process may take", 512)
    )
    group.add_argument("--num-workers", type=_count, metavar="N", help="programs at once (default: cores + 1)")
    group = parser.add_argument_group("results")
    group.add_argument(
        "--out", type=path_argument, metavar="DIR",
        help="folder, where the same command goes on (default: RUN/humaneval/CHECKPOINT-PROBLEMS)",
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
    from codeparrot_ds.evaluation.sandbox import Limits
    from codeparrot_ds.evaluation.source import named_model

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
    with _progress("samples") as progress:
        results = humaneval(
            source,
            folder,
            settings=settings,
            k=arguments.k,
            judge=arguments.allow_execution,
            limits=Limits(seconds=arguments.seconds, memory_bytes=arguments.memory_mb << 20),
            num_workers=arguments.num_workers,
            batch_size=arguments.batch_size,
            device=arguments.device,
            num_processes=arguments.num_processes,
            overwrite=arguments.overwrite,
            progress=progress,
            say=_say_aside,
        )
    if arguments.json and results:
        print(json.dumps(results, indent=2))
        return 0
    print(describe(results) if results else "nothing was run")
    print(f"results in {folder}")
    return 0


def _say_aside(line: str) -> None:
    """A line for the user of a command whose standard output is its result."""
    print(line, file=sys.stderr, flush=True)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        type=name_argument,
        metavar="MODEL",
        help="a run (its path, or its name in runs), a checkpoint, an exported folder, a Hub model's name "
        "(org/name@BRANCH), or REPO.git@BRANCH",
    )
    group = parser.add_argument_group("device")
    group.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
        help=_default("precision; auto: that of the weights", "auto"),
    )  # fmt: skip
    group.add_argument("--device", metavar="NAME", help="torch device (default: the GPU where there is one)")


# --------------------------------------------------------------------------------------------------------------------
# what a run leaves behind


def _add_checkpoint(commands: Any) -> None:
    parser = _command(commands, "checkpoint", None, "looks after a run's checkpoints")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    action = _command(actions, "list", _run_checkpoint_list, "lists a run's checkpoints")
    action.add_argument("run_folder", type=name_argument, metavar="RUN", help=RUN_HELP)
    action.add_argument("--json", action="store_true", help="print one JSON array")
    action = _command(
        actions, "verify", _run_checkpoint_verify, "compares every byte of checkpoints with their manifests"
    )
    action.add_argument("path", type=name_argument, metavar="PATH", help="a run, or one checkpoint of it")
    action = _command(
        actions,
        "export",
        _run_checkpoint_export,
        "writes a checkpoint's model as a Hugging Face folder",
    )
    action.add_argument("path", type=name_argument, metavar="RUN", help="a run, or one checkpoint of it")
    action.add_argument("--step", type=_count, metavar="N", help="optimizer step (default: the newest checkpoint)")
    dtypes = ("float32", "bfloat16", "float16")
    action.add_argument(
        "--dtype", choices=dtypes, default="float32", help=_default("precision of the weights", "float32")
    )
    action.add_argument("--out", type=path_argument, required=True, metavar="DIR", help="folder to make (required)")
    action.add_argument("--overwrite", action="store_true", help="replace an earlier export there")
    _add_checkpoint_import(actions)


def _add_checkpoint_import(actions: Any) -> None:
    action = _command(
        actions,
        "import",
        _run_checkpoint_import,
        "begins a run from a checkpoint that DeepSpeed's engine.save_checkpoint wrote",
        usage=f"{PROGRAM} checkpoint import DEEPSPEED_FOLDER RUN_FOLDER [PRESET] [--config FILE] [options]",
        epilog="Nothing in the checkpoint is run: it is read as tensors and plain values, and refused where it asks "
        "for more. The other options say what the run is, as for `train`, whose config it keeps.",
    )
    action.add_argument(
        "deepspeed_folder", type=path_argument, metavar="DEEPSPEED_FOLDER", help="what engine.save_checkpoint was given"
    )
    action.add_argument("run_folder", type=path_argument, metavar="RUN_FOLDER", help="folder of the run to make")
    action.add_argument("--tag", metavar="TAG", help="which checkpoint, as global_step500 (default: the latest)")
    action.add_argument(
        "--first-row", type=_index, default=0, metavar="K",
        help=_default("row of the run's data to go on with; those before are read once to find it", 0),
    )  # fmt: skip
    add_config_arguments(action)


def _run_checkpoint_import(arguments: argparse.Namespace) -> int:
    for field in ("output_dir", "run_name"):
        if hasattr(arguments, field):
            option = "--" + field.replace("_", "-")
            raise UserError(f"{option} does not go with RUN_FOLDER, which says where the run is and what its name is")
    config = config_from_arguments(arguments)

    from codeparrot_ds.run.import_check import check_import

    check_import(arguments.deepspeed_folder, arguments.run_folder, config, arguments.tag)
    _say(f"importing torch, then reading {arguments.deepspeed_folder}")

    from codeparrot_ds.run.checkpoint_import import describe, import_deepspeed, warnings_of

    with _progress("rows") as progress:
        imported = import_deepspeed(
            arguments.deepspeed_folder,
            arguments.run_folder,
            config,
            tag=arguments.tag,
            first_row=arguments.first_row,
            progress=progress,
        )
    for warning in warnings_of(imported, config):
        print(f"{PROGRAM}: warning: {warning.sentence}", file=sys.stderr)
    print("\n".join(describe(imported, config)))
    return 0


def _run_checkpoint_list(arguments: argparse.Namespace) -> int:
    from codeparrot_ds.run.checkpoint_files import list_checkpoints

    run = find_run(arguments.run_folder)
    rows = list_checkpoints(run)
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return 0
    for row in rows:
        state = "set aside" if row["aside"] else "complete" if row["complete"] else "NOT COMPLETE"
        loss = "" if row["eval_loss"] is None else f"loss {row['eval_loss']:.4f}"
        size = size_text(row["bytes"]) if row["bytes"] else "unknown size"
        print(f"step {row['step']:>8,}  {size:>13}  {row['created']}  {loss:<12}  {state:<12}  {row['path']}")
    if not rows:
        print(f"{run} has no checkpoint yet")
    return 0


def _run_checkpoint_export(arguments: argparse.Namespace) -> int:
    from codeparrot_ds.data.staging import refuse_existing
    from codeparrot_ds.run.checkpoint_files import find_checkpoint, locate_checkpoint

    refuse_existing(arguments.out, marker="config.json", overwrite=arguments.overwrite)
    checkpoint = locate_checkpoint(find_run(arguments.path), arguments.step)
    _say(f"reading {checkpoint}: every byte is verified first")
    find_checkpoint(checkpoint)

    from codeparrot_ds.run.checkpoint_export import export_checkpoint

    export_checkpoint(checkpoint, arguments.out, dtype=arguments.dtype, overwrite=arguments.overwrite)
    print(f"{arguments.out}: the weights of {checkpoint} in {arguments.dtype}")
    return 0


def _run_checkpoint_verify(arguments: argparse.Namespace) -> int:
    from codeparrot_ds.run.checkpoint_files import list_checkpoints, verify_checkpoint

    place = find_run(arguments.path)
    is_run = (place / "run.json").is_file()
    if not is_run and not place.name.startswith(("step-", "aside-step-")) and not (place / "manifest.json").is_file():
        raise not_a_run(place)
    paths = [Path(row["path"]) for row in list_checkpoints(place)] if is_run else [place]
    if not paths:
        raise UserError(f"{place} has no checkpoint yet")
    num_damaged = 0
    for path in paths:
        problems = verify_checkpoint(path)
        num_damaged += bool(problems)
        print("\n".join(problems) or f"{path}: every byte is right")
    return 1 if num_damaged else 0


def _add_hub(commands: Any) -> None:
    parser = _command(commands, "hub", None, "the run's branch of checkpoints and its queue")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    for name, text in (
        ("status", "what is pushed and what waits"),
        ("push", "pushes what waits"),
        ("publish", "pushes what waits and merges the run's branch into main"),
    ):
        action = _command(actions, name, _run_hub, text)
        action.set_defaults(action=name)
        action.add_argument("run_folder", type=name_argument, metavar="RUN", help=RUN_HELP)
        if name == "publish":
            action.add_argument(
                "--checkpoint", choices=("last", "best"), default="last",
                help=_default("which; best is that with the lowest evaluation loss", "last"),
            )  # fmt: skip
            action.add_argument("--tag", metavar="NAME", help="name of the release (default: RUN-step-N)")
            action.add_argument(
                "--overwrite", action="store_true",
                help="also where others committed to main, which its history keeps (default: refuse)",
            )  # fmt: skip


def _run_hub(arguments: argparse.Namespace) -> int:
    from codeparrot_ds.hub.commands import hub_publish, hub_push, hub_status

    run = find_run(arguments.run_folder)
    if arguments.action == "status":
        print(hub_status(run))
    elif arguments.action == "push":
        print(hub_push(run, say=_say_aside))
    else:
        options = {"checkpoint": arguments.checkpoint, "tag": arguments.tag, "overwrite": arguments.overwrite}
        print(hub_publish(run, say=_say_aside, **options))
    return 0


def _add_report(commands: Any) -> None:
    parser = _command(commands, "report", _run_report, "plots and tables of one or more runs")
    parser.add_argument("runs", nargs="+", type=name_argument, metavar="RUN", help=f"{RUN_HELP}; one or more")
    parser.add_argument("--out", type=path_argument, metavar="DIR", help="folder of the report (default: RUN/report)")


def _run_report(arguments: argparse.Namespace) -> int:
    from codeparrot_ds.run.report import write_report

    print(write_report([find_run(run) for run in arguments.runs], arguments.out))
    return 0


def _default(text: str, value: Any) -> str:
    return f"{text} (default: {value})"


def _data(text: str) -> str:
    """The type of an argument that means what the run config's ``data`` means."""
    try:
        return FIELDS["data"].each_path(text, expand)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
