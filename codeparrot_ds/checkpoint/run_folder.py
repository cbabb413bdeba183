"""A run's folder: its name, its record, its lock, and whether a config may continue it. No torch here."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import fcntl
import importlib.metadata
import os
import random
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from codeparrot_ds.checkpoint.folders import (
    DATA,
    REPLACED,
    STATE,
    Checkpoint,
    checkpoint_folders,
    newest_checkpoint,
    readable_checkpoints,
)
from codeparrot_ds.child_process import PACKAGE_PARENT
from codeparrot_ds.config.files import load_config, save_config
from codeparrot_ds.config.run_config import FIELDS, RunConfig, with_absolute_paths
from codeparrot_ds.config.warnings import Continued, learning_rate_at
from codeparrot_ds.ds_config.changes import Change, changes, run_of, saved_ds_config
from codeparrot_ds.durable import rename, write_json
from codeparrot_ds.errors import UserError
from codeparrot_ds.hub.identity import identity_of, place_of
from codeparrot_ds.json_files import DamagedFileError, parts_of, read_object
from codeparrot_ds.model.shapes import GPT2Shape, differing_parameters, parameter_shapes
from codeparrot_ds.paths import find_run, shown
from codeparrot_ds.secret_forms import hide_secrets

ADJECTIVES = (
    "amber brave bright calm clever copper crimson daring dusty eager early fancy gentle golden green happy hidden "
    "jolly keen lively lucky mellow merry misty noble olive patient proud quick quiet rapid royal rustic scarlet "
    "silent silver smooth snowy solar steady sunny swift tidy vivid warm wild wise young "
).split()
NOUNS = (
    "ara badger breeze brook cedar cloud comet coral crane dawn delta dune ember falcon fern finch fjord forest "
    "galaxy glade harbor hawk heron island kestrel lagoon lark macaw maple meadow meteor moon oak orchid otter "
    "parrot pebble pine planet prairie raven reef river robin sparrow spruce star summit swan thicket toucan valley "
    "willow wren "
).split()
PACKAGES = ("torch", "deepspeed", "transformers", "datasets", "tokenizers", "huggingface_hub", "wandb", "numpy")

KEPT_TOKENIZERS = "tokenizers"
"""Folder beside the runs with the tokenizers that came from elsewhere (`checkpoint.initial`)."""

# What a run is: a config that differs here is another run, and continuing it would mix two.
IDENTITY = ("model", "seq_length", "global_batch_size", "num_lanes", "shuffle_buffer", "seed")
OF_THE_STREAM = ("seq_length", "num_lanes", "shuffle_buffer", "seed")
"""May change where the stream is restarted on other data (``on_data_change``)."""


def run_path(config: RunConfig) -> Path:
    """Where a run with a name lives, as it is shown to people who work in this process's folder."""
    assert config.run_name is not None
    return Path(shown(config.output_dir)) / config.run_name


def new_run_name(output_dir: Path) -> str:
    """An adjective-noun-number name that no run in ``output_dir`` has; a valid branch name, never like a commit id."""
    draw = random.SystemRandom()
    number = 1 + sum(1 for path in output_dir.glob("*/run.json")) if output_dir.is_dir() else 1
    while True:
        name = f"{draw.choice(ADJECTIVES)}-{draw.choice(NOUNS)}-{number}"
        if not (output_dir / name).exists():
            return name
        number += 1


def check_run_name(name: str) -> None:
    """Refuses a run name that cannot be a folder and a branch.

    Raises:
        UserError: with the reason.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}", name) or ".." in name or name.endswith((".lock", ".")):
        raise UserError(f"run_name {name!r} cannot be a branch: use letters, digits, '-', '_' and '.' (brave-otter-7)")
    if name == "main" or re.fullmatch(r"[A-Z_]*HEAD|AUTO_MERGE", name):  # FETCH_HEAD and others are git's own
        raise UserError(f"run_name {name!r} means something else in git: choose another, such as brave-otter-7")
    if re.fullmatch(r"[0-9a-fA-F]{7,64}", name):
        raise UserError(f"run_name {name!r} looks like a commit id: add a word to it")
    if name.lower().endswith(".git"):
        raise UserError(f"run_name {name!r} is a name of a repository, as hub.git beside the runs: leave .git out")
    if name == KEPT_TOKENIZERS:
        raise UserError(f"run_name {name!r} is the folder of the runs' tokenizers: choose another, such as {name}-1")


class RunFolder:
    """``<output_dir>/<run_name>/`` as one process sees it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.record: dict[str, Any] = {}
        self.copy_of: Path | None = None
        """The run that the folder is a copy of, at the first start of the copy."""
        self._lock: Any = None

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def branch(self) -> str:
        """Of its checkpoints: the run's first name, which a folder that was renamed keeps."""
        return str(self.record["name"])

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def reload(self) -> None:
        """Reads ``run.json`` as rank 0 wrote it."""
        self.record = read_object(self.path / "run.json")

    def update(self, **fields: Any) -> None:
        """Changes fields of ``run.json`` (rank 0)."""
        self.record.update(fields)
        write_json(self.path / "run.json", self.record)


