"""Files that are whole or not there, and say what is in them."""

import errno
import hashlib
import json
import logging
import os

import pytest

from codeparrot_ds import durable


def test_write_file_says_what_it_wrote(tmp_path):
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # of "abc": FIPS 180-2, appendix B.1
    assert durable.write_file(tmp_path / "abc", [b"a", b"", bytearray(b"bc")]) == durable.WrittenFile(3, digest)
    assert (tmp_path / "abc").read_bytes() == b"abc"


def test_pieces_and_short_writes_make_the_same_file(tmp_path, monkeypatch):
    content = os.urandom(10_000)
    monkeypatch.setattr(durable, "PIECE", 1000)
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:333]))
    entry = durable.write_file(tmp_path / "file", [memoryview(content)[:4500], content[4500:]])
    assert (tmp_path / "file").read_bytes() == content
    assert entry == durable.WrittenFile(10_000, hashlib.sha256(content).hexdigest())


def test_an_error_names_the_file(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*/file'"):
        durable.write_file(tmp_path / "file", [b"abc"])


def test_a_replaced_file_is_the_old_or_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    durable.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        durable.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}

    def refuse(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    for name in ("write", "fsync", "rename"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, refuse)
            with pytest.raises(OSError, match="run.json"):
                durable.write_json(path, {"a": 2})
        assert json.loads(path.read_text()) == {"a": 1}
        assert [file.name for file in tmp_path.iterdir()] == ["run.json"]
    durable.write_json(path, {"a": 3})
    assert json.loads(path.read_text()) == {"a": 3}


def test_a_file_system_that_syncs_no_folders_is_said_once(tmp_path, monkeypatch, caplog):
    def refuse(_):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(durable, "_told", set())
    monkeypatch.setattr(os, "fsync", refuse)
    with caplog.at_level(logging.WARNING, logger="codeparrot_ds.durable"):
        durable.sync_folder(tmp_path)
        durable.sync_folder(tmp_path)
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path} lies on a file system that syncs no folders (Invalid argument): a power cut may take the newest "
        "checkpoint's name, a kill cannot"
    ]


def test_a_folder_that_cannot_be_synced_for_another_reason_is_an_error(tmp_path, monkeypatch):
    def refuse(_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match=str(tmp_path)):
        durable.sync_folder(tmp_path)


def test_a_removed_folder_is_hidden_first(tmp_path, monkeypatch):
    folder = tmp_path / "step-1"
    (folder / "export").mkdir(parents=True)
    (folder / "export" / "file").write_text("x")
    hidden = tmp_path / ".staging-step-1"
    hidden.mkdir()  # left by a kill
    seen = []
    rmdir = os.rmdir
    monkeypatch.setattr(os, "rmdir", lambda *args, **kwargs: (seen.append(folder.exists()), rmdir(*args, **kwargs)))
    durable.remove_folder(folder, hidden)
    assert seen[-2:] == [False, False] and list(tmp_path.iterdir()) == []
