"""Checkpoint folders on disk: complete or invisible, every byte accounted for. No torch here.

A checkpoint is written into a hidden staging folder, every file's size and SHA-256 go into ``manifest.json``,
everything is synced to the disk, and one rename makes it visible. Whoever finds a ``step-*`` folder with a manifest
that holds has a whole checkpoint; anything else is not one. The manifest itself ends with the SHA-256 of what stands
above. Besides, in the same folder::

    latest                the name and step of the newest complete one, as JSON
    aside-step-…          damaged, or of a time line that the run has left; kept until somebody deletes it
    .staging-…            being written or being removed; worth nothing after a kill
    .replaced-step-…      an older checkpoint of the same step while its successor takes its place
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import datetime
import hashlib
import os
import re
import shutil
import stat
from collections.abc import Collection
from pathlib import Path
from typing import Any

from codeparrot_ds import durable
from codeparrot_ds.cpu import usable_cores
from codeparrot_ds.durable import WrittenFile
from codeparrot_ds.errors import UserError
from codeparrot_ds.hub.revision import fetch, parse_revision
from codeparrot_ds.json_files import DamagedFileError, parse_json, parts_of, read_bytes, read_json
from codeparrot_ds.model.foreign import recognized
from codeparrot_ds.paths import exists, expand, may_be_on_hub, no_run, not_a_run

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"
DATA = "data.json"
EXPORT = "export"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")
LATEST = "latest"
SEAL = "sha256"
STAGING = ".staging-"
REPLACED = ".replaced-"
ASIDE = "aside-"
_STEP = re.compile(r"step-([0-9]+)")
_ASIDE = re.compile(rf"{ASIDE}step-([0-9]+)(\.[0-9]+)?")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A folder of a run's ``checkpoints``, whole or not: nothing is read before it is asked for."""

    path: Path

    @classmethod
    def of_step(cls, checkpoints: Path, step: int) -> Checkpoint:
        """Where the checkpoint of an optimizer step lives."""
        return cls(checkpoints / f"step-{step:08d}")

    def __str__(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def step(self) -> int:
        """Optimizer steps done, by the folder's name.

        Raises:
            UserError: it is not a checkpoint's name.
        """
        found = _STEP.fullmatch(self.name) or _ASIDE.fullmatch(self.name)
        if found is None:
            raise UserError(f"{self} is not named as a checkpoint is, such as {self.of_step(Path(), 500)}")
        return int(found[1])

    @property
    def is_aside(self) -> bool:
        return self.name.startswith(ASIDE)

    @property
    def run(self) -> Path:
        return self.path.parent.parent

    @property
    def export(self) -> Path:
        """The weights as a Hugging Face folder."""
        return self.path / EXPORT

    def read_json(self, name: str) -> Any:
        """One of its JSON files; raises as `json_files.read_json`."""
        return read_json(self.path / name)

    def manifest(self) -> Manifest:
        """What the checkpoint has to be.

        Raises:
            UserError: there is no manifest, or it is damaged.
            NewerFormatError: a newer version of this program wrote it.
        """
        path = self.path / MANIFEST
        try:
            content = read_bytes(path)
            with parts_of(path):
                manifest = parse_json(content, path)
                version, entries, created = (manifest[key] for key in ("format", "files", "created"))
                # Compared as bytes: every one of them counts. Whatever a later format holds, it ends in the same seal.
                unsealed = {key: value for key, value in manifest.items() if key != SEAL}
                holds = durable.json_bytes(sealed(unsealed)) == content
        except FileNotFoundError as error:
            foreign = recognized(self.path)
            what = f"; it holds {foreign.what}: {foreign.as_start}" if foreign else ""
            raise UserError(f"{self} is not a complete checkpoint: it has no {MANIFEST}{what}") from error
        except (OSError, DamagedFileError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is damaged"
            raise UserError(f"{self} is not a complete checkpoint: {MANIFEST} cannot be read: {why}") from error
        if not holds:
            raise UserError(f"{path} is damaged: its content is not what its own SHA-256 says")
        if isinstance(version, int) and version > FORMAT:
            raise NewerFormatError(
                f"{self} has format {version}; this version reads up to {FORMAT}: update codeparrot-ds"
            )
        whole = isinstance(version, int) and isinstance(created, str) and isinstance(entries, dict)
        if not whole or not all(
            isinstance(entry, dict) and type(entry.get("bytes")) is int and isinstance(entry.get("sha256"), str)
            for entry in entries.values()
        ):  # a negative size is one that no file has
            raise UserError(f"{path} is damaged: it is not a table of files with 'bytes' and 'sha256'")
        for name in entries:
            if name.startswith("/") or ".." in name.split("/") or not name.isprintable():  # a message has one line
                raise UserError(f"{path} is damaged: it names {name!r}, which is not in the checkpoint's folder")
        files = {name: WrittenFile(entry["bytes"], entry["sha256"]) for name, entry in entries.items()}
        return Manifest(created=created, files=files)

    def damage(self, *, share: int = 0, num_shares: int = 1) -> list[str]:
        """Compares every file with the manifest: the damage, one sentence per file; none when it is whole.

        Args:
            share: which of ``num_shares`` equal shares of the files to read (ranks on many hosts read one each).
            num_shares: how many there are.
        """
        try:
            files = self.manifest().files
        except UserError as error:
            return [str(error)]
        # Sorted by size, so that each share has as many bytes; hashlib releases the interpreter.
        names = sorted(files, key=lambda name: (files[name].num_bytes, name), reverse=True)[share::num_shares]
        with concurrent.futures.ThreadPoolExecutor(max_workers=min(16, usable_cores())) as pool:
            problems = pool.map(lambda name: _content_damage(self.path / name, files[name]), names)
            return sorted(problem for problem in problems if problem)

    def damage_in_sight(self) -> list[str]:
        """The damage that shows without reading the files: the manifest's, and files that are missing or of another
        size."""
        try:
            files = self.manifest().files
        except NewerFormatError:
            raise
        except UserError as error:
            return [str(error)]
        return [problem for name in sorted(files) if (problem := _size_damage(self.path / name, files[name]))]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """The files of a checkpoint as they were written."""

    created: str
    """In ISO 8601, to the second."""
    files: dict[str, WrittenFile]
    """By path relative to the checkpoint."""

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files.values())

    def exported(self) -> dict[str, WrittenFile]:
        """The files of the export, by path relative to it."""
        prefix = f"{EXPORT}/"
        return {name.removeprefix(prefix): file for name, file in self.files.items() if name.startswith(prefix)}


class NewerFormatError(UserError):
    """A checkpoint that a later version of this program wrote: whole, but not to be read, and not to be passed over."""


def _size_damage(path: Path, file: WrittenFile) -> str | None:
    try:
        status = path.stat()
    except (OSError, ValueError):  # a name that no file can have
        return f"{path} is missing"
    if not stat.S_ISREG(status.st_mode):
        return f"{path} is not a regular file"
    size = status.st_size
    return None if size == file.num_bytes else f"{path} has {size} bytes instead of {file.num_bytes}"


def _content_damage(path: Path, file: WrittenFile) -> str | None:
    digest = hashlib.sha256()
    try:
        if problem := _size_damage(path, file):
            return problem
        with path.open("rb") as content:
            while chunk := content.read(1 << 22):
                digest.update(chunk)
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    return None if digest.hexdigest() == file.sha256 else f"{path} is damaged: its SHA-256 is not the manifest's"


# Writing


def staging_folder(checkpoints: Path, step: int) -> Path:
    """A new place to write it before it is complete; hidden, and never looked at when resuming.

    No two are the same: a rank that outlives a killed run writes to a place that is gone, never into its successor's.
    """
    return checkpoints / f"{STAGING}{step:08d}-{os.urandom(4).hex()}"


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """A manifest with its own SHA-256, over its JSON without that."""
    return content | {SEAL: hashlib.sha256(durable.json_bytes(content)).hexdigest()}


def publish(staging: Path, step: int, files: dict[str, WrittenFile]) -> Checkpoint:
    """Turns a fully written staging folder into the checkpoint of a step and points ``latest`` at it.

    Args:
        staging: the folder with every file in place and synced.
        step: the optimizer step.
        files: all of them by path relative to ``staging``.

    Raises:
        OSError: the system refused; ``recover`` then puts a checkpoint of the same step back that was there before,
            unless the new one is there already.
    """
    checkpoint = Checkpoint.of_step(staging.parent, step)
    final = checkpoint.path
    created = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    entries = {name: {"bytes": file.num_bytes, "sha256": file.sha256} for name, file in files.items()}
    content = {"format": FORMAT, "step": step, "created": created, "files": entries}
    durable.write_file(staging / MANIFEST, [durable.json_bytes(sealed(content))])
    for folder in sorted({staging, *((staging / name).parent for name in files)}):
        durable.sync_folder(folder)
    replaced = final.with_name(f"{REPLACED}{final.name}")
    if final.exists():  # The same step again, after a resume from an older one.
        if replaced.exists():  # An earlier replacement came as far as its removal.
            _remove(replaced)
        durable.rename(final, replaced)
    durable.rename(staging, final)
    durable.sync_folder(final.parent)
    point_latest(checkpoint)
    if replaced.exists():
        _remove(replaced)
    return checkpoint


def point_latest(checkpoint: Checkpoint) -> None:
    """Names a checkpoint in ``latest``, for people and scripts: a start looks at the folders themselves."""
    content = {"checkpoint": checkpoint.name, "step": checkpoint.step}
    durable.write_json(checkpoint.path.parent / LATEST, content)


def _remove(folder: Path) -> None:
    durable.remove_folder(folder, folder.with_name(f"{STAGING}{folder.name.lstrip('.')}"))


def recover(checkpoints: Path) -> None:
    """Puts the folder in order after a kill or a failed save: a checkpoint that was being replaced comes back, what is
    half written or half removed goes, as far as the system lets it: it is hidden and harms nobody."""
    for replaced in checkpoints.glob(f"{REPLACED}step-*"):
        final = replaced.with_name(replaced.name.removeprefix(REPLACED))
        if not final.exists():
            durable.rename(replaced, final)
        else:
            with contextlib.suppress(OSError):
                _remove(replaced)
    for staging in checkpoints.glob(f"{STAGING}*"):
        shutil.rmtree(staging, ignore_errors=True)
    for temporary in checkpoints.glob(f".{LATEST}.*.tmp"):
        with contextlib.suppress(OSError):
            temporary.unlink()


def set_aside(checkpoint: Checkpoint) -> Checkpoint:
    """Takes a checkpoint out of the row without losing a byte of it; returns it in its new place."""
    place, attempt = checkpoint.path.with_name(f"{ASIDE}{checkpoint.name}"), 1
    while place.exists():
        attempt += 1
        place = checkpoint.path.with_name(f"{ASIDE}{checkpoint.name}.{attempt}")
    durable.rename(checkpoint.path, place)
    durable.sync_folder(place.parent)
    return Checkpoint(place)


def remove_old(
    checkpoints: Path, *, newest: int, every: int | None = None, best: Collection[int] = ()
) -> list[Checkpoint]:
    """Removes the checkpoints that nothing keeps; returns them.

    Args:
        checkpoints: the folder of checkpoints.
        newest: how many of the newest to keep.
        every: keep each whose step is a multiple of this, for ever.
        best: steps to keep besides, those with the best evaluation.
    """
    removed = []
    for checkpoint in checkpoint_folders(checkpoints)[newest:]:
        if checkpoint.step not in best and not (every and checkpoint.step % every == 0):
            _remove(checkpoint.path)
            removed.append(checkpoint)
    return removed


# Finding


def checkpoint_folders(checkpoints: Path) -> list[Checkpoint]:
    """The visible checkpoint folders, newest step first, not yet verified."""
    folders = [path for path in checkpoints.glob("step-*") if _STEP.fullmatch(path.name) and path.is_dir()]
    return sorted(map(Checkpoint, folders), key=lambda checkpoint: checkpoint.step, reverse=True)


def newest_checkpoint(checkpoints: Path) -> Checkpoint | None:
    """The first of `checkpoint_folders`; None without any."""
    return next(iter(checkpoint_folders(checkpoints)), None)


def readable_checkpoints(checkpoints: Path) -> list[tuple[Checkpoint, str | None]]:
    """The visible checkpoint folders, newest first, each with what is wrong with its manifest; files are not read.

    Raises:
        NewerFormatError: a later version of this program continued the run; an older checkpoint would undo that.
    """
    found: list[tuple[Checkpoint, str | None]] = []
    for checkpoint in checkpoint_folders(checkpoints):
        problem = None
        try:
            checkpoint.manifest()
        except NewerFormatError:
            raise
        except UserError as error:
            problem = str(error)
        found.append((checkpoint, problem))
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointRow:
    """A line of ``checkpoint list``; the fields are the keys of its ``--json``."""

    step: int
    path: str
    aside: bool
    eval_loss: float | None
    """Where the run was evaluated at that step."""
    bytes: int = 0
    files: int = 0
    created: str = ""
    complete: bool = False


def list_checkpoints(run: Path) -> list[CheckpointRow]:
    """The checkpoints of a run, oldest first, with what was set aside.

    Raises:
        UserError: the folder is not a run.
    """
    run = Path(run)
    if not (run / "run.json").is_file():
        raise not_a_run(run)
    aside = [path for path in (run / "checkpoints").glob(f"{ASIDE}*") if _ASIDE.fullmatch(path.name) and path.is_dir()]
    found = [*checkpoint_folders(run / "checkpoints"), *map(Checkpoint, aside)]
    return [_row(checkpoint) for checkpoint in sorted(found, key=lambda each: (each.step, each.name))]


def _row(checkpoint: Checkpoint) -> CheckpointRow:
    row = CheckpointRow(
        step=checkpoint.step, path=str(checkpoint), aside=checkpoint.is_aside, eval_loss=_eval_loss(checkpoint)
    )
    try:
        manifest = checkpoint.manifest()
    except UserError:
        return row
    return dataclasses.replace(
        row, bytes=manifest.num_bytes, files=len(manifest.files), created=manifest.created, complete=True
    )


def _eval_loss(checkpoint: Checkpoint) -> float | None:
    try:
        with parts_of(checkpoint.path / STATE):
            rows = reversed(checkpoint.read_json(STATE)["extra"]["evaluations"])
            return next((float(row["eval_loss"]) for row in rows if row["step"] == checkpoint.step), None)
    except (OSError, DamagedFileError):
        return None  # `checkpoint verify` names the damage


def find_checkpoint(path: Path, step: int | None = None) -> Checkpoint:
    """A checkpoint from the folder of a run (the newest, or the one of a step) or from its own; its bytes are not read.

    Raises:
        UserError: there is none, or not that one.
    """
    path = Path(path)
    if (path / "run.json").is_file():
        found = {checkpoint.step: checkpoint for checkpoint in checkpoint_folders(path / "checkpoints")}
        if not found:
            raise UserError(f"{path} has no checkpoint yet")
        if step is not None and step not in found:
            nearest = min(sorted(found), key=lambda other: abs(other - step))
            raise UserError(
                f"{path} has no checkpoint of step {step}; the nearest is of step {nearest} "
                f"(there are: {', '.join(map(str, sorted(found)))})"
            )
        return found[max(found) if step is None else step]
    if step is not None and path.name != Checkpoint.of_step(path, step).name:
        raise UserError(f"--step goes with a run's folder, and {path} is none")
    return Checkpoint(path)


def newest_export(run: Path) -> Path:
    """The Hugging Face folder of a run's newest complete checkpoint.

    Raises:
        UserError: the run has none yet.
    """
    for checkpoint in checkpoint_folders(Path(run) / "checkpoints"):
        if (checkpoint.path / MANIFEST).is_file() and checkpoint.export.is_dir():
            return checkpoint.export
    raise UserError(f"{run} has no checkpoint yet: train it until the first save, or name a model folder")


def find_model(source: str | Path) -> str:
    """Returns what ``from_pretrained`` takes: the folder of the weights, or a name on the Hub.

    A run stands for its newest complete checkpoint, a checkpoint for its export; ``org/name@branch`` and
    ``hub.git@branch`` are downloaded first.

    Raises ``UserError`` for what is neither here nor a name on the Hub.
    """
    text = expand(str(source))
    path = Path(text)
    if not (path / "config.json").is_file() and (revision := parse_revision(text)) is not None:
        return str(fetch(revision))
    if path.is_dir():
        if (path / "config.json").is_file():
            return str(path)
        if (path / EXPORT / "config.json").is_file():
            return str(path / EXPORT)
        if (path / "checkpoints").is_dir():
            return str(newest_export(path))
    if exists(path) and (foreign := recognized(path)):
        raise UserError(f"{path} holds {foreign.what}: {foreign.as_model}")
    if path.is_dir():
        raise UserError(f"{path} is no run, checkpoint or Hugging Face model: it has no checkpoints and no config.json")
    if exists(path):
        raise UserError(f"{path} is a file; name the run or model folder that holds it")
    if may_be_on_hub(text):
        return text
    raise UserError(no_run(text, what="run or model folder", otherwise="a model on the Hub is named org/name"))


def find_run(source: str | Path) -> Path | None:
    """Returns the run folder that a run, checkpoint or export belongs to, None for any other model."""
    path = Path(expand(str(source))).absolute()
    if not exists(path):
        return None
    return next((place for place in (path, *path.parents[:3]) if (place / "run.json").is_file()), None)
