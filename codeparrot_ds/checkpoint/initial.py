"""A run that begins with the weights and the tokenizer of another: ``--init-from``. Torch only where weights are read.

Nothing else of the other run is taken: the optimizer, the schedule, the data and the step begin anew.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from codeparrot_ds.checkpoint.folders import TOKENIZER_FILES, checkpoint_folders, find_model
from codeparrot_ds.checkpoint.run_folder import KEPT_TOKENIZERS
from codeparrot_ds.config.files import load_config
from codeparrot_ds.config.run_config import RunConfig
from codeparrot_ds.data.encoder import find_tokenizer, load_encoder
from codeparrot_ds.errors import UserError, first_line
from codeparrot_ds.hub.revision import fetch, parse_revision
from codeparrot_ds.json_files import DamagedFileError, parts_of, read_object
from codeparrot_ds.model.foreign import WEIGHTS, WEIGHTS_INDEX, is_model, recognized, refuse_own_code
from codeparrot_ds.model.shapes import differing_parameters, find_shape, parameter_shapes
from codeparrot_ds.paths import in_runs
from codeparrot_ds.resolved_run import encoder_and_shape
from codeparrot_ds.staging import staged_folder

# What two configs may differ in and still have the same weights; the activation's two names are one function.
_FREE = ("vocab_size", "activation_function")
_EMBEDDING = "transformer.wte.weight"
_FLOATS = ("F64", "F32", "F16", "BF16")


class StoredTensor(NamedTuple):
    """Where a parameter's values are: a safetensors file, and what its header says of them."""

    file: Path
    name: str
    shape: list[int]
    dtype: str
    """As safetensors names it, such as ``BF16``."""


def with_initial_model(config: RunConfig) -> RunConfig:
    """Resolves ``init_from`` of a run that is about to start: to a commit or a folder, and its tokenizer.

    A run that resumes from a checkpoint keeps what it began with, and nothing is fetched.

    Returns:
        The config with ``init_from`` pinned and ``tokenizer`` set, maybe to a folder that goes with this process
        (`with_kept_tokenizer`); unchanged without ``init_from``.

    Raises:
        UserError: the model cannot be had, is of another shape than ``model``, or has another tokenizer than the one
            that was named.
    """
    if not config.init_from:
        return config
    run = Path(config.output_dir) / str(config.run_name)
    if resumes(config) and (run / "config.yaml").is_file():
        saved = load_config(run / "config.yaml")
        return dataclasses.replace(config, init_from=saved.init_from, tokenizer=config.tokenizer or saved.tokenizer)
    config = dataclasses.replace(config, init_from=in_runs(config.init_from, config.output_dir))
    revision = parse_revision(config.init_from)
    if revision is not None and revision.is_pinned and config.tokenizer:
        return config  # by the command
    if revision is not None:
        revision = revision.pinned()
        source, folder = str(revision), fetch(revision)
    else:
        folder = _folder_of(config.init_from).absolute()
        source = str(folder)
    refuse_own_code(folder)
    tokenizer = _tokenizer(config, folder, source)
    encoder, shape = encoder_and_shape(dataclasses.replace(config, tokenizer=tokenizer))
    there = find_shape(str(folder), vocab_size=encoder.vocab_size, seq_length=1)
    differing = [
        f"{field.name} is {getattr(there, field.name)} there and {getattr(shape, field.name)} here"
        for field in dataclasses.fields(shape)
        if field.name not in _FREE and getattr(there, field.name) != getattr(shape, field.name)
    ]
    if differing:
        raise UserError(
            f"--init-from {config.init_from} is another model than --model {config.model} ({'; '.join(differing)}); "
            "name its shape or its config.json with --model"
        )
    expected = parameter_shapes(shape)
    found = {name: tensor.shape for name, tensor in _weights_in(folder, expected, config.init_from).items()}
    if found[_EMBEDDING][:1] != [encoder.vocab_size]:
        raise UserError(f"--init-from {config.init_from}: its weights are not for {encoder.vocab_size} tokens")
    if difference := differing_parameters(found, expected):
        raise UserError(f"--init-from {config.init_from}: its weights are not those of its config.json: {difference}")
    return dataclasses.replace(config, init_from=source, tokenizer=tokenizer)


def with_kept_tokenizer(config: RunConfig, typed: str) -> RunConfig:
    """The config with its tokenizer in a folder that outlives this start and that every host sees.

    What came from the Hub or out of a git repository is copied beside the runs.

    Args:
        config: as `with_initial_model` leaves it.
        typed: its ``tokenizer`` before that.
    """
    is_a_models_own = not typed and parse_revision(config.init_from) is None
    if not config.tokenizer or os.path.isdir(typed) or is_a_models_own:
        return config
    folder, digest = find_tokenizer(config.tokenizer), load_encoder(config.tokenizer).fingerprint
    place = Path(config.output_dir).absolute() / KEPT_TOKENIZERS / digest[:12]
    if not place.is_dir():
        with staged_folder(place, marker="tokenizer.json", overwrite=False) as staging:
            for name in TOKENIZER_FILES:
                if (folder / name).is_file():
                    shutil.copyfile(folder / name, staging / name)
    return dataclasses.replace(config, tokenizer=str(place))


