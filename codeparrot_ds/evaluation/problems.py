"""Programming problems with unit tests, in HumanEval's schema or MBPP's: from a file, or through ``datasets``."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codeparrot_ds.data.hub_files import first_look
from codeparrot_ds.errors import UserError, first_line
from codeparrot_ds.evaluation.complete import BLOCK_STARTS, cut
from codeparrot_ds.paths import did_you_mean_path, exists, expand, may_be_on_hub
from codeparrot_ds.rows.files import saved_files
from codeparrot_ds.rows.reading import BadRow, read_row_file, text_of
from codeparrot_ds.sandbox.judge import Check

PUBLIC = {"humaneval": "openai/openai_humaneval:test", "mbpp": "google-research-datasets/mbpp:test"}
"""Short names of the public sets."""

_HUMANEVAL = ("task_id", "prompt", "entry_point", "canonical_solution", "test")
_MBPP = ("task_id", "code", "test_list")
_WITH_SPLIT = re.compile(r"[\w.-]+/[\w.-]+:\w+")  # also of a folder, which the library takes as a data set
# A completion of an MBPP prompt begins with the function itself, or a class, which the recipe's ends would cut off.
_MBPP_ENDS = ("\nassert", '\n"""', "\nprint", "\nif")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One problem."""

    task_id: str
    prompt: str
    """What a model completes: without the space at its end, which tokenizers join to what follows, as in the recipe."""
    solution: str
    """A right completion."""
    check: Check
    ends: tuple[str, ...]
    """Texts of which the first ends a completion."""

    def cut(self, completion: str) -> str:
        """Returns a completion up to its block's end, without trailing space."""
        return cut(completion, self.ends).rstrip()

    def program(self, completion: str) -> str:
        """Returns the source that is judged."""
        return self.prompt + completion + "\n"


def load_problems(source: str | Path, say: Callable[[str], None] = lambda line: None) -> list[Problem]:
    """Reads problems.

    Args:
        source: a file of rows (``.jsonl``, ``.jsonl.gz``, ``.parquet`` …); ``humaneval`` or ``mbpp``; or
            ``org/name[:split]`` for ``datasets``, split ``test`` by default.
        say: gets a line before what takes long begins.

    Raises ``UserError`` with the line and the key of what is no problem in either schema.
    """
    name, path = str(source), Path(expand(str(source)))
    if exists(path) and not (name in PUBLIC and path.is_dir()):  # `humaneval` makes a folder of that name
        rows = _file_rows(path)
    elif name in PUBLIC or _WITH_SPLIT.fullmatch(name) or may_be_on_hub(name):
        rows = _dataset_rows(PUBLIC.get(name, name), say)
    else:
        kinds = f"neither {', '.join(PUBLIC)} nor a data set's name (org/name or org/name:split)"
        raise UserError(f"problems {name}: no such file, and {kinds}{did_you_mean_path(name)}")
    problems = [_problem(row, where) for where, row in rows]
    if not problems:
        raise UserError(f"{source} holds no problem")
    seen: set[str] = set()
    for problem in problems:
        if problem.task_id in seen:
            raise UserError(f"{source}: two problems have the task_id '{problem.task_id}'")
        seen.add(problem.task_id)
    return problems


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
    try:
        with first_look(repo, "name a .jsonl file of problems"):
            rows: Iterable[Any] = datasets.load_dataset(repo, split=split or "test")
    except UserError:
        raise
    except Exception as error:  # the library raises many kinds, and each says what is wrong
        raise UserError(f"{name} is no file here, and cannot be loaded as a data set: {first_line(error)}") from error
    for number, row in enumerate(rows, start=1):
        yield f"{name}, row {number}", row


def _problem(row: Any, where: str) -> Problem:
    if not isinstance(row, dict):
        raise UserError(f"{where}: a problem is a JSON object, not {type(row).__name__}")
    schema, build = (_MBPP, _mbpp) if "test_list" in row else (_HUMANEVAL, _humaneval)
    for key in schema:
        kind: Any = list if key == "test_list" else (str, int) if key == "task_id" else str
        if not isinstance(row.get(key), kind):
            said = "is missing" if row.get(key) is None else f"is a {type(row[key]).__name__}"
            raise UserError(
                f"{where}: {key} {said}; HumanEval's keys are {', '.join(_HUMANEVAL)}, MBPP's "
                f"{', '.join(_MBPP)} and text or prompt"
            )
    return build(row, where)


def _humaneval(row: dict[str, Any], where: str) -> Problem:
    """The prompt is a function's head and docstring: what stands before it helps the tests as well as the program."""
    tests = f"{row['test']}\ncheck({row['entry_point']})\n"
    prompt = row["prompt"].rstrip()
    return Problem(
        task_id=str(row["task_id"]),
        prompt=prompt,
        solution=row["prompt"][len(prompt) :] + row["canonical_solution"],
        check=Check(setup=row["prompt"], tests=(tests,), entry_point=row["entry_point"]),
        ends=BLOCK_STARTS,
    )


def _mbpp(row: dict[str, Any], where: str) -> Problem:
    """The prompt is the task and one test in a docstring, as for other models that follow no instructions."""
    text = row.get("text") or row.get("prompt")
    tests = [*row["test_list"], *(row.get("challenge_test_list") or [])]
    if not isinstance(text, str) or not tests or not all(isinstance(test, str) for test in tests):
        raise UserError(f"{where}: an MBPP problem has a text (or prompt) and a test_list of texts")
    imports = row.get("test_imports") or []
    setup = "\n".join([*imports, row.get("test_setup_code") or ""])
    return Problem(
        task_id=str(row["task_id"]),
        prompt=f'"""\n{text}\n{tests[0]}\n"""',
        solution="\n" + row["code"].replace("\r\n", "\n"),
        check=Check(setup=setup, tests=tuple(tests)),
        ends=_MBPP_ENDS,
    )
