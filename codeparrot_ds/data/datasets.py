"""From a run config to its data: the training stream, the validation shards, and where a resumed run continues."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from codeparrot_ds.config.run_config import RunConfig
from codeparrot_ds.data.encoder import Encoder
from codeparrot_ds.data.shards import BadDocuments, Shard, find_shards, in_version_1, layout_of, read_documents
from codeparrot_ds.data.stream import (
    ORDER_VERSION,
    ORDER_VERSIONS,
    Dataset,
    LaneState,
    LaneStates,
    StreamConfig,
    check_lanes,
    fingerprint_differences,
    lane_pieces,
    stream_fingerprint,
)
from codeparrot_ds.errors import UserError
from codeparrot_ds.layouts import parse_columns
from codeparrot_ds.paths import exists, may_be_on_hub
from codeparrot_ds.terminal import size_text

_PROOF_DOCUMENTS_PER_LANE = 4


def parse_mixture(data: str) -> list[tuple[str, float]]:
    """The data sets that ``data`` names, with their weights: one name, or ``NAME=WEIGHT,NAME=WEIGHT``."""
    if "=" not in data or Path(data).exists():
        return [(data, 1.0)]
    mixture = []
    for part in data.split(","):
        name, _, weight = part.strip().rpartition("=")
        if not name or not re.fullmatch(r"\d+(\.\d*)?|\.\d+", weight) or not float(weight):
            raise UserError(f"data: {part.strip()!r} is not NAME=WEIGHT with a weight above 0, as in code=0.7,docs=0.3")
        mixture.append((name, float(weight)))
    for name, _ in mixture:
        if sum(name == other for other, _ in mixture) > 1:
            raise UserError(f"data: {name} is named twice; add its weights up")
    return mixture


def split_shards(
    data: str, split: str, *, named: bool = False, columns: str = "", began: Mapping[str, Any] | None = None
) -> list[Shard]:
    """The shards of a split of every data set that ``data`` names.

    Args:
        data: as in a run config.
        split: one of ``layouts.SPLITS``.
        named: ``data`` was named for this split: see ``find_shards``.
        columns: as in a run config.
        began: the fingerprint (``run_fingerprint``) of the data that a run has begun with, which finds them again.
    """
    return [shard for name, _ in parse_mixture(data) for shard in _find(name, split, named, columns, began)]


def _find(name: str, split: str, named: bool, columns: str, began: Mapping[str, Any] | None) -> list[Shard]:
    if began is not None and "columns" not in began:  # version 0.1 told no names apart and read one column
        return find_shards(name, split, by_names=False, text_column="content")
    return find_shards(name, split, named=named, text_column=parse_columns(columns).get("content", ""))


def check_local_data(data: str, split: str, *, named: bool = False, began: Mapping[str, Any] | None = None) -> None:
    """Raises a UserError where data that is not on the Hub lacks a split; the Hub is not asked."""
    for name, _ in parse_mixture(data):
        if exists(name) or not may_be_on_hub(name):
            _find(name, split, named, "", began)


def validation_shards(config: RunConfig, began: Mapping[str, Any] | None = None) -> list[Shard]:
    """What a run evaluates on: ``validation_data``, or the validation split of its own data."""
    if config.validation_data:
        return split_shards(config.validation_data, "validation", named=True, columns=config.columns, began=began)
    files = [name for name, _ in parse_mixture(config.data) if Path(name).is_file()]
    if files:
        raise UserError(f"{files[0]} is one shard, without a validation split: name another with --validation-data")
    try:
        return split_shards(config.data, "validation", columns=config.columns, began=began)
    except UserError as error:
        raise UserError(f"{error} Name what to evaluate on with --validation-data.") from None


def describe_layouts(*data: str, began: Mapping[str, Any] | None = None) -> list[str]:
    """What is taken for what in the folders that some ``data`` names, a line for each where its names must tell it."""
    names = dict.fromkeys(name for each in data if each for name, _ in parse_mixture(each))
    lines = [layout_of(Path(name)).describe() for name in names if Path(name).is_dir()]
    if any(lines) and began is not None and "columns" not in began:
        return ["the run keeps the shards that it began with, whatever their names say now"]
    return [line for line in lines if line]


def describe_data(
    config: RunConfig,
    datasets: Sequence[Dataset],
    validation: Sequence[Shard],
    began: Mapping[str, Any] | None = None,
) -> list[str]:
    """`describe_layouts` of a run's data, and a line where it evaluates on what it trains on, as a run may be told."""
    trained = {str(shard.path) for dataset in datasets for shard in dataset.shards}
    both = sum(str(shard.path) in trained for shard in validation)
    lines = describe_layouts(config.data, config.validation_data, began=began)
    return lines + [f"{both:,} of the {len(validation):,} shard(s) to evaluate on are trained on as well"] * bool(both)