def _recorded(path: Path) -> dict[str, Any]:
    """A run's ``run.json``; empty where there is none. A damaged one is refused."""
    try:
        return read_object(path / "run.json")
    except OSError:
        return {}


def recorded_pins(path: Path) -> dict[str, str]:
    """The commits of Hub data sets that a run began with; empty for a run that starts."""
    with parts_of(path / "run.json"):
        return {str(name): str(commit) for name, commit in _recorded(path).get("data_pins", {}).items()}


def order_version_of(path: Path, resume: str = "auto") -> int | None:
    """The version of the stream's order that a run keeps, which it began with; None for a run that begins.

    The checkpoint says it that the run resumes from, else the run's record.

    Args:
        path: the run's folder.
        resume: as in the run config; a checkpoint may be another run's.
    """
    began = recorded_fingerprint(path, "auto" if resume == "never" else resume)
    if began is not None and "order_version" in began:
        with parts_of(path / "checkpoints"):
            return int(began["order_version"])
    record = _recorded(path)
    with parts_of(path / "run.json"):
        return int(record.get("order_version", 1)) if record else None  # 0.1.0 recorded none


def recorded_fingerprint(run: Path, resume: str = "auto") -> dict[str, Any] | None:
    """The fingerprint of the data that a run has begun with; None for one that starts.

    Args:
        run: its folder.
        resume: as in a run config.
    """
    if resume == "never":
        return None
    checkpoints = checkpoint_folders(run / "checkpoints") if resume == "auto" else [Checkpoint(Path(resume))]
    for checkpoint in checkpoints:
        # Damaged: an older one says the same.
        with contextlib.suppress(OSError, DamagedFileError), parts_of(checkpoint.path / DATA):
            return dict(checkpoint.read_json(DATA)["fingerprint"])
    return None


def began_data(config: RunConfig) -> dict[str, Any] | None:
    """The fingerprint of the data that a run of this config continues on; None for one that starts, there or anew."""
    if config.run_name is None or config.on_data_change == "restart":
        return None
    return recorded_fingerprint(Path(config.output_dir) / config.run_name, config.resume)


def recorded_hub(path: Path) -> str | None:
    """Where a run's checkpoints are pushed; None where they are not."""
    return _recorded(path).get("hub")


def recorded_outcome(path: Path) -> dict[str, Any]:
    """What became of a run's last start, ``status`` and ``step``; empty where nothing says it."""
    with parts_of(path / "run.json"):
        return dict(_recorded(path).get("outcome") or {})


def finished_checkpoint(config: RunConfig) -> Checkpoint | None:
    """The last checkpoint of a run that has finished, where this config leaves it nothing to train; None otherwise."""
    path = Path(config.output_dir) / str(config.run_name)
    outcome, newest = recorded_outcome(path), newest_checkpoint(path / "checkpoints")
    if config.resume != "auto" or outcome.get("status") != "finished" or newest is None:
        return None
    return newest if newest.step == outcome.get("step") and newest.step >= config.max_train_steps else None


def continued_from(config: RunConfig) -> Continued | None:
    """The checkpoint that a run of this config resumes from; None for one that starts.

    Also None for a checkpoint that cannot be read: the ranks verify it, name the damage and look for an older one.
    """
    if config.resume == "never" or not config.run_name:
        return None
    run = Path(config.output_dir) / config.run_name
    auto = config.resume == "auto"
    checkpoint = newest_checkpoint(run / "checkpoints") if auto else Checkpoint(Path(config.resume))
    if checkpoint is None:
        return None
    try:
        state = checkpoint.read_json(STATE)
        with parts_of(checkpoint.path / STATE):
            saved = {name: value for name, value in state["extra"]["config"].items() if name in FIELDS}
            step, schedule_step, then = int(state["step"]), int(state["scheduler_step"]), RunConfig(**saved)
            rate = learning_rate_at(then, schedule_step)
    except (OSError, UserError):
        return None
    return Continued(name=str(run), step=step, schedule_step=schedule_step, learning_rate=rate, config=then)


