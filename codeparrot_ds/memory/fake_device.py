"""A rank that is one of many, on an accelerator that is not there: what DeepSpeed meets when its memory is traced.

Everything here changes the process for good: it is for a process of its own.

The pretended accelerator is torch's ``PrivateUse1`` device with a device guard written in Python: torch, autograd and
DeepSpeed treat it like any GPU (streams, pinned host memory, copies between host and device), so what DeepSpeed leaves
on the device and what it puts on the host are told apart by where the tensors lie. A pretended ``cuda`` would need a
CUDA build of torch; a pretended ``cpu`` is the CPU accelerator itself, where offloading moves nothing.
"""

from __future__ import annotations

import contextlib
import os
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from codeparrot_ds.engine.ranks import build_no_shared_memory_operator
from codeparrot_ds.engine.traced import replace_backend, replace_operators, replace_pinning
from codeparrot_ds.memory.storage_counter import StorageCounter

PRETENDED = "pretended"
# Enough that DeepSpeed never turns to the host for want of device memory.
PLENTY = 1 << 50


class FinishedWork:
    """The handle of a collective that is over."""

    def wait(self, *_: Any) -> None:
        return None

    def is_completed(self) -> bool:
        return True


waits: list[Callable[[], None]] = []
"""Called whenever the host would wait for the device."""


def _wait(*_: Any) -> None:
    for noticed in waits:
        noticed()


class FakeStream:
    """A stream or an event: everything on it has happened."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def wait_stream(self, *_: Any) -> None:
        pass

    wait_event = record = wait = wait_stream
    synchronize = _wait

    def record_event(self, *_: Any) -> FakeStream:
        return FakeStream()

    def query(self) -> bool:
        return True

    def elapsed_time(self, *_: Any) -> float:
        return 1.0


# --------------------------------------------------------------------------------------------------------------------
# The accelerator


def _make_accelerator() -> Any:
    """A DeepSpeed accelerator that behaves like CUDA's where memory is concerned."""
    from deepspeed.accelerator.abstract_accelerator import DeepSpeedAccelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    device = torch.device(PRETENDED, 0)

    def tensor_type(dtype: torch.dtype) -> property:
        def make(_: Any) -> Any:
            return lambda value: (
                torch.empty(value, dtype=dtype, device=device)
                if isinstance(value, int)
                else torch.tensor(value, dtype=dtype, device=device)
            )

        return property(make)

    class PretendedAccelerator(CPU_Accelerator):
        def is_synchronized_device(self) -> bool:
            return False

        def device_name(self, device_index: int | None = None) -> str:
            return PRETENDED if device_index is None else f"{PRETENDED}:{device_index}"

        def device(self, device_index: int | None = None) -> torch.device:
            return device

        def current_device(self) -> int:
            return 0

        def current_device_name(self) -> str:
            return f"{PRETENDED}:0"

        def device_count(self) -> int:
            return 1

        def synchronize(self, device_index: int | None = None) -> None:
            _wait()

        def communication_backend_name(self) -> str:
            return "fake"

        def is_fp16_supported(self) -> bool:
            return True

        def total_memory(self, device_index: int | None = None) -> int:
            return PLENTY

        available_memory = total_memory

        def memory_allocated(self, device_index: int | None = None) -> int:
            return 0

        max_memory_allocated = memory_reserved = max_memory_reserved = memory_allocated

        @property
        def Stream(self) -> Any:
            return FakeStream

        Event = Stream

        def stream(self, stream: Any) -> Any:
            return contextlib.nullcontext()

        def current_stream(self, device_index: int | None = None) -> FakeStream:
            return FakeStream()

        default_stream = current_stream

        def on_accelerator(self, tensor: torch.Tensor) -> bool:
            return tensor.device.type == PRETENDED

        FloatTensor = tensor_type(torch.float32)
        HalfTensor = tensor_type(torch.float16)
        BFloat16Tensor = tensor_type(torch.bfloat16)
        DoubleTensor = tensor_type(torch.float64)
        IntTensor = tensor_type(torch.int32)
        LongTensor = tensor_type(torch.int64)
        ByteTensor = tensor_type(torch.uint8)

        pin_memory = DeepSpeedAccelerator.pin_memory

    replace_pinning(
        PretendedAccelerator,
        pin=lambda tensor: pinned_by_torch(torch.empty_like(tensor, device="cpu")),
        empty=lambda tensor, shape: pinned_by_torch(tensor.new_empty(shape)),
        is_pinned=is_pinned,
    )
    return PretendedAccelerator()


