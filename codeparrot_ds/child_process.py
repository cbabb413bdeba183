"""Processes of this package: the same code in a fresh interpreter, for what needs torch where there is none."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PACKAGE_PARENT = Path(__file__).resolve().parents[1]
"""The folder of the package: a checkout, or an environment's site-packages."""


def python_path(environment: Mapping[str, str] = os.environ) -> str:
    """``PYTHONPATH`` with which another interpreter imports this very package, wherever it was imported from."""
    return os.pathsep.join(filter(None, [str(PACKAGE_PARENT), environment.get("PYTHONPATH")]))


def start_module(module: str, *arguments: str, **options: Any) -> subprocess.Popen[bytes]:
    """Starts ``python -m module``, which imports this same package; the options are those of ``Popen``."""
    environment = os.environ | {"PYTHONPATH": python_path()}
    return subprocess.Popen([sys.executable, "-m", module, *arguments], env=environment, **options)


def run_module(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """``python -m module``, which imports this same package; its output is kept."""
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env=os.environ | {"PYTHONPATH": python_path()},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def last_words(process: subprocess.CompletedProcess[str]) -> str:
    """The last line of what a process said before it failed."""
    lines = [line for line in process.stderr.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"
