"""Near duplicates: MinHash sketches, candidates by locality-sensitive hashing, each verified by exact Jaccard.

The measure is CodeParrot's: the Jaccard similarity of two documents' sets of tokens, split at what is no ASCII letter,
digit or underscore; documents of fewer than 10 tokens are left alone; 256 permutations, threshold 0.85. Documents are
visited in a fixed order and one is removed where an earlier one *that stays* is similar enough, so every removed
document has its like in the corpus and nothing disappears through a chain A~B~C with A and C unlike.

The sketches are rensa's (Rust): it takes whole batches with hashed tokens through the buffer protocol, and its
signatures agree as often as the sets (bias under 0.003, standard deviation at or below that of 256 permutations,
measured on sets of 12 to 2000 tokens at Jaccard 0.5 to 0.9). datasketch, the older library, is a pure Python class per
document: with 256 permutations it sketches 19 MB/s of Python code on a core, where rensa takes 3 GB/s and splitting
into tokens becomes the cost; it would bring SciPy along. Both are deterministic and have releases of 2026 with wheels
for Python 3.10 and newer; rensa's has one author and changed its signatures in 0.5, so a sketch on disk is keyed by
the version and never outlives a build. Its ``RMinHashLSH`` is not used: it holds every document in memory, and does
not verify by the sets.

Memory: one band at a time, 24 bytes per document that is compared; then 16 bytes for each time that a document shares a
band's bucket with another (512 at most, were every document to share all 32), the buckets' lists of kept ones, and of
those in crowded buckets some 100 bytes per token of a seventh of their tokens.
Signatures and token hashes stay on disk: per document, 512 bytes and 8 per distinct token.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

NUM_PERMUTATIONS = 256
THRESHOLD = 0.85
MIN_TOKENS = 10
MIN_RECALL = 0.9995
"""Of pairs exactly at the threshold, so many at least become candidates."""

CROWDED_BUCKET = 64
"""Documents in a bucket from which on its members are compared by their rare tokens (``_Crowd``)."""
_SEED = 1
_SKETCH_BATCH = 256
_OPEN_PARTS = 128
_COUNTERS = 1 << 22
_SEPARATORS = bytes(
    byte if byte < 128 and (chr(byte).isalnum() or byte == ord("_")) else ord(" ") for byte in range(256)
)
# An odd multiplier mixes a band's values into one key; two unlike bands with one key only cost a verification.
_MIX = np.uint64(0x9E3779B97F4A7C15)


def tokens(data: bytes) -> list[bytes]:
    """The tokens of a UTF-8 text, as CodeParrot splits it."""
    return data.translate(_SEPARATORS).split()


def token_hashes(texts: Iterable[bytes]) -> list[np.ndarray]:
    """A sorted array of 64-bit hashes for each text's set of tokens; an empty one where it has too few to compare.

    Two tokens of a pair of documents with one hash are one chance in 10^13: the Jaccard of the hashes is the tokens'.
    """
    from rensa import RMinHash

    sets = [list(set(found)) if len(found := tokens(text)) >= MIN_TOKENS else [] for text in texts]
    return [np.unique(np.array(hashes, dtype=np.uint64)) for hashes in RMinHash.hash_token_sets(sets)]


def jaccard(first: np.ndarray, second: np.ndarray) -> float:
    """Of two sorted arrays without repetitions."""
    if not len(first) or not len(second):
        return 0.0
    both = np.concatenate([first, second])
    both.sort(kind="stable")  # merges two sorted runs
    shared = int(np.count_nonzero(both[1:] == both[:-1]))
    return shared / (len(both) - shared)


@functools.cache
def rows_per_band(threshold: float) -> int:
    """The longest bands that still find pairs at the threshold: longer bands mean fewer pairs to verify in vain.

    A pair with similarity s agrees in all r rows of one of b bands with probability 1 - (1 - s^r)^b.
    """
    for rows in range(NUM_PERMUTATIONS, 1, -1):
        if 1 - (1 - threshold**rows) ** (NUM_PERMUTATIONS // rows) >= MIN_RECALL:
            return rows
    return 1


def num_bands(threshold: float) -> int:
    return NUM_PERMUTATIONS // rows_per_band(threshold)


@dataclass(frozen=True, kw_only=True)
class Sketch:
    """Of n documents. A document that is not compared has no tokens; its other rows mean nothing."""

    bands: np.ndarray
    """(bands, n) keys, uint64: documents with one key in a band are candidates."""
    signatures: np.ndarray
    """(n, permutations), the low byte of each value: enough to estimate, a quarter of the size."""
    tokens: np.ndarray
    """Sorted hashes of the first document's tokens, then the second's …, uint64."""
    ends: np.ndarray
    """(n,) where each document's tokens end, int64."""

    FILES = ("bands", "signatures", "tokens", "ends")

    def save(self, folder: Path) -> None:
        for name in self.FILES:
            np.save(folder / f"{name}.npy", getattr(self, name))

    @classmethod
    def load(cls, folder: Path) -> Sketch:
        """Mapped into memory, not read."""
        return cls(**{name: _map(folder / f"{name}.npy") for name in cls.FILES})


