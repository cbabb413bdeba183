"""Everything that a rank holds while it trains, set up in one order, and what it does between two steps.

:mod:`codeparrot_ds.train` has the loop; this module has the set-up, the evaluation, the save and the end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
import socket
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch

from codeparrot_ds.config import RunConfig, with_absolute_paths
from codeparrot_ds.config_warnings import config_warnings
from codeparrot_ds.data.encoder import Encoder, load_encoder
from codeparrot_ds.data.loader import TrainingLoader, token_ids
from codeparrot_ds.data.opening import (
    StreamStart,
    data_account,
    open_datasets,
    pinned_names,
    proof_texts,
    resume_stream,
    saved_stream,
    stream_of,
    validation_shards,
)
from codeparrot_ds.data.sources import Shard
from codeparrot_ds.data.stream import Dataset, StreamConfig, check_world_size, stream_fingerprint
from codeparrot_ds.data.validation import ValidationLoader
from codeparrot_ds.errors import UserError
from codeparrot_ds.evaluation.perplexity import evaluate_batches, token_losses
from codeparrot_ds.hub.commands import SETTLE_SECONDS, settle
from codeparrot_ds.hub.queue import PushQueue
from codeparrot_ds.hub.repository import is_remote, open_repository
from codeparrot_ds.hub.secrets import check_for_secrets
from codeparrot_ds.hub.worker import start_drain
from codeparrot_ds.model.attention import document_inputs
from codeparrot_ds.model.gpt2 import build_model
from codeparrot_ds.model.products import multiply_in_fp32_where_needed
from codeparrot_ds.model.shapes import GPT2Shape, find_shape, flops_per_token, num_parameters
from codeparrot_ds.paths import shown
from codeparrot_ds.run import checkpoint_files
from codeparrot_ds.run.bad_steps import BadSteps
from codeparrot_ds.run.beats import beat
from codeparrot_ds.run.checkpoint import CheckpointSaver, RunState, SaveOutcome, load_checkpoint
from codeparrot_ds.run.device_memory import load_overhead
from codeparrot_ds.run.engine import create_engine, keep_freed_pages
from codeparrot_ds.run.export import run_export
from codeparrot_ds.run.folder import (
    RunFolder,
    continued_from,
    forgotten_if_refused,
    new_run_name,
    open_run,
    run_path,
    with_checkpoint,
)
from codeparrot_ds.run.guard import write_stacks_to
from codeparrot_ds.run.hardware import peak_flops, rank_precisions
from codeparrot_ds.run.initial import load_initial_weights, with_initial_model, with_kept_tokenizer
from codeparrot_ds.run.memory_check import MemoryCheck, forget_peak, measure_gpu
from codeparrot_ds.run.meter import Meter
from codeparrot_ds.run.micro_batch import with_micro_batch
from codeparrot_ds.run.ops import build_operators, use_operators_folder
from codeparrot_ds.run.plan import predict
from codeparrot_ds.run.precision import began_with, with_precision
from codeparrot_ds.run.profiler import StepProfiler
from codeparrot_ds.run.rank_times import RankTimes
from codeparrot_ds.run.ranks import Ranks, SharedError, join_ranks
from codeparrot_ds.run.samples import Sampler, open_sampler
from codeparrot_ds.run.startup import LAUNCHED_AT, Startup
from codeparrot_ds.run.stopping import StopSignal
from codeparrot_ds.run.tracking import Progress, Tracker, set_up_logging, warm_up
from codeparrot_ds.units import size_text
from codeparrot_ds.zero.ds_config import (
    Resolved,
    open_ds_config,
    precision,
    resolve,
    zero_stage,
)
from codeparrot_ds.zero.lint import check_ds_config
from codeparrot_ds.zero.resolution import sources_as_json

T = TypeVar("T")
logger = logging.getLogger("codeparrot_ds.session")

CURVE_POINTS = 24
"""Of the training loss in a model card."""


@dataclasses.dataclass(kw_only=True)
class Session:
    """One rank's run; see :meth:`start` for how the parts come about."""

    config: RunConfig
    ds_config: dict[str, Any]
    ranks: Ranks
    stop: StopSignal
    folder: RunFolder
    encoder: Encoder
    shape: GPT2Shape
    engine: Any
    loader: TrainingLoader
    bad_steps: BadSteps
    tracker: Tracker
    progress: Progress
    meter: Meter
    startup: Startup
    step: int
    fingerprint: dict[str, Any]
    """Of the training data, on rank 0."""
    stream_start: StreamStart
    validation: list[Shard]
    evaluations: list[dict[str, Any]]
    sampler: Sampler | None = None
    """Of completions at each evaluation."""
    profiler: StepProfiler | None = None
    """On rank 0 of a start with ``--profile``."""
    saver: CheckpointSaver = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.saver = CheckpointSaver(
            self.engine,
            self.ranks,
            self.folder.checkpoints,
            in_background=self.config.save_in_background,
            published=self._after_save,
            report=self._report_save,
        )
        self.bad_steps.give_up = self._give_up

    @classmethod
    @forgotten_if_refused()
    def start(cls, config: RunConfig, *, peak_flops: float | None = None) -> Session:
        """Sets one rank up: ranks, config, folder, model, engine, restored state, data, trackers; collective.

        ``peak_flops`` of all ranks is what MFU is held against; None takes the devices' own, which may be measured.
        """
        startup = Startup()
        startup.lap("Python, torch and other imports")
        keep_freed_pages()
        _share_the_cores()
        use_operators_folder(os.environ)
        ranks = join_ranks()
        startup.lap("DeepSpeed import and process group")
        stop = StopSignal(ranks, config.max_hours)
        if ranks.device.type == "cpu":
            multiply_in_fp32_where_needed(torch.bfloat16)  # DeepSpeed trains no fp16 where a CPU has none
        config, followed = ranks.on_main(lambda: _ready(config, ranks))
        resolved, encoder, shape = ranks.together(lambda: _resolve(config, followed, ranks))
        ds_config = resolved.config
        sampler = open_sampler(config, ranks, together=zero_stage(ds_config) == 3)
        startup.lap("config and tokenizer")
        folder = _open_folder(config, resolved, ranks)
        write_stacks_to(set_up_logging(folder.path, ranks.rank))
        if ranks.is_main and config.wandb != "off":
            warm_up()
        startup.lap("run folder and branch")
        ranks.together(lambda: build_operators(ds_config, ranks.device.type))
        startup.lap("operators")
        # On rank 0 alone: on the Hub each look costs requests.
        datasets, validation = ranks.on_main(lambda: _open_data(config, folder))
        stream = stream_of(config, datasets, encoder)
        fingerprint = ranks.on_main(lambda: stream_fingerprint(stream))
        _choose_encoding(stream, ranks)
        startup.lap("data")
        torch.manual_seed(config.seed * 1_000_003 + ranks.rank)  # dropout differs between ranks
        model = build_model(
            shape,
            eos_token_id=encoder.eos_token_id,
            seed=config.seed,
            dropout=config.dropout,
            chunked_loss=config.chunked_loss,
            zero3_config=ds_config if zero_stage(ds_config) == 3 else None,
            device=ranks.device,
        )
        load_initial_weights(model, config, ranks, partitioned=zero_stage(ds_config) == 3)
        startup.lap("model")
        engine = create_engine(model, ds_config, config)
        startup.lap("DeepSpeed engine")
        restored = _restore(config, folder, engine, ranks)
        stream_start, data_changes = _stream_start(config, ranks, restored, fingerprint)
        _leave_later(config, folder, ranks, restored)
        startup.lap("checkpoint")
        if config.compile:
            engine.compile()
        step = restored.step if restored else 0
        loader = _training_loader(config, stream, ranks, stream_start)
        progress = Progress(active=ranks.is_main, start=step, total=config.max_train_steps)
        _introduce(progress, config, ds_config, shape, ranks, folder, restored)
        if data_changes:
            progress.say("the data begins a new epoch: %s", " ".join(data_changes))
        tracker = _open_tracker(config, ds_config, shape, ranks, folder, step)
        startup.lap("loader and trackers")
        peak_flops = peak_flops or _peak_of_ranks(ds_config, ranks)
        meter = _start_meter(config, ds_config, shape, ranks, loader, restored, peak_flops)
        if ranks.is_main:
            folder.update(peak_flops=peak_flops)
        meter.memory_check = _memory_check(config, ds_config, shape, ranks, folder, progress, step)
        session = cls(
            config=config,
            ds_config=ds_config,
            ranks=ranks,
            stop=stop,
            folder=folder,
            encoder=encoder,
            shape=shape,
            engine=engine,
            loader=loader,
            bad_steps=_watch_steps(config, ranks, engine, stream, stream_start, step, loader, progress),
            tracker=tracker,
            progress=progress,
            meter=meter,
            startup=startup,
            step=step,
            fingerprint=fingerprint,
            stream_start=stream_start,
            validation=validation,
            evaluations=list(restored.extra["evaluations"]) if restored else [],
            sampler=sampler,
            profiler=_profiler(config, ranks, folder, engine, loader, step, progress, meter),
        )
        if restored is not None:
            ranks.on_main(lambda: session._queue_again(restored))
        return session

    @property
    def last_evaluation(self) -> dict[str, Any]:
        """The newest evaluation row; empty before the first."""
        return self.evaluations[-1] if self.evaluations else {}

    def looks_well(self, step: int) -> bool:
        """Whether the weights after ``step`` are worth a checkpoint: neither it nor its evaluation gave a NaN.

        Older checkpoints make room for newer ones, so those of weights that are past help must not push out good ones.
        """
        evaluation = self.last_evaluation
        evaluated_well = evaluation.get("step") != step or math.isfinite(evaluation["eval_loss"])
        return self.bad_steps.in_a_row == 0 and evaluated_well

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches a rank an optimizer step."""
        return self.config.gradient_accumulation_steps(self.ranks.world_size)

    def model_inputs(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the model takes for a micro-batch of the loader, on this rank's device."""
        ids = token_ids(batch.to(self.ranks.device, non_blocking=True))
        return {"labels": ids, **self._forward_inputs(ids)}

    def _forward_inputs(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        if not self.config.intra_document_masking:
            return {"input_ids": ids}
        return {"input_ids": ids, **document_inputs(ids, self.encoder.eos_token_id)}

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
            self.validation,
            self.encoder,
            seq_length=config.seq_length,
            num_lanes=config.num_lanes,
            batch_size=config.micro_batch_size,
            max_rows=None if config.max_eval_steps < 0 else config.max_eval_steps * config.micro_batch_size,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            max_bad_documents=config.max_bad_documents,
        )
        self.engine.eval()
        result = evaluate_batches(
            lambda ids, labels: token_losses(self.engine(**self._forward_inputs(ids)).logits, labels),
            _beating(batches),
            token_bytes=self.encoder.token_bytes(),
            reduce=self.ranks.sum,
            device=self.ranks.device,
        )
        samples = None if self.sampler is None else self.sampler(self.engine)
        self.engine.train()
        row = {
            "step": step,
            "tokens": self.meter.tokens_at(step),
            "eval_loss": result.loss,
            "perplexity": result.perplexity,
            "bits_per_byte": result.bits_per_byte,
            "eval_tokens": result.eval_tokens,
            **(samples.figures if samples else {}),
        }
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
        tokens = self.meter.tokens_at(step)
        state = RunState(
            step=step,
            tokens=tokens,
            data=saved_stream(self.fingerprint, StreamStart(row=rows, lane_states=lanes)),
            layout=_layout(self.ds_config, self.ranks),
            extra={
                # Copies: they are written while the run goes on.
                "evaluations": [dict(row) for row in self.evaluations],
                "config": dataclasses.asdict(self.config),
                "ds_config": self.ds_config,
            },
        )
        export = run_export(
            self.config,
            self.ds_config,
            model_config=self.engine.module.config,
            name=self.folder.name,
            num_parameters=num_parameters(self.shape),
            step=step,
            tokens=tokens,
            evaluations=self.evaluations,
            versions=self.folder.record["versions"],
            losses=self.tracker.metrics.losses(CURVE_POINTS) if self.ranks.is_main else [],
            fingerprint=self.fingerprint,
            hub_name=self.folder.record.get("hub") if is_remote(self.config.hub) else None,
        )
        self.saver.save(state, export)
        self.meter.pause(time.perf_counter() - started)

    def _give_up(self, step: int) -> Path | None:
        """Records that the run has diverged and finds its newest checkpoint that is whole (rank 0)."""
        self.saver.wait()
        self.folder.update(outcome={"status": "diverged", "step": step, "run": str(self.folder.path)})
        candidates = checkpoint_files.readable_checkpoints(self.folder.checkpoints)
        whole = (path for path, problem in candidates if not problem and not checkpoint_files.verify_checkpoint(path))
        return next(whole, None)

    def _report_save(self, outcome: SaveOutcome) -> None:
        """Says what became of a save (rank 0, from the thread that wrote)."""
        if outcome.error is not None:
            self.progress.say("error: %s; training goes on", outcome.error)
            logger.error("%s", outcome.error)
            return
        self.progress.say(
            "checkpoint at step %d: %s (%s in %.1f s, training waited %.2f s)",
            outcome.step,
            outcome.path,
            size_text(outcome.num_bytes),
            outcome.seconds,
            outcome.stall_seconds,
        )

    def _after_save(self, path: Path, state: RunState) -> None:
        """Removes checkpoints that nothing keeps and queues the export (rank 0, from the thread that wrote)."""
        config = self.config
        evaluations = state.extra["evaluations"]
        saved = {int(folder.name[5:]) for folder in checkpoint_files.checkpoint_folders(self.folder.checkpoints)}
        judged = [row for row in evaluations if row["step"] in saved and not math.isnan(row["eval_loss"])]
        best = min(judged, key=lambda row: row["eval_loss"], default={"step": -1})
        for removed in checkpoint_files.remove_old(
            self.folder.checkpoints,
            newest=config.keep_checkpoints,
            every=config.keep_checkpoint_every,
            best=[best["step"]] if config.keep_best_checkpoint else [],
        ):
            logger.debug("removed %s", removed)
        self._queue_export(path, state)

    def _queue_again(self, restored: RunState) -> None:
        """Queues the export of the checkpoint that the run goes on from: a kill may have come before that (rank 0)."""
        path = checkpoint_files.step_folder(self.folder.checkpoints, restored.step)
        if not path.is_dir():  # another run's
            return
        try:
            self._queue_export(path, restored)
        except UserError as error:
            self.progress.say("error: %s; training goes on", error)

    def _queue_export(self, path: Path, state: RunState) -> None:
        """Queues a checkpoint's export for the run's branch and starts pushing; one that is known changes nothing."""
        if self.folder.record.get("hub") is None:
            return
        evaluations = state.extra["evaluations"]
        title, eval_loss = f"Step {state.step}", None
        if evaluations:
            evaluation = evaluations[-1]
            is_of_now = evaluation["step"] == state.step and math.isfinite(evaluation["eval_loss"])
            eval_loss = evaluation["eval_loss"] if is_of_now else None
            title += f": loss {evaluation['eval_loss']:.4f}, perplexity {evaluation['perplexity']:.2f}"
            if evaluation["step"] != state.step:
                title += f" (at step {evaluation['step']})"
        files = checkpoint_files.read_manifest(path)["files"]
        exported = checkpoint_files.EXPORT + "/"
        dropped = PushQueue(self.folder.path).enqueue(
            state.step,
            path / checkpoint_files.EXPORT,
            title,
            f"Tokens: {state.tokens:,}",
            sha256={
                name.removeprefix(exported): entry["sha256"]
                for name, entry in files.items()
                if name.startswith(exported)
            },
            eval_loss=eval_loss,
            max_bytes=self.config.hub_queue_gb * 1e9,
        )
        for drop in dropped:
            self.progress.say("error: not pushed: %s", drop)
        start_drain(self.folder.path)

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
            encoder=self.encoder.name,
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
                self.progress.say("%s", settle(self.folder.path, wait_seconds=wait))
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


