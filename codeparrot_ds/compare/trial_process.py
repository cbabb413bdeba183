"""One trial of a comparison from outside: a fresh process through the launcher, watched until it ends. No torch here.

Whatever happens to it becomes a result: finished, out of memory, crashed, hung or refused, with the step and the peak.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from codeparrot_ds import durable
from codeparrot_ds.child_process import last_words, python_path, run_module
from codeparrot_ds.compare.candidates import FINGERPRINTS, FINISHED, RESULT, Request, Trial
from codeparrot_ds.compare.peak import Peak
from codeparrot_ds.compare.trial import OUT_OF_MEMORY, REFUSED, processes_killed_for_memory
from codeparrot_ds.config.files import save_config
from codeparrot_ds.config.run_config import RunConfig
from codeparrot_ds.durable import rename
from codeparrot_ds.errors import UserError
from codeparrot_ds.supervision.process_end import signal_at_parents_end
from codeparrot_ds.terminal import gigabytes

FOUND = "found.json"
HUNG, CRASHED = "hung", "crashed"
_TOLD = re.compile(r"^codeparrot-ds train: (rank lost|hang): (.+)$", re.MULTILINE)
"""What the watchdog of a trial says of its ranks."""
_KILLED = re.compile(r"'--local_rank=(\d+)'.* exits with return code = -9\b")
"""What DeepSpeed's launcher says of the rank that it lost (``launcher/launch.py``, ``sigkill_handler``)."""
POLL_SECONDS = 0.2
PROGRAM = (sys.executable, "-m", "codeparrot_ds.compare.trial")
WATCHDOG_SECONDS = 30.0
"""Longer than the trial's own watchdog has, which can say which rank hangs where."""
SAMPLE_SECONDS = 1.0
"""Between two looks at the memory of all processes: for a trial that is killed before it can say."""


def run_trial(
    trial: Trial,
    folder: Path,
    *,
    initial: Path,
    orders: dict[str, Any],
    hang_seconds: float,
    progress: Callable[[int], None],
    program: Sequence[str] = PROGRAM,
) -> dict[str, Any]:
    """Runs a trial to its end and writes its ``result.json``; what an earlier, interrupted try left is removed.

    Args:
        trial: what to run.
        folder: of the comparison.
        initial: the model folder that it begins with.
        orders: those of ``trial.Orders``, less its folder.
        hang_seconds: a trial that writes nothing for so long is ended.
        progress: told of the steps done, now and then.
        program: the command, less its options.

    Raises:
        KeyboardInterrupt: the user's; all its processes are gone and there is no result.
    """
    place, run = prepare_trial(trial, folder, initial=initial, orders=orders), folder / "runs" / trial.name
    command = [*program, "--config", str(place / "config.yaml")]
    command += ["--num-gpus", str(trial.candidate.world_size), "--hang-seconds", f"{hang_seconds:g}"]
    command += ["--ignore-memory-plan"]
    environment = os.environ | {"CODEPARROT_DS_TRIAL": str((place / "orders.json").absolute())}
    environment["PYTHONPATH"] = python_path(environment)
    started, killed_before = time.monotonic(), processes_killed_for_memory()
    with (place / "output.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            preexec_fn=signal_at_parents_end(signal.SIGKILL, os.getpid()),
        )
        watch = _Watch(process, place, run, hang_seconds, progress)
        try:
            hung = watch.wait()
        finally:
            end_processes(process)
    killed = processes_killed_for_memory() > killed_before
    result = judge_end(process.returncode, hung, place, sampled_peak_bytes=watch.peak_bytes, killed_for_memory=killed)
    result |= {"name": trial.name, "repeat": trial.repeat, "seconds": round(time.monotonic() - started, 2)}
    result["found"] = _read(place / FOUND)
    durable.write_json(place / RESULT, result)
    shutil.rmtree(run / "checkpoints", ignore_errors=True)  # measured, and of no further use
    return result


def prepare_trial(trial: Trial, folder: Path, *, initial: Path, orders: dict[str, Any]) -> Path:
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
    durable.write_json(place / "orders.json", orders | {"folder": str(place.absolute())})
    return place


def orders_of(request: Request, trial: Trial, peak: Peak | None) -> dict[str, Any]:
    """What a trial does: parts and a checkpoint are measured once for each candidate; the peak is one for all."""
    first = trial.repeat == 0 and not trial.perturbed
    return {
        "steps": request.steps,
        "parts_steps": request.parts_steps if first else 0,
        "checkpoint": request.checkpoint and first,
        "noise": trial.perturbed,
        "peak_flops": None if peak is None else peak.of_ranks(trial.candidate.world_size),
    }


