"""Where a branch of checkpoints is: a path, or a name on the Hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from codeparrot_ds.errors import UserError
from codeparrot_ds.hub.local_git import LocalRepository
from codeparrot_ds.hub.repository import HUB_NAME, Repository


def open_repository(hub: str, output_dir: str | os.PathLike[str]) -> Repository | None:
    """Returns the repository that a run config's ``hub`` names; touches nothing.

    ``local`` is ``<output_dir>/hub.git``, a path ending in ``.git`` is that repository, ``org/name`` a model repository
    on the Hugging Face Hub, ``off`` is None.
    """
    if hub == "off":
        return None
    if hub == "local":
        return LocalRepository(Path(output_dir) / "hub.git")
    if "://" in hub:
        # What a URL holds besides may be a token: it is not repeated.
        raise UserError(
            "hub: a URL is not taken; give org/name of a model repository on the Hub, local, off, or a path ending in "
            ".git, and the token as HF_TOKEN in the environment"
        )
    if hub.endswith(".git"):
        return LocalRepository(hub)
    if re.fullmatch(HUB_NAME, hub):
        from codeparrot_ds.hub.hugging_face import HubRepository

        return HubRepository(hub)
    raise UserError(f"hub: '{hub}' is none of local, off, org/name on the Hub, or a path ending in .git")


def is_remote(hub: str) -> bool:
    """Whether a run config's ``hub`` is on another machine."""
    return hub not in ("local", "off") and not hub.endswith(".git")
