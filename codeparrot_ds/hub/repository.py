"""The interface of the places that a run's checkpoints are pushed to: one branch per run, one commit per checkpoint.

There are two: a bare git repository on this machine (:mod:`codeparrot_ds.hub.local_git`) and a model repository on the
Hugging Face Hub (:mod:`codeparrot_ds.hub.hugging_face`).
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


def check_branch_name(name: str) -> None:
    """Refuses a run's name that is taken by main or that commands would read as a commit id."""
    if name == MAIN:
        raise UserError(f"a run cannot be named '{MAIN}': that is the branch which runs are merged into")
    if re.fullmatch(r"[0-9a-fA-F]{7,64}", name):
        raise UserError(f"'{name}' looks like a commit id, so it cannot name a branch; choose another run name")


class Repository(Protocol):
    """A place for branches of checkpoints.

    Every method raises ``UserError`` for what the user must fix, and ``UnavailableError`` where the same call may
    succeed later; a method that was interrupted, or whose answer was lost, may be called again.
    """

    @property
    def spec(self) -> str:
        """What ``open_repository`` takes to open it again, on this machine."""

    def create(self) -> None:
        """Makes the repository with a branch main; does nothing where it exists."""

    def create_branch(self, name: str) -> None:
        """Starts a branch at main's tip, or leaves it as it is; refuses a name that git or `check_branch_name` does."""

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

        ``parent`` is the commit that the branch must still be at, its tip by default; ``sha256`` has the hashes of
        files by relative path, as far as they are known. Refuses links and a folder without files.
        """

    def commits(self, branch: str) -> list[Commit]:
        """Returns a branch's commits, newest first, down to the repository's first."""

    def resolve(self, revision: str) -> str:
        """Returns the commit id of a branch, a tag or a commit."""

    def download(self, revision: str, folder: Path, *, only: Sequence[str] = NEEDED) -> Path:
        """Returns a folder with the files of a revision whose names match a pattern of ``only``.

        It is ``folder``, or a cache of the place's own.
        """

    def merge(self, branch: str, *, commit: str | None = None, overwrite: bool = False) -> str:
        """Makes main show a commit of a branch, its tip by default, and returns the id of main's commit.

        Refuses to hide what others committed on main, except with ``overwrite``.
        """

    def tag(self, name: str, commit: str) -> None:
        """Names a commit for good; the same again changes nothing, a name that another commit has is refused."""

    def how_to_get(self, revision: str) -> str:
        """Returns the command that gives a folder with the files of a branch or tag."""
