"""Tests that are inputs alone, as EvalPlus publishes them: a program must do on each what the reference solution does.

The reference solution runs in the checker, beside the program's answers. The rules of comparison are EvalPlus's, but
for two that a constant satisfies (``are_equivalent``, and ``sum_div`` that is 0), which stay exact here.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from codeparrot_ds.sandbox.judge import Check

_RULES = {
    **dict.fromkeys(("check_str", "text_match_three", "text_starta_endb"), "found"),
    **dict.fromkeys(
        (
            "similar_elements", "find_char_long", "common_in_nested_lists", "extract_singly", "larg_nnum",
            "intersection_array", "find_dissimilar", "Diff",
        ),
        "set",
    ),
    "find_zero": "root",
    "surface_Area": "pyramid",
    "digit_distance_nums": "digits",
}  # fmt: skip
"""By entry point, how answers are compared where more than the reference solution's own are right."""

# Runs in the checker, in a namespace of its own: the program's names, which may be those of built-in functions, are
# none of its names. Ordinary Python that the project's tests also run as it is.
HARNESS = '''
import copy
import math


def check(function):
    scope = {}
    exec(REFERENCE, scope)
    for arguments in INPUTS:
        expected = scope[ENTRY_POINT](*copy.deepcopy(arguments))
        assert RULES[RULE](function(*copy.deepcopy(arguments)), expected, arguments), "another result"


def is_equal(found, expected, arguments):
    if found == expected:
        return True
    tolerance = TOLERANCE or (1e-6 if are_floats(expected) else 0)
    return bool(tolerance) and type(found) is type(expected) and is_close(found, expected, tolerance)


def are_floats(value):
    if isinstance(value, (list, tuple)):
        return bool(value) and all(isinstance(part, float) for part in value)
    return isinstance(value, float)


def is_close(found, expected, tolerance):
    if isinstance(expected, (list, tuple)):
        same_length = isinstance(found, (list, tuple)) and len(found) == len(expected)
        return same_length and all(map(is_close, found, expected, [tolerance] * len(expected)))
    if isinstance(found, (int, float, complex)) and isinstance(expected, (int, float, complex)):
        return found == expected or abs(found - expected) <= tolerance + 1e-7 * abs(expected) < math.inf
    return False


def is_found(found, expected, arguments):
    """Matches cannot be compared: only whether there is one."""
    wanted = expected if isinstance(expected, bool) else expected is not None
    return (found if isinstance(found, bool) else found is not None) == wanted


def is_set(found, expected, arguments):
    return set(found) == set(expected)


def is_root(found, expected, arguments):
    """Of the polynomial with the coefficients, from the constant on: it may have several.

    Added as the problem's own function adds, whose rounding a program's search for the root sees.
    """
    return abs(sum(factor * math.pow(found, power) for power, factor in enumerate(arguments[0]))) <= TOLERANCE


def is_pyramid(found, expected, arguments):
    """The height of a square pyramid may be that of its sides or its own."""
    base, height = arguments
    own = round(base * base + 2 * base * math.hypot(base / 2, height))
    return abs(found - expected) <= TOLERANCE or abs(found - own) <= TOLERANCE


def is_digits(found, expected, arguments):
    """The distance of two numbers' digits may be that of their difference's digits or of those in the same places."""
    first, second = map(str, arguments)
    width = max(len(first), len(second))
    pairs = zip(first.zfill(width), second.zfill(width))
    return found == expected or found == sum(abs(int(one) - int(other)) for one, other in pairs)


RULES = {
    "equal": is_equal,
    "found": is_found,
    "set": is_set,
    "root": is_root,
    "pyramid": is_pyramid,
    "digits": is_digits,
}
'''


