"""One training run, as one of its ranks sees it.

The recipe's loop on the DeepSpeed engine: gradient accumulation, clipping, warm-up and cosine; evaluation and a
checkpoint every so many optimizer steps and at the end; each checkpoint is exported and queued for the run's branch.

Started by a launcher (``deepspeed --module codeparrot_ds.train small --data …``, ``torchrun -m …``) this module is a
rank. Started bare it is the front door, like ``codeparrot-ds train``: it checks everything, then starts the launcher.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from codeparrot_ds.config.arguments import ArgumentParser, add_config_arguments, config_from_arguments
from codeparrot_ds.config.launch_options import add_launch_arguments
from codeparrot_ds.config.run_config import RunConfig
from codeparrot_ds.errors import UserError
from codeparrot_ds.telemetry.startup import LAUNCHED_AT
from codeparrot_ds.training.loop import train


def main(arguments: list[str] | None = None) -> int:
    """Entry of ``python -m codeparrot_ds.train``: a rank under a launcher, the front door without one."""
    from codeparrot_ds.supervision.forwarded_env import name_rank, take_carried

    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        brought = take_carried(os.environ)
    except UserError as error:
        print(f"codeparrot-ds train: error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    if brought is not None:
        sys.argv[1:] = arguments = brought
    name_rank(os.environ)
    if "RANK" not in os.environ or "LOCAL_RANK" not in os.environ:
        os.execv(sys.executable, [sys.executable, "-m", "codeparrot_ds", "train", *arguments])
    return run_rank(arguments)


def run_rank(arguments: list[str], work: Callable[[RunConfig], Any] = train, command: str = "train") -> int:
    """Runs one rank behind its guard and returns its exit code.

    0 is finished, or stopped and saved; 2 a mistake of the user's; 3 too many bad steps in a row.

    Args:
        arguments: options of ``train``.
        work: what the rank does with its config.
        command: what the user typed, for messages.
    """
    from codeparrot_ds.launch.interface import choose_interface
    from codeparrot_ds.supervision.guard import guard_this_rank
    from codeparrot_ds.supervision.process_end import launcher_of_this_rank, signal_at_parents_end

    signal_at_parents_end(signal.SIGTERM, launcher_of_this_rank())()
    choose_interface(os.environ)
    guard_this_rank()  # before torch: the guard stays small
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else torch's profiler tells each of its stages
    if os.environ["RANK"] == "0" and LAUNCHED_AT not in os.environ:  # no front door has said it
        print("rank 0: importing torch and DeepSpeed takes a while", file=sys.stderr, flush=True)
    from codeparrot_ds.engine.ranks import SharedError, leave_ranks

    parser = ArgumentParser(prog="codeparrot_ds.train", description="one rank of a training run")
    add_config_arguments(parser)
    add_launch_arguments(parser)  # typed for the front door; the ranks have nothing to do with them
    rank = int(os.environ["RANK"])
    try:
        try:
            config = config_from_arguments(parser.parse_args(arguments))
        except UserError as error:
            # The arguments are the same on every rank, but a host may lack a variable that one of their paths names.
            raise (UserError if os.environ.get("LOCAL_RANK", "0") == "0" else SharedError)(str(error)) from None
        work(config)
    except UserError as error:
        if rank == 0 or not isinstance(error, SharedError):
            print(f"codeparrot-ds {command}: error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    finally:
        leave_ranks()
    return 0


if __name__ == "__main__":
    from codeparrot_ds.supervision.process_end import end_process

    end_process(main())
