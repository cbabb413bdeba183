"""The counted step: launches, bytes and waits of the host in one optimizer step, and what a GPU could make of it.

    python benchmarks/counted_step.py --models gpt2 --stages 1 --micro-batch-size 64

No GPU is needed: DeepSpeed's engine, the model and the training loop are the real ones, on an accelerator that is only
pretended (``codeparrot_ds/telemetry/counted_step.py`` says what counts). ``--layers 2 3`` counts models of so many
layers and continues the line to the whole model: a tenth of the work for the 1.5B model, within a percent of the
launches (buckets fill unevenly).
``--operators`` adds which operators move the bytes, ``--json`` prints figures for programs.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import os
import sys
from types import SimpleNamespace
from typing import Any

# Before torch and DeepSpeed look at them.
os.environ |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}

import torch

from codeparrot_ds.config.run_config import RunConfig
from codeparrot_ds.ds_config.facts import steps_lean
from codeparrot_ds.ds_config.file import find_ds_config, read_ds_config
from codeparrot_ds.ds_config.resolve import resolve_ds_config
from codeparrot_ds.memory.workload import Workload
from codeparrot_ds.model.shapes import KNOWN_SHAPES, find_shape, num_parameters
from codeparrot_ds.telemetry.counted_step import GPUS, PARTS, Step, StepCounter, count_steps
from codeparrot_ds.training.bad_steps import BadSteps
from codeparrot_ds.training.loop import Observer, accumulate_gradients

SEQ_LENGTH, VOCAB_SIZE = 1024, 32_768
MICRO_BATCH_SIZES = {"gpt2": 64, "gpt2-xl": 16}


def workload(
    model: str,
    config: str,
    micro_batch_size: int,
    accumulation_steps: int,
    layers: int | None,
    *,
    lean: str = "auto",
    loss: str = "fused",
) -> Workload:
    """A step of a shipped config on one rank, of the model or of one with another number of layers."""
    run = RunConfig(
        model=model, seq_length=SEQ_LENGTH, micro_batch_size=micro_batch_size,
        global_batch_size=micro_batch_size * accumulation_steps,
    )  # fmt: skip
    shape = find_shape(model, vocab_size=VOCAB_SIZE, seq_length=SEQ_LENGTH)
    shape = shape if layers is None else dataclasses.replace(shape, n_layer=layers)
    path = find_ds_config(config)
    ds_config = resolve_ds_config(
        read_ds_config(path).config, run, world_size=1, model_hidden_size=shape.n_embd, source=path
    )
    return Workload(
        shape=shape,
        ds_config=ds_config,
        world_size=1,
        seq_length=SEQ_LENGTH,
        chunked_loss=loss == "chunked",
        fused_loss=loss == "fused",
        lean_step=steps_lean(lean, ds_config, "cuda"),
    )


class Parts(Observer):
    """Tells the counter what runs."""

    def __init__(self, counter: StepCounter) -> None:
        self.counter = counter

    def enter(self, phase: str, *, batch: int) -> None:
        self.counter.part = {"data": "forward", "step": "engine"}.get(phase, phase)


def trainer(work: Workload, engine: Any, counter: StepCounter) -> Any:
    """A step of the training loop, with its watch over bad steps."""
    ids = torch.zeros(work.micro_batch_size, SEQ_LENGTH, dtype=torch.long, device=counter.device)
    watch = BadSteps(
        engine=engine, ranks=None, stream=None, loader=SimpleNamespace(places=list), global_batch_size=1,
        start_step=0, start_row=0, limit=1, say=print,
    )  # fmt: skip
    session = SimpleNamespace(
        bad_steps=watch,
        accumulation_steps=work.accumulation_steps,
        meter=SimpleNamespace(forward=contextlib.nullcontext),
        model_inputs=lambda batch: {"input_ids": batch, "labels": batch},
    )

    def step() -> None:
        counter.part = "forward"
        accumulate_gradients(engine, iter([ids] * work.accumulation_steps), session, Parts(counter))
        counter.part = "engine"
        watch.check(1)

    return step


def figures_of(work: Workload, step: Step) -> dict[str, Any]:
    """What is counted of a step, and the size of what it trains."""
    return step.summary() | {
        "parameters": num_parameters(work.shape),
        "tokens": work.micro_batch_size * work.accumulation_steps * SEQ_LENGTH,
        "operators": step.by_operator(),
        "where": [list(wait) for wait in step.waits],
    }


def count(works: list[Workload]) -> list[dict[str, Any]]:
    """The figures of a step of each workload; in a process of its own, since counting changes it for good."""
    gc.freeze()  # DeepSpeed collects garbage again and again: it need not look through what was imported
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(2, 1)  # DeepSpeed prints
        figures = [figures_of(work, step) for work, step in zip(works, count_steps(works, trainer), strict=True)]
        with os.fdopen(writing, "w") as file:
            file.write(json.dumps(figures))
        # Autograd's threads for a device that is not there would keep the interpreter from ending.
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as file:
        text = file.read()
    _, status = os.waitpid(child, 0)
    if not text:
        sys.exit(f"counting ended with status {os.waitstatus_to_exitcode(status)}")
    return json.loads(text)


def continued(few: Any, more: Any, ahead: float) -> Any:
    """Figures on the line through those of two numbers of layers, so many times their distance from the first."""
    if isinstance(few, dict):
        return {key: continued(value, more[key], ahead) for key, value in few.items()}
    if isinstance(few, int | float):
        value = few + (more - few) * ahead
        return round(value) if isinstance(few, int) else value
    if few and len(few[0]) == 4:  # operators
        there = {tuple(row[:2]): row for row in more}
        return [[*row[:2], *(continued(row[i], there[tuple(row[:2])][i], ahead) for i in (2, 3))] for row in few]
    return more


def table(rows: list[dict[str, Any]], gpu: str) -> str:
    """The rows as Markdown."""
    lines = [
        "| model | config | micro-batch | launches | forward | backward | engine | GB | forward | backward | engine | "
        f"engine, bytes per parameter | waits | roofline {gpu}, ms | tokens/s |",
        "|---|---|---|" + "---:|" * 12,
    ]
    for row in rows:
        figures = row["figures"]
        parts = figures["parts"]
        seconds = figures["roofline_seconds"][gpu]
        cells = [
            row["model"], row["config"], f"{row['micro_batch_size']} x {row['accumulation_steps']}",
            f"{figures['launches']:,}", *(f"{parts[part]['launches']:,}" for part in PARTS),
            f"{figures['bytes'] / 1e9:.1f}", *(f"{parts[part]['bytes'] / 1e9:.1f}" for part in PARTS),
            f"{parts['engine']['bytes'] / figures['parameters']:.1f}", f"{figures['waits']}",
            f"{seconds * 1e3:.1f}", f"{figures['tokens'] / seconds:,.0f}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(MICRO_BATCH_SIZES), choices=list(MICRO_BATCH_SIZES))
    parser.add_argument("--configs", nargs="+", default=["zero0", "zero1", "zero2", "zero3"], help="shipped files")
    parser.add_argument("--micro-batch-size", type=int, help="of all (default: 64 and 16)")
    parser.add_argument("--accumulation-steps", nargs="+", type=int, default=[1])
    parser.add_argument("--lean-step", default="auto", choices=("auto", "on", "off"), help="as the run config's")
    parser.add_argument("--loss", default="fused", choices=("fused", "plain", "chunked"))
    parser.add_argument("--layers", nargs=2, type=int, default=[], help="count models of so many layers")
    parser.add_argument("--gpu", default="H200", choices=list(GPUS))
    parser.add_argument("--operators", type=int, default=0, help="print so many operators of each step")
    parser.add_argument("--json", action="store_true", help="print figures instead of the table")
    options = parser.parse_args()

    points = [
        (model, config, options.micro_batch_size or MICRO_BATCH_SIZES[model], steps)
        for model in options.models
        for config in options.configs
        for steps in options.accumulation_steps
    ]
    works = [
        workload(*point, layers, lean=options.lean_step, loss=options.loss)
        for point in points
        for layers in options.layers or [None]
    ]
    counted = count(works)
    if options.layers:
        few, more = options.layers
        counted = [
            continued(*pair, (KNOWN_SHAPES[point[0]].n_layer - few) / (more - few))
            for point, pair in zip(points, zip(counted[::2], counted[1::2], strict=True), strict=True)
        ]
    rows = [
        {"model": model, "config": config, "micro_batch_size": size, "accumulation_steps": steps, "figures": figures}
        for (model, config, size, steps), figures in zip(points, counted, strict=True)
    ]
    for row in rows if options.operators else []:
        print(f"{row['model']} {row['config']}", file=sys.stderr)
        for operator in row["figures"]["operators"][: options.operators]:
            print("  {:10} {:45} {:6} {:8.2f} GB".format(*operator[:3], operator[3] / 1e9), file=sys.stderr)
        for part, where in row["figures"]["where"]:
            print(f"  {part:10} waits at {where}", file=sys.stderr)
    print(json.dumps(rows) if options.json else table(rows, options.gpu))


if __name__ == "__main__":
    main()
