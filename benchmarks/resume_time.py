"""Resuming at 1%, 50% and 99% of an epoch: from the command to the first step, run after run in turns, demo shape.

python benchmarks/resume_time.py --data CORPUS --tokenizer TOKENIZER

An engine trains two steps and saves; ``checkpoint import`` makes three runs of that, whose data continues at three
places of the first epoch. Each is resumed, a fresh copy each time.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from record import REPOSITORY, record_parser, write_record

from codeparrot_ds.config.run_config import PRESETS, RunConfig

SHARES = (0.01, 0.5, 0.99)
DATA_PARTS = ("data", "checkpoint", "loader and trackers", "first step")


def main() -> None:
    parser = record_parser(__doc__, name="resume-time-cpu")
    parser.add_argument("--data", required=True, help="corpus folder")
    parser.add_argument("--tokenizer", required=True, help="tokenizer folder")
    parser.add_argument("--num-gpus", type=int, default=1, help="ranks")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--engine", type=Path, help="used by this script itself: where to save an engine")
    options = parser.parse_args()
    if options.engine:
        save_engine(options)
        return
    rows = rows_of_an_epoch(options)
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        command = [sys.executable, __file__, *sys.argv[1:], "--engine", str(base / "engine")]
        rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29533"}
        subprocess.run(command, check=True, capture_output=True, env=os.environ | rank | {"DS_ACCELERATOR": "cpu"})
        config = run_config(options)
        for share in SHARES:
            step = int(share * rows) // config.global_batch_size
            arguments = ["checkpoint", "import", str(base / "engine"), str(base / f"at-{share}")]
            arguments += ["--first-row", str(step * config.global_batch_size), *options_of(config)]
            subprocess.run([sys.executable, "-m", "codeparrot_ds", *arguments], check=True, cwd=REPOSITORY)
        laps: dict[float, list[dict[str, float]]] = {share: [] for share in SHARES}
        for number in range(options.rounds + 1):
            for share in SHARES if number % 2 else reversed(SHARES):
                startup = resume(base / f"at-{share}", base / "again", options.num_gpus)
                if number:  # the first one warms the disk's cache
                    laps[share].append(startup)
                    print(f"{share:.0%}: {sum(startup.values()):.2f} s", flush=True)
    folder = write_record(
        options.name,
        title="Resuming at three places of an epoch",
        text=report(rows, laps, options.num_gpus),
        raw={"rows_of_an_epoch": rows, "startup_seconds": laps},
        out=options.out,
    )
    print((folder / "README.md").read_text())


def run_config(options: argparse.Namespace) -> RunConfig:
    """The demo's, which ends two steps after the checkpoint."""
    changes = {"data": options.data, "tokenizer": options.tokenizer, "hub": "off", "wandb": "off"}
    return RunConfig(**PRESETS["demo"] | changes | {"max_train_steps": 4, "num_warmup_steps": 1, "max_eval_steps": 1})


def options_of(config: RunConfig) -> list[str]:
    """What differs from the defaults, as options of the command line."""
    usual = RunConfig()
    changed = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != getattr(usual, field.name)
    }
    return [word for name, value in changed.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def save_engine(options: argparse.Namespace) -> None:
    """Trains two steps of the demo's model on noise and saves the engine as DeepSpeed does."""
    import torch

    from codeparrot_ds.data.encoder import load_encoder
    from codeparrot_ds.ds_config.file import open_ds_config
    from codeparrot_ds.ds_config.resolve import resolve_ds_config
    from codeparrot_ds.engine.engine import create_engine
    from codeparrot_ds.engine.operators import build_operators
    from codeparrot_ds.engine.ranks import join_ranks
    from codeparrot_ds.model.gpt2 import build_model
    from codeparrot_ds.model.shapes import find_shape
    from codeparrot_ds.supervision.process_end import end_process

    config, encoder = run_config(options), load_encoder(options.tokenizer)
    shape = find_shape(config.model, vocab_size=encoder.vocab_size, seq_length=config.seq_length)
    raw = open_ds_config(config.deepspeed).config
    ds_config = resolve_ds_config(raw, config, world_size=1, model_hidden_size=shape.n_embd)
    join_ranks()
    build_operators(ds_config, "cpu")
    engine = create_engine(build_model(shape, eos_token_id=encoder.eos_token_id, seed=1), ds_config, config)
    for _ in range(2 * config.gradient_accumulation_steps(1)):
        ids = torch.randint(encoder.vocab_size, (config.micro_batch_rows, config.seq_length))
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
    engine.save_checkpoint(str(options.engine))
    end_process(0)


def rows_of_an_epoch(options: argparse.Namespace) -> int:
    """Rows of the run before one of its lanes begins anew."""
    from codeparrot_ds.data.encoder import load_encoder

    sys.path[:0] = [str(REPOSITORY)]
    from tests.data.streams import RowStream, open_stream

    config = run_config(options)
    stream = open_stream(config, load_encoder(config.tokenizer))
    return next(number for number, row in enumerate(RowStream(stream)) if row.states[0].epoch)


def resume(run: Path, folder: Path, ranks: int) -> dict[str, float]:
    """Goes on with a copy of a run; seconds of its parts until the first step."""
    shutil.rmtree(folder, ignore_errors=True)
    copy = shutil.copytree(run, folder / run.name)
    command = [sys.executable, "-m", "codeparrot_ds", "train", "--config", str(copy / "config.yaml")]
    command += ["--output-dir", str(folder), "--num-gpus", str(ranks)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if done.returncode or "resumed from step 2" not in done.stdout + done.stderr:
        sys.exit((done.stdout + done.stderr)[-3000:])
    seconds: dict[str, float] = json.loads((copy / "run.json").read_text())["starts"][-1]["startup_seconds"]
    return seconds


def report(rows: int, laps: dict[float, list[dict[str, float]]], ranks: int) -> str:
    """Medians and spread of each place, all together and of the parts that the data has to do with."""
    lines = ["| at | command to first step, s | of which data, checkpoint, loader and first step, s |", "|---|---|---|"]
    for share, runs in laps.items():
        cells = [f"{share:.0%} of {rows} rows"]
        for seconds in (
            [sum(one.values()) for one in runs],
            [sum(one.get(part, 0.0) for part in DATA_PARTS) for one in runs],
        ):
            cells.append(f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})")
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"Medians, least and most of {len(runs)} rounds; {ranks} rank(s) on {os.cpu_count()} cores."]
    everything = [one for runs in laps.values() for one in runs]
    parts = (f"{name} {statistics.median(one[name] for one in everything):.2f}" for name in everything[0])
    lines += ["", f"The parts, medians of all, s: {', '.join(parts)}."]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
