"""The files of DeepSpeed's own checkpoints: which of them belong together, and their contents without running them.

They are pickles, programs that unpickling runs. Here torch's restricted unpickler reads them: tensors and plain values,
and of classes those in ``STAND_INS`` alone, each in the form of an inert stand-in, so that not even DeepSpeed's own
code takes part and a checkpoint of another version of it reads the same. Any other class is refused before it is read,
but for those in what the import does not use (``client_state``): there each becomes an ``Unread``.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy
import torch

from codeparrot_ds.errors import UserError, first_line
from codeparrot_ds.model.foreign import MODEL_STATES, OPTIMIZER_STATES


class Attributes:
    """An object of a checkpoint with nothing but its attributes."""


class Number(int):
    """A member of an enumeration of numbers."""


class Unread:
    """In the place of an object whose class or function is not known: takes and forgets whatever it is made of."""

    name = "a type of NumPy's"
    """Of that class or function; of a subclass for each."""

    def __new__(cls, *args: Any) -> Unread:
        return super().__new__(cls)

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class NumpyType:
    """A ``numpy.dtype``: its name, and the order of its bytes."""

    def __init__(self, name: str, *flags: Any) -> None:
        self.name, self.order = name, "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1]


def numpy_number(kind: NumpyType, value: Any = b"") -> Any:
    """A NumPy scalar as Python's number; learning rates and losses often are some."""
    if kind.name[:1] not in tuple("biuf"):  # text, dates, objects
        return Unread()
    return numpy.frombuffer(value, f"{kind.order}{kind.name}").item()


# All that DeepSpeed itself puts beside tensors and plain values, and what its examples pass as client_state.
STAND_INS: dict[str, Any] = {
    "deepspeed.runtime.fp16.loss_scaler.LossScaler": Attributes,
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler": Attributes,
    "deepspeed.runtime.zero.config.ZeroStageEnum": Number,
    "deepspeed.utils.tensor_fragment.fragment_address": Attributes,
    "argparse.Namespace": Attributes,
    "collections.deque": lambda *args: [],  # torch's unpickler fills no other list or dict than these
    "collections.defaultdict": lambda *args: {},
    "numpy.dtype": NumpyType,
    "numpy.core.multiarray.scalar": numpy_number,
    "numpy._core.multiarray.scalar": numpy_number,  # since NumPy 2
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


def load_file(path: Path, used: Collection[str] | None = None) -> dict[str, Any]:
    """The contents of a file that DeepSpeed wrote; tensors stay on the disk until they are looked at.

    Args:
        path: of the file.
        used: the keys that matter; the others are left out. None for all.

    Raises:
        UserError: it is damaged or cut off, or asks for a class or function that is not in ``STAND_INS``.
    """
    if not path.is_file() and path.exists():  # opening a named pipe waits for its writer
        raise UserError(f"{path} cannot be read: it is not a regular file")
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            # torch compresses nothing: what claims to be more than the file is would fill the memory.
            if any(member.compress_type != zipfile.ZIP_STORED for member in members) or (
                sum(member.file_size for member in members) > path.stat().st_size
            ):
                raise UserError(f"{path} is not a file that torch writes: it is compressed, or parts of it overlap")
            damaged = archive.testzip()  # torch writes a CRC of each tensor, and does not look at it again
    except (zipfile.BadZipFile, EOFError, ValueError, RuntimeError, struct.error) as error:
        raise UserError(f"{path} is cut off or damaged: {first_line(error)}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    if damaged:
        raise UserError(f"{path} is damaged: {damaged} in it is not what was written")
    foreign: list[str] = []
    try:
        known = [(stand_in, name) for name, stand_in in STAND_INS.items()]
        with torch.serialization.safe_globals(known):
            foreign = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
        if foreign and used is None:
            raise _foreign_code(path, foreign[0])
        unread = [(type("Unread", (Unread,), {"name": name}), name) for name in foreign]
        with torch.serialization.safe_globals([*known, *unread]):
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except UserError:
        raise
    except Exception as error:  # whatever a program that is none makes of torch's unpickler, and of its stack
        if foreign:
            raise _foreign_code(path, foreign[0]) from None
        raise UserError(f"{path} is not a file that DeepSpeed writes: {first_line(error)}") from None

    if not isinstance(content, dict):
        raise UserError(f"{path} is not a file that DeepSpeed writes: it holds a {type(content).__name__}")
    if used is not None:
        content = {key: content[key] for key in used if key in content}
    for value in _values_in(content):
        kind = value if isinstance(value, type) else type(value)
        if issubclass(kind, Unread):
            raise _foreign_code(path, kind.name)
        if isinstance(value, torch.Tensor) and value.nbytes > value.untyped_storage().nbytes():
            raise UserError(f"{path} is damaged: a tensor of {value.numel():,} values has not as many in the file")
    return content


def _foreign_code(path: Path, name: str) -> UserError:
    return UserError(
        f"{path} would run code that is not DeepSpeed's ({name}) and was not loaded: save again without it, mostly a "
        "part of client_state"
    )


def _values_in(content: Any) -> Iterator[Any]:
    """All values in plain ones of any depth."""
    todo, seen = [content], set()
    while todo:
        value = todo.pop()
        if id(value) not in seen:
            seen.add(id(value))
            yield value
            if isinstance(value, dict):
                todo += [*value, *value.values()]
            elif isinstance(value, (list, tuple, set)):
                todo += value
            elif isinstance(value, Attributes):
                todo.append(vars(value))
