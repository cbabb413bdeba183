"""Memory plans: every config for a model, numbers of ranks and micro-batches, before a GPU is touched.

The formulas of ``formulas.py`` answer at once; what was traced before (``trace.py``) replaces them. No torch here.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from codeparrot_ds.config.run_config import PRESETS, RunConfig
from codeparrot_ds.cpu import usable_cores
from codeparrot_ds.ds_config.facts import VALUE_BYTES, precision, steps_lean
from codeparrot_ds.ds_config.file import DsFile, open_ds_config, shipped_names
from codeparrot_ds.ds_config.foreign import import_ds_config, own_batch
from codeparrot_ds.ds_config.lint import check_ds_config
from codeparrot_ds.ds_config.resolve import ACCUMULATION, MICRO_BATCH, ROWS, resolve
from codeparrot_ds.errors import UserError
from codeparrot_ds.memory.device import Overhead, load_overhead
from codeparrot_ds.memory.formulas import quick_memories
from codeparrot_ds.memory.model_memory import BackwardPass
from codeparrot_ds.memory.trace import ATTENTIONS, cached, trace_all
from codeparrot_ds.memory.workload import CATEGORIES, Memory, Workload
from codeparrot_ds.model.shapes import KNOWN_SHAPES, GPT2Shape, find_shape, num_parameters
from codeparrot_ds.paths import did_you_mean
from codeparrot_ds.terminal import gigabytes

VOCAB_SIZE = 32_768  # the recipe's
MAX_MICRO_BATCH_SIZE = 128  # larger ones are not planned unless they are asked for
PHASES = {"forward_backward": "backward", "step": "step"}


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """What is planned. None stands for the preset's value, or for what follows from the others."""

    model: str
    ds_configs: Sequence[str] = ()
    world_sizes: Sequence[int] = (1,)
    micro_batch_sizes: Sequence[int] | None = None
    global_batch_size: int | None = None
    seq_length: int | None = None
    vocab_size: int | None = None
    attention: str = "flash"
    dropout: float | None = None
    chunked_loss: bool | None = None
    fused_loss: bool | None = None
    device_memory: int | None = None
    trace: bool = False
    num_workers: int = 1


@dataclass(frozen=True, kw_only=True)
class PlanRow:
    """One config on one number of ranks with one micro-batch."""

    config: str
    world_size: int
    micro_batch_size: int
    accumulation_steps: int
    is_own: bool
    """Whether the config itself says the micro-batch, so that there is no other."""
    memory: Memory
    needed_bytes: int
    """Of a rank's device: the tensors and what a run takes beside them."""
    spare_bytes: int | None
    """What is left of the device; negative where it does not fit; None where no device is known."""

    @property
    def rows_per_step(self) -> int:
        """Of all ranks."""
        return self.micro_batch_size * self.accumulation_steps * self.world_size

    @property
    def fits(self) -> bool | None:
        """Whether the device holds it; None where no device is known."""
        return None if self.spare_bytes is None else self.spare_bytes >= 0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All rows of a request, those that fit first, by what they need; and the configs that cannot run there."""

    request: PlanRequest
    config: RunConfig
    shape: GPT2Shape
    overhead: Overhead
    rows: Sequence[PlanRow]
    impossible: Mapping[tuple[str, int], str]
    """(config, world size) → why."""

    def largest(self, config: str, world_size: int) -> int | None:
        """The largest planned micro-batch that fits; None where none does, or no device is known."""
        mine = [row for row in self.rows if (row.config, row.world_size) == (config, world_size) and row.fits]
        return max((row.micro_batch_size for row in mine), default=None)

    @property
    def asked(self) -> list[PlanRow]:
        """The rows of the micro-batches asked for: all where none were named."""
        sizes = self.request.micro_batch_sizes
        return [row for row in self.rows if sizes is None or row.micro_batch_size in sizes]

    def shown(self, world_size: int) -> list[PlanRow]:
        """The rows of the table: the micro-batches asked for, or the config's own, or the preset's.

        Where the preset's is not planned, the largest below it.
        """
        rows = [row for row in self.asked if row.world_size == world_size]
        if self.request.micro_batch_sizes is not None:
            return rows
        wanted = _shown_size({row.micro_batch_size for row in rows if not row.is_own}, self.config)
        return [row for row in rows if row.is_own or row.micro_batch_size == wanted]


# --------------------------------------------------------------------------------------------------------------------
# Making a plan


def plan_of(
    arguments: argparse.Namespace,
    device_memory: int | None,
    overhead: Overhead,
    progress: Callable[[int, int], None],
) -> Plan:
    """The plan of the ``plan`` command's arguments; see `make_plan`."""
    for name in arguments.ds_configs:
        if name.isdigit():
            raise UserError(f"{name!r} is not a DeepSpeed config; several numbers of one option have commas: 1,2,4")
    alike = "model ds_configs micro_batch_sizes global_batch_size seq_length vocab_size attention dropout"
    request = PlanRequest(
        **{name: getattr(arguments, name) for name in [*alike.split(), "chunked_loss", "fused_loss", "trace"]},
        world_sizes=arguments.world_size,
        device_memory=device_memory,
        num_workers=arguments.num_workers or usable_cores(),
    )
    return make_plan(request, overhead, progress)


