"""What a rank measures while it trains: speed against the devices' peak, memory against its plan, steps to profile."""

from __future__ import annotations

import logging
import socket
from typing import Any

from codeparrot_ds.checkpoint.run_folder import RunFolder
from codeparrot_ds.checkpoint.state import RunState
from codeparrot_ds.data.loader import TrainingLoader
from codeparrot_ds.engine.hardware import peak_flops
from codeparrot_ds.engine.ranks import Ranks
from codeparrot_ds.memory.check import MemoryCheck, forget_peak, measure_gpu
from codeparrot_ds.memory.device import load_overhead
from codeparrot_ds.memory.plan import predict
from codeparrot_ds.model.shapes import flops_per_token
from codeparrot_ds.resolved_run import ResolvedRun
from codeparrot_ds.telemetry.meter import Meter
from codeparrot_ds.telemetry.profiler import StepProfiler
from codeparrot_ds.telemetry.rank_times import RankTimes
from codeparrot_ds.telemetry.tracking import Progress

logger = logging.getLogger("codeparrot_ds.measuring")


def start_meter(
    run: ResolvedRun,
    ranks: Ranks,
    folder: RunFolder,
    loader: TrainingLoader,
    progress: Progress,
    restored: RunState | None,
    peak: float | None,
) -> Meter:
    """The run's meter; collective. ``peak``: FLOP/s of all ranks, for MFU; None asks the devices."""
    if peak is None:
        mine, source = peak_flops(ranks.device, run.precision)
        logger.debug("peak of this rank: %.3g FLOP/s (%s)", mine, source)
        peak = sum(ranks.gather(mine))
    if ranks.is_main:
        folder.update(peak_flops=peak)
    hosts = ranks.gather(socket.gethostname())
    step = restored.step if restored else 0
    meter = Meter(
        loader=loader,
        tokens_per_step=run.config.global_batch_size * run.config.seq_length,
        flops_per_token=flops_per_token(run.shape, run.config.seq_length),
        peak_flops=peak,
        device=ranks.device,
        tokens=restored.tokens if restored else 0,
        step=step,
        max_train_steps=run.config.max_train_steps,
        rank_times=RankTimes(ranks, hosts, run.zero_stage) if ranks.world_size > 1 else None,
    )
    meter.memory_check = _memory_check(run, ranks, folder, progress, step)
    return meter


def _memory_check(
    run: ResolvedRun, ranks: Ranks, folder: RunFolder, progress: Progress, step: int
) -> MemoryCheck | None:
    """What compares a GPU run's memory with its plan; None on the other ranks, and on CPUs, where nothing counts it."""
    if ranks.device.type != "cuda":
        return None
    forget_peak(ranks.device)
    if not ranks.is_main:
        return None
    return MemoryCheck(
        predict(run.config, run.shape, run.ds_config, run.world_size),
        library_bytes=load_overhead().fixed_bytes,
        measure=lambda: measure_gpu(ranks.device),
        say=progress.say,
        record=lambda memory: folder.update(memory=memory),
        first_step=step,
    )


def open_profiler(
    run: ResolvedRun, ranks: Ranks, folder: RunFolder, engine: Any, meter: Meter, progress: Progress, step: int
) -> StepProfiler | None:
    """On rank 0 of a start with ``--profile``."""
    if not run.config.profile or not ranks.is_main:
        return None
    return StepProfiler(
        engine=engine,
        loader=meter.loader,
        device=ranks.device,
        folder=folder.path,
        num_steps=run.config.profile,
        first_step=step + 1,
        say=progress.say,
        pause=meter.pause,
    )
