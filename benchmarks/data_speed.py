"""The data path: raw JSON lines to packed rows, against the recipe's class and against a pre-tokenized file.

``python benchmarks/data_speed.py --record`` makes a corpus of the Python sources that are installed here and measures

- rows on one core: ours, the recipe's class with the Hugging Face tokenizer on the same files, and a memory-mapped file
  of token ids (what nobody who tokenizes can beat), interleaved, in MB of text per CPU-second; and where the time goes;
- whether a training step has to wait: steps that do nothing but take their time, with two loader workers, beside the
  same with rows of the memory-mapped file;
- the first batch, on the corpus and on 1 GB;
- peak memory, on the corpus and on ten times as much.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from record import write_record

from codeparrot_ds.config.run_config import RunConfig
from codeparrot_ds.corpus.build import build_corpus
from codeparrot_ds.corpus.tokenizer import train_tokenizer
from codeparrot_ds.data.datasets import check_datasets, open_datasets, proof_texts, stream_of
from codeparrot_ds.data.encoder import Encoder, load_encoder
from codeparrot_ds.data.loader import TrainingLoader
from codeparrot_ds.data.packing import Packer
from codeparrot_ds.data.shards import BadDocuments, Piece, find_shards, read_documents, read_texts
from codeparrot_ds.data.stream import StreamConfig, stream_fingerprint

SEQ_LENGTH = 1024
STEP_ROWS = 98  # 100,352 tokens
SUBSET_BYTES = 32 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, help="keeps corpus and tokenizer there (default: a temporary folder)")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default: 5)")
    parser.add_argument("--record", action="store_true", help="write records/<date>-data-cpu")
    parser.add_argument("--out", type=Path, help="another folder for the record")
    options = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with TemporaryDirectory() as temporary:
        workdir = options.workdir or Path(temporary)
        prepare(workdir)
        raw = {
            "corpus_bytes": sum(shard.bytes for shard in find_shards(workdir / "corpus", "train")),
            "one_core": one_core(workdir, options.rounds),
            "paced": paced(workdir),
            "first_batch": first_batches(workdir),
            "memory": memory(workdir),
        }
    text = summary(raw)
    print(text)
    if options.record or options.out:
        print(write_record("data-cpu", title="Data: raw text to packed rows", text=text, raw=raw, out=options.out))


# --------------------------------------------------------------------------------------------------------------------
# What is measured on


def prepare(workdir: Path) -> None:
    """The corpus, a tokenizer of 16,384 tokens, a subset of one shard, and the corpus several times over."""
    workdir.mkdir(parents=True, exist_ok=True)
    if not (workdir / "corpus").is_dir():
        paths = sysconfig.get_paths()
        build_corpus([paths["stdlib"], paths["purelib"]], workdir / "corpus", near_duplicates=False)
    if not (workdir / "tokenizer").is_dir():
        train_tokenizer(workdir / "corpus", workdir / "tokenizer", vocab_size=16384, max_bytes=64 << 20)
    if not (workdir / "subset").is_dir():
        lines = all_lines(workdir)
        (workdir / "subset" / "train").mkdir(parents=True)
        with open(workdir / "subset" / "train" / "part-00000.jsonl", "wb") as file:
            while file.tell() < SUBSET_BYTES:
                file.write(next(lines))
    corpus_bytes = sum(shard.bytes for shard in find_shards(workdir / "corpus", "train"))
    for name, copies in (("gigabyte", -(-(10**9) // corpus_bytes)), ("tenfold", 10)):
        if not (workdir / name).is_dir():
            (workdir / name / "train").mkdir(parents=True)
            (workdir / name / "validation").mkdir()
            for copy in range(copies):
                for shard in find_shards(workdir / "corpus", "train"):
                    os.link(shard.path, workdir / name / "train" / f"copy-{copy:02d}-{shard.name}")
            shutil.copytree(workdir / "corpus" / "validation", workdir / name / "validation", dirs_exist_ok=True)


def all_lines(workdir: Path) -> Iterator[bytes]:
    for shard in find_shards(workdir / "corpus", "train"):
        with open(shard.path, "rb") as file:
            yield from file


def run_config(workdir: Path, corpus: str) -> RunConfig:
    return RunConfig(data=str(workdir / corpus), tokenizer=str(workdir / "tokenizer"))


def open_stream(workdir: Path, corpus: str, *, check: bool = False) -> StreamConfig:
    """Opens a stream as a run does, with what the front door checks when ``check`` is set."""
    config = run_config(workdir, corpus)
    datasets = open_datasets(config)
    if check:
        check_datasets(config, datasets)
    stream = stream_of(config, datasets, load_encoder(workdir / "tokenizer"))
    reason = stream.encoder.prove_fast_encoding(proof_texts(stream))
    if reason:
        raise SystemExit(f"these are not the speeds of gigatoken: {reason}")
    return stream


# --------------------------------------------------------------------------------------------------------------------
# One core


Timed = tuple[int, float]
"""Bytes of text and CPU-seconds."""


def one_core(workdir: Path, rounds: int) -> dict[str, Any]:
    """MB of text a CPU-second on one core, each contender in turn in every round, and the stages of ours."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    pretokenize(workdir)
    contenders: dict[str, Callable[[], Timed]] = {
        "ours": lambda: read_epoch(open_stream(workdir, "subset")),
        "recipe": lambda: read_recipe(workdir),
        "ours, whole corpus": lambda: read_epoch(open_stream(workdir, "corpus")),
        "pretokenized": lambda: timed(lambda: pretokenized(workdir)),
        **{f"stage: {name}": stage for name, stage in stages(workdir).items()},
    }
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            num_bytes, seconds = contender()
            rates[name].append(num_bytes / seconds / 1e6)
            print(f"{name}: {rates[name][-1]:,.1f} MB/s", file=sys.stderr)
    os.sched_setaffinity(0, cores)
    return {"rates_mb_per_cpu_second": rates, "rows_identical": rows_identical(workdir)}


