"""A small Hugging Face Hub on loopback for the real client: model repositories in bare git, LFS, faults on demand.

Each repository is a bare git repository below ``root``, so that ``git`` itself can judge what was pushed; LFS files are
pointers in it, and their contents lie beside it under their SHA-256, which is checked on the way in.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import json
import re
import secrets
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import yaml

from codeparrot_ds.config.run_config import LICENSES

TOKEN = "hf_" + "TheTokenOfTheTests" + "0" * 16
READER = "hf_" + "ReadsAndNeverWrites" + "0" * 15
LFS_SUFFIXES = (".safetensors", ".bin")
LFS_SIZE = 5 << 20
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {size}\n"
_POINTER = re.compile(POINTER.format(oid=r"(?P<oid>[0-9a-f]{64})", size=r"(?P<size>\d+)").encode())
ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
PIECE = 1 << 20
_REPO = r"(?P<repo>[^/]+/[^/]+)"
_API = re.compile(rf"/api/(?P<kind>model|dataset|space)s/{_REPO}(/(?P<what>[a-z-]+)(/(?P<rest>.*))?)?")
# Some of the oldest models have a name without an organisation.
_RESOLVE = re.compile(
    rf"/(?P<kind>datasets/|spaces/|){_REPO.replace('/[^/]+', '(/[^/]+)?')}/resolve/(?P<revision>[^/]+)/(?P<path>.+)"
)
_LFS = re.compile(rf"/{_REPO}\.git/info/lfs/(?P<what>objects/batch|verify|complete)")
_STORE = re.compile(rf"/store/{_REPO}/(?P<oid>[0-9a-f]{{64}})(/(?P<part>\d+))?")


@dataclasses.dataclass
class Fault:
    """What happens to requests, for a number of them.

    Kinds: ``status`` answers with it and does nothing; ``hang`` is silent for ``seconds`` and hangs up; ``reset``
    resets the connection before anything is done; ``lost`` does what was asked and resets it instead of answering;
    ``corrupt`` flips a byte of the body on its way in.
    """

    kind: str
    requests: int = 1 << 30
    status: int = 503
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    seconds: float = 30
    matching: str = ""
    """Only requests whose ``METHOD /path`` contains it."""


@dataclasses.dataclass(frozen=True)
class Answered:
    """One request; ``status`` is 0 where no answer was sent, ``fault`` the kind of the one that hit it."""

    method: str
    path: str
    authorization: str | None
    status: int
    fault: str | None


class RefusedError(Exception):
    """An answer other than success."""

    def __init__(self, status: int, code: str = "", message: str = "", body: dict[str, Any] | None = None) -> None:
        self.status, self.code, self.message = status, code, message
        self.body = {"error": message or code} if body is None else body


class ModelHub(ThreadingHTTPServer):
    """Serves ``root``. ``faults`` are tried in order; ``inject`` may name one for any request."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        # Another host, as the Hub's store is: a client must not send it the token.
        self.store_endpoint = f"http://localhost:{self.server_port}"
        self.tokens = {TOKEN: {"name": "org", "write": True}, READER: {"name": "org", "write": False}}
        self.faults: list[Fault] = []
        self.inject: Callable[[str], Fault | None] = lambda request: None
        self.multipart_bytes: int | None = None
        """Files larger than this are uploaded in parts of it."""
        self.log: list[Answered] = []
        self.lock = threading.RLock()
        self.stopping = threading.Event()
        (root / "lfs").mkdir(parents=True, exist_ok=True)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is no error; what a test then misses, it says."""

    def take_fault(self, request: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.requests > 0 and fault.matching in request:
                    fault.requests -= 1
                    return fault
        return self.inject(request)

    # ---------------------------------------------------------------------------------------------------------- git

    def repository(self, repo: str, kind: str = "model") -> Path:
        return self.root / f"{kind}s" / f"{repo}.git"

    def git(self, repo: str, *arguments: str, stdin: bytes = b"", kind: str = "model") -> bytes:
        command = ["git", f"--git-dir={self.repository(repo, kind)}", *arguments]
        done = subprocess.run(command, input=stdin, capture_output=True, check=False, env=GIT_ENVIRONMENT)
        if done.returncode:
            raise RuntimeError(f"{command}: {done.stderr.decode()}")
        return done.stdout

    def text(self, repo: str, *arguments: str, kind: str = "model") -> str:
        return self.git(repo, *arguments, kind=kind).decode().strip()

    def create(self, repo: str, kind: str = "model") -> None:
        """Makes a repository as the Hub does, with a first commit of ``.gitattributes``."""
        path = self.repository(repo, kind)
        path.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            ["git", "init", "-q", "--bare", "--template=", "-b", "main", str(path)], check=True, env=GIT_ENVIRONMENT
        )
        for key, value in (("core.compression", "0"), ("gc.auto", "0")):
            self.git(repo, "config", key, value, kind=kind)
        change = [(".gitattributes", ATTRIBUTES.encode())]
        self.write_commit(repo, "main", None, "initial commit", change, [], kind=kind)

    def find(self, repo: str, revision: str, kind: str = "model") -> str:
        """The commit of a branch, tag or id; refused as the Hub does where there is none."""
        for name in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            with contextlib.suppress(RuntimeError):
                return self.text(repo, "rev-parse", "--verify", "--end-of-options", f"{name}^{{commit}}", kind=kind)
        raise RefusedError(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def files(self, repo: str, commit: str, kind: str = "model") -> dict[str, dict[str, Any]]:
        """The files of a commit as the Hub describes them, by path."""
        entries = {}
        for line in filter(None, self.git(repo, "ls-tree", "-r", "-l", "-z", commit, kind=kind).decode().split("\0")):
            about, path = line.split("\t")
            _, _, oid, size = about.split()
            entry: dict[str, Any] = {"type": "file", "path": path, "oid": oid, "size": int(size)}
            if int(size) < 200 and (pointer := _POINTER.fullmatch(self.blob(repo, oid, kind))):
                entry["size"] = int(pointer["size"])
                entry["lfs"] = {"oid": pointer["oid"].decode(), "size": entry["size"], "pointerSize": int(size)}
            entries[path] = entry
        return entries

    def blob(self, repo: str, oid: str, kind: str = "model") -> bytes:
        return self.git(repo, "cat-file", "blob", oid, kind=kind)

    def content(self, repo: str, revision: str, path: str) -> bytes:
        """A file's bytes at a revision, fetched from the store where it is an LFS file."""
        entry = self.files(repo, self.find(repo, revision))[path]
        return (
            (self.root / "lfs" / entry["lfs"]["oid"]).read_bytes() if "lfs" in entry else self.blob(repo, entry["oid"])
        )

    def commits(self, repo: str, revision: str, kind: str = "model") -> list[dict[str, Any]]:
        log = self.text(
            repo,
            "log",
            "-z",
            "--date=format:%Y-%m-%dT%H:%M:%S.000Z",
            "--format=%H%x1f%cd%x1f%s%x1f%b",
            self.find(repo, revision, kind),
            kind=kind,
        )
        fields = [entry.split("\x1f", 3) for entry in log.split("\0") if entry]
        return [
            {"id": i, "title": title, "message": body.strip(), "date": date, "authors": [{"user": "org"}]}
            for i, date, title, body in fields
        ]

    def write_commit(
        self,
        repo: str,
        branch: str,
        parent: str | None,
        message: str,
        written: list[tuple[str, bytes]],
        deleted: list[str],
        kind: str = "model",
    ) -> str:
        """One commit of changed and deleted files on a branch; ``parent`` is its tip."""
        text = message.encode()
        parts = [f"commit refs/heads/{branch}\ncommitter org <org@localhost> {int(time.time())} +0000\n".encode()]
        parts.append(b"data %d\n%s\n" % (len(text), text))
        parts.append(f"from {parent}\n".encode() if parent else b"")
        parts += [f"D {path}\n".encode() for path in deleted]
        for path, content in written:
            parts.append(b"M 100644 inline %s\ndata %d\n%s\n" % (path.encode(), len(content), content))
        self.git(repo, "fast-import", "--quiet", stdin=b"".join(parts), kind=kind)
        return self.text(repo, "rev-parse", f"refs/heads/{branch}", kind=kind)