def make_plan(
    request: PlanRequest, overhead: Overhead, progress: Callable[[int, int], None] = lambda done, total: None
) -> Plan:
    """Plans every config of a request; `progress` gets how many traces are done, and how many there are.

    Raises:
        UserError: an unknown model, sizes that do not go together, or a named config with an error.
    """
    config, shape = _run_of(request)
    names = list(request.ds_configs) or shipped_names()
    planned: list[_Planned] = []
    impossible: dict[tuple[str, int], str] = {}
    for world_size in request.world_sizes:
        if not request.ds_configs:
            _micro_batch_sizes(request, config, world_size)  # what is wrong for all is said once
        for name in names:
            try:
                planned += _plan_file(name, config, shape, request, world_size)
            except UserError as error:
                if request.ds_configs:
                    raise
                impossible[name, world_size] = str(error)
    memories = _memories(planned, request, config, progress)
    rows = []
    for each, memory in zip(planned, memories, strict=True):
        workload = each.workload
        needed = overhead.total(memory.peak_bytes, workload.world_size)
        rows.append(
            PlanRow(
                config=each.name,
                world_size=workload.world_size,
                micro_batch_size=workload.micro_batch_size,
                accumulation_steps=workload.accumulation_steps,
                is_own=each.is_own,
                memory=memory,
                needed_bytes=needed,
                spare_bytes=None if request.device_memory is None else request.device_memory - needed,
            )
        )
    rows.sort(key=lambda row: (row.fits is False, row.needed_bytes, row.config))
    return Plan(request=request, config=config, shape=shape, overhead=overhead, rows=rows, impossible=impossible)


def _run_of(request: PlanRequest) -> tuple[RunConfig, GPT2Shape]:
    values: dict[str, Any] = {"model": request.model}
    if request.model in PRESETS:
        values = {"model": RunConfig().model, **PRESETS[request.model]}
    elif request.model not in KNOWN_SHAPES and "/" not in request.model and not request.model.endswith(".json"):
        hint = did_you_mean(request.model, [*PRESETS, *KNOWN_SHAPES])
        raise UserError(f"model {request.model!r} is neither a preset, a known shape nor a GPT-2 config.json{hint}")
    for field in ("global_batch_size", "seq_length", "dropout", "chunked_loss", "fused_loss"):
        if getattr(request, field) is not None:
            values[field] = getattr(request, field)
    if request.global_batch_size is not None:
        values["micro_batch_size"] = _at_most(RunConfig(**values).micro_batch_rows, request.global_batch_size)
    config = RunConfig(**values)
    vocab_size = VOCAB_SIZE if request.vocab_size is None else request.vocab_size
    return config, find_shape(config.model, vocab_size=vocab_size, seq_length=config.seq_length)


def _at_most(size: int, whole: int) -> int:
    """The largest divisor of `whole` that is not above `size`."""
    return max(divisor for divisor in range(1, min(size, whole) + 1) if whole % divisor == 0)


