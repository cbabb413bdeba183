"""A checkpoint's model in any precision, as a plain Hugging Face folder, from the fragments of its masters."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from codeparrot_ds.data.staging import staged_folder
from codeparrot_ds.run import checkpoint_files
from codeparrot_ds.run.checkpoint_files import STATE
from codeparrot_ds.run.export import TRAINING_STATE, Export, write_export
from codeparrot_ds.run.fragment_files import FragmentReader


def export_checkpoint(checkpoint: Path, out: Path, *, dtype: str, overwrite: bool) -> None:
    """Writes a checkpoint's weights, rounded from its masters, with config, tokenizer and card; complete or not at all.

    Args:
        checkpoint: from ``checkpoint_files.find_checkpoint``.
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
