"""Programs that want out, want to do harm, or want to pass without being right.

Each is ``(program, kinds)``: what its verdict may be, never ``passed``. The tests ask ``answer() == SECRET``.
``{home}``, ``{outside}``, ``{port}``, ``{abstract}`` and ``{host}`` stand for a file with the secret, a folder, a TCP
port and a socket that tell it, and the process that judges.
"""

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from typing import Any

CALLS = "def answer():\n    "

HOSTILE = {
    # too much
    "fork bomb": ("import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass", "timeout"),
    "fork bomb that stops at the limit": (CALLS + "import os\n    while True: os.fork()", "error"),
    "memory bomb": (CALLS + "x = [0]\n    while True: x += x", "memory"),
    "memory in one piece": (CALLS + "return bytearray(1 << 40)", "memory"),
    "memory of the kernel": (
        "import mmap\nkept = []\nwhile True: kept.append(mmap.mmap(-1, 1 << 26))",
        "memory",
    ),
    "endless loop": ("while True: pass", "timeout"),
    "endless loop that ignores signals": (
        CALLS + "import signal\n    signal.signal(signal.SIGXCPU, signal.SIG_IGN)\n    while True:\n        try:\n"
        "            while True: pass\n        except BaseException: pass",
        "timeout",
    ),
    "sleep": (CALLS + "import time\n    time.sleep(3600)", "timeout"),
    "stopped": ("import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)", "timeout"),
    "a pipe that nobody writes": ("import os\nos.mkfifo('/tmp/f')\nopen('/tmp/f').read()", "timeout"),
    "huge power": (CALLS + "return 10 ** 10 ** 10", "timeout memory"),
    "endless output": ("while True: print('x' * 1000)", "output"),
    "endless errors": ("import os\nwhile True: os.write(2, b'x' * 4096)", "output"),
    "endless message": (
        "import os\nwhile True:\n    for end in range(3, 64):\n        try: os.write(end, b'[' * 65536)\n"
        "        except OSError: pass",
        "output",
    ),
    "huge result": (CALLS + "return 'x' * (9 << 20)", "output"),
    "zip bomb": (
        CALLS + "import zlib\n    bomb = zlib.compress(bytes(32 << 20), 1)\n"
        "    return [zlib.decompress(bomb) for _ in range(1000)]",
        "memory",
    ),
    "zip bomb on disk": (
        CALLS + "import zlib\n    bomb = zlib.compress(bytes(4 << 20), 1)\n    n = 0\n    while True:\n"
        "        open(f'/tmp/{n}', 'wb').write(zlib.decompress(bomb))\n        n += 1",
        "error",
    ),
    "one large file": (CALLS + "open('/tmp/x', 'wb').truncate(1 << 30)", "error"),
    "thousand threads": (
        "import threading, time\nfor _ in range(1000):\n"
        "    threading.Thread(target=time.sleep, args=(99,), daemon=True).start()",
        "error",
    ),
    "busy threads": (
        "import threading\ndef work():\n    while True: pass\n"
        "for _ in range(3): threading.Thread(target=work, daemon=True).start()\n" + CALLS + "return 1",
        "failed timeout",
    ),
    "deep recursion": (CALLS + "return answer()", "error"),
    "recursion without limit": (
        "import sys\nsys.setrecursionlimit(10 ** 9)\n" + CALLS + "return [answer()]",
        "exited error memory timeout",
    ),
    "deep result": (CALLS + "x = []\n    for _ in range(500): x = [x]\n    return x", "error"),
    "result that holds itself": (CALLS + "x = []\n    x.append(x)\n    return x", "error"),
    "nested source": ("(" * 100_000, "syntax memory"),
    "sleeping children": (
        "import os, time\nfor _ in range(4):\n    if not os.fork():\n        os.setsid()\n        time.sleep(3600)\n"
        + CALLS
        + "return 1",
        "failed",
    ),
    "child of a child": (
        "import os, time\nif not os.fork():\n    os.setsid()\n    if not os.fork():\n        time.sleep(3600)\n"
        "    os._exit(0)\nos.wait()\nos._exit(0)",
        "exited",
    ),
    # out of the sandbox
    "home": (CALLS + "return open({home!r}).read()", "error"),
    "installed packages": (  # which may be this project, or published problems with their solutions
        CALLS + "import glob, sys\n    roots = (sys.base_prefix, '/usr', '/usr/local')\n"
        "    return sum([glob.glob(root + '/lib*/python3*/*-packages/*') for root in roots], []).pop()",
        "error",
    ),
    "folders of the system": (
        CALLS + "import os\n    return os.listdir('/root') + os.listdir('/home')",
        "error failed",
    ),
    "environment": (CALLS + "import os\n    return os.environ.get('CANARY', '')", "failed"),
    "environment of the host in /proc": (CALLS + "return open('/proc/1/environ').read()", "error"),
    "open files in /proc": (CALLS + "import os\n    return os.listdir('/proc/self/fd')", "error"),
    "mounting /proc": (
        CALLS + "import ctypes\n    if ctypes.CDLL(None).mount(b'proc', b'/tmp', b'proc', 0, None): raise OSError",
        "error",
    ),
    "writing outside": (CALLS + "open({outside!r} + '/harm', 'w').write('x')", "error"),
    "writing to the system": (CALLS + "open('/usr/lib/harm', 'w')", "error"),
    "writing to the library": (CALLS + "import os\n    open(os.__file__, 'a')", "error"),
    "symbolic link out": (
        CALLS + "import os\n    os.symlink({home!r}, '/tmp/link')\n    return open('/tmp/link').read()",
        "error",
    ),
    "hard link out": (CALLS + "import os\n    os.link(os.__file__, '/tmp/link')", "error"),
    "devices": (CALLS + "return open('/dev/mem', 'rb').read(1) or open('/dev/tty')", "error"),
    "making a device": (CALLS + "import os\n    os.mknod('/tmp/d', 0o60666, os.makedev(8, 0))", "error"),
    "root": (CALLS + "import os\n    os.setuid(0)", "error"),
    "raising limits": (
        CALLS + "import resource\n    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
        "error",
    ),
    "network": (CALLS + "import socket\n    return socket.create_connection(('127.0.0.1', {port})).recv(99)", "error"),
    "names": (CALLS + "import socket\n    return socket.getaddrinfo('example.org', 80)", "error"),
    "socket without a file": (
        CALLS
        + "import socket\n    s = socket.socket(socket.AF_UNIX)\n    s.connect({abstract!r})\n    return s.recv(99)",
        "error",
    ),
    "signal to the parent": (CALLS + "import os\n    os.kill(os.getppid(), 9)", "error failed"),
    "signal to the host": (CALLS + "import os\n    os.kill({host}, 9)", "error"),
    "signal to all": (CALLS + "import os\n    os.kill(-1, 9)", "error failed exited"),
    # passing without being right
    "exit at once": ("import sys\nsys.exit(0)", "exited"),
    "exit when asked": (CALLS + "raise SystemExit(0)", "exited"),
    "end without a word": (CALLS + "import os\n    os._exit(0)", "exited"),
    "closed pipes": (CALLS + "import os\n    os.closerange(0, 64)", "exited"),
    "crash": (CALLS + "import ctypes\n    ctypes.string_at(0)", "exited"),
    "equal to everything": ("class A:\n    def __eq__(self, o): return True\n" + CALLS + "return A()", "failed"),
    "text equal to everything": (
        "class A(str):\n    def __eq__(self, o): return True\n    __hash__ = None\n" + CALLS + "return A('x')",
        "failed",
    ),
    "another assert": (
        "import builtins\nbuiltins.AssertionError = ZeroDivisionError\n__debug__ or 1\n" + CALLS + "return 1",
        "failed",
    ),
    "its own AssertionError": (CALLS + "raise AssertionError", "error"),
    "another checker": (
        "import __main__, builtins, sys\nfor name in ('encode', 'decode', '_attempt', 'exception_to_reply', 'run'):\n"
        "    setattr(__main__, name, lambda *a: ['value', ['b', '1'], ['l']])\nbuiltins.isinstance = lambda *a: True\n"
        + CALLS
        + "return 1",
        "failed error exited",
    ),
    "a verdict of its own": (
        'import os\nline = b\'["done","passed","",""]\\n\'\nfor end in range(3, 64):\n'
        "    try: os.write(end, line * 3)\n"
        "    except OSError: pass\n" + CALLS + "return 1",
        "error",
    ),
    "a reply of its own": (
        "import __main__\n__main__.Messages.send = lambda self, message: __import__('os').write(self.write_to, "
        'b\'["value",["h","0"],["l"],["done","passed"]]\\n\')\n' + CALLS + "return 1",
        "failed",
    ),
    "a stop of its own": (
        "import __main__\n__main__.Messages.send = lambda self, message: __import__('os').write(self.write_to, "
        "b'[\"stop\"]\\n')\n" + CALLS + "return 1",
        "error",
    ),
    "no message at all": (
        "import __main__, os\n__main__.Messages.send = lambda self, message: os.write(self.write_to, b'\\n')\n"
        + CALLS
        + "return 1",
        "error",
    ),
    "reading the answer": (
        "import gc, sys\n"
        + CALLS
        + "frame, found = sys._getframe(), []\n    while frame:\n        found += [v for v in "
        "[*frame.f_locals.values(), *frame.f_globals.values()] if isinstance(v, str)]\n        frame = frame.f_back\n"
        "    found += [o for o in gc.get_objects() if isinstance(o, str)]\n"
        "    return next((v for v in found if v.startswith('secret-')), '')",
        "failed",
    ),
    "reading the tests": (CALLS + "import codeparrot_ds.sandbox.judge", "error"),
    "reading ahead": (
        CALLS + "import os, select\n    for end in range(64):\n        try:\n"
        "            if select.select([end], [], [], 0)[0]: return os.read(end, 999).decode()\n"
        "        except OSError: pass",
        "failed",
    ),
    "an exception that is more": (
        "class Odd(BaseException):\n    def __str__(self): raise SystemExit\n" + CALLS + "raise Odd",
        "error",
    ),
    "no Python": ("def answer(:\n    return 1", "syntax"),
    "null in the source": ("x = 1\0", "syntax"),
    "nothing": ("", "error"),
}


@contextlib.contextmanager
def listening(answer: bytes) -> Iterator[tuple[int, str, list[Any]]]:
    """A TCP port of loopback and an abstract name that give the answer to whoever connects, and who did until now."""
    asked: list[Any] = []

    def serve(server: socket.socket) -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:  # closed
                return
            asked.append(server.getsockname())
            connection.sendall(answer)
            connection.close()

    with socket.socket(socket.AF_INET) as tcp, socket.socket(socket.AF_UNIX) as unix:
        tcp.bind(("127.0.0.1", 0))
        unix.bind(abstract := f"\0codeparrot-{os.getpid()}")
        for server in (tcp, unix):
            server.listen()
            threading.Thread(target=serve, args=(server,), daemon=True).start()
        try:
            yield tcp.getsockname()[1], abstract, asked
        finally:
            for server in (tcp, unix):
                server.shutdown(socket.SHUT_RDWR)  # closing alone does not wake who waits in it