def timed(work: Callable[[], int]) -> Timed:
    started = time.process_time()
    num_bytes = work()
    return num_bytes, time.process_time() - started


def read_epoch(stream: StreamConfig) -> Timed:
    """About one epoch through the loader in this process, with an encoder that has seen nothing but its proof."""
    total = sum(shard.bytes for dataset in stream.datasets for shard in dataset.shards)

    def read() -> int:
        loader = TrainingLoader(stream, micro_batch_size=STEP_ROWS)
        while loader.counters()["bytes"] < 0.9 * total:
            next(loader)
        return loader.counters()["bytes"]

    return timed(read)


def read_recipe(workdir: Path) -> Timed:
    num_bytes = sum(len(text.encode()) for text in read_texts(find_shards(workdir / "subset", "train"), BadDocuments()))

    def read() -> int:
        for _ in recipe_rows(workdir):
            pass
        return num_bytes

    return timed(read)


def recipe_rows(workdir: Path) -> Iterator[Any]:
    """The recipe's class, written as it is there, on the recipe's stream of the same files."""
    import torch
    from datasets import load_dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(workdir / "tokenizer")
    files = str(workdir / "subset" / "train" / "*.jsonl")
    dataset = load_dataset("json", data_files=files, split="train", streaming=True).shuffle(buffer_size=1000, seed=1)
    input_characters, more = SEQ_LENGTH * 3.6 * 1024, True
    iterator = iter(dataset)
    while more:
        buffer, buffer_length = [], 0
        while buffer_length < input_characters:
            try:
                buffer.append(next(iterator)["content"])
                buffer_length += len(buffer[-1])
            except StopIteration:
                more = False
                break
        all_token_ids: list[int] = []
        for ids in tokenizer(buffer, truncation=False)["input_ids"] if buffer else []:
            all_token_ids.extend([*ids, tokenizer.eos_token_id])
        for start in range(0, len(all_token_ids), SEQ_LENGTH):
            ids = all_token_ids[start : start + SEQ_LENGTH]
            if len(ids) == SEQ_LENGTH:
                yield torch.tensor(ids)


def rows_identical(workdir: Path) -> bool:
    """Whether our encoder and packing core give the rows of the recipe's class, under its rule, on the same texts."""
    from datasets import load_dataset

    stream = open_stream(workdir, "subset")
    files = str(workdir / "subset" / "train" / "*.jsonl")
    dataset = load_dataset("json", data_files=files, split="train", streaming=True).shuffle(buffer_size=1000, seed=1)
    texts = (row["content"] for row in dataset)
    theirs = recipe_rows(workdir)
    while True:
        buffer, length = [], 0
        while length < SEQ_LENGTH * 3.6 * 1024 and (text := next(texts, None)) is not None:
            buffer.append(text)
            length += len(text)
        if not buffer:
            return next(theirs, None) is None
        packer = Packer(SEQ_LENGTH, stream.encoder.eos_token_id, stream.encoder.dtype)
        for row in packer.add(stream.encoder.encode_batch(buffer)).rows:
            if not np.array_equal(row, next(theirs).numpy()):
                return False


