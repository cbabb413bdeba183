"""One table of formats: each container and each kind of damage reads the same in every reader."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from pyarrow import ipc

from codeparrot_ds.corpus.plan import plan_sources
from codeparrot_ds.corpus.readers import ReadAccount, read_json_rows, read_parquet_rows
from codeparrot_ds.data.shards import BadDocuments, find_shards, in_version_1, read_documents
from codeparrot_ds.data.stream import lane_pieces
from codeparrot_ds.errors import UserError
from codeparrot_ds.evaluation.problems import load_problems
from codeparrot_ds.evaluation.prompts import read_prompts

TEXTS = ["x = 1", "naïve 漢字 😀", "a\r\nb\u2028c\x85d", "<|endoftext|> is text", "y" * 3000, '"{[\\]}"\n\n  z', "last"]
Outcome = tuple[list[str], list[tuple[int, str]]]
"""Documents in their order; row and reason of what could not be read."""


def row(text: Any, number: int = 0) -> dict[str, Any]:
    """What is a document, a prompt and a problem."""
    problem = {"task_id": f"t/{number}", "entry_point": "f", "canonical_solution": "    1\n", "test": "def check(f): 0"}
    return {"content": text, "prompt": text, "repo_name": "org/name", "path": f"{number}.py", **problem}


ROWS = [row(text, number) for number, text in enumerate(TEXTS)]
LINES = [json.dumps(each, ensure_ascii=False).encode() + b"\n" for each in ROWS]
DATA = b"".join(LINES)
BOM = codecs.BOM_UTF8


def zst(data: bytes, **options: Any) -> bytes:
    parameters = zstandard.ZstdCompressionParameters.from_level(3, enable_ldm=True, **options)
    return zstandard.ZstdCompressor(compression_params=parameters).compress(data)


def streamed_zst(data: bytes) -> bytes:
    """Frames that do not say how long their text is, so that a reader must keep the whole window."""
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=31, write_content_size=False)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return compressor.compress(data) + compressor.flush()


def members(compress: Callable[[bytes], bytes], data: bytes, size: int = 100) -> bytes:
    """Members that end inside lines, and one without text."""
    return compress(b"") + b"".join(compress(data[start : start + size]) for start in range(0, len(data), size))


def table(kind: Any = None, **options: Any) -> pyarrow.Table:
    columns = {name: pyarrow.array([each[name] for each in ROWS]) for name in ROWS[0]}
    for name in ("content", "prompt") if kind is not None else ():
        columns[name] = columns[name].dictionary_encode() if kind == "dictionary" else columns[name].cast(kind)
    return pyarrow.table(columns)


def parquet(kind: Any = None, **options: Any) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(table(kind), sink, **options)
    return sink.getvalue()


def arrow(new: Callable[..., Any], kind: Any = None, batch_rows: int = 3, **options: Any) -> bytes:
    sink, content = io.BytesIO(), table(kind)
    with new(sink, content.schema, options=ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(content, batch_rows)
    return sink.getvalue()


INDENTED = [json.dumps(each, indent=2).encode() for each in ROWS]
CONTAINERS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "plain": ("a.jsonl", lambda: DATA),
    "JSON lines called .json": ("a.json", lambda: DATA),
    "no line end at the end": ("a.jsonl", lambda: DATA.removesuffix(b"\n")),
    "blank lines": ("a.jsonl", lambda: b"\n \n" + b"\n".join(LINES) + b"\n\n"),
    "byte order mark": ("a.jsonl", lambda: BOM + DATA),
    "byte order mark, .json": ("a.json", lambda: BOM + DATA),
    "byte order marks of joined files": ("a.jsonl", lambda: b"".join(BOM + line for line in LINES) + BOM),
    "a byte order mark in each text": (
        "a.jsonl",
        lambda: b"".join(json.dumps(row("\ufeff" + text, n)).encode() + b"\n" for n, text in enumerate(TEXTS)),
    ),
    "CRLF": ("a.jsonl", lambda: DATA.replace(b"\n", b"\r\n")),
    "gzip": ("a.jsonl.gz", lambda: gzip.compress(DATA)),
    "gzip of many members": ("a.json.gz", lambda: members(gzip.compress, DATA)),
    "gzip with padding": ("a.jsonl.gz", lambda: gzip.compress(DATA) + bytes(600_000) + gzip.compress(b"\n") + bytes(9)),
    "gzip with a byte order mark": ("a.jsonl.gz", lambda: gzip.compress(BOM + DATA)),
    "zstd of many frames": ("a.jsonl.zst", lambda: members(zstandard.compress, DATA)),
    "zstd with a frame to skip": ("a.jsonl.zst", lambda: b"\x50\x2a\x4d\x18\x03\0\0\0abc" + zstandard.compress(DATA)),
    **{f"zstd, window of 2^{log}": ("a.jsonl.zst", lambda log=log: zst(DATA, window_log=log)) for log in (27, 29, 31)},
    "zstd, window of 2^31, length not said": ("a.json.zst", lambda: streamed_zst(BOM + DATA)),
    "array": ("a.json", lambda: json.dumps(ROWS).encode()),
    "array with a byte order mark": ("a.json", lambda: BOM + json.dumps(ROWS, ensure_ascii=False).encode()),
    "indented array": ("a.json", lambda: json.dumps(ROWS, indent=1).encode()),
    "array, a row per line": ("a.json", lambda: b"[\n" + b",\n".join(map(bytes.strip, LINES)) + b"\n]\n"),
    "indented objects": ("a.json", lambda: b"\n".join(INDENTED)),
    "array, gzip": ("a.json.gz", lambda: members(gzip.compress, json.dumps(ROWS, indent=1).encode())),
    "indented objects, zstd": ("a.json.zst", lambda: zst(b"\r\n".join(INDENTED), window_log=27)),
    "parquet, string": ("a.parquet", parquet),
    "parquet, row groups": ("a.parquet", lambda: parquet(row_group_size=2)),
    "parquet, large_string": ("a.parquet", lambda: parquet(pyarrow.large_string())),
    "parquet, string_view": ("a.parquet", lambda: parquet(pyarrow.string_view())),
    "parquet, dictionary": ("a.parquet", lambda: parquet("dictionary")),
    "parquet, binary": ("a.parquet", lambda: parquet(pyarrow.binary())),
    "parquet, large_binary": ("a.parquet", lambda: parquet(pyarrow.large_binary())),
    "parquet, binary_view": ("a.parquet", lambda: parquet(pyarrow.binary_view())),
    "Arrow stream": ("a.arrow", lambda: arrow(ipc.new_stream)),
    "Arrow stream, compressed": ("a.arrow", lambda: arrow(ipc.new_stream, compression="zstd")),
    "Arrow stream, dictionary": ("a.arrow", lambda: arrow(ipc.new_stream, "dictionary")),
    "Arrow stream, string_view": ("a.arrow", lambda: arrow(ipc.new_stream, pyarrow.string_view())),
    "Arrow stream, binary": ("a.arrow", lambda: arrow(ipc.new_stream, pyarrow.binary())),
    "Arrow file": ("a.arrow", lambda: arrow(ipc.new_file)),
    "Arrow file, compressed": ("a.arrow", lambda: arrow(ipc.new_file, pyarrow.large_string(), compression="lz4")),
}


def as_corpus(path: Path) -> Outcome:
    (source,) = plan_sources([str(path)], suffixes=[".py"], content_column="content")
    texts, found, base = [], [(number + 1, reason) for _, number, reason in source.account.damaged], 0
    for unit in source.units:
        account = ReadAccount()
        read = read_parquet_rows if unit.kind == "parquet" else read_json_rows
        documents = list(read(Path(unit.name), account, "content", start=unit.start, stop=unit.stop))
        assert {document.repo_name for document in documents} <= {"org/name"}
        texts += [document.content for document in documents]
        found += [(base + number, reason) for _, number, reason in account.named]
        found += [(base + number + 1, reason) for _, number, reason in account.damaged]  # the last good row is named
        base += account.rows
    return texts, found


def as_stream(path: Path, num_lanes: int = 1) -> Outcome:
    shards, bad, texts = find_shards(path, "train"), BadDocuments(limit=None), []
    for lane in range(num_lanes):
        for piece in lane_pieces(shards, num_lanes, lane):
            texts += [text for text, _ in read_documents(piece, bad=bad)]
    return texts, sorted((each.line, each.reason) for each in bad)


def assert_all_read(path: Path, texts: list[str]) -> None:
    assert as_corpus(path) == (texts, [])
    assert as_stream(path) == (texts, [])
    for num_lanes in (2, 5):
        shared, bad = as_stream(path, num_lanes)
        assert sorted(shared) == sorted(texts) and not bad
    assert [problem.prompt for problem in load_problems(path)] == texts


@pytest.mark.parametrize("name", CONTAINERS)
def test_every_reader_reads_every_container(tmp_path: Path, name: str) -> None:
    file, data = CONTAINERS[name]
    path = tmp_path / file
    path.write_bytes(data())
    assert_all_read(path, TEXTS)
    assert read_prompts(path) == TEXTS


@pytest.mark.parametrize("name", CONTAINERS)
def test_every_position_of_every_container_is_one_to_continue_from(tmp_path: Path, name: str) -> None:
    file, data = CONTAINERS[name]
    (tmp_path / file).write_bytes(data())
    (shard,) = find_shards(tmp_path / file, "train")
    (piece,) = lane_pieces([shard], 1, 0)
    read = list(read_documents(piece, bad=BadDocuments()))
    for number, (_, position) in enumerate(read):
        assert list(read_documents(piece, position, bad=BadDocuments())) == read[number + 1 :]


def test_a_data_set_that_was_saved_to_disk(tmp_path: Path) -> None:
    import datasets

    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(tmp_path / "saved", num_shards=2)
    (tmp_path / "saved" / "cache-0.arrow").write_bytes(b"of somebody's map()")
    assert as_stream(tmp_path / "saved") == as_corpus(tmp_path / "saved") == (TEXTS, [])
    assert read_prompts(tmp_path / "saved") == TEXTS
    assert [problem.prompt for problem in load_problems(tmp_path / "saved")] == TEXTS
    datasets.DatasetDict(train=data, test=data).save_to_disk(tmp_path / "splits")
    assert as_stream(tmp_path / "splits") == (TEXTS, [])
    assert as_corpus(tmp_path / "splits" / "test") == (TEXTS, [])
    with pytest.raises(UserError, match="several splits: name one, .*splits/test or .*splits/train"):
        as_corpus(tmp_path / "splits")
    (tmp_path / "saved" / "data-00001-of-00002.arrow").unlink()
    for reader in (as_corpus, as_stream):
        with pytest.raises(UserError, match="data-00001-of-00002.arrow is gone: save it again"):
            reader(tmp_path / "saved")


def test_a_saved_data_set_with_an_order_of_its_own_is_refused(tmp_path: Path) -> None:
    state = {"_data_files": [{"filename": "data.arrow"}], "_indices_data_files": [{"filename": "indices.arrow"}]}
    (tmp_path / "state.json").write_text(json.dumps(state))
    for reader in (as_corpus, as_stream):
        with pytest.raises(UserError, match="flatten_indices"):
            reader(tmp_path)


def with_line(line: bytes) -> bytes:
    return LINES[0] + line + b"\n" + b"".join(LINES[1:])


def with_value(value: str | bytes) -> bytes:
    return with_line(
        json.dumps(row("VALUE", 9)).encode().replace(b'"VALUE"', value.encode() if isinstance(value, str) else value)
    )


def binary_table(value: bytes | None, format_: str) -> bytes:
    rows = [ROWS[0], row(value, 9), *ROWS[1:]]
    columns = {name: [each[name] for each in rows] for name in ROWS[0]}
    for name in ("content", "prompt"):
        values = [value.encode() if isinstance(value, str) else value for value in columns[name]]
        columns[name] = pyarrow.array(values, pyarrow.binary())
    sink, content = io.BytesIO(), pyarrow.table(columns)
    if format_ == "parquet":
        pyarrow.parquet.write_table(content, sink)
    else:
        with ipc.new_stream(sink, content.schema) as writer:
            writer.write_table(content)
    return sink.getvalue()


BAD_ROWS: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "broken": ("a.jsonl", lambda: with_line(b'{"content": "x"'), "broken JSON (unexpected end of data"),
    "NUL": ("a.jsonl", lambda: with_value('"a\\u0000b"'), "`content` has a NUL character: not text"),
    "bare NUL": ("a.jsonl", lambda: with_value(b'"a\0b"'), "broken JSON (unexpected control character"),
    "lone surrogate": ("a.jsonl", lambda: with_value('"a\\ud800b"'), "a lone surrogate, which is half a character"),
    "not UTF-8": ("a.jsonl", lambda: with_value(b'"\xff"'), "broken JSON (str is not valid UTF-8"),
    "null": ("a.jsonl", lambda: with_value("null"), "`content` is NoneType, not a string"),
    "number": ("a.jsonl", lambda: with_value("7"), "`content` is int, not a string"),
    "a list": ("a.jsonl", lambda: with_line(b'["x"]'), "not a JSON object"),
    "null row": ("a.jsonl", lambda: with_line(b"null"), "not a JSON object"),
    "brackets": ("a.jsonl", lambda: with_line(b"[" * 100_000 + b"]" * 100_000), "broken JSON (depth limit exceeded"),
    "brackets in a row": (
        "a.jsonl",
        lambda: with_value(b"[" * 100_000 + b'"\\ud800"' + b"]" * 100_000),
        "broken JSON (depth limit exceeded",
    ),
    "UTF-16": ("a.jsonl", lambda: with_line('{"content": "x"}'.encode("utf-16")), "UTF-16, not UTF-8"),
    "an indented array in JSON lines": (
        "a.jsonl",
        lambda: with_line(b"["),
        "broken JSON (unexpected end of data: line 1 column 2 (char 1)); an array or indented JSON is read from a",
    ),
    "brackets, gzip": (
        "a.json.gz",
        lambda: gzip.compress(with_line(b"{" * 100_000)),
        "broken JSON",
    ),
    "NUL in an array": (
        "a.json",
        lambda: json.dumps([ROWS[0], row("a\0b", 9), *ROWS[1:]]).encode(),
        "`content` has a NUL character: not text",
    ),
    "brackets in an array": (
        "a.json",
        lambda: json.dumps(ROWS).encode().replace(b"}, {", b"}, " + b"[" * 100_000 + b"]" * 100_000 + b", {", 1),
        "broken JSON (depth limit exceeded",
    ),
    **{
        f"{name}, {format_}": (
            f"a.{format_}",
            lambda value=value, format_=format_: binary_table(value, format_),
            reason,
        )
        for format_ in ("parquet", "arrow")
        for name, value, reason in (
            ("NUL", b"a\0b", "`content` has a NUL character: not text"),
            ("not UTF-8", b"\xff\xfe", "`content` is not UTF-8 text"),
            ("null", None, "`content` is NoneType, not a string"),
        )
    },
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_costs_itself_and_is_named_in_one_way(tmp_path: Path, name: str) -> None:
    file, data, reason = BAD_ROWS[name]
    path = tmp_path / file
    path.write_bytes(data())
    texts, [(number, said)] = as_stream(path)
    assert texts == TEXTS and number == 2 and said.startswith(reason)
    assert as_corpus(path) == (TEXTS, [(2, said)])
    unit = "line" if path.suffix in (".jsonl", ".gz") else "row"
    if not name.startswith(("null", "number", "a list")):  # which are a matter of what a prompt and a problem are
        for reader in (read_prompts, load_problems):
            with pytest.raises(UserError) as told:
                reader(path)
            assert str(told.value).replace("`prompt`", "`content`") == f"{path}, {unit} 2: {said}"


DAMAGED: dict[str, tuple[str, Callable[[], bytes], int]] = {
    "gzip cut off": ("a.jsonl.gz", lambda: gzip.compress(DATA, mtime=0)[:-30], -1),
    "gzip with rubbish behind": ("a.jsonl.gz", lambda: gzip.compress(DATA) + b"rubbish", len(TEXTS)),
    "zstd cut off between blocks": ("a.jsonl.zst", lambda: zstandard.compress(b"".join(LINES[:3])) + zst(DATA)[:9], 3),
    "zstd with rubbish behind": ("a.jsonl.zst", lambda: zstandard.compress(DATA) + b"rubbish", len(TEXTS)),
    "array cut off": ("a.json", lambda: json.dumps(ROWS).encode()[:-100], len(TEXTS) - 1),
    "parquet cut off": ("a.parquet", lambda: parquet()[:-9], 0),
    "Arrow stream cut off": ("a.arrow", lambda: arrow(ipc.new_stream)[:-600], 6),
    "no Arrow": ("a.arrow", lambda: b"nothing of the kind", 0),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_costs_what_is_behind_it(tmp_path: Path, name: str) -> None:
    file, data, num_left = DAMAGED[name]
    path = tmp_path / file
    path.write_bytes(data())
    texts, [(number, reason)] = as_stream(path)
    assert texts == TEXTS[: len(texts)] and number == len(texts) + 1
    assert len(texts) == num_left or num_left < 0
    corpus_texts, [(corpus_number, corpus_reason)] = as_corpus(path)
    assert (corpus_texts, corpus_number) == (texts, number) and (corpus_reason in reason)
    for reader in (read_prompts, load_problems):
        with pytest.raises(UserError, match="truncated or damaged from here on"):
            reader(path)


def test_a_broken_row_group_costs_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(parquet(row_group_size=2))
    data = bytearray(path.read_bytes())
    metadata = pyarrow.parquet.read_metadata(path)
    for column in range(2):
        chunk = metadata.row_group(1).column(column)
        start = chunk.dictionary_page_offset or chunk.data_page_offset
        data[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(data)
    texts, [(number, reason)] = as_stream(path)
    assert texts == TEXTS[:2] + TEXTS[4:] and number == 3 and reason.startswith("row group 1 is damaged (")
    assert as_corpus(path) == (texts, [(3, reason)])
    bad = BadDocuments()
    (piece,) = lane_pieces(in_version_1(find_shards(path, "train")), 1, 0)
    assert [text for text, _ in read_documents(piece, bad=bad)] == TEXTS[:2]
    assert [found.line for found in bad] == [3]


def test_a_row_that_is_too_long_costs_itself_and_no_memory(tmp_path: Path) -> None:
    """Two gigabytes of zeros in 64 KB: a zstd frame of blocks that repeat one byte 131,072 times."""
    path = tmp_path / "a.jsonl.zst"
    zeros = [((1 << 17) << 3 | 1 << 1 | (number == 16_383)).to_bytes(3, "little") + b"\0" for number in range(16_384)]
    long_line = b"\x28\xb5\x2f\xfd\x00\x58" + b"".join(zeros)
    path.write_bytes(zstandard.compress(LINES[0]) + long_line + zstandard.compress(b"\n" + b"".join(LINES[1:])))
    code = """
