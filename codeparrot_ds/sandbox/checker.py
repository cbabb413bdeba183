"""What runs inside the checker's sandbox: the side of a verdict that has the tests, and alone can say "passed".

See ``judge.py`` and ``inside.py``, whose code comes before this one's.
"""

from __future__ import annotations

import ast
import builtins
import collections  # noqa: F401 (what a test is forked from has loaded it)
import gc
import json
import posix
import sys

from codeparrot_ds.sandbox.inside import (
    VALUE_TYPES,
    Messages,
    Stopped,
    TransferError,
    decode,
    encode,
    exception_from_reply,
    exception_to_reply,
    text_from_hex,
    text_to_hex,
)

TYPE_CHECKING = False  # as in inside.py
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


def run(messages: Messages) -> None:
    """Runs the tests of one problem after another, each in a child of its own; ends where such a child dies."""
    gc.freeze()  # a collection in a child would copy all that it shares
    while True:
        check = json.loads(messages.receive())
        child = posix.fork()
        if not child:
            try:
                _check_programs(check, messages)
            except BaseException:
                posix._exit(1)
            posix._exit(0)
        _, status = posix.waitpid(child, 0)
        if status:
            posix._exit(1)


def _check_programs(check: dict[str, Any], messages: Messages) -> None:
    """Runs a problem's tests on one program after another, until the host has another problem."""
    failure: list[Any] | None = None
    names: set[str] = set()
    codes: list[Any] = []
    try:
        names, codes = _compile(check["setup"], check["tests"], set(check["names"]))
    except Exception as error:  # the problem's mistake
        failure = ["done", "error", text_to_hex(f"{type(error).__name__} in the tests")]
    messages.send(["ready"])
    while messages.receive() != b'["end"]':
        messages.send(failure or _run_tests(names, codes, messages))
    messages.send(["ended"])


class Remote:
    """What the checker has of the candidate's: a name, or an object that equals nothing but itself.

    No operator reaches the program, which could answer ``result - expected`` with what the tests wish for; nor does the
    program decide which of its objects are the same.
    """

    __slots__ = ("_candidate", "_place")

    def __init__(self, candidate: Candidate, tag: str, text: str) -> None:
        object.__setattr__(self, "_candidate", candidate)
        object.__setattr__(self, "_place", (tag, text))

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self._candidate.call(self._place, arguments, keywords)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._candidate.value("get", *self._place, text_to_hex(name))

    def __setattr__(self, name: str, value: Any) -> None:
        self._candidate.value("set", *self._place, text_to_hex(name), self._candidate.encode(value))

    def __getitem__(self, key: Any) -> Any:
        return self._candidate.value("item", *self._place, self._candidate.encode(key))

    def __len__(self) -> int:
        return int(self._candidate.value("length", *self._place))

    def __bool__(self) -> bool:
        return True

    def __iter__(self) -> Any:
        iterator = self._candidate.value("iterate", *self._place)
        while (reply := self._candidate.ask("next", *iterator._place))[0] != "end":
            yield self._candidate.decode(reply[1])


