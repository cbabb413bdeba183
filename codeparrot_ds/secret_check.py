"""Refuses what must not reach a file of a run or leave this machine: secrets in well-known forms, and those in use."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from codeparrot_ds.errors import UserError
from codeparrot_ds.secret_forms import find_secret, may_be_secret, names_a_secret

# Written by the tokenizer's training on public text, and large: a token of the vocabulary is no secret of ours.
_NOT_READ = ("tokenizer.json", "vocab.json", "merges.txt")
_READ = (".json", ".md", ".txt", ".yaml")
_REMEDY = (
    "remove it, everything of a run is written to its logs and its branch; tokens are read from the environment "
    "(HF_TOKEN, WANDB_API_KEY)"
)


def check_for_secrets(text: str, where: str) -> None:
    """Refuses a text that holds a secret, by naming the place and not the secret."""
    found = find_secret(text)
    if found is not None:
        raise UserError(f"{where} holds {found}: {_REMEDY}")


def check_settings(settings: Mapping[str, Any], where: str) -> None:
    """Refuses settings that hold a secret, also one of no known form under a name such as ``api_key``."""
    check_for_secrets(json.dumps(settings, default=str), where)
    named = next((key for key, value in _texts(settings) if names_a_secret(key) and may_be_secret(value)), None)
    if named is not None:
        raise UserError(f"{where} holds a secret under {named}: {_REMEDY}")


def _texts(settings: Any) -> Iterator[tuple[str, str]]:
    """Every text in nested settings, with its key."""
    children = settings.items() if isinstance(settings, Mapping) else [("", each) for each in settings]
    for key, value in children:
        if isinstance(value, str):
            yield key, value
        elif isinstance(value, (Mapping, list, tuple)):
            yield from _texts(value)


def check_export(folder: Path, names: list[str]) -> None:
    """Refuses to publish an export with a secret in one of its texts."""
    for name in names:
        if name.endswith(_READ) and name.rpartition("/")[2] not in _NOT_READ:
            check_for_secrets((folder / name).read_text(encoding="utf-8", errors="replace"), str(folder / name))
