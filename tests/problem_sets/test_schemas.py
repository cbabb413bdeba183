"""Each published schema is judged by all its tests; what cannot be judged is refused by name."""

import pytest

from codeparrot_ds.errors import UserError
from codeparrot_ds.problem_sets.schemas import parse_row
from codeparrot_ds.sandbox.judge import judge_all
from tests.problem_sets.sets import HUMANEVAL, HUMANEVALPLUS_FILE, MBPP, MBPPPLUS_FILE, MBPPPLUS_HUB, SETS


@pytest.mark.parametrize("name", SETS)
def test_own_solutions_pass_and_wrong_programs_do_not(name):
    row, wrong = SETS[name]
    problem, unread = parse_row(row, "line 1")
    assert not unread and problem.cut(problem.solution) == problem.solution.rstrip()
    programs = [problem.program(text) for text in (problem.solution, *wrong)]
    kinds = [verdict.kind for verdict in judge_all([(program, problem.check) for program in programs], num_workers=2)]
    assert kinds == ["passed", *["failed"] * len(wrong)]


EQUAL = "class Equal(float):\n    __eq__ = __ne__ = __le__ = __lt__ = __sub__ = __rsub__ = __abs__ = lambda *_: True\n"
CHEATS = (
    "def before(values):\n    return Equal(1)\n" + EQUAL,
    "def before(values):\n    return type('Equal', (), {'__eq__': lambda *_: True})()\n",
    "def before(values):\n    raise StopIteration\n",
    "def before(values):\n    raise SystemExit(0)\n",
    "def before(values):\n    values[:] = []\n",
    "def before(values):\n    from __main__ import REFERENCE\n    return REFERENCE(values)\n",
    "def before(values):\n    yield 1\n",
    "REFERENCE = INPUTS = RULES = check = _evalplus = exec = len\nbefore = len\n",
    "",
)


def test_no_trick_passes_inputs():
    problem = parse_row(MBPPPLUS_FILE, "line 1").problem
    verdicts = list(judge_all([(problem.program("\n" + text), problem.check) for text in CHEATS], num_workers=2))
    assert [verdict.kind for verdict in verdicts if verdict.kind not in ("failed", "error", "exited")] == []


def test_further_tests_are_read_wherever_a_schema_has_them():
    """A program that is right on the first test alone."""
    only_first = "\ndef largest(values):\n    return 9\n"
    for row, passes in (
        ({**MBPPPLUS_HUB, "test": None}, True),
        (MBPPPLUS_HUB, False),
        ({**MBPP, "challenge_test_list": []}, True),
        (MBPP, False),
    ):
        problem = parse_row(row, "line 1").problem
        (verdict,) = judge_all([(problem.program(only_first), problem.check)], num_workers=1)
        assert verdict.passed == passes


def without(row, *keys):
    return {key: value for key, value in row.items() if key not in keys}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({**HUMANEVAL, "suffix": "    return 1\n"}, r"line 7: the row has a suffix, as those of HumanEval-Infilling"),
        ({**HUMANEVAL, "language": "java"}, "line 7: the problem is in java; only problems in Python"),
        ({**HUMANEVAL, "lang": "C++"}, r"the problem is in C\+\+; only"),
        ({"name": "x", "language": "rs", "prompt": "fn f()", "tests": "}", "stop_tokens": []}, "the problem is in rs"),
        ({**HUMANEVAL, "task_id": "CPP/0"}, "the problem is in CPP; only"),
        ({**MBPP, "programming_language": "go"}, "the problem is in go; only"),
        ({**HUMANEVAL, "tests": "assert f()"}, "tests may be a part of the tests, and HumanEval has no such key"),
        ({**MBPP, "test_case_list": ["x"]}, "test_case_list may be a part of the tests, and MBPP has no such key"),
        ({**MBPP, "extraAsserts": ["x"]}, "extraAsserts may be a part of the tests"),
        ({**HUMANEVAL, "input_output": "{}"}, "input_output may be a part of the tests"),
        ({**HUMANEVAL, "plus_input": [[1]]}, "plus_input may be a part of the tests"),
        (without(HUMANEVALPLUS_FILE, "plus_input"), "plus_input is missing; HumanEval's keys are task_id"),
        ({**HUMANEVALPLUS_FILE, "atol": "0"}, "atol is a str"),
        ({**HUMANEVALPLUS_FILE, "base_input": [3], "plus_input": []}, "an input is a list of arguments, not int"),
        ({**HUMANEVALPLUS_FILE, "base_input": [], "plus_input": []}, "there is no input"),
        ({**HUMANEVALPLUS_FILE, "canonical_solution": ""}, "are those of entry_point in canonical_solution"),
        ({**MBPPPLUS_FILE, "assertion": "assert before("}, "assertion is no Python"),
        ({**MBPPPLUS_FILE, "assertion": "before({(1,)})", "plus_input": [[[{}]]]}, "an input is not of the kind"),
        ({**HUMANEVAL, "canonical_solution": None, "test": "public static void"}, "the tests are no Python"),
        ({**MBPP, "test_list": ["assert f()", 3]}, "test_list is no list of texts"),
        ({**MBPP, "test_imports": "import math"}, "test_imports is a str"),
        ({**MBPP, "test_list": []}, r"an MBPP problem has a text \(or prompt\) and a test_list of texts"),
    ],
)
def test_what_cannot_be_judged_is_refused_by_name(row, words):
    with pytest.raises(UserError, match=words) as refusal:
        parse_row(row, "set.jsonl, line 7")
    assert str(refusal.value).startswith("set.jsonl, line 7: ") and "\n" not in str(refusal.value)


def test_what_matters_to_no_verdict_is_let_through_and_named():
    for extra in ({"language": "Python"}, {"task_id": "Python/3"}, {"suffix": ""}, {"tests": []}, {"inputs": None}):
        assert parse_row({**HUMANEVAL, **extra}, "line 1").unread == frozenset()
    assert parse_row({**MBPP, "difficulty": 3, "author": "me"}, "line 1").unread == {"difficulty", "author"}
    # Words, not parts of words: nobody tests a latest version or a greatest age.
    assert parse_row({**MBPP, "latest": 3, "greatest_age": 1}, "line 1").unread == {"latest", "greatest_age"}


def test_a_prompt_may_be_a_head_alone():
    for end in ("", "\n", "  # the average\n"):
        row = {**HUMANEVAL, "prompt": f"import math\n\n\ndef halves(numbers):{end}"}
        problem = parse_row({**row, "canonical_solution": "\n" + row["canonical_solution"]}, "line 1").problem
        (verdict,) = judge_all([(problem.program(problem.solution), problem.check)], num_workers=1)
        assert verdict.passed, verdict


def test_a_set_may_have_no_solutions():
    assert parse_row(without(HUMANEVAL, "canonical_solution"), "line 1").problem.solution is None
    assert parse_row({**MBPP, "code": ""}, "line 1").problem.solution is None