def _map(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="r").view(np.ndarray)  # a memmap's own indexing is ten times as slow


def sketch(texts: Iterable[bytes], threshold: float = THRESHOLD) -> Sketch:
    """The sketch of all texts; only its arrays grow with their number."""
    from rensa import RMinHash

    rows, bands = rows_per_band(threshold), num_bands(threshold)
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []
    for batch in _batches(texts):
        sets = token_hashes(batch)
        counts = np.array([len(each) for each in sets], dtype=np.int64)
        flat = np.concatenate(sets)
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.uint64)
        matrix = RMinHash.digest_matrix_from_flat_token_hashes(flat, offsets, NUM_PERMUTATIONS, _SEED)
        values = np.array(matrix.to_rows(), dtype=np.uint64).reshape(len(sets), NUM_PERMUTATIONS)
        keys = np.zeros((bands, len(sets)), dtype=np.uint64)
        for row in range(rows):
            keys = (keys ^ values[:, row : rows * bands : rows].T) * _MIX
            keys ^= keys >> np.uint64(29)
        parts.append((keys, values.astype(np.uint8), flat, counts))
    if not parts:
        parts.append(
            (np.zeros((bands, 0), np.uint64), np.zeros((0, 256), np.uint8), np.zeros(0, np.uint64), np.zeros(0))
        )
    keys_, signatures, flats, counts_ = zip(*parts, strict=True)
    return Sketch(
        bands=np.concatenate(keys_, axis=1),
        signatures=np.concatenate(signatures),
        tokens=np.concatenate(flats),
        ends=np.cumsum(np.concatenate(counts_), dtype=np.int64),
    )


def _batches(texts: Iterable[bytes]) -> Iterable[list[bytes]]:
    batch: list[bytes] = []
    for text in texts:
        batch.append(text)
        if len(batch) == _SKETCH_BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


class _Documents:
    """Documents of several sketches under one number each: their place in the order of visiting.

    Sketches are folders; few are open at a time, because each mapped file holds a file descriptor.
    """

    def __init__(self, folders: Sequence[Path], order: np.ndarray) -> None:
        self._folders = folders
        self._open = functools.lru_cache(maxsize=_OPEN_PARTS)(lambda part: Sketch.load(folders[part]))
        sizes = [_map(folder / "ends.npy").shape[0] for folder in folders]
        starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self._order = order
        self._part = np.searchsorted(starts, order, side="right").astype(np.int32) - 1
        self._row = (order - starts[self._part]).astype(np.uint32)
        self.num_tokens = self._gather(lambda folder: np.diff(np.load(folder / "ends.npy"), prepend=0))[order]
        self.num_tokens = self.num_tokens.astype(np.uint32)

    def _gather(self, read: Callable[[Path], np.ndarray]) -> np.ndarray:
        return np.concatenate([read(folder) for folder in self._folders])

    def band_keys(self, band: int) -> np.ndarray:
        """Of all documents, by number."""
        return self._gather(lambda folder: np.array(_map(folder / "bands.npy")[band]))[self._order]

    def signature(self, number: int) -> np.ndarray:
        return self._open(self._part[number]).signatures[self._row[number]]

    def tokens(self, number: int) -> np.ndarray:
        opened, row = self._open(self._part[number]), self._row[number]
        return opened.tokens[opened.ends[row - 1] if row else 0 : opened.ends[row]]


