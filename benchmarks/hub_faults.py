"""Pushes checkpoints to a local Hub that fails half of all requests, kills the uploader, and pushes an export of 3 GB.

python benchmarks/hub_faults.py
"""

from __future__ import annotations

import collections
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from record import REPOSITORY, record_parser, write_record

sys.path[:0] = [str(REPOSITORY)]

from codeparrot_ds.errors import UserError  # noqa: E402
from codeparrot_ds.hub.local_git import LocalRepository  # noqa: E402
from codeparrot_ds.hub.queue import PushQueue  # noqa: E402
from codeparrot_ds.hub.worker import drain, read_destination, start_drain  # noqa: E402
from codeparrot_ds.retry import Pauses  # noqa: E402
from tests.hub.model_hub import TOKEN, ModelHub, running_hub  # noqa: E402
from tests.hub.pushing import REPO, TEMPORARY, branch_problems, chaos, enqueue, export_of, make_run  # noqa: E402

TIMEOUT_SECONDS = 0.5
HANG_SECONDS = 0.8
STATUSES = (*TEMPORARY * 2, 401, 403, 404)
"""Of the injected refusals; the last three end a worker, as they should, and it is started again."""
SHORT = {"first_seconds": 0.05, "longest_seconds": 0.5}
"""Pauses between attempts; the worker's own begin with a second. The library's are as they are."""


def main() -> int:
    parser = record_parser(__doc__, name="hub-faults-2-cores")
    parser.add_argument("--pushes", type=int, default=200)
    parser.add_argument("--branches", type=int, default=10, help="runs that push side by side")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--gigabytes", type=float, default=3.0, help="of the large export")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--uploader", type=Path, help="used by this script itself: a run to drain")
    options = parser.parse_args()
    if options.uploader:
        return upload(options.uploader)
    with tempfile.TemporaryDirectory() as name:
        os.environ.update(HF_TOKEN=TOKEN, HF_HOME=f"{name}/hf", HF_HUB_DISABLE_XET="1")
        os.environ["CODEPARROT_HUB_TIMEOUT_SECONDS"] = str(TIMEOUT_SECONDS)
        os.environ["PYTHONPATH"] = str(REPOSITORY)
        faults = through_faults(Path(name), options.pushes, options.branches, options.seed)
        print(json.dumps(faults), flush=True)
        kills = through_kills(Path(name), options.kills, options.seed)
        print(json.dumps(kills), flush=True)
        os.environ["CODEPARROT_HUB_TIMEOUT_SECONDS"] = "60"
        large = {place: large_export(Path(name), options.gigabytes, place) for place in ("Hub", "git")}
        print(json.dumps(large), flush=True)
    problems = [*faults["problems"], *kills["problems"], *(p for part in large.values() for p in part["problems"])]
    folder = write_record(
        options.name,
        title="Checkpoints pushed through faults and kills",
        text=report(faults, kills, large),
        raw={"faults": faults, "kills": kills, "large": large},
        out=options.out,
    )
    print((folder / "README.md").read_text())
    return 1 if problems else 0