def _micro_batch_sizes(request: PlanRequest, config: RunConfig, world_size: int) -> Sequence[int]:
    """All that divide the global batch, and those asked for, which must."""
    asked = request.micro_batch_sizes or ()
    for size in asked:
        _with_micro_batch(config, size).gradient_accumulation_steps(world_size)
    return sorted({*asked, *dividing_sizes(config, world_size, MAX_MICRO_BATCH_SIZE)})


@dataclass(frozen=True)
class _Planned:
    """What a rank does with a config and one micro-batch; ``is_own`` as in `PlanRow`."""

    name: str
    is_own: bool
    workload: Workload


def _plan_file(name: str, config: RunConfig, shape: GPT2Shape, request: PlanRequest, world_size: int) -> list[_Planned]:
    """A config with each micro-batch that a run with it may have.

    What it says of the batch itself holds, as `train` wants it; what else is the run's, as the learning rate, takes
    no memory and is left out.

    Raises:
        UserError: the config has errors, an option contradicts it, or its numbers do not go with so many ranks.
    """
    file = _checked(name, shape, world_size)
    own, asked, rows = own_batch(file.config), request.micro_batch_sizes, request.global_batch_size
    if None not in (own.rows, rows) and own.rows != rows:
        raise UserError(
            f"{file.where(ROWS)}: train_batch_size is {own.rows} but --global-batch-size says {rows}; keep one of them"
        )
    rows = rows or own.rows
    size = own.size(rows, world_size)
    if size and asked and size not in asked:
        raise UserError(
            f"{file.where(MICRO_BATCH)}: the file itself makes micro-batches of {size} row(s) on {world_size} rank(s), "
            f"and --micro-batch-sizes says {','.join(map(str, asked))}: name {size} as well, or remove the key"
        )
    whole = dataclasses.replace(config, micro_batch_size=1, global_batch_size=rows or config.global_batch_size)
    runs = [
        _with_rows(whole, each, rows, own.accumulation_steps, world_size)
        for each in ([size] if size else _micro_batch_sizes(request, whole, world_size))
    ]
    if own.accumulation_steps:
        runs = [run for run in runs if run.gradient_accumulation_steps(world_size) == own.accumulation_steps]
    if not runs:
        raise UserError(
            f"{file.where(ACCUMULATION)}: gradient_accumulation_steps {own.accumulation_steps} on {world_size} rank(s) "
            f"cannot make {rows} rows per step"
        )
    file = dataclasses.replace(file, config=import_ds_config(file.config, config).config)
    return [_Planned(name, bool(size), _workload(file, run, shape, request, world_size)) for run in runs]


def _with_rows(run: RunConfig, size: int, rows: int | None, steps: int | None, world_size: int) -> RunConfig:
    """The run with a micro-batch; its rows per step, where they are open, as near as they come with it."""
    unit = size * world_size
    near = unit * (steps or max(1, round(run.global_batch_size / unit)))
    return dataclasses.replace(run, micro_batch_size=size, global_batch_size=rows or near)


def dividing_sizes(config: RunConfig, world_size: int, most: int) -> list[int]:
    """The micro-batches up to `most` that divide a rank's rows per step.

    Raises:
        UserError: `world_size` does not divide the rows of a step.
    """
    rows = _with_micro_batch(config, 1).gradient_accumulation_steps(world_size)
    return [size for size in range(1, min(rows, most) + 1) if rows % size == 0]


def _with_micro_batch(config: RunConfig, size: int) -> RunConfig:
    return dataclasses.replace(config, micro_batch_size=size)


def _checked(name: str, shape: GPT2Shape, world_size: int) -> DsFile:
    """A config without errors, as it would be on GPUs."""
    file = open_ds_config(name)
    check_ds_config(
        file,
        device="cuda",
        world_size=world_size,
        parameters=num_parameters(shape),
        model_hidden_size=shape.n_embd,
    )
    return file


def _workload(file: DsFile, run: RunConfig, shape: GPT2Shape, request: PlanRequest, world_size: int) -> Workload:
    resolved = resolve(file, run, world_size=world_size, model_hidden_size=shape.n_embd, nvme_path="nvme")
    return _workload_of(run, shape, resolved.config, world_size, request.attention)


