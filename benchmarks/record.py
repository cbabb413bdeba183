"""What every record in ``records/`` says: the command, the commit, the hardware, the versions, the raw numbers."""

from __future__ import annotations

import argparse
import datetime
import functools
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


@functools.cache  # a record that grows with each result asks again and again
def hardware() -> str:
    """Processor, cores in use, memory, and the GPUs where there are any."""
    cpu = platform.processor() or platform.machine()
    found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    cpu = found[1] if found else cpu
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    text = f"{len(os.sched_getaffinity(0))} cores of {cpu}, {memory:.0f} GiB"
    return f"{text}, {', '.join(gpu['name'] for gpu in ask_gpus('name')) or 'no GPU'}"


def ask_gpus(*fields: str) -> list[dict[str, str]]:
    """What ``nvidia-smi --query-gpu`` says of each GPU; empty where there is none."""
    query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return []
    return [dict(zip(fields, map(str.strip, line.split(",")), strict=False)) for line in lines if line.strip()]


@functools.cache
def commit() -> str:
    """The commit of this checkout, marked when the tree differs from it; a copy without git names it in COMMIT."""
    if "COMMIT" in os.environ:
        return os.environ["COMMIT"]
    command = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty=+changes", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown: neither git nor COMMIT says"  # no reason to lose what was measured


def last_words(said: str) -> str:
    """The line of a failed program's that says what went wrong: the last with an error in it, or the last of all."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or ["it said nothing"])[-1][-300:]


def record_folder(name: str, out: Path | None) -> Path:
    """``records/<date>-<name>/``, or the folder that was asked for."""
    return out or REPOSITORY / "records" / f"{datetime.date.today().isoformat()}-{name}"


def write_record(name: str, *, title: str, text: str, raw: Any, out: Path | None) -> Path:
    """Writes README.md and raw.json into `record_folder`, each at once; returns the folder.

    Args:
        name: what was measured and on what, for the folder's name.
        title: the README's first line.
        text: the README's body: tables, what they mean, what limits.
        raw: all numbers, JSON.
        out: another folder.
    """
    folder = record_folder(name, out)
    folder.mkdir(parents=True, exist_ok=True)
    facts = {
        "command": f"python {shlex.join([os.path.relpath(sys.argv[0], REPOSITORY), *sys.argv[1:]])}",
        "commit": commit(),
        "hardware": hardware(),
        "versions": ", ".join(map(_versioned, PACKAGES)),
        "python": platform.python_version(),
    }
    lines = [f"# {title}", "", *(f"- {key}: {value}" for key, value in facts.items()), "", text.strip(), ""]
    _replace(folder / "raw.json", json.dumps(facts | {"raw": raw}, indent=1) + "\n")
    _replace(folder / "README.md", "\n".join(lines))
    return folder


def _replace(path: Path, text: str) -> None:
    """Writes a file at once: killed at any moment, a benchmark leaves the one before or this one, and no half."""
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def _versioned(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:  # a peer, installed with the test extras
        return f"no {package}"
