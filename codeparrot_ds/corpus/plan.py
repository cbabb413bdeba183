"""Cuts the sources of a corpus into units of work: the same sources give the same units on any number of cores.

A unit is a few megabytes or thousands of a tree's files, a byte range of a plain file of JSON lines or of an Arrow
file, a whole compressed file or JSON array (whose rows can only be reached from its start), some row groups of a
Parquet file, or one shard of a streamed data set. Its ``key`` names everything that its result depends on, so a
finished unit is reused exactly where it is still true.

Memory: about 300 bytes per file of a source tree, until all units are read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import operator
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import orjson

from codeparrot_ds.corpus.readers import (
    ReadAccount,
    TreeFile,
    detect_license,
    leads_below,
    open_dataset,
    repository_name,
)
from codeparrot_ds.data.hub_files import first_look
from codeparrot_ds.errors import UserError, first_line
from codeparrot_ds.layouts import is_sidecar, lay_out
from codeparrot_ds.paths import did_you_mean_path
from codeparrot_ds.rows.files import FORMATS, file_format, is_splittable, local_shard, saved_files

UNIT_BYTES = 8 << 20
UNIT_FILES = 4096
"""Of a tree: opening a small file costs as much as reading some kilobytes."""
ROW_SUFFIXES = tuple(FORMATS)
UNIT_VERSION = 3
"""Raised when the code reads a unit to another result."""

# Installed packages and caches inside a tree are other people's code or no code. A folder that is itself given as a
# source is always read: only what lies below it is skipped.
_SKIPPED_FOLDERS = {"__pycache__", "site-packages", "dist-packages", "node_modules"}
_DATASET_NAME = re.compile(r"[\w.-]+/[\w.-]+(?::[\w+\[\]%-]+)?|.+:[\w+\[\]%-]+")


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """One piece of work. ``start`` and ``stop`` are bytes, row groups, or the shard and the number of shards."""

    source: int
    kind: str
    """``tree``, ``json``, ``parquet`` or ``dataset``."""
    name: str
    files: tuple[TreeFile, ...] = ()
    start: int = 0
    stop: int | None = None
    state: tuple[Any, ...] = ()
    """What shows that a source changed: size and time of a row file, the origin of a data set's files."""

    def key(self, settings: Sequence[Any]) -> str:
        """Name of the result: equal for equal sources read with equal settings."""
        fields = {item.name: getattr(self, item.name) for item in dataclasses.fields(self) if item.name != "source"}
        fields["files"] = [_identity(each) for each in self.files]
        # A file name need not be valid Unicode; such a file is left out, but it has a place in its unit's name.
        data = orjson.dumps([UNIT_VERSION, settings, orjson.Fragment(_dump(fields))])
        return hashlib.blake2b(data, digest_size=16).hexdigest()


_identity = operator.attrgetter(*(item.name for item in dataclasses.fields(TreeFile)))


def _dump(value: Any) -> bytes:
    try:
        return orjson.dumps(value)
    except orjson.JSONEncodeError:
        return orjson.dumps(ascii(value))


@dataclass(kw_only=True)
class Source:
    """A source with its units and what planning already had to leave out."""

    name: str
    expected: str
    units: list[Unit]
    account: ReadAccount
    is_sidecar: bool = False
    """Whether it lies beside data and is none, as where a shell named all files of a folder."""


