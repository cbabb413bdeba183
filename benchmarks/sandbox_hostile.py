"""Every hostile program by itself, as root and as an ordinary user: verdict, what it leaves, and its memory.

python benchmarks/sandbox_hostile.py

Needs root (for the other user, and to count memory with a control group), the system's Python at /usr/bin/python3, and
setpriv. Run it on a machine that judges nothing else meanwhile.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from record import REPOSITORY, record_parser, write_record

sys.path.insert(0, str(REPOSITORY))  # the programs are the tests'

from codeparrot_ds.sandbox.groups import Group, make_group
from codeparrot_ds.sandbox.judge import Check, Limits, group_bytes
from tests.evaluation.escapes import ESCAPES
from tests.evaluation.hostile import HOSTILE, listening
from tests.evaluation.test_escapes import HASTY, SMALL, descendants, what_is_left
from tests.evaluation.wrong import PROBLEMS, WRONG

SECRET = "secret-5e0f3a"
USERS = {"root": [], "an ordinary user": ["setpriv", "--reuid=1000", "--regid=1000", "--clear-groups"]}
DRIVER = """
import json, os, sys
from codeparrot_ds.sandbox.judge import Check, Judge, Limits, check_sandbox
check_sandbox()
for line in sys.stdin:
    program, check, limits = json.loads(line)
    judge = Judge(Limits(**limits), 0)
    try:
        verdict = judge(program, Check(**check))
    finally:
        judge.close()
    print(json.dumps([verdict.kind, verdict.detail, len(os.listdir("/proc/self/fd"))]), flush=True)
