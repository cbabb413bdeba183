"""The optimizer fragments that a rank owns, for every ZeRO stage: the portable form of a DeepSpeed engine's state.

A fragment is a contiguous piece of one flattened parameter: its fp32 master weights and both Adam moments. Each rank
reads and writes only what its ZeRO partition owns, under the parameter's name and the offset inside the parameter.
Where the pieces lie is read from DeepSpeed's own mappings (`codeparrot_ds.engine.private_parts`):

- stages 1 and 2 (``DeepSpeedZeroOptimizer``): the flat groups' parameters in their order and offsets, cut by rank
  (``parameter._hp_mapping`` is not used: with ``round_robin_gradients`` it has the offsets of another order);
- stage 1 with fp32 accumulation (``BF16_Optimizer``): ``parameter._hp_mapping``;
- stage 3: ``optimizer.grad_position`` (group, offset, numel), piece ``rank`` of the parameter, cut at ``ds_numel``;
- stage 0: the bare optimizer (fp32) or ``FP16_Optimizer``'s flat groups (bf16, fp16); rank 0 owns everything.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Iterator
from typing import Any

import torch
from torch import nn

from codeparrot_ds.engine.private_parts import BF16, FUSED, UNFUSED, ZERO3, ZERO12, wrapper_of

MASTER = "fp32"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fragment:
    """One piece of one parameter.

    Attributes:
        name: the parameter's name in the model.
        start: offset of the piece inside the flattened parameter.
        tensors: ``fp32``, ``exp_avg`` and ``exp_avg_sq``, one-dimensional views into the optimizer's storage, each in
            the precision that the optimizer keeps it in (fp32, or bf16 where the config asks for bf16 states).
    """

    name: str
    start: int
    tensors: dict[str, torch.Tensor]

    @property
    def numel(self) -> int:
        return self.tensors[MASTER].numel()


def parameter_shapes(engine: Any) -> dict[str, list[int]]:
    """Shape of every trained parameter by name, the whole one also where ZeRO-3 has partitioned it."""
    whole = wrapper_of(engine) == ZERO3
    return {name: list(p.ds_shape if whole else p.shape) for name, p in _trained(engine)}


def owned_fragments(engine: Any, *, every_copy: bool = False) -> Generator[list[Fragment], None, None]:
    """Yields the fragments that this rank owns, as many at once as are in memory together: all, or a group of NVMe's.

    Use each list before asking for the next: a group of NVMe's is written back and let go then.

    Args:
        engine: a DeepSpeed engine with a FusedAdam, CPUAdam or torch AdamW optimizer whose states exist.
        every_copy: at stage 0, where every rank holds everything, yield on every rank (to fill them all) and not on
            rank 0 alone (to save once).

    Raises:
        PrivatePartError: DeepSpeed's optimizer is of a class that is not known here.
    """
    wrapper = wrapper_of(engine)
    if wrapper == ZERO3:
        yield from _stage3_fragments(engine)
    elif wrapper == ZERO12:
        yield list(_stage12_fragments(engine))
    elif wrapper == BF16:
        yield list(_bf16_optimizer_fragments(engine))
    elif engine.global_rank == 0 or every_copy:  # stage 0
        yield list(_stage0_fragments(engine, wrapper))


def on_nvme(engine: Any) -> bool:
    """Whether this rank's fragments are on NVMe, and in memory a group at a time."""
    return wrapper_of(engine) == ZERO3 and bool(engine.optimizer.swap_optimizer)


def create_optimizer_state(engine: Any) -> None:
    """Creates Adam's moments and step counters where DeepSpeed has not done so yet (it waits for the first step)."""
    optimizer, base, wrapper = engine.optimizer, engine.basic_optimizer, wrapper_of(engine)
    # Stage 3 hands the basic optimizer one group at a time.
    groups = [tensor for group in base.param_groups for tensor in group["params"]]
    for i, flat in enumerate(optimizer.fp32_partitioned_groups_flat if wrapper == ZERO3 else groups):
        state = base.state[flat]
        if any(moment not in state for moment in MOMENTS):
            with _in_memory(engine, i):  # A group on NVMe goes back there with its moments.
                for moment in MOMENTS:
                    state.setdefault(moment, torch.zeros_like(flat.data, dtype=_moments_dtype(base, flat)))
        state.setdefault("step", torch.tensor(0.0) if isinstance(base, torch.optim.Adam) else 0)
    if wrapper in (ZERO12, BF16):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def _moments_dtype(base: Any, master: torch.Tensor) -> torch.dtype:
    """What the optimizer itself would create: the master's dtype, but in CPU memory fp32 unless told otherwise."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return torch.float32 if isinstance(base, DeepSpeedCPUAdam) and base.fp32_optimizer_states else master.dtype


def optimizer_step_count(engine: Any) -> int:
    """Adam's step counter. FusedAdam counts in one tensor's state of a group alone, hence the maximum."""
    return max((int(state["step"]) for state in engine.basic_optimizer.state.values() if "step" in state), default=0)


def set_optimizer_step_count(engine: Any, step: int) -> None:
    """Sets Adam's step counter for every tensor."""
    base = engine.basic_optimizer
    for state in base.state.values():
        state["step"] = torch.tensor(float(step)) if isinstance(base, torch.optim.Adam) else step