def plan_sources(sources: Sequence[str], *, suffixes: Sequence[str], content_column: str) -> list[Source]:
    """The sources, each once, in an order that does not depend on how they were given.

    Raises:
        UserError: a source that does not exist or is of no known kind.
    """
    # One folder named twice would double the copies of all its files.
    unique = {os.path.realpath(source) if os.path.exists(source) else source: source for source in map(str, sources)}
    planned = []
    sidecars = {place for place in unique if os.path.isfile(place) and is_sidecar(os.path.basename(place))}
    if len(sidecars) == len(unique):
        sidecars.clear()  # it must have been meant
    units: Iterable[Unit]
    for number, (place, source) in enumerate(sorted(unique.items())):
        account = ReadAccount()
        rows = f"rows with the text column {content_column!r}"
        if place in sidecars:
            account.leave_out("sidecars", source, reason="it lies beside data and is none")
            planned.append(Source(name=source, expected=rows, units=[], account=account, is_sidecar=True))
            continue
        if os.path.isdir(place) and (files := saved_files(Path(place))) is not None:
            units = chain.from_iterable(_row_file_units(number, file, account) for file in files)
            expected = rows
        elif os.path.isfile(os.path.join(place, "dataset_dict.json")):
            splits = " or ".join(
                sorted(os.path.join(source, entry.name) for entry in os.scandir(place) if entry.is_dir())
            )
            raise UserError(f"{source} is a saved data set of several splits: name one, {splits}")
        elif os.path.isdir(place):
            units = _tree_units(number, Path(place), account, tuple(suffixes))
            expected = "/".join(f"*{suffix}" for suffix in suffixes)
        elif os.path.isfile(place) and file_format(os.path.basename(source)):
            units, expected = _row_file_units(number, Path(source), account), rows
        elif os.path.exists(place):
            raise UserError(f"{source} is neither a folder nor a row file ({', '.join(ROW_SUFFIXES)})")
        elif _names_dataset(source):
            units, expected = _dataset_units(number, source), rows
        else:
            raise UserError(f"source {source} does not exist{did_you_mean_path(source)}")
        planned.append(Source(name=source, expected=expected, units=list(units), account=account))
    return planned


def _names_dataset(source: str) -> bool:
    """A name without a split whose first part is a folder here is a path with a mistake, not worth asking the Hub."""
    if source.startswith((".", "~")) or "://" in source or not _DATASET_NAME.fullmatch(source):
        return False
    return ":" in source or not os.path.isdir(os.path.dirname(source))


def _tree_units(source: int, root: Path, account: ReadAccount, suffixes: tuple[str, ...]) -> Iterator[Unit]:
    """Files in name order, cut where ``UNIT_BYTES`` or ``UNIT_FILES`` are reached."""
    if str(root) == os.path.realpath(sysconfig.get_paths()["stdlib"]):
        # Debian ships the library without its licence, and a folder name such as "python3.11" tells a reader nothing.
        files = _walk(root, "python/cpython", "psf-2.0", account, suffixes)
    else:
        files = _walk(root, repository_name(root), detect_license(root), account, suffixes)
    group: list[TreeFile] = []
    size = 0
    for each in files:
        group.append(each)
        size += each.size_bytes
        if size >= UNIT_BYTES or len(group) == UNIT_FILES:
            yield Unit(source=source, kind="tree", name=str(root), files=tuple(group))
            group, size = [], 0
    if group:
        yield Unit(source=source, kind="tree", name=str(root), files=tuple(group))


@dataclass(frozen=True, kw_only=True)
class _Folder:
    """A folder of a tree on the way: what of it is left to look at, and what its files belong to."""

    entries: Iterator[os.DirEntry[str]]
    prefix: str
    """Of the paths of its files in their repository."""
    root: str
    """Of the repository: a link is followed no further."""
    repo_name: str
    license: str


def _walk(
    root: Path, repo_name: str, license: str, account: ReadAccount, suffixes: tuple[str, ...]
) -> Iterator[TreeFile]:
    """Walk in name order. A git checkout below the root is a repository of its own, with its own name and licence.

    A link is taken where it leads to a file of the same repository that is read as well, as one more copy of it. Any
    other is left out: whoever made the repository could put a reader's own files into the corpus by it. Folders are
    entered by their own names only.
    """
    way = list(_enter(str(root), "", str(root), repo_name, license, account))
    while way:
        folder = way[-1]
        entry = next(folder.entries, None)
        if entry is None:
            way.pop()
        elif entry.is_dir(follow_symlinks=False):
            if entry.name not in _SKIPPED_FOLDERS and not entry.name.startswith("."):
                prefix = f"{folder.prefix}{entry.name}/"
                way += _enter(
                    *(entry.path, prefix, folder.root, folder.repo_name, folder.license, account), may_be_checkout=True
                )
        elif entry.name.endswith(suffixes) or (entry.is_symlink() and os.path.isdir(entry.path)):
            try:
                file = os.path.realpath(entry.path) if entry.is_symlink() else entry.path
                if file != entry.path and not _is_read(file, folder.root, suffixes):
                    if not leads_below(file, folder.root) or entry.is_file():
                        account.leave_out("links_elsewhere", entry.path, reason="it leads to what is not read here")
                    continue
                if not entry.is_file():
                    continue
                status = entry.stat()
            except OSError as error:  # it went away meanwhile
                account.leave_out("unreadable", entry.path, reason=error.strerror or str(error))
                continue
            yield TreeFile(
                file=file,
                path=folder.prefix + entry.name,
                repo_name=folder.repo_name,
                license=folder.license,
                size_bytes=status.st_size,
                mtime_ns=status.st_mtime_ns,
            )


