"""What the memory plan chooses of a run, always within the same rows per step. No torch here.

``micro_batch_size: auto`` is the largest micro-batch that fits: larger ones keep the device busier, up to a point. On a
GPU ``deepspeed: auto`` is the first of `LADDER` that fits. Who names neither has both on a GPU, and a run that resumes
has what it began with.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from codeparrot_ds.config.files import read_saved_fields
from codeparrot_ds.config.run_config import FIELDS, RunConfig
from codeparrot_ds.devices import smallest_gpu
from codeparrot_ds.ds_config.file import open_ds_config, shipped_names
from codeparrot_ds.ds_config.foreign import own_batch
from codeparrot_ds.ds_config.precision import begun_run, open_for, with_precision
from codeparrot_ds.errors import UserError
from codeparrot_ds.json_files import DamagedFileError
from codeparrot_ds.memory.device import load_overhead
from codeparrot_ds.memory.plan import Plan, dividing_sizes, predict
from codeparrot_ds.memory.workload import Memory
from codeparrot_ds.resolved_run import encoder_and_shape, resolve_run
from codeparrot_ds.terminal import gigabytes

# Tokens of a micro-batch. 64 rows of 1,024 are the most that an H200 was given (records/2026-11-28-gpu-memory-h200):
# its products of matrices are large long before. On a CPU more than some thousands only cost memory.
MAX_TOKENS = {"cuda": 65_536, "cpu": 8_192}
# With fewer in a micro-batch the host, which launches a thousand kernels for it, is slower than the GPU.
ENOUGH_TOKENS = 4_096
# Of a CPU's memory, for the tensors of all ranks: the processes, the page cache and other programs have the rest.
# So have the probabilities that a CPU's attention keeps in bf16, which the plan of a GPU's does not know.
CPU_SHARE = 0.5
# What a GPU's run is tried with, by what each costs. ZeRO-1's hooks run once per step, ZeRO-2's in every micro-step,
# for as much memory on one rank. Computing activations again costs a third more arithmetic on any machine; gathering
# weights (ZeRO-3) what the network makes of it; offloading, the bus and the host's Adam.
LADDER = (
    *("zero1", "zero2", "zero2_activation_checkpointing", "zero3", "zero3_activation_checkpointing"),
    *("zero2_offload", "zero2_offload_activation_checkpointing", "zero3_offload", "zero3_offload_cpu_checkpointing"),
)


def as_begun(config: RunConfig, *, world_size: int, device: str) -> RunConfig:
    """The config with what the run that it continues has in the fields that the user left open, and says so.

    Another machine would be given another choice, and sums of other micro-batches would round otherwise. A micro-batch
    that does not divide the rows of so many ranks is the largest below it that does.
    """
    run = begun_run(config)
    if run is None or not config.open_fields:
        return config
    try:
        saved = read_saved_fields(run / "config.yaml")
    except (OSError, DamagedFileError):  # a run that begins; what is damaged is named where the run is checked
        return config
    kept = {name: saved[name] for name in config.open_fields if name in saved and _is_kept(name, saved[name])}
    rows, size = config.global_batch_size, kept.get("micro_batch_size")
    if size is not None and rows % (size * world_size) and rows % world_size == 0:
        kept["micro_batch_size"] = dividing_sizes(config, world_size, size)[-1]
    if kept and (device == "cuda" or not _is_usual(config, kept)):
        values = " and ".join(f"{name} {value}" for name, value in kept.items())
        options = " and ".join(f"--{name.replace('_', '-')} auto" for name in kept)
        print(f"{values}, as {run} began; {options} would choose for this machine", file=sys.stderr)
    return dataclasses.replace(config, **kept)


def _is_kept(name: str, value: Any) -> bool:
    """Whether a saved value is one that can still be followed: decided, and not a file that is gone."""
    if value in (None, "auto") or FIELDS[name].is_open(value) or FIELDS[name].problem(value) is not None:
        return False
    return not (isinstance(value, str) and Path(value).is_absolute()) or Path(value).is_file()


def _is_usual(config: RunConfig, kept: dict[str, Any]) -> bool:
    """Whether what is kept is what a CPU has, but for the precision."""
    name, size = kept.get("deepspeed", config.ds_config_name), kept.get("micro_batch_size", config.micro_batch_rows)
    return size == config.micro_batch_rows and str(name).startswith(config.ds_config_name.removesuffix(":auto"))


def with_choices(config: RunConfig, *, world_size: int, device: str, precision: str) -> RunConfig:
    """Resolves what of ``deepspeed`` and ``micro_batch_size`` is left to the plan, and says what was chosen and why.

    Args:
        config: with data and tokenizer named; on a CPU with nothing open (`RunConfig.on_cpu`).
        world_size: number of ranks.
        device: ``cuda`` or ``cpu``; memory is that of this machine's smallest GPU, or of this machine.
        precision: of the config that is chosen.

    Raises:
        UserError: not even one row fits, or ``auto`` was named and nvidia-smi does not say how much memory there is.
    """
    is_named = config.auto_micro_batch or config.deepspeed == "auto"
    if config.open_fields and not is_named and smallest_gpu() is None:
        config = with_precision(config.on_cpu(), precision)
        print(
            f"nvidia-smi does not say how much memory a GPU has, so nothing is chosen for it: {config.deepspeed}, "
            f"micro-batch {config.micro_batch_size}; --deepspeed and --micro-batch-size set them",
            file=sys.stderr,
        )
        return config
    if "micro_batch_size" in config.open_fields:
        config = dataclasses.replace(config, micro_batch_size="auto")
    if config.deepspeed == "auto" or "deepspeed" in config.open_fields:
        return _with_ds_config(config, world_size, device, precision)
    return with_micro_batch(config, world_size=world_size, device=device)


def with_micro_batch(config: RunConfig, *, world_size: int, device: str) -> RunConfig:
    """Resolves ``micro_batch_size: auto`` alone; a config that names a size comes back as it is.

    Args: as for `with_choices`.

    Raises:
        UserError: not even one row fits, or nvidia-smi does not say how much memory there is.
    """
    if not config.auto_micro_batch:
        return config
    sizes, file = micro_batch_sizes(config, world_size, device), open_for(config, device)
    own = own_batch(file.config).size(config.global_batch_size, world_size)
    choice = f"the largest of {', '.join(map(str, sizes))} that fits" if own is None else f"as {file.path} says"
    sizes = sizes if own is None else [own]
    fitting = config_fitting(
        config, sizes, world_size=world_size, device=device, budget=memory_budget(device, world_size)
    )
    print(
        f"micro-batch {fitting.micro_batch_size}, {choice}, and "
        f"{fitting.gradient_accumulation_steps(world_size)} accumulation step(s)",
        file=sys.stderr,
    )
    return fitting


def _with_ds_config(config: RunConfig, world_size: int, device: str, precision: str) -> RunConfig:
    """The config with the first of `LADDER` that fits, and with a micro-batch."""
    available, place = memory_budget(device, world_size)
    sizes = [config.micro_batch_rows] if not config.auto_micro_batch else micro_batch_sizes(config, world_size, device)
    names, model, overhead = ladder(precision), encoder_and_shape(config), load_overhead()

    @functools.cache
    def memory_of(name: str, size: int) -> Memory:
        sized = dataclasses.replace(config, deepspeed=name, micro_batch_size=size)
        run = resolve_run(sized, open_ds_config(name), world_size=world_size, device=device, model=model)
        return predict(sized, run.shape, run.ds_config, world_size)

    def needed(name: str, size: int) -> int:
        return overhead.total(memory_of(name, size).peak_bytes, world_size)

    found = first_that_fits(lambda name, size: needed(name, size) <= available, names, sizes, config.seq_length)
    if found is None:
        least = min(names, key=lambda name: needed(name, sizes[0]))
        raise UserError(
            f"no DeepSpeed config holds {sizes[0]} row(s) of {config.model} here: {least} needs "
            f"{gigabytes(needed(least, sizes[0]))} a rank and {place} has {gigabytes(available)}; more ranks share "
            "more, or name a --deepspeed and a --micro-batch-size and train with --ignore-memory-plan"
        )
    name, size, enough = found
    chosen = dataclasses.replace(config, deepspeed=name, micro_batch_size=size)
    on_host = memory_of(name, size).host_bytes
    passed = names[: names.index(name)]
    print(
        f"{name}, micro-batch {size} and {chosen.gradient_accumulation_steps(world_size)} accumulation step(s), chosen "
        f"for {place}: by the memory plan {gigabytes(needed(name, size))} of {gigabytes(available)} per rank"
        + (f" and {gigabytes(on_host)} of the host's" if on_host else "")
        + (f"; less than {enough} row(s) would fit with {', '.join(passed)}" if passed else "")
        + "; --deepspeed and --micro-batch-size choose otherwise",
        file=sys.stderr,
    )
    return chosen


def ladder(precision: str) -> list[str]:
    """The names of `LADDER`'s configs in a precision, of which not all are shipped."""
    shipped = shipped_names()
    names = LADDER if precision == "bf16" else [f"{name}_{precision}" for name in LADDER]
    return [name for name in names if name in shipped]


