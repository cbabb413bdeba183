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
# Triton interprets its kernels where no GPU runs them; it looks when it is imported, by whoever comes first.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from codeparrot_ds.engine.operators import are_built

# A suite that was started in the background has SIGINT ignored, and what it starts would have it too.
signal.signal(signal.SIGINT, signal.default_int_handler)

pytest_plugins = ["tests.runs"]
REPOSITORY = Path(__file__).resolve().parents[1]
OPERATORS = ["fused_adam", "cpu_adam", "pin_memory", "async_io"]
BUILD = """
from codeparrot_ds.engine.operators import build_operators
from tools.ds_configs import catalogue
for name in ("zero2", "zero2_offload", "zero3_nvme"):
    build_operators(catalogue()[name].config, "cpu")
"""
# Each starts two or three ranks at a time: one after another, and those that need no operator of the disk first.
LAUNCHING = (
    *("torture", "cluster", "story", "test_old_runs.py", "training/test_bad_steps.py", "checkpoint/test_matrix.py"),
)
_builder: list[subprocess.Popen] = []


def pytest_xdist_auto_num_workers(config):
    """Two workers for the whole suite; none for chosen tests, which start sooner and can be debugged."""
    return 2 if config.args_source is pytest.Config.ArgsSource.TESTPATHS else 0


def _place(nodeid: str) -> int:
    """Where a test's kind comes in the order: those of LAUNCHING, then all others."""
    path = nodeid.partition("::")[0].removeprefix("tests/")
    return next((place for place, begin in enumerate(LAUNCHING) if path.startswith(begin)), len(LAUNCHING))


def pytest_xdist_make_scheduler(config, log):
    """All launching tests to the first worker, the other modules to the second, and to whoever has nothing left."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "launching" if _place(nodeid) < len(LAUNCHING) else nodeid.partition("::")[0]

    return Scheduling(config, log)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: _place(item.nodeid))


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


@pytest.fixture(autouse=True)
def _own_products():
    """Gives a CPU without 16-bit products its own back after a test that ran a command here, which replaces them."""
    yield
    products = sys.modules.get("codeparrot_ds.model.products")
    if products is not None and products._library is not None:
        products._library._destroy()
        products._library = None
        products._replaced.clear()


def pytest_sessionfinish():
    for builder in _builder:
        if builder.poll() is None:
            os.killpg(builder.pid, signal.SIGTERM)
        builder.wait()
