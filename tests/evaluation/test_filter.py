"""The filter of system calls: what it says to every call, by an interpreter of its own, and what the kernel does."""

import errno
import platform
import re
import struct
from pathlib import Path

import pytest

from codeparrot_ds.sandbox.filter import (
    ALLOW,
    ARCHITECTURES,
    CONDITIONS,
    ERRNO,
    KILL_PROCESS,
    NUMBERS,
    build_filter,
)
from codeparrot_ds.sandbox.judge import Check, Judge, Limits

REFUSED = ERRNO | errno.EPERM
UNKNOWN = ERRNO | errno.ENOSYS
# What the filter exists for; `clone` and a few more depend on their arguments.
NEVER = (
    "ptrace process_vm_readv process_vm_writev process_madvise pidfd_getfd kcmp unshare setns clone3 keyctl add_key "
    "request_key io_uring_setup io_uring_enter io_uring_register io_setup bpf perf_event_open userfaultfd shmget shmat "
    "shmctl msgget msgsnd semget semop mq_open memfd_create memfd_secret socket connect bind sendmsg mount umount2 "
    "pivot_root chroot fsopen fsmount open_tree move_mount kexec_load init_module finit_module personality seccomp "
    "setxattr syncfs sync vmsplice splice tee inotify_init1 fanotify_init capset setresuid timer_create mlockall "
    "sched_setscheduler sched_setattr open_by_handle_at remap_file_pages mbind rt_sigqueueinfo quotactl reboot swapon"
).split()


def answer(program, number, arguments=(0,) * 6, architecture=ARCHITECTURES["x86_64"]):
    """What a filter returns: classic BPF, as far as the kernel's filters may use it and ours does."""
    data = struct.pack("<IIQ6Q", number, architecture, 0, *arguments)
    instructions = list(struct.iter_unpack("<HBBI", program))
    place = accumulator = 0
    while True:
        code, if_true, if_false, value = instructions[place]
        place += 1
        if code == 0x20:
            (accumulator,) = struct.unpack_from("<I", data, value)
        elif code == 0x54:
            accumulator &= value
        elif code in (0x15, 0x35):
            place += if_true if (accumulator == value if code == 0x15 else accumulator >= value) else if_false
        else:
            assert code == 0x06, hex(code)
            return value


@pytest.fixture(params=ARCHITECTURES)
def machine(request):
    return request.param


def test_every_number_is_allowed_by_name_or_unknown(machine):
    program, numbers = build_filter(machine), NUMBERS[machine]
    assert len(set(numbers.values())) == len(numbers) > 140
    conditional = {numbers[name] for name in CONDITIONS}
    for number in range(1024):
        said = answer(program, number, architecture=ARCHITECTURES[machine])
        if number not in conditional:
            assert said == (ALLOW if number in numbers.values() else UNKNOWN), number


def test_what_is_never_allowed_is_not_in_a_table(machine):
    assert not set(NEVER) & NUMBERS[machine].keys()


def test_other_architectures_end_the_process(machine):
    program = build_filter(machine)
    for other in (0x40000003, 0x40000028, 0xC000003E, 0xC00000B7, 0xC00000F3):  # i386, arm, ours, riscv64
        said = answer(program, NUMBERS[machine]["read"], architecture=other)
        assert said == (ALLOW if other == ARCHITECTURES[machine] else KILL_PROCESS)
    for number in (0x40000000, 0x40000000 + 39, 0xFFFFFFFF):  # x32
        assert answer(program, number, architecture=ARCHITECTURES[machine]) == KILL_PROCESS


FORK, THREAD = 17, 0x3D0F00  # as the C library makes a process and a thread
ARGUMENTS = [
    ("clone", (FORK,), ALLOW),
    ("clone", (THREAD,), ALLOW),
    *[("clone", (FORK | 1 << bit,), REFUSED) for bit in (17, 25, 26, 27, 28, 29, 30)],
    ("mmap", (0, 4096, 3, 0x22), ALLOW),
    ("mmap", (0, 4096, 3, 0x40022), REFUSED),
    ("socketpair", (1, 1), ALLOW),
    ("socketpair", (1, 1 | 0o2000000 | 0o4000), ALLOW),
    *[("socketpair", (1, kind), REFUSED) for kind in (2, 3, 5, 2 | 0o2000000)],
    *[("socketpair", (family, 1), REFUSED) for family in (0, 2, 10, 16, 17, 40)],
    ("prlimit64", (0, 7), ALLOW),
    ("prlimit64", (1, 7), REFUSED),
    ("prctl", (15,), ALLOW),
    *[("prctl", (option,), REFUSED) for option in (1, 4, 22, 23, 24, 35, 36, 38, 47, 59)],
    *[("fcntl", (0, request), ALLOW) for request in (0, 1, 2, 3, 4, 6, 1030, 1032)],
    *[("fcntl", (0, request), REFUSED) for request in (8, 15, 1024, 1026, 1031, 1033)],
    ("ioctl", (1, 0x5401), ALLOW),
    *[("ioctl", (1, request), REFUSED) for request in (0x5412, 0x541C, 0x40049409, 0)],
]


@pytest.mark.parametrize(("name", "arguments", "said"), ARGUMENTS)
def test_arguments_decide(machine, name, arguments, said):
    arguments = (*arguments, *(0,) * (6 - len(arguments)))
    number = NUMBERS[machine][name]
    assert answer(build_filter(machine), number, arguments, ARCHITECTURES[machine]) == said
    assert {name for name, _, _ in ARGUMENTS} == CONDITIONS.keys()


def test_numbers_are_those_of_the_kernels_headers():
    """Where they are: x86-64's, and the table that aarch64 shares with newer architectures."""
    found = 0
    for machine, place in (
        ("x86_64", "/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
        ("x86_64", "/usr/include/asm/unistd_64.h"),
        ("aarch64", "/usr/include/asm-generic/unistd.h"),
    ):
        if Path(place).exists():
            text = Path(place).read_text().replace("__NR3264_", "__NR_").replace("__NR_fstatat", "__NR_newfstatat")
            pairs = {name: int(number) for name, number in re.findall(r"#define __NR_(\w+)\s+(\d+)", text)}
            assert {name: pairs.get(name, number) for name, number in NUMBERS[machine].items()} == NUMBERS[machine]
            found += len(pairs.keys() & NUMBERS[machine].keys())
    assert found == 0 or found > 140


def test_the_kernel_refuses_what_the_filter_refuses():
    """A program that makes every call which is not allowed: each is unknown to it."""
    program = (
        "import ctypes, errno, os, sys\nlibc = ctypes.CDLL(None, use_errno=True)\ndef tried(numbers):\n    odd = []\n"
        "    for number in numbers:\n"
        "        if libc.syscall(ctypes.c_long(number), *[ctypes.c_long(-1)] * 6) != -1 or "
        "ctypes.get_errno() != errno.ENOSYS:\n            odd.append(number)\n    return odd"
    )
    traps = {335, 336} if platform.machine() == "x86_64" else set()  # of probes: no filter sees them, SIGILL ends them
    refused = sorted(set(range(500)) - traps - set(NUMBERS[platform.machine()].values()))
    check = Check(tests=(f"found = tried({refused})\nassert found == [], found",))
    verdict = Judge(Limits(seconds=30.0), 0).once(program, check)
    assert verdict.passed, verdict
