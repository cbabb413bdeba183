"""A small corpus of real code for the whole-story tests, and runs on it that several of them look at."""

from __future__ import annotations

import concurrent.futures
import shutil
import sysconfig
from pathlib import Path

import pytest

from codeparrot_ds.corpus.build import build_corpus
from codeparrot_ds.corpus.tokenizer import train_tokenizer
from tests.old_cpu import OLD_CPU
from tests.story.stories import COMPARED, OTHERS, STEPS, Workshop, run_here, train_in_turn


@pytest.fixture(scope="session")
def workshop(tmp_path_factory) -> Workshop:
    """Some packages of the standard library as a corpus, and a tokenizer of 1,024 tokens."""
    base = tmp_path_factory.mktemp("workshop")
    tree = base / "tree"
    for package in ("asyncio", "email", "http", "json", "logging", "unittest", "xml"):
        shutil.copytree(Path(sysconfig.get_path("stdlib")) / package, tree / package)
    build_corpus([str(tree)], base / "corpus")
    train_tokenizer(base / "corpus", base / "tokenizer", vocab_size=1024)
    return Workshop(corpus=base / "corpus", tokenizer=base / "tokenizer", runs=base / "runs")


@pytest.fixture(scope="session")
def on_two_ranks(workshop) -> dict[str, Path]:
    """A run of each of `COMPARED`, `OTHERS`, and one with dropout, whose masks come from each rank's own generator.

    Twenty steps saved every ten, five of the others; all in one launch.
    """
    options = {name: ("--deepspeed", name, *STEPS) for name in COMPARED}
    options |= {name: ("--deepspeed", name, "--max-train-steps", "5") for name in OTHERS}
    options["zero2"] += ("--hub", "local")
    options["dropout"] = ("--deepspeed", "zero2", "--dropout", "0.1", *STEPS)
    names = {name: name if name == "dropout" else f"{name}-on-2" for name in options}
    runs = [workshop.options("--run-name", names[name], *chosen) for name, chosen in options.items()]
    outcomes = train_in_turn(runs, ranks=2)
    return {name: Path(outcome["run"]) for name, outcome in zip(options, outcomes, strict=True)}


@pytest.fixture(scope="session")
def on_an_old_cpu(workshop) -> dict[str, Path]:
    """Two runs on two ranks whose CPU has AVX2 alone: one that names no DeepSpeed config, and one in bf16 by name."""
    chosen = {"default": (), "zero2": ("--deepspeed", "zero2")}
    runs = [
        workshop.options("--run-name", f"{name}-on-an-old-cpu", *options, *STEPS) for name, options in chosen.items()
    ]
    outcomes = train_in_turn(runs, ranks=2, **OLD_CPU)
    return {name: Path(outcome["run"]) for name, outcome in zip(chosen, outcomes, strict=True)}


@pytest.fixture(scope="session")
def on_one_rank(workshop, on_two_ranks) -> dict[str, Path]:
    """The fp32 runs again, on one rank: two launches at a time, a core for each.

    And ``imported``: what the engine of ``zero3_fp32`` saved on two ranks after ten steps, which goes on at stage 1.
    """
    names = [f"zero{stage}_fp32" for stage in range(4)]
    runs = [workshop.options("--run-name", f"{name}-on-1", "--deepspeed", name, *STEPS) for name in names]
    imported = workshop.runs / "imported"
    options = workshop.options("--deepspeed", "zero1_fp32", *STEPS)
    place = options.index("--output-dir")
    del options[place : place + 2]  # the folder says it
    answer = run_here(
        *("checkpoint", "import", str(on_two_ranks["zero3_fp32"] / "deepspeed"), str(imported)),
        *("--tag", "global_step10", "--first-row", "80", *options),
    )
    assert answer.returncode == 0, answer.stderr
    runs.append(["--config", str(imported / "config.yaml")])
    with concurrent.futures.ThreadPoolExecutor() as pool:
        launches = pool.map(lambda part: train_in_turn(part, ranks=1), (runs[:2], runs[2:]))
        outcomes = [outcome for launch in launches for outcome in launch]
    return {name: Path(outcome["run"]) for name, outcome in zip([*names, "imported"], outcomes, strict=True)}


@pytest.fixture(scope="session")
def continued(workshop, on_two_ranks, on_an_old_cpu) -> dict[str, Path]:
    """Copies of runs that went on, in one launch of new processes.

    ``zero0``, ``zero1`` and ``zero0_fp32`` from their step 10; ``default``, of an old CPU, from its step 10 without a
    DeepSpeed config's name; ``zero2`` after its end; ``new data``: ``zero2``, of
    whose training data a document is gone, on half the lanes; ``new batch``: ``zero2`` in batches twice as large; and
    ``back``: ``zero3_fp32`` from its step 10, which it was told to go back to.
    """
    base = workshop.runs.parent / "continued"
    shards = shutil.copytree(workshop.corpus, base / "corpus") / "train"
    shard = min(shards.iterdir())
    shard.write_text("".join(shard.read_text().splitlines(keepends=True)[1:]))
    runs, options = {}, []
    whole_runs = on_two_ranks | {"default": on_an_old_cpu["default"]}
    for key, name, *chosen in (
        ("default", "default", *STEPS),
        *((name, name, *STEPS) for name in ("zero0", "zero1", "zero0_fp32", "zero2")),
        ("new data", "zero2", *("--data", str(shards.parent), "--num-lanes", "4", "--on-data-change", "restart"),
         "--max-train-steps", "22", "--save-checkpoint-steps", "1"),
        ("new batch", "zero2", "--global-batch-size", "16", "--on-batch-change", "continue", "--max-train-steps", "24"),
        ("back", "zero3_fp32", *STEPS, "--resume", "step-00000010"),
    ):  # fmt: skip
        whole = whole_runs[name]
        runs[key] = base / key.replace(" ", "-") / whole.name
        shutil.copytree(whole, runs[key])
        if key == "back":
            chosen[-1] = str(runs[key] / "checkpoints" / chosen[-1])
        elif name != "zero2":
            shutil.rmtree(runs[key] / "checkpoints" / "step-00000020")
        if name != "default":
            chosen += ["--deepspeed", name]
        options.append(workshop.options("--run-name", whole.name, *chosen, output_dir=runs[key].parent))
    train_in_turn(options, ranks=2)
    return runs
