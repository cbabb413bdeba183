"""The system calls that a sandbox's programs may make, as a filter for the kernel (seccomp, classic BPF).

What CPython and numpy need is allowed by name, with the arguments that they need; every other call, known today or not,
fails with ENOSYS, upon which libraries take their older way. Calls of another architecture's numbers end the process.
Constants: Linux's uapi headers; the data that a filter reads: ``struct seccomp_data`` in ``linux/seccomp.h``.
"""

from __future__ import annotations

import errno
import os
import struct
from functools import cache

from codeparrot_ds.errors import UserError

ALLOW, ERRNO, KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000
"""What a filter returns; ERRNO with the error's number in its lower half."""

_LOAD, _AND, _JUMP_IF_EQUAL, _JUMP_IF_AT_LEAST, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x06
_NUMBER_AT, _ARCHITECTURE_AT, _ARGUMENTS_AT = 0, 4, 16
_X32 = 0x40000000  # bit of x86-64's other calling convention

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""By ``uname -m``: AUDIT_ARCH_…"""

_CALLS = """
read:0:63 write:1:64 open:2:- close:3:57 stat:4:- fstat:5:80 lstat:6:- poll:7:- lseek:8:62 pread64:17:67
pwrite64:18:68 readv:19:65 writev:20:66 preadv:295:69 pwritev:296:70 preadv2:327:286 pwritev2:328:287 access:21:-
pipe:22:- pipe2:293:59 select:23:- pselect6:270:72 ppoll:271:73 dup:32:23 dup2:33:- dup3:292:24 sendfile:40:71
copy_file_range:326:285 fcntl:72:25 flock:73:32 fsync:74:82 fdatasync:75:83 truncate:76:45 ftruncate:77:46
fallocate:285:47 fadvise64:221:223 getdents:78:- getdents64:217:61 getcwd:79:17 chdir:80:49
fchdir:81:50 rename:82:- renameat:264:38 renameat2:316:276 mkdir:83:- mkdirat:258:34 rmdir:84:- creat:85:-
openat:257:56 openat2:437:437 link:86:- linkat:265:37 unlink:87:- unlinkat:263:35 symlink:88:- symlinkat:266:36
readlink:89:- readlinkat:267:78 chmod:90:- fchmod:91:52 fchmodat:268:53 chown:92:- fchown:93:55 lchown:94:-
fchownat:260:54 umask:95:166 utime:132:- utimes:235:- futimesat:261:- utimensat:280:88 mknod:133:- mknodat:259:33
statfs:137:43 fstatfs:138:44 newfstatat:262:79 statx:332:291 faccessat:269:48 faccessat2:439:439 getxattr:191:8
lgetxattr:192:9 fgetxattr:193:10 listxattr:194:11 llistxattr:195:12 flistxattr:196:13 ioctl:16:29 close_range:436:436
eventfd:284:- eventfd2:290:19 epoll_create:213:- epoll_create1:291:20 epoll_ctl:233:21 epoll_wait:232:-
epoll_pwait:281:22 epoll_pwait2:441:441 timerfd_create:283:85 timerfd_settime:286:86 timerfd_gettime:287:87
socketpair:53:199 sendto:44:206 recvfrom:45:207 shutdown:48:210 getsockname:51:204 getpeername:52:205
getsockopt:55:209 mmap:9:222 mprotect:10:226 munmap:11:215 brk:12:214 mremap:25:216 madvise:28:233 mincore:27:232
msync:26:227 rseq:334:293 clone:56:220 fork:57:- vfork:58:- execve:59:221 execveat:322:281
exit:60:93 exit_group:231:94 wait4:61:260 waitid:247:95 kill:62:129 tkill:200:130 tgkill:234:131 getpid:39:172
getppid:110:173 gettid:186:178 getpgid:121:155 setpgid:109:154 getpgrp:111:- setsid:112:157 getsid:124:156
getuid:102:174 geteuid:107:175 getgid:104:176 getegid:108:177 getresuid:118:148 getresgid:120:150 getgroups:115:158
getpriority:140:141 setpriority:141:140 sched_yield:24:124 sched_getaffinity:204:123 sched_setaffinity:203:122
sched_getparam:143:121 sched_getscheduler:145:120 sched_get_priority_max:146:125 sched_get_priority_min:147:126
sched_rr_get_interval:148:127 getrlimit:97:163 setrlimit:160:164 prlimit64:302:261 getrusage:98:165 times:100:153
sysinfo:99:179 uname:63:160 prctl:157:167 arch_prctl:158:- set_tid_address:218:96 set_robust_list:273:99
get_robust_list:274:100 futex:202:98 restart_syscall:219:128 rt_sigaction:13:134 rt_sigprocmask:14:135
rt_sigreturn:15:139 rt_sigpending:127:136 rt_sigtimedwait:128:137 rt_sigsuspend:130:133 sigaltstack:131:132 pause:34:-
alarm:37:- getitimer:36:102 setitimer:38:103 nanosleep:35:101 clock_gettime:228:113 clock_getres:229:114
clock_nanosleep:230:115 gettimeofday:96:169 time:201:- getrandom:318:278 getcpu:309:168
"""
NUMBERS: dict[str, dict[str, int]] = {machine: {} for machine in ARCHITECTURES}
"""Of the allowed calls, by architecture and name; a call that one lacks is ``-`` above."""
for _call in _CALLS.split():
    _name, *_numbers = _call.split(":")
    for _machine, _number in zip(ARCHITECTURES, _numbers, strict=True):
        if _number != "-":
            NUMBERS[_machine][_name] = int(_number)

_ALL = 0xFFFFFFFF
_NAMESPACES = 0x7E020000  # CLONE_NEWNS, CGROUP, UTS, IPC, USER, PID, NET; clone itself knows no CLONE_NEWTIME
CONDITIONS: dict[str, tuple[tuple[int, int, tuple[int, ...]], ...]] = {
    # Name: (which argument, its bits that count, what they may be). Lower halves only: none of these has another.
    "clone": ((0, _NAMESPACES, (0,)),),
    "mmap": ((3, 0x40000, (0,)),),  # not MAP_HUGETLB: the machine's huge pages count for no limit on memory
    # AF_UNIX and SOCK_STREAM: a socket of datagrams can send elsewhere than to its other half.
    "socketpair": ((0, _ALL, (1,)), (1, 0xF, (1,))),
    "prlimit64": ((0, _ALL, (0,)),),  # its own limits, not another process's
    "prctl": ((0, _ALL, (15, 16)),),  # PR_SET_NAME, PR_GET_NAME
    # All but F_SETPIPE_SZ, leases, notifications and owners of signals.
    "fcntl": ((1, _ALL, (*range(8), 36, 37, 38, 1030, 1032)),),
    "ioctl": ((1, _ALL, (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)),),  # isatty, window size, FIONREAD, flags
}


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    """A ``struct sock_filter``; jumps count the instructions that they skip."""
    return struct.pack("<HBBI", code, if_true, if_false, value)


def _checked(conditions: tuple[tuple[int, int, tuple[int, ...]], ...]) -> list[bytes]:
    """Allows a call whose arguments meet every condition, refuses it otherwise."""
    block = []
    for argument, mask, values in conditions:
        block += [_instruction(_LOAD, _ARGUMENTS_AT + 8 * argument), _instruction(_AND, mask)]
        for left, value in zip(range(len(values), 0, -1), values, strict=True):
            block.append(_instruction(_JUMP_IF_EQUAL, value, if_true=left))
        block.append(_instruction(_RETURN, ERRNO | errno.EPERM))
    return [*block, _instruction(_RETURN, ALLOW)]


def build_filter(machine: str) -> bytes:
    """Returns the filter's instructions for an architecture of ``ARCHITECTURES``, 8 bytes each."""
    calls = {number: _checked(CONDITIONS.get(name, ())) for name, number in NUMBERS[machine].items()}
    unknown = [_instruction(_RETURN, ERRNO | errno.ENOSYS)]
    runs: list[tuple[int, list[bytes]]] = []  # the first number of each run with the same answer
    for number in range(max(calls) + 2):
        block = calls.get(number, unknown)
        if not runs or runs[-1][1] != block:
            runs.append((number, block))
    program = [
        _instruction(_LOAD, _ARCHITECTURE_AT),
        _instruction(_JUMP_IF_EQUAL, ARCHITECTURES[machine], if_true=1),
        _instruction(_RETURN, KILL_PROCESS),
        _instruction(_LOAD, _NUMBER_AT),
        _instruction(_JUMP_IF_AT_LEAST, _X32, if_false=1),
        _instruction(_RETURN, KILL_PROCESS),
    ]
    return b"".join([*program, *_search(runs)])


def _search(runs: list[tuple[int, list[bytes]]]) -> list[bytes]:
    """A binary search: the kernel follows every number through a new filter, which takes long through a list."""
    if len(runs) == 1:
        return runs[0][1]
    middle = len(runs) // 2
    below, above = _search(runs[:middle]), _search(runs[middle:])
    return [_instruction(_JUMP_IF_AT_LEAST, runs[middle][0], if_true=len(below)), *below, *above]


@cache
def own_filter() -> bytes:
    """``build_filter`` of this machine; ``UserError`` where its architecture has no table."""
    machine = os.uname().machine
    if machine not in ARCHITECTURES:
        raise UserError(
            f"generated programs run in a sandbox only, whose filter of system calls knows {', '.join(ARCHITECTURES)}, "
            f"and this machine is {machine}"
        )
    return build_filter(machine)
