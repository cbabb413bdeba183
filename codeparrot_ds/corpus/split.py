"""Holds out whole repositories, or the next finer groups where there are too few: files of one leak into each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import PurePosixPath

import numpy as np

from codeparrot_ds.corpus.filters import unit_interval
from codeparrot_ds.corpus.index import CorpusIndex, Documents
from codeparrot_ds.errors import UserError

MIN_REPOSITORIES_FOR_SPLIT = 20


def split_documents(
    index: CorpusIndex, documents: Documents, validation_fraction: float, seed: int
) -> tuple[dict[str, Documents], dict]:
    """Hold out whole groups of documents; return the splits and the rule for the card.

    Files of one repository share names, idioms and licence headers, so a split by file leaks into validation. The
    coarsest grouping wins that meets the asked fraction of bytes within a factor of two: two repositories of equal
    size must not cost half of the training data.
    """
    if len(documents) < 2:
        raise UserError(f"cleaning left {len(documents)} document(s); train and validation need at least one each")
    for group_by, names in _grouping_rules(index, documents):
        numbers: dict[str, int] = {}
        group = np.fromiter((numbers.setdefault(name, len(numbers)) for name in names()), np.int64, len(documents))
        sizes = np.bincount(group, weights=documents.size).astype(np.int64)
        held_out = _hold_out(list(numbers), sizes, validation_fraction * documents.num_bytes, seed)
        fraction = int(sizes[held_out].sum()) / documents.num_bytes
        rule = {
            "group_by": group_by,
            "groups": len(sizes),
            "groups_held_out": int(held_out.sum()),
            "validation_fraction": validation_fraction,
            "validation_fraction_of_bytes": round(fraction, 6),
        }
        if 0.5 <= fraction / validation_fraction <= 2:
            break
    mask = held_out[group]
    return {"train": documents.take(~mask), "validation": documents.take(mask)}, rule


def _grouping_rules(index: CorpusIndex, documents: Documents) -> Iterator[tuple[str, Callable[[], Iterable[str]]]]:
    """From coarse to fine, with the name of each document's group. The last always tells any two documents apart."""
    if len(np.unique(documents.repository)) >= MIN_REPOSITORIES_FOR_SPLIT:
        yield "repository", lambda: (index.repositories[number] for number in documents.repository.tolist())
    yield (
        "top-level folder or module",
        lambda: (f"{repository}/{_top_level(path.decode())}" for repository, path in index.places(documents)),
    )
    yield "document", documents.hashes


def _hold_out(names: list[str], sizes: np.ndarray, target_bytes: float, seed: int) -> np.ndarray:
    """Mask of the groups that are held out: at least one, and never all of many.

    Groups are taken in the order of their seeded hashes until the target is reached. One that would overshoot by more
    than a quarter is passed over; where every group does, the smallest is taken.
    """
    held_out = np.zeros(len(names), dtype=bool)
    held_bytes = 0
    order = sorted(range(len(names)), key=lambda number: (unit_interval(seed, "split", names[number]), names[number]))
    for number in order:
        if held_bytes >= target_bytes:
            break
        if held_bytes + sizes[number] <= 1.25 * target_bytes:
            held_out[number] = True
            held_bytes += int(sizes[number])
    if held_out.all():
        held_out[max(order, key=lambda number: (sizes[number], names[number]))] = False
    if not held_out.any():
        held_out[min(order, key=lambda number: (sizes[number], names[number]))] = True
    return held_out


def _top_level(path: str) -> str:
    """``asyncio`` for both ``asyncio/events.py`` and ``asyncio.py``; a lone ``src`` or ``lib`` folder says nothing."""
    parts = PurePosixPath(path).parts
    if len(parts) > 2 and parts[0] in ("src", "lib"):
        parts = parts[1:]
    return parts[0].partition(".")[0] or path
