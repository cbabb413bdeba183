"""The rows that a rank trains and evaluates on: data sets opened once by rank 0, and where the stream begins."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

from codeparrot_ds.checkpoint.run_folder import RunFolder, began_data
from codeparrot_ds.checkpoint.state import RunState
from codeparrot_ds.config.run_config import RunConfig
from codeparrot_ds.data.datasets import (
    StreamStart,
    open_datasets,
    pinned_names,
    proof_texts,
    resume_stream,
    run_fingerprint,
    stream_of,
    validation_shards,
)
from codeparrot_ds.data.loader import TrainingLoader
from codeparrot_ds.data.shards import Shard, in_version_1
from codeparrot_ds.data.stream import Dataset, StreamConfig
from codeparrot_ds.engine.ranks import Ranks
from codeparrot_ds.json_files import parts_of
from codeparrot_ds.resolved_run import ResolvedRun

logger = logging.getLogger("codeparrot_ds.data")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunData:
    """What a run reads."""

    stream: StreamConfig
    validation: list[Shard]
    fingerprint: dict[str, Any]
    """Of the stream: with it a resumed run knows its rows again."""

    def start(self, config: RunConfig, ranks: Ranks, restored: RunState | None) -> tuple[StreamStart, list[str]]:
        """Where the stream begins, and what has changed in the data where that is a new epoch; collective."""
        if restored is None:
            return StreamStart(), []
        saved = restored.data

        def resume() -> tuple[StreamStart, list[str]]:
            with parts_of(f"the place in the data of the checkpoint at step {restored.step}"):
                return resume_stream(saved, self.fingerprint, on_data_change=config.on_data_change)

        return ranks.on_main(resume)

    def loader(self, config: RunConfig, ranks: Ranks, start: StreamStart) -> TrainingLoader:
        """This rank's micro-batches from there on."""
        return TrainingLoader(
            self.stream,
            micro_batch_size=config.micro_batch_rows,
            num_workers=config.num_workers,
            rank=ranks.rank,
            world_size=ranks.world_size,
            start_row=start.row,
            lane_states=start.lane_states,
        )


def open_data(run: ResolvedRun, folder: RunFolder, ranks: Ranks) -> RunData:
    """Opens the run's data sets, which stay at the Hub commits that the run began with; collective."""
    # On rank 0 alone: on the Hub each look costs requests.
    datasets, validation, began = ranks.on_main(lambda: _open(run.config, folder))
    stream = stream_of(run.config, datasets, run.encoder, folder.record["order_version"])
    if stream.order_version == 1:
        validation = in_version_1(validation)
    fingerprint = ranks.on_main(lambda: run_fingerprint(run.config, stream, began))
    _choose_encoding(stream, ranks)
    return RunData(stream=stream, validation=validation, fingerprint=fingerprint)


def _open(config: RunConfig, folder: RunFolder) -> tuple[list[Dataset], list[Shard], dict[str, Any] | None]:
    began = began_data(config)
    datasets = open_datasets(config, folder.record.get("data_pins"), began)
    pins = pinned_names(config, datasets)
    if pins:
        folder.update(data_pins=folder.record.get("data_pins", {}) | pins)
    return datasets, validation_shards(config, began), began


def _choose_encoding(stream: StreamConfig, ranks: Ranks) -> None:
    """Every rank encodes with gigatoken where rank 0 has proved it on the corpus; otherwise none does."""
    reason = ranks.on_main(lambda: stream.encoder.prove_fast_encoding(proof_texts(stream)))
    if reason is None and not ranks.is_main:
        reason = stream.encoder.prove_fast_encoding(())
    if ranks.gather(reason) != [None] * ranks.world_size:
        stream.encoder.forget_fast_encoding()
        if ranks.is_main:
            logger.warning("%s; the tokenizers library encodes instead, at a hundredth of the speed", reason)
