"""Kills training runs with SIGKILL at random moments, some hundred times, and compares how they end.

python benchmarks/torture.py --kills 300
python benchmarks/torture.py --kills 100 --faults --configs zero2 --at-once 1 --name torture-faults
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import statistics
import sys
import tempfile
import time
from pathlib import Path

from record import REPOSITORY, record_parser, write_record

sys.path[:0] = [str(REPOSITORY)]

from tests.torture.faults import FAULTS, Faults, FaultyKill  # noqa: E402
from tests.torture.kills import MOMENTS, TARGETS, Course, Kill, Torture, figures, lay_course  # noqa: E402

CONFIGS = ("zero0_fp32", "zero1", "zero2", "zero2_offload", "zero3", "zero3_fp32")


def main() -> int:
    parser = record_parser(__doc__, name="torture-cpu")
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--configs", nargs="+", default=CONFIGS, help="DeepSpeed configs, each with its own reference")
    parser.add_argument("--hub", default="local", choices=("local", "off"))
    parser.add_argument("--at-once", type=int, default=2, help="configs side by side")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--faults", nargs="*", choices=FAULTS, metavar="FAULT", help="with faults, all kinds by default"
    )
    options = parser.parse_args()

    began = time.monotonic()
    configs = list(options.configs)
    tortures: dict[str, Torture] = {}
    with tempfile.TemporaryDirectory() as name:
        course = lay_course(Path(name, "course"))

        def torment(number: int) -> None:
            config, seed = configs[number], options.seed * 1000 + number
            kills = options.kills // len(configs) + (number < options.kills % len(configs))
            print(f"{config}: {kills} kills, seed {seed}", flush=True)
            run, room = Course(folder=course, deepspeed=config, hub=options.hub), Path(name, config)
            with contextlib.ExitStack() as stack:
                if options.faults is None:
                    torture = Torture(run, room, seed)
                else:
                    chosen = tuple(options.faults or FAULTS)
                    torture = Faults(run, room, seed, faults=chosen)
                    stack.callback(torture.close)
                tortures[config] = torture
                for count, kill in enumerate(torture.torment(kills), 1):
                    print(f"{time.monotonic() - began:7.0f} s  {config} {count}: {kill}", flush=True)
                for problem in torture.problems:
                    print(f"PROBLEM: {problem}", flush=True)

        with concurrent.futures.ThreadPoolExecutor(options.at_once) as pool:
            list(pool.map(torment, range(len(configs))))
    tortures = {config: tortures[config] for config in configs}
    folder = write_record(
        options.name,
        title="Runs that were killed again and again",
        text=report(tortures, time.monotonic() - began),
        raw={
            config: {
                "runs": torture.runs,
                "problems": torture.problems,
                "kills": [dataclasses.asdict(kill) for kill in torture.kills],
            }
            for config, torture in tortures.items()
        },
        out=options.out,
    )
    print((folder / "README.md").read_text())
    return 1 if any(torture.problems for torture in tortures.values()) else 0


def report(tortures: dict[str, Torture], seconds: float) -> str:
    """What was done, what came of it, and how long it took until everything of a killed start was gone."""
    kills = [kill for torture in tortures.values() for kill in torture.kills]
    rows = {config: figures(torture.kills) for config, torture in tortures.items()} | {"all": figures(kills)}
    names = list(rows["all"])
    lines = [f"| config | runs finished | problems | {' | '.join(names)} |", "|---|" + "---|" * (len(names) + 2)]
    for config, row in rows.items():
        chosen = [tortures[config]] if config in tortures else list(tortures.values())
        runs, problems = sum(one.runs for one in chosen), sum(len(one.problems) for one in chosen)
        lines.append(f"| {config} | {runs} | {problems} | {' | '.join(str(row[key]) for key in names)} |")
    lines += [
        "",
        "A problem would be: a row of metrics or a file of the last checkpoint that differs from the uninterrupted "
        "run's, a start from scratch or from another checkpoint than the newest, one reported damaged, an exit code of "
        "0 after a kill, a process that outlives a kill by a minute, a step missing or doubled on the run's branch.",
        "",
        "| until everything of a killed start is gone, s | median | most |",
        "|---|---|---|",
    ]
    for title, chosen_kills in groups(kills):
        gone = [kill.gone_seconds for kill in chosen_kills]
        if gone:
            lines.append(f"| {title} | {statistics.median(gone):.1f} | {max(gone):.1f} |")
    if faulty := [kill for kill in kills if isinstance(kill, FaultyKill)]:
        lines += ["", "| with | kills | ended of it before the kill | in a save |", "|---|---|---|---|"]
        for fault in FAULTS:
            of_it = [kill for kill in faulty if kill.fault == fault]
            ended, saving = (sum(getattr(kill, name) for kill in of_it) for name in ("ended_by_itself", "in_a_save"))
            lines.append(f"| {fault} | {len(of_it)} | {ended} | {saving} |")
    return "\n".join([*lines, "", f"{seconds / 60:.0f} minutes in all."])


def groups(kills: list[Kill]) -> list[tuple[str, list[Kill]]]:
    return [
        (f"{target}, {moment}", [kill for kill in kills if (kill.target, kill.moment) == (target, moment)])
        for target in TARGETS
        for moment in MOMENTS
    ]


if __name__ == "__main__":
    sys.exit(main())
