"""Builds a corpus: cleaned, deduplicated shards of rows with CodeParrot's columns, split by repository.

``build_corpus`` cleans as the published scripts do: exact duplicates → filters → near duplicates → split → shards.
The work is cut into units that worker processes read into a hidden folder beside the corpus (``plan``,
``units``); this process decides on arrays (``index``, ``dedup``, ``split``); workers write the shards
(``write_shards``). Every piece appears when it is complete and under a name that says what it depends on, so
a build that was killed continues from its finished pieces and gives the same bytes.

Memory: about 300 bytes per document in this process (220 MB at the peak for 600,000 rows), more only where documents
have duplicates (``index``, ``dedup``); in each worker a shard's rows. Disk, until the end: the text that was
read, and with near duplicates, per document, 512 bytes and 8 per distinct token.
"""

from __future__ import annotations

import hashlib
import math
import os
import platform
import shutil
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import orjson

from codeparrot_ds.corpus import dedup, redaction
from codeparrot_ds.corpus.filters import FILTER_NAMES, select_filters, unit_interval
from codeparrot_ds.corpus.index import CorpusIndex, Documents, drop_exact_duplicates, group_by, index_units
from codeparrot_ds.corpus.plan import UNIT_BYTES, Source, plan_sources, row_files_in
from codeparrot_ds.corpus.pool import WorkerPool
from codeparrot_ds.corpus.readers import UNKNOWN_LICENSE, ReadAccount, printable
from codeparrot_ds.corpus.split import split_documents
from codeparrot_ds.corpus.units import (
    KEPT,
    LoadedUnit,
    UnitSettings,
    complete_folder,
    finished_documents,
    load_unit,
    read_texts,
    read_unit,
)
from codeparrot_ds.corpus.write_shards import COMPRESSIONS, ShardPlan, finished_shard, write_shard
from codeparrot_ds.cpu import usable_cores
from codeparrot_ds.errors import UserError
from codeparrot_ds.layouts import CARD as CARD_NAME
from codeparrot_ds.layouts import parse_columns
from codeparrot_ds.staging import RESULT, refuse_existing, resumable_folder
from codeparrot_ds.terminal import Progress
from codeparrot_ds.version import __version__

CARD_VERSION = 2
MIN_TRAIN_SHARDS = 8
MIN_COMPRESSED_TRAIN_SHARDS = 64
"""The default number of lanes of the training stream: each lane then has a shard of its own to decompress."""
SKETCH_DOCUMENTS = 4096


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
    near_duplicates: bool = True,
    near_duplicate_threshold: float = dedup.THRESHOLD,
    redact: bool = False,
    suffixes: Sequence[str] = (".py",),
    columns: str = "",
    num_workers: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict:
    """Write ``out/train``, ``out/validation`` and the card ``out/corpus.json``; return the card.

    The same sources give the same shards byte for byte, in whatever order they are named, with any number of workers,
    and however often the build was killed and started again.

    Args:
        sources: Source trees (folders; git checkouts inside them count as repositories of their own), row files
            (``ROW_SUFFIXES`` of ``plan``), and names of data sets for the ``datasets`` library
            (``org/name`` or ``org/name:split``), which are streamed.
        validation_fraction: Share of the bytes that is held out, met as nearly as whole groups allow.
        compress: ``none``, ``gz`` or ``zst``; the last two in pieces of about 1 MiB that can be read alone.
        shard_bytes: Target size of a shard before compression; train has at least 8 shards (64 where compressed)
            where documents suffice.
        seed: Decides the split, the order of documents and the filters that act with a probability.
        filters: Names out of ``FILTER_NAMES``.
        tokenizer: A tokenizer folder; with it, files under 1.5 characters per token are dropped as well.
        near_duplicates: Drop documents that are nearly equal to one that stays (``dedup``).
        near_duplicate_threshold: Jaccard similarity of the sets of tokens from which on two are nearly equal.
        redact: Replace e-mail addresses, public IP addresses and secrets by placeholders (``redaction``).
        suffixes: Names of files in source trees that are read.
        columns: Of row files: ``content=text,license=terms``, or the text's alone; those of published data sets of code
            (``layouts.COLUMNS``) are known.
        num_workers: Processes; as many as cores by default.
        overwrite: Replace a corpus that is already at ``out``; it stays whole until the new one is complete.

    Raises:
        UserError: bad arguments, a source that gives nothing, nothing left after cleaning, or a disk that refuses.
    """
    _check_arguments(sources, validation_fraction, compress, shard_bytes, suffixes, near_duplicate_threshold)
    refuse_existing(Path(os.path.abspath(out)), marker=CARD_NAME, overwrite=overwrite)
    content_column = parse_columns(columns).get("content", "content")
    settings = _unit_settings(columns, filters, seed, tokenizer, redact)
    report: Progress = progress or (lambda phase, done, total: None)
    planned = plan_sources(sources, suffixes=suffixes, content_column=content_column)
    num_units = sum(len(source.units) for source in planned)
    workers = min(num_workers or usable_cores(), max(num_units, 1))
    with resumable_folder(Path(out), marker=CARD_NAME, overwrite=overwrite) as folder, WorkerPool(workers) as pool:
        build = _Build(folder=folder, pool=pool, settings=settings, report=report)
        index, accounts, redactions = build.read(planned)
        documents, steps = _clean(index, settings)
        if near_duplicates:
            before = documents
            documents = build.drop_near_duplicates(index, documents, near_duplicate_threshold)
            step = _step("near_duplicates", before, documents)
            steps.append({**step, "threshold": near_duplicate_threshold, "permutations": dedup.NUM_PERMUTATIONS})
        splits, rule = split_documents(index, documents, validation_fraction, seed)
        written = build.write(index, splits, compress, shard_bytes)
        card = {
            "version": CARD_VERSION,
            "seed": seed,
            "sources": accounts,
            "suffixes": list(suffixes),
            "steps": steps,
            "documents": len(documents),
            "bytes": documents.num_bytes,
            "licenses": _counts(documents.license, index.licenses),
            "encodings": _counts(documents.encoding, index.encodings),
            "redactions": _redaction_card(documents, redactions) if redact else None,
            "split": rule,
            "compress": compress,
            "splits": written,
            "versions": _versions(near_duplicates, tokenizer is not None, settings),
        }
        (folder / RESULT / CARD_NAME).write_bytes(orjson.dumps(card, option=orjson.OPT_INDENT_2))
    return card


