"""Whether a set's own solutions pass its tests here: what says that its tests can be trusted with a model's programs.

A set that this judge cannot judge (its tests need a module that the sandbox has not, or more time than there is) is
found in this way before a model is scored with it. What passed is remembered in the user's cache.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codeparrot_ds import durable, sandbox
from codeparrot_ds.errors import UserError
from codeparrot_ds.json_files import DamagedFileError, parts_of, read_object
from codeparrot_ds.problem_sets.problem import Problem
from codeparrot_ds.sandbox.judge import Limits, Verdict, judge_all
from codeparrot_ds.terminal import Progress

_NO_OPTIONS: Mapping[str, str] = {}
_NAMED = 5
"""So many failing ones are named in a message."""


@dataclass(frozen=True, kw_only=True)
class References:
    """What became of a set's reference solutions."""

    problems: int
    failed: dict[str, str]
    """By ``task_id`` of those that do not pass, why."""
    missing: tuple[str, ...]
    """``task_id`` of the problems that have none."""

    @property
    def passed(self) -> int:
        return self.problems - len(self.failed) - len(self.missing)

    def as_json(self) -> dict[str, Any]:
        counts = {"problems": self.problems, "passed": self.passed, "missing": len(self.missing)}
        return {**counts, "failed": self.failed, "text": str(self)}

    def __str__(self) -> str:
        text = f"{self.passed} of {self.problems - len(self.missing)} pass their own tests"
        if self.failed:
            text += f"; not {_named(self.failed)}"
        return text + (f"; {len(self.missing)} problems have none" if self.missing else "")


def check_references(
    problems: Sequence[Problem],
    source: str,
    *,
    limits: Limits,
    accept_failing: bool = False,
    num_workers: int | None = None,
    options: Mapping[str, str] = _NO_OPTIONS,
    progress: Progress = lambda *_: None,
    say: Callable[[str], None] = lambda line: None,
) -> References:
    """Judges each problem's reference solution with its tests, once for the same set, judge, limits and Python.

    Args:
        source: the set's name, for messages.
        accept_failing: whether a set may be used whose solutions do not pass; they are returned in any case.
        options: by kind of a verdict, and by module that may be imported, the option that allows a program more.
        say: gets a line before what takes long, and where there are no reference solutions.

    Raises ``UserError`` with those that do not pass, and why.
    """
    with_solution = [problem for problem in problems if problem.solution is not None]
    missing = tuple(problem.task_id for problem in problems if problem.solution is None)
    if missing:
        every = f"{len(missing)} of {len(problems)}" if with_solution else f"all {len(missing)}"
        say(f"{every} problems of {source} have no reference solution: nothing shows that a right program passes them")
    file = _remembered_in(with_solution, limits)
    passed = _remembered(file)
    wanted = [problem for problem in with_solution if problem.task_id not in passed]
    if not wanted:
        return References(problems=len(problems), failed={}, missing=missing)
    say(f"judging the reference solutions of {source}")
    failed = {}
    for done, (problem, verdict) in enumerate(_verdicts(wanted, limits, num_workers), start=1):
        if verdict.passed:
            passed.add(problem.task_id)
        else:
            failed[problem.task_id] = _why(problem, verdict, limits)
        progress("reference solutions", done, len(wanted))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        durable.write_json(file, {"source": source, "passed": sorted(passed)})
    except OSError as error:
        say(f"the reference solutions are judged again each time: {file} cannot be written ({error.strerror})")
    references = References(problems=len(problems), failed=failed, missing=missing)
    if failed and not accept_failing:
        words = [word for why in failed.values() for word in why.replace(",", "").split()]
        more = dict.fromkeys(options[word] for word in words if word in options)
        raise UserError(
            f"{len(failed)} of {len(with_solution)} reference solutions of {source} do not pass their own tests here "
            f"({_named(failed)}), so what they say of a model would be wrong: correct or remove these problems"
            f"{', allow more with ' if more else ''}{' and '.join(more)}, or accept them (--accept-failing-references)"
        )
    return references


def _verdicts(
    problems: Sequence[Problem], limits: Limits, num_workers: int | None
) -> Iterable[tuple[Problem, Verdict]]:
    slow = []
    verdicts = judge_all(map(_reference, problems), limits=limits, num_workers=num_workers)
    for problem, verdict in zip(problems, verdicts, strict=True):
        if verdict.kind == "timeout":
            slow.append(problem)
        else:
            yield problem, verdict
    # Alone, since programs that were judged beside them took their share of the cores.
    yield from zip(slow, judge_all(map(_reference, slow), limits=limits, num_workers=1) if slow else (), strict=True)


def _reference(problem: Problem) -> tuple[str, Any]:
    assert problem.solution is not None
    return problem.program(problem.solution), problem.check


def _why(problem: Problem, verdict: Verdict, limits: Limits) -> str:
    why = f"{verdict.kind} {verdict.detail}".rstrip()
    if verdict.kind == "timeout" and not verdict.detail:
        why += f" after {limits.seconds:g} s"
    if verdict.detail in ("ModuleNotFoundError", "ImportError"):
        program, check = _reference(problem)
        modules = sorted({name for text in (program, check.setup, *check.tests) for name in _imported(text)})
        why += f" for {', '.join(modules)}" if modules else ""
    return why


def _imported(source: str) -> set[str]:
    """The modules that a source imports and that are not of Python's own library."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return {name.partition(".")[0] for name in found} - sys.stdlib_module_names


def _named(failed: dict[str, str]) -> str:
    more = f" and {len(failed) - _NAMED} more" if len(failed) > _NAMED else ""
    return ", ".join(f"{task_id}: {why}" for task_id, why in list(failed.items())[:_NAMED]) + more


# --------------------------------------------------------------------------------------------------------------------
# What is remembered. Only what passed: what fails may pass once a module is installed or the machine is less busy.


def verdict_key(problem: Problem, limits: Limits) -> str:
    """Returns what a verdict on a program depends on beside the program: tests, limits, judge, Python, as a hash."""
    content = [dataclasses.astuple(problem.check), dataclasses.asdict(limits), _judge_version()]
    return _hash(content)


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _remembered_in(problems: Sequence[Problem], limits: Limits) -> Path:
    """The file of what passed, by all that the verdicts depend on."""
    rows = [[problem.task_id, *_reference(problem)[:1], verdict_key(problem, limits)] for problem in problems]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "codeparrot-ds" / "references" / f"{_hash(rows)}.json"


@functools.cache
def _judge_version() -> list[str]:
    sources = (path.read_bytes() for path in sorted(Path(sandbox.__path__[0]).glob("*.py")))
    numpy = importlib.metadata.version("numpy")  # that tests may import
    return [hashlib.sha256(b"\0".join(sources)).hexdigest(), sys.version, numpy]


def _remembered(file: Path) -> set[str]:
    try:
        with parts_of(file):
            return set(read_object(file)["passed"])
    except (OSError, DamagedFileError):
        # Not there yet, or damaged: all are judged, and it is written anew, which says what is wrong with its place.
        return set()
