"""Hostile programs that go to the kernel: out of the sandbox, past its limits, or on to live after their judge.

As in ``hostile.py``: ``(program, kinds)``. Where the kernel refuses, ``answer`` raises OSError; what it returns is what
should not have worked.
"""

import platform

from tests.evaluation.hostile import CALLS

# Numbers of calls that the C library has no function for: on x86-64 and on aarch64.
NUMBERS = {
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "io_uring_setup": (425, 425),
    "io_setup": (206, 0),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "memfd_secret": (447, 447),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "process_madvise": (440, 440),
    "kcmp": (312, 272),
    "clone": (56, 220),
    "clone3": (435, 435),
    "fsopen": (430, 430),
    "fspick": (433, 433),
    "open_tree": (428, 428),
    "mount_setattr": (442, 442),
    "pivot_root": (155, 41),
    "kexec_load": (246, 104),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "syslog": (103, 116),
    "seccomp": (317, 277),
    "landlock_create_ruleset": (444, 444),
    "set_mempolicy": (238, 237),
    "move_pages": (279, 239),
    "migrate_pages": (256, 238),
    "ioprio_set": (251, 30),
    "timer_create": (222, 107),
    "rt_sigqueueinfo": (129, 138),
    "capset": (126, 91),
    "mq_open": (240, 180),
    "lookup": (212, 18),  # lookup_dcookie
    "sched_setattr": (314, 274),
    "remap_file_pages": (216, 234),
    "personality": (135, 92),
    "quotactl": (179, 60),
    "name_to_handle_at": (303, 264),
}
CALL = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = libc.mmap.restype = libc.shmat.restype = ctypes.c_long
def checked(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
def raw(number, *arguments):
    values = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    return checked(libc.syscall(ctypes.c_long(number), *values))
def run(*command):
    import subprocess
    if subprocess.run(command, capture_output=True).returncode:
        raise OSError(command[0])
"""


def call(name, arguments="0, 0, 0, 0, 0", before=""):
    """A program whose answer is what a system call returned."""
    number = NUMBERS[name][platform.machine() == "aarch64"]
    lines = [f"    {line}\n" for line in before.splitlines()]
    return (f"{CALL}{'def answer():'}\n{''.join(lines)}    return raw({number}, {arguments})", "error")


def library(expression, before=""):
    """A program whose answer is what a function of the C library returned."""
    return (f"{CALL}def answer():\n    {before or 'pass'}\n    return checked(libc.{expression})", "error")


def command(*words):
    """A program that runs one of the system's."""
    return (f"{CALL}def answer():\n    run{words!r}\n    return 1", "error")


def endless(body, kinds, before=""):
    """A program that does the same for as long as it may."""
    lines = "".join(f"        {line}\n" for line in body.splitlines())
    return (f"{CALL}{before}\ndef answer():\n    kept, n = [], 0\n    while True:\n        n += 1\n{lines}", kinds)


def socket(arguments):
    return (CALLS + f"import socket\n    return socket.socket({arguments}).fileno()", "error")


# Attaches to the first process of its namespace and has it clear the signal that it gets when its parent ends.
OUTLIVES = (
    CALL
    + """
libc.ptrace.argtypes = [ctypes.c_long] * 4
libc.ptrace.restype = ctypes.c_long
class Registers(ctypes.Structure):
    _fields_ = [(name, ctypes.c_ulong) for name in
        "r15 r14 r13 r12 rbp rbx r11 r10 r9 r8 rax rcx rdx rsi rdi orig_rax rip cs eflags rsp ss fs gs ds es fsb gsb"
        .split()]
def attach(first):
    checked(libc.ptrace(16, first, 0, 0))
    os.waitpid(first, 0x40000000)
    before, now = Registers(), Registers()
    checked(libc.ptrace(12, first, 0, ctypes.addressof(before)))
    ctypes.memmove(ctypes.addressof(now), ctypes.addressof(before), ctypes.sizeof(now))
    now.rip, now.rax, now.orig_rax, now.rdi, now.rsi = before.rip - 2, 157, -1 % 2 ** 64, 1, 0
    checked(libc.ptrace(13, first, 0, ctypes.addressof(now)))
    checked(libc.ptrace(9, first, 0, 0))
    os.waitpid(first, 0x40000000)
    checked(libc.ptrace(13, first, 0, ctypes.addressof(before)))
    checked(libc.ptrace(17, first, 0, 0))
def answer():
    attach(1)
    if not os.fork():
        os.setsid()
        os.closerange(0, 64)
        import time
        time.sleep(600)
    return 1
""",
    "error",
)

SHARED = "import mmap\nkept = mmap.mmap(-1, 200 << 20)\n"
MANY_PROCESSES = (
    "import os, time\nfor _ in range(6):\n    if not os.fork():\n        break\n"
    "def fill():\n    kept = []\n    try:\n        while True: kept.append(bytearray(1 << 20))\n"
    "    except MemoryError: time.sleep({seconds})\nfill()\n" + CALLS + "return 1"
)

ESCAPES = {
    # --- on to live after the judge
    "attach to the first process and outlive the judge": OUTLIVES,
    "attach to the first process": library("ptrace(16, 1, 0, 0)"),
    "seize the first process": library("ptrace(0x4206, 1, 0, 0)"),
    "be traced": library("ptrace(0, 0, 0, 0)"),
    "read the first process": library("process_vm_readv(1, 0, 0, 0, 0, 0)"),
    "write the first process": library("process_vm_writev(1, 0, 0, 0, 0, 0)"),
    "descriptors of another process": call("pidfd_getfd", "3, 0, 0"),
    "a handle of the first process": call("pidfd_open", "1, 0"),
    "advise another process": call("process_madvise"),
    "compare processes": call("kcmp"),
    "limits of the first process": (
        CALLS + "import resource\n    return resource.prlimit(1, resource.RLIMIT_CPU, (0, 0))",
        "error",
    ),
    "the signal of a parent's death": library("prctl(1, 0, 0, 0, 0)"),
    "adopt orphans": library("prctl(36, 1, 0, 0, 0)"),
    "all signals to the first process": (
        CALLS + "import os\n    for number in range(1, 65):\n        if number not in (32, 33): os.kill(1, number)",
        "failed error",
    ),
    "stop everybody": (CALLS + "import os, signal\n    os.kill(-1, signal.SIGSTOP)", "failed error"),
    "run away from kills": (
        "import os\nwhile True:\n    try:\n        if os.fork(): os._exit(0)\n    except OSError: pass",
        "exited",
    ),
    "run away in sessions of their own": (
        "import os\nfor _ in range(5):\n    if not os.fork():\n        while True:\n            try:\n"
        "                os.setsid()\n            except OSError: pass\n            try:\n"
        "                if os.fork(): os._exit(0)\n            except OSError: pass\n" + CALLS + "return 1",
        "failed error",
    ),
    "new images all the time": (
        "import os, sys\nos.execv('/bin/sh', ['sh', '-c', 'while true; do exec sh -c \"exec sleep 9\"; done'])",
        "timeout",
    ),
    "zombies": (
        "import os\nfor _ in range(6):\n    if not os.fork(): os._exit(0)\n" + CALLS + "return 1",
        "failed",
    ),
    "stopped children": (
        "import os, signal\nfor _ in range(5):\n    if not os.fork(): os.kill(os.getpid(), signal.SIGSTOP)\n"
        + CALLS
        + "return 1",
        "failed",
    ),
    "a parent that waits for its clone": (
        call("clone", "0x4000 | 17, 0, 0, 0, 0")[0] + " or __import__('time').sleep(99)",
        "timeout",
    ),
    "a child that holds the pipes": (
        "import os, time\nif os.fork(): os._exit(0)\nwhile True: time.sleep(9)",
        "exited",
    ),
    "children that ignore every signal": (
        "import os, signal, time\nfor _ in range(5):\n    if not os.fork():\n        for number in range(1, 32):\n"
        "            try: signal.signal(number, signal.SIG_IGN)\n            except OSError: pass\n"
        "        os.setsid()\n        while True: pass\n" + CALLS + "return 1",
        "failed",
    ),
    # --- other namespaces
    "a user namespace": library("unshare(0x10000000)"),
    "a user namespace and all others": library("unshare(0x7E020080)"),
    "a network namespace": library("unshare(0x40000000)"),
    "a clone in a user namespace": call("clone", "0x10000000 | 17, 0, 0, 0, 0"),
    "a clone in all namespaces": call("clone", "0x7E020000 | 17, 0, 0, 0, 0"),
    "the newer clone": call("clone3", "(0x10000000).to_bytes(8, 'little') + bytes(80), 88"),
    "enter a namespace": library("setns(0, 0)"),
    "the command for namespaces": command("unshare", "--user", "--map-root-user", "true"),
    "a sandbox in the sandbox": command("bwrap", "--unshare-user", "--ro-bind", "/", "/", "true"),
    "the limit of namespaces": (CALLS + "return open('/dev/user/max_user_namespaces', 'w').write('99')", "error"),
    # --- calls of the kernel
    "rings of requests": call("io_uring_setup", "8, ctypes.create_string_buffer(120)"),
    "requests of old": call("io_setup", "1, ctypes.create_string_buffer(8)"),
    "programs for the kernel": call("bpf", "0, ctypes.create_string_buffer(120), 120"),
    "counters of the processor": call("perf_event_open", "ctypes.create_string_buffer(120), 0, -1, -1, 0"),
    "page faults by hand": call("userfaultfd", "1"),
    "a key for the next program": call(
        "add_key", "ctypes.c_char_p(b'user'), ctypes.c_char_p(b'codeparrot-left'), ctypes.c_char_p(b'x'), 1, -4"
    ),
    "a key for all of this user": call("keyctl", "0, -4, 1"),
    "a session of keys": call("keyctl", "1, 0"),
    "a key of the machine": call("request_key", "ctypes.c_char_p(b'user'), ctypes.c_char_p(b'x'), 0, -2"),
    "mounting": library("mount(b'tmpfs', b'/tmp', b'tmpfs', 0, None)"),
    "more files in the scratch folder": library("mount(b'tmpfs', b'/tmp', b'tmpfs', 32, b'nr_inodes=0,size=0')"),
    "mounting the root anew": library("mount(None, b'/', None, 32 | 4096, None)"),
    "unmounting": library("umount2(b'/tmp', 2)"),
    "another root": call("pivot_root"),
    "a root of its own": (CALLS + "import os\n    return os.chroot('/tmp')", "error"),
    "a file system by its parts": call("fsopen", "ctypes.c_char_p(b'tmpfs'), 0"),
    "a file system's settings": call("fspick", "-100, ctypes.c_char_p(b'/tmp'), 0"),
    "a copy of the tree": call("open_tree", "-100, ctypes.c_char_p(b'/'), 1"),
    "attributes of a mount": call("mount_setattr", "-100, ctypes.c_char_p(b'/'), 0, 0, 0"),
    "a file by its handle": library("open_by_handle_at(0, 0, 0)"),
    "handles of files": call("name_to_handle_at"),
    "another kernel": call("kexec_load"),
    "a module": call("init_module"),
    "a module by its file": call("finit_module"),
    "no module": call("delete_module"),
    "the kernel's messages": call("syslog", "3, ctypes.create_string_buffer(99), 99"),
    "the kernel's cookies": call("lookup"),
    "a filter of its own": call("seccomp"),
    "a filter that asks it": call("seccomp", "1, 8, 0"),
    "rules of its own": call("landlock_create_ruleset", "0, 0, 1"),
    "another personality": call("personality", "0x0040000"),
    "another's capabilities": call("capset", "0, 0"),
    "restart": library("reboot(0x4321FEDC)"),
    "swap": library("swapon(b'/tmp/x', 0)"),
    "accounting": library("acct(b'/tmp/x')"),
    "quotas": call("quotactl"),
    "the machine's clock": (CALLS + "import time\n    return time.clock_settime(time.CLOCK_REALTIME, 0.0)", "error"),
    "the machine's name": (CALLS + "import socket\n    return socket.sethostname('x')", "error"),
    "write all disks": library("syncfs(0)"),
    "ports of the processor": library("iopl(3)") if platform.machine() == "x86_64" else call("lookup"),
    "real time": (
        CALLS + "import os\n    return os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))",
        "error",
    ),
    "deadlines": call("sched_setattr"),
    "priority": (CALLS + "import os\n    return os.nice(-5)", "error"),
    "priority of the disk": call("ioprio_set", "1, 0, 1 << 13"),
    "policy of memory": call("set_mempolicy", "0, 0, 0"),
    "pages of others": call("move_pages"),
    "all pages of others": call("migrate_pages"),
    "watch files": library("inotify_init1(0)"),
    "watch all files": library("fanotify_init(0, 0)"),
    # --- sockets
    "the hypervisor": socket("40, socket.SOCK_STREAM"),
    "the hypervisor's datagrams": socket("40, socket.SOCK_DGRAM"),
    "the loopback": (CALLS + "import socket\n    return socket.create_connection(('::1', {port})).recv(99)", "error"),
    "datagrams": socket("socket.AF_INET, socket.SOCK_DGRAM"),
    "raw packets": socket("socket.AF_INET, socket.SOCK_RAW, 1"),
    "packets of the wire": socket("17, socket.SOCK_RAW"),
    "the kernel by netlink": socket("socket.AF_NETLINK, socket.SOCK_RAW"),
    "the kernel's ciphers": socket("38, socket.SOCK_SEQPACKET"),
    "bluetooth": socket("31, socket.SOCK_RAW, 1"),
    "datagrams to elsewhere": (
        CALLS + "import socket\n    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)\n"
        "    return a.sendto(b'x', {abstract!r})",
        "error",
    ),
    "a pair that connects elsewhere": (
        CALLS + "import socket\n    a, b = socket.socketpair()\n    a.connect({abstract!r})",
        "error",
    ),
    "descriptors in flight": (
        CALLS + "import socket\n    a, b = socket.socketpair()\n    return socket.send_fds(a, [b'x'], [0, 1, 2])",
        "error",
    ),
    "larger buffers": (
        CALLS + "import socket\n    a, b = socket.socketpair()\n"
        "    a.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 30)",
        "error",
    ),
    # --- other ways in
    "commands of root": command("su", "-c", "id"),
    "the command that mounts": command("mount", "-t", "tmpfs", "tmpfs", "/tmp"),
    "files of root": (CALLS + "import os\n    open('/tmp/x', 'w')\n    return os.chown('/tmp/x', 0, 0)", "error"),
    "groups of root": (CALLS + "import os\n    return os.setgroups([0])", "error"),
    "characters for the terminal": (
        CALLS + "import fcntl\n    for n in range(9):\n        try: fcntl.fcntl(n, 1)\n"
        "        except OSError: continue\n        fcntl.ioctl(n, 0x5412, b'x')",
        "error",
    ),
    "open files of the judge": (
        CALLS + "import os, stat\n    for n in range(3, 4096):\n        try: mode = os.fstat(n).st_mode\n"
        "        except OSError: continue\n        if not stat.S_ISFIFO(mode) and not stat.S_ISCHR(mode): return mode\n"
        "    raise OSError",
        "error",
    ),
    "files of the kernel": (
        CALLS + "import os\n    return [name for name in ('proc', 'sys', 'run', 'etc', 'root', 'home', 'var') "
        "if os.listdir('/' + name) and name != 'etc']",
        "error",
    ),
    "32 bits": (
        "import ctypes, mmap\ncode = mmap.mmap(-1, 4096, prot=7)\n"
        "code.write(bytes.fromhex('b814000000cd80c3'))\n"  # mov eax, getpid; int 0x80; ret
        + CALLS
        + "address = ctypes.addressof(ctypes.c_char.from_buffer(code))\n"
        "    return ctypes.CFUNCTYPE(ctypes.c_int)(address)()",
        "exited",
    ),
    "numbers of x32": (
        CALL + "def answer():\n    return raw(0x40000000 + 39)",
        "exited" if platform.machine() == "x86_64" else "error",
    ),
    "a dump": ("import os\nos.abort()", "exited"),
    # --- memory that no limit counts
    "System V shared memory": endless(
        "segment = checked(libc.shmget(0, 64 << 20, 0o1600))\naddress = checked(libc.shmat(segment, None, 0))\n"
        "ctypes.memset(ctypes.c_void_p(address), 1, 64 << 20)\nlibc.shmdt(ctypes.c_void_p(address))",
        "error",
    ),
    "a segment that stays": library("shmget(0x5e0f3a, 4096, 0o1666)"),
    "files in memory": endless("kept.append(os.memfd_create('x'))\nos.truncate(kept[-1], 64 << 20)", "error"),
    "secret files in memory": call("memfd_secret", "0"),
    "System V messages": endless("queue = checked(libc.msgget(0, 0o1600))", "error"),
    "System V semaphores": endless("checked(libc.semget(0, 250, 0o1600))", "error"),
    "POSIX messages": call("mq_open", "ctypes.c_char_p(b'x'), 0o102, 0o600, 0"),
    "POSIX shared memory": (
        CALLS
        + "from multiprocessing.shared_memory import SharedMemory\n    return SharedMemory(create=True, size=99).size",
        "error",
    ),
    "empty files": endless("open(f'/tmp/{n}', 'w').close()", "error"),
    "empty folders": endless("os.mkdir(f'/tmp/{n}')", "error"),
    "links": endless("os.symlink('x' * 3000, f'/tmp/{n}')", "error"),
    "hard links": endless("open('/tmp/x', 'a').close()\nos.link('/tmp/x', f'/tmp/{n}')", "error"),
    "pipes with names": endless("os.mkfifo(f'/tmp/{n}')", "error"),
    "folders in folders": endless("os.mkdir('x')\nos.chdir('x')", "error"),
    "long names": endless("open('/tmp/' + str(n).rjust(250, 'x'), 'w').close()", "error"),
    "deleted files that stay open": endless(
        "kept.append(open('/tmp/x', 'wb'))\nos.unlink('/tmp/x')\nkept[-1].write(bytes(1 << 20))\nkept[-1].flush()",
        "error",
    ),
    "attributes of files": (
        CALLS
        + "import os\n    open('/tmp/x', 'w')\n    for n in range(10 ** 6): os.setxattr('/tmp/x', f'user.{n}', b'x')",
        "error",
    ),
    "reserved space": (CALLS + "import os\n    os.posix_fallocate(open('/tmp/x', 'wb').fileno(), 0, 1 << 30)", "error"),
    "huge pages": (CALLS + "import mmap\n    return len(mmap.mmap(-1, 1 << 21, flags=0x40022))", "error"),
    "locked memory": library("mlockall(3)"),
    "memory mapped twice": call("remap_file_pages"),
    "pages in pipes": library("vmsplice(1, 0, 0, 0)"),
    "large pipes": (
        CALLS + "import fcntl, os\n    return fcntl.fcntl(os.pipe()[1], 1031, 1 << 20)",
        "error",
    ),
    "full pipes": endless("a, b = os.pipe()\nos.set_blocking(b, False)\nos.write(b, bytes(1 << 16))", "error"),
    "full sockets": endless(
        "for end in socket.socketpair():\n    kept.append(end)\n    end.setblocking(False)\n    try:\n"
        "        while True: end.send(bytes(1 << 16))\n    except BlockingIOError: pass",
        "error",
        "import socket",
    ),
    "queued signals": call("rt_sigqueueinfo", "os.getpid(), 34, ctypes.create_string_buffer(128)"),
    "queued signals by kill": (
        CALLS + "import os, signal\n    signal.pthread_sigmask(signal.SIG_BLOCK, [40])\n"
        "    for _ in range(10_000): os.kill(os.getpid(), 40)",
        "failed",
    ),
    "timers": call("timer_create", "0, 0, ctypes.create_string_buffer(8)"),
    "locks of bytes": (
        CALLS
        + "import fcntl\n    file = open('/tmp/x', 'w')\n    for n in range(20_000): fcntl.lockf(file, 2, 1, 2 * n)",
        "failed timeout",
    ),
    "watched descriptors": endless(
        "kept.append(select.epoll())\nfor end in kept[:-1]: kept[-1].register(end)", "error", "import select"
    ),
    "tables of pages": (
        CALL + "libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]\n"
        "def answer():\n    for n in range(1, 40_000):\n"
        "        address = checked(libc.mmap((1 << 40) + (n << 30), 4096, 3, 0x100022, -1, 0))\n"
        "        ctypes.c_char.from_address(address).value = b'x'",
        "memory failed exited error",
    ),
    "shared memory without a name": (
        "import mmap\nkept = []\nwhile True:\n    kept.append(mmap.mmap(-1, 1 << 24))\n"
        "    kept[-1].write(bytes(1 << 24))",
        "memory",
    ),
    "shared memory of several processes": (
        SHARED + "import os, time\nfor _ in range(5):\n    if not os.fork():\n        kept = None\n"
        "        kept = mmap.mmap(-1, 180 << 20)\n        kept.write(bytes(150 << 20))\n        time.sleep(0.3)\n"
        "        os._exit(0)\nfor _ in range(5): os.wait()\n" + CALLS + "return 1",
        "failed memory",
    ),
    "memory of many processes": (MANY_PROCESSES.format(seconds=0.3), "failed memory error exited"),
    "memory that grows by moving": (
        CALLS + "import mmap\n    kept = mmap.mmap(-1, 4096)\n    while True: kept.resize(2 * len(kept))",
        "memory error",
    ),
    "a large environment": (
        CALLS + "import os\n    os.execve('/bin/sh', ['sh'], {str(n): 'x' * 100_000 for n in range(10_000)})",
        "error memory",
    ),
    # --- verdicts
    "a long name": (CALLS + "raise type('x' * (1 << 20), (Exception,), {})", "error"),
    "a long name at the pipe": (
        "import __main__\n__main__.exception_to_reply = lambda e: ['error', 'ValueError', b'x'.hex() * (3 << 19), '']\n"
        + CALLS
        + "raise ValueError",
        "error",
    ),
    "a name for the terminal": (
        "import __main__\n__main__.exception_to_reply = lambda e: ['error', 'ValueError', "
        "'\\x1b]0;x\\x07\\x1b[2J\\r\\n\\0\\u202e'.encode().hex(), '']\n" + CALLS + "raise ValueError",
        "error",
    ),
    "a name for the terminal, at once": (
        "import __main__\n__main__.exception_to_reply = lambda e: ['error', 'ValueError', "
        "'\\x1b[31m\\n{{\"kind\": \"passed\"}}'.encode().hex() * 10_000, '']\nraise ValueError",
        "error",
    ),
    "a name that is none": (
        "import __main__\n__main__.exception_to_reply = lambda e: ['error', 'ValueError', 'zz', 'zz']\n"
        + CALLS
        + "raise ValueError",
        "error",
    ),
    "a long text": (CALLS + "raise ValueError('\\x1b' * (1 << 22))", "error"),
}
