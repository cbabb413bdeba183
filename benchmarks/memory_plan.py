"""The formulas of a memory plan against DeepSpeed's own engine, over the catalogue.

python benchmarks/memory_plan.py --num-workers 2

Traces every shipped config for both shapes, three numbers of ranks and two micro-batches, and compares the peaks. It
takes hours on two cores; what is done lies in --state and is not traced again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from record import write_record

from codeparrot_ds.config.run_config import RunConfig
from codeparrot_ds.ds_config.file import find_ds_config, open_ds_config, read_ds_config, shipped_names
from codeparrot_ds.ds_config.resolve import resolve_ds_config
from codeparrot_ds.errors import UserError
from codeparrot_ds.memory.formulas import quick_memories
from codeparrot_ds.memory.trace import trace_all
from codeparrot_ds.memory.workload import Workload
from codeparrot_ds.model.shapes import find_shape

SEQ_LENGTH, VOCAB_SIZE = 1024, 32_768
# Micro-batch and accumulation: a micro-batch that is added to others, and one that is a whole step.
BATCHES = ((1, 4), (4, 1))
SAVED_AT_ONCE = 16


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["gpt2", "gpt2-xl"])
    parser.add_argument("--configs", nargs="+", default=shipped_names())
    parser.add_argument("--world-sizes", nargs="+", type=int, default=[2, 8, 64])
    parser.add_argument("--num-workers", type=int, default=2)
    parser.add_argument("--state", type=Path, default=Path("/tmp/memory-plan.jsonl"), help="what is traced already")
    parser.add_argument("--only-record", action="store_true", help="trace nothing; record what is there")
    parser.add_argument("--out", type=Path, help="folder of the record")
    options = parser.parse_args()

    points = list(_points(options.models, options.configs, options.world_sizes))
    lines = options.state.read_text().splitlines() if options.state.is_file() else []
    done = {json.dumps(json.loads(line)["point"]): json.loads(line)["traced"] for line in lines}
    todo = [] if options.only_record else [point for point in points if json.dumps(point) not in done]
    random.Random(0).shuffle(todo)  # what is done at any time is a fair sample
    for start in range(0, len(todo), SAVED_AT_ONCE):
        batch = todo[start : start + SAVED_AT_ONCE]
        results = trace_all([workload(**point) for point in batch], options.num_workers)
        with options.state.open("a") as file:
            for point, result in zip(batch, results, strict=True):
                traced = str(result) if isinstance(result, UserError) else dataclasses.asdict(result)
                file.write(json.dumps({"point": point, "traced": traced}) + "\n")
                done[json.dumps(point)] = traced
        print(f"{start + len(batch)} of {len(todo)}", flush=True)
    rows = [compare(point, done[json.dumps(point)]) for point in points if json.dumps(point) in done]
    text = f"{_table(rows)}\n\n{len(points) - len(rows)} of {len(points)} points are not traced yet."
    folder = write_record(
        "memory-plan", title="Memory formulas against the traced engine", text=text, raw=rows, out=options.out
    )
    print(folder)


def _points(models: list[str], configs: list[str], world_sizes: list[int]) -> Iterator[dict[str, Any]]:
    for model in models:
        for micro_batch_size, accumulation_steps in BATCHES:
            for world_size in world_sizes:
                for config in configs:
                    raw = open_ds_config(config).config
                    if world_size % int(raw["zero_optimization"].get("zero_hpz_partition_size", 1)) == 0:
                        yield {
                            "model": model,
                            "config": config,
                            "world_size": world_size,
                            "micro_batch_size": micro_batch_size,
                            "accumulation_steps": accumulation_steps,
                        }


def workload(*, model: str, config: str, world_size: int, micro_batch_size: int, accumulation_steps: int) -> Workload:
    """A workload of the shipped config `config`."""
    run = RunConfig(
        model=model,
        seq_length=SEQ_LENGTH,
        global_batch_size=micro_batch_size * accumulation_steps * world_size,
        micro_batch_size=micro_batch_size,
    )
    shape = find_shape(model, vocab_size=VOCAB_SIZE, seq_length=SEQ_LENGTH)
    path = find_ds_config(config)
    ds_config = resolve_ds_config(
        read_ds_config(path).config,
        run,
        world_size=world_size,
        model_hidden_size=shape.n_embd,
        nvme_path="nvme",
        source=path,
    )
    return Workload(shape=shape, ds_config=ds_config, world_size=world_size, seq_length=SEQ_LENGTH)


def compare(point: dict[str, Any], traced: dict[str, Any] | str) -> dict[str, Any]:
    """One row of the record: the point, what was traced, and how far the formulas are off."""
    if isinstance(traced, str):
        return {"point": point, "error": traced}
    phases = {name: traced["phases"][name] for name in ("forward_backward", "step")}
    (quick,), peak = quick_memories([workload(**point)]), max(phases.values())
    return {
        "point": point,
        "traced": traced,
        "quick_peak_bytes": quick.peak_bytes,
        "peak_error": quick.peak_bytes / peak - 1,
        "resident_error": quick.resident_bytes / traced["resident_bytes"] - 1,
        "host_error": quick.host_bytes / traced["host_bytes"] - 1 if traced["host_bytes"] > 2**20 else 0.0,
    }


def _table(rows: list[dict[str, Any]]) -> str:
    lines = ["| model | config | points | peak, largest error | median | host, largest |", "|---|---|---|---|---|---|"]
    keys = list(dict.fromkeys((row["point"]["model"], row["point"]["config"]) for row in rows))
    for model, config in keys:
        mine = [row for row in rows if (row["point"]["model"], row["point"]["config"]) == (model, config)]
        known = [row for row in mine if "error" not in row]
        if not known:
            lines.append(f"| {model} | `{config}` | not traced: {mine[0]['error'].splitlines()[0][:120]} | | | |")
            continue
        worst = max((row["peak_error"] for row in known), key=abs)
        median = statistics.median(abs(row["peak_error"]) for row in known)
        host = max((row["host_error"] for row in known), key=abs)
        lines.append(f"| {model} | `{config}` | {len(known)} | {worst:+.2%} | {median:.2%} | {host:+.1%} |")
    errors = [abs(row["peak_error"]) for row in rows if "error" not in row]
    if errors:
        within = sum(error <= 0.03 for error in errors)
        lines += ["", f"{len(errors)} points: {within} within 3%, the largest error is {max(errors):.2%}."]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
