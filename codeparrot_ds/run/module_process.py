"""A module of this package run to its end in a fresh process, for what needs torch where there is none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run_module(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """``python -m module``, which imports this same package; its output is kept."""
    package_parent = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [package_parent, os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env=os.environ | {"PYTHONPATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def last_words(process: subprocess.CompletedProcess[str]) -> str:
    """The last line of what a process said before it failed."""
    lines = [line for line in process.stderr.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"
