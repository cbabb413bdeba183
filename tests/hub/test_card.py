"""The model card: metadata that huggingface_hub accepts, and every figure in its place."""

import json
import math

import pytest
from huggingface_hub import ModelCard

from codeparrot_ds.hub.card import Card, corpus_of, model_card
from codeparrot_ds.metrics import EvaluationRow


def evaluation(step: int, loss: float) -> EvaluationRow:
    return EvaluationRow(
        step=step,
        tokens=196_608 * step,
        eval_loss=loss,
        perplexity=math.exp(loss) if loss < 700 else math.inf,
        bits_per_byte=0.4 * loss,
        eval_tokens=1_000_000,
    )


INFO = {
    "name": "brave-fox-1",
    "model": "gpt2",
    "num_parameters": 111_008_256,
    "dtype": "bfloat16",
    "step": 15_000,
    "tokens": 2_949_120_000,
    "evaluations": [evaluation(7500, 1.5), evaluation(15_000, 1.3)],
    "config": {"model": "gpt2", "learning_rate": 5e-4, "num_warmup_steps": 2000, "output_dir": "/home/me/secret-place"},
    "ds_config": {
        "zero_optimization": {"stage": 2, "nvme_path": "/home/me/secret-place/nvme"},
        "bf16": {"enabled": True},
    },
    "corpus": {
        "steps": [
            {
                "step": "exact_duplicates",
                "documents_before": 90,
                "documents_after": 80,
                "bytes_before": 9,
                "bytes_after": 8,
            }
        ],
        "licenses": {"mit": 50, "apache-2.0|or-later": 30},
        "splits": {"train": {"documents": 70, "bytes": 7000}, "validation": {"documents": 10, "bytes": 1000}},
    },
    "losses": [(7500, 1.75), (15_000, 1.25)],
    "hub_name": "org/code",
    "fingerprint": {
        "order_version": 1,
        "datasets": [
            {"name": "/home/me/secret-place/corpus", "weight": 0.5, "shards": {"part-0": [6000, "ab"]}},
            {"name": "org/data@" + "c" * 40, "weight": 0.5, "shards": {"train/x.parquet": [4000, "cd"]}},
        ],
        "tokenizer": "f" * 64,
        "seq_length": 1024,
    },
    "license": "apache-2.0",
    "versions": {"deepspeed": "0.19.8"},
}


def test_metadata_is_what_the_hub_reads():
    data = ModelCard(model_card(Card(**INFO))).data
    assert (data.language, data.license, data.library_name) == ("code", "apache-2.0", "transformers")
    assert {"deepspeed", "gpt2", "code-generation"} <= set(data.tags)
    assert data.metrics == ["perplexity"] and data.datasets == ["org/data"]
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value) == ("perplexity", round(math.exp(1.3), 6))


def test_the_body_holds_every_figure_and_no_local_path():
    text = model_card(Card(**INFO))
    for shown in (
        "111,008,256", "15,000", "2,949,120,000", "1.2500", "1.3000", "3.6693", "0.5200", "| 7,500 | 1.5000 | 4.4817 |",
        "`learning_rate` | 0.0005", '"stage": 2', "| exact_duplicates | 90 | 80 | 8 |", "| mit | 50 |",
        "apache-2.0\\|or-later", "| train | 70 | 7,000 |", 'model="org/code", revision="brave-fox-1"', "<details>",
        "## Limits", "| 7,500 | 1.7500 |", "| training shards | 2 |", "| their bytes | 10,000 |", "f" * 64,
        f"`org/data@{'c' * 40}`", "Needs `transformers` 4.45 with `tokenizers` 0.20",
        "These weights come under `apache-2.0`",
    ):  # fmt: skip
        assert shown in text, shown
    assert "secret-place" not in text


def test_a_card_of_little_knowledge_is_still_valid():
    for evaluations in ([], [evaluation(0, 1e4)]):
        text = model_card(Card(name="x", evaluations=evaluations))
        data = ModelCard(text).data
        assert data.license == "other" and data.datasets is None and data.eval_results is None
    assert "## Data" not in text and "Hyperparameters" not in text and "| inf |" in text
    assert 'model="model"' in text and "No licence was chosen" in text


def test_a_model_named_by_a_path_shows_no_path():
    named = {"model": "/home/me/secret-place/config.json", "config": {"model": "./secret-place/x.json"}}
    text = model_card(Card(**INFO | named))
    assert "shape `config.json`" in text and "| x.json |" in text and "secret-place" not in text


def test_the_fingerprint_changes_with_the_data_and_not_with_its_place():
    def digest(**changes) -> str:
        parts = [INFO["fingerprint"]["datasets"][0] | changes]
        text = model_card(Card(**INFO | {"fingerprint": INFO["fingerprint"] | {"datasets": parts}}))
        return next(line for line in text.splitlines() if line.startswith("| stream"))

    assert digest() == digest(name="/elsewhere")
    assert len({digest(), digest(weight=0.7), digest(shards={"part-0": [6000, "xy"]})}) == 3


@pytest.mark.parametrize("other", [[], "[" * 100_000, {"splits": 3}, {"steps": [{"step": 1}]}, {"licenses": ["mit"]}])
def test_a_corpus_json_that_corpus_did_not_write_is_left_out(tmp_path, other):
    """A data folder may have one of its own, and no checkpoint is to fail for it."""
    assert corpus_of(str(tmp_path)) is None
    (tmp_path / "corpus.json").write_text(other if isinstance(other, str) else json.dumps(other))
    assert corpus_of(str(tmp_path)) is None
    (tmp_path / "corpus.json").write_text(json.dumps(INFO["corpus"]))
    assert corpus_of(str(tmp_path)) == INFO["corpus"]
