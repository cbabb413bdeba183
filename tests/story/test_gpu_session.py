"""``benchmarks/gpu_session.py`` on a CPU: what it does on a GPU, with the demo's shape on short rows."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import psutil

from tests.story.stories import REPOSITORY, clean_environment, run_command

SHAPE = "demo's shape"


def command(workshop, out: Path, *arguments: str) -> list[str]:
    script = [sys.executable, str(REPOSITORY / "benchmarks" / "gpu_session.py"), "--small", "--out", str(out)]
    return [*script, "--data", str(workshop.corpus), "--tokenizer", str(workshop.tokenizer), *arguments]


def record(folder: Path) -> dict[str, dict]:
    """The items of a record by their names, once it has been seen to be valid."""
    raw = json.loads((folder / "raw.json").read_text())
    text = (folder / "README.md").read_text()
    assert text.startswith("# GPU session") and "- commit: " in text
    lines = (folder / "results.jsonl").read_text().splitlines(keepends=True)
    results = [json.loads(line) for line in lines if line.endswith("\n")]
    assert len(lines) - len(results) <= 1
    ended = {line["name"]: line["status"] for line in results if "status" in line}
    items = {item["name"]: item for item in raw["raw"]["items"]}
    for name, item in items.items():
        assert item["status"] in ("not begun", "running") or ended[name] == item["status"]
    return items


def test_every_item_has_a_figure_or_a_failure_of_its_own(workshop, tmp_path):
    """On two ranks: runs as they are, levers, peers and resumes share two processes."""
    chosen = [
        *("device", f"{SHAPE}: as it is", ": chunked loss", "Liger", "peer: DDP lean"),
        *("peer: FSDP2", "resume in zero1:auto"),
    ]
    answer = run_command(command(workshop, tmp_path / "out", "--ranks", "2", "--only", *chosen))
    assert answer.returncode == 0, answer.stderr
    items = record(tmp_path / "out")

    def one(name: str, key: str):
        return next(part[key] for part in items[name]["parts"] if part.get(key) is not None)

    as_it_is = f"{SHAPE}: as it is"
    for name in (as_it_is, f"{SHAPE}: chunked loss", "peer: DDP lean", "peer: FSDP2"):
        assert items[name]["status"] == "done", (name, items[name]["error"], answer.stdout)
    assert one(as_it_is, "window")["tokens_per_second"] > 0
    assert one(f"{SHAPE}: chunked loss", "loss_gap") < 1e-4
    # The same rows from the same weights in the same arithmetic, without DeepSpeed; FSDP2's masters are not rounded.
    assert one("peer: DDP lean", "loss_gap") < 5e-3
    assert one("peer: FSDP2", "loss_gap") < 2e-2
    assert one("resume in zero1:auto", "equal") is True
    liger = items[f"{SHAPE}: loss by Liger (patched in)"]
    assert liger["status"] == "failed" and "no Liger here" in liger["error"]
    run = tmp_path / "out" / "calibration" / "small"
    assert json.loads((run / "run.json").read_text())["world_size"] == 2
    assert json.loads((run / "profile" / "profile.json").read_text())["steps"] == 1
    assert "| peer: DDP lean |" in (tmp_path / "out" / "README.md").read_text()


def test_killed_at_any_moment_it_leaves_a_valid_record_and_no_process(workshop, tmp_path):
    out = tmp_path / "out"
    chosen = ["device", "matrix products", "passes", "attention"]
    process = subprocess.Popen(
        command(workshop, out, "--only", *chosen), cwd=REPOSITORY, env=clean_environment(),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while not (out / "README.md").is_file():  # written before anything is measured
        assert process.poll() is None
        time.sleep(0.05)
    moment = random.uniform(0, 8)
    time.sleep(moment)
    started = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    items = record(out)
    assert all(item["status"] in ("done", "running", "not begun") for item in items.values())
    _, alive = psutil.wait_procs(started, timeout=10)
    assert not alive
