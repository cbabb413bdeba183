"""Everything that a rank holds while it trains, and what it does between two steps: evaluation, save, end."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch

from codeparrot_ds.checkpoint.export import run_export
from codeparrot_ds.checkpoint.folders import readable_checkpoints
from codeparrot_ds.checkpoint.run_folder import RunFolder
from codeparrot_ds.checkpoint.saver import CheckpointSaver, SaveOutcome
from codeparrot_ds.checkpoint.state import RunState
from codeparrot_ds.config.run_config import RunConfig
from codeparrot_ds.data.datasets import StreamStart, data_account, saved_stream
from codeparrot_ds.data.loader import TrainingLoader, token_ids
from codeparrot_ds.data.validation import ValidationLoader
from codeparrot_ds.engine.ranks import Ranks, SharedError
from codeparrot_ds.evaluation.perplexity import evaluate_batches, token_losses
from codeparrot_ds.hub.commands import SETTLE_SECONDS, settle
from codeparrot_ds.hub.places import is_remote
from codeparrot_ds.metrics import EvaluationRow
from codeparrot_ds.model.attention import document_inputs
from codeparrot_ds.resolved_run import ResolvedRun
from codeparrot_ds.supervision.heartbeat import beat
from codeparrot_ds.telemetry.meter import Meter
from codeparrot_ds.telemetry.profiler import StepProfiler
from codeparrot_ds.telemetry.startup import Startup
from codeparrot_ds.telemetry.tracking import Progress, Tracker
from codeparrot_ds.terminal import size_text
from codeparrot_ds.training.bad_steps import BadSteps
from codeparrot_ds.training.data import RunData
from codeparrot_ds.training.publish import Publisher
from codeparrot_ds.training.samples import Sampler
from codeparrot_ds.training.stopping import StopSignal

T = TypeVar("T")
logger = logging.getLogger("codeparrot_ds.session")

CURVE_POINTS = 24
"""Of the training loss in a model card."""


@dataclasses.dataclass(kw_only=True)
class Session:
    """One rank's run; see :mod:`codeparrot_ds.training.setup` for how the parts come about."""

    run: ResolvedRun
    ranks: Ranks
    stop: StopSignal
    folder: RunFolder
    engine: Any
    loader: TrainingLoader
    bad_steps: BadSteps
    tracker: Tracker
    progress: Progress
    meter: Meter
    startup: Startup
    step: int
    """Optimizer steps done before this start."""
    data: RunData
    stream_start: StreamStart
    evaluations: list[EvaluationRow]
    sampler: Sampler | None = None
    """Of completions at each evaluation."""
    profiler: StepProfiler | None = None
    """On rank 0 of a start with ``--profile``."""
    saver: CheckpointSaver = dataclasses.field(init=False)
    publisher: Publisher = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.publisher = Publisher(self.config, self.folder, self.progress.say)
        self.saver = CheckpointSaver(
            self.engine,
            self.ranks,
            self.folder.checkpoints,
            in_background=self.config.save_in_background,
            published=self.publisher.after_save,
            report=self._report_save,
        )
        self.bad_steps.give_up = self._give_up

    @property
    def config(self) -> RunConfig:
        return self.run.config

    def is_healthy(self, step: int) -> bool:
        """False if the last step was skipped or its evaluation loss is not finite.

        Older checkpoints make room for newer ones, so weights that are past help must not push out good ones.
        """
        evaluated_well = all(math.isfinite(row.eval_loss) for row in self.evaluations[-1:] if row.step == step)
        return self.bad_steps.in_a_row == 0 and evaluated_well

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches per rank and optimizer step."""
        return self.run.accumulation_steps

    def model_inputs(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the model takes for a micro-batch of the loader, on this rank's device."""
        ids = token_ids(batch.to(self.ranks.device, non_blocking=True))
        return {"labels": ids, **self._forward_inputs(ids)}

    def _forward_inputs(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        if not self.config.intra_document_masking:
            return {"input_ids": ids}
        return {"input_ids": ids, **document_inputs(ids, self.run.encoder.eos_token_id)}

    def profiled(self, step: int) -> contextlib.AbstractContextManager[None]:
        """Around a step of training."""
        return contextlib.nullcontext() if self.profiler is None else self.profiler.step(step)

    def mean_loss(self, loss_sum: torch.Tensor) -> float:
        """The mean loss of the step's global batch, nats a token; collective, waits for the device.

        Raises a UserError on every rank when they skipped more than ``max_bad_documents`` documents together.
        """
        bad = torch.full_like(loss_sum, len(self.loader.bad_documents))
        loss, num_bad = self.ranks.sum(torch.stack([loss_sum, bad])).tolist()
        if num_bad > self.config.max_bad_documents:
            raise SharedError(
                f"{num_bad:.0f} documents could not be read, which is more than "
                f"max_bad_documents={self.config.max_bad_documents}; the ranks' logs in {self.folder.path / 'log'} "
                "name each"
            )
        return loss / (self.accumulation_steps * self.ranks.world_size)

    def first_step_done(self) -> None:
        """Records where the time between the command and the first step went."""
        self.startup.lap("first step")
        if self.ranks.is_main:
            starts = self.folder.record["starts"]
            starts[-1]["startup_seconds"] = self.startup.laps
            self.folder.update(starts=starts)
            logger.debug("first step %.1f s after the start: %s", self.startup.total_seconds, self.startup.laps)

    def evaluate(self, step: int) -> None:
        """Evaluates on the validation split and records the row; collective."""
        started = time.perf_counter()
        config = self.config
        beat("evaluate", step=step)
        batches = ValidationLoader(
            self.data.validation,
            self.data.stream.encoder,
            seq_length=config.seq_length,
            num_lanes=config.num_lanes,
            batch_size=config.micro_batch_rows,
            max_rows=None if config.max_eval_steps < 0 else config.max_eval_steps * config.micro_batch_rows,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            max_bad_documents=config.max_bad_documents,
        )
        self.engine.eval()
        result = evaluate_batches(
            lambda ids, labels: token_losses(self.engine(**self._forward_inputs(ids)).logits, labels),
            _beating(batches),
            token_bytes=self.run.encoder.token_bytes(),
            reduce=self.ranks.sum,
            device=self.ranks.device,
        )
        samples = None if self.sampler is None else self.sampler(self.engine)
        self.engine.train()
        row = EvaluationRow(
            step=step,
            tokens=self.meter.tokens_at(step),
            eval_loss=result.loss,
            perplexity=result.perplexity,
            bits_per_byte=result.bits_per_byte,
            eval_tokens=result.eval_tokens,
            **(samples.figures if samples else {}),
        )
        self.evaluations.append(row)
        self.tracker.evaluation(row)
        if samples is not None:
            self.tracker.completions(step, samples.rows)
            shares = ", ".join(f"{name.replace('_', ' ')} {share:.0%}" for name, share in samples.figures.items())
            self.progress.say("completions at step %d: %s", step, shares)
        self.progress.say(
            "evaluation at step %d: loss %.4f, perplexity %.2f (%d tokens, %.1f s)",
            step,
            result.loss,
            result.perplexity,
            result.eval_tokens,
            time.perf_counter() - started,
        )
        self.meter.pause(time.perf_counter() - started)
        if step == self.step:
            self.startup.lap("first evaluation")

    def save(self, step: int) -> None:
        """Saves a checkpoint with its export and queues the export for the run's branch; collective.

        With ``save_in_background`` it returns as soon as the state is copied; ``finish`` waits for the rest.
        """
        started = time.perf_counter()
        beat("save", step=step)
        lanes = {lane: state for table in self.ranks.gather(self.loader.state()) for lane, state in table.items()}
        rows = self.stream_start.row + (step - self.step) * self.config.global_batch_size
        state = RunState(
            step=step,
            tokens=self.meter.tokens_at(step),
            data=saved_stream(self.data.fingerprint, StreamStart(row=rows, lane_states=lanes)),
            layout=self.run.layout,
            evaluations=list(self.evaluations),  # a copy: it is written while the run continues
            config=dataclasses.asdict(self.config),
            ds_config=self.run.ds_config,
        )
        export = run_export(
            self.config,
            state,
            model_config=self.engine.module.config,
            name=self.folder.branch,
            num_parameters=self.run.parameters,
            versions=self.folder.record["versions"],
            losses=self.tracker.metrics.losses(CURVE_POINTS) if self.ranks.is_main else [],
            hub_name=self.folder.record.get("hub") if is_remote(self.config.hub) else None,
        )
        self.saver.save(state, export)
        self.meter.pause(time.perf_counter() - started)

    def _give_up(self, step: int) -> Path | None:
        """Records that the run has diverged and finds its newest checkpoint that is whole (rank 0)."""
        self.saver.wait()
        self.folder.update(outcome={"status": "diverged", "step": step, "run": str(self.folder.path)})
        candidates = readable_checkpoints(self.folder.checkpoints)
        return next((each.path for each, problem in candidates if not problem and not each.damage()), None)

    def _report_save(self, outcome: SaveOutcome) -> None:
        """Says what became of a save (rank 0, from the thread that wrote)."""
        if outcome.error is not None:
            self.progress.say("error: %s; training continues", outcome.error)
            logger.error("%s", outcome.error)
            return
        self.progress.say(
            "checkpoint at step %d: %s (%s in %.1f s, training waited %.2f s)",
            outcome.step,
            outcome.checkpoint,
            size_text(outcome.num_bytes),
            outcome.seconds,
            outcome.stall_seconds,
        )

    def _saves(self) -> list[dict[str, Any]]:
        """What the saves of this start took, for the record."""
        return [
            {
                "step": outcome.step,
                "bytes": outcome.num_bytes,
                "stall_seconds": round(outcome.stall_seconds, 4),
                "seconds": round(outcome.seconds, 4),
                "error": None if outcome.error is None else str(outcome.error),
            }
            for outcome in self.saver.outcomes
        ]

    def _data_account(self) -> dict[str, Any]:
        """What all ranks read since the stream began; collective."""
        counters = self.ranks.gather(self.loader.counters())
        bad = self.ranks.gather([str(document) for document in self.loader.bad_documents])
        rows = self.ranks.gather(self.loader.rows_per_lane())
        return data_account(
            counters,
            bad_documents=[text for texts in bad for text in texts],
            rows_per_lane={lane: count for table in rows for lane, count in table.items()},
            encoder=self.data.stream.encoder.name,
        )

    def finish(self, step: int, status: str) -> dict[str, Any]:
        """Ends loader, trackers and the branch's queue; says where everything is. Returns the outcome."""
        beat("save", step=step)
        data = self._data_account()
        if self.profiler is not None:
            self.profiler.close()
        self.loader.close()
        last_save = self.saver.wait()
        self.progress.close()
        outcome = {"status": status, "step": step, "run": str(self.folder.path)}

        def conclude() -> None:
            self.tracker.close()
            self.folder.update(outcome=outcome, data=data, saves=self._saves())
            self.progress.say("data: %s", data["summary"])
            if self.folder.record.get("hub") is not None:
                wait = SETTLE_SECONDS if is_remote(self.config.hub) else math.inf
                self.progress.say("%s", settle(self.folder.path, wait_seconds=wait, stopped=lambda: self.stop.asked))
            self.progress.say("run %s %s at step %d: %s", self.folder.name, status, step, self.folder.path)

        beat("push", step=step)
        self.ranks.on_main(conclude)
        beat("end", step=step)
        if last_save is not None and last_save.error is not None:
            raise SharedError(f"the run {status} at step {step}, but {last_save.error}")
        return outcome


def _beating(batches: Iterable[T]) -> Iterator[T]:
    """Validation batches, each a beat of the rank's."""
    for number, batch in enumerate(batches, start=1):
        beat("evaluate", batch=number)
        yield batch
