"""Stops and breaks runs on a cluster of network namespaces at random moments, and times what surrounds a run.

python benchmarks/launching.py                       # as root, with pdsh, iproute2 and openssh-server; half an hour
python benchmarks/launching.py --parts stops --moments 5 --out /tmp/record
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from record import REPOSITORY, record_parser, write_record

sys.path[:0] = [str(REPOSITORY)]

import psutil  # noqa: E402

from tests.cluster.cluster import OF_A_LAUNCHER, Cluster, missing  # noqa: E402
from tests.cluster.trainings import Training, newest_valid_step, options, outcome, rows, train_on_one_host  # noqa: E402
from tests.torture.kills import lay_course  # noqa: E402

PARTS = ("stops", "losses", "doctor", "overhead")
HOSTS = ("alpha", "beta")
STEPS = 400
MOMENTS = ("step", "evaluate", "save")
HANG_SECONDS = 10
FAULTS = {
    "killed": ("rank lost: ", r"rank {rank} on {host} \(process {pid}\) was killed by SIGKILL", 4, 5),
    "stopped": ("hang: ", r"rank {rank} on {host} \(process {pid}\) is a stopped process", 5, HANG_SECONDS + 5),
    "cut": ("rank lost: ", r"host {host} \(rank {rank}\) has not responded", 4, HANG_SECONDS + 5),
}
"""Of each: how the line begins, the rest of it, the exit code, and the seconds within which it must be said."""
PATIENCE_SECONDS = 900.0
"""For a whole run that nobody touches, on a machine that does other things."""
GONE_SECONDS = {"stop": 30.0, "killed": 30.0, "stopped": 30.0, "cut": 60.0}


class Breaker:
    """Runs on a cluster that are stopped or broken again and again, and compared with one that nobody touched.

    Attributes:
        events: what was done and what came of it.
        problems: everything that was not as it must be, in sentences.
    """

    def __init__(self, cluster: Cluster, course: Path, room: Path, seed: int, seconds: float) -> None:
        self.cluster, self.course, self.room = cluster, course, room
        self.draw = random.Random(seed)
        self.deadline = time.monotonic() + seconds
        self.events: list[dict[str, Any]] = []
        self.problems: list[str] = []
        self.reference = room / "alone" / "brave-otter-7"
        train_on_one_host(self.reference, self._options(), len(HOSTS), PATIENCE_SECONDS)

    def _options(self) -> list[str]:
        return options(self.course, "--max-train-steps", str(STEPS))

    def _start(self, run: Path, *extra: str) -> Training:
        hostfile = self.cluster.hostfile("".join(f"{host} slots=1\n" for host in HOSTS))
        return Training(self.cluster, run, [*self._options(), "--hostfile", hostfile, *extra])

    def stops(self, moments: int) -> Iterator[dict[str, Any]]:
        """SIGTERM to the front door, again and again, of one run that then finishes."""
        run = self.room / "stopped" / "brave-otter-7"
        for number in range(moments):
            if time.monotonic() > self.deadline:
                break
            training = self._start(run)
            moment = MOMENTS[number % len(MOMENTS)]
            self._wait_for(training, moment)
            training.process.send_signal(signal.SIGTERM)
            asked = time.monotonic()
            code = training.wait()
            gone = self._gone(training, asked, GONE_SECONDS["stop"])
            end = outcome(run)
            saved, last = newest_valid_step(run), training.last_step()
            event = {"fault": "SIGTERM", "moment": moment, "code": code, "gone_seconds": gone, "step": last}
            if (code, end["status"], end["step"]) != (0, "stopped", saved) or saved != last:
                self._problem(training, f"{event}: {end}, newest valid checkpoint {saved}, last step {last}")
            self.events.append(event)
            yield event
        self._finish(run)

    def losses(self, moments: int) -> Iterator[dict[str, Any]]:
        """Ranks killed and stopped, hosts cut off: each first fault of a start is followed by a restart, a second one
        ends it."""
        run = self.room / "broken" / "brave-otter-7"
        plan = [(fault, moment) for fault in FAULTS for moment in MOMENTS]
        order: list[tuple[str, str]] = []
        done = 0
        while done < moments and time.monotonic() < self.deadline:
            training = self._start(run, "--max-restarts", "1", "--hang-seconds", str(HANG_SECONDS))
            for restarts in (True, False):
                order = order or self.draw.sample(plan, len(plan))
                fault, moment = order.pop()
                event = self._break(training, fault, moment, restarts)
                done += 1
                self.events.append(event)
                yield event
            self.cluster.mend(str(event["host"]))
        self._finish(run)

    def _break(self, training: Training, fault: str, moment: str, restarts: bool) -> dict[str, Any]:
        self._wait_for(training, moment)
        ranks = training.ranks()
        rank = self.draw.randrange(len(HOSTS))
        host, pid = HOSTS[rank], ranks[rank]
        words_before = len(training.said())
        began = time.monotonic()
        if fault == "cut":
            self.cluster.cut(host)
        else:
            os.kill(pid, signal.SIGKILL if fault == "killed" else signal.SIGSTOP)
        begin, rest, wanted, limit = FAULTS[fault]
        try:
            line = self._until_line(training, begin, words_before, limit + 30)
        finally:
            if restarts and fault == "cut":
                self.cluster.mend(host)
        named = round(time.monotonic() - began, 2)
        event: dict[str, Any] = {"fault": fault, "moment": moment, "host": host, "rank": rank, "named_seconds": named}
        event |= {"then": "restart" if restarts else "end", "said": line}
        if named > limit or not re.search(rest.format(rank=rank, host=host, pid=pid), line):
            self._problem(training, f"{event}")
        if not restarts:
            event["code"] = training.wait()
            event["gone_seconds"] = self._gone(training, began, GONE_SECONDS[fault])
            if event["code"] != wanted:
                self._problem(training, f"{event}: exit code {wanted} expected")
        return event

    def _until_line(self, training: Training, begin: str, after: int, seconds: float) -> str:
        deadline = time.monotonic() + seconds
        while not (
            found := re.search(r"codeparrot-ds train: (?:rank lost|hang|failed): .*\n", training.said()[after:])
        ):
            if time.monotonic() > deadline:
                self._problem(training, f"nothing was said within {seconds} s")
                return ""
            time.sleep(0.01)
        return found[0].strip() if begin in found[0] else f"(not {begin}) {found[0].strip()}"

    def _wait_for(self, training: Training, moment: str) -> None:
        """A moment of this start's training: some steps after the checkpoint that it began from."""
        first = newest_valid_step(training.run)
        before = training.metrics()

        def trains() -> bool:
            return training.metrics() != before and training.last_step() > first

        training.until(lambda: trains() and len(training.ranks()) == len(HOSTS))
        steps = self.draw.randint(1, 12)
        if moment == "step":
            training.until(lambda: training.last_step() >= first + steps)
            time.sleep(self.draw.uniform(0, 0.2))
        elif moment == "evaluate":
            training.until(training.evaluating)
            time.sleep(self.draw.uniform(0, 0.3))
        else:
            training.until(training.saving)
            time.sleep(self.draw.uniform(0, 0.05))

    def _gone(self, training: Training, since: float, limit: float) -> float:
        """Seconds until no process of the run was left on any host."""
        while left := {host: self.cluster.of_the_run(host) for host in HOSTS if self.cluster.of_the_run(host)}:
            if time.monotonic() > since + limit:
                self._problem(training, f"after {limit} s there are {left}")
                break
            time.sleep(0.05)
        return round(time.monotonic() - since, 2)

    def _finish(self, run: Path) -> None:
        training = self._start(run)
        code = training.wait(PATIENCE_SECONDS)
        if code != 0:
            self._problem(training, f"exit code {code} of the start that nobody touched")
        found, wanted = rows(run), rows(self.reference)
        wrong = [row for row, right in zip(found, wanted, strict=False) if row != right]
        if wrong or len(found) != len(wanted):
            self.problems.append(f"{run}: {len(wrong)} of {len(found)} rows differ, the first is {wrong[:1]}")

    def _problem(self, training: Training, sentence: str) -> None:
        self.problems.append(f"{sentence}\n{training.said()[-3000:]}")