def _workload_of(
    config: RunConfig, shape: GPT2Shape, ds_config: Mapping[str, Any], world_size: int, attention: str
) -> Workload:
    """What a rank of a run does, for the memory that it takes."""
    return Workload(
        shape=shape,
        ds_config=ds_config,
        world_size=world_size,
        seq_length=config.seq_length,
        attention=attention,
        dropout=config.dropout,
        chunked_loss=config.chunked_loss,
        lean_step=steps_lean("off" if config.lean_step == "off" else "auto", ds_config, "cuda"),
        fused_loss=config.fused_loss,
    )


def _memories(
    planned: Sequence[_Planned], request: PlanRequest, config: RunConfig, progress: Callable[[int, int], None]
) -> list[Memory]:
    """Traced where it is known, or asked for and shown in the tables; by formulas elsewhere."""
    workloads = [each.workload for each in planned]
    quick = quick_memories(workloads)
    found = [_traced_or_quick(cached(workload), memory) for workload, memory in zip(workloads, quick, strict=True)]
    if not request.trace:
        return found
    sizes = {each.workload.micro_batch_size for each in planned if not each.is_own}
    shown = request.micro_batch_sizes or (_shown_size(sizes, config),)
    wanted = [i for i, each in enumerate(planned) if each.is_own or each.workload.micro_batch_size in shown]
    traced = trace_all([workloads[index] for index in wanted], request.num_workers, progress)
    for index, result in zip(wanted, traced, strict=True):
        if not isinstance(result, UserError):
            found[index] = _traced_or_quick(result, found[index])
        elif request.ds_configs:
            raise result
    return found


def _shown_size(sizes: Iterable[int], config: RunConfig) -> int:
    """The run's micro-batch, or the largest planned below it."""
    return max((size for size in sizes if size <= config.micro_batch_rows), default=min(sizes, default=0))


def _traced_or_quick(traced: Memory | None, quick: Memory) -> Memory:
    """The traced memory; what a checkpoint takes is the run's own format, not the one that DeepSpeed would write."""
    return quick if traced is None else dataclasses.replace(traced, checkpoint_bytes=quick.checkpoint_bytes)


def predict(
    config: RunConfig, shape: GPT2Shape, ds_config: Mapping[str, Any], world_size: int, *, attention: str = "flash"
) -> Memory:
    """What a run will take on each rank: traced where that is known, by formulas otherwise."""
    workload = _workload_of(config, shape, ds_config, world_size, attention)
    return _traced_or_quick(cached(workload), quick_memories([workload])[0])


# --------------------------------------------------------------------------------------------------------------------
# What a run reports


def why_too_large(
    config: RunConfig, shape: GPT2Shape, ds_config: Mapping[str, Any], world_size: int, device_memory: int, name: str
) -> str | None:
    """Why a run does not fit, with what would; None where it fits.

    `ds_config` is resolved; `device_memory` is bytes of the smallest device, which is called `name`.
    """
    overhead = load_overhead()
    memory = predict(config, shape, ds_config, world_size)
    needed = overhead.total(memory.peak_bytes, world_size)
    if needed <= device_memory:
        return None
    largest = max(memory.device, key=lambda category: memory.device[category])
    return (
        f"the run needs {gigabytes(needed)} a rank and {name} has {gigabytes(device_memory)}: "
        f"{gigabytes(needed - device_memory)} too little (peak in the {_phase(memory)}, most of it {largest}: "
        f"{gigabytes(memory.device[largest])}); {_what_fits(config, shape, ds_config, world_size, device_memory)}; "
        "--ignore-memory-plan trains all the same"
    )


