"""Builds DeepSpeed's operators in the background while the unit tests run, for the whole stories that come after."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

# The Hubs of the tests speak LFS, not Xet; the client reads this when it is imported.
os.environ["HF_HUB_DISABLE_XET"] = "1"

from codeparrot_ds.run.ops import are_built

REPOSITORY = Path(__file__).resolve().parents[1]
OPERATORS = ["fused_adam", "cpu_adam", "pin_memory", "async_io"]
BUILD = """
from codeparrot_ds.run.ops import build_operators
from codeparrot_ds.zero.catalogue import catalogue
for name in ("zero2", "zero2_offload", "zero3_nvme"):
    build_operators(catalogue()[name].config, "cpu")
"""
_builder: list[subprocess.Popen] = []


def pytest_collection_finish(session):
    wanted = any("story" in item.path.parts for item in session.items) and not are_built(OPERATORS)
    if wanted and not session.config.option.collectonly:
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "DS_ACCELERATOR": "cpu"}
        command = [sys.executable, "-c", BUILD]
        # What goes wrong here goes wrong again in the story that needs the operator, and is said there.
        _builder.append(
            subprocess.Popen(
                command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
        )


def pytest_sessionfinish():
    for builder in _builder:
        if builder.poll() is None:
            os.killpg(builder.pid, signal.SIGTERM)
        builder.wait()