def find_near_duplicates(
    folders: Sequence[Path],
    order: np.ndarray,
    *,
    threshold: float = THRESHOLD,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> np.ndarray:
    """For each document the one that stays in its place, or -1 where it stays itself.

    Args:
        folders: Sketches, saved with the same threshold; documents are numbered through all of them.
        order: Numbers of all documents in the order of visiting: the earlier of two alike stays.
        threshold: Documents at least this similar to one that stays are removed.
    """
    witness = np.full(len(order), -1, dtype=np.int64)
    if not len(order):
        return witness
    documents = _Documents(folders, order)
    numbers, buckets = _shared_buckets(documents, num_bands(threshold))
    crowded = np.bincount(buckets) > CROWDED_BUCKET
    crowd = _Crowd(documents, np.unique(numbers[crowded[buckets]]), threshold)
    # Of each bucket, those that stay in no crowd and in one: of a crowd two find each other by their tokens.
    alone_in: dict[int, list[int]] = {}
    crowd_in: dict[int, list[int]] = {}
    bounds = np.flatnonzero(np.diff(numbers, prepend=-1, append=-1))
    for done, (start, stop) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True), start=1):
        number, own = int(numbers[start]), buckets[start:stop]
        in_crowd = bool(crowded[own].any())
        prefix = crowd.prefix(number) if in_crowd else []
        candidates = crowd.candidates(prefix)
        few = own[~crowded[own]].tolist()
        for lists in (alone_in,) if in_crowd else (alone_in, crowd_in):
            candidates.update(other for bucket in few for other in lists.get(bucket, ()))
        similar = _first_similar(documents, number, sorted(candidates), threshold) if candidates else -1
        if similar >= 0:
            witness[order[number]] = order[similar]
        else:
            crowd.keep(number, prefix)
            for bucket in few:
                (crowd_in if in_crowd else alone_in).setdefault(bucket, []).append(number)
        progress(done, len(bounds) - 1)
    return witness


class _Crowd:
    """The kept documents of crowded buckets, found by their rare tokens.

    Small files with one licence or one template, each a little different, meet in the same buckets by thousands, and to
    compare all of them takes the square of their number. In any one order of all tokens, a set's prefix is its first
    n - ceil(t n) + 1. Two sets of n and m with a Jaccard of at least t have a = ceil(t (n + m) / (1 + t)) in common; so
    their prefixes, of p and q tokens, have at least min(p - n, q - m) + a in common, and behind the first that they
    share there are still enough (prefix filters: PPJoin, Xiao et al. 2008; AdaptJoin, Wang et al. 2012). With rare
    tokens first, that is not what everybody has.
    """

    def __init__(self, documents: _Documents, members: np.ndarray, threshold: float) -> None:
        self._documents, self._threshold = documents, threshold
        # By token, then by the size of a document and how many of its tokens come behind this one.
        self._kept: dict[int, dict[tuple[int, int], list[int]]] = {}
        # Counts of hashes that share a place add up, which makes another order, as good as any for being right.
        self._counts = np.zeros(_COUNTERS if len(members) else 0, dtype=np.uint32)
        for number in members.tolist():
            self._counts[self._places(documents.tokens(number))] += 1

    @staticmethod
    def _places(tokens: np.ndarray) -> np.ndarray:
        return (tokens & np.uint64(_COUNTERS - 1)).astype(np.int64)

    def prefix(self, number: int) -> list[tuple[int, int]]:
        """The prefix of a document's tokens, each with the number of those behind it."""
        tokens = np.array(self._documents.tokens(number))
        order = np.argsort(self._counts[self._places(tokens)], kind="stable")  # equal counts: by hash, as they lie
        size = int(_prefix_size(len(tokens), self._threshold))
        return list(zip(tokens[order[:size]].tolist(), range(len(tokens) - 1, -1, -1), strict=False))

    def candidates(self, prefix: Sequence[tuple[int, int]]) -> set[int]:
        """The kept documents that can be similar enough to the one of this prefix."""
        shared: Counter[int] = Counter()
        passed_over = 0  # tokens that many have, and behind which nobody has enough: not counted, so as good as shared
        size = prefix[0][1] + 1 if prefix else 0
        for token, behind in prefix:
            groups = self._kept.get(token, {})
            few = sum(map(len, groups.values())) <= 256 + 4 * len(shared)
            if few or any(
                1 + min(behind, other_behind) >= _least_common(size, other_size, self._threshold)
                for other_size, other_behind in groups
            ):
                for numbers in groups.values():
                    shared.update(numbers)
            else:
                passed_over += 1
        if not shared:
            return set()
        others = np.fromiter(shared, np.int64, len(shared))
        sizes = self._documents.num_tokens[others].astype(np.int64)
        counts = np.fromiter(shared.values(), np.int64, len(shared)) + passed_over
        spare = np.minimum(len(prefix) - size, _prefix_size(sizes, self._threshold) - sizes)
        return set(others[counts >= spare + _least_common(size, sizes, self._threshold)].tolist())

    def keep(self, number: int, prefix: Sequence[tuple[int, int]]) -> None:
        for token, behind in prefix:
            self._kept.setdefault(token, {}).setdefault((prefix[0][1] + 1, behind), []).append(number)


