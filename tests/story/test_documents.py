"""Attention inside documents: a run with it trains, and its export knows how it was trained."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from codeparrot_ds.evaluation.perplexity import evaluate_model
from tests.story.stories import evaluations, losses, run_command

STEPS = 3


def cut(corpus: Path, out: Path) -> Path:
    """A corpus of short documents, so that each row of 64 tokens has borders: pieces of another corpus's documents."""
    for shard in corpus.glob("*/*.jsonl"):
        texts = [json.loads(line)["content"] for line in shard.read_text().splitlines()]
        pieces = [text[start : start + 90] for text in texts for start in range(0, len(text), 90)]
        path = out / shard.relative_to(corpus)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps({"content": piece}) + "\n" for piece in pieces))
    return out


def without_masking(export: Path, out: Path) -> Path:
    """A copy of an export that says it was trained without."""
    shutil.copytree(export, out)
    state = json.loads((out / "training_state.json").read_text())
    assert state["evaluated_with"].pop("intra_document_masking") is True
    (out / "training_state.json").write_text(json.dumps(state))
    return out


def test_an_export_is_evaluated_as_it_was_trained(workshop, tmp_path):
    corpus = cut(workshop.corpus, tmp_path / "corpus")
    process = workshop.train(
        *("--intra-document-masking", "--data", str(corpus), "--run-name", "inside", "--max-train-steps", str(STEPS)),
        # fp32 and large steps: attention soon matters by far more than rounding.
        *("--deepspeed", "zero0_fp32", "--learning-rate", "5e-3", "--num-warmup-steps", "0", "--num-gpus", "2"),
        output_dir=tmp_path,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    run = tmp_path / "inside"
    assert list(losses(run)) == [1, 2, 3] and losses(run)[3] < losses(run)[1]
    logged = evaluations(run)[STEPS]
    export = run / "checkpoints" / f"step-{STEPS:08d}" / "export"
    command = [sys.executable, "-m", "codeparrot_ds", "evaluate", str(export), "--json", "--device", "cpu"]
    process = run_command(command)
    assert process.returncode == 0, process.stderr[-3000:]
    assert json.loads(process.stdout)["loss"] == pytest.approx(logged, rel=1e-6)
    plain = evaluate_model(without_masking(export, tmp_path / "plain"), data=corpus, device="cpu")["loss"]
    assert abs(plain - logged) > 2e-5 * logged  # the other masking is noticed
