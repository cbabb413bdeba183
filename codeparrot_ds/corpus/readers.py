"""Raw documents: the text files of source trees and the rows of row files, with their repository and licence.

The readers take a piece of a source (files of a tree, a byte range, some row groups, a shard) and a ``ReadAccount``
that they fill on the way. What cannot be used costs its document, never the source, and is counted and named.
"""

from __future__ import annotations

import codecs
import configparser
import contextlib
import io
import os
import re
import sysconfig
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from codeparrot_ds.errors import UserError
from codeparrot_ds.layouts import find_columns
from codeparrot_ds.rows.files import Shard, local_shard, open_shard
from codeparrot_ds.rows.reading import BLANK, MAX_ROW_BYTES, BadRow, Piece, document_of, read_rows, rows_of_table
from codeparrot_ds.rows.tables import Table, open_table
from codeparrot_ds.secret_forms import hide_secrets, repository_of

UNKNOWN_LICENSE = "unknown"
MAX_NAMED = 100
"""So many problems of a unit are named; all are counted."""
SPDX_HEAD_CHARACTERS = 2000
LICENSE_CHARACTERS = 1_000_000
GIT_CONFIG_BYTES = 1_000_000

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
_SPDX = re.compile(r"SPDX-License-Identifier:[ \t]*([A-Za-z0-9.+\-() \t]*[A-Za-z0-9.+)])")
# UTF-32 first: its little-endian mark begins with that of UTF-16.
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# Codecs of Python for other purposes than files: they would rewrite escapes, or take a minute for a megabyte.
_NO_ENCODINGS_OF_FILES = {"unicode-escape", "unicode_escape", "raw-unicode-escape", "raw_unicode_escape"}
_NO_ENCODINGS_OF_FILES |= {"idna", "punycode", "undefined"}


@dataclass(frozen=True, kw_only=True, slots=True)
class TreeFile:
    """A file of a source tree as planning found it; size and time show a later build whether it changed."""

    file: str
    """Where it lies, with links followed."""
    path: str
    """Relative to the repository's root."""
    repo_name: str
    license: str
    size_bytes: int
    mtime_ns: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RawDocument:
    """One file or row as it was found. ``copies`` is above 1 where a row file says so.

    ``path`` is empty where a row names none; ``row`` (from 1, inside the piece that was read) then stands for it.
    """

    repo_name: str
    path: str
    license: str
    content: str
    encoding: str = "utf-8"
    row: int = 0
    copies: int = 1


@dataclass(kw_only=True)
class ReadAccount:
    """What was read from one piece of a source, and what was left out and why."""

    documents: int = 0
    bytes: int = 0
    rows: int = 0
    """Rows that the piece holds, good or bad: later pieces of the same file number theirs from here."""
    left_out: Counter[str] = field(default_factory=Counter)
    named: list[tuple[str, int, str]] = field(default_factory=list)
    """File, row (0 for a whole file) and reason of the first ``MAX_NAMED`` problems; empty files are none."""
    damaged: list[tuple[str, int, str]] = field(default_factory=list)
    """File, last good row and reason, of files that end or break in the middle; what came before is kept."""

    def leave_out(self, category: str, file: str, row: int = 0, reason: str = "") -> None:
        self.left_out[category] += 1
        if category != "empty" and len(self.named) < MAX_NAMED:  # packages are full of empty files, and rightly so
            self.named.append((printable(file), row, hide_secrets(reason) or category.replace("_", " ")))

    def damage(self, file: str, row: int, reason: str) -> None:
        self.damaged.append((printable(file), row, hide_secrets(reason.splitlines()[0]) if reason else "unknown"))


def printable(name: str) -> str:
    """A file name of any bytes as text that can be printed and stored."""
    return name.encode("utf-8", "replace").decode("utf-8")


class _LeftOut(Exception):
    """A document that must not enter a corpus, with the category that it is counted under."""

    def __init__(self, category: str, reason: str = "") -> None:
        super().__init__(reason)
        self.category = category


def standard_library_sources() -> list[str]:
    """The running interpreter's own standard library: real code of one licence on every machine."""
    return [sysconfig.get_paths()["stdlib"]]


# --------------------------------------------------------------------------------------------------------------------
# text


