"""Every call that a save makes to the system goes wrong once, and the newest complete checkpoint is found and right.

The calls are those of a real save: a DeepSpeed engine's fragments, the export, the manifest, the switch, retention and
the queue of the run's branch. What a kill or a failing disk leaves behind is restored by a start's own code into
another engine, and compared number by number.
"""

import dataclasses
import errno
import itertools
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from codeparrot_ds import durable
from codeparrot_ds.checkpoint.folders import Checkpoint, readable_checkpoints, recover
from codeparrot_ds.hub import queue
from codeparrot_ds.hub.queue import PushQueue
from codeparrot_ds.training import publish
from tests.torture.failing_disk import KILLED, NEEDS_SPACE, Call, Died, Disk, Fault, in_a_fork
from tests.torture.tiny_run import Content, TinyRun, checkpoint_steps, leftovers

AUDITED = ("open", "os.rename", "os.mkdir", "os.truncate", "os.link", "os.symlink")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A save, and what is there before and after it.

    Attributes:
        before: the run's folder before the save.
        after: the checkpoint that it makes when nothing goes wrong.
        step: what is saved.
        old: what the newest checkpoint of ``before`` brings back; None when there is none.
        new: what the saved one does.
        calls: the calls that the save makes.
    """

    before: Path
    after: Path
    step: int
    old: Content | None
    new: Content
    calls: list[Call]

    def wanted(self, run: TinyRun, calls: list[Call], *, power_cut: bool = False) -> Content | None:
        """What must be found after these calls: the switch was among them, or a power cut would undo it."""
        switch = Call("rename", Checkpoint.of_step(run.checkpoints, self.step).path)
        made = switch in calls
        if made and power_cut:
            made = Call("fsync", run.checkpoints) in calls[calls.index(switch) :]
        return self.new if made else self.old


class Bench:
    """A run, and three saves of it: the first, the next one with retention, and a step that is there already."""

    def __init__(self, run: TinyRun, room: Path) -> None:
        self.run, self.room = run, room
        self.cases = {"first": self._case("first", 10, None)}
        contents = {}
        for step in (10, 20):
            run.train_step()
            contents[step] = run.content(step)
            assert run.save(step).error is None
        self.cases["next"] = self._case("next", 30, contents[20])
        self.cases["again"] = self._case("again", 20, contents[20])

    def _case(self, name: str, step: int, old: Content | None) -> Case:
        """Saves once with a disk that does nothing but count; the run's folder is then as it was."""
        run, before, after = self.run, self.room / name / "before", self.room / name / "after"
        shutil.copytree(run.path, before)
        run.train_step()
        new = run.content(step)
        with Disk(run.path).watching() as disk:
            assert run.save(step).error is None
        newest = run.newest()
        assert newest is not None and run.load(newest).equals(new)
        shutil.copytree(newest.path, after)
        replace(run.path, before)
        return Case(before=before, after=after, step=step, old=old, new=new, calls=disk.calls)

    def save(self, case: Case, fault: Fault, *, in_background: bool = False) -> tuple[Disk, Any]:
        """Makes the case's save on a disk with a fault, from what was there before; returns the outcome, None if dead.

        In the background fewer calls write: the copy of all fragments is one piece.
        """
        replace(self.run.path, case.before)
        torch.set_rng_state(case.new.tensors["rng"])  # one for both engines: the restored one has changed it
        with Disk(self.run.path, fault).watching() as disk:
            try:
                return disk, self.run.save(case.step, in_background=in_background)
            except Died:
                return disk, None

    def newest(self) -> Content | None:
        """What the newest complete checkpoint brings back; none of them is damaged."""
        for checkpoint, problem in readable_checkpoints(self.run.checkpoints):
            assert problem is None and checkpoint.damage() == []
            return self.run.load(checkpoint)
        return None

    def restart(self) -> Content | None:
        """What a start of the run goes on with."""
        run = self.run
        recover(run.checkpoints)
        found = run.newest()
        assert not list(run.checkpoints.glob("aside-*")) and leftovers(run.checkpoints) == []
        if found is None:
            return None
        content = run.load(found)
        assert json.loads((run.checkpoints / "latest").read_text())["checkpoint"] == found.name
        run.publisher.queue_again(content.state)
        self.check_queue(found)
        return content

    def check_queue(self, checkpoint: Path) -> None:
        """The checkpoint's export waits for the branch, once, and nothing that waits is damaged."""
        pending = PushQueue(self.run.path).pending()
        exported = {name: file.sha256 for name, file in checkpoint.manifest().exported().items()}
        assert [entry.sha256 for entry in pending].count(exported) == 1
        assert [queue.damage(entry) for entry in pending] == [None] * len(pending)


