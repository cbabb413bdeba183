"""The files that hold a checkpoint's optimizer fragments: one or more a rank, read by any slice of any parameter.

A tensor's name in a file is ``parameter|kind|start``: the parameter, ``fp32``, ``exp_avg`` or ``exp_avg_sq``, and the
offset inside the flattened parameter. Which file holds what does not matter: whoever reads looks at all of them.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from codeparrot_ds.checkpoint.tensor_file import TensorEntry
from codeparrot_ds.engine.fragments import MASTER, MOMENTS, Fragment
from codeparrot_ds.errors import UserError

PATTERN = "fragments-*.safetensors"
PIECE = 1 << 20
"""Values of a parameter that are exported at a time: an embedding as a whole would be the largest thing in memory."""


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


class FragmentReader:
    """All fragments of one checkpoint, read by slices; the files are mapped, not loaded.

    Args:
        folder: of the checkpoint.
        names: its files, those of other kinds among them; what else lies in the folder was never verified, and a
            network's file system may show a folder's new files late, though it opens them by name at once.
    """

    def __init__(self, folder: Path, names: Iterable[str]) -> None:
        from safetensors import safe_open

        self._folder = folder
        # (start, file, name in it) of every piece, by parameter and kind
        self._pieces: dict[tuple[str, str], list[tuple[int, Any, str]]] = {}
        for fragment_file in sorted(fnmatch.filter(names, PATTERN)):
            file = safe_open(folder / fragment_file, "pt")
            for key in file.keys():  # noqa: SIM118 (not a mapping)
                name, kind, start = key.rsplit("|", 2)
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
