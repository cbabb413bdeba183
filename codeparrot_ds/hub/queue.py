"""A run's push queue on disk: training leaves finished exports here; a worker commits each once, in order.

On disk, below ``<run>/hub/``::

    queue/000001-step-00000500/entry.json   step, title, body, {path: SHA-256} of the files, their digest
    queue/000001-step-00000500/files/       the export, hard-linked where the file system allows it
    pushed.jsonl     one object per push: step, digest, commit, branch, title, time
    dropped.jsonl    one object per export that will not be pushed, with the reason
    refused/         entries whose files no longer match their hashes, each with a reason.txt
    problem.json     why the last attempt failed, and when the next one is; absent while all is well
    push.log         what the workers said
    lock, waiting    held by the one worker that drains, and by the one that waits for it

Disk use is bounded: hard links take nothing as long as the checkpoint keeps its export. Where the exports that the
queue alone keeps exceed its limit, the oldest ones go, but neither the newest nor the one with the lowest evaluation
loss, and each is recorded in ``dropped.jsonl`` and reported.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from codeparrot_ds import durable
from codeparrot_ds.errors import UserError, first_line
from codeparrot_ds.hub.local_git import folder_files
from codeparrot_ds.json_files import DamagedFileError, lines_of, parse_json, parts_of, read_object
from codeparrot_ds.secret_check import check_export

_ENTRY = re.compile("[0-9]+-step-[0-9]+")
_KINDS: dict[Any, type] = {"int": int, "str": str, "float": float}
_CANNOT_LINK = {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EACCES}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """An export that waits to be pushed; ``digest`` names its contents, ``eval_loss`` is None where it has none."""

    step: int
    title: str
    body: str
    sha256: dict[str, str]
    digest: str
    path: Path
    eval_loss: float | None = None

    @property
    def files(self) -> Path:
        """The folder that is committed."""
        return self.path / "files"

    def trailers(self, run: str, run_id: str | None) -> dict[str, str]:
        """Returns what a push is recognised by afterwards, as lines of its commit's message."""
        trailers = {"Run": run, "Run-Id": run_id, "Step": str(self.step), "Digest": self.digest}
        return {key: value for key, value in trailers.items() if value is not None}

    def message_body(self, run: str, run_id: str | None) -> str:
        """Returns the commit's body: what training said, and the trailers."""
        trailers = self.trailers(run, run_id)
        if self.eval_loss is not None:
            trailers["Eval-Loss"] = repr(self.eval_loss)
        lines = "\n".join(f"{key}: {value}" for key, value in trailers.items())
        return f"{self.body}\n\n{lines}".strip()


@dataclass(frozen=True, kw_only=True)
class Pushed:
    """A push that is known to have succeeded; ``time`` in seconds since 1970."""

    step: int
    digest: str
    commit: str
    branch: str
    title: str
    time: float


@dataclass(frozen=True, kw_only=True)
class Dropped:
    """An export that was not pushed and will not be; ``time`` in seconds since 1970."""

    step: int
    digest: str
    title: str
    reason: str
    time: float

    def __str__(self) -> str:
        return f"step {self.step} ({self.title}): {self.reason}"


Row = TypeVar("Row", Pushed, Dropped)


