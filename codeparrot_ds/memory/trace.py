"""The traced depth of a memory prediction: DeepSpeed's own engine and the run's own model, on tensors without memory.

Each trace runs in a process of its own, since pretending ranks and an accelerator changes the process for good:
``python -m codeparrot_ds.memory.trace`` reads workloads as lines of JSON on its standard input and answers with as
many lines. Results are kept in the user's cache folder. Importing this module imports no torch.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from codeparrot_ds.child_process import PACKAGE_PARENT, python_path
from codeparrot_ds.ds_config.facts import uses_nvme, value_at
from codeparrot_ds.errors import UserError
from codeparrot_ds.json_files import parts_of, read_object
from codeparrot_ds.memory.workload import Memory, Workload
from codeparrot_ds.model.shapes import GPT2Shape
from codeparrot_ds.secret_forms import hide_secrets

ATTENTIONS = ("flash", "math")
# Micro-batches after the second meet what the second meets.
MAX_ACCUMULATION_STEPS = 2
# They write files, time and print, or belong to the launcher; none holds tensors.
WITHOUT_TENSORS = (
    "tensorboard",
    "wandb",
    "csv_monitor",
    "comet",
    "comms_logger",
    "flops_profiler",
    "autotuning",
    "elasticity",
)
# How long one trace may take; the 1.5B shape takes half a minute.
TIMEOUT_SECONDS = 900
PACKAGE = PACKAGE_PARENT / "codeparrot_ds"
# What a result depends on beside the workload and the versions of torch, DeepSpeed and transformers.
SOURCES = (
    "model/gpt2.py",
    "model/shapes.py",
    "model/activation.py",
    "model/attention.py",
    "model/cpu_kernels.py",
    "model/fused_loss.py",
    "model/loss.py",
    "model/loss_kernel.py",
    "model/products.py",
    "engine/compiled.py",
    "engine/engine.py",
    "engine/deepspeed_fixes.py",
    "engine/fragments.py",
    "engine/lean_step.py",
    "engine/private_parts.py",
    "engine/ranks.py",
    "engine/traced.py",
    "memory/fake_device.py",
    "memory/trace.py",
    "memory/storage_counter.py",
    "memory/traced_engine.py",
    "memory/workload.py",
)


def trace_all(
    workloads: Sequence[Workload], num_workers: int, progress: Callable[[int, int], None] = lambda done, total: None
) -> list[Memory | UserError]:
    """What DeepSpeed's engine and the run's model take in memory, or why that is not known, for each workload.

    A trace is a few steps in a process of its own, `num_workers` at a time; results are kept, and known ones are not
    traced again. The model runs as it is written: ``compile`` in either config is not traced. With
    ``offload_optimizer`` or ``offload_param`` on NVMe, DeepSpeed's own swapping runs too: its files are counted, not
    written. Page-locked host memory counts as torch's allocator takes it, in powers of two.

    `progress` gets how many workloads are done, and how many there are, after each one.
    """
    keys = [cache_key(workload) for workload in workloads]
    different = dict(zip(keys, workloads, strict=True))
    results: dict[str, Memory | UserError] = {}
    idle: queue.SimpleQueue[_Tracer] = queue.SimpleQueue()
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(max(1, num_workers)) as pool:
        for _ in range(max(1, num_workers)):
            idle.put(stack.enter_context(_Tracer()))
        try:
            found = pool.map(lambda workload: _known_or_traced(workload, idle), different.values())
            for key, result in zip(different, found, strict=True):
                results[key] = result
                progress(sum(key in results for key in keys), len(keys))
        except BaseException:
            # Interrupted: what is being traced ends with it.
            pool.shutdown(wait=False, cancel_futures=True)
            stack.close()
            raise
    return [results[key] for key in keys]


def _known_or_traced(workload: Workload, idle: queue.SimpleQueue[_Tracer]) -> Memory | UserError:
    known = cached(workload)
    if known is not None:
        return known
    tracer = idle.get()
    try:
        _check_traceable(workload)
        memory = tracer.trace(workload)
    except UserError as error:
        return error
    finally:
        idle.put(tracer)
    keep(workload, memory)
    return memory


class _Tracer:
    """A process that traces one workload after another, each in a fork of its own; it starts with the first."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> _Tracer:
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop()

    def trace(self, workload: Workload) -> Memory:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", "codeparrot_ds.memory.trace"],
                env=_clean_environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                start_new_session=True,
            )
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        too_long = threading.Timer(TIMEOUT_SECONDS, _end_session, [process])
        too_long.start()
        try:
            print(json.dumps(_to_json(_traced_form(workload))), file=process.stdin, flush=True)
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            too_long.cancel()
        if not line:
            self._stop()
            raise UserError(f"the trace ended without an answer, or not within {TIMEOUT_SECONDS} s")
        answer = json.loads(line)
        if "error" in answer:
            raise UserError(f"this config cannot be traced: {answer['error']}")
        return Memory(**answer)

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            _end_session(process)
            process.communicate()


