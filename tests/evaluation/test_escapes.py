"""Nothing escapes the sandbox or outlives it: as this user, as an ordinary one, and when the judge is killed."""

import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from codeparrot_ds.sandbox.groups import _possible_way, make_group
from codeparrot_ds.sandbox.judge import KINDS, Check, Judge, Limits, group_bytes, judge_all
from tests.evaluation.escapes import ESCAPES, MANY_PROCESSES
from tests.evaluation.hostile import HOSTILE
from tests.evaluation.test_sandbox import descendants, there_is_a_sandbox  # noqa: F401 (a fixture)

REPOSITORY = Path(__file__).resolve().parents[2]
CHECK = Check(tests=("assert answer() == 'secret'",))
SMALL = Limits(seconds=30.0, memory_bytes=256 << 20)
HASTY = Limits(seconds=1.5, memory_bytes=256 << 20)
RIGHT = "def answer():\n    return 'secret'"
PLACES = {"{port}": "9", "{abstract!r}": repr("\0codeparrot-nobody"), "{home!r}": "'/root/x'", "{host}": "999999"}
ORDINARY = 1000


def filled(text):
    for place, value in PLACES.items():
        text = text.replace(place, value)
    return text


def what_is_left(processes):
    """What programs have left on this machine, but for the processes that were there before."""
    left = [f"process {process}" for process in wait_for_ends(processes)]
    keys = Path("/proc/keys").read_text() if os.path.exists("/proc/keys") else ""
    left += ["key"] * keys.count("codeparrot-left")
    for kind in ("shm", "msg", "sem"):
        lines = Path("/proc/sysvipc", kind).read_text().splitlines()[1:]
        left += [f"{kind} {line}" for line in lines if line.split()[0] == str(0x5E0F3A)]
    return left


def wait_for_ends(before):
    """The descendants that do not end within a few seconds."""
    soon = time.monotonic() + 5
    while (left := descendants() - before) and time.monotonic() < soon:
        for process in left:
            try:
                os.waitpid(process, os.WNOHANG)
            except ChildProcessError:  # somebody else's
                continue
        time.sleep(0.02)
    return left


@pytest.fixture(scope="module", autouse=True)
def orphans_come_here():
    """A process whose parent has ended becomes this one's child, so that none is overlooked."""
    libc = ctypes.CDLL(None)
    assert libc.prctl(36, 1, 0, 0, 0) == 0  # PR_SET_CHILD_SUBREAPER
    yield
    libc.prctl(36, 0, 0, 0, 0)


@pytest.fixture(scope="module")
def escape_verdicts():
    before = descendants()
    verdicts = {}
    for limits in (HASTY, SMALL):
        names = [name for name, (_, kinds) in ESCAPES.items() if ("timeout" in kinds) == (limits is HASTY)]
        items = [(text, CHECK) for name in names for text in (filled(ESCAPES[name][0]), RIGHT)]
        found = list(judge_all(items, limits=limits, num_workers=3))
        assert [verdict.kind for verdict in found[1::2]] == ["passed"] * len(names)  # beside the hostile ones
        verdicts |= zip(names, found[::2], strict=True)
    assert what_is_left(before) == []
    return verdicts


@pytest.mark.parametrize("name", ESCAPES)
def test_the_kernel_refuses_an_escape(escape_verdicts, name):
    verdict, kinds = escape_verdicts[name], ESCAPES[name][1].split()
    assert "passed" not in kinds and set(kinds) <= set(KINDS)
    assert verdict.kind in kinds, verdict
    assert len(verdict.detail) <= 200 and verdict.detail.isprintable()


def test_there_are_more_than_150_hostile_programs():
    assert len(HOSTILE.keys() | ESCAPES.keys()) > 200 and not HOSTILE.keys() & ESCAPES.keys()


