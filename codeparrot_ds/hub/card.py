"""The model card that goes with every export: Hub metadata, figures, settings, data and limits, from plain values."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

# The run config's fields that say how the model was trained; paths and places of one machine stay out of a public card.
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
_LIMITS = (
    "## Limits\n\n"
    "The model continues text in the manner of the files that it saw. What it writes may be wrong, insecure, or a copy "
    "of a training file under that file's licence; review it before use. It was not trained to follow instructions, "
    "and prose is outside its domain."
)


def model_card(info: Mapping[str, Any]) -> str:
    """Returns the text of README.md for one checkpoint; a key that is absent or None leaves its part out.

    Args:
        info: ``name`` of the run (required); ``model`` (shape) and ``num_parameters``; ``dtype`` of the weights;
            ``step``, ``tokens``, ``loss`` (training, nats per token), ``eval_loss``, ``perplexity``, ``bits_per_byte``,
            ``eval_tokens``; ``history``, rows of ``step``, ``eval_loss``, ``perplexity``; ``losses``, pairs of step and
            training loss; ``config``, the run config's fields; ``ds_config``, the resolved DeepSpeed config;
            ``corpus``, the contents of corpus.json; ``fingerprint`` of the training stream; ``hub_name``, the model's
            name on the Hub; ``license`` of the weights (a Hub identifier, ``other`` by default); ``versions``, package
            to version.
    """
    parts = [
        _metadata(info),
        _introduction(info),
        _usage(info),
        _figures(info),
        _hyperparameters(info),
        _deepspeed(info),
        _data(info),
        _LIMITS,
        _license(info),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _metadata(info: Mapping[str, Any]) -> str:
    import yaml

    metadata: dict[str, Any] = {
        "language": "code",
        "license": info.get("license") or "other",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["code", "code-generation", "gpt2", "deepspeed", "codeparrot-ds"],
    }
    datasets = [name.partition("@")[0] for name in _hub_datasets(info)]
    if datasets:
        metadata["datasets"] = datasets
    metadata["metrics"] = ["perplexity"]
    perplexity = info.get("perplexity")
    if perplexity is not None and math.isfinite(perplexity):
        dataset = {"name": "held-out source files", "type": "code"}
        metadata["model-index"] = [
            {
                "name": info["name"],
                "results": [
                    {
                        "task": {"type": "text-generation"},
                        "dataset": {"name": datasets[0], "type": datasets[0]} if datasets else dataset,
                        "metrics": [{"type": "perplexity", "value": round(float(perplexity), 6)}],
                    }
                ],
            }
        ]
    return f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---"


def _introduction(info: Mapping[str, Any]) -> str:
    size = f"{info['num_parameters']:,} parameters" if info.get("num_parameters") else None
    shape = f"shape `{_without_path(info['model'])}`" if info.get("model") else None
    about = ", ".join(filter(None, [shape, size]))
    at = f"This commit holds the weights after step {info['step']:,}." if info.get("step") is not None else ""
    return (
        f"# {info['name']}\n\n"
        f"A GPT-2 language model of source code{f' ({about})' if about else ''}, trained from scratch with DeepSpeed "
        f"by codeparrot-ds. {at}".rstrip()
    )


def _usage(info: Mapping[str, Any]) -> str:
    name, branch = info.get("hub_name"), info["name"]
    model = f'"{name}", revision="{branch}"' if name else '"model"'
    where = "or revision=..., a tag or a commit" if name else "the folder of this file"
    return (
        f"## How to load\n\n```python\nfrom transformers import pipeline\n\n"
        f'generate = pipeline("text-generation", model={model})  # {where}\n'
        f'print(generate("def fibonacci(n):", max_new_tokens=64)[0]["generated_text"])\n```'
    )


def _figures(info: Mapping[str, Any]) -> str:
    rows = [
        ("optimizer steps", _whole(info.get("step"))),
        ("training tokens", _whole(info.get("tokens"))),
        ("training loss (nats per token)", _real(info.get("loss"))),
        ("validation loss (nats per token)", _real(info.get("eval_loss"))),
        ("validation perplexity", _real(info.get("perplexity"))),
        ("validation bits per byte", _real(info.get("bits_per_byte"))),
        ("validation tokens", _whole(info.get("eval_tokens"))),
        ("precision of these weights", info.get("dtype")),
    ]
    history = [
        (_whole(row["step"]), _real(row["eval_loss"]), _real(row["perplexity"])) for row in info.get("history") or []
    ]
    course = _table(("step", "validation loss", "perplexity"), history)
    losses = _table(("step", "training loss"), [(_whole(step), _real(loss)) for step, loss in info.get("losses") or []])
    return "\n\n".join(filter(None, [_section("Training", _table(("figure", "value"), rows)), course, losses]))


def _hyperparameters(info: Mapping[str, Any]) -> str:
    config = info.get("config") or {}
    rows = [(f"`{name}`", _without_path(config[name])) for name in _HYPERPARAMETERS if config.get(name) is not None]
    rows += [(f"`{package}`", version) for package, version in (info.get("versions") or {}).items()]
    return _section("Hyperparameters", _table(("setting", "value"), rows))


def _deepspeed(info: Mapping[str, Any]) -> str:
    if not info.get("ds_config"):
        return ""
    text = json.dumps(_without_path(info["ds_config"]), indent=2, default=str)
    return f"<details><summary>Resolved DeepSpeed config</summary>\n\n```json\n{text}\n```\n\n</details>"


def _data(info: Mapping[str, Any]) -> str:
    corpus = info.get("corpus") or {}
    splits = [
        (name, _whole(split.get("documents")), _whole(split.get("bytes")))
        for name, split in (corpus.get("splits") or {}).items()
    ]
    steps = [
        (step["step"], _whole(step["documents_before"]), _whole(step["documents_after"]), _whole(step["bytes_after"]))
        for step in corpus.get("steps") or []
    ]
    licenses = [(name, _whole(count)) for name, count in (corpus.get("licenses") or {}).items()]
    tables = [
        _table(("data set on the Hub",), [(f"`{name}`",) for name in _hub_datasets(info)]),
        _table(("split", "files", "bytes"), splits),
        _table(("cleaning step", "files before", "files after", "bytes after"), steps),
        _table(("licence", "files"), licenses),
        _fingerprint(info.get("fingerprint")),
    ]
    return _section("Data", "\n\n".join(filter(None, tables)))


def _hub_datasets(info: Mapping[str, Any]) -> list[str]:
    """The data sets on the Hub that the run reads, each with its commit; a local one's name is a path."""
    names = [part["name"] for part in (info.get("fingerprint") or {}).get("datasets", [])]
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


def _license(info: Mapping[str, Any]) -> str:
    name = info.get("license") or "other"
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
