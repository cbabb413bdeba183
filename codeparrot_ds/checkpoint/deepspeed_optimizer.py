"""The optimizer's state in DeepSpeed's own checkpoints: masters and Adam's moments as fragments under parameter names.

Where the pieces lie, by what wrote them (0.19.8; ``deepspeed/utils/zero_to_fp32.py`` reads the masters alike):

- stages 1 and 2 (``DeepSpeedZeroOptimizer``, ``BF16_Optimizer``): each group's parameters in the order of
  ``param_shapes``, with ``param_alignment_paddings`` behind them, cut into equal partitions; what a rank's partition
  has of padding at its end (``group_paddings``) is not saved of the masters;
- stage 3: each sub-group's parameters in the order of ``param_shapes``, ``ceil(numel / ranks)`` of each per rank;
- stage 0: everything in the one file, and no names. The optimizer's groups are matched with the model's parameters by
  their sizes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from codeparrot_ds.checkpoint.deepspeed_files import load_file
from codeparrot_ds.engine.fragments import MASTER, MOMENTS, Fragment
from codeparrot_ds.errors import UserError

Shapes = Mapping[str, Sequence[int]]

# Of the object that looks for fp16's loss scale.
SCALER_FIELDS = {"cur_scale": float, "cur_iter": int, "last_overflow_iter": int, "cur_hysteresis": int}


@dataclasses.dataclass(frozen=True)
class AdamState:
    """A base optimizer's state: moments by the place of a tensor in its groups, and the groups' settings."""

    moments: list[dict[str, torch.Tensor]]
    groups: list[dict[str, Any]]
    step: int


def rank_optimizer(file: Path, world_size: int) -> dict[str, Any]:
    """The state of DeepSpeed's optimizer on one of ``world_size`` ranks.

    Raises:
        UserError: the file holds something else, or one of another number of partitions.
    """
    owner = load_file(file).get("optimizer_state_dict")
    if not isinstance(owner, dict):
        raise UserError(f"{file} is not what an engine of DeepSpeed's saves: it has no optimizer_state_dict")
    counts = owner.get("partition_count", world_size)
    counts = set(counts if isinstance(counts, list) else [counts])
    if counts != {world_size}:
        raise UserError(f"{file} is one of {max(counts)} partitions and the checkpoint was saved by {world_size} ranks")
    return owner


def adam_state(file: Path, base: Any, owner: Mapping[str, Any]) -> AdamState:
    """Adam's state out of the base optimizer's.

    Args:
        file: that it is from.
        base: what the base optimizer's ``state_dict`` gave, or with ``elastic_checkpoint`` the states alone.
        owner: the state of DeepSpeed's optimizer around it.

    Raises:
        UserError: it is another optimizer's.
    """
    if isinstance(base, list):  # elastic_checkpoint
        states, groups = dict(enumerate(base)), [{"params": [i]} for i in range(len(base))]
        counters = [owner.get("base_optimizer_state_step")]
    elif isinstance(base, dict) and isinstance(base.get("param_groups"), list):
        states, groups = base.get("state", {}), base["param_groups"]
        counters = [group.get("step") for group in groups]
    else:
        raise UserError(f"{file} has no state of a base optimizer that is known")
    foreign = {key for state in states.values() for key in state} - {"step", *MOMENTS}
    # Of the update: LAMB's moments are named like Adam's.
    foreign |= {key for group in groups for key in ("max_coeff", "amsgrad") if group.get(key)}
    if foreign:
        raise UserError(f"{file} has the state of another optimizer than Adam or AdamW: it has {sorted(foreign)[0]!r}")
    moments = []
    for index in chain.from_iterable(group["params"] for group in groups):
        state = states.get(index, {})
        if any(not torch.is_tensor(state.get(moment)) for moment in MOMENTS):
            raise UserError(
                f"{file} has no exp_avg and exp_avg_sq of every parameter: the optimizer is another than Adam or "
                "AdamW, or it has made no step yet"
            )
        moments.append({moment: state[moment] for moment in MOMENTS})
    # FusedAdam counts in one tensor's state of a group alone, hence the maximum.
    counters += [state.get("step") for state in states.values()]
    return AdamState(moments, groups, max((int(counter) for counter in counters if counter is not None), default=0))


def loss_scaler(owner: Mapping[str, Any]) -> dict[str, Any]:
    """The place of dynamic loss scaling: ZeRO's optimizers save the object, stage 0's its values."""
    values = vars(owner["loss_scaler"]) if "loss_scaler" in owner else owner
    if not owner.get("dynamic_loss_scale"):
        return {}
    return {key: kind(values[key]) for key, kind in SCALER_FIELDS.items() if key in values}


def stage12_fragments(
    file: Path,
    owner: Mapping[str, Any],
    state: AdamState,
    groups: Sequence[Shapes],
    rank: int,
    world_size: int,
) -> Iterator[Fragment]:
    """A rank's fragments at stages 1 and 2; ``groups`` are shapes by name, in the order of the flat tensors."""
    masters = _tensors(file, owner, "single_partition_of_fp32_groups", len(groups), state)
    paddings = owner.get("param_alignment_paddings") or [[0] * len(group) for group in groups]
    # BF16_Optimizer leaves its padding where it is.
    cut_off = owner["group_paddings"] if "zero_stage" in owner else [0] * len(groups)
    for i, group in enumerate(groups):
        begin = rank * (masters[i].numel() + cut_off[i])
        end, offset = begin + masters[i].numel(), 0
        for (name, shape), padding in zip(group.items(), paddings[i], strict=True):
            low, high = max(begin, offset), min(end, offset + math.prod(shape))
            if low < high:  # otherwise other ranks have all of it
                yield _fragment(file, name, low - offset, masters[i], state.moments[i], low - begin, high - low)
            offset += math.prod(shape) + padding


