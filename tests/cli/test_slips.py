"""Every slip of `slips.py` costs one sentence, little CPU and no import of torch, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from codeparrot_ds.cli.main import main
from tests.cli.slips import ENVIRONMENT, SLIPS, Slip, prepare

REPOSITORY = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "transformers", "deepspeed")
CPU_SECONDS = 2.0


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slips")
    with prepare(folder):
        yield folder


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of everything below a folder."""
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
    }


def make(slip: Slip) -> tuple[int | str | None, str]:
    """Makes a slip in this process's working directory: its exit code and what it said."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            code: int | str | None = main(shlex.split(slip.command))
        except SystemExit as end:  # the parser's
            code = end.code
    return code, said.getvalue()


@pytest.mark.parametrize("slip", SLIPS, ids=lambda slip: slip.name)
def test_a_slip_costs_one_sentence_and_leaves_nothing(slip, place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.delenv("NONE_SUCH", raising=False)
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    before = contents(place)
    code, said = make(slip)
    *notes, sentence = said.splitlines()
    assert code == 2 and slip.sentence in sentence and sentence.startswith("codeparrot-ds"), said
    assert all(" is taken for runs/" in note or note.startswith("fetching the problems ") for note in notes), said
    assert contents(place) == before


def test_slips_import_no_torch_and_take_little_cpu(place):
    script = (
        "import json, sys, time\nfrom tests.cli.slips import SLIPS\nfrom tests.cli.test_slips import make\n"
        "seconds = {}\n"
        "for slip in SLIPS:\n"
        "    began = time.process_time()\n"
        "    make(slip)\n"
        "    seconds[slip.name] = time.process_time() - began\n"
        "print(json.dumps([seconds, sorted(sys.modules)]))\n"
    )
    paths = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    environment = {name: value for name, value in os.environ.items() if name != "NONE_SUCH"}
    command = [sys.executable, "-c", script]
    answer = subprocess.run(
        command, cwd=place, env=environment | ENVIRONMENT | {"PYTHONPATH": paths}, capture_output=True, check=True
    )
    seconds, modules = json.loads(answer.stdout)
    assert not set(HEAVY) & set(modules)
    assert {name: taken for name, taken in seconds.items() if taken > CPU_SECONDS} == {}
