"""One trial of ``compare``: the first steps of a run, measured. As a rank under the launcher, or the launcher's start.

Its steps are those of ``train`` (:func:`codeparrot_ds.training.loop.train_step`): warm-up and scored steps, then a
checkpoint, then a few steps that are taken apart and not scored. What a trial finds is written after each of these, so
that one that breaks has said all that it knew.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import hashlib
import os
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from codeparrot_ds.compare.results import (
    FOUND,
    OUT_OF_MEMORY,
    REFUSED,
    Failure,
    Found,
    PartsOfStep,
    SavedCheckpoint,
    Weights,
)
from codeparrot_ds.config.arguments import ArgumentParser, add_config_arguments, config_from_arguments
from codeparrot_ds.config.launch_options import add_launch_arguments, launch_from_arguments
from codeparrot_ds.config.run_config import RunConfig
from codeparrot_ds.durable import write_json
from codeparrot_ds.errors import UserError
from codeparrot_ds.json_files import read_object
from codeparrot_ds.metrics import TrainingRow
from codeparrot_ds.secret_forms import hide_secrets
from codeparrot_ds.supervision.heartbeat import beat
from codeparrot_ds.training.loop import Observer, accumulate_gradients, train_step

if TYPE_CHECKING:
    import torch

    from codeparrot_ds.resolved_run import ResolvedRun
    from codeparrot_ds.telemetry.step_parts import StepParts
    from codeparrot_ds.training.session import Session


ORDERS = "CODEPARROT_DS_TRIAL"
"""Environment variable: the JSON file with a trial's `Orders`."""


@dataclass(frozen=True, kw_only=True)
class Orders:
    """What a trial does, and where it writes what it finds."""

    steps: int
    """Warm-up and scored; all of them give losses."""
    parts_steps: int
    """Taken apart afterwards."""
    checkpoint: bool
    """Whether to save one."""
    noise: str | None = None
    """The precision whose rounding errors every layer makes at random; None for none."""
    peak_flops: float | None = None
    """Of all ranks together, for MFU; None lets the trial measure its own."""
    folder: str = ""
    """Gets ``found.json``, ``failure-<rank>.json`` and ``phase``."""

    @staticmethod
    def read() -> Orders:
        """Those of this process."""
        return Orders(**read_object(Path(os.environ[ORDERS])))


