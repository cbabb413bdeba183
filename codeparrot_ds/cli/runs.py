"""``runs``, ``checkpoint``, ``hub`` and ``report``: what a run leaves behind."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from codeparrot_ds.cli.common import PROGRAM, RUN_HELP, add_command, default_of, say, say_aside
from codeparrot_ds.config import option_types as types
from codeparrot_ds.config.arguments import add_config_arguments, config_from_arguments
from codeparrot_ds.errors import UserError
from codeparrot_ds.paths import RUNS, find_run, name_argument, not_a_run, path_argument
from codeparrot_ds.shell import next_steps, pasteable
from codeparrot_ds.terminal import progress_line, size_text


def add_runs(commands: Any) -> None:
    parser = add_command(
        commands, "runs", _run_runs, "lists runs: step, loss, status, when, how to resume; or shows one as it trains"
    )
    parser.add_argument(
        "place", nargs="?", type=name_argument, metavar="PLACE",
        help=default_of("folder of runs, or one run, by its folder or its name in runs", RUNS),
    )  # fmt: skip
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--follow", action="store_true",
        help="show the run's metrics as they come (the newest run's of a folder); Ctrl-C ends the view, not the run",
    )  # fmt: skip
    group.add_argument("--json", action="store_true", help="print one JSON array")


def _run_runs(arguments: argparse.Namespace) -> int:
    from codeparrot_ds.report.run_list import nothing_in, runs_in, state_of, table
    from codeparrot_ds.report.run_view import follow, show

    place = Path(RUNS) if arguments.place is None else find_run(arguments.place, what="run or folder of runs")
    is_run = (place / "run.json").is_file()
    runs = [state_of(place)] if is_run else runs_in(place)
    if arguments.json:
        print(json.dumps([run.as_json() for run in runs], indent=2))
    elif not runs:
        print(nothing_in(place))
    elif arguments.follow:
        follow(runs[0].path)
    else:
        print(show(place) if is_run else table(runs))
    return 0


def add_checkpoint(commands: Any) -> None:
    parser = add_command(commands, "checkpoint", None, "looks after a run's checkpoints")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    action = add_command(actions, "list", _run_checkpoint_list, "lists a run's checkpoints")
    action.add_argument("run_folder", type=name_argument, metavar="RUN", help=RUN_HELP)
    action.add_argument("--json", action="store_true", help="print one JSON array")
    action = add_command(
        actions, "verify", _run_checkpoint_verify, "compares every byte of checkpoints with their manifests"
    )
    action.add_argument("path", type=name_argument, metavar="PATH", help="a run, or one checkpoint of it")
    action = add_command(
        actions,
        "export",
        _run_checkpoint_export,
        "writes a checkpoint's model as a Hugging Face folder",
    )
    action.add_argument("path", type=name_argument, metavar="RUN", help="a run, or one checkpoint of it")
    action.add_argument("--step", type=types.count, metavar="N", help="optimizer step (default: the newest checkpoint)")
    dtypes = ("float32", "bfloat16", "float16")
    action.add_argument(
        "--dtype", choices=dtypes, default="float32", help=default_of("precision of the weights", "float32")
    )
    action.add_argument("--out", type=path_argument, required=True, metavar="DIR", help="folder to make (required)")
    action.add_argument("--overwrite", action="store_true", help="replace an earlier export there")
    _add_checkpoint_import(actions)


def _add_checkpoint_import(actions: Any) -> None:
    action = add_command(
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
        "--first-row", type=types.index, default=0, metavar="K",
        help=default_of("row of the run's data to resume at; those before are read once to find it", 0),
    )  # fmt: skip
    add_config_arguments(action)


def _run_checkpoint_import(arguments: argparse.Namespace) -> int:
    for field in ("output_dir", "run_name"):
        if hasattr(arguments, field):
            option = "--" + field.replace("_", "-")
            raise UserError(f"{option} does not go with RUN_FOLDER, which says where the run is and what its name is")
    config = config_from_arguments(arguments)

    from codeparrot_ds.checkpoint.import_check import check_import
    from codeparrot_ds.data.datasets import describe_layouts

    check_import(arguments.deepspeed_folder, arguments.run_folder, config, arguments.tag)
    for line in describe_layouts(config.data, config.validation_data):
        say_aside(line)
    say(f"importing torch, then reading {arguments.deepspeed_folder}")

    from codeparrot_ds.checkpoint.import_run import describe, import_deepspeed, warnings_of

    with progress_line("rows") as progress:
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
    from codeparrot_ds.checkpoint.folders import list_checkpoints

    run = find_run(arguments.run_folder)
    rows = list_checkpoints(run)
    if arguments.json:
        print(json.dumps([dataclasses.asdict(row) for row in rows], indent=2))
        return 0
    for row in rows:
        state = "set aside" if row.aside else "complete" if row.complete else "NOT COMPLETE"
        loss = "" if row.eval_loss is None else f"loss {row.eval_loss:.4f}"
        size = size_text(row.bytes) if row.bytes else "unknown size"
        print(f"step {row.step:>8,}  {size:>13}  {row.created}  {loss:<12}  {state:<12}  {row.path}")
    if not rows:
        print(f"{run} has no checkpoint yet")
    return 0


def _run_checkpoint_export(arguments: argparse.Namespace) -> int:
    from codeparrot_ds.checkpoint.folders import find_checkpoint
    from codeparrot_ds.staging import refuse_existing

    refuse_existing(arguments.out, marker="config.json", overwrite=arguments.overwrite)
    checkpoint = find_checkpoint(find_run(arguments.path), arguments.step)
    say(f"reading {checkpoint}: every byte is verified first")
    if damage := checkpoint.damage():
        raise UserError(damage[0])

    from codeparrot_ds.checkpoint.export import export_checkpoint

    export_checkpoint(checkpoint, arguments.out, dtype=arguments.dtype, overwrite=arguments.overwrite)
    print(f"{arguments.out}: the weights of {checkpoint} in {arguments.dtype}")
    print(next_steps(pasteable("complete", arguments.out, "import os")))
    return 0


def _run_checkpoint_verify(arguments: argparse.Namespace) -> int:
    from codeparrot_ds.checkpoint.folders import Checkpoint, list_checkpoints

    place = find_run(arguments.path)
    is_run = (place / "run.json").is_file()
    if not is_run and not place.name.startswith(("step-", "aside-step-")) and not (place / "manifest.json").is_file():
        raise not_a_run(place)
    paths = [Path(row.path) for row in list_checkpoints(place)] if is_run else [place]
    if not paths:
        raise UserError(f"{place} has no checkpoint yet")
    num_damaged = 0
    for path in paths:
        problems = Checkpoint(path).damage()
        num_damaged += bool(problems)
        print("\n".join(problems) or f"{path}: every byte is right")
    return 1 if num_damaged else 0


def add_hub(commands: Any) -> None:
    parser = add_command(commands, "hub", None, "the run's branch of checkpoints and its queue")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    for name, text in (
        ("status", "what is pushed and what waits"),
        ("push", "pushes what waits"),
        ("publish", "pushes what waits and merges the run's branch into main"),
    ):
        action = add_command(actions, name, _run_hub, text)
        action.set_defaults(action=name)
        action.add_argument("run_folder", type=name_argument, metavar="RUN", help=RUN_HELP)
        if name == "publish":
            action.add_argument(
                "--checkpoint", choices=("last", "best"), default="last",
                help=default_of("which; best is that with the lowest evaluation loss", "last"),
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
        print(hub_push(run, say=say_aside))
    else:
        options = {"checkpoint": arguments.checkpoint, "tag": arguments.tag, "overwrite": arguments.overwrite}
        print(hub_publish(run, say=say_aside, **options))
    return 0


def add_report(commands: Any) -> None:
    parser = add_command(commands, "report", _run_report, "plots and tables of one or more runs")
    parser.add_argument("runs", nargs="+", type=name_argument, metavar="RUN", help=f"{RUN_HELP}; one or more")
    parser.add_argument("--out", type=path_argument, metavar="DIR", help="folder of the report (default: RUN/report)")


def _run_report(arguments: argparse.Namespace) -> int:
    from codeparrot_ds.report.run_report import write_report

    print(write_report([find_run(run) for run in arguments.runs], arguments.out))
    return 0