"""
# Of the tree beside the program: the judging process and the tests' sandbox, with their copies of a message.
JUDGE_BYTES = 384 << 20


def programs() -> dict[str, tuple[str, Check, Limits, tuple[str, ...]]]:
    """By name: program, check, limits and the kinds that its verdict may have."""
    found = {}
    for name, (text, kinds) in (HOSTILE | ESCAPES).items():
        limits = HASTY if "timeout" in kinds else SMALL
        found[name] = (text, Check(tests=(f"assert answer() == {SECRET!r}",)), limits, tuple(kinds.split()))
    for name, (problem, text) in WRONG.items():
        if problem != "halve":  # needs numpy, which the system's Python has not
            found[f"wrong: {name}"] = (text, PROBLEMS[problem], SMALL, ("failed", "error", "exited"))
    return found


def copy_of_the_package() -> Path:
    """What an ordinary user may read, wherever this checkout is."""
    folder = Path(tempfile.mkdtemp(prefix="codeparrot-"))
    shutil.copytree(REPOSITORY / "codeparrot_ds" / "sandbox", folder / "codeparrot_ds" / "sandbox")
    for path in (REPOSITORY / "codeparrot_ds").glob("*.py"):
        shutil.copy(path, folder / "codeparrot_ds")
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755)
    return folder


class Peak(threading.Thread):
    """The most memory that a control group had since it was last asked, above what it had then."""

    def __init__(self, group: Group) -> None:
        super().__init__(daemon=True)
        names = ("memory.current", "memory.usage_in_bytes")
        self.file = next(path for name in names if (path := group.folders[0] / name).exists())
        self.base = self.most = self.usage()
        self.start()

    def usage(self) -> int:
        return int(self.file.read_text())

    def run(self) -> None:
        while self.file.exists():
            try:
                self.most = max(self.most, self.usage())
            except OSError:  # removed in between
                return
            time.sleep(0.002)

    def restart(self) -> None:
        self.base = self.most = self.usage()

    def bytes(self) -> int:
        return self.most - self.base


def judge_as(user: str, found: dict[str, Any], asked: list[Any], port: int, abstract: str) -> list[dict[str, Any]]:
    """Rows of one user."""
    folder = copy_of_the_package()
    outside = folder / "outside"
    outside.mkdir()
    (outside / "home.txt").write_text(SECRET)
    for path in (outside, outside / "home.txt"):
        path.chmod(0o777)
    group = make_group(f"measure{len(asked)}{os.getpid()}", 16 << 30, 4096)
    assert group is not None, "no control group can be made here, which counts the memory"
    enter = "; ".join(f"echo 0 > {folder}/cgroup.procs" for folder in group.folders)
    process = subprocess.Popen(
        ["/bin/sh", "-c", f'{enter}; exec "$@"', "sh", *USERS[user], "/usr/bin/python3", "-B", "-c", DRIVER],
        text=True, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env={"PATH": os.environ["PATH"], "HOME": str(folder), "PYTHONPATH": str(folder), "CANARY": SECRET},
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    grouped = user == "root"
    places = {"home": str(outside / "home.txt"), "outside": str(outside), "port": port, "abstract": abstract}
    places["host"] = process.pid
    peak, rows = Peak(group), []
    for name, (text, check, limits, kinds) in {"warm": next(iter(found.values())), **found}.items():
        if any("{" + place in text for place in places):
            text = text.format_map(places)
        before = descendants()
        asked.clear()
        peak.restart()
        started = time.monotonic()
        print(json.dumps([text, asdict(check), asdict(limits)]), file=process.stdin, flush=True)
        kind, detail, descriptors = json.loads(process.stdout.readline())
        row = {
            "user": user, "name": name, "kind": kind, "right_kind": kind in kinds, "detail": detail,
            "plain": detail.isprintable() and len(detail) <= 200, "left": what_is_left(before),
            "files": sorted(path.name for path in outside.iterdir()) != ["home.txt"], "reached": len(asked),
            "peak_bytes": peak.bytes(), "descriptors": descriptors, "seconds": time.monotonic() - started,
        }  # fmt: skip
        each = group_bytes(limits) if grouped else limits.processes * 2 * limits.memory_bytes + limits.scratch_bytes
        row["bound_bytes"] = each + JUDGE_BYTES
        if name != "warm":
            rows.append(row)
    process.stdin.close()
    process.wait()
    shutil.rmtree(folder)
    while any(group.folders[0].glob("codeparrot-ds-*")):
        time.sleep(0.1)
    group.close()
    return rows


def main() -> None:
    parser = record_parser(__doc__, name="sandbox-hostile-cpu")
    options = parser.parse_args()
    assert ctypes.CDLL(None).prctl(36, 1, 0, 0, 0) == 0  # PR_SET_CHILD_SUBREAPER: no orphan is overlooked
    found = programs()
    with listening(b"secret") as (port, abstract, asked):
        rows = [row for user in USERS for row in judge_as(user, found, asked, port, abstract)]
    lines = ["| | " + " | ".join(USERS) + " |", "|---" * (len(USERS) + 1) + "|"]

    def count(text: str, choose: Any) -> None:
        counts = [sum(bool(choose(row)) for row in rows if row["user"] == user) for user in USERS]
        lines.append(f"| {text} | " + " | ".join(map(str, counts)) + " |")

    count("programs", lambda row: True)
    count("passed", lambda row: row["kind"] == "passed")
    count("another kind than expected", lambda row: not row["right_kind"])
    count("reached a server", lambda row: row["reached"])
    count("left processes, keys or segments", lambda row: row["left"])
    count("left files", lambda row: row["files"])
    count("a detail that is long or not plain", lambda row: not row["plain"])
    count("more open files in the judge than at first", lambda row: row["descriptors"] != rows[0]["descriptors"])
    count("more memory than the bound", lambda row: row["peak_bytes"] > row["bound_bytes"])
    for text, of in (("median peak, MiB", statistics.median), ("highest peak, MiB", max)):
        values = [of([row["peak_bytes"] for row in rows if row["user"] == user]) / 2**20 for user in USERS]
        lines.append(f"| {text} | " + " | ".join(f"{value:.0f}" for value in values) + " |")
    lines += ["", "| most memory | user | peak, MiB | bound, MiB |", "|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: -row["peak_bytes"])[:8]:
        sizes = f"{row['peak_bytes'] >> 20} | {row['bound_bytes'] >> 20}"
        lines.append(f"| {row['name']} | {row['user']} | {sizes} |")
    for row in rows:
        if not row["right_kind"] or row["left"] or row["reached"] or row["files"]:
            lines.append(f"\n{row['user']}: {row['name']}: {row['kind']} {row['detail']} {row['left']}")
    folder = write_record(
        options.name, title="Hostile programs in the sandbox", text="\n".join(lines), raw=rows, out=options.out
    )
    print((folder / "README.md").read_text())


if __name__ == "__main__":
    main()
