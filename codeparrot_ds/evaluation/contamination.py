"""Which problems a model may have read before: n-grams of their solutions that occur in the training corpus."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import numpy as np

from codeparrot_ds.data.shards import BadDocuments, Piece, Shard, read_documents
from codeparrot_ds.errors import UserError
from codeparrot_ds.problem_sets.problem import Problem
from codeparrot_ds.terminal import Progress

NGRAM_TOKENS = 10
THRESHOLD = 0.5
# Names and numbers whole, signs one by one; space, which formatters change, is no token.
_TOKEN = re.compile(rb"[A-Za-z0-9_\x80-\xff]+|[^\sA-Za-z0-9_\x80-\xff]")
_MIX = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, kw_only=True)
class Contamination:
    """What the corpus holds of one problem's solution."""

    task_id: str
    num_ngrams: int
    """Different ones of the solution; 0 where it is too short to have one, and nothing can be said."""
    share: float
    """Of them that occur in the one document that holds the most."""
    document: str
    """That document's shard and number in it, from 1; empty where no document holds any."""

    @property
    def found(self) -> str:
        return f"{self.share:.0%} of its {self.num_ngrams} n-grams in {self.document}"


def tokens(text: bytes) -> list[bytes]:
    """Splits source into names, numbers and signs."""
    return _TOKEN.findall(text)


def find_contamination(
    problems: Sequence[Problem],
    shards: Sequence[Shard],
    *,
    ngram_tokens: int = NGRAM_TOKENS,
    num_workers: int = 1,
    progress: Progress = lambda *_: None,
) -> list[Contamination]:
    """Returns for each problem what one document of the shards holds of its solution; reads each shard once.

    Args:
        ngram_tokens: tokens of an n-gram.
        num_workers: processes; a shard is read by one.
    """
    if ngram_tokens < 1:
        raise UserError(f"n-grams have at least 1 token, not {ngram_tokens}")
    solutions = {problem.task_id: problem.solution for problem in problems if problem.solution is not None}
    if len(solutions) < len(problems):
        first = next(problem.task_id for problem in problems if problem.solution is None)
        count = len(problems) - len(solutions)
        raise UserError(f"{count} problems, {first} the first, have no reference solution that could be looked for")
    index = _Index.of(solutions.values(), ngram_tokens)
    best: list[tuple[int, str]] = [(0, "")] * len(problems)
    for done, found in enumerate(_results(index, shards, num_workers), start=1):
        for problem, (count, document) in found.items():
            best[problem] = max(best[problem], (count, document), key=lambda entry: entry[0])
        progress("shards", done, len(shards))
    return [
        Contamination(
            task_id=problem.task_id,
            num_ngrams=number,
            share=count / number if number else 0.0,
            document=document,
        )
        for problem, number, (count, document) in zip(problems, index.sizes, best, strict=True)
    ]


@dataclass(frozen=True)
class _Index:
    """The n-grams of all solutions."""

    ngram_tokens: int
    vocabulary: dict[bytes, int]
    """Number of each token that a solution has, from 1; any other token is 0."""
    owners: dict[tuple[int, ...], list[int]]
    """The problems whose solutions hold an n-gram."""
    hashes: np.ndarray
    """Of the n-grams, sorted, uint64."""
    sizes: list[int]
    """Different n-grams of each problem."""

    @classmethod
    def of(cls, solutions: Iterable[str], ngram_tokens: int) -> _Index:
        vocabulary: dict[bytes, int] = {}
        owners: dict[tuple[int, ...], list[int]] = {}
        sizes = []
        for problem, solution in enumerate(solutions):
            numbers = [vocabulary.setdefault(token, len(vocabulary) + 1) for token in tokens(solution.encode())]
            ngrams = {tuple(numbers[n : n + ngram_tokens]) for n in range(len(numbers) - ngram_tokens + 1)}
            sizes.append(len(ngrams))
            for ngram in ngrams:
                owners.setdefault(ngram, []).append(problem)
        every = np.array(sorted(owners), dtype=np.uint64).reshape(-1, ngram_tokens)
        hashes = np.unique(np.concatenate([_hashes(row, ngram_tokens) for row in every] or [every.ravel()]))
        return cls(ngram_tokens, vocabulary, owners, hashes, sizes)

    def found_in(self, text: str) -> dict[int, int]:
        """Returns how many different n-grams of each problem's solution a document holds, where it holds any."""
        number = self.vocabulary.get
        numbers = np.array([number(token, 0) for token in tokens(text.encode("utf-8", "replace"))], dtype=np.uint64)
        if len(numbers) < self.ngram_tokens:
            return {}
        places = np.flatnonzero(np.isin(_hashes(numbers, self.ngram_tokens), self.hashes))
        ngrams = {tuple(numbers[place : place + self.ngram_tokens].tolist()) for place in places.tolist()}
        found: dict[int, int] = defaultdict(int)
        for ngram in ngrams:
            for problem in self.owners.get(ngram, ()):  # two n-grams may have one hash
                found[problem] += 1
        return found


