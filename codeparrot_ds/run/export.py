"""A trained model as a plain Hugging Face folder: safetensors weights, config, tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")
TRAINING_STATE = "training_state.json"


def save_tensors(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file.

    Raises:
        OSError: the system refused (disk full, no permission); safetensors has an exception of its own for that.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        raise OSError(f"{path.name}: {str(error).removeprefix('Error while serializing: ')}") from error


def working_weights(engine: Any, *, keep: bool) -> dict[str, torch.Tensor]:
    """The weights that the forward pass uses, on the CPU in their own precision; collective at stage 3.

    Args:
        engine: a DeepSpeed engine.
        keep: whether this rank wants them (the others take part in the gathering and get an empty table). ZeRO-3
            parameters are gathered one at a time, so no device ever holds the whole model.
    """
    weights: dict[str, torch.Tensor] = {}
    for name, parameter in engine.module.named_parameters():  # a tied weight appears once
        if hasattr(parameter, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters(parameter):
                if keep:
                    weights[name] = parameter.detach().to("cpu", copy=True)
        elif keep:
            weights[name] = parameter.detach().to("cpu").contiguous()
    return weights


def write_export(
    folder: Path,
    weights: dict[str, torch.Tensor],
    model_config: Any,
    tokenizer: Path,
    *,
    card: str,
    training_state: dict[str, Any],
) -> None:
    """Writes what ``AutoModelForCausalLM.from_pretrained`` and ``AutoTokenizer.from_pretrained`` need, and the card.

    Args:
        folder: created here.
        weights: ``working_weights`` of rank 0.
        model_config: the model's ``transformers`` config.
        tokenizer: folder of the run's tokenizer.
        card: the text of README.md.
        training_state: step, tokens, losses and how they were evaluated, for ``training_state.json``.
    """
    from transformers import GenerationConfig

    folder.mkdir(parents=True)
    save_tensors(weights, folder / "model.safetensors", {"format": "pt"})
    saved = type(model_config).from_dict(model_config.to_dict())
    saved.architectures = ["GPT2LMHeadModel"]
    saved.dtype = next(iter(weights.values())).dtype
    saved.use_cache = True  # Off in training, wanted in generation.
    saved.save_pretrained(folder)
    eos = model_config.eos_token_id
    GenerationConfig(bos_token_id=eos, eos_token_id=eos, pad_token_id=eos).save_pretrained(folder)
    for name in TOKENIZER_FILES:
        if (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, folder / name)
    (folder / "README.md").write_text(card, encoding="utf-8")
    text = json.dumps(training_state, indent=2) + "\n"
    (folder / TRAINING_STATE).write_text(text, encoding="utf-8")