class FakeTensors(FakeTensorMode):
    """While it is entered, tensors have shapes, types and devices, but no memory."""

    # A tensor made from Python numbers is otherwise first made on its device for real, which is not there.
    avoid_device_init = True  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)


class _HostGenerator(torch.Generator):
    """A generator of random numbers for a device that has none: nothing is drawn from it."""

    def __new__(cls, device: Any = None) -> _HostGenerator:
        return super().__new__(cls)


_pinned_storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}


def pinned(tensor: torch.Tensor) -> torch.Tensor:
    """Notes that a host tensor lies in page-locked memory, and returns it."""
    storage = tensor.untyped_storage()
    key = storage._cdata
    _pinned_storages[key] = weakref.ref(storage, lambda _: _pinned_storages.pop(key, None))
    return tensor


def pinned_by_torch(tensor: torch.Tensor) -> torch.Tensor:
    """The same for torch's own allocator, which rounds up to a power of two (``CachingHostAllocator``)."""
    for mode in _get_current_dispatch_mode_stack():
        if isinstance(mode, StorageCounter) and tensor.numel():
            record = mode.count(tensor)
            assert record is not None
            record.num_bytes = 1 << (record.num_bytes - 1).bit_length()
    return pinned(tensor)


def is_pinned(tensor: torch.Tensor) -> bool:
    """Whether a host tensor lies in page-locked memory."""
    return tensor.untyped_storage()._cdata in _pinned_storages


def pretend_accelerator() -> torch.device:
    """Makes torch and DeepSpeed believe in an accelerator; returns its device."""
    from torch.utils import backend_registration

    class Module(backend_registration._DummyBackendModule):
        def get_amp_supported_dtype(self) -> list[torch.dtype]:
            return [torch.bfloat16, torch.float16]

    backend_registration._setup_privateuseone_for_python_backend(PRETENDED, backend_module=Module())
    from deepspeed.accelerator import set_accelerator

    set_accelerator(_make_accelerator())
    torch.Generator = _HostGenerator  # type: ignore[misc]
    # Delayed frees are the allocator's business, not the tensors'.
    torch.Tensor.record_stream = lambda self, stream: None  # type: ignore[method-assign, assignment]
    return torch.device(PRETENDED, 0)


def make_everything_finite() -> None:
    """Lets ``torch.isfinite`` of tensors without values be true; other truths of theirs are false (no overflow)."""
    plain = torch.isfinite

    def isfinite(tensor: torch.Tensor) -> torch.Tensor:
        result = plain(tensor)
        result.is_true = True
        return result

    torch.isfinite = isfinite


def use_fused_attention() -> None:
    """Gives the pretended accelerator CUDA's fused attention kernels; without them torch takes the math formulas.

    As CUDA chooses (``aten/src/ATen/native/transformers/cuda/sdp_utils.cpp``): flash attention in half precision, which
    pads heads to a multiple of 8, memory-efficient attention in fp32. Both keep queries, keys, values, outputs and the
    logarithms of the softmax sums.
    """
    plain, operators = functional.scaled_dot_product_attention, torch.ops.aten

    def attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        **options: Any,
    ) -> torch.Tensor:
        head_size, half = query.shape[-1], query.dtype in (torch.bfloat16, torch.float16)
        if attn_mask is not None or head_size > 256 or (not half and head_size % 4):
            return plain(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **options)
        scale = head_size**-0.5 if scale is None else scale
        if not half:
            return operators._scaled_dot_product_efficient_attention(
                query, key, value, None, True, dropout_p, is_causal, scale=scale
            )[0]
        if head_size % 8:
            query, key, value = (functional.pad(tensor, (0, -head_size % 8)) for tensor in (query, key, value))
        output = operators._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
        return output[..., :head_size]

    functional.scaled_dot_product_attention = attention


