"""Prompts from files, and what a run completes while it trains. No torch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from codeparrot_ds.config.run_config import RunConfig
from codeparrot_ds.errors import UserError
from codeparrot_ds.evaluation.complete import EXAMPLE_PROMPTS
from codeparrot_ds.evaluation.problems import load_problems
from codeparrot_ds.paths import did_you_mean_path, nearest_of
from codeparrot_ds.problem_sets.problem import Problem
from codeparrot_ds.problem_sets.references import check_references
from codeparrot_ds.rows.files import file_format, saved_files
from codeparrot_ds.rows.reading import BadRow, read_row_file, text_of
from codeparrot_ds.sandbox.judge import Limits, check_sandbox

EXAMPLES = "examples"
"""As ``eval_prompts``: the recipe's four."""
TRAINING_LIMITS = Limits(seconds=2.0)
"""Of the programs that a model writes while it trains: the other ranks wait."""


def read_prompts(path: str | Path, words: Sequence[str] = ()) -> list[str]:
    """Returns the prompts of a file: its text, or where its name is that of a file of rows (``.jsonl``, ``.parquet`` …)
    one per row, as a text or an object with one under ``prompt``.

    A file that is not there may be one of ``words`` mistyped.
    """
    path = Path(path)
    is_saved = saved_files(path) is not None
    if path.is_dir() and not is_saved:
        raise UserError(f"{path} is a folder: name a file of prompts")
    if not path.exists():
        word = nearest_of(str(path), words)
        hint = f"; did you mean {word!r}?" if word else did_you_mean_path(path)
        raise UserError(f"{path}: no such file of a prompt{hint}")
    if is_saved or file_format(path.name):
        return [_prompt_of(row, place) for place, row in read_row_file(path)]
    try:
        return [path.read_text(encoding="utf-8-sig").rstrip("\n")]
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8 text: {error}") from error


def _prompt_of(row: Any, place: str) -> str:
    if not isinstance(row, (str, dict)) or (isinstance(row, dict) and row.get("prompt") is None):
        raise UserError(f"{place}: neither a text nor an object with a text under 'prompt'")
    try:
        return text_of(row if isinstance(row, dict) else {"prompt": row}, "prompt")
    except BadRow as error:
        raise UserError(f"{place}: {error}") from None


def gather_prompts(prompts: Sequence[str], files: Sequence[str | Path] = ()) -> list[str]:
    """Returns the prompts that were given as texts, of which ``-`` is standard input, and those of the files."""
    texts = [sys.stdin.read().rstrip("\n") if prompt == "-" else prompt for prompt in prompts]
    return texts + [text for path in files for text in read_prompts(path)]


def what_to_complete(
    config: RunConfig, say: Callable[[str], None] = lambda line: None
) -> tuple[list[str], list[Problem]]:
    """Returns the prompts and problems of a run's evaluations.

    Args:
        say: gets what is to be known of the problems, and a line before what takes long.

    Raises ``UserError`` for those that cannot be read, for problems where programs may not run or cannot, and for those
    whose own solutions do not pass their tests.
    """
    prompts = []
    if config.eval_prompts == EXAMPLES:
        prompts = [prompt for prompt, _ in EXAMPLE_PROMPTS]
    elif config.eval_prompts:
        prompts = read_prompts(config.eval_prompts, [EXAMPLES])
        if not prompts:
            raise UserError(f"eval_prompts: {config.eval_prompts} holds no prompt")
    if not config.eval_problems:
        return prompts, []
    if not config.allow_execution:
        raise UserError(
            "eval_problems: the programs that the model writes are run in a sandbox; allow that with --allow-execution"
        )
    problems = load_problems(config.eval_problems, say)
    check_sandbox()
    check_references(
        problems,
        config.eval_problems,
        limits=TRAINING_LIMITS,
        accept_failing=config.accept_failing_references,
        say=say,
    )
    return prompts, problems
