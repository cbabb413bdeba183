"""The files of DeepSpeed's own checkpoints: which of them belong together, and their contents without running them.

They are pickles, programs that unpickling runs. Here torch's restricted unpickler reads them: tensors and plain values,
and of classes those in ``STAND_INS`` alone, each in the form of an inert stand-in, so that not even DeepSpeed's own
code takes part and a checkpoint of another version of it reads the same. Anything else is refused before it is read.
"""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from codeparrot_ds.checkpoint.import_check import MODEL_STATES
from codeparrot_ds.errors import UserError

OPTIMIZER_STATES = "_optim_states.pt"


class Attributes:
    """An object of a checkpoint with nothing but its attributes."""


class Number(int):
    """A member of an enumeration of numbers."""


# All that DeepSpeed itself puts beside tensors and plain values, and what its examples pass as client_state.
STAND_INS: dict[str, type] = {
    "deepspeed.runtime.fp16.loss_scaler.LossScaler": Attributes,
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler": Attributes,
    "deepspeed.runtime.zero.config.ZeroStageEnum": Number,
    "deepspeed.utils.tensor_fragment.fragment_address": Attributes,
    "argparse.Namespace": Attributes,
}


def model_states_file(checkpoint: Path) -> Path:
    """The file of what all ranks share; at stage 3 the first rank's.

    Raises:
        UserError: it is missing, or the model was split between ranks (tensor, pipeline or expert parallelism).
    """
    files = {path.name for path in checkpoint.glob("*.pt")}
    foreign = sorted(
        name for name in files if name.startswith(("layer_", "expp_rank_", "expert_")) or "mp_rank_01_" in name
    )
    if foreign:
        raise UserError(
            f"{checkpoint} is of a model that was split between ranks ({foreign[0]}): only data-parallel training "
            "can be imported"
        )
    for name in (f"mp_rank_00{MODEL_STATES}", f"zero_pp_rank_0_mp_rank_00{MODEL_STATES}"):
        if name in files:
            return checkpoint / name
    raise UserError(f"{checkpoint} is not complete: zero_pp_rank_0_mp_rank_00{MODEL_STATES} is missing")


def optimizer_files(checkpoint: Path, world_size: int, *, bf16: bool) -> list[Path]:
    """The file of every rank's share of the optimizer, in rank order; those of more ranks are of an older save.

    Raises:
        UserError: one is missing.
    """
    prefix = "bf16_" if bf16 else ""
    names = [f"{prefix}zero_pp_rank_{rank}_mp_rank_00{OPTIMIZER_STATES}" for rank in range(world_size)]
    missing = [name for name in names if not (checkpoint / name).is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(
            f"{checkpoint} was saved by {world_size} rank(s) and is not complete: {missing[0]}{more} is missing"
        )
    return [checkpoint / name for name in names]


def load_file(path: Path) -> dict[str, Any]:
    """The contents of a file that DeepSpeed wrote; tensors stay on the disk until they are looked at.

    Raises:
        UserError: it is damaged or cut off, or asks for a class or function that is not in ``STAND_INS``.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch writes a CRC of each tensor, and does not look at it again
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError) as error:
        raise UserError(f"{path} is cut off or damaged: {error}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    if damaged:
        raise UserError(f"{path} is damaged: {damaged} in it is not what was written")
    try:
        with torch.serialization.safe_globals([(stand_in, name) for name, stand_in in STAND_INS.items()]):
            foreign = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
            if foreign:
                raise UserError(
                    f"{path} would run code that is not DeepSpeed's ({foreign[0]}) and was not loaded: save again "
                    "without it, mostly a part of client_state"
                )
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, KeyError, EOFError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{path} is not a file that DeepSpeed writes: {reason}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a file that DeepSpeed writes: it holds a {type(content).__name__}")
    return content
