"""The checkpoint that a start resumes from."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from codeparrot_ds.checkpoint import folders as checkpoint_files
from codeparrot_ds.checkpoint.folders import Checkpoint
from codeparrot_ds.checkpoint.run_folder import RunFolder
from codeparrot_ds.checkpoint.saver import load_checkpoint
from codeparrot_ds.checkpoint.state import RunState
from codeparrot_ds.config.run_config import RunConfig
from codeparrot_ds.engine.ranks import Ranks, SharedError
from codeparrot_ds.errors import UserError

logger = logging.getLogger("codeparrot_ds.resume")


def restore(config: RunConfig, folder: RunFolder, engine: Any, ranks: Ranks) -> RunState | None:
    """Fills the engine from the newest valid checkpoint, or the one asked for; None for a run that starts."""
    ranks.on_main(lambda: checkpoint_files.recover(folder.checkpoints))
    if config.resume == "never":
        return None
    checkpoint = newest_valid(folder, ranks) if config.resume == "auto" else _asked_for(config, ranks)
    return None if checkpoint is None else load_checkpoint(engine, ranks, checkpoint)


def newest_valid(folder: RunFolder, ranks: Ranks) -> Checkpoint | None:
    """The newest checkpoint that holds; damaged ones are named and set aside. Every rank verifies its share."""
    # Rank 0 alone looks at the folder: others may see it late on a network's file system.
    candidates = ranks.on_main(lambda: checkpoint_files.readable_checkpoints(folder.checkpoints))
    found = None
    damaged: dict[Checkpoint, list[str]] = {}
    for checkpoint, problem in candidates:
        damage = [problem] if problem else _verify(checkpoint, ranks)
        if not damage:
            found = checkpoint
            break
        damaged[checkpoint] = damage

    def report() -> None:
        if found is None and damaged:
            raise UserError(f"no checkpoint of {folder.path} is whole: {next(iter(damaged.values()))[0]}")
        for checkpoint, damage in damaged.items():
            for sentence in damage:
                logger.error("damaged checkpoint left out: %s", sentence)
            logger.error("%s was set aside as %s", checkpoint.name, checkpoint_files.set_aside(checkpoint).name)
        if found is not None:
            checkpoint_files.point_latest(found)  # a kill may have come between the rename and this

    ranks.on_main(report)
    return found


def _verify(checkpoint: Checkpoint, ranks: Ranks) -> list[str]:
    share = checkpoint.damage(share=ranks.rank, num_shares=ranks.world_size)
    return sorted({sentence for sentences in ranks.gather(share) for sentence in sentences})


def _asked_for(config: RunConfig, ranks: Ranks) -> Checkpoint:
    """The checkpoint that ``--resume`` names, of this run or another; every byte of it is right."""
    chosen = Checkpoint(Path(config.resume).resolve())
    damage = _verify(chosen, ranks)
    if damage:
        raise SharedError(f"--resume {config.resume}: {damage[0]}")
    return chosen


def leave_later(config: RunConfig, folder: RunFolder, ranks: Ranks, restored: RunState | None) -> None:
    """Sets aside what the run saved later than the checkpoint that ``--resume`` names.

    It is of a time line that the run leaves here, and would be taken for newer than what comes now. Called once nothing
    can refuse the start.
    """
    if restored is None or config.resume == "auto":
        return
    chosen, step = Path(config.resume).resolve(), restored.step

    def set_aside() -> None:
        for later in checkpoint_files.checkpoint_folders(folder.checkpoints):
            if later.step >= step and later.path.resolve() != chosen:
                logger.warning("%s was set aside as %s", later.name, checkpoint_files.set_aside(later).name)

    ranks.on_main(set_aside)
