"""Runs that are killed again and again, and must end as if nothing had happened.

A reference run trains once without interruption. Then the same command is started in another folder, killed with
SIGKILL at a random moment, and started again, until the run has finished: its losses, its checkpoints and its exported
weights must be the reference's, bit for bit. Real processes all the way: the command, DeepSpeed's launcher, two
ranks on gloo.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import random
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
from safetensors.torch import load_file

from codeparrot_ds.checkpoint.folders import MANIFEST, REPLACED, Checkpoint, checkpoint_folders
from codeparrot_ds.corpus.tokenizer import train_tokenizer
from codeparrot_ds.hub.local_git import LocalRepository

REPOSITORY = Path(__file__).resolve().parents[2]
NAME = "brave-otter-7"
SAVE_EVERY = 4
TARGETS = ("one rank", "all ranks", "launcher", "command")
MOMENTS = ("saving", "training", "starting")
MARK = "CODEPARROT_DS_TORTURE"
"""Environment variable by which every process of a start is found, whoever its parent is by then."""
OF_A_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_SIZE", "OMP_NUM_THREADS")
GONE_SECONDS = 60
"""How long what a kill leaves behind may take to end: ranks save at the next step and stop."""
HUNG_SECONDS = 300


@dataclasses.dataclass(frozen=True, kw_only=True)
class Course:
    """What every run trains on, and how: dropout, several epochs, a checkpoint every few steps."""

    folder: Path
    """With corpus, tokenizer and the model's shape."""
    deepspeed: str = "zero2"
    hub: str = "off"
    """``local``, with a branch that must get every checkpoint once, or ``off``."""
    steps: int = 40
    """Of each run: room for some kills."""
    prefix: tuple[str, ...] = ()
    """A command that becomes the training command, in surroundings of its own."""
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Beside this process's."""

    def typed(self, output_dir: Path) -> list[str]:
        return [
            *self.prefix,
            *(sys.executable, "-m", "codeparrot_ds", "train", "demo", "--num-gpus", "2"),
            *("--model", str(self.folder / "config.json"), "--data", str(self.folder / "corpus")),
            *("--tokenizer", str(self.folder / "tokenizer"), "--deepspeed", self.deepspeed, "--dropout", "0.1"),
            *("--seq-length", "32", "--global-batch-size", "8", "--micro-batch-size", "2", "--num-lanes", "4"),
            *("--shuffle-buffer", "8", "--num-workers", "1", "--learning-rate", "5e-4", "--num-warmup-steps", "4"),
            *(
                "--max-train-steps",
                str(self.steps),
                "--save-checkpoint-steps",
                str(SAVE_EVERY),
                "--keep-checkpoints",
                "2",
            ),
            *("--max-eval-steps", "2", "--log-steps", "1", "--wandb", "off", "--hub", self.hub),
            *("--output-dir", str(output_dir), "--run-name", NAME),
        ]


def lay_course(folder: Path, *, validation_documents: int = 4) -> Path:
    """Writes a corpus of some documents, a tokenizer of bytes and a model's shape; returns the folder."""
    draw = random.Random(1)
    for split, count in (("train", 60), ("validation", validation_documents)):
        (folder / "corpus" / split).mkdir(parents=True)
        texts = [f"def {split}_{n}():\n    return {draw.randrange(10**9)}\n" for n in range(count)]
        lines = [json.dumps({"path": "a.py", "content": text}) + "\n" for text in texts]
        (folder / "corpus" / split / "part-00000.jsonl").write_text("".join(lines))
    train_tokenizer(folder / "corpus", folder / "tokenizer", vocab_size=260)
    shape = {"model_type": "gpt2", "n_layer": 2, "n_embd": 128, "n_head": 2, "n_positions": 32}
    (folder / "config.json").write_text(json.dumps(shape))
    return folder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ending:
    """What a finished run is compared by."""

    rows: list[dict[str, Any]]
    """Of ``metrics.jsonl``, without the times."""
    files: dict[str, str]
    """SHA-256 of every file of the last checkpoint but two that quote the config, which names folders; of the tensors
    alone in those of the random number generators, for Python's own is nobody's here."""
    startup_seconds: float
    """From the command to the first step."""


