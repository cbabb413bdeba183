"""Files of Hugging Face Hub datasets: found through ``datasets``, pinned at a commit, read by byte ranges.

Nothing but the dataset's card is ever downloaded whole. A reader waits out long outages of the Hub or the network, and
logs that once per outage.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from codeparrot_ds.errors import UserError, first_line
from codeparrot_ds.layouts import named_split
from codeparrot_ds.retry import Pauses, UnavailableError, retry_after

logger = logging.getLogger(__name__)

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst", ".parquet")
"""Endings of the names of files that can be read."""
PATIENCE_SECONDS = 2 * 3600.0
MAX_WAIT_SECONDS = 60.0

# org/name or org/name:config, either with @revision, which takes the rest: it may hold slashes (refs/convert/parquet)
_NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(:(?P<config>[^@]+))?(@(?P<revision>\S+))?")
_PATHS_PER_REQUEST = 500
_RETRIED_STATUSES = (408, 425, 429)  # and 5xx
# What the Hub keeps in git and not in its large-file store is below 10 MB: such a file may come whole where a server on
# the way knows no ranges. Anything larger must not.
_MAX_WHOLE_BYTES = 16 << 20


@dataclass(frozen=True, kw_only=True)
class HubFile:
    """One file of a dataset repository, as it is at one commit."""

    repo: str
    """``org/name``."""
    commit: str
    """Full commit hash: what is read never changes, whatever happens to the branch."""
    path: str
    """Path inside the repository."""
    bytes: int
    content_id: str
    """What identifies the bytes in a fingerprint: the SHA-256 of an LFS file, otherwise the git object's id."""

    def __str__(self) -> str:
        return f"hf://datasets/{self.repo}@{self.commit[:8]}/{self.path}"

    def open(self) -> HubReader:
        """For reading; nothing is asked of the Hub yet."""
        return HubReader(self)


def resolve_hub_dataset(name: str, split: str, *, named: bool = False) -> list[HubFile]:
    """The files of a split, sorted by path, at the commit that ``name`` stands for now.

    ``name`` is ``org/name``, with ``:config`` where the dataset card defines several and ``@revision`` (branch, tag or
    commit; the default branch without). The card's ``configs:`` and otherwise the default patterns of ``datasets``
    decide which files are the split's: the same as ``datasets.load_dataset`` would load, each once. To find the files
    of an earlier resolution again, name their commit as the revision. What ``named`` means: ``layouts.named_split``.

    Raises a UserError when there is no such dataset, config or split, when the user may not read it, when a file has a
    format that is not in SUFFIXES, and when the Hub cannot be reached.
    """
    parsed = _NAME.fullmatch(name)
    if parsed is None:
        raise UserError(
            f"{name!r} is neither an existing folder nor the name of a Hub dataset (org/name, org/name@revision)."
        )
    from huggingface_hub import is_offline_mode

    if is_offline_mode():
        raise UserError(
            f"The Hub dataset {name} cannot be read offline; unset HF_HUB_OFFLINE (and TRANSFORMERS_OFFLINE) or train "
            f"from a local folder."
        )
    with _user_errors(name, parsed["repo"]):
        commit = _pin(parsed["repo"], parsed["revision"])
        paths = _split_paths(parsed["repo"], parsed["config"], commit, split, named)
        return _describe(parsed["repo"], commit, paths)


def _pin(repo: str, revision: str | None) -> str:
    """The hash of the commit that ``revision`` stands for now. Raises the Hub client's errors."""
    from huggingface_hub import HfApi

    info = HfApi().dataset_info(repo, revision=revision, timeout=30)
    if info.gated:
        # The Hub describes a gated dataset to anybody: ask whether its files may be read before reading any.
        HfApi().auth_check(repo, repo_type="dataset")
    if info.sha is None:
        raise UserError(f"The Hub dataset {repo} has no commit yet: nothing was uploaded.")
    return info.sha


def _split_paths(repo: str, config: str | None, commit: str, split: str, named: bool) -> list[str]:
    """Paths inside the repository of the files that make up ``split``, sorted."""
    from datasets import load_dataset_builder

    # hf:// keeps `datasets` from taking a folder ./org/name for the dataset, and the empty cache from answering with
    # another commit's files, which it prepared earlier, where the Hub fails.
    with tempfile.TemporaryDirectory() as cache, _no_progress_bars():
        source = f"hf://datasets/{repo}"
        builder = load_dataset_builder(source, config, revision=commit, cache_dir=cache)
    splits = {str(each): files for each, files in (builder.config.data_files or {}).items() if files}
    chosen = named_split(split, splits, named=named)
    if chosen is None:
        raise UserError(f"The Hub dataset {repo} has no split {split!r}; it has {', '.join(splits) or 'none'}.")
    prefix = f"hf://datasets/{repo}@{commit}/"
    paths = set()
    for file in splits[chosen]:
        if not file.startswith(prefix):
            raise UserError(f"The split {split!r} of {repo} names {file}, which is no file of that repository.")
        if not file.endswith(SUFFIXES):
            raise UserError(
                f"The split {split!r} of {repo} has {file.removeprefix(prefix)}, whose format is not read; a file's "
                f"name must end in one of {', '.join(SUFFIXES)}."
            )
        paths.add(file.removeprefix(prefix))
    return sorted(paths)