def first_that_fits(
    fits: Callable[[str, int], bool], names: Sequence[str], sizes: Sequence[int], seq_length: int
) -> tuple[str, int, int] | None:
    """The config that a GPU's run has, its micro-batch, and how many rows those before it do not hold.

    It is the first that holds enough rows to keep a GPU busy; where none does, the first that holds any.

    Args:
        fits: whether the device holds a config with a micro-batch.
        names: the configs, first to last.
        sizes: the micro-batches that may be chosen, in ascending order.
        seq_length: tokens of a row.

    Returns:
        None where nothing fits.
    """
    rows = math.ceil(ENOUGH_TOKENS / seq_length)
    enough = next((size for size in sizes if size >= rows), sizes[-1])
    for least in dict.fromkeys((enough, sizes[0])):
        for name in names:
            if fits(name, least):
                return name, next(size for size in reversed(sizes) if size == least or fits(name, size)), least
    return None


def choices_of(plan: Plan, precision: str) -> list[dict[str, Any]]:
    """What ``train`` chooses on such GPUs, for each number of ranks on which a config fits; for the plan's JSON.

    Args:
        plan: of all shipped configs, for a device whose memory is known; nothing is chosen otherwise.
        precision: of the GPU.
    """
    found = []
    for world_size in () if plan.request.ds_configs else plan.request.world_sizes:
        fitting = {(row.config, row.micro_batch_size) for row in plan.rows if row.world_size == world_size and row.fits}
        sizes = micro_batch_sizes(plan.config, world_size, "cuda")
        choice = first_that_fits(
            lambda *each, fitting=fitting: each in fitting, ladder(precision), sizes, plan.config.seq_length
        )
        if choice is not None:
            found.append({"world_size": world_size, "config": choice[0], "micro_batch_size": choice[1]})
    return found


