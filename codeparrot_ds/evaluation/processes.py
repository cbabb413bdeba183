"""Several processes that share an evaluation on this machine, a GPU each, or a share of the cores."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from codeparrot_ds.child_process import start_module
from codeparrot_ds.cpu import usable_cores
from codeparrot_ds.errors import UserError
from codeparrot_ds.secret_forms import hide_secrets_in_tracebacks

_POLL_SECONDS = 0.05


def number_of_processes(wanted: int | None, device: str | None) -> int:
    """Returns how many processes share the work: what is wanted, or one per GPU where no device is named."""
    if wanted is not None:
        return wanted
    if device is not None:
        return 1
    import torch

    return max(1, torch.cuda.device_count())


def run_processes(module: str, tasks: list[dict[str, Any]], *, device: str | None) -> None:
    """Runs ``python -m module TASK`` for all tasks at once, each with ``device`` and ``threads`` of its own beside.

    Raises ``UserError`` with the number of the first that fails; the others are ended then, as they are on Ctrl-C.
    """
    import torch

    gpus = torch.cuda.device_count()
    threads = max(1, usable_cores() // len(tasks))
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank, task in enumerate(tasks):
            own = {"device": device or (f"cuda:{rank % gpus}" if gpus else "cpu"), "threads": threads}
            processes.append(start_module(module, json.dumps(task | own)))
        while any(process.poll() is None for process in processes):
            _check(processes)
            time.sleep(_POLL_SECONDS)
        _check(processes)
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()
            process.wait()


def _check(processes: list[subprocess.Popen[bytes]]) -> None:
    for rank, process in enumerate(processes):
        if process.poll():
            raise UserError(f"process {rank + 1} of {len(processes)} ended with code {process.returncode}")


def run_task(work: Callable[[dict[str, Any]], None]) -> None:
    """The main function of a module that ``run_processes`` runs: its task is the only argument."""
    hide_secrets_in_tracebacks()
    import torch

    from codeparrot_ds.model.products import multiply_in_fp32_where_needed

    multiply_in_fp32_where_needed()
    task = json.loads(sys.argv[1])
    torch.set_num_threads(task.pop("threads"))
    try:
        work(task)
    except UserError as error:
        sys.exit(f"codeparrot-ds: error: {error}")
