"""The rows of a stream as text, so that a person sees what the model sees. Neither torch nor a model is needed."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from codeparrot_ds.config.files import load_config
from codeparrot_ds.config.run_config import RunConfig
from codeparrot_ds.data.datasets import open_datasets, proof_texts, split_shards, stream_of
from codeparrot_ds.data.encoder import load_encoder
from codeparrot_ds.data.shards import BadDocuments, Shard, in_version_1, read_texts
from codeparrot_ds.data.stream import Lane, LaneState, StreamConfig
from codeparrot_ds.data.validation import ValidationLoader
from codeparrot_ds.errors import UserError
from codeparrot_ds.paths import exists, may_be_on_hub, no_run
from codeparrot_ds.terminal import VISIBLE, Progress, visible

DIM, BOLD, PLAIN = "\x1b[2m", "\x1b[1m", "\x1b[0m"
VISIBLE |= {0x7F: "\u2421"} | {code: f"\\x{code:02x}" for code in range(0x80, 0xA0)}


@dataclass(frozen=True, kw_only=True)
class InspectedRow:
    """One packed row and where it comes from."""

    index: int
    """Of the stream; for validation the index that lanes which have ended leave gaps in."""
    lane: int
    dataset: str
    epoch: int | None
    """In which the row ends; None for validation, which is one pass."""
    continued: bool
    """Whether the row begins inside a document."""
    ids: np.ndarray
    """Shape (tokens,), without padding."""
    padding: int
    """Tokens of padding after them."""

    def documents(self, eos_token_id: int) -> list[np.ndarray]:
        """The ids cut after each end-of-sequence token: what the row holds of each document."""
        parts = np.split(self.ids, np.flatnonzero(self.ids == eos_token_id) + 1)
        return parts if len(parts[-1]) else parts[:-1]


def inspection_config(source: str, *, tokenizer: str | None = None, **fields: int | str | None) -> RunConfig:
    """The run config whose stream is to be seen.

    Args:
        source: a run's folder, or what a run config's ``data`` may be.
        tokenizer: its folder; needed where the source is no run.
        fields: fields of the run config that win over the run's; None for those that do not.

    Raises a UserError for a run without a config, and for no tokenizer.
    """
    values: dict[str, Any] = {name: value for name, value in fields.items() if value is not None}
    if tokenizer:
        values["tokenizer"] = tokenizer
    folder = Path(source)
    if (folder / "config.yaml").is_file():
        config = dataclasses.replace(load_config(folder / "config.yaml"), **values)
        if not config.data or not config.tokenizer:
            raise UserError(f"{folder / 'config.yaml'} names no {'tokenizer' if config.data else 'data'}")
        return config
    if (folder / "run.json").is_file():
        raise UserError(f"{folder} is a run without config.yaml; name its data instead, with --tokenizer DIR")
    if "=" not in source and not exists(source) and not may_be_on_hub(source):
        hint = "make a corpus with `codeparrot-ds corpus SRC --out DIR`"
        raise UserError(no_run(source, what="run or data", otherwise=hint))
    if not tokenizer:
        raise UserError(f"{source} is not a run, so its tokenizer must be named with --tokenizer DIR")
    return RunConfig(data=source, **values)


class RowReader:
    """Reads the rows of a run config's training stream or validation pass, from any row on.

    Only the lanes of the wanted rows are read, each from its start: a lane's state at a row is known no other way.

    Args:
        split: one of ``layouts.SPLITS``.
        pins, began: of the run, where it is one: see ``datasets.open_datasets``.
        order_version: of the run; None for what a run that begins now has.
    """

    def __init__(
        self,
        config: RunConfig,
        split: str,
        pins: Mapping[str, str] | None = None,
        began: Mapping[str, Any] | None = None,
        order_version: int | None = None,
    ) -> None:
        self._config, self._split = config, split
        self._data = config.validation_data or config.data if split == "validation" else config.data
        self.bad_documents = BadDocuments(config.max_bad_documents)
        self.encoder = load_encoder(config.tokenizer)
        self._stream: StreamConfig | None = None
        self._shards: list[Shard] = []
        if split == "train":
            self._stream = stream_of(config, open_datasets(config, pins, began), self.encoder, order_version)
            self.encoder = self._stream.encoder
            texts = proof_texts(self._stream)
        else:
            named = bool(config.validation_data)
            self._shards = split_shards(self._data, split, named=named, columns=config.columns, began=began)
            if order_version == 1:
                self._shards, self.encoder = in_version_1(self._shards), self.encoder.in_version_1()
            texts = read_texts(self._shards, BadDocuments(limit=None))
        self.slow_reason = self.encoder.prove_fast_encoding(texts)
        """Why gigatoken is not used; None where it is."""

    def rows(self, start_row: int, count: int, progress: Progress | None = None) -> Iterator[InspectedRow]:
        """Up to ``count`` rows from ``start_row`` on; all that lies before is read at once, in this call.

        Raises a UserError when validation ends before ``start_row``.
        """
        num_lanes = self._config.num_lanes
        wanted = range(start_row, start_row + min(count, num_lanes))
        lanes = {index % num_lanes: self._lane(index % num_lanes) for index in wanted}
        total, done = sum(index // num_lanes for index in wanted), 0
        for index in wanted:
            for _ in islice(lanes[index % num_lanes], index // num_lanes):
                done += 1
                if progress:
                    progress(f"reading up to row {start_row:,}", done, total)
        return self._in_turn(lanes, start_row, count)

    def _in_turn(self, lanes: dict[int, Iterator[InspectedRow]], start_row: int, count: int) -> Iterator[InspectedRow]:
        num_lanes = self._config.num_lanes
        index, shown, ended = start_row, 0, 0
        while shown < count and ended < num_lanes:
            lane = index % num_lanes
            if lane not in lanes:  # beyond the wanted ones, because some of those have ended
                lanes[lane] = self._lane(lane)
                next(islice(lanes[lane], index // num_lanes, index // num_lanes), None)
            row = next(lanes[lane], None)
            index += 1
            # Ended lanes stay ended: only a whole round of them is the end of the pass.
            ended = 0 if row else ended + 1
            if row:
                shown += 1
                yield row
        if count and not shown:
            raise UserError(f"the {self._split} split of {self._data} ends before row {start_row}")

    def _lane(self, lane: int) -> Iterator[InspectedRow]:
        """The rows of one lane from its first."""
        return self._training_lane(self._stream, lane) if self._stream else self._validation_lane(lane)

    def _training_lane(self, stream: StreamConfig, number: int) -> Iterator[InspectedRow]:
        lane = Lane(stream, number, (LaneState(),) * len(stream.datasets), self.bad_documents)
        index = number
        while True:
            before = [LaneState.from_array(state) for state in lane.states]
            rows = np.empty((1, stream.seq_length), self.encoder.dtype)
            lane.take(rows, np.empty((1, *lane.states.shape), np.int64))
            after = [LaneState.from_array(state) for state in lane.states]
            source = next(place for place, state in enumerate(after) if state.tokens > before[place].tokens)
            yield InspectedRow(
                index=index,
                lane=number,
                dataset=stream.datasets[source].name,
                epoch=after[source].epoch,
                continued=before[source].token > 0,
                ids=rows[0],
                padding=0,
            )
            index += stream.num_lanes

    def _validation_lane(self, number: int) -> Iterator[InspectedRow]:
        config = self._config
        loader = ValidationLoader(
            self._shards,
            self.encoder,
            seq_length=config.seq_length,
            num_lanes=config.num_lanes,
            batch_size=1,
            # A rank of so many has this one lane, and with it the indexes of its rows are known.
            rank=number,
            world_size=config.num_lanes,
        )
        loader.bad_documents = self.bad_documents
        index, continued = number, False
        for row in loader.rows():
            ids = row.ids[: row.num_valid_tokens]
            yield InspectedRow(
                index=index,
                lane=number,
                dataset=self._data,
                epoch=None,
                continued=continued,
                ids=ids,
                padding=len(row.ids) - len(ids),
            )
            index, continued = index + config.num_lanes, bool(ids[-1] != self.encoder.eos_token_id)

    def decode(self, ids: np.ndarray) -> str:
        """The text of some ids; what is cut off inside a character becomes U+FFFD."""
        return self.encoder.decode(ids)


class RowPrinter:
    """Writes rows for people, and adds up what it wrote.

    Args:
        width: columns of a rule.
        colour: mark rules with the escape codes of a terminal.
        ids: write the token ids of each document below its text.
    """

    def __init__(self, reader: RowReader, *, width: int = 80, colour: bool = False, ids: bool = False) -> None:
        self._reader, self._width, self._colour, self._ids = reader, width, colour, ids
        self._rows = self._tokens = self._characters = 0

    def row(self, row: InspectedRow) -> str:
        """The row's header, its text with the documents' borders, and where they continue."""
        eos_token_id = self._reader.encoder.eos_token_id
        documents = row.documents(eos_token_id)
        lines = [self._header(row, documents)]
        if row.continued:
            lines.append(self._rule("continued: this document began in an earlier row"))
        for ids in documents:
            ends = ids[-1] == eos_token_id
            text = self._reader.decode(ids[:-1] if ends else ids)
            self._characters += len(text)
            lines.append(visible(text).removesuffix("\n"))
            if self._ids:
                lines.append(self._styled(DIM, self._wrapped(ids)))
            lines.append(self._rule("end of document" if ends else "end of the row: this document continues"))
        if row.padding:
            lines.append(self._rule(f"{row.padding:,} tokens of padding"))
        self._rows, self._tokens = self._rows + 1, self._tokens + len(row.ids)
        return "\n".join([*lines, ""])

    def _header(self, row: InspectedRow, documents: list[np.ndarray]) -> str:
        ended = sum(ids[-1] == self._reader.encoder.eos_token_id for ids in documents)
        facts = [f"row {row.index:,}", f"lane {row.lane}", f"{len(row.ids):,} tokens"]
        if row.epoch is not None:
            facts.insert(2, f"epoch {row.epoch}")
        facts.append(f"documents begun {len(documents) - row.continued}, ended {ended}")
        return self._styled(BOLD, " · ".join([*facts, row.dataset]))

    def _wrapped(self, ids: np.ndarray) -> str:
        return textwrap.fill(" ".join(map(str, ids.tolist())), self._width)

    def _rule(self, text: str) -> str:
        return self._styled(DIM, f"──── {text} ".ljust(self._width, "─"))

    def _styled(self, style: str, text: str) -> str:
        return f"{style}{text}{PLAIN}" if self._colour else text

    def summary(self) -> str:
        """One line about the rows written so far: encoder, characters per token, unreadable documents."""
        reader = self._reader
        text = f"{self._rows:,} row{'s' * (self._rows != 1)}, {self._tokens:,} tokens"
        if self._tokens:
            text += f", {self._characters / self._tokens:.2f} characters per token"
        text += f"; encoded by {reader.encoder.name}"
        if reader.slow_reason:
            text += f" ({reader.slow_reason})"
        if bad := list(reader.bad_documents):
            text += f"; {len(bad)} unreadable documents skipped, the first: {bad[0]}"
        return text
