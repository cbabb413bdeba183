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
import datetime
import hashlib
import json
import os
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from codeparrot_ds import durable
from codeparrot_ds.cpu import usable_cores
from codeparrot_ds.errors import UserError
from codeparrot_ds.hub.revision import fetch, parse_revision
from codeparrot_ds.paths import exists, expand, may_be_on_hub, no_run, not_a_run

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"
EXPORT = "export"
WEIGHTS = "model.safetensors"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")
LATEST = "latest"
SEAL = "sha256"
STAGING = ".staging-"
REPLACED = ".replaced-"
ASIDE = "aside-"


def step_folder(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint of an optimizer step lives."""
    return checkpoints / f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """The optimizer step of a checkpoint, by the name of its folder."""
    return int(folder.name.removeprefix("step-"))


def staging_folder(checkpoints: Path, step: int) -> Path:
    """A new place to write it before it is complete; hidden, and never looked at when resuming.

    No two are the same: a rank that outlives a killed run writes to a place that is gone, never into its successor's.
    """
    return checkpoints / f"{STAGING}{step:08d}-{os.urandom(4).hex()}"


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """A manifest with its own SHA-256, over its JSON without that."""
    return content | {SEAL: hashlib.sha256(durable.json_bytes(content)).hexdigest()}


def publish(staging: Path, step: int, files: dict[str, dict[str, Any]]) -> Path:
    """Turns a fully written staging folder into the checkpoint of a step and points ``latest`` at it.

    Args:
        staging: the folder with every file in place and synced.
        step: the optimizer step.
        files: ``bytes`` and ``sha256`` of every file by its path relative to ``staging``.

    Raises:
        OSError: the system refused; ``recover`` then puts a checkpoint of the same step back that was there before,
            unless the new one is there already.
    """
    final = step_folder(staging.parent, step)
    created = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    content = {"format": FORMAT, "step": step, "created": created, "files": files}
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
    point_latest(final)
    if replaced.exists():
        _remove(replaced)
    return final


def point_latest(checkpoint: Path) -> None:
    """Names a checkpoint in ``latest``, for people and scripts: a start looks at the folders themselves."""
    content = {"checkpoint": checkpoint.name, "step": step_of(checkpoint)}
    durable.write_json(checkpoint.parent / LATEST, content)


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


def set_aside(checkpoint: Path) -> Path:
    """Takes a checkpoint out of the row without losing a byte of it; returns its new place."""
    place, attempt = checkpoint.with_name(f"{ASIDE}{checkpoint.name}"), 1
    while place.exists():
        attempt += 1
        place = checkpoint.with_name(f"{ASIDE}{checkpoint.name}.{attempt}")
    durable.rename(checkpoint, place)
    durable.sync_folder(place.parent)
    return place


class NewerFormatError(UserError):
    """A checkpoint that a later version of this program wrote: whole, but not to be read, and not to be passed over."""


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint.

    Raises:
        UserError: there is none, or it is damaged.
        NewerFormatError: a newer version of this program wrote it.
    """
    path = checkpoint / MANIFEST
    try:
        content = path.read_bytes()
        manifest = json.loads(content)
        version, entries, created = (manifest[key] for key in ("format", "files", "created"))
    except FileNotFoundError as error:
        raise UserError(f"{checkpoint} is not a complete checkpoint: it has no {MANIFEST}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is damaged"
        raise UserError(f"{checkpoint} is not a complete checkpoint: {MANIFEST} cannot be read: {why}") from error
    # Compared as bytes: every one of them counts. Whatever a later format holds, it ends in the same seal.
    if durable.json_bytes(sealed({key: value for key, value in manifest.items() if key != SEAL})) != content:
        raise UserError(f"{path} is damaged: its content is not what its own SHA-256 says")
    if isinstance(version, int) and version > FORMAT:
        raise NewerFormatError(
            f"{checkpoint} has format {version}; this version reads up to {FORMAT}: update codeparrot-ds"
        )
    whole = isinstance(version, int) and isinstance(created, str) and isinstance(entries, dict)
    if not whole or not all(
        isinstance(entry, dict) and {"bytes", "sha256"} <= entry.keys() for entry in entries.values()
    ):
        raise UserError(f"{path} is damaged: it is not a table of files with 'bytes' and 'sha256'")
    return manifest


def verify_checkpoint(checkpoint: Path, *, share: int = 0, num_shares: int = 1) -> list[str]:
    """Compares every file with the manifest and returns the damage, one sentence a file; none when it is whole.

    Args:
        checkpoint: its folder.
        share: which of ``num_shares`` equal shares of the files to read (ranks on many hosts read one each).
        num_shares: how many there are.
    """
    checkpoint = Path(checkpoint)
    try:
        entries = read_manifest(checkpoint)["files"]
    except UserError as error:
        return [str(error)]
    # Sorted by size, so that each share has as many bytes; hashlib releases the interpreter.
    names = sorted(entries, key=lambda name: (entries[name]["bytes"], name), reverse=True)[share::num_shares]
    with concurrent.futures.ThreadPoolExecutor(max_workers=min(16, usable_cores())) as pool:
        problems = pool.map(lambda name: _compare(checkpoint / name, entries[name]), names)
        return sorted(problem for problem in problems if problem)


def damage_in_sight(checkpoint: Path) -> list[str]:
    """The damage that shows without reading the files: of the manifest, and files that are gone or of another size."""
    try:
        entries = read_manifest(checkpoint)["files"]
    except NewerFormatError:
        raise
    except UserError as error:
        return [str(error)]
    return [problem for name in sorted(entries) if (problem := _compare_size(checkpoint / name, entries[name]))]


def _compare_size(path: Path, entry: dict[str, Any]) -> str | None:
    if not path.is_file():
        return f"{path} is missing"
    size = path.stat().st_size
    return None if size == entry["bytes"] else f"{path} has {size} bytes instead of {entry['bytes']}"


def _compare(path: Path, entry: dict[str, Any]) -> str | None:
    digest = hashlib.sha256()
    try:
        if problem := _compare_size(path, entry):
            return problem
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    return None if digest.hexdigest() == entry["sha256"] else f"{path} is damaged: its SHA-256 is not the manifest's"


def checkpoint_folders(checkpoints: Path) -> list[Path]:
    """The visible checkpoint folders, newest step first, not yet verified."""
    folders = [path for path in checkpoints.glob("step-*") if path.name[5:].isdigit() and path.is_dir()]
    return sorted(folders, key=lambda path: step_of(path), reverse=True)


def readable_checkpoints(checkpoints: Path) -> list[tuple[Path, str | None]]:
    """The visible checkpoint folders, newest first, each with what is wrong with its manifest; files are not read.

    Raises:
        NewerFormatError: a later version of this program went on with the run; an older checkpoint would undo that.
    """
    found: list[tuple[Path, str | None]] = []
    for folder in checkpoint_folders(checkpoints):
        try:
            read_manifest(folder)
        except NewerFormatError:
            raise
        except UserError as error:
            found.append((folder, str(error)))
        else:
            found.append((folder, None))
    return found


def list_checkpoints(run: Path) -> list[dict[str, Any]]:
    """The checkpoints of a run, oldest first, with what was set aside.

    Returns:
        Rows of ``step``, ``path``, ``bytes``, ``files``, ``created``, ``complete``, ``aside``, and ``eval_loss`` where
        the run was evaluated at that step.

    Raises:
        UserError: the folder is not a run.
    """
    run = Path(run)
    if not (run / "run.json").is_file():
        raise not_a_run(run)
    aside = [path for path in (run / "checkpoints").glob(f"{ASIDE}step-*") if path.is_dir()]
    folders = checkpoint_folders(run / "checkpoints") + aside
    return [_row(folder) for folder in sorted(folders, key=lambda folder: (_step(folder), folder.name))]


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix(ASIDE)[5:].split(".")[0])


def _row(folder: Path) -> dict[str, Any]:
    row: dict[str, Any] = {"step": _step(folder), "path": str(folder), "aside": folder.name.startswith(ASIDE)}
    row |= {"eval_loss": _eval_loss(folder)}
    try:
        manifest = read_manifest(folder)
    except UserError:
        return row | {"bytes": 0, "files": 0, "created": "", "complete": False}
    sizes = [entry["bytes"] for entry in manifest["files"].values()]
    return row | {"bytes": sum(sizes), "files": len(sizes), "created": manifest["created"], "complete": True}


def _eval_loss(folder: Path) -> float | None:
    try:
        evaluations = json.loads((folder / STATE).read_text(encoding="utf-8"))["extra"]["evaluations"]
        return next((row["eval_loss"] for row in reversed(evaluations) if row["step"] == _step(folder)), None)
    except (OSError, ValueError, KeyError, TypeError):
        return None  # A damaged one; `checkpoint verify` names the damage.


def find_checkpoint(path: Path, step: int | None = None) -> Path:
    """A checkpoint's folder from that of a run (the newest, or the one of a step) or from its own; every byte is right.

    Raises:
        UserError: there is none, not that one, or it is damaged.
    """
    checkpoint = locate_checkpoint(path, step)
    if damage := verify_checkpoint(checkpoint):
        raise UserError(damage[0])
    return checkpoint


def locate_checkpoint(path: Path, step: int | None = None) -> Path:
    """What `find_checkpoint` finds, before its bytes are looked at."""
    path = Path(path)
    if (path / "run.json").is_file():
        folders = checkpoint_folders(path / "checkpoints")
        if not folders:
            raise UserError(f"{path} has no checkpoint yet")
        steps = sorted(step_of(folder) for folder in folders)
        if step is not None and step not in steps:
            nearest = min(steps, key=lambda other: abs(other - step))
            raise UserError(
                f"{path} has no checkpoint of step {step}; the nearest is of step {nearest} "
                f"(there are: {', '.join(map(str, steps))})"
            )
        path = step_folder(path / "checkpoints", step or steps[-1])
    elif step is not None and path.name != step_folder(path, step).name:
        raise UserError(f"--step goes with a run's folder, and {path} is none")
    return path


def remove_old(checkpoints: Path, *, newest: int, every: int | None = None, best: Collection[int] = ()) -> list[Path]:
    """Removes the checkpoints that nothing keeps; returns them.

    Args:
        checkpoints: the folder of checkpoints.
        newest: how many of the newest to keep.
        every: keep each whose step is a multiple of this, for ever.
        best: steps to keep besides, those with the best evaluation.
    """
    removed = []
    for folder in checkpoint_folders(checkpoints)[newest:]:
        step = step_of(folder)
        if step not in best and not (every and step % every == 0):
            _remove(folder)
            removed.append(folder)
    return removed


def newest_export(run: Path) -> Path:
    """The Hugging Face folder of a run's newest complete checkpoint.

    Raises:
        UserError: the run has none yet.
    """
    for folder in checkpoint_folders(Path(run) / "checkpoints"):
        if (folder / MANIFEST).is_file() and (folder / EXPORT).is_dir():
            return folder / EXPORT
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
        if (path / "export" / "config.json").is_file():
            return str(path / "export")
        if (path / "checkpoints").is_dir():
            return str(newest_export(path))
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