def _check_arguments(
    sources: Sequence[str],
    validation_fraction: float,
    compress: str,
    shard_bytes: int,
    suffixes: Sequence[str],
    threshold: float,
) -> None:
    if not sources:
        raise UserError("no source given; name at least one folder, row file or data set")
    if not 0 < validation_fraction < 1:
        raise UserError(f"validation_fraction is {validation_fraction}; it must lie between 0 and 1, for example 0.05")
    if compress not in COMPRESSIONS:
        raise UserError(f"compress is {compress!r}; choose one of {', '.join(COMPRESSIONS)}")
    if shard_bytes < 1:
        raise UserError(f"shard_bytes is {shard_bytes}; it must be at least 1")
    if not suffixes or not all(suffixes):
        raise UserError("suffixes is empty; name at least one, for example .py")
    if not 0.3 <= threshold <= 1:
        # Below, bands become so short that most documents of a corpus are candidates for each other.
        raise UserError(f"near_duplicate_threshold is {threshold}; it must lie between 0.3 and 1, for example 0.85")


def _unit_settings(
    columns: str, filters: Iterable[str], seed: int, tokenizer: Path | None, redact: bool
) -> UnitSettings:
    fingerprint = ""
    if tokenizer is not None:
        from codeparrot_ds.data.encoder import load_encoder

        fingerprint = load_encoder(tokenizer).fingerprint
    return UnitSettings(
        columns=columns,
        filters=tuple(each.name for each in select_filters(filters)),
        seed=seed,
        tokenizer=None if tokenizer is None else os.path.abspath(tokenizer),
        tokenizer_fingerprint=fingerprint,
        redact=redact,
    )


# --------------------------------------------------------------------------------------------------------------------
# the phases that workers do


