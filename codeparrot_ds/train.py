"""One training run, as one of its ranks sees it.

The recipe's loop on the DeepSpeed engine: gradient accumulation, clipping, warm-up and cosine; evaluation and a
checkpoint every so many optimizer steps and at the end; each checkpoint is exported and queued for the run's branch.

Started by a launcher (``deepspeed --module codeparrot_ds.train small --data …``, ``torchrun -m …``) this module is a
rank. Started otherwise it is ``codeparrot-ds train``, which makes it a rank under srun and mpirun, and else checks
everything and starts the launcher.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from codeparrot_ds.config.arguments import ArgumentParser, add_config_arguments, config_from_arguments
from codeparrot_ds.config.launch_options import add_launch_arguments
from codeparrot_ds.config.run_config import RunConfig
from codeparrot_ds.errors import UserError
from codeparrot_ds.secret_forms import hide_secrets_in_tracebacks
from codeparrot_ds.telemetry.startup import LAUNCHED_AT
from codeparrot_ds.training.loop import train

if TYPE_CHECKING:
    from codeparrot_ds.resolved_run import ResolvedRun


def main(arguments: list[str] | None = None) -> int:
    """Entry of ``python -m codeparrot_ds.train``: a rank under a launcher, ``codeparrot-ds train`` without one."""
    from codeparrot_ds.launch.starters import find_starter, name_rank
    from codeparrot_ds.supervision.forwarded_env import take_carried

    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        brought = take_carried(os.environ)
        # Of the command's own: its launcher may be srun or mpirun. Without it the command finds out, which is next.
        if brought is not None and (starter := find_starter(os.environ)) is not None:
            name_rank(os.environ, starter)
    except UserError as error:
        print(f"codeparrot-ds train: error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    if "RANK" not in os.environ or "LOCAL_RANK" not in os.environ:
        os.execv(sys.executable, [sys.executable, "-m", "codeparrot_ds", "train", *arguments])
    return run_rank(arguments, brought=brought)


def run_rank(
    arguments: list[str],
    work: Callable[[RunConfig | ResolvedRun], Any] = train,
    command: str = "train",
    brought: Mapping[str, Any] | None = None,
) -> int:
    """Runs one rank behind its guard and returns its exit code.

    0 is finished, or stopped and saved; 2 a mistake of the user's; 3 too many bad steps in a row.

    Args:
        arguments: ``--resolved-run FILE`` of the command, or options of ``train`` where a rank was started without it.
        work: what the rank does; it is given the resolved run, or the run config that rank 0 still has to resolve.
        command: what the user typed, for messages.
        brought: the resolved run as JSON that came with this host's environment; ``arguments`` then mean nothing.
    """
    from codeparrot_ds.launch.interface import choose_interface
    from codeparrot_ds.supervision.guard import guard_this_rank
    from codeparrot_ds.supervision.process_end import launcher_of_this_rank, signal_at_parents_end

    hide_secrets_in_tracebacks()
    signal_at_parents_end(signal.SIGTERM, launcher_of_this_rank())()
    choose_interface(os.environ)
    guard_this_rank()  # before torch: the guard stays small
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else torch's profiler reports each of its stages
    if os.environ["RANK"] == "0" and LAUNCHED_AT not in os.environ:  # else the command has said it
        print("rank 0: importing torch and DeepSpeed takes a while", file=sys.stderr, flush=True)
    from codeparrot_ds.engine.ranks import SharedError, leave_ranks
    from codeparrot_ds.resolved_run import ResolvedRun

    try:
        try:
            run = ResolvedRun.from_json(brought) if brought is not None else given_run(arguments)
        except UserError as error:
            # The same on every rank of a host, but a host may lack a variable or a file that a path names.
            raise (UserError if os.environ.get("LOCAL_RANK", "0") == "0" else SharedError)(str(error)) from None
        work(run)
    except UserError as error:
        if is_said_here(error):
            print(f"codeparrot-ds {command}: error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    finally:
        leave_ranks()
    return 0


def is_said_here(error: UserError) -> bool:
    """Whether this rank says what ended it: what all ranks know rank 0 says, what DeepSpeed lacks each host's first."""
    from codeparrot_ds.engine.private_parts import PrivatePartError
    from codeparrot_ds.engine.ranks import SharedError

    if isinstance(error, SharedError):
        return os.environ["RANK"] == "0"
    return not isinstance(error, PrivatePartError) or os.environ.get("LOCAL_RANK", "0") == "0"


def given_run(arguments: list[str]) -> RunConfig | ResolvedRun:
    """The resolved run that the command left in a file, or the run config that a rank's own options say."""
    from codeparrot_ds.resolved_run import ResolvedRun
    from codeparrot_ds.supervision.forwarded_env import RESOLVED_RUN, read_private

    parser = ArgumentParser(prog="codeparrot_ds.train", description="one rank of a training run")
    parser.add_argument(RESOLVED_RUN, type=Path, metavar="FILE", dest="resolved_run", help=argparse.SUPPRESS)
    add_config_arguments(parser)
    add_launch_arguments(parser)  # typed for the command; the ranks have nothing to do with them
    parsed = parser.parse_args(arguments)
    if parsed.resolved_run is not None:
        return ResolvedRun.from_json(read_private(parsed.resolved_run))
    return config_from_arguments(parsed)


if __name__ == "__main__":
    from codeparrot_ds.supervision.process_end import end_process

    end_process(main())
