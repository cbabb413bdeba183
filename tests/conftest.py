"""The order of the whole suite: what launches ranks on one worker, the rest beside it, operators in the background."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

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
# Each starts two or three ranks at a time: one after another, and those that need no operator of the disk first.
LAUNCHING = ("torture", "story", "run/test_bad_steps.py", "run/test_checkpoint_matrix.py")
_builder: list[subprocess.Popen] = []


def pytest_xdist_auto_num_workers(config):
    """Two workers for the whole suite; none for chosen tests, which start sooner and can be debugged."""
    return 2 if config.args_source is pytest.Config.ArgsSource.TESTPATHS else 0


def _launching(item: pytest.Item) -> int | None:
    path = item.path.relative_to(REPOSITORY / "tests").as_posix()
    return next((place for place, begin in enumerate(LAUNCHING) if path.startswith(begin)), None)


@pytest.hookimpl(tryfirst=True)  # xdist writes the groups into the names next
def pytest_collection_modifyitems(items):
    """Launching tests are one group and come first; every other module is a group of its own."""
    for item in items:
        module = item.path.relative_to(REPOSITORY).as_posix()
        item.add_marker(pytest.mark.xdist_group("launching" if _launching(item) is not None else module))
    items.sort(key=lambda item: len(LAUNCHING) if (place := _launching(item)) is None else place)


def pytest_collection_finish(session):
    if os.environ.get("PYTEST_XDIST_WORKER", "gw0") != "gw0":
        return  # one worker builds for both
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
