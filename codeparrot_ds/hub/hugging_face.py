"""A model repository on the Hugging Face Hub as a place for branches of checkpoints, over ``huggingface_hub``.

The token comes from ``HF_TOKEN`` in the environment and from nowhere else. No torch here.

``create_commit`` is atomic, but certainty is left to the caller: the library retries uploads, and neither commits nor
the making of repositories and branches. Each method here may be called again after any failure, and says by
``UnavailableError`` when that is worth trying; a commit names its parent, so that of two attempts one at most succeeds.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from codeparrot_ds.errors import UserError
from codeparrot_ds.hub.local_git import folder_files
from codeparrot_ds.hub.repository import MAIN, NEEDED, PUBLISHED, PUBLISHED_COMMIT, Commit, check_branch_name
from codeparrot_ds.retry import UnavailableError, retry_after
from codeparrot_ds.secret_forms import without_credentials

TOKEN_VARIABLE = "HF_TOKEN"
TIMEOUT_SECONDS = 60.0
"""Of silence on a connection; the library's own is none at all."""
TIMEOUT_VARIABLE = "CODEPARROT_HUB_TIMEOUT_SECONDS"
XET_VARIABLE = "HF_HUB_DISABLE_XET"
"""The client's own; ``0`` asks for uploads through Xet."""
ATTRIBUTES = ".gitattributes"  # the Hub's own, without which git shows pointers
# Worth another attempt: timeouts, conflicts with another writer, a moved parent, rate limits.
_TEMPORARY = {408, 409, 412, 423, 425, 429}
_last_request = ""  # of this process: the library's errors do not say which request of a call failed


