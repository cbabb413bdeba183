"""DeepSpeed's operators: which are needed, stale locks, and what a failed build says."""

import importlib.metadata
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from deepspeed.ops.op_builder import FusedAdamBuilder

from codeparrot_ds.engine import operators as ops
from codeparrot_ds.engine.operators import (
    are_built,
    build_operators,
    needed_operators,
    operators_folder,
    use_operators_folder,
)
from codeparrot_ds.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]


def ds_config(*, optimizer=None, offload_optimizer=None, offload_param=None):
    zero = {"stage": 3}
    if offload_optimizer:
        zero["offload_optimizer"] = {"device": offload_optimizer}
    if offload_param:
        zero["offload_param"] = {"device": offload_param}
    return {"zero_optimization": zero, "optimizer": {"type": "AdamW", "params": optimizer or {}}}


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (ds_config(), ["fused_adam"]),
        (ds_config(offload_optimizer="cpu"), ["cpu_adam"]),
        (ds_config(offload_optimizer="none"), ["fused_adam"]),
        (ds_config(offload_optimizer="nvme"), ["cpu_adam", "pin_memory", "async_io"]),
        (ds_config(offload_param="nvme"), ["fused_adam", "pin_memory", "async_io"]),
        (ds_config(offload_param="cpu"), ["fused_adam"]),
        (ds_config(optimizer={"torch_adam": True}), []),
        (ds_config(optimizer={"torch_adam": True}, offload_param="nvme"), ["pin_memory", "async_io"]),
    ],
)
def test_needed_operators(config, names):
    assert needed_operators(config, "cpu") == names


def test_operators_folder_belongs_to_the_versions(monkeypatch, tmp_path):
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = operators_folder()
    assert folder.is_relative_to(tmp_path / "codeparrot-ds")
    for package in ("torch", "deepspeed"):
        assert f"{package}{importlib.metadata.version(package)}" in folder.name
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert operators_folder().is_relative_to(tmp_path / "home" / ".cache")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "mine"))
    assert operators_folder() == tmp_path / "mine"


def test_a_cache_of_compiled_models_that_the_user_chose_stays():
    environment = {"TORCHINDUCTOR_CACHE_DIR": "/mine", "TRITON_CACHE_DIR": "/own"}
    use_operators_folder(environment)
    assert (environment["TORCHINDUCTOR_CACHE_DIR"], environment["TRITON_CACHE_DIR"]) == ("/mine", "/own")


def test_use_operators_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    environment = {"PATH": "/usr/bin:/bin"}
    scripts = str(Path(sys.executable).parent)
    for _ in range(2):  # again changes nothing
        use_operators_folder(environment)
        assert environment == {
            "PATH": f"{scripts}:/usr/bin:/bin",
            "TORCH_EXTENSIONS_DIR": str(tmp_path),
            "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"),
            "TRITON_CACHE_DIR": str(tmp_path / "triton"),
        }
    empty = {}
    use_operators_folder(empty)
    assert empty["PATH"] == scripts


