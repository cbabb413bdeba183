import os
import pickle

import pytest

from codeparrot_ds.errors import UserError
from codeparrot_ds.json_files import (
    MAX_BYTES,
    MAX_DEPTH,
    MAX_LINE_BYTES,
    DamagedFileError,
    lines_from_the_end,
    lines_of,
    parts_of,
    read_json,
    read_object,
)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[" * 100_000, "nested"),
        ('{"a":' * 100_000, "nested"),
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "nested"),
        ('{"step": 5', "line 1 is not JSON"),
        ("", "line 1 is not JSON"),
        ("9" * 5000, "4300 digits"),
        (b"{\xff", "not text"),
        ("[]", "holds no JSON object"),
    ],
)
def test_what_is_no_object_is_one_sentence_with_the_file(tmp_path, content, reason):
    path = tmp_path / "run.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DamagedFileError, match=rf"^{path} is damaged: [^\n]*{reason}[^\n]*$") as caught:
        read_object(path)
    assert isinstance(caught.value, (UserError, ValueError))
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # ranks send it to each other


def test_a_pipe_a_folder_and_a_giant_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    with (tmp_path / "giant").open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    for name, reason in (("pipe", "not a regular file"), ("folder", "is a folder"), ("giant", "bytes at most")):
        with pytest.raises(DamagedFileError, match=reason):
            read_json(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "nothing")


def test_a_part_that_does_not_fit_is_damage_and_a_mistake_stays_one(tmp_path):
    for take_apart in (lambda: {}["step"], lambda: int("many"), lambda: [][3], lambda: 1 / 0, lambda: None.keys()):
        with pytest.raises(DamagedFileError, match="^state.json is damaged: "), parts_of("state.json"):
            take_apart()
    with pytest.raises(UserError, match="^choose another$"), parts_of("state.json"):
        raise UserError("choose another")
    with pytest.raises(FileNotFoundError), parts_of("state.json"):
        read_json(tmp_path / "nothing")


def test_lines_come_one_by_one_from_either_end(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert list(lines_of(path)) == list(lines_from_the_end(path)) == []
    giant = b"x" * (3 * MAX_LINE_BYTES)
    for lines in ([b"a", b"", b"bc"], [b"a" * 300_000] * 5, [b"a", giant, b"b"], [giant], [giant, giant, b"c"]):
        for ending in (b"\n", b""):
            path.write_bytes(b"\n".join(lines) + ending)
            forward = [line.rstrip(b"\n") for line in lines_of(path)]
            assert [line if len(line) < MAX_LINE_BYTES else giant for line in forward] == lines
            short = [line for line in lines if line and line is not giant]
            assert [line for line in lines_from_the_end(path) if line] == short[::-1]
