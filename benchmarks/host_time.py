"""CPU time of the host for a step of 48 layers: what a GPU's defaults cost it, and what those of a CPU would.

python benchmarks/host_time.py

A GPU waits where its host is slower. The real engine and the real model run on the pretended accelerator
(``memory/fake_device.py``), whose tensors have no memory: what is left is the host's work, that of tensors without
memory among it. Two processes, one for each config, take turns. Nothing is trained, and no time of a GPU is measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from record import REPOSITORY, record_parser, write_record

from codeparrot_ds.config.run_config import PRESETS, RunConfig
from codeparrot_ds.ds_config.file import name_in, open_ds_config
from codeparrot_ds.ds_config.resolve import resolve
from codeparrot_ds.memory.choice import choices_of
from codeparrot_ds.memory.device import Overhead
from codeparrot_ds.memory.plan import VOCAB_SIZE, PlanRequest, make_plan
from codeparrot_ds.model.shapes import find_shape

H200_BYTES = 143_771 * 2**20
ACCUMULATION = 4  # of a measured step: the last micro-batch has what comes once per step


def main() -> None:
    parser = record_parser(__doc__, name="host-time-cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--config", help=argparse.SUPPRESS)  # of a process that measures
    parser.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)  # as before 0.2.0: neither lever
    options = parser.parse_args()
    if options.config is not None:
        _measure(options.config, options.layers, options.plain)
        return
    usual = RunConfig(**PRESETS["large"]).on_cpu()
    request = PlanRequest(model="large", device_memory=H200_BYTES)
    (choice,) = choices_of(make_plan(request, Overhead()), "bf16")
    sizes = {
        name_in(usual.deepspeed, "bf16"): usual.micro_batch_rows,
        choice["config"]: choice["micro_batch_size"],
    }
    times = _in_turn(list(sizes), options.rounds, options.layers)
    rows = [_row(name, size, times[name], usual.global_batch_size) for name, size in sizes.items()]
    text, ratios = _described(rows, options.layers, options.rounds)
    folder = write_record(
        options.name,
        title=f"Host time of a step of {options.layers} layers: a CPU's defaults and those that an H200 is given",
        text=text,
        raw={"rows": rows, "ratios": ratios, "times": times},
        out=options.out,
    )
    print(text)
    print(folder)


def _described(rows: list[dict[str, Any]], layers: int, rounds: int) -> tuple[str, dict[str, float]]:
    """The record's text, and the ratios of the second row to the first."""
    before, after = rows
    ratios = {key: after[key] / before[key] for key in ("seconds_per_micro_step", "mean_seconds", "seconds_per_step")}
    lines = ["| config | micro-batch | CPU ms per micro-step | the last with the step, ms | CPU s per step |"]
    lines += ["|---|---|---|---|---|"]
    lines += [
        f"| `{row['config']}` | {row['micro_batch_size']} | {1e3 * row['seconds_per_micro_step']:.0f} "
        f"({1e3 * row['range'][0]:.0f} to {1e3 * row['range'][1]:.0f}) | {1e3 * row['seconds_of_last']:.0f} "
        f"| {row['seconds_per_step']:.1f} |"
        for row in rows
    ]
    lines += [
        "",
        f"{layers} layers, one rank, bf16, the first with neither lean step nor fused loss, as before 0.2.0; medians "
        f"of {rounds} rounds, in which the two take turns with a step of "
        f"{ACCUMULATION} micro-batches. `{after['config']}` takes {ratios['seconds_per_micro_step']:.2f} of the host's "
        f"time per micro-step ({ratios['mean_seconds']:.2f} where the last of a step, with what ZeRO and Adam do once, "
        f"is shared out), and {ratios['seconds_per_step']:.3f} per step of the same rows. Tensors without memory cost "
        "the host more than a GPU's do: read the ratios. No time of a GPU is in them.",
    ]
    return "\n".join(lines), ratios


def _in_turn(names: list[str], rounds: int, layers: int) -> dict[str, list[list[float]]]:
    """Seconds of CPU of each micro-batch of every step, of each config; the processes take turns."""
    command = [sys.executable, str(Path(__file__)), "--layers", str(layers), "--config"]
    pipe: Any = subprocess.PIPE
    workers = {
        name: subprocess.Popen(
            [*command, name, *(["--plain"] if name == names[0] else [])],
            stdin=pipe,
            stdout=pipe,
            text=True,
            cwd=REPOSITORY,
        )
        for name in names
    }
    times: dict[str, list[list[float]]] = {name: [] for name in names}
    for turn in range(rounds + 1):  # the first warms up
        for name, worker in workers.items():
            assert worker.stdin is not None and worker.stdout is not None
            worker.stdin.write("go\n")
            worker.stdin.flush()
            answer = worker.stdout.readline()
            if not answer:
                raise SystemExit(f"{name} failed with exit code {worker.wait()}")
            times[name] += [json.loads(answer)] if turn else []
    for worker in workers.values():
        worker.communicate()
    return times


def _row(name: str, size: int, steps: list[list[float]], global_batch_size: int) -> dict[str, Any]:
    """A config's times for a step of the preset's rows."""
    usual = [seconds for step in steps for seconds in step[:-1]]
    last = statistics.median(step[-1] for step in steps)
    micro, number = statistics.median(usual), global_batch_size // size
    whole = (number - 1) * micro + last
    return {
        "config": name,
        "micro_batch_size": size,
        "micro_steps": number,
        "seconds_per_micro_step": micro,
        "range": [min(usual), max(usual)],
        "seconds_of_last": last,
        "mean_seconds": whole / number,
        "seconds_per_step": whole,
    }


def _measure(name: str, layers: int, plain: bool) -> None:
    """A process of one config: for each line of stdin a step, whose times go to stdout."""
    stdout, sys.stdout = sys.stdout, sys.stderr  # which DeepSpeed logs to
    import torch

    from codeparrot_ds.engine.engine import create_engine
    from codeparrot_ds.memory import fake_device
    from codeparrot_ds.memory.storage_counter import StorageCounter
    from codeparrot_ds.model.gpt2 import build_model

    torch.set_num_threads(1)
    device = fake_device.pretend_accelerator()
    fake_device.join_fake_ranks(1)
    fake_device.use_fake_operators()
    fake_device.convert_modules_in_place()
    fake_device.make_everything_finite()
    fake_device.use_fused_attention()
    config = RunConfig(**PRESETS["large"] | {"micro_batch_size": 1, "global_batch_size": ACCUMULATION})
    shape = find_shape(config.model, vocab_size=VOCAB_SIZE, seq_length=config.seq_length)
    shape = dataclasses.replace(shape, n_layer=layers)
    ds_config = resolve(open_ds_config(name), config, world_size=1, model_hidden_size=shape.n_embd).config
    with fake_device.FakeTensors():
        model = build_model(shape, fused_loss=not plain, eos_token_id=0, seed=0, dropout=0.0, device=device)
        engine = create_engine(model, ds_config, RunConfig(lean_step="off" if plain else "auto"), traced=True)
        answers = StorageCounter(fake=True)
        ids = torch.zeros(1, config.seq_length, dtype=torch.long, device=device)
        for _ in sys.stdin:
            print(json.dumps(_step(engine, ids, answers)), file=stdout, flush=True)


def _step(engine: Any, ids: Any, answers: Any) -> list[float]:
    """CPU seconds of each micro-batch of an optimizer step; ``answers`` has the numbers that the step asks for."""
    times = []
    for _ in range(ACCUMULATION):
        begun = time.process_time()
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        with answers:
            engine.step()
        times.append(time.process_time() - begun)
    return times


if __name__ == "__main__":
    main()