class _Watch:
    """Waits for a trial's process, looks whether it gets on, and samples the memory of all its processes."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        place: Path,
        run: Path,
        hang_seconds: float,
        progress: Callable[[int], None],
    ) -> None:
        self._process, self._place, self._run = process, place, run
        self._hang_seconds, self._progress = hang_seconds, progress
        self.peak_bytes = 0

    def wait(self) -> bool:
        """Waits for the end; True when it was ended for writing nothing too long."""
        last_sign, signs, sampled = time.monotonic(), None, 0.0
        while self._process.poll() is None:
            time.sleep(POLL_SECONDS)
            now = time.monotonic()
            if now - sampled < SAMPLE_SECONDS:
                continue
            sampled = now
            self.peak_bytes = max(self.peak_bytes, resident_bytes_of(self._process.pid))
            found = self._signs()
            self._progress(found[0])
            if found != signs:
                last_sign, signs = now, found
            elif now - last_sign > self._hang_seconds + WATCHDOG_SECONDS:
                end_processes(self._process)
                return True
        return False

    def _signs(self) -> tuple[int, ...]:
        """The steps done and the sizes of what a trial writes: they grow while it lives."""
        metrics = self._run / "metrics.jsonl"
        steps = metrics.read_bytes().count(b"\n") if metrics.is_file() else 0
        files = [self._place / "output.log", self._place / "phase", self._place / FOUND]
        return (steps, *(file.stat().st_mtime_ns if file.is_file() else 0 for file in files))


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
) -> dict[str, Any]:
    """What became of a trial, from its exit code and what its ranks wrote.

    Args:
        code: of its first process.
        hung: it was ended for writing nothing.
        place: its folder.
        sampled_peak_bytes: the most that all its processes were seen to have resident.
        killed_for_memory: the system killed some process meanwhile because memory ran out.

    Returns:
        ``status`` (one of finished, out of memory, crashed, hung, refused), ``reason`` in one sentence, ``phase`` and
        ``step`` where it broke, and ``peak_bytes`` at that moment: of the device where there is one, else resident.
    """
    failures = [failure for path in sorted(place.glob("failure-*.json")) if (failure := _read(path)) is not None]
    phase = (place / "phase").read_text(encoding="utf-8") if (place / "phase").is_file() else "start"
    if code == 0 and not hung and (place / FOUND).is_file():
        return {"status": FINISHED, "reason": None, "phase": phase, "step": None, "peak_bytes": None}
    result: dict[str, Any] = {"phase": phase, "step": _last_step(place), "peak_bytes": sampled_peak_bytes}
    memory = next((failure for failure in failures if failure["kind"] == OUT_OF_MEMORY), None)
    failed = memory or next((failure for failure in failures if failure["type"] != "SharedError"), None)
    failed = failed or next(iter(failures), None)
    if failed is not None:
        peaks = [failure["device_peak_bytes"] or failure["resident_peak_bytes"] for failure in failures]
        result |= {"phase": failed["phase"], "step": failed["step"], "peak_bytes": max(peaks)}
    where = f"in step {result['step']}" if result["phase"] == "steps" else f"in its {result['phase']} phase"
    log = (place / "output.log").read_text(encoding="utf-8", errors="replace")
    told = _TOLD.search(log)
    kind, sentence = told.groups() if told else (None, None)
    if kind == "hang":
        return result | {"status": HUNG, "reason": sentence}
    if hung:
        after = f"after step {result['step']}" if result["step"] else where
        return result | {"status": HUNG, "reason": f"wrote nothing for too long {after} and was ended"}
    if memory is not None:
        reason = f"{where}, at a peak of {gigabytes(result['peak_bytes'])}: {memory['message']}"
        return result | {"status": OUT_OF_MEMORY, "reason": reason}
    killed = _KILLED.search(log)
    if kind == "rank lost" or killed or code in (-signal.SIGKILL, 128 + signal.SIGKILL):
        # What other ranks say is of their lost peer.
        if killed_for_memory:
            reason = f"the system's, {where}, at a peak of {gigabytes(sampled_peak_bytes)} in all"
            return result | {"status": OUT_OF_MEMORY, "reason": reason, "peak_bytes": sampled_peak_bytes}
        who = f"rank {killed[1]}" if killed else "a process"
        return result | {"status": CRASHED, "reason": sentence or f"{who} was killed by SIGKILL {where}"}
    if failed is not None and failed["kind"] == REFUSED:
        return result | {"status": REFUSED, "reason": failed["message"]}
    if failed is None and code == UserError.exit_code:
        return result | {"status": REFUSED, "reason": _last_error(log)}
    what = f"{failed['type']}: {failed['message']}" if failed is not None else _last_error(log)
    return result | {"status": CRASHED, "reason": f"{what} ({where}; exit code {code}; see {place / 'output.log'})"}


def _last_step(place: Path) -> int | None:
    metrics = place.parent.parent / "runs" / place.name / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.is_file() else None


def _last_error(log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    told = [line for line in lines if "error: " in line]
    chosen = (told or lines or ["it said nothing"])[-1]
    return chosen.partition("error: ")[2] or chosen


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None


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
    save_config(config, folder / "initial.yaml")
    arguments = [str(folder / "initial.yaml"), str(making), *([perturbed] if perturbed else [])]
    made = run_module("codeparrot_ds.compare.initial_weights", *arguments)
    if made.returncode != 0:
        raise UserError(f"the initial weights could not be made: {last_words(made)}")
    rename(making, place)
    return place


def fingerprints(place: Path) -> dict[str, str] | None:
    """The hash of a folder's weights by dtype (``float32``, ``bfloat16``, ``float16``); None where it is not whole."""
    try:
        return dict(json.loads((place / FINGERPRINTS).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None
