"""DeepSpeed's just-in-time operators: built once on a host before they are needed, and never waited for in vain.

A rank that is killed while it builds leaves a file named ``lock`` in the operator's folder, and every later process
waits for it without a word. Builds are therefore made under a file lock of our own, which the system releases with its
holder: whoever holds it knows that a leftover ``lock`` is stale.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import logging
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from codeparrot_ds.ds_config.facts import offload_device
from codeparrot_ds.engine.private_parts import require
from codeparrot_ds.errors import UserError

logger = logging.getLogger("codeparrot_ds.ops")
RECORD = "codeparrot-ds.built"
# The others share symbols, which DeepSpeed's own loading arranges.
LOADED_DIRECTLY = ("fused_adam", "cpu_adam")


def operators_folder() -> Path:
    """Where operators are built: ``TORCH_EXTENSIONS_DIR``, or a folder for this environment and processor alone.

    A shared cache is rebuilt whenever another environment's ninja or compiler flags come along.
    """
    chosen = os.environ.get("TORCH_EXTENSIONS_DIR")
    if chosen:
        return Path(chosen)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "codeparrot-ds" / f"operators-{_build_key()}"


@functools.cache
def _build_key() -> str:
    """What a built operator depends on: Python, torch, DeepSpeed, and the processor's instructions (-march=native)."""
    versions = [f"{name}{importlib.metadata.version(name)}" for name in ("torch", "deepspeed")]
    flags = platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        flags += next((line for line in file if line.startswith(("flags", "Features"))), "")
    processor = hashlib.sha256(flags.encode()).hexdigest()[:8]
    return "-".join([f"py{sys.version_info[0]}{sys.version_info[1]}", *versions, processor])


def use_operators_folder(environment: dict[str, str] | os._Environ[str]) -> None:
    """Sets what a build needs in an environment: the folder, and this interpreter's ninja before the system's.

    What ``torch.compile`` and Triton make is kept beside the operators, not in a temporary folder or in the home.
    """
    environment["TORCH_EXTENSIONS_DIR"] = str(operators_folder())
    for variable, name in (("TORCHINDUCTOR_CACHE_DIR", "inductor"), ("TRITON_CACHE_DIR", "triton")):
        environment.setdefault(variable, str(operators_folder() / name))
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
    """Whether every operator has been built and loaded here before (without importing torch)."""
    return all(_record_holds(name) for name in names)


def build_operators(ds_config: dict[str, Any], device: str) -> None:
    """Loads the operators of a config, building what is missing; one process a host builds, the others wait for it.

    Raises:
        UserError: an operator cannot be built, with the compiler's last words.
    """
    use_operators_folder(os.environ)
    names = needed_operators(ds_config, device)
    through_builder = [name for name in names if name not in LOADED_DIRECTLY or not are_built([name])]
    if through_builder:
        with _build_lock():
            for name in through_builder:
                _build(name)
    for name in names:
        if name in LOADED_DIRECTLY:
            _load_built(name)


def build_apart(ds_config: dict[str, Any], device: str, environment: dict[str, str]) -> str | None:
    """``build_operators`` in a process of its own, for one that has no torch; returns what went wrong, if anything."""
    script = (
        "import json, sys\n"
        "from codeparrot_ds.errors import UserError\n"
        "from codeparrot_ds.engine.operators import build_operators\n"
        "try:\n"
        "    build_operators(json.loads(sys.stdin.read()), sys.argv[1])\n"
        "except UserError as error:\n"
        "    sys.exit(f'codeparrot-ds: error: {error}')\n"
    )
    command = [sys.executable, "-c", script, device]
    built = subprocess.run(
        command, input=json.dumps(ds_config), text=True, capture_output=True, env=environment, check=False
    )
    if built.returncode == 0:
        return None
    lines = [line for line in built.stderr.splitlines() if line.strip()]
    return lines[-1].removeprefix("codeparrot-ds: error: ") if lines else "building operators failed"


def _build(name: str) -> None:
    """Has DeepSpeed build (or check) and load one operator, and records it; call it with the build lock held."""
    from deepspeed.ops.op_builder import AsyncIOBuilder, CPUAdamBuilder, FusedAdamBuilder, PinMemoryBuilder

    builders = {
        "fused_adam": FusedAdamBuilder,
        "cpu_adam": CPUAdamBuilder,
        "pin_memory": PinMemoryBuilder,
        "async_io": AsyncIOBuilder,
    }
    _remove_stale_lock(name)
    started = time.monotonic()
    require("OpBuilder.cxx_args")
    builder = builders[name]()
    arguments = builder.cxx_args
    # DeepSpeed asks for debug information, mostly of torch's headers: a fifth of the time, nine tenths of the file.
    builder.cxx_args = lambda: [*arguments(), "-g0"]
    try:
        # The builder prints its checks to the console; they matter only when it fails.
        with contextlib.redirect_stdout(io.StringIO()) as said, _plain_architectures():
            builder.load(verbose=False)
    except (RuntimeError, ValueError, OSError, subprocess.SubprocessError) as error:
        raise UserError(_build_failure(name, f"{said.getvalue()}\n{error}")) from error
    library = _library(name)
    if library.is_file():  # not where the operator was installed with DeepSpeed
        (library.parent / RECORD).write_text(_record(library), encoding="utf-8")
    logger.debug("operator %s built and loaded in %.1f s", name, time.monotonic() - started)


@contextlib.contextmanager
def _plain_architectures() -> Iterator[None]:
    """``9.0`` for ``9.0a`` in ``TORCH_CUDA_ARCH_LIST``, as some images set it: DeepSpeed's builder reads no letters.

    Its operators use no instruction that such an architecture has and the plain one has not.
    """
    before = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if before is not None:
        os.environ["TORCH_CUDA_ARCH_LIST"] = re.sub(r"(\d)[af](?![a-z])", r"\1", before)
    try:
        yield
    finally:
        if before is not None:
            os.environ["TORCH_CUDA_ARCH_LIST"] = before


def _load_built(name: str) -> None:
    """Imports a recorded library and hands it to DeepSpeed, whose own loading spends seconds to find nothing to build.

    That loading imports the compiler tools, asks py-cpuinfo and runs ninja, each time in each rank.
    """
    require("OpBuilder._loaded_ops")
    from deepspeed.ops.op_builder.builder import OpBuilder

    if name in OpBuilder._loaded_ops or not _record_holds(name):
        return
    specification = importlib.util.spec_from_file_location(name, _library(name))
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    OpBuilder._loaded_ops[name] = module


def _library(name: str) -> Path:
    return operators_folder() / name / f"{name}.so"


def _record(library: Path) -> str:
    status = library.stat()
    return f"{_build_key()} {status.st_size} {status.st_mtime_ns}\n"


def _record_holds(name: str) -> bool:
    """Whether a library is the one that was loaded before: a linker that was killed leaves one that is not."""
    library = _library(name)
    try:
        return (library.parent / RECORD).read_text(encoding="utf-8") == _record(library)
    except OSError:
        return False


def _build_failure(name: str, output: str) -> str:
    remedy = {"async_io": "install libaio's headers (Debian: apt-get install libaio-dev)"}.get(
        name, "install g++ and ninja, or set optimizer.params.torch_adam to true in the DeepSpeed JSON"
    )
    marks = ("error:", "not found", "unable", "returned non-zero")
    words = [line.strip() for line in output.splitlines() if any(mark in line.lower() for mark in marks)]
    return f"DeepSpeed's operator {name} cannot be built: {(words or [output.strip()])[-1][-300:]}; {remedy}"


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
