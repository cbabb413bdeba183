"""One trial of a comparison from outside: a fresh process through the launcher, watched until it ends. No torch here.

Whatever happens to it becomes a result: finished, out of memory, crashed, hung or refused, with the step and the peak.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from codeparrot_ds import durable
from codeparrot_ds.child_process import last_words, python_path, run_module
from codeparrot_ds.compare.candidates import Request, Trial
from codeparrot_ds.compare.results import (
    CRASHED,
    FINISHED,
    FOUND,
    HUNG,
    OUT_OF_MEMORY,
    REFUSED,
    RESULT,
    Failure,
    Found,
    Peak,
    TrialResult,
    fingerprints,
    read_json,
)
from codeparrot_ds.compare.trial import ORDERS, Orders, processes_killed_for_memory
from codeparrot_ds.config.files import save_config
from codeparrot_ds.config.run_config import RunConfig
from codeparrot_ds.errors import UserError
from codeparrot_ds.json_files import parts_of, read_object
from codeparrot_ds.secret_forms import hide_secrets
from codeparrot_ds.supervision import watchdog
from codeparrot_ds.supervision.process_end import signal_at_parents_end
from codeparrot_ds.supervision.supervise import END_FILE
from codeparrot_ds.terminal import gigabytes

END = "end.json"
"""How the trial's own launcher saw its ranks end; see `END_FILE`."""
KILLED_BY_LAUNCHER = re.compile(r"'--local_rank=(\d+)'.* exits with return code = -9\b")
"""What DeepSpeed's launcher says of a process that it lost, and what nothing else says where a rank's guard is killed
(``launcher/launch.py``, ``sigkill_handler``)."""
POLL_SECONDS = 0.2
PROGRAM = (sys.executable, "-m", "codeparrot_ds.compare.trial")
WATCHDOG_SECONDS = 30.0
"""Longer than the trial's own watchdog has, which can say which rank hangs where."""
SAMPLE_SECONDS = 1.0
"""Between two looks at the memory of all processes: for a trial that is killed before it can say."""


@dataclass(frozen=True, kw_only=True)
class TrialRunner:
    """Runs the trials of a comparison."""

    request: Request
    folder: Path
    """Of the comparison."""
    peak: Peak | None = None
    """What all are held against for MFU; None lets each measure its own."""
    hang_seconds: float
    """The most that a rank may stay in one place."""
    program: Sequence[str] = PROGRAM
    """The command that runs a trial, less its options."""

    def __call__(self, trial: Trial, progress: Callable[[int], None] = lambda steps: None) -> TrialResult:
        """Runs a trial to its end and writes its ``result.json``; what an interrupted try left is removed.

        ``progress`` is given the number of steps done, now and then.

        Raises:
            UserError: its initial weights could not be made.
            KeyboardInterrupt: the user's; all its processes are gone and there is no result.
        """
        initial = initial_weights(self.request.config, self.folder, perturbed=trial.perturbed)
        orders = orders_of(self.request, trial, self.peak)
        place, run = (
            prepare_trial(trial, self.folder, initial=initial, orders=orders),
            self.folder / "runs" / trial.name,
        )
        started, killed_before = time.monotonic(), processes_killed_for_memory()
        with (place / "output.log").open("wb") as log:
            process = self._start(trial, place, log)
            try:
                silent_seconds = self.hang_seconds + WATCHDOG_SECONDS
                hung, peak_bytes = _wait(process, place, run / "metrics.jsonl", silent_seconds, progress)
            finally:
                end_processes(process)
        killed = processes_killed_for_memory() > killed_before
        result = dataclasses.replace(
            judge_end(process.returncode, hung, place, sampled_peak_bytes=peak_bytes, killed_for_memory=killed),
            name=trial.name,
            repeat=trial.repeat,
            seconds=round(time.monotonic() - started, 2),
            found=Found.read(place / FOUND),
        )
        durable.write_json(place / RESULT, result.as_json())
        shutil.rmtree(run / "checkpoints", ignore_errors=True)  # measured, and of no further use
        return result

    def _start(self, trial: Trial, place: Path, log: IO[bytes]) -> subprocess.Popen[bytes]:
        command = [*self.program, "--config", str(place / "config.yaml"), "--hang-seconds", f"{self.hang_seconds:g}"]
        command += ["--num-gpus", str(trial.candidate.world_size), "--ignore-memory-plan"]
        files = {ORDERS: place / "orders.json", END_FILE: place / END}
        environment = os.environ | {name: str(file.absolute()) for name, file in files.items()}
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment | {"PYTHONPATH": python_path(environment)},
            start_new_session=True,
            preexec_fn=signal_at_parents_end(signal.SIGKILL, os.getpid()),
        )


