"""Builds a corpus: cleaned, deduplicated shards of rows with CodeParrot's columns, split by repository.

``build_corpus`` reads as the published cleaning does: read → exact duplicates → filters → split → shards. Texts wait in
one spool file on disk between the steps, so memory holds an index entry a document and never the texts.
"""

import contextlib
import gzip
import hashlib
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import orjson

from codeparrot_ds.data.encoder import load_encoder
from codeparrot_ds.data.filters import (
    FILTER_NAMES,
    Filter,
    TextStatistics,
    chars_per_token_filter,
    select_filters,
    text_statistics,
    unit_interval,
)
from codeparrot_ds.data.raw import Progress, RawDocument, ReadAccount, read_source
from codeparrot_ds.data.staging import staged_folder
from codeparrot_ds.errors import UserError

CARD_NAME = "corpus.json"
CARD_VERSION = 1
COMPRESSIONS = {"none": ".jsonl", "gz": ".jsonl.gz", "zst": ".jsonl.zst"}
MIN_TRAIN_SHARDS = 8
MIN_REPOSITORIES_FOR_SPLIT = 20


@dataclass(kw_only=True, slots=True)
class Document:
    """Index entry of one text: everything but the text itself, which is ``size`` bytes at ``offset`` of the spool."""

    place: tuple[str, str]
    """Repository name and path."""
    license: str
    hash: str
    copies: int
    offset: int
    size: int
    statistics: TextStatistics | None = None