def _end_session(process: subprocess.Popen[str]) -> None:
    """Ends a tracer and the fork that it waits for."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


# --------------------------------------------------------------------------------------------------------------------
# What is traced


def _check_traceable(workload: Workload) -> None:
    if workload.attention not in ATTENTIONS:
        raise UserError(f"attention must be one of {', '.join(ATTENTIONS)}, not {workload.attention!r}")
    if value_at(workload.ds_config, ("torch_autocast", "enabled")):
        raise UserError(
            "torch_autocast cannot be traced (its casts are kernels of the device's own); use bf16, or the formulas"
        )
    for key in ("zero_quantized_weights", "zero_quantized_gradients"):
        if value_at(workload.ds_config, ("zero_optimization", key)):
            raise UserError(f"{key} cannot be traced (its kernels exist on GPUs alone); use the formulas")


def _traced_form(workload: Workload) -> Workload:
    """The workload as it is traced: without what holds no tensors, so that equal memory has an equal form."""
    ds_config = copy.deepcopy(dict(workload.ds_config))
    for key in WITHOUT_TENSORS:
        ds_config.pop(key, None)
    parameters = (ds_config.get("optimizer") or {}).get("params", {})
    for key, value in {"lr": 1e-4, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.1}.items():
        if key in parameters:
            parameters[key] = value
    steps = min(workload.accumulation_steps, MAX_ACCUMULATION_STEPS)
    rows = workload.micro_batch_size * steps * workload.world_size
    ds_config |= {"gradient_accumulation_steps": steps, "train_batch_size": rows, "wall_clock_breakdown": False}
    if uses_nvme(ds_config):
        for block in ("offload_optimizer", "offload_param"):
            if value_at(ds_config, ("zero_optimization", block, "device")) == "nvme":
                # DeepSpeed makes its folders there, and then nothing is written.
                ds_config["zero_optimization"][block]["nvme_path"] = str(_cache_folder() / "no-nvme")
    return dataclasses.replace(workload, ds_config=ds_config)


def _clean_environment() -> dict[str, str]:
    """The caller's environment without what a launcher or a GPU adds to it."""
    launchers = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in launchers}
    return environment | {
        "PYTHONPATH": python_path(environment),
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }


def _to_json(workload: Workload) -> dict[str, Any]:
    values = dataclasses.asdict(workload)
    values["ds_config"] = dict(workload.ds_config)
    return values


def _from_json(values: dict[str, Any]) -> Workload:
    return Workload(**values | {"shape": GPT2Shape(**values["shape"])})


# --------------------------------------------------------------------------------------------------------------------
# The cache


def cached(workload: Workload) -> Memory | None:
    """What an earlier trace of the same workload by the same versions found; None when there is none."""
    try:
        path = _cache_file(workload)
        with parts_of(path):
            memory = Memory(**read_object(path)["memory"])
            numbers = (memory.resident_bytes, memory.host_bytes, memory.nvme_bytes, memory.checkpoint_bytes)
            return memory if sum(numbers) + sum(memory.device.values()) >= memory.peak_bytes else None
    except (OSError, UserError):  # not traced yet, not traceable, or damaged: then a trace makes it anew
        return None


def keep(workload: Workload, memory: Memory) -> None:
    """Writes a result into the cache, whole or not at all; a cache that cannot be written is no error."""
    path = _cache_file(workload)
    content = {"workload": _to_json(_traced_form(workload)), "memory": dataclasses.asdict(memory)}
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False, encoding="utf-8") as file:
            json.dump(content, file)
        os.replace(file.name, path)


def cache_key(workload: Workload) -> str:
    """What a result is kept under: a digest of the workload, the versions and the sources that it depends on."""
    text = json.dumps([_to_json(_traced_form(workload)), _versions(), _sources()], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _cache_folder() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "codeparrot-ds" / "traces"


def _cache_file(workload: Workload) -> Path:
    return _cache_folder() / f"{cache_key(workload)}.json"


@functools.cache
def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("torch", "deepspeed", "transformers")}


@functools.cache
def _sources() -> str:
    return hashlib.sha256(b"\0".join((PACKAGE / name).read_bytes() for name in SOURCES)).hexdigest()


# --------------------------------------------------------------------------------------------------------------------
# The process that traces


def main() -> None:
    """Answers each workload on standard input, a line of JSON, with a line: its memory, or why it has none."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # DeepSpeed prints
    # Once for all forks: seconds each.
    import deepspeed  # noqa: F401
    from transformers import GPT2LMHeadModel  # noqa: F401

    from codeparrot_ds.memory.traced_engine import trace

    def answer(workload: Workload) -> dict[str, Any]:
        try:
            return dataclasses.asdict(trace(workload))
        except Exception as error:
            # Whatever DeepSpeed, transformers or torch say to a config: the caller hands it to the user.
            print(hide_secrets(traceback.format_exc()), file=sys.stderr)
            return {"error": hide_secrets(" ".join(f"{type(error).__name__}: {error}".split()))[:300]}

    for line in sys.stdin:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            with os.fdopen(writing, "w") as file:
                file.write(json.dumps(answer(_from_json(json.loads(line)))))
            # Autograd's threads for a device that is not there would keep the interpreter from ending.
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as file:
            text = file.read()
        _, status = os.waitpid(child, 0)
        text = text or json.dumps({"error": f"its process ended with status {os.waitstatus_to_exitcode(status)}"})
        print(text, file=answers, flush=True)


if __name__ == "__main__":
    main()