class HubRepository:
    """A model repository ``org/name``; nothing is asked of the Hub before a method is called."""

    def __init__(self, repo_id: str, *, timeout_seconds: float | None = None):
        self.repo_id = repo_id
        self._timeout = timeout_seconds or float(os.environ.get(TIMEOUT_VARIABLE, TIMEOUT_SECONDS))
        self.endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")

    def __str__(self) -> str:
        return without_credentials(f"{self.endpoint}/{self.repo_id}")

    @property
    def spec(self) -> str:
        return self.repo_id

    def how_to_get(self, revision: str) -> str:
        return shlex.join(["hf", "download", self.repo_id, "--revision", revision, "--local-dir", "model"])

    def create(self) -> None:
        """Makes the repository, private; does nothing where it exists."""
        with self._asking("making the repository") as api:
            if api.repo_exists(self.repo_id):
                return
            for kind in ("dataset", "space"):
                if api.repo_exists(self.repo_id, repo_type=kind):
                    raise UserError(f"hub: {self.repo_id} is a {kind} on the Hub, not a model; choose another name")
            api.create_repo(self.repo_id, private=True, exist_ok=True)

    def create_branch(self, name: str) -> None:
        check_branch_name(name)
        if (
            not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name, flags=re.ASCII)
            or ".." in name
            or name.endswith((".", ".lock"))
        ):
            raise UserError(f"'{name}' is not a branch name that git accepts; use letters, digits and '-'")
        with self._asking(f"making branch '{name}'") as api:
            if name not in self._heads(api):
                api.create_branch(self.repo_id, branch=name)  # a 409 means that another process was faster

    def head(self, branch: str) -> str:
        with self._asking(f"looking at branch '{branch}'") as api:
            heads = self._heads(api)
        if branch not in heads:
            raise UserError(f"{self} has no branch '{branch}'; it has {', '.join(sorted(heads)) or 'none'}")
        return heads[branch]

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
        """Uploads what the Hub lacks; a file that does not match its known SHA-256 is refused there."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        names = folder_files(folder)
        if not names:
            raise UserError(f"{folder}: no files to commit")
        with self._asking(f"committing to branch '{branch}'") as api, _lfs_unless_asked():
            there = api.model_info(self.repo_id, revision=branch)
            if parent is not None and there.sha != parent:
                raise UnavailableError(f"{self}: branch '{branch}' moved on meanwhile", retry_after=0)
            additions = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=Path(folder) / name) for name in names]
            for addition in additions:
                if known := (sha256 or {}).get(addition.path_in_repo):
                    addition.upload_info.sha256 = bytes.fromhex(known)
            gone = {sibling.rfilename for sibling in there.siblings or []} - {*names, ATTRIBUTES}
            commit = api.create_commit(
                self.repo_id,
                operations=[*additions, *(CommitOperationDelete(path_in_repo=name) for name in sorted(gone))],
                commit_message=" ".join(title.split()),
                commit_description=body.strip(),
                revision=branch,
                parent_commit=there.sha,
                num_threads=2,
            )
            return str(commit.oid)

    def commits(self, branch: str) -> list[Commit]:
        with self._asking(f"listing the commits of branch '{branch}'") as api:
            return [
                Commit(
                    id=commit.commit_id,
                    title=commit.title,
                    body=commit.message.strip(),
                    time=int(commit.created_at.timestamp()),
                )
                for commit in api.list_repo_commits(self.repo_id, revision=branch)
            ]

    def download(self, revision: str, folder: Path, *, only: Sequence[str] = NEEDED) -> Path:
        """Returns the library's cached folder; ``folder`` stays empty."""
        with self._asking(f"downloading '{revision}'") as api:
            return Path(api.snapshot_download(self.repo_id, revision=revision, allow_patterns=list(only)))

    def resolve(self, revision: str) -> str:
        with self._asking(f"looking at '{revision}'") as api:
            return str(api.model_info(self.repo_id, revision=revision).sha)

    def merge(self, branch: str, *, commit: str | None = None, overwrite: bool = False) -> str:
        """Makes main show a commit of a branch, by a commit on main that names both; returns its id.

        The Hub merges no branches: the same contents are committed again, without an upload. A commit on main that
        neither the branch contains nor this method made is refused by name, or overwritten with ``overwrite``.
        """
        from huggingface_hub import CommitOperationCopy, CommitOperationDelete

        history, shown = self.commits(branch), self.commits(MAIN)
        chosen = next((past for past in history if past.id == commit), None) if commit else history[0]
        if chosen is None:
            raise UserError(f"{self}: branch '{branch}' has no commit {commit}")
        if shown[0].trailer(PUBLISHED_COMMIT) == chosen.id:
            return shown[0].id
        contained = {past.id for past in history}
        foreign = [past for past in shown if past.id not in contained and past.trailer(PUBLISHED) is None]
        if foreign and not overwrite:
            raise UserError(
                f"{self}: '{MAIN}' moved on by commit {foreign[0].id[:10]} ({foreign[0].title}), which '{branch}' does "
                "not contain and publishing would hide; publish with --overwrite if that is meant (the history keeps "
                "the commit)"
            )
        with self._asking(f"publishing branch '{branch}'") as api:
            files, there = (
                {sibling.rfilename for sibling in api.model_info(self.repo_id, revision=revision).siblings or []}
                - {ATTRIBUTES}
                for revision in (chosen.id, shown[0].id)
            )
            copies = [
                CommitOperationCopy(src_path_in_repo=name, path_in_repo=name, src_revision=chosen.id)
                for name in sorted(files)
            ]
            published = api.create_commit(
                self.repo_id,
                operations=[*copies, *(CommitOperationDelete(path_in_repo=name) for name in sorted(there - files))],
                commit_message=f"Publish {branch}: {chosen.title}",
                commit_description=f"{PUBLISHED}: {branch}\n{PUBLISHED_COMMIT}: {chosen.id}",
                revision=MAIN,
                parent_commit=shown[0].id,
            )
            return str(published.oid)

    def tag(self, name: str, commit: str) -> None:
        with self._asking(f"making tag '{name}'") as api:
            tags = {tag.name: tag.target_commit for tag in api.list_repo_refs(self.repo_id).tags}
            if name not in tags:
                api.create_tag(self.repo_id, tag=name, revision=commit)
            elif tags[name] != commit:
                raise UserError(
                    f"{self}: tag '{name}' names commit {tags[name][:10]} already; choose another with --tag"
                )

    def _heads(self, api: Any) -> dict[str, str]:
        return {branch.name: branch.target_commit for branch in api.list_repo_refs(self.repo_id).branches}

    @contextlib.contextmanager
    def _asking(self, doing: str) -> Iterator[Any]:
        """Gives an ``HfApi``, and turns what goes wrong into one sentence that says whether to try again."""
        import huggingface_hub

        _set_timeouts(self._timeout)
        with warnings.catch_warnings(), _quiet(huggingface_hub):
            warnings.simplefilter("ignore")
            try:
                yield huggingface_hub.HfApi(endpoint=self.endpoint, token=access_token())
            except UserError:
                raise
            except Exception as error:
                explained = self._explain(error, doing)
                if explained is None:
                    raise
                if isinstance(explained, UnavailableError):
                    explained.request = _last_request
                raise explained from error

    def _explain(self, error: Exception, doing: str) -> UserError | None:
        """The sentence for an error of the library or of its transport; None for a mistake of ours."""
        if isinstance(error, ValueError) and "Invalid metadata" in str(error):
            return UserError(f"{self}: {_one_line(str(error))}")
        chain = list(_causes(error))
        # The store's own words about an upload (a damaged body, a link that has expired) are no verdict on the push.
        uploading = any(isinstance(cause, RuntimeError) and "while uploading" in str(cause) for cause in chain)
        for cause in chain:
            response = getattr(cause, "response", None)
            if response is not None:
                return self._judge(response, doing, uploading)
            if isinstance(cause, _transport_errors()):
                return UnavailableError(f"{self}: no answer while {doing} ({type(cause).__name__})")
            if isinstance(cause, json.JSONDecodeError):  # a proxy's page, with any status
                return UnavailableError(f"{self}: an answer that is not JSON while {doing}")
        for cause in chain:
            if isinstance(cause, OSError) and cause.errno is not None:  # of this machine: a file that is gone, say
                return UserError(f"{self}: {doing} failed: {cause.strerror}: {cause.filename}")
        if isinstance(error, ValueError):  # what the library itself says about a card, or about a server's words
            return UserError(f"{self}: {doing} failed: {_one_line(str(error))}")
        if isinstance(error, OSError) and error.errno is None:  # LocalEntryNotFoundError, OfflineModeIsEnabled
            return UnavailableError(f"{self}: the Hub cannot be reached while {doing}: {_one_line(str(error))}")
        return None

    def _judge(self, response: Any, doing: str, uploading: bool) -> UserError:
        status, code = response.status_code, response.headers.get("X-Error-Code")
        if uploading or status in _TEMPORARY or status >= 500:
            return UnavailableError(f"{self}: answer {status} while {doing}", retry_after(response.headers))
        if status == 401 or (code == "RepoNotFound" and not access_token()):
            asked = "does not accept the token of" if access_token() else "wants a token: set"
            return UserError(f"{self}: the Hub {asked} {TOKEN_VARIABLE} in the environment")
        if status == 403:
            return UserError(
                f"{self}: the token of {TOKEN_VARIABLE} does not permit {doing}; it needs the right to write to "
                f"{self.repo_id}"
            )
        if code == "RepoNotFound":
            return UserError(f"{self}: no such model repository, or none that the token of {TOKEN_VARIABLE} can see")
        if code == "RevisionNotFound":
            return UserError(f"{self}: no such branch, tag or commit while {doing}")
        message = response.headers.get("X-Error-Message") or code or ""
        return UserError(f"{self}: answer {status} while {doing}{f': {_one_line(message)}' if message else ''}")


