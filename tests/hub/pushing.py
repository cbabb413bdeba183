"""Run folders with exports to push, a Hub that fails at random, and what its branch must hold afterwards."""

from __future__ import annotations

import hashlib
import json
import random
import tempfile
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from codeparrot_ds.hub.queue import PushQueue
from codeparrot_ds.hub.repository import Repository
from tests.hub.model_hub import Fault, ModelHub

REPO = "org/model"
TEMPORARY = (500, 502, 503, 504, 429, 409, 412)
# The library itself repeats these, a second and more later.
REPEATED_BY_THE_LIBRARY = ("preupload", "objects/batch", "/store/", "/verify", "/commits/")


def export(folder: Path, **files: bytes) -> Path:
    """A folder with these files; ``__`` in a name is a slash."""
    for name, content in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def read_file(repository: Repository, revision: str, name: str) -> bytes:
    """A file's content at a revision, as a download has it."""
    with tempfile.TemporaryDirectory() as folder:
        return (repository.download(revision, Path(folder), only=["*"]) / name).read_bytes()


def make_run(runs: Path, name: str, run_id: str | None = None) -> Path:
    """The folder of a run that has not pushed yet."""
    folder = runs / name
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"name": name, "hub": REPO, "id": run_id or f"{name}-abc"}))
    return folder


def export_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}" / "export"


def enqueue(run: Path, *steps: int, size: int = 2000, **options) -> None:
    """Queues an export for each step; its files follow from the run's name and the step."""
    for step in steps:
        export = export_of(run, step)
        export.mkdir(parents=True, exist_ok=True)
        (export / "model.safetensors").write_bytes(random.Random(f"{run.name} {step}").randbytes(size))
        (export / "config.json").write_text("{}")
        (export / "README.md").write_text(f"---\nlicense: other\n---\n# Step {step}\n")
        PushQueue(run).enqueue(step, export, f"Step {step}: loss 3.21", f"Tokens: {step}", **options)


def chaos(
    seed: int, share: float, share_of_repeated: float, *, statuses: Iterable[int] = TEMPORARY, seconds: float = 0.3
) -> Callable[[str], Fault | None]:
    """Faults for a share of all requests, of every kind: what to set as a Hub's ``inject``.

    Args:
        seed: of the draw.
        share: of the requests that the library makes once.
        share_of_repeated: of those that it repeats itself.
        statuses: of the refusals; 429 comes with a Retry-After.
        seconds: that a hang lasts.
    """
    draw, lock, choices = random.Random(seed), threading.Lock(), list(statuses)

    def inject(request: str) -> Fault | None:
        with lock:
            repeated = any(part in request for part in REPEATED_BY_THE_LIBRARY)
            if draw.random() >= (share_of_repeated if repeated else share):
                return None
            kind = draw.choice(["reset", "lost", "status", "status", "hang"] + ["corrupt"] * ("PUT" in request))
            status = draw.choice(choices)
            headers = {"Retry-After": "0"} if status == 429 else {}
            return Fault(kind, status=status, headers=headers, seconds=seconds)

    return inject


def branch_problems(hub: ModelHub, run: Path, steps: Iterable[int]) -> list[str]:
    """What is wrong with a run's branch: every step must be on it once, in order, with the bytes that were exported."""
    steps = list(steps)
    commits = [commit for commit in reversed(hub.commits(REPO, run.name)) if "Run: " in commit["message"]]
    titles = [commit["title"] for commit in commits]
    if titles != [f"Step {step}: loss 3.21" for step in steps]:
        return [f"{run.name}: the branch has {titles}"]
    problems = []
    for commit, step in zip(commits, steps, strict=True):
        files = hub.files(REPO, commit["id"])
        exported = {path.name: path for path in export_of(run, step).iterdir()}
        if files.keys() != {".gitattributes", *exported}:
            problems.append(f"{run.name} step {step}: the commit has {sorted(files)}")
            continue
        for name, path in exported.items():
            there = hub.content(REPO, commit["id"], name)
            if hashlib.sha256(there).digest() != hashlib.sha256(path.read_bytes()).digest():
                problems.append(f"{run.name} step {step}: {name} differs")
    if [push.step for push in PushQueue(run).pushed()] != steps or PushQueue(run).entry_folders():
        problems.append(f"{run.name}: the queue's record is {PushQueue(run).pushed()}")
    return problems