def replace(folder: Path, source: Path) -> None:
    """Puts a folder in another's state; files are linked, for none is ever written to once it is complete."""
    shutil.rmtree(folder)
    shutil.copytree(source, folder, copy_function=os.link)


def is_content(found: Content | None, wanted: Content | None) -> bool:
    return found is wanted if found is None or wanted is None else found.equals(wanted)


@pytest.fixture(scope="module")
def bench(only_rank, tokenizer_dir):
    """The three saves, made by this process as the only rank of a run."""
    # In memory where that can be: some hundred thousand small files come and go.
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(publish, "start_drain", lambda run: None)  # a process for each save would take the time
        yield Bench(TinyRun(tokenizer_dir, Path(name, "brave-otter-7")), Path(name))


@pytest.fixture(params=["first", "next", "again"])
def case(bench, request):
    """One of the saves, with the training engine where it is to be saved."""
    case = bench.cases[request.param]
    bench.run.become(Checkpoint(case.after))
    yield case
    replace(bench.run.path, case.before)


def test_the_calls_are_those_of_every_file_and_folder(bench, case):
    """What is enumerated below is all of it: no file comes about without being made, written and synced here."""
    kinds = {}
    for call in case.calls:
        kinds.setdefault(call.path.name, set()).add(call.kind)
    files = [path for path in case.after.rglob("*") if path.is_file()]
    assert len(files) >= 12
    for path in files:
        assert {"create", "write", "fsync"} <= kinds[path.name], path
    assert len(case.calls) >= {"first": 80, "next": 110, "again": 110}[find(bench, case)]


def find(bench: Bench, case: Case) -> str:
    return next(name for name, other in bench.cases.items() if other is case)


@pytest.mark.parametrize("half", [False, True], ids=["at the call", "in the middle of a write"])
def test_killed_at_any_call(bench, case, half):
    numbers = [number for number, call in enumerate(case.calls) if call.kind == "write" or not half]
    for number in numbers:
        disk, outcome = bench.save(case, Fault(at=number, half=half))
        assert outcome is None and [call.kind for call in disk.calls] == [
            call.kind for call in case.calls[: number + 1]
        ]
        assert is_content(bench.restart(), case.wanted(bench.run, disk.calls[:-1])), disk.calls[-1]
    assert len(numbers) >= (20 if half else 80)


def test_killed_for_good(bench, case):
    """The test above freezes the disk; here the process does end, at some of the calls."""
    for number in range(0, len(case.calls), 12):
        assert in_a_fork(lambda: bench.save(case, Fault(at=number, exits=True))) == KILLED  # noqa: B023
        assert is_content(bench.restart(), case.wanted(bench.run, case.calls[:number])), case.calls[number]


def test_power_cut_at_any_call(bench, case):
    for number in range(len(case.calls)):
        disk, _ = bench.save(case, Fault(at=number, power_cut=True))
        wanted = case.wanted(bench.run, disk.calls[:-1], power_cut=True)
        assert is_content(bench.restart(), wanted), disk.calls[-1]


def test_power_cut_after_the_last_call(bench, case):
    """What was reported as saved and queued is on the disk."""
    replace(bench.run.path, case.before)
    torch.set_rng_state(case.new.tensors["rng"])
    with Disk(bench.run.path).watching() as disk:
        assert bench.run.save(case.step).error is None
        disk.cut_the_power()
    bench.check_queue(bench.run.newest())
    assert is_content(bench.restart(), case.new)


def test_any_call_is_answered_with_an_error(bench, case):
    """One sentence that names the place, nothing lost, nothing left behind, and the next save is as good as any."""
    told = 0
    for number in itertools.count():
        disk, outcome = bench.save(case, Fault(at=number, error=errno.EIO), in_background=True)
        if not disk.struck:
            break
        call = disk.calls[number]
        assert is_content(bench.newest(), case.wanted(bench.run, disk.calls[:number])), call
        if outcome.error is not None:
            check_sentence(bench.run, outcome.error)
            told += 1
        removing = call.kind in ("open", "unlink", "rmdir") and outcome.checkpoint is not None
        assert removing or leftovers(bench.run.checkpoints) == [], call
        check_next_save(bench, case)
    assert told >= 70


