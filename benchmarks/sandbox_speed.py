"""Verdicts a second on trivial programs, for several numbers of workers, and what one verdict's time consists of.

python benchmarks/sandbox_speed.py
"""

from __future__ import annotations

import os
import statistics
import subprocess
import time

from record import record_parser, write_record

from codeparrot_ds.sandbox.judge import Check, Limits, _bubblewrap, _interpreter, check_sandbox, judge_all

PROGRAM = "def add(a, b):\n    return a + b\n"
CHECK = Check(tests=("assert add(1, 2) == 3\nassert add(-1, 1) == 0\nassert add('a', 'b') == 'ab'",), entry_point="add")


def verdicts_per_second(num_verdicts: int, num_workers: int) -> float:
    """Starts of the workers and their checkers included."""
    started = time.perf_counter()
    verdicts = list(judge_all([(PROGRAM, CHECK)] * num_verdicts, num_workers=num_workers))
    seconds = time.perf_counter() - started
    assert all(verdict.passed for verdict in verdicts), verdicts
    return num_verdicts / seconds


def milliseconds(command: list[str], rounds: int = 50) -> float:
    """Median wall clock of a command that does nothing."""
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        subprocess.run(command, env={}, check=True)
        times.append(time.perf_counter() - started)
    return 1000 * statistics.median(times)


def main() -> None:
    parser = record_parser(__doc__, name="sandbox-speed-cpu")
    parser.add_argument("--verdicts", type=int, default=300, help="a measurement")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    check_sandbox()
    cores = len(os.sched_getaffinity(0))
    raw: dict[str, object] = {}
    lines = ["| workers | verdicts/s, median | min - max |", "|---|---|---|"]
    for workers in dict.fromkeys((1, cores, cores + 1, 2 * cores)):
        rates = [verdicts_per_second(options.verdicts, workers) for _ in range(options.rounds)]
        raw[f"verdicts_per_second_{workers}_workers"] = rates
        lines.append(f"| {workers} | {statistics.median(rates):.0f} | {min(rates):.0f} - {max(rates):.0f} |")
    lines += ["", "| a process that does nothing | ms |", "|---|---|"]
    bubblewrap, python = _bubblewrap(Limits().scratch_bytes), _interpreter()
    nothing = ["-c", "import posix;posix._exit(0)"]
    for name, command in (
        ("/bin/true", ["/bin/true"]),
        ("the interpreter", [*python, *nothing]),
        ("bubblewrap and /bin/true", [*bubblewrap, "/bin/true"]),
        ("bubblewrap and the interpreter: the floor of a verdict", [*bubblewrap, *python, *nothing]),
    ):
        raw[name] = milliseconds(command)
        lines.append(f"| {name} | {raw[name]:.1f} |")
    folder = write_record(
        options.name, title="Verdicts a second in the sandbox", text="\n".join(lines), raw=raw, out=options.out
    )
    print((folder / "README.md").read_text())


if __name__ == "__main__":
    main()
