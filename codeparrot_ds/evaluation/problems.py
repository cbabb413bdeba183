"""Programming problems with unit tests: from a file in one of the published schemas, or through ``datasets``."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from codeparrot_ds.data.hub_files import first_look
from codeparrot_ds.errors import UserError, first_line
from codeparrot_ds.paths import did_you_mean_path, exists, expand, may_be_on_hub
from codeparrot_ds.problem_sets.problem import Problem
from codeparrot_ds.problem_sets.schemas import parse_row
from codeparrot_ds.rows.files import saved_files
from codeparrot_ds.rows.reading import BadRow, read_row_file, text_of

PUBLIC = {
    "humaneval": "openai/openai_humaneval:test",
    "humanevalplus": "evalplus/humanevalplus:test",
    "mbpp": "google-research-datasets/mbpp:test",
    "mbppplus": "evalplus/mbppplus:test",
}
"""Short names of the public sets; ``humaneval+`` and ``mbpp+`` are names as well."""
_PUBLISHED_FILES = {
    "openai/openai_humaneval": "HumanEval.jsonl.gz of github.com/openai/human-eval",
    "evalplus/humanevalplus": "HumanEvalPlus.jsonl.gz of github.com/evalplus/humanevalplus_release",
    "google-research-datasets/mbpp": "mbpp/mbpp.jsonl of github.com/google-research/google-research",
    "evalplus/mbppplus": "MbppPlus.jsonl.gz of github.com/evalplus/mbppplus_release",
}
_MBPP_SPLITS = {"prompt": range(1, 11), "test": range(11, 511), "validation": range(511, 601), "train": range(601, 975)}
"""Of the one file that MBPP is published in, by ``task_id``."""

_WITH_SPLIT = re.compile(r"[\w.-]+/[\w.-]+:\w+")  # also of a folder, which the library takes as a data set


def load_problems(source: str | Path, say: Callable[[str], None] = lambda line: None) -> list[Problem]:
    """Reads problems.

    Args:
        source: a file of rows (``.jsonl``, ``.json``, ``.parquet`` …; of MBPP's one file with ``:split``); a name in
            ``PUBLIC``; or ``org/name[:split]`` for ``datasets``, split ``test`` by default.
        say: gets a line before what takes long begins, and one with the keys that are not read.

    Raises ``UserError`` with the line and the key of what is no problem in any schema, or cannot be judged.
    """
    file, _, split = str(source).rpartition(":")
    if split in _MBPP_SPLITS and Path(expand(file)).is_file():
        return _mbpp_split(load_problems(file, say), str(source), _MBPP_SPLITS[split])
    name, path = str(source), Path(expand(str(source)))
    public = PUBLIC.get(public_name(name))
    if exists(path) and not (public and path.is_dir()):  # `humaneval` makes a folder of that name
        rows = _file_rows(path)
    elif public or _WITH_SPLIT.fullmatch(name) or may_be_on_hub(name):
        rows = _dataset_rows(public or name, say)
    else:
        kinds = f"neither {', '.join(PUBLIC)} nor a data set's name (org/name or org/name:split)"
        raise UserError(f"problems {name}: no such file, and {kinds}{did_you_mean_path(name)}")
    problems: dict[str, Problem] = {}
    unread: set[str] = set()
    for where, row in rows:
        problem, keys = parse_row(row, where)
        if problem.task_id in problems:
            raise UserError(f"{source}: two problems have the task_id '{problem.task_id}'")
        problems[problem.task_id] = problem
        unread |= keys
    if not problems:
        raise UserError(f"{source} holds no problem")
    if unread:
        say(f"keys of {source} that are not read: {', '.join(sorted(unread))}")
    return list(problems.values())


def _mbpp_split(problems: list[Problem], source: str, task_ids: range) -> list[Problem]:
    by_id = {problem.task_id: problem for problem in problems}
    missing = [task_id for task_id in task_ids if str(task_id) not in by_id]
    if missing:
        raise UserError(
            f"{source} would be the problems {task_ids[0]} to {task_ids[-1]} of MBPP, and the file has no task_id "
            f"{missing[0]}; name the file without a split for all that it has"
        )
    return [by_id[str(task_id)] for task_id in task_ids]


def public_name(name: str) -> str:
    """A name as ``PUBLIC`` has it: EvalPlus writes its sets' names with a sign, the Hub without."""
    return name.replace("+", "plus") if name.replace("+", "plus") in PUBLIC else name


def _file_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """The rows of a file of rows, their texts without what is no text; JSON lines by any other name."""
    if path.is_dir() and saved_files(path) is None:
        raise UserError(f"{path} is a folder; name a file of problems, such as one of .jsonl or .parquet")
    for place, row in read_row_file(path):
        for name in [name for name in row if isinstance(row[name], (str, bytes))] if isinstance(row, dict) else ():
            try:
                row[name] = text_of(row, name)
            except BadRow as error:
                raise UserError(f"{place}: {error}") from None
        yield place, row


def _dataset_rows(name: str, say: Callable[[str], None]) -> Iterator[tuple[str, Any]]:
    say(f"fetching the problems {name}")
    import datasets

    repo, _, split = name.partition(":")
    published = f", such as {_PUBLISHED_FILES[repo]}" if repo in _PUBLISHED_FILES else ""
    try:
        with first_look(repo, f"name a .jsonl file of problems{published}"):
            rows: Iterable[Any] = datasets.load_dataset(repo, split=split or "test")
    except UserError:
        raise
    except Exception as error:  # the library raises many kinds, and each says what is wrong
        raise UserError(f"{name} is no file here, and cannot be loaded as a data set: {first_line(error)}") from error
    for number, row in enumerate(rows, start=1):
        yield f"{name}, row {number}", row
