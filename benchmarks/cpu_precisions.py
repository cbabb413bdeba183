"""A training step in fp32 and in bf16 on this CPU, step after step in turns: demo shape, one rank, DeepSpeed's engine.

python benchmarks/cpu_precisions.py [--like-avx2] [--scalar-steps 3]

With ``--like-avx2`` a newer CPU behaves like one with AVX2 alone. ``--scalar-steps`` times some steps with the scalar
16-bit products that PyTorch falls to on such a CPU, before they are replaced. All engines train on the same rows.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

from record import record_parser, write_record

from codeparrot_ds.config.run_config import PRESETS, RunConfig

CONFIGS = {"fp32": "zero2_fp32", "bf16": "zero2"}
VOCAB_SIZE = 8192
LIKE_AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
RANK = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


def main() -> None:
    parser = record_parser(__doc__, name="cpu-precisions")
    parser.add_argument("--like-avx2", action="store_true", help="leave this CPU its AVX2 instructions alone")
    parser.add_argument("--steps", type=int, default=15, help="of each precision, after one that is not counted")
    parser.add_argument("--scalar-steps", type=int, default=0, help="bf16 steps before its products are replaced")
    parser.add_argument("--measure", action="store_true", help="used by this script itself")
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.steps, options.scalar_steps)), flush=True)
        os._exit(0)
    environment = os.environ | RANK | {"DS_ACCELERATOR": "cpu"} | (LIKE_AVX2 if options.like_avx2 else {})
    command = [sys.executable, __file__, *sys.argv[1:], "--measure"]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    raw = json.loads(answer.stdout.splitlines()[-1])
    title = "Precisions on a CPU" + (" with AVX2 alone (imitated)" if options.like_avx2 else "")
    folder = write_record(options.name, title=title, text=report(raw), raw=raw, out=options.out)
    print((folder / "README.md").read_text())


def measure(steps: int, scalar_steps: int) -> dict[str, Any]:
    """Trains the engines in turns; seconds of each step and losses by name, and whether products were replaced."""
    import torch

    from codeparrot_ds.cpu import cpu_precisions
    from codeparrot_ds.ds_config.file import open_ds_config
    from codeparrot_ds.ds_config.resolve import resolve
    from codeparrot_ds.engine.engine import create_engine, keep_freed_pages
    from codeparrot_ds.engine.operators import build_operators
    from codeparrot_ds.engine.ranks import join_ranks
    from codeparrot_ds.model.gpt2 import build_model
    from codeparrot_ds.model.products import multiply_in_fp32_where_needed
    from codeparrot_ds.model.shapes import find_shape

    keep_freed_pages()
    join_ranks()
    preset = RunConfig(**PRESETS["demo"])
    config = RunConfig(**PRESETS["demo"] | {"global_batch_size": preset.micro_batch_rows})
    shape = find_shape(config.model, vocab_size=VOCAB_SIZE, seq_length=config.seq_length)

    def engine(name: str) -> Any:
        ds_config = resolve(open_ds_config(name), config, world_size=1, model_hidden_size=shape.n_embd).config
        build_operators(ds_config, "cpu")
        return create_engine(build_model(shape, eos_token_id=0, seed=1), ds_config, config)

    engines = {precision: engine(name) for precision, name in CONFIGS.items()}
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randint(VOCAB_SIZE, (8, config.seq_length), generator=generator) for _ in range(steps + 1)]

    def step(engine: Any, ids: torch.Tensor) -> dict[str, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        return {"seconds": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "loss": loss.item()}

    scalar = engine(CONFIGS["bf16"])
    rows: dict[str, list[dict[str, float]]] = {
        "bf16, scalar": [step(scalar, batches[number]) for number in range(scalar_steps)]
    }
    replaced = bool(multiply_in_fp32_where_needed(torch.bfloat16))
    for number, ids in enumerate(batches):
        for precision in CONFIGS if number % 2 else reversed(CONFIGS):
            rows.setdefault(precision, []).append(step(engines[precision], ids))
    return {
        "cpu_precisions": cpu_precisions(),
        "products_replaced": replaced,
        "tokens_a_step": batches[0].numel(),
        "threads": torch.get_num_threads(),
        "steps": {name: found for name, found in rows.items() if found},
    }


def report(raw: dict[str, Any]) -> str:
    """The table: medians after the first step, and ratios to fp32 step by step."""
    reference = raw["steps"]["fp32"][1:]
    lines = [
        f"This CPU trains fast in: {', '.join(raw['cpu_precisions'])}. 16-bit products are "
        f"{'replaced by fp32 ones' if raw['products_replaced'] else 'its own'}; {raw['threads']} thread(s), "
        f"{raw['tokens_a_step']:,} tokens per step.",
        "",
        "| precision | steps | tokens/s | CPU s per step | speed against fp32 (wall, CPU) | largest loss difference |",
        "|---|---|---|---|---|---|",
    ]
    for name, rows in raw["steps"].items():
        rows = rows[1:] or rows
        seconds, cpu = (statistics.median(row[key] for row in rows) for key in ("seconds", "cpu"))
        ratios = [
            statistics.median(other[key] / row[key] for row, other in zip(rows, reference, strict=False))
            for key in ("seconds", "cpu")
        ]
        losses = [
            abs(row["loss"] - other["loss"])
            for row, other in zip(raw["steps"][name], raw["steps"]["fp32"], strict=False)
        ]
        lines.append(
            f"| {name} | {len(rows)} | {raw['tokens_a_step'] / seconds:,.0f} | {cpu:.2f} | {ratios[0]:.2f}x, "
            f"{ratios[1]:.2f}x | {max(losses):.1e} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
