"""The schemas in which sets of problems are published, as a table: a row is recognised, read whole, or refused by name.

A figure on a set is true only where all that its rows say about judging is read. So a key that can hold a part of the
tests and that no schema here reads is refused, as is a row in another language than Python or one to be filled in.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from codeparrot_ds.errors import UserError
from codeparrot_ds.problem_sets.inputs import check_of_inputs
from codeparrot_ds.problem_sets.problem import BLOCK_STARTS, Problem
from codeparrot_ds.sandbox.judge import Check, names_defined

# A completion of an MBPP prompt begins with the function itself, or a class, which the recipe's ends would cut off.
_WHOLE_PROGRAM_ENDS = ("\nassert", '\n"""', "\nprint", "\nif")
_TEXTS = "texts"  # a list of them
_WORDS_THAT_MATTER = frozenset(
    "test tests doctest doctests case cases input inputs output outputs expected assert asserts assertion assertions "
    "check checks checker suffix import imports setup fixture fixtures helper helpers stdin stdout timeout atol rtol "
    "tolerance".split()
)
_LANGUAGE_KEYS = frozenset({"language", "lang", "programming_language"})
_PYTHON = frozenset({"python", "python3", "py"})
# As task_ids of sets in many languages begin: CPP/0, Java/0.
_OTHER_LANGUAGES = frozenset(
    "c++ cpp c# csharp go java javascript julia kotlin lua perl php ruby rust scala swift typescript".split()
)


class ParsedRow(NamedTuple):
    """A row as a problem."""

    problem: Problem
    unread: frozenset[str]
    """Keys of the row that no schema knows, and that hold nothing which judging needs."""


@dataclass(frozen=True, kw_only=True)
class Schema:
    """What the rows of a set hold."""

    name: str
    mark: str
    """The key that tells a row of it; empty for the schema that is taken where no mark is found."""
    keys: Mapping[str, Any]
    """Those that each row has, with their types."""
    optional: Mapping[str, Any]
    """Those that a row may have, and that are read."""
    described: frozenset[str]
    """Those that say nothing which judging needs."""
    build: Callable[[dict[str, Any], str], Problem]