@dataclass(frozen=True, kw_only=True)
class _Build:
    """Where a build works and with what."""

    folder: Path
    pool: WorkerPool
    settings: UnitSettings
    report: Progress

    def read(self, sources: Sequence[Source]) -> tuple[CorpusIndex, list[dict], list[dict[int, dict[str, int]]]]:
        """Read the units that no earlier build finished; return all documents and the sources' accounts."""
        units = [unit for source in sources for unit in source.units]
        place = self.folder / "units"
        folders = [place / unit.key(self.settings.identity()) for unit in units]
        _keep_only(place, {folder.name for folder in folders})
        num_documents = 0
        todo = []
        for unit, folder in zip(units, folders, strict=True):
            finished = finished_documents(folder)
            if finished is None:
                todo.append((unit, self.settings, folder))
            else:
                num_documents += finished
        self.report("reading", num_documents, None)
        for _, count in self.pool.run(read_unit, todo):
            num_documents += count
            self.report("reading", num_documents, None)
        loaded = [load_unit(folder) for folder in folders]
        bases = _row_bases(units, loaded)
        accounts = _account_for(sources, loaded, bases)
        return index_units(loaded, bases), accounts, [unit.redactions for unit in loaded]

    def drop_near_duplicates(self, index: CorpusIndex, documents: Documents, threshold: float) -> Documents:
        """Those that stay; of two alike the one with more copies does, being the one that people chose to copy."""
        place = self.folder / "sketches"
        # Sketches number documents by unit and record; `number` below says which of those each document has.
        by_place = np.lexsort((documents.record, documents.unit))
        rensa = version("rensa")
        tasks = [
            (parts, threshold, place / _sketch_key(parts, threshold, rensa))
            for parts in _sketch_parts(index, documents)
        ]
        _keep_only(place, {folder.name for *_, folder in tasks})
        todo = [task for task in tasks if not (task[-1]).is_dir()]
        done = len(documents) - sum(len(records) for parts, *_ in todo for _, records in parts)
        for _, count in self.pool.run(_sketch_documents, todo):
            done += count
            self.report("sketching", done, len(documents))
        number = np.empty(len(documents), dtype=np.int64)
        number[by_place] = np.arange(len(documents))
        order = number[np.lexsort((documents.low, documents.high, -documents.copies))]
        folders = [folder for *_, folder in tasks]
        witness = dedup.find_near_duplicates(
            folders, order, threshold=threshold, progress=lambda done, total: self.report("comparing", done, total)
        )
        return documents.take(witness[number] < 0)

    def write(
        self, index: CorpusIndex, splits: dict[str, Documents], compress: str, shard_bytes: int
    ) -> dict[str, dict]:
        """Write the shards that no earlier build finished, and put all into the result's folder."""
        place = self.folder / "shards"
        plans = [
            (f"{split}/part-{number:05d}{COMPRESSIONS[compress]}", plan)
            for split, documents in splits.items()
            for number, plan in enumerate(
                _shard_plans(index, split, documents, compress, shard_bytes, self.settings.seed)
            )
        ]
        paths = [place / plan.key() for _, plan in plans]
        _keep_only(place, {name for path in paths for name in (path.name, f"{path.name}.sha256")})
        digests = [finished_shard(path) for path in paths]
        todo = [number for number, digest in enumerate(digests) if digest is None]
        total = sum(map(len, splits.values()))
        done = total - sum(len(plans[number][1].units) for number in todo)
        for position, digest in self.pool.run(write_shard, [(plans[number][1], paths[number]) for number in todo]):
            digests[todo[position]] = digest
            done += len(plans[todo[position]][1].units)
            self.report("writing", done, total)
        result = self.folder / RESULT
        shutil.rmtree(result, ignore_errors=True)
        cards: dict[str, dict] = {}
        for split, documents in splits.items():
            (result / split).mkdir(parents=True)
            cards[split] = {"documents": len(documents), "bytes": documents.num_bytes, "shards": []}
        for (name, plan), path, digest in zip(plans, paths, digests, strict=True):
            path.rename(result / name)
            cards[name.partition("/")[0]]["shards"].append(
                {"file": name, "documents": len(plan.units), "sha256": digest}
            )
        return cards


def _keep_only(folder: Path, names: set[str]) -> None:
    """Remove what other settings or other sources left behind, and what was never finished."""
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        if path.name not in names:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


_SketchParts = list[tuple[Path, np.ndarray]]
"""Folders of units with the numbers of records there."""


def _sketch_parts(index: CorpusIndex, documents: Documents) -> Iterator[_SketchParts]:
    """What to sketch at once, by unit and record: parts of a large unit, or as many small ones as make a sketch."""
    parts: _SketchParts = []
    size = num_bytes = 0
    for unit, members in group_by(documents.unit):
        records = np.sort(documents.record[members])
        while len(records):
            taken, records = np.split(records, [SKETCH_DOCUMENTS - size])
            parts.append((index.folders[unit], taken))
            size += len(taken)
            if size == SKETCH_DOCUMENTS:
                yield parts
                parts, size, num_bytes = [], 0, 0
        num_bytes += int(documents.size[members].sum())
        if parts and num_bytes >= UNIT_BYTES:  # so that all cores have some
            yield parts
            parts, size, num_bytes = [], 0, 0
    if parts:
        yield parts


