"""Drains a run's push queue: every export is committed to the run's branch once, in order, through outages and kills.

``python -m codeparrot_ds.hub.worker RUN`` is the process that training starts with ``start_drain`` after each
checkpoint, so that a push never blocks a step. It tries again while the place does not answer, with growing pauses;
what only the user can fix ends it, is recorded in the queue and reported when the run ends. A later start, or
``codeparrot-ds hub push``, continues from what is there.

A push may have succeeded although its answer was lost, or its process was killed before the record was written: its
commit is then found on the branch by the trailers of its message. A commit names its parent, so that an attempt that
arrives late cannot add a second one.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from codeparrot_ds.child_process import start_module
from codeparrot_ds.errors import UserError
from codeparrot_ds.hub.places import open_repository
from codeparrot_ds.hub.queue import Entry, Pushed, PushQueue, damage, read_entry
from codeparrot_ds.hub.repository import Commit, Repository
from codeparrot_ds.json_files import parts_of, read_object
from codeparrot_ds.paths import not_a_run
from codeparrot_ds.retry import Answer, Pauses, UnavailableError, say_retry
from codeparrot_ds.secret_forms import hide_secrets_in_tracebacks

WORKER_PATIENCE_SECONDS = 6 * 3600.0
"""Without one success; the next checkpoint starts another worker anyway."""
NICENESS = 10


@dataclass(frozen=True, kw_only=True)
class Destination:
    """Where a run's checkpoints go: the branch and the repository, and the id that tells two runs of one name apart."""

    branch: str
    run_id: str | None
    repository: Repository


@dataclass(kw_only=True)
class DrainResult:
    """What one drain did: pushes made, and one sentence for each refused entry."""

    pushed: list[Pushed] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


