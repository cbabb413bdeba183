"""One training run, as one of its ranks sees it.

The recipe's loop on the DeepSpeed engine: gradient accumulation, clipping, warm-up and cosine; evaluation and a
checkpoint every so many optimizer steps and at the end; each checkpoint is exported and queued for the run's branch.

Started by a launcher (``deepspeed --module codeparrot_ds.train small --data …``, ``torchrun -m …``) this module is a
rank. Started bare it is the front door, like ``codeparrot-ds train``: it checks everything, then starts the launcher.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from codeparrot_ds.config import (
    ArgumentParser,
    RunConfig,
    add_config_arguments,
    add_launch_arguments,
    config_from_arguments,
)
from codeparrot_ds.errors import UserError
from codeparrot_ds.run.beats import beat
from codeparrot_ds.run.startup import LAUNCHED_AT

if TYPE_CHECKING:
    from codeparrot_ds.run.session import Session


def train(config: RunConfig) -> dict[str, Any]:
    """Trains a run, or continues it, as one rank; every rank of the launcher calls it with the same config.

    Returns:
        ``{"status": "finished" or "stopped", "step": optimizer steps done, "run": the run's folder}``.

    Raises:
        UserError: something that the user can mend, in one sentence; the same on every rank. A DivergedError after
            ``max_bad_steps`` steps in a row whose loss or gradient was not finite.
    """
    # Start-up makes some hundred thousand objects that live as long as the run: nothing for the collector.
    gc.disable()
    from codeparrot_ds.run.session import Session

    session = Session.start(config)
    gc.freeze()
    gc.enable()
    try:
        return train_session(session)
    except UserError:
        session.saver.wait()  # a checkpoint that is being written is worth having all the more
        raise
    finally:
        session.progress.close()  # what is said of the end goes below the bar


def train_session(session: Session) -> dict[str, Any]:
    """The loop of ``train`` and the end of the run."""
    config, engine, progress = session.config, session.engine, session.progress
    beat("agree", step=session.step)
    step = first_step = session.step
    due = False
    batches = iter(session.loader)
    while True:
        # Evaluate and save at the boundary between two steps; a run that was just restored has done both here.
        last = step >= config.max_train_steps
        beat("agree", step=step + (not last))
        stopping = session.stop.agreed()
        fresh = step == 0 or step > first_step
        due = step > first_step and (due or step % config.save_checkpoint_steps == 0)
        evaluating = last or step % (config.eval_steps or config.save_checkpoint_steps) == 0
        if fresh and evaluating:
            session.evaluate(step)
        saving = last or stopping or (due and session.looks_well(step))  # else it waits for the next good step
        if fresh and saving and step > 0:
            session.save(step)
            due = False
        if last or stopping:
            break

        step += 1
        with session.profiled(step):
            losses = accumulate_gradients(engine, batches, session)
        session.bad_steps.check(step)
        if step == first_step + 1:
            session.first_step_done()
        if step % config.log_steps == 0 or step == config.max_train_steps:
            beat("log")
            # The only place where the host waits for the device.
            loss = session.mean_loss(losses.sum())
            row = session.meter.row(step, loss, engine)
            session.tracker.train(row)
            progress.show(row, session.meter.seconds_left(step))

    return session.finish(step, "finished" if last else "stopped")


def accumulate_gradients(engine: Any, batches: Iterator[Any], session: Session) -> Any:
    """One optimizer step: forward and backward over the step's micro-batches; the last one updates.

    Returns:
        The micro-batches' mean losses on this rank, shape (micro-batches,), on the device (nothing is waited for).
    """
    session.bad_steps.begin()
    for number in range(1, session.accumulation_steps + 1):
        beat("data", batch=number)
        batch = next(batches)
        beat("forward", batch=number)
        with session.meter.forward():
            loss = engine(**session.model_inputs(batch)).loss
        beat("backward", batch=number)
        session.bad_steps.watch(batch, loss)
        engine.backward(loss)
        beat("step", batch=number)
        engine.step()  # counts the micro-batches itself: clips, updates and schedules after the last one
    return session.bad_steps.losses()


def main(arguments: list[str] | None = None) -> int:
    """Entry of ``python -m codeparrot_ds.train``: a rank under a launcher, the front door without one."""
    from codeparrot_ds.run.carried import name_rank, take_carried

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
    from codeparrot_ds.run.guard import guard_this_rank
    from codeparrot_ds.run.interface import choose_interface
    from codeparrot_ds.run.parent_end import launcher_of_this_rank, signal_at_parents_end

    signal_at_parents_end(signal.SIGTERM, launcher_of_this_rank())()
    choose_interface(os.environ)
    guard_this_rank()  # before torch: the guard stays small
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else torch's profiler tells each of its stages
    if os.environ["RANK"] == "0" and LAUNCHED_AT not in os.environ:  # no front door has said it
        print("rank 0: importing torch and DeepSpeed takes a while", file=sys.stderr, flush=True)
    from codeparrot_ds.run.ranks import SharedError, leave_ranks

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
    from codeparrot_ds.run.parent_end import end_process

    end_process(main())
