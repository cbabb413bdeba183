"""A checkpoint that DeepSpeed's ``engine.save_checkpoint`` wrote, read, checked, and under this project's names.

Which files there are and how they are read without running them is in ``deepspeed_files``; where the optimizer's state
lies in them, in ``deepspeed_optimizer``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from codeparrot_ds.checkpoint.deepspeed_files import load_file, model_states_file, optimizer_files
from codeparrot_ds.checkpoint.deepspeed_optimizer import (
    AdamState,
    Shapes,
    adam_state,
    loss_scaler,
    rank_optimizer,
    stage0_fragments,
    stage3_fragments,
    stage12_fragments,
)
from codeparrot_ds.checkpoint.import_check import find_tag
from codeparrot_ds.engine.fragments import MASTER, Fragment
from codeparrot_ds.errors import UserError

# What is read of the file that all ranks share. Beside it are the scheduler's state and whatever client_state was.
USED = (
    *("module", "param_shapes", "shared_params", "buffer_names", "frozen_param_shapes", "optimizer"),
    *("global_steps", "skipped_steps", "global_samples", "dp_world_size", "mp_world_size", "ds_config", "ds_version"),
)
MOST_RANKS = 2**20
PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepSpeedCheckpoint:
    """One checkpoint of DeepSpeed's, whole and of the model that was asked for."""

    path: Path
    """Its folder, whose name is its tag."""
    version: str | None
    """Of the DeepSpeed that wrote it; None where it does not say."""
    zero_stage: int
    world_size: int
    """Data-parallel ranks."""
    precision: str
    """Of the working weights: ``fp32``, ``bf16`` or ``fp16``."""
    step: int
    """``global_steps``, those that were skipped among them."""
    skipped_steps: int
    samples: int
    """Rows trained on."""
    optimizer_step: int
    """Adam's own counter."""
    learning_rate: float | None
    """Of the first group at the last step."""
    loss_scaler: dict[str, Any]
    """Of dynamic loss scaling; empty without."""
    shapes: dict[str, list[int]]
    """Of every parameter by its name here."""
    shards: list[list[Fragment]]
    """The fragments of each rank, views of the files."""
    ds_config: dict[str, Any]
    """With an ``optimizer`` block that says which Adam it was."""
    prefix: str
    """What stands before every parameter's name in it (of a module around the model)."""

    @property
    def bytes_a_parameter(self) -> int:
        """Of masters and both moments, those of the widest where they differ."""
        fragments = chain.from_iterable(self.shards)
        return max(sum(tensor.element_size() for tensor in fragment.tensors.values()) for fragment in fragments)


def read_deepspeed_checkpoint(folder: Path, shapes: Shapes, *, tag: str | None = None) -> DeepSpeedCheckpoint:
    """Reads a folder that ``engine.save_checkpoint`` filled.

    Args:
        folder: that folder, or that of one tag in it.
        shapes: of the model that it is to be, every parameter by name, a tied one once.
        tag: which of its checkpoints; None for the one that ``latest`` names.

    Raises:
        UserError: there is none, a file is missing, damaged or asks for foreign code, the model or the optimizer is
            another, or its optimizer's state is elsewhere (NVMe).
    """
    path = find_tag(folder, tag)
    if (path / "offloaded_tensors").is_dir():
        raise UserError(f"{path} has its optimizer's state as raw files of NVMe offload, which cannot be imported")
    model_file = model_states_file(path)
    model = load_file(model_file, USED)
    try:
        _check_kind(model_file, model)
        return _understand(path, model_file, model, shapes)
    except (LookupError, AttributeError, ValueError, TypeError, ArithmeticError, RuntimeError) as error:
        # Something is missing, of another type, or of another length.
        version = model.get("ds_version", "unknown")
        raise UserError(
            f"{path} is not laid out as DeepSpeed 0.19 does it (its version: {version}; "
            f"{type(error).__name__}: {error}): continue the run with a newer DeepSpeed and save it again"
        ) from error


def _check_kind(file: Path, model: Mapping[str, Any]) -> None:
    """Refuses what is no engine's, of a model that was split between ranks, or not all of the model."""
    module = model.get("module")
    if not isinstance(module, dict) or not module or not isinstance(model.get("global_steps"), int):
        raise UserError(f"{file} is not what an engine of DeepSpeed's saves: it has no module or no global_steps")
    if model.get("mp_world_size", 1) != 1:
        raise UserError(f"{file} is of a model that was split between ranks: only data parallelism can be imported")
    frozen = list(model.get("frozen_param_shapes") or ())
    if frozen:
        raise UserError(f"{file} has {len(frozen)} frozen parameters (the first: {frozen[0]}); here all are trained")
    if model["global_steps"] < 1:
        raise UserError(f"{file} is of a run that has made no step: there is nothing to continue")


