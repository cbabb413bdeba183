"""A trained model as a plain Hugging Face folder: safetensors weights, config, tokenizer, card."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from codeparrot_ds import durable
from codeparrot_ds.checkpoint import folders as checkpoint_files
from codeparrot_ds.checkpoint.folders import STATE, TOKENIZER_FILES, WEIGHTS
from codeparrot_ds.checkpoint.fragment_files import FragmentReader
from codeparrot_ds.checkpoint.tensor_file import TensorEntry, write_tensor_file
from codeparrot_ds.config.run_config import RunConfig
from codeparrot_ds.ds_config.facts import TORCH_DTYPES, precision
from codeparrot_ds.hub.card import model_card
from codeparrot_ds.staging import staged_folder

TRAINING_STATE = "training_state.json"
"""Of an export, by a run's precision."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """What a Hugging Face folder is made of, but for the weights.

    Attributes:
        model_config: the model's ``transformers`` config.
        tokenizer: folder of the run's tokenizer.
        dtype: of the weights, by torch's name: ``float32``, ``bfloat16`` or ``float16``.
        card: the text of README.md.
        training_state: step, tokens, losses and how they were evaluated, for ``training_state.json``.
    """

    model_config: Any
    tokenizer: Path
    dtype: str
    card: str
    training_state: dict[str, Any]


def run_export(
    config: RunConfig,
    ds_config: dict[str, Any],
    *,
    model_config: Any,
    name: str,
    num_parameters: int,
    step: int,
    tokens: int,
    evaluations: Sequence[Mapping[str, Any]],
    losses: Sequence[tuple[int, float]],
    fingerprint: Mapping[str, Any] | None,
    hub_name: str | None,
    versions: Mapping[str, Any],
) -> Export:
    """What goes with the weights of a run after a step: its card, and what ``evaluate`` needs to see its rows again.

    Args:
        config: of the run.
        ds_config: its DeepSpeed config, for the precision.
        model_config: the model's ``transformers`` config.
        name: of the run.
        num_parameters: of the model.
        step: optimizer steps done.
        tokens: tokens trained on.
        evaluations: rows of the evaluations so far.
        losses: training losses by step, a few.
        fingerprint: of the training stream.
        hub_name: the model's name on the Hub, where its branch is there.
        versions: package to version.
    """
    last = dict(evaluations[-1]) if evaluations else {}
    corpus = Path(config.data) / "corpus.json"
    card = {
        "name": name,
        "model": config.model,
        "num_parameters": num_parameters,
        "dtype": precision(ds_config),
        "step": step,
        "tokens": tokens,
        "loss": losses[-1][1] if losses else None,
        **{key: last.get(key) for key in ("eval_loss", "perplexity", "bits_per_byte", "eval_tokens")},
        "history": evaluations,
        "losses": losses,
        "config": dataclasses.asdict(config),
        "ds_config": ds_config,
        "corpus": json.loads(corpus.read_text(encoding="utf-8")) if corpus.is_file() else None,
        "fingerprint": fingerprint,
        "hub_name": hub_name,
        "license": config.license,
        "versions": versions,
    }
    evaluated_with = {
        "seq_length": config.seq_length,
        "num_lanes": config.num_lanes,
        "batch_size": config.micro_batch_size,
        "max_eval_steps": config.max_eval_steps,
        "intra_document_masking": config.intra_document_masking,
    }
    return Export(
        model_config=model_config,
        tokenizer=Path(config.tokenizer),
        dtype=TORCH_DTYPES[precision(ds_config)],
        card=model_card(card),
        training_state={
            "run": name,
            "step": step,
            "tokens": tokens,
            "losses": losses,
            "evaluation": last,
            "evaluations": [dict(row) for row in evaluations],
            "evaluated_with": evaluated_with,
        },
    )


def write_export(
    folder: Path, export: Export, shapes: Mapping[str, Sequence[int]], weights: Iterable[torch.Tensor]
) -> dict[str, dict[str, Any]]:
    """Writes what ``AutoModelForCausalLM.from_pretrained`` and ``AutoTokenizer.from_pretrained`` need, and the card.

    Args:
        folder: empty.
        export: everything but the weights.
        shapes: shape of every parameter by its name in the model, a tied one once.
        weights: the parameters in that order, in the export's precision, on the CPU, whole or in pieces; each is
            written before the next one is asked for.

    Returns:
        ``bytes`` and ``sha256`` of each file by name.

    Raises:
        OSError: the system refused (disk full, no permission).
    """
    from transformers import GenerationConfig

    dtype = getattr(torch, export.dtype)
    entries = [TensorEntry(name=name, dtype=dtype, shape=tuple(shape)) for name, shape in shapes.items()]
    written = {WEIGHTS: write_tensor_file(folder / WEIGHTS, entries, weights, {"format": "pt"})}
    config = type(export.model_config).from_dict(export.model_config.to_dict())
    config.architectures = ["GPT2LMHeadModel"]
    config.dtype = dtype
    config.use_cache = True  # Off in training, wanted in generation.
    eos = config.eos_token_id
    generation = GenerationConfig(bos_token_id=eos, eos_token_id=eos, pad_token_id=eos)
    contents = {
        "config.json": config.to_json_string().encode(),
        "generation_config.json": generation.to_json_string().encode(),
        "README.md": export.card.encode(),
        TRAINING_STATE: durable.json_bytes(export.training_state),
    }
    for name in TOKENIZER_FILES:
        if (export.tokenizer / name).is_file():
            contents[name] = (export.tokenizer / name).read_bytes()
    for name, content in contents.items():
        written[name] = durable.write_file(folder / name, [content])
    return written


def export_checkpoint(checkpoint: Path, out: Path, *, dtype: str, overwrite: bool) -> None:
    """Writes a checkpoint's weights, rounded from its masters, with config, tokenizer and card; complete or not at all.

    Args:
        checkpoint: from ``checkpoint_files.find_checkpoint``.
        out: folder to make.
        dtype: ``float32``, ``bfloat16`` or ``float16``.
        overwrite: whether an earlier export there may be replaced.

    Raises:
        UserError: ``out`` may not be replaced or cannot be written, or a weight is too large for float16.
    """
    from transformers import AutoConfig

    exported = checkpoint / checkpoint_files.EXPORT
    state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    card = (exported / "README.md").read_text(encoding="utf-8")
    export = Export(
        model_config=AutoConfig.from_pretrained(exported),
        tokenizer=exported,
        dtype=dtype,
        card=f"{card}\nThese weights were exported in {dtype} from the optimizer's masters.\n",
        training_state=json.loads((exported / TRAINING_STATE).read_text(encoding="utf-8")),
    )
    shapes = state["parameters"]
    reader = FragmentReader(checkpoint, checkpoint_files.read_manifest(checkpoint)["files"])
    weights = reader.weights(shapes, getattr(torch, dtype))
    with staged_folder(out, marker="config.json", overwrite=overwrite) as staging:
        write_export(staging, export, shapes, weights)
