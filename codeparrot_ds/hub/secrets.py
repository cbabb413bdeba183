"""Finds what must not reach a file of a run or leave this machine: tokens in well-known formats, and those in use."""

from __future__ import annotations

import os
from pathlib import Path

from codeparrot_ds.corpus.redaction import find_key
from codeparrot_ds.errors import UserError

# Written by the tokenizer's training on public text, and large: a token of the vocabulary is no secret of ours.
_NOT_READ = ("tokenizer.json", "vocab.json", "merges.txt")
_READ = (".json", ".md", ".txt", ".yaml")
_NAMES = ("TOKEN", "KEY", "SECRET", "PASSWORD", "PASSWD")
_LEAST_LENGTH = 12  # of a value that could not stand in a text by chance


def find_secret(text: str) -> str | None:
    """Says what secret a text holds, without repeating it; None for none that is known.

    That is the value of an environment variable whose name ends as those of secrets do (``HF_TOKEN``,
    ``WANDB_API_KEY``), or a key in one of the formats that secret scanners look for.
    """
    for name, value in os.environ.items():
        value = value.strip()
        is_secret = name.upper().endswith(_NAMES) and len(value) >= _LEAST_LENGTH and not value.startswith("/")
        if is_secret and value in text:  # a path is where a secret lies, and is none
            return f"the value of {name}"
    kind = find_key(text)
    return None if kind is None else f"what looks like a secret ({kind.lower().replace('_', ' ')})"


def check_for_secrets(text: str, where: str) -> None:
    """Refuses a text that holds a secret, by naming the place and not the secret."""
    found = find_secret(text)
    if found is not None:
        raise UserError(
            f"{where} holds {found}: remove it, everything of a run is written to its logs and its branch; tokens are "
            "read from the environment (HF_TOKEN, WANDB_API_KEY)"
        )


def check_export(folder: Path, names: list[str]) -> None:
    """Refuses to publish an export with a secret in one of its texts."""
    for name in names:
        if name.endswith(_READ) and name.rpartition("/")[2] not in _NOT_READ:
            check_for_secrets((folder / name).read_text(encoding="utf-8", errors="replace"), str(folder / name))
