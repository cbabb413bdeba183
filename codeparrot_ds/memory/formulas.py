"""The memory of a rank by formulas: the whole catalogue at once, without torch, in milliseconds.

Each term names the file of DeepSpeed 0.19.8 (under ``deepspeed/runtime/``) that allocates it. A plan is made once for a
model, a DeepSpeed config and a number of ranks; any number of micro-batches is then a multiplication. The traced depth
(``memory/trace.py``) runs DeepSpeed's own engine instead, and the formulas are tested against it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from codeparrot_ds.ds_config.facts import (
    VALUE_BYTES,
    activation_checkpointing,
    offload_device,
    precision,
    short_dtype,
    value_at,
    zero_stage,
)
from codeparrot_ds.memory.gradient_memory import (
    NORM_WIDTH,
    Buckets,
    GradientMemory,
    Partition,
    PartitionedGradients,
    lean_step,
    partition_numel,
    partitions,
    sharded_gradients,
    whole_gradients,
)
from codeparrot_ds.memory.model_memory import FP32, BackwardPass, Moment, parameters
from codeparrot_ds.memory.workload import CATEGORIES, Memory, Workload
from codeparrot_ds.model.shapes import num_parameters

# Defaults of zero/config.py.
REDUCE_BUCKET_SIZE, PREFETCH_BUCKET_SIZE, PERSISTENCE_THRESHOLD = 500_000_000, 50_000_000, 100_000
MAX_LIVE_PARAMETERS, SUB_GROUP_SIZE = 1_000_000_000, 1_000_000_000
# swap_tensor/partitioned_optimizer_swapper.py: gradient, master and two moments go to the file.
SWAPPED_TENSORS = 4
PARAMETER_BUFFER_ELEMENTS = 100_000_000  # zero/offload_config.py, offload_param.buffer_size


class EngineSettings:
    """What a resolved DeepSpeed config says about memory, with DeepSpeed's defaults filled in. Widths are in bytes."""

    def __init__(self, ds_config: Mapping[str, Any], world_size: int) -> None:
        def zero(*path: str, default: Any) -> Any:
            value = value_at(ds_config, ("zero_optimization", *path))
            return default if value is None else value

        def width_of(dtype: Any, default: int) -> int:
            return default if dtype is None else VALUE_BYTES[short_dtype(dtype)]

        def is_on(*path: str) -> bool:
            return value_at(ds_config, path) is True

        self.world_size, self.stage, self.precision = world_size, zero_stage(ds_config), precision(ds_config)
        self.width = VALUE_BYTES[self.precision]  # of a weight
        # Of a gradient that is accumulated, and of one on the wire (engine.py).
        self.accumulation_width = width_of(value_at(ds_config, ("data_types", "grad_accum_dtype")), self.width)
        self.communication_width = width_of(ds_config.get("communication_data_type"), self.width)
        # Of a master weight and of its gradient in the step (base_optimizer.py), and of each of Adam's two moments.
        low_masters = is_on("bf16", "bf16_master_weights_and_grads") or is_on("fp16", "fp16_master_weights_and_grads")
        self.master_width = 2 if low_masters else FP32
        self.state_width = 2 if is_on("bf16", "bf16_optimizer_states") else FP32
        # "none", "cpu" or "nvme"; stage 3 alone offloads weights.
        self.optimizer_device = offload_device(ds_config, "optimizer")
        self.parameter_device = offload_device(ds_config, "parameters") if self.stage == 3 else "none"
        self.optimizer_buffers = int(zero("offload_optimizer", "buffer_count", default=4))
        self.parameter_buffers = int(zero("offload_param", "buffer_count", default=5))
        self.pins = any(zero(f"offload_{what}", "pin_memory", default=False) is True for what in ("optimizer", "param"))
        self.overlaps = bool(zero("overlap_comm", default=self.stage == 3))
        self.bucket_elements = int(zero("reduce_bucket_size", default=REDUCE_BUCKET_SIZE))
        self.prefetch_elements = int(zero("stage3_prefetch_bucket_size", default=PREFETCH_BUCKET_SIZE))
        self.max_live_parameters = int(zero("stage3_max_live_parameters", default=MAX_LIVE_PARAMETERS))
        # Smaller weights stay whole on every rank.
        self.persistence_threshold = int(zero("stage3_param_persistence_threshold", default=PERSISTENCE_THRESHOLD))
        self.sub_group_size = int(zero("sub_group_size", default=SUB_GROUP_SIZE))
        # Ranks that hold a second copy of the weights between them, all where there are fewer; 0 without.
        ranks = int(zero("zero_hpz_partition_size", default=1))
        self.secondary_ranks = min(ranks, world_size) if ranks > 1 else 0
        self.checkpoints_on_host = is_on("activation_checkpointing", "cpu_checkpointing")

    @property
    def buckets(self) -> Buckets:
        """Those of stages 1 and 2."""
        separate = self.stage == 1 and self.accumulation_width != self.width
        return Buckets(
            elements=self.bucket_elements,
            count=1 + self.overlaps,
            width=self.accumulation_width if separate else self.width,
            communication_width=self.communication_width,
        )

    def pinned(self, size: int) -> int:
        """What a host tensor of `size` bytes takes: torch's page-locked blocks are powers of two."""
        return 1 << (size - 1).bit_length() if self.pins and size else size


