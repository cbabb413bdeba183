"""Steps whose loss or gradient is NaN or infinite: skipped by every engine, reported with their rows, few in a row.

DeepSpeed leaves a step out when the norm of its gradient, which all ranks share, is not finite; ``engine/`` fixes where
it does not. A loss can be infinite while its gradient is finite, so :meth:`BadSteps.watch` makes the gradient of such a
loss NaN: then one check, which costs nothing more, is for both. Nothing here waits for the device or for another rank
until a step has been left out. Of a lean step (``engine/lean_step.py``) that is known, and reported, with the next one.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from codeparrot_ds.config.run_config import RunConfig
from codeparrot_ds.data.loader import TrainingLoader
from codeparrot_ds.data.stream import StreamConfig, describe_place
from codeparrot_ds.engine.compiled import compiles_whole
from codeparrot_ds.engine.engine import loss_scale, lowest_loss_scale, step_outcomes
from codeparrot_ds.engine.ranks import Ranks, SharedError
from codeparrot_ds.telemetry.tracking import Progress

logger = logging.getLogger("codeparrot_ds.bad_steps")
NAMED_MICRO_BATCHES = 3
"""So many a bad step are named in its line; all of them are in the ranks' logs."""
QUOTED_CHARACTERS = 80


class DivergedError(SharedError):
    """Too many bad steps in a row: neither the user's mistake nor worth another start as it is."""

    exit_code = 3


class Finding(NamedTuple):
    """A micro-batch whose own loss or gradient is not finite."""

    rank: int
    number: int
    """Of the rank's micro-batches of the step."""
    what: str
    """``loss`` or ``gradient``."""
    value: float
    """The loss, or the norm of the gradient at the embedding's output."""
    rows: Sequence[int]
    """Of the run's stream, from 0."""
    lanes: Sequence[int]
    places: Sequence[str]
    """Where the rows are in the shards, each place once."""


@dataclasses.dataclass
class _Watched:
    """What is kept of a step on this rank until it is known to have been made."""

    places: list[Any]
    """Of the loader's lanes: before the first micro-batch, and after each."""
    loss_scale: float
    scale_can_fall: bool
    batches: list[torch.Tensor] = dataclasses.field(default_factory=list)
    losses: list[torch.Tensor] = dataclasses.field(default_factory=list)
    gradient_norms: list[torch.Tensor] = dataclasses.field(default_factory=list)
    step: int = 0