class _Recorder(Observer):
    """Keeps the training row of each step, and one number for its data rows, whatever their order and their ranks."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.hashes: list[int] = []

    def read(self, batch: torch.Tensor) -> None:
        if len(self.hashes) == len(self.rows):  # every step is logged: this one has no row yet
            self.hashes.append(0)
        for row in batch.numpy():
            digest = hashlib.blake2b(row.tobytes(), digest_size=8).digest()
            self.hashes[-1] = (self.hashes[-1] + int.from_bytes(digest, "little")) % 2**64

    def logged(self, row: TrainingRow) -> None:
        self.rows.append(row.as_json())


class _PartTimer(Observer):
    """Gives the time between two phases to a part of the step; the last part lasts until ``current`` is closed."""

    def __init__(self, parts: StepParts, current: contextlib.ExitStack) -> None:
        self._parts, self._current = parts, current

    def enter(self, phase: str, *, batch: int) -> None:
        self._current.close()
        self._current.enter_context(self._parts.part("optimizer" if phase == "step" else phase))


def run_trial(run: RunConfig | ResolvedRun, orders: Orders) -> None:
    """One rank of a trial; every rank of the launcher calls it with the same arguments."""
    folder, rank = Path(orders.folder), int(os.environ["RANK"])
    phase = "start"
    step = 0

    def enter(name: str) -> None:
        nonlocal phase
        phase = name
        if rank == 0:
            (folder / "phase").write_text(name, encoding="utf-8")

    def write() -> None:
        if rank == 0:
            write_json(folder / FOUND, found.as_json())

    try:
        enter("start")
        gc.disable()
        import deepspeed  # noqa: F401  what is resident before the model should hold the libraries
        from transformers import GPT2LMHeadModel  # noqa: F401

        from codeparrot_ds.training.setup import start_session

        before = resident_bytes()
        session = start_session(run, peak_flops=orders.peak_flops)
        gc.freeze()
        gc.enable()
        found = _introduce(session, before)
        if orders.noise is not None:
            from codeparrot_ds.compare.initial_weights import inject_rounding_noise

            inject_rounding_noise(session.engine.module, orders.noise, seed=session.config.seed * 1_000 + rank)
        batches, recorder = iter(session.loader), _Recorder()
        enter("steps")
        for step in range(1, orders.steps + 1):
            beat("agree", step=step)
            if session.stop.agreed():
                raise KeyboardInterrupt
            train_step(session, batches, step, recorder)
        _add_steps(found, session, recorder)
        write()
        if orders.checkpoint:
            enter("checkpoint")
            found.checkpoint = _checkpoint(session, orders.steps)
            write()
        if orders.parts_steps:
            enter("parts")
            found.parts = _take_apart(session, batches, orders.parts_steps)
            write()
        enter("end")
        session.finish(orders.steps, "finished")
    except BaseException as error:
        write_json(folder / f"failure-{rank}.json", asdict(describe_failure(error, phase, step, *_peaks())))
        raise


def _introduce(session: Session, before: int) -> Found:
    """What is known before the first step; collective."""
    import torch

    from codeparrot_ds.compare.initial_weights import engine_fingerprint

    ranks = session.ranks
    dtype, fingerprint = engine_fingerprint(session.engine, partitioned=session.run.zero_stage == 3)
    return Found(
        world_size=ranks.world_size,
        weights=Weights(dtype=dtype, sha256=fingerprint),
        data=ranks.broadcast(session.data.fingerprint),
        device=torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else "CPU",
        flops_per_token=session.meter.flops_per_token,
        peak_flops=session.meter.peak_flops,
        resident_before_bytes=ranks.gather(before),
    )


def _add_steps(found: Found, session: Session, recorder: _Recorder) -> None:
    """Adds what is known once the scored steps are done; collective."""
    from codeparrot_ds.engine.hardware import peak_memory_bytes

    ranks = session.ranks
    found.rows = recorder.rows
    sums = zip(*ranks.gather(recorder.hashes), strict=True)
    found.row_hashes = [f"{sum(parts) % 2**64:016x}" for parts in sums]
    found.startup_seconds = session.startup.laps
    if ranks.device.type == "cuda":
        found.device_peak_bytes = ranks.gather(peak_memory_bytes(ranks.device))
    found.resident_peak_bytes = ranks.gather(resident_bytes("VmHWM"))
    found.skipped_steps = session.engine.skipped_steps


def _checkpoint(session: Session, step: int) -> SavedCheckpoint:
    """Saves a checkpoint and waits for it; collective."""
    started = time.perf_counter()
    session.save(step)
    outcome = session.saver.wait()
    waited = time.perf_counter() - started
    if outcome is None:
        raise RuntimeError("the checkpoint left no outcome")
    return SavedCheckpoint(
        bytes=outcome.num_bytes,
        stall_seconds=max(session.ranks.gather(outcome.stall_seconds)),
        seconds=waited,
        error=None if outcome.error is None else str(outcome.error),
    )


def _take_apart(session: Session, batches: Iterator[Any], steps: int) -> PartsOfStep:
    """The parts of so many steps, means over steps and ranks; collective."""
    from codeparrot_ds.telemetry.step_parts import StepParts

    parts = StepParts(session.ranks.device)
    beat("evaluate")  # patience: nothing says in between where the rank is
    for _ in range(steps):
        with parts.step(), contextlib.ExitStack() as current:
            accumulate_gradients(session.engine, batches, session, _PartTimer(parts, current))
    tables = session.ranks.gather(parts.as_json())

    def mean(values: Iterable[float]) -> float:
        return sum(values) / len(tables)

    means = {
        "seconds": {name: mean(table["seconds"][name] for table in tables) for name in tables[0]["seconds"]},
        "total_seconds": mean(table["total_seconds"] for table in tables),
        "sent_bytes": mean(table["sent_bytes"] for table in tables),
    }
    return PartsOfStep(**tables[0] | means)


def _peaks() -> tuple[int, int | None]:
    """The most that this process had resident, and that its tensors took on its GPU; None without one."""
    torch = sys.modules.get("torch")  # what fails before it is imported has used no device
    on_gpu = torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized()
    return resident_bytes("VmHWM"), torch.cuda.max_memory_allocated() if torch is not None and on_gpu else None


def resident_bytes(field: str = "VmRSS") -> int:
    """Memory of this process that is resident: now, or the most ever with ``VmHWM``."""
    with open("/proc/self/status", encoding="ascii") as status:
        line = next(line for line in status if line.startswith(field))
    return int(line.split()[1]) * 1024


def main(arguments: list[str] | None = None) -> int:
    """A rank under a launcher; without one, the command that checks the run config and starts the launcher."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if "RANK" in os.environ:
        from codeparrot_ds.train import run_rank

        return run_rank(arguments, lambda run: run_trial(run, Orders.read()), "compare")
    parser = ArgumentParser(prog="codeparrot_ds.compare.trial", description="one trial of a comparison")
    add_config_arguments(parser)
    add_launch_arguments(parser)
    try:
        from codeparrot_ds.launch.start import front_door

        parsed = parser.parse_args(arguments)
        launch = launch_from_arguments(parsed)
        return front_door(config_from_arguments(parsed), launch, module="codeparrot_ds.compare.trial")
    except UserError as error:
        print(f"codeparrot-ds compare: error: {error}", file=sys.stderr, flush=True)
        return error.exit_code


# Of torch's allocators, CUDA, cuBLAS, NCCL and the C library.
_NO_MEMORY = ("can't allocate memory", "out of memory", "not enough memory", "cannot allocate memory", "alloc_failed")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device or the host has no more memory."""
    if isinstance(error, MemoryError) or any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__):
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError | OSError) and any(words in str(error).lower() for words in _NO_MEMORY)


def describe_failure(
    error: BaseException, phase: str, step: int, resident_peak_bytes: int, device_peak_bytes: int | None
) -> Failure:
    """What a rank that had begun a step in a phase broke of, with its memory at that moment."""
    kind = "error"
    if is_out_of_memory(error):
        kind = OUT_OF_MEMORY
    elif isinstance(error, UserError):
        kind = REFUSED
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return Failure(
        kind=kind,
        message=hide_secrets(lines[0]) if lines else type(error).__name__,
        type=type(error).__name__,
        phase=phase,
        step=step,
        device_peak_bytes=device_peak_bytes,
        resident_peak_bytes=resident_peak_bytes,
        traceback=hide_secrets("".join(traceback.format_exception(error)[-4:])),
    )


def processes_killed_for_memory(counters: Path = Path("/proc/vmstat")) -> int:
    """How many processes the system has killed since it started because memory ran out; 0 where it does not say."""
    try:
        lines = counters.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))


if __name__ == "__main__":
    code = main()
    if "RANK" not in os.environ:
        sys.exit(code)
    from codeparrot_ds.supervision.process_end import end_process

    end_process(code)
