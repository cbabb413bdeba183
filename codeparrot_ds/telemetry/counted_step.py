"""What a GPU is made to do in one optimizer step, counted without a GPU: launches, bytes, FLOPs, and waits of the host.

The engine and the model are the real ones, on the pretended accelerator of ``memory/fake_device.py``. This is a profile
of a step without its times, so it is among the profiles: `StepCounter` sees every operator that torch runs below
autograd.

- A launch is an operator that computes: views and allocations are none, and what a library splits into several kernels
  is one; but what takes lists of tensors is as many as have room for their chunks. Collectives, and copies between host
  and device, are none.
- The bytes of a launch are those of the tensors that it reads and writes, each once, however often a cache misses.
- A kernel that torch does not know is one launch. As an operator of ``torch.library`` it is counted like torch's own,
  by its arguments; where it reads or writes something else than each of them once, it says so by `register_kernel`.
- The host waits where it asks for a number of a tensor, copies between host and device without ``non_blocking``, or
  synchronizes. What gives as many numbers as fulfil something cannot be counted: that is an error.
"""

from __future__ import annotations

import math
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from codeparrot_ds.memory import fake_device
from codeparrot_ds.memory.storage_counter import DEVICE_OF, answer_without_values
from codeparrot_ds.memory.traced_engine import build_engine, pretend
from codeparrot_ds.memory.workload import Workload

PARTS = ("forward", "backward", "engine")
"""The model's two passes with its loss; and the rest, which is DeepSpeed's: what its hooks do in them, and its step."""
WARM_UP_STEPS = 1  # creates Adam's states


class Gpu(NamedTuple):
    """What a GPU sustains."""

    flops: float
    """FLOP/s of large bf16 matrix products."""
    bytes_per_second: float
    """Of its memory."""


GPUS = {
    "H200": Gpu(790e12, 4.3e12),
    # By their data sheets, with the H200's shares of them: 0.80 of the dense peak, 0.90 of the bandwidth.
    "H100": Gpu(790e12, 3.0e12),
    "A100": Gpu(250e12, 1.83e12),
}


class Launch(NamedTuple):
    """One kernel."""

    part: str
    """One of `PARTS`."""
    operator: str
    num_bytes: int
    """Read and written."""
    flops: int
    """Of matrix products and attention; 0 for others, which memory bounds."""


class Wait(NamedTuple):
    """The host waits for the device."""

    part: str
    where: str
    """``file.py:line`` of the nearest code that is not torch's."""


class Step(NamedTuple):
    """One optimizer step on one rank."""

    launches: list[Launch]
    waits: list[Wait]

    def summary(self) -> dict[str, Any]:
        """Figures of the whole step, of each part of it, and its roofline on each of `GPUS`."""
        figures: dict[str, Any] = _totals(self.launches) | {"waits": len(self.waits)}
        figures["parts"] = {part: _totals(launch for launch in self.launches if launch.part == part) for part in PARTS}
        figures["roofline_seconds"] = {name: roofline_seconds(self.launches, gpu) for name, gpu in GPUS.items()}
        return figures

    def by_operator(self) -> list[tuple[str, str, int, int]]:
        """(part, operator, launches, bytes), the most bytes first."""
        count: Counter[tuple[str, str]] = Counter()
        size: Counter[tuple[str, str]] = Counter()
        for launch in self.launches:
            count[launch[:2]] += 1
            size[launch[:2]] += launch.num_bytes
        return [(*key, count[key], num_bytes) for key, num_bytes in size.most_common()]


def _totals(launches: Iterable[Launch]) -> dict[str, Any]:
    launches = list(launches)
    return {
        "launches": len(launches),
        "bytes": sum(launch.num_bytes for launch in launches),
        "flops": sum(launch.flops for launch in launches),
    }


def roofline_seconds(launches: Iterable[Launch], gpu: Gpu) -> float:
    """The least time of a step on a GPU: each launch takes its FLOPs or its bytes, whichever is longer."""
    return sum(max(launch.flops / gpu.flops, launch.num_bytes / gpu.bytes_per_second) for launch in launches)


# --------------------------------------------------------------------------------------------------------------------
# What a launch costs

_KERNELS: dict[str, Callable[..., int]] = {}


def register_kernel(operator: str, num_bytes: Callable[..., int]) -> None:
    """Says what an operator, ``namespace::name``, reads and writes in bytes, by its output and its arguments.

    For operators whose kernel does not read and write each of its tensors just once.
    """
    _KERNELS[operator] = num_bytes


