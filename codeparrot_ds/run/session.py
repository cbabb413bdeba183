"""Everything that a rank holds while it trains, set up in one order, and what it does between two steps.

:mod:`codeparrot_ds.train` has the loop; this module has the set-up, the evaluation, the save and the end.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import socket
import time
from pathlib import Path
from typing import Any

import torch

from codeparrot_ds.config import RunConfig
from codeparrot_ds.data.encoder import Encoder, load_encoder
from codeparrot_ds.data.loader import TrainingLoader
from codeparrot_ds.data.sources import find_shards
from codeparrot_ds.data.stream import (
    LaneState,
    StreamConfig,
    check_world_size,
    fingerprint_differences,
    open_stream,
    stream_fingerprint,
)
from codeparrot_ds.data.validation import ValidationLoader
from codeparrot_ds.errors import UserError
from codeparrot_ds.evaluation.perplexity import evaluate_batches, token_losses
from codeparrot_ds.hub.card import model_card
from codeparrot_ds.hub.queue import PushQueue, hub_push, start_drain
from codeparrot_ds.hub.repository import open_repository
from codeparrot_ds.model.gpt2 import build_model
from codeparrot_ds.model.shapes import GPT2Shape, find_shape, flops_per_token, num_parameters
from codeparrot_ds.run import checkpoint_files
from codeparrot_ds.run.checkpoint import RestoredRun, load_checkpoint, save_checkpoint
from codeparrot_ds.run.engine import create_engine, keep_freed_pages
from codeparrot_ds.run.export import working_weights, write_export
from codeparrot_ds.run.folder import RunFolder, new_run_name, open_run
from codeparrot_ds.run.hardware import peak_flops
from codeparrot_ds.run.meter import Meter
from codeparrot_ds.run.ops import build_operators, use_operators_folder
from codeparrot_ds.run.ranks import Ranks, join_ranks
from codeparrot_ds.run.startup import Startup
from codeparrot_ds.run.stopping import StopSignal
from codeparrot_ds.run.tracking import Progress, Tracker, set_up_logging, warm_up
from codeparrot_ds.zero.ds_config import (
    find_ds_config,
    load_ds_config,
    precision,
    resolve_ds_config,
    zero_stage,
)

logger = logging.getLogger("codeparrot_ds.session")


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
    tracker: Tracker
    progress: Progress
    meter: Meter
    startup: Startup
    step: int
    stream: StreamConfig
    evaluations: list[dict[str, Any]]

    @classmethod
    def start(cls, config: RunConfig) -> Session:
        """Sets one rank up: ranks, config, folder, model, engine, restored state, data, trackers; collective."""
        startup = Startup()
        startup.lap("Python, torch and other imports")
        keep_freed_pages()
        _share_the_cores()
        use_operators_folder(os.environ)
        ranks = join_ranks()
        startup.lap("DeepSpeed import and process group")
        stop = StopSignal(ranks)
        config = ranks.on_main(lambda: _named(config))
        ds_config, encoder, shape = ranks.together(lambda: _resolve(config, ranks))
        startup.lap("config and tokenizer")
        folder = _open_folder(config, ds_config, ranks)
        set_up_logging(folder.path, ranks.rank)
        if ranks.is_main and config.wandb != "off":
            warm_up()
        startup.lap("run folder and branch")
        ranks.together(lambda: build_operators(ds_config, ranks.device.type))
        startup.lap("operators")
        stream = ranks.together(lambda: open_stream(config, encoder))
        startup.lap("data")
        torch.manual_seed(config.seed * 1_000_003 + ranks.rank)  # dropout differs between ranks
        model = build_model(
            shape,
            eos_token_id=encoder.eos_token_id,
            seed=config.seed,
            dropout=config.dropout,
            zero3_config=ds_config if zero_stage(ds_config) == 3 else None,
            device=ranks.device,
        )
        startup.lap("model")
        engine = create_engine(model, ds_config, config)
        startup.lap("DeepSpeed engine")
        restored = _restore(config, folder, engine, ranks, stream)
        startup.lap("checkpoint")
        if config.compile:
            engine.compile()
        step = restored.step if restored else 0
        loader = _training_loader(config, stream, ranks, restored)
        progress = Progress(active=ranks.is_main, start=step, total=config.max_train_steps)
        _introduce(progress, config, ds_config, shape, ranks, folder, restored)
        tracker = _open_tracker(config, ds_config, shape, ranks, folder, step)
        startup.lap("loader and trackers")
        meter = _start_meter(config, ds_config, shape, ranks, loader, restored)
        return cls(
            config=config,
            ds_config=ds_config,
            ranks=ranks,
            stop=stop,
            folder=folder,
            encoder=encoder,
            shape=shape,
            engine=engine,
            loader=loader,
            tracker=tracker,
            progress=progress,
            meter=meter,
            startup=startup,
            step=step,
            stream=stream,
            evaluations=list(restored.extra["evaluations"]) if restored else [],
        )

    @property
    def last_evaluation(self) -> dict[str, Any]:
        """The newest evaluation row; empty before the first."""
        return self.evaluations[-1] if self.evaluations else {}

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches a rank an optimizer step."""
        return self.config.gradient_accumulation_steps(self.ranks.world_size)

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
        batches = ValidationLoader(
            find_shards(config.data, "validation"),
            self.encoder,
            seq_length=config.seq_length,
            num_lanes=config.num_lanes,
            batch_size=config.micro_batch_size,
            max_rows=None if config.max_eval_steps < 0 else config.max_eval_steps * config.micro_batch_size,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
        )
        self.engine.eval()
        result = evaluate_batches(
            lambda ids, labels: token_losses(self.engine(input_ids=ids).logits, labels),
            batches,
            token_bytes=self.encoder.token_bytes(),
            reduce=self.ranks.sum,
            device=self.ranks.device,
        )
        self.engine.train()
        row = {
            "step": step,
            "tokens": self.meter.tokens_at(step),
            "eval_loss": result.loss,
            "perplexity": result.perplexity,
            "bits_per_byte": result.bits_per_byte,
            "eval_tokens": result.eval_tokens,
        }
        self.evaluations.append(row)
        self.tracker.evaluation(row)
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
        """Saves a checkpoint with its export and queues the export for the run's branch; collective."""
        started = time.perf_counter()
        weights = working_weights(self.engine, keep=self.ranks.is_main)
        lanes = {lane: state for table in self.ranks.gather(self.loader.state()) for lane, state in table.items()}
        data = {
            "fingerprint": stream_fingerprint(self.stream),
            "rows": step * self.config.global_batch_size,
            "lanes": {str(lane): state.to_json() for lane, state in sorted(lanes.items())},
        }
        tokens = self.meter.tokens_at(step)
        path = save_checkpoint(
            self.engine,
            self.ranks,
            self.folder.checkpoints,
            step=step,
            tokens=tokens,
            data=data,
            layout=_layout(self.ds_config, self.ranks),
            extra={"evaluations": self.evaluations},
            write_export=lambda folder: write_export(
                folder,
                weights,
                self.engine.module.config,
                Path(self.config.tokenizer),
                card=self._card(step, tokens),
                training_state=self._training_state(step, tokens),
            ),
        )
        self.ranks.on_main(lambda: self._after_save(path, step))
        seconds = time.perf_counter() - started
        self.progress.say("checkpoint at step %d: %s (%.1f s)", step, path, seconds)
        self.meter.pause(seconds)

    def _after_save(self, path: Path, step: int) -> None:
        for removed in checkpoint_files.remove_old(self.folder.checkpoints, self.config.keep_checkpoints):
            logger.debug("removed %s", removed)
        if self.folder.record.get("hub") is None:
            return
        evaluation = self.last_evaluation
        title = f"Step {step}"
        if evaluation:
            title += f": loss {evaluation['eval_loss']:.4f}, perplexity {evaluation['perplexity']:.2f}"
            if evaluation["step"] != step:
                title += f" (at step {evaluation['step']})"
        files = checkpoint_files.read_manifest(path)["files"]
        PushQueue(self.folder.path).enqueue(
            step,
            path / "export",
            title,
            f"Tokens: {self.meter.tokens_at(step):,}",
            sha256={name[7:]: entry["sha256"] for name, entry in files.items() if name.startswith("export/")},
        )
        start_drain(self.folder.path)

    def _card(self, step: int, tokens: int) -> str:
        corpus = Path(self.config.data) / "corpus.json"
        figures = {
            key: self.last_evaluation.get(key) for key in ("eval_loss", "perplexity", "bits_per_byte", "eval_tokens")
        }
        return model_card(
            {
                "name": self.folder.name,
                "model": self.config.model,
                "num_parameters": num_parameters(self.shape),
                "dtype": precision(self.ds_config),
                "step": step,
                "tokens": tokens,
                **figures,
                "history": self.evaluations,
                "config": dataclasses.asdict(self.config),
                "ds_config": self.ds_config,
                "corpus": json.loads(corpus.read_text(encoding="utf-8")) if corpus.is_file() else None,
                "versions": self.folder.record["versions"],
            }
        )

    def _training_state(self, step: int, tokens: int) -> dict[str, Any]:
        """What the exported model is, and what ``evaluate`` needs to see the same rows again."""
        config = self.config
        return {
            "run": self.folder.name,
            "step": step,
            "tokens": tokens,
            "evaluation": self.last_evaluation,
            "evaluated_with": {
                "seq_length": config.seq_length,
                "num_lanes": config.num_lanes,
                "batch_size": config.micro_batch_size,
                "max_eval_steps": config.max_eval_steps,
            },
        }

    def finish(self, step: int, status: str) -> dict[str, Any]:
        """Ends loader, trackers and the branch's queue; says where everything is. Returns the outcome."""
        self.loader.close()
        self.progress.close()
        outcome = {"status": status, "step": step, "run": str(self.folder.path)}

        def conclude() -> None:
            self.tracker.close()
            self.folder.update(outcome=outcome, data=self.loader.counters())
            if self.folder.record.get("hub") is not None:
                hub_push(self.folder.path)
                self.progress.say("branch %s of %s has every checkpoint", self.folder.name, self.folder.record["hub"])
            self.progress.say("run %s %s at step %d: %s", self.folder.name, status, step, self.folder.path)

        self.ranks.on_main(conclude)
        return outcome


