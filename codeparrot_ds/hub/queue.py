"""A run's push queue: training leaves finished exports here and goes on; another process commits each once, in order.

``python -m codeparrot_ds.hub.queue RUN`` drains the queue of a run folder. Training starts it with ``start_drain``
after each checkpoint, so that a push never blocks a step; ``codeparrot-ds hub push`` finishes what a killed run left.

On disk, below ``<run>/hub/``::

    queue/step-00000500/entry.json   step, title, body, {path: SHA-256} of the files, their digest
    queue/step-00000500/files/       the export, hard-linked where the file system allows it
    pushed.jsonl                     one object a push: step, digest, commit, branch, title, time
    refused/                         entries whose files no longer match their hashes, each with a reason.txt
    push.log                         what the draining processes said
    lock                             held by the one process that drains

Two fields of ``<run>/run.json`` (written by training) say where the entries go: ``name`` is the branch, ``hub`` what
``open_repository`` takes: the absolute path of a git repository, ``org/name`` on the Hub, or null for none.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from codeparrot_ds import durable
from codeparrot_ds.errors import UserError
from codeparrot_ds.hub.repository import Repository, folder_files, open_repository

_CANNOT_LINK = {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EACCES}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """An export that waits to be pushed; ``digest`` names its contents."""

    step: int
    title: str
    body: str
    sha256: dict[str, str]
    digest: str
    path: Path

    @property
    def files(self) -> Path:
        """The folder that is committed."""
        return self.path / "files"

    def message_body(self, run: str) -> str:
        """Returns the commit's body: what training said, and the trailers by which a push is recognised afterwards."""
        return f"{self.body}\n\nRun: {run}\nStep: {self.step}\nDigest: {self.digest}".strip()


@dataclass(frozen=True, kw_only=True)
class Pushed:
    """A push that is known to have succeeded; ``time`` in seconds since 1970."""

    step: int
    digest: str
    commit: str
    branch: str
    title: str
    time: float


@dataclass(kw_only=True)
class DrainResult:
    """What one drain did: pushes made, and one sentence for each refused entry."""

    pushed: list[Pushed] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


