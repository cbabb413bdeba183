"""The documents of a corpus as arrays: what deciding needs, and no text.

Memory: 46 bytes per document that was read, twice that while exact duplicates are sorted out, and about 200 bytes for
each document that has an exact duplicate while the one that stays is chosen.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from codeparrot_ds.corpus.units import LoadedUnit, load_unit, read_paths, read_texts


@dataclass(kw_only=True)
class Documents:
    """One element per document in each array."""

    unit: np.ndarray
    record: np.ndarray
    """Its number in the unit."""
    high: np.ndarray
    low: np.ndarray
    """The halves of the content hash, uint64."""
    size: np.ndarray
    """Bytes of UTF-8, int64."""
    copies: np.ndarray
    verdict: np.ndarray
    repository: np.ndarray
    license: np.ndarray
    encoding: np.ndarray

    def __len__(self) -> int:
        return len(self.unit)

    def take(self, chosen: np.ndarray) -> Documents:
        """Those of a mask or of numbers."""
        return Documents(**{item.name: getattr(self, item.name)[chosen] for item in fields(self)})

    def hashes(self) -> Iterator[str]:
        """The content hash of each, one at a time: a list of texts would be larger than all arrays."""
        return (f"{int(high):016x}{int(low):016x}" for high, low in zip(self.high, self.low, strict=True))

    @property
    def num_bytes(self) -> int:
        return int(self.size.sum())


@dataclass(kw_only=True)
class CorpusIndex:
    """All documents of all units, and the names that their numbers stand for."""

    documents: Documents
    folders: list
    row_bases: list[int]
    repositories: list[str]
    licenses: list[str]
    encodings: list[str]

    def places(self, documents: Documents) -> list[tuple[str, bytes]]:
        """Repository and path of each."""
        found: list[tuple[str, bytes]] = [("", b"")] * len(documents)
        for unit, chosen in group_by(documents.unit):
            index = load_unit(self.folders[unit], mapped=True).index[documents.record[chosen]]
            paths = read_paths(self.folders[unit], index, self.row_bases[unit])
            for place, path in zip(chosen.tolist(), paths, strict=True):
                found[place] = (self.repositories[documents.repository[place]], path)
        return found

    def text(self, documents: Documents, number: int) -> bytes:
        folder = self.folders[documents.unit[number]]
        record = documents.record[number]
        return next(read_texts(folder, _mapped_index(folder)[record : record + 1]))


@functools.lru_cache(maxsize=64)
def _mapped_index(folder: Path) -> np.ndarray:
    """A unit's records. Each text of a group of equal ones at one place is looked up by itself."""
    return load_unit(folder, mapped=True).index


def group_by(values: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """Each distinct value, rising, with the positions that hold it, rising: one sort however many values there are."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1])) if len(order) else order
    # Not strict: NumPy splits an empty array into one empty part.
    return [(int(ordered[start]), part) for start, part in zip(starts, np.split(order, starts[1:]), strict=False)]


def index_units(units: Sequence[LoadedUnit], row_bases: Sequence[int]) -> CorpusIndex:
    """Gather units that were loaded, in this order."""
    repositories: dict[str, int] = {}
    licenses: dict[str, int] = {}
    encodings: dict[str, int] = {}
    columns: dict[str, list[np.ndarray]] = {item.name: [] for item in fields(Documents)}
    for number, unit in enumerate(units):
        count = len(unit.index)
        columns["unit"].append(np.full(count, number, dtype=np.int32))
        columns["record"].append(np.arange(count, dtype=np.uint32))
        for name, kind in (("high", np.uint64), ("low", np.uint64), ("size", np.int64), ("copies", np.int64)):
            columns[name].append(unit.index[name].astype(kind))
        columns["verdict"].append(unit.index["verdict"].copy())
        for name, names, table in (
            ("repository", unit.repositories, repositories),
            ("license", unit.licenses, licenses),
            ("encoding", unit.encodings, encodings),
        ):
            numbers = np.array([table.setdefault(each, len(table)) for each in names], dtype=np.uint32)
            columns[name].append(numbers[unit.index[name]] if count else np.zeros(0, np.uint32))
    return CorpusIndex(
        documents=Documents(**{name: np.concatenate(parts) for name, parts in columns.items()}),
        folders=[unit.folder for unit in units],
        row_bases=list(row_bases),
        repositories=list(repositories),
        licenses=list(licenses),
        encodings=list(encodings),
    )


def drop_exact_duplicates(index: CorpusIndex) -> Documents:
    """The documents with unlike hashes, in the order of their hashes, each with the copies of all its like.

    Of equal texts the one that is first by repository and path stays, so the order of the sources does not show.
    """
    documents = index.documents
    order = np.lexsort((documents.low, documents.high))
    high, low = documents.high[order], documents.low[order]
    first = np.append(True, (high[1:] != high[:-1]) | (low[1:] != low[:-1])) if len(order) else np.zeros(0, bool)
    starts = np.flatnonzero(first)
    if not len(starts):
        return documents
    copies = np.add.reduceat(documents.copies[order], starts)
    chosen = order[starts]
    _choose_first_places(index, order, starts, chosen)
    kept = documents.take(chosen)
    kept.copies = copies
    return kept


def _choose_first_places(index: CorpusIndex, order: np.ndarray, starts: np.ndarray, chosen: np.ndarray) -> None:
    """Set ``chosen`` to the first by place, then by text, of each group of equal hashes."""
    ends = np.append(starts[1:], len(order))
    groups = np.flatnonzero(ends - starts > 1)
    if not len(groups):
        return
    members = np.concatenate([order[starts[group] : ends[group]] for group in groups])
    documents = index.documents.take(members)
    places = index.places(documents)
    position = 0
    for group in groups.tolist():
        numbers = range(position, position := position + int(ends[group] - starts[group]))
        place = min(places[number] for number in numbers)
        same = [number for number in numbers if places[number] == place]
        if len(same) > 1:
            same.sort(key=lambda number: index.text(documents, number))
        chosen[group] = members[same[0]]
