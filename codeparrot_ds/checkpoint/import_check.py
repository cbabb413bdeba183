"""What shows to be wrong with an import of a DeepSpeed checkpoint before anything of it is read. No torch here."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from codeparrot_ds.checkpoint.folders import find_run
from codeparrot_ds.checkpoint.run_folder import check_run_name
from codeparrot_ds.config.run_config import RunConfig
from codeparrot_ds.data.datasets import check_local_data
from codeparrot_ds.ds_config.file import find_ds_config, read_ds_config
from codeparrot_ds.errors import UserError
from codeparrot_ds.json_files import read_bytes
from codeparrot_ds.model.foreign import (
    MODEL_STATES,
    OPTIMIZER_STATES,
    UNIVERSAL,
    newest_first,
    recognized,
    trainer_checkpoints,
)
from codeparrot_ds.paths import did_you_mean, did_you_mean_path, exists
from codeparrot_ds.resolved_run import encoder_and_shape
from codeparrot_ds.shell import pasteable

LATEST = "latest"


def check_import(folder: Path, run: Path, config: RunConfig, tag: str | None = None) -> RunConfig:
    """Returns the config of the run to be, with the name and place of ``run``.

    Args: as for ``checkpoint_import.import_deepspeed``.

    Raises:
        UserError: the checkpoint is not there, the run is, or the config has a mistake.
    """
    run = Path(os.path.abspath(run))
    check_run_name(run.name)
    if run.exists() and (not run.is_dir() or any(run.iterdir())):
        raise UserError(f"{run} exists: an imported checkpoint begins a new run, choose another folder")
    for field in ("data", "tokenizer"):
        if not getattr(config, field):
            raise UserError(f"--{field} is missing: the run continues with it")
    find_tag(folder, tag)
    encoder_and_shape(config)
    read_ds_config(find_ds_config(config.ds_config_name))
    check_local_data(config.data, "train", named=True)
    return dataclasses.replace(config, output_dir=str(run.parent), run_name=run.name)


def find_tag(folder: Path, tag: str | None = None) -> Path:
    """The folder of one checkpoint: that of a tag, the one that ``latest`` names, or ``folder`` where it is one itself.

    Raises:
        UserError: there is none, or not that one; what is there instead is said.
    """
    folder = Path(folder)
    if not exists(folder):
        raise UserError(f"the DeepSpeed checkpoint {folder} does not exist{did_you_mean_path(folder)}")
    if tag is None and _is_checkpoint(folder):
        return folder
    tags = _tags(folder)
    if not tags:
        raise UserError(_no_checkpoint(folder))
    named_by = f"--tag {tag}"
    if tag is None:
        named_by = str(folder / LATEST)
        try:
            tag = read_bytes(folder / LATEST).decode().strip()
        except (OSError, ValueError):
            raise UserError(
                f"{named_by}, which names the newest checkpoint, cannot be read; choose one with --tag: "
                f"{', '.join(tags)}"
            ) from None
    if tag in os.listdir(folder) and UNIVERSAL.fits(folder / tag):
        raise UserError(f"{named_by}: {_universal(folder / tag)}")
    if tag not in tags:
        hint = did_you_mean(tag, tags) or f"; the last one is {tags[-1]!r}"
        raise UserError(f"{named_by}: {folder} has no checkpoint {tag!r:.300}{hint}")
    return folder / tag


def _tags(folder: Path) -> list[str]:
    """The checkpoints that ``engine.save_checkpoint`` wrote into a folder, the newest last."""
    return [path.name for path in reversed(newest_first(folder)) if _is_checkpoint(path)]


def _is_checkpoint(folder: Path) -> bool:
    return next(folder.glob(f"*{MODEL_STATES}"), None) is not None and not UNIVERSAL.fits(folder)


def _universal(place: Path) -> str:
    """What to say of a universal checkpoint, with those that lie beside it: DeepSpeed's tool puts it there."""
    beside = [str(place.parent / tag) for tag in _tags(place.parent)]
    which = f", one of {', '.join(beside)}" if beside else ""
    return f"{place} holds {UNIVERSAL.what}, which is not read: name the checkpoint that it was converted from{which}"


def _no_checkpoint(folder: Path) -> str:
    """What to say of a file or folder that ``engine.save_checkpoint`` was not given."""
    if _is_checkpoint(folder):
        return f"{folder} is the folder of one checkpoint; leave --tag out, or name {folder.parent}"
    if folder.is_file() and folder.name.endswith(".pt") and _is_checkpoint(folder.parent):
        return f"{folder} is a file of a checkpoint; name its folder, {folder.parent}"
    if run := find_run(folder):
        return (
            f"{folder} is of this program's run {run.name}, not a checkpoint of DeepSpeed's; continue it with "
            f"{pasteable('train', '--config', run / 'config.yaml')}"
        )
    if below := [path for path in newest_first(folder) if _tags(path)]:
        whose = "of a transformers Trainer" if trainer_checkpoints(folder) else "of DeepSpeed's"
        return f"{folder} holds folders with checkpoints {whose}; name one of them, the newest is {below[0]}"
    if universal := UNIVERSAL.place(folder):
        return _universal(universal)
    if next(folder.glob(f"*{OPTIMIZER_STATES}"), None):
        return f"{folder} has no *{MODEL_STATES}: copy the files of all nodes into one folder, and name that"
    if foreign := recognized(folder):
        return f"{folder} holds {foreign.what}, not what engine.save_checkpoint wrote: {foreign.as_start}"
    if not folder.is_dir():
        return f"{folder} is not a folder; name the one that was given to engine.save_checkpoint"
    return f"{folder} holds no checkpoint of DeepSpeed's: no folder in it has a *{MODEL_STATES}"
