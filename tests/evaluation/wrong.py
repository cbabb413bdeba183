"""Wrong programs that want to pass, and right ones of the same problems: in HumanEval's manner and in MBPP's."""

from codeparrot_ds.sandbox.judge import Check

PROBLEMS = {
    "largest": Check(
        setup='def largest(numbers):\n    """The largest, None of an empty list."""\n',
        entry_point="largest",
        tests=(
            "def check(candidate):\n    assert candidate([3, 9, 2]) == 9\n    assert candidate([]) is None\n"
            "    assert candidate([-5, -2]) == -2\ncheck(largest)",
        ),
    ),
    "abs": Check(names=("abs",), tests=("assert abs(-3) == 3", "assert abs(2) == 2")),
    "sum": Check(names=("sum",), tests=("assert sum(1, 2) == 3",)),
    # The tests hold the program against the built-in function of its name.
    "max": Check(
        setup='from typing import List\n\n\ndef max(numbers: List[int]) -> int:\n    """The largest."""\n',
        entry_point="max",
        tests=(
            "def check(candidate):\n    for numbers in ([1, 5, 2], [7], [-1, -2]):\n"
            "        assert candidate(numbers) == max(numbers)\n\n\ncheck(max)",
        ),
    ),
    "min": Check(
        entry_point="min",
        tests=(
            "same = lambda candidate, numbers: candidate(numbers) == min(numbers)\n\n\ndef main():\n"
            "    assert same(min, [2, 1]) and same(candidate=min, numbers=[3])\n\n\nmain()",
        ),
    ),
    "pow": Check(
        names=("pow",),
        tests=("def check(candidate):\n    assert candidate(2, 3) == pow(2, 3)\nrun = check\nrun(pow)",),
    ),
    # … and against a library's.
    "gcd": Check(
        setup='def gcd(a, b):\n    """The greatest common divisor."""\n',
        entry_point="gcd",
        tests=(
            "from math import gcd\n\ndef check(candidate):\n    assert candidate(4, 6) == gcd(4, 6) == 2\n\ncheck(gcd)",
        ),
    ),
    "Counter": Check(setup="from typing import *", names=("Counter",), tests=("assert Counter('abca', 'a') == 2",)),
    "check": Check(
        setup="def check(text):\n    '''Whether it is lower case.'''\n",
        entry_point="check",
        tests=(
            "def check(candidate):\n    assert candidate('a') is True and candidate('A') is False\n\n\ncheck(check)",
        ),
    ),
    # No function is handed over, and the parameter says nothing.
    "len": Check(
        setup='def len(values):\n    """How many."""\n',
        entry_point="len",
        tests=("def check(candidate):\n    assert len([1, 2]) == 2\n    assert len([]) == 0\n\n\ncheck(len)",),
    ),
    # A variable of the tests' has the name as well.
    "round": Check(
        names=("round",),
        tests=("def near(round, other):\n    return -0.5 <= round - other <= 0.5\nassert near(round('2.4'), 2)",),
    ),
    "root": Check(
        setup="def close(a, b):\n    return abs(a - b) < 1e-6",
        names=("root",),
        tests=("assert close(root(4), 2.0)", "assert all(close(root(n * n), n) for n in range(1, 9))"),
    ),
    "square": Check(
        names=("square",), tests=("for got, want in zip(map(square, [2, 3]), [4, 9]):\n    assert got == want",)
    ),
    "without": Check(
        names=("without",), tests=("assert without((1, 'a', 2.5), int) == ['a', 2.5]", "assert without((), str) == []")
    ),
    "apply": Check(names=("apply",), tests=("assert apply(lambda v: v + 1, 1) == 2", "assert apply(len, 'abc') == 3")),
    "halve": Check(
        setup='def halve(numbers):\n    """Each number divided by two."""\n',
        entry_point="halve",
        tests=(
            "import numpy as np\n\n\ndef check(candidate):\n    assert np.allclose(candidate([1.0, 4.0]), [0.5, 2.0])\n"
            "\n\ncheck(halve)",
        ),
    ),
    "each": Check(
        names=("each",),
        tests=("def is_odd(value):\n    assert value % 2, value\nassert each(is_odd, [1, 3]) is None",),
    ),
    "constant": Check(names=("answer",), tests=("assert 1 + 1 == 2",)),  # asks nothing: nobody can pass
}

