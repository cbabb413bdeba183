"""One trial of ``compare``: the first steps of a run, measured. As a rank under the launcher, or the launcher's start.

The loop is that of ``train`` with the same parts and in the same order: warm-up and scored steps, then a checkpoint,
then a few steps that are taken apart and not scored. What a trial finds is written after each of these, so that one
that breaks has said all that it knew.
"""

from __future__ import annotations

import errno
import gc
import hashlib
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from codeparrot_ds.config.arguments import ArgumentParser, add_config_arguments, config_from_arguments
from codeparrot_ds.config.launch_options import add_launch_arguments, launch_from_arguments
from codeparrot_ds.config.run_config import RunConfig
from codeparrot_ds.durable import write_json
from codeparrot_ds.errors import UserError
from codeparrot_ds.supervision.heartbeat import beat

if TYPE_CHECKING:
    from codeparrot_ds.training.session import Session


ORDERS = "CODEPARROT_DS_TRIAL"
"""Environment variable: the JSON file with a trial's `Orders`."""


@dataclass(frozen=True, kw_only=True)
class Orders:
    """What a trial does, and where it writes what it finds.

    Attributes:
        steps: warm-up and scored steps; all of them give losses.
        parts_steps: steps that are taken apart afterwards.
        checkpoint: whether to save one.
        noise: the precision whose rounding errors every layer makes at random; None for none.
        peak_flops: of all ranks together, for MFU; None lets the trial measure its own.
        folder: gets ``found.json``, ``failure-<rank>.json`` and ``phase``.
    """

    steps: int
    parts_steps: int
    checkpoint: bool
    folder: str
    noise: str | None = None
    peak_flops: float | None = None

    @staticmethod
    def read() -> Orders:
        """Those of this process."""
        return Orders(**json.loads(Path(os.environ[ORDERS]).read_text(encoding="utf-8")))

    def write(self, path: Path) -> None:
        """Writes them where a trial reads them."""
        write_json(path, asdict(self))


class RowHashes:
    """A loader's micro-batches, with one number a step for the rows in them, whatever their order and their ranks."""

    def __init__(self, batches: Iterator[Any], micro_batches: int) -> None:
        self._batches, self._micro_batches = batches, micro_batches
        self._seen = 0
        self.steps: list[int] = []

    def __iter__(self) -> RowHashes:
        return self

    def __next__(self) -> Any:
        batch = next(self._batches)
        if self._seen % self._micro_batches == 0:
            self.steps.append(0)
        self._seen += 1
        for row in batch.numpy():
            digest = hashlib.blake2b(row.tobytes(), digest_size=8).digest()
            self.steps[-1] = (self.steps[-1] + int.from_bytes(digest, "little")) % 2**64
        return batch


def run_trial(config: RunConfig, orders: Orders) -> None:
    """One rank of a trial; every rank of the launcher calls it with the same arguments."""
    folder, rank = Path(orders.folder), int(os.environ["RANK"])
    phase = "start"
    step = 0

    def enter(name: str) -> None:
        nonlocal phase
        phase = name
        if rank == 0:
            (folder / "phase").write_text(name, encoding="utf-8")

    try:
        enter("start")
        gc.disable()
        import deepspeed  # noqa: F401  what is resident before the model should hold the libraries
        from transformers import GPT2LMHeadModel  # noqa: F401

        from codeparrot_ds.training.setup import start_session

        before = resident_bytes()
        session = start_session(config, peak_flops=orders.peak_flops)
        gc.freeze()
        gc.enable()
        found = _introduce(session, before)
        if orders.noise is not None:
            from codeparrot_ds.compare.initial_weights import inject_rounding_noise

            inject_rounding_noise(session.engine.module, orders.noise, seed=config.seed * 1_000 + rank)
        batches = RowHashes(iter(session.loader), session.accumulation_steps)
        enter("steps")
        for step in range(1, orders.steps + 1):
            beat("agree", step=step)
            if session.stop.agreed():
                raise KeyboardInterrupt
            found["rows"].append(_step(session, batches, step))
        found |= _after_steps(session, batches)
        _write(session, folder, found)
        if orders.checkpoint:
            enter("checkpoint")
            found["checkpoint"] = _checkpoint(session, orders.steps)
            _write(session, folder, found)
        if orders.parts_steps:
            enter("parts")
            found["parts"] = _take_apart(session, batches, orders.parts_steps)
            _write(session, folder, found)
        enter("end")
        session.finish(orders.steps, "finished")
    except BaseException as error:
        _write_failure(folder / f"failure-{rank}.json", error, phase, step)
        raise


def _introduce(session: Session, before: int) -> dict[str, Any]:
    """What is known before the first step."""
    from codeparrot_ds.compare.initial_weights import engine_fingerprint
    from codeparrot_ds.ds_config.facts import zero_stage

    dtype, fingerprint = engine_fingerprint(session.engine, partitioned=zero_stage(session.ds_config) == 3)
    return {
        "world_size": session.ranks.world_size,
        "weights": {"dtype": dtype, "sha256": fingerprint},
        "data": session.ranks.broadcast(session.fingerprint),
        "device": _device_name(session),
        "flops_per_token": session.meter.flops_per_token,
        "peak_flops": session.meter.peak_flops,
        "resident_before_bytes": session.ranks.gather(before),
        "rows": [],
    }


