"""Counts the bytes of every tensor storage that is alive, tensor by tensor: real tensors and fake ones alike."""

from __future__ import annotations

import sys
import types
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# How far up the call stack to look for the DeepSpeed function that made a tensor.
STACK_DEPTH = 24
# It makes nothing; FakeTensor asks for the device many times an operator.
DEVICE_OF = torch.ops.prim.device.default


@dataclass(eq=False, slots=True)
class Storage:
    """One allocation: how large it is, where it lies, and what is known about why it was made."""

    num_bytes: int
    device: str
    shape: tuple[int, ...]
    phase: str
    operator: str
    maker: str  # "file.py:function" of DeepSpeed's function that made it; empty: none did
    tags: set[str] = field(default_factory=set)


class StorageCounter(TorchDispatchMode):
    """While it is entered, every storage that an operator makes is counted until it is freed.

    Args:
        granularity: allocations are rounded up to it (512 bytes in CUDA's caching allocator).
        fake: the tensors have no values: numbers that the program asks for are made up (see
            `answer_without_values`).
    """

    def __init__(self, *, granularity: int = 1, fake: bool = False) -> None:
        super().__init__()
        self.granularity = granularity
        self.fake = fake
        self.phase = ""
        self.live: dict[int, tuple[Storage, Any]] = {}
        self.events: list[tuple[Storage, bool]] = []  # made or freed, in order
        self._makers: dict[Any, str] = {}

    def __torch_dispatch__(self, operator: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.fake:
            answered, value = answer_without_values(operator, args)
            if answered:
                return value
        output = operator(*args, **(kwargs or {}))
        if operator is DEVICE_OF:
            return output
        if isinstance(output, torch.Tensor):
            self.count(output, operator)
        elif output is not None:
            for leaf in tree_leaves(output):
                if isinstance(leaf, torch.Tensor):
                    self.count(leaf, operator)
        return output

    def count(self, tensor: torch.Tensor, operator: Any = "") -> Storage | None:
        """The record of a tensor's storage; a storage that is not known yet begins to count."""
        if tensor.device.type == "meta" or tensor.layout != torch.strided:
            return None
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self.live.get(key)
        if known is not None:
            return known[0]
        num_bytes = -(-storage.nbytes() // self.granularity) * self.granularity
        record = Storage(
            num_bytes, tensor.device.type, tuple(tensor.shape), self.phase, str(operator), self._find_maker()
        )
        # The reference is kept beside the record, or its callback would never run.
        self.live[key] = record, weakref.ref(storage, lambda _: self._freed(key))
        self.events.append((record, True))
        return record

    def _freed(self, key: int) -> None:
        record, _ = self.live.pop(key)
        self.events.append((record, False))

    def _find_maker(self) -> str:
        """The nearest DeepSpeed function on the call stack. Autograd's own operators have no stack."""
        frame: types.FrameType | None = sys._getframe(3)
        for _ in range(STACK_DEPTH):
            if frame is None:
                return ""
            code = frame.f_code
            maker = self._makers.get(code)
            if maker is None:
                maker = ""
                if "/deepspeed/" in code.co_filename and not code.co_filename.endswith("/nvtx.py"):
                    maker = f"{code.co_filename.rsplit('/', 1)[-1]}:{code.co_name}"
                self._makers[code] = maker
            if maker:
                return maker
            frame = frame.f_back
        return ""

    def tag(self, tensors: Iterator[torch.Tensor] | list[torch.Tensor], name: str) -> None:
        """Notes what a tensor turned out to be."""
        for tensor in tensors:
            record = self.count(tensor)
            if record is not None:
                record.tags.add(name)

    def storages(self, device: str) -> list[Storage]:
        """What is alive now on a device (``cpu``, ``cuda`` …)."""
        return [record for record, _ in self.live.values() if record.device == device]


def answer_without_values(operator: Any, args: Any) -> tuple[bool, Any]:
    """Whether an operator asks for a number of a tensor, and the answer where tensors have no values.

    Every float is 1, every integer 0, and nothing is infinite or NaN: those are the answers of a training step in which
    nothing goes wrong: it is not skipped.
    """
    if operator is torch.ops.aten._local_scalar_dense.default:
        tensor = args[0]
        if tensor.dtype == torch.bool:
            return True, getattr(tensor, "is_true", False)
        return True, 1.0 if tensor.dtype.is_floating_point else 0
    return (True, True) if operator is torch.ops.aten.equal.default else (False, None)


def bytes_of(storages: list[Storage]) -> int:
    """The bytes of storages together."""
    return sum(storage.num_bytes for storage in storages)


@dataclass(frozen=True)
class Peak:
    """The moment when the most bytes were alive, and what was alive then."""

    num_bytes: int
    storages: list[Storage]


def find_peak(before: list[Storage], events: list[tuple[Storage, bool]], device: str) -> Peak:
    """The peak on a device during `events`; `before` was alive there when they began."""
    current = most = bytes_of(before)
    at = 0
    for index, (storage, made) in enumerate(events, start=1):
        if storage.device == device:
            current += storage.num_bytes if made else -storage.num_bytes
            if current > most:
                most, at = current, index
    alive = dict.fromkeys(before)
    for storage, made in events[:at]:
        if storage.device == device:
            if made:
                alive[storage] = None
            else:
                del alive[storage]
    return Peak(most, list(alive))