# Of one number or an array; a rounding error must cost no pair.
def _prefix_size(size: Any, threshold: float) -> Any:
    return size + (1e-9 - threshold * size) // 1 + 1


def _least_common(size: int, other: Any, threshold: float) -> Any:
    return -((1e-9 - threshold / (1 + threshold) * (size + other)) // 1)


def _shared_buckets(documents: _Documents, bands: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (document, bucket), sorted by document, of all buckets that hold more than one document."""
    comparable = np.flatnonzero(documents.num_tokens)
    if not len(comparable):
        return np.zeros(0, np.int64), np.zeros(0, np.uint32)
    all_numbers, all_buckets = [], []
    num_buckets = 0
    for band in range(bands):
        keys = documents.band_keys(band)[comparable]
        by_key = np.argsort(keys, kind="stable")
        keys = keys[by_key]
        same_as_previous = np.concatenate([[False], keys[1:] == keys[:-1]])
        shared = same_as_previous | np.append(same_as_previous[1:], False)
        bucket = np.cumsum(~same_as_previous[shared]) + num_buckets
        num_buckets = int(bucket[-1]) if len(bucket) else num_buckets
        all_numbers.append(comparable[by_key[shared]].astype(np.uint32))
        all_buckets.append(bucket.astype(np.uint32))
    numbers, buckets = np.concatenate(all_numbers), np.concatenate(all_buckets)
    by_number = np.argsort(numbers, kind="stable")
    return numbers[by_number].astype(np.int64), buckets[by_number]


def _first_similar(documents: _Documents, number: int, candidates: Sequence[int], threshold: float) -> int:
    """The candidate that agrees most by its signature and is similar enough by its tokens, or -1."""
    others = np.array(candidates)
    # A set cannot be more similar to another than their sizes are.
    sizes, own_size = documents.num_tokens[others], documents.num_tokens[number]
    others = others[np.minimum(sizes, own_size) >= threshold * np.maximum(sizes, own_size)]
    if not len(others):
        return -1
    signatures = np.stack([documents.signature(other) for other in others])
    agreement = np.count_nonzero(signatures == documents.signature(number), axis=1) / NUM_PERMUTATIONS
    # Five standard deviations below the threshold: one similar pair in millions is missed for it.
    least = threshold - 5 * np.sqrt(threshold * (1 - threshold) / NUM_PERMUTATIONS)
    own_tokens = np.array(documents.tokens(number))
    for place in np.argsort(-agreement, kind="stable"):
        if agreement[place] < least:
            return -1
        if jaccard(own_tokens, documents.tokens(int(others[place]))) >= threshold:
            return int(others[place])
    return -1
