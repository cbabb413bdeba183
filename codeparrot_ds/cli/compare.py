"""``compare``: several DeepSpeed configs on the same weights and rows."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from codeparrot_ds.cli.check import device_here
from codeparrot_ds.cli.common import PROGRAM, add_command, default_of, say, say_aside
from codeparrot_ds.config import option_types as types
from codeparrot_ds.config.arguments import add_config_arguments, config_from_arguments
from codeparrot_ds.config.run_config import SET_BY_COMPARE
from codeparrot_ds.errors import UserError
from codeparrot_ds.launch.starters import refuse_several
from codeparrot_ds.paths import name_argument, path_argument
from codeparrot_ds.shell import interrupted_by_sigterm, pasteable


def add_compare(commands: Any) -> None:
    parser = add_command(
        commands,
        "compare",
        _run_compare,
        "trains several DeepSpeed configs on the same weights and rows, and says which serves best",
        usage=f"{PROGRAM} compare DS_JSON[,FIELD=VALUE ...] ... [--preset NAME] [options]",
        epilog="Each config runs in fresh processes through the deepspeed launcher. The same command continues where "
        "an interrupted one stopped. The report is DIR/report.html, .md and .json.",
    )
    parser.add_argument(
        "ds_configs", nargs="*", type=name_argument, metavar="DS_JSON",
        help="files or shipped names; zero2,micro_batch_size=4 changes a field of the run config for this one",
    )  # fmt: skip
    group = parser.add_argument_group("comparison")
    group.add_argument(
        "--world-sizes",
        type=types.counts,
        metavar="N,...",
        help="numbers of ranks (default: all GPUs, or two on a CPU)",
    )
    group.add_argument(
        "--micro-batches",
        type=types.counts,
        metavar="N,...",
        help="rows per rank and forward pass (default: each config's own)",
    )
    group.add_argument(
        "--steps", type=types.count, default=30, metavar="N", help=default_of("optimizer steps a trial", 30)
    )
    group.add_argument(
        "--warmup-steps", type=types.index, default=5, metavar="N", help=default_of("of them, not scored for speed", 5)
    )
    group.add_argument(
        "--repeats", type=types.count, default=2, metavar="N", help=default_of("trials of each config, in turn", 2)
    )
    group.add_argument(
        "--parts-steps", type=types.index, default=3, metavar="N",
        help=default_of("further steps that are taken apart; 0 for none", 3),
    )  # fmt: skip
    group.add_argument(
        "--checkpoint", action=argparse.BooleanOptionalAction, default=True,
        help="also measure a checkpoint of each (default: on)",
    )  # fmt: skip
    group.add_argument(
        "--search", action="store_true",
        help="continue to other stages, micro-batches, buckets, checkpointing and offloading as long as that is faster",
    )  # fmt: skip
    group.add_argument(
        "--minutes", type=types.count, default=60, metavar="N", help=default_of("of trials that a search may take", 60)
    )
    group.add_argument(
        "--hang-limit", type=types.count, default=300, metavar="SECONDS",
        help=default_of("the most that a rank of a trial may stay in one place", 300),
    )  # fmt: skip
    group.add_argument("--retry-failed", action="store_true", help="when continuing, run again what did not finish")
    group.add_argument(
        "--out",
        type=path_argument,
        default=Path("comparison"),
        metavar="DIR",
        help=default_of("folder", "./comparison"),
    )
    add_config_arguments(parser, preset="--preset", without=SET_BY_COMPARE)


def _run_compare(arguments: argparse.Namespace) -> int:
    refuse_several("compare")
    config = config_from_arguments(arguments)
    if not arguments.ds_configs and not arguments.search:
        raise UserError("nothing to compare: name DeepSpeed JSONs, such as zero1 zero2 zero3")
    if arguments.search and len(arguments.world_sizes or ()) > 1:
        raise UserError("--search looks for the best config of one number of ranks: give one with --world-sizes")
    say(f"comparison in {arguments.out}: checking the configs first")

    from codeparrot_ds.compare.candidates import Request, local_world_size, with_nothing_open
    from codeparrot_ds.compare.run import run_comparison
    from codeparrot_ds.ds_config.file import name_in, open_ds_config
    from codeparrot_ds.ds_config.precision import describe_choice, device_precisions, with_precision

    device = device_here()
    precisions = device_precisions(device)
    fastest = precisions[0]
    world_sizes = arguments.world_sizes or (local_world_size(device),)
    asked = "" if arguments.ds_configs else config.ds_config_name
    is_named = bool(arguments.ds_configs)
    config = with_nothing_open(config, named=is_named, world_size=world_sizes[0], device=device, precision=fastest)
    config = with_precision(config, fastest)
    named = [text.partition(",") for text in arguments.ds_configs]
    for name in filter(None, [asked, *(name for name, _, _ in named)]):
        if (said := describe_choice(name, open_ds_config(name, precisions), device=device)) is not None:
            say_aside(said)
    request = Request(
        configs=[name_in(name, fastest) + comma + fields for name, comma, fields in named] or [config.deepspeed],
        config=config,
        world_sizes=world_sizes,
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
                say=say,
            )
    except KeyboardInterrupt:
        say(f"Continue with:\n  {pasteable('compare', *arguments.arguments)}")
        raise