def build_corpus(
    sources: Sequence[str],
    out: Path,
    *,
    validation_fraction: float = 0.05,
    compress: str = "none",
    shard_bytes: int = 128 << 20,
    seed: int = 1,
    filters: Iterable[str] = FILTER_NAMES,
    tokenizer: Path | None = None,
    suffixes: Sequence[str] = (".py",),
    content_column: str = "content",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict:
    """Write ``out/train``, ``out/validation`` and the card ``out/corpus.json``; return the card.

    The same sources give the same shards byte for byte, in whatever order they are named.

    Args:
        sources: Source trees (folders; git checkouts inside them count as repositories of their own) and row files
            (``.jsonl``, ``.jsonl.gz``, ``.jsonl.zst``).
        validation_fraction: Share of the bytes that is held out, met as nearly as whole groups allow.
        compress: ``none`` (seekable, so a resume is instant), ``gz`` or ``zst``.
        shard_bytes: Target size of a shard before compression; train has at least 8 shards where documents suffice.
        seed: Decides the split, the order of documents and the filters that act with a probability.
        filters: Names out of ``FILTER_NAMES``.
        tokenizer: A tokenizer folder; with it, files under 1.5 characters a token are dropped as well.
        suffixes: Names of files in source trees that are read.
        content_column: The column of row files that holds the text.
        overwrite: Replace a corpus that is already at ``out``; it stays whole until the new one is complete.

    Raises:
        UserError: bad arguments, a source that gives nothing, nothing left after cleaning, or a disk that refuses.
    """
    _check_arguments(sources, validation_fraction, compress, shard_bytes, suffixes)
    active = select_filters(filters)
    if tokenizer is not None:
        active.append(chars_per_token_filter(_token_counter(Path(tokenizer))))
    report: Progress = progress or (lambda phase, done, total: None)
    with staged_folder(Path(out), marker=CARD_NAME, overwrite=overwrite) as folder:
        spool_path = folder / "spool.bin"
        with spool_path.open("w+b") as spool:
            documents, accounts, duplicates = _read_and_deduplicate(sources, spool, suffixes, content_column, report)
            documents, steps = _apply_filters(documents, spool, active, seed, report)
            splits, rule = _split(documents, validation_fraction, seed)
            written = _write_splits(splits, spool, folder, compress, shard_bytes, seed, report)
        spool_path.unlink()
        card = {
            "version": CARD_VERSION,
            "seed": seed,
            "sources": [account.as_dict() for account in accounts],
            "suffixes": list(suffixes),
            "steps": [duplicates, *steps],
            "documents": len(documents),
            "bytes": sum(document.size for document in documents),
            "licenses": dict(Counter(document.license for document in documents).most_common()),
            "split": rule,
            "splits": written,
        }
        (folder / CARD_NAME).write_bytes(orjson.dumps(card, option=orjson.OPT_INDENT_2))
    return card


def _check_arguments(
    sources: Sequence[str], validation_fraction: float, compress: str, shard_bytes: int, suffixes: Sequence[str]
) -> None:
    if not sources:
        raise UserError("no source given; name at least one folder or row file")
    if not 0 < validation_fraction < 1:
        raise UserError(f"validation_fraction is {validation_fraction}; it must lie between 0 and 1, for example 0.05")
    if compress not in COMPRESSIONS:
        raise UserError(f"compress is {compress!r}; choose one of {', '.join(COMPRESSIONS)}")
    if shard_bytes < 1:
        raise UserError(f"shard_bytes is {shard_bytes}; it must be at least 1")
    if not suffixes or not all(suffixes):
        raise UserError("suffixes is empty; name at least one, for example .py")


def _token_counter(tokenizer_dir: Path) -> Callable[[str], int]:
    encoder = load_encoder(tokenizer_dir)
    return lambda text: len(encoder.encode_batch([text])[0])


def content_hash(text: str) -> str:
    """Identity of a document: 128 bits over its text without whitespace, so that reformatted copies are duplicates."""
    return hashlib.blake2b("".join(text.split()).encode("utf-8"), digest_size=16).hexdigest()


def _read_and_deduplicate(
    sources: Sequence[str], spool: BinaryIO, suffixes: Sequence[str], content_column: str, report: Progress
) -> tuple[list[Document], list[ReadAccount], dict]:
    """Of equal texts the one that is first by repository and path stays, so the order of the sources does not show."""
    kept: dict[str, Document] = {}
    accounts = []
    num_documents = num_bytes = 0
    # One folder named twice would double the copies of all its files.
    for source in {os.path.realpath(source): source for source in map(str, sources)}.values():
        account = ReadAccount(source=source)
        accounts.append(account)
        for raw in read_source(source, account, suffixes=suffixes, content_column=content_column):
            num_documents += 1
            num_bytes += _keep_first(kept, raw, spool)
            report("reading", num_documents, None)
    documents = sorted(kept.values(), key=lambda document: (document.place, document.hash))
    return documents, accounts, _step("exact_duplicates", num_documents, num_bytes, documents)


def _keep_first(kept: dict[str, Document], raw: RawDocument, spool: BinaryIO) -> int:
    """Put the text into the spool unless a copy with a smaller place (or, at the same place, text) is there."""
    data = raw.content.encode("utf-8")
    key = content_hash(raw.content)
    place = (raw.repo_name, raw.path)
    first = kept.get(key)
    if first is None or place < first.place or (place == first.place and data < _read(spool, first)):
        offset = spool.seek(0, os.SEEK_END)
        spool.write(data)
        copies = raw.copies + (first.copies if first else 0)
        kept[key] = Document(place=place, license=raw.license, hash=key, copies=copies, offset=offset, size=len(data))
    else:
        first.copies += raw.copies
    return len(data)


def _read(spool: BinaryIO, document: Document) -> bytes:
    spool.seek(document.offset)
    return spool.read(document.size)


def _step(name: str, documents_before: int, bytes_before: int, after: Sequence[Document]) -> dict:
    return {
        "step": name,
        "documents_before": documents_before,
        "documents_after": len(after),
        "bytes_before": bytes_before,
        "bytes_after": sum(document.size for document in after),
    }


def _apply_filters(
    documents: list[Document], spool: BinaryIO, filters: Sequence[Filter], seed: int, report: Progress
) -> tuple[list[Document], list[dict]]:
    """The documents that no filter drops, with their statistics, and one counted step a filter.

    Each document meets the filters in order and is dropped by the first that applies, so the steps add up.
    """
    survivors: list[list[Document]] = [[] for _ in filters]
    for done, document in enumerate(documents, start=1):
        text = _read(spool, document).decode("utf-8")
        document.statistics = text_statistics(text)
        for each, passed in zip(filters, survivors, strict=True):
            if each.drops(text, document.statistics, content_hash=document.hash, seed=seed):
                break
            passed.append(document)
        report("cleaning", done, len(documents))
    steps = []
    for each, passed in zip(filters, survivors, strict=True):
        num_bytes = sum(document.size for document in documents)
        steps.append(_step(each.name, len(documents), num_bytes, passed))
        documents = passed
    return documents, steps


def _split(
    documents: Sequence[Document], validation_fraction: float, seed: int
) -> tuple[dict[str, list[Document]], dict]:
    """Hold out whole groups of documents; return the splits and the rule for the card.

    Files of one repository share names, idioms and licence headers, so a split by file leaks into validation. The
    coarsest grouping wins that meets the asked fraction of bytes within a factor of two: two repositories of equal
    size must not cost half of the training data.
    """
    if len(documents) < 2:
        raise UserError(f"cleaning left {len(documents)} document(s); train and validation need at least one each")
    num_bytes = sum(document.size for document in documents)
    for group_by, key in _grouping_rules(documents):
        groups: dict[str, list[Document]] = {}
        for document in documents:
            groups.setdefault(key(document), []).append(document)
        sizes = {name: sum(document.size for document in members) for name, members in groups.items()}
        held_out = _hold_out(sizes, validation_fraction * num_bytes, seed)
        fraction = sum(sizes[name] for name in held_out) / num_bytes
        rule = {
            "group_by": group_by,
            "groups": len(groups),
            "groups_held_out": len(held_out),
            "validation_fraction": validation_fraction,
            "validation_fraction_of_bytes": round(fraction, 6),
        }
        if 0.5 <= fraction / validation_fraction <= 2:
            break
    splits: dict[str, list[Document]] = {"train": [], "validation": []}
    for name, members in groups.items():
        splits["validation" if name in held_out else "train"] += members
    return splits, rule


def _grouping_rules(documents: Sequence[Document]) -> list[tuple[str, Callable[[Document], str]]]:
    """From coarse to fine. The last always tells any two documents apart."""
    rules: list[tuple[str, Callable[[Document], str]]] = [
        ("repository", lambda document: document.place[0]),
        ("top-level folder or module", lambda document: "/".join((document.place[0], _top_level(document.place[1])))),
        ("document", lambda document: document.hash),
    ]
    repositories = len({document.place[0] for document in documents})
    return rules if repositories >= MIN_REPOSITORIES_FOR_SPLIT else rules[1:]


def _hold_out(sizes: dict[str, int], target_bytes: float, seed: int) -> set[str]:
    """Groups in the order of their seeded hashes until the target is reached: at least one, and never all of many.

    A group that would overshoot by more than a quarter is passed over; where every group does, the smallest is taken.
    """
    held_out: set[str] = set()
    held_bytes = 0
    for name in sorted(sizes, key=lambda name: (unit_interval(seed, "split", name), name)):
        if held_bytes < target_bytes and held_bytes + sizes[name] <= 1.25 * target_bytes:
            held_out.add(name)
            held_bytes += sizes[name]
    if len(held_out) == len(sizes):
        held_out.remove(max(held_out, key=lambda name: (sizes[name], name)))
    return held_out or {min(sizes, key=lambda name: (sizes[name], name))}


def _top_level(path: str) -> str:
    """``asyncio`` for both ``asyncio/events.py`` and ``asyncio.py``; a lone ``src`` or ``lib`` folder says nothing."""
    parts = Path(path).parts
    if len(parts) > 2 and parts[0] in ("src", "lib"):
        parts = parts[1:]
    return parts[0].partition(".")[0] or path


def _write_splits(
    splits: dict[str, list[Document]],
    spool: BinaryIO,
    folder: Path,
    compress: str,
    shard_bytes: int,
    seed: int,
    report: Progress,
) -> dict[str, dict]:
    total = sum(map(len, splits.values()))
    done = 0
    cards = {}
    for split, members in splits.items():
        # Readers take a shard or a part of one at a time, and one repository's files in a row make a biased batch. In
        # the order of a keyed hash every shard is a fair sample of the corpus, and a document keeps its place relative
        # to the others when more are added.
        members = sorted(members, key=lambda document: (unit_interval(seed, "order", document.hash), document.hash))
        num_bytes = sum(document.size for document in members)
        num_shards = max(math.ceil(num_bytes / shard_bytes), MIN_TRAIN_SHARDS if split == "train" else 1)
        num_shards = min(num_shards, len(members))
        (folder / split).mkdir()
        shards = []
        for number in range(num_shards):
            part = members[number::num_shards]
            name = f"{split}/part-{number:05d}{COMPRESSIONS[compress]}"
            _write_shard(folder / name, part, spool, compress)
            shards.append({"file": name, "documents": len(part), "sha256": _sha256(folder / name)})
            done += len(part)
            report("writing", done, total)
        cards[split] = {"documents": len(members), "bytes": num_bytes, "shards": shards}
    return cards


def _write_shard(path: Path, documents: Sequence[Document], spool: BinaryIO, compress: str) -> None:
    with path.open("wb") as raw, _compressor(raw, compress) as file:
        for document in documents:
            file.write(
                orjson.dumps(_row(document, _read(spool, document).decode("utf-8")), option=orjson.OPT_APPEND_NEWLINE)
            )


def _compressor(raw: BinaryIO, compress: str) -> contextlib.AbstractContextManager[BinaryIO]:
    if compress == "gz":
        # A time stamp or file name in the header would make equal shards differ.
        return gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0)  # type: ignore[return-value]
    if compress == "zst":
        import zstandard

        return zstandard.ZstdCompressor(level=3).stream_writer(raw, closefd=False)  # type: ignore[return-value]
    return contextlib.nullcontext(raw)


def _row(document: Document, content: str) -> dict:
    assert document.statistics is not None
    return {
        "repo_name": document.place[0],
        "path": document.place[1],
        "copies": document.copies,
        "size": document.size,
        "content": content,
        "license": document.license,
        "hash": document.hash,
        "line_mean": document.statistics.line_mean,
        "line_max": document.statistics.line_max,
        "alpha_frac": document.statistics.alpha_frac,
        "autogenerated": document.statistics.autogenerated,
    }


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
