"""The traced depth of a memory prediction: DeepSpeed's own engine and the run's own model, on tensors without memory.

Each trace runs in a process of its own, since pretending ranks and an accelerator changes the process for good:
``python -m codeparrot_ds.run.memory_trace`` reads a workload as JSON on its standard input and writes the memory as
JSON. Results are kept in the user's cache folder. Importing this module imports no torch.
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
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

from codeparrot_ds.errors import UserError
from codeparrot_ds.model.shapes import GPT2Shape
from codeparrot_ds.zero.ds_config import uses_nvme, value_at
from codeparrot_ds.zero.memory import Memory, Workload

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
PACKAGE = Path(__file__).resolve().parents[1]
# What a result depends on beside the workload and the versions of torch, DeepSpeed and transformers.
SOURCES = (
    "model/gpt2.py",
    "model/shapes.py",
    "run/engine.py",
    "run/fake_ranks.py",
    "run/memory_trace.py",
    "run/storage_counter.py",
    "run/traced_engine.py",
    "zero/memory.py",
)


def trace_memory(workload: Workload) -> Memory:
    """What DeepSpeed's engine and the run's model take in memory, from a few steps in a process of its own.

    With ``offload_optimizer`` or ``offload_param`` on NVMe, DeepSpeed's own swapping runs too: its files are counted,
    not written.

    Raises:
        UserError: the config cannot be traced, or DeepSpeed refuses it, in DeepSpeed's words.
    """
    workload = _traced_form(workload)
    environment = _clean_environment()
    command = [sys.executable, "-W", "ignore", "-m", "codeparrot_ds.run.memory_trace"]
    try:
        answer = subprocess.run(
            command,
            input=json.dumps(_to_json(workload)),
            env=environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"the trace did not end within {TIMEOUT_SECONDS} s; use the formulas (no --trace)") from None
    if answer.returncode or not answer.stdout:
        words = answer.stdout.strip() or f"the trace ended with exit code {answer.returncode}: {answer.stderr[-200:]}"
        raise UserError(f"this config cannot be traced: {words}")
    return Memory(**json.loads(answer.stdout))


def trace_all(
    workloads: Sequence[Workload],
    num_workers: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Memory | UserError]:
    """Traces several workloads, `num_workers` at a time, and keeps the results; known ones are not traced again.

    Args:
        progress: called with how many are done and how many there are, after each one.

    Returns:
        For each workload its memory, or why it has none.
    """
    done = 0

    def trace(workload: Workload) -> Memory | UserError:
        try:
            return cached(workload) or _trace_and_keep(workload)
        except UserError as error:
            return error

    results: dict[str, Memory | UserError] = {}
    keys = [cache_key(workload) for workload in workloads]
    different = dict(zip(keys, workloads, strict=True))
    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        try:
            for key, result in zip(different, pool.map(trace, different.values()), strict=True):
                results[key] = result
                done += keys.count(key)
                progress(done, len(keys))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [results[key] for key in keys]


def _trace_and_keep(workload: Workload) -> Memory:
    memory = trace_memory(workload)
    keep(workload, memory)
    return memory


# --------------------------------------------------------------------------------------------------------------------
# What is traced


def _traced_form(workload: Workload) -> Workload:
    """The workload as it is traced: without what holds no tensors, so that equal memory has an equal form.

    Raises:
        UserError: it cannot be traced.
    """
    if workload.attention not in ATTENTIONS:
        raise UserError(f"attention must be one of {', '.join(ATTENTIONS)}, not {workload.attention!r}")
    ds_config = copy.deepcopy(dict(workload.ds_config))
    if value_at(ds_config, ("torch_autocast", "enabled")):
        raise UserError(
            "torch_autocast cannot be traced (its casts are kernels of the device's own); use bf16, or the formulas"
        )
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
    path = [str(PACKAGE.parent), environment.get("PYTHONPATH", "")]
    return environment | {
        "PYTHONPATH": os.pathsep.join(part for part in path if part),
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
    path = _cache_file(workload)
    try:
        return Memory(**json.loads(path.read_text(encoding="utf-8"))["memory"])
    except (OSError, ValueError, KeyError, TypeError):
        # Not there, or not whole: a trace makes it anew.
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


def main() -> NoReturn:
    """Traces the workload on standard input; DeepSpeed's own words go to standard error."""
    workload = _from_json(json.load(sys.stdin))
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from codeparrot_ds.run.traced_engine import trace

    code = 0
    try:
        answer = json.dumps(dataclasses.asdict(trace(workload)))
    except Exception as error:
        # Whatever DeepSpeed, transformers or torch say to a config: the caller hands it to the user.
        traceback.print_exc()
        answer, code = " ".join(f"{type(error).__name__}: {error}".split())[:300], 1
    print(answer, file=output, flush=True)
    # Autograd's threads for a device that is not there would keep the interpreter from ending.
    os._exit(code)


if __name__ == "__main__":
    main()