class Candidate:
    """Asks the candidate through the host."""

    def __init__(self, messages: Messages) -> None:
        self.messages = messages
        self.was_asked = False
        self.failure: AssertionError | None = None
        """Of the tests, in a function of theirs that the program called, and whose exceptions it may have caught."""
        self.functions: list[Callable[..., Any]] = []
        """What the program may call: functions that the tests have handed over."""
        self.numbers: dict[int, int] = {}
        """Their places in the list, by id; the list keeps them, so that an id stays theirs."""

    def ask(self, *request: Any) -> list[Any]:
        """Returns the program's reply, ``["value", …]`` or ``["end"]``; raises what it says that it raised."""
        self.was_asked = True
        self.messages.send(list(request))
        while (reply := self._reply())[0] == "back":
            self.messages.send(self._call_back(*reply[1:]))
        if reply[0] == "error":
            raise exception_from_reply(*reply[1:])
        if reply[0] not in ("value", "end"):
            raise TransferError("no reply")
        return reply

    def _reply(self) -> list[Any]:
        reply = json.loads(self.messages.receive())
        if not isinstance(reply, list) or not reply:
            raise TransferError("no reply")
        if reply[0] == "stop":
            raise Stopped
        return reply

    def _call_back(self, number: str, arguments: Any, keywords: Any) -> list[Any]:
        """Calls a function of the tests' for the program; it may call the program in turn."""
        try:
            function = self.functions[int(number)]
            return ["return", self.encode(function(*self.decode(arguments), **self.decode(keywords)))]
        except Stopped:
            raise
        except BaseException as error:
            if isinstance(error, AssertionError) and getattr(error, "_candidate", None) is None:
                self.failure = error
            return ["raise", *exception_to_reply(error)[1:]]

    def value(self, *request: Any) -> Any:
        return self.decode(self.ask(*request)[1])

    def call(self, place: tuple[str, str], arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        reply = self.ask("call", *place, self.encode(list(arguments)), self.encode(keywords))
        for argument, after in zip(arguments, self.decode(reply[2]), strict=True):
            _update(argument, after)
        return self.decode(reply[1])

    def decode(self, code: Any) -> Any:
        return decode(code, self._from_handle)

    def _from_handle(self, tag: str, text: str) -> Any:
        if tag == "k":
            return self.functions[int(text)]
        if tag == "T":
            place, _, name = text_from_hex(text).partition(" ")
            if place != "builtins" or name not in VALUE_TYPES:  # `exec` would let the program into the checker
                raise TransferError("a type that only the program has")
            return VALUE_TYPES[name]
        return Remote(self, "h", str(int(text)))

    def encode(self, value: Any) -> list[Any]:
        return encode(value, self._to_handle)

    def _to_handle(self, value: Any) -> list[Any]:
        if type(value) is Remote:
            return [*value._place]
        if place := _importable(value):
            return ["T", text_to_hex(place)]
        if callable(value):
            return ["k", self._given(value, getattr(value, "__name__", type(value).__name__))]
        if hasattr(value, "__next__"):

            def next_items() -> list[Any]:
                for item in value:
                    return [item]
                return []

            return ["I", self._given(next_items, "")]
        raise TransferError(f"a test hands over a {type(value).__name__}, which cannot leave the checker")

    def _given(self, function: Callable[..., Any], name: str) -> str:
        """Hands a function over: its number and name, in hexadecimal."""
        number = self.numbers.setdefault(id(function), len(self.functions))
        if number == len(self.functions):
            self.functions.append(function)
        return text_to_hex(f"{number} {name}")


def _importable(value: Any) -> str:
    """Module and name of a type or function that a program can import as well; empty for others."""
    if not isinstance(value, (type, type(encode), type(len))):
        return ""
    module, name = value.__module__, value.__name__
    return f"{module} {name}" if getattr(sys.modules.get(module), name, None) is value else ""


def _update(before: Any, after: Any) -> None:
    """Makes an argument what the call left of it."""
    if type(before) is not type(after):
        return
    if isinstance(before, list):
        if len(before) == len(after):
            kept = [old if _is_mutable(old) and type(old) is type(new) else new for old, new in zip(before, after)]  # noqa: B905
            for old, new in zip(kept, after):  # noqa: B905
                _update(old, new)
            after = kept
        before[:] = after
    elif isinstance(before, (dict, set)):
        before.clear()
        before.update(after)
    elif isinstance(before, bytearray):
        before[:] = after
    elif type(before).__module__ == "numpy" and before.shape == after.shape:
        before[...] = after


def _is_mutable(value: Any) -> bool:
    return isinstance(value, (list, dict, set, bytearray))


def _run_tests(names: set[str], codes: list[Any], messages: Messages) -> list[Any]:
    """Returns ``["done", kind, detail]`` of one program; the detail is hexadecimal.

    Args:
        codes: the setup's, then each test's.
    """
    candidate = Candidate(messages)
    remotes = {name: Remote(candidate, "g", text_to_hex(name)) for name in names}
    namespace: dict[str, Any] = {"__name__": "checker"}
    namespace |= {name: remote for name, remote in remotes.items() if not _is_built_in(name)}
    namespace |= {name + _OWN: remote for name, remote in remotes.items()}
    try:
        for code in codes:
            exec(code, namespace)
        if candidate.failure is not None:
            raise candidate.failure
    except Stopped:
        return ["done", "stopped", ""]
    except BaseException as error:
        own = getattr(error, "_candidate", None)
        kind = "failed" if isinstance(error, AssertionError) and own is None else "error"
        return ["done", kind, text_to_hex(own or type(error).__name__)]
    if not candidate.was_asked:
        return ["done", "error", text_to_hex("the tests ask nothing of the program")]
    return ["done", "passed", ""]


# --------------------------------------------------------------------------------------------------------------------
# whose names the tests mean

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
_SCOPES = (*_FUNCTIONS, ast.ClassDef, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_OWN = "()"
"""Behind a name: the program's, whatever else has that name. No source can write such a name."""


def _is_built_in(name: str) -> bool:
    return hasattr(builtins, name)


def _compile(setup: str, tests: list[str], own: set[str]) -> tuple[set[str], list[Any]]:
    """Returns the names that are the program's where nothing else has them, and the code of setup and tests.

    Args:
        own: names that are the program's even where Python, an import or the setup has them.
    """
    trees = [ast.parse(text) for text in (setup, *tests)]
    # A prompt's head of the wanted function, without its body.
    trees[0].body = [node for node in trees[0].body if getattr(node, "name", None) not in own]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    read = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    imported = {node.asname or node.name for node in nodes if isinstance(node, ast.alias)}
    functions: dict[str, Any] = {}  # of the tests, by all their names
    for node in (node for tree in trees[1:] for node in tree.body):
        if isinstance(node, ast.FunctionDef):
            functions[node.name] = node
        elif isinstance(node, ast.Assign):
            value = functions.get(node.value.id) if isinstance(node.value, ast.Name) else node.value
            if isinstance(value, _FUNCTIONS):
                functions |= {target.id: value for target in node.targets if isinstance(target, ast.Name)}
    hidden = {name for name in own if _is_built_in(name) or name in imported or name in functions}
    if "*" in imported:
        hidden = own
    if hidden:
        _mark_own(trees, hidden, functions)
    names = {name for name in read if not _is_built_in(name)} | own
    return names, [compile(tree, "<tests>", "exec", dont_inherit=True) for tree in trees]


def _mark_own(trees: list[Any], own: set[str], functions: dict[str, Any]) -> None:
    """Renames what means the program's own function, which is called ``abs``, ``gcd`` or ``check`` as another is.

    Where the tests hand it to a function of theirs, as HumanEval's do, only that argument is it, and what the function
    reads under the name is Python's or the tests' own: ``assert candidate(-1) == abs(-1)``. Otherwise, as in MBPP's,
    the name is the program's wherever it is read.

    Args:
        functions: of the tests, by name.
    """
    outside = [node for tree in trees[1:] for node in _outside_scopes(tree)]
    handed = []
    for call in (node for node in outside if isinstance(node, ast.Call)):
        function = functions.get(call.func.id) if isinstance(call.func, ast.Name) else None
        if function is not None and _reads_arguments(function):
            values = [*call.args, *(keyword.value for keyword in call.keywords)]
            handed += [value for value in values if isinstance(value, ast.Name) and value.id in own]
    bound = {node.id for node in outside if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    everywhere = own - {node.id for node in handed} - bound - functions.keys()
    for node in [*handed, *(node for tree in trees for node in _global_reads(tree, everywhere))]:
        node.id += _OWN


def _outside_scopes(tree: Any) -> list[Any]:
    """The nodes that belong to no function, class or comprehension; a function without arguments is none."""
    found = [tree]
    for node in found:  # which grows
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, _SCOPES) or isinstance(child, ast.FunctionDef) and not _reads_arguments(child):
                found.append(child)
    return found


def _global_reads(node: Any, names: set[str]) -> list[Any]:
    """Where a tree reads one of the names and no variable of a function or comprehension has it."""
    if isinstance(node, _SCOPES) and not isinstance(node, ast.ClassDef):
        inner: list[Any] = list(ast.walk(node))
        names = names - {part.arg for part in inner if isinstance(part, ast.arg)}
        names = names - {part.asname or part.name for part in inner if isinstance(part, ast.alias)}
        names = names - {part.id for part in inner if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)}
    if not names:
        return []
    if isinstance(node, ast.Name):
        return [node] if node.id in names and isinstance(node.ctx, ast.Load) else []
    return [read for child in ast.iter_child_nodes(node) for read in _global_reads(child, names)]


def _reads_arguments(function: Any) -> bool:
    arguments = {node.arg for node in ast.walk(function.args) if isinstance(node, ast.arg)}
    return any(node.id in arguments for node in ast.walk(function) if isinstance(node, ast.Name))
