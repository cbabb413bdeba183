"""Shards of documents: found by the names of their splits, read one document at a time from any position of any piece.

A row of a shard is a JSON object, or a row of a table, whose ``content`` is the text of one document. How files are
read, and what a piece and a position are, says ``codeparrot_ds.rows``.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from codeparrot_ds.errors import UserError
from codeparrot_ds.paths import did_you_mean_path, exists, may_be_on_hub
from codeparrot_ds.rows.files import FORMATS, TABLES, Shard, file_format, local_shard, open_shard, saved_files
from codeparrot_ds.rows.reading import BLANK, START, BadRow, Piece, Position, read_rows, row_number, text_of


class BadDocument(NamedTuple):
    """Where a document was lost, and why."""

    path: str
    line: int
    """1-based line (parquet: row); 0 for the shard as a whole."""
    reason: str

    def __str__(self) -> str:
        return f"{self.path}, line {self.line}: {self.reason}" if self.line else f"{self.path}: {self.reason}"


class BadDocuments:
    """Counts the documents that could not be read, each once however often its shard is read.

    Raises a UserError when there are more than ``limit`` (None: never).
    """

    def __init__(self, limit: int | None = 100) -> None:
        self.limit = limit
        self._found: dict[tuple[str, int], BadDocument] = {}
        self._reported = 0

    def __len__(self) -> int:
        return len(self._found)

    def __iter__(self) -> Iterator[BadDocument]:
        return iter(self._found.values())

    def add(self, document: BadDocument) -> None:
        self._found.setdefault(document[:2], document)
        if self.limit is not None and len(self) > self.limit:
            raise UserError(
                f"{len(self)} documents cannot be read, which is more than max_bad_documents={self.limit}; "
                f"the first is {next(iter(self))}, the last is {document}."
            )

    def take_new(self) -> list[BadDocument]:
        """The bad documents found since the last call."""
        new = list(self)[self._reported :] if len(self) > self._reported else []
        self._reported = len(self)
        return new


# --------------------------------------------------------------------------------------------------------------------
# Finding shards


def find_shards(data: str | Path, split: str) -> list[Shard]:
    """The shards of a split, sorted by name. Raises a UserError when there is nothing to read.

    ``data`` is a folder with one folder per split, a folder of shards or one shard (which then are the split, whatever
    its name is), or the name of a Hub dataset (``org/name``, with ``:config`` and ``@revision`` where wanted).
    """
    folder = Path(data)
    if not exists(folder):
        if may_be_on_hub(str(data)):
            return _hub_shards(str(data), split)
        hint = did_you_mean_path(data, "make a corpus with `codeparrot-ds corpus SRC --out DIR`")
        raise UserError(f"the data {data} does not exist{hint}")
    if not folder.is_dir():
        return [_only_shard(folder)]
    root = folder / split
    if not root.is_dir() and _shards_in(folder):
        root = folder
    if not root.is_dir():
        neighbours = sorted(path.name for path in folder.glob("*/"))
        hint = f"it has {', '.join(neighbours)}" if neighbours else "make one with `codeparrot-ds corpus SRC --out DIR`"
        raise UserError(f"The corpus folder {folder} has no split {split!r}; {hint}.")
    shards = _shards_in(root)
    if not shards:
        raise UserError(f"{root} has no shards; a shard's name ends in one of {', '.join(FORMATS)}.")
    if not any(shard.bytes for shard in shards):
        raise UserError(f"Every shard in {root} is empty; build the corpus again.")
    return shards


def _shards_in(folder: Path) -> list[Shard]:
    saved = saved_files(folder)
    # A corpus folder holds its card, corpus.json, beside the splits.
    paths = [path for path in sorted(folder.iterdir()) if path.name != "corpus.json"] if saved is None else saved
    shards = [local_shard(path) for path in paths if file_format(path.name) and path.is_file()]
    return [shard for shard in shards if shard is not None]


def _only_shard(path: Path) -> Shard:
    shard = local_shard(path)
    if shard is None:
        raise UserError(
            f"the data {path} is a file of a kind that is not read: the name of a shard ends in one of "
            f"{', '.join(FORMATS)}, and each of its rows has a `content` column"
        )
    if not shard.bytes:
        raise UserError(f"the shard {path} is empty")
    return shard


def _hub_shards(name: str, split: str) -> list[Shard]:
    from codeparrot_ds.data.hub_dataset import resolve_hub_dataset

    return [
        Shard(
            path=f"hf://datasets/{file.repo}@{file.commit[:12]}/{file.path}",
            name=file.path,
            format=str(file_format(file.path)),
            bytes=file.bytes,
            remote=file,
        )
        for file in resolve_hub_dataset(name, split)
    ]


def in_version_1(shards: Iterable[Shard]) -> list[Shard]:
    """The same shards, read as a run that began with ``order_version`` 1 has read them."""
    return [dataclasses.replace(shard, is_values=False, as_before=True) for shard in shards]


_SAMPLES, _SAMPLE_BYTES = 16, 4096


def content_id(shard: Shard) -> str:
    """Identifies a shard's bytes without reading them all: a hash of 16 blocks of 4 KiB spread evenly over the file.

    An edit that moves text changes it; one of equal length between two blocks does not. On the Hub, the file's own id.
    """
    if shard.remote is not None:
        return str(shard.remote.content_id)
    digest = hashlib.blake2b(digest_size=16)
    with open_shard(shard) as file:
        last = max(0, shard.bytes - _SAMPLE_BYTES)
        for offset in sorted({last * sample // (_SAMPLES - 1) for sample in range(_SAMPLES)}):
            digest.update(file.read_at(offset, _SAMPLE_BYTES))
    return digest.hexdigest()


# --------------------------------------------------------------------------------------------------------------------
# Documents


def read_documents(piece: Piece, position: Position = START, *, bad: BadDocuments) -> Iterator[tuple[str, Position]]:
    """The documents of ``piece`` from ``position`` on, each with the position after it.

    A bad document is skipped and counted in ``bad``; a damaged or missing file costs what cannot be read of it. Raises
    a UserError when the system refuses to read, a table has no ``content``, or ``bad`` is over its limit.
    """
    shard = piece.shard
    if shard.bytes == 0:
        bad.add(BadDocument(str(shard.path), 0, "the shard is empty"))
        return
    as_before = shard.as_before
    try:
        for row, after in read_rows(piece, position, ("content",)):
            if row is BLANK:
                continue
            try:
                text = text_of(row, as_before=as_before)
            except BadRow as error:
                if shard.format in TABLES and isinstance(row, dict) and "content" not in row:
                    raise UserError(f"{shard.path} has no column `content`; it has {', '.join(row)}.") from None
                # Of damage the position is the last before it.
                number = row_number(piece, after) + (error.kind == "damaged")
                bad.add(BadDocument(str(shard.path), number, error.reason))
                continue
            yield text, after
    except FileNotFoundError:
        bad.add(BadDocument(str(shard.path), 0, "the shard is gone"))


def read_texts(shards: Iterable[Shard], bad: BadDocuments) -> Iterator[str]:
    """The documents of some shards, one after the other."""
    for shard in shards:
        for text, _ in read_documents(Piece(shard, 0, shard.bytes), bad=bad):
            yield text