class PushQueue:
    """The queue of one run folder; any number of processes may look, one enqueues (training's rank 0), one drains."""

    def __init__(self, run_dir: str | os.PathLike[str]):
        self.folder = Path(run_dir) / "hub"
        self._queue = self.folder / "queue"
        self._pushed = self.folder / "pushed.jsonl"

    def enqueue(
        self,
        step: int,
        export_dir: str | os.PathLike[str],
        title: str,
        body: str = "",
        *,
        sha256: Mapping[str, str] | None = None,
    ) -> None:
        """Adds a finished export, complete or not at all; enqueuing the same export again changes nothing.

        Files are hard-linked, so this takes no space and the checkpoint may be deleted before it is pushed. Pass the
        files' SHA-256 by relative path where they are known already (a checkpoint's manifest): hashing an export of
        hundreds of MB takes a second.
        """
        export = Path(export_dir)
        names = folder_files(export)
        if not names:
            raise UserError(f"{export}: no files to push")
        hashes = {name: (sha256 or {}).get(name) or file_sha256(export / name) for name in names}
        digest = _digest(hashes)
        known = [(entry.step, entry.digest) for entry in self.pending()]
        known += [(push.step, push.digest) for push in self.pushed()]
        if (step, digest) in known:
            return
        staging = self._queue / f".staging-{step:08d}"
        try:
            shutil.rmtree(staging, ignore_errors=True)
            if not self._queue.is_dir():
                self._queue.mkdir(parents=True)
                for folder in (self.folder, self.folder.parent):
                    durable.sync_folder(folder)
            for name in names:
                _link_or_copy(export / name, staging / "files" / name)
            for folder in sorted({(staging / "files" / name).parent for name in names}):
                durable.sync_folder(folder)
            entry = {"step": step, "title": title, "body": body, "sha256": hashes, "digest": digest}
            durable.write_json(staging / "entry.json", entry)
            staging.rename(self._free_name(step))
            durable.sync_folder(self._queue)
        except OSError as error:
            shutil.rmtree(staging, ignore_errors=True)
            raise UserError(f"{self._queue}: step {step} was not queued: {error.strerror}") from error

    def pending(self) -> list[Entry]:
        """Returns the entries that wait, oldest step first, without the damaged ones."""
        return [entry for path in self._entry_folders() if not isinstance(entry := _read_entry(path), str)]

    def pushed(self) -> list[Pushed]:
        """Returns the pushes on record, in order."""
        if not self._pushed.exists():
            return []
        return [Pushed(**json.loads(line)) for line in self._pushed.read_text().splitlines()]

    def refused(self) -> list[str]:
        """Returns one sentence for each entry that was found damaged."""
        return [path.read_text().strip() for path in sorted((self.folder / "refused").glob("*/reason.txt"))]

    def drain(self, repository: Repository, branch: str) -> DrainResult:
        """Commits every waiting entry to the branch, oldest step first, until none is left.

        Waits while another process drains. An entry is deleted after its push is on record; a push whose record was
        lost (the process died in between) is recognised by the trailers of the branch's commits. Damaged entries move
        to ``refused/`` and the others go on. Raises what the repository raises; the entry then stays in the queue.
        """
        result = DrainResult()
        with self._lock():
            for leftover in self._queue.glob(".removing-*"):
                shutil.rmtree(leftover)
            repository.create()
            repository.create_branch(branch)
            # Read again until empty: training may have added an entry during the last push.
            while folders := self._entry_folders():
                for path in folders:
                    self._push_one(path, repository, branch, result)
        return result

    def _push_one(self, path: Path, repository: Repository, branch: str, result: DrainResult) -> None:
        entry = _read_entry(path)
        problem = entry if isinstance(entry, str) else _damage(entry)
        if isinstance(entry, str) or problem:
            result.refused.append(self._refuse(path, str(problem)))
            return
        if not any((known.step, known.digest) == (entry.step, entry.digest) for known in self.pushed()):
            result.pushed.append(self._commit(entry, repository, branch))
        # Renamed first: a kill halfway through the deletion must not leave something that looks like a damaged entry.
        removing = path.with_name(f".removing-{path.name}")
        path.rename(removing)
        shutil.rmtree(removing)

    def _commit(self, entry: Entry, repository: Repository, branch: str) -> Pushed:
        committed = [
            commit.id
            for commit in repository.commits(branch)
            if (commit.trailer("Run"), commit.trailer("Step"), commit.trailer("Digest"))
            == (branch, str(entry.step), entry.digest)
        ]
        commit = (
            committed[0]
            if committed
            else repository.commit_folder(branch, entry.files, entry.title, entry.message_body(branch))
        )
        push = Pushed(
            step=entry.step, digest=entry.digest, commit=commit, branch=branch, title=entry.title, time=time.time()
        )
        lines = [json.dumps(asdict(row)) + "\n" for row in [*self.pushed(), push]]
        durable.replace_file(self._pushed, ["".join(lines).encode()])
        return push

    def _refuse(self, path: Path, problem: str) -> str:
        target = self.folder / "refused" / path.name
        attempt = 1
        while target.exists():
            attempt += 1
            target = target.with_name(f"{path.name}.{attempt}")
        sentence = f"{path.name}: {problem}; it was not pushed and lies in {target}"
        durable.replace_file(path / "reason.txt", [(sentence + "\n").encode()])
        target.parent.mkdir(exist_ok=True)
        path.rename(target)
        return sentence

    def _entry_folders(self) -> list[Path]:
        return sorted(self._queue.glob("step-*"))

    def _free_name(self, step: int) -> Path:
        # A run that went back to an older checkpoint may reach a step again with other weights: both are history.
        path, attempt = self._queue / f"step-{step:08d}", 1
        while path.exists():
            attempt += 1
            path = self._queue / f"step-{step:08d}.{attempt}"
        return path

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "lock", "w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)  # the kernel releases it when the process ends, however it ends
            yield


def start_drain(run_dir: str | os.PathLike[str]) -> subprocess.Popen[bytes]:
    """Starts a process that drains the run's queue and returns it; its words go to ``<run>/hub/push.log``.

    It has a session of its own, so Ctrl-C and signals to the training's process group do not reach it.
    """
    log = Path(run_dir) / "hub" / "push.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    package_parent = str(Path(__file__).resolve().parents[2])
    search_path = [package_parent, *filter(None, [os.environ.get("PYTHONPATH")])]
    with open(log, "ab") as handle:
        return subprocess.Popen(
            [sys.executable, "-m", "codeparrot_ds.hub.queue", str(run_dir)],
            stdin=subprocess.DEVNULL,
            stdout=handle,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(search_path)},
        )