GIT_ENVIRONMENT = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LC_ALL": "C", "GIT_CONFIG_NOSYSTEM": "1"} | {
    f"GIT_{role}_{field}": value
    for role in ("AUTHOR", "COMMITTER")
    for field, value in (("NAME", "org"), ("EMAIL", "org@localhost"))
}


class _Handler(BaseHTTPRequestHandler):
    server: ModelHub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None:
        """The log is `ModelHub.log`."""

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        self._serve()

    def _serve(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.fault = self.server.take_fault(f"{self.command} {url.path}")
        kind = self.fault.kind if self.fault else ""
        if kind == "reset":
            self._reset()
            return
        if kind == "hang":
            self.server.stopping.wait(self.fault.seconds)
            self._reset()
            return
        self.body = self._pieces()
        try:
            if kind == "status":
                for _ in self.body:
                    pass
                self._answer(self.fault.status, b"busy", self.fault.headers)
                return
            self._route(url.path)
        except RefusedError as refused:
            for _ in self.body:
                pass
            headers = {"X-Error-Code": refused.code} if refused.code else {}
            headers |= {"X-Error-Message": refused.message} if refused.message else {}
            self._json(refused.body, status=refused.status, headers=headers)

    def _route(self, path: str) -> None:
        if match := _API.fullmatch(path):
            self._api(match["kind"], match["repo"], match["what"], unquote(match["rest"] or ""))
        elif path == "/api/repos/create":
            self._create(self._read_json())
        elif path == "/api/validate-yaml":
            self._validate(self._read_json()["content"])
        elif path == "/api/whoami-v2":
            self._json({"type": "user", "name": self._user()["name"], "orgs": []})
        elif match := _LFS.fullmatch(path):
            self._lfs(match["repo"], match["what"])
        elif match := _STORE.fullmatch(path):
            self._store(match["oid"], match["part"])
        elif match := _RESOLVE.fullmatch(path):
            kind = match["kind"].removesuffix("s/") or "model"
            self._resolve(kind, match["repo"], unquote(match["revision"]), unquote(match["path"]))
        else:
            raise RefusedError(404, "", f"no such endpoint: {path}")

    # ------------------------------------------------------------------------------------------------- repositories

    def _user(self) -> dict[str, Any]:
        user = self.server.tokens.get((self.headers.get("Authorization") or "").removeprefix("Bearer "))
        if user is None:
            raise RefusedError(401, "", "Invalid credentials in Authorization header")
        return user

    def _writer(self, organization: str) -> None:
        user = self._user()
        if not user["write"] or user["name"] != organization:
            raise RefusedError(403, "", f"You don't have the rights to write to the namespace {organization}")

    def _existing(self, repo: str, kind: str) -> None:
        """Every repository here is private."""
        self._user()
        if not self.server.repository(repo, kind).is_dir():
            raise RefusedError(404, "RepoNotFound", "Repository not found")

    def _create(self, asked: dict[str, Any]) -> None:
        repo, kind = f"{asked['organization']}/{asked['name']}", asked.get("type", "model")
        self._writer(asked["organization"])
        with self.server.lock:
            if self.server.repository(repo, kind).is_dir():
                url = f"{self.server.endpoint}/{repo}"
                raise RefusedError(409, "", "You already created this repo", {"error": "exists", "url": url})
            self.server.create(repo, kind)
        self._json({"url": f"{self.server.endpoint}/{repo}", "name": repo})

    def _api(self, kind: str, repo: str, what: str | None, rest: str) -> None:
        self._existing(repo, kind)
        hub = self.server
        if self.command == "GET" and what in (None, "revision"):
            commit = hub.find(repo, rest or "main", kind)
            siblings = [{"rfilename": path} for path in hub.files(repo, commit, kind)]
            self._json({"id": repo, "modelId": repo, "sha": commit, "private": True, "siblings": siblings})
        elif self.command == "GET" and what == "refs":
            self._json({"branches": self._refs(repo, "heads"), "tags": self._refs(repo, "tags"), "converts": []})
        elif self.command == "GET" and what == "commits":
            self._commits(repo, rest)
        elif self.command == "GET" and what == "tree":
            revision, _, folder = rest.partition("/")
            self._json(_tree(hub.files(repo, hub.find(repo, revision, kind), kind), folder, self.query))
        elif self.command == "POST" and what == "paths-info":
            asked = parse_qs(self._read().decode())["paths"]
            files = hub.files(repo, hub.find(repo, rest, kind), kind)
            self._json([files[path] for path in asked if path in files])
        elif self.command == "POST" and what in ("branch", "tag", "preupload", "commit"):
            self._writer(repo.split("/")[0])
            getattr(self, f"_{what}")(repo, rest)
        else:
            raise RefusedError(404, "", f"no such endpoint: {self.command} {self.path}")

    def _refs(self, repo: str, place: str) -> list[dict[str, str]]:
        lines = self.server.text(
            repo, "for-each-ref", "--format=%(refname)\t%(objectname)\t%(*objectname)", f"refs/{place}"
        ).splitlines()
        refs = [line.split("\t") for line in lines]
        return [
            {"name": ref.split("/", 2)[2], "ref": ref, "targetCommit": target or commit}
            for ref, commit, target in ((*fields, "")[:3] for fields in refs)
        ]

    def _commits(self, repo: str, revision: str) -> None:
        """Pages of fifty, as the Hub's are."""
        page, size = int(self.query.get("p", ["0"])[0]), 50
        commits = self.server.commits(repo, revision)
        more = (page + 1) * size < len(commits)
        next_page = f"{self.server.endpoint}{urlsplit(self.path).path}?p={page + 1}"
        headers = {"Link": f'<{next_page}>; rel="next"'} if more else {}
        self._json(commits[page * size : (page + 1) * size], headers=headers)

    def _branch(self, repo: str, name: str) -> None:
        start = self._read_json().get("startingPoint", "main")
        with self.server.lock:
            if any(ref["name"] == name for ref in self._refs(repo, "heads")):
                raise RefusedError(409, "", f"Reference already exists: {name}")
            self.server.git(repo, "update-ref", f"refs/heads/{name}", self.server.find(repo, start))
        self._json({})

    def _tag(self, repo: str, revision: str) -> None:
        asked = self._read_json()
        with self.server.lock:
            if any(ref["name"] == asked["tag"] for ref in self._refs(repo, "tags")):
                raise RefusedError(409, "", f"Tag reference exists already: {asked['tag']}")
            commit = self.server.find(repo, revision)
            message = ("-m", asked["message"]) if asked.get("message") else ()
            self.server.git(repo, "tag", *message, asked["tag"], commit)
        self._json({})

    def _validate(self, content: str) -> None:
        problems = _card_problems(content)
        answer = {"errors": [{"message": problem} for problem in problems], "warnings": []}
        self._json(answer, status=400 if problems else 200)

    def _preupload(self, repo: str, revision: str) -> None:
        files = self.server.files(repo, self.server.find(repo, revision))

        def mode(file: dict[str, Any]) -> str:
            return "lfs" if file["path"].endswith(LFS_SUFFIXES) or file["size"] > LFS_SIZE else "regular"

        def known(path: str) -> str | None:
            entry = files.get(path)
            return entry and (entry["lfs"]["oid"] if "lfs" in entry else entry["oid"])

        self._json(
            {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": mode(file),
                        "shouldIgnore": False,
                        "oid": known(file["path"]),
                    }
                    for file in self._read_json()["files"]
                ]
            }
        )

    def _commit(self, repo: str, branch: str) -> None:
        lines = [json.loads(line) for line in self._read().splitlines()]
        header = lines[0]["value"]
        written, deleted = [], []
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                written.append((value["path"], base64.b64decode(value["content"])))
            elif line["key"] == "lfsFile":
                stored = self.server.root / "lfs" / value["oid"]
                if not stored.is_file():
                    raise RefusedError(400, "", f"LFS object {value['oid']} was never uploaded")
                pointer = POINTER.format(oid=value["oid"], size=stored.stat().st_size)
                written.append((value["path"], pointer.encode()))
            elif line["key"] == "deletedFile":
                deleted.append(value["path"])
            else:
                raise RefusedError(400, "", f"unknown operation {line['key']}")
        with self.server.lock:
            tip = self.server.find(repo, f"refs/heads/{branch}")
            if header.get("parentCommit", tip) != tip:
                raise RefusedError(412, "", "A commit has happened since. Please refresh and try again.")
            message = f"{header['summary']}\n\n{header.get('description', '')}".strip() + "\n"
            commit = self.server.write_commit(repo, branch, tip, message, written, deleted)
        self._json({"commitUrl": f"{self.server.endpoint}/{repo}/commit/{commit}", "commitOid": commit})

    # ---------------------------------------------------------------------------------------------------------- LFS

    def _lfs(self, repo: str, what: str) -> None:
        if what != "complete":  # whose URL is signed, as the store's are
            self._writer(repo.split("/")[0])
            self._existing(repo, "model")
        asked = self._read_json()
        if what == "objects/batch":
            self._json({"transfer": "basic", "objects": [self._lfs_object(repo, entry) for entry in asked["objects"]]})
        elif what == "verify":
            stored = self.server.root / "lfs" / asked["oid"]
            if not stored.is_file() or stored.stat().st_size != asked["size"]:
                raise RefusedError(422, "", "the object was not uploaded whole")
            self._json({})
        else:
            self._join_parts(asked["oid"], len(asked["parts"]))

    def _lfs_object(self, repo: str, entry: dict[str, Any]) -> dict[str, Any]:
        oid, size = entry["oid"], entry["size"]
        if (self.server.root / "lfs" / oid).is_file():
            return {"oid": oid, "size": size}
        place = f"{self.server.store_endpoint}/store/{repo}/{oid}"
        prefix = f"{self.server.endpoint}/{repo}.git/info/lfs"
        upload: dict[str, Any] = {"href": place}
        if self.server.multipart_bytes and size > self.server.multipart_bytes:
            parts = range(1, -(-size // self.server.multipart_bytes) + 1)
            header = {"chunk_size": str(self.server.multipart_bytes), **{str(n): f"{place}/{n}" for n in parts}}
            upload = {"href": f"{prefix}/complete", "header": header}
        return {"oid": oid, "size": size, "actions": {"upload": upload, "verify": {"href": f"{prefix}/verify"}}}

    def _store(self, oid: str, part: str | None) -> None:
        """What a store does for whoever has the URL: takes an object or a part of it, or gives an object."""
        stored = self.server.root / "lfs" / oid
        if self.command != "PUT":
            self._send_file(stored)
            return
        if self.headers.get("Authorization"):
            raise RefusedError(400, "", "the token is none of the store's business")
        incoming = self.server.root / f"incoming-{secrets.token_hex(8)}"
        try:
            digest = self._receive(incoming)
            if part is None and digest != oid:
                raise RefusedError(400, "", f"BadDigest: the content's SHA-256 is {digest}")
            incoming.replace(stored if part is None else self.server.root / f"part-{oid}-{part}")
        finally:
            incoming.unlink(missing_ok=True)
        self._answer(200, b"", {"ETag": f'"{digest}"'})

    def _receive(self, path: Path) -> str:
        digest = hashlib.sha256()
        with open(path, "wb") as file:
            for piece in self.body:
                digest.update(piece)
                if piece.count(0) == len(piece):  # keeps a sparse file sparse
                    file.seek(len(piece), 1)
                else:
                    file.write(piece)
            file.truncate()
        return digest.hexdigest()

    def _join_parts(self, oid: str, number: int) -> None:
        parts = [self.server.root / f"part-{oid}-{part}" for part in range(1, number + 1)]
        whole, digest = self.server.root / f"incoming-{secrets.token_hex(8)}", hashlib.sha256()
        with open(whole, "wb") as file:
            for part in parts:
                if not part.is_file():
                    raise RefusedError(400, "", f"{part.name} was never uploaded")
                content = part.read_bytes()
                digest.update(content)
                file.write(content)
        if digest.hexdigest() != oid:
            raise RefusedError(400, "", "the parts are not the object")
        whole.replace(self.server.root / "lfs" / oid)
        for part in parts:
            part.unlink()
        self._json({})

    def _resolve(self, kind: str, repo: str, revision: str, path: str) -> None:
        self._existing(repo, kind)
        commit = self.server.find(repo, revision, kind)
        entry = self.server.files(repo, commit, kind).get(path)
        if entry is None:
            raise RefusedError(404, "EntryNotFound", f"no file {path}")
        headers = {"X-Repo-Commit": commit, "ETag": f'"{entry["oid"]}"'}
        if "lfs" not in entry:
            self._answer(200, self.server.blob(repo, entry["oid"], kind), headers)
            return
        oid = entry["lfs"]["oid"]
        headers |= {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(entry["size"])}
        place = f"{self.server.store_endpoint}/store/{quote(repo)}/{oid}"
        self._answer(302, b"", headers | {"Location": place})

    # ------------------------------------------------------------------------------------------------- the wire

    def _pieces(self) -> Iterator[bytes]:
        """The body as it comes in; a ``corrupt`` fault has flipped a byte of it."""
        flip = self.fault is not None and self.fault.kind == "corrupt"
        for piece in self._raw_pieces():
            if flip:
                piece, flip = bytes([piece[0] ^ 1]) + piece[1:], False
            yield piece

    def _raw_pieces(self) -> Iterator[bytes]:
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length", 0))
        while left:
            piece = self.rfile.read(min(left, PIECE))
            if not piece:
                raise ConnectionError("the client hung up")
            left -= len(piece)
            yield piece

    def _read(self) -> bytes:
        return b"".join(self.body)

    def _read_json(self) -> dict[str, Any]:
        try:
            return json.loads(self._read())
        except ValueError:
            raise RefusedError(400, "", "the body is not JSON") from None

    def _json(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"} | (headers or {}))

    def _send_file(self, path: Path) -> None:
        size = path.stat().st_size
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        end = int(asked[2]) if asked and asked[2] else size - 1
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{end}/{size}")
        self.send_header("Content-Length", str(end - start + 1))
        self._note(206 if asked else 200)
        self.end_headers()
        if self.command == "HEAD":
            return
        with open(path, "rb") as file:
            file.seek(start)
            left = end - start + 1
            while left:
                piece = file.read(min(left, PIECE))
                self.wfile.write(piece)
                left -= len(piece)

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        if self.fault and self.fault.kind == "lost":
            self._reset()
            return
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self._note(status)  # before a byte leaves: a test looks at the log once it has the answer
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _reset(self) -> None:
        """Ends the connection by a reset: unread data, and no more words."""
        self._note(0)
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def _note(self, status: int) -> None:
        fault = self.fault.kind if self.fault else None
        answered = Answered(self.command, self.path, self.headers.get("Authorization"), status, fault)
        with self.server.lock:
            self.server.log.append(answered)


def _tree(files: dict[str, dict[str, Any]], folder: str, query: dict[str, list[str]]) -> list[dict[str, Any]]:
    """Files below a folder, all of them or the direct children, and the folders between."""
    prefix = f"{folder}/" if folder else ""
    recursive = query.get("recursive", ["false"])[0].lower() == "true"
    below = [path for path in files if path.startswith(prefix)]
    folders = {"/".join(path.split("/")[:depth]) for path in below for depth in range(1, path.count("/") + 1)}
    entries = [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in sorted(folders)]
    entries += [files[path] for path in below]
    return [entry for entry in entries if recursive or "/" not in entry["path"][len(prefix) :]]


def _card_problems(content: str) -> list[str]:
    """What the Hub refuses in a card's metadata: the rules of its documentation that a card of ours could break."""
    match = re.match(r"---\n(.*?)\n---\n", content, flags=re.DOTALL)
    if match is None:
        return []
    try:
        metadata = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return [f"the metadata is not YAML: {error}"]
    if not isinstance(metadata, dict):
        return ["the metadata is not a mapping"]
    problems = []
    if "license" in metadata and metadata["license"] not in LICENSES:
        problems.append(f'"license" must be one of {LICENSES}')
    for name in ("library_name", "pipeline_tag"):
        if name in metadata and not isinstance(metadata[name], str):
            problems.append(f'"{name}" must be a string')
    for name in ("tags", "datasets", "metrics"):
        value = metadata.get(name, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            problems.append(f'"{name}" must be an array of strings')
    for model in metadata.get("model-index", []):
        if not model.get("name") or not isinstance(model.get("results"), list):
            problems.append('"model-index[0]" needs "name" and "results"')
            continue
        for result in model["results"]:
            if not result.get("task", {}).get("type"):
                problems.append('"model-index[0].results[0].task.type" is required')
            if not {"type", "name"} <= set(result.get("dataset", {})):
                problems.append('"model-index[0].results[0].dataset" needs "type" and "name"')
            for metric in result.get("metrics", []):
                if not {"type", "value"} <= set(metric):
                    problems.append('"model-index[0].results[0].metrics[0]" needs "type" and "value"')
    return problems


@contextlib.contextmanager
def running_hub(root: Path) -> Iterator[ModelHub]:
    """A Hub on a free port, in a thread of this process."""
    with ModelHub(root) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.stopping.set()
            server.shutdown()
            thread.join()