def decode(data: bytes) -> tuple[str, str]:
    """The text of a file without its byte order mark, and the name of its encoding; line ends stay as they are.

    In this order: a byte order mark, UTF-8, the coding cookie of PEP 263. Text that is none of these is left out: a
    guess by letter frequencies is wrong often enough on code, which is nearly all ASCII, to put broken words into
    comments and strings, and such files are rare. UTF-8 comes before the cookie because bytes beyond ASCII that
    happen to be valid UTF-8 are UTF-8, whatever a forgotten "latin-1" in the first line says.

    Raises:
        UnicodeError: none of these encodings.
    """
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS if data.startswith(mark)), "utf-8")
    try:
        return data.decode(encoding), encoding
    except UnicodeError:
        if encoding != "utf-8":
            raise
    try:
        cookie, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        if codecs.lookup(cookie).name in _NO_ENCODINGS_OF_FILES:
            raise LookupError(f"no file is written in {cookie}")
        return data.decode(cookie), cookie
    except (SyntaxError, LookupError) as error:  # no cookie or one that names nothing
        raise UnicodeError(str(error)) from error


def _checked(content: str) -> str:
    """The text, if it may enter a corpus."""
    if "\0" in content:
        raise _LeftOut("nul_bytes")
    if not content.strip():
        raise _LeftOut("empty")
    try:
        content.encode("utf-8")
    except UnicodeEncodeError as error:  # a codec of escapes, or UTF-7, can make them of harmless bytes
        raise _LeftOut("lone_surrogates") from error
    return content


def spdx_license(text: str) -> str:
    """The licence that an ``SPDX-License-Identifier`` line in the file's head names, as GitHub writes it, or ""."""
    found = _SPDX.search(text, 0, SPDX_HEAD_CHARACTERS)
    if not found:
        return ""
    return " ".join(found[1].lower().replace("-only", "").strip("()").split())


# --------------------------------------------------------------------------------------------------------------------
# source trees


def read_files(files: Iterable[TreeFile], account: ReadAccount) -> Iterator[RawDocument]:
    """The documents of these files, in their order."""
    for each in files:
        try:
            try:
                content, encoding = decode(_read(each.file))
                each.path.encode("utf-8")
            except OSError as error:
                raise _LeftOut("unreadable", error.strerror or str(error)) from error
            except UnicodeError as error:
                raise _LeftOut("not_text") from error
            _checked(content)
        except _LeftOut as error:
            account.leave_out(error.category, each.file, reason=str(error))
            continue
        yield RawDocument(
            repo_name=each.repo_name,
            path=each.path,
            license=spdx_license(content) or each.license,
            content=content,
            encoding=encoding,
        )


def _read(file: str) -> bytes:
    """The bytes of a file that planning found: a link that has taken its place since may lead anywhere."""
    with open(file, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NOFOLLOW)) as opened:
        if os.fstat(opened.fileno()).st_size > MAX_ROW_BYTES:  # git keeps ten gigabytes of spaces in a few megabytes
            raise _LeftOut("too_long", f"longer than {MAX_ROW_BYTES >> 20} MiB")
        return opened.read()


def repository_name(root: Path) -> str:
    """``owner/name`` of a checkout's remote "origin", otherwise the folder's name.

    Only a config that lies in the checkout itself is read: a ``.git`` that is a link, or a file that names another
    place (of a worktree or submodule), says nothing about this tree that its author could not have made up.
    """
    config, place = configparser.ConfigParser(strict=False, interpolation=None), root / ".git" / "config"
    if not leads_below(place, root) or not place.is_file() or place.stat().st_size > GIT_CONFIG_BYTES:
        return printable(root.name)  # a pipe would be waited for
    try:
        config.read(place, encoding="utf-8")
        url = config.get('remote "origin"', "url")
    except (configparser.Error, UnicodeError):
        return printable(root.name)
    return repository_of(url) or printable(root.name)


def leads_below(path: Path | str, root: Path | str) -> bool:
    """Whether a path, with all its links followed, is a folder or lies in it."""
    return os.path.join(os.path.realpath(path), "").startswith(os.path.join(os.path.realpath(root), ""))


def detect_license(root: Path) -> str:
    """GitHub's name of the licence in the tree's root (``mit``, ``apache-2.0`` …), or ``unknown``."""
    for path in sorted(root.iterdir()):
        is_named_so = path.name.upper().startswith(("LICENSE", "LICENCE", "COPYING", "UNLICENSE"))
        if is_named_so and path.is_file() and leads_below(path, root):
            with path.open(encoding="utf-8", errors="replace") as file:
                text = " ".join(file.read(LICENSE_CHARACTERS).lower().split())
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


# --------------------------------------------------------------------------------------------------------------------
# rows


def read_json_rows(
    path: Path, account: ReadAccount, columns: str, *, start: int = 0, stop: int | None = None
) -> Iterator[RawDocument]:
    """The rows of a JSON or Arrow file; of one that can be entered anywhere those that begin in bytes [start, stop)."""
    with _damage_noted(path, account):
        shard = _shard(path)
        piece = Piece(shard, start, shard.bytes if stop is None else stop)
        for row, after in read_rows(piece, columns=lambda names: _wanted(names, columns)):
            account.rows = after.line
            yield from _row_document(row, columns, path, after.line, account)