def _sketch_key(parts: _SketchParts, threshold: float, rensa: str) -> str:
    facts = [[(unit.name, hashlib.sha256(records.tobytes()).hexdigest()) for unit, records in parts], threshold, rensa]
    return hashlib.blake2b(orjson.dumps(facts), digest_size=16).hexdigest()


def _sketch_documents(parts: _SketchParts, threshold: float, folder: Path) -> int:
    with complete_folder(folder) as staging:
        texts = (text for unit, records in parts for text in read_texts(unit, load_unit(unit).index[records]))
        dedup.sketch(texts, threshold).save(staging)
    return sum(len(records) for _, records in parts)


def _shard_plans(
    index: CorpusIndex, split: str, documents: Documents, compress: str, shard_bytes: int, seed: int
) -> list[ShardPlan]:
    """Readers take a shard or a part of one at a time, and one repository's files in a row make a biased batch. In the
    order of a keyed hash every shard is a fair sample of the corpus, and a document keeps its place relative to the
    others when more are added.
    """
    keys = np.fromiter((unit_interval(seed, "order", each) for each in documents.hashes()), float, len(documents))
    documents = documents.take(np.lexsort((documents.low, documents.high, keys)))
    least = MIN_TRAIN_SHARDS if compress == "none" else MIN_COMPRESSED_TRAIN_SHARDS
    num_shards = max(math.ceil(documents.num_bytes / shard_bytes), least if split == "train" else 1)
    num_shards = min(num_shards, len(documents))
    return [
        ShardPlan(
            folders=index.folders,
            row_bases=index.row_bases,
            units=documents.unit[number::num_shards],
            records=documents.record[number::num_shards],
            copies=documents.copies[number::num_shards],
            compress=compress,
        )
        for number in range(num_shards)
    ]


# --------------------------------------------------------------------------------------------------------------------
# deciding and counting


def _clean(index: CorpusIndex, settings: UnitSettings) -> tuple[Documents, list[dict]]:
    """What exact duplicates and filters leave, in the order of the hashes, and one counted step each.

    Each document met the filters in order and is dropped by the first that applies, so the steps add up.
    """
    documents = drop_exact_duplicates(index)
    steps = [_step("exact_duplicates", index.documents, documents)]
    names = [*settings.filters, *(["chars_per_token"] if settings.tokenizer else [])]
    for number, name in enumerate(names):
        after = documents.take(documents.verdict != number)
        steps.append(_step(name, documents, after))
        documents = after
    assert (documents.verdict == KEPT).all()
    return documents, steps


def _step(name: str, before: Documents, after: Documents) -> dict:
    return {
        "step": name,
        "documents_before": len(before),
        "documents_after": len(after),
        "bytes_before": before.num_bytes,
        "bytes_after": after.num_bytes,
    }


def _row_bases(units: Sequence, loaded: Sequence[LoadedUnit]) -> list[int]:
    """Rows of the same file in the units before each."""
    rows: Counter[tuple[int, str]] = Counter()
    bases = []
    for unit, each in zip(units, loaded, strict=True):
        bases.append(rows[unit.source, unit.name])
        rows[unit.source, unit.name] += each.account.rows
    return bases


def _account_for(sources: Sequence[Source], loaded: Sequence[LoadedUnit], bases: Sequence[int]) -> list[dict]:
    """One account per source, for the card; an unusable source is an error, damage alone is not while others give."""
    cards = []
    position = 0
    for source in sources:
        stop = position + len(source.units)
        lacking = sum((unit.lacking for unit in loaded[position:stop]), Counter())
        parts = [(source.account, 0)]
        parts += [(unit.account, base) for unit, base in zip(loaded[position:stop], bases[position:stop], strict=True)]
        position = stop
        cards.append({**_source_card(source.name, parts), "lacking": dict(sorted(lacking.items()))})
    for source, card in zip(sources, cards, strict=True):
        if (
            not source.is_sidecar
            and not card["documents"]
            and (not card["damaged"] or not any(each["documents"] for each in cards))
        ):
            raise UserError(_nothing_usable(source, card))
    return cards


