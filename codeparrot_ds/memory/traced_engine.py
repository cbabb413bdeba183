"""A few training steps of the real engine and the real model, with every storage counted and named.

The steps are those of a run: :func:`codeparrot_ds.model.gpt2.build_model`,
:func:`codeparrot_ds.engine.engine.create_engine`, forward, backward, step. What they run on is the caller's: tensors
without memory on a pretended accelerator (`trace`), or real ones.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from codeparrot_ds.config.run_config import RunConfig
from codeparrot_ds.ds_config.facts import zero_stage
from codeparrot_ds.engine.engine import create_engine
from codeparrot_ds.engine.fragments import parameter_shapes
from codeparrot_ds.engine.traced import MAKERS, capture_checkpoints, model_state
from codeparrot_ds.memory.storage_counter import Peak, Storage, StorageCounter, bytes_of, find_peak
from codeparrot_ds.memory.workload import CATEGORIES, Memory, Workload
from codeparrot_ds.model.gpt2 import build_model

# Adam's states appear in the first step, what stage 3 keeps gathered after the first backward pass: by then a step is
# like all that follow, with a micro-batch to spare.
NUM_MICRO_BATCHES = 3


def trace(workload: Workload, *, device_name: str = "accelerator") -> Memory:
    """The memory of one rank, from tensors without memory; changes the process for good (`fake_device`).

    Args:
        device_name: ``"accelerator"``: what a GPU run does. ``"cpu"``: what a run on DeepSpeed's CPU accelerator does,
            where the host's memory is the device's.
    """
    from codeparrot_ds.memory import fake_device

    accelerator = device_name == "accelerator"
    device, files = pretend(workload, accelerator=accelerator)
    # CUDA's caching allocator hands out blocks of 512 bytes.
    counter = StorageCounter(granularity=512 if accelerator else 1, fake=True)
    with fake_device.FakeTensors(), counter:
        engine, memory = measure(workload, counter, device)
        checkpoint_bytes = _checkpoint_bytes(engine, workload.world_size, files.num_bytes)
    return dataclasses.replace(memory, nvme_bytes=files.num_bytes, checkpoint_bytes=checkpoint_bytes)


def pretend(workload: Workload, *, accelerator: bool = True, **operators: Any) -> tuple[torch.device, Any]:
    """Makes this process rank 0 of the workload's ranks, for good; returns its device and the files of offloading.

    `operators` are given to ``use_fake_operators``.
    """
    from codeparrot_ds.memory import fake_device

    warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
    device = fake_device.pretend_accelerator() if accelerator else torch.device("cpu")
    fake_device.join_fake_ranks(workload.world_size)
    files = fake_device.use_fake_operators(**operators)
    fake_device.convert_modules_in_place()
    fake_device.make_everything_finite()
    if accelerator and workload.attention == "flash":
        fake_device.use_fused_attention()
    return device, files


def build_engine(workload: Workload, device: torch.device) -> Any:
    """The engine that a run of this workload trains with."""
    ds_config = dict(workload.ds_config)
    model = build_model(
        workload.shape,
        eos_token_id=0,
        seed=0,
        dropout=workload.dropout,
        chunked_loss=workload.chunked_loss,
        fused_loss=workload.fused_loss,
        zero3_config=ds_config if zero_stage(ds_config) == 3 else None,
        device=device,
    )
    run = RunConfig(lean_step="on" if workload.lean_step else "off")
    return create_engine(model, ds_config, run, traced=True)


def measure(workload: Workload, counter: StorageCounter, device: torch.device) -> tuple[Any, Memory]:
    """Builds the engine and makes the steps, with `counter` entered; returns the engine and what it took.

    ``nvme_bytes`` and ``checkpoint_bytes`` are left at 0.
    """
    gc.freeze()  # each micro-batch ends with a collection: it need not look through what was imported
    peaks = _Peaks(counter, device.type)
    counter.phase = "initialization"
    with peaks.of("initialization"):
        engine = build_engine(workload, device)
        gc.collect()
    gc.freeze()
    ids = torch.zeros(workload.micro_batch_size, workload.seq_length, dtype=torch.long, device=device)
    for _ in range(max(2, math.ceil(NUM_MICRO_BATCHES / workload.accumulation_steps))):
        peaks.forget("forward_backward", "step")
        _step(engine, ids, workload.accumulation_steps, counter, peaks)
    _tag_model_state(engine, counter)
    largest = max((peaks.device[phase] for phase in ("forward_backward", "step")), key=lambda peak: peak.num_bytes)
    memory = Memory(
        depth="traced",
        device=_composition(largest, workload, engine),
        resident_bytes=bytes_of(counter.storages(device.type)),
        phases={phase: peak.num_bytes for phase, peak in peaks.device.items()},
        host_bytes=peaks.host_bytes,
        nvme_bytes=0,
        checkpoint_bytes=0,
    )
    return engine, memory


class _Peaks:
    """The largest peak of each phase, on the device and (where that is another place) on the host."""

    def __init__(self, counter: StorageCounter, device: str) -> None:
        self._counter = counter
        self._device = device
        self.device: dict[str, Peak] = {}
        self.host: dict[str, int] = {}

    @property
    def host_bytes(self) -> int:
        """The most on the host in a training step."""
        return max((size for phase, size in self.host.items() if phase != "initialization"), default=0)

    def forget(self, *phases: str) -> None:
        for phase in phases:
            self.device.pop(phase, None)
            self.host.pop(phase, None)

    @contextlib.contextmanager
    def of(self, phase: str) -> Iterator[None]:
        """Looks for the peak of what happens inside, which belongs to a phase."""
        counter, device = self._counter, self._device
        counter.events.clear()
        before, before_on_host = counter.storages(device), counter.storages("cpu")
        yield
        peak = find_peak(before, counter.events, device)
        if phase not in self.device or peak.num_bytes > self.device[phase].num_bytes:
            self.device[phase] = peak
        if device != "cpu":
            on_host = find_peak(before_on_host, counter.events, "cpu").num_bytes
            self.host[phase] = max(on_host, self.host.get(phase, 0))


def _step(engine: Any, ids: torch.Tensor, accumulation_steps: int, counter: StorageCounter, peaks: _Peaks) -> None:
    """One optimizer step, as :func:`codeparrot_ds.training.loop.accumulate_gradients` makes it."""
    for _ in range(accumulation_steps):
        with peaks.of("forward_backward"):
            counter.phase = "forward"
            loss = engine(input_ids=ids, labels=ids).loss
            counter.phase = "backward"
            engine.backward(loss)
        counter.tag((p.grad for p in engine.module.parameters() if p.grad is not None), "gradients")
        with peaks.of("step"):
            counter.phase = "step"
            engine.step()
        del loss
        gc.collect()


# --------------------------------------------------------------------------------------------------------------------
# What the storages are


def _tag_model_state(engine: Any, counter: StorageCounter) -> None:
    """Names what stays from step to step by where it is found."""
    for category, tensors in model_state(engine):
        counter.tag(_tensors(tensors), category)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in a tensor or in nested lists and dicts."""
    return (leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor))