def convert_modules_in_place() -> None:
    """Lets ``Module.to`` and its like treat fake parameters as they treat real ones.

    torch swaps fake parameters with their converted form, which fails as soon as anything has a weak reference to one.
    Real parameters stay the same objects and get other data, unless they go to another kind of device.
    """

    def apply(module: torch.nn.Module, convert: Any, recurse: bool = True) -> torch.nn.Module:
        for child in module.children() if recurse else ():
            apply(child, convert)
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            with torch.no_grad():
                converted = convert(parameter)
            if converted.device.type == parameter.device.type:
                parameter.data = converted
            else:
                module._parameters[name] = torch.nn.Parameter(converted, parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = convert(buffer)
        return module

    torch.nn.Module._apply = apply  # type: ignore[method-assign, assignment]


# --------------------------------------------------------------------------------------------------------------------
# The other ranks


def join_fake_ranks(world_size: int) -> None:
    """Makes this process rank 0 of `world_size` ranks whose collectives are over at once and change nothing."""
    import torch.distributed as dist
    from deepspeed.comm.torch import TorchBackend
    from torch.testing._internal.distributed.fake_pg import FakeStore

    class FakeRanks(TorchBackend):
        """DeepSpeed's communication backend over torch's fake process groups."""

        def _done(self, *_: Any, **__: Any) -> FinishedWork:
            return FinishedWork()

        all_reduce = broadcast = reduce = barrier = monitored_barrier = _done
        all_gather = all_gather_into_tensor = all_gather_coalesced = all_reduce_coalesced = _done
        reduce_scatter = reduce_scatter_tensor = all_to_all = all_to_all_single = _done
        broadcast_object_list = _done

        def all_gather_object(self, object_list: list[Any], obj: Any, group: Any = None) -> None:
            object_list[:] = [obj] * len(object_list)

    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")  # looked at, never connected to
    build_no_shared_memory_operator()
    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    replace_backend(FakeRanks("fake", None, None))


# --------------------------------------------------------------------------------------------------------------------
# The operators


class FakeFiles:
    """What DeepSpeed's asynchronous I/O has written: bytes by path."""

    def __init__(self) -> None:
        self.sizes: dict[str, int] = {}

    @property
    def num_bytes(self) -> int:
        return sum(self.sizes.values())

    def make_handle(self, *_: Any, **settings: Any) -> _FakeHandle:
        return _FakeHandle(self, settings.get("block_size", 1024 * 1024), settings.get("intra_op_parallelism", 1))


class _FakeHandle:
    """DeepSpeed's ``aio_handle`` (``csrc/aio/py_lib/py_ds_aio.cpp``) without a disk."""

    def __init__(self, files: FakeFiles, block_size: int, intra_op_parallelism: int) -> None:
        self._files = files
        self._pending = 0
        self._block_size = block_size
        self._parallelism = intra_op_parallelism

    def get_block_size(self) -> int:
        return self._block_size

    def get_intra_op_parallelism(self) -> int:
        return self._parallelism

    def get_alignment(self) -> int:
        return 512 * self._parallelism

    def async_pwrite(self, tensor: torch.Tensor, path: str, offset: int = 0) -> int:
        size = offset + tensor.numel() * tensor.element_size()
        self._files.sizes[path] = max(size, self._files.sizes.get(path, 0))
        self._pending += 1
        return 0

    def async_pread(self, tensor: torch.Tensor, path: str, offset: int = 0) -> int:
        self._pending += 1
        return 0

    def sync_pwrite(self, tensor: torch.Tensor, path: str, offset: int = 0) -> int:
        self.async_pwrite(tensor, path, offset)
        return self.wait()

    def sync_pread(self, tensor: torch.Tensor, path: str, offset: int = 0) -> int:
        self.async_pread(tensor, path, offset)
        return self.wait()

    def wait(self) -> int:
        done, self._pending = self._pending, 0
        return done

    def new_cpu_locked_tensor(self, num_elements: int, example: torch.Tensor) -> torch.Tensor:
        return pinned(torch.empty(num_elements, dtype=example.dtype, device="cpu"))

    def free_cpu_locked_tensor(self, tensor: torch.Tensor) -> bool:
        return True

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return is_pinned(tensor)


def _nothing(*_: Any, **__: Any) -> int:
    return 0


def use_fake_operators(multi_tensor_adam: Callable[..., Any] = _nothing) -> FakeFiles:
    """Replaces DeepSpeed's compiled operators by ones that leave tensors alone; returns what they "write".

    `multi_tensor_adam` is called in the place of FusedAdam's kernel.
    """
    files = FakeFiles()
    replace_operators(
        fused_adam=types.SimpleNamespace(multi_tensor_adam=multi_tensor_adam),
        cpu_adam=types.SimpleNamespace(create_adam=_nothing, adam_update=_nothing, destroy_adam=_nothing),
        async_io=types.SimpleNamespace(aio_handle=files.make_handle),
        pin_memory=types.SimpleNamespace(pin_handle=files.make_handle),
    )
    return files
