"""What another program's file or folder holds, by the names in it, and what works with it.

No file is read but a model's settings, for whether it wants code of its own to be run.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from codeparrot_ds.errors import UserError
from codeparrot_ds.json_files import DamagedFileError, read_json

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
"""Names the files of a model whose weights are in several."""
MODEL_STATES = "_model_states.pt"
OPTIMIZER_STATES = "_optim_states.pt"
"""How files of DeepSpeed's checkpoints end: one at least of the first, and one of the second per rank above stage 0."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Foreign:
    """What a path holds, and which folder is a model instead, or how to make one."""

    what: str
    how: str = ""
    """What makes ``made`` of it; empty where ``model`` is there."""
    made: str = "DIR"
    """What the sentence ``how`` calls its result: a model's folder, DIR, or a RUN."""
    model: Path | None = None

    @property
    def as_model(self) -> str:
        """What to do where a model is wanted."""
        return f"name {self.model}" if self.model else f"{self.how}, and name {self.made}"

    @property
    def as_start(self) -> str:
        """What to do where a run is to begin."""
        if self.made == "RUN":
            return self.how
        how = f"{self.how}, and " if self.how else ""
        return f"{how}begin a run with the weights: `train --init-from {self.model or self.made}`"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """A row of `KINDS`."""

    what: str
    marker: str
    """Pattern of a path that folders of this kind hold."""
    how: str
    """With ``{place}`` for the folder, and ``{named}`` for the one that was named."""
    unless: str | None = None
    """Pattern of a path that they do not hold."""
    made: str = "DIR"
    is_below: bool = False
    """Whether the folder above it is commonly named, too."""

    def place(self, folder: Path) -> Path | None:
        """The folder of this kind: the one that is named, or the newest in it; None where neither is."""
        return next(filter(self.fits, (folder, *(newest_first(folder) if self.is_below else ()))), None)

    def fits(self, folder: Path) -> bool:
        return _holds(folder, self.marker) and not (self.unless and _holds(folder, self.unless))

    def foreign(self, named: Path, place: Path) -> Foreign:
        return Foreign(what=self.what, how=self.how.format(named=named, place=place), made=self.made)


_BY_HAND = "load it into the model, write model and tokenizer with save_pretrained('DIR')"
UNIVERSAL = Kind(
    what="a universal checkpoint of DeepSpeed's",
    marker="zero/*/fp32.pt",
    how="make a RUN of the checkpoint that it was converted from with `codeparrot-ds checkpoint import`",
    made="RUN",
    is_below=True,
)
# The first that fits is taken. Some folders hold two: what says most about the weights comes first.
KINDS = (
    Kind(
        what="a PEFT adapter, which is a change to another model's weights",
        marker="adapter_config.json",
        how="merge it into that model with merge_and_unload(), write the result and the tokenizer with "
        "save_pretrained('DIR')",
    ),
    Kind(
        what="a checkpoint of DeepSpeed's",
        marker="*_states.pt",
        unless=UNIVERSAL.marker,
        how="make a run of it with `codeparrot-ds checkpoint import {named} RUN`",
        made="RUN",
        is_below=True,
    ),
    UNIVERSAL,
    Kind(
        what="an FSDP checkpoint of accelerate's (.distcp)",
        marker="pytorch_model_fsdp_0/*.distcp",
        how="write its weights with `accelerate merge-weights {place}/pytorch_model_fsdp_0 DIR`, put the model's "
        "config.json and tokenizer.json beside them",
        is_below=True,
    ),
    Kind(
        what="a checkpoint of PyTorch's Distributed Checkpoint (.distcp)",
        marker="*.distcp",
        how="write it as one file with `python -m torch.distributed.checkpoint.format_utils dcp_to_torch {place} "
        f"FILE`, {_BY_HAND}",
        is_below=True,
    ),
    Kind(
        what="an FSDP checkpoint as a pickle",
        marker="pytorch_model_fsdp*.bin",
        how=_BY_HAND,
        is_below=True,
    ),
    Kind(
        what="a checkpoint of Megatron-LM's",
        marker="mp_rank_*/model_optim_rng.pt",
        how="convert it into a transformers model with its tokenizer, DIR",
        is_below=True,
    ),
    Kind(
        what="weights as pickles (pytorch_model.bin), which can run code and are not read",
        marker="pytorch_model*.bin",
        how="load them with AutoModelForCausalLM.from_pretrained, write model and tokenizer with "
        "save_pretrained('DIR')",
    ),
    Kind(
        what="a GGUF model, which is made for inference",
        marker="*.gguf",
        how="take the transformers model that it was made from, DIR",
    ),
    Kind(
        what=f"weights without the config.json or the {WEIGHTS_INDEX} that belongs to them",
        marker="model*.safetensors",
        how="put what is missing and the tokenizer.json beside them in a folder DIR",
    ),
    *(
        Kind(what=f"a pickle of PyTorch's (*{ending}), which can run code and is not read", marker=f"*{ending}",
             how=_BY_HAND)
        for ending in (".pt", ".pth", ".ckpt", ".bin")
    ),
)  # fmt: skip