def _is_read(file: str, root: str, suffixes: tuple[str, ...]) -> bool:
    """Whether a walk from a repository's root comes to this file: not one in ``.git``, nor one of no such name."""
    if not leads_below(file, root) or not file.endswith(suffixes):
        return False
    *folders, _ = os.path.relpath(file, os.path.realpath(root)).split(os.sep)
    return not any(name in _SKIPPED_FOLDERS or name.startswith(".") for name in folders)


def _enter(
    folder: str,
    prefix: str,
    root: str,
    repo_name: str,
    license: str,
    account: ReadAccount,
    *,
    may_be_checkout: bool = False,
) -> list[_Folder]:
    """The folder, or nothing where it cannot be looked into."""
    try:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
        if may_be_checkout and any(entry.name == ".git" for entry in entries):
            prefix, root = "", folder
            repo_name, license = repository_name(Path(folder)), detect_license(Path(folder))
    except OSError as error:
        account.leave_out("unreadable", folder, reason=error.strerror or str(error))
        return []
    return [_Folder(entries=iter(entries), prefix=prefix, root=root, repo_name=repo_name, license=license)]


def row_files_in(folder: Path) -> list[Path]:
    """The row files in a folder that was named for a source tree."""
    layout = lay_out(folder, lambda name: name.endswith(ROW_SUFFIXES))
    return [path for paths in layout.splits.values() for path in paths]


def _row_file_units(source: int, path: Path, account: ReadAccount) -> Iterator[Unit]:
    status, shard = path.stat(), local_shard(path)
    state = (status.st_size, status.st_mtime_ns)
    if path.suffix == ".parquet":
        yield from _parquet_units(source, path, state, account)
    elif shard is not None and is_splittable(shard):
        for start in range(0, status.st_size, UNIT_BYTES):
            stop = min(start + UNIT_BYTES, status.st_size)
            yield Unit(source=source, kind="json", name=str(path), start=start, stop=stop, state=state)
    else:
        yield Unit(source=source, kind="json", name=str(path), state=state)


def _parquet_units(source: int, path: Path, state: tuple[Any, ...], account: ReadAccount) -> Iterator[Unit]:
    import pyarrow
    import pyarrow.parquet

    try:
        metadata = pyarrow.parquet.read_metadata(path)
    except (OSError, pyarrow.ArrowException) as error:
        # The directory of a Parquet file is its last part: of one that was cut off nothing can be read.
        account.damage(str(path), 0, str(error))
        return
    start = size = 0
    for group in range(metadata.num_row_groups):
        size += metadata.row_group(group).total_byte_size
        if size >= UNIT_BYTES or group + 1 == metadata.num_row_groups:
            yield Unit(source=source, kind="parquet", name=str(path), start=start, stop=group + 1, state=state)
            start, size = group + 1, 0


def _dataset_units(source: int, name: str) -> Iterator[Unit]:
    try:
        with first_look(name.partition(":")[0], "name a folder or a file"):
            dataset, state = open_dataset(name)
    except UserError:
        raise
    except Exception as error:  # the library raises many kinds: no such name, no such split, no network
        reason = f"source {name} is no path here, and no data set that can be opened: {first_line(error)}"
        raise UserError(reason) from error
    for shard in range(dataset.num_shards):
        yield Unit(source=source, kind="dataset", name=name, start=shard, stop=dataset.num_shards, state=tuple(state))