def _describe(repo: str, commit: str, paths: list[str]) -> list[HubFile]:
    """Asks the Hub for the sizes and identities of files; the same order as ``paths``."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    found = {}
    for start in range(0, len(paths), _PATHS_PER_REQUEST):
        some = paths[start : start + _PATHS_PER_REQUEST]
        for info in HfApi().get_paths_info(repo, some, revision=commit, repo_type="dataset"):
            if isinstance(info, RepoFile):
                content_id = info.lfs.sha256 if info.lfs else info.blob_id
                found[info.path] = HubFile(
                    repo=repo, commit=commit, path=info.path, bytes=info.size, content_id=content_id
                )
    return [found[path] for path in paths]


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """A bar for the few kilobytes of a dataset card is noise in a run's output."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    disabled = are_progress_bars_disabled()
    if not disabled:
        disable_progress_bars()
    try:
        yield
    finally:
        if not disabled:
            enable_progress_bars()


@contextmanager
def _user_errors(name: str, repo: str) -> Iterator[None]:
    """Says in one sentence what the clients' exceptions mean for the user who asked for ``name``."""
    from datasets.data_files import EmptyDatasetError
    from datasets.exceptions import DataFilesNotFoundError, DatasetsError
    from huggingface_hub import errors
    from huggingface_hub.utils import httpx

    try:
        yield
    except errors.GatedRepoError as error:
        raise UserError(
            f"The Hub dataset {repo} is gated: accept its terms at https://huggingface.co/datasets/{repo} and log in "
            f"with `hf auth login`."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"The Hub has no dataset {repo} that you can see; check the spelling, give the path of an existing folder "
            f"if you meant one, or log in with `hf auth login` if the dataset is private."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"The Hub dataset {repo} has no branch, tag or commit {name.partition('@')[2]!r}.") from error
    except errors.HfHubHTTPError as error:
        raise UserError(
            f"The Hub cannot list the dataset {repo} (HTTP {error.response.status_code}); try again later."
        ) from error
    except (EmptyDatasetError, DataFilesNotFoundError) as error:
        raise UserError(
            f"The Hub dataset {repo} has no files that can be read; a file's name must end in one of "
            f"{', '.join(SUFFIXES)}."
        ) from error
    except (httpx.HTTPError, ConnectionError, errors.LocalEntryNotFoundError) as error:
        raise UserError(
            f"The Hub dataset {name} cannot be looked up: {_endpoint()} cannot be reached ({first_line(error)}); check "
            "the network or train from a local folder."
        ) from error
    except (ValueError, RuntimeError, DatasetsError) as error:
        raise UserError(_listing_problem(repo, error)) from error


def _listing_problem(repo: str, error: Exception) -> str:
    """The sentence for a dataset that is there, but that ``datasets`` cannot list as it was asked to."""
    text = " ".join(str(error).split())
    # Only the texts tell these apart: `datasets` raises a bare ValueError or RuntimeError for them.
    if "Dataset scripts are no longer supported" in text:
        return f"The Hub dataset {repo} is a script, which `datasets` runs no longer; try {repo}@refs/convert/parquet."
    if configs := re.search(r"(?:available configs|Available): \[(.*?)\]", text):
        return f"The Hub dataset {repo} has several configs; name one as {repo}:CONFIG, of {configs[1]}."
    return f"`datasets` cannot list the files of the Hub dataset {repo}: {text.rstrip('.')}."


def _endpoint() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT


class HubReader:
    """Random access to one file of the Hub, by HTTP range requests at its commit.

    Each read is one request through ``resolve`` (and the redirect to the store where the Hub keeps large files), so
    read in blocks of about a megabyte or more: the Hub limits the number of requests.

    ``HfFileSystem`` is not used: it retries for half a minute only, warns at each try, takes a whole file for a range
    where a server ignores the range, and leaves compression on. The URL, the login and the HTTP library are
    huggingface_hub's.

    A reader holds no connection and no lock: it may be pickled, used by several threads, and used on both sides of a
    fork. Connections belong to the process.
    """

    def __init__(
        self,
        file: HubFile,
        *,
        patience_seconds: float = PATIENCE_SECONDS,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        """``sleep`` waits between tries; one that raises gives up. ``time.sleep`` lets through what a signal's handler
        raises, but sleeps on after a handler that only takes note."""
        # What a read imports is imported here: a child that is forked while another thread imports waits for ever.
        from huggingface_hub import constants, hf_hub_url, is_offline_mode  # noqa: F401
        from huggingface_hub.utils import build_hf_headers, httpx  # noqa: F401

        self.file = file
        self._patience_seconds = patience_seconds
        self._sleep = sleep

    def read_at(self, offset: int, size: int) -> bytes:
        """The ``size`` bytes at ``offset``: fewer at the end of the file, none after it.

        Connection errors, time-outs, HTTP 408, 425, 429 and 5xx and answers that are not the bytes asked for are
        tried again until ``patience_seconds`` have passed since the first failure. Raises a UserError then, and at
        once for any other refusal.
        """
        if offset < 0 or size < 0:
            raise ValueError(f"read_at({offset}, {size})")
        size = min(size, self.file.bytes - offset)
        if size <= 0:
            return b""
        try:
            return _fetch(self.file, offset, size)
        except UnavailableError as error:
            return self._wait_out(error, offset, size)

    def _wait_out(self, error: UnavailableError, offset: int, size: int) -> bytes:
        """Tries again after a failure, with a line in the log at the first pause and at the end of the outage."""
        # To the end of patience: a run that has waited for hours had better try once more than stop early.
        began, pauses = (
            time.monotonic(),
            Pauses(self._patience_seconds, longest_seconds=MAX_WAIT_SECONDS, to_the_end=True),
        )
        warned = False
        while (pause := pauses.next(error)) is not None:
            if not warned:
                again = (_duration(pause), _duration(self._patience_seconds))
                logger.warning(
                    "%s cannot be read (%s); trying again in %s, then for up to %s", self.file, error, *again
                )
                warned = True
            self._sleep(pause)
            try:
                data = _fetch(self.file, offset, size)
            except UnavailableError as newest:
                error = newest
            else:
                logger.info("%s can be read again after %s", self.file, _duration(time.monotonic() - began))
                return data
        raise UserError(
            f"{self.file} could not be read for {_duration(time.monotonic() - began)} ({error}); start again when "
            f"{_endpoint()} can be reached."
        ) from error


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"


def _fetch(file: HubFile, offset: int, size: int) -> bytes:
    """One request for bytes that the file has. Raises an UnavailableError, or another UserError for a refusal."""
    from huggingface_hub import constants, hf_hub_url, is_offline_mode
    from huggingface_hub.utils import build_hf_headers, httpx

    if is_offline_mode():
        raise UserError(f"{file} cannot be read offline; unset HF_HUB_OFFLINE (and TRANSFORMERS_OFFLINE).")
    url = hf_hub_url(file.repo, file.path, repo_type="dataset", revision=file.commit)
    headers = build_hf_headers(library_name="codeparrot-ds") | {
        "Range": f"bytes={offset}-{offset + size - 1}",
        "Accept-Encoding": "identity",  # a range of a compressed answer is another range
    }
    body = bytearray()
    try:
        client = _client(os.getpid())
        with client.stream("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as response:
            first, length = _body_span(response, file, offset, size)
            for chunk in response.iter_raw():
                body += chunk
                if len(body) > length:  # leaving the block closes the connection: the rest is not read
                    break
    except httpx.HTTPError as error:
        raise UnavailableError(str(error) or type(error).__name__) from error
    if len(body) != length:
        raise UnavailableError(f"{'more' if len(body) > length else len(body)} bytes came instead of {length}")
    return bytes(body[offset - first : offset - first + size])


@functools.lru_cache(maxsize=1)
def _client(process: int) -> Any:
    """The HTTP client of this process, with connections of its own.

    Not huggingface_hub's ``get_session()``, which ``HfFileSystem`` uses too: other code of the process closes that one
    at will, and a forked child closes what it inherits under the connection pool's lock. Where a thread of the parent
    read at that moment, the child waits for that lock for ever (within 100 forks beside 4 reading threads).
    """
    from huggingface_hub.utils import httpx

    return httpx.Client(follow_redirects=True)


def _body_span(response: Any, file: HubFile, offset: int, size: int) -> tuple[int, int]:
    """Where in the file the body of an answer begins and how long it must be.

    Raises an UnavailableError, or another UserError for a refusal, when it is not the body asked for.
    """
    status = response.status_code
    asked = f"bytes {offset}-{offset + size - 1}/"
    if status == 206:
        answered = response.headers.get("Content-Range", "")
        if answered not in (f"{asked}{file.bytes}", f"{asked}*"):
            raise UnavailableError(f"the answer has {answered!r} instead of '{asked}{file.bytes}'")
        return offset, size
    if status == 200 and file.bytes <= _MAX_WHOLE_BYTES:
        return 0, file.bytes
    if status in _RETRIED_STATUSES or status >= 500:
        raise UnavailableError(f"HTTP {status}", retry_after(response.headers))
    if status in (401, 403):
        raise UserError(f"{file} may not be read (HTTP {status}); log in with `hf auth login` as a user who may.")
    if status == 404:
        raise UserError(f"{file} is no longer on the Hub (HTTP 404); start a new run on the dataset as it is now.")
    if status == 416:
        raise UserError(f"{file} does not have the {asked}{file.bytes} that the Hub said it has (HTTP 416).")
    if 400 <= status < 500:
        raise UserError(f"{file} cannot be read: the Hub refuses the request (HTTP {status}).")
    raise UnavailableError(f"HTTP {status} in answer to a byte range")