def test_nothing_is_built_yet(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert are_built([]) and not are_built(["fused_adam"])
    (tmp_path / "fused_adam").mkdir()
    (tmp_path / "fused_adam" / "fused_adam.so").touch()  # cut off by a kill, perhaps
    assert not are_built(["fused_adam"])


def test_a_stale_lock_is_removed_and_said(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(logging.getLogger("codeparrot_ds"), "propagate", True)
    (tmp_path / "fused_adam").mkdir()
    lock = tmp_path / "fused_adam" / "lock"
    ops._remove_stale_lock("fused_adam")
    assert not caplog.records
    lock.touch()
    ops._remove_stale_lock("fused_adam")
    assert not lock.exists() and str(lock) in caplog.text


COMPILER = """#!/bin/sh
case "$*" in *-c*) echo "simd.h:18:10: fatal error: omp.h: No such file or directory" >&2; exit 1;; esac
exec g++ "$@"
"""
BUILD = """
import sys
from codeparrot_ds.errors import UserError
from codeparrot_ds.engine.operators import build_operators
try:
    build_operators({"optimizer": {"type": "AdamW", "params": {}}}, "cpu")
except UserError as error:
    print(error)
"""


def build_with(compiler: str, folder: Path) -> str:
    """What a build in an empty folder says."""
    environment = os.environ | {"CXX": compiler, "TORCH_EXTENSIONS_DIR": str(folder), "DS_ACCELERATOR": "cpu"}
    answer = subprocess.run(
        [sys.executable, "-c", BUILD], env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=120
    )
    assert answer.returncode == 0, answer.stderr
    return answer.stdout.strip().splitlines()[-1]


def test_a_failed_build_says_what_the_compiler_said_and_what_to_do(tmp_path):
    """DeepSpeed's own builder with a compiler without OpenMP, after a rank that was killed while it built."""
    compiler = tmp_path / "g++"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    (tmp_path / "built" / "fused_adam").mkdir(parents=True)
    (tmp_path / "built" / "fused_adam" / "lock").touch()  # torch would wait for it for ever
    assert build_with(str(compiler), tmp_path / "built") == (
        "DeepSpeed's operator fused_adam cannot be built: simd.h:18:10: fatal error: omp.h: No such file or directory; "
        "install g++ and ninja, or set optimizer.params.torch_adam to true in the DeepSpeed JSON"
    )


def test_a_compiler_that_does_not_run(tmp_path):
    words = build_with("false", tmp_path)
    assert words.startswith(
        "DeepSpeed's operator fused_adam cannot be built: Command '['false', '--version']' returned"
    )
    assert words.endswith("install g++ and ninja, or set optimizer.params.torch_adam to true in the DeepSpeed JSON")


NO_COMPILER = "FAILED: [code=127] fused_adam.o\n/bin/sh: 1: c++: not found\nninja: build stopped."
NO_LIBAIO = "x\nUnable to JIT load the async_io op due to it not being compatible.\n"


@pytest.mark.parametrize(
    ("name", "output", "words"),
    [
        ("fused_adam", NO_COMPILER, "cannot be built: /bin/sh: 1: c++: not found; install g++ and ninja"),
        ("async_io", NO_LIBAIO, "not being compatible.; install libaio's headers (Debian: apt-get install libaio-dev)"),
        ("cpu_adam", "something\nunheard of", "cannot be built: something\nunheard of; install g++"),
    ],
)
def test_the_words_of_a_failure(name, output, words):
    assert words in ops._build_failure(name, output)


def test_a_folder_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file" / "operators"))
    monkeypatch.setenv("PATH", os.environ["PATH"])
    with pytest.raises(UserError, match="cannot write DeepSpeed's operators to .*: Not a directory; set TORCH_EXT"):
        build_operators(ds_config(), "cpu")


@pytest.mark.parametrize(
    ("given", "seen"),
    [("9.0a", "9.0"), ("8.0;9.0a+PTX 10.0f", "8.0;9.0+PTX 10.0"), ("8.6", "8.6"), ("Hopper", "Hopper"), (None, None)],
)
def test_an_operator_is_built_for_plain_architectures(monkeypatch, tmp_path, given, seen):
    """DeepSpeed's builder fails over ``9.0a``, which images for H100 set."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    if given is not None:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", given)
    at_build = []
    monkeypatch.setattr(
        FusedAdamBuilder, "load", lambda *_, **__: at_build.append(os.environ.get("TORCH_CUDA_ARCH_LIST"))
    )
    ops._build("fused_adam")
    assert at_build == [seen] and os.environ.get("TORCH_CUDA_ARCH_LIST") == given


def test_an_architecture_that_deepspeed_cannot_read_is_a_users_error(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))

    def load(*_, **__):
        raise ValueError("invalid literal for int() with base 10: 'Hopper'")

    monkeypatch.setattr(FusedAdamBuilder, "load", load)
    with pytest.raises(UserError, match="fused_adam cannot be built: .*'Hopper'"):
        ops._build("fused_adam")