def _share_the_cores() -> None:
    """Without OMP_NUM_THREADS every rank would take every core, and they would push each other off."""
    if "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(
            max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1"))))
        )


def _named(config: RunConfig) -> RunConfig:
    return config if config.run_name else dataclasses.replace(config, run_name=new_run_name(Path(config.output_dir)))


def _ready(config: RunConfig, ranks: Ranks) -> tuple[RunConfig, str]:
    """The config with what the front door decides where there is one, and the precision that ``auto`` follows.

    Decided are the name, the initial model, the precision, the micro-batch and the paths. These are rank 0's: another
    rank may have another working directory, or its host another home.
    """
    typed_tokenizer = config.tokenizer
    config = with_checkpoint(_named(config))
    followed = began_with(config) or rank_precisions(ranks.device)[0]
    config = with_initial_model(with_precision(config, followed))
    config = with_micro_batch(config, world_size=ranks.world_size, device=ranks.device.type)
    return with_absolute_paths(with_kept_tokenizer(config, typed_tokenizer)), followed


def _resolve(config: RunConfig, followed: str, ranks: Ranks) -> tuple[Resolved, Encoder, GPT2Shape]:
    encoder = load_encoder(config.tokenizer)
    shape = find_shape(config.model, vocab_size=encoder.vocab_size, seq_length=config.seq_length)
    file = open_ds_config(config.deepspeed, rank_precisions(ranks.device), began=followed)
    # The front door has checked it too; a rank may have been started without.
    check_ds_config(file, config=config, device=ranks.device.type, world_size=ranks.world_size)
    resolved = resolve(
        file,
        config,
        world_size=ranks.world_size,
        model_hidden_size=shape.n_embd,
        nvme_path=Path(config.output_dir) / str(config.run_name) / "nvme",
    )
    check_world_size(config.num_lanes, ranks.world_size)
    return resolved, encoder, shape