def pretokenize(workdir: Path) -> None:
    stream = open_stream(workdir, "corpus")
    if (workdir / "tokens.npy").is_file():
        return
    packer = Packer(SEQ_LENGTH, stream.encoder.eos_token_id, stream.encoder.dtype)
    texts = read_texts(find_shards(workdir / "corpus", "train"), BadDocuments())
    np.save(workdir / "tokens.npy", packer.add([*map(stream.encoder._fast_encode, texts)]).rows)  # type: ignore[arg-type]


def pretokenized(workdir: Path) -> int:
    """Micro-batches in random order from a memory-mapped file of token ids; returns the text's bytes."""
    rows = np.load(workdir / "tokens.npy", mmap_mode="r")
    order = np.random.default_rng(0).permutation(len(rows))
    for start in range(0, len(order) - STEP_ROWS, STEP_ROWS):
        rows[order[start : start + STEP_ROWS]].sum()
    return sum(shard.bytes for shard in find_shards(workdir / "corpus", "train"))


def stages(workdir: Path) -> dict[str, Callable[[], Timed]]:
    """The stages of our path one at a time, over the whole corpus (packing over a part of it)."""
    import orjson

    shards = find_shards(workdir / "corpus", "train")
    total = sum(shard.bytes for shard in shards)
    encoder: Encoder = open_stream(workdir, "subset").encoder
    texts = list(read_texts(shards, BadDocuments()))
    num_bytes = sum(map(len, texts))
    lines = list(all_lines(workdir))

    def read() -> int:
        for shard in shards:
            with open(shard.path, "rb", buffering=1 << 18) as file:
                for _ in file:
                    pass
        return total

    def parse() -> int:
        for line in lines:
            orjson.loads(line)
        return total

    def read_and_parse() -> int:
        for shard in shards:
            for _ in read_documents(Piece(shard, 0, shard.bytes), bad=BadDocuments()):
                pass
        return num_bytes

    def encode() -> Timed:
        fresh = load_encoder(workdir / "tokenizer")  # with an empty cache of words, as a run begins
        fresh.prove_fast_encoding(())
        return timed(lambda: sum(len(text) for text in texts if len(fresh.encode_batch([text]))))

    def pack() -> int:
        packer = Packer(SEQ_LENGTH, 0, np.uint16)
        for start in range(0, len(ids), 16):
            packer.add(ids[start : start + 16])
        return sum(map(len, texts[: len(ids)]))

    ids = encoder.encode_batch(texts[:2000])
    return {
        "reading lines": lambda: timed(read),
        "parsing JSON": lambda: timed(parse),
        "our reader (both)": lambda: timed(read_and_parse),
        "encoding": encode,
        "packing": lambda: timed(pack),
    }


# --------------------------------------------------------------------------------------------------------------------
# Waiting, first batch, memory


def paced(workdir: Path) -> list[dict[str, float]]:
    """The share of the time that steps of 100,352 tokens wait for data after the first, for several paces."""
    results = []
    for step_seconds in (0.001, 0.0015, 0.002, 0.003, 0.005, 0.02, 0.1):
        loader = TrainingLoader(open_stream(workdir, "corpus"), micro_batch_size=STEP_ROWS, num_workers=2)
        next(loader)
        steps, waited, started = int(min(2000, 20 / step_seconds)), loader.wait_seconds, time.perf_counter()
        for _ in range(steps):
            time.sleep(step_seconds)
            next(loader)
        seconds = time.perf_counter() - started
        results.append(
            {
                "step_seconds": step_seconds,
                "asked_tokens_per_second": STEP_ROWS * SEQ_LENGTH / step_seconds,
                "tokens_per_second": steps * STEP_ROWS * SEQ_LENGTH / seconds,
                "wait_share": (loader.wait_seconds - waited) / seconds,
                "mapped_wait_share": mapped_wait_share(workdir, step_seconds, steps),
            }
        )
        loader.close()
    return results


def mapped_wait_share(workdir: Path, step_seconds: float, steps: int) -> float:
    """The same of a loop that takes its rows from the memory-mapped file, in random order."""
    rows = np.load(workdir / "tokens.npy", mmap_mode="r")
    chosen = np.random.default_rng(0).integers(len(rows), size=(steps, STEP_ROWS))
    waited, started = 0.0, time.perf_counter()
    for indices in chosen:
        time.sleep(step_seconds)
        asked = time.perf_counter()
        torch.from_numpy(rows[indices])
        waited += time.perf_counter() - asked
    return waited / (time.perf_counter() - started)


