"""The training loop: the recipe's, on the DeepSpeed engine."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from codeparrot_ds.config.run_config import RunConfig
from codeparrot_ds.errors import UserError
from codeparrot_ds.supervision.heartbeat import beat

if TYPE_CHECKING:
    import torch

    from codeparrot_ds.metrics import TrainingRow
    from codeparrot_ds.resolved_run import ResolvedRun
    from codeparrot_ds.training.session import Session


def train(run: RunConfig | ResolvedRun) -> dict[str, Any]:
    """Trains a run, or continues it, as one rank; every rank of the launcher calls it with the same run.

    Args:
        run: resolved, as ``codeparrot-ds train`` hands it over; or a run config, which rank 0 resolves for all.

    Returns:
        ``{"status": "finished" or "stopped", "step": optimizer steps done, "run": the run's folder}``.

    Raises:
        UserError: something that the user can fix, in one sentence; the same on every rank. A DivergedError after
            ``max_bad_steps`` steps in a row whose loss or gradient was not finite.
    """
    # Start-up makes some hundred thousand objects that live as long as the run: nothing for the collector.
    gc.disable()
    from codeparrot_ds.training.setup import start_session

    session = start_session(run)
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
    config = session.config
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
        if last or stopping or due or evaluating:
            session.bad_steps.settle()
        if fresh and evaluating:
            session.evaluate(step)
        saving = last or stopping or (due and session.is_healthy(step))  # else it waits for the next good step
        if fresh and saving and step > 0:
            session.save(step)
            due = False
        if last or stopping:
            break

        step += 1
        train_step(session, batches, step)

    return session.finish(step, "finished" if last else "stopped")


class Observer:
    """Follows the steps of a run; this one only reports each phase to the rank's guard.

    ``compare`` measures its trials through observers of its own, so that what it compares is what trains.
    """

    def enter(self, phase: str, *, batch: int) -> None:
        """A micro-batch of the step, counted from 1, enters ``data``, ``forward``, ``backward`` or ``step``."""
        beat(phase, batch=batch)

    def read(self, batch: torch.Tensor) -> None:
        """The loader gave a micro-batch, which is about to enter its forward pass."""

    def logged(self, row: TrainingRow) -> None:
        """A step has its training row."""


_NOBODY = Observer()


def train_step(session: Session, batches: Iterator[Any], step: int, observer: Observer = _NOBODY) -> None:
    """One optimizer step of a run, checked, and logged where that is due."""
    config, engine = session.config, session.engine
    with session.profiled(step):
        losses = accumulate_gradients(engine, batches, session, observer)
    logging = step % config.log_steps == 0 or step == config.max_train_steps
    session.bad_steps.check(step, wait=logging)
    if step == session.step + 1:
        session.first_step_done()
    if logging:
        beat("log")
        # Here the host waits for the device anyway.
        row = session.meter.row(step, session.mean_loss(losses.sum()), engine)
        session.tracker.train(row)
        session.progress.show(row, session.meter.seconds_left(step))
        observer.logged(row)


def accumulate_gradients(
    engine: Any, batches: Iterator[Any], session: Session, observer: Observer = _NOBODY
) -> torch.Tensor:
    """One optimizer step: forward and backward over the step's micro-batches; the last one updates.

    Returns:
        The micro-batches' mean losses on this rank, shape (micro-batches,), on the device (nothing is waited for).
    """
    session.bad_steps.begin()
    for number in range(1, session.accumulation_steps + 1):
        observer.enter("data", batch=number)
        batch = next(batches)
        observer.read(batch)
        observer.enter("forward", batch=number)
        with session.meter.forward():
            loss = engine(**session.model_inputs(batch)).loss
        observer.enter("backward", batch=number)
        session.bad_steps.watch(batch, loss)
        engine.backward(loss)
        observer.enter("step", batch=number)
        engine.step()  # counts the micro-batches itself: clips, updates and schedules after the last one
    return session.bad_steps.losses()
