"""The sandbox: right programs pass, hostile ones neither pass nor do harm, and every verdict has its kind."""

import builtins
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from codeparrot_ds.errors import UserError
from codeparrot_ds.sandbox import judge as sandbox
from codeparrot_ds.sandbox.judge import KINDS, Check, Judge, Limits, check_sandbox, judge_all, names_defined
from tests.evaluation.hostile import HOSTILE, listening
from tests.evaluation.wrong import PROBLEMS, WRONG
from tests.evaluation.wrong import RIGHT as RIGHT_OF_PROBLEMS

SECRET = "secret-5e0f3a"
PATIENT = Limits(seconds=30.0, memory_bytes=256 << 20)  # a busy machine is no reason for another verdict
HASTY = Limits(seconds=1.5, memory_bytes=256 << 20)  # for what goes on for ever


@pytest.fixture(scope="module", autouse=True)
def there_is_a_sandbox():
    """Where CI runs, a machine without one fails."""
    if os.environ.get("CI") != "true":
        try:
            check_sandbox()
        except UserError as error:
            pytest.skip(str(error))


@pytest.fixture(scope="module")
def judge():
    with_checker = Judge(PATIENT, 0)
    yield with_checker
    with_checker.close()


def descendants():
    """Processes whose parents lead to this one."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # it ended meanwhile
            continue
    found, last = {os.getpid()}, set()
    while found != last:
        last = set(found)
        found |= {child for child, parent in parents.items() if parent in found}
    return found - {os.getpid()}


@pytest.fixture(scope="module")
def hostile_verdicts(tmp_path_factory):
    """All hostile programs at once, with what they may do harm to; each one's verdict."""
    folder = tmp_path_factory.mktemp("outside")
    (folder / "home.txt").write_text(SECRET)
    for path in (folder, *folder.parents[:2]):
        path.chmod(0o777)  # the file system's permissions must not be what protects it
    before = descendants()
    check = Check(tests=(f"assert answer() == {SECRET!r}",))
    verdicts = {}
    os.environ["CANARY"] = SECRET
    with listening(SECRET.encode()) as (port, abstract, asked):
        home = str(folder / "home.txt")
        places = {"home": home, "outside": str(folder), "port": port, "abstract": abstract, "host": os.getpid()}
        for limits in (HASTY, PATIENT):
            names = [name for name, (_, kinds) in HOSTILE.items() if ("timeout" in kinds) == (limits is HASTY)]
            texts = [HOSTILE[name][0] for name in names]
            texts = [
                text.format_map(places) if any("{" + place in text for place in places) else text for text in texts
            ]
            found = judge_all([(text, check) for text in texts], limits=limits, num_workers=4)
            verdicts |= zip(names, found, strict=True)
        yield verdicts
    del os.environ["CANARY"]
    assert asked == []
    assert sorted(path.name for path in folder.iterdir()) == ["home.txt"]
    soon = time.monotonic() + 5
    while (left := descendants() - before) and time.monotonic() < soon:
        time.sleep(0.05)
    assert left == set()


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_program_does_not_pass_and_is_classified(hostile_verdicts, name):
    kinds = HOSTILE[name][1].split()
    assert "passed" not in kinds and set(kinds) <= set(KINDS)
    assert hostile_verdicts[name].kind in kinds, hostile_verdicts[name]


@pytest.fixture
def many_open_files():
    """As in a process that has done much before: the next descriptors are beyond what a sandbox may open."""
    files = [os.open(os.devnull, os.O_RDONLY) for _ in range(200)]
    yield
    for file in files:
        os.close(file)


@pytest.mark.parametrize("name", ["endless message", "closed pipes", "a verdict of its own", "a reply of its own"])
def test_verdicts_do_not_depend_on_how_many_files_the_judge_has_open(many_open_files, name):
    text, kinds = HOSTILE[name]
    before = sorted(os.listdir("/proc/self/fd"))
    assert Judge(PATIENT, 0).once(text, Check(tests=("assert answer() == 0",))).kind == kinds
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_there_are_forty_hostile_programs_and_the_answer_would_pass(judge):
    assert len(HOSTILE) >= 40
    assert judge(f"def answer():\n    return {SECRET!r}", Check(tests=(f"assert answer() == {SECRET!r}",))).passed


@pytest.fixture(scope="module")
def wrong_verdicts():
    items = [(program, PROBLEMS[problem]) for problem, program in WRONG.values()]
    return dict(zip(WRONG, judge_all(items, limits=PATIENT), strict=True))


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_program_does_not_pass(wrong_verdicts, name):
    assert wrong_verdicts[name].kind in ("failed", "error", "exited"), wrong_verdicts[name]


