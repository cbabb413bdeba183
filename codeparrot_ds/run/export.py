"""A trained model as a plain Hugging Face folder: safetensors weights, config, tokenizer, card."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from codeparrot_ds import durable
from codeparrot_ds.run.checkpoint_files import TOKENIZER_FILES, WEIGHTS
from codeparrot_ds.run.tensor_file import TensorEntry, write_tensor_file

TRAINING_STATE = "training_state.json"


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


def write_export(
    folder: Path, export: Export, shapes: Mapping[str, Sequence[int]], weights: Iterable[torch.Tensor]
) -> dict[str, dict[str, Any]]:
    """Writes what ``AutoModelForCausalLM.from_pretrained`` and ``AutoTokenizer.from_pretrained`` need, and the card.

    Args:
        folder: empty.
        export: everything but the weights.
        shapes: shape of every parameter by its name in the model, a tied one once.
        weights: the parameters in that order, in the export's precision, on the CPU; each is written and let go before
            the next one is asked for.

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