@dataclass(frozen=True, kw_only=True)
class EngineMemory:
    """What an engine holds and adds, in bytes on the device of a rank; `Memory` without the activations.

    Pairs are for the first and for later micro-batches of a step.
    """

    # Resident between two steps.
    parameters: int
    optimizer: int
    buckets: int = 0
    gradients: int = 0
    temporary: int = 0
    gathered: Sequence[Sequence[tuple[int, int]]] = ()
    """Whole weights at each moment (stage 3), and copies of them."""
    backward: Sequence[Sequence[GradientMemory]] = field(default_factory=list)
    """Gradients and buckets at the same moments."""
    before_step: int = 0
    """Gradients that the backward pass leaves."""
    step_temporary: int = 0
    """What the optimizer step adds to them at its peak."""
    initialization: int = 0
    """The peak while the engine is built."""
    host: Sequence[int] = (0, 0)
    nvme: int = 0

    @property
    def resident(self) -> int:
        """Bytes between two steps."""
        return self.parameters + self.optimizer + self.buckets + self.gradients + self.temporary


class QuickPlan:
    """Formulas for one workload; `at` gives the memory of any micro-batch of the same model, config and ranks."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self.settings = EngineSettings(workload.ds_config, workload.world_size)
        self.parameters = parameters(workload.shape)
        self.numel = num_parameters(workload.shape)
        self.largest = max(parameter.numel for parameter in self.parameters)
        self.moments = BackwardPass(
            workload.shape,
            seq_length=workload.seq_length,
            width=self.settings.width,
            attention=workload.attention,
            dropout=workload.dropout > 0,
            chunked_loss=workload.chunked_loss,
            fused_loss=workload.fused_loss,
            checkpointing=activation_checkpointing(workload.ds_config),
            checkpoints_on_host=self.settings.checkpoints_on_host,
        ).moments()

    @cached_property
    def engine(self) -> EngineMemory:
        """What the optimizer holds that the config makes DeepSpeed choose (``engine.py``, ``_configure_optimizer``)."""
        settings = self.settings
        if settings.stage == 3:
            return self._stage3()
        if settings.stage == 0:
            return self._unpartitioned()
        fp32_beside_bf16 = settings.precision == "bf16" and settings.accumulation_width == FP32
        if settings.stage == 1 and fp32_beside_bf16 and settings.optimizer_device == "none":
            return self._bf16_optimizer()
        return self._stages_1_and_2()

    @property
    def checkpoint_bytes(self) -> int:
        """What a checkpoint of the run takes: masters and moments once, and the export (``checkpoint/saver.py``)."""
        settings = self.settings
        return self.numel * (settings.master_width + 2 * settings.state_width + settings.width)

    @property
    def _built(self) -> int:
        """The peak while the model is built below stage 3: fp32 weights, and the largest as it is drawn."""
        return FP32 * (self.numel + self.largest)

    def at(self, micro_batch_size: int, accumulation_steps: int) -> Memory:
        """The memory of a rank that runs ``accumulation_steps`` micro-batches of ``micro_batch_size`` rows per step."""
        engine = self.engine
        later = accumulation_steps > 1
        sizes = self._sizes[later]
        index = max(range(len(sizes)), key=lambda i: sizes[i][0] + micro_batch_size * sizes[i][1])
        device = self._device_at(index, micro_batch_size, later)
        step = dict.fromkeys(CATEGORIES, 0) | {
            "parameters": engine.parameters,
            "optimizer": engine.optimizer,
            "buckets": engine.buckets,
            "gradients": engine.gradients + engine.before_step,
            "temporary": engine.temporary + engine.step_temporary,
        }
        phases = {
            "initialization": engine.initialization,
            "forward_backward": sum(device.values()),
            "step": sum(step.values()),
        }
        return Memory(
            depth="quick",
            device=step if phases["step"] > phases["forward_backward"] else device,
            resident_bytes=engine.resident,
            phases=phases,
            host_bytes=engine.host[later] + self._host_activations(micro_batch_size),
            nvme_bytes=engine.nvme,
            checkpoint_bytes=self.checkpoint_bytes,
        )

    @cached_property
    def _sizes(self) -> list[list[tuple[int, int]]]:
        """For a step's first micro-batch and for later ones: bytes at each moment without rows, and a row's."""
        found = []
        for later in (False, True):
            devices = [[self._device_at(index, rows, later) for rows in (0, 1)] for index in range(len(self._with_end))]
            sums = [[sum(device.values()) for device in pair] for pair in devices]
            found.append([(none, one - none) for none, one in sums])
        return found

    def _device_at(self, index: int, rows: int, later: bool) -> dict[str, int]:
        """What lies on the device at one moment of the last micro-batch of a step, by category."""
        engine, moment = self.engine, self._with_end[index]
        held = engine.backward[later][index]
        gathered, copies = engine.gathered[later][index] if engine.gathered else (0, 0)
        temporary = rows * moment.temporary_a_row + held.temporary + copies
        return {
            "parameters": engine.parameters + gathered,
            "gradients": engine.gradients + held.gradients + moment.unfinished_gradient,
            "optimizer": engine.optimizer,
            "buckets": engine.buckets + held.buckets,
            "activations": rows * moment.activations_a_row,
            "logits": rows * moment.logits_a_row,
            "temporary": engine.temporary + temporary,
        }

    def _host_activations(self, rows: int) -> int:
        """The blocks' inputs that ``cpu_checkpointing`` keeps on the host: all but the newest."""
        if not self.settings.checkpoints_on_host:
            return 0
        shape = self.workload.shape
        size = rows * self.settings.width * self.workload.seq_length * shape.n_embd
        return (shape.n_layer - 1) * (1 << (size - 1).bit_length())  # page-locked

    @cached_property
    def _with_end(self) -> list[Moment]:
        return [*self.moments, Moment(name="reduce", activations_a_row=0)]

    def _whole_gradients(self, width: int, later: bool, reduces_at_end: bool = True) -> list[GradientMemory]:
        ranks = self.settings.world_size
        return whole_gradients(
            self.moments, width=width, carried=later, world_size=ranks, reduces_at_end=reduces_at_end
        )

    # ----------------------------------------------------------------------------------------------------------------
    # Stage 0

    def _unpartitioned(self) -> EngineMemory:
        """Stage 0: ``fp16/fused_optimizer.py`` for bf16 and fp16, the bare optimizer for fp32."""
        settings = self.settings
        whole = settings.width * self.numel
        backward = [self._whole_gradients(settings.width, later) for later in (False, True)]
        if settings.width == FP32:
            # Clipping takes one norm at a time; the fused optimizer works in place.
            return EngineMemory(
                parameters=whole,
                optimizer=2 * FP32 * self.numel,
                backward=backward,
                before_step=whole,
                initialization=self._built,
            )
        numels = [parameter.numel for parameter in self.parameters if parameter.decayed]
        decayed, lean = sum(numels), self.workload.lean_step
        return EngineMemory(
            parameters=whole,
            optimizer=3 * FP32 * self.numel,  # fp32_groups_flat and Adam's two moments
            backward=backward,
            before_step=whole,
            # step: the gradients in fp32 one by one, then flattened; both beside the 16-bit ones.
            step_temporary=lean_step(numels, decayed, width=settings.width) if lean else 2 * FP32 * decayed,
            # initialize_optimizer_states: Adam's states and a zero gradient before the first step.
            initialization=whole + 4 * FP32 * self.numel,
        )

    # ----------------------------------------------------------------------------------------------------------------
    # Stages 1 and 2

    def _shares(self) -> list[Partition]:
        return partitions(self.parameters, self.settings.world_size)

    def _bf16_optimizer(self) -> EngineMemory:
        """Stage 1 with fp32 accumulation: ``bf16_optimizer.py``.

        fp32 gradients of the whole model stay for good (``fp32_groups_gradients_flat``); bf16 ones stay on the
        parameters from the first micro-batch to the step.
        """
        settings, shares = self.settings, self._shares()
        flat, mine = sum(share.flat_numel for share in shares), sum(share.numel for share in shares)
        backward = [self._whole_gradients(settings.width, later, reduces_at_end=False) for later in (False, True)]
        # get_grads_for_reduction hands over the flat fp32 gradients: one tensor a group, reduced in the dtype of
        # communication, a copy of the whole in 16 bits.
        decayed = max(share.flat_numel for share in shares)
        copy = settings.communication_width * decayed if settings.communication_width != FP32 else 0
        for moments in backward:
            moments[-1] = GradientMemory(gradients=moments[-1].gradients, temporary=copy)
        return EngineMemory(
            parameters=settings.width * flat,
            optimizer=3 * FP32 * mine,
            gradients=FP32 * flat,
            backward=backward,
            initialization=max(self._built, settings.width * flat + FP32 * (flat + mine)),
        )

    def _stages_1_and_2(self) -> EngineMemory:
        """``zero/stage_1_and_2.py``."""
        settings, shares = self.settings, self._shares()
        flat, mine = sum(share.flat_numel for share in shares), sum(share.numel for share in shares)
        offloaded = settings.optimizer_device != "none"
        states = (settings.master_width + 2 * settings.state_width) * mine
        accumulator = settings.width * self.largest if offloaded else 0  # temp_grad_buffer_for_gpu_offload
        owned = self._gradients(shares).owned_bytes if not offloaded or self._compact else 0
        backward = [self._backward_of_stages_1_and_2(shares, owned, later) for later in (False, True)]
        if self.workload.lean_step and settings.world_size == 1:  # nothing goes through a bucket
            owned = settings.width * self.numel
            backward = [self._whole_gradients(settings.width, later) for later in (False, True)]
        return EngineMemory(
            parameters=settings.width * flat,
            optimizer=0 if offloaded else states,
            temporary=accumulator,
            backward=backward,
            before_step=owned,
            step_temporary=0 if offloaded else self._step_of_stages_1_and_2(shares),
            # Flattening a group copies it.
            initialization=max(self._built, 2 * settings.width * flat),
            host=[self._host_of_stages_1_and_2(shares, later) if offloaded else 0 for later in (False, True)],
        )

    @property
    def _compact(self) -> bool:
        """Whether owned gradients lie in a flat fp32 partition (``_use_compact_grad_partition_buffer``)."""
        return self.settings.accumulation_width == FP32 and self.settings.width != FP32

    def _gradients(self, shares: Sequence[Partition]) -> PartitionedGradients:
        settings = self.settings
        return PartitionedGradients(
            shares,
            settings.buckets,
            compact=self._compact,
            offloaded=settings.optimizer_device != "none" and not self._compact,
        )

    def _backward_of_stages_1_and_2(self, shares: Sequence[Partition], owned: int, later: bool) -> list[GradientMemory]:
        settings = self.settings
        width = settings.buckets.width
        if settings.stage == 1 and not settings.overlaps:
            # Hooks only allocate the bucket; reduce_gradients goes through the parameters after the backward pass.
            held = self._whole_gradients(width, later, reduces_at_end=False)
            bucketed = [
                GradientMemory(memory.gradients, settings.buckets.bytes if later or index else 0, memory.temporary)
                for index, memory in enumerate(held[:-1])
            ]
            return [*bucketed, self._gradients(shares).reduce_at_end(self.parameters, gradient_width=width)]
        # Stage 2 reduces each micro-batch and keeps the sum of what it owns beside the newest; stage 1 keeps whole
        # gradients until the last.
        carried = owned if later and settings.stage == 2 and not self._compact else 0
        gradients = self._gradients(shares)
        if later and settings.stage == 2 and self._compact:
            gradients.allocated = True
        return gradients.run(self.moments, carried=carried, whole=later and settings.stage == 1, gradient_width=width)

    def _step_of_stages_1_and_2(self, shares: Sequence[Partition]) -> int:
        """The largest of what ``step`` adds: the norm of one slice in fp64, or one group's gradients for the update."""
        settings = self.settings
        if self.workload.lean_step:
            return max(lean_step(share.slices.values(), share.numel, width=settings.width) for share in shares)
        norm = NORM_WIDTH * max(share.largest_slice for share in shares)
        if self._compact:
            return norm
        updates = []
        for share in shares:
            # flatten(averaged_gradients), then .to(the master's dtype); a share of one slice is not copied.
            flattened = settings.width * share.numel if share.pieces > 1 else 0
            converted = settings.master_width * share.numel if settings.master_width != settings.width else 0
            updates.append(flattened + converted)
        return max(norm, *updates)

    def _host_of_stages_1_and_2(self, shares: Sequence[Partition], later: bool) -> int:
        """Master, gradient and two moments, the 16-bit copy that goes back, and buffers for accumulation."""
        settings = self.settings
        pinned, plain = [settings.width * self.largest], 0
        for share in shares:
            pinned += [settings.master_width * share.numel] * 2 + [settings.width * share.numel]
            plain += 2 * settings.state_width * share.numel
        if later and not self._compact and settings.master_width == FP32:
            pinned += [settings.width * member.numel for share in shares for member in share.owned]
        return plain + sum(settings.pinned(size) for size in pinned)

    # ----------------------------------------------------------------------------------------------------------------
    # Stage 3

    def _stage3(self) -> EngineMemory:
        """``zero/stage3.py`` and ``zero/partition_parameters.py``."""
        settings = self.settings
        mine = sum(partition_numel(parameter, settings.world_size) for parameter in self.parameters)
        persistent = sum(p.numel for p in self.parameters if p.numel <= settings.persistence_threshold)
        offloaded, away = settings.optimizer_device != "none", settings.parameter_device != "none"
        # _create_fp32_partitions means to share fp32 weights with their masters, but compares a device with its name.
        master = settings.master_width
        states = (master + 2 * settings.state_width) * mine
        buckets = settings.width * settings.bucket_elements
        gradients = settings.accumulation_width * mine  # grad_partitions_flat_buffer
        held = 0 if away else settings.width * mine
        whole = settings.width * persistent if settings.world_size > 1 or away else 0
        return EngineMemory(
            parameters=held + whole,
            optimizer=0 if offloaded else states,
            gradients=0 if offloaded else gradients,
            buckets=buckets,
            gathered=[self._gathered(persistent, away, later) for later in (False, True)],
            backward=[self._backward_of_stage3()] * 2,
            step_temporary=0 if offloaded else self._step_of_stage3() + self._second_copy,
            # zero.Init draws one weight at a time in fp32; a master is converted, then cloned.
            initialization=max(
                held + (FP32 + settings.width) * self.largest,
                buckets + 2 * held + whole + (0 if offloaded else 2 * master * mine + gradients),
            ),
            host=[self._host_of_stage3(mine, gradients)] * 2,
            nvme=self._nvme(mine),
        )

    def _gathered(self, persistent: int, away: bool, later: bool) -> list[tuple[int, int]]:
        """Whole weights at each moment, and the copies of the newest.

        From the second step on the coordinator knows the order of the modules and prefetches until
        ``max_live_parameters`` are there; a weight is given back when nothing in reach needs it again
        (``zero/partitioned_param_coordinator.py``). Several weights gathered together are copied out of their common
        buffer (``AllGatherCoalescedHandle.wait``).
        """
        settings = self.settings
        if settings.world_size == 1 and not away:
            return [(self._second_copy, 0)] * (len(self.moments) + 1)
        live = max(0, settings.max_live_parameters - persistent)
        prefetched = min(settings.prefetch_elements, self.numel) * settings.width
        second = self._second_copy  # made as weights are given back, kept until the step
        found = []
        for moment in self.moments:
            needed = min(max(0, moment.needed - persistent), live)
            waits = self.numel > settings.max_live_parameters and moment.name not in ("loss", "lm_head")
            found.append(
                (
                    settings.width * needed + (second if later else second * (self.numel - needed) // self.numel),
                    prefetched if waits and moment.needed > live else 0,
                )
            )
        return [*found, (second, 0)]

    @property
    def _second_copy(self) -> int:
        """This rank's part of the second copy of the weights that hpZ keeps within a host until the next step."""
        ranks = self.settings.secondary_ranks
        return self.settings.width * self.numel // ranks if ranks else 0

    def _backward_of_stage3(self) -> list[GradientMemory]:
        settings = self.settings
        return sharded_gradients(
            self.moments,
            bucket_elements=settings.bucket_elements,
            width=settings.width,
            communication_width=settings.communication_width,
            world_size=settings.world_size,
        )

    def _sub_groups(self) -> list[list[int]]:
        """Elements of each partition, by the sub-groups that are updated one after another."""
        settings = self.settings
        found: list[list[int]] = []
        for decayed in (True, False):
            numels = [
                partition_numel(parameter, settings.world_size)
                for parameter in self.parameters
                if parameter.decayed is decayed
            ]
            group: list[int] = []
            for index, numel in enumerate(numels):
                group.append(numel)
                whole = sum(numels) <= settings.sub_group_size
                if index == len(numels) - 1 or (not whole and sum(group) >= settings.sub_group_size):
                    found.append(group)
                    group = []
        return found

    def _step_of_stage3(self) -> int:
        """One sub-group's gradients, flattened and in the master's dtype (``_prepare_fp32_grad_for_sub_group``)."""
        settings = self.settings
        found = []
        for group in self._sub_groups():
            flattened = settings.accumulation_width * sum(group) if len(group) > 1 else 0
            converted = (
                settings.master_width * sum(group) if settings.master_width != settings.accumulation_width else 0
            )
            found.append(max(flattened + converted, NORM_WIDTH * max(group)))
        return max(found)

    def _groups_of_partitions(self) -> list[int]:
        """Elements that this rank holds of each parameter group."""
        ranks = self.settings.world_size
        return [
            sum(partition_numel(parameter, ranks) for parameter in self.parameters if parameter.decayed is decayed)
            for decayed in (True, False)
        ]

    def _host_of_stage3(self, mine: int, gradients: int) -> int:
        """Weights by group, 16-bit gradients, and the optimizer's tensors or its buffers for the disk."""
        settings = self.settings
        weights = 0
        if settings.parameter_device != "none":
            weights = sum(settings.pinned(settings.width * numel) for numel in self._groups_of_partitions())
        if settings.parameter_device == "nvme":
            weights += settings.pinned(settings.width * PARAMETER_BUFFER_ELEMENTS * settings.parameter_buffers)
        if settings.optimizer_device == "none":
            return weights
        sub_groups = [sum(group) for group in self._sub_groups()]
        weights += settings.pinned(gradients)
        if settings.optimizer_device == "nvme":
            return weights + settings.optimizer_buffers * FP32 * max(sub_groups)
        weights += sum(settings.pinned(settings.master_width * numel) for numel in sub_groups)  # gradients of the step
        return weights + (settings.master_width + 2 * settings.state_width) * mine

    def _nvme(self, mine: int) -> int:
        settings = self.settings
        optimizer = SWAPPED_TENSORS * FP32 * mine if settings.optimizer_device == "nvme" else 0
        return optimizer + (settings.width * mine if settings.parameter_device == "nvme" else 0)


def quick_memories(workloads: Sequence[Workload]) -> list[Memory]:
    """The memory of each workload; those that differ in their micro-batch alone share their work."""
    batch = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    plans: dict[str, QuickPlan] = {}
    found = []
    for workload in workloads:
        rest = {key: value for key, value in workload.ds_config.items() if key not in batch}
        key = repr(replace(workload, ds_config=rest))
        if key not in plans:
            plans[key] = QuickPlan(workload)
        found.append(plans[key].at(workload.micro_batch_size, workload.accumulation_steps))
    return found
