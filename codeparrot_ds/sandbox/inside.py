"""What runs inside a sandbox: the candidate's side and the checker's side of a verdict. See ``judge.py``.

The host compiles this file and hands the code over; nothing of the package can be imported inside, and little of the
standard library is, because every verdict starts an interpreter. Values cross as JSON lists of strings, which are
Python literals as well: a candidate, which must start fast, needs no JSON library.
"""

from __future__ import annotations

import posix
import sys

TYPE_CHECKING = False  # typing's own, without the import, which would take half the time of a start
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_NO_MEMORY = 12  # ENOMEM

MAX_DEPTH = 64
"""Of nested values. Python's own parser ends at 200 brackets."""

_SAFE = (int, float, complex, bool, str, bytes, bytearray, list, tuple, dict, set, frozenset, range, object, type(None))
_VALUE_TYPES: dict[str, Any] = {kind.__name__: kind for kind in _SAFE}
"""Types that cross as values in both directions: calling one with anything does no harm."""


class TransferError(Exception):
    """A value that cannot cross: too deep, too large, or of a type that only one side has."""


class TooLarge(TransferError):
    """A message that no limit allows."""


class Stopped(BaseException):
    """The candidate is gone; the checker's child ends, whatever the tests catch."""


class Messages:
    """Lines over two file descriptors."""

    def __init__(self, read_from: int, write_to: int, max_bytes: int) -> None:
        self.read_from, self.write_to, self.max_bytes = read_from, write_to, max_bytes
        self.buffer = b""

    def receive(self) -> bytes:
        parts = [self.buffer]
        while b"\n" not in parts[-1]:
            part = posix.read(self.read_from, 1 << 16)
            if not part:
                posix._exit(0)  # the host is gone
            parts.append(part)
        line, _, self.buffer = b"".join(parts).partition(b"\n")
        return line

    def send(self, message: list[Any]) -> None:
        parts: list[str] = []
        _write_json(message, parts)
        data = "".join(parts).encode("ascii") + b"\n"
        if len(data) > self.max_bytes:
            raise TooLarge
        while data:
            data = data[posix.write(self.write_to, data) :]


def _write_json(value: Any, parts: list[str]) -> None:
    if isinstance(value, str):
        parts.append('"' + value + '"')  # names and hexadecimal digits: nothing to escape
        return
    parts.append("[")
    for index, item in enumerate(value):
        if index:
            parts.append(",")
        _write_json(item, parts)
    parts.append("]")


def text_to_hex(text: str) -> str:
    return text.encode("utf-8", "surrogatepass").hex()


def text_from_hex(text: str) -> str:
    return bytes.fromhex(text).decode("utf-8", "surrogatepass")


def encode(value: Any, other: Callable[[Any], list[Any]], depth: int = 0) -> list[Any]:
    """Returns a value as nested lists of strings, each with its type's tag first.

    Built-in types cross with their content, subclasses as the built-in type they extend, so that no method of theirs
    reaches the other side. ``other`` encodes what is of no such type.
    """
    if depth > MAX_DEPTH:
        raise TransferError("too deep")
    if value is None:
        return ["n"]
    if isinstance(value, bool):
        return ["b", "1" if value else ""]
    if isinstance(value, int):
        return ["i", hex(int.__add__(value, 0))]
    if isinstance(value, float):
        return ["f", float.hex(value)]
    if isinstance(value, complex):
        return ["c", float.hex(value.real), float.hex(value.imag)]
    if isinstance(value, str):
        return ["s", text_to_hex(str.__add__(value, ""))]
    if isinstance(value, (bytes, bytearray)):
        return ["y" if isinstance(value, bytes) else "Y", value.hex()]
    if isinstance(value, dict):
        return ["d", *(encode(part, other, depth + 1) for pair in dict.items(value) for part in pair)]
    for kind, tag in ((list, "l"), (tuple, "t"), (set, "S"), (frozenset, "F")):
        if isinstance(value, kind):
            return [tag, *(encode(part, other, depth + 1) for part in value)]
    if type(value) is range:
        return ["r", hex(value.start), hex(value.stop), hex(value.step)]
    if type(value).__name__ == "deque" and type(value).__module__ == "collections":
        return ["q", *(encode(part, other, depth + 1) for part in value)]
    if type(value).__module__ == "numpy" and getattr(getattr(value, "dtype", None), "str", "") in _numpy_types():
        if not value.shape:
            return encode(value.item(), other, depth)
        return ["N", value.dtype.str, value.tobytes().hex(), *map(hex, value.shape)]
    if isinstance(value, type) and any(value is kind for kind in _SAFE):
        return ["T", text_to_hex(f"builtins {value.__name__}")]
    return other(value)


