"""The places that a run's checkpoints are pushed to: a branch a run, a commit a checkpoint.

Both have one interface, :class:`Repository`: a bare git repository on this machine, in this module, and a model
repository on the Hugging Face Hub, in :mod:`codeparrot_ds.hub.hugging_face`. The local one is written through git's
plumbing: no work tree, no index and no copy of the weights beside git's own object. ``git clone -b BRANCH PATH`` gives
a folder that ``transformers`` loads.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from codeparrot_ds.errors import UserError

MAIN = "main"
PUBLISHED = "Published"  # trailer of the commits that merge() makes on main: the branch
PUBLISHED_COMMIT = "Published-Commit"  # and the commit of it
NEEDED = ("*.json", "*.txt", "*.safetensors", "README.md")
"""What a model needs to be loaded, and nothing that could be loaded as code."""
HUB_NAME = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"  # org/name


@dataclass(frozen=True, kw_only=True)
class Commit:
    """A commit of a branch; ``time`` in seconds since 1970, ``body`` with its trailers."""

    id: str
    title: str
    body: str
    time: int

    def trailer(self, key: str) -> str | None:
        """Returns the value of the last ``key: value`` line of the body, None without one."""
        values = re.findall(rf"^{re.escape(key)}: (.+)$", self.body, flags=re.MULTILINE)
        return values[-1].strip() if values else None


class UnavailableError(UserError):
    """The place does not answer, or asks for another attempt; nothing is known to be wrong with what was asked.

    ``retry_after`` is what the place asked to wait, in seconds; ``request`` names what it did not answer, so that
    two failures of one request can be told from an outage's end.
    """

    def __init__(self, message: str, retry_after: float | None = None, request: str = ""):
        super().__init__(message)
        self.retry_after, self.request = retry_after, request


class Repository(Protocol):
    """A place for branches of checkpoints.

    Every method raises ``UserError`` for what the user must mend, and ``UnavailableError`` where the same call may
    succeed later; a method that was interrupted, or whose answer was lost, may be called again.
    """

    @property
    def spec(self) -> str:
        """What ``open_repository`` takes to open it again, on this machine."""

    def create(self) -> None:
        """Makes the repository with a branch main; does nothing where it exists."""

    def create_branch(self, name: str, *, exist_ok: bool = True) -> None:
        """Starts a branch at main's tip."""

    def head(self, branch: str) -> str:
        """Returns the id of a branch's newest commit."""

    def commit_folder(
        self,
        branch: str,
        folder: str | os.PathLike[str],
        title: str,
        body: str = "",
        *,
        parent: str | None = None,
        sha256: Mapping[str, str] | None = None,
    ) -> str:
        """Makes the folder's files the content of a branch, all of them or none, and returns the commit's id.

        Args:
            branch: exists.
            folder: plain files, also in folders below it.
            title: the commit's first line.
            body: the rest of its message.
            parent: the commit that the branch must still be at; its tip by default.
            sha256: of the files by relative path, as far as they are known.
        """

    def branches(self) -> list[str]:
        """Returns the names of the branches, main among them."""

    def commits(self, branch: str) -> list[Commit]:
        """Returns a branch's commits, newest first, down to the repository's first."""

    def read_file(self, revision: str, path: str) -> bytes:
        """Returns a file's bytes at a revision: a branch, a tag or a commit id."""

    def resolve(self, revision: str) -> str:
        """Returns the commit id of a branch, a tag or a commit."""

    def download(self, revision: str, folder: Path, *, only: Sequence[str] = NEEDED) -> Path:
        """Returns a folder with the files of a revision whose names match a pattern of ``only``.

        It is ``folder``, or a cache of the place's own.
        """

    def merge(self, branch: str, *, commit: str | None = None, overwrite: bool = False) -> str:
        """Makes main show a commit of a branch, its tip by default, and returns the id of main's commit.

        Refuses to hide what others committed on main, unless told to ``overwrite`` it.
        """

    def tag(self, name: str, commit: str) -> None:
        """Names a commit for good; refuses a name that another commit has."""

    def how_to_get(self, revision: str) -> str:
        """Returns the command that gives a folder with the files of a branch or tag."""