NEEDS_AN_ORDINARY_USER = [
    *("attach to the first process and outlive the judge", "seize the first process", "write the first process"),
    *("limits of the first process", "all signals to the first process", "stop everybody", "run away from kills"),
    *("children that ignore every signal", "stopped children", "a child that holds the pipes", "32 bits"),
    *("a user namespace", "a clone in a user namespace", "the newer clone", "a sandbox in the sandbox"),
    *("the limit of namespaces", "more files in the scratch folder", "unmounting", "a key for the next program"),
    *("rings of requests", "the hypervisor", "System V shared memory", "files in memory", "empty files", "hard links"),
    *("files of root", "open files of the judge", "the loopback", "a name for the terminal"),
]
DRIVER = """
import json, sys
from codeparrot_ds.sandbox.judge import Check, Limits, judge_all
programs = json.loads(sys.stdin.readline())
items = [(program, Check(tests=("assert answer() == 'secret'",))) for program in programs]
print("started", flush=True)
for verdict in judge_all(items, limits=Limits(seconds=30.0, memory_bytes=256 << 20), num_workers=2):
    print(json.dumps([verdict.kind, verdict.detail]), flush=True)
"""


# Of one who may not give capabilities to what is inside: AppArmor's profile for bubblewrap in newer Ubuntus.
WITHOUT_CAPABILITIES = """#!/bin/sh
left=$#
while [ $left -gt 0 ]; do
    word=$1; shift; left=$((left - 1))
    if [ "$word" = --cap-add ]; then shift; left=$((left - 1)); else set -- "$@" "$word"; fi
done
exec {bwrap} "$@"
"""
COUNTED_FILES = {"empty files", "hard links"}