def through_faults(base: Path, pushes: int, branches: int, seed: int) -> dict[str, Any]:
    """Runs side by side, an uploader process each, while half of all requests fail."""
    with running_hub(base / "faulty-hub") as hub:
        os.environ["HF_ENDPOINT"] = hub.endpoint
        hub.create(REPO)
        runs = {make_run(base / "faulty", f"brave-fox-{n}"): pushes // branches for n in range(branches)}
        for run, number in runs.items():
            enqueue(run, *range(10, 10 * number + 1, 10), size=100_000)
        hub.inject = chaos(seed, 0.5, 0.5, statuses=STATUSES, seconds=HANG_SECONDS)
        began = time.monotonic()
        command = [sys.executable, __file__, "--uploader"]
        uploaders = [subprocess.Popen([*command, str(run)], stdout=subprocess.PIPE, text=True) for run in runs]
        said = [json.loads(uploader.communicate()[0]) for uploader in uploaders]
        seconds = time.monotonic() - began
        hub.inject = lambda request: None
        problems = [
            p for run, number in runs.items() for p in branch_problems(hub, run, range(10, 10 * number + 1, 10))
        ]
        return {
            "pushes": sum(runs.values()),
            "branches": branches,
            "seconds": round(seconds, 1),
            "problems": problems,
        } | {
            "starts": sum(one["starts"] for one in said),
            "failed_attempts": sum(one["failures"] for one in said),
            **requests(hub),
        }


def upload(run: Path) -> int:
    """Drains a run's queue, beginning anew whenever the Hub says something that only the user could mend."""
    starts, failures = 0, []
    while PushQueue(run).entry_folders():
        starts += 1
        try:
            drain(PushQueue(run), read_destination(run), pauses=Pauses(600, **SHORT), say=failures.append)
        except UserError as error:
            failures.append(str(error))
    print(json.dumps({"starts": starts, "failures": len(failures)}))
    return 0


def requests(hub: ModelHub) -> dict[str, Any]:
    """How many requests there were, and what became of them."""
    kinds = collections.Counter(
        f"{row.fault} {row.status}" if row.fault == "status" else row.fault for row in hub.log if row.fault
    )
    lost = sum(row.fault == "lost" and "/commit/" in row.path for row in hub.log)
    return {
        "requests": len(hub.log),
        "failed_requests": sum(kinds.values()),
        "lost_answers_to_commits": lost,
        "faults": dict(sorted(kinds.items())),
    }


def through_kills(base: Path, kills: int, seed: int) -> dict[str, Any]:
    """The real worker of one run, killed at a random moment and started again."""
    draw, steps = random.Random(seed), range(1, kills + 11)
    with running_hub(base / "killing-hub") as hub:
        os.environ["HF_ENDPOINT"] = hub.endpoint
        run = make_run(base / "killed", "brave-fox-1")
        enqueue(run, *steps, size=100_000)
        hub.inject = chaos(seed, 0.1, 0, seconds=0.2)
        moments: collections.Counter[str] = collections.Counter()
        began = time.monotonic()
        while sum(moments.values()) < kills:
            seen, worker = len(hub.log), start_drain(run)
            until = seen + draw.randrange(1, 14)
            while len(hub.log) < until and worker.poll() is None:
                time.sleep(0.0005)
            time.sleep(draw.random() * 0.02)
            if worker.poll() is None:
                os.killpg(worker.pid, signal.SIGKILL)
                last = hub.log[-1].path.split("?")[0] if len(hub.log) > seen else "before a request"
                moments[next((part for part in MOMENTS if part in last), "other")] += 1
            worker.wait()
        left = len(PushQueue(run).pending())
        recorded = len(PushQueue(run).pushed())
        unrecorded = len(hub.commits(REPO, run.name)) - 1 - recorded if recorded else 0
        hub.inject = lambda request: None
        drain(PushQueue(run), read_destination(run), pauses=Pauses(60))
        return {
            "kills": sum(moments.values()),
            "pushes": len(steps),
            "waiting_after_the_last_kill": left,
            "commits_without_record_then": unrecorded,
            "seconds": round(time.monotonic() - began, 1),
            "last_request_before": dict(sorted(moments.items())),
            "problems": branch_problems(hub, run, steps),
        }


MOMENTS = ("/commit/", "/commits/", "/refs", "/revision/", "validate-yaml", "preupload", "batch", "/store/", "verify")


def large_export(base: Path, gigabytes: float, place: str) -> dict[str, Any]:
    """The memory of the processes that queue and push a sparse export, and of the same with a small one."""
    result: dict[str, Any] = {"gigabytes": gigabytes, "problems": []}
    with running_hub(base / f"large-{place}") as hub:
        os.environ["HF_ENDPOINT"] = hub.endpoint
        for name, size in (("small", 1000), ("large", int(gigabytes * 1e9))):
            run = make_run(base / f"runs-{place}", f"{name}-fox-1")
            if place == "git":
                spec = str(base / "large.git")
                (run / "run.json").write_text(json.dumps({"name": run.name, "hub": spec, "id": "x"}))
            export = export_of(run, 1)
            export.mkdir(parents=True)
            with open(export / "model.safetensors", "wb") as file:
                file.write(name.encode())
                file.truncate(size)
            for part, code in (("queue", QUEUE), ("push", PUSH)):
                began = time.monotonic()
                kib, children = measured(code, run, export)
                result[f"{name}_{part}_mb"] = round(max(kib, children) / 1024, 1)
                result[f"{name}_{part}_seconds"] = round(time.monotonic() - began, 1)
            (push,) = PushQueue(run).pushed()
            if place == "Hub":
                there = hub.files(REPO, push.commit)["model.safetensors"]["lfs"]["size"]
            else:
                there = int(LocalRepository(spec)._git("cat-file", "-s", f"{push.commit}:model.safetensors"))
            if there != size:
                result["problems"].append(f"{place}: {there} bytes arrived instead of {size}")
    return result


QUEUE = "from codeparrot_ds.hub.queue import PushQueue; PushQueue(run).enqueue(1, export, 'Step 1')"
PUSH = "from codeparrot_ds.hub import worker; assert worker.main([run]) == 0"


def measured(code: str, run: Path, export: Path) -> tuple[int, int]:
    """The largest resident size of a Python process that runs some code, and of its largest child, in KiB."""
    # Not ru_maxrss for the process itself: it begins with what the process that started it had.
    script = (
        f"import re, resource, sys; run, export = sys.argv[1:]; {code}; "
        "own = re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]; "
        "print(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    command = [sys.executable, "-c", script, str(run), str(export)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    own, children = done.stdout.splitlines()[-1].split()
    return int(own), int(children)


def report(faults: dict[str, Any], kills: dict[str, Any], large: dict[str, Any]) -> str:
    share = faults["failed_requests"] / faults["requests"]
    lines = [
        f"The real huggingface_hub client ({version('huggingface_hub')}) against the tests' local Hub (bare git "
        "repository, LFS by SHA-256), all on "
        "one machine that had other work to do. A problem would be: a checkpoint missing, doubled or out of order on "
        "its branch, a file whose SHA-256 is not the local one's, an entry left in the queue.",
        "",
        "## Faults in half of all requests",
        "",
        f"{faults['pushes']} pushes on {faults['branches']} branches side by side in {faults['seconds']} s: "
        f"**{len(faults['problems'])} problems**. {faults['failed_requests']} of {faults['requests']} requests failed "
        f"({share:.0%}); {faults['lost_answers_to_commits']} commits were made whose answer was lost. "
        f"{faults['failed_attempts']} attempts failed; uploaders were started {faults['starts']} times, anew after "
        f"each 401, 403 and 404. Pauses between attempts went from {SHORT['first_seconds']} to "
        f"{SHORT['longest_seconds']} s instead of from 1 s to 5 minutes.",
        "",
        "| fault | requests |",
        "|---|---|",
        *(f"| {kind} | {number} |" for kind, number in faults["faults"].items()),
        "",
        "## SIGKILL of the uploader",
        "",
        f"{kills['kills']} kills over {kills['pushes']} pushes, with faults in a tenth of the requests, then one "
        f"drain: **{len(kills['problems'])} problems**, {kills['seconds']} s. The last request before a kill:",
        "",
        "| request | kills |",
        "|---|---|",
        *(f"| {moment} | {number} |" for moment, number in kills["last_request_before"].items()),
        "",
        "## A large export",
        "",
        "Largest resident size of the processes that queue and push a sparse file, MB, Python and client included; for "
        "git that of the largest of its processes.",
        "",
        "| place | GB | queue | more than with 1 kB | push | more than with 1 kB | queue, s | push, s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for place, row in large.items():
        more = [round(row[f"large_{part}_mb"] - row[f"small_{part}_mb"], 1) for part in ("queue", "push")]
        lines.append(
            f"| {place} | {row['gigabytes']:g} | {row['large_queue_mb']} | {more[0]} | {row['large_push_mb']} "
            f"| {more[1]} | {row['large_queue_seconds']} | {row['large_push_seconds']} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
