"""Verdicts on generated programs: each runs in bubblewrap, and the tests that judge it run in another one.

A program (the *candidate*) gets namespaces of its own: no network, no process but its own, an empty environment, a
read-only system, a scratch folder of limited size, limits on memory, processor time, processes, files and output, and a
wall-clock kill. The problem's tests run in the *checker*, a second sandbox that lives as long as its worker and forks
for every problem. This process carries calls and values between them, so a program sees no test, no expected answer and
no checker; only the checker can say that it passed. Docs: ``docs/judging.md``.
"""

from __future__ import annotations

import ast
import ctypes
import importlib.util
import itertools
import json
import marshal
import math
import os
import queue
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from codeparrot_ds.cpu import usable_cores
from codeparrot_ds.errors import UserError
from codeparrot_ds.sandbox.filter import own_filter
from codeparrot_ds.sandbox.groups import Group, make_group
from codeparrot_ds.sandbox.inside import NAMESPACES

KINDS = ("passed", "failed", "error", "syntax", "timeout", "memory", "output", "exited")
"""Of verdicts: an assertion failed; an exception; no Python; too slow; too large; too talkative; ended by itself."""

_START_SECONDS = 60.0  # of a sandbox, on a machine that is very busy
_STOP_SECONDS = 1.0  # of a problem's tests, which do nothing more
# Users that systemd keeps for services without one, which nothing else has. Spread, so that two programs of two hosts'
# processes hardly ever share one: they would only share the limit on their number.
_FIRST_USER, _NUM_USERS, _SPREAD = 61184, 4336, 2654435761
# Without alternatives, a numpy of the system's finds no BLAS.
_SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/libx32", "/bin", "/etc/ld.so.cache", "/etc/alternatives")
_DEVICES = ("null", "urandom")
_PACKAGES = "/packages"
"""Where numpy is inside."""
# Address space of what is none of a program's doing: numpy with one thread, and the tests, which may hold thousands of
# inputs.
_NUMPY_BYTES, _TESTS_BYTES = 256 << 20, 1 << 30
_KERNEL_BYTES = 128 << 20
_ONE_THREAD = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
# Of the work below: 0.04 s on an idle core of records/2026-11-28-sandbox-speed-2-cores, and what a little load adds.
_REFERENCE_SECONDS = 0.06
_WORK = """
def answer():
    places = {}
    for number in range(100_000):
        places.setdefault(str(number * 7919 % 1009), []).append(number)
    return sum(len(sorted(found)) for found in places.values())
"""
_SHARED = "codeparrot_ds.sandbox.inside"  # which the checker's file imports from, and which runs as the main module
# The code comes in pieces where this user has many pipes: the kernel then gives new ones 8 KiB.
_START = f"""import marshal, posix, sys
sys.modules["{_SHARED}"] = sys.modules["__main__"]
data = b""
while (left := int(sys.argv[2]) - len(data)):
    data += posix.read(0, left) or posix._exit(1)
system_calls, *codes = marshal.loads(data)
for code in codes:
    exec(code)
run(start(eval(sys.argv[1]), system_calls))"""
_FILES = {"candidate": ("inside.py",), "checker": ("inside.py", "checker.py")}
_ENDS = (
    (b'["memory"', "memory", ""),
    (b'["exit"', "exited", "SystemExit"),
    (b'["syntax"', "syntax", ""),
    (b'["output"', "output", "a result is too large"),
)
_REPLIES = (b'["ready"]', b'["value",', b'["error",', b'["end"]', b'["back",')
_PIDFD_SEND_SIGNAL, _PIDFD_OPEN = 424, 434  # on every architecture
_CPU_LIMIT_REACHED = 128 + 24  # SIGXCPU, as bubblewrap hands it on


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a program may use."""

    seconds: float = 5.0
    """Of wall clock from the program's first line to its tests' last, and of processor time for each process; for
    ``judge_all`` on a machine of the usual speed."""
    memory_bytes: int = 512 << 20
    """Address space of each process."""
    processes: int = 8
    """Processes and threads together."""
    scratch_bytes: int = 16 << 20
    """Of files in its folder, ``/tmp``."""
    scratch_files: int = 1024
    """And folders there."""
    output_bytes: int = 1 << 20
    """Of what it prints."""
    message_bytes: int = 16 << 20
    """Of the arguments or the result of one call, in hexadecimal."""
    calls: int = 100_000
    """From the tests into the program."""
    numpy: bool = False
    """Whether a program may import numpy, beside the standard library. Tests may where they name it."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """The tests of a problem."""

    setup: str = ""
    """Source that the tests need beside the program: imports and helpers."""
    tests: tuple[str, ...]
    """Sources that raise where the program is wrong. Names that neither they nor ``setup`` define are the program's."""
    entry_point: str = ""
    """A name that is the program's even where Python, an import or ``setup`` has it."""
    names: tuple[str, ...] = ()
    """More such names."""