def _numpy_types() -> dict[str, Any]:
    """Of numpy's arrays that cross with their content, and of its numbers, which cross as Python's: no objects."""
    import numpy

    return {kind.str: kind for kind in map(numpy.dtype, "?bBhHiIlLqQefdFD")}


def decode(code: Any, other: Callable[[str, str], Any], depth: int = 0) -> Any:
    """Returns the value of ``encode``; ``other`` takes the tag and the text of what is of no built-in type.

    Raises ``ValueError``, ``TypeError`` or ``TransferError`` for anything else.
    """
    if depth > MAX_DEPTH:
        raise TransferError("too deep")
    tag, *parts = code
    if tag == "n":
        return None
    if tag == "b":
        return bool(parts[0])
    if tag == "i":
        return int(parts[0], 16)
    if tag == "f":
        return float.fromhex(parts[0])
    if tag == "c":
        return complex(float.fromhex(parts[0]), float.fromhex(parts[1]))
    if tag == "s":
        return text_from_hex(parts[0])
    if tag == "y":
        return bytes.fromhex(parts[0])
    if tag == "Y":
        return bytearray.fromhex(parts[0])
    if tag == "r":
        return range(*(int(part, 16) for part in parts))
    if tag in "ltSFqd":
        values = [decode(part, other, depth + 1) for part in parts]
        if tag == "l":
            return values
        if tag == "t":
            return tuple(values)
        if tag == "S":
            return set(values)
        if tag == "F":
            return frozenset(values)
        if tag == "d":
            return dict(zip(values[::2], values[1::2], strict=True))
        from collections import deque

        return deque(values)
    if tag == "N":
        import numpy

        shape = [int(part, 16) for part in parts[2:]]
        return numpy.ndarray(shape, _numpy_types()[parts[0]], bytearray.fromhex(parts[1]))
    return other(tag, parts[0])


def confine(settings: dict[str, Any]) -> None:
    """Sets this process's limits, then leaves root for a user that owns nothing, where the host is root."""
    import resource

    for name, limit in settings["limits"].items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), limit)
    if settings["user"]:
        posix.setgroups([])
        posix.setresgid(*[settings["user"]] * 3)
        posix.setresuid(*[settings["user"]] * 3)


def main(settings: dict[str, Any]) -> None:
    """Runs one side. The host's lines are standard input and output; the program finds the one empty, and the other
    is where its errors go."""
    read_from, write_to = posix.dup(0), posix.dup(1)
    null = posix.open("/dev/null", posix.O_RDWR)
    posix.dup2(null, 0)
    posix.dup2(2, 1)
    confine(settings)
    if settings["packages"]:
        sys.path.append(settings["packages"])
        if settings["side"] == "checker":
            import numpy  # noqa: F401 (its children find it loaded)
    messages = Messages(read_from, write_to, settings["message_bytes"])
    messages.send(["hello"])
    if settings["side"] == "candidate":
        run_candidate(messages)
    else:
        run_checker(messages)


# --------------------------------------------------------------------------------------------------------------------
# the candidate's side: nothing here is worth protecting from the program


