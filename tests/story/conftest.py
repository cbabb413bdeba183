"""A small corpus of real code for the whole-story tests, and runs on it that several of them look at.

A test says with ``@needs`` which of the runs it looks at; those that no chosen test needs are not trained.
"""

from __future__ import annotations

import concurrent.futures
import shutil
import sysconfig
from collections.abc import Iterable
from pathlib import Path

import pytest

from codeparrot_ds.corpus.build import build_corpus
from codeparrot_ds.corpus.tokenizer import train_tokenizer
from tests.needs import needed
from tests.old_cpu import OLD_CPU
from tests.story.stories import COMPARED, OTHERS, STEPS, Workshop, run_here, train_in_turn

# Options of the runs on two ranks: twenty steps saved every ten, five of the others; one with dropout, whose masks come
# from each rank's own generator.
ON_TWO_RANKS = {
    **{name: ("--deepspeed", name, *STEPS) for name in COMPARED},
    **{name: ("--deepspeed", name, "--max-train-steps", "5") for name in OTHERS},
    "zero2": ("--deepspeed", "zero2", *STEPS, "--hub", "local"),
    "dropout": ("--deepspeed", "zero2", "--dropout", "0.1", *STEPS),
}
ON_AN_OLD_CPU = {"default": (), "zero2": ("--deepspeed", "zero2")}
# Runs that are continued, each with the run that it is a copy of: from step 10 those whose last checkpoint is taken
# away, and ``back``, which is told to; after their end the copies of ``zero2``: as it was, with a document less in its
# data and half the lanes, and in batches twice as large. ``default`` is of an old CPU and names no DeepSpeed config.
CONTINUED = {
    "default": ("default", STEPS),
    **{name: (name, STEPS) for name in ("zero0", "zero1", "zero0_fp32", "zero2")},
    "new data": (
        "zero2",
        ("--num-lanes", "4", "--on-data-change", "restart", "--max-train-steps", "22", "--save-checkpoint-steps", "1"),
    ),
    "new batch": (
        "zero2",
        ("--global-batch-size", "16", "--on-batch-change", "continue", "--max-train-steps", "24"),
    ),
    "back": ("zero3_fp32", STEPS),
}


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
def on_two_ranks(request, workshop) -> dict[str, Path]:
    """The runs of ``ON_TWO_RANKS`` that are needed, by their keys; all in one launch."""
    wanted = {*needed(request, "on_two_ranks"), *(CONTINUED[key][0] for key in needed(request, "continued"))}
    if "imported" in needed(request, "on_one_rank"):
        wanted.add("zero3_fp32")
    chosen = {name: options for name, options in ON_TWO_RANKS.items() if name in wanted}
    names = {name: name if name == "dropout" else f"{name}-on-2" for name in chosen}
    runs = [workshop.options("--run-name", names[name], *options) for name, options in chosen.items()]
    return _by_key(chosen, train_in_turn(runs, ranks=2))


@pytest.fixture(scope="session")
def on_an_old_cpu(request, workshop) -> dict[str, Path]:
    """Runs on two ranks whose CPU has AVX2 alone: ``default`` names no DeepSpeed config, ``zero2`` is bf16 by name."""
    chosen = needed(request, "on_an_old_cpu")
    runs = [workshop.options("--run-name", f"{name}-on-an-old-cpu", *ON_AN_OLD_CPU[name], *STEPS) for name in chosen]
    return _by_key(chosen, train_in_turn(runs, ranks=2, **OLD_CPU))


@pytest.fixture(scope="session")
def on_one_rank(request, workshop, on_two_ranks) -> dict[str, Path]:
    """fp32 runs again, on one rank: two launches at a time, a core for each.

    And ``imported``: what the engine of ``zero3_fp32`` saved on two ranks after ten steps, continued at stage 1.
    """
    chosen = needed(request, "on_one_rank")
    runs = [workshop.options("--run-name", f"{name}-on-1", "--deepspeed", name, *STEPS) for name in chosen]
    if "imported" in chosen:
        imported = workshop.runs / "imported"
        options = workshop.options("--deepspeed", "zero1_fp32", *STEPS)
        place = options.index("--output-dir")
        del options[place : place + 2]  # the folder says it
        answer = run_here(
            *("checkpoint", "import", str(on_two_ranks["zero3_fp32"] / "deepspeed"), str(imported)),
            *("--tag", "global_step10", "--first-row", "80", *options),
        )
        assert answer.returncode == 0, answer.stderr
        runs[chosen.index("imported")] = ["--config", str(imported / "config.yaml")]
    half = len(runs) // 2
    with concurrent.futures.ThreadPoolExecutor() as pool:
        launches = pool.map(lambda part: train_in_turn(part, ranks=1), (runs[:half], runs[half:]))
        return _by_key(chosen, [outcome for launch in launches for outcome in launch])


@pytest.fixture(scope="session")
def continued(request, workshop, on_two_ranks, on_an_old_cpu) -> dict[str, Path]:
    """The runs of ``CONTINUED`` that are needed, by their keys; copies, in one launch of new processes."""
    base = workshop.runs.parent / "continued"
    runs, options = {}, []
    for key in needed(request, "continued"):
        name, chosen = CONTINUED[key]
        whole = on_an_old_cpu[name] if name == "default" else on_two_ranks[name]
        runs[key] = base / key.replace(" ", "-") / whole.name
        shutil.copytree(whole, runs[key])
        if key == "back":
            chosen = (*chosen, "--resume", str(runs[key] / "checkpoints" / "step-00000010"))
        elif name != "zero2":
            shutil.rmtree(runs[key] / "checkpoints" / "step-00000020")
        if key == "new data":
            chosen = (*chosen, "--data", str(_without_a_document(workshop.corpus, base / "corpus")))
        if name != "default":
            chosen = (*chosen, "--deepspeed", name)
        options.append(workshop.options("--run-name", whole.name, *chosen, output_dir=runs[key].parent))
    train_in_turn(options, ranks=2)
    return runs


def _by_key(keys: Iterable[str], outcomes: list[dict]) -> dict[str, Path]:
    return {key: Path(outcome["run"]) for key, outcome in zip(keys, outcomes, strict=True)}


def _without_a_document(corpus: Path, out: Path) -> Path:
    """A copy of a corpus that lacks the first document it trains on."""
    shard = min((shutil.copytree(corpus, out) / "train").iterdir())
    shard.write_text("".join(shard.read_text().splitlines(keepends=True)[1:]))
    return out
