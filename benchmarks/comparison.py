"""Comparisons that one can believe: all stages judged and ranked, twice, and configs made subtly wrong on purpose.

python benchmarks/comparison.py --data CORPUS --tokenizer TOKENIZER

First stages 0 to 3 in fp32 and bf16 on 1 and 2 ranks, the demo's shape, in one command; as often as ``--times``, each
in a folder of its own, to see whether the same ranking comes out. Then configs that train otherwise than the reference,
by one setting each, and some that only look different: is each told for what it is, with the right reason?
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from record import REPOSITORY, record_parser, write_record

sys.path[:0] = [str(REPOSITORY)]

from tests.story.wrong_configs import CASES, CASES_ON_2, SMALL, Case, is_right, write_cases  # noqa: E402

STAGES = [f"zero{stage}{precision}" for precision in ("_fp32", "") for stage in range(4)]
WRONG_STEPS = 30


def main() -> None:
    parser = record_parser(__doc__, name="comparison-2-cores")
    parser.add_argument("--data", required=True, help="corpus folder")
    parser.add_argument("--tokenizer", required=True, help="tokenizer folder")
    parser.add_argument("--times", type=int, default=2, help="how often all stages are compared")
    parser.add_argument("--repeats", type=int, default=1, help="trials of each config")
    parser.add_argument("--keep", type=Path, help="folder for the comparisons and their reports, kept")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        wrong = [*compare_cases(options, folder, CASES, 1), *compare_cases(options, folder, CASES_ON_2, 2)]
        stages: list[dict[str, Any]] = []
        record(options, wrong, stages)
        for number in range(options.times):
            stages.append(compare_stages(options, folder / f"stages-{number}"))
            record(options, wrong, stages)


def record(options: argparse.Namespace, wrong: list[dict[str, Any]], stages: list[dict[str, Any]]) -> None:
    """Writes down what is known so far: all of it takes half an hour."""
    text = "\n\n".join([*([stages_text(stages)] if stages else []), wrong_text(wrong)])
    raw = {"stages": stages, "wrong": wrong}
    title = "Comparisons of ZeRO stages, and of configs made wrong"
    place = write_record(options.name, title=title, text=text, raw=raw, out=options.out)
    print((place / "README.md").read_text(), flush=True)


def compare(options: argparse.Namespace, folder: Path, arguments: Sequence[str], **environment: str) -> dict[str, Any]:
    """One command, with the seconds that it took."""
    command = [sys.executable, "-m", "codeparrot_ds", "compare", *arguments]
    command += ["--data", options.data, "--tokenizer", options.tokenizer, "--out", str(folder)]
    started = time.monotonic()
    process = subprocess.run(
        command, cwd=REPOSITORY, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    if process.returncode:
        sys.exit(f"{process.stdout[-2000:]}\n{process.stderr[-2000:]}")
    print(process.stdout, flush=True)
    report = json.loads((folder / "report.json").read_text())
    return report | {"command_seconds": round(time.monotonic() - started, 1), "command": " ".join(arguments)}


# --------------------------------------------------------------------------------------------------------------------
# All stages


def compare_stages(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Eight configs on one and two ranks."""
    arguments = [*STAGES, "--preset", "demo", "--world-sizes", "1,2", "--steps", "30"]
    report = compare(options, folder, [*arguments, "--repeats", str(options.repeats)])
    kept = ("name", "status", "tokens_per_second", "memory", "parts", "checkpoint", "verdict")
    configs = [{key: config[key] for key in kept} for config in report["configs"]]
    figures = ("command", "command_seconds", "recommendation", "reference", "ranking", "loss_bands", "complete")
    return {key: report[key] for key in figures} | {"configs": configs}