def _open_folder(config: RunConfig, resolved: Resolved, ranks: Ranks) -> RunFolder:
    hosts = ranks.gather(socket.gethostname())
    mine = RunFolder(run_path(config))

    def open_on_main() -> None:
        nonlocal mine
        check_for_secrets(json.dumps(dataclasses.asdict(config)), "the run config")
        check_for_secrets(json.dumps(resolved.config), "the DeepSpeed config")
        repository = open_repository(config.hub, Path(config.output_dir))
        mine = open_run(config, resolved.config, ranks.world_size, hosts, sources_as_json(resolved))
        if repository is not None and not is_remote(config.hub):  # on the Hub its worker does: training waits for none
            repository.create()
            repository.create_branch(mine.name)
        mine.update(hub=None if repository is None else repository.spec)

    ranks.on_main(open_on_main)
    if not ranks.is_main:
        mine.reload()
    return mine


def _open_data(config: RunConfig, folder: RunFolder) -> tuple[list[Dataset], list[Shard]]:
    datasets = open_datasets(config, folder.record.get("data_pins"))
    pins = pinned_names(config, datasets)
    if pins:
        folder.update(data_pins=folder.record.get("data_pins", {}) | pins)
    return datasets, validation_shards(config)


def _choose_encoding(stream: StreamConfig, ranks: Ranks) -> None:
    """Every rank encodes with gigatoken where rank 0 has proved it on the corpus; otherwise none does."""
    reason = ranks.on_main(lambda: stream.encoder.prove_fast_encoding(proof_texts(stream)))
    if reason is None and not ranks.is_main:
        reason = stream.encoder.prove_fast_encoding(())
    if ranks.gather(reason) != [None] * ranks.world_size:
        stream.encoder.forget_fast_encoding()
        if ranks.is_main:
            logger.warning("%s; the tokenizers library encodes instead, at a hundredth of the speed", reason)