def run_candidate(messages: Messages) -> None:
    """Runs the program and then answers calls of what it defines, until the host ends it."""
    program = text_from_hex(messages.receive().decode("ascii"))
    module = type(sys)("candidate")
    sys.modules["candidate"] = module
    messages.send(_attempt(lambda: _define(program, module.__dict__)))
    objects: list[Any] = []
    functions: dict[str, Any] = {}  # of the tests, by number
    numbers: dict[Any, str] = {}

    def to_handle(value: Any) -> list[Any]:
        if type(value) is type(encode) and value in numbers:
            return ["k", numbers[value]]
        objects.append(value)
        return ["h", str(len(objects) - 1)]

    def from_handle(tag: str, text: str) -> Any:
        if tag == "h":
            return objects[int(text)]
        if tag == "g":
            return _global(module, text_from_hex(text))
        place, _, name = text_from_hex(text).partition(" ")
        if tag == "T":
            if place == "builtins" and name in _VALUE_TYPES:
                return _VALUE_TYPES[name]  # which holds None's type too, as no module does
            return getattr(__import__(place, fromlist=[name]), name)
        if place not in functions:
            functions[place] = of_the_tests(place, name)
            numbers[functions[place]] = place
        return functions[place] if tag == "k" else _pull(functions[place])

    def of_the_tests(number: str, name: str) -> Any:
        def function(*arguments: Any, **keywords: Any) -> Any:
            messages.send(["back", number, encode(list(arguments), to_handle), encode(keywords, to_handle)])
            outcome, *parts = serve()
            if outcome == "raise":
                raise _exception(*parts)
            return decode(parts[0], from_handle)

        function.__name__ = name
        return function

    def value(result: Any) -> list[Any]:
        return ["value", encode(result, to_handle)]

    def call(tag: str, text: str, arguments: Any, keywords: Any) -> list[Any]:
        arguments, keywords = decode(arguments, from_handle), decode(keywords, from_handle)
        result = encode(from_handle(tag, text)(*arguments, **keywords), to_handle)
        return ["value", result, encode(list(arguments), to_handle)]

    def assign(tag: str, text: str, name: str, new: Any) -> list[Any]:
        setattr(from_handle(tag, text), text_from_hex(name), decode(new, from_handle))
        return ["value", ["n"]]

    def advance(tag: str, text: str) -> list[Any]:
        for item in from_handle(tag, text):
            return value(item)
        return ["end"]

    operations: dict[str, Callable[..., list[Any]]] = {
        "call": call,
        "get": lambda tag, text, name: value(getattr(from_handle(tag, text), text_from_hex(name))),
        "set": assign,
        "item": lambda tag, text, key: value(from_handle(tag, text)[decode(key, from_handle)]),
        "length": lambda tag, text: value(len(from_handle(tag, text))),
        "iterate": lambda tag, text: ["value", to_handle(iter(from_handle(tag, text)))],
        "next": advance,
    }

    def serve() -> list[Any]:
        """Answers the checker until it has what a function of the tests returned or raised."""
        while True:
            operation, *parts = eval(messages.receive())  # the checker's own lists of strings
            if operation in ("return", "raise"):
                return [operation, *parts]
            reply = _attempt(lambda: operations[operation](*parts))  # noqa: B023
            try:
                messages.send(reply)
            except TooLarge:
                messages.send(["output"])

    serve()
    posix._exit(1)  # an answer to a call that was not made


def _pull(next_items: Callable[[], list[Any]]) -> Any:
    """An iterator of the tests': ``next_items`` returns a list of one, or of none at the end."""
    while items := next_items():
        yield items[0]


