"""A trained model as a plain Hugging Face folder: safetensors weights, config, tokenizer, card."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from codeparrot_ds import durable
from codeparrot_ds.checkpoint.folders import EXPORT, TOKENIZER_FILES, Checkpoint
from codeparrot_ds.checkpoint.state import RunState, read_state
from codeparrot_ds.checkpoint.tensor_files import FragmentReader, TensorEntry, write_tensor_file
from codeparrot_ds.config.run_config import RunConfig
from codeparrot_ds.data.encoder import TOKENIZER_SETTINGS, tokenizer_of, tokenizer_settings
from codeparrot_ds.ds_config.facts import TORCH_DTYPES, precision
from codeparrot_ds.durable import WrittenFile
from codeparrot_ds.hub.card import NEEDED, Card, corpus_of, model_card
from codeparrot_ds.model.foreign import WEIGHTS
from codeparrot_ds.staging import staged_folder

TRAINING_STATE = "training_state.json"
"""Of an export, by a run's precision."""
SPECIAL_TOKENS = ("bos", "eos", "unk", "pad")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """What a Hugging Face folder is made of, but for the weights."""

    model_config: Any
    """The model's ``transformers`` config."""
    tokenizer: Path
    """Folder of the run's tokenizer."""
    dtype: str
    """Of the weights, by torch's name: ``float32``, ``bfloat16`` or ``float16``."""
    card: str
    """The text of README.md."""
    training_state: dict[str, Any]
    """Step, tokens, losses and how they were evaluated, for ``training_state.json``."""


def run_export(
    config: RunConfig,
    state: RunState,
    *,
    model_config: Any,
    name: str,
    num_parameters: int,
    versions: Mapping[str, str | None],
    losses: Sequence[tuple[int, float]] = (),
    hub_name: str | None = None,
) -> Export:
    """What goes with the weights of a run: its card, and what ``evaluate`` needs to see its rows again.

    Args:
        config: of the run.
        state: after the step that is exported.
        model_config: the model's ``transformers`` config.
        name: of the run.
        num_parameters: of the model.
        versions: package to version.
        losses: training losses by step, a few.
        hub_name: the model's name on the Hub, where its branch is there.
    """
    trained_in = precision(state.ds_config)
    card = Card(
        name=name,
        model=config.model,
        num_parameters=num_parameters,
        dtype=trained_in,
        step=state.step,
        tokens=state.tokens,
        losses=losses,
        evaluations=state.evaluations,
        config=state.config,
        ds_config=state.ds_config,
        corpus=corpus_of(config.data),
        fingerprint=state.data["fingerprint"],
        hub_name=hub_name,
        license=config.license,
        versions=versions,
    )
    evaluations = [row.as_json() for row in state.evaluations]
    return Export(
        model_config=model_config,
        tokenizer=Path(config.tokenizer),
        dtype=TORCH_DTYPES[trained_in],
        card=model_card(card),
        training_state={
            "run": name,
            "step": state.step,
            "tokens": state.tokens,
            "losses": losses,
            "evaluation": evaluations[-1] if evaluations else {},
            "evaluations": evaluations,
            "evaluated_with": {
                "seq_length": config.seq_length,
                "num_lanes": config.num_lanes,
                "batch_size": config.micro_batch_rows,
                "max_eval_steps": config.max_eval_steps,
                "intra_document_masking": config.intra_document_masking,
                "order_version": state.data["fingerprint"]["order_version"],
            },
        },
    )


def write_export(
    folder: Path, export: Export, shapes: Mapping[str, Sequence[int]], weights: Iterable[torch.Tensor]
) -> dict[str, WrittenFile]:
    """Writes what ``transformers`` and the converters to other formats need (docs/checkpoints.md), and the card.

    Args:
        folder: empty.
        export: everything but the weights.
        shapes: shape of every parameter by its name in the model, a tied one once.
        weights: the parameters in that order, in the export's precision, on the CPU, whole or in pieces; each is
            written before the next one is asked for.

    Returns:
        Each file by name.

    Raises:
        OSError: the system refused (disk full, no permission).
    """
    from transformers import GenerationConfig

    dtype = getattr(torch, export.dtype)
    entries = [TensorEntry(name=name, dtype=dtype, shape=tuple(shape)) for name, shape in shapes.items()]
    written = {WEIGHTS: write_tensor_file(folder / WEIGHTS, entries, weights, {"format": "pt"})}
    config = type(export.model_config).from_dict(export.model_config.to_dict())
    tokenizer, special_tokens = _tokenizer_files(
        export.tokenizer, eos_token_id=config.eos_token_id, context=config.n_positions
    )
    token_ids = {f"{kind}_token_id": special_tokens[kind] for kind in ("bos", "eos", "pad")}
    config.update({"architectures": ["GPT2LMHeadModel"], "dtype": dtype, **token_ids})
    config.use_cache = True  # Off in training, wanted in generation.
    # Names of the same from before, which converters (n_ctx: llama.cpp's) and transformers until 4.55 ask for.
    older = {"n_ctx": config.n_positions, "torch_dtype": export.dtype}
    contents = tokenizer | {
        "config.json": _json_bytes(json.loads(config.to_json_string()) | older),
        "generation_config.json": GenerationConfig(**token_ids).to_json_string().encode(),
        "README.md": export.card.encode(),
        TRAINING_STATE: durable.json_bytes(export.training_state),
    }
    for name, content in contents.items():
        written[name] = durable.write_file(folder / name, [content])
    return written