def stages_text(runs: Sequence[Mapping[str, Any]]) -> str:
    """The ranking of each run, and whether they agree."""
    first = runs[0]
    lines = [
        f"`codeparrot-ds compare {first['command']}`: "
        + " and ".join(f"{run['command_seconds'] / 60:.1f} minutes" for run in runs),
        "",
        "| config | tokens/s | spread | " + " | ".join(f"again ({n})" for n in range(2, len(runs) + 1)) + " | losses |",
        "|---|---|---|" + "---|" * len(runs),
    ]
    again = [{config["name"]: config for config in run["configs"]} for run in runs]
    for place in first["ranking"]:
        config = again[0][place["name"]]
        speed = config["tokens_per_second"]
        others = "".join(f" {speeds_of(other)[place['name']]['median']:,.0f} |" for other in runs[1:])
        verdict = config["verdict"]["text"]
        figures = f"{speed['median']:,.0f} | {speed['low']:,.0f} to {speed['high']:,.0f} |{others}"
        lines.append(f"| {place['name']} | {figures} {verdict} |")
    counts = [agreement(one, other) for one, other in itertools.combinations(runs, 2)]
    for count in counts:
        lines += [
            "",
            f"Of {count['pairs']} pairs {count['apart']} were told apart in both runs, {count['reversed']} of them in "
            f"the opposite order; {count['tied']} were called a tie in one run or in both.",
        ]
    return "\n".join(lines)


def speeds_of(run: Mapping[str, Any]) -> dict[str, Any]:
    return {config["name"]: config["tokens_per_second"] for config in run["configs"] if config["tokens_per_second"]}


def agreement(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, int]:
    """How many pairs two rankings tell apart, and how many of these the other way round."""
    ties = [{place["name"]: set(place["tied_with"]) for place in run["ranking"]} for run in (one, other)]
    orders = [[place["name"] for place in run["ranking"]] for run in (one, other)]
    count = {"pairs": 0, "apart": 0, "reversed": 0, "tied": 0}
    for a, b in itertools.combinations(orders[0], 2):
        count["pairs"] += 1
        if any(b in tied[a] for tied in ties):
            count["tied"] += 1
            continue
        count["apart"] += 1
        count["reversed"] += orders[1].index(a) > orders[1].index(b)
    return count


# --------------------------------------------------------------------------------------------------------------------
# Wrong on purpose


def compare_cases(
    options: argparse.Namespace, folder: Path, cases: Sequence[Case], world_size: int
) -> list[dict[str, Any]]:
    """All cases in one comparison with fp32 at stage 0."""
    place = folder / f"wrong-on-{world_size}"
    place.mkdir(parents=True, exist_ok=True)
    arguments = [
        "zero0_fp32",
        *write_cases(cases, place),
        *SMALL,
        "--world-sizes",
        str(world_size),
        "--steps",
        str(WRONG_STEPS),
    ]
    arguments += ["--repeats", "1", "--parts-steps", "0", "--no-checkpoint"]
    report = compare(options, place / "out", arguments, OMP_NUM_THREADS="1")  # speed is not what is looked at
    verdicts = [config["verdict"] for config in report["configs"][1:]]
    found = []
    for case, config, verdict in zip(cases, report["configs"][1:], verdicts, strict=True):
        said = verdict["text"] if verdict else f"{config['status']}: {config['reason']}"
        right = bool(verdict) and is_right(case, verdict["kind"], verdict["reason"])
        found.append({"case": case.name, "expected": case.reason, "said": said, "right": right, "verdict": verdict})
    return found


def wrong_text(cases: Sequence[Mapping[str, Any]]) -> str:
    """A line a case."""
    wrong = [case for case in cases if case["expected"] is not None]
    controls = [case for case in cases if case["expected"] is None]
    lines = [
        f"Of {len(wrong)} configs made wrong on purpose {sum(case['right'] for case in wrong)} were called different "
        f"with the right reason; of {len(controls)} that are not wrong {sum(case['right'] for case in controls)} were "
        f"called the same. Reference: zero0_fp32; {WRONG_STEPS} steps.",
        "",
        "| config | as expected | verdict |",
        "|---|---|---|",
    ]
    lines += [f"| {case['case']} | {'yes' if case['right'] else 'no'} | {case['said']} |" for case in cases]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
