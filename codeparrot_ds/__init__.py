"""Trains code models from scratch with DeepSpeed: the CodeParrot recipe, from source files to a model on a Hub branch.

A launcher's rank calls ``codeparrot_ds.train.train(config)``; that name belongs to the submodule here.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from codeparrot_ds.version import __version__ as __version__

if TYPE_CHECKING:
    from codeparrot_ds.config.run_config import RunConfig
    from codeparrot_ds.data.constant_length import ConstantLengthDataset
    from codeparrot_ds.data.encoder import estimate_chars_per_token
    from codeparrot_ds.evaluation.complete import complete_code, first_block
    from codeparrot_ds.model.gpt2 import get_grouped_params


__all__ = [
    "ConstantLengthDataset",
    "RunConfig",
    "complete_code",
    "estimate_chars_per_token",
    "first_block",
    "get_grouped_params",
]

# Imported when first touched, so that `import codeparrot_ds` costs neither torch nor transformers.
_HOMES = {
    "ConstantLengthDataset": "codeparrot_ds.data.constant_length",
    "RunConfig": "codeparrot_ds.config.run_config",
    "complete_code": "codeparrot_ds.evaluation.complete",
    "estimate_chars_per_token": "codeparrot_ds.data.encoder",
    "first_block": "codeparrot_ds.evaluation.complete",
    "get_grouped_params": "codeparrot_ds.model.gpt2",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
