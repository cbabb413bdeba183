"""The sizes of GPT-2 models, without building one: known names, Hugging Face config files, parameters and FLOPs."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codeparrot_ds.errors import UserError
from codeparrot_ds.json_files import DamagedFileError, read_json
from codeparrot_ds.paths import did_you_mean, did_you_mean_path

MOST_LAYERS, MOST_OF_A_SIZE = 10_000, 2**24

# Of the fp32 softmax of a chunked loss: 128 MiB.
CHUNK_ELEMENTS = 2**25


@dataclass(frozen=True, kw_only=True)
class GPT2Shape:
    """What decides the weights of a GPT-2; field names are those of ``transformers.GPT2Config``."""

    n_layer: int
    n_embd: int
    n_head: int
    vocab_size: int = 32_768
    n_positions: int = 1024
    n_inner: int | None = None  # width of the MLP; None: 4 x n_embd
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    reorder_and_upcast_attn: bool = False
    tie_word_embeddings: bool = True


# https://huggingface.co/openai-community/gpt2 (-medium, -large, -xl): config.json; demo is this project's own.
KNOWN_SHAPES = {
    "demo": GPT2Shape(n_layer=4, n_embd=256, n_head=4),
    "gpt2": GPT2Shape(n_layer=12, n_embd=768, n_head=12),
    "gpt2-medium": GPT2Shape(n_layer=24, n_embd=1024, n_head=16),
    "gpt2-large": GPT2Shape(n_layer=36, n_embd=1280, n_head=20),
    "gpt2-xl": GPT2Shape(n_layer=48, n_embd=1600, n_head=25),
}


def find_shape(name_or_path: str, *, vocab_size: int, seq_length: int) -> GPT2Shape:
    """The shape of a known name or of a Hugging Face GPT-2 ``config.json`` (the file or its folder).

    The vocabulary is always set to `vocab_size` (the tokenizer's). `UserError` for an unknown name, a config of another
    model family, sizes that do not fit together, and a `seq_length` beyond the position embeddings.
    """
    shape = KNOWN_SHAPES.get(name_or_path) or _read_shape(name_or_path)
    if vocab_size < 1:
        raise UserError(f"model {name_or_path}: the vocabulary size must be at least 1, not {vocab_size}")
    if seq_length > shape.n_positions:
        raise UserError(
            f"seq_length {seq_length} is longer than the {shape.n_positions} positions of model {name_or_path}; "
            f"choose at most {shape.n_positions}"
        )
    return dataclasses.replace(shape, vocab_size=vocab_size)


def _read_shape(name_or_path: str) -> GPT2Shape:
    path = Path(name_or_path)
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        if Path(name_or_path).is_dir():
            raise UserError(f"model {name_or_path} is a folder without a config.json")
        hint = did_you_mean_path(name_or_path) or did_you_mean(name_or_path, KNOWN_SHAPES)
        raise UserError(f"model {name_or_path!r} is neither a known shape nor a GPT-2 config.json{hint}")
    try:
        config = read_json(path)
    except DamagedFileError as error:
        raise UserError(f"model {path} is no GPT-2 config.json: {error.reason}") from None
    if not isinstance(config, dict) or config.get("model_type") != "gpt2":
        family = config.get("model_type") if isinstance(config, dict) else None
        raise UserError(f"{path}: model_type must be 'gpt2', not {family!r}")
    known = {field.name for field in dataclasses.fields(GPT2Shape)}
    values = {"n_layer": 12, "n_embd": 768, "n_head": 12} | {k: v for k, v in config.items() if k in known}
    _check_sizes(path, values)
    for field in dataclasses.fields(GPT2Shape):
        kind = {"bool": (bool,), "str": (str,), "float": (int, float)}.get(str(field.type))
        if kind is not None and not isinstance(values.get(field.name, field.default), kind):
            raise UserError(f"{path}: {field.name} must be such as {field.default!r}, not {values[field.name]!r:.100}")
    return GPT2Shape(**values)


def _check_sizes(path: Path, values: dict[str, Any]) -> None:
    for key in ("n_layer", "n_embd", "n_head", "n_positions", "n_inner"):
        size = values.get(key)
        if size is None and (key == "n_inner" or key not in values):
            continue
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise UserError(f"{path}: {key} must be a whole number of at least 1, not {size!r}")
        if size > (most := MOST_LAYERS if key == "n_layer" else MOST_OF_A_SIZE):
            raise UserError(f"{path}: {key} is {size}; at most {most} is a model that anybody could train")
    if values["n_embd"] % values["n_head"]:
        raise UserError(f"{path}: n_embd {values['n_embd']} is not divisible by n_head {values['n_head']}")


def parameter_shapes(shape: GPT2Shape) -> dict[str, list[int]]:
    """The shape of every parameter by its name in ``GPT2LMHeadModel``, in its order; a tied one once."""
    d = shape.n_embd
    inner = shape.n_inner or 4 * d
    # Weights and biases of a block; its matrices are (in, out).
    block = {"ln_1": [d], "attn.c_attn": [d, 3 * d], "attn.c_proj": [d, d]}
    block |= {"ln_2": [d], "mlp.c_fc": [d, inner], "mlp.c_proj": [inner, d]}
    shapes = {"transformer.wte.weight": [shape.vocab_size, d], "transformer.wpe.weight": [shape.n_positions, d]}
    for layer in range(shape.n_layer):
        for name, size in block.items():
            shapes[f"transformer.h.{layer}.{name}.weight"] = list(size)
            shapes[f"transformer.h.{layer}.{name}.bias"] = size[-1:]
    shapes |= {"transformer.ln_f.weight": [d], "transformer.ln_f.bias": [d]}
    return shapes if shape.tie_word_embeddings else shapes | {"lm_head.weight": [shape.vocab_size, d]}


def differing_parameters(there: Mapping[str, list[int]], here: Mapping[str, list[int]]) -> str | None:
    """How the parameters of a checkpoint differ from a model's, by names and shapes; None where they do not."""
    different = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
    if not different:
        return None
    name, count = different[0], len(different)
    return f"{name} has shape {there.get(name)} there and {here.get(name)} here ({count} parameters differ)"


@functools.cache
def num_parameters(shape: GPT2Shape) -> int:
    """All parameters; tied embeddings count once."""
    return sum(map(math.prod, parameter_shapes(shape).values()))


def chunk_of_tokens(seq_length: int, vocab_size: int) -> int:
    """Tokens whose softmax a chunked loss holds at a time: never more than a row's."""
    return max(1, min(seq_length, CHUNK_ELEMENTS // vocab_size))


def flops_per_token(shape: GPT2Shape, seq_length: int) -> float:
    """Forward and backward FLOPs per token: 6N + 12·L·d·s (PaLM, arXiv:2204.02311, appendix B, with all parameters)."""
    return 6.0 * num_parameters(shape) + 12.0 * shape.n_layer * shape.n_embd * seq_length