def _step(session: Session, batches: RowHashes, step: int) -> dict[str, Any]:
    """One optimizer step as ``train`` makes it, logged."""
    from codeparrot_ds.training.loop import accumulate_gradients

    losses = accumulate_gradients(session.engine, batches, session)
    session.bad_steps.check(step)
    if step == 1:
        session.first_step_done()
    row = session.meter.row(step, session.mean_loss(losses.sum()), session.engine)
    session.tracker.train(row)
    session.progress.show(row, 0.0)
    return row.as_json()


def _after_steps(session: Session, batches: RowHashes) -> dict[str, Any]:
    """What the scored steps leave to be told; collective."""
    from codeparrot_ds.engine.hardware import peak_memory_bytes

    sums = zip(*session.ranks.gather(batches.steps), strict=True)
    is_gpu = session.ranks.device.type == "cuda"
    return {
        "row_hashes": [f"{sum(parts) % 2**64:016x}" for parts in sums],
        "startup_seconds": session.startup.laps,
        "device_peak_bytes": session.ranks.gather(peak_memory_bytes(session.ranks.device)) if is_gpu else None,
        "resident_peak_bytes": session.ranks.gather(resident_bytes("VmHWM")),
        "skipped_steps": session.engine.skipped_steps,
    }


def _checkpoint(session: Session, step: int) -> dict[str, Any]:
    """Saves a checkpoint and waits for it: its bytes and seconds; collective."""
    started = time.perf_counter()
    session.save(step)
    outcome = session.saver.wait()
    waited = time.perf_counter() - started
    if outcome is None:
        raise RuntimeError("the checkpoint left no outcome")
    problem = None if outcome.error is None else str(outcome.error)
    stall = max(session.ranks.gather(outcome.stall_seconds))
    return {"bytes": outcome.num_bytes, "stall_seconds": stall, "seconds": waited, "error": problem}


def _take_apart(session: Session, batches: RowHashes, steps: int) -> dict[str, Any]:
    """The parts of so many steps, means over steps and ranks; collective."""
    from codeparrot_ds.telemetry.step_parts import StepParts

    parts = StepParts(session.ranks.device)
    beat("evaluate")  # patience: nothing says in between where the rank is
    for _ in range(steps):
        with parts.step():
            session.bad_steps.begin()
            for _ in range(session.accumulation_steps):
                with parts.part("data"):
                    batch = next(batches)
                    inputs = session.model_inputs(batch)
                with parts.part("forward"):
                    loss = session.engine(**inputs).loss
                session.bad_steps.watch(batch, loss)
                with parts.part("backward"):
                    session.engine.backward(loss)
                with parts.part("optimizer"):
                    session.engine.step()
    tables = session.ranks.gather(parts.as_json())
    mean = tables[0]
    for table in tables[1:]:
        mean["total_seconds"] += table["total_seconds"]
        mean["sent_bytes"] += table["sent_bytes"]
        mean["seconds"] = {name: mean["seconds"][name] + table["seconds"][name] for name in mean["seconds"]}
    count = len(tables)
    mean["seconds"] = {name: seconds / count for name, seconds in mean["seconds"].items()}
    return mean | {"total_seconds": mean["total_seconds"] / count, "sent_bytes": mean["sent_bytes"] / count}


def _write(session: Session, folder: Path, found: dict[str, Any]) -> None:
    if session.ranks.is_main:
        write_json(folder / "found.json", found)


def _write_failure(path: Path, error: BaseException, phase: str, step: int) -> None:
    """What this rank broke of, for ``compare``; the error itself goes its way."""

    torch = sys.modules.get("torch")  # what fails before it is imported has used no device
    on_gpu = torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized()
    device_peak = torch.cuda.max_memory_allocated() if torch is not None and on_gpu else None
    peak = resident_bytes("VmHWM")
    write_json(path, describe_failure(error, phase, step, resident_peak_bytes=peak, device_peak_bytes=device_peak))


def _device_name(session: Session) -> str:
    import torch

    device = session.ranks.device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def resident_bytes(field: str = "VmRSS") -> int:
    """Memory of this process that is resident: now, or the most ever with ``VmHWM``."""
    with open("/proc/self/status", encoding="ascii") as status:
        line = next(line for line in status if line.startswith(field))
    return int(line.split()[1]) * 1024


def main(arguments: list[str] | None = None) -> int:
    """A rank under a launcher; without one, the front door that checks the run config and starts the launcher."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if "RANK" in os.environ:
        from codeparrot_ds.train import run_rank

        return run_rank(arguments, lambda config: run_trial(config, Orders.read()), "compare")
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


OUT_OF_MEMORY, REFUSED, ERROR = "out of memory", "refused", "error"
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
    error: BaseException, phase: str, step: int, *, resident_peak_bytes: int, device_peak_bytes: int | None
) -> dict[str, Any]:
    """A failure for ``failure-<rank>.json``: its kind, one sentence, the phase, and memory at that moment.

    Args:
        error: what was raised.
        phase: of the trial.
        step: the last step that was begun.
        resident_peak_bytes: of this process.
        device_peak_bytes: tensors on this rank's GPU; None on a CPU.
    """
    kind = ERROR
    if is_out_of_memory(error):
        kind = OUT_OF_MEMORY
    elif isinstance(error, UserError):
        kind = REFUSED
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return {
        "kind": kind,
        "message": lines[0] if lines else type(error).__name__,
        "type": type(error).__name__,
        "phase": phase,
        "step": step,
        "device_peak_bytes": device_peak_bytes,
        "resident_peak_bytes": resident_peak_bytes,
        "traceback": "".join(traceback.format_exception(error)[-4:]),
    }


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
