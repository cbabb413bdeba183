"""``--micro-batch-size auto``: the largest micro-batch that the memory plan says fits. No torch here.

The rows of a step are the same whatever the micro-batch; larger ones keep the device busier, up to a point.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

from codeparrot_ds.config.run_config import RunConfig
from codeparrot_ds.devices import smallest_gpu
from codeparrot_ds.ds_config.foreign import own_batch
from codeparrot_ds.ds_config.precision import open_for
from codeparrot_ds.errors import UserError
from codeparrot_ds.memory.device import load_overhead
from codeparrot_ds.memory.plan import dividing_sizes, predict
from codeparrot_ds.resolved_run import encoder_and_shape, resolve_run
from codeparrot_ds.terminal import gigabytes

# Tokens of a micro-batch. 64 rows of 1,024 are the most that an H200 was given (records/2026-11-28-gpu-memory-h200):
# its products of matrices are large long before. On a CPU more than some thousands only cost memory.
MAX_TOKENS = {"cuda": 65_536, "cpu": 8_192}
# Of a CPU's memory, for the tensors of all ranks: the processes, the page cache and other programs have the rest.
# So have the probabilities that a CPU's attention keeps in bf16, which the plan of a GPU's does not know.
CPU_SHARE = 0.5


def with_micro_batch(config: RunConfig, *, world_size: int, device: str) -> RunConfig:
    """Resolves ``micro_batch_size: auto``; a config that names a size comes back as it is.

    Args:
        config: with data and tokenizer named.
        world_size: number of ranks.
        device: ``cuda`` or ``cpu``; memory is that of this machine's smallest GPU, or of this machine.

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
            "micro_batch_size auto needs to know the GPU's memory and nvidia-smi does not say: give it a number"
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
        "`codeparrot-ds plan` shows which DeepSpeed configs fit"
    )