import sys
from pathlib import Path
from tests.rows.test_formats import TEXTS, as_stream

def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) >> 10

before = peak()
assert as_stream(Path(sys.argv[1])) == (TEXTS, [(2, "longer than 64 MiB")])
print(peak() - before)
"""
    answer = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=300)
    assert answer.returncode == 0, answer.stderr
    assert int(answer.stdout) < 250


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.parquet"])
def test_a_row_that_is_too_long_is_named_by_every_reader(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from codeparrot_ds.rows import reading

    monkeypatch.setattr(reading, "MAX_ROW_BYTES", 50_000)
    rows = [ROWS[0], row("z" * 300_000, 9), *ROWS[1:]]
    path = tmp_path / name
    if name == "a.parquet":
        columns = {key: [each[key] for each in rows] for key in rows[0]}
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
    elif name == "a.json":
        path.write_text(json.dumps(rows))
    else:
        data = b"".join(json.dumps(each).encode() + b"\n" for each in rows)
        path.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    assert as_stream(path) == as_corpus(path) == (TEXTS, [(2, "longer than 64 MiB")])
    assert as_stream(path, 3)[1] == [(2, "longer than 64 MiB")]
    for reader in (read_prompts, load_problems):
        with pytest.raises(UserError, match="2: longer than 64 MiB"):
            reader(path)


def test_problems_come_through_a_pipe(tmp_path: Path) -> None:
    import os
    import threading

    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_bytes, args=(DATA,))
    writer.start()
    assert [problem.prompt for problem in load_problems(path)] == TEXTS
    writer.join()


@pytest.mark.parametrize("name", ["dataset_info.json", "dataset_dict.json", "._a.jsonl"])
def test_what_lies_beside_shards_is_none(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(DATA)
    (tmp_path / name).write_text('{"builder_name": "json"}')
    assert as_stream(tmp_path) == (TEXTS, [])
