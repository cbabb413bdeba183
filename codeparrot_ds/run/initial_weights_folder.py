"""The folder of a comparison's initial weights, made once by a process of its own. No torch here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from codeparrot_ds.config import RunConfig, save_config
from codeparrot_ds.durable import rename
from codeparrot_ds.errors import UserError
from codeparrot_ds.run.module_process import last_words, run_module

FINGERPRINTS = "fingerprints.json"


def initial_weights(config: RunConfig, folder: Path, *, perturbed: str | None = None) -> Path:
    """The model folder that trials begin with, made when it is not there.

    Args:
        config: the run config that all trials share.
        folder: of the comparison.
        perturbed: those of the sensitivity run of this precision.

    Raises:
        UserError: it could not be made.
    """
    place = folder / (f"perturbed-{perturbed}" if perturbed else "initial")
    if fingerprints(place) is not None:
        return place
    making = place.with_name(f".{place.name}.making")
    shutil.rmtree(making, ignore_errors=True)
    shutil.rmtree(place, ignore_errors=True)
    save_config(config, folder / "initial.yaml")
    arguments = [str(folder / "initial.yaml"), str(making), *([perturbed] if perturbed else [])]
    made = run_module("codeparrot_ds.run.initial_weights", *arguments)
    if made.returncode != 0:
        raise UserError(f"the initial weights could not be made: {last_words(made)}")
    rename(making, place)
    return place


def fingerprints(place: Path) -> dict[str, str] | None:
    """The hash of a folder's weights by dtype (``float32``, ``bfloat16``, ``float16``); None where it is not whole."""
    try:
        return dict(json.loads((place / FINGERPRINTS).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None