def _composition(peak: Peak, workload: Workload, engine: Any) -> dict[str, int]:
    """The bytes of a peak by category."""
    shapes = set(map(tuple, parameter_shapes(engine).values()))
    num_logits = workload.micro_batch_size * workload.seq_length * workload.shape.vocab_size
    composition = dict.fromkeys(CATEGORIES, 0)
    for storage in peak.storages:
        composition[_category(storage, shapes, num_logits)] += storage.num_bytes
    return composition


def _category(storage: Storage, parameter_shapes: set[tuple[int, ...]], num_logits: int) -> str:
    for tag in ("parameters", "optimizer", "gradients", "buckets"):
        if tag in storage.tags:
            return tag
    file, _, function = storage.maker.partition(":")
    for category, files in MAKERS.items():
        if file in files and ("*" in files[file] or function in files[file]):
            return category
    if storage.phase not in ("forward", "backward"):
        return "temporary"
    if math.prod(storage.shape) == num_logits:
        return "logits"
    # A weight's gradient on its way to the weight: autograd makes it without DeepSpeed.
    shape = storage.shape[1:] if storage.shape[:1] == (1,) else storage.shape
    if storage.phase == "backward" and shape in parameter_shapes and not storage.maker:
        return "gradients"
    return "activations"


# --------------------------------------------------------------------------------------------------------------------
# Checkpoints


def _checkpoint_bytes(engine: Any, world_size: int, nvme_bytes: int) -> int:
    """What ``engine.save_checkpoint`` of all ranks writes, from what rank 0 hands to its checkpoint engine.

    Files named after a rank (``zero_pp_rank_0…``) are written by every rank, and are as large on each.
    """
    sizes: dict[str, int] = {}

    def save(state_dict: Any, path: str) -> None:
        storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in _tensors(state_dict)}
        sizes[path] = sum(storage.nbytes() for storage in storages.values())

    capture_checkpoints(engine, save)
    with tempfile.TemporaryDirectory() as folder:
        engine.save_checkpoint(folder, tag="traced", save_latest=False)
    own = sum(size for path, size in sizes.items() if "zero_pp_rank_" in path)
    shared = sum(size for path, size in sizes.items() if "zero_pp_rank_" not in path)
    return shared + world_size * (own + nvme_bytes)
