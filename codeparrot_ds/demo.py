"""The whole story in minutes: the standard library's source becomes corpus, tokenizer, model, branch, report."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from codeparrot_ds.checkpoint.run_folder import new_run_name, recorded_outcome
from codeparrot_ds.config.arguments import options_of
from codeparrot_ds.config.launch_options import LaunchOptions
from codeparrot_ds.config.run_config import PRESETS, RunConfig
from codeparrot_ds.corpus.build import build_corpus
from codeparrot_ds.corpus.readers import standard_library_sources
from codeparrot_ds.corpus.tokenizer import train_tokenizer
from codeparrot_ds.errors import UserError
from codeparrot_ds.json_files import lines_of, parts_of, read_object
from codeparrot_ds.launch.start import front_door
from codeparrot_ds.metrics import read_row
from codeparrot_ds.shell import interrupted_by_sigterm, next_steps, pasteable
from codeparrot_ds.terminal import duration

VOCAB_SIZE = 8192
PROMPT = '''def area_of_rectangle(a: float, b: float):
    """Return the area of the rectangle."""'''


def run_demo(
    *,
    workdir: Path,
    max_train_steps: int | None = None,
    num_gpus: int | None = None,
    deepspeed: str | None = None,
    hub: str | None = None,
    overwrite: bool = False,
) -> int:
    """Runs corpus → tokenizer → training → branch → merge → completions → report in ``workdir``; returns the exit code.

    A second call keeps corpus and tokenizer and trains another run beside the first.

    Args:
        workdir: folder for everything; created.
        max_train_steps: optimizer steps, the preset's by default.
        num_gpus: ranks; one per GPU, or one on a CPU, by default.
        deepspeed: DeepSpeed JSON, the preset's by default.
        hub: place of the branch, a git repository beside the runs by default.
        overwrite: start afresh in a folder that holds a demo.
    """
    started = time.monotonic()
    _prepare(workdir, overwrite)
    corpus, tokenizer, runs = workdir / "corpus", workdir / "tokenizer", workdir / "runs"
    options = {"--num-gpus": num_gpus, "--deepspeed": deepspeed, "--hub": hub}
    given = [part for name, value in options.items() if value is not None for part in (name, value)]
    again = ["demo", "--workdir", workdir, *given]
    try:
        with interrupted_by_sigterm():
            _make_data(corpus, tokenizer)
    except KeyboardInterrupt:
        steps = [] if max_train_steps is None else ["--max-train-steps", max_train_steps]
        print(f"\nContinue with:\n  {pasteable(*again, *steps)}", flush=True)
        raise

    overrides = demo_schedule(max_train_steps) | {"deepspeed": deepspeed, "hub": hub}
    config = RunConfig(
        **{**PRESETS["demo"], **{key: value for key, value in overrides.items() if value is not None}},
        data=str(corpus),
        tokenizer=str(tokenizer),
        output_dir=str(runs),
        run_name=new_run_name(runs),
    )
    run = runs / str(config.run_name)
    _say(3, f"training: {config.max_train_steps} steps through the deepspeed launcher")
    typed = [
        "demo",
        *options_of(config, RunConfig(**PRESETS["demo"])),
        *([] if num_gpus is None else ["--num-gpus", str(num_gpus)]),
    ]
    code = front_door(config, LaunchOptions(num_gpus=num_gpus), typed=typed)
    if code != 0 or recorded_outcome(run).get("status") != "finished":
        return code  # the command that resumes it, where it was stopped, has been printed
    _finish(run, started, again=[*again, "--max-train-steps", 3 * config.max_train_steps])
    return 0


def _make_data(corpus: Path, tokenizer: Path) -> None:
    """Corpus and tokenizer, where they are not there yet."""
    _say(1, "corpus: the standard library's source, cleaned and split")
    card = _corpus(corpus)
    documents = {split: part["documents"] for split, part in card["splits"].items()}
    print(f"{documents['train']} files to train on, {documents['validation']} held out, in {corpus}")
    _say(2, f"tokenizer: byte-level BPE with {VOCAB_SIZE:,} tokens")
    print(f"{_tokenizer(corpus, tokenizer):.2f} characters per token, in {tokenizer}")


def demo_schedule(max_train_steps: int | None) -> dict[str, Any]:
    """The preset's schedule, on so many steps: one that is shorter warms up for less of them and saves at its end."""
    preset = RunConfig(**PRESETS["demo"])
    steps = max_train_steps or preset.max_train_steps
    return {
        "max_train_steps": steps,
        "num_warmup_steps": min(preset.num_warmup_steps, steps // 5),
        "save_checkpoint_steps": min(preset.save_checkpoint_steps, steps),
        "log_steps": min(preset.log_steps, steps),
    }


def _finish(run: Path, started: float, again: Sequence[object]) -> None:
    """All that comes after training; ``again`` is the command of a longer run."""
    from codeparrot_ds.evaluation.complete import complete_code, load_generator
    from codeparrot_ds.hub.commands import hub_publish
    from codeparrot_ds.hub.worker import read_destination
    from codeparrot_ds.model.products import multiply_in_fp32_where_needed
    from codeparrot_ds.report.run_report import write_report

    multiply_in_fp32_where_needed()
    _say(4, "branch: every checkpoint is a commit on the run's branch, now merged into main")
    print(hub_publish(run))
    _say(5, f"completions of: {PROMPT.splitlines()[0]}")
    complete_code(load_generator(run), PROMPT, max_length=96)
    report = write_report([run])
    first, last = _evaluations(run)
    repository = read_destination(run).repository
    _say(6, f"done in {duration(time.monotonic() - started)}")
    print(f"validation loss   {first['eval_loss']:.3f} -> {last['eval_loss']:.3f}")
    print(f"perplexity        {first['perplexity']:,.0f} -> {last['perplexity']:,.1f}")
    print(f"report            {report}")
    print(f"branch            {run.name} of {repository}   ({repository.how_to_get(run.name)})")
    print(f"logs              {run / 'log'}, {run / 'metrics.jsonl'}, {run / 'tensorboard'}, {run / 'wandb'}")
    print(
        next_steps(
            pasteable("complete", run, "import os"),
            pasteable("evaluate", run),
            f"{pasteable('runs', run.parent)}     # step, loss and state of each run",
            f"{pasteable('train', 'small', '--help')}     # the recipe's 111M model on your own corpus",
            f"{pasteable(*again)}     # a longer run beside this one",
        )
    )


def _prepare(workdir: Path, overwrite: bool) -> None:
    parts = [workdir / name for name in ("corpus", "tokenizer", "runs")]
    if workdir.is_file():
        raise UserError(f"--workdir {workdir} is a file: name a folder")
    if overwrite:
        for part in parts:
            if part.exists():
                shutil.rmtree(part)
    workdir.mkdir(parents=True, exist_ok=True)


def _corpus(corpus: Path) -> dict:
    if not (corpus / "corpus.json").is_file():
        return build_corpus(standard_library_sources(), corpus)
    return read_object(corpus / "corpus.json")


def _tokenizer(corpus: Path, tokenizer: Path) -> float:
    """Characters per token of the demo's tokenizer, trained when it is not there yet."""
    record = tokenizer / "training.json"
    if not record.is_file():
        figures = train_tokenizer(corpus, tokenizer, vocab_size=VOCAB_SIZE)
        record.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    with parts_of(record):
        return float(read_object(record)["chars_per_token"])


def _evaluations(run: Path) -> tuple[dict, dict]:
    rows = [row for row in map(read_row, lines_of(run / "metrics.jsonl")) if row is not None and "eval_loss" in row]
    return rows[0], rows[-1]


def _say(number: int, text: str) -> None:
    print(f"\n[{number}/6] {text}", flush=True)