RIGHT = {
    "largest": "def largest(numbers):\n    return max(numbers, default=None)",
    "abs": "def abs(x):\n    return x if x > 0 else -x",
    "sum": "def sum(a, b):\n    return a + b",
    "max": "def max(numbers):\n    return sorted(numbers)[-1]",
    "pow": "def pow(a, b):\n    return a**b",
    "min": "def min(numbers):\n    return sorted(numbers)[0]",
    "each": "def each(f, values):\n    for value in values:\n        f(value)",
    "gcd": "def gcd(a, b):\n    return gcd(b, a % b) if b else a",
    "Counter": "def Counter(text, letter):\n    return text.count(letter)",
    "check": "def check(text):\n    return text.islower()",
    "len": "def len(values):\n    return sum(1 for _ in values)",
    "round": "def round(text):\n    return int(float(text) + 0.5)",
    "root": "def root(x):\n    return x ** 0.5",
    "square": "square = lambda x: x * x",
    "without": "def without(values, kind):\n    return [v for v in values if not isinstance(v, kind)]",
    "apply": "def apply(f, x):\n    return f(x)",
    "halve": "def halve(numbers):\n    return [n / 2 for n in numbers]",
}

LARGEST = "def largest(numbers):\n    "
ANYTHING = "__eq__ = lambda self, other: True\n    __ne__ = lambda self, other: False\n    __hash__ = lambda self: 0\n"

