import codecs
import gzip
import inspect
import json
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from codeparrot_ds.corpus import plan as corpus_plan
from codeparrot_ds.corpus.plan import plan_sources
from codeparrot_ds.corpus.readers import (
    ReadAccount,
    decode,
    read_dataset_rows,
    read_files,
    read_json_rows,
    read_parquet_rows,
    spdx_license,
)
from codeparrot_ds.errors import UserError


def write_rows(path: Path, texts: list[str]) -> Path:
    data = "".join(json.dumps({"content": text}) + "\n" for text in texts).encode()
    if path.suffix == ".gz":
        data = gzip.compress(data)
    elif path.suffix == ".zst":
        data = zstandard.compress(data)
    path.write_bytes(data)
    return path


def write_arrow(path: Path, texts: list) -> None:
    table = pyarrow.table({"content": texts})
    with pyarrow.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table, 5)


def write_parquet(path: Path, texts: list, row_group_size: int = 5) -> Path:
    pyarrow.parquet.write_table(pyarrow.table({"content": texts}), path, row_group_size=row_group_size)
    return path


@pytest.mark.parametrize(
    ("data", "encoding"),
    [
        ("naïve 漢字".encode(), "utf-8"),
        (codecs.BOM_UTF8 + "naïve 漢字".encode(), "utf-8-sig"),
        ("naïve 漢字".encode("utf-16"), "utf-16"),
        (codecs.BOM_UTF16_BE + "naïve 漢字".encode("utf-16-be"), "utf-16"),
        ("naïve 漢字".encode("utf-32"), "utf-32"),
    ],
)
def test_encodings_by_mark(data, encoding):
    assert decode(data) == ("naïve 漢字", encoding)


def test_encodings_by_cookie():
    text = "#!/usr/bin/python\n# -*- coding: {} -*-\nx = 'é'\n"
    for cookie, name in (("latin-1", "iso-8859-1"), ("cp1252", "cp1252"), ("koi8-r", "koi8-r")):
        own = text.format(cookie).replace("é", "é" if name != "koi8-r" else "я")
        assert decode(own.encode(cookie)) == (own, name)
    # Valid UTF-8 with a forgotten cookie is UTF-8: nobody writes "Ã©".
    own = text.format("latin-1")
    assert decode(own.encode("utf-8")) == (own, "utf-8")


@pytest.mark.parametrize(
    "cookie",
    "unicode_escape raw_unicode_escape unicode-escape idna punycode rot13 hex base64 zip undefined mbcs utf-7".split(),
)
def test_a_codec_that_no_file_is_written_in_costs_its_file(tmp_path, cookie):
    texts = {
        "bad.py": f"# -*- coding: {cookie} -*-\nx = '\\ud800 +2AA- \xe9'\n".encode("latin-1"),
        "good.py": b"x = 1\n",
    }
    for name, data in texts.items():
        (tmp_path / name).write_bytes(data)
    (source,) = plan_sources([str(tmp_path)], suffixes=[".py"], content_column="content")
    account = ReadAccount()
    found = [document.path for unit in source.units for document in read_files(unit.files, account)]
    assert found == ["good.py"]
    ((file, _, reason),) = account.named
    assert file == str(tmp_path / "bad.py") and reason in ("not text", "lone surrogates")


@pytest.mark.parametrize(
    "data", [b"x = '\xe9'", b"# coding: nothing\nx = '\xe9'", codecs.BOM_UTF16_LE + b"\x00\xd8x\x00", b"\xed\xa0\x80"]
)
def test_other_encodings_are_no_text(data):
    with pytest.raises(UnicodeError):
        decode(data)


@pytest.mark.parametrize(
    ("head", "name"),
    [
        ("# SPDX-License-Identifier: MIT\n", "mit"),
        ("#!/bin/sh\n/* SPDX-License-Identifier: GPL-2.0-only */", "gpl-2.0"),
        ("# SPDX-License-Identifier: (Apache-2.0 OR MIT)\n", "apache-2.0 or mit"),
        ("# SPDX-License-Identifier: BSD-3-Clause\r\nx", "bsd-3-clause"),
        ("x = 1\n" * 500 + "# SPDX-License-Identifier: MIT\n", ""),
        ("# the license is MIT", ""),
    ],
)
def test_spdx_line_in_the_head(head, name):
    assert spdx_license(head) == name


@pytest.mark.parametrize("size", [1, 7, 30, 31, 1000])
def test_byte_ranges_hold_every_row_once(tmp_path, size):
    texts = [f"text {number} " + "x" * (number % 17) for number in range(40)]
    path = write_rows(tmp_path / "rows.jsonl", texts)
    path.write_bytes(codecs.BOM_UTF8 + path.read_bytes().removesuffix(b"\n"))
    found, rows = [], 0
    for start in range(0, path.stat().st_size, size):
        account = ReadAccount()
        for document in read_json_rows(path, account, "content", start=start, stop=start + size):
            found.append((document.content, rows + document.row))
        rows += account.rows
    assert found == [(text, number) for number, text in enumerate(texts, start=1)]