def _share_the_cores() -> None:
    """Without OMP_NUM_THREADS every rank would take every core, and they would push each other off."""
    if "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(
            max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1"))))
        )


def _named(config: RunConfig) -> RunConfig:
    return config if config.run_name else dataclasses.replace(config, run_name=new_run_name(Path(config.output_dir)))


def _resolve(config: RunConfig, ranks: Ranks) -> tuple[dict[str, Any], Encoder, GPT2Shape]:
    encoder = load_encoder(config.tokenizer)
    shape = find_shape(config.model, vocab_size=encoder.vocab_size, seq_length=config.seq_length)
    source = find_ds_config(config.deepspeed)
    ds_config = resolve_ds_config(
        load_ds_config(source),
        config,
        world_size=ranks.world_size,
        model_hidden_size=shape.n_embd,
        nvme_path=Path(config.output_dir) / str(config.run_name) / "nvme",
        source=source,
    )
    check_world_size(config.num_lanes, ranks.world_size)
    return ds_config, encoder, shape


def _open_folder(config: RunConfig, ds_config: dict[str, Any], ranks: Ranks) -> RunFolder:
    hosts = ranks.gather(socket.gethostname())
    mine = RunFolder(Path(config.output_dir) / str(config.run_name))

    def open_on_main() -> None:
        nonlocal mine
        repository = open_repository(config.hub, Path(config.output_dir))
        mine = open_run(config, ds_config, ranks.world_size, hosts)
        if repository is not None:
            repository.create()
            repository.create_branch(mine.name)
        mine.update(hub=None if repository is None else str(repository.path))

    ranks.on_main(open_on_main)
    if not ranks.is_main:
        mine.reload()
    return mine