def prepare_trial(trial: Trial, folder: Path, *, initial: Path, orders: Orders) -> Path:
    """Makes a trial's folder with its ``config.yaml`` and ``orders.json``, and returns it."""
    place = folder / "trials" / trial.name
    shutil.rmtree(place, ignore_errors=True)
    shutil.rmtree(folder / "runs" / trial.name, ignore_errors=True)
    place.mkdir(parents=True)
    config = dataclasses.replace(
        trial.candidate.config,
        output_dir=str((folder / "runs").absolute()),
        run_name=trial.name,
        init_from=str(initial.absolute()),
        log_steps=1,
        wandb="off",
        hub="off",
        resume="never",
    )
    save_config(config, place / "config.yaml")
    orders = dataclasses.replace(orders, folder=str(place.absolute()))
    durable.write_json(place / "orders.json", dataclasses.asdict(orders))
    return place


def orders_of(request: Request, trial: Trial, peak: Peak | None) -> Orders:
    """What a trial does: parts and a checkpoint are measured once for each candidate; the peak is one for all."""
    first = trial.repeat == 0 and not trial.perturbed
    return Orders(
        steps=request.steps,
        parts_steps=request.parts_steps if first else 0,
        checkpoint=request.checkpoint and first,
        noise=trial.perturbed,
        peak_flops=None if peak is None else peak.of_ranks(trial.candidate.world_size),
    )


def _wait(
    process: subprocess.Popen[bytes], place: Path, metrics: Path, silent_seconds: float, progress: Callable[[int], None]
) -> tuple[bool, int]:
    """Waits for a trial's end: whether it was ended because it wrote nothing for so long, and its peak of memory.

    Ranks that hang are found by the trial's own launcher, which watches their heartbeats. This is for what that cannot
    see: itself, the checks before there are ranks, and a start, to which it gives half an hour.
    """
    files = [place / "output.log", place / "phase", place / FOUND]
    last_sign, signs, sampled, peak_bytes = time.monotonic(), None, 0.0, 0
    while process.poll() is None:
        time.sleep(POLL_SECONDS)
        now = time.monotonic()
        if now - sampled < SAMPLE_SECONDS:
            continue
        sampled = now
        peak_bytes = max(peak_bytes, resident_bytes_of(process.pid))
        steps = _count_lines(metrics) or 0
        progress(steps)
        found = (steps, *(file.stat().st_mtime_ns if file.is_file() else 0 for file in files))
        if found != signs:
            last_sign, signs = now, found
        elif now - last_sign > silent_seconds:
            end_processes(process)
            return True, peak_bytes
    return False, peak_bytes


def _count_lines(file: Path) -> int | None:
    return file.read_bytes().count(b"\n") if file.is_file() else None