def _what_fits(
    config: RunConfig, shape: GPT2Shape, ds_config: Mapping[str, Any], world_size: int, device_memory: int
) -> str:
    """The smaller micro-batch and the shipped configs of the same precision that fit, those that need most first."""
    overhead, options = load_overhead(), []
    request = PlanRequest(model=config.model, device_memory=device_memory)
    own = open_ds_config(config.deepspeed, began=precision(ds_config))
    smaller = [size for size in _micro_batch_sizes(request, config, world_size) if size < config.micro_batch_rows]
    if own_batch(own.config).size(config.global_batch_size, world_size):
        smaller = []  # With another micro-batch the file would be refused.
    for size in sorted(smaller, reverse=True):
        workload = _workload(own, _with_micro_batch(config, size), shape, request, world_size)
        needed = overhead.total(quick_memories([workload])[0].peak_bytes, world_size)
        if needed <= device_memory:
            options.append(f"--micro-batch-size {size} ({gigabytes(needed)})")
            break
    found = []
    for name in shipped_names():
        try:
            file = _checked(name, shape, world_size)
            workload = _workload(file, config, shape, request, world_size)
        except UserError:
            continue  # One that cannot run on this many ranks is no suggestion.
        needed = overhead.total(quick_memories([workload])[0].peak_bytes, world_size)
        if needed <= device_memory and precision(workload.ds_config) == precision(ds_config):
            found.append((needed, name))
    options += [f"--deepspeed {name} ({gigabytes(needed)})" for needed, name in sorted(found, reverse=True)[:3]]
    return f"these fit: {', '.join(options)}" if options else "no shipped config of this precision fits either"


def _phase(memory: Memory) -> str:
    return {"forward_backward": "backward pass", "step": "optimizer step"}[memory.peak_phase]


# --------------------------------------------------------------------------------------------------------------------
# What is printed


def describe(plan: Plan) -> str:
    """The plan as text: the model, what is assumed, and one table a number of ranks."""
    request, config = plan.request, plan.config
    parameters = num_parameters(plan.shape)
    device = "" if request.device_memory is None else f"; {gigabytes(request.device_memory)} a device"
    lines = [
        f"{request.model}: {parameters:,} parameters ({gigabytes(2 * parameters)} in 16 bits, "
        f"{gigabytes(4 * parameters)} in fp32), {config.seq_length:,} tokens per row, vocabulary "
        f"{plan.shape.vocab_size:,}, {config.global_batch_size:,} rows per step{device}",
        f"overhead per rank, in addition to tensors: {plan.overhead}",
    ]
    for world_size in request.world_sizes:
        rows = plan.shown(world_size)
        sizes = sorted({row.micro_batch_size for row in rows})
        lines += ["", f"{world_size} rank(s), GB of 10^9 bytes per rank, at the peak of a step", _table(plan, rows)]
        lines += [activation_line(plan, size) for size in sizes]
        lines += [
            f"{row.config} says so itself: micro-batch {row.micro_batch_size}, {row.rows_per_step:,} rows per step"
            for row in rows
            if row.is_own or row.rows_per_step != config.global_batch_size
        ]
        reasons = {name: why for (name, ranks), why in plan.impossible.items() if ranks == world_size}
        lines += [f"not on {world_size} rank(s): {name}: {why}" for name, why in reasons.items()]
    return "\n".join(lines)