def open_datasets(
    config: RunConfig, pins: Mapping[str, str] | None = None, began: Mapping[str, Any] | None = None
) -> list[Dataset]:
    """The training data sets of a run config.

    Args:
        pins: what a run's earlier start found under the names in ``data`` (``pinned_names``): a Hub data set stays at
            the commit that the run began with.
        began: the fingerprint of the data that the run has begun with: its shards stay the same, whatever their names.
    """
    datasets = []
    for name, weight in parse_mixture(config.data):
        shards = _find((pins or {}).get(name, name), "train", True, config.columns, began)
        remote = shards[0].remote
        found = name if remote is None else f"{name.partition('@')[0]}@{remote.commit}"
        datasets.append(Dataset(name=found, shards=shards, weight=weight))
    return datasets


def pinned_names(config: RunConfig, datasets: Sequence[Dataset]) -> dict[str, str]:
    """The names in ``data`` that stand for something that moves, with what they stood for when they were opened."""
    names = [name for name, _ in parse_mixture(config.data)]
    return {name: dataset.name for name, dataset in zip(names, datasets, strict=True) if name != dataset.name}


def stream_of(
    config: RunConfig, datasets: Sequence[Dataset], encoder: Encoder, order_version: int | None = None
) -> StreamConfig:
    """The training stream of a run config over its data sets.

    Args:
        order_version: the one that the run began with; None for a run that begins. One that is not known here is
            left to the comparison of fingerprints, which names it.
    """
    if order_version not in ORDER_VERSIONS:
        order_version = ORDER_VERSION
    if order_version == 1:
        datasets = [replace(dataset, shards=in_version_1(dataset.shards)) for dataset in datasets]
        encoder = encoder.in_version_1()
    return StreamConfig(
        datasets=datasets,
        encoder=encoder,
        order_version=order_version,
        seq_length=config.seq_length,
        num_lanes=config.num_lanes,
        shuffle_buffer=config.shuffle_buffer,
        seed=config.seed,
        max_bad_documents=config.max_bad_documents,
    )


def check_datasets(
    config: RunConfig, datasets: Sequence[Dataset], began: Mapping[str, Any] | None = None
) -> list[Shard]:
    """The shards to evaluate on; raises a UserError when there are none or a lane of local data has no document."""
    validation = validation_shards(config, began)
    for dataset in datasets:
        # On the Hub this would fetch the start of every lane; a lane that finds nothing says so when it is read.
        if not any(shard.remote for shard in dataset.shards):
            check_lanes(dataset, config.num_lanes)
    return validation


def proof_texts(stream: StreamConfig) -> Iterator[str]:
    """Some documents of every lane, for proving the fast encoder on the corpus's own text."""
    bad = BadDocuments(limit=None)  # counted where they are trained on
    for dataset in stream.datasets:
        for lane in range(stream.num_lanes):
            for piece in lane_pieces(dataset.shards, stream.num_lanes, lane)[:1]:
                for text, _ in islice(read_documents(piece, bad=bad), _PROOF_DOCUMENTS_PER_LANE):
                    yield text


