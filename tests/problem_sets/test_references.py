"""A set whose own solutions do not pass here is refused before a model is judged with it."""

import dataclasses
import json

import pytest

from codeparrot_ds.errors import UserError
from codeparrot_ds.problem_sets import references
from codeparrot_ds.problem_sets.references import check_references
from codeparrot_ds.problem_sets.schemas import parse_row
from codeparrot_ds.sandbox.judge import Limits
from tests.problem_sets.sets import HUMANEVAL, MBPP

LIMITS = Limits(seconds=20.0)  # a busy machine changes no verdict
GOOD = parse_row(MBPP, "").problem
WRONG = parse_row({**MBPP, "task_id": "wrong", "code": "def largest(values):\n    return 9"}, "").problem
NO_MODULE = parse_row(
    {**HUMANEVAL, "task_id": "module", "test": f"import absent_module\n{HUMANEVAL['test']}"}, ""
).problem


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "codeparrot-ds" / "references"


@pytest.fixture
def judged(monkeypatch):
    """The number of programs that are judged at each call; they are judged all the same."""
    counts = []

    def judge_all(items, **settings):
        items = list(items)
        counts.append(len(items))
        return real(items, **settings)

    real = references.judge_all
    monkeypatch.setattr(references, "judge_all", judge_all)
    return counts


def check(*problems, limits=LIMITS, **options):
    return check_references(problems, "own.jsonl", limits=limits, num_workers=2, **options)


def test_one_that_imports_what_programs_may_not_is_named_with_the_option(judged):
    code = "import numpy\n" + MBPP["code"]
    array = parse_row({**MBPP, "task_id": "array", "code": code}, "").problem
    with pytest.raises(UserError, match=r"for numpy\).*, allow more with --imports numpy, or accept"):
        check(array, options={"numpy": "--imports numpy"})
    assert check(array, limits=Limits(seconds=5, numpy=True)).passed == 1


def test_those_that_do_not_pass_are_named_with_the_reason():
    with pytest.raises(UserError) as refusal:
        check(GOOD, WRONG, NO_MODULE)
    assert str(refusal.value) == (
        "2 of 3 reference solutions of own.jsonl do not pass their own tests here (wrong: failed AssertionError, "
        "module: error ModuleNotFoundError for absent_module), so what they say of a model would be wrong: correct or "
        "remove these problems, or accept them (--accept-failing-references)"
    )
    found = check(GOOD, WRONG, NO_MODULE, accept_failing=True)
    assert found.passed == 1 and list(found.failed) == ["wrong", "module"]
    why = "wrong: failed AssertionError, module: error ModuleNotFoundError for absent_module"
    text = f"1 of 3 pass their own tests; not {why}"
    assert found.as_json() == {"problems": 3, "passed": 1, "missing": 0, "failed": found.failed, "text": text}


def test_only_the_first_of_many_are_named():
    wrong = [dataclasses.replace(WRONG, task_id=f"wrong/{number}") for number in range(7)]
    with pytest.raises(UserError, match=r"7 of 7 .*\(wrong/0: .*, wrong/4: failed AssertionError and 2 more\)"):
        check(*wrong)


def test_what_passed_is_not_judged_again(judged, cache):
    said = []
    assert check(GOOD, say=said.append) == check(GOOD, say=said.append)
    assert judged == [1] and said == ["judging the reference solutions of own.jsonl"]
    assert [json.loads(path.read_text()) for path in cache.iterdir()] == [{"source": "own.jsonl", "passed": ["1"]}]
    # What else a verdict depends on: the solution, the tests, the limits.
    check(dataclasses.replace(GOOD, solution=GOOD.solution + "\n"))
    check(dataclasses.replace(GOOD, check=dataclasses.replace(GOOD.check, setup="import math")))
    check(GOOD, limits=Limits(seconds=21.0))
    assert judged == [1, 1, 1, 1]


def test_the_judge_and_the_interpreter_are_part_of_what_is_remembered(judged, monkeypatch):
    version = references._judge_version()
    check(GOOD)
    for place in range(len(version)):
        other = [part + " other" * (number == place) for number, part in enumerate(version)]
        monkeypatch.setattr(references, "_judge_version", lambda other=other: other)
        check(GOOD)
    assert judged == [1] * (1 + len(version))


def test_what_failed_is_judged_again(judged):
    for _ in range(2):
        with pytest.raises(UserError, match="1 of 2 reference solutions"):
            check(GOOD, WRONG)
    assert judged == [2, 1]


def test_a_cache_that_cannot_be_used_costs_time_alone(judged, cache, tmp_path):
    check(GOOD)
    (file,) = cache.iterdir()
    file.write_text('{"pass')
    assert check(GOOD).passed == 1 and json.loads(file.read_text())["passed"] == ["1"]
    for path in (file, cache, cache.parent, cache.parent.parent):
        path.unlink() if path == file else path.rmdir()
    (tmp_path / "cache").write_text("a file")
    said = []
    assert check(GOOD, say=said.append).passed == 1 and judged == [1, 1, 1]
    assert "are judged again each time: " in said[-1]


def test_one_that_needs_more_time_is_judged_alone_and_then_named(judged):
    slow = parse_row({**MBPP, "task_id": "slow", "code": "import time\ntime.sleep(30)\n" + MBPP["code"]}, "").problem
    with pytest.raises(
        UserError,
        match=r"\(slow: timeout after [\d.]+ s, in the program\).*, allow more with --seconds, or accept them",
    ):
        check(slow, limits=Limits(seconds=0.5), options={"timeout": "--seconds", "output": "--memory-mb"})
    assert judged == [1, 1]


def test_problems_without_a_solution_are_said_in_one_line(judged):
    bare = dataclasses.replace(GOOD, task_id="bare", solution=None)
    said = []
    found = check(bare, say=said.append)
    line = "all 1 problems of own.jsonl have no reference solution: nothing shows that a right program passes them"
    assert said == [line] and judged == [] and found.as_json()["missing"] == 1
    check(GOOD, bare, say=said.append)
    assert said[1].startswith("1 of 2 problems of own.jsonl have no reference solution") and judged == [1]
