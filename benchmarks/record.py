"""What every record in ``records/`` says: the command, the commit, the hardware, the versions, the raw numbers."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "deepspeed", "transformers", "accelerate", "numpy")


def record_parser(doc: str, *, name: str) -> argparse.ArgumentParser:
    """The parser of a benchmark that leaves one record: its options with their defaults, ``--name`` and ``--out``."""
    parser = argparse.ArgumentParser(
        description=doc.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--name", default=name, help="of the record")
    parser.add_argument("--out", type=Path, help="folder of the record")
    return parser


def hardware() -> str:
    """Processor, cores in use, memory, and the GPUs where there are any."""
    cpu = platform.processor() or platform.machine()
    found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    cpu = found[1] if found else cpu
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    text = f"{len(os.sched_getaffinity(0))} cores of {cpu}, {memory:.0f} GiB"
    try:
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        gpus = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")
    except (OSError, subprocess.CalledProcessError):
        return f"{text}, no GPU"
    return f"{text}, {', '.join(gpu for gpu in gpus if gpu)}"


def commit() -> str:
    """The commit of this checkout, marked when the tree differs from it; a copy without git names it in COMMIT."""
    if "COMMIT" in os.environ:
        return os.environ["COMMIT"]
    command = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty=+changes", "--abbrev=12", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def write_record(name: str, *, title: str, text: str, raw: Any, out: Path | None) -> Path:
    """Writes ``records/<date>-<name>/`` with README.md and raw.json; returns the folder.

    Args:
        name: what was measured and on what, for the folder's name.
        title: the README's first line.
        text: the README's body: tables, what they mean, what limits.
        raw: all numbers, JSON.
        out: another folder.
    """
    folder = out or REPOSITORY / "records" / f"{datetime.date.today().isoformat()}-{name}"
    folder.mkdir(parents=True, exist_ok=True)
    facts = {
        "command": f"python {shlex.join([os.path.relpath(sys.argv[0], REPOSITORY), *sys.argv[1:]])}",
        "commit": commit(),
        "hardware": hardware(),
        "versions": ", ".join(map(_versioned, PACKAGES)),
        "python": platform.python_version(),
    }
    lines = [f"# {title}", "", *(f"- {key}: {value}" for key, value in facts.items()), "", text.strip(), ""]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")
    (folder / "raw.json").write_text(json.dumps(facts | {"raw": raw}, indent=1) + "\n", encoding="utf-8")
    return folder


def _versioned(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:  # a peer, installed with the test extras
        return f"no {package}"