def _hashes(numbers: np.ndarray, ngram_tokens: int) -> np.ndarray:
    """Returns a hash of each n-gram, (tokens - n + 1,), uint64."""
    hashes = np.zeros(len(numbers) - ngram_tokens + 1, dtype=np.uint64)
    for offset in range(ngram_tokens):
        hashes = (hashes ^ numbers[offset : offset + len(hashes)]) * _MIX
        hashes ^= hashes >> np.uint64(29)
    return hashes


def _results(index: _Index, shards: Sequence[Shard], num_workers: int) -> Iterator[dict[int, tuple[int, str]]]:
    if num_workers == 1 or len(shards) == 1:
        yield from (_scan(index, shard) for shard in shards)
        return
    with ProcessPoolExecutor(min(num_workers, len(shards)), get_context("spawn")) as pool:
        yield from pool.map(_scan, [index] * len(shards), shards)


def _scan(index: _Index, shard: Shard) -> dict[int, tuple[int, str]]:
    """Returns each problem's greatest number of n-grams in one document of a shard, and which."""
    best: dict[int, tuple[int, str]] = {}
    texts = read_documents(Piece(shard, 0, shard.bytes), bad=BadDocuments(limit=None))
    for number, (text, _) in enumerate(texts, start=1):
        for problem, count in index.found_in(text).items():
            if count > best.get(problem, (0, ""))[0]:
                best[problem] = (count, f"{shard.path}, document {number}")
    return best


def describe(found: Sequence[Contamination], *, threshold: float, ngram_tokens: int, data: str) -> str:
    """The share of problems that the corpus holds, each by its name, and those of which nothing can be said."""
    known = [row for row in found if row.num_ngrams]
    held = sorted((row for row in known if row.share >= threshold), key=lambda row: -row.share)
    share = f" ({len(held) / len(known):.1%})" if known else ""
    lines = [
        f"{len(held)} of {len(known)} problems{share} have a solution of which one document of {data} holds at least "
        f"{threshold:.0%} of the n-grams of {ngram_tokens} tokens"
    ]
    lines += [f"  {row.task_id}: {row.found}" for row in held]
    if len(known) < len(found):
        lines.append(
            f"{len(found) - len(known)} solutions are shorter than {ngram_tokens} tokens, and were not looked for"
        )
    return "\n".join(lines)


def as_json(found: Sequence[Contamination], *, threshold: float, ngram_tokens: int, data: str) -> dict[str, Any]:
    """The same as an object."""
    known = [row for row in found if row.num_ngrams]
    held = [row.task_id for row in known if row.share >= threshold]
    return {
        "data": data,
        "ngram_tokens": ngram_tokens,
        "threshold": threshold,
        "share": len(held) / len(known) if known else None,
        "contaminated": held,
        "too_short": [row.task_id for row in found if not row.num_ngrams],
        "problems": [
            {"task_id": row.task_id, "ngrams": row.num_ngrams, "share": row.share, "document": row.document}
            for row in found
        ],
    }