def _define(program: str, namespace: dict[str, Any]) -> list[Any]:
    try:
        code = compile(program, "<program>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:  # ValueError: a null character
        return ["syntax", type(error).__name__]
    exec(code, namespace)
    return ["ready"]


def _global(module: Any, name: str) -> Any:
    try:
        return module.__dict__[name]
    except KeyError:
        raise NameError(f"name '{name}' is not defined") from None


def _attempt(action: Callable[[], list[Any]]) -> list[Any]:
    """Returns the reply to a request: the action's, or what it raised."""
    try:
        return action()
    except MemoryError:
        return ["memory"]
    except SystemExit:
        return ["exit"]
    except BaseException as error:
        return ["memory"] if getattr(error, "errno", None) == _NO_MEMORY else _failure(error)


def _failure(error: BaseException) -> list[Any]:
    """An exception as the nearest built-in one's name, its own name, and its text."""
    built_in = next(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins")
    try:
        is_key = isinstance(error, KeyError) and len(error.args) == 1 and isinstance(error.args[0], str)
        text = str(error.args[0] if is_key else error)[:500]  # a KeyError's own text has quotes about it
    except BaseException:  # a __str__ of the program's own
        text = ""
    name = "".join(letter for letter in type(error).__name__[:64] if letter.isalnum() or letter == "_")
    return ["error", built_in, text_to_hex(name), text_to_hex(text)]


# --------------------------------------------------------------------------------------------------------------------
# the checker's side: the only one that can say "passed"


def run_checker(messages: Messages) -> None:
    """Runs the tests of one problem after another, each in a child of its own; ends where such a child dies."""
    import ast  # noqa: F401 (its children find it loaded)
    import collections  # noqa: F401
    import gc
    import json

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


class CandidateError(Exception):
    """An exception of the program's that is no built-in one."""


class Candidate:
    """Asks the candidate through the host."""

    def __init__(self, messages: Messages) -> None:
        import json

        self.messages, self.loads = messages, json.loads
        self.was_asked = False
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
            raise _exception(*reply[1:])
        if reply[0] not in ("value", "end"):
            raise TransferError("no reply")
        return reply

    def _reply(self) -> list[Any]:
        reply = self.loads(self.messages.receive())
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
            return ["raise", *_failure(error)[1:]]

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
            if place != "builtins" or name not in _VALUE_TYPES:  # `exec` would let the program into the checker
                raise TransferError("a type that only the program has")
            return _VALUE_TYPES[name]
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


def _exception(built_in: str, own_name: str, text: str) -> Exception:
    """The exception of ``_failure`` on the other side."""
    import builtins

    kind: Any = getattr(builtins, built_in, None)
    error: Exception
    try:
        if not issubclass(kind, Exception):
            raise TypeError(built_in)
        if issubclass(kind, (StopIteration, StopAsyncIteration)):
            kind = RuntimeError  # as from a generator: `for … in map(function, …)` would end there as if all were well
        error = kind(text_from_hex(text))
    except TypeError:  # none that can be raised with a text alone
        error = CandidateError(text_from_hex(text))
    error._candidate = text_from_hex(own_name)  # type: ignore[attr-defined]
    return error


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

_OWN = "()"
"""Behind a name: the program's, whatever else has that name. No source can write such a name."""


def _is_built_in(name: str) -> bool:
    import builtins

    return hasattr(builtins, name)


def _compile(setup: str, tests: list[str], own: set[str]) -> tuple[set[str], list[Any]]:
    """Returns the names that are the program's where nothing else has them, and the code of setup and tests.

    Args:
        own: names that are the program's even where Python, an import or the setup has them.
    """
    import ast

    trees = [ast.parse(text) for text in (setup, *tests)]
    # A prompt's head of the wanted function, without its body.
    trees[0].body = [node for node in trees[0].body if getattr(node, "name", None) not in own]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    read = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    imported = {node.asname or node.name for node in nodes if isinstance(node, ast.alias)}
    functions = {node.name: node for tree in trees[1:] for node in tree.body if isinstance(node, ast.FunctionDef)}
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
    import ast

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


def _scopes() -> tuple[Any, ...]:
    import ast

    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    return (*functions, ast.ClassDef, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def _outside_scopes(tree: Any) -> list[Any]:
    """The nodes that belong to no function, class or comprehension."""
    import ast

    found, scopes = [tree], _scopes()
    for node in found:  # which grows
        found += [child for child in ast.iter_child_nodes(node) if not isinstance(child, scopes)]
    return found


def _global_reads(node: Any, names: set[str]) -> list[Any]:
    """Where a tree reads one of the names and no variable of a function or comprehension has it."""
    import ast

    if isinstance(node, _scopes()) and not isinstance(node, ast.ClassDef):
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
    import ast

    arguments = {node.arg for node in ast.walk(function.args) if isinstance(node, ast.arg)}
    read = {node.id for part in function.body for node in ast.walk(part) if isinstance(node, ast.Name)}
    return bool(arguments & read)