@pytest.mark.parametrize("suffix", corpus_plan.ROW_SUFFIXES)
def test_every_kind_of_row_file_is_planned_and_read(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(corpus_plan, "UNIT_BYTES", 300)
    texts = [f"text {number}" for number in range(30)]
    path = tmp_path / f"rows{suffix}"
    {".parquet": write_parquet, ".arrow": write_arrow}.get(suffix, write_rows)(path, texts)
    (source,) = plan_sources([str(path)], suffixes=[".py"], content_column="content")
    assert len(source.units) > 1 or suffix.endswith(("gz", "zst"))
    found = []
    for unit in source.units:
        read = read_parquet_rows if unit.kind == "parquet" else read_json_rows
        found += [each.content for each in read(path, ReadAccount(), "content", start=unit.start, stop=unit.stop)]
    assert found == texts


def test_parquet_rows_that_are_no_text(tmp_path):
    pyarrow.parquet.write_table(
        pyarrow.table({"content": pyarrow.array([b"good", b"\xff\xfe", b"a\0b", None, b" "], pyarrow.binary())}),
        tmp_path / "rows.parquet",
    )
    account = ReadAccount()
    found = list(read_parquet_rows(tmp_path / "rows.parquet", account, "content", start=0, stop=1))
    assert [(each.content, each.row) for each in found] == [("good", 1)]
    assert account.left_out == {"not_text": 1, "nul_bytes": 1, "bad_rows": 1, "empty": 1}
    assert [row for _, row, _ in account.named] == [2, 3, 4]


def test_parquet_without_the_column_names_those_there_are(tmp_path):
    path = write_parquet(tmp_path / "rows.parquet", ["x"])
    account = ReadAccount()
    assert not list(read_parquet_rows(path, account, "text", start=0, stop=1))
    ((file, row, reason),) = account.named
    assert (file, row) == (str(path), 1) and reason.startswith("no column 'text' (columns: content)")


def test_a_broken_row_group_costs_that_group(tmp_path):
    texts = [f"text {number} " * 50 for number in range(15)]
    path = write_parquet(tmp_path / "rows.parquet", texts)
    data = bytearray(path.read_bytes())
    chunk = pyarrow.parquet.read_metadata(path).row_group(1).column(0)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    data[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(data)
    account = ReadAccount()
    found = [each.content for each in read_parquet_rows(path, account, "content", start=0, stop=3)]
    assert found == texts[:5] + texts[10:]
    ((file, row, reason),) = account.damaged
    assert (file, row) == (str(path), 5) and reason.startswith("row group 1 is damaged (")


def test_a_parquet_file_that_was_cut_off_is_named(tmp_path):
    path = write_parquet(tmp_path / "rows.parquet", ["x"] * 100)
    path.write_bytes(path.read_bytes()[:-20])
    (source,) = plan_sources([str(path)], suffixes=[".py"], content_column="content")
    assert not source.units and source.account.damaged[0][0] == str(path)


def test_datasets_are_streamed_by_shard(tmp_path):
    for number in range(3):
        write_parquet(tmp_path / f"data-{number}.parquet", [f"text {number} {row}" for row in range(4)])
    name = f"{tmp_path}:train"
    (source,) = plan_sources([name], suffixes=[".py"], content_column="content")
    assert [(unit.kind, unit.start, unit.stop) for unit in source.units] == [("dataset", n, 3) for n in range(3)]
    found = []
    for unit in source.units:
        found += [
            each.content for each in read_dataset_rows(name, ReadAccount(), "content", shard=unit.start, num_shards=3)
        ]
    assert sorted(found) == sorted(f"text {number} {row}" for number in range(3) for row in range(4))
    keys = {unit.key([]) for unit in source.units}
    write_parquet(tmp_path / "data-1.parquet", ["other"])
    (source,) = plan_sources([name], suffixes=[".py"], content_column="content")
    assert not keys & {unit.key([]) for unit in source.units}


def test_a_data_set_that_is_none_is_one_sentence(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty:train is no path here, and no data set that can be opened: \S"):
        plan_sources([f"{tmp_path}/empty:train"], suffixes=[".py"], content_column="content")


def test_a_path_with_a_mistake_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    with pytest.raises(UserError, match="source data/nowhere does not exist"):
        plan_sources(["data/nowhere"], suffixes=[".py"], content_column="content")


def test_a_tree_is_cut_by_number_of_files_too_and_as_deep_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_plan, "UNIT_FILES", 7)
    folder = tmp_path / "deep"
    for number in range(200):
        folder.mkdir()
        if number % 10 == 0:
            (folder / f"file{number}.py").write_text("x")
        folder = folder / "d"
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack(0)) + 120)
    try:
        (source,) = plan_sources([str(tmp_path / "deep")], suffixes=[".py"], content_column="content")
    finally:
        sys.setrecursionlimit(before)
    assert [len(unit.files) for unit in source.units] == [7, 7, 6]
    paths = [each.path for unit in source.units for each in unit.files]
    assert paths[-1] == "file0.py" and paths[0] == "d/" * 190 + "file190.py"


def test_units_of_a_tree_depend_on_its_files_alone(tmp_path):
    for number in range(5):
        (tmp_path / f"{number}.py").write_text("x")

    def keys():
        (source,) = plan_sources([str(tmp_path)], suffixes=[".py"], content_column="content")
        return [unit.key(["settings"]) for unit in source.units]

    before = keys()
    assert keys() == before
    (tmp_path / "3.py").write_text("xx")
    assert keys() != before
    (tmp_path / "\udcff.py").write_text("a name that is no Unicode")
    assert len(keys()) == 1