def _restore(
    config: RunConfig, folder: RunFolder, engine: Any, ranks: Ranks, stream: StreamConfig
) -> RestoredRun | None:
    """Fills the engine from the newest valid checkpoint, or the one asked for; None for a run that starts."""

    def choose() -> Path | None:
        if config.resume == "never":
            return None
        if config.resume != "auto":
            chosen = Path(config.resume)
            damage = checkpoint_files.verify_checkpoint(chosen)
            if damage:
                raise UserError(f"--resume {chosen}: {damage[0]}")
            problems: list[str] = []
        else:
            found, problems = checkpoint_files.newest_valid(folder.checkpoints)
            for problem in problems:
                logger.error("damaged checkpoint left out: %s", problem)
            if found is None:
                if problems:
                    raise UserError(f"no checkpoint of {folder.path} is whole: {problems[0]}")
                return None
            chosen = found
        saved = json.loads((chosen / "data.json").read_text(encoding="utf-8"))["fingerprint"]
        differences = fingerprint_differences(saved, stream_fingerprint(stream))
        if differences:
            raise UserError(f"{chosen} was trained on other data: {'; '.join(differences)}")
        return chosen

    checkpoint = ranks.on_main(choose)
    return None if checkpoint is None else load_checkpoint(engine, ranks, checkpoint)


def _training_loader(
    config: RunConfig, stream: StreamConfig, ranks: Ranks, restored: RestoredRun | None
) -> TrainingLoader:
    states = None
    if restored is not None:
        states = {int(lane): LaneState.from_json(state) for lane, state in restored.data["lanes"].items()}
    return TrainingLoader(
        stream,
        micro_batch_size=config.micro_batch_size,
        num_workers=config.num_workers,
        rank=ranks.rank,
        world_size=ranks.world_size,
        start_row=restored.data["rows"] if restored else 0,
        lane_states=states,
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
    restored: RestoredRun | None,
) -> None:
    progress.say(
        "run %s: %s, %s parameters, ZeRO-%d %s on %d rank(s), %d rows a step (%d x %d x %d)",
        folder.name,
        config.model,
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
        tracker.metrics.truncate_after(step if step else -1)  # a fresh start evaluates step 0 again
        folder.update(parameters=num_parameters(shape), **_layout(ds_config, ranks))
    return tracker


def _start_meter(
    config: RunConfig,
    ds_config: dict[str, Any],
    shape: GPT2Shape,
    ranks: Ranks,
    loader: TrainingLoader,
    restored: RestoredRun | None,
) -> Meter:
    flops, source = peak_flops(ranks.device, precision(ds_config))
    logger.debug("peak of this rank: %.3g FLOP/s (%s)", flops, source)
    return Meter(
        loader=loader,
        tokens_per_step=config.global_batch_size * config.seq_length,
        flops_per_token=flops_per_token(shape, config.seq_length),
        peak_flops=sum(ranks.gather(flops)),
        device=ranks.device,
        tokens=restored.tokens if restored else 0,
        step=restored.step if restored else 0,
        max_train_steps=config.max_train_steps,
    )
