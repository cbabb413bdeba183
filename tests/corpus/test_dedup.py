"""Near duplicates, planted in a few thousand pieces of the standard library."""

from __future__ import annotations

import functools
import random
import re
import sysconfig
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from codeparrot_ds.corpus import dedup

NUM_DOCUMENTS = 2500
NUM_PLANTED = 500
TOKEN = re.compile(rb"[A-Za-z_0-9]+")


def exact_jaccard(first: bytes, second: bytes) -> float:
    """By another way than the code under test: sets of the tokens themselves."""
    one, other = set(TOKEN.findall(first)), set(TOKEN.findall(second))
    return len(one & other) / len(one | other)


@functools.cache
def pieces() -> list[bytes]:
    """Pieces of 60 lines of the standard library."""
    texts = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if "site-packages" not in path.parts and len(texts) < 4 * NUM_DOCUMENTS:
            lines = path.read_bytes().splitlines(keepends=True)
            texts += [b"".join(lines[start : start + 60]) for start in range(0, len(lines) - 60, 60)]
    return random.Random(1).sample([text for text in texts if len(set(TOKEN.findall(text))) > 40], NUM_DOCUMENTS)


def change_tokens(text: bytes, draw: Callable[[], bytes], rng: random.Random, fraction: float = 0.1) -> bytes:
    """Replace the tokens at a tenth of all positions; what lies between tokens stays."""
    places = list(TOKEN.finditer(text))
    parts, end = [], 0
    for place in sorted(rng.sample(places, round(fraction * len(places))), key=lambda found: found.start()):
        parts += [text[end : place.start()], draw()]
        end = place.end()
    return b"".join([*parts, text[end:]])


def find(tmp_path: Path, texts: list[bytes], *, threshold: float = 0.85, parts: int = 3) -> list[int]:
    """The one that stays in each text's place, or -1, with the texts in several sketches, visited in their order."""
    folders = []
    for number in range(parts):
        folder = tmp_path / f"sketch-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        start, stop = number * len(texts) // parts, (number + 1) * len(texts) // parts
        dedup.sketch(texts[start:stop], threshold).save(folder)
        folders.append(folder)
    return dedup.find_near_duplicates(folders, np.arange(len(texts)), threshold=threshold).tolist()


@pytest.mark.parametrize("source_of_tokens", ["own", "corpus"])
def test_planted_near_duplicates(tmp_path, source_of_tokens):
    """A tenth of the positions changed, to tokens of the same document or of the whole corpus.

    The second lowers the Jaccard similarity of the sets below 0.85 for nearly all: found is what is similar enough.
    """
    rng = random.Random(2)
    originals = pieces()
    corpus_tokens = [token for text in originals for token in TOKEN.findall(text)]
    planted = []
    for text in originals[:NUM_PLANTED]:
        tokens = TOKEN.findall(text) if source_of_tokens == "own" else corpus_tokens
        planted.append(change_tokens(text, lambda tokens=tokens: rng.choice(tokens), rng))
    texts = originals + planted
    witness = find(tmp_path, texts)

    stays = [number for number, other in enumerate(witness) if other < 0]
    for number, other in enumerate(witness):
        if other >= 0:
            assert witness[other] < 0, "the one in its place must stay itself"
            assert exact_jaccard(texts[number], texts[other]) >= 0.85
    similar = [n for n in range(NUM_PLANTED) if exact_jaccard(originals[n], planted[n]) >= 0.85 and witness[n] < 0]
    found = [n for n in similar if witness[NUM_DOCUMENTS + n] >= 0]
    assert len(found) == len(similar)  # of 0.9995 each, or better
    if source_of_tokens == "own":
        assert len(similar) > 0.95 * NUM_PLANTED and len(stays) < NUM_DOCUMENTS + 0.05 * NUM_PLANTED
    else:
        assert len(similar) < 0.2 * NUM_PLANTED
        found = find(tmp_path, texts, threshold=0.6)[NUM_DOCUMENTS:]
        assert sum(other >= 0 for other in found) > 0.95 * NUM_PLANTED


def test_nothing_similar_stays_and_nothing_unlike_goes(tmp_path):
    """Against all pairs of a small corpus with many likes of each other."""
    rng = random.Random(3)
    texts = []
    for text in pieces()[:25]:
        family = [text]
        for _ in range(9):
            tokens = TOKEN.findall(text)
            family.append(change_tokens(rng.choice(family), lambda tokens=tokens: rng.choice(tokens), rng, 0.15))
        texts += family
    witness = find(tmp_path, texts)
    kept = [number for number, other in enumerate(witness) if other < 0]
    assert 25 < len(kept) < 200
    for number, other in enumerate(witness):
        earlier = [exact_jaccard(texts[number], texts[each]) for each in kept if each < number]
        assert (other >= 0) == (max(earlier, default=0) >= 0.85), number


