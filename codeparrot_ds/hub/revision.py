"""Models named by a place and a revision of it: ``org/name@branch`` on the Hub, ``runs/hub.git@branch`` on this disk.

A branch, a tag or a commit id may stand after the ``@``; without it a git repository stands for its main.
"""

from __future__ import annotations

import functools
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from codeparrot_ds.errors import UserError
from codeparrot_ds.hub.hugging_face import HubRepository
from codeparrot_ds.hub.local_git import LocalRepository
from codeparrot_ds.hub.repository import HUB_NAME, MAIN, Repository
from codeparrot_ds.paths import expand


@dataclass(frozen=True)
class Revision:
    """A place, and which state of it."""

    place: str
    revision: str

    def __str__(self) -> str:
        return f"{self.place}@{self.revision}"

    @property
    def is_pinned(self) -> bool:
        """Whether it names a commit, which never changes."""
        return re.fullmatch(r"[0-9a-f]{40}", self.revision) is not None

    def repository(self) -> Repository:
        """Returns the place; nothing is asked of it."""
        return LocalRepository(self.place) if self.place.endswith(".git") else HubRepository(self.place)

    def pinned(self) -> Revision:
        """Returns the commit that the revision is now."""
        place = str(Path(expand(self.place)).absolute()) if self.place.endswith(".git") else self.place
        return self if self.is_pinned else Revision(place, self.repository().resolve(self.revision))


def parse_revision(source: str | Path) -> Revision | None:
    """Returns the place and revision that a source names; None for what is neither."""
    text = str(source).rstrip("/")
    if "://" in text:
        return None
    if text.endswith(".git"):
        return Revision(text, MAIN)
    place, at, revision = text.rpartition("@")
    if not at or not (place.endswith(".git") or re.fullmatch(HUB_NAME, place)):
        return None
    if not re.fullmatch(r"[\w.][\w./-]*", revision):
        raise UserError(f"{text}: '{revision}' is no branch, tag or commit")
    return Revision(place, revision)


# A folder stays as long as the process: whoever asks twice gets the same, also of a branch that moved meanwhile.
_folders: list[tempfile.TemporaryDirectory[str]] = []


@functools.cache
def fetch(revision: Revision) -> Path:
    """Returns a folder with the model of a revision; one from a git repository is removed when the process ends."""
    repository = revision.repository()
    if isinstance(repository, HubRepository):
        return repository.download(revision.revision, Path())
    _folders.append(tempfile.TemporaryDirectory(prefix="codeparrot-ds-"))
    return repository.download(revision.revision, Path(_folders[-1].name))
