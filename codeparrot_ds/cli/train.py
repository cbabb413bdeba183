"""``demo``, ``train`` and ``doctor``: runs, and what they need of a machine."""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path
from typing import Any

from codeparrot_ds.cli.common import PROGRAM, add_command, default_of, say
from codeparrot_ds.config import option_types as types
from codeparrot_ds.config.arguments import add_config_arguments, commented_yaml, config_from_arguments
from codeparrot_ds.config.files import read_config_file
from codeparrot_ds.config.launch_options import LaunchOptions, add_launch_arguments, launch_from_arguments
from codeparrot_ds.config.run_config import RunConfig
from codeparrot_ds.launch.starters import refuse_several, train_as_rank
from codeparrot_ds.paths import name_argument, path_argument
from codeparrot_ds.shell import next_steps, pasteable

DRY_RUN = "--dry-run"


def add_demo(commands: Any) -> None:
    parser = add_command(
        commands, "demo", _run_demo, "the whole story on the standard library's source, in minutes, on any machine"
    )
    parser.add_argument(
        "--workdir", type=path_argument, default=Path("demo"), metavar="DIR", help=default_of("folder", "./demo")
    )
    parser.add_argument(
        "--max-train-steps", type=types.count, metavar="N", help="optimizer steps (default: the preset's)"
    )
    parser.add_argument(
        "--num-gpus", "--num-ranks", type=types.count, dest="num_gpus", metavar="N",
        help="ranks (default: one per GPU, or one without)",
    )  # fmt: skip
    parser.add_argument("--deepspeed", metavar="JSON", help="DeepSpeed JSON (default: the preset's)")
    parser.add_argument(
        "--hub", metavar="PLACE", help="of the branch: org/name on the Hub, or a REPO.git (default: DIR/runs/hub.git)"
    )
    parser.add_argument("--overwrite", action="store_true", help="start afresh in a folder that holds a demo")


def _run_demo(arguments: argparse.Namespace) -> int:
    refuse_several("demo")
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


def add_train(commands: Any) -> None:
    parser = add_command(
        commands,
        "train",
        _run_train,
        "checks a run's settings, then trains it with the deepspeed launcher",
        usage=f"{PROGRAM} train [PRESET] [--config FILE] [--deepspeed JSON] [options]",
        epilog="Values: defaults < preset < file < options. Both --max-train-steps and --max_train_steps work.",
    )
    add_config_arguments(parser)
    add_launch_arguments(parser)
    group = parser.add_argument_group("instead of training").add_mutually_exclusive_group()
    group.add_argument(
        DRY_RUN, action="store_true",
        help="check everything and say all that would happen: config, memory, ranks, data, first rows; write nothing",
    )  # fmt: skip
    group.add_argument(
        "--print-config", action="store_true",
        help="print a YAML file to start from, with what preset, file and options set, and what each field means",
    )  # fmt: skip


def _run_train(arguments: argparse.Namespace) -> int:
    launch = launch_from_arguments(arguments)
    if not (arguments.print_config or arguments.dry_run):
        train_as_rank(launch, arguments.arguments)
    config = config_from_arguments(arguments)
    if arguments.print_config:
        print(commented_yaml(config))
        return 0

    from codeparrot_ds.launch.start import front_door

    if arguments.dry_run:
        from codeparrot_ds.ds_config.changes import field_origins
        from codeparrot_ds.launch.dry_run import describe

        origins = field_origins(arguments.preset, arguments.config, vars(arguments))
        dry_run = functools.partial(describe, asked=config, origins=origins)
        front_door(config, launch, say=say, dry_run=dry_run)
        print(next_steps(pasteable("train", *(part for part in arguments.arguments if part != DRY_RUN))))
        return 0
    return front_door(config, launch, typed=arguments.arguments, say=say)


def add_doctor(commands: Any) -> None:
    parser = add_command(
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
    group.add_argument("--master-port", type=types.port, metavar="N", help="port there (default: any free one)")
    group.add_argument(
        "--ssh-port",
        type=types.port,
        metavar="N",
        help="port of the hosts' sshd (default: that of ~/.ssh/config, or 22)",
    )
    group = parser.add_argument_group("the run")
    group.add_argument(
        "--config", type=name_argument, metavar="FILE", help="run config with the four below (default: none)"
    )
    group.add_argument("--data", metavar="DIR", help="corpus that every host must see (default: none)")
    group.add_argument("--tokenizer", metavar="DIR", help="tokenizer that every host must see (default: none)")
    group.add_argument("--output-dir", metavar="DIR", help="folder of runs that hosts share (default: runs)")
    group.add_argument("--deepspeed", metavar="JSON", help="whose operators must be built (default: zero2:auto)")
    group = parser.add_argument_group("fixes")
    group.add_argument("--build", action="store_true", help="build operators that are missing, on all hosts at once")
    group.add_argument("--clear-locks", action="store_true", help="remove the locks of killed builds")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _run_doctor(arguments: argparse.Namespace) -> int:
    from codeparrot_ds.launch.doctor import describe, examine
    from codeparrot_ds.launch.start import wanted_of

    given = {name: getattr(arguments, name) for name in ("data", "tokenizer", "output_dir", "deepspeed")}
    values = read_config_file(arguments.config) if arguments.config else {}
    config = RunConfig(**values | {name: value for name, value in given.items() if value is not None})
    options = ("hostfile", "include", "exclude", "master_addr", "master_port", "ssh_port")
    launch = LaunchOptions(**{name: getattr(arguments, name) for name in options})
    hosts, wanted = wanted_of(config, launch, build=arguments.build, clear_locks=arguments.clear_locks)
    examination = examine(hosts, wanted)
    print(json.dumps(examination.as_json(), indent=2) if arguments.json else describe(examination))
    return 1 if examination.findings else 0