def group_bytes(limits: Limits) -> int:
    """Returns what all processes of a program may have together, where a control group counts it: one process's memory,
    the files, and what the kernel keeps for them."""
    return limits.memory_bytes + limits.numpy * _NUMPY_BYTES + limits.scratch_bytes + _KERNEL_BYTES


def names_defined(source: str) -> tuple[str, ...]:
    """Returns what a reference solution defines at its top level, for ``Check.names``; nothing of what is no Python."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):  # its verdict says so
        return ()
    named = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    names = [node.name for node in tree.body if isinstance(node, named)]
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda):
            names += [target.id for target in node.targets if isinstance(target, ast.Name)]
    return tuple(dict.fromkeys(names))


@dataclass(frozen=True)
class Verdict:
    """What became of one program."""

    kind: str
    """One of ``KINDS``."""
    detail: str = ""
    """The exception's name, or what limit was met."""
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return self.kind == "passed"


def judge_all(
    items: Iterable[tuple[str, Check]], *, limits: Limits | None = None, num_workers: int | None = None
) -> Iterator[Verdict]:
    """Yields the verdict on each (program, check), in order; a sandbox and a checker for each worker.

    Args:
        items: all read at once.
        limits: a slower machine's programs have ``slowness()`` times as many seconds.
        num_workers: one more than cores by default, since each waits now and then.

    Raises ``UserError`` where no sandbox can be had.
    """
    check_sandbox()
    limits = limits or Limits()
    limits = replace(limits, seconds=limits.seconds * slowness())
    workers = num_workers or usable_cores() + 1
    with ThreadPoolExecutor(workers, thread_name_prefix="sandbox") as pool:
        judges: queue.SimpleQueue[Judge] = queue.SimpleQueue()
        every = [Judge(limits, slot) for slot in range(workers)]
        for judge in every:
            judges.put(judge)

        def run(item: tuple[str, Check]) -> Verdict:
            judge = judges.get()
            try:
                return judge(*item)
            finally:
                judges.put(judge)

        try:
            yield from pool.map(run, items)
        finally:
            pool.shutdown(cancel_futures=True)
            for judge in every:
                judge.close()


@cache
def slowness() -> float:
    """How many times as long as elsewhere a program takes here, at least 1: measured once, in the sandbox."""
    judge = Judge(Limits(seconds=_START_SECONDS), 0)
    try:
        verdicts = [judge(_WORK, Check(tests=("assert answer() == 100_000",))) for _ in range(3)]
    finally:
        judge.close()
    return max(1.0, round(min(verdict.seconds for verdict in verdicts) / _REFERENCE_SECONDS, 1))


@cache
def check_sandbox() -> None:
    """Raises ``UserError`` in one sentence where this machine has no sandbox to run programs in."""
    if sys.platform != "linux" or shutil.which("bwrap") is None:
        raise UserError(
            "generated programs run in a sandbox only, and bubblewrap, which makes it, is not installed; on Debian and "
            "Ubuntu: apt-get install bubblewrap"
        )
    try:
        verdict = Judge(Limits(seconds=30), 0).once(
            "def answer():\n    return 1", Check(tests=("assert answer() == 1",))
        )
    except SandboxError as error:
        if "option" in str(error).lower():
            raise UserError(f"the sandbox needs bubblewrap 0.7 or newer; the one that is installed: {error}") from error
        advice = "run as another user than root, or allow" if os.geteuid() == 0 else "allow"
        raise UserError(
            f"generated programs run in a sandbox only, and bubblewrap cannot make one here ({error}); {advice} it to "
            "create namespaces"
        ) from error
    if not verdict.passed:
        raise UserError(
            f"the sandbox does not work here: a right program's verdict was {verdict.kind} {verdict.detail}"
        )


class SandboxError(UserError):
    """The sandbox itself did not start; says nothing about a program."""