@torch.no_grad()
def masters_to_working_weights(engine: Any) -> None:
    """Copies the fp32 masters, just filled, into the weights that the forward pass uses."""
    optimizer, wrapper = engine.optimizer, wrapper_of(engine)
    if wrapper in (ZERO12, BF16):
        optimizer.update_lp_params()
    elif wrapper == FUSED:
        for working, master in zip(optimizer.fp16_groups_flat, optimizer.fp32_groups_flat, strict=True):
            working.data.copy_(master.data)
    elif wrapper == UNFUSED:
        for working_group, master_group in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for working, master in zip(working_group, master_group, strict=True):
                working.data.copy_(master.data)
    elif wrapper == ZERO3:
        optimizer.checkpoint_event_prologue()
        for i in range(len(optimizer.fp32_partitioned_groups_flat)):
            with _in_memory(engine, i):
                optimizer._partitioned_params_swap_out(i)  # into memory or, for weights on NVMe, to the disk
        optimizer.checkpoint_event_epilogue()


def _trained(engine: Any) -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            yield name, parameter


def _pieces(state: dict[str, torch.Tensor], flat: torch.Tensor, offset: int, numel: int) -> dict[str, torch.Tensor]:
    tensors = {MASTER: flat.data.view(-1).narrow(0, offset, numel)}
    for key in MOMENTS:
        tensors[key] = state[key].view(-1).narrow(0, offset, numel)
    return tensors


def _stage3_fragments(engine: Any) -> Iterator[list[Fragment]]:
    optimizer = engine.optimizer
    rank = torch.distributed.get_rank(optimizer.dp_process_group)
    by_group: dict[int, list[tuple[str, nn.Parameter, int, int]]] = {}
    for name, parameter in _trained(engine):
        group, offset, numel = optimizer.grad_position[optimizer.get_param_id(parameter)]
        by_group.setdefault(group, []).append((name, parameter, offset, numel))
    resident: list[Fragment] = []
    for group, members in sorted(by_group.items()):
        with _in_memory(engine, group):
            flat = optimizer.fp32_partitioned_groups_flat[group]
            fragments = []
            for name, parameter, offset, numel in members:
                start = rank * numel
                owned = min(numel, parameter.ds_numel - start)  # The last partition is padded.
                if owned > 0:
                    tensors = _pieces(engine.basic_optimizer.state[flat], flat, offset, owned)
                    fragments.append(Fragment(name=name, start=start, tensors=tensors))
            if _swapped(engine, group):
                yield fragments
            else:
                resident += fragments
    yield resident


def _stage12_fragments(engine: Any) -> Iterator[Fragment]:
    optimizer, base = engine.optimizer, engine.basic_optimizer
    names = {id(parameter): name for name, parameter in _trained(engine)}
    for i, flat in enumerate(optimizer.single_partition_of_fp32_groups):
        begin = torch.distributed.get_rank(optimizer.real_dp_process_group[i]) * flat.numel()
        parameters = optimizer.round_robin_bit16_groups[i]  # in the order of the flat group, whatever that is
        for parameter, offset in zip(parameters, optimizer.round_robin_bit16_offsets[i], strict=True):
            low, high = max(begin, offset), min(begin + flat.numel(), offset + parameter.numel())
            if low < high:  # Otherwise other ranks own all of it.
                tensors = _pieces(base.state[flat], flat, low - begin, high - low)
                yield Fragment(name=names[id(parameter)], start=low - offset, tensors=tensors)


def _bf16_optimizer_fragments(engine: Any) -> Iterator[Fragment]:
    base = engine.basic_optimizer
    for name, parameter in _trained(engine):
        mapping = parameter._hp_mapping
        if mapping is None:  # Other ranks own all of it.
            continue
        flat = base.param_groups[mapping.param_group_index]["params"][0]
        address = mapping.hp_fragment_address
        tensors = _pieces(base.state[flat], flat, address.start, address.numel)
        yield Fragment(name=name, start=mapping.lp_fragment_address.start, tensors=tensors)


def _stage0_fragments(engine: Any, wrapper: str) -> Iterator[Fragment]:
    optimizer, base = engine.optimizer, engine.basic_optimizer
    names = {id(parameter): name for name, parameter in _trained(engine)}
    if wrapper == FUSED:
        for group, flat in zip(optimizer.fp16_groups, optimizer.fp32_groups_flat, strict=True):
            offset = 0
            for parameter in group:
                tensors = _pieces(base.state[flat], flat, offset, parameter.numel())
                yield Fragment(name=names[id(parameter)], start=0, tensors=tensors)
                offset += parameter.numel()
    elif wrapper == UNFUSED:
        for group, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for parameter, master in zip(group, masters, strict=True):
                tensors = _pieces(base.state[master], master, 0, master.numel())
                yield Fragment(name=names[id(parameter)], start=0, tensors=tensors)
    else:
        for name, parameter in _trained(engine):
            tensors = _pieces(base.state[parameter], parameter, 0, parameter.numel())
            yield Fragment(name=name, start=0, tensors=tensors)


def _swapped(engine: Any, group: int) -> bool:
    return on_nvme(engine) and engine.optimizer._swappable_optimizer_subgroup(group)


class _in_memory:
    """Holds one stage 3 group in memory when it lives on NVMe, and writes it back after."""

    def __init__(self, engine: Any, group: int) -> None:
        self.optimizer, self.group, self.swapped = engine.optimizer, group, _swapped(engine, group)

    def __enter__(self) -> None:
        if self.swapped:
            self.optimizer._optimizer_states_and_gradient_swap_in(self.group)

    def __exit__(self, *_: object) -> None:
        if self.swapped:
            self.optimizer._optimizer_states_and_gradient_swap_out(self.group)