def _understand(path: Path, file: Path, model: Mapping[str, Any], expected: Shapes) -> DeepSpeedCheckpoint:
    precision = _precision(file, model["module"])
    world_size = int(model.get("dp_world_size", 1))
    if not 1 <= world_size <= MOST_RANKS:
        raise UserError(f"{file} says that {world_size} ranks saved it")
    parts = _Parts.of_stage0(file, model, expected)
    if parts is None:
        files = optimizer_files(path, world_size, bf16=precision == "bf16")
        parts = _Parts.of_shards(file, model, files, expected)
    _check_model(path, parts.shapes, expected)
    _check_whole(path, parts.shards, parts.shapes)
    _check_weights(path, parts.shards, parts.weights)
    state = parts.state
    learning_rate = state.groups[0].get("lr")
    return DeepSpeedCheckpoint(
        path=path,
        version=model.get("ds_version"),
        zero_stage=parts.zero_stage,
        world_size=world_size,
        precision=precision,
        step=model["global_steps"],
        skipped_steps=int(model.get("skipped_steps", 0)),
        samples=int(model.get("global_samples", 0)),
        optimizer_step=state.step,
        learning_rate=None if learning_rate is None else float(learning_rate),
        loss_scaler=loss_scaler(parts.owner) if precision == "fp16" else {},
        shapes={name: list(shape) for name, shape in expected.items()},
        shards=parts.shards,
        ds_config=_ds_config(file, model.get("ds_config"), state.groups, parts.zero_stage, precision),
        prefix=parts.prefix,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Parts:
    """What the optimizer's state came as."""

    zero_stage: int
    owner: Mapping[str, Any]  # the state of DeepSpeed's optimizer, of the first rank
    state: AdamState  # of the first rank
    shards: list[list[Fragment]]
    shapes: dict[str, list[int]]
    weights: Mapping[str, torch.Tensor]  # the working ones; none at stage 3, which does not save them
    prefix: str

    @classmethod
    def of_stage0(cls, file: Path, model: Mapping[str, Any], expected: Shapes) -> _Parts | None:
        """Where the optimizer is in the file of the model, as it is at stage 0; None elsewhere."""
        owner = model.get("optimizer")
        if owner is None:
            return None
        buffers = model.get("buffer_names") or ()
        named: dict[str, torch.Tensor] = {}
        shared: dict[str, str] = {}
        first_names: dict[int, str] = {}  # by address: a tied weight is in the file once, under both its names
        for name, weight in model["module"].items():
            first = first_names.setdefault(weight.data_ptr(), name)
            if first != name:
                shared[name] = first
            elif name not in buffers:
                named[name] = weight
        names = _Names(named, expected, shared)
        weights = names.own(named)
        state = adam_state(file, owner.get("optimizer_state_dict", owner), {})
        return cls(
            zero_stage=0,
            owner=owner,
            state=state,
            shards=[stage0_fragments(file, owner, state, weights)],
            shapes={name: list(weight.shape) for name, weight in weights.items()},
            weights=weights,
            prefix=names.prefix,
        )

    @classmethod
    def of_shards(cls, file: Path, model: Mapping[str, Any], files: Sequence[Path], expected: Shapes) -> _Parts:
        """Where each rank has a file of its own."""
        groups = model.get("param_shapes")
        if not isinstance(groups, list):
            raise UserError(f"{file} does not say which parameters the optimizer's state is of (param_shapes)")
        names = _Names([*chain.from_iterable(groups)], expected, model.get("shared_params") or {})
        groups = [names.own(group) for group in groups]
        owners = [rank_optimizer(path, len(files)) for path in files]
        stage = int(owners[0].get("zero_stage", 1))  # BF16_Optimizer does not say; it is stage 1's
        base, cut = (
            ("optimizer_state_dict", stage3_fragments) if stage == 3 else ("base_optimizer_state", stage12_fragments)
        )
        states = [adam_state(path, owner.get(base), owner) for path, owner in zip(files, owners, strict=True)]
        steps = [state.step for state in states]
        if min(steps) != max(steps):
            raise UserError(
                f"{file.parent} mixes files of several saves: Adam's step is {steps[0]} in {files[0].name} and others "
                f"have {min(steps)} to {max(steps)}"
            )
        return cls(
            zero_stage=stage,
            owner=owners[0],
            state=states[0],
            shards=[
                list(cut(path, owner, state, groups, rank, len(files)))
                for rank, (path, owner, state) in enumerate(zip(files, owners, states, strict=True))
            ],
            shapes={name: list(shape) for group in groups for name, shape in group.items()},
            weights={} if stage == 3 else names.own(model["module"]),
            prefix=names.prefix,
        )


# --------------------------------------------------------------------------------------------------------------------
# Names


class _Names:
    """The names that a file has for the parameters, and the model's own."""

    def __init__(self, names: Iterable[str], shapes: Shapes, shared: Mapping[str, str]) -> None:
        names, self._shapes = list(names), shapes
        first = next(iter(shapes))
        prefixes = {name.removesuffix(first) for name in [*names, *shared] if name.endswith(first)}
        prefix = prefixes.pop() if len(prefixes) == 1 else ""
        self.prefix = prefix if all(name.startswith(prefix) for name in names) else ""
        # A tied parameter is saved under the name that the module found first, which may be the other one.
        self._aliases = {stored: alias for alias, stored in shared.items()}

    def own(self, named: Mapping[str, Any]) -> dict[str, Any]:
        """The same values under the model's names; of tied weights, one."""
        found: dict[str, Any] = {}
        for name, value in named.items():
            alias = self._aliases.get(name, name)
            own, other = name.removeprefix(self.prefix), alias.removeprefix(self.prefix)
            found[other if own not in self._shapes and other in self._shapes else own] = value
        return found


def _check_model(path: Path, found: Mapping[str, Sequence[int]], shapes: Shapes) -> None:
    different = [name for name in [*shapes, *found] if list(found.get(name, ())) != list(shapes.get(name, ()))]
    if different:
        first = different[0]
        there, here = (
            f"has shape {list(which[first])}" if first in which else "is missing" for which in (found, shapes)
        )
        raise UserError(
            f"{path} belongs to another model: {first} {there} there and {here} here "
            f"({len(set(different))} of {len(shapes)} parameters differ): set --model, and its tokenizer"
        )


def _check_whole(path: Path, shards: Sequence[Sequence[Fragment]], shapes: Shapes) -> None:
    """Every value of every parameter once: a defect here, or a DeepSpeed that cuts otherwise."""
    pieces: dict[str, list[tuple[int, int]]] = {name: [] for name in shapes}
    for fragment in chain.from_iterable(shards):
        pieces[fragment.name].append((fragment.start, fragment.start + fragment.numel))
    for name, found in pieces.items():
        found.sort()
        starts, ends = [start for start, _ in found], [end for _, end in found]
        if [0, *ends] != [*starts, math.prod(shapes[name])]:
            raise UserError(f"{path} does not hold every value of {name} once: its layout is not one that is known")


def _check_weights(path: Path, shards: Sequence[Sequence[Fragment]], weights: Mapping[str, torch.Tensor]) -> None:
    """The working weights are the masters, rounded: names and places are right, and all files are of one save."""
    for fragment in chain.from_iterable(shards):
        weight = weights.get(fragment.name)
        if weight is not None:
            piece = weight.reshape(-1)[fragment.start : fragment.start + fragment.numel]
            if not torch.equal(fragment.tensors[MASTER].to(piece.dtype), piece):
                raise UserError(
                    f"{path}: the masters of {fragment.name} are not its weights: its files are of several saves, or "
                    "its layout is not one that is known"
                )


# --------------------------------------------------------------------------------------------------------------------
# Settings


def _ds_config(
    file: Path, saved: Any, groups: Sequence[Mapping[str, Any]], stage: int, precision: str
) -> dict[str, Any]:
    """The config that is saved in the file (DeepSpeed keeps what it was given: a path says nothing here).

    Its ``optimizer`` block is made where a client's optimizer was passed, from the groups' settings.
    """
    config: dict[str, Any] = dict(saved) if isinstance(saved, dict) else {}
    config["zero_optimization"] = {**(config.get("zero_optimization") or {}), "stage": stage}
    for name in ("bf16", "fp16"):  # as the weights are, where the file does not say or says "auto"
        if config.get(name) or precision == name:
            config[name] = {**(config.get(name) or {}), "enabled": precision == name}
    kind = (config.get("optimizer") or {}).get("type")
    if kind is not None:
        if str(kind).lower() not in ("adam", "adamw"):
            raise UserError(f"{file} was trained with optimizer {kind!r}: only Adam and AdamW can be imported")
        return config
    params: dict[str, Any] = {}
    if any(group.get("decoupled_weight_decay") is False and group.get("weight_decay") for group in groups):
        params["adam_w_mode"] = False  # PyTorch's Adam; its AdamW says true, DeepSpeed's Adams do not say
    if any(group.get("bias_correction") in (False, 0) for group in groups):
        params["bias_correction"] = False
    config["optimizer"] = {"type": "Adam" if "adam_w_mode" in params else "AdamW", "params": params}
    return config


def _precision(file: Path, module: Mapping[str, Any]) -> str:
    dtypes = {value.dtype for value in module.values() if torch.is_tensor(value) and value.is_floating_point()}
    if len(dtypes) != 1 or not dtypes <= PRECISIONS.keys():
        raise UserError(
            f"{file} has weights in {sorted(map(str, dtypes))}: one of {list(PRECISIONS.values())} is known"
        )
    return PRECISIONS[dtypes.pop()]