def _restore(config: RunConfig, folder: RunFolder, engine: Any, ranks: Ranks) -> RunState | None:
    """Fills the engine from the newest valid checkpoint, or the one asked for; None for a run that starts."""
    ranks.on_main(lambda: checkpoint_files.recover(folder.checkpoints))
    if config.resume == "never":
        return None
    checkpoint = _newest_valid(folder, ranks) if config.resume == "auto" else _asked_for(config, ranks)
    return None if checkpoint is None else load_checkpoint(engine, ranks, checkpoint)


def _newest_valid(folder: RunFolder, ranks: Ranks) -> Path | None:
    """The newest checkpoint that holds; damaged ones are named and set aside. Every rank verifies its share."""
    # Rank 0 alone looks at the folder: others may see it late on a network's file system.
    candidates = ranks.on_main(lambda: checkpoint_files.readable_checkpoints(folder.checkpoints))
    found = None
    damaged: dict[Path, list[str]] = {}
    for path, problem in candidates:
        damage = [problem] if problem else _verify(path, ranks)
        if not damage:
            found = path
            break
        damaged[path] = damage

    def report() -> None:
        if found is None and damaged:
            raise UserError(f"no checkpoint of {folder.path} is whole: {next(iter(damaged.values()))[0]}")
        for path, damage in damaged.items():
            for sentence in damage:
                logger.error("damaged checkpoint left out: %s", sentence)
            logger.error("%s was set aside as %s", path.name, checkpoint_files.set_aside(path).name)
        if found is not None:
            checkpoint_files.point_latest(found)  # a kill may have come between the rename and this

    ranks.on_main(report)
    return found