class _Ended(Exception):
    """A program's verdict, other than the checker's."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(kind)
        self.kind, self.detail = kind, detail


class Judge:
    """One worker: a checker that lives on and a candidate for every verdict. Not for several threads."""

    def __init__(self, limits: Limits, slot: int) -> None:
        self.limits, self.slot = limits, slot
        self._checker: _Inside | None = None
        self._checked: Check | None = None
        """Whose tests the checker has."""
        self._group = make_group(str(next(_numbers)), group_bytes(limits), limits.processes)

    def __call__(self, program: str, check: Check) -> Verdict:
        started = time.monotonic()
        with _Inside("candidate", self.limits, 2 * self.slot, numpy=self.limits.numpy, group=self._group) as candidate:
            kills = self._group.kills() if self._group else 0
            candidate.expect_hello()
            try:
                checker = self._ready_checker(check)
                started = time.monotonic()  # from here on it is the program's time
                kind, detail = self._relay(program, candidate, checker, started + self.limits.seconds)
            except _Ended as end:
                kind, detail = end.kind, end.detail
                if kind == "exited" and self._group and self._group.kills() > kills:
                    kind, detail = "memory", ""
        return Verdict(kind, _plain(detail), time.monotonic() - started)

    def once(self, program: str, check: Check) -> Verdict:
        """A verdict of a worker that ends with it."""
        try:
            return self(program, check)
        finally:
            self.close()

    def close(self) -> None:
        self._close_checker()
        if self._group is not None:
            self._group.close()
            self._group = None

    def _close_checker(self) -> None:
        if self._checker is not None:
            self._checker.close()
            self._checker = None
            self._checked = None

    def _ready_checker(self, check: Check) -> _Inside:
        """Returns a checker that has read the problem's tests, which takes none of the program's time."""
        try:
            numpy = self.limits.numpy or any("numpy" in text for text in (check.setup, *check.tests))
            if self._checker is not None and numpy and not self._checker.numpy:
                self._close_checker()
            if self._checker is None:
                self._checker = _Inside("checker", self.limits, 2 * self.slot + 1, numpy=numpy)
                self._checker.expect_hello()
            if check != self._checked:
                deadline = time.monotonic() + _START_SECONDS
                if self._checked is not None:
                    self._checker.send(b'["end"]', deadline)
                    self._checker.receive(deadline)
                self._checked = check
                own = [check.entry_point, *check.names] if check.entry_point else check.names
                message = {"setup": check.setup, "tests": check.tests, "names": own}
                self._checker.send(json.dumps(message).encode(), deadline)
                self._checker.receive(deadline)
        except BaseException:
            self._close_checker()
            raise
        return self._checker

    def _relay(self, program: str, candidate: _Inside, checker: _Inside, deadline: float) -> tuple[str, str]:
        """Returns kind and detail of the verdict; raises ``_Ended`` where it is not the checker's."""
        candidate.send(program.encode("utf-8", "surrogatepass").hex().encode(), deadline)
        reply = candidate.receive(deadline)
        _check_reply(reply)
        if reply.startswith(b'["error"'):
            raise _Ended("error", _name_of(reply))
        try:
            checker.printed_bytes = 0
            checker.send(b'["run"]', deadline)
            return self._carry(candidate, checker, deadline)
        except BaseException:
            # Whatever state the tests are in, the next problem begins with a checker of its own.
            self._close_checker()
            raise

    def _carry(self, candidate: _Inside, checker: _Inside, deadline: float) -> tuple[str, str]:
        """Carries the tests' calls to the program and its answers back, until the checker has its verdict."""
        for _ in range(self.limits.calls + 1):
            request = checker.receive(deadline)
            if request.startswith(b'["done"'):
                _, kind, detail = json.loads(request)
                return kind, bytes.fromhex(detail).decode("utf-8", "replace")
            try:
                candidate.send(request, deadline)
                reply = candidate.receive(deadline)
                _check_reply(reply)
            except _Ended as end:
                if not _stops(checker):
                    self._close_checker()
                return end.kind, end.detail
            checker.send(reply, deadline)
        raise _Ended("timeout", f"more than {self.limits.calls:,} calls")


def _check_reply(reply: bytes) -> None:
    """Raises ``_Ended`` for what ends a program before its tests have decided; an exception in a call is the tests'."""
    for start, kind, detail in _ENDS:
        if reply.startswith(start):
            raise _Ended(kind, detail)
    if not reply.startswith(_REPLIES):  # such as what only this process may send the checker
        raise _Ended("error", "no reply")


