import json
from pathlib import Path

import pytest

from codeparrot_ds.data.shards import (
    BadDocuments,
    content_id,
    find_shards,
    read_documents,
)
from codeparrot_ds.errors import UserError
from codeparrot_ds.rows import files
from codeparrot_ds.rows.access import LocalFile
from codeparrot_ds.rows.files import Shard
from codeparrot_ds.rows.reading import START, Piece, Position
from tests.data.conftest import compressed, make_documents, write_shard

SUFFIXES = [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"]


def shard_of(path: Path) -> Shard:
    [shard] = [shard for shard in find_shards(path.parent.parent, path.parent.name) if shard.path == path]
    return shard


def whole(shard: Shard) -> Piece:
    return Piece(shard, 0, shard.bytes)


def write_lines(path: Path, *lines: bytes) -> Shard:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return shard_of(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_reads_on_from_any_position(tmp_path: Path, suffix: str) -> None:
    texts = make_documents(40)
    write_shard(tmp_path / "train" / f"part-0{suffix}", texts)
    shard = shard_of(tmp_path / "train" / f"part-0{suffix}")
    read = list(read_documents(whole(shard), bad=BadDocuments()))
    assert [text for text, _ in read] == texts
    for place, (_, position) in enumerate(read):
        rest = [text for text, _ in read_documents(whole(shard), position, bad=BadDocuments())]
        assert rest == texts[place + 1 :]


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".json.zst"])
def test_strides_share_a_compressed_shard(tmp_path: Path, suffix: str) -> None:
    texts = make_documents(23)
    write_shard(tmp_path / "train" / f"part-0{suffix}", texts)
    shard = shard_of(tmp_path / "train" / f"part-0{suffix}")
    for phase in range(3):
        piece = Piece(shard, 0, shard.bytes, phase, 3)
        read = list(read_documents(piece, bad=BadDocuments()))
        assert [text for text, _ in read] == texts[phase::3]
        assert [text for text, _ in read_documents(piece, read[2][1], bad=BadDocuments())] == texts[phase::3][3:]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_pieces_share_a_shard_wherever_it_is_cut(tmp_path: Path, suffix: str) -> None:
    texts = ["", *make_documents(40), "x" * 500]
    write_shard(tmp_path / "train" / f"part-0{suffix}", texts)
    shard = shard_of(tmp_path / "train" / f"part-0{suffix}")
    for cut in range(0, shard.bytes + 1, 1 if suffix == ".jsonl" else 97):
        parts = Piece(shard, 0, cut), Piece(shard, cut, shard.bytes)
        assert [text for part in parts for text, _ in read_documents(part, bad=BadDocuments())] == texts
    piece = Piece(shard, shard.bytes // 3, 2 * shard.bytes // 3)
    read = list(read_documents(piece, bad=BadDocuments()))
    for place, (_, position) in enumerate(read):
        assert list(read_documents(piece, position, bad=BadDocuments())) == read[place + 1 :]


def test_a_bad_line_of_a_piece_is_named_by_its_line_in_the_file(tmp_path: Path) -> None:
    lines = [b'{"content": "%d"}' % number for number in range(100)]
    lines[70] = b"{"
    shard = write_lines(tmp_path / "train" / "part-0.jsonl", *lines)
    bad = BadDocuments()
    for begin in range(0, shard.bytes, 300):
        list(read_documents(Piece(shard, begin, min(begin + 300, shard.bytes)), bad=bad))
    assert [found.line for found in bad] == [71]


def test_a_line_longer_than_any_block(tmp_path: Path) -> None:
    texts = ["1", "y" * 5_000_000, "3"]
    write_shard(tmp_path / "train" / "part-0.jsonl", texts)
    shard = shard_of(tmp_path / "train" / "part-0.jsonl")
    pieces = [Piece(shard, begin, min(begin + 1_000_000, shard.bytes)) for begin in range(0, shard.bytes, 1_000_000)]
    assert [[len(text) for text, _ in read_documents(piece, bad=BadDocuments())] for piece in pieces] == [
        [1, 5_000_000], [], [], [], [], [1],
    ]  # fmt: skip


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_a_position_names_its_frame(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed reader begins at its own frame; positions do not depend on what was read ahead."""
    texts = make_documents(400)
    path = tmp_path / "train" / f"part-0{suffix}"
    path.parent.mkdir()
    lines = [json.dumps({"content": text}).encode() + b"\n" for text in texts]
    path.write_bytes(b"".join(compressed(b"".join(lines[n : n + 20]), suffix) for n in range(0, 400, 20)))
    shard = shard_of(path)
    read = list(read_documents(whole(shard), bad=BadDocuments()))
    assert [text for text, _ in read] == texts
    assert len({position.frame for _, position in read}) == 20
    monkeypatch.setattr(files, "READ_BYTES", 512)
    asked: list[int] = []
    read_at = LocalFile.read_at

    def note_and_read(file: LocalFile, offset: int, size: int) -> bytes:
        asked.append(offset)
        return read_at(file, offset, size)

    assert list(read_documents(whole(shard), bad=BadDocuments())) == read
    for place in (0, 18, 19, 20, 21, 250, 399):
        with monkeypatch.context() as patch:
            patch.setattr(LocalFile, "read_at", note_and_read)
            asked.clear()
            assert list(read_documents(whole(shard), read[place][1], bad=BadDocuments())) == read[place + 1 :]
        assert min(asked) == read[place][1].frame


def test_content_id_tells_what_has_changed(tmp_path: Path) -> None:
    path = tmp_path / "train" / "part-0.jsonl"
    write_shard(path, make_documents(2000))
    before = content_id(shard_of(path))
    assert content_id(shard_of(path)) == before
    data = path.read_bytes()
    for changed in (data[1:] + b"\n", b" " + data[:-1], data[: len(data) // 2] + b"  " + data[len(data) // 2 : -2]):
        path.write_bytes(changed)
        assert len(changed) == len(data) and content_id(shard_of(path)) != before


def test_shards_are_sorted_and_described(tmp_path: Path) -> None:
    for name in ("part-1.jsonl.gz", "part-0.jsonl", "part-2.parquet"):
        write_shard(tmp_path / "train" / name, ["x"])
    (tmp_path / "train" / "README.md").write_text("not a shard")
    shards = find_shards(tmp_path, "train")
    assert [(shard.name, shard.format) for shard in shards] == [
        ("part-0.jsonl", "jsonl"),
        ("part-1.jsonl.gz", "gz"),
        ("part-2.parquet", "parquet"),
    ]
    assert shards[0].bytes == (tmp_path / "train" / "part-0.jsonl").stat().st_size


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_one_shard_is_a_data_set(tmp_path: Path, suffix: str) -> None:
    texts = make_documents(20)
    path = tmp_path / f"code{suffix}"
    write_shard(path, texts)
    (shard,) = find_shards(path, "train")
    assert find_shards(str(path), "validation") == [shard] and shard.name == path.name
    assert [text for text, _ in read_documents(whole(shard), bad=BadDocuments())] == texts


def test_nothing_to_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="missing does not exist; make a corpus with"):
        find_shards(tmp_path / "missing", "train")
    (tmp_path / "validation").mkdir()
    with pytest.raises(UserError, match="no split 'train'; it has validation"):
        find_shards(tmp_path, "train")
    with pytest.raises(UserError, match="has no shards; .*jsonl.gz"):
        find_shards(tmp_path, "validation")
    (tmp_path / "validation" / "part-0.jsonl").touch()
    with pytest.raises(UserError, match="Every shard in .* is empty"):
        find_shards(tmp_path, "validation")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"content": "x"', "broken JSON"),
        (b'{"content": "a\x00b"}', "broken JSON"),
        (b'{"content": "\\ud800"}', "a lone surrogate"),
        (b'{"content": "\xff"}', "broken JSON"),
        (b'{"content": "a\\u0000b"}', "`content` has a NUL character"),
        (b'{"text": "x"}', "no column 'content' (columns: text)"),
        (b'{"content": null}', "`content` is NoneType, not a string"),
        (b'{"content": 7}', "`content` is int, not a string"),
        (b'["x"]', "not a JSON object"),
    ],
)
def test_a_bad_document_costs_itself(tmp_path: Path, line: bytes, reason: str) -> None:
    shard = write_lines(tmp_path / "train" / "part-0.jsonl", b'{"content": "1"}', line, b'{"content": "3"}')
    bad = BadDocuments()
    for _ in range(2):  # a second epoch finds the same document, not another one
        assert [text for text, _ in read_documents(whole(shard), bad=bad)] == ["1", "3"]
    [found] = bad
    assert (found.path, found.line) == (str(shard.path), 2)
    assert found.reason.startswith(reason)
    assert bad.take_new() == [found] and bad.take_new() == []


def test_strange_but_whole_documents_are_read(tmp_path: Path) -> None:
    texts = ["", "long " * 200_000, "\u2028 two\r\nlines", "😀"]
    shard = write_lines(tmp_path / "train" / "part-0.jsonl", *(json.dumps({"content": t}).encode() for t in texts))
    shard.path.write_bytes(shard.path.read_bytes().rstrip(b"\n"))
    bad = BadDocuments()
    assert [text for text, _ in read_documents(whole(shard), bad=bad)] == texts
    assert len(bad) == 0


def test_blank_lines_are_no_documents(tmp_path: Path) -> None:
    shard = write_lines(tmp_path / "train" / "part-0.jsonl", b'{"content": "1"}', b"", b'{"content": "3"}', b"")
    bad = BadDocuments(limit=0)
    assert list(read_documents(whole(shard), bad=bad)) == [("1", Position(17, 1)), ("3", Position(35, 3))]


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_a_truncated_shard_costs_its_rest(tmp_path: Path, suffix: str) -> None:
    texts = [" ".join(make_documents(30, seed=n)) for n in range(300)]
    path = tmp_path / "train" / f"part-0{suffix}"
    write_shard(path, texts)
    path.write_bytes(path.read_bytes()[:-40])
    bad = BadDocuments()
    for _ in range(2):
        read = [text for text, _ in read_documents(whole(shard_of(path)), bad=bad)]
        assert read == texts[: len(read)] and 100 < len(read) < 300
    [found] = bad
    assert (found.line, found.path) == (len(read) + 1, str(path))
    assert "truncated or damaged" in found.reason


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_frames_in_one_file_are_read_across(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "train" / f"part-0{suffix}"
    path.parent.mkdir()
    path.write_bytes(compressed(b'{"content": "1"}\n{"cont', suffix) + compressed(b'ent": "2"}\n', suffix))
    assert [text for text, _ in read_documents(whole(shard_of(path)), bad=BadDocuments())] == ["1", "2"]


def test_a_damaged_parquet_file_costs_its_rest(tmp_path: Path) -> None:
    path = tmp_path / "train" / "part-0.parquet"
    write_shard(path, make_documents(30))
    path.write_bytes(path.read_bytes()[:-9])
    bad = BadDocuments()
    assert list(read_documents(whole(shard_of(path)), bad=bad)) == []
    assert "truncated or damaged" in str(next(iter(bad)))


def test_parquet_rows_without_text(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "train" / "part-0.parquet"
    path.parent.mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"content": ["1", None, "3"]}), path)
    bad = BadDocuments()
    assert [text for text, _ in read_documents(whole(shard_of(path)), bad=bad)] == ["1", "3"]
    assert [(found.line, found.reason) for found in bad] == [(2, "`content` is NoneType, not a string")]
    pyarrow.parquet.write_table(pyarrow.table({"text": ["1"], "size": [1]}), path)
    with pytest.raises(UserError, match=r"has no column 'content' \(columns: text, size\)"):
        next(read_documents(whole(shard_of(path)), bad=bad))


def test_an_empty_shard_is_named(tmp_path: Path) -> None:
    write_shard(tmp_path / "train" / "part-0.jsonl", ["1"])
    shard = write_lines(tmp_path / "train" / "part-1.jsonl")
    bad = BadDocuments()
    assert list(read_documents(whole(shard), bad=bad)) == []
    assert [str(found) for found in bad] == [f"{shard.path}: the shard is empty"]


def test_too_many_bad_documents_abort(tmp_path: Path) -> None:
    shard = write_lines(tmp_path / "train" / "part-0.jsonl", *[b"{"] * 3, b'{"content": "4"}')
    assert [text for text, _ in read_documents(whole(shard), bad=BadDocuments(limit=3))] == ["4"]
    with pytest.raises(UserError, match=r"max_bad_documents=2; the first is .*part-0.jsonl, line 1: broken JSON"):
        next(read_documents(whole(shard), bad=BadDocuments(limit=2)))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_shard_that_disappears_costs_itself(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "train" / f"part-0{suffix}"
    write_shard(path, ["1"])
    shard = shard_of(path)
    path.unlink()
    bad = BadDocuments()
    for _ in range(3):
        assert list(read_documents(whole(shard), START, bad=bad)) == []
    assert [str(found) for found in bad] == [f"{path}: the shard is gone"]


def test_a_shard_that_shrinks_is_named(tmp_path: Path) -> None:
    shard = write_lines(tmp_path / "train" / "part-0.jsonl", *[b'{"content": "1"}'] * 10)
    shard.path.write_bytes(shard.path.read_bytes()[:100])
    bad = BadDocuments()
    assert len(list(read_documents(whole(shard), bad=bad))) == 5
    assert [found.line for found in bad] == [6, 7] or "broken" in next(iter(bad)).reason


def test_a_folder_whose_names_say_no_split_is_to_train_on(tmp_path: Path) -> None:
    write_shard(tmp_path / "part-0.jsonl", ["1"])
    (tmp_path / "corpus.json").write_text("{}")
    assert [shard.name for shard in find_shards(tmp_path, "train")] == ["part-0.jsonl"]
    with pytest.raises(
        UserError, match=r"no split 'validation': no name tells any of its 1 shard\(s\) from the others"
    ):
        find_shards(tmp_path, "validation")
    assert find_shards(tmp_path, "validation", named=True) == find_shards(tmp_path, "train")


def test_shards_of_the_usual_layout_are_found_by_split(tmp_path: Path) -> None:
    """A cloned data set: each shard is of one split, under a name that no other has."""
    names = ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"]
    names += ["data/test-00000-of-00001.parquet", "data/validation-00000-of-00001.parquet"]
    for name in names:
        write_shard(tmp_path / name, [name])
    (tmp_path / "data" / "dataset_info.json").write_text("{}")
    assert [shard.name for shard in find_shards(tmp_path, "train")] == names[:2]
    assert [shard.name for shard in find_shards(tmp_path, "test")] == names[2:3]
    assert [shard.name for shard in find_shards(tmp_path, "validation")] == names[3:]
    (tmp_path / "data" / "validation-00000-of-00001.parquet").unlink()
    with pytest.raises(UserError, match="no split 'validation'; it has train, test"):
        find_shards(tmp_path, "validation")
    assert [shard.name for shard in find_shards(tmp_path, "validation", named=True)] == names[2:3]
    # As version 0.1 found them: a folder per split, or else all of a folder.
    assert [shard.name for shard in find_shards(tmp_path / "data", "train", by_names=False)] == [
        *("dataset_info.json", "test-00000-of-00001.parquet", "train-00000-of-00002.parquet"),
        "train-00001-of-00002.parquet",
    ]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.zst", ".parquet"])
def test_the_text_is_where_published_data_sets_have_it_or_where_it_is_named(tmp_path: Path, suffix: str) -> None:
    def texts(**columns: str) -> list[str]:
        path = tmp_path / f"code{suffix}"
        write_shard(path, ["not this"], columns)
        shards = find_shards(path, "train", text_column=text_column)
        return [text for text, _ in read_documents(whole(shards[0]), bad=BadDocuments())]

    text_column = ""
    assert texts(code="github-code", repo_name="a/b", path="x.py", content_id="1") == ["github-code"]
    assert texts(code="other", content="The Stack", max_stars_repo_name="a/b") == ["The Stack"]
    text_column = "text"
    assert texts(content="summary", text="named") == ["named"]


def test_the_stack_v2_is_said_to_have_no_contents(tmp_path: Path) -> None:
    shard = write_lines(tmp_path / "train" / "0.jsonl", b'{"blob_id": "9c1", "repo_name": "a/b", "path": "x.py"}')
    bad = BadDocuments()
    assert not list(read_documents(whole(shard), bad=bad))
    assert "ids of contents, as in The Stack v2, which has none" in str(list(bad)[0])
