"""DeepSpeed's just-in-time operators: built once on a host before they are needed, and never waited for in vain.

A rank that is killed while it builds leaves a file named ``lock`` in the operator's folder, and every later process
waits for it without a word. Builds are therefore made under a file lock of our own, which the system releases with its
holder: whoever holds it knows that a leftover ``lock`` is stale.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import io
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from codeparrot_ds.errors import UserError
from codeparrot_ds.zero.ds_config import offload_device

logger = logging.getLogger("codeparrot_ds.ops")


def operators_folder() -> Path:
    """Where operators are built: ``TORCH_EXTENSIONS_DIR``, or a folder for this Python, torch and DeepSpeed alone.

    A shared cache is rebuilt whenever another environment's ninja or compiler flags come along.
    """
    chosen = os.environ.get("TORCH_EXTENSIONS_DIR")
    if chosen:
        return Path(chosen)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    versions = "-".join(f"{name}{importlib.metadata.version(name)}" for name in ("torch", "deepspeed"))
    return cache / "codeparrot-ds" / f"operators-py{sys.version_info[0]}{sys.version_info[1]}-{versions}"


def use_operators_folder(environment: dict[str, str] | os._Environ[str]) -> None:
    """Sets what a build needs in an environment: the folder, and this interpreter's ninja before the system's."""
    environment["TORCH_EXTENSIONS_DIR"] = str(operators_folder())
    scripts = str(Path(sys.executable).parent)
    path = environment.get("PATH", "")
    if path.split(os.pathsep)[0] != scripts:
        environment["PATH"] = os.pathsep.join(part for part in (scripts, path) if part)


def needed_operators(ds_config: dict[str, Any], device: str) -> list[str]:
    """Names of the operators that a resolved config makes DeepSpeed load on ``cpu`` or ``cuda``."""
    names = []
    optimizer = ds_config.get("optimizer", {})
    if not optimizer.get("params", {}).get("torch_adam", False):
        names.append("fused_adam" if offload_device(ds_config, "optimizer") == "none" else "cpu_adam")
    if "nvme" in (offload_device(ds_config, "optimizer"), offload_device(ds_config, "parameters")):
        names += ["pin_memory", "async_io"]
    return names


def are_built(names: list[str]) -> bool:
    """Whether every operator has a library in the folder (without importing torch)."""
    return all((operators_folder() / name / f"{name}.so").is_file() for name in names)


def build_operators(ds_config: dict[str, Any], device: str) -> None:
    """Loads the operators of a config, building what is missing; one process a host builds, the others wait for it.

    Raises:
        UserError: an operator cannot be built, with the compiler's last words.
    """
    use_operators_folder(os.environ)
    names = needed_operators(ds_config, device)
    if not names:
        return
    from deepspeed.ops.op_builder import AsyncIOBuilder, CPUAdamBuilder, FusedAdamBuilder, PinMemoryBuilder

    builders = {
        "fused_adam": FusedAdamBuilder,
        "cpu_adam": CPUAdamBuilder,
        "pin_memory": PinMemoryBuilder,
        "async_io": AsyncIOBuilder,
    }
    with _build_lock():
        for name in names:
            _remove_stale_lock(name)
            started, known = time.monotonic(), are_built([name])
            if not known:
                logger.info("building DeepSpeed's operator %s (once; 20 to 60 s)", name)
            try:
                # The builder prints its checks to the console; they matter only when it fails.
                with contextlib.redirect_stdout(io.StringIO()) as said:
                    builders[name]().load(verbose=False)
            except (RuntimeError, OSError) as error:
                raise UserError(_build_failure(name, f"{said.getvalue()}\n{error}")) from error
            logger.debug("operator %s ready after %.1f s", name, time.monotonic() - started)


def _build_failure(name: str, output: str) -> str:
    remedy = {"async_io": "install libaio's headers (Debian: apt-get install libaio-dev)"}.get(
        name, "install g++ and ninja, or set optimizer.params.torch_adam to true in the DeepSpeed JSON"
    )
    words = [line.strip() for line in output.splitlines() if "error" in line.lower() or "unable" in line.lower()]
    return f"DeepSpeed's operator {name} cannot be built: {words[-1] if words else output.strip()[-300:]}; {remedy}"


@contextlib.contextmanager
def _build_lock() -> Iterator[None]:
    folder = operators_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".build-lock").open("w")
    except OSError as error:
        raise UserError(
            f"cannot write DeepSpeed's operators to {folder}: {error.strerror}; set TORCH_EXTENSIONS_DIR"
        ) from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remove_stale_lock(name: str) -> None:
    lock = operators_folder() / name / "lock"
    if lock.exists():
        logger.warning("removed a stale build lock that a killed process left: %s", lock)
        lock.unlink(missing_ok=True)
