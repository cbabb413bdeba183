"""What runs inside a sandbox: what both sides of a verdict have, and the candidate's side. See ``judge.py``.

The host compiles this file, and ``checker.py`` for the checker, and hands the code over; nothing of the package can be
imported inside, and little of the standard library is, because every verdict starts an interpreter. Values cross as
JSON lists of strings, which are Python literals as well: a candidate, which must start fast, needs no JSON library.
"""

from __future__ import annotations

import posix
import sys

TYPE_CHECKING = False  # typing's own, without the import, which would take half the time of a start
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_NO_MEMORY = 12  # ENOMEM
_REMOUNT = 32 | 2 | 4  # MS_REMOUNT, MS_NOSUID, MS_NODEV
NAMESPACES = "/dev/user"  # /proc/sys/user, in an ordinary user's sandbox, until a program is let in
_CAPABILITIES_VERSION = (0x20080522).to_bytes(4, sys.byteorder)  # _LINUX_CAPABILITY_VERSION_3

MAX_DEPTH = 64
"""Of nested values. Python's own parser ends at 200 brackets."""

_SAFE = (int, float, complex, bool, str, bytes, bytearray, list, tuple, dict, set, frozenset, range, object, type(None))
VALUE_TYPES: dict[str, Any] = {kind.__name__: kind for kind in _SAFE}
"""Types that cross as values in both directions: calling one with anything does no harm."""


class TransferError(Exception):
    """A value that cannot cross: too deep, too large, or of a type that only one side has."""


class OtherError(Exception):
    """An exception of the program's that is no built-in one."""


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
        rest = memoryview(data)  # no copy of it for each part that a pipe takes
        while rest:
            rest = rest[posix.write(self.write_to, rest) :]


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
            items = [*value]
            if tag in "lt" and items and {*map(type, items)} <= {int, float}:  # a million of them, in time
                return ["#" + tag, " ".join([f"{item:x}" if type(item) is int else f"_{item!r}" for item in items])]
            return [tag, *(encode(item, other, depth + 1) for item in items)]
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
    if tag in ("#l", "#t"):
        items = [float(part[1:]) if part[0] == "_" else int(part, 16) for part in parts[0].split()]
        return items if tag == "#l" else tuple(items)
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


def exception_to_reply(error: BaseException) -> list[Any]:
    """An exception as the nearest built-in one's name, its own name, and its text."""
    built_in = next(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins")
    try:
        is_key = isinstance(error, KeyError) and len(error.args) == 1 and isinstance(error.args[0], str)
        text = str(error.args[0] if is_key else error)[:500]  # a KeyError's own text has quotes about it
    except BaseException:  # a __str__ of the program's own
        text = ""
    name = "".join(letter for letter in type(error).__name__[:64] if letter.isalnum() or letter == "_")
    return ["error", built_in, text_to_hex(name), text_to_hex(text)]


def exception_from_reply(built_in: str, own_name: str, text: str) -> Exception:
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
        error = OtherError(text_from_hex(text))
    error._candidate = text_from_hex(own_name)  # type: ignore[attr-defined]
    return error


def confine(settings: dict[str, Any], system_calls: bytes) -> None:
    """Takes from this process what its program is not to have, for good: more than its limits, its capabilities (and
    root, where the host is root), and system calls.

    Args:
        system_calls: the filter of ``filter.py``.
    """
    import _ctypes  # ctypes itself would take as long as a third of an interpreter's start
    import resource

    library = _ctypes.dlopen(None, 0)  # type: ignore[arg-type]

    def call(name: str, *arguments: Any) -> None:
        if _ctypes.call_cdeclfunction(_ctypes.dlsym(library, name), arguments):
            raise OSError(name)

    for name, limit in settings["limits"].items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), limit)
    if not settings["user"]:
        _end_namespaces()
    try:
        # bubblewrap knows no limit on the number of files, whose inodes are the kernel's memory.
        call("mount", b"tmpfs", b"/tmp", b"tmpfs", _REMOUNT, settings["scratch"].encode())
        if not settings["user"]:
            call("umount2", NAMESPACES.encode(), 2)  # MNT_DETACH
    except OSError:
        # AppArmor's profile for bubblewrap, of newer Ubuntus, lets nothing inside have a capability.
        if settings["user"]:
            raise
    if settings["user"]:
        posix.setgroups([])
        posix.setresgid(*[settings["user"]] * 3)
        posix.setresuid(*[settings["user"]] * 3)  # with which all capabilities go
    else:
        call("capset", _CAPABILITIES_VERSION + bytes(4), bytes(24))

    class Pointer(_ctypes._SimpleCData):  # type: ignore[misc, name-defined]
        _type_ = "z"

    pointer = Pointer(system_calls)
    count = len(system_calls) // 8
    call("prctl", 22, 2, count.to_bytes(8, sys.byteorder) + bytes(memoryview(pointer)))  # SET_SECCOMP, MODE_FILTER


def _end_namespaces() -> None:
    """Nobody in this user namespace makes another: the filter's second lock, where the host's /proc can be written."""
    try:
        descriptor = posix.open(f"{NAMESPACES}/max_user_namespaces", posix.O_WRONLY)
    except OSError:  # a container's is read-only, and without a capability it is so everywhere
        return
    posix.write(descriptor, b"0")
    posix.close(descriptor)


def start(settings: dict[str, Any], system_calls: bytes) -> Messages:
    """Begins one side and returns its way to the host, which takes standard input and output: the program finds the
    one empty, and the other is where its errors go."""
    read_from, write_to = posix.dup(0), posix.dup(1)
    null = posix.open("/dev/null", posix.O_RDWR)
    posix.dup2(null, 0)
    posix.dup2(2, 1)
    confine(settings, system_calls)
    if settings["packages"]:
        sys.path.append(settings["packages"])
        if settings["side"] == "checker":
            import numpy  # noqa: F401 (its children find it loaded)
    messages = Messages(read_from, write_to, settings["message_bytes"])
    messages.send(["hello"])
    return messages


# --------------------------------------------------------------------------------------------------------------------
# the candidate's side: nothing here is worth protecting from the program


def run(messages: Messages) -> None:
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
            if place == "builtins" and name in VALUE_TYPES:
                return VALUE_TYPES[name]  # which holds None's type too, as no module does
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
                raise exception_from_reply(*parts)
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
        return ["memory"] if getattr(error, "errno", None) == _NO_MEMORY else exception_to_reply(error)
