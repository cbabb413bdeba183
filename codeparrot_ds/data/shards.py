"""Shards of documents: found by the names of their splits, read one document at a time from any position of any piece.

A row of a shard is a JSON object, or a row of a table, with the text of one document in ``content`` or where published
data sets have it (``layouts``). How files are read, and what a piece and a position are, says ``codeparrot_ds.rows``.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from codeparrot_ds.errors import UserError
from codeparrot_ds.layouts import CARD, Layout, columns_of_text, is_sidecar, lay_out, named_split, no_text
from codeparrot_ds.paths import did_you_mean_path, exists, may_be_on_hub
from codeparrot_ds.rows.files import FORMATS, TABLES, Shard, file_format, local_shard, open_shard, saved_files
from codeparrot_ds.rows.reading import BLANK, START, BadRow, Piece, Position, document_of, read_rows, row_number


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


def find_shards(
    data: str | Path, split: str, *, named: bool = False, by_names: bool = True, text_column: str = ""
) -> list[Shard]:
    """The shards of a split, sorted by name. Raises a UserError when there is nothing to read.

    ``data`` is a folder whose names tell splits apart (``layouts``) or do not (then all is ``train``), one shard (which
    is the split, whatever its name is), or the name of a Hub dataset (``org/name``, with ``:config`` and ``@revision``
    where wanted).

    Args:
        data: what to read.
        split: one of ``layouts.SPLITS``.
        named: it was named for this split: see ``layouts.named_split``.
        by_names: False for what a run of version 0.1 found, to resume it: all of a folder that has none per split.
        text_column: see ``Shard``.
    """
    folder = Path(data)
    if not exists(folder):
        if may_be_on_hub(str(data)):
            on_hub = _hub_shards(str(data), split, named)
            return [dataclasses.replace(shard, text_column=text_column) for shard in on_hub]
        hint = did_you_mean_path(data, "make a corpus with `codeparrot-ds corpus SRC --out DIR`")
        raise UserError(f"the data {data} does not exist{hint}")
    if not folder.is_dir():
        return [_only_shard(folder, text_column)]
    found = _split_of_folder(folder, split, named) if by_names else _whole_folder(folder, split)
    shards = [_shard(path, name=name, text_column=text_column) for path, name in found]
    if not any(shard.bytes for shard in shards):
        raise UserError(f"Every shard in {_split_folder(folder, split)} is empty; build the corpus again.")
    return shards


def layout_of(folder: Path) -> Layout:
    """Which shards of a folder are of which split; of a saved data set only the files that it names are."""
    layout = lay_out(folder, lambda name: file_format(name) is not None)
    paths = [path for paths in layout.splits.values() for path in paths]
    saved = {parent: saved_files(parent) for parent in {folder, *(path.parent for path in paths)}}
    cached = {path for path in paths if (named := saved[path.parent]) is not None and path not in named}
    if not cached:
        return layout
    splits = {split: [path for path in paths if path not in cached] for split, paths in layout.splits.items()}
    return dataclasses.replace(layout, splits=splits, left_out=sorted([*layout.left_out, *cached]))


def _split_of_folder(folder: Path, split: str, named: bool) -> list[tuple[Path, str]]:
    layout = layout_of(folder)
    chosen = named_split(split, layout.splits, named=named)
    if chosen is not None:
        return list(zip(layout.splits[chosen], layout.names(chosen), strict=True))
    if not layout.splits:
        raise _no_shards(folder, split)
    if not layout.told_apart:
        count = len(layout.splits["train"])
        raise UserError(
            f"The corpus folder {folder} has no split {split!r}: no name tells any of its {count:,} shard(s) from the "
            "others, and all are to train on."
        )
    raise UserError(f"The corpus folder {folder} has no split {split!r}; it has {', '.join(layout.splits)}.")


def _whole_folder(folder: Path, split: str) -> list[tuple[Path, str]]:
    root = _split_folder(folder, split)
    paths = [path for path in sorted(root.iterdir()) if path.name != CARD and path.is_file()]
    paths = [path for path in paths if file_format(path.name) not in (None, "arrow")]  # it knew no Arrow
    if not paths:
        raise _no_shards(folder, split)
    return [(path, path.name) for path in paths]


def _split_folder(folder: Path, split: str) -> Path:
    return folder / split if (folder / split).is_dir() else folder


def _no_shards(folder: Path, split: str) -> UserError:
    if (folder / split).is_dir():
        return UserError(f"{folder / split} has no shards; a shard's name ends in one of {', '.join(FORMATS)}.")
    neighbours = sorted(path.name for path in folder.glob("*/") if path.name[0] != ".")
    hint = f"it has {', '.join(neighbours)}" if neighbours else "make one with `codeparrot-ds corpus SRC --out DIR`"
    return UserError(f"The corpus folder {folder} has no split {split!r}; {hint}.")


def _shard(path: Path, *, name: str | None = None, text_column: str) -> Shard:
    shard = local_shard(path)
    assert shard is not None  # its name has the ending of a format
    return dataclasses.replace(shard, name=name or shard.name, text_column=text_column)


def _only_shard(path: Path, text_column: str) -> Shard:
    if is_sidecar(path.name) or not file_format(path.name):
        raise UserError(
            f"the data {path} is a file of a kind that is not read: the name of a shard ends in one of "
            f"{', '.join(FORMATS)}, and each of its rows has a `content` column"
        )
    shard = _shard(path, text_column=text_column)
    if not shard.bytes:
        raise UserError(f"the shard {path} is empty")
    return shard


def _hub_shards(name: str, split: str, named: bool) -> list[Shard]:
    from codeparrot_ds.data.hub_dataset import resolve_hub_dataset

    return [
        Shard(
            path=f"hf://datasets/{file.repo}@{file.commit[:12]}/{file.path}",
            name=file.path,
            format=str(file_format(file.path)),
            bytes=file.bytes,
            remote=file,
        )
        for file in resolve_hub_dataset(name, split, named=named)
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
    a UserError when the system refuses to read, a table has no column of texts, or ``bad`` is over its limit.
    """
    shard = piece.shard
    if shard.bytes == 0:
        bad.add(BadDocument(str(shard.path), 0, "the shard is empty"))
        return
    as_before, columns = shard.as_before, f"content={shard.text_column}" if shard.text_column else ""
    try:
        for row, after in read_rows(piece, position, lambda names: columns_of_text(names, columns)):
            if row is BLANK:
                continue
            try:
                text = document_of(row, columns, as_before=as_before)
            except BadRow as error:
                if shard.format in TABLES and isinstance(row, dict) and not columns_of_text(tuple(row), columns):
                    raise UserError(f"{shard.path} has {no_text(tuple(row), columns)}") from None
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
