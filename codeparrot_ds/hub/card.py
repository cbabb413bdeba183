"""The model card that goes with every export: Hub metadata, figures, settings, data and limits, from plain values."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from codeparrot_ds.json_files import DamagedFileError, parts_of, read_object
from codeparrot_ds.metrics import EvaluationRow

# The run config's fields that tell how the model came to be; paths and places of one machine stay out of a public card.
_HYPERPARAMETERS = (
    "model",
    "seq_length",
    "global_batch_size",
    "micro_batch_size",
    "learning_rate",
    "lr_scheduler_type",
    "num_warmup_steps",
    "max_train_steps",
    "weight_decay",
    "max_grad_norm",
    "dropout",
    "shuffle_buffer",
    "num_lanes",
    "seed",
)
# The oldest that read the files of an export: tokenizers 0.20 is the first that reads merges as pairs.
NEEDED = (
    "Needs `transformers` 4.45 with `tokenizers` 0.20, or newer, and `safetensors`. A list of prompts with "
    "`batch_size=…` is completed in batches: the tokenizer has a pad token, and pads on the left."
)
_LIMITS = (
    "## Limits\n\n"
    "The model continues text in the manner of the files that it saw. What it writes may be wrong, insecure, or a copy "
    "of a training file under that file's licence; review it before use. It was not trained to follow instructions, "
    "and prose is outside its domain."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Card:
    """What a card tells of one checkpoint; None and empty leave a part out."""

    name: str
    """Of the run."""
    model: str | None = None
    """The shape's name or path."""
    num_parameters: int | None = None
    dtype: str | None = None
    """Of the weights."""
    step: int | None = None
    tokens: int | None = None
    evaluations: Sequence[EvaluationRow] = ()
    losses: Sequence[tuple[int, float]] = ()
    """Training losses by step, nats per token, a few; the last is the newest."""
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """The run config's fields."""
    ds_config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Resolved."""
    corpus: Mapping[str, Any] | None = None
    """The contents of corpus.json."""
    fingerprint: Mapping[str, Any] | None = None
    """Of the training stream."""
    hub_name: str | None = None
    """The model's name on the Hub."""
    license: str | None = None
    """Of the weights, by a Hub identifier; None is ``other``."""
    versions: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    """By package."""

    @property
    def last_evaluation(self) -> EvaluationRow | None:
        return self.evaluations[-1] if self.evaluations else None