def read_parquet_rows(
    path: Path, account: ReadAccount, columns: str, *, start: int, stop: int
) -> Iterator[RawDocument]:
    """The rows of row groups [start, stop); a group that cannot be read is damage, the next ones are still read."""
    with _damage_noted(path, account), _open_table(path) as table:
        first, end = sum(table.group_rows[:start]), sum(table.group_rows[:stop])
        account.rows = end - first
        for row, after in rows_of_table(table, first, end, lambda names: _wanted(names, columns)):
            yield from _row_document(row, columns, path, after.line, account)


def _wanted(names: Sequence[str], columns: str) -> list[str]:
    """What is read of a table with columns of these names; nothing where none is that of the texts."""
    found = find_columns(tuple(names), columns)
    return list(found.values()) if "content" in found else []


def _shard(path: Path) -> Shard:
    shard = local_shard(path)
    assert shard is not None  # planning has looked at its name
    return shard


@contextlib.contextmanager
def _open_table(path: Path) -> Iterator[Table]:
    import pyarrow

    shard = _shard(path)
    try:
        with open_shard(shard) as file, open_table(file, shard) as table:
            yield table
    except pyarrow.ArrowException as error:
        raise UserError(str(error)) from error


@contextlib.contextmanager
def _damage_noted(path: Path, account: ReadAccount) -> Iterator[None]:
    """Within, a file that cannot be opened or read any more, as it could when it was planned, is damage."""
    try:
        yield
    except (OSError, UserError) as error:
        account.damage(str(path), account.rows, getattr(error, "strerror", None) or str(error))


def _row_document(row: Any, columns: str, path: Path, number: int, account: ReadAccount) -> Iterator[RawDocument]:
    """The document of one row, or none, with the reason in the account."""
    if row is BLANK:
        return
    try:
        content = document_of(row, columns)
        if not content.strip():
            raise BadRow("empty", "")
        if not content.isascii():
            content.encode("utf-8")
    except BadRow as error:
        if error.kind == "damaged":
            account.damage(str(path), number, error.reason)
        else:
            account.leave_out(error.kind, str(path), number, error.reason)
        return
    except UnicodeEncodeError:  # of the `datasets` library alone: JSON with such a row is not read
        account.leave_out("lone_surrogates", str(path), number)
        return
    # CodeParrot's rows hold counts as text ("copies": "3"); rows of other origin may lack all but the text.
    found = {what: _words(row[name]) for what, name in find_columns(tuple(row), columns).items() if what != "content"}
    copies, license = found.get("copies") or "1", found.get("license") or UNKNOWN_LICENSE
    yield RawDocument(
        repo_name=found.get("repo") or path.name,
        path=found.get("path", ""),
        license=spdx_license(content) or license if license == UNKNOWN_LICENSE else license,
        content=content,
        row=number,
        copies=max(1, int(copies)) if copies.isdecimal() and len(copies) < 10 else 1,
    )


def _words(value: object) -> str:
    """A value of a column that describes the text; of several licences all, as GitHub writes them."""
    if isinstance(value, (list, tuple)):
        return ", ".join(_words(each).lower() for each in value)
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    return printable(str(value)) if value else ""


def open_dataset(name: str) -> tuple[Any, list[str]]:
    """The streamed split that a source ``org/name`` or ``org/name:split`` names (``train`` by default), and its state.

    The state names the files with their revision, checksum or time, as far as the library knows them.

    Raises:
        Exception: whatever the ``datasets`` library raises where it finds or reads no such data set.
    """
    from datasets import load_dataset_builder

    head, _, split = name.partition(":")
    builder = load_dataset_builder(head)
    files = (builder.config.data_files or {}).items()
    state = [f"{split}: {list(each)} {getattr(each, 'origin_metadata', '')}" for split, each in files]
    return builder.as_streaming_dataset(split=split or "train"), [str(builder.hash), *state]


def read_dataset_rows(
    name: str, account: ReadAccount, columns: str, *, shard: int, num_shards: int
) -> Iterator[RawDocument]:
    """The rows of one shard of a streamed data set."""
    path = Path(name)
    try:
        dataset, _ = open_dataset(name)
        if num_shards > 1:
            dataset = dataset.shard(num_shards=num_shards, index=shard)
        for account.rows, row in enumerate(dataset, start=1):
            yield from _row_document(row, columns, path, account.rows, account)
    except Exception as error:  # the library raises many kinds; each is named and costs the rest of a shard
        account.damage(name, account.rows, f"shard {shard}: {error or repr(error)}")