def ending(run: Path, steps: int) -> Ending:
    """Reads how a run ended; a UserError or an AssertionError where its last checkpoint is not whole."""
    of_the_clock = {"time", "tokens_per_second", "mfu", "step_seconds", "data_wait_seconds", "memory_bytes"}
    of_the_clock |= {"rank_seconds_median", "rank_seconds_max", "slowest_rank"}
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = Checkpoint.of_step(run / "checkpoints", steps)
    assert last.damage() == []
    written = last.manifest().files
    record = json.loads((run / "run.json").read_text())
    files = {name: file.sha256 for name, file in written.items() if name not in ("state.json", "export/README.md")}
    for name in [name for name in files if name.startswith("rng-")]:
        tensors = load_file(last.path / name)
        files[name] = hashlib.sha256(b"".join(bytes(tensors[key].numpy()) for key in sorted(tensors))).hexdigest()
    return Ending(
        rows=[{key: value for key, value in row.items() if key not in of_the_clock} for row in rows],
        files=files,
        startup_seconds=sum(record["starts"][-1].get("startup_seconds", {}).values()),
    )


@dataclasses.dataclass(kw_only=True)
class Kill:
    """One kill, and what came of it."""

    moment: str
    """What was waited for: ``saving``, ``training`` or ``starting``."""
    target: str
    """Who was killed."""
    seconds: float = 0.0
    """From the command to the kill."""
    in_a_save: bool = False
    """Whether a checkpoint was being written then."""
    torn: bool = False
    """Whether it was left half-written."""
    exit_code: int = 0
    """Of the command."""
    gone_seconds: float = 0.0
    """Until every process of the start had ended and the run's lock was free."""
    newest_step: int | None = None
    """Of the newest checkpoint that it left; None for none."""
    problems: list[str] = dataclasses.field(default_factory=list)
    """What was not as it must be in its run from then on, in sentences."""