class PushQueue:
    """The queue of one run folder; any number of processes may look, one enqueues (training's rank 0), one drains."""

    def __init__(self, run_dir: str | os.PathLike[str]):
        self.folder = Path(run_dir) / "hub"
        self._queue = self.folder / "queue"
        self._pushed = self.folder / "pushed.jsonl"
        self._dropped = self.folder / "dropped.jsonl"
        self._problem = self.folder / "problem.json"

    def enqueue(
        self,
        step: int,
        export_dir: str | os.PathLike[str],
        title: str,
        body: str = "",
        *,
        sha256: Mapping[str, str] | None = None,
        eval_loss: float | None = None,
        max_bytes: float | None = None,
    ) -> list[Dropped]:
        """Adds a finished export, complete or not at all; enqueuing the same export again changes nothing.

        Files are hard-linked, so this takes no space and the checkpoint may be deleted before it is pushed. Pass the
        files' SHA-256 by relative path where they are known already (a checkpoint's manifest): hashing an export of
        hundreds of MB takes a second.

        Args:
            title, body: the commit's message.
            eval_loss: nats per token, where the run was evaluated at this step.
            max_bytes: that the exports which the queue alone keeps may take; None for no limit.

        Returns:
            What had to go to keep the limit.

        Raises:
            UserError: the export is empty, holds a secret, or the disk is full; it says that the step was not queued.
        """
        export = Path(export_dir)
        names = folder_files(export)
        if not names:
            raise UserError(f"{export}: no files to push")
        hashes = {name: (sha256 or {}).get(name) or file_sha256(export / name) for name in names}
        digest = _digest(hashes)
        known = {(entry.step, entry.digest) for entry in self.pending()}
        known |= {(push.step, push.digest) for push in self.pushed()}
        known |= {(drop.step, drop.digest) for drop in self._dropped_for_good()}
        if (step, digest) in known:
            return []
        check_export(export, names)
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
            durable.write_json(staging / "entry.json", entry | {"eval_loss": eval_loss})
            staging.rename(self._next_place(step))
            durable.sync_folder(self._queue)
        except OSError as error:
            shutil.rmtree(staging, ignore_errors=True)
            reason = f"it was not queued: {error.strerror}"
            with contextlib.suppress(OSError):  # the disk is full: the sentence below says the same
                self._drop(Dropped(step=step, digest=digest, title=title, reason=reason, time=time.time()))
            raise UserError(f"{self._queue}: step {step} was not queued: {error.strerror}") from error
        return [] if max_bytes is None else self._make_room(max_bytes)

    def pending(self) -> list[Entry]:
        """Returns the entries that wait, in the order of pushing, without the damaged ones."""
        return [entry for path in self.entry_folders() if not isinstance(entry := read_entry(path), str)]

    def pushed(self) -> list[Pushed]:
        """Returns the pushes on record, in order."""
        return _rows(self._pushed, Pushed)

    def dropped(self) -> list[Dropped]:
        """Returns what was not pushed and will not be."""
        done = {(entry.step, entry.digest) for entry in self.pending()}
        done |= {(push.step, push.digest) for push in self.pushed()}
        return [drop for drop in self._all_dropped() if (drop.step, drop.digest) not in done]

    def refused(self) -> list[str]:
        """Returns one sentence for each entry that was found damaged."""
        return [path.read_text().strip() for path in sorted((self.folder / "refused").glob("*/reason.txt"))]

    def problem(self) -> dict[str, Any] | None:
        """Returns why the last attempt failed: ``problem``, ``time``, and ``retry_at`` or None where nobody retries."""
        try:
            found = read_object(self._problem)
            with parts_of(self._problem):
                again = found["retry_at"]
                return {
                    "problem": " ".join(str(found["problem"]).split()),
                    "time": _seconds(found["time"]),
                    "retry_at": None if again is None else _seconds(again),
                }
        except (OSError, DamagedFileError):
            return None

    def note_problem(self, problem: str | None, retry_at: float | None = None) -> None:
        """Records why an attempt failed, for `problem` in any process; None when one has succeeded."""
        if problem is not None:
            durable.write_json(self._problem, {"problem": problem, "time": time.time(), "retry_at": retry_at})
        else:
            self._problem.unlink(missing_ok=True)

    def entry_folders(self) -> list[Path]:
        """Returns the folders of the entries, in the order of pushing, damaged ones among them."""
        return sorted(path for path in self._queue.glob("*-step-*") if _ENTRY.fullmatch(path.name))

    def record_push(self, push: Pushed) -> None:
        """Adds a push to the record; on the disk before its entry is removed."""
        _write_rows(self._pushed, [*map(asdict, self.pushed()), asdict(push)])

    def remove(self, path: Path) -> None:
        """Removes an entry; it may be gone already, when it was dropped meanwhile."""
        # Renamed first: a kill halfway through the deletion must not leave something that looks like a damaged entry.
        removing = path.with_name(f".removing-{path.name}")
        with contextlib.suppress(FileNotFoundError):
            path.rename(removing)
        shutil.rmtree(removing, ignore_errors=True)

    def refuse(self, path: Path, problem: str) -> str:
        """Moves a damaged entry aside, with the reason, and returns the reason."""
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

    @contextlib.contextmanager
    def lock(self) -> Iterator[bool]:
        """Holds the right to drain, waiting for it; gives False where another process waits for it already.

        That one reads the queue once it has the lock, and so finds whatever was there before this call.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "lock", "w") as lock, open(self.folder / "waiting", "w") as waiting:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                try:
                    fcntl.flock(waiting, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    yield False
                    return
                fcntl.flock(lock, fcntl.LOCK_EX)
                fcntl.flock(waiting, fcntl.LOCK_UN)
            for leftover in self._queue.glob(".removing-*"):
                shutil.rmtree(leftover, ignore_errors=True)
            yield True  # the kernel releases the locks when the process ends, however it ends

    def is_draining(self) -> bool:
        """Whether a process holds the lock."""
        try:
            with open(self.folder / "lock") as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

    def _make_room(self, max_bytes: float) -> list[Dropped]:
        entries = self.pending()
        sizes = {entry.path: _bytes_of_its_own(entry.files) for entry in entries}
        judged = [entry for entry in entries if entry.eval_loss is not None]
        best = min(judged, key=lambda entry: entry.eval_loss or 0.0, default=None)
        dropped = []
        for entry in entries[:-1]:
            if sum(sizes.values()) <= max_bytes:
                break
            if entry is best or not sizes[entry.path]:
                continue
            reason = f"the queue may keep {max_bytes / 1e9:.3g} GB; it was dropped as the oldest that waited"
            drop = Dropped(step=entry.step, digest=entry.digest, title=entry.title, reason=reason, time=time.time())
            self._drop(drop)
            self.remove(entry.path)
            del sizes[entry.path]
            dropped.append(drop)
        return dropped

    def _drop(self, drop: Dropped) -> None:
        _write_rows(self._dropped, [*map(asdict, self._all_dropped()), asdict(drop)])

    def _all_dropped(self) -> list[Dropped]:
        return _rows(self._dropped, Dropped)

    def _dropped_for_good(self) -> list[Dropped]:
        """Those that made room; what a full disk kept out may be offered again."""
        return [drop for drop in self._all_dropped() if "not queued" not in drop.reason]

    def _next_place(self, step: int) -> Path:
        # Numbered as they come: a run that went back to an older checkpoint reaches a step again, and both are history.
        last = max((int(path.name.split("-")[0]) for path in self.entry_folders()), default=0)
        return self._queue / f"{last + 1:06d}-step-{step:08d}"


def _seconds(value: Any) -> float:
    """Since 1970, of a moment that a clock can show."""
    seconds = float(value)
    if not 0 <= seconds < 2**36:
        raise ValueError(f"{seconds} is no time")
    return seconds


def file_sha256(path: str | os.PathLike[str]) -> str:
    """Returns the hexadecimal SHA-256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_entry(path: Path) -> Entry | str:
    """Returns the entry in a folder, or what is wrong with it."""
    try:
        saved = read_object(path / "entry.json")
        with parts_of(path / "entry.json"):
            loss = saved.get("eval_loss")
            return Entry(
                step=int(saved["step"]),
                title=str(saved["title"]),
                body=str(saved["body"]),
                sha256={str(name): str(digest) for name, digest in saved["sha256"].items()},
                digest=str(saved["digest"]),
                path=path,
                eval_loss=None if loss is None else float(loss),
            )
    except (OSError, DamagedFileError) as error:
        return f"entry.json cannot be read ({first_line(error)})"