def check_of_inputs(
    reference: str, entry_point: str, inputs: Sequence[Any], *, tolerance: float, assertions: str
) -> Check:
    """Returns tests that call a program with each input and compare.

    Args:
        reference: source of the reference solution.
        entry_point: the function's name in there and in the programs.
        inputs: of each call a list of arguments, as JSON has them.
        tolerance: absolute, of numbers; 0 for exact ones.
        assertions: source of some calls, which show what JSON does not: tuples, sets and complex numbers.

    Raises ``ValueError`` where an input is no list of arguments, or the assertions are no Python.
    """
    for each in inputs:
        if not isinstance(each, list):
            raise ValueError(f"an input is a list of arguments, not {type(each).__name__}")
    if not inputs:
        raise ValueError("there is no input")
    kinds = _Kinds(assertions, entry_point)
    try:
        restored = [kinds.restored(each) for each in inputs]
    except TypeError as error:
        raise ValueError(f"an input is not of the kind of the calls in assertion: {error}") from error
    given = {
        "INPUTS": restored,
        "REFERENCE": reference,
        "ENTRY_POINT": entry_point,
        "TOLERANCE": tolerance,
        "RULE": _RULES.get(entry_point, "equal"),
    }
    # The literal stands in the setup, which is compiled once for all programs of a problem.
    setup = f"_evalplus = {literal(given)}\nexec({HARNESS!r}, _evalplus)\n"
    return Check(setup=setup, tests=(f"_evalplus['check']({entry_point})\n",), entry_point=entry_point)


def literal(value: Any) -> str:
    """Returns the Python source of a value without a name in it, which a program's own could take the place of."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{literal(key)}: {literal(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(literal, value)) + "]"
    if isinstance(value, tuple):
        return "(" + "".join(literal(part) + ", " for part in value) + ")"
    if isinstance(value, set):
        return "{" + (", ".join(sorted(map(literal, value))) or "*()") + "}"
    if isinstance(value, float):  # a number too large for one is infinite, and the difference of two is none
        return repr(value).replace("inf", "1e999").replace("nan", "(1e999-1e999)")
    return repr(value)


class _Kinds:
    """What the arguments of a function are beyond JSON: learned from calls in Python, restored in those in JSON."""

    def __init__(self, assertions: str, entry_point: str) -> None:
        self._seen: dict[tuple[int, ...], set[type]] = {}
        """Types by place: the argument's number, then how deep in it."""
        for arguments in _calls(assertions, entry_point):
            for number, argument in enumerate(arguments):
                self._learn(argument, (number, 0))

    def restored(self, arguments: list[Any]) -> list[Any]:
        return [self._restore(argument, (number, 0)) for number, argument in enumerate(arguments)]

    def _learn(self, value: Any, place: tuple[int, int]) -> None:
        self._seen.setdefault(place, set()).add(type(value))
        for part in _parts(value):
            self._learn(part, (place[0], place[1] + 1))

    def _restore(self, value: Any, place: tuple[int, int]) -> Any:
        seen, below = self._seen.get(place, set()), (place[0], place[1] + 1)
        if isinstance(value, dict):
            return {key: self._restore(part, below) for key, part in value.items()}
        if isinstance(value, list):
            parts = [self._restore(part, below) for part in value]
            # Where lists were seen as well, nothing says which this one is.
            if list in seen or not seen & {tuple, set}:
                return parts
            if tuple in seen:
                return tuple(parts)
            # The empty {} among sets is a dictionary in Python.
            return set(parts) if parts or dict not in seen else {}
        if isinstance(value, str) and str not in seen:  # of numbers, where one is complex, which JSON does not have
            return _number(value, complex if complex in seen else float) if seen & {complex, float, int} else value
        return value


def _number(text: str, kind: type) -> Any:
    try:
        return kind(text)
    except ValueError:  # a text, where the calls show none
        return text


def _parts(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, (list, tuple, set)):
        yield from value


def _calls(source: str, name: str) -> Iterator[list[Any]]:
    """Yields the arguments of each call of a function that are literals throughout."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in other people's tests
            tree = ast.parse(source)
    except SyntaxError as error:
        raise ValueError(f"assertion is no Python: {error}") from error
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name:
            try:
                yield [ast.literal_eval(argument) for argument in node.args]
            except ValueError:  # an expression: it shows nothing of its type
                continue
