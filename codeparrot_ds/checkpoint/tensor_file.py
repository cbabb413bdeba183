"""Writes safetensors files straight from memory, hashed on the way.

The library's own writer copies every tensor once more before it writes, and its files would have to be read again for
their SHA-256: at the size of an optimizer's state both are too much. The format is a header in JSON and the bytes.
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from codeparrot_ds import durable

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
) -> dict[str, Any]:
    """Writes a safetensors file and waits until the disk has it; returns its ``bytes`` and ``sha256``.

    Args:
        path: of the file.
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


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> Any:
    """``write_tensor_file`` for tensors that are all there."""
    entries = [TensorEntry(name=name, dtype=value.dtype, shape=tuple(value.shape)) for name, value in tensors.items()]
    return write_tensor_file(path, entries, (value.contiguous() for value in tensors.values()), metadata)