def micro_batch_sizes(config: RunConfig, world_size: int, device: str) -> list[int]:
    """The sizes that divide the rows of a rank, up to what fills a device."""
    return dividing_sizes(config, world_size, max(1, MAX_TOKENS[device] // config.seq_length))


def memory_budget(device: str, world_size: int) -> tuple[int, str]:
    """Bytes a rank may take, and of what."""
    if device == "cpu":
        import psutil

        return int(psutil.virtual_memory().total * CPU_SHARE / world_size), "half of this machine's memory"
    gpu = smallest_gpu()
    if gpu is None:
        raise UserError(
            "auto needs to know the GPU's memory and nvidia-smi does not say: give it a number (micro_batch_size) or a "
            "name (deepspeed)"
        )
    return gpu[1], gpu[0]


def config_fitting(
    config: RunConfig, sizes: Sequence[int], *, world_size: int, device: str, budget: tuple[int, str]
) -> RunConfig:
    """The config with the largest of `sizes` that fits ``budget``, by the plan.

    Raises:
        UserError: none does.
    """
    model, file = encoder_and_shape(config), open_for(config, device)
    available, place = budget
    overhead, needed = load_overhead(), 0
    for size in sorted(sizes, reverse=True):
        sized = dataclasses.replace(config, micro_batch_size=size)
        run = resolve_run(sized, file, world_size=world_size, device=device, model=model)
        memory = predict(sized, run.shape, run.ds_config, world_size)
        on_device = overhead.total(memory.peak_bytes, world_size)
        needed = memory.peak_bytes + memory.host_bytes if device == "cpu" else on_device
        if needed <= available:
            return sized
    raise UserError(
        f"micro_batch_size auto: one row needs {gigabytes(needed)} a rank and {place} gives {gigabytes(available)}; "
        "`codeparrot-ds plan` shows which DeepSpeed configs fit; a number is taken all the same (--ignore-memory-plan)"
    )
