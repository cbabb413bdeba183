"""Stands for a trial where its processes' end is what counts: writes what a trial writes, and breaks as it is told.

``FAKE_TRIALS`` is a JSON object: trial name, or the beginning of one, → what becomes of it. Configs ``a`` and ``b``
have their speeds; others are faster the larger their micro-batch is and the lower their stage.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from codeparrot_ds.config.files import load_config
from codeparrot_ds.config.run_config import RunConfig

TOKENS = {"a": 1000.0, "b": 800.0}
STEPS, WARMUP_STEPS = 6, 2
"""Of the trials whose results are written down without being run."""


def main() -> int:
    options = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=False))
    config = load_config(options["--config"])
    orders = json.loads(Path(os.environ["CODEPARROT_DS_TRIAL"]).read_text())
    folder, run = Path(orders["folder"]), Path(config.output_dir) / config.run_name
    plans = json.loads(os.environ["FAKE_TRIALS"])
    plan = next((plan for name, plan in plans.items() if config.run_name.startswith(name)), "finish")
    print(f"trial {config.run_name}: {plan}", flush=True)
    run.mkdir(parents=True)
    (folder / "phase").write_text("steps")
    rows = []
    for step in range(1, orders["steps"] + 1):
        if plan not in ("finish", "fast and wrong") and step == 3:
            return broken(plan, folder)
        wrong = plan == "fast and wrong"
        rows.append(row(step, 5000.0 if wrong else speed_of(config), wrong))
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
    (folder / "found.json").write_text(json.dumps(found(rows, int(options["--num-gpus"]))))
    return 0


def speed_of(config: RunConfig) -> float:
    name = Path(config.deepspeed).stem
    stage = json.loads(Path(config.deepspeed).read_text())["zero_optimization"]["stage"]
    return TOKENS.get(name, 1000.0 + 100 * config.micro_batch_size - 50 * stage)


def row(step: int, tokens_per_second: float, wrong: bool) -> dict:
    return {
        "step": step,
        "loss": 9.0 - 0.1 * step + wrong,
        "grad_norm": 1.0,
        "skipped_steps": 0,
        "tokens_per_second": tokens_per_second + step % 2,
        "step_seconds": 1.0,
        "data_wait_seconds": 0.0,
        "mfu": 0.1,
    }


def found(rows: list[dict], world_size: int) -> dict:
    return {
        "world_size": world_size,
        "weights": {"dtype": "float32", "sha256": "same"},
        "device": "CPU",
        "rows": rows,
        "row_hashes": [str(each["step"]) for each in rows],
        "resident_before_bytes": [10**8] * world_size,
        "resident_peak_bytes": [3 * 10**8] * world_size,
        "device_peak_bytes": None,
        "startup_seconds": {"all": 1.0},
    }


def broken(plan: str, folder: Path) -> int:
    if plan == "crash":
        print("RuntimeError: the crash", file=sys.stderr)
        return 1
    if plan == "no memory":
        failure = {
            "kind": "out of memory", "message": "you tried to allocate 8 GB", "type": "RuntimeError", "phase": "steps",
            "step": 3, "device_peak_bytes": None, "resident_peak_bytes": 5 * 10**9,
        }  # fmt: skip
        (folder / "failure-0.json").write_text(json.dumps(failure))
        return 1
    if plan == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    # It hangs, with a child in a session of its own that would outlive it, and hears no SIGTERM.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    (folder / "child").write_text(str(child.pid))
    if plan == "interrupt":
        os.kill(os.getppid(), signal.SIGINT)
    time.sleep(600)
    return 0


if __name__ == "__main__":
    sys.exit(main())