def hub_status(run_dir: str | os.PathLike[str]) -> str:
    """Returns what of a run is pushed, waiting and refused, as lines of text."""
    name, repository = read_destination(run_dir)
    queue = PushQueue(run_dir)
    pushed, pending, refused = queue.pushed(), queue.pending(), queue.refused()
    lines = [f"branch {name} of {repository}", f"pushed   {len(pushed)}"]
    lines += [f"  step {push.step:>8}  {push.commit[:10]}  {push.title}" for push in pushed]
    lines += [f"waiting  {len(pending)}"]
    lines += [f"  step {entry.step:>8}  {entry.title}" for entry in pending]
    lines += [f"refused  {len(refused)}"] if refused else []
    lines += [f"  {sentence}" for sentence in refused]
    lines += [f"push them with: codeparrot-ds hub push {run_dir}"] if pending else []
    return "\n".join(lines)


def hub_push(run_dir: str | os.PathLike[str]) -> str:
    """Drains a run's queue and returns what was pushed; raises ``UserError`` when an entry was refused."""
    name, repository = read_destination(run_dir)
    result = PushQueue(run_dir).drain(repository, name)
    if result.refused:
        raise UserError("; ".join([f"pushed {len(result.pushed)} to branch {name}", *result.refused]))
    lines = [f"pushed step {push.step} to branch {name} of {repository}: {push.title}" for push in result.pushed]
    return "\n".join(lines) or f"nothing waits: branch {name} of {repository} is up to date"


def hub_publish(run_dir: str | os.PathLike[str]) -> str:
    """Drains a run's queue, merges its branch into main, and returns what was merged."""
    name, repository = read_destination(run_dir)
    said = hub_push(run_dir)
    (tip, *_) = repository.commits(name)
    if tip.trailer("Run") != name:
        raise UserError(f"branch {name} of {repository} has no checkpoint yet; there is nothing to publish")
    commit = repository.merge(name)
    merged = f"{name} at step {tip.trailer('Step')} ({tip.title})"
    return f"{said}\nmain of {repository} is now {merged}: commit {commit[:10]}"


def read_destination(run_dir: str | os.PathLike[str]) -> tuple[str, Repository]:
    """Returns a run's branch name and repository, from its ``run.json``."""
    path = Path(run_dir) / "run.json"
    try:
        run = json.loads(path.read_text())
        name, hub = str(run["name"]), str(run.get("hub") or "off")
    except FileNotFoundError:
        raise UserError(f"{run_dir} is not a run folder: it has no run.json") from None
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{path}: not a run's record ({error})") from None
    repository = open_repository(hub, path.absolute().parent.parent)
    if repository is None:
        raise UserError(f"{path}: this run was trained with hub off, so nothing was queued")
    return name, repository


def file_sha256(path: str | os.PathLike[str]) -> str:
    """Returns the hexadecimal SHA-256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _digest(sha256: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(sha256, sort_keys=True).encode()).hexdigest()[:20]


def _read_entry(path: Path) -> Entry | str:
    """Returns the entry in a folder, or what is wrong with it."""
    try:
        return Entry(path=path, **json.loads((path / "entry.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        return f"entry.json cannot be read ({error})"


def _damage(entry: Entry) -> str | None:
    try:
        names = folder_files(entry.files)
        changed = set(names) ^ set(entry.sha256)
        changed |= {name for name in set(names) - changed if file_sha256(entry.files / name) != entry.sha256[name]}
    except (OSError, UserError) as error:
        return str(error)
    return f"{', '.join(sorted(changed))} changed after it was queued" if changed else None


def _link_or_copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _CANNOT_LINK:
            raise
        shutil.copyfile(source, target)
        with open(target, "rb") as handle:
            os.fsync(handle.fileno())


def main(arguments: list[str]) -> int:
    """Drains the queue of the run folder named in ``arguments``; 0 when nothing is left, 2 when something is."""

    def say(text: str) -> None:
        stamp = datetime.datetime.now().isoformat(timespec="seconds")
        print("\n".join(f"{stamp} {line}" for line in text.splitlines()), flush=True)

    os.nice(10)  # the training's steps come first
    try:
        (run_dir,) = arguments
        say(hub_push(run_dir))
    except UserError as error:
        say(f"error: {error}")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
