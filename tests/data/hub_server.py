"""A small Hugging Face Hub on loopback: the dataset endpoints that the real clients call, and faults on demand."""

from __future__ import annotations

import gzip
import hashlib
import json
import multiprocessing
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

LFS_SUFFIXES = (".gz", ".zst", ".parquet")
_REPO = r"(?P<repo>[^/]+/[^/]+)"
_API = re.compile(rf"/api/datasets/{_REPO}(/(?P<what>revision|tree|paths-info|auth-check)(/(?P<rest>.*))?)?")
_RESOLVE = re.compile(rf"/datasets/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")


class Answered(NamedTuple):
    """One request and what became of it; ``status`` is 0 for a dropped connection, ``bytes`` counts the body."""

    method: str
    path: str
    range: str | None
    authorization: str | None
    status: int
    bytes: int
    port: int
    """The client's: what tells its connections apart."""


@dataclass
class Fault:
    """What happens to requests instead of an answer, for a number of requests or until a time.

    Kinds: ``drop`` closes the connection, ``hang`` does after two seconds of silence; ``status`` answers with it;
    ``truncate`` sends half of the body that it announces, ``scant`` half of the range that it announces, ``short`` half
    of the range and says so, ``shift`` another range; ``whole`` ignores ranges.
    """

    kind: str
    requests: int = 1 << 30
    until: float = float("inf")
    status: int = 503
    headers: dict[str, str] = field(default_factory=dict)
    matching: str = ""
    """Only requests whose path contains it."""


