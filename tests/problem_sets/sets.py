"""Small sets of our own in each published schema, and for each problem programs that are wrong."""

_HEAD = 'def halves(numbers):\n    """Return each number divided by two."""\n'
_HEAD_SOLUTION = "    return [number / 2 for number in numbers]\n"
_WRONG_HALVES = tuple(
    f"\n    return {text}\n" for text in ("[1.0, 2.0]", "[number // 2 for number in numbers]", "numbers")
)

HUMANEVAL = {
    "task_id": "Own/0",
    "prompt": _HEAD,
    "entry_point": "halves",
    "canonical_solution": _HEAD_SOLUTION,
    "test": "\n\nMETADATA = {}\n\n\ndef check(candidate):\n    assert candidate([2, 5]) == [1.0, 2.5]\n"
    "    assert candidate([]) == []\n",
}
HUMANEVALPLUS_HUB = {
    **HUMANEVAL,
    "test": "import math\n\n\ndef assertion(out, exp, atol):\n    assert len(out) == len(exp)\n"
    "    assert all(math.isclose(*pair, abs_tol=atol) for pair in zip(out, exp))\n\n\ndef check(candidate):\n"
    "    inputs = [[[2, 5]], [[]]]\n    results = [[1.0, 2.5], []]\n"
    "    for i, (inp, exp) in enumerate(zip(inputs, results)):\n        assertion(candidate(*inp), exp, 1e-6)\n",
}
HUMANEVALPLUS_FILE = {
    **HUMANEVAL,
    "contract": "\n    assert isinstance(numbers, list) # $_CONTRACT_$\n",
    "base_input": [[[2, 4]]],
    "plus_input": [[[]], [[5]], [[float("inf"), 3.5]]],
    "atol": 0,
}
_LARGEST = "def largest(values):\r\n    return max(values, default=None)"
_WRONG_LARGEST = (
    "\ndef largest(values):\n    return 9\n",
    "\ndef largest(values):\n    return values[-1] if values else None\n",
)
MBPP = {
    "task_id": 1,
    "text": "Write a function that returns the largest value, or None where there is none.",
    "code": _LARGEST,
    "test_list": ["assert largest([3, 9, 2]) == 9"],
    "test_setup_code": "",
    "challenge_test_list": ["assert largest([]) is None"],
}
MBPP_SANITIZED = {
    "source_file": "own.ipynb",
    "task_id": 1,
    "prompt": MBPP["text"],
    "code": _LARGEST,
    "test_imports": ["import math"],
    "test_list": ["assert largest([3, math.floor(9.5), 2]) == 9", "assert largest([]) is None"],
}
MBPPPLUS_HUB = {
    **MBPP_SANITIZED,
    "test_imports": [],
    "test_list": ["assert largest([3, 9, 2]) == 9"],
    "test": "for values, want in (([], None), ([1], 1), ([-5, -2, -7], -2)):\n    assert largest(values) == want\n",
}
MBPPPLUS_FILE = {
    "task_id": "Mbpp/1",
    "prompt": '"""\nWrite a function that counts what stands before the first tuple.\n'
    'assert before((1, (2, 3), 4)) == 1\n"""\n',
    "entry_point": "before",
    "canonical_solution": "\ndef before(values):\n    for place, value in enumerate(values):\n"
    "        if isinstance(value, tuple):\n            return place\n",
    "base_input": [[[1, [2, 3], 4]], [[1, 2, [5, 6]]]],
    "plus_input": [[[]], [[[1], 2]], [["a", "b"]]],
    "atol": 0,
    "contract": "\n  assert isinstance(values, tuple) # $_CONTRACT_$\n",
    "assertion": "\nassert before((1, (2, 3), 4)) == 1\nassert before((1, 2, (5, 6))) == 2\n",
}

SETS = {
    "humaneval": (HUMANEVAL, _WRONG_HALVES),
    "humanevalplus-hub": (HUMANEVALPLUS_HUB, _WRONG_HALVES),
    "humanevalplus-file": (HUMANEVALPLUS_FILE, _WRONG_HALVES),
    "mbpp": (MBPP, _WRONG_LARGEST),
    "mbpp-sanitized": (MBPP_SANITIZED, _WRONG_LARGEST),
    "mbppplus-hub": (MBPPPLUS_HUB, _WRONG_LARGEST),
    "mbppplus-file": (
        MBPPPLUS_FILE,
        (
            "\ndef before(values):\n    return 1\n",
            # Right on what is in the prompt, and where the arguments stay lists, as JSON has them.
            "\ndef before(values):\n    return next((n for n, v in enumerate(values) if isinstance(v, list)), None)\n",
            "\ndef before(values):\n    return len([v for v in values if not isinstance(v, tuple)])\n",
        ),
    ),
}
"""By the schema's name a row, and completions that must not pass."""
