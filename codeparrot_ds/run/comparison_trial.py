"""One trial of a comparison from outside: a fresh process through the launcher, watched until it ends. No torch here.

Whatever happens to it becomes a result: finished, out of memory, crashed, hung or refused, with the step and the peak.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from codeparrot_ds import durable
from codeparrot_ds.config import save_config
from codeparrot_ds.errors import UserError
from codeparrot_ds.run.comparison import Trial
from codeparrot_ds.run.device_memory import gigabytes
from codeparrot_ds.run.parent_end import signal_at_parents_end

POLL_SECONDS = 0.2
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
) -> dict[str, Any]:
    """Runs a trial to its end and writes its ``result.json``; what an earlier, interrupted try left is removed.

    Args:
        trial: what to run.
        folder: of the comparison.
        initial: the model folder that it begins with.
        orders: ``steps``, ``parts_steps`` and ``checkpoint`` of ``trial.Orders``.
        hang_seconds: a trial that writes nothing for so long is ended.
        progress: told of the steps done, now and then.

    Raises:
        KeyboardInterrupt: the user's; all its processes are gone and there is no result.
    """
    place, run = folder / "trials" / trial.name, folder / "runs" / trial.name
    shutil.rmtree(place, ignore_errors=True)
    shutil.rmtree(run, ignore_errors=True)
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
    command = [sys.executable, "-m", "codeparrot_ds.trial", "--config", str(place / "config.yaml")]
    command += ["--num-gpus", str(trial.candidate.world_size), "--ignore-memory-plan"]
    environment = os.environ | {"CODEPARROT_DS_TRIAL": str((place / "orders.json").absolute())}
    package_parent = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [package_parent, environment.get("PYTHONPATH")]))
    started = time.monotonic()
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
    result = judge_end(process.returncode, hung, place, watch.peak_bytes)
    result |= {"name": trial.name, "repeat": trial.repeat, "seconds": round(time.monotonic() - started, 2)}
    result["found"] = _read(place / "found.json")
    durable.write_json(place / "result.json", result)
    shutil.rmtree(run / "checkpoints", ignore_errors=True)  # measured, and of no further use
    return result


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
            elif now - last_sign > self._hang_seconds:
                end_processes(self._process)
                return True
        return False

    def _signs(self) -> tuple[int, ...]:
        """The steps done and the sizes of what a trial writes: they grow while it lives."""
        metrics = self._run / "metrics.jsonl"
        steps = metrics.read_bytes().count(b"\n") if metrics.is_file() else 0
        files = [self._place / "output.log", self._place / "phase", self._place / "found.json"]
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


def judge_end(code: int, hung: bool, place: Path, sampled_peak_bytes: int) -> dict[str, Any]:
    """What became of a trial, from its exit code and what its ranks wrote.

    Returns:
        ``status`` (one of finished, out of memory, crashed, hung, refused), ``reason`` in one sentence, ``phase`` and
        ``step`` where it broke, and ``peak_bytes`` at that moment: of the device where there is one, else resident.
    """
    failures = [failure for path in sorted(place.glob("failure-*.json")) if (failure := _read(path)) is not None]
    phase = (place / "phase").read_text(encoding="utf-8") if (place / "phase").is_file() else "start"
    if code == 0 and not hung:
        return {"status": "finished", "reason": None, "phase": phase, "step": None, "peak_bytes": None}
    result: dict[str, Any] = {"phase": phase, "step": _last_step(place), "peak_bytes": sampled_peak_bytes}
    peaks = [failure["device_peak_bytes"] or failure["resident_peak_bytes"] for failure in failures]
    memory = next((failure for failure in failures if failure["kind"] == "out of memory"), None)
    failed = memory or next((failure for failure in failures if failure["type"] != "SharedError"), None)
    failed = failed or next(iter(failures), None)
    if failed is not None:
        result |= {"phase": failed["phase"], "step": failed["step"]}
    if peaks:
        result["peak_bytes"] = max(peaks)
    if hung:
        where = f"after step {result['step']}" if result["step"] else f"in its {phase} phase"
        return result | {"status": "hung", "reason": f"wrote nothing for too long {where} and was ended"}
    if memory is not None:
        peak = gigabytes(result["peak_bytes"])
        return result | {
            "status": "out of memory",
            "reason": f"out of memory in step {memory['step']}, at a peak of {peak}: {memory['message']}",
        }
    if failed is not None and failed["kind"] == "refused":
        return result | {"status": "refused", "reason": failed["message"]}
    log = (place / "output.log").read_text(encoding="utf-8", errors="replace")
    if failed is None and code == UserError.exit_code:
        return result | {"status": "refused", "reason": _last_error(log)}
    if failed is None and ("exits with return code = -9" in log or code in (-9, 137)):
        reason = f"a process was killed (SIGKILL) in its {phase} phase; the system does so when memory runs out"
        return result | {"status": "crashed", "reason": reason}
    what = f"{failed['type']}: {failed['message']}" if failed is not None else _last_error(log)
    return result | {"status": "crashed", "reason": f"{what} (exit code {code}; see {place / 'output.log'})"}


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