def _source_card(name: str, parts: Sequence[tuple[ReadAccount, int]]) -> dict:
    def places(problems: Iterable[tuple[str, int, str]], base: int) -> list[str]:
        return [f"{file}:{row + base}: {reason}" if row else f"{file}: {reason}" for file, row, reason in problems]

    left_out: Counter[str] = Counter()
    named: list[str] = []
    damaged: list[str] = []
    for account, base in parts:
        left_out.update(account.left_out)
        named += places(account.named, base)
        damaged += [
            f"{file} is damaged: read up to row {row + base} ({reason})" for file, row, reason in account.damaged
        ]
    return {
        "source": printable(name),
        "documents": sum(account.documents for account, _ in parts),
        "bytes": sum(account.bytes for account, _ in parts),
        "left_out": dict(sorted(left_out.items())),
        "left_out_first": named[:100],
        "damaged": damaged,
    }


def describe(card: dict) -> tuple[list[str], list[str]]:
    """Lines for a console: what each step dropped and what was replaced; and warnings: what could not be read."""
    lines = []
    for step in card["steps"]:
        dropped = step["documents_before"] - step["documents_after"]
        lines.append(f"{step['step']:<20} drops {dropped:>8,}  leaves {step['documents_after']:>8,} documents")
    if redactions := card["redactions"]:
        counts = ", ".join(f"{count:,} {kind}" for kind, count in redactions["counts"].items()) or "nothing"
        lines.append(f"redacted {counts} in {redactions['documents']:,} documents ({redactions['limits']})")
    sidecars = [source["source"] for source in card["sources"] if "sidecars" in source["left_out"]]
    warnings = [f"left out, for they lie beside data and are none: {', '.join(sidecars)}"] if sidecars else []
    for source in card["sources"]:
        if source["source"] in sidecars:
            continue
        warnings += source["damaged"]
        # An empty file is nothing that anybody must look at: packages are full of them.
        left_out = {name.replace("_", " "): count for name, count in source["left_out"].items() if name != "empty"}
        if left_out:
            reasons = ", ".join(f"{count:,} {name}" for name, count in left_out.items())
            first = source["left_out_first"][0]
            warnings.append(f"{source['source']}: left out {reasons} (first: {first}; more in {CARD_NAME})")
        warnings += _what_rows_lack(source)
    return lines, warnings


def _what_rows_lack(source: dict) -> list[str]:
    """What rows of a source did not say, and what that costs."""
    costs = {
        "repo": "the file stands for the repository, so files of one are not held out together",
        "path": "numbers stand for paths",
        "license": f"it is {UNKNOWN_LICENSE}",
    }
    return [
        f"{source['source']}: {count:,} of {source['documents']:,} rows name no {what} in a column that is known: "
        f"{costs[what]}; --columns {what}=NAME names another"
        for what, count in source["lacking"].items()
    ]


def _nothing_usable(source: Source, card: dict) -> str:
    counts = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in card["left_out"].items())
    first = f"first: {card['left_out_first'][0]}" if card["left_out_first"] else ""
    rows = row_files_in(Path(source.name)) if os.path.isdir(source.name) and not card["left_out"] else []
    hint = f"row files are sources by their own names, as {rows[0]}" if rows else ""
    detail = "; ".join(filter(None, [counts, first, *card["damaged"][:1], hint]))
    return f"{source.name} holds no usable {source.expected}" + (f" ({detail})" if detail else "")


def _counts(numbers: np.ndarray, names: Sequence[str]) -> dict[str, int]:
    counts = zip(names, np.bincount(numbers, minlength=len(names)).tolist(), strict=True)
    return {name: count for name, count in sorted(counts, key=lambda pair: (-pair[1], pair[0])) if count}


def _redaction_card(documents: Documents, redactions: Sequence[dict[int, dict[str, int]]]) -> dict:
    """What was replaced in the documents of the corpus, not in those that cleaning dropped."""
    counts: Counter[str] = Counter()
    num_documents = 0
    for unit, record in zip(documents.unit.tolist(), documents.record.tolist(), strict=True):
        if found := redactions[unit].get(record):
            counts.update(found)
            num_documents += 1
    return {"counts": dict(sorted(counts.items())), "documents": num_documents, "limits": redaction.LIMITS}


def _versions(near_duplicates: bool, tokenized: bool, settings: UnitSettings) -> dict[str, str]:
    """Of what decided which documents and which bytes there are."""
    packages = ["orjson", "zstandard", "numpy", *(["rensa"] if near_duplicates else [])]
    versions = {"codeparrot_ds": __version__, "python": platform.python_version(), "zlib": zlib.ZLIB_RUNTIME_VERSION}
    versions |= {package: version(package) for package in packages + (["tokenizers"] if tokenized else [])}
    return versions | ({"tokenizer_sha256": settings.tokenizer_fingerprint} if tokenized else {})
