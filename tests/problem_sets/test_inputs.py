"""Inputs as tests: what JSON does not have comes back, and answers are compared as EvalPlus compares them."""

import math

import pytest

from codeparrot_ds.problem_sets.inputs import HARNESS, check_of_inputs, literal

NAN = float("nan")


@pytest.mark.parametrize(
    "value",
    [
        [1, -2.5, 1e300, True, None, "a'\n\u2028\ud800", 10**400],
        [math.inf, -math.inf, [math.inf]],
        {"inf": "nan", "x": [1]},
        [(), (1,), (1, (2, "b")), set(), {1, 2}, {(1, 2)}, [{}], 2j, 1 - 1j],
    ],
)
def test_a_literal_is_the_value_and_uses_no_name(value):
    assert eval(literal(value), {"__builtins__": {}}) == value
    assert math.isnan(eval(literal(NAN), {"__builtins__": {}}))


def given(check):
    """What the setup of a check holds, without running it."""
    return eval(check.setup.partition("\n")[0].removeprefix("_evalplus = "))


@pytest.mark.parametrize(
    ("assertions", "inputs", "restored"),
    [
        ("", [[[1, [2]], "1j"]], [[[1, [2]], "1j"]]),
        ("assert f((1, 2)) == 3", [[[1, 2]], [[]]], [[(1, 2)], [()]]),
        ("assert f([(1, 2), (3,)], [4])", [[[[1, 2]], [5]], [[], []]], [[[(1, 2)], [5]], [[], []]]),
        ("assert f((1, (2, 3), 'a'))", [[[[9], 1, "b"]]], [[((9,), 1, "b")]]),
        ("assert f({'a': (1, 2)}, 3)", [[{"b": [5]}, 4]], [[{"b": (5,)}, 4]]),
        ("assert f([{1, 2}, {}])", [[[[3], []]]], [[[{3}, {}]]]),
        ("assert f(2, 1j)", [["3", "2j"], ["x", "y"]], [[3.0, 2j], ["x", "y"]]),
        # Where both were seen nothing says which it is; what is no literal says nothing.
        ("assert f((1, 2)) and f([1])", [[[3]]], [[[3]]]),
        ("assert f(make(3), (1,)) and g((1,))", [[[3], [4]]], [[[3], [4]]]),
        ("assert set(f((1, 2), (3,))) == set((1,))", [[[3], [4]]], [[(3,), (4,)]]),
    ],
)
def test_arguments_are_of_the_kinds_that_the_calls_show(assertions, inputs, restored):
    check = check_of_inputs("def f(*a): pass", "f", inputs, tolerance=0, assertions=assertions)
    assert given(check)["INPUTS"] == restored


@pytest.mark.parametrize(
    ("entry_point", "tolerance", "arguments", "expected", "right", "wrong"),
    [
        ("f", 0, [1], [1, "a"], [[1, "a"]], [[1], [1, "b"], (1, "a"), None, True]),
        ("f", 0, [1], 1.0, [1.0, 1, 1 + 1e-7], [1.001, "1.0", [1.0], True + 1]),
        ("f", 0, [1], [1.0, 2.0], [[1.0, 2.0 + 1e-7]], [[1.0], [1.0, 2.0, 3.0], (1.0, 2.0 + 1e-7), "ab"]),
        ("f", 0, [1], [1.0, 2], [[1.0, 2]], [[1.0 + 1e-7, 2]]),  # exact where not all are floats
        ("f", 0.1, [1], [1, [2.0]], [[1, [2.05]]], [[1, [2.2]], [1, 2.05], [1, ["x"]]]),
        ("f", 0, [1], math.inf, [math.inf], [-math.inf, NAN, 1e308, 0]),
        ("f", 0, [1], 0.0, [0.0, -1e-7], [1e-3, None]),
        ("check_str", 0, ["a"], None, [None, False], ["match", True, 0]),
        ("check_str", 0, ["a"], "match", [3, True], [None, False]),
        ("Diff", 0, [1], [1, 2], [[2, 1], (1, 2, 2)], [[1], []]),
        ("find_zero", 1e-4, [[-6, 11, -6, 1]], 1.0, [1.0, 2.0, 3.00001], [0.0, 1.5]),
        ("surface_Area", 0, [3, 4], 33, [33, 35], [34, 0]),
        ("digit_distance_nums", 0, [10, 9], 1, [1, 10], [9, 0]),
        ("sum_div", 0, [8], 7, [7], [0]),
    ],
)
def test_answers_are_compared_by_the_rule_of_the_problem(entry_point, tolerance, arguments, expected, right, wrong):
    reference = f"def {entry_point}(*arguments): return {literal(expected)}"
    check = check_of_inputs(reference, entry_point, [arguments], tolerance=tolerance, assertions="")
    for answers, passes in ((right, True), (wrong, False)):
        for answer in answers:
            scope = given(check)
            exec(HARNESS, scope)
            try:
                scope["check"](lambda *_, answer=answer: answer)
                assert passes, answer
            except AssertionError:
                assert not passes, answer


def test_neither_side_sees_what_the_other_does_to_the_arguments():
    reference = "def f(values):\n    values.append(1)\n    return values"
    check = check_of_inputs(reference, "f", [[[1, 2]]], tolerance=0, assertions="")
    scope = given(check)
    exec(HARNESS, scope)
    seen = []

    def program(values):
        seen.append(list(values))
        values += [1]
        return values

    scope["check"](program)
    scope["check"](program)
    assert seen == [[1, 2], [1, 2]]