def access_token() -> str | bool:
    """The token of the environment; False, which is the library's word for none, without one."""
    return os.environ.get(TOKEN_VARIABLE, "").strip() or False


def require_token(repo_id: str) -> None:
    """Raises a ``UserError`` that says how to set a token, where there is none."""
    if not access_token():
        raise UserError(
            f"hub {repo_id}: {TOKEN_VARIABLE} is not set; make a token that may write at "
            f"https://huggingface.co/settings/tokens and `export {TOKEN_VARIABLE}=…`"
        )


@contextlib.contextmanager
def _lfs_unless_asked() -> Iterator[None]:
    """Uploads by LFS, which the tests cover, where the user's environment does not say which way to take."""
    from huggingface_hub import constants

    if os.environ.get(XET_VARIABLE):
        yield
        return
    # Setting the variable would come too late: the client reads it once, when it is imported. The constant is read by
    # each upload. Downloads keep the client's own way.
    before, constants.HF_HUB_DISABLE_XET = constants.HF_HUB_DISABLE_XET, True
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_XET = before


def _set_timeouts(seconds: float) -> None:
    """Gives every connection a limit to its silence: without one a Hub that hangs would hang the upload for ever."""
    from huggingface_hub import get_session, set_client_factory

    session = get_session()
    if session.timeout.read == seconds:
        return
    client, hooks = type(session), session.event_hooks

    def limit_silence(request: Any) -> None:
        global _last_request
        _last_request = f"{request.method} {request.url.path}"
        # Some calls of the library ask for no limit, which overrides the client's.
        if request.extensions.get("timeout", {}).get("read") is None:
            request.extensions["timeout"] = dict.fromkeys(("connect", "read", "write", "pool"), seconds)

    others = [hook for hook in hooks.get("request", []) if hook.__name__ != limit_silence.__name__]
    hooks = {**hooks, "request": [*others, limit_silence]}
    set_client_factory(lambda: client(event_hooks=hooks, follow_redirects=True, timeout=seconds))


@contextlib.contextmanager
def _quiet(library: Any) -> Iterator[None]:
    """Keeps the library's warnings out of the log, whose URLs are signed, and its bars off what is no terminal."""
    verbosity = library.utils.logging.get_verbosity()
    hides_bars = not sys.stderr.isatty() and not library.utils.are_progress_bars_disabled()
    library.utils.logging.set_verbosity_error()
    if hides_bars:
        library.utils.disable_progress_bars()
    try:
        yield
    finally:
        library.utils.logging.set_verbosity(verbosity)
        if hides_bars:
            library.utils.enable_progress_bars()


def _transport_errors() -> tuple[type[BaseException], ...]:
    """The base of the HTTP library's errors below HTTP, whichever it is, and the system's own."""
    from huggingface_hub import get_session

    http = sys.modules[type(get_session()).__module__.split(".")[0]]
    return (http.TransportError, ConnectionError, TimeoutError)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]
