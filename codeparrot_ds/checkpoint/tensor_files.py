"""The safetensors files of a checkpoint: written straight from memory and hashed on the way, read by slices.

The library's own writer copies every tensor once more before it writes, and its files would have to be read again for
their SHA-256: at the size of an optimizer's state both are too much. The format is a header in JSON and the bytes
(https://github.com/huggingface/safetensors#format). Reading is the library's.

A rank's optimizer fragments are one file or more. A tensor's name in there is ``parameter|kind|start``: the parameter,
``fp32``, ``exp_avg`` or ``exp_avg_sq``, and the offset inside the flattened parameter. Which file holds what does not
matter: whoever reads looks at all of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from codeparrot_ds import durable
from codeparrot_ds.durable import WrittenFile
from codeparrot_ds.engine.fragments import MASTER, MOMENTS, Fragment
from codeparrot_ds.errors import UserError, first_line
from codeparrot_ds.json_files import DamagedFileError, parts_of

FRAGMENT_FILES = "fragments-*.safetensors"
PIECE = 1 << 20
"""Values of a parameter that are exported at a time: an embedding as a whole would be the largest thing in memory."""

_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float64: "F64",
    torch.uint8: "U8",
    torch.int64: "I64",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """One tensor of a file, before its values are there."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensor_file(
    path: Path,
    entries: Sequence[TensorEntry],
    values: Iterable[torch.Tensor],
    metadata: Mapping[str, str] | None = None,
) -> WrittenFile:
    """Writes a safetensors file and waits until the disk has it.

    Args:
        entries: every tensor in the file's order.
        values: the bytes of all of them in that order, as contiguous CPU tensors of any dtype and any cut; each is let
            go before the next one is taken.
        metadata: strings that the format keeps in its header.

    Raises:
        OSError: the system refused.
        ValueError: the values are not as many bytes as the entries say.
    """
    expected = sum(entry.num_bytes for entry in entries)

    def content() -> Iterable[Any]:
        yield _header(entries, metadata or {})
        found = 0
        for value in values:
            found += value.nbytes
            yield value.reshape(-1).view(torch.uint8).numpy()
        if found != expected:
            raise ValueError(f"{path}: {found} bytes of values where the header says {expected}")

    return durable.write_file(path, content())


def _header(entries: Sequence[TensorEntry], metadata: Mapping[str, str]) -> bytes:
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for entry in entries:
        start, end = end, end + entry.num_bytes
        table[entry.name] = {"dtype": _NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [start, end]}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the values begin where every dtype is aligned
    return len(text).to_bytes(8, "little") + text


def save_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> WrittenFile:
    """``write_tensor_file`` for tensors that are all there."""
    entries = [TensorEntry(name=name, dtype=value.dtype, shape=tuple(value.shape)) for name, value in tensors.items()]
    return write_tensor_file(path, entries, (value.contiguous() for value in tensors.values()), metadata)


def fragment_file_name(rank: int, part: int) -> str:
    """The name of one of a rank's files; state on NVMe has a part for every group that fits in memory at once."""
    return f"fragments-{rank:05d}-{part:03d}.safetensors"


def fragment_entries(fragments: Iterable[Fragment]) -> tuple[list[TensorEntry], list[torch.Tensor]]:
    """The entries of a file with these fragments and the tensors behind them, in the file's order.

    Wide numbers come first, so that each tensor begins where its dtype is aligned.
    """
    named = [
        (f"{fragment.name}|{kind}|{fragment.start}", tensor)
        for fragment in fragments
        for kind, tensor in fragment.tensors.items()
    ]
    named.sort(key=lambda item: -item[1].element_size())
    entries = [TensorEntry(name=name, dtype=tensor.dtype, shape=(tensor.numel(),)) for name, tensor in named]
    return entries, [tensor for _, tensor in named]


@contextlib.contextmanager
def tensors_of(path: Path) -> Iterator[Any]:
    """A safetensors file while it is read; it stays open for as long as somebody has it.

    Raises:
        DamagedFileError: it is none, or what is in it is not what the block looks for.
    """
    try:
        with parts_of(path):
            if not path.is_file():  # opening a named pipe waits for its writer
                raise DamagedFileError(path, "it is not a regular file" if path.exists() else "it is missing")
            yield safe_open(path, "pt")
    except (SafetensorError, RuntimeError) as error:
        raise DamagedFileError(path, first_line(error)) from error


class FragmentReader:
    """All fragments of one checkpoint, read by slices; the files are mapped, not loaded.

    Args:
        folder: of the checkpoint.
        names: its files, those of other kinds among them; what else lies in the folder was never verified, and a
            network's file system may show a folder's new files late, though it opens them by name at once.
    """

    def __init__(self, folder: Path, names: Iterable[str]) -> None:
        self._folder = folder
        # (start, file, name in it) of every piece, by parameter and kind
        self._pieces: dict[tuple[str, str], list[tuple[int, Any, str]]] = {}
        for fragment_file in sorted(fnmatch.filter(names, FRAGMENT_FILES)):
            with tensors_of(folder / fragment_file) as file:
                for key in file.keys():  # noqa: SIM118 (not a mapping)
                    name, kind, start = key.rsplit("|", 2)
                    if len(file.get_slice(key).get_shape()) != 1:
                        raise ValueError(f"{key} is not flat")
                    self._pieces.setdefault((name, kind), []).append((int(start), file, key))

    def fill(self, target: torch.Tensor, name: str, kind: str, start: int = 0) -> None:
        """Copies ``[start, start + numel)`` of a flattened parameter into a one-dimensional tensor of any dtype.

        Raises:
            UserError: the checkpoint does not hold all of it.
        """
        filled = 0
        for piece_start, file, key in self._pieces.get((name, kind), ()):
            piece = file.get_slice(key)
            low = max(start, piece_start)
            high = min(start + target.numel(), piece_start + piece.get_shape()[0])
            if low < high:
                target[low - start : high - start].copy_(piece[low - piece_start : high - piece_start])
                filled += high - low
        if filled != target.numel():
            raise UserError(
                f"{self._folder} holds {filled} of {target.numel()} values of {name} ({kind}) from offset {start}"
            )

    def weights(self, shapes: Mapping[str, Sequence[int]], dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """The parameters one after the other, from their masters, in the precision asked for (rounded to nearest).

        Yields:
            Pieces of flattened parameters, all in the same buffer: use each before the next one is taken.

        Raises:
            UserError: the checkpoint does not hold all of it, or a value is too large for float16.
        """
        buffer = torch.empty(PIECE, dtype=dtype)
        for name, shape in shapes.items():
            numel = math.prod(shape)
            for start in range(0, numel, PIECE):
                piece = buffer[: min(PIECE, numel - start)]
                self.fill(piece, name, MASTER, start)
                if dtype == torch.float16 and not piece.isfinite().all():
                    raise UserError(f"{name} has values that float16 cannot hold: export it in bfloat16 or float32")
                yield piece

    def load(self, fragment: Fragment) -> None:
        """Fills an optimizer's fragment, masters and moments."""
        for kind in (MASTER, *MOMENTS):
            self.fill(fragment.tensors[kind], fragment.name, kind, fragment.start)