def test_a_crowd_of_one_template_is_sorted_out_as_pairs_are(tmp_path, monkeypatch):
    """Hundreds of small texts that share most of their tokens meet in the same buckets."""
    rng = random.Random(3)
    header = b"# Licensed under some terms; you may use this file in compliance with them, on an as is basis\n"
    texts = []
    for _ in range(400):
        names = b" = ".join(b"name_%d" % rng.randrange(40) for _ in range(3))
        texts.append(header + names)
    monkeypatch.setattr(dedup, "CROWDED_BUCKET", len(texts))
    expected = find(tmp_path, texts)
    assert 50 < sum(witness >= 0 for witness in expected) < 350
    monkeypatch.setattr(dedup, "CROWDED_BUCKET", 8)
    compared = []
    first_similar = dedup._first_similar

    def note(documents, number, candidates, threshold):
        compared.extend(candidates)
        return first_similar(documents, number, candidates, threshold)

    monkeypatch.setattr(dedup, "_first_similar", note)
    assert find(tmp_path, texts) == expected
    kept = sum(witness < 0 for witness in expected)
    assert len(compared) < kept * len(texts) / 8


def test_no_chain_removes_what_has_no_like(tmp_path):
    """A~B and B~C but A unlike C: B goes for A, and C stays though it is like B."""
    tokens = [b"token_%d" % number for number in range(120)]
    a, b, c = (b" ".join(tokens[start : start + 100]) for start in (0, 7, 14))
    assert exact_jaccard(a, b) > 0.85 < exact_jaccard(b, c) and exact_jaccard(a, c) < 0.85
    assert find(tmp_path, [a, b, c], parts=1) == [-1, 0, -1]
    assert find(tmp_path, [b, a, c], parts=2) == [-1, 0, 0]


def test_documents_of_few_tokens_are_left_alone(tmp_path):
    short = b"a = b; " * 4 + b"c"  # nine tokens
    long = short + b" d"
    assert len(dedup.tokens(short)) == 9
    assert find(tmp_path, [short, short, long, long, b"", b" "], parts=1) == [-1, -1, -1, 2, -1, -1]


def test_the_order_of_visiting_decides(tmp_path):
    text = pieces()[0]
    for number, part in enumerate((text, pieces()[1], text + b" x")):
        (tmp_path / str(number)).mkdir()
        dedup.sketch([part]).save(tmp_path / str(number))
    folders = [tmp_path / str(number) for number in range(3)]
    assert dedup.find_near_duplicates(folders, np.array([0, 1, 2])).tolist() == [-1, -1, 0]
    assert dedup.find_near_duplicates(folders, np.array([2, 0, 1])).tolist() == [2, -1, -1]


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 1.0])
def test_bands_find_pairs_at_the_threshold(threshold):
    rows, bands = dedup.rows_per_band(threshold), dedup.num_bands(threshold)
    assert rows * bands <= dedup.NUM_PERMUTATIONS
    assert 1 - (1 - threshold**rows) ** bands >= 0.9995


def test_signatures_agree_as_often_as_the_sets():
    rng = np.random.default_rng(4)
    differences = []
    for similarity in (0.5, 0.7, 0.85, 0.95):
        for _ in range(50):
            words = [b"%d" % number for number in rng.integers(0, 2**62, size=200)]
            shared, each = round(200 * similarity), round(200 * (1 - similarity)) // 2
            one, other = words[: shared + each], words[:shared] + words[shared + each :]
            signatures = dedup.sketch([b" ".join(one), b" ".join(other)]).signatures
            exact = exact_jaccard(b" ".join(one), b" ".join(other))
            differences.append((signatures[0] == signatures[1]).mean() - exact)
    assert abs(np.mean(differences)) < 0.01 and np.std(differences) < 0.03


def test_jaccard_of_arrays():
    first, second = np.array([1, 2, 3, 4], np.uint64), np.array([3, 4, 5], np.uint64)
    assert dedup.jaccard(first, second) == 2 / 5 and dedup.jaccard(first, first) == 1
    assert dedup.jaccard(first, second[:0]) == dedup.jaccard(first[:0], second[:0]) == 0
