"""How one rank is set up, in one order: ranks, run, folder, data, model, engine, checkpoint, loader, trackers."""

from __future__ import annotations

from typing import Any

import torch

from codeparrot_ds.checkpoint.initial import load_initial_weights
from codeparrot_ds.checkpoint.run_folder import forgotten_if_refused
from codeparrot_ds.config.run_config import RunConfig
from codeparrot_ds.engine.compiled import compile_model
from codeparrot_ds.engine.engine import create_engine
from codeparrot_ds.engine.operators import build_operators
from codeparrot_ds.engine.ranks import Ranks
from codeparrot_ds.model.gpt2 import build_model
from codeparrot_ds.resolved_run import ResolvedRun
from codeparrot_ds.telemetry.startup import Startup
from codeparrot_ds.telemetry.tracking import Progress
from codeparrot_ds.training.bad_steps import watch_steps
from codeparrot_ds.training.data import open_data
from codeparrot_ds.training.measuring import open_profiler, start_meter
from codeparrot_ds.training.process import agree_on_run, join_as_rank
from codeparrot_ds.training.records import introduce, open_folder, open_log, open_tracker
from codeparrot_ds.training.resume import leave_later, restore
from codeparrot_ds.training.samples import open_sampler
from codeparrot_ds.training.session import Session
from codeparrot_ds.training.stopping import StopSignal


@forgotten_if_refused()
def start_session(given: RunConfig | ResolvedRun, *, peak_flops: float | None = None) -> Session:
    """Sets one rank up; collective.

    Args:
        given: the run as the command resolved it, or the run config that rank 0 resolves for all.
        peak_flops: of all ranks, what MFU is held against; None takes the devices' own, which may be measured.
    """
    startup = Startup()
    startup.lap("Python, torch and other imports")
    ranks = join_as_rank()
    startup.lap("DeepSpeed import and process group")
    run = agree_on_run(given, ranks)
    config = run.config
    stop = StopSignal(ranks, config.max_hours)
    sampler = open_sampler(config, ranks, together=run.zero_stage == 3)
    startup.lap("config and tokenizer")
    folder = open_folder(run, ranks)
    open_log(run, ranks, folder)
    startup.lap("run folder and branch")
    ranks.together(lambda: build_operators(run.ds_config, ranks.device.type))
    startup.lap("operators")
    data = open_data(run, folder, ranks)
    startup.lap("data")
    model = _build_model(run, ranks)
    startup.lap("model")
    engine = create_engine(model, run.ds_config, config)
    startup.lap("DeepSpeed engine")
    restored = restore(config, folder, engine, ranks)
    stream_start, data_changes = data.start(config, ranks, restored)
    leave_later(config, folder, ranks, restored)
    startup.lap("checkpoint")
    if config.compile:
        compile_model(engine, config)
    step = restored.step if restored else 0
    loader = data.loader(config, ranks, stream_start)
    progress = Progress(active=ranks.is_main, start=step, total=config.max_train_steps)
    if ranks.is_main:
        introduce(progress, run, folder, restored, data_changes)
    tracker = open_tracker(run, ranks, folder, step)
    startup.lap("loader and trackers")
    meter = start_meter(run, ranks, folder, loader, progress, restored, peak_flops)
    session = Session(
        run=run,
        ranks=ranks,
        stop=stop,
        folder=folder,
        engine=engine,
        loader=loader,
        bad_steps=watch_steps(config, ranks, engine, data.stream, loader, stream_start.row, step, progress),
        tracker=tracker,
        progress=progress,
        meter=meter,
        startup=startup,
        step=step,
        data=data,
        stream_start=stream_start,
        evaluations=restored.evaluations if restored else [],
        sampler=sampler,
        profiler=open_profiler(run, ranks, folder, engine, meter, progress, step),
    )
    if restored is not None:
        ranks.on_main(lambda: session.publisher.queue_again(restored))
    return session


def _build_model(run: ResolvedRun, ranks: Ranks) -> Any:
    """The model with its initial weights: random ones of the run's seed, or those of ``init_from``; collective."""
    config = run.config
    torch.manual_seed(config.seed * 1_000_003 + ranks.rank)  # dropout differs between ranks
    model = build_model(
        run.shape,
        eos_token_id=run.encoder.eos_token_id,
        seed=config.seed,
        dropout=config.dropout,
        chunked_loss=config.chunked_loss,
        fused_loss=config.fused_loss,
        zero3_config=run.ds_config if run.zero_stage == 3 else None,
        device=ranks.device,
    )
    load_initial_weights(model, config, ranks, partitioned=run.zero_stage == 3)
    return model