def check_continuation(config: RunConfig, path: Path) -> None:
    """Refuses to continue a run with a config that is another run, or to start anew on top of one; changes nothing.

    Raises:
        UserError: with the fields that differ, or the holder of the folder.
    """
    if not path.exists():
        return
    if not path.is_dir():
        raise UserError(f"{path} is a file: choose another --run-name or --output-dir")
    saved_config = path / "config.yaml"
    if not (path / "run.json").is_file() or not saved_config.is_file():
        if not _left_by_a_killed_start(path):
            raise UserError(f"{path} is not a run and not empty: choose another --run-name or --output-dir")
        return
    if config.resume == "never" and checkpoint_folders(path / "checkpoints"):
        raise UserError(f"{path} holds a run with checkpoints and resume is 'never': choose another --run-name")
    saved = load_config(saved_config)
    free: tuple[str, ...] = OF_THE_STREAM if config.on_data_change == "restart" else ()
    free += ("global_batch_size",) if config.on_batch_change == "continue" else ()
    fixed = [field for field in IDENTITY if field not in free]
    # A model may be a path, which was saved as it was typed by versions that did not make it absolute.
    there, here = with_absolute_paths(saved), with_absolute_paths(config)
    differences = [
        f"{field} is {getattr(saved, field)!r} there and {getattr(config, field)!r} here"
        for field in fixed
        if getattr(there, field) != getattr(here, field)
    ]
    if differences:
        otherwise = ""
        if len(differences) == 1 and saved.global_batch_size != config.global_batch_size:
            otherwise = ", or pass --on-batch-change continue to take the next rows in batches of the new size"
        raise UserError(
            f"{path} belongs to another config ({'; '.join(differences)}): choose another --run-name{otherwise}"
        )


def with_checkpoint(config: RunConfig) -> RunConfig:
    """Resolves a ``resume`` that is neither ``auto`` nor ``never`` to the folder of a checkpoint.

    A run, by its path or its name, stands for its newest checkpoint that can be read.

    Raises:
        UserError: there is no such run or checkpoint.
    """
    if config.resume in ("auto", "never"):
        return config
    try:
        place = find_run(config.resume, config.output_dir, what="checkpoint or run")
        if (place / "checkpoints").is_dir():
            readable = [each for each, problem in readable_checkpoints(place / "checkpoints") if problem is None]
            if not readable:
                raise UserError(f"{place} has no checkpoint that can be read")
            place = readable[0].path
    except UserError as error:
        raise UserError(f"--resume {config.resume}: {error}") from None
    return dataclasses.replace(config, resume=str(place))


def check_checkpoint(config: RunConfig, path: Path, shape: GPT2Shape) -> Checkpoint | None:
    """Refuses a start from a checkpoint that cannot hold, as far as that shows without reading its large files.

    Args:
        config: the run config; ``resume`` is as `with_checkpoint` leaves it.
        path: the run's folder.
        shape: of the run's model.

    Returns:
        The checkpoint that the run would resume from; None for one that begins.

    Raises:
        UserError: the checkpoint is damaged, a later version's, or of another model.
    """
    if config.resume == "never":
        return None
    checkpoints = path / "checkpoints"
    if config.resume == "auto":
        candidates = [checkpoint for checkpoint, _ in readable_checkpoints(checkpoints)]
        refusal = f"no checkpoint of {path} is whole: "
    else:
        candidates, refusal = [Checkpoint(Path(config.resume))], f"--resume {config.resume}: "
    problems = []
    for checkpoint in candidates:
        if problem := next(iter(checkpoint.damage_in_sight()), None):
            problems.append(problem)
            continue
        _check_model(checkpoint, shape)
        return checkpoint
    # One that was being replaced when a start was killed comes back with the next start.
    if problems and not (config.resume == "auto" and any(checkpoints.glob(f"{REPLACED}*"))):
        raise UserError(refusal + problems[0])
    return None


def _check_model(checkpoint: Checkpoint, shape: GPT2Shape) -> None:
    try:
        with parts_of(checkpoint.path / STATE):
            parameters = checkpoint.read_json(STATE)["parameters"]
            saved = {" ".join(name.split()): [int(size) for size in sizes] for name, sizes in parameters.items()}
            problem = differing_parameters(saved, parameter_shapes(shape))
    except (OSError, DamagedFileError):
        return  # which the ranks find by its hash
    if problem:
        raise UserError(f"{checkpoint} belongs to another model: {problem}")


def _left_by_a_killed_start(path: Path) -> bool:
    """Whether a folder without ``run.json`` holds nothing, or only what a start makes before that."""
    names = {entry.name for entry in path.iterdir()}
    if "checkpoints" in names and any((path / "checkpoints").iterdir()):
        return False
    made = {"checkpoints", ".lock"}
    if ".lock" in names:  # without it, they are somebody else's
        made |= {name for name in names if re.fullmatch(r"(ds_)?config(_sources)?\.(yaml|json)|\..+\.\d+\.tmp", name)}
    return names <= made


