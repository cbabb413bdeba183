"""Some hundred damaged folders for each reader; ``python -m tests.torture.fuzz`` makes more of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.torture.readers import READERS

HEAVY = ("tensors", "deepspeed")  # import torch
INPUTS = 500


@pytest.mark.parametrize("names", [[name for name in READERS if name not in HEAVY], HEAVY], ids=["plain", "torch"])
def test_damage_is_a_sentence_or_no_harm(names):
    repository = Path(__file__).resolve().parents[2]
    # A process of its own: its memory is bounded.
    done = subprocess.run(
        [sys.executable, "-m", "tests.torture.fuzz", "--inputs", str(INPUTS), *names],
        capture_output=True,
        text=True,
        cwd=repository,
        env=os.environ | {"PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-3000:]
    assert done.stdout.count(f": {INPUTS} inputs, 0 problems") == len(names)
