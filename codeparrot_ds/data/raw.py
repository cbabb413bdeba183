"""Raw documents: the text files of source trees and the rows of row files, with their repository and licence."""

import configparser
import gzip
import os
import re
import sysconfig
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import orjson

from codeparrot_ds.errors import UserError

ROW_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
UNKNOWN_LICENSE = "unknown"

Progress = Callable[[str, int, "int | None"], None]
"""Called as ``progress(phase, documents done, documents in all or None)``, for each: the caller thins it out."""

# Installed packages and caches inside a tree are other people's code or no code. A folder that is itself given as a
# source is always read: only what lies below it is skipped.
_SKIPPED_FOLDERS = {"__pycache__", "site-packages", "dist-packages", "node_modules"}

# The phrase that comes first in a licence decides: the GPLs name each other in their last paragraphs.
_LICENSE_PHRASES = {
    "python software foundation license": "psf-2.0",
    "apache license": "apache-2.0",
    "gnu affero general public license": "agpl-3.0",
    "gnu lesser general public license": "lgpl",
    "gnu general public license": "gpl",
    "mozilla public license": "mpl-2.0",
    "this is free and unencumbered software": "unlicense",
    "permission to use, copy, modify, and/or distribute": "isc",
    "permission is hereby granted, free of charge": "mit",
    "redistribution and use in source and binary forms": "bsd",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class RawDocument:
    """One file or row as it was found. ``copies`` is above 1 where a row file says so."""

    repo_name: str
    path: str
    license: str
    content: str
    copies: int = 1


@dataclass(kw_only=True)
class ReadAccount:
    """What was read from one source, and what was left out and why."""

    source: str
    documents: int = 0
    bytes: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    first_bad_row: str = ""

    def as_dict(self) -> dict:
        card = {"source": self.source, "documents": self.documents, "bytes": self.bytes}
        return {**card, "left_out": dict(sorted(self.left_out.items())), "first_bad_row": self.first_bad_row}


def standard_library_sources() -> list[str]:
    """The running interpreter's own standard library: real code of one licence on every machine."""
    return [sysconfig.get_paths()["stdlib"]]


def read_source(
    source: str, account: ReadAccount, *, content_column: str, suffixes: Sequence[str] = (".py",)
) -> Iterator[RawDocument]:
    """Yield the ``RawDocument``s of one source in a fixed order; ``account`` is filled on the way.

    Raises:
        UserError: the source is missing, of no known kind, unreadable, damaged, or without a single document.
    """
    path = Path(source)
    if path.is_dir():
        candidates = _read_tree(path, account, suffixes)
        expected = "/".join(f"*{suffix}" for suffix in suffixes)
    elif path.is_file() and source.endswith(ROW_SUFFIXES):
        candidates = _read_rows(path, account, content_column)
        expected = f"rows with the text column {content_column!r}"
    elif path.exists():
        raise UserError(f"{source} is neither a folder nor a row file ({', '.join(ROW_SUFFIXES)})")
    else:
        raise UserError(f"source {source} does not exist")
    for document in candidates:
        account.documents += 1
        account.bytes += len(document.content.encode("utf-8"))
        yield document
    if not account.documents:
        left_out = ", ".join(
            f"{count} {reason.replace('_', ' ')}" for reason, count in sorted(account.left_out.items())
        )
        detail = f" ({left_out}{'; first: ' * bool(account.first_bad_row)}{account.first_bad_row})" if left_out else ""
        raise UserError(f"{source} holds no usable {expected}{detail}")


def _read_tree(root: Path, account: ReadAccount, suffixes: Sequence[str]) -> Iterator[RawDocument]:
    """Walk in name order. A git checkout below the root is a repository of its own, with its own name and licence."""
    root = root.resolve()
    if str(root) == os.path.realpath(sysconfig.get_paths()["stdlib"]):
        # Debian ships the library without its licence, and a folder name such as "python3.11" tells a reader nothing.
        yield from _walk(root, root, "python/cpython", "psf-2.0", account, tuple(suffixes))
    else:
        yield from _walk(root, root, repository_name(root), detect_license(root), account, tuple(suffixes))


def _walk(
    folder: Path, root: Path, repo_name: str, license: str, account: ReadAccount, suffixes: tuple[str, ...]
) -> Iterator[RawDocument]:
    if folder != root and (folder / ".git").exists():
        root, repo_name, license = folder, repository_name(folder), detect_license(folder)
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        account.left_out["unreadable"] += 1
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            if entry.name not in _SKIPPED_FOLDERS and not entry.name.startswith("."):
                yield from _walk(Path(entry.path), root, repo_name, license, account, suffixes)
        elif entry.name.endswith(suffixes) and entry.is_file():
            path = os.path.relpath(entry.path, root)
            try:
                content = _text(Path(entry.path).read_bytes())
                path.encode("utf-8")
            except OSError:
                account.left_out["unreadable"] += 1
            except UnicodeError:
                account.left_out["not_text"] += 1
            else:
                if content.strip():
                    yield RawDocument(repo_name=repo_name, path=path, license=license, content=content)
                else:
                    account.left_out["empty"] += 1


def _text(data: bytes) -> str:
    """UTF-8 text without its byte order mark; line ends stay as they are.

    Raises:
        UnicodeError: other encodings, and binary data that happens to decode.
    """
    if b"\0" in data:
        raise UnicodeError("NUL byte")
    return data.decode("utf-8-sig")


def _read_rows(path: Path, account: ReadAccount, content_column: str) -> Iterator[RawDocument]:
    number = 0
    try:
        for number, line in enumerate(_lines(path), start=1):
            try:
                content = _row_text(row := orjson.loads(line), content_column)
            except ValueError as error:
                account.left_out["bad_rows"] += 1
                account.first_bad_row = account.first_bad_row or f"{path}:{number}: {error}"
                continue
            if "\0" in content:
                account.left_out["not_text"] += 1
            elif not content.strip():
                account.left_out["empty"] += 1
            else:
                yield _document_of_row(row, content, path, number)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path} after row {number}: {error}") from error