def check_ds_continuation(config: RunConfig, path: Path, ds_config: dict[str, Any]) -> list[Change]:
    """What a resolved DeepSpeed config changes for a run that resumes from a checkpoint, all of it safe.

    Args:
        config: the run config; it says which checkpoint the run resumes from.
        path: the run's folder.
        ds_config: the resolved DeepSpeed config.

    Raises:
        UserError: with the changes that the checkpoint cannot be continued with.
    """
    if config.resume == "never":
        return []
    run = path if config.resume == "auto" else run_of(config.resume)
    saved = saved_ds_config(run / "ds_config.json")
    if saved is None or (config.resume == "auto" and not checkpoint_folders(path / "checkpoints")):
        return []
    found = changes(saved, ds_config)
    refused = [str(change) for change in found if change.refused]
    if refused:
        raise UserError(
            f"{path}: the DeepSpeed config cannot continue the run: {'; '.join(refused)}: choose another --run-name"
        )
    return found


def open_run(
    config: RunConfig,
    ds_config: dict[str, Any],
    world_size: int,
    hosts: list[str],
    sources: dict[str, str] | None = None,
    command: Sequence[str] | None = None,
) -> RunFolder:
    """Creates or continues the run's folder and takes its lock (rank 0).

    Args:
        config: the run config; its ``run_name`` is set.
        ds_config: the resolved DeepSpeed config.
        world_size: number of ranks of this start.
        hosts: host name of every rank.
        sources: where each value of the DeepSpeed config came from.
        command: that started the run; this process's own without.

    Raises:
        UserError: the folder belongs to another config or another process, or cannot be written.
    """
    from codeparrot_ds.data.stream import ORDER_VERSION

    path = run_path(config)
    check_continuation(config, path)
    check_ds_continuation(config, path, ds_config)
    order_version = order_version_of(path, config.resume) or ORDER_VERSION
    folder = RunFolder(path)
    is_new = not path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / "checkpoints").mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write the run folder {path}: {error.strerror}") from error
    _take_lock(folder)
    if is_new:
        _made_here.append(path)
    if (path / "run.json").is_file():
        folder.reload()
    save_config(config, path / "config.yaml")
    write_json(path / "ds_config.json", ds_config)
    write_json(path / "ds_config_sources.json", sources or {})
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    identity = identity_of(path)
    if identity.copy_of is not None and (path / "hub").exists():
        # What the original has pushed and what waits there is the original's.
        rename(path / "hub", path / f"hub-of-{folder.record.get('id')}")
    folder.copy_of = identity.copy_of
    folder.record.setdefault("created", now)
    with parts_of(path / "run.json"):
        starts = [*folder.record.get("starts", ())]
    typed = hide_secrets(shlex.join(command or sys.argv))
    starts.append({"time": now, "world_size": world_size, "command": typed, "hosts": sorted(set(hosts))})
    folder.update(
        name=identity.branch,
        id=identity.run_id or f"{identity.branch}-{os.urandom(3).hex()}",
        place=place_of(path),
        versions=package_versions(),
        git_commit=_git_commit(),
        hosts=sorted(set(hosts)),
        rank_hosts=hosts,
        starts=starts,
        outcome={"status": "running", "step": None},
        order_version=order_version,
    )
    return folder


_made_here: list[Path] = []
"""Folders that this process made for runs that are still starting."""


@contextlib.contextmanager
def forgotten_if_refused() -> Iterator[None]:
    """Around the start of a run: where that is refused, a folder that was made for it is taken away again (rank 0)."""
    _made_here.clear()
    try:
        yield
    except UserError:
        for path in _made_here:
            shutil.rmtree(path, ignore_errors=True)
        raise


def _take_lock(folder: RunFolder) -> None:
    """Holds ``<run>/.lock`` until the process ends, so that two runs never write to one folder."""
    file = (folder.path / ".lock").open("a+", encoding="utf-8")
    _lock(file, folder.path)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    folder._lock = file


def check_free(path: Path) -> None:
    """Refuses the folder of a run that another process trains.

    Raises:
        UserError: with the holder.
    """
    if (path / ".lock").is_file():
        with (path / ".lock").open("a+", encoding="utf-8") as file:
            _lock(file, path)


def _lock(file: IO[str], path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        holder = file.read().strip() or "another process"
        raise UserError(f"{path} is in use by {holder}: wait for it, or choose another --run-name") from error


def package_versions() -> dict[str, str | None]:
    """Of Python and of the packages that a run's result depends on."""
    return {"python": sys.version.split()[0], **{name: _version(name) for name in PACKAGES}}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit of this project's checkout, with ``+changes`` when the tree differs from it; None outside git."""
    describe = ("describe", "--always", "--dirty=+changes", "--abbrev=40", "--exclude=*")
    command = ["git", "-C", str(PACKAGE_PARENT / "codeparrot_ds"), *describe]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None if answer.returncode == 0 else None