def _table(plan: Plan, rows: Sequence[PlanRow]) -> str:
    headings = ["config", "rows", *CATEGORIES, "peak", "at", "needed", "spare", "largest", "host", "NVMe", "checkpoint"]
    body = [_cells(plan, row) for row in rows]
    if sys.stdout.isatty() and shutil.get_terminal_size().columns < 170:
        keep = [index for index, heading in enumerate(headings) if heading not in (*CATEGORIES, "NVMe", "checkpoint")]
        headings, body = [headings[i] for i in keep], [[cells[i] for i in keep] for cells in body]
    widths = [max(len(cells[index]) for cells in [headings, *body]) for index in range(len(headings))]
    return "\n".join(
        "  ".join(
            [cells[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        )
        for cells in [headings, *body]
    )


def _cells(plan: Plan, row: PlanRow) -> list[str]:
    memory, known = row.memory, row.spare_bytes is not None
    largest = plan.largest(row.config, row.world_size)
    mark = "*" if memory.depth == "traced" else ""
    return [
        row.config,
        str(row.micro_batch_size),
        *(in_gigabytes(memory.device.get(category, 0)) for category in CATEGORIES),
        in_gigabytes(memory.peak_bytes) + mark,
        PHASES[memory.peak_phase],
        in_gigabytes(row.needed_bytes),
        f"{row.spare_bytes / 1e9:+.1f}" if row.spare_bytes is not None else "?",
        (str(largest) if largest else "none") if known else "?",
        in_gigabytes(memory.host_bytes),
        in_gigabytes(memory.nvme_bytes),
        in_gigabytes(memory.checkpoint_bytes),
    ]


def in_gigabytes(size: int) -> str:
    """A size as the tables and the picture have it, in GB of 10^9 bytes."""
    if size == 0:
        return "-"
    return f"{size / 1e9:.1f}" if size >= 1e8 else f"{size / 1e9:.2f}"


def activations(plan: Plan, micro_batch_size: int) -> dict[str, dict[str, int]]:
    """Bytes of activations of one micro-batch in 16 bits, by attention, kept and with activation checkpointing."""

    def largest(attention: str, checkpointing: bool) -> int:
        moments = _backward_in_16_bits(plan, attention, checkpointing).moments()
        return micro_batch_size * max(moment.activations_a_row for moment in moments)

    return {name: {"kept": largest(name, False), "checkpointed": largest(name, True)} for name in ATTENTIONS}


def _backward_in_16_bits(plan: Plan, attention: str, checkpointing: bool) -> BackwardPass:
    return BackwardPass(
        plan.shape,
        seq_length=plan.config.seq_length,
        width=VALUE_BYTES["bf16"],
        attention=attention,
        dropout=plan.config.dropout > 0,
        chunked_loss=plan.config.chunked_loss,
        fused_loss=plan.config.fused_loss,
        checkpointing=checkpointing,
    )


def activation_line(plan: Plan, micro_batch_size: int) -> str:
    """What the activations of one micro-batch take, in one line."""
    sizes = activations(plan, micro_batch_size)
    parts = [f"{gigabytes(size['kept'])} with {name} attention ({gigabytes(size['checkpointed'])} checkpointed)"
             for name, size in sizes.items()]  # fmt: skip
    backward = _backward_in_16_bits(plan, "flash", False)
    logits = micro_batch_size * backward.logits + backward.softmax_chunk
    return f"activations of {micro_batch_size} row(s) in 16 bits: {', '.join(parts)}; logits {gigabytes(logits)}"


def as_json(plan: Plan) -> dict[str, Any]:
    """The whole plan, sizes in bytes."""
    parameters, config = num_parameters(plan.shape), plan.config
    sizes = sorted({row.micro_batch_size for row in plan.asked})
    return {
        "model": plan.request.model,
        "parameters": parameters,
        "parameter_bytes": {"fp32": 4 * parameters, "bf16": 2 * parameters},
        "seq_length": config.seq_length,
        "vocab_size": plan.shape.vocab_size,
        "global_batch_size": config.global_batch_size,
        "attention": plan.request.attention,
        "device_memory_bytes": plan.request.device_memory,
        "overhead": dataclasses.asdict(plan.overhead),
        "activation_bytes": {str(size): activations(plan, size) for size in sizes},
        "plans": [_row_as_json(row) for row in plan.asked],
        "largest_micro_batch_size": [
            {"config": config, "world_size": ranks, "micro_batch_size": plan.largest(config, ranks)}
            for config, ranks in dict.fromkeys((row.config, row.world_size) for row in plan.rows)
        ],
        "impossible": [
            {"config": name, "world_size": ranks, "reason": why} for (name, ranks), why in plan.impossible.items()
        ],
    }


def _row_as_json(row: PlanRow) -> dict[str, Any]:
    memory = row.memory
    return {
        "config": row.config,
        "world_size": row.world_size,
        "micro_batch_size": row.micro_batch_size,
        "gradient_accumulation_steps": row.accumulation_steps,
        "global_batch_size": row.rows_per_step,
        "depth": memory.depth,
        "peak_bytes": memory.peak_bytes,
        "peak_phase": memory.peak_phase,
        "device_bytes": dict(memory.device),
        "resident_bytes": memory.resident_bytes,
        "phase_bytes": dict(memory.phases),
        "host_bytes": memory.host_bytes,
        "nvme_bytes": memory.nvme_bytes,
        "checkpoint_bytes": memory.checkpoint_bytes,
        "needed_bytes": row.needed_bytes,
        "spare_bytes": row.spare_bytes,
        "fits": row.fits,
    }