class HubServer(ThreadingHTTPServer):
    """Serves datasets from memory. ``commit`` adds a commit; ``fault`` sets what goes wrong from now on."""

    daemon_threads = True

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        # Another host, as the Hub's stores are: a client must not send it the login.
        self.store = f"http://localhost:{self.server_port}/store"
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}
        self.heads: dict[str, str] = {}
        self.refusals: dict[str, tuple[int, str]] = {}
        """Of a repository's files: status and X-Error-Code."""
        self.fault: Fault | None = None
        self.log: list[Answered] = []
        self.lock = threading.Lock()

    def commit(self, repo: str, files: dict[str, bytes]) -> str:
        """Makes ``files`` the whole content of main, and returns the commit's hash."""
        commits = self.commits.setdefault(repo, {})
        sha = hashlib.sha1(f"{repo} {len(commits)}".encode()).hexdigest()
        commits[sha] = files
        self.heads[repo] = sha
        return sha

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is no error; what a test then misses, it says."""

    def take_fault(self, path: str) -> Fault | None:
        with self.lock:
            fault = self.fault
            if fault is None or fault.matching not in path:
                return None
            if fault.requests <= 0 or time.monotonic() >= fault.until:
                self.fault = None
                return None
            fault.requests -= 1
            return fault


def content_id(path: str, data: bytes) -> str:
    if path.endswith(LFS_SUFFIXES):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None:
        """The log is `HubServer.log`."""

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def _serve(self) -> None:
        form = parse_qs(self.rfile.read(int(self.headers.get("Content-Length", 0))).decode())
        url = urlsplit(self.path)
        self.fault = self.server.take_fault(url.path)
        if self.fault and self.fault.kind in ("drop", "hang"):
            time.sleep(2 if self.fault.kind == "hang" else 0)
            self.close_connection = True
            self._note(0, 0)
        elif self.fault and self.fault.kind == "status":
            self._send(self.fault.status, b"busy", self.fault.headers)
        elif match := _RESOLVE.fullmatch(url.path):
            self._resolve(match["repo"], unquote(match["revision"]), unquote(match["path"]))
        elif match := _API.fullmatch(url.path):
            self._api(match["repo"], match["what"], unquote(match["rest"] or ""), parse_qs(url.query) | form)
        elif url.path.startswith("/store/"):
            repo, sha, path = re.fullmatch(rf"/store/{_REPO}/([^/]+)/(.+)", unquote(url.path)).group(1, 2, 3)
            self._content(self.server.commits[repo][sha][path], {})
        else:
            self._refuse(404, "")

    def _files(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Commit hash and files, or None after an answer that there are none."""
        commits = self.server.commits.get(repo)
        if commits is None:
            self._refuse(401, "RepoNotFound")
            return None
        sha = self.server.heads[repo] if revision == "main" else revision
        if sha not in commits:
            self._refuse(404, "RevisionNotFound")
            return None
        return sha, commits[sha]

    def _api(self, repo: str, what: str | None, rest: str, query: dict[str, list[str]]) -> None:
        revision, _, folder = rest.partition("/") if what == "tree" else (rest, "", "")
        found = self._files(repo, revision or "main")
        if found is None:
            return
        sha, files = found
        refusal = self.server.refusals.get(repo)
        if what in (None, "revision"):
            info = {"id": repo, "sha": sha, "private": False, "gated": "auto" if refusal else False}
            self._json(info | {"siblings": [{"rfilename": path} for path in files]})
        elif refusal:
            self._refuse(*refusal)
        elif what == "auth-check":
            self._json({})
        elif what == "paths-info":
            self._json([_entry(path, files[path]) for path in query["paths"] if path in files])
        else:
            recursive = query.get("recursive", ["false"])[0].lower() == "true"
            self._json(_tree(files, folder.strip("/"), recursive))

    def _resolve(self, repo: str, revision: str, path: str) -> None:
        found = self._files(repo, revision)
        if found is None:
            return
        sha, files = found
        if refusal := self.server.refusals.get(repo):
            self._refuse(*refusal)
        elif path not in files:
            self._refuse(404, "EntryNotFound", {"X-Repo-Commit": sha})
        else:
            headers = {"X-Repo-Commit": sha, "ETag": f'"{content_id(path, files[path])}"'}
            if path.endswith(LFS_SUFFIXES):
                headers |= {"X-Linked-Size": str(len(files[path])), "X-Linked-Etag": headers["ETag"]}
                self._send(302, b"", headers | {"Location": f"{self.server.store}/{repo}/{sha}/{path}"})
            else:
                self._content(files[path], headers)

    def _content(self, data: bytes, headers: dict[str, str]) -> None:
        kind = self.fault.kind if self.fault else ""
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked is None or kind == "whole":
            self._send(200, data, headers | {"Accept-Ranges": "bytes"})
            return
        start, end = int(asked[1]), min(int(asked[2]), len(data) - 1)
        if start > end:
            self._send(416, b"", headers | {"Content-Range": f"bytes */{len(data)}"})
            return
        if kind == "short":
            end = start + (end - start) // 2
        if kind == "shift":
            start, end = 0, end - start
        headers |= {"Content-Range": f"bytes {start}-{end}/{len(data)}"}
        body = data[start : end + 1]
        if kind == "scant":
            body = body[: len(body) // 2]
        if "gzip" in self.headers.get("Accept-Encoding", ""):  # as a store may, and then a range means something else
            headers |= {"Content-Encoding": "gzip"}
            body = gzip.compress(body)
        self._send(206, body, headers, truncate=kind == "truncate")

    def _refuse(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        self._send(status, b"", (headers or {}) | ({"X-Error-Code": code} if code else {}))

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str], truncate: bool = False) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        sent = b"" if self.command == "HEAD" else body[: len(body) // 2] if truncate else body
        self._note(status, len(sent))  # before a byte leaves: a test looks at the log once it has the answer
        self.end_headers()
        self.wfile.write(sent)
        if truncate:
            self.close_connection = True

    def _note(self, status: int, size: int) -> None:
        asked, login = self.headers.get("Range"), self.headers.get("Authorization")
        answered = Answered(self.command, self.path, asked, login, status, size, self.client_address[1])
        with self.server.lock:
            self.server.log.append(answered)


def _entry(path: str, data: bytes) -> dict[str, object]:
    oid = content_id(path, data)
    entry = {"type": "file", "path": path, "size": len(data), "oid": oid}
    if path.endswith(LFS_SUFFIXES):
        # The git object of an LFS file is its pointer.
        entry |= {"oid": hashlib.sha1(oid.encode()).hexdigest()}
        entry |= {"lfs": {"oid": oid, "size": len(data), "pointerSize": 130}}
    return entry


def _tree(files: dict[str, bytes], folder: str, recursive: bool) -> list[dict[str, object]]:
    """Files and folders below ``folder``: all of them or the direct children."""
    prefix = f"{folder}/" if folder else ""
    below = [path for path in files if path.startswith(prefix)]
    parts = [path[len(prefix) :].split("/")[:-1] for path in below]
    folders = {prefix + "/".join(some[: depth + 1]) for some in parts for depth in range(len(some))}
    entries = [{"type": "directory", "path": path, "oid": "0" * 40} for path in sorted(folders)]
    entries += [_entry(path, files[path]) for path in below]
    return [entry for entry in entries if recursive or "/" not in str(entry["path"])[len(prefix) :]]


@contextmanager
def running_hub() -> Iterator[HubServer]:
    """A server on a free port, in a thread of this process."""
    with HubServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@contextmanager
def client_process(folder: Path, **environment: str) -> Iterator[Callable[..., Any]]:
    """Calls functions in a process of its own: the clients read their environment when they are imported."""
    with pytest.MonkeyPatch.context() as patch, ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN"):
            patch.delenv(name, raising=False)
        patch.setenv("HF_HOME", str(folder))
        patch.setenv("HF_HUB_DISABLE_XET", "1")
        patch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "1")
        for name, value in environment.items():
            patch.setenv(name, value)
        yield lambda function, *arguments: pool.submit(function, *arguments).result(timeout=60)