@dataclass(frozen=True, kw_only=True)
class StreamStart:
    """Where the stream begins in this start of a run."""

    row: int = 0
    """Rows of the stream before."""
    lane_states: Mapping[int, LaneStates] = field(default_factory=dict)


def run_fingerprint(config: RunConfig, stream: StreamConfig, began: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What must be equal for a run to continue on its data, as JSON; ``began`` is that of the run that continues."""
    fingerprint = stream_fingerprint(stream)
    # Those of version 0.1 say no columns, and are known by that.
    return fingerprint if began is not None and "columns" not in began else fingerprint | {"columns": config.columns}


def saved_stream(fingerprint: Mapping[str, Any], start: StreamStart) -> dict[str, Any]:
    """What a checkpoint keeps of the stream, as JSON; ``resume_stream`` reads it."""
    return {
        "fingerprint": fingerprint,
        "rows": start.row,
        "lanes": {
            str(lane): [state.to_json() for state in states] for lane, states in sorted(start.lane_states.items())
        },
    }


def resume_stream(
    saved: Mapping[str, Any], fingerprint: Mapping[str, Any], *, on_data_change: str
) -> tuple[StreamStart, list[str]]:
    """Where a stream with this fingerprint continues, and what differs from the saved one.

    Raises a UserError when anything differs, unless ``on_data_change`` is ``restart``: then the stream begins anew.
    """
    began = saved["fingerprint"]
    differences = fingerprint_differences(began, fingerprint)
    columns, before = fingerprint.get("columns", ""), began.get("columns", "")
    if columns != before:
        differences.append(f"columns is {columns!r}, but the run was started with {before!r}.")
    if not differences:
        lanes = {
            int(lane): tuple(LaneState.from_json(state) for state in states) for lane, states in saved["lanes"].items()
        }
        return StreamStart(row=saved["rows"], lane_states=lanes), []
    if on_data_change != "restart":
        raise UserError(
            f"the run was trained on other data: {' '.join(differences)} Choose another --run-name, or pass "
            "--on-data-change restart to begin a new epoch on this data"
        )
    return StreamStart(), differences


def data_account(
    counters: Sequence[Mapping[str, int]],
    *,
    bad_documents: Sequence[str],
    rows_per_lane: Mapping[int, int],
    encoder: str,
) -> dict[str, Any]:
    """What a run has read since its stream began, as JSON with a ``summary`` in words.

    ``counters`` are ``TrainingLoader.counters()`` of every rank; ``bad_documents`` say where each was lost and why, in
    this start of the run; ``encoder`` names the library that encoded.
    """
    names = ("documents", "characters", "bytes", "tokens", "tokens_of_documents")
    totals = {name: sum(each[name] for each in counters) for name in names}
    epoch = min(each["epoch"] for each in counters)
    summary = f"epoch {epoch}, {totals['tokens']:,} tokens"
    tokens_per_document = chars_per_token = None
    if totals["documents"]:
        tokens_per_document = totals["tokens_of_documents"] / totals["documents"]
        chars_per_token = totals["characters"] / totals["tokens_of_documents"]
        summary += f", {totals['documents']:,} documents finished ({size_text(totals['bytes'])}, "
        summary += f"{tokens_per_document:,.0f} tokens per document, {chars_per_token:.2f} characters per token)"
    elif totals["tokens"]:
        summary += ", no document read to its end yet"
    if bad_documents:
        summary += f"; {len(bad_documents)} unreadable documents skipped, the first: {bad_documents[0]}"
    return {
        "summary": summary,
        "epoch": epoch,
        **totals,
        "tokens_per_document": tokens_per_document,
        "chars_per_token": chars_per_token,
        "bad_documents": list(bad_documents),
        "rows_per_lane": [rows_per_lane[lane] for lane in sorted(rows_per_lane)],
        "encoder": encoder,
    }
