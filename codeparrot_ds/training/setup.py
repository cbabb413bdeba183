"""How one rank is set up, in one order."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import socket
from pathlib import Path
from typing import Any

import torch

from codeparrot_ds.checkpoint.initial import load_initial_weights, with_initial_model, with_kept_tokenizer
from codeparrot_ds.checkpoint.run_folder import (
    RunFolder,
    continued_from,
    forgotten_if_refused,
    new_run_name,
    open_run,
    run_path,
    with_checkpoint,
)
from codeparrot_ds.checkpoint.saver import RunState
from codeparrot_ds.config.run_config import RunConfig, with_absolute_paths
from codeparrot_ds.config.warnings import config_warnings
from codeparrot_ds.cpu import usable_cores
from codeparrot_ds.data.datasets import (
    StreamStart,
    open_datasets,
    pinned_names,
    proof_texts,
    resume_stream,
    stream_of,
    validation_shards,
)
from codeparrot_ds.data.encoder import Encoder, load_encoder
from codeparrot_ds.data.loader import TrainingLoader
from codeparrot_ds.data.shards import Shard
from codeparrot_ds.data.stream import Dataset, StreamConfig, check_world_size, stream_fingerprint
from codeparrot_ds.ds_config.changes import sources_as_json
from codeparrot_ds.ds_config.facts import precision, zero_stage
from codeparrot_ds.ds_config.file import open_ds_config
from codeparrot_ds.ds_config.lint import check_ds_config
from codeparrot_ds.ds_config.precision import began_with, with_precision
from codeparrot_ds.ds_config.resolve import Resolved, resolve
from codeparrot_ds.engine.engine import create_engine, keep_freed_pages
from codeparrot_ds.engine.hardware import peak_flops, rank_precisions
from codeparrot_ds.engine.operators import build_operators, use_operators_folder
from codeparrot_ds.engine.ranks import Ranks, join_ranks
from codeparrot_ds.hub.places import is_remote, open_repository
from codeparrot_ds.hub.secrets import check_for_secrets
from codeparrot_ds.memory.check import MemoryCheck, forget_peak, measure_gpu
from codeparrot_ds.memory.device import load_overhead
from codeparrot_ds.memory.micro_batch import with_micro_batch
from codeparrot_ds.memory.plan import predict
from codeparrot_ds.model.gpt2 import build_model
from codeparrot_ds.model.products import multiply_in_fp32_where_needed
from codeparrot_ds.model.shapes import GPT2Shape, find_shape, flops_per_token, num_parameters
from codeparrot_ds.paths import shown
from codeparrot_ds.supervision.guard import write_stacks_to
from codeparrot_ds.telemetry.meter import Meter
from codeparrot_ds.telemetry.profiler import StepProfiler
from codeparrot_ds.telemetry.rank_times import RankTimes
from codeparrot_ds.telemetry.startup import LAUNCHED_AT, Startup
from codeparrot_ds.telemetry.tracking import Progress, Tracker, set_up_logging, warm_up
from codeparrot_ds.training.bad_steps import BadSteps
from codeparrot_ds.training.resume import leave_later, restore
from codeparrot_ds.training.samples import open_sampler
from codeparrot_ds.training.session import Session, layout_of
from codeparrot_ds.training.stopping import StopSignal

logger = logging.getLogger("codeparrot_ds.setup")


@forgotten_if_refused()
def start_session(config: RunConfig, *, peak_flops: float | None = None) -> Session:
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
    restored = restore(config, folder, engine, ranks)
    stream_start, data_changes = _stream_start(config, ranks, restored, fingerprint)
    leave_later(config, folder, ranks, restored)
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
    session = Session(
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
        ranks.on_main(lambda: session.publisher.queue_again(restored))
    return session


def _share_the_cores() -> None:
    """Without OMP_NUM_THREADS every rank would use all cores and oversubscribe the machine."""
    if "OMP_NUM_THREADS" not in os.environ:
        cores = usable_cores()
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
        now = layout_of(ds_config, ranks)
        changes = [f"{key} {restored.layout[key]} -> {now[key]}" for key in now if restored.layout[key] != now[key]]
        if changes:
            progress.say("layout changed: %s; losses agree to rounding", ", ".join(changes))
    if ranks.is_main and LAUNCHED_AT not in os.environ:  # without a front door, which has said it
        for warning in config_warnings(config, continued_from(config)):
            progress.say("warning: %s", warning.sentence)


def _open_tracker(
    config: RunConfig, ds_config: dict[str, Any], shape: GPT2Shape, ranks: Ranks, folder: RunFolder, step: int
) -> Tracker:
    hyperparameters = dataclasses.asdict(config) | layout_of(ds_config, ranks)
    hyperparameters |= {
        "parameters": num_parameters(shape),
        "vocab_size": shape.vocab_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps(ranks.world_size),
    }
    tracker = Tracker(folder, active=ranks.is_main, mode=config.wandb, hyperparameters=hyperparameters)
    if ranks.is_main:
        for log in (tracker.metrics, tracker.samples):
            log.truncate_after(step if step else -1)  # a fresh start evaluates step 0 again
        folder.update(parameters=num_parameters(shape), **layout_of(ds_config, ranks))
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