def _verify(checkpoint: Path, ranks: Ranks) -> list[str]:
    share = checkpoint_files.verify_checkpoint(checkpoint, share=ranks.rank, num_shares=ranks.world_size)
    return sorted({sentence for sentences in ranks.gather(share) for sentence in sentences})


def _asked_for(config: RunConfig, ranks: Ranks) -> Path:
    """The checkpoint that ``--resume`` names, of this run or another; every byte of it is right."""
    chosen = Path(config.resume).resolve()
    damage = _verify(chosen, ranks)
    if damage:
        raise SharedError(f"--resume {config.resume}: {damage[0]}")
    return chosen


def _leave_later(config: RunConfig, folder: RunFolder, ranks: Ranks, restored: RunState | None) -> None:
    """Sets aside what the run saved later than the checkpoint that ``--resume`` names.

    It is of a time line that the run leaves here, and would be taken for newer than what comes now. Called once nothing
    can refuse the start.
    """
    if restored is None or config.resume == "auto":
        return
    chosen, step = Path(config.resume).resolve(), restored.step

    def set_aside() -> None:
        for later in checkpoint_files.checkpoint_folders(folder.checkpoints):
            if int(later.name[5:]) >= step and later.resolve() != chosen:
                logger.warning("%s was set aside as %s", later.name, checkpoint_files.set_aside(later).name)

    ranks.on_main(set_aside)