def stage3_fragments(
    file: Path,
    owner: Mapping[str, Any],
    state: AdamState,
    groups: Sequence[Shapes],
    rank: int,
    world_size: int,
) -> Iterator[Fragment]:
    """A rank's fragments at stage 3; ``groups`` are shapes by name, in the order of the flat tensors."""
    masters = _tensors(file, owner, "fp32_flat_groups", len(groups), state)
    for i, group in enumerate(groups):
        offset = 0
        for name, shape in group.items():
            numel = math.prod(shape)
            share = -(-numel // world_size)
            start = rank * share
            owned = min(share, numel - start)  # the last partition is padded
            if owned > 0:
                yield _fragment(file, name, start, masters[i], state.moments[i], offset, owned)
            offset += share
        if offset != masters[i].numel():
            raise UserError(f"{file} has {masters[i].numel()} values in group {i} where its parameters take {offset}")


def _tensors(file: Path, owner: Mapping[str, Any], key: str, count: int, state: AdamState) -> list[torch.Tensor]:
    tensors = owner.get(key)
    if not isinstance(tensors, list) or not len(tensors) == count == len(state.moments):
        raise UserError(f"{file} has not the same number of groups in {key}, the moments and param_shapes ({count})")
    return tensors


def _fragment(
    file: Path,
    name: str,
    start: int,
    master: torch.Tensor,
    moments: Mapping[str, torch.Tensor],
    offset: int,
    numel: int,
) -> Fragment:
    tensors = {MASTER: master, **moments}
    for kind, tensor in tensors.items():
        if tensor.numel() < offset + numel:
            raise UserError(f"{file} holds {tensor.numel()} values of {kind} where {name} takes {offset + numel}")
    views = {kind: tensor.detach().reshape(-1).narrow(0, offset, numel) for kind, tensor in tensors.items()}
    return Fragment(name=name, start=start, tensors=views)


def stage0_fragments(
    file: Path, owner: Mapping[str, Any], state: AdamState, weights: Mapping[str, torch.Tensor]
) -> list[Fragment]:
    """All fragments at stage 0; ``weights`` are the working ones by name, in the model's order.

    Raises:
        UserError: it is not known which of the optimizer's tensors is whose.
    """
    if "fp32_groups_flat" in owner:  # FP16_Optimizer: a tensor per group
        masters = owner["fp32_groups_flat"]
        sizes = [(master.numel(),) for master in masters]
    elif "fp32_groups" in owner:  # FP16_UnfusedOptimizer: a tensor per parameter
        masters = list(chain.from_iterable(owner["fp32_groups"]))
        sizes = [tuple(master.shape) for master in masters]
    else:  # the bare optimizer: the weights are the masters
        masters = None
        sizes = [tuple(moments["exp_avg"].shape) for moments in state.moments]
    flat = "fp32_groups_flat" in owner
    bounds = [len(group["params"]) for group in state.groups]
    named = next((groups for groups in _groupings(weights, state) if _fits(groups, bounds, sizes, weights, flat)), None)
    if named is None:
        raise UserError(
            f"{file}: stage 0 saves no names, and its optimizer's groups ({', '.join(map(str, bounds))} tensors) are "
            "neither all parameters in the model's order nor these split into decayed and not decayed ones: continue "
            "the run at stage 1 for a step and save it there"
        )
    fragments = []
    for index, names in enumerate(named if flat else [[name] for group in named for name in group]):
        offset = 0
        for name in names:
            weight = weights[name]
            source = weight if masters is None else masters[index]
            fragments.append(_fragment(file, name, 0, source, state.moments[index], offset, weight.numel()))
            offset += weight.numel()
    return fragments


def _groupings(weights: Mapping[str, torch.Tensor], state: AdamState) -> Iterator[list[list[str]]]:
    """The ways in which parameters are handed to an optimizer: by name, all in order, or split by decay."""
    if all(group.get("param_names") for group in state.groups):
        yield [list(group["param_names"]) for group in state.groups]
    yield [list(weights)]
    decays: tuple[Callable[[str], bool], ...] = (
        lambda name: weights[name].dim() > 1,  # get_grouped_params, transformers' Trainer, nanoGPT
        lambda name: "bias" not in name and "LayerNorm.weight" not in name,  # the recipe's, as it stands
    )
    for is_decayed in decays:
        split = [[name for name in weights if is_decayed(name) is decayed] for decayed in (True, False)]
        yield split
        yield split[::-1]


def _fits(
    groups: Sequence[Sequence[str]],
    bounds: Sequence[int],
    sizes: Sequence[tuple[int, ...]],
    weights: Mapping[str, torch.Tensor],
    flat: bool,
) -> bool:
    """Whether groups of parameters have the sizes of the optimizer's tensors."""
    if any(name not in weights for name in chain.from_iterable(groups)):
        return False
    if flat:
        return [(sum(weights[name].numel() for name in group),) for group in groups] == list(sizes)
    shapes = [tuple(weights[name].shape) for name in chain.from_iterable(groups)]
    return [len(group) for group in groups] == list(bounds) and shapes == list(sizes)