def model_card(card: Card) -> str:
    """Returns the text of README.md for one checkpoint."""
    parts = [
        _metadata(card),
        _introduction(card),
        _usage(card),
        _figures(card),
        _hyperparameters(card),
        _deepspeed(card),
        _data(card),
        _LIMITS,
        _license(card),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _metadata(card: Card) -> str:
    import yaml

    metadata: dict[str, Any] = {
        "language": "code",
        "license": card.license or "other",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["code", "code-generation", "gpt2", "deepspeed", "codeparrot-ds"],
    }
    datasets = [name.partition("@")[0] for name in _hub_datasets(card)]
    if datasets:
        metadata["datasets"] = datasets
    metadata["metrics"] = ["perplexity"]
    evaluation = card.last_evaluation
    if evaluation is not None and math.isfinite(evaluation.perplexity):
        dataset = {"name": "held-out source files", "type": "code"}
        metadata["model-index"] = [
            {
                "name": card.name,
                "results": [
                    {
                        "task": {"type": "text-generation"},
                        "dataset": {"name": datasets[0], "type": datasets[0]} if datasets else dataset,
                        "metrics": [{"type": "perplexity", "value": round(evaluation.perplexity, 6)}],
                    }
                ],
            }
        ]
    return f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---"


def _introduction(card: Card) -> str:
    size = f"{card.num_parameters:,} parameters" if card.num_parameters else None
    shape = f"shape `{_without_path(card.model)}`" if card.model else None
    about = ", ".join(filter(None, [shape, size]))
    at = f"This commit holds the weights after step {card.step:,}." if card.step is not None else ""
    return (
        f"# {card.name}\n\n"
        f"A GPT-2 language model of source code{f' ({about})' if about else ''}, trained from scratch with DeepSpeed "
        f"by codeparrot-ds. {at}".rstrip()
    )


def _usage(card: Card) -> str:
    name, branch = card.hub_name, card.name
    model = f'"{name}", revision="{branch}"' if name else '"model"'
    where = "or revision=..., a tag or a commit" if name else "the folder of this file"
    return (
        f"## How to load\n\n```python\nfrom transformers import pipeline\n\n"
        f'generate = pipeline("text-generation", model={model})  # {where}\n'
        f'print(generate("def fibonacci(n):", max_new_tokens=64)[0]["generated_text"])\n```\n\n'
        f"{NEEDED}"
    )


def _figures(card: Card) -> str:
    evaluation = card.last_evaluation
    rows = [
        ("optimizer steps", _whole(card.step)),
        ("training tokens", _whole(card.tokens)),
        ("training loss (nats per token)", _real(card.losses[-1][1] if card.losses else None)),
        ("validation loss (nats per token)", _real(evaluation.eval_loss if evaluation else None)),
        ("validation perplexity", _real(evaluation.perplexity if evaluation else None)),
        ("validation bits per byte", _real(evaluation.bits_per_byte if evaluation else None)),
        ("validation tokens", _whole(evaluation.eval_tokens if evaluation else None)),
        ("precision of these weights", card.dtype),
    ]
    history = [(_whole(row.step), _real(row.eval_loss), _real(row.perplexity)) for row in card.evaluations]
    course = _table(("step", "validation loss", "perplexity"), history)
    losses = _table(("step", "training loss"), [(_whole(step), _real(loss)) for step, loss in card.losses])
    return "\n\n".join(filter(None, [_section("Training", _table(("figure", "value"), rows)), course, losses]))


def _hyperparameters(card: Card) -> str:
    config = card.config
    rows = [(f"`{name}`", _without_path(config[name])) for name in _HYPERPARAMETERS if config.get(name) is not None]
    rows += [(f"`{package}`", version) for package, version in card.versions.items()]
    return _section("Hyperparameters", _table(("setting", "value"), rows))


def _deepspeed(card: Card) -> str:
    if not card.ds_config:
        return ""
    text = json.dumps(_without_path(card.ds_config), indent=2, default=str)
    return f"<details><summary>Resolved DeepSpeed config</summary>\n\n```json\n{text}\n```\n\n</details>"


def corpus_of(data: str) -> dict[str, Any] | None:
    """What ``corpus`` wrote of a data folder into ``corpus.json``; None without that, or where it is another file."""
    path = Path(data) / "corpus.json"
    try:
        corpus = read_object(path)
        with parts_of(path):
            _corpus_tables(corpus)
        return corpus
    except (OSError, DamagedFileError):
        return None


def _data(card: Card) -> str:
    tables = [
        _table(("data set on the Hub",), [(f"`{name}`",) for name in _hub_datasets(card)]),
        *_corpus_tables(card.corpus or {}),
        _fingerprint(card.fingerprint),
    ]
    return _section("Data", "\n\n".join(filter(None, tables)))


def _corpus_tables(corpus: Mapping[str, Any]) -> list[str]:
    splits = [
        (name, _whole(split.get("documents")), _whole(split.get("bytes")))
        for name, split in (corpus.get("splits") or {}).items()
    ]
    steps = [
        (step["step"], _whole(step["documents_before"]), _whole(step["documents_after"]), _whole(step["bytes_after"]))
        for step in corpus.get("steps") or []
    ]
    licenses = [(name, _whole(count)) for name, count in (corpus.get("licenses") or {}).items()]
    return [
        _table(("split", "files", "bytes"), splits),
        _table(("cleaning step", "files before", "files after", "bytes after"), steps),
        _table(("licence", "files"), licenses),
    ]


def _hub_datasets(card: Card) -> list[str]:
    """The data sets on the Hub that the run reads, each with its commit; a local one's name is a path."""
    names = [part["name"] for part in (card.fingerprint or {}).get("datasets", [])]
    return [name for name in names if re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{40}", name)]


def _fingerprint(fingerprint: Mapping[str, Any] | None) -> str:
    """The identity of the training stream: equal numbers mean the same documents in the same order."""
    if not fingerprint:
        return ""
    content = {
        "datasets": [[part["weight"], sorted(map(list, part["shards"].values()))] for part in fingerprint["datasets"]],
        "rest": {key: value for key, value in fingerprint.items() if key != "datasets"},
    }
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    shards = [size for part in fingerprint["datasets"] for size, _ in part["shards"].values()]
    rows = [
        ("training shards", f"{len(shards):,}"),
        ("their bytes", _whole(sum(size for size in shards if size is not None))),
        ("tokenizer.json, SHA-256", fingerprint["tokenizer"]),
        ("stream (shards, tokenizer, rows, order), SHA-256", digest),
    ]
    return _table(("fingerprint", "value"), rows)


def _license(card: Card) -> str:
    name = card.license or "other"
    chosen = "No licence was chosen for these weights" if name == "other" else f"These weights come under `{name}`"
    return f"## Licence\n\n{chosen}. The files that they were trained on have licences of their own."


def _without_path(value: Any) -> Any:
    """The value with the place on one machine cut off every path in it, which says something about its user only."""
    if isinstance(value, Mapping):
        return {key: _without_path(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_path(part) for part in value]
    if isinstance(value, str) and value.startswith(("/", "~", ".")):
        return PurePath(value).name
    return value


def _section(title: str, content: str) -> str:
    return f"## {title}\n\n{content}" if content else ""


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Returns a Markdown table of the rows whose last cell is known, "" without any."""
    known = [row for row in rows if row[-1] is not None]
    if not known:
        return ""
    lines = [header, ["---"] * len(header), *known]
    return "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines)


def _cell(value: Any) -> str:
    return " ".join(str(value).replace("|", "\\|").split())


def _whole(value: int | None) -> str | None:
    return None if value is None else f"{value:,}"


def _real(value: float | None) -> str | None:
    return None if value is None else f"{value:.4f}"