def parse_row(row: Any, where: str) -> ParsedRow:
    """Returns a row's problem.

    Args:
        row: as the file or data set has it.
        where: file and line, for messages.

    Raises ``UserError`` with the key of what is no problem in any schema, or cannot be judged.
    """
    if not isinstance(row, dict):
        raise UserError(f"{where}: a problem is a JSON object, not {type(row).__name__}")
    row = {key: value for key, value in row.items() if value is not None}  # columns that other rows have
    schema = next(schema for schema in SCHEMAS if not schema.mark or schema.mark in row)
    _check_language(row, where)
    if row.get("suffix"):
        raise UserError(
            f"{where}: the row has a suffix, as those of HumanEval-Infilling: filling in cannot be judged, only what "
            "continues a prompt"
        )
    known = schema.keys.keys() | schema.optional.keys() | schema.described | _LANGUAGE_KEYS | {"suffix"}
    unread = {key for key, value in row.items() if key not in known and value not in ("", [], {})}
    for key in sorted(unread):
        if _WORDS_THAT_MATTER & {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", key)}:
            raise UserError(
                f"{where}: {key} may be a part of the tests, and {schema.name} has no such key; its keys are "
                f"{_list_of_keys(schema)}"
            )
    for key, kind in {**schema.keys, **schema.optional}.items():
        if key in row or key in schema.keys:
            _check_type(row, key, kind, where)
    problem = schema.build(row, where)
    if problem.solution is None:  # nothing of the set's own will show whether its tests run
        for source in (problem.check.setup, *problem.check.tests):
            if error := _syntax_error(source):
                raise UserError(f"{where}: the tests are no Python ({error}); only problems in Python can be judged")
    return ParsedRow(problem, frozenset(unread))


def _check_language(row: dict[str, Any], where: str) -> None:
    """Raises ``UserError`` where a row says that it is in another language than Python."""
    named = [row[key] for key in _LANGUAGE_KEYS if row.get(key)]
    if not named and "/" in str(row.get("task_id", "")):
        first = str(row["task_id"]).partition("/")[0]
        named = [first] if first.lower() in _OTHER_LANGUAGES else []
    for language in named:
        if str(language).lower() not in _PYTHON:
            raise UserError(f"{where}: the problem is in {language}; only problems in Python can be judged")


def _check_type(row: dict[str, Any], key: str, kind: Any, where: str) -> None:
    value = row.get(key)
    fits = (
        isinstance(value, list) and all(isinstance(part, str) for part in value)
        if kind is _TEXTS
        else isinstance(value, kind)
    )
    if not fits:
        said = "is missing" if key not in row else f"is a {type(value).__name__}"
        if kind is _TEXTS and isinstance(value, list):
            said = "is no list of texts"
        each = ", ".join(f"{schema.name}'s keys are {_list_of_keys(schema)}" for schema in SCHEMAS[::-1])
        raise UserError(f"{where}: {key} {said}; {each}")


def _list_of_keys(schema: Schema) -> str:
    return f"{', '.join(schema.keys)}, and maybe {', '.join(schema.optional)}"


def _syntax_error(source: str) -> str:
    """Why a text is no Python; empty where it is."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in other people's tests
            ast.parse(source)
    except (SyntaxError, ValueError) as error:  # ValueError: a null character
        return str(error)
    return ""


# --------------------------------------------------------------------------------------------------------------------
# The schemas


def _humaneval(row: dict[str, Any], where: str) -> Problem:
    """The prompt is a function's head and docstring: what stands before it helps the tests as well as the program."""
    setup, tests = row["prompt"], f"{row['test']}\ncheck({row['entry_point']})\n"
    if _syntax_error(setup):  # a head without a docstring
        setup = setup.rstrip() + "\n    pass\n"
    return _of_function_head(row, Check(setup=setup, tests=(tests,), entry_point=row["entry_point"]))


def _of_function_head(row: dict[str, Any], check: Check) -> Problem:
    prompt, solution = row["prompt"].rstrip(), row.get("canonical_solution")
    return Problem(
        task_id=str(row["task_id"]),
        prompt=prompt,
        solution=row["prompt"][len(prompt) :] + solution if solution else None,
        check=check,
        ends=BLOCK_STARTS,
    )


def _mbpp(row: dict[str, Any], where: str) -> Problem:
    """The prompt is the task and one test in a docstring, as for other models that follow no instructions."""
    text = row.get("text") or row.get("prompt")
    # MBPP+ keeps its further tests in `test`; MBPP's first test is the one that the prompt shows.
    further = [row["test"]] if row.get("test") else []
    tests = [*row["test_list"], *row.get("challenge_test_list", []), *further]
    if not text or not row["test_list"]:
        raise UserError(f"{where}: an MBPP problem has a text (or prompt) and a test_list of texts")
    setup = "\n".join([*row.get("test_imports", []), row.get("test_setup_code", "")])
    return Problem(
        task_id=str(row["task_id"]),
        prompt=f'"""\n{text}\n{tests[0]}\n"""',
        solution=_whole_program(row["code"]) if row.get("code") else None,
        check=Check(setup=setup, tests=tuple(tests), names=names_defined(row.get("code") or "")),
        ends=_WHOLE_PROGRAM_ENDS,
    )


def _evalplus(row: dict[str, Any], where: str) -> Problem:
    """The tests are inputs, and the reference solution's results on them: of HumanEval+ (a head) or MBPP+ (a text)."""
    entry_point = row["entry_point"]
    has_head = re.search(rf"^\s*def\s+{re.escape(entry_point)}\b", row["prompt"], re.MULTILINE)
    if not row["canonical_solution"] or not entry_point.isidentifier():
        raise UserError(f"{where}: the results on EvalPlus's inputs are those of entry_point in canonical_solution")
    solution = row["canonical_solution"] if has_head else _whole_program(row["canonical_solution"])
    try:
        check = check_of_inputs(
            row["prompt"] + solution,
            entry_point,
            [*row["base_input"], *row["plus_input"]],
            tolerance=row["atol"],
            assertions=row.get("assertion", ""),
        )
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
    if has_head:
        return _of_function_head(row, check)
    return Problem(
        task_id=str(row["task_id"]),
        prompt=row["prompt"].rstrip(),
        solution=solution,
        check=check,
        ends=_WHOLE_PROGRAM_ENDS,
    )


def _whole_program(code: str) -> str:
    return "\n" + code.replace("\r\n", "\n")


_ID = (str, int)
# Where a schema's key is another one's mark, the more special schema comes first.
SCHEMAS = (
    Schema(
        name="EvalPlus",
        mark="base_input",
        keys={
            "task_id": _ID, "prompt": str, "entry_point": str, "canonical_solution": str, "base_input": list,
            "plus_input": list, "atol": (int, float),
        },
        optional={"assertion": str},
        # Contracts say which inputs are valid, for making them; the other tests are those that base_input came from.
        described=frozenset({"contract", "test", "test_list", "test_imports"}),
        build=_evalplus,
    ),
    Schema(
        name="MBPP",
        mark="test_list",
        keys={"task_id": _ID, "test_list": _TEXTS},
        optional={
            "text": str, "prompt": str, "code": str, "test_setup_code": str, "test_imports": _TEXTS,
            "challenge_test_list": _TEXTS, "test": str,
        },
        described=frozenset({"source_file"}),
        build=_mbpp,
    ),
    Schema(
        name="HumanEval",
        mark="",
        keys={"task_id": _ID, "prompt": str, "entry_point": str, "test": str},
        optional={"canonical_solution": str},
        described=frozenset(),
        build=_humaneval,
    ),
)  # fmt: skip
