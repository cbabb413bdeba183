"""One programming problem, whatever schema it was published in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from codeparrot_ds.sandbox.judge import Check

BLOCK_STARTS = ("\nclass", "\ndef", "\n#", "\n@", "\nprint", "\nif")
"""Each starts another block at the left margin, which ends the one before."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One problem."""

    task_id: str
    prompt: str
    """What a model completes: without the space at its end, which tokenizers join to what follows, as in the recipe."""
    solution: str | None
    """The set's own completion (the reference solution); None where the set has none."""
    check: Check
    ends: tuple[str, ...]
    """Texts of which the first ends a completion."""

    def cut(self, completion: str) -> str:
        """Returns a completion up to its block's end, without trailing space."""
        return cut(completion, self.ends).rstrip()

    def program(self, completion: str) -> str:
        """Returns the source that is judged."""
        return self.prompt + completion + "\n"


def cut(text: str, ends: Sequence[str]) -> str:
    """Returns a text up to the first of the ends."""
    return text[: min((position for end in ends if (position := text.find(end)) >= 0), default=None)]