def _name_of(reply: bytes) -> str:
    """The exception's name in a program's reply, as far as it holds one."""
    try:
        return bytes.fromhex(json.loads(reply)[2])[:64].decode("utf-8", "replace")
    except (ValueError, LookupError, TypeError, RecursionError):
        return ""


def _plain(detail: str) -> str:
    """A detail of at most 200 letters that a terminal and a file of lines show as they are: it may be the program's."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in detail[:200])


def _stops(checker: _Inside) -> bool:
    """Tells a problem's tests, which wait for an answer, to end; whether they do, and the checker can continue."""
    soon = time.monotonic() + _STOP_SECONDS
    try:
        checker.send(b'["stop"]', soon)
        return checker.receive(soon).startswith(b'["done"')
    except _Ended:
        return False


class _Inside:
    """A process in a sandbox and its pipes."""

    def __init__(self, side: str, limits: Limits, user: int, *, numpy: bool, group: Group | None = None) -> None:
        self.side, self.limits, self.numpy = side, limits, numpy
        self._received, self.printed_bytes = b"", 0
        settings = _settings(side, limits, user, numpy)
        code = _code(side)
        command = [*_bubblewrap(limits.scratch_bytes, numpy), *_interpreter()]
        command += ["-c", _START, repr(settings), str(len(code))]
        self._first: int | None = None
        self._first_output = b""
        # Messages take the standard streams, whose numbers are the same however many files this process has open:
        # a limit inside is on numbers of descriptors.
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={},
            start_new_session=True,
        )
        self._pipes = (self.process.stdin, self.process.stdout, self.process.stderr)
        self._to_inside, self._from_inside, self._output = (pipe.fileno() for pipe in self._pipes if pipe)
        try:
            os.set_blocking(self._to_inside, False)
            os.set_blocking(self._output, False)
            with suppress(_Ended):  # expect_hello says why
                self._send(code, time.monotonic() + _START_SECONDS)
            self._hold(group)  # while the interpreter starts
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> _Inside:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Kills all inside, and returns when nothing of it is left.

        The kernel ends a namespace with its first process, which is ended before any other in the namespace; bubblewrap
        itself can end earlier. None of this asks a program that may have stopped listening.
        """
        if self._first is not None:
            with suppress(ProcessLookupError):
                _system_call(_PIDFD_SEND_SIGNAL, self._first, signal.SIGKILL, None, 0)
            ended = select.poll()
            ended.register(self._first, select.POLLIN)
            if not ended.poll(_START_SECONDS * 1000):
                raise SandboxError(f"its processes did not end within {_START_SECONDS:.0f} s of being killed")
            os.close(self._first)
            self._first = None
        else:
            # Until bubblewrap lets its child run, the child would wait for it for ever.
            self.process.send_signal(signal.SIGSTOP)
            for child in _children(self.process.pid):
                os.kill(child, signal.SIGKILL)
            self.process.kill()
        self.process.wait()
        for pipe in self._pipes:
            if pipe:
                pipe.close()

    def expect_hello(self) -> None:
        try:
            hello = self.receive(time.monotonic() + _START_SECONDS)
        except _Ended as end:
            lines = self._first_output.decode("utf-8", "replace").strip().splitlines()
            raise SandboxError(f"it did not start: {lines[-1] if lines else end.kind}") from end
        if hello != b'["hello"]':
            raise SandboxError(f"its {self.side} began with {hello[:80]!r}")
        assert self._first is not None, "who says hello has a first process"

    def _hold(self, group: Group | None) -> None:
        """Takes hold of the first process inside, and of its child, which the program is not yet sent to.

        bubblewrap's --info-fd names the first process as well, and lets it wait for ever where this process ends while
        that is written.
        """
        first = self._only_child(self.process.pid)
        if first is None:
            return
        try:
            self._first = _system_call(_PIDFD_OPEN, first, 0)
        except ProcessLookupError:
            return
        except OSError as error:
            raise SandboxError(f"it needs Linux 5.3 or newer: pidfd_open: {error.strerror}") from error
        if _parent(first) != self.process.pid:  # the number is another process's by now
            os.close(self._first)
            self._first = None
            return
        program = self._only_child(first) if self.side == "candidate" else None
        if program is not None:
            with suppress(FileNotFoundError, ProcessLookupError):  # it has ended; expect_hello says why
                with suppress(PermissionError):  # an interpreter that its user may run and not read
                    # Where the machine runs out of memory, the kernel ends the program first, not who judges it.
                    Path(f"/proc/{program}/oom_score_adj").write_text("1000")
                if group:
                    group.take(program)

    def _only_child(self, process: int) -> int | None:
        """Waits for the child of bubblewrap, or of its child; None where it has ended, and expect_hello says why."""
        while not (children := _children(process)):
            if self.process.poll() is not None:
                return None
            time.sleep(0.002)  # of the 10 ms that an interpreter takes to start
        return children[0]

    def send(self, line: bytes, deadline: float) -> None:
        self._send(line + b"\n", deadline)

    def _send(self, content: bytes, deadline: float) -> None:
        data = memoryview(content)
        while data:
            self._wait(self._to_inside, select.POLLOUT, deadline)
            try:
                data = data[os.write(self._to_inside, data) :]
            except BlockingIOError:
                continue
            except BrokenPipeError:
                raise self._how_it_ended() from None

    def receive(self, deadline: float) -> bytes:
        """Returns the next line; raises ``_Ended`` when there is none in time, or too much output before it."""
        parts = [self._received]
        size = len(self._received)
        while b"\n" not in parts[-1]:
            self._wait(self._from_inside, select.POLLIN, deadline)
            part = os.read(self._from_inside, 1 << 16)
            if not part:
                raise self._how_it_ended()
            parts.append(part)
            size += len(part)
            if size > self.limits.message_bytes + (1 << 16):
                raise _Ended("output", "a message is too large")
        line, _, self._received = b"".join(parts).partition(b"\n")
        return line

    def _wait(self, descriptor: int, event: int, deadline: float) -> None:
        """Waits until a descriptor is ready, and reads what is printed meanwhile."""
        poll = select.poll()
        poll.register(descriptor, event)
        poll.register(self._output, select.POLLIN)
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                whose = "program" if self.side == "candidate" else "tests"
                raise _Ended("timeout", f"after {self.limits.seconds:.3g} s, in the {whose}")
            # Awake now and then: a child that outlives the program may hold the pipes open.
            ready = dict(poll.poll(min(left, 0.25) * 1000))
            if self._output in ready and not self._read_output():
                poll.unregister(self._output)
            if descriptor in ready:
                return
            if not ready and self.process.poll() is not None:
                raise self._how_it_ended()

    def _read_output(self) -> bool:
        """Counts what was printed; False at its end."""
        try:
            part = os.read(self._output, 1 << 16)
        except BlockingIOError:
            return True
        self.printed_bytes += len(part)
        if len(self._first_output) < 4096:
            self._first_output += part
        if self.printed_bytes > self.limits.output_bytes:
            raise _Ended("output", f"more than {self.limits.output_bytes:,} bytes")
        return bool(part)

    def _how_it_ended(self) -> _Ended:
        try:
            code = self.process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:  # it closed its pipe and lives on
            return _Ended("exited", "closed its pipe")
        self._drain()
        if code == _CPU_LIMIT_REACHED:
            return _Ended("timeout", f"after {math.ceil(self.limits.seconds)} s of processor time")
        return _Ended("exited", f"code {code}")

    def _drain(self) -> None:
        """Reads what was printed last, for the message of a sandbox that did not start."""
        with suppress(BlockingIOError):
            self._first_output += os.read(self._output, 4096)


@cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _system_call(number: int, *arguments: Any) -> int:
    """Of Linux, where Python may have been built for one that was older than the call."""
    result: int = _library().syscall(number, *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def _parent(process: int | str) -> int:
    """0 of a process that has ended."""
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0


def _children(process: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):  # it has ended, or the kernel is one without CONFIG_PROC_CHILDREN
        return [int(child) for child in os.listdir("/proc") if child.isdigit() and _parent(child) == process]


_code_lock = threading.Lock()
_numbers = itertools.count()  # of this process's groups


def _code(side: str) -> bytes:
    with _code_lock:
        return _compiled(side)


@cache
def _compiled(side: str) -> bytes:
    texts = [Path(__file__).with_name(name).read_text(encoding="utf-8") for name in _FILES[side]]
    codes = [compile(text, "<sandbox>", "exec", dont_inherit=True, optimize=2) for text in texts]
    return marshal.dumps([own_filter(), *codes])


def _settings(side: str, limits: Limits, user: int, numpy: bool) -> dict[str, Any]:
    memory = limits.memory_bytes + numpy * _NUMPY_BYTES
    cpu = (math.ceil(limits.seconds), math.ceil(limits.seconds) + 1)
    if side == "checker":  # it lives on, and the wall clock ends its children
        memory, cpu = memory + _TESTS_BYTES, (-1, -1)
    return {
        "side": side,
        "packages": _PACKAGES if numpy else "",
        "message_bytes": limits.message_bytes,
        "scratch": f"size={limits.scratch_bytes},nr_inodes={limits.scratch_files},mode=1777",
        "user": _FIRST_USER + (os.getpid() * _SPREAD + user) % _NUM_USERS if os.geteuid() == 0 else 0,
        "limits": {
            "AS": (memory, memory),
            "CPU": cpu,
            "FSIZE": (limits.scratch_bytes,) * 2,
            # Kernels before 5.14 count all of a user's processes here: the checker, who is trusted, must still fork.
            **({"NPROC": (limits.processes,) * 2} if side == "candidate" else {}),
            "NOFILE": (64, 64),
            "SIGPENDING": (64, 64),  # each is some of the kernel's memory
            **dict.fromkeys(("CORE", "MEMLOCK", "MSGQUEUE", "NICE", "RTPRIO"), (0, 0)),
        },
    }


@cache
def _bubblewrap(scratch_bytes: int, numpy: bool = False) -> tuple[str, ...]:
    """The command that makes the sandbox, up to the program's own."""
    bwrap = shutil.which("bwrap")
    assert bwrap is not None, "check_sandbox comes first"
    command = [bwrap, "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
    command += ["--die-with-parent", "--new-session", "--clearenv"]
    if os.geteuid() == 0:
        # Root's processes are not counted: the program gets a user of its own, which a user namespace would not let it.
        command += ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        command += ["--unshare-user", "--cap-add", "CAP_SYS_RESOURCE"]
    command += ["--cap-add", "CAP_SYS_ADMIN"]  # inside.confine needs these, and gives them up
    for path in map(Path, _SYSTEM):
        if path.is_symlink():
            command += ["--symlink", os.readlink(path), str(path)]
        elif path.exists():
            command += _read_only(path)
    base = Path(sys.base_prefix).resolve()
    if not base.is_relative_to("/usr"):
        for path in (base / "bin", base / "lib", base / "lib64"):
            if path.exists():
                command += _read_only(path)
    for folder in _packages_of(base):
        command += ["--perms", "0755", "--size", "4096", "--tmpfs", str(folder), "--remount-ro", str(folder)]
    if numpy:
        command += [*_make_folder(_PACKAGES), *(part for name in _ONE_THREAD for part in ("--setenv", name, "1"))]
        for folder in _numpy_folders():
            command += ["--ro-bind", str(folder), f"{_PACKAGES}/{folder.name}"]
    command += _make_folder("/dev")
    for name in _DEVICES:
        command += ["--dev-bind", f"/dev/{name}", f"/dev/{name}"]
    if os.geteuid():
        command += ["--bind", "/proc/sys/user", NAMESPACES]
    command += ["--perms", "1777", "--size", str(scratch_bytes), "--tmpfs", "/tmp", "--remount-ro", "/"]
    return (*command, "--chdir", "/tmp", "--")


def _packages_of(base: Path) -> list[Path]:
    """Where an interpreter at ``base`` and the system's keep what is installed, maybe this project and its problems."""
    libraries = {Path("/usr/lib"), Path("/usr/lib64"), Path("/usr/local/lib"), base / "lib", base / "lib64"}
    places = {folder.resolve() for library in libraries for folder in library.glob("python3*/*-packages")}
    return sorted(folder for folder in places if folder.is_dir())


def _read_only(path: Path) -> list[str]:
    """A folder of the system, read-only, under parents that every user may pass through."""
    parents = [str(parent) for parent in reversed(path.parents) if parent != Path("/")]
    made = [option for parent in parents for option in _make_folder(parent)]
    return [*made, "--ro-bind", str(path), str(path)]


def _make_folder(path: str) -> list[str]:
    return ["--perms", "0755", "--dir", path]


def _numpy_folders() -> list[Path]:
    """This environment's numpy and, where its wheel has them, the libraries beside it; not imported."""
    spec = importlib.util.find_spec("numpy")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("the tests or the programs may import numpy, and it is not installed here: pip install numpy")
    folder = Path(spec.submodule_search_locations[0]).resolve()
    return [path for path in (folder, folder.with_name("numpy.libs")) if path.is_dir()]


def _interpreter() -> tuple[str, ...]:
    executable = Path(getattr(sys, "_base_executable", sys.executable)).resolve()
    return (str(executable), "-I", "-S", "-E", "-B")