def _tokenizer_files(folder: Path, *, eos_token_id: int, context: int) -> tuple[dict[str, bytes], dict[str, int]]:
    """A run's tokenizer as an export has it, for programs that ask for special tokens and for the longest input.

    ``tokenizer.json`` stays byte for byte, and is all that training reads of a tokenizer: what is said beside it may
    neither change how it splits a text nor add tokens, which the model would not know.

    Args:
        folder: of the tokenizer.
        eos_token_id: the end-of-sequence token, which takes the place of special tokens that the folder does not name
            and of those that ``tokenizer.json`` does not have.
        context: tokens that the model reads at once.

    Returns:
        Contents by file name, and the id of each of `SPECIAL_TOKENS`.
    """
    kept = [name for name in TOKENIZER_FILES if name not in TOKENIZER_SETTINGS and (folder / name).is_file()]
    contents = {name: (folder / name).read_bytes() for name in kept}
    vocabulary = tokenizer_of(folder / "tokenizer.json", contents["tokenizer.json"])

    def token_id(token: Any) -> int | None:
        return vocabulary.token_to_id(token["content"] if isinstance(token, dict) else token)

    settings = tokenizer_settings(folder)
    ids = {}
    for kind in SPECIAL_TOKENS:
        key = f"{kind}_token"
        found = token_id(settings[key]) if key in settings and kind != "eos" else None
        if found is None:
            settings[key], found = vocabulary.id_to_token(eos_token_id), eos_token_id
        ids[kind] = found
    for key in ("cls_token", "sep_token", "mask_token"):
        if key in settings and token_id(settings[key]) is None:
            del settings[key]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        if isinstance(settings.get(key), list):
            settings[key] = [token for token in settings[key] if token_id(token) is not None]
    settings.pop("added_tokens_decoder", None)  # those of tokenizer.json once more, or others
    settings |= {
        # Takes tokenizer.json as it is; transformers 5's GPT2Tokenizer makes its own pre-tokenizer instead.
        "tokenizer_class": "PreTrainedTokenizerFast",
        # That class would give GPT-2 token types, too, whose embedding the model adds to each token's.
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": context,
        # A completion continues the end of its row.
        "padding_side": "left",
        # The clean-up joins "x ." to "x.": a decoded program would not be the program.
        "clean_up_tokenization_spaces": False,
    }
    return contents | {"tokenizer_config.json": _json_bytes(settings)}, ids


def _json_bytes(values: Mapping[str, Any]) -> bytes:
    """As transformers writes its files."""
    return f"{json.dumps(values, indent=2, sort_keys=True)}\n".encode()


def export_checkpoint(checkpoint: Checkpoint, out: Path, *, dtype: str, overwrite: bool) -> None:
    """Writes a checkpoint's weights, rounded from its masters, with config, tokenizer and card; complete or not at all.

    Args:
        checkpoint: without damage.
        out: folder to make.
        dtype: ``float32``, ``bfloat16`` or ``float16``.
        overwrite: whether an earlier export there may be replaced.

    Raises:
        UserError: ``out`` may not be replaced or cannot be written, or a weight is too large for float16.
    """
    from transformers import AutoConfig

    card = (checkpoint.export / "README.md").read_text(encoding="utf-8")
    if NEEDED not in card:  # of 0.1.0
        card = f"{card}\n{NEEDED}\n"
    export = Export(
        model_config=AutoConfig.from_pretrained(checkpoint.export, trust_remote_code=False),
        tokenizer=checkpoint.export,
        dtype=dtype,
        card=f"{card}\nThese weights were exported in {dtype} from the optimizer's masters.\n",
        training_state=checkpoint.read_json(f"{EXPORT}/{TRAINING_STATE}"),
    )
    shapes = read_state(checkpoint)[1].parameters
    weights = FragmentReader(checkpoint.path, checkpoint.manifest().files).weights(shapes, getattr(torch, dtype))
    with staged_folder(out, marker="config.json", overwrite=overwrite) as staging:
        write_export(staging, export, shapes, weights)
