"""The branch of checkpoints in a local bare git repository.

It is written through git's plumbing: no work tree, no index and no copy of the weights beside git's own object.
``git clone -b BRANCH PATH`` gives a folder that ``transformers`` loads.
"""

from __future__ import annotations

import fnmatch
import os
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from codeparrot_ds.errors import UserError
from codeparrot_ds.hub.repository import MAIN, NEEDED, PUBLISHED, PUBLISHED_COMMIT, Commit, check_branch_name
from codeparrot_ds.paths import did_you_mean_path, expand

MARKER = "codeparrot-ds.repository"
_STALE_LOCK_SECONDS = 2.0
_README = """# Checkpoints

Each branch is a training run of codeparrot-ds, each of its commits a checkpoint in Hugging Face format:

    git clone -b BRANCH {path}

Publishing a run merges its branch into `main`.
"""
# Weights do not compress and are never deltas of each other: storing them as they are commits at the speed of SHA-1,
# and files over the threshold are streamed instead of read whole. Objects and refs reach the disk before a push counts.
SETTINGS = {
    "core.compression": "0",
    "core.bigFileThreshold": "1m",
    "core.fsync": "committed,reference",
    "gc.auto": "0",
    MARKER: "1",
}


class LocalRepository:
    """A bare git repository on this machine, made by ``create()``.

    Every method raises ``UserError`` when git is missing, when the path is not a repository of ours, or with git's own
    words when git refuses (a full disk, say). A branch changes only by the last act of a method, in one step and
    against the value that was read before: a kill at any moment leaves it at the old or the new commit.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(expand(os.fspath(path))).absolute()

    def __str__(self) -> str:
        return str(self.path)

    @property
    def spec(self) -> str:
        return str(self.path)

    def how_to_get(self, revision: str) -> str:
        return shlex.join(["git", "clone", "-b", revision, str(self.path), "model"])

    def create(self) -> None:
        """Makes the repository with a first commit on main; does nothing where it exists and is ours."""
        if self.path.is_dir() and any(self.path.iterdir()) or self.path.is_file():
            self._check(otherwise="; give a path ending in .git that does not exist yet")
            if self._find(f"refs/heads/{MAIN}") is None:
                self._first_commit()
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            staging = LocalRepository(tempfile.mkdtemp(prefix=f".{self.path.name}.", dir=self.path.parent))
        except OSError as error:
            raise UserError(f"{self}: the repository cannot be made: {error.strerror}") from None
        try:
            staging._git("init", "--quiet", "--bare", str(staging.path), "--template=")
            for key, value in SETTINGS.items():
                staging._git("config", key, value)
            staging._git("symbolic-ref", "HEAD", f"refs/heads/{MAIN}")
            staging._first_commit(self.path)
            staging.path.chmod(0o755)  # mkdtemp's is for this user alone, but others may clone
            # Complete or absent: two runs that start at once make one repository, and the loser of the race uses it.
            try:
                staging.path.rename(self.path)
            except OSError:
                self._check()
        finally:
            shutil.rmtree(staging.path, ignore_errors=True)

    def create_branch(self, name: str) -> None:
        self._check()
        check_branch_name(name)
        accepted = self._run("check-ref-format", "--branch", name)
        # git expands "-" and "@{-1}" to a branch of before, so acceptance alone is not enough.
        if accepted.returncode or accepted.stdout.decode(errors="replace").rstrip("\n") != name:
            raise UserError(f"'{name}' is not a branch name that git accepts; use letters, digits and '-'")
        if self._find(f"refs/heads/{name}") is not None:
            return
        try:
            self._git("update-ref", f"refs/heads/{name}", self.head(MAIN), "0" * 40)  # only if it is not there yet
        except UserError:  # another process was faster, or the disk is full
            if self._find(f"refs/heads/{name}") is None:
                raise

    def head(self, branch: str) -> str:
        self._check()
        commit = self._find(f"refs/heads/{branch}")
        if commit is None:
            raise UserError(f"{self} has no branch '{branch}'; it has {', '.join(self.branches()) or 'none'}")
        return commit

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
        parent = parent or self.head(branch)
        tree = self._write_tree(Path(folder))
        return self._commit(branch, tree, [parent], title, body)

    def branches(self) -> list[str]:
        """Their names, main among them."""
        self._check()
        return self._git("for-each-ref", "--format=%(refname:lstrip=2)", "refs/heads").split()

    def commits(self, branch: str) -> list[Commit]:
        return self._log(self.head(branch))

    def download(self, revision: str, folder: Path, *, only: Sequence[str] = NEEDED) -> Path:
        """Writes into ``folder``, streamed: weights are never whole in memory."""
        commit = self.resolve(revision)
        names = filter(None, self._git("ls-tree", "-r", "-z", "--name-only", commit).split("\0"))
        for name in (name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in only)):
            if ".." in name.split("/") or name.startswith("/"):  # git makes no such tree, but a file can hold one
                raise UserError(f"{self}: '{name}' at '{revision}' would lie outside of the model's folder")
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(target, "wb") as handle:
                done = self._run("cat-file", "blob", f"{commit}:{name}", stdout=handle.fileno())
            if done.returncode:
                raise UserError(f"{self}: '{name}' at '{revision}' cannot be read: {_last_line(done.stderr)}")
        return folder

    def resolve(self, revision: str) -> str:
        self._check()
        commit = self._find(f"refs/heads/{revision}") or self._find(f"refs/tags/{revision}") or self._find(revision)
        if commit is None:
            raise UserError(
                f"{self} has no branch, tag or commit '{revision}'; branches: {', '.join(self.branches()) or 'none'}"
            )
        return commit

    def merge(self, branch: str, *, commit: str | None = None, overwrite: bool = False) -> str:
        """Merges a run's branch into main, up to a commit of it, and returns the id of the merge commit.

        Main shows the run published last: the merge commit has both tips as parents and the commit's tree. That is
        safe as long as main holds nothing but what the branch grew from and earlier merges by this method; a commit
        that somebody else made there would vanish from view, so it is refused by name, except with ``overwrite``.
        A commit that main shows already is left alone.
        """
        chosen, target = commit or self.head(branch), self.head(MAIN)
        tree, shown = (self._git("rev-parse", f"{revision}^{{tree}}").strip() for revision in (chosen, target))
        contained = self._run("merge-base", "--is-ancestor", chosen, target).returncode == 0
        if contained and tree == shown:
            return target
        since = self._log("--first-parent", target, f"^{self.head(branch)}")
        foreign = [other for other in since if other.trailer(PUBLISHED) is None]
        if foreign and not overwrite:
            raise UserError(
                f"{self}: '{MAIN}' moved on by commit {foreign[0].id[:10]} ({foreign[0].title}), which '{branch}' does "
                f"not contain and the merge would hide; merge '{MAIN}' into '{branch}' with git first, or publish with "
                "--overwrite (its history keeps the commit)"
            )
        (tip,) = self._log("-1", chosen)
        body = f"{PUBLISHED}: {branch}\n{PUBLISHED_COMMIT}: {chosen}"
        parents = [target] if contained else [target, chosen]
        return self._commit(MAIN, tree, parents, f"Merge {branch}: {tip.title}", body)

    def tag(self, name: str, commit: str) -> None:
        self._check()
        if self._run("check-ref-format", f"refs/tags/{name}").returncode or name.startswith("-"):
            raise UserError(f"'{name}' is not a tag that git accepts; use letters, digits, '.' and '-'")
        found = self._find(f"refs/tags/{name}")
        if found is None:
            self._git("update-ref", f"refs/tags/{name}", commit, "0" * 40)
        elif found != commit:
            raise UserError(f"{self}: tag '{name}' names commit {found[:10]} already; choose another with --tag")

    def _log(self, *arguments: str) -> list[Commit]:
        log = self._git("log", "-z", "--format=%H%x1f%ct%x1f%s%x1f%b", *arguments)
        fields = [entry.split("\x1f", 3) for entry in log.split("\0") if entry]
        return [Commit(id=i, time=int(time), title=title, body=body.strip()) for i, time, title, body in fields]

    def _first_commit(self, final_path: Path | None = None) -> None:
        readme = _README.format(path=shlex.quote(str(final_path or self.path)))
        blob = self._git("hash-object", "-w", "--stdin", stdin=readme).strip()
        tree = self._git("mktree", "-z", stdin=f"100644 blob {blob}\tREADME.md\0").strip()
        self._commit(MAIN, tree, [], "Start of the repository", "")

    def _commit(self, branch: str, tree: str, parents: list[str], title: str, body: str) -> str:
        options = [word for parent in parents for word in ("-p", parent)]
        message = f"{' '.join(title.split())}\n\n{body.strip()}".strip() + "\n"
        commit = self._git("commit-tree", tree, *options, "-F", "-", stdin=message).strip()
        update = ("update-ref", f"refs/heads/{branch}", commit, parents[0] if parents else "0" * 40)
        moved = self._run(*update)
        locks = [self.path / "refs" / "heads" / f"{branch}.lock", self.path / "HEAD.lock"]
        if moved.returncode and any(lock.exists() for lock in locks):
            # A living git holds these files for milliseconds, a killed one leaves them behind for ever.
            time.sleep(_STALE_LOCK_SECONDS)
            for lock in locks:
                lock.unlink(missing_ok=True)
            moved = self._run(*update)
        if moved.returncode:
            raise UserError(f"{self}: branch '{branch}' was not moved to its new commit: {_last_line(moved.stderr)}")
        return commit

    def _write_tree(self, folder: Path) -> str:
        files = folder_files(folder)
        if not files:
            raise UserError(f"{folder}: no files to commit")
        # One process hashes and stores every file; --no-filters keeps the bytes (no line-end conversion by attributes).
        paths = "".join(f"{(folder / name).absolute()}\n" for name in files)
        blobs = self._git("hash-object", "-w", "--no-filters", "--stdin-paths", stdin=paths).split()
        tree: dict = {}
        for name, blob in zip(files, blobs, strict=True):
            *folders, leaf = name.split("/")
            node = tree
            for part in folders:
                node = node.setdefault(part, {})
            node[leaf] = blob
        return self._make_tree(tree)

    def _make_tree(self, tree: dict) -> str:
        entries = [
            f"040000 tree {self._make_tree(entry)}\t{name}\0"
            if isinstance(entry, dict)
            else f"100644 blob {entry}\t{name}\0"
            for name, entry in tree.items()
        ]
        return self._git("mktree", "-z", stdin="".join(entries)).strip()

    def _check(self, otherwise: str = "") -> None:
        if not self.path.exists():
            raise UserError(f"{self}: no such repository{did_you_mean_path(self.path)}")
        if self._run("rev-parse", "--is-bare-repository").stdout.strip() != b"true":
            raise UserError(f"{self} is not a bare git repository{otherwise}")
        if self._run("config", "--get", MARKER).returncode:
            raise UserError(
                f"{self} is a git repository that codeparrot-ds did not make; give another path, or let it be used by "
                f"`git --git-dir {self} config {MARKER} 1`"
            )

    def _find(self, revision: str) -> str | None:
        found = self._run("rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
        return found.stdout.decode().strip() if found.returncode == 0 else None

    def _git(self, *arguments: str, stdin: str = "") -> str:
        done = self._run(*arguments, stdin=stdin)
        if done.returncode:
            raise UserError(f"{self}: git {arguments[0]} failed: {_last_line(done.stderr)}")
        return done.stdout.decode("utf-8", errors="surrogateescape")

    def _run(
        self, *arguments: str, stdin: str = "", stdout: int = subprocess.PIPE
    ) -> subprocess.CompletedProcess[bytes]:
        try:
            return subprocess.run(
                ["git", f"--git-dir={self.path}", *arguments],
                input=stdin.encode("utf-8", errors="surrogateescape"),
                stdout=stdout,
                stderr=subprocess.PIPE,
                env=_git_environment(),
                check=False,
            )
        except FileNotFoundError:
            raise UserError("git is not installed; install it, or train with --hub off") from None


def folder_files(folder: str | os.PathLike[str]) -> list[str]:
    """Returns the files of a folder, recursively, as sorted relative paths with ``/``; a link raises ``UserError``."""
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder")
    paths = sorted(root.rglob("*"))
    for path in paths:
        if path.is_symlink() or "\n" in path.name:
            raise UserError(f"{path}: only plain files and folders are pushed, no links and no line breaks in names")
    return [path.relative_to(root).as_posix() for path in paths if path.is_file()]


def _git_environment() -> dict[str, str]:
    # Variables such as GIT_DIR (set inside a git hook) would redirect the commands; an empty home has no identity.
    kept = {key: value for key, value in os.environ.items() if not key.startswith("GIT_") or key == "GIT_EXEC_PATH"}
    identity = {
        f"GIT_{role}_{field}": value
        for role in ("AUTHOR", "COMMITTER")
        for field, value in (("NAME", "codeparrot-ds"), ("EMAIL", "codeparrot-ds@localhost"))
    }
    return {**kept, **identity, "LC_ALL": "C"}


def _last_line(stderr: bytes) -> str:
    lines = stderr.decode("utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "no message"