def _stream_start(
    config: RunConfig, ranks: Ranks, restored: RunState | None, fingerprint: dict[str, Any]
) -> tuple[StreamStart, list[str]]:
    """Where the stream begins, and what has changed in the data where that is a new epoch; collective."""
    if restored is None:
        return StreamStart(), []
    saved = restored.data
    return ranks.on_main(lambda: resume_stream(saved, fingerprint, on_data_change=config.on_data_change))


def _training_loader(config: RunConfig, stream: StreamConfig, ranks: Ranks, start: StreamStart) -> TrainingLoader:
    return TrainingLoader(
        stream,
        micro_batch_size=config.micro_batch_size,
        num_workers=config.num_workers,
        rank=ranks.rank,
        world_size=ranks.world_size,
        start_row=start.row,
        lane_states=start.lane_states,
    )


def _profiler(
    config: RunConfig,
    ranks: Ranks,
    folder: RunFolder,
    engine: Any,
    loader: TrainingLoader,
    step: int,
    progress: Progress,
    meter: Meter,
) -> StepProfiler | None:
    if not config.profile or not ranks.is_main:
        return None
    return StepProfiler(
        engine=engine,
        loader=loader,
        device=ranks.device,
        folder=folder.path,
        num_steps=config.profile,
        first_step=step + 1,
        say=progress.say,
        pause=meter.pause,
    )


def _watch_steps(
    config: RunConfig,
    ranks: Ranks,
    engine: Any,
    stream: StreamConfig,
    start: StreamStart,
    step: int,
    loader: TrainingLoader,
    progress: Progress,
) -> BadSteps:
    return BadSteps(
        engine=engine,
        ranks=ranks,
        stream=stream,
        loader=loader,
        global_batch_size=config.global_batch_size,
        start_step=step,
        start_row=start.row,
        limit=config.max_bad_steps,
        say=progress.say,
        watch_gradients=not config.compile,  # a hook inside a compiled model would cut its graph
    )