@pytest.mark.parametrize("problem", RIGHT_OF_PROBLEMS)
def test_a_right_program_of_the_same_problem_passes(judge, problem):
    assert len(WRONG) >= 40 and {problem for problem, _ in WRONG.values()} <= {*RIGHT_OF_PROBLEMS, "constant"}
    verdict = judge(RIGHT_OF_PROBLEMS[problem], PROBLEMS[problem])
    assert verdict.passed, verdict


RIGHT = {
    "values": (
        "def f(x):\n    return x",
        "from collections import deque\n"
        "for x in (None, True, -(10 ** 40), 0.1, float('inf'), 1j, 'ö\\ud800\\0', b'\\xff', bytearray(b'a'), [1, [2]],"
        " (1, ()), {1, 2}, frozenset('a'), {'a': {'b': 1}, 2: None}, range(3, 9, 2), deque([1]),"
        " [-1, 2.5, 0, -(16 ** 40), float('-inf'), 1e-300], (3, True), (4, -0.5), [[1, 2], [3]]):\n"
        "    y = f(x)\n    assert x == y and type(x) is type(y), x\n"
        "assert [type(v) for v in f((1, 2.0, True))] == [int, float, bool] and str(f([float('nan')])) == '[nan]'\n"
        "assert str(f(float('nan'))) == 'nan' and str(f(-0.0)) == '-0.0'",
    ),
    "large values": (
        "def f(n):\n    return list(range(n))\ndef g(n):\n    return 'x' * n",
        "assert f(500_000) == list(range(500_000)) and g(6 << 20) == 'x' * (6 << 20)",
    ),
    "arguments changed in place": (
        "def f(a, b, c):\n    a.sort()\n    b['x'] = 1\n    c.clear()\n    a.append([])\ndef g(a):\n    a[0].append(1)",
        "a, b, c = [3, 1], {}, {1}\nf(a, b, c)\nassert (a, b, c) == ([1, 3, []], {'x': 1}, set())\n"
        "inner = []\nouter = [inner]\ng(outer)\nassert inner == [1] and outer[0] is inner",
    ),
    "objects of its own": (
        "class Node:\n    def __init__(self, v): self.v, self.next = v, None\n    def twice(self): return 2 * self.v\n"
        "def total(node):\n    return node.v + total(node.next) if node else 0",
        "a = Node(1)\na.next = Node(2)\nassert total(a) == 3 and a.next.v == 2 and a.twice() == 2\n"
        "assert a == a and a != Node(1)",
    ),
    "iterators": (
        "def f(n):\n    for i in range(n): yield i\ndef g():\n    return {1: 2}.items()",
        "assert list(f(3)) == [0, 1, 2]\nassert next(iter(f(1))) == 0\nassert len(g()) == 1",
    ),
    "exceptions": (
        "class Odd(ValueError): pass\ndef f(x):\n    if x: raise Odd('no')\n    return {}[1]",
        "try:\n    f(1)\nexcept ValueError as e:\n    assert str(e) == 'no'\nelse:\n    assert False\n"
        "try:\n    f(0)\nexcept KeyError:\n    pass",
    ),
    "functions as arguments": (
        "def apply(f, *values):\n    return [f(v) for v in values]\ndef twice(f):\n    return lambda x: f(f(x))\n"
        "from functools import reduce\ndef same(f):\n    return f\ndef fold(f, values):\n    return reduce(f, values)\n"
        "def double(x):\n    return 2 * x\ndef name(f):\n    return f.__name__",
        "import math, operator\nseen = []\ndef one_more(x):\n    return double(x) + 1\n"
        "assert apply(lambda v: [v, v], 1, 2) == [[1, 1], [2, 2]]\n"
        "assert apply(len, 'ab', ()) == [2, 0] and apply(math.sqrt, 4) == [2.0] and apply(str.upper, 'a') == ['A']\n"
        "assert apply(seen.append, 1, 2) == [None, None] and seen == [1, 2]\n"
        "assert twice(lambda x: x * 3)(2) == 18 and twice(one_more)(1) == 7 and twice(double)(1) == 4\n"
        "assert same(one_more) is one_more and name(one_more) == 'one_more' and fold(operator.add, 'abc') == 'abc'\n"
        "assert fold(lambda a, b: a if a > b else b, [1, 3, 2]) == 3 and sorted([3, 1], key=double) == [1, 3]",
    ),
    "types as arguments": (
        "def f(value, kind):\n    return isinstance(value, kind)\ndef make(kind):\n    return kind('12')\n"
        "def kinds(*values):\n    return [type(v) for v in values]",
        "from collections import OrderedDict\nfrom numbers import Number\n"
        "assert f(1, int) and not f(1, (str, list)) and f(None, type(None))\n"
        "assert f(2.5, Number) and not f([], OrderedDict)\n"
        "assert make(int) == 12 and make(list) == ['1', '2'] and kinds(1, None, {}) == [int, type(None), dict]",
    ),
    "iterators as arguments": (
        "def total(values):\n    return sum(values)\ndef first(values):\n    return next(values)",
        "from itertools import count\nassert total(iter([1, 2])) == 3 and total(x for x in (1, 2, 3)) == 6\n"
        "numbers = count(5)\nassert (first(numbers), first(numbers)) == (5, 6) and total(map(int, '12')) == 3",
    ),
    "exceptions of the tests' functions": (
        "def f(g):\n    try:\n        return g()\n    except KeyError as error:\n        return error.args\n"
        "def loud(g):\n    return g()",
        "def bad():\n    raise KeyError('a')\ndef worse():\n    raise ValueError('b')\nassert f(bad) == ('a',)\n"
        "try:\n    loud(worse)\nexcept ValueError as error:\n    assert str(error) == 'b'\nelse:\n    assert False",
    ),
    "keywords and printing": (
        "print('hello')\nimport sys\ndef f(*, a, b=2):\n    print(a, file=sys.stderr)\n    return a + b",
        "assert f(a=1) == 3",
    ),
    "its own main": ("if __name__ == '__main__':\n    raise SystemExit\ndef f(): return 1", "assert f() == 1"),
    "a scratch folder and a thread": (
        "import threading\ndef f():\n    open('x.txt', 'w').write('kept')\n    found = []\n"
        "    t = threading.Thread(target=lambda: found.append(open('/tmp/x.txt').read()))\n"
        "    t.start()\n    t.join()\n"
        "    return found",
        "assert f() == ['kept']",
    ),
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_program_passes(judge, name):
    program, tests = RIGHT[name]
    verdict = judge(program, Check(tests=(tests,)))
    assert verdict.passed and verdict.seconds > 0, verdict


def test_no_exception_of_a_program_ends_a_loop_of_the_tests(judge):
    kinds = [value for value in vars(builtins).values() if isinstance(value, type) and issubclass(value, BaseException)]
    names = [
        kind.__name__ for kind in kinds if not issubclass(kind, (SystemExit, MemoryError))
    ]  # which end all at once
    assert len(names) > 60 and "StopIteration" in names
    program = (
        "import builtins\ndef f(name):\n    raise getattr(builtins, name)('x')\nclass A:\n"
        "    def __init__(self, name): self.name = name\n    def __iter__(self): return self\n"
        "    def __next__(self): f(self.name)\n    @property\n    def value(self): f(self.name)"
    )
    ways = ("list(map(f, [name]))", "[*filter(f, [name])]", "[A(name).value for _ in 'a']")
    tests = (
        f"for name in {names!r}:\n    for way in {ways!r}:\n        try:\n            eval(way)\n"
        "        except BaseException:\n            continue\n        assert False, (name, way)\n"
        "assert list(A('StopIteration')) == []  # which is how an iterator ends"
    )
    verdict = judge(program, Check(setup="f, A", tests=(tests,)))
    assert verdict.passed, verdict


USES_NUMPY = "import numpy as np\ndef f(x):\n    return np.asarray(x) * 2\ndef g(x):\n    return np.asarray(x).sum()"


def test_tests_may_import_numpy_and_programs_where_their_limits_say_so(judge):
    tests = (
        "import numpy as np\nassert isinstance(f([1, 2]), np.ndarray) and f([1, 2]).tolist() == [2, 4]\n"
        "assert f(np.array([0.5])).tolist() == [1.0] and f([]).shape == (0,) and g([1, 2]) == 3\n"
        "from numpy import linalg\nassert linalg.norm(f([1.5, 2.0])) == 5.0",
    )
    verdict = judge(USES_NUMPY, Check(tests=tests))
    assert (verdict.kind, verdict.detail) == ("error", "ModuleNotFoundError")
    with_numpy = Judge(replace(PATIENT, numpy=True), 0)
    try:
        assert with_numpy(USES_NUMPY, Check(tests=tests)).passed
        assert with_numpy("def f(x): return 1", Check(tests=("assert f(1) == 1",))).passed
        in_place = Check(tests=("import numpy as np\na = np.zeros(2)\nf(a)\nassert a.sum() == 2",))
        assert with_numpy("def f(a): a += 1", in_place).passed and not with_numpy("def f(a): a + 1", in_place).passed
        whole = Check(tests=("import numpy as np\nassert np.all(f() == np.array([1, 2]))",))
        equal = "import numpy as np\nclass A(np.ndarray):\n    __eq__ = lambda self, other: True\n"
        assert with_numpy(equal + "def f(): return np.array([5, 6]).view(A)", whole).kind == "failed"
        assert with_numpy(equal + "def f(): return np.array([None], dtype=object)", whole).kind == "failed"
        places = "import numpy, os\ndef f():\n    open(os.path.dirname(numpy.__file__) + '/x', 'w')"
        assert with_numpy(places, Check(tests=("f()",))).detail == "OSError"
        threads = "import numpy, os\ndef f():\n    return os.environ['OPENBLAS_NUM_THREADS']"
        assert with_numpy(threads, Check(tests=("assert f() == '1'",))).passed
        bomb = "import numpy\ndef f():\n    return numpy.ones(1 << 28)"
        assert with_numpy(bomb, Check(tests=("f()",))).kind == "memory"
    finally:
        with_numpy.close()


def test_too_slow_is_told_from_wrong(judge):
    """A right program that takes longer than it may, and tests that do: neither is `failed`."""
    hasty = Judge(HASTY, 0)
    try:
        slow = hasty("import time\ndef f():\n    time.sleep(60)\n    return 1", Check(tests=("assert f() == 1",)))
        assert (slow.kind, slow.detail) == ("timeout", "after 1.5 s, in the program")
        slow = hasty("def f(): return 1", Check(tests=("import time\nassert f() == 1\ntime.sleep(60)",)))
        assert (slow.kind, slow.detail) == ("timeout", "after 1.5 s, in the tests")
        assert hasty("def f(): return 2", Check(tests=("assert f() == 1",))).kind == "failed"
    finally:
        hasty.close()


def test_reading_the_tests_takes_none_of_the_programs_time():
    """Extended sets have thousands of inputs to a problem."""
    many = "inputs = [" + "[1, 2, 3], " * 40_000 + "]\nassert all(f(x) == 3 for x in inputs[:3])"
    judge = Judge(HASTY, 0)
    try:
        verdict = judge("def f(x): return len(x)", Check(tests=(many,)))
        assert verdict.passed and verdict.seconds < 0.5, verdict
    finally:
        judge.close()


def test_limits_follow_the_machines_speed(monkeypatch):
    """The same machine, measured against one that is four times as fast as it."""
    slowness = sandbox.slowness.__wrapped__
    monkeypatch.setattr(sandbox, "_REFERENCE_SECONDS", 1e9)
    assert slowness() == 1.0
    monkeypatch.setattr(sandbox, "_REFERENCE_SECONDS", 1e-3)
    assert slowness() > 4
    monkeypatch.setattr(sandbox, "slowness", lambda: 4.0)
    waits = "import time\ndef f():\n    time.sleep(1.2)\n    return 1"
    (verdict,) = judge_all([(waits, Check(tests=("assert f() == 1",)))], limits=Limits(seconds=1.0), num_workers=1)
    assert verdict.passed and verdict.seconds > 1.2
    (verdict,) = judge_all([("while True: pass", Check(tests=("f()",)))], limits=Limits(seconds=0.1), num_workers=1)
    assert verdict.kind == "timeout" and "after 0.4 s" in verdict.detail


def test_names_defined_are_those_of_functions_and_classes():
    source = (
        "import os\nx = 1\nclass A:\n    def inner(self): pass\ndef abs(x):\n    def inner(): pass\nf = g = lambda: 1"
    )
    assert names_defined(source) == ("A", "abs", "f", "g")
    assert names_defined("def f(:") == names_defined("x = '\0'") == ()


def test_setup_helps_the_tests_and_the_entry_point_is_the_programs(judge):
    """As HumanEval's prompts: they define helpers that the tests call, and the wanted function without a body."""
    setup = 'import math\ndef helper(x):\n    return x + 1\ndef wanted(x):\n    """Doc."""\n'
    check = Check(
        setup=setup, entry_point="wanted", tests=("assert wanted(1) == helper(1)", "assert math.pi < wanted(3) < 5")
    )
    assert judge("def helper(x):\n    return 'other'\ndef wanted(x):\n    return x + 1", check).passed
    assert judge("def wanted(x):\n    return 1", check).kind == "failed"
    missing = judge("def other(x):\n    return 1", check)
    assert (missing.kind, missing.detail) == ("error", "NameError")


def test_one_problem_leaves_nothing_to_the_next():
    judge = Judge(HASTY, 0)
    try:
        check_that_nothing_is_left(judge)
    finally:
        judge.close()


def check_that_nothing_is_left(judge):
    judge("def f(): return 1", Check(tests=("import builtins\nbuiltins.leak = 1\nleaked = f()",)))
    check = Check(tests=("import builtins\nassert not hasattr(builtins, 'leak') and not hasattr(f(), 'x')",))
    assert judge("import os\ndef f(): return len(os.listdir('/tmp'))", check).passed
    for answer in (1, 2, 1):  # the same tests on several programs: each begins anew
        counting = Check(tests=("assert 'mark' not in globals()\nglobals()['mark'] = 1\nassert f() == 1",))
        assert judge(f"def f(): return {answer}", counting).passed == (answer == 1)
    slow = Check(tests=("while True: f()",))  # the tests themselves do not end
    assert judge("def f(): return 1", slow).kind == "timeout"
    assert judge("def f(): return 1", Check(tests=("assert f() == 1",))).passed
    broken = Check(tests=("assert f( == 1",))
    for _ in range(2):
        verdict = judge("def f(): return 1", broken)
        assert (verdict.kind, verdict.detail) == ("error", "SyntaxError in the tests")
    endless = Check(tests=("try:\n    f()\nexcept BaseException:\n    while True: pass",))
    assert judge("import os\ndef f(): os._exit(1)", endless).kind == "exited"
    assert judge("def f(): return 1", Check(tests=("assert f() == 1",))).passed


def test_verdicts_come_in_order_and_stop_when_nobody_wants_more():
    items = [(f"def f():\n    return {n % 2}", Check(tests=("assert f() == 1",))) for n in range(8)]
    verdicts = judge_all(items, limits=PATIENT, num_workers=2)
    assert [next(verdicts).passed for _ in range(3)] == [False, True, False]
    verdicts.close()
    assert [verdict.kind for verdict in judge_all(items, limits=PATIENT, num_workers=3)] == ["failed", "passed"] * 4


def test_an_ordinary_users_sandbox_confines_as_well(hostile_verdicts, monkeypatch):
    """The flags of one who is not root: a user namespace, and no user of the program's own."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    sandbox._bubblewrap.cache_clear()
    assert "--unshare-user" in sandbox._bubblewrap(1 << 20)
    check = Check(tests=(f"assert answer() == {SECRET!r}",))
    names = ("home", "environment", "open files in /proc", "network", "signal to the host", "end without a word")
    judge = Judge(PATIENT, 0)
    try:
        assert judge(f"def answer():\n    return {SECRET!r}", check).passed
        for name in names:
            text = HOSTILE[name][0].replace("{home!r}", "'/root/x'").replace("{port}", "9").replace("{host}", "999999")
            assert judge(text, check).kind in HOSTILE[name][1].split()
    finally:
        judge.close()
        sandbox._bubblewrap.cache_clear()


@pytest.mark.parametrize(
    ("bwrap", "message"),
    [
        (None, "bubblewrap, which makes it, is not installed; on Debian and Ubuntu: apt-get install bubblewrap"),
        ("echo 'bwrap: Unknown option --size' >&2; exit 1", "needs bubblewrap 0.7 or newer.*Unknown option --size"),
        ("echo 'bwrap: No permissions to create new namespace' >&2; exit 1", "cannot make one here .*No permissions"),
    ],
)
def test_a_machine_without_a_sandbox_is_told_so(tmp_path, bwrap, message):
    if bwrap:
        (tmp_path / "bwrap").write_text(f"#!/bin/sh\n{bwrap}\n")
        (tmp_path / "bwrap").chmod(0o755)
    script = "from codeparrot_ds.sandbox.judge import check_sandbox\ncheck_sandbox()"
    if bwrap:  # a shell to run it with
        os.symlink("/bin/sh", tmp_path / "sh")
    done = subprocess.run(
        [sys.executable, "-c", script], env={"PATH": str(tmp_path), "PYTHONPATH": os.getcwd()}, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert re.search(message, done.stderr), done.stderr
