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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from record import REPOSITORY, record_parser, write_record

sys.path[:0] = [str(REPOSITORY)]

from codeparrot_ds.zero.ds_config import find_ds_config, load_ds_config  # noqa: E402

STAGES = [f"zero{stage}{precision}" for precision in ("_fp32", "") for stage in range(4)]
# A small model on short rows, with steps large enough that every setting does something, and clipping at work.
SMALL = [
    *("--preset", "demo", "--model", str(REPOSITORY / "tests" / "story" / "model.json"), "--seq-length", "64"),
    *("--global-batch-size", "8", "--micro-batch-size", "2", "--num-warmup-steps", "4", "--learning-rate", "1e-3"),
    *("--num-lanes", "8", "--shuffle-buffer", "64", "--num-workers", "1", "--max-train-steps", "60"),
]
WRONG_STEPS = 30


@dataclass(frozen=True, kw_only=True)
class Case:
    """A config with one thing changed.

    Attributes:
        name: what is wrong, for a reader.
        base: the shipped config.
        fields: ``field=value`` of the run config.
        keys: changes of the DeepSpeed config.
        reason: what its verdict should say; None where it should be called the same.
    """

    name: str
    reason: str | None
    base: str = "zero1_fp32"
    fields: str = ""
    keys: Mapping[str, Any] = field(default_factory=dict)


def adam(**params: Any) -> dict[str, Any]:
    """Parameters of the optimizer beside the shipped ones."""
    return {"optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.999], "eps": 1e-8, **params}}}


CASES = [
    Case(name="clipping off", fields="max_grad_norm=0", reason="clipping 0.0, reference 1.0"),
    Case(name="clipping at 0.5", fields="max_grad_norm=0.5", reason="clipping 0.5, reference 1.0"),
    Case(
        name="gradients accumulated in bf16",
        keys={"data_types": {"grad_accum_dtype": "bf16"}},
        reason="accumulation dtype bf16",
    ),
    Case(name="another seed", fields="seed=2", reason="data order: it read other rows (seed 2, reference 1)"),
    Case(name="dropout", fields="dropout=0.1", reason="dropout 0.1, reference 0.0"),
    Case(name="another shuffle buffer", fields="shuffle_buffer=8", reason="data order: it read other rows (shuffle"),
    Case(name="another number of lanes", fields="num_lanes=4", reason="data order: it read other rows (lanes"),
    Case(name="no weight decay", fields="weight_decay=0", reason="weight decay 0.0, reference 0.1"),
    Case(name="learning rate 5% too high", fields="learning_rate=1.05e-3", reason="learning rate 0.00105"),
    Case(name="no warm-up", fields="num_warmup_steps=0", reason="warm-up 0, reference 4"),
    Case(name="linear decay", fields="lr_scheduler_type=linear", reason="schedule linear, reference cosine"),
    Case(name="beta2 0.95", keys=adam(betas=[0.9, 0.95]), reason="betas [0.9, 0.95], reference [0.9, 0.999]"),
    Case(name="epsilon 1e-6", keys=adam(eps=1e-6), reason="epsilon 1e-06, reference 1e-08"),
    Case(name="no bias correction", keys=adam(bias_correction=False), reason="bias correction"),
    Case(name="masked between documents", fields="intra_document_masking=yes", reason="masking between documents"),
    Case(name="bf16 master weights", base="zero2_bf16_states", reason="master weights' dtype"),
    Case(name="control: stage 2", base="zero2_fp32", reason=None),
    Case(name="control: stage 3, micro-batch 4", base="zero3_fp32", fields="micro_batch_size=4", reason=None),
    Case(name="control: bf16", base="zero2", reason=None),
    Case(name="control: bf16 at stage 0, micro-batch 8", base="zero0", fields="micro_batch_size=8", reason=None),
    Case(name="control: bf16, fp32 accumulation", base="zero2_fp32_accumulation", reason=None),
]
# Communication is between ranks.
CASES_ON_2 = [
    Case(
        name="gradients sent in bf16",
        keys={"communication_data_type": "bf16"},
        reason="communication dtype bf16, reference fp32",
    ),
    Case(name="clipping off, 2 ranks", fields="max_grad_norm=0", base="zero2_fp32", reason="clipping 0.0"),
    Case(name="control: stage 3, 2 ranks", base="zero3_fp32", reason=None),
]


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
    configs = []
    for number, case in enumerate(cases):
        path = place / f"case{number}.json"
        path.write_text(json.dumps(merged(load_ds_config(find_ds_config(case.base)), case.keys)))
        configs.append(f"{path},{case.fields}" if case.fields else str(path))
    arguments = ["zero0_fp32", *configs, *SMALL, "--world-sizes", str(world_size), "--steps", str(WRONG_STEPS)]
    arguments += ["--repeats", "1", "--parts-steps", "0", "--no-checkpoint"]
    report = compare(options, place / "out", arguments, OMP_NUM_THREADS="1")  # speed is not what is looked at
    verdicts = [config["verdict"] for config in report["configs"][1:]]
    found = []
    for case, config, verdict in zip(cases, report["configs"][1:], verdicts, strict=True):
        said = verdict["text"] if verdict else f"{config['status']}: {config['reason']}"
        is_same = bool(verdict) and verdict["kind"].startswith("equal")
        right = is_same if case.reason is None else bool(verdict) and case.reason in str(verdict["reason"])
        found.append({"case": case.name, "expected": case.reason, "said": said, "right": right, "verdict": verdict})
    return found


def merged(config: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A config with the keys of another; blocks are merged."""
    for key, value in changes.items():
        config[key] = merged(config.get(key, {}), value) if isinstance(value, Mapping) else value
    return config


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