def _row_text(row: object, column: str) -> str:
    if not isinstance(row, dict):
        raise ValueError("the row is not an object")
    if column not in row:
        raise ValueError(f"no column {column!r} (columns: {', '.join(row)})")
    if not isinstance(row[column], str):
        raise ValueError(f"column {column!r} is not text")
    return row[column]


def _document_of_row(row: dict, content: str, path: Path, number: int) -> RawDocument:
    """CodeParrot's rows hold counts as text ("copies": "3"); rows of other origin may lack all but the text."""
    copies = str(row.get("copies", 1))
    return RawDocument(
        repo_name=str(row.get("repo_name") or path.name),
        path=str(row.get("path") or f"row-{number}"),
        license=str(row.get("license") or UNKNOWN_LICENSE),
        content=content,
        copies=max(1, int(copies)) if copies.isdecimal() else 1,
    )


def _lines(path: Path) -> Iterator[bytes]:
    if path.suffix == ".zst":
        yield from _zstandard_lines(path)
    else:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            yield from file


def _zstandard_lines(path: Path) -> Iterator[bytes]:
    """Lines of all frames. ``zstandard.open`` would end quietly where a file was cut off; this raises ``EOFError``."""
    import zstandard

    decompressor = zstandard.ZstdDecompressor()
    rest, frame, frame_data = b"", None, b""
    with path.open("rb") as file:
        while frame_data or (frame_data := file.read(1 << 20)):
            frame = frame or decompressor.decompressobj()
            try:
                *lines, rest = (rest + frame.decompress(frame_data)).split(b"\n")
            except zstandard.ZstdError as error:
                raise OSError(str(error)) from error
            yield from lines
            frame_data = frame.unused_data
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("the file ends in the middle of a zstd frame")
    if rest:
        yield rest


def repository_name(root: Path) -> str:
    """``owner/name`` of a checkout's remote "origin", otherwise the folder's name."""
    config = configparser.ConfigParser(strict=False, interpolation=None)
    try:
        config.read(root / ".git" / "config", encoding="utf-8")
        url = config.get('remote "origin"', "url")
    except (configparser.Error, UnicodeError):
        return root.name
    parts = url.strip().removesuffix("/").removesuffix(".git").replace(":", "/").split("/")
    return "/".join(part for part in parts[-2:] if part) or root.name


def detect_license(root: Path) -> str:
    """GitHub's name of the licence in the tree's root (``mit``, ``apache-2.0`` …), or ``unknown``."""
    for path in sorted(root.iterdir()):
        if path.name.upper().startswith(("LICENSE", "LICENCE", "COPYING", "UNLICENSE")) and path.is_file():
            text = " ".join(path.read_text(encoding="utf-8", errors="replace").lower().split())
            found = {text.find(phrase): name for phrase, name in _LICENSE_PHRASES.items() if phrase in text}
            if found:
                return _with_version(found[min(found)], text[min(found) :])
    return UNKNOWN_LICENSE


def _with_version(name: str, text: str) -> str:
    if name == "bsd":
        return "bsd-3-clause" if "neither the name" in text else "bsd-2-clause"
    if name in ("gpl", "lgpl"):
        version = re.search(r"version (\d(?:\.\d)?)", text[:100])
        return f"{name}-{float(version[1])}" if version else name
    return name