@pytest.fixture(scope="module", params=["this user", "an ordinary user", "an ordinary user without capabilities"])
def judging(request):
    """Starts a process that judges programs, by (programs) -> Popen."""
    python, command = sys.executable, []
    folder = Path(tempfile.mkdtemp(prefix="codeparrot-", dir="/tmp"))
    if request.param != "this user" and os.geteuid() == 0:  # otherwise this user is one
        # Neither this environment nor this checkout need be readable to others.
        python = "/usr/bin/python3"
        assert os.access(python, os.X_OK), "the tests need the system's Python, which every user may run"
        command = ["setpriv", f"--reuid={ORDINARY}", f"--regid={ORDINARY}", "--clear-groups"]
    path = os.environ["PATH"]
    if request.param.endswith("capabilities"):
        (folder / "bin").mkdir()
        (folder / "bin" / "bwrap").write_text(WITHOUT_CAPABILITIES.format(bwrap=shutil.which("bwrap")))
        path = f"{folder}/bin:{path}"
    package = folder / "codeparrot_ds"
    shutil.copytree(REPOSITORY / "codeparrot_ds" / "sandbox", package / "sandbox")
    for file in (REPOSITORY / "codeparrot_ds").glob("*.py"):
        shutil.copy(file, package)
    for file in (folder, *folder.rglob("*")):
        file.chmod(0o755)

    command += [python, "-B", "-c"]
    options = {
        "cwd": folder, "text": True, "env": {"PATH": path, "HOME": str(folder), "PYTHONPATH": str(folder)}
    }  # fmt: skip

    def start(programs):
        process = subprocess.Popen([*command, DRIVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, **options)
        print(json.dumps(programs), file=process.stdin, flush=True)
        assert process.stdout.readline() == "started\n"
        return process

    start.counts_files = not request.param.endswith("capabilities")
    start.script = lambda script: subprocess.run([*command, script], capture_output=True, timeout=300, **options)
    yield start
    shutil.rmtree(folder)


def test_an_ordinary_users_programs_escape_no_better(judging):
    before = descendants()
    names = [name for name in NEEDS_AN_ORDINARY_USER if judging.counts_files or name not in COUNTED_FILES]
    programs = [filled(ESCAPES[name][0]) for name in names]
    process = judging([*programs, RIGHT])
    *verdicts, right = [json.loads(line) for line in process.communicate(timeout=300)[0].splitlines()]
    assert right[0] == "passed" and len(verdicts) == len(programs)
    wrong = {
        name: verdict
        for name, verdict in zip(names, verdicts, strict=True)
        if verdict[0] not in ESCAPES[name][1].split()
    }
    assert wrong == {}
    assert what_is_left(before) == []


LIVES = [
    ESCAPES["attach to the first process and outlive the judge"][0].replace(
        "return 1", "\n    while True: pass\nanswer()"
    ),
    "import os, time\nfor _ in range(5):\n    if not os.fork():\n        os.setsid()\n"
    "        while True: time.sleep(9)\nwhile True: time.sleep(9)",
    "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_is_left_of_a_judge_that_is_killed(judging, number):
    before = descendants()
    process = judging(LIVES)
    soon = time.monotonic() + 60
    # Judge, checkers, sandboxes, their children; counted once, since some of them come and go.
    while (running := len(descendants() - before)) < 20 and time.monotonic() < soon:
        time.sleep(0.05)
    assert running >= 20
    process.send_signal(number)
    process.wait(timeout=30)
    assert what_is_left(before) == []


KILLS = """
import ctypes, os, random, signal, time
from codeparrot_ds.sandbox.judge import Check, Judge, Limits, check_sandbox
check_sandbox()
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: what is left comes here
program = "import os, time\\nfor _ in range(3):\\n    if not os.fork(): time.sleep(999)\\ndef answer(): return 1"
for seed in range(40):
    judging = os.fork()
    if not judging:
        judge = Judge(Limits(), 0)
        while True:
            judge(program, Check(tests=("assert answer() == 1",)))
    time.sleep(random.Random(seed).uniform(0, 0.05))
    os.kill(judging, signal.SIGKILL)
end = time.monotonic() + 10
while time.monotonic() < end:
    try:
        if os.waitpid(-1, os.WNOHANG) == (0, 0):
            time.sleep(0.02)
    except ChildProcessError:
        print("nothing is left")
        break
"""


def test_nothing_is_left_of_judges_that_are_killed_at_any_moment(judging):
    """Most of all while bubblewrap starts: its child waits for it, for ever where it dies at the wrong moment."""
    done = judging.script(KILLS)
    assert (done.stdout, done.stderr) == ("nothing is left\n", "")


MANY_PIPES = """
import fcntl, os, resource
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
for _ in range(1200):  # as other programs of this user may have: new pipes of ordinary users are small from then on
    pipe = os.pipe()
    if fcntl.fcntl(pipe[0], fcntl.F_GETPIPE_SZ) <= 8192:
        break
assert not os.geteuid() or fcntl.fcntl(pipe[0], fcntl.F_GETPIPE_SZ) <= 8192
from codeparrot_ds.sandbox.judge import Check, Limits, judge_all
items = [("def answer(): return 'x' * 99_999", Check(tests=("assert len(answer()) == 99_999",)))] * 2
print([verdict.kind for verdict in judge_all(items, limits=Limits(seconds=30.0), num_workers=2)])
"""


def test_a_user_of_many_pipes_gets_verdicts(judging):
    done = judging.script(MANY_PIPES)
    assert (done.stdout, done.stderr) == ("['passed', 'passed']\n", "")


def test_nothing_is_left_when_the_machine_ends_a_process():
    """As where its memory is out, which ends any of them: the outer process, the namespace's first, the program."""
    before = descendants()
    judge = Judge(SMALL, 0)
    try:
        assert judge(RIGHT, CHECK).passed
        checker = descendants() - before
        for place in range(3):
            ended = []

            def end_one(place=place, ended=ended):
                soon = time.monotonic() + 30
                while len(found := sorted(descendants() - before - checker)) < 6 and time.monotonic() < soon:
                    time.sleep(0.02)
                if place == 0:  # what the kernel would choose first
                    ended += [Path(f"/proc/{process}/oom_score_adj").read_text() for process in found[2:]]
                os.kill(found[place], signal.SIGKILL)

            thread = threading.Thread(target=end_one)
            thread.start()
            verdict = judge(LIVES[1], CHECK)
            thread.join()
            assert verdict.kind == "exited", verdict
            assert set(ended) <= {"1000\n"} and bool(ended) == (place == 0)
            assert wait_for_ends(before | checker) == set()
        assert judge(RIGHT, CHECK).passed
    finally:
        judge.close()
    assert what_is_left(before) == []


def test_a_programs_processes_have_one_limit_together_where_a_group_can_be_made():
    limits = Limits(seconds=30.0, memory_bytes=64 << 20)
    probe = make_group("test", group_bytes(limits), limits.processes)
    if probe:
        probe.close()
    judge = Judge(limits, 0)
    # As the first of six processes: each fills less than its own limit, and the group is full before all have.
    text = MANY_PROCESSES.format(seconds=3).replace("fill()\n", "fill()\n" if probe else "time.sleep(1)\n")
    try:
        verdict = judge(text, CHECK)
        assert verdict.kind in (("memory",) if probe else ("failed", "memory")), verdict
        assert judge(RIGHT, CHECK).passed
    finally:
        judge.close()
    if probe:
        assert not any(folder.exists() for folder in probe.folders)


def test_empty_groups_of_killed_judges_are_removed():
    group = make_group("first", 1 << 30, 8)
    if group is None:  # nothing to remove
        assert Judge(SMALL, 0).once(RIGHT, CHECK).passed
        return
    dead = subprocess.Popen(["true"])
    dead.wait()
    left = [folder.with_name(f"codeparrot-ds-{dead.pid}-0") for folder in group.folders]
    for folder in left:
        folder.mkdir()
    assert _possible_way.__wrapped__() is not None  # as when a process makes its first
    group.close()
    assert not any(folder.exists() for folder in left)


def test_a_folder_that_is_no_group_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr("codeparrot_ds.sandbox.groups._ways", lambda *limits: [[(tmp_path, {"memory.max": 1})]])
    assert _possible_way.__wrapped__() is None
    assert list(tmp_path.iterdir()) == []


MAY = {
    "processes": "import multiprocessing as m\n    c = m.get_context('fork')\n    a, b = c.Pipe()\n"
    "    p = c.Process(target=b.send, args=(3,))\n    p.start()\n    p.join()\n    return a.recv() == 3",
    "threads": "from concurrent.futures import ThreadPoolExecutor\n    with ThreadPoolExecutor(3) as pool:\n"
    "        return list(pool.map(abs, [-1, 2])) == [1, 2]",
    "commands": "import subprocess\n    return subprocess.check_output(['sh', '-c', 'ls /usr | head -1']) != b''",
    "asyncio": "import asyncio\n    async def g():\n"
    "        p = await asyncio.create_subprocess_exec('echo', stdout=-1)\n"
    "        return (await p.communicate())[0] == b'\\n'\n    return asyncio.run(g())",
    "a database": "import sqlite3\n    d = sqlite3.connect('/tmp/x')\n    d.execute('create table a(b)')\n"
    "    d.commit()\n    return d.execute('select * from a').fetchall() == []",
    "files": "import os, shutil, tempfile\n    shutil.copytree(os.path.dirname(os.__file__) + '/json', '/tmp/j')\n"
    "    shutil.copy2(os.__file__, '/tmp/y')\n    shutil.move('/tmp/y', '/tmp/z')\n    shutil.rmtree('/tmp/j')\n"
    "    with tempfile.NamedTemporaryFile() as f: return f.write(b'x')",
    "alarms": "import signal, time\n    seen = []\n    signal.signal(signal.SIGALRM, lambda *a: seen.append(1))\n"
    "    signal.setitimer(signal.ITIMER_REAL, 0.01)\n    time.sleep(0.05)\n    return seen == [1]",
    "selectors": "import selectors, socket\n    s = selectors.DefaultSelector()\n    a, b = socket.socketpair()\n"
    "    s.register(a, 1)\n    b.send(b'x')\n    return len(s.select(1)) == 1",
    "a mapped file and locks": "import fcntl, mmap\n    f = open('/tmp/m', 'w+b')\n    f.write(b'a' * 5000)\n"
    "    f.flush()\n    fcntl.flock(f, 2)\n    fcntl.lockf(f, 2)\n    m = mmap.mmap(f.fileno(), 0)\n"
    "    m[0] = 98\n    m.flush()\n    return m[:2] == b'ba'",
    "facts of the machine": "import os, platform, resource\n"
    "    resource.setrlimit(resource.RLIMIT_NOFILE, (32, 64))\n"
    "    return platform.platform() and os.uname() and os.times() and os.sched_getaffinity(0)",
}


def test_programs_may_use_the_standard_library():
    judge = Judge(SMALL, 0)
    try:
        verdicts = {name: judge(f"def f():\n    {body}", Check(tests=("assert f()",))) for name, body in MAY.items()}
    finally:
        judge.close()
    assert {name: verdict for name, verdict in verdicts.items() if not verdict.passed} == {}


@pytest.mark.parametrize("machine", ["riscv64", "i686"])
def test_a_machine_without_a_filter_is_told_so(tmp_path, machine):
    script = (
        f"import os\nuname = os.uname\nos.uname = lambda: type('U', (), dict(machine={machine!r}))\n"
        "from codeparrot_ds.sandbox.judge import check_sandbox\ncheck_sandbox()"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 1
    assert re.search(f"UserError: .*knows x86_64, aarch64, and this machine is {machine}", done.stderr), done.stderr
