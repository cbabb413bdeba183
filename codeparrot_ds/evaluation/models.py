"""What `evaluate` and `complete` take as a model: a run, a checkpoint, an exported folder, or a name on the Hub."""

from __future__ import annotations

import contextlib
import importlib.metadata
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codeparrot_ds.checkpoint.folders import find_model, find_run
from codeparrot_ds.checkpoint.run_folder import recorded_fingerprint
from codeparrot_ds.config.files import load_config
from codeparrot_ds.data.datasets import check_local_data, split_shards
from codeparrot_ds.data.encoder import tokenizer_of
from codeparrot_ds.data.hub_files import hub_file
from codeparrot_ds.data.shards import Shard
from codeparrot_ds.errors import UserError, first_line
from codeparrot_ds.json_files import DamagedFileError, read_object
from codeparrot_ds.model.foreign import own_code, refuse_own_code
from codeparrot_ds.paths import exists, in_runs

DTYPES = ("auto", "float32", "bfloat16", "float16")


def named_model(source: str, *, device: str | None = None, seq_length: int | None = None) -> str:
    """Returns a model as a command was given it, with the path of a run that was given by its bare name.

    Raises ``UserError`` for one that is not there, a device that this machine lacks, and rows that are longer than what
    the model reads, before anything heavy is imported.
    """
    if device is not None:
        _check_device(device)
    source = in_runs(source)
    place = find_model(source)
    config = Path(place) / "config.json"
    if place == source and not exists(source):
        refuse_own_code(hub_file(source, "config.json", what="model").parent)
    refuse_own_code(place)
    if seq_length is not None and config.is_file():
        with contextlib.suppress(DamagedFileError):  # what is no config is said where the model is loaded
            context = read_object(config).get("n_positions")
            check_seq_length(seq_length, context if type(context) is int else None)
    return source


def check_seq_length(seq_length: int, context: int | None) -> None:
    """Raises ``UserError`` for rows that a model cannot read."""
    if seq_length < 2 or context is not None and seq_length > context:
        raise UserError(f"seq_length is {seq_length}; the model reads rows of 2 to {context} tokens")


def _check_device(device: str) -> None:
    from codeparrot_ds.devices import local_device, local_ranks

    name = re.fullmatch(r"(cpu|cuda|mps|xpu)(?::(\d+))?", device)
    if name is None:
        raise UserError(f"device {device!r} is none that PyTorch knows; choose cpu, cuda, cuda:N, mps or xpu")
    version = importlib.metadata.version("torch")
    if name[1] != "cuda" or "rocm" in version:  # AMD's GPUs are called so too, and are not counted here
        return
    number = local_ranks("cuda") if local_device() == "cuda" else 0
    if number == 0:
        raise UserError(f"device {device!r}: this machine has no GPU that its PyTorch ({version}) can use; choose cpu")
    if int(name[2] or 0) >= number:
        raise UserError(f"device {device!r}: this machine's GPUs are cuda:0 to cuda:{number - 1}")


@dataclass(frozen=True, kw_only=True)
class EvaluatedData:
    """The data that a model is evaluated on, and how its shards are found."""

    name: str
    named: bool
    """Whether it was named for this: then a folder whose names tell no splits apart may be it."""
    columns: str = ""
    began: Mapping[str, Any] | None = None
    """The fingerprint of the run's data, where it is that."""

    def check(self, split: str) -> None:
        """Raises a UserError where local data lacks the split; the Hub is not asked."""
        check_local_data(self.name, split, named=self.named, began=self.began)

    def shards(self, split: str) -> list[Shard]:
        """The shards of the split."""
        return split_shards(self.name, split, named=self.named, columns=self.columns, began=self.began)


def data_of(source: str | Path, split: str, data: str | None = None, columns: str = "") -> EvaluatedData:
    """Returns the data that a model is evaluated on: the given, or the run's own.

    Raises ``UserError`` for a model that is no run's where none is given, and for data that is neither here nor on the
    Hub, which is not asked.
    """
    run = find_run(source)
    config = None if run is None else load_config(run / "config.yaml")
    own = "" if config is None else (config.validation_data if split == "validation" else "") or config.data
    if not data and not own:
        raise UserError(f"{source} does not say which corpus it belongs to; name one with --data")
    if run is None or config is None or (data and data != own):
        found = EvaluatedData(name=str(data), named=True, columns=columns)
    else:
        named = bool(data or config.validation_data)
        began = recorded_fingerprint(run)
        found = EvaluatedData(name=own, named=named, columns=columns or config.columns, began=began)
    found.check(split)
    return found


def load_model(source: str | Path, *, dtype: str = "auto", device: str | None = None) -> tuple[Any, Any]:
    """Returns a causal language model (in evaluation mode, on its device) and its tokenizer.

    Args:
        source: as for ``find_model``.
        dtype: one of ``DTYPES``; ``auto`` keeps the precision of the stored weights.
        device: a torch device; the GPU by default, where there is one.

    Raises ``UserError`` for a model that cannot be found, read, or used with its own tokenizer.
    """
    import torch
    import transformers
    from safetensors import SafetensorError

    if dtype not in DTYPES:
        raise UserError(f"dtype '{dtype}' is none of {', '.join(DTYPES)}")
    place = find_model(source)
    refuse_own_code(place)
    tokenizer_file = Path(place) / "tokenizer.json"
    if tokenizer_file.is_file():  # what the library makes of damage is no error of transformers'
        tokenizer_of(tokenizer_file, tokenizer_file.read_bytes())
    shows_bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(place, trust_remote_code=False)
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            place, dtype=dtype, output_loading_info=True, trust_remote_code=False
        )
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        if "trust_remote_code" in str(error):  # of a model on the Hub, whose files were not looked at before
            raise UserError(own_code(place)) from error
        raise UserError(f"{place}: the model cannot be loaded: {first_line(error)}") from error
    finally:
        if shows_bars:
            transformers.utils.logging.enable_progress_bar()
    model, report = loaded
    # Rows here are whole or come with a mask: transformers would take an end-of-sequence token at an end for padding.
    model.config.pad_token_id = None
    if report["missing_keys"]:  # transformers would continue with random values
        raise UserError(f"{place}: the weights lack {', '.join(sorted(report['missing_keys'])[:3])}")
    if len(tokenizer) > model.config.vocab_size:
        raise UserError(
            f"{place}: the tokenizer has {len(tokenizer)} tokens and the model only {model.config.vocab_size}; "
            "they do not belong together"
        )
    try:
        model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except (RuntimeError, AssertionError) as error:  # an unknown name, no such device, or too little memory on it
        raise UserError(f"{place}: the model cannot go to device '{device}': {first_line(error)}") from error
    return model.eval(), tokenizer


def context_length(model: Any) -> int | None:
    """Returns the most tokens that the model reads at once, None when its config does not say."""
    return getattr(model.config, "max_position_embeddings", None)
