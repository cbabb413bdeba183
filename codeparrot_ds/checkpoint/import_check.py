"""What shows to be wrong with an import of a DeepSpeed checkpoint before anything of it is read. No torch here."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from codeparrot_ds.checkpoint.run_folder import check_run_name
from codeparrot_ds.config.run_config import RunConfig
from codeparrot_ds.data.datasets import check_local_data
from codeparrot_ds.ds_config.file import find_ds_config, read_ds_config
from codeparrot_ds.errors import UserError
from codeparrot_ds.paths import did_you_mean, did_you_mean_path, exists
from codeparrot_ds.resolved_run import encoder_and_shape

LATEST = "latest"
MODEL_STATES = "_model_states.pt"


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
    read_ds_config(find_ds_config(config.deepspeed))
    check_local_data(config.data, "train")
    return dataclasses.replace(config, output_dir=str(run.parent), run_name=run.name)


def find_tag(folder: Path, tag: str | None = None) -> Path:
    """The folder of one checkpoint: that of a tag, the one that ``latest`` names, or ``folder`` where it is one itself.

    Raises:
        UserError: there is none, or not that one.
    """
    folder = Path(folder)
    if not exists(folder):
        raise UserError(f"the DeepSpeed checkpoint {folder} does not exist{did_you_mean_path(folder)}")
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; name the one that was given to engine.save_checkpoint")
    if tag is None and _is_checkpoint(folder):
        return folder
    tags = sorted((path.name for path in folder.iterdir() if path.is_dir() and _is_checkpoint(path)), key=_natural)
    if not tags:
        raise UserError(f"{folder} holds no checkpoint of DeepSpeed's: no folder in it has a *{MODEL_STATES}")
    named_by = f"--tag {tag}"
    if tag is None:
        named_by = str(folder / LATEST)
        try:
            tag = (folder / LATEST).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            raise UserError(
                f"{named_by}, which names the newest checkpoint, cannot be read; choose one with --tag: "
                f"{', '.join(tags)}"
            ) from None
    if tag not in tags:
        hint = did_you_mean(tag, tags) or f"; the last one is {tags[-1]!r}"
        raise UserError(f"{named_by}: {folder} has no checkpoint {tag!r}{hint}")
    return folder / tag


def _is_checkpoint(folder: Path) -> bool:
    return next(folder.glob(f"*{MODEL_STATES}"), None) is not None


def _natural(name: str) -> tuple[int, str]:
    digits = "".join(filter(str.isdigit, name))
    return int(digits or 0), name
