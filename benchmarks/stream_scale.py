"""The stream at 1,024 lanes on 1,024 simulated ranks over 54 shards: state size, bytes read at start, balance.

``python benchmarks/stream_scale.py --record`` makes a corpus of 54 shards of the Python sources that are installed here
(or takes --data) and plays every rank in turn, in this process; no rank knows more than it would know alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import sysconfig
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from record import REPOSITORY, write_record

from codeparrot_ds.config.run_config import RunConfig
from codeparrot_ds.corpus.build import build_corpus
from codeparrot_ds.corpus.tokenizer import train_tokenizer
from codeparrot_ds.data.datasets import StreamStart, saved_stream
from codeparrot_ds.data.encoder import load_encoder
from codeparrot_ds.data.shards import BadDocuments, find_shards, read_documents
from codeparrot_ds.data.stream import StreamConfig, lane_pieces, stream_fingerprint
from codeparrot_ds.rows.access import LocalFile

sys.path[:0] = [str(REPOSITORY)]

from tests.data.streams import RowStream, open_stream  # noqa: E402

NUM_RANKS = NUM_LANES = 1024
NUM_SHARDS = 54
CORPUS_BYTES = 1 << 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="corpus folder (default: made of what is installed)")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer folder (default: trained on the corpus)")
    parser.add_argument("--record", action="store_true", help="write records/<date>-stream-scale-cpu")
    parser.add_argument("--out", type=Path, help="another folder for the record")
    options = parser.parse_args()
    with TemporaryDirectory() as temporary:
        data, tokenizer = options.data, options.tokenizer or Path(temporary) / "tokenizer"
        if data is None:
            data = Path(temporary) / "corpus"
            build_corpus([sysconfig.get_paths()["purelib"]], data, near_duplicates=False)
        if not tokenizer.is_dir():
            train_tokenizer(data, tokenizer, vocab_size=16384, max_bytes=32 << 20)
        reshard(data / "train", Path(temporary) / "scale" / "train")
        config = RunConfig(data=str(Path(temporary) / "scale"), tokenizer=str(tokenizer), num_lanes=NUM_LANES)
        encoder = load_encoder(tokenizer)
        if reason := encoder.prove_fast_encoding(()):
            raise SystemExit(reason)
        raw = measure(open_stream(config, encoder))
    text = summary(raw)
    print(text)
    if options.record or options.out:
        title = f"The stream on {NUM_RANKS:,} simulated ranks"
        print(write_record("stream-scale-cpu", title=title, text=text, raw=raw, out=options.out))


def reshard(source: Path, target: Path) -> None:
    """The same documents in 54 shards, as often as makes a gigabyte."""
    target.mkdir(parents=True)
    shards = find_shards(source.parent, "train")
    copies = -(-CORPUS_BYTES // sum(shard.bytes for shard in shards))
    files = [open(target / f"part-{number:05d}.jsonl", "wb") for number in range(NUM_SHARDS)]  # noqa: SIM115
    number = 0
    for shard in shards * copies:
        with open(shard.path, "rb") as lines:
            for line in lines:
                files[number % NUM_SHARDS].write(line)
                number += 1
    for file in files:
        file.close()


def measure(stream: StreamConfig) -> dict[str, Any]:
    """Plays the ranks: what each reads until its first row, how long it takes, and what it owns of an epoch."""
    shards = stream.datasets[0].shards
    started = time.perf_counter()
    fingerprint = stream_fingerprint(stream)
    fingerprint_seconds = time.perf_counter() - started
    counted = CountedReads()
    start_bytes, start_reads, start_seconds, states = [], [], [], {}
    with counted:
        for rank in range(NUM_RANKS):
            counted.reset()
            started = time.perf_counter()
            row = next(iter(RowStream(stream, rank=rank, world_size=NUM_RANKS)))
            start_seconds.append(time.perf_counter() - started)
            start_bytes.append(counted.bytes)
            start_reads.append(counted.reads)
            states[row.lane] = row.states
    saved = saved_stream(fingerprint, StreamStart(row=NUM_LANES, lane_states=states))
    documents, tokens = [], []
    for lane in range(NUM_LANES):
        texts = [
            text
            for piece in lane_pieces(shards, NUM_LANES, lane)
            for text, _ in read_documents(piece, bad=BadDocuments())
        ]
        documents.append(len(texts))
        tokens.append(sum(len(ids) + 1 for ids in stream.encoder.encode_batch(texts)))
    return {
        "corpus_bytes": sum(shard.bytes for shard in shards),
        "shards": len(shards),
        "documents": sum(documents),
        "saved_bytes": len(json.dumps(saved)),
        "saved_bytes_of_lanes": len(json.dumps(saved["lanes"])),
        "fingerprint_seconds": fingerprint_seconds,
        "start_bytes_a_rank": start_bytes,
        "start_reads_a_rank": start_reads,
        "start_seconds_a_rank": start_seconds,
        "documents_a_lane": documents,
        "tokens_a_lane": tokens,
    }


class CountedReads:
    """Counts what is asked of local files while it is entered."""

    def __init__(self) -> None:
        self._real = LocalFile.read_at
        self.reset()

    def reset(self) -> None:
        self.bytes = self.reads = 0

    def __enter__(self) -> None:
        def read_at(file: LocalFile, offset: int, size: int) -> bytes:
            data = self._real(file, offset, size)
            self.bytes, self.reads = self.bytes + len(data), self.reads + 1
            return data

        LocalFile.read_at = read_at  # type: ignore[method-assign]

    def __exit__(self, *_: object) -> None:
        LocalFile.read_at = self._real  # type: ignore[method-assign]


def summary(raw: dict[str, Any]) -> str:
    tokens = np.array(raw["tokens_a_lane"])
    start = raw["start_bytes_a_rank"]
    rows = {
        "corpus": f"{raw['corpus_bytes'] / 1e6:,.0f} MB, {raw['documents']:,} documents, {raw['shards']} shards",
        "saved state of the data": f"{raw['saved_bytes'] / 1e3:,.0f} kB of JSON, of which lanes "
        f"{raw['saved_bytes_of_lanes'] / 1e3:,.0f} kB ({raw['saved_bytes_of_lanes'] / NUM_LANES:.0f} bytes a lane)",
        "fingerprint (rank 0)": f"{raw['fingerprint_seconds'] * 1e3:.0f} ms",
        "bytes read until the first row, a rank": f"median {statistics.median(start) / 1e3:,.0f} kB, most "
        f"{max(start) / 1e3:,.0f} kB; all ranks {sum(start) / raw['corpus_bytes']:.2f} times the corpus",
        "reads until the first row, a rank": f"median {statistics.median(raw['start_reads_a_rank']):.0f}, most "
        f"{max(raw['start_reads_a_rank'])}",
        "seconds until the first row, a rank": f"median {statistics.median(raw['start_seconds_a_rank']) * 1e3:.1f} ms, "
        f"most {max(raw['start_seconds_a_rank']) * 1e3:.0f} ms",
        "documents a lane": f"{min(raw['documents_a_lane'])}-{max(raw['documents_a_lane'])}",
        "tokens a lane and epoch": f"mean {tokens.mean():,.0f}, standard deviation {tokens.std() / tokens.mean():.0%}, "
        f"least {tokens.min() / tokens.mean():.2f}, most {tokens.max() / tokens.mean():.2f} of the mean",
    }
    return "\n".join(["| what | measured |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


if __name__ == "__main__":
    main()
