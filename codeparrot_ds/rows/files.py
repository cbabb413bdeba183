"""What a file of rows is by its name and its first bytes."""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from codeparrot_ds.errors import UserError
from codeparrot_ds.json_files import DamagedFileError, parts_of, read_object
from codeparrot_ds.rows.access import LocalFile, RandomAccess
from codeparrot_ds.rows.compressed import DAMAGE, Frames

_JSON = ("json", "jsonl")  # the published dumps of code call JSON lines .json
FORMATS = {
    **{f".{name}.gz": "gz" for name in _JSON},
    **{f".{name}.zst": "zst" for name in _JSON},
    **{f".{name}": "jsonl" for name in _JSON},
    ".parquet": "parquet",
    ".arrow": "arrow",
}
TABLES = ("parquet", "arrow")
"""Formats whose rows are numbered, not lines of text."""
READ_BYTES = 1 << 18
"""Bytes that a reader asks the disk for at once; one open piece per lane holds about so much."""
REMOTE_READ_BYTES = 1 << 21
"""The same on the Hub, where each request costs a round trip."""
SNIFFED_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One file of documents."""

    path: Path | str
    """Where it is, for people: a path, or hf://datasets/… on the Hub."""
    name: str
    """What identifies the shard in a fingerprint, wherever the corpus lies: its file name, or its path on the Hub."""
    format: str
    """One of the values of FORMATS."""
    bytes: int
    """Size of the file."""
    remote: Any = None
    """A ``hub_dataset.HubFile`` where the shard is on the Hub."""
    is_values: bool = False
    """Whether the text is one JSON array, or JSON objects over several lines each, and not JSON lines."""
    text_column: str = ""
    """The column of the texts; where empty the one that published data sets have (``layouts.COLUMNS``)."""
    as_before: bool = False
    """Whether it is read as 0.1.0 read it, mistakes included: for runs that began with ``order_version`` 1."""
    exact_numbers: bool = False
    """Whether whole numbers of any size, infinity and NaN are read, which texts do without and tests may need."""

    @property
    def read_bytes(self) -> int:
        return REMOTE_READ_BYTES if self.remote else READ_BYTES


def file_format(name: str) -> str | None:
    """The format that the ending of a file's name stands for, or None."""
    return next((format_ for suffix, format_ in FORMATS.items() if name.endswith(suffix)), None)


def local_shard(path: Path, otherwise: str | None = None) -> Shard | None:
    """A file on a disk as a shard; None where its name stands for no format and there is no ``otherwise``.

    Of a ``.json`` file the beginning is read, which is JSON lines or one JSON array.
    """
    format_ = file_format(path.name) or otherwise
    if format_ is None:
        return None
    is_values = format_ not in TABLES and ".json" in path.suffixes and _begins_with_values(path, format_)
    return Shard(path=path, name=path.name, format=format_, bytes=path.stat().st_size, is_values=is_values)


def is_splittable(shard: Shard) -> bool:
    """Whether a reader can start anywhere in the shard."""
    return shard.format in TABLES or (shard.format == "jsonl" and not shard.is_values)


def saved_files(folder: Path) -> list[Path] | None:
    """The Arrow files that ``datasets`` wrote into a folder with ``save_to_disk``; None for any other folder.

    A file of its caches may lie beside them. Raises a UserError for what is more than its files.
    """
    try:
        state = read_object(folder / "state.json")
    except (OSError, DamagedFileError):
        return None
    if not isinstance(state.get("_data_files"), list):
        return None
    if state.get("_indices_data_files"):
        raise UserError(
            f"{folder} is a saved data set whose rows are chosen by an index: save `dataset.flatten_indices()` instead"
        )
    with parts_of(folder / "state.json"):
        names = [str(file["filename"]) for file in state["_data_files"]]
    if elsewhere := [name for name in names if os.path.basename(name) != name]:
        raise UserError(
            f"{folder / 'state.json'} names {elsewhere[0]}, and files of a saved data set lie beside it: save it again"
        )
    files = [folder / name for name in names]
    if missing := [file.name for file in files if not file.is_file()]:
        raise UserError(f"{folder} is a saved data set of which {missing[0]} is gone: save it again")
    return files


_COMPLETE_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)


def _begins_with_values(path: Path, format_: str) -> bool:
    """Whether a text is an array or objects over several lines, by its beginning; a broken line is neither."""
    try:
        with LocalFile(path) as file:
            if format_ == "jsonl":
                text = file.read_at(0, SNIFFED_BYTES)
            else:
                text = io.BufferedReader(Frames(file, 0, format_, READ_BYTES)).read(SNIFFED_BYTES)
    except (OSError, *DAMAGE):
        return False  # named where it is read
    text = text.removeprefix(codecs.BOM_UTF8).lstrip()
    first, newline, rest = text.partition(b"\n")
    second = rest.lstrip().partition(b"\n")[0]
    if text.startswith(b"["):
        return not (_is_json(first) and second)  # lines may be arrays, too
    if not text.startswith(b"{") or not newline or _is_json(first) or _is_json(second):
        return False
    outside = _COMPLETE_STRING.sub(b"", first)
    return b'"' not in outside and outside.count(b"{") > outside.count(b"}")


def _is_json(text: bytes) -> bool:
    try:
        orjson.loads(text)
    except orjson.JSONDecodeError:
        return False
    return True


def open_shard(shard: Shard) -> contextlib.AbstractContextManager[RandomAccess]:
    """Opens a shard for reading. Raises a UserError where the system refuses, and FileNotFoundError."""
    if shard.remote is not None:
        return contextlib.nullcontext(shard.remote.open())
    try:
        return LocalFile(shard.path)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"The shard {shard.path} cannot be read: {error.strerror or error}.") from error