@dataclasses.dataclass(kw_only=True)
class BadSteps:
    """Watches the micro-batches of each step on one rank, and gives account of the steps that were left out.

    Attributes:
        engine: the DeepSpeed engine, from ``create_engine``.
        ranks: this process among the others.
        stream: where the rows come from.
        loader: the training loader, for the places of its lanes.
        global_batch_size: rows per step over all ranks.
        start_step: optimizer steps of the run before this start.
        start_row: rows of the stream before this start.
        limit: so many bad steps in a row end the run.
        say: tells the user a line, on rank 0.
        give_up: records on rank 0 that the run ends after a step, and finds its newest checkpoint that is whole.
        watch_gradients: whether to keep the norm of each micro-batch's own gradient at the embedding's output, by which
            a gradient that is not finite where the loss is can be traced to its rows.
        in_a_row: bad steps since the last good one.
    """

    engine: Any
    ranks: Ranks
    stream: StreamConfig
    loader: TrainingLoader
    global_batch_size: int
    start_step: int
    start_row: int
    limit: int
    say: Callable[..., None]
    give_up: Callable[[int], Path | None] = lambda step: None
    watch_gradients: bool = True
    in_a_row: int = 0

    def __post_init__(self) -> None:
        self._open: list[_Watched] = []
        self.begin()
        if self.watch_gradients:
            self.engine.module.get_input_embeddings().register_forward_hook(self._watch_embedding)

    def begin(self) -> None:
        """Turns to the next step; call it before the first micro-batch of each."""
        scale, lowest = loss_scale(self.engine), lowest_loss_scale(self.engine)
        self._now = _Watched([self.loader.places()], scale, lowest is not None and scale > lowest)

    def watch(self, batch: torch.Tensor, loss: torch.Tensor) -> None:
        """Remembers a micro-batch and its loss, between its forward and its backward pass.

        Where the loss is not finite the backward pass gets NaN: 0 x loss is added to the number that it begins with,
        one operation on the device.
        """
        value = loss.detach()
        loss.register_hook(lambda gradient: torch.add(gradient, value, alpha=0))
        self._now.batches.append(batch)
        self._now.losses.append(value)
        self._now.places.append(self.loader.places())

    def losses(self) -> torch.Tensor:
        """The mean loss of each micro-batch of the step on this rank, on the device, shape (micro-batches,)."""
        return _mean_losses(self._now)

    def _watch_embedding(self, module: Any, inputs: Any, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(self._keep_norm)

    def _keep_norm(self, gradient: torch.Tensor) -> None:
        self._now.gradient_norms.append(torch.linalg.vector_norm(gradient, dtype=torch.float32))

    def check(self, step: int, *, wait: bool = False) -> None:
        """Reports the steps that DeepSpeed has left out and that are known by now; collective only then, for all ranks
        know of them.

        Args:
            step: that was just made.
            wait: for the device, where it is not yet known whether that one was left out.

        Raises:
            DivergedError: it was the last of too many in a row; on every rank.
        """
        self._now.step = step
        self._open.append(self._now)
        self._judge(wait)

    def settle(self) -> None:
        """Waits until it is known whether the last step was left out: before anything is made of what was trained.

        Raises as `check`.
        """
        self._judge(wait=True)

    def _judge(self, wait: bool) -> None:
        for made in step_outcomes(self.engine, len(self._open), wait=wait):
            watched = self._open.pop(0)
            if made:
                self.in_a_row = 0
            else:
                self._report(watched)

    def _report(self, watched: _Watched) -> None:
        by_rank = self.ranks.gather((list(self._findings(watched)), _mean_losses(watched).tolist()))
        findings = [finding for found, _ in by_rank for finding in found]
        losses = [loss for _, some in by_rank for loss in some]
        step = watched.step
        if watched.scale_can_fall and all(map(math.isfinite, losses)):
            # How dynamic loss scaling finds its scale: the gradient as such may well be finite.
            logger.debug("step %d skipped: its gradient overflowed at the loss scale %g", step, watched.loss_scale)
            return
        self.in_a_row += 1
        reason = self._reason(step, findings, losses)
        line = f"step {step} skipped: {reason}"
        if self.in_a_row > 1:
            line += f" ({self.in_a_row} in a row; the run stops at {self.limit})"
        if self.ranks.is_main:
            self.say("%s", line)
        else:
            logger.warning("%s", line)
        self._quote([finding for finding in findings if finding.rank == self.ranks.rank], watched)
        if self.in_a_row >= self.limit:
            raise DivergedError(self._last_words(step, reason))

    def _findings(self, watched: _Watched) -> Iterator[Finding]:
        """This rank's micro-batches whose loss, or else whose gradient, is not finite; waits for the device."""
        losses, norms = _mean_losses(watched).tolist(), []
        if len(watched.gradient_norms) == len(losses):
            norms = torch.stack(watched.gradient_norms).tolist()
        for number, loss in enumerate(losses):
            what, value = "loss", loss
            if math.isfinite(loss) and norms:
                what, value = "gradient", norms[number]
            if not math.isfinite(value):
                rows = self._rows(watched, number)
                lanes = [row % self.stream.num_lanes for row in rows]
                places = [self._place(watched, lane, number) for lane in dict.fromkeys(lanes)]
                yield Finding(self.ranks.rank, number, what, value, rows, lanes, list(dict.fromkeys(places)))

    def _first_row(self, step: int) -> int:
        return self.start_row + (step - 1 - self.start_step) * self.global_batch_size

    def _rows(self, watched: _Watched, number: int) -> list[int]:
        """The rows of this rank's micro-batch ``number`` of a step: every world_size-th of the step's."""
        size, world_size = len(watched.batches[number]), self.ranks.world_size
        first = self._first_row(watched.step) + self.ranks.rank + world_size * number * size
        return list(range(first, first + world_size * size, world_size))

    def _place(self, watched: _Watched, lane: int, number: int) -> str:
        turn, places = self.loader.lanes.index(lane), watched.places
        return describe_place(self.stream, lane, places[number][turn], places[number + 1][turn])

    def _reason(self, step: int, findings: Sequence[Finding], losses: Sequence[float]) -> str:
        """What is known of why a step is bad, from all ranks' findings and losses."""
        first = self._first_row(step)
        every_row = f"rows {first} to {first + self.global_batch_size - 1}"
        if not findings:
            return f"the gradient of {every_row} is not finite; all losses are, the largest is {max(losses):.4g}"
        if len(findings) == len(losses) > 1:
            kinds = {(finding.what, f"{finding.value:g}") for finding in findings}
            what, value = kinds.pop() if len(kinds) == 1 else ("loss or gradient", "not finite")
            return f"the {what} of all its micro-batches, {every_row}, is {value}"
        parts = [_describe(finding) for finding in findings[:NAMED_MICRO_BATCHES]]
        if len(findings) > len(parts):
            parts.append(f"{len(findings) - len(parts)} more micro-batches of {len(losses)} are named in the log")
        return "; ".join(parts)

    def _quote(self, findings: Sequence[Finding], watched: _Watched) -> None:
        """Writes how the rows of this rank's findings begin to its log."""
        dtype = self.stream.encoder.dtype
        for finding in findings:
            logger.debug("step %d: %s", watched.step, _describe(finding))
            ids = watched.batches[finding.number].numpy().view(dtype)
            for row, lane, tokens in zip(finding.rows, finding.lanes, ids, strict=True):
                text = self.stream.encoder.decode(tokens[:QUOTED_CHARACTERS])[:QUOTED_CHARACTERS]
                logger.debug("row %d (lane %d) begins %r", row, lane, text)

    def _last_words(self, step: int, reason: str) -> str:
        checkpoint = self.ranks.on_main(lambda: self.give_up(step))
        last = "there is no checkpoint" if checkpoint is None else f"the last good checkpoint is {checkpoint}"
        return f"{self.in_a_row} steps in a row were skipped, the last was step {step}: {reason}; {last}"


def _mean_losses(watched: _Watched) -> torch.Tensor:
    return torch.stack(watched.losses).float()


def _describe(finding: Finding) -> str:
    where = [f"rank {finding.rank}", _numbers("lane", finding.lanes), *finding.places[:2]]
    if len(finding.places) > 2:
        where.append(f"{len(finding.places) - 2} more places")
    return f"the {finding.what} of {_numbers('row', finding.rows)} ({', '.join(where)}) is {finding.value:g}"


def _numbers(noun: str, numbers: Sequence[int]) -> str:
    """``row 97``, ``rows 97 and 99``, ``rows 97, 99 … 119``."""
    if len(numbers) == 1:
        return f"{noun} {numbers[0]}"
    if len(numbers) == 2:
        return f"{noun}s {numbers[0]} and {numbers[1]}"
    return f"{noun}s {numbers[0]}, {numbers[1]} {'… ' if len(numbers) > 3 else 'and '}{numbers[-1]}"


def watch_steps(
    config: RunConfig,
    ranks: Ranks,
    engine: Any,
    stream: StreamConfig,
    loader: TrainingLoader,
    start_row: int,
    start_step: int,
    progress: Progress,
) -> BadSteps:
    """What watches the steps of a run from one that begins at a row and a step."""
    return BadSteps(
        engine=engine,
        ranks=ranks,
        stream=stream,
        loader=loader,
        global_batch_size=config.global_batch_size,
        start_step=start_step,
        start_row=start_row,
        limit=config.max_bad_steps,
        say=progress.say,
        watch_gradients=not compiles_whole(engine, config),
    )