def is_model(folder: Path) -> bool:
    """Whether a folder holds a model that can be read: its config, and weights in safetensors."""
    return (folder / "config.json").is_file() and any((folder / name).is_file() for name in (WEIGHTS, WEIGHTS_INDEX))


def refuse_own_code(folder: Path | str, files: tuple[str, ...] = ("config.json", "tokenizer_config.json")) -> None:
    """Refuses a model or a tokenizer that brings code of its own, before anything of it is loaded.

    ``transformers`` would import that code, with all that this user may do, after one question on the terminal.

    Raises:
        UserError: one of the files has an ``auto_map``, which names the code.
    """
    for path in (Path(folder) / name for name in files):
        try:
            settings = read_json(path)
        except (OSError, DamagedFileError):
            continue  # what is no JSON is said where it is loaded
        if isinstance(settings, dict) and settings.get("auto_map"):
            raise UserError(own_code(path))


def own_code(place: Path | str) -> str:
    """Why a model is not taken that brings code of its own."""
    return (
        f"{place} names code of its own ('auto_map'), and models and tokenizers that bring code are not taken: name "
        "one that transformers loads without, or remove 'auto_map' from a copy if transformers knows its model_type"
    )


def recognized(path: Path) -> Foreign | None:
    """What a file or folder holds; None for what is not known, this program's own runs and checkpoints among it."""
    if path.is_file():
        if is_model(path.parent):
            return Foreign(what="a part of a model", model=path.parent)
        kind = next((kind for kind in KINDS if path.match(kind.marker)), None)
        return kind.foreign(path.parent, path.parent) if kind else None
    if is_model(path):
        return Foreign(what="a model without the state of an optimizer", model=path)
    if snapshot := _snapshot(path):
        return Foreign(what="a model of the Hub's cache", model=snapshot)
    if saved := trainer_checkpoints(path):
        newest = recognized(saved[0]) or Foreign(what="", model=saved[0])
        return dataclasses.replace(newest, what="the checkpoints of a transformers Trainer")
    places = ((kind, kind.place(path)) for kind in KINDS)
    return next((kind.foreign(path, place) for kind, place in places if place), None)


def _holds(folder: Path, pattern: str) -> bool:
    return next(folder.glob(pattern), None) is not None


def newest_first(folder: Path, names: str = "*") -> list[Path]:
    """The folders in a folder, by the number in their names."""

    def number(path: Path) -> tuple[int, str]:
        return int("".join(filter(str.isdecimal, path.name)) or 0), path.name

    return sorted(filter(Path.is_dir, folder.glob(names)), key=number, reverse=True)


def trainer_checkpoints(folder: Path) -> list[Path]:
    """Those that a transformers Trainer saved in its output folder, newest first."""
    return [path for path in newest_first(folder, "checkpoint-*") if (path / "trainer_state.json").is_file()]


def _snapshot(folder: Path) -> Path | None:
    """The model in a ``models--org--name`` of the Hub's cache: that of its main, or the last that is there."""
    main, snapshots = folder / "refs" / "main", folder / "snapshots"
    revision = main.read_bytes().strip() if main.is_file() and main.stat().st_size < 100 else b""
    named = [snapshots / revision.decode()] if revision.isalnum() else []  # a commit's id
    return next(filter(is_model, [*named, *newest_first(snapshots)]), None)