def first_batches(workdir: Path) -> dict[str, dict[str, float]]:
    """Seconds from nothing but imports to the first micro-batch, as the front door and the ranks together need them."""
    results = {}
    for corpus in ("corpus", "gigabyte"):
        started = time.perf_counter()
        stream = open_stream(workdir, corpus, check=True)
        opened = time.perf_counter()
        stream_fingerprint(stream)
        fingerprinted = time.perf_counter()
        loader = TrainingLoader(stream, micro_batch_size=12, num_workers=1)
        next(loader)
        results[corpus] = {
            "bytes": sum(shard.bytes for shard in stream.datasets[0].shards),
            "open, check lanes, prove the encoder": opened - started,
            "fingerprint": fingerprinted - opened,
            "workers and first batch": time.perf_counter() - fingerprinted,
        }
        loader.close()
    return results


MEMORY = """
import itertools, json, sys
sys.path[:0] = [".", "benchmarks"]
from pathlib import Path
from codeparrot_ds.config.run_config import RunConfig
from codeparrot_ds.data.encoder import load_encoder
from tests.data.streams import RowStream, open_stream
def peak():  # not getrusage, whose peak a process inherits from the one that started it
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
workdir, corpus, rows = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
encoder = load_encoder(workdir / "tokenizer")
encoder.prove_fast_encoding(())
before = peak()
config = RunConfig(data=str(workdir / corpus), tokenizer=str(workdir / "tokenizer"))
marks = []
for number, row in enumerate(itertools.islice(RowStream(open_stream(config, encoder)), rows)):
    if number % (rows // 8) == rows // 8 - 1:
        marks.append(peak())
print(json.dumps({"before": before * 1024, "peaks": [mark * 1024 for mark in marks]}))
"""


def memory(workdir: Path, rows: int = 40_000) -> dict[str, Any]:
    """Peak memory of a process that does nothing but stream all 64 lanes, after each eighth of the rows."""
    results = {}
    for corpus in ("corpus", "tenfold"):
        command = [sys.executable, "-c", MEMORY, str(workdir), corpus, str(rows)]
        results[corpus] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return results


# --------------------------------------------------------------------------------------------------------------------
# Words


def summary(raw: dict[str, Any]) -> str:
    all_rates = raw["one_core"]["rates_mb_per_cpu_second"]
    ratios = [ours / recipe for ours, recipe in zip(all_rates["ours"], all_rates["recipe"], strict=True)]
    rates = {name: statistics.median(values) for name, values in all_rates.items()}
    identical = "identical" if raw["one_core"]["rows_identical"] else "DIFFERENT"
    lines = [
        f"One core, MB of text a CPU-second, medians of {len(ratios)} interleaved rounds. Ours and the recipe's class "
        f"read the same {SUBSET_BYTES / 1e6:.0f} MB; the corpus has {raw['corpus_bytes'] / 1e6:.0f} MB.",
        "",
        "| what | MB/s |",
        "|---|---|",
        *(f"| {name} | {rate:,.1f} |" for name, rate in rates.items()),
        "",
        f"Ours is {statistics.median(ratios):.0f} times the recipe's class ({min(ratios):.0f}-{max(ratios):.0f}); rows "
        f"under the recipe's packing rule are {identical}.",
        "",
        "Steps of 100,352 tokens that only take their time, two workers:",
        "",
        "| step | asked for, M tokens/s | got | share of the time waiting | of the memory-mapped file |",
        "|---|---|---|---|---|",
        *(
            f"| {row['step_seconds'] * 1e3:.1f} ms | {row['asked_tokens_per_second'] / 1e6:.0f} | "
            f"{row['tokens_per_second'] / 1e6:.1f} | {row['wait_share']:.3%} | "
            f"{row['mapped_wait_share']:.3%} |"
            for row in raw["paced"]
        ),
        "",
        "First batch, seconds:",
        "",
        "| corpus | open, check lanes, prove the encoder | fingerprint | workers and first batch |",
        "|---|---|---|---|",
        *(
            f"| {row['bytes'] / 1e6:,.0f} MB | "
            + " | ".join(f"{value:.2f}" for name, value in row.items() if name != "bytes")
            + " |"
            for row in raw["first_batch"].values()
        ),
        "",
        "Peak memory of a process that streams 64 lanes, MB above what it had with the tokenizer loaded:",
        "",
        "| corpus | after 1/8 | after 8/8 of 40,000 rows |",
        "|---|---|---|",
        *(
            f"| {name} | " + " | ".join(f"{(row['peaks'][at] - row['before']) / 1e6:.0f}" for at in (0, -1)) + " |"
            for name, row in raw["memory"].items()
        ),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
