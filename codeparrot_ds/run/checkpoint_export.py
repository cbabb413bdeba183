"""A checkpoint's model in any precision, as a plain Hugging Face folder, from the fragments of its masters."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from codeparrot_ds.data.staging import staged_folder
from codeparrot_ds.errors import UserError
from codeparrot_ds.run import checkpoint_files
from codeparrot_ds.run.checkpoint_files import STATE
from codeparrot_ds.run.export import TRAINING_STATE, Export, write_export
from codeparrot_ds.run.fragment_files import FragmentReader


def find_checkpoint(path: Path, step: int | None = None) -> Path:
    """A checkpoint's folder from that of a run (the newest, or the one of a step) or from its own; every byte is right.

    Raises:
        UserError: there is none, not that one, or it is damaged.
    """
    path = Path(path)
    if (path / "run.json").is_file():
        folders = checkpoint_files.checkpoint_folders(path / "checkpoints")
        if not folders:
            raise UserError(f"{path} has no checkpoint yet")
        steps = sorted(int(folder.name[5:]) for folder in folders)
        if step is not None and step not in steps:
            nearest = min(steps, key=lambda other: abs(other - step))
            raise UserError(
                f"{path} has no checkpoint of step {step}; the nearest is of step {nearest} "
                f"(there are: {', '.join(map(str, steps))})"
            )
        path = checkpoint_files.step_folder(path / "checkpoints", step or steps[-1])
    elif step is not None and path.name != checkpoint_files.step_folder(path, step).name:
        raise UserError(f"--step goes with a run's folder, and {path} is none")
    damage = checkpoint_files.verify_checkpoint(path)
    if damage:
        raise UserError(damage[0])
    return path


def export_checkpoint(checkpoint: Path, out: Path, *, dtype: str, overwrite: bool) -> None:
    """Writes a checkpoint's weights, rounded from its masters, with config, tokenizer and card; complete or not at all.

    Args:
        checkpoint: from ``find_checkpoint``.
        out: folder to make.
        dtype: ``float32``, ``bfloat16`` or ``float16``.
        overwrite: whether an earlier export there may be replaced.

    Raises:
        UserError: ``out`` may not be replaced or cannot be written, or a weight is too large for float16.
    """
    from transformers import AutoConfig

    exported = checkpoint / checkpoint_files.EXPORT
    state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    card = (exported / "README.md").read_text(encoding="utf-8")
    export = Export(
        model_config=AutoConfig.from_pretrained(exported),
        tokenizer=exported,
        dtype=dtype,
        card=f"{card}\nThese weights were exported in {dtype} from the optimizer's masters.\n",
        training_state=json.loads((exported / TRAINING_STATE).read_text(encoding="utf-8")),
    )
    shapes = state["parameters"]
    reader = FragmentReader(checkpoint, checkpoint_files.read_manifest(checkpoint)["files"])
    weights = reader.weights(shapes, getattr(torch, dtype))
    with staged_folder(out, marker="config.json", overwrite=overwrite) as staging:
        write_export(staging, export, shapes, weights)
