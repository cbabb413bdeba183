"""What ``train --dry-run`` says of a checked run: all that its start would do, of which nothing was done. No torch."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from codeparrot_ds.checkpoint.folders import DATA, Checkpoint, newest_checkpoint
from codeparrot_ds.checkpoint.run_folder import (
    began_data,
    continued_from,
    finished_checkpoint,
    order_version_of,
    recorded_pins,
    run_path,
)
from codeparrot_ds.config.arguments import shown_value
from codeparrot_ds.config.run_config import FIELDS, RunConfig
from codeparrot_ds.data.datasets import open_datasets, validation_shards
from codeparrot_ds.data.inspect import RowPrinter, RowReader
from codeparrot_ds.data.shards import Shard
from codeparrot_ds.devices import smallest_gpu
from codeparrot_ds.ds_config.changes import explain
from codeparrot_ds.engine.operators import are_built, needed_operators
from codeparrot_ds.hub.places import open_repository
from codeparrot_ds.launch.deepspeed_command import is_local
from codeparrot_ds.launch.hostfile import Host
from codeparrot_ds.memory.device import load_overhead
from codeparrot_ds.memory.plan import predict
from codeparrot_ds.paths import shown
from codeparrot_ds.resolved_run import ResolvedRun
from codeparrot_ds.shell import pasteable
from codeparrot_ds.terminal import gigabytes, size_text

WIDTH = 80
FIRST_ROWS, LINES_OF_A_ROW = 2, 10
_LABEL = 12


def describe(run: ResolvedRun, hosts: list[Host], *, asked: RunConfig, origins: Mapping[str, str]) -> Iterator[str]:
    """The lines of a dry run, for a terminal of 80 columns.

    Args:
        run: as `preflight` returned it.
        hosts: that its ranks would run on; none of them is asked.
        asked: the run config before anything in it was decided.
        origins: where each field of that came from, as `field_origins` says it.
    """
    assert run.file is not None
    yield "\nDry run: nothing is started and nothing is written.\n"
    for label, text in [*_plan(run, origins), *_machine(run, hosts), *_data(run.config)]:
        yield _filled(text, f"{label:<{_LABEL}}", " " * _LABEL)
    yield "\nRun config: field, value, where it comes from"
    yield from _fields(run.config, asked, origins)
    yield f"\nDeepSpeed config, from {run.file.path}: key, value, where it comes from"
    yield from ("  " + line.replace(f"{run.file.path}:", "line ") for line in explain(run.ds))
    yield "\nFirst rows that the model would see"
    yield from _rows(run.config)


def _plan(run: ResolvedRun, origins: Mapping[str, str]) -> Iterable[tuple[str, str]]:
    """Which run it is, what it trains for how long, and what it leaves behind."""
    config, facts = run.config, {}
    made_up = "; the name is made up, and a start makes another: --run-name keeps one"
    facts["run"] = f"{config.run_name} in {run_path(config)}{made_up if origins['run_name'] == 'default' else ''}"
    continued, finished = continued_from(config), finished_checkpoint(config)
    first = 0 if continued is None else continued.step
    if finished is not None:
        facts["begins"] = f"not at all: it has finished at step {finished.step:,}, and nothing would be trained"
    elif continued is not None:
        facts["begins"] = f"after step {continued.step:,} of {continued.name}"
    else:
        facts["begins"] = f"with {f'the weights of {config.init_from}' if config.init_from else 'random weights'}"
    facts["model"] = f"{config.model}: {run.parameters:,} parameters, ZeRO-{run.zero_stage}, {run.precision}"
    steps, tokens = max(0, config.max_train_steps - first), config.global_batch_size * config.seq_length
    facts["steps"] = f"{steps:,} of {config.max_train_steps:,}, {tokens:,} tokens each, {steps * tokens:,} in all"
    facts["batch"] = (
        f"{config.global_batch_size:,} rows of {config.seq_length:,} tokens per step = {config.micro_batch_rows} per "
        f"rank and forward pass x {run.accumulation_steps} accumulated x {run.world_size} rank(s)"
    )
    warmup = f"after {config.num_warmup_steps:,} steps of warm-up"
    facts["rate"] = f"{config.learning_rate:g} {warmup}, then {config.lr_scheduler_type}"
    every = config.eval_steps or config.save_checkpoint_steps
    batches = "all of it" if config.max_eval_steps == -1 else f"{config.max_eval_steps} batches"
    facts["evaluates"] = f"every {every:,} steps and at the end, on validation data: {batches}"
    kept = f"{config.keep_checkpoints}{' and the best' if config.keep_best_checkpoint else ''}"
    facts["saves"] = f"every {config.save_checkpoint_steps:,} steps and at the end; keeps the newest {kept}"
    repository = open_repository(config.hub, config.output_dir)
    facts["branch"] = "none" if repository is None else f"{config.run_name} of {shown(str(repository))}"
    return facts.items()


def _machine(run: ResolvedRun, hosts: list[Host]) -> Iterator[tuple[str, str]]:
    """Where the ranks run, and what they take there."""
    where = ", ".join(f"{len(host.slots)} on {host.name}" for host in hosts)
    asked = "" if is_local(hosts) else "; the hosts were not asked: `codeparrot-ds doctor` does"
    yield "ranks", f"{run.world_size} on {run.device}: {where}{asked}"
    operators = needed_operators(run.ds_config, run.device)
    if operators and is_local(hosts):
        state = "built" if are_built(operators) else "would be built first, in a minute or two"
        yield "operators", f"{', '.join(operators)}: {state}"
    memory = predict(run.config, run.shape, run.ds_config, run.world_size)
    parts = ", ".join(f"{name} {gigabytes(size)}" for name, size in memory.device.items() if size)
    yield "memory", f"{gigabytes(memory.peak_bytes)} of tensors per rank at the peak of a step: {parts}"
    if run.device == "cuda":
        gpu = smallest_gpu()
        has = "" if gpu is None or not is_local(hosts) else f"; {gpu[0]} has {gigabytes(gpu[1])}"
        needed = load_overhead().total(memory.peak_bytes, run.world_size)
        yield "", f"{gigabytes(needed)} per GPU with what libraries and the allocator take{has}"
    if memory.host_bytes or memory.nvme_bytes:
        host, nvme = gigabytes(memory.host_bytes), gigabytes(memory.nvme_bytes)
        yield "", f"offloaded, per rank: {host} to the host, {nvme} to NVMe"
    yield "disk", f"{gigabytes(memory.checkpoint_bytes)} for each checkpoint, and its export"


def _data(config: RunConfig) -> Iterator[tuple[str, str]]:
    """What was found under the names of the data."""
    datasets = open_datasets(config, recorded_pins(run_path(config)), began := began_data(config))
    whole = sum(dataset.weight for dataset in datasets)
    for place, dataset in enumerate(datasets):
        share = f", {dataset.weight / whole:.0%} of the rows" if len(datasets) > 1 else ""
        yield "" if place else "data", f"{dataset.name}: {_size(dataset.shards)}{share}"
    yield "", f"to evaluate on: {_size(validation_shards(config, began))}"
    yield "tokenizer", config.tokenizer


def _size(shards: Sequence[Shard]) -> str:
    plural = "s" * (len(shards) != 1)
    return f"{len(shards):,} shard{plural}, {size_text(sum(shard.bytes for shard in shards))}"


def _fields(config: RunConfig, asked: RunConfig, origins: Mapping[str, str]) -> Iterator[str]:
    """What is not at its default a line each, with its source; then the others."""
    rows, defaults = [], []
    for name in FIELDS:
        value, before = getattr(config, name), getattr(asked, name)
        if value != before:
            rows.append((name, shown_value(value), f"decided here; {origins[name]}: {shown_value(before)}"))
        elif origins[name] != "default":
            rows.append((name, shown_value(value), origins[name]))
        else:
            defaults.append(f"{name} {shown_value(value)}")
    widths = [max((len(row[column]) for row in rows), default=0) for column in (0, 1)]
    yield from (f"  {name:{widths[0]}}  {value:{widths[1]}}  {source}" for name, value, source in rows)
    yield _filled(f"at their defaults: {', '.join(defaults)}", "  ", "  ")


def _filled(text: str, first: str, others: str) -> str:
    """A text in lines that begin so; paths in it stay whole, to be copied."""
    return textwrap.fill(
        text, WIDTH, initial_indent=first, subsequent_indent=others, break_on_hyphens=False, break_long_words=False
    )


def _rows(config: RunConfig) -> Iterator[str]:
    """The first rows, decoded and each cut after some lines; of a run that resumes how to see them."""
    run = run_path(config)
    if finished_checkpoint(config) is not None:
        yield "  none: it has finished"
        return
    if continued_from(config) is not None:
        # A lane's state at a row is known by reading up to it, which may take long.
        checkpoint = (
            newest_checkpoint(run / "checkpoints") if config.resume == "auto" else Checkpoint(Path(config.resume))
        )
        assert checkpoint is not None
        try:
            first = int(checkpoint.read_json(DATA)["rows"])
        except (OSError, ValueError, KeyError, TypeError):
            yield f"  not known: {checkpoint} is damaged, and the ranks look for an older checkpoint"
            return
        yield f"  those from row {first:,} on; to see them:"
        yield f"  {pasteable('data', 'inspect', checkpoint.run, '--start-row', first)}"
        return
    reader = RowReader(config, "train", recorded_pins(run), began_data(config), order_version_of(run, config.resume))
    printer = RowPrinter(reader, width=WIDTH)
    for row in reader.rows(0, FIRST_ROWS):
        lines = printer.row(row).rstrip("\n").splitlines()
        for line in lines[:LINES_OF_A_ROW]:
            yield line if len(line) <= WIDTH else f"{line[: WIDTH - 1]}…"
        if len(lines) > LINES_OF_A_ROW:
            yield f"… {len(lines) - LINES_OF_A_ROW} more lines of this row"
        yield ""
    yield printer.summary()