def damage(entry: Entry) -> str | None:
    """Returns which files of an entry are not what they were when it was queued; None when all are."""
    try:
        names = folder_files(entry.files)
        changed = set(names) ^ set(entry.sha256)
        changed |= {name for name in set(names) - changed if file_sha256(entry.files / name) != entry.sha256[name]}
    except (OSError, UserError) as error:
        return str(error)
    return f"{', '.join(sorted(changed))} changed after it was queued" if changed else None


def _digest(sha256: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(sha256, sort_keys=True).encode()).hexdigest()[:20]


def _rows(path: Path, kind: type[Row]) -> list[Row]:
    """The rows of a record, which is replaced as a whole; raises DamagedFileError: a lost one is pushed twice."""
    rows = []
    for number, line in enumerate(lines_of(path), start=1):
        place = f"{path}, line {number}"
        row = parse_json(line, place)
        with parts_of(place):
            # Annotations are text here: the types of a field by their names.
            rows.append(kind(**{field.name: _KINDS[field.type](row[field.name]) for field in fields(kind)}))
    return rows


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    durable.replace_file(path, ["".join(json.dumps(row) + "\n" for row in rows).encode()])


def _bytes_of_its_own(folder: Path) -> int:
    """Bytes of the files that have no other name: what removing them would free."""
    stats = [path.stat() for path in folder.rglob("*") if path.is_file()]
    return sum(stat.st_size for stat in stats if stat.st_nlink == 1)


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