def test_full_disk_from_any_call_on(bench, case):
    """Half of the write that meets it still fits."""
    reached = 0
    for number, call in enumerate(case.calls):
        if call.kind not in NEEDS_SPACE:
            continue
        disk, outcome = bench.save(case, Fault(at=number, error=errno.ENOSPC, half=True, lasting=True))
        assert disk.struck and "No space left on device" in str(outcome.error), call
        check_sentence(bench.run, outcome.error)
        assert is_content(bench.newest(), case.wanted(bench.run, disk.calls[:number])), call
        assert leftovers(bench.run.checkpoints) == [], call
        check_next_save(bench, case)
        reached += 1
    assert reached >= 40


def test_disk_that_is_gone_from_any_call_on(bench, case):
    """Nothing can be cleaned up; a restart finds everything, and so does the next save when the disk is back."""
    for number, call in enumerate(case.calls):
        disk, _ = bench.save(case, Fault(at=number, error=errno.EIO, lasting=True))
        if number % 2:
            check_next_save(bench, case)
        else:
            assert is_content(bench.restart(), case.wanted(bench.run, disk.calls[:number])), call


def check_sentence(run: TinyRun, error: Exception) -> None:
    sentence = str(error)
    assert "\n" not in sentence
    assert re.search(rf"{re.escape(str(run.path))}/(checkpoints|hub)\b", sentence), sentence


def check_next_save(bench: Bench, case: Case) -> None:
    run = bench.run
    torch.set_rng_state(case.new.tensors["rng"])
    assert run.save(40).error is None
    newest = bench.newest()
    assert newest is not None and newest.equals(dataclasses.replace(case.new, state=run.content(40).state))
    assert leftovers(run.checkpoints) == [] and len(checkpoint_steps(run.checkpoints)) <= 2


def test_killed_at_any_call_of_the_recovery(bench):
    """After a kill between the two renames of a replacement, and one in the removal of what was replaced."""
    case, run = bench.cases["again"], bench.run
    run.become(Checkpoint(case.after))
    final = Checkpoint.of_step(run.checkpoints, case.step).path
    switch = case.calls.index(Call("rename", final))
    removal = case.calls.index(Call("rename", final.with_name(f".staging-replaced-{final.name}")))
    for kill in (switch, removal, removal + 3):
        bench.save(case, Fault(at=kill))
        killed = bench.room / f"killed-at-{kill}"
        shutil.copytree(run.path, killed)
        with Disk(run.path).watching() as disk:
            recover(run.checkpoints)
        assert len(disk.calls) > 10
        for number in range(len(disk.calls)):
            replace(run.path, killed)
            with Disk(run.path, Fault(at=number)).watching(), pytest.raises(Died):
                recover(run.checkpoints)
            assert is_content(bench.restart(), case.wanted(run, case.calls[:kill])), (kill, disk.calls[number])
    replace(run.path, case.before)


def test_nothing_but_durable_writes_below_the_checkpoints(bench, case):
    """Seen by Python's audit hook, which cannot be taken out again: in a child. What writes past it is found too."""
    replace(bench.run.path, case.before)
    report = bench.room / "report.json"
    root = str(bench.run.checkpoints)
    written, others = set(), []

    def watch(event: str, arguments: tuple) -> None:
        if event not in AUDITED:
            return
        path = arguments[1] if event in ("os.rename", "os.link", "os.symlink") else arguments[0]
        changes = event != "open" or arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if not changes or isinstance(path, int) or not os.fsdecode(path).startswith(root):
            return
        caller = sys._getframe(1).f_code
        if caller.co_filename != durable.__file__:
            others.append(f"{event} {path} from {caller.co_filename}: {caller.co_name}")
        elif event == "open":
            written.add(os.path.basename(path))

    def save_and_report() -> None:
        sys.addaudithook(watch)
        assert bench.run.save(case.step).error is None
        with open(report, "w", encoding="utf-8") as file:
            json.dump([sorted(written), others], file)

    assert in_a_fork(save_and_report) == 0
    seen, past = json.loads(report.read_text())
    assert past == []
    saved = Checkpoint.of_step(bench.run.checkpoints, case.step).path
    assert {path.name for path in saved.rglob("*") if path.is_file()} <= set(seen)