def resumes(config: RunConfig) -> bool:
    """Whether the weights come from a checkpoint, so that ``init_from`` has nothing to say."""
    checkpoints = Path(config.output_dir) / str(config.run_name) / "checkpoints"
    return config.resume not in ("auto", "never") or (config.resume == "auto" and bool(checkpoint_folders(checkpoints)))


def _weights_in(folder: Path, names: Iterable[str], source: str) -> dict[str, StoredTensor]:
    """Where a model's folder has the values of each parameter; only headers are read.

    A file of the model without its head (such as the Hub's gpt2) leaves the first part of each name out, and one of two
    tied parameters may be there under the other's name.

    Args:
        folder: of the model.
        names: of the parameters, as in ``GPT2LMHeadModel``, of tied ones the first.
        source: what ``init_from`` calls it.

    Raises:
        UserError: a file cannot be read, some parameters are not in it, or their values are not floating point.
    """
    if not is_model(folder):
        raise UserError(f"--init-from {source} has no {WEIGHTS}, the only format of weights that is read")
    stored = {name: tensor for file in _weight_files(folder) for name, tensor in _tensors_in(file).items()}
    names, found, lacking = list(names), {}, []
    for name in names:
        tied = ["lm_head.weight"] if name == _EMBEDDING and "lm_head.weight" not in names else []
        there = (stored[each] for each in (name, name.removeprefix("transformer."), *tied) if each in stored)
        if (tensor := next(there, None)) is None:
            lacking.append(name)
        else:
            found[name] = tensor
    if lacking:
        raise UserError(f"--init-from {source} has no weights for {', '.join(sorted(lacking)[:3])}")
    if rounded := next((tensor for tensor in found.values() if tensor.dtype not in _FLOATS), None):
        raise UserError(
            f"--init-from {source} has {rounded.name} in {rounded.dtype}: quantized weights cannot be trained, name "
            "the model that was quantized"
        )
    return found


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model: one, or those of an index."""
    index = folder / WEIGHTS_INDEX
    if (folder / WEIGHTS).is_file() or not index.is_file():
        return [folder / WEIGHTS]
    try:
        with parts_of(index):
            names = sorted(set(read_object(index)["weight_map"].values()))
            return [folder / Path(name).name for name in names]
    except DamagedFileError:
        raise UserError(f"{index} cannot be read: it is no index of safetensors files, or damaged") from None


def _tensors_in(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of a safetensors file by its name, from its header.

    Raises:
        UserError: it cannot be read, or is damaged or cut off: the header has to account for every byte.
    """
    from safetensors import SafetensorError, safe_open

    try:
        if not path.is_file() and path.exists():  # opening a named pipe waits for its writer
            raise UserError(f"{path} cannot be read: it is not a regular file")
        with safe_open(path, "np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            return {name: StoredTensor(path, name, each.get_shape(), each.get_dtype()) for name, each in slices.items()}
    except OSError as error:
        reason = str(error).removesuffix(f": {path}")
    except SafetensorError as error:
        reason = f"it is no safetensors file, or damaged ({first_line(error)})"
    raise UserError(f"{path} cannot be read: {reason}")


def load_initial_weights(model: Any, config: RunConfig, ranks: Any, *, partitioned: bool) -> None:
    """Puts the weights of ``init_from`` into a model that was just built; rank 0 reads them; collective."""
    if not config.init_from or ranks.on_main(lambda: resumes(config)):
        return
    from codeparrot_ds.model.gpt2 import load_weights

    names = [name for name, _ in model.named_parameters()]
    weights = ranks.on_main(lambda: initial_weights(config.init_from, names))
    load_weights(model, weights if ranks.is_main else None, partitioned=partitioned)


def initial_weights(source: str, names: Iterable[str]) -> dict[str, tuple[Path, str]]:
    """The file, and the name in it, of each parameter's values in what ``init_from`` names."""
    revision = parse_revision(source)
    folder = fetch(revision) if revision is not None else _folder_of(source)
    return {name: (tensor.file, tensor.name) for name, tensor in _weights_in(folder, names, source).items()}


def _folder_of(source: str) -> Path:
    try:
        folder = Path(find_model(source))
    except UserError as error:
        raise UserError(f"--init-from {source}: {error}") from None
    if not folder.is_dir():
        raise UserError(
            f"--init-from {source}: no such run or model folder; a model on the Hub is named with its branch, as in "
            "org/name@main"
        )
    if not is_model(folder) and (foreign := recognized(folder)):
        raise UserError(f"--init-from {source}: {folder} holds {foreign.what}: {foreign.as_model}")
    return folder


def _tokenizer(config: RunConfig, folder: Path, source: str) -> str:
    """The tokenizer: the one that was named, or the model's own."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"--init-from {source} has no tokenizer.json, so its weights mean nothing")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if config.tokenizer:
        if load_encoder(config.tokenizer).fingerprint != digest:
            raise UserError(
                f"the tokenizer {config.tokenizer} is not the one that --init-from {source} was trained with; leave "
                "--tokenizer out to take that one"
            )
        return config.tokenizer
    return str(folder)