def size_of(*values: Any) -> int:
    """The bytes of tensors, or of nested lists of them: what is expanded lies in memory once."""
    total = 0
    for tensor in tree_leaves(values):
        if isinstance(tensor, torch.Tensor):
            lengths = (length for length, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
            total += math.prod(lengths) * tensor.element_size() if tensor.numel() else 0
    return total


def _overwrites(output: Any, *args: Any, **kwargs: Any) -> int:
    """All but the first argument is read; the first is written, and not read before."""
    return size_of(args[1:], kwargs) + size_of(args[0])


def _picks(output: Any, source: Any, *others: Any, **_: Any) -> int:
    """Of the first argument only what comes out is read."""
    return 2 * size_of(output) + size_of(others)


_PICKING = ("embedding", "index", "index_select", "gather", "nll_loss_forward")
_OVERWRITING = ("copy_", "fill_", "zero_", "normal_", "uniform_", "bernoulli_", "_foreach_copy_", "_foreach_zero_")
for _name, _size in (*((name, _picks) for name in _PICKING), *((name, _overwrites) for name in _OVERWRITING)):
    register_kernel(f"aten::{_name}", _size)
for _name in ("zeros_like", "ones_like", "full_like", "rand_like", "randn_like"):  # the first only gives the shape
    register_kernel(f"aten::{_name}", lambda output, *_, **__: size_of(output))
# Losses of tokens are picked: their places are the targets.
register_kernel("aten::nll_loss_forward", lambda output, logits, targets, *_: size_of(output, targets, targets))
# (gradient, logits, targets, …): only zeros are written, and a number for each target.
register_kernel("aten::nll_loss_backward", lambda output, gradient, logits, targets, *_: size_of(output, targets))
# (into, dimension, places, from)
register_kernel("aten::scatter_add_", lambda output, into, _, places, source: size_of(places, places, source))
# Gradients are written only where they are divided by a scale.
register_kernel(
    "aten::_fused_adamw_",
    lambda output, parameters, gradients, *rest, grad_scale=None, **_: (
        size_of(gradients) * (1 if grad_scale is None else 2) + 2 * size_of(parameters, rest)
    ),
)

_ALLOCATIONS = frozenset(
    f"aten::{name}" for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_")
)
_COPIES = frozenset(("aten::copy_", "aten::_to_copy", "aten::_copy_from"))
_OF_LISTS = ("aten::_foreach_", "aten::_fused_adamw_")


# --------------------------------------------------------------------------------------------------------------------
# The counter


class StepCounter(TorchDispatchMode):
    """While it is entered, it notes every launch on a device and every wait of the host for it.

    The tensors have no values (``fake_device``). `part` says what runs; what DeepSpeed's hooks do meanwhile is counted
    as the engine's.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.part = "forward"
        self.launches: list[Launch] = []
        self.waits: list[Wait] = []
        self._kinds: dict[types.CodeType, str] = {}
        fake_device.waits.append(self.wait)

    def begin(self) -> None:
        """Forgets what has been counted."""
        self.launches, self.waits = [], []

    @property
    def counted(self) -> Step:
        return Step(self.launches, self.waits)

    def __torch_dispatch__(self, operator: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        answered, value = answer_without_values(operator, args)
        if answered:
            if self._is_here(args):
                self.wait()
            return value
        output = operator(*args, **kwargs)
        if operator is not DEVICE_OF:
            self._note(operator, args, kwargs, output)
        return output

    def wait(self) -> None:
        """Notes that the host waits for the device."""
        self.waits.append(Wait(self._part(), self._caller()))

    def kernel(self, operator: str, num_bytes: int, flops: int = 0, *, launches: int = 1) -> None:
        """Notes a launch, or several that share the bytes."""
        part, rest = self._part(), num_bytes % launches
        for number in range(launches):
            self.launches.append(Launch(part, operator, num_bytes // launches + (rest if number == 0 else 0), flops))

    def fused_adam(self, chunk_size: int, flag: Any, tensors: list[Any], *_: Any) -> None:
        """FusedAdam's kernel: gradients, weights and both moments are read, all but the gradients written."""
        gradients, *others = tensors
        num_bytes = size_of(gradients) + 2 * size_of(others)
        self.kernel("deepspeed::multi_tensor_adam", num_bytes, launches=_launches_of_lists(tensors))

    def _note(self, operator: Any, args: Any, kwargs: Any, output: Any) -> None:
        tensors = [leaf for leaf in tree_leaves((args, kwargs, output)) if isinstance(leaf, torch.Tensor)]
        here = [tensor for tensor in tensors if tensor.device == self.device]
        name = operator._schema.name
        if not here or name in _ALLOCATIONS:
            return
        # A number on the host is an argument of the kernel, not a copy.
        if name in _COPIES and any(tensor.device != self.device for tensor in tensors):
            if not (kwargs.get("non_blocking") or (name == "aten::copy_" and len(args) > 2 and args[2])):
                self.wait()
            return
        written = _written(operator, args, kwargs)
        if not written and self._is_view(args, kwargs, output):
            return
        cost = _KERNELS.get(name)
        if cost is not None:
            num_bytes = cost(output, *args, **kwargs)
        else:
            known = _storages((args, kwargs))
            fresh = [leaf for leaf in tree_leaves(output) if not _storages(leaf) <= known]
            num_bytes = size_of(args, kwargs, written, fresh)
        lists = [value for value in args if isinstance(value, list | tuple) and value]
        launches = _launches_of_lists(lists) if name.startswith(_OF_LISTS) else 1
        self.kernel(name, num_bytes, _flops(operator, args, kwargs, output), launches=launches)

    def _is_here(self, values: Any) -> bool:
        return any(isinstance(leaf, torch.Tensor) and leaf.device == self.device for leaf in tree_leaves(values))

    def _is_view(self, args: Any, kwargs: Any, output: Any) -> bool:
        """Whether all that comes out lies in what went in."""
        return _storages(output) <= _storages((args, kwargs))

    def _part(self) -> str:
        """What runs: the nearest of the model's and DeepSpeed's functions on the stack says it; autograd has none."""
        if self.part == "engine":
            return self.part
        for frame in _frames():
            kind = self._kind(frame.f_code)
            if kind:
                return "engine" if kind == "engine" else self.part
        return self.part

    def _kind(self, code: types.CodeType) -> str:
        kind = self._kinds.get(code)
        if kind is None:
            file = code.co_filename
            kind = ""
            if "/transformers/" in file or "/codeparrot_ds/model/" in file or file.endswith(_RUNS_THE_MODEL):
                kind = "model"
            elif "/codeparrot_ds/engine/" in file or "/deepspeed/" in file and not file.endswith(_WRAPPERS):
                kind = "engine"
            self._kinds[code] = kind
        return kind

    def _caller(self) -> str:
        own = (__file__, fake_device.__file__)
        for frame in _frames():
            file = frame.f_code.co_filename
            if "/torch/" not in file and file not in own:
                return f"{file.rsplit('/', 1)[-1]}:{frame.f_lineno}"
        return ""


_RUNS_THE_MODEL = ("/activation_checkpointing/checkpointing.py", "/runtime/zero/linear.py")
_WRAPPERS = ("/deepspeed/utils/nvtx.py", "/deepspeed/accelerator/abstract_accelerator.py")


def _frames() -> Iterator[types.FrameType]:
    frame: types.FrameType | None = sys._getframe(2)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _storages(values: Any) -> set[int]:
    return {leaf.untyped_storage()._cdata for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)}