WRONG = {
    # names
    "a built-in's name": ("abs", "def abs(x):\n    return 'wrong'"),
    "a built-in's name, called otherwise": ("sum", "def sum(values):\n    return 3"),
    "a built-in's name, not defined": ("sum", "def add(a, b):\n    return a + b"),
    "a built-in's name, held against it": ("max", "def max(numbers):\n    return 5"),
    "a built-in's name, held against it elsewhere": ("min", "def min(numbers):\n    return 1"),
    "a built-in's name, held against it by another name": ("pow", "def pow(a, b):\n    return 1"),
    "a caught failure of the tests' function": (
        "each",
        "def each(f, values):\n    try:\n        f(2)\n    except BaseException: pass",
    ),
    "a built-in's name, one of the tests'": ("len", "def len(values):\n    return 2"),
    "a built-in's name, gone again": ("abs", "def abs(x):\n    return x if x > 0 else -x\ndel abs"),
    "a built-in's name and a variable's": ("round", "def round(text):\n    return float(text) * 2"),
    "a library's name": ("gcd", "def gcd(a, b):\n    return 1"),
    "a library's name, of all its names": ("Counter", "def Counter(text, letter):\n    return 0"),
    "the tests' own name": ("check", "def check(text):\n    return True"),
    "the tests' own name, taking anything": ("check", "def check(*anything):\n    return None"),
    "a test that asks nothing": ("constant", "def answer():\n    return 1"),
    "nothing at all": ("largest", ""),
    "defined nowhere": ("largest", "if False:\n    def largest(numbers):\n        return max(numbers, default=None)"),
    "defined in a function": ("abs", "def outer():\n    def abs(x):\n        return -x if x < 0 else x"),
    "defined as None": ("largest", "largest = None"),
    "defined as a constant": ("square", "square = 4"),
    "a module that has every name": ("abs", "def __getattr__(name):\n    return lambda *a: 3"),
    "helpers of the tests": ("root", "close = lambda a, b: True\ndef root(x):\n    return 0"),
    "built-ins of the tests": (
        "root",
        "import builtins\nbuiltins.abs = abs = lambda x: 0\nbuiltins.all = all = lambda x: True\n"
        "def root(x):\n    return 7.0",
    ),
    # constants and values that are nearly right
    "a constant": ("largest", LARGEST + "return 9"),
    "None": ("largest", LARGEST + "return None"),
    "true": ("square", "def square(x):\n    return True"),
    "not a number": ("root", "def root(x):\n    return float('nan')"),
    "the argument": ("apply", "def apply(f, x):\n    return f"),
    "the type": ("without", "def without(values, kind):\n    return kind"),
    "not implemented": ("largest", LARGEST + "return NotImplemented"),
    "an empty list for numpy": ("halve", "def halve(numbers):\n    return []"),
    "a class of its own for numpy": (
        "halve",
        "class A:\n    __array__ = lambda self, *a, **k: [0.5, 2.0]\n    __array_ufunc__ = lambda *a, **k: True\n"
        "    __len__ = lambda self: 2\n    __getitem__ = lambda self, n: [9.0, 9.0][n]\n"
        "def halve(numbers):\n    return A()",
    ),
    "numpy swapped": (
        "halve",
        "import sys\nclass Fake:\n    __getattr__ = lambda self, name: lambda *a, **k: True\n"
        "sys.modules['numpy'] = Fake()\n"
        "def halve(numbers):\n    return [9.0, 9.0]",
    ),
    # ends that are none
    "StopIteration": ("square", "def square(x):\n    raise StopIteration"),
    "an heir of StopIteration": (
        "square",
        "class Odd(StopIteration): pass\ndef square(x):\n    raise Odd(4)",
    ),
    "next of nothing": ("square", "def square(x):\n    return next(iter(()))"),
    "StopAsyncIteration": ("square", "def square(x):\n    raise StopAsyncIteration"),
    "GeneratorExit": ("square", "def square(x):\n    raise GeneratorExit"),
    "KeyboardInterrupt": ("largest", LARGEST + "raise KeyboardInterrupt"),
    "SystemExit": ("largest", LARGEST + "raise SystemExit(0)"),
    "SystemExit at once": ("largest", "raise SystemExit(0)"),
    "an exception of no kind": ("largest", "class Odd(BaseException): pass\n" + LARGEST + "raise Odd"),
    "an exception that equals everything": (
        "largest",
        f"class Odd(Exception):\n    {ANYTHING}" + LARGEST + "return Odd()",
    ),
    "an exception group": ("largest", LARGEST + "raise BaseExceptionGroup('x', [SystemExit(0)])"),
    "AssertionError": ("largest", LARGEST + "raise AssertionError"),
    "IndexError": ("square", "def square(x):\n    raise IndexError"),
    "an exception handler": (
        "largest",
        "import sys, os\nsys.excepthook = lambda *a: os._exit(0)\n" + LARGEST + "raise ValueError",
    ),
    "exit at the end": ("largest", "import atexit, os\natexit.register(os._exit, 0)\n" + LARGEST + "return 1"),
    "exit by an alarm": (
        "largest",
        "import os, signal\nsignal.signal(signal.SIGALRM, lambda *a: os._exit(0))\n"
        "signal.setitimer(signal.ITIMER_REAL, 1e-3)\n" + LARGEST + "while True: pass",
    ),
    "exit by a finalizer": (
        "largest",
        "import os\nclass A:\n    def __del__(self): os._exit(0)\n" + LARGEST + "A()\n    return 1",
    ),
    "exit by a thread": (
        "largest",
        "import os, threading\n"
        + LARGEST
        + "threading.Thread(target=os._exit, args=(0,)).start()\n    while True: pass",
    ),
    # objects
    "equal to everything": ("largest", f"class A:\n    {ANYTHING}" + LARGEST + "return A()"),
    "a number equal to everything": ("largest", f"class A(int):\n    {ANYTHING}" + LARGEST + "return A(1)"),
    "a list equal to everything": (
        "without",
        f"class A(list):\n    {ANYTHING}def without(values, kind):\n    return A([1])",
    ),
    "a class equal to everything": (
        "largest",
        f"class M(type):\n    {ANYTHING}class A(metaclass=M): pass\n" + LARGEST + "return A",
    ),
    "any of unittest": ("largest", "from unittest.mock import ANY\n" + LARGEST + "return ANY"),
    "another class": (
        "largest",
        f"class A:\n    __class__ = property(lambda self: int)\n    {ANYTHING}" + LARGEST + "return A()",
    ),
    "a difference of nothing": (
        "root",
        "class A:\n    __sub__ = __rsub__ = __abs__ = lambda self, *a: 0.0\n    __lt__ = lambda self, other: True\n"
        "def root(x):\n    return A()",
    ),
    "a generator": ("largest", LARGEST + "yield 9"),
    "a coroutine": ("largest", "async " + LARGEST + "return 9"),
    "a function with arguments left": ("apply", "def apply(f, x):\n    return lambda *a: f(x)"),
    # the program's interpreter
    "patched built-ins": (
        "largest",
        "import builtins\nfor name in ('isinstance', 'type', 'len', 'compile', 'exec', 'eval', 'AssertionError'):\n"
        "    setattr(builtins, name, lambda *a: True)\n" + LARGEST + "return 1",
    ),
    "patched encoding": (
        "largest",
        "import __main__\nfor name in ('encode', 'decode', 'exception_from_reply', 'exception_to_reply', 'Messages'):\n"
        "    setattr(__main__, name, lambda *a: ['value', ['k', '0'], ['l']])\n" + LARGEST + "return 1",
    ),
    "a function that was never handed over": (
        "largest",
        "import __main__\n__main__.encode = lambda value, *a: ['k', '0']\n" + LARGEST + "return 1",
    ),
    "exec for the tests to call": (
        "apply",
        "import __main__\n__main__.encode = lambda value, *a: ['T', 'builtins exec'.encode().hex()]\n"
        "def apply(f, x):\n    return 1",
    ),
    "calls in place of an answer": (
        "apply",
        "import __main__, os\n__main__.Messages.send = lambda self, message: os.write(\n"
        '    self.write_to, b\'["back","0",["l",["i","0x1"]],["d"]]\\n\')\ndef apply(f, x):\n    return 1',
    ),
    "swapped modules": (
        "largest",
        "import sys\nfor name in list(sys.modules):\n    sys.modules[name] = sys.modules['candidate']\n"
        + LARGEST
        + "return 1",
    ),
    "a trace function": ("largest", "import sys\nsys.settrace(lambda *a: sys.exit(0))\n" + LARGEST + "return 1"),
    "its own code swapped": ("largest", LARGEST + "largest.__code__ = (lambda n: 9).__code__\n    return 9"),
}