class Start:
    """The command, running in the background.

    Args:
        course: of the run.
        output_dir: where the run's folder is.
        output: file that gets its words.
    """

    def __init__(self, course: Course, output_dir: Path, output: Path) -> None:
        self.run, self.output = output_dir / NAME, output
        self._mark = uuid.uuid4().hex
        self._left_by_others = self._stagings()
        self._old_metrics = self._metrics()[0]
        self._rows_at_first: int | None = None
        kept = {key: value for key, value in os.environ.items() if key not in OF_A_LAUNCHER}
        self.began = time.monotonic()
        with output.open("wb") as file:
            self.command = subprocess.Popen(
                course.typed(output_dir),
                cwd=REPOSITORY,
                env=kept | {"PYTHONPATH": str(REPOSITORY), MARK: self._mark} | dict(course.environment),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def ended(self) -> bool:
        return self.command.poll() is not None

    def wait(self) -> int:
        """Waits for the end of a start that nobody kills; returns the exit code."""
        return self.command.wait(timeout=HUNG_SECONDS)

    def said(self) -> str:
        return self.output.read_text(errors="replace")

    def processes(self, target: str) -> list[psutil.Process]:
        """The living processes that a target is; fewer than there will be while the start is under way."""
        try:
            command = psutil.Process(self.command.pid)
            if target == "command":
                return [command]
            launchers = [one for one in command.children() if "deepspeed.launcher.launch" in one.cmdline()]
            if target == "launcher":
                return launchers
            return [
                rank
                for launcher in launchers
                for rank in launcher.children()
                if any(word.startswith("--local_rank=") for word in rank.cmdline())
            ]
        except psutil.NoSuchProcess:
            return []

    def alive(self) -> list[psutil.Process]:
        """All processes of this start, its orphans among them, but those that push to the hub: they may take longer."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                ours = process.environ().get(MARK) == self._mark and process.status() != psutil.STATUS_ZOMBIE
                if ours and "codeparrot_ds.hub.worker" not in process.cmdline():
                    found.append(process)
        return found

    def locked(self) -> bool:
        """Whether somebody holds the run's folder."""
        try:
            with (self.run / ".lock").open("a+") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

    def stagings(self) -> set[str]:
        """The checkpoints that this start is writing, or that it left half-written."""
        return self._stagings() - self._left_by_others

    def _stagings(self) -> set[str]:
        try:
            names = os.listdir(self.run / "checkpoints")
        except FileNotFoundError:
            return set()
        return {name for name in names if re.fullmatch(r"\.staging-\d+-[0-9a-f]+", name)}

    def rows(self) -> int:
        """Rows of metrics since this start began to train."""
        inode, rows = self._metrics()
        if inode == self._old_metrics:  # a start replaces the file before it trains
            return 0
        if self._rows_at_first is None:
            self._rows_at_first = rows
        return rows - self._rows_at_first

    def _metrics(self) -> tuple[int | None, int]:
        try:
            with (self.run / "metrics.jsonl").open("rb") as file:
                return os.fstat(file.fileno()).st_ino, file.read().count(b"\n")
        except FileNotFoundError:
            return None, 0

    def end_all(self) -> None:
        """Leaves nothing running, whatever went wrong."""
        for process in self.alive():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.command.kill()
        self.command.wait()


class Torture:
    """Kills runs of one course until there were enough kills, and compares each run with the reference.

    Args:
        course: of all runs.
        room: folder for the runs.
        seed: of the moments and targets.
        plan: moments and targets in their order, before those that are drawn.

    Attributes:
        kills: those that hit, in order.
        runs: how many runs finished, each compared.
        problems: everything that was not as it must be, in sentences.
    """

    def __init__(self, course: Course, room: Path, seed: int, plan: Sequence[tuple[str, str]] = ()) -> None:
        self.course, self.room = course, room
        self.kills: list[Kill] = []
        self.runs = 0
        self.problems: list[str] = []
        self._draw = random.Random(seed)
        self._plan = list(plan)[::-1]
        self._starts = 0
        (room / "output").mkdir(parents=True, exist_ok=True)
        start = self._start(room / "reference")
        try:
            assert start.wait() == 0, start.said()[-3000:]
        finally:
            start.end_all()
        self.reference = ending(start.run, course.steps)

    def _start(self, output_dir: Path) -> Start:
        self._starts += 1
        return Start(self.course, output_dir, self.room / "output" / f"{self._starts:04d}.txt")

    def torment(self, kills: int) -> Iterator[Kill]:
        """Yields every kill that hit, until there were as many, and lets the last run finish."""
        aim = len(self.kills) + kills
        while len(self.kills) < aim:
            output_dir = self.room / f"run-{self.runs}"
            newest: int | None = None
            finished = False
            of_this_run: list[Kill] = []
            while not finished:
                kill = self._next_kill() if len(self.kills) < aim else None
                start, known = self._start(output_dir), len(self.problems)
                try:
                    hit = kill is not None and self._kill(start, kill)
                    if not hit:
                        finished = self._finish(start)
                    self._check_start(start, newest)
                finally:
                    start.end_all()
                newest = newest_checkpoint(start.run)
                if kill is not None and hit:
                    kill.newest_step = newest
                    self.kills.append(kill)
                    of_this_run.append(kill)
                    yield kill
                elif kill is not None:  # the start had ended before: the next one is for it
                    self._plan.append((kill.moment, kill.target))
                self._blame(of_this_run, known)
                if not hit and not finished:
                    return  # the problem is on the list
            known = len(self.problems)
            self._compare(output_dir / NAME)
            self._blame(of_this_run, known)
            self.runs += 1

    def _blame(self, kills: list[Kill], known: int) -> None:
        for kill in kills:
            kill.problems += self.problems[known:]

    def _next_kill(self) -> Kill:
        """Moments and targets in a random order: two of any five kills come in a save, two before any step.

        Twenty are every moment with every target, as often as it is in the five.
        """
        if not self._plan:
            moments = ("saving", "saving", "training", "starting", "starting")
            targets = [self._draw.sample(TARGETS, len(TARGETS)) for _ in moments]
            for turn in zip(*targets, strict=True):
                self._plan += self._draw.sample(list(zip(moments, turn, strict=True)), len(moments))
        moment, target = self._plan.pop()
        return Kill(moment=moment, target=target)

    def _kill(self, start: Start, kill: Kill) -> bool:
        """Waits for the moment and kills; False when the start ended before."""
        return self._moment_comes(start, kill) and self._kill_now(start, kill)

    def _kill_now(self, start: Start, kill: Kill) -> bool:
        # A kill while the command is alone waits for whom it is meant for.
        count = 2 if kill.target in ("one rank", "all ranks") else 1
        while len(victims := start.processes(kill.target)) < count:
            if start.ended():
                return False
            time.sleep(0.002)
        if kill.target == "one rank":
            victims = [self._draw.choice(victims)]
        self._draw.shuffle(victims)
        kill.in_a_save = bool(start.stagings())
        kill.seconds = round(time.monotonic() - start.began, 3)
        living = 0
        for victim in victims:
            with contextlib.suppress(psutil.NoSuchProcess):
                living += victim.status() != psutil.STATUS_ZOMBIE
                victim.kill()
        if living < len(victims):
            self._wait_until_gone(start)
            return False
        self._after(start, kill)
        return True

    def _moment_comes(self, start: Start, kill: Kill) -> bool:
        draw = self._draw
        if kill.moment == "starting":
            until = time.monotonic() + draw.uniform(0, self.reference.startup_seconds)
            return self._wait(start, lambda: time.monotonic() >= until)
        if kill.moment == "training":
            number = draw.randint(1, 8)
            come = self._wait(start, lambda: start.rows() >= number)
        else:
            number, seen = draw.choice((1, 1, 1, 2, 3)), set[str]()

            def enough() -> bool:
                seen.update(start.stagings())
                return len(seen) >= number

            come = self._wait(start, enough)
        time.sleep(draw.uniform(0, 0.15))
        return come and not start.ended()

    def _wait(self, start: Start, condition: Any) -> bool:
        deadline = time.monotonic() + HUNG_SECONDS
        while not condition():
            if start.ended():
                return False
            assert time.monotonic() < deadline, f"hangs: {start.said()[-3000:]}"
            time.sleep(0.002)
        return True

    def _after(self, start: Start, kill: Kill) -> None:
        """Waits until everything of the start is gone."""
        kill.gone_seconds = self._wait_until_gone(start)
        kill.torn = bool(start.stagings())
        kill.exit_code = start.command.wait()
        if kill.exit_code == 0:
            self._problem(start, f"the command exits with 0 after a kill of {kill.target}")

    def _wait_until_gone(self, start: Start) -> float:
        began = time.monotonic()
        while (left := start.alive()) or start.locked():
            if time.monotonic() > began + GONE_SECONDS:
                self._problem(start, f"after {GONE_SECONDS} s there are {[process.cmdline() for process in left]}")
                break
            time.sleep(0.05)
        return round(time.monotonic() - began, 2)

    def _finish(self, start: Start) -> bool:
        code = start.wait()
        if code != 0:
            self._problem(start, f"exit code {code} without a kill: {start.said()[-2000:]}")
        return code == 0

    def _check_start(self, start: Start, newest: int | None) -> None:
        """A start that came far enough to say so goes on from the newest checkpoint, and finds none damaged."""
        said = start.said()
        resumed = re.search(r"^resumed from step (\d+)", said, re.MULTILINE)
        if resumed and int(resumed[1]) != newest:
            self._problem(start, f"went on from step {resumed[1]} instead of {newest}")
        if "evaluation at step 0" in said and newest is not None:
            self._problem(start, f"began from scratch, with a checkpoint of step {newest}")
        for words in ("damaged", "set aside", "is in use by", "could not be written"):
            if words in said:
                self._problem(start, f"said: {next(line for line in said.splitlines() if words in line)}")

    def _compare(self, run: Path) -> None:
        """A run that finished is the reference, but for the clock."""
        found = ending(run, self.course.steps)
        wrong = [row for row, wanted in zip(found.rows, self.reference.rows, strict=False) if row != wanted]
        if wrong or len(found.rows) != len(self.reference.rows):
            self.problems.append(f"{run}: {len(wrong)} of {len(found.rows)} rows differ, the first is {wrong[:1]}")
        different = sorted(
            name
            for name in found.files.keys() | self.reference.files.keys()
            if found.files.get(name) != self.reference.files.get(name)
        )
        if different:
            self.problems.append(f"{run}: differs in {', '.join(different)}")
        hidden = [path.name for path in (run / "checkpoints").iterdir() if path.name.startswith((".", "aside"))]
        if hidden:
            self.problems.append(f"{run}: {', '.join(hidden)} was left behind")
        if self.course.hub != "off":
            self._compare_branch(run)

    def _compare_branch(self, run: Path) -> None:
        """Every checkpoint is on the branch, none twice; a run that was stopped has more of them."""
        pushed = self._pushed(run)
        missing = set(range(SAVE_EVERY, self.course.steps + 1, SAVE_EVERY)) - set(pushed)
        if missing or len(pushed) != len(set(pushed)):
            self.problems.append(f"{run}: the branch has the steps {pushed}")

    def _pushed(self, run: Path) -> list[int]:
        """The steps on the run's branch, in order."""
        steps = [commit.trailer("Step") for commit in LocalRepository(run.parent / "hub.git").commits(NAME)]
        return sorted(int(step) for step in steps if step)

    def _problem(self, start: Start, sentence: str) -> None:
        self.problems.append(f"{start.output}: {sentence}")


def newest_checkpoint(run: Path) -> int | None:
    """The step of the newest whole checkpoint; one whose place another was to take counts."""
    found = checkpoint_folders(run / "checkpoints")
    steps = [checkpoint.step for checkpoint in found if (checkpoint.path / MANIFEST).is_file()]
    steps += [int(path.name[-8:]) for path in (run / "checkpoints").glob(f"{REPLACED}*")]
    return max(steps, default=None)


def figures(kills: list[Kill]) -> dict[str, Any]:
    """How many kills of which kind there were."""
    return {
        "kills": len(kills),
        "in a save": sum(kill.in_a_save for kill in kills),
        "left a half-written checkpoint": sum(kill.torn for kill in kills),
        **{moment: sum(kill.moment == moment for kill in kills) for moment in MOMENTS},
        **{target: sum(kill.target == target for kill in kills) for target in TARGETS},
    }