def _written(operator: Any, args: Any, kwargs: Any) -> list[Any]:
    """The arguments that an operator writes, by its schema."""
    found = []
    for place, argument in enumerate(operator._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            found.append(value)
    return found


def _launches_of_lists(lists: list[Any]) -> int:
    """Of torch's and DeepSpeed's multi-tensor kernels (``MultiTensorApply.cuh``, ``multi_tensor_apply.cuh``).

    A launch has room for 320 chunks of 65,536 elements, and for fewer tensors the more lists there are.
    """
    chunks = sum(-(-tensor.numel() // 65_536) for tensor in lists[0])
    most = (110, 64, 48, 36, 30)[min(len(lists), 5) - 1]
    return max(1, -(-chunks // 320), -(-len(lists[0]) // most))


def _flops(operator: Any, args: Any, kwargs: Any, output: Any) -> int:
    """As torch's own counter has them; of causal attention half."""
    formula = flop_registry.get(operator._overloadpacket)
    if formula is None:
        return 0
    flops = formula(*args, **kwargs, out_val=output)
    causal = "attention" in operator._schema.name and _argument(operator, args, kwargs, "is_causal")
    return int(flops) // 2 if causal else int(flops)


def _argument(operator: Any, args: Any, kwargs: Any, name: str) -> Any:
    names = [argument.name for argument in operator._schema.arguments]
    place = names.index(name) if name in names else len(args)
    return args[place] if place < len(args) else kwargs.get(name)


# --------------------------------------------------------------------------------------------------------------------
# A step


def count_steps(
    workloads: Sequence[Workload], trainer: Callable[[Workload, Any, StepCounter], Callable[[], None]]
) -> Iterator[Step]:
    """A step of each workload, like all that follow its first; changes the process for good (`fake_device`).

    Args:
        workloads: with as many ranks and the same attention.
        trainer: makes of an engine a function that trains one step, and says in the counter's ``part`` what runs.
    """
    counters: list[StepCounter] = []
    device, _ = pretend(workloads[0], multi_tensor_adam=lambda *args: counters[0].fused_adam(*args))
    counter = StepCounter(device)
    counters.append(counter)
    with fake_device.FakeTensors(), counter:
        for workload in workloads:
            engine = build_engine(workload, device)
            train = trainer(workload, engine, counter)
            for _ in range(WARM_UP_STEPS + 1):
                counter.begin()
                train()
            yield counter.counted
            engine.destroy()