def doctor_of_many(folder: Path, hosts: int, rounds: int) -> dict[str, Any]:
    """Seconds of ``doctor`` for healthy hosts, all on this machine's cores."""
    cluster = Cluster(folder, tuple(f"host-{number:02d}" for number in range(hosts)))
    seconds = []
    try:
        cluster.start()
        hostfile = cluster.hostfile("".join(f"{name} slots=1\n" for name in cluster.names))
        for _ in range(rounds):
            began = time.monotonic()
            said = cluster.codeparrot("doctor", "--hostfile", hostfile, "--output-dir", str(folder), "--json")
            seconds.append(round(time.monotonic() - began, 2))
            answer = json.loads(said.stdout)
            assert said.returncode == 0 or all(one["warning"] for one in answer["findings"]), answer["findings"]
    finally:
        cluster.close()
    return {"hosts": hosts, "seconds": seconds}


def overhead(course: Path, room: Path, rounds: int) -> dict[str, Any]:
    """Seconds from the command to two ranks' processes: the front door, and the bare launcher, turn by turn."""
    environment = {key: value for key, value in os.environ.items() if key not in OF_A_LAUNCHER}
    environment |= {"PYTHONPATH": str(REPOSITORY), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    arguments = [*options(course, "--max-train-steps", "1"), "--output-dir", str(room / "overhead"), "--run-name"]
    bare = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2", "--module", "codeparrot_ds.train"]
    front = [sys.executable, "-m", "codeparrot_ds", "train"]
    seconds: dict[str, list[float]] = {"front door": [], "deepspeed": []}
    for number in range(rounds + 1):
        for name, command in (("deepspeed", bare), ("front door", front)):
            extra = {"LOCAL_SIZE": "2"} if name == "deepspeed" else {}  # how many ranks its CPU accelerator counts
            whole = [*command, *arguments, f"{name[0]}-b-{number}"]
            took = _until_ranks(whole, environment | extra)
            if number:  # the first one warms the disk's cache
                seconds[name].append(took)
    return seconds


def _until_ranks(command: list[str], environment: dict[str, str]) -> float:
    began = time.time()
    with tempfile.TemporaryFile() as words:
        process = subprocess.Popen(command, env=environment, cwd=REPOSITORY, stdout=words, stderr=words)
        try:
            while True:
                if process.poll() is not None:
                    words.seek(0)
                    raise AssertionError(words.read().decode(errors="replace"))
                tree = psutil.Process(process.pid).children(recursive=True)
                ranks = [one for one in tree if any(word.startswith("--local_rank=") for word in _words(one))]
                # Two ranks; their guards may be there already, with the same words, and children of theirs.
                parents = [one for one in ranks if one.ppid() not in {other.pid for other in ranks}]
                if len(parents) >= 2:
                    return round(max(one.create_time() for one in parents) - began, 2)
                time.sleep(0.02)
        finally:
            if process.poll() is None:
                tree = psutil.Process(process.pid).children(recursive=True)
                for one in [*tree, psutil.Process(process.pid)]:
                    try:
                        one.kill()
                    except psutil.NoSuchProcess:
                        continue
            process.wait()


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def main() -> int:
    parser = record_parser(__doc__, name="launching-cpu")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--moments", type=int, default=20, help="of stops, and of losses")
    parser.add_argument("--minutes", type=float, default=60.0, help="after which no further moment of a part is tried")
    parser.add_argument("--hosts", type=int, default=16, help="that doctor looks at")
    parser.add_argument("--rounds", type=int, default=5, help="of doctor and of the launchers")
    parser.add_argument("--seed", type=int, default=1)
    options_given = parser.parse_args()
    reason = missing()
    if reason is not None:
        parser.error(reason)
    raw: dict[str, Any] = {}
    problems: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        room = Path(name)
        course = lay_course(room / "course", validation_documents=120)
        for part in options_given.parts:
            (room / part).mkdir()
            began = time.monotonic()
            if part == "doctor":
                raw[part] = doctor_of_many(room / part, options_given.hosts, options_given.rounds)
            elif part == "overhead":
                raw[part] = overhead(course, room / part, options_given.rounds)
            else:
                raw[part], found = _break_runs(part, course, room / part, options_given)
                problems += found
            print(f"{part}: {time.monotonic() - began:.0f} s", flush=True)
    for problem in problems:
        print(f"PROBLEM: {problem}", flush=True)
    folder = write_record(
        options_given.name,
        title="Runs on several hosts: stopped, broken, looked at",
        text=report(raw, problems),
        raw=raw | {"problems": problems},
        out=options_given.out,
    )
    print((folder / "README.md").read_text())
    return 1 if problems else 0


def _break_runs(
    part: str, course: Path, room: Path, given: argparse.Namespace
) -> tuple[list[dict[str, Any]], list[str]]:
    (room / "cluster").mkdir()
    cluster = Cluster(room / "cluster", HOSTS)
    try:
        cluster.start()
        breaker = Breaker(cluster, course, room, given.seed, 60 * given.minutes)
        work: Callable[[int], Iterator[dict[str, Any]]] = breaker.stops if part == "stops" else breaker.losses
        for event in work(given.moments):
            print(event, flush=True)
        return breaker.events, breaker.problems
    finally:
        cluster.close()


def report(raw: dict[str, Any], problems: list[str]) -> str:
    """Tables of what was done."""
    lines = [f"{len(problems)} problem(s). A problem would be: a wrong or missing name, a name too late, a wrong exit "]
    lines[0] += (
        "code, a process left on a host, a checkpoint that is missing or damaged, a step lost at a stop, or rows "
    )
    lines[0] += "of metrics that differ from those of one host that nobody touched."
    for part in ("stops", "losses"):
        if part in raw:
            lines += ["", *_table(raw[part])]
    if "losses" in raw:
        lines += ["", f"Two hosts of one rank; `--hang-seconds {HANG_SECONDS}`. A host that is cut off stays so until "]
        lines[-1] += "its processes have ended (where no restart follows) or until it is named."
    if "doctor" in raw:
        seconds = raw["doctor"]["seconds"]
        lines += ["", f"`doctor` for {raw['doctor']['hosts']} healthy hosts on this machine's cores: median "]
        lines[-1] += f"{statistics.median(seconds):.1f} s, at most {max(seconds):.1f} s."
    if "overhead" in raw:
        front, bare = (statistics.median(raw["overhead"][name]) for name in ("front door", "deepspeed"))
        lines += ["", f"From the command to two ranks on one host: `codeparrot-ds train` {front:.1f} s, "]
        lines[-1] += f"`deepspeed` {bare:.1f} s (medians of {len(raw['overhead']['deepspeed'])}, turn by turn)."
    return "\n".join(lines)


def _table(events: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| fault | moment | times | named after, s | all gone after, s | exit codes |",
        "|---|---|---|---|---|---|",
    ]
    for fault in dict.fromkeys(event["fault"] for event in events):
        for moment in MOMENTS:
            chosen = [one for one in events if (one["fault"], one["moment"]) == (fault, moment)]
            if chosen:
                named = _span([one["named_seconds"] for one in chosen if "named_seconds" in one])
                gone = _span([one["gone_seconds"] for one in chosen if "gone_seconds" in one])
                codes = ", ".join(str(code) for code in sorted({one["code"] for one in chosen if "code" in one}))
                lines.append(f"| {fault} | {moment} | {len(chosen)} | {named} | {gone} | {codes or 'restarted'} |")
    return lines


def _span(values: list[float]) -> str:
    return f"{min(values):.1f} - {max(values):.1f}" if values else ""


if __name__ == "__main__":
    sys.exit(main())