def drain(
    queue: PushQueue,
    destination: Destination,
    *,
    pauses: Pauses | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> DrainResult:
    """Commits every waiting entry to the branch until none is left, and returns what was done.

    Waits while another process drains, or leaves it to the one that waits already. Damaged entries move to
    ``refused/``; the others are still pushed. Without ``pauses`` the first failure is raised; ``say`` takes a line
    whenever an attempt fails.

    Raises:
        UserError: something that the user must fix, or patience is at its end; the entries stay in the queue.
    """
    work = _Drain(queue, destination, pauses or Pauses(0.0), say)
    with queue.lock() as mine:
        try:
            if mine:
                work.run()
        except UnavailableError:  # noted already, with the time of the next attempt, by `_Drain._failed`
            raise
        except UserError as error:
            queue.note_problem(str(error))
            raise
    return work.result


@dataclass
class _Drain:
    """One process's work on a queue, under its lock."""

    queue: PushQueue
    destination: Destination
    pauses: Pauses
    say: Callable[[str], None]
    result: DrainResult = field(default_factory=DrainResult)

    def run(self) -> None:
        if self.queue.entry_folders() and not self.queue.pushed():
            repository = self.destination.repository
            self._ask(repository.create)
            self._ask(lambda: repository.create_branch(self.destination.branch))
        # Read again until empty: training may have added an entry during the last push.
        while folders := self.queue.entry_folders():
            for path in folders:
                self._push_one(path)
                self.queue.note_problem(None)
                self.pauses.reset()

    def _ask(self, call: Callable[[], Answer]) -> Answer:
        return self.pauses.patiently(call, self._failed)

    def _failed(self, error: UnavailableError, pause: float | None) -> None:
        self.queue.note_problem(str(error), None if pause is None else time.time() + pause)
        say_retry(error, pause, self.say)

    def _push_one(self, path: Path) -> None:
        queue, entry = self.queue, read_entry(path)
        problem = entry if isinstance(entry, str) else damage(entry)
        if isinstance(entry, str) or problem:
            if path.exists():  # else it was dropped to make room
                self.result.refused.append(queue.refuse(path, str(problem)))
            return
        if not any((known.step, known.digest) == (entry.step, entry.digest) for known in queue.pushed()):
            try:
                commit = self._ask(lambda: self._commit(entry))
            except UserError:
                if path.exists():
                    raise
                return  # training has dropped it meanwhile, to make room
            push = Pushed(
                step=entry.step,
                digest=entry.digest,
                commit=commit,
                branch=self.destination.branch,
                title=entry.title,
                time=time.time(),
            )
            queue.record_push(push)
            self.result.pushed.append(push)
        queue.remove(path)

    def _commit(self, entry: Entry) -> str:
        """Commits an entry, or finds the commit that an earlier attempt made; returns its id."""
        branch, run_id, repository = self.destination.branch, self.destination.run_id, self.destination.repository
        head, pushed = self._ask(lambda: repository.head(branch)), self.queue.pushed()
        if not pushed or pushed[-1].commit != head:
            history = self._ask(lambda: repository.commits(branch))
            check_owner(history, self.destination)
            wanted = entry.trailers(branch, run_id)
            for commit in history:
                if all(commit.trailer(key) == value for key, value in wanted.items()):
                    return commit.id
            head = history[0].id
        body = entry.message_body(branch, run_id)
        return repository.commit_folder(branch, entry.files, entry.title, body, parent=head, sha256=entry.sha256)


def check_owner(history: list[Commit], destination: Destination) -> None:
    """Raises a ``UserError`` that names a checkpoint of another run with this name, where the branch has one."""
    for commit in history:
        if commit.trailer("Run") == destination.branch and commit.trailer("Run-Id") != destination.run_id:
            raise UserError(
                f"{destination.repository}: branch '{destination.branch}' has checkpoints of another run with that "
                f"name (commit {commit.id[:10]}: {commit.title}); choose another --run-name or another --hub"
            )


def read_destination(run_dir: str | os.PathLike[str]) -> Destination:
    """Returns where a run's checkpoints go, from its ``run.json``: ``name``, ``id`` and ``hub``.

    Raises:
        UserError: the folder is no run, or one without a branch.
    """
    path = Path(run_dir) / "run.json"
    try:
        run = read_object(path)
        with parts_of(path):
            name, run_id, hub = str(run["name"]), run.get("id"), str(run.get("hub") or "off")
    except FileNotFoundError:
        raise not_a_run(run_dir) from None
    try:
        repository = open_repository(hub, path.absolute().parent.parent)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if repository is None:
        raise UserError(f"{path}: this run was trained with hub off, so nothing was queued")
    return Destination(branch=name, run_id=run_id, repository=repository)


def start_drain(run_dir: str | os.PathLike[str]) -> subprocess.Popen[bytes]:
    """Starts a process that drains the run's queue and returns it; its output goes to ``<run>/hub/push.log``.

    It has a session of its own, so Ctrl-C and signals to the training's process group do not reach it.
    """
    log = Path(run_dir) / "hub" / "push.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as handle:
        return start_module(
            *("codeparrot_ds.hub.worker", str(run_dir)),
            stdin=subprocess.DEVNULL,
            stdout=handle,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _let_training_go_first() -> None:
    os.nice(NICENESS)
    # A kernel that groups processes by session weighs a process against those of its own session only, and the worker
    # has one to itself: the session needs the same (sched(7), "The autogroup feature"), unless it is somebody else's.
    if os.getsid(0) == os.getpid():
        with contextlib.suppress(OSError):
            Path("/proc/self/autogroup").write_text(f"{NICENESS}")


def main(arguments: list[str]) -> int:
    """Drains the queue of the run folder named in ``arguments``; 0 when nothing is left, 2 when something is."""

    def say(text: str) -> None:
        stamp = datetime.datetime.now().isoformat(timespec="seconds")
        print("\n".join(f"{stamp} {line}" for line in text.splitlines()), flush=True)

    _let_training_go_first()
    try:
        (run_dir,) = arguments
        pauses = Pauses(WORKER_PATIENCE_SECONDS)
        result = drain(PushQueue(run_dir), read_destination(run_dir), pauses=pauses, say=say)
    except UserError as error:
        say(f"error: {error}")
        return error.exit_code
    for push in result.pushed:
        say(f"pushed step {push.step} to branch {push.branch}: {push.title}")
    for sentence in result.refused:
        say(f"error: {sentence}")
    return UserError.exit_code if result.refused else 0


if __name__ == "__main__":
    hide_secrets_in_tracebacks()  # into push.log
    sys.exit(main(sys.argv[1:]))