def resident_bytes_of(root: int) -> int:
    """Resident memory of a process and all under it; what they share counts for each."""
    import psutil

    total = 0
    try:
        root_process = psutil.Process(root)
        processes = [root_process, *root_process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            total += process.memory_info().rss
    return total


def end_processes(process: subprocess.Popen[bytes]) -> None:
    """Kills a trial's process and everything under it; stopped and hung ones too."""
    import psutil

    if process.poll() is not None:
        return
    try:
        root = psutil.Process(process.pid)
        everything = [*root.children(recursive=True), root]
    except psutil.NoSuchProcess:
        everything = []
    for each in everything:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    process.wait()
    psutil.wait_procs(everything, timeout=10)


def judge_end(
    code: int, hung: bool, place: Path, *, sampled_peak_bytes: int, killed_for_memory: bool = False
) -> TrialResult:
    """What became of a trial, from its exit code and what its ranks and its launcher wrote.

    Args:
        code: of its first process.
        hung: it was ended for writing nothing.
        place: its folder.
        sampled_peak_bytes: the most that all its processes were seen to have resident.
        killed_for_memory: the system killed some process meanwhile because memory ran out.
    """
    phase = (place / "phase").read_text(encoding="utf-8") if (place / "phase").is_file() else "start"
    if code == 0 and not hung and (place / FOUND).is_file():
        return TrialResult(status=FINISHED, phase=phase)
    failures = list(_failures(place))
    memory = next((failure for failure in failures if failure.kind == OUT_OF_MEMORY), None)
    failed = memory or next((failure for failure in failures if failure.type != "SharedError"), None)
    failed = failed or next(iter(failures), None)
    run = place.parent.parent / "runs" / place.name
    step, peak_bytes = _count_lines(run / "metrics.jsonl"), sampled_peak_bytes
    if failed is not None:
        phase, step, peak_bytes = failed.phase, failed.step, max(failure.peak_bytes for failure in failures)
    where = f"in step {step}" if phase == "steps" else f"in its {phase} phase"

    def ended(status: str, reason: str, peak_bytes: int = peak_bytes) -> TrialResult:
        return TrialResult(status=status, reason=reason, phase=phase, step=step, peak_bytes=peak_bytes)

    log = (place / "output.log").read_text(encoding="utf-8", errors="replace")
    verdict = _verdict(place)
    if verdict is not None and verdict.code == watchdog.HUNG:
        stacks = f"; every rank's Python stacks are in {run / 'log'}" if verdict.dump else ""
        return ended(HUNG, verdict.sentence + stacks)
    if hung:
        return ended(HUNG, f"wrote nothing for too long {f'after step {step}' if step else where} and was ended")
    if memory is not None:
        return ended(OUT_OF_MEMORY, f"{where}, at a peak of {gigabytes(peak_bytes)}: {memory.message}")
    killed = KILLED_BY_LAUNCHER.search(log)
    lost = verdict.sentence if verdict is not None and verdict.code == watchdog.LOST else None
    if lost or killed or code in (-signal.SIGKILL, 128 + signal.SIGKILL):
        # What other ranks say is of their lost peer.
        if killed_for_memory:
            reason = f"the system's, {where}, at a peak of {gigabytes(sampled_peak_bytes)} in all"
            return ended(OUT_OF_MEMORY, reason, sampled_peak_bytes)
        who = f"rank {killed[1]}" if killed else "a process"
        return ended(CRASHED, lost or f"{who} was killed by SIGKILL {where}")
    if failed is not None and failed.kind == REFUSED:
        return ended(REFUSED, failed.message)
    if failed is None and code == UserError.exit_code:
        return ended(REFUSED, _last_error(log))
    what = f"{failed.type}: {failed.message}" if failed is not None else _last_error(log)
    return ended(CRASHED, f"{what} ({where}; exit code {code}; see {place / 'output.log'})")


def _failures(place: Path) -> Iterator[Failure]:
    """What the trial's ranks wrote of what they broke of."""
    for path in sorted(place.glob("failure-*.json")):
        with parts_of(path):
            failure = Failure.from_json(read_object(path))
            int(failure.step), int(failure.peak_bytes)
        yield failure


def _last_error(log: str) -> str:
    """What a trial that left no failure said last, with the words of a refusal first; libraries say what they like."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if "error: " in line]
    chosen = (errors or lines or ["it said nothing"])[-1]
    return hide_secrets(chosen.partition("error: ")[2] or chosen)


def _verdict(place: Path) -> watchdog.Verdict | None:
    """What the trial's own launcher found wrong with its ranks."""
    saved = (read_json(place / END) or {}).get("verdict")
    with parts_of(place / END):
        return None if saved is None else watchdog.Verdict(**saved)


def initial_weights(config: RunConfig, folder: Path, *, perturbed: str | None = None) -> Path:
    """The model folder that trials begin with, made when it is not there.

    Args:
        config: the run config that all trials share.
        folder: of the comparison.
        perturbed: those of the sensitivity run of this precision.

    Raises:
        UserError: it could not be made.
    """
    place = folder / (f"perturbed-{perturbed}" if perturbed else "initial")
    if fingerprints(place) is not None:
        return place
    making = place.with_name(f".{place.name}.making")
    shutil.rmtree(making, ignore_errors=True)
    shutil.rmtree(place, ignore_errors=True)
    if config.auto_micro_batch:  # each candidate chooses its own; it changes no weight
        config = dataclasses.replace(config, micro_batch_size=1)
    save_config(config, folder / "initial.yaml")
    arguments = [str(folder / "initial.yaml"), str(making), *([perturbed] if perturbed else [])]
    made = run_module("codeparrot_ds.compare.initial_weights", *arguments)
    if made.returncode != 0:
        raise UserError(f"the initial weights could not be made: {last_words(made)}")
    durable.rename(making, place)
    return place