def _layout(ds_config: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    return {"world_size": ranks.world_size, "zero_stage": zero_stage(ds_config), "precision": precision(ds_config)}


def _introduce(
    progress: Progress,
    config: RunConfig,
    ds_config: dict[str, Any],
    shape: GPT2Shape,
    ranks: Ranks,
    folder: RunFolder,
    restored: RunState | None,
) -> None:
    progress.say(
        "run %s: %s, %s parameters, ZeRO-%d %s on %d rank(s), %d rows a step (%d x %d x %d)",
        folder.name,
        shown(config.model),
        f"{num_parameters(shape):,}",
        zero_stage(ds_config),
        precision(ds_config),
        ranks.world_size,
        config.global_batch_size,
        config.micro_batch_size,
        config.gradient_accumulation_steps(ranks.world_size),
        ranks.world_size,
    )
    if restored is not None:
        progress.say("resumed from step %d (%s tokens)", restored.step, f"{restored.tokens:,}")
        now = _layout(ds_config, ranks)
        changes = [f"{key} {restored.layout[key]} -> {now[key]}" for key in now if restored.layout[key] != now[key]]
        if changes:
            progress.say("layout changed: %s; losses agree to rounding", ", ".join(changes))
    if ranks.is_main and LAUNCHED_AT not in os.environ:  # without a front door, which has said it
        for warning in config_warnings(config, continued_from(config)):
            progress.say("warning: %s", warning.sentence)


def _open_tracker(
    config: RunConfig, ds_config: dict[str, Any], shape: GPT2Shape, ranks: Ranks, folder: RunFolder, step: int
) -> Tracker:
    hyperparameters = dataclasses.asdict(config) | _layout(ds_config, ranks)
    hyperparameters |= {
        "parameters": num_parameters(shape),
        "vocab_size": shape.vocab_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps(ranks.world_size),
    }
    tracker = Tracker(folder, active=ranks.is_main, mode=config.wandb, hyperparameters=hyperparameters)
    if ranks.is_main:
        for log in (tracker.metrics, tracker.samples):
            log.truncate_after(step if step else -1)  # a fresh start evaluates step 0 again
        folder.update(parameters=num_parameters(shape), **_layout(ds_config, ranks))
    return tracker


def _start_meter(
    config: RunConfig,
    ds_config: dict[str, Any],
    shape: GPT2Shape,
    ranks: Ranks,
    loader: TrainingLoader,
    restored: RunState | None,
    peak_flops: float,
) -> Meter:
    hosts = ranks.gather(socket.gethostname())
    return Meter(
        loader=loader,
        tokens_per_step=config.global_batch_size * config.seq_length,
        flops_per_token=flops_per_token(shape, config.seq_length),
        peak_flops=peak_flops,
        device=ranks.device,
        tokens=restored.tokens if restored else 0,
        step=restored.step if restored else 0,
        max_train_steps=config.max_train_steps,
        rank_times=RankTimes(ranks, hosts, zero_stage(ds_config)) if ranks.world_size > 1 else None,
    )


def _peak_of_ranks(ds_config: dict[str, Any], ranks: Ranks) -> float:
    """FLOP/s of all ranks' devices together; collective."""
    flops, source = peak_flops(ranks.device, precision(ds_config))
    logger.debug("peak of this rank: %.3g FLOP/s (%s)", flops, source)
    return sum(ranks.gather(flops))


def _memory_check(
    config: RunConfig,
    ds_config: dict[str, Any],
    shape: GPT2Shape,
    ranks: Ranks,
    folder: RunFolder,
    progress: Progress,
    step: int,
) -> MemoryCheck | None:
    """What compares a GPU run's memory with its plan; None on the other ranks, and on CPUs, where nothing counts it."""
    if ranks.device.type != "cuda":
        return None
    forget_peak(ranks.device)
    if not ranks.is_main:
        return None
    return MemoryCheck(
        predict(config, shape, ds_config, ranks.world_size),
        library_bytes=load_overhead().fixed_bytes,
        measure=lambda: measure_gpu(ranks.device),
        say=progress.say,
        record=lambda memory: folder.update(memory=memory),
        first_step=step,
    )
