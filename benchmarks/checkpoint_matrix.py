"""Every layout of an engine saved and reopened at every other: ZeRO stages, world sizes, precisions, CPU offload.

    python benchmarks/checkpoint_matrix.py

What is compared, and with what, is said in ``tests/checkpoint/layouts.py``; a test keeps to
a selection of the pairs. Exits with 1 where a bar is missed.
"""

from __future__ import annotations

import itertools
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from record import REPOSITORY, record_parser, write_record

sys.path[:0] = [str(REPOSITORY)]
from tests.checkpoint.layouts import (  # noqa: E402
    CONTROLS,
    OFFLOADED,
    STAGES,
    WORLD_SIZES,
    Layout,
    Results,
    exact_job,
    loss_limit,
    pair_class,
    pair_jobs,
    plain_job,
    plans_of,
    run_plans,
    save_job,
)

CONTROLLED = (Layout("zero3_fp32", 2), Layout("zero2", 2))


def main() -> None:
    parser = record_parser(__doc__, name="checkpoint-matrix")
    parser.add_argument("--configs", nargs="+", default=STAGES + OFFLOADED)
    parser.add_argument("--world-sizes", nargs="+", type=int, default=list(WORLD_SIZES))
    parser.add_argument("--timeout", type=float, default=4 * 3600, help="seconds")
    options = parser.parse_args()

    layouts = list(itertools.starmap(Layout, itertools.product(options.configs, options.world_sizes)))
    pairs = list(itertools.product(layouts, layouts))
    controlled = [layout for layout in CONTROLLED if layout in layouts]
    controls = [plain_job(source, source, control) for source in controlled for control in ("", *CONTROLS)]
    jobs = [job for pair in pairs for job in pair_jobs(*pair)]
    plans = plans_of([*jobs, *map(exact_job, layouts), *controls])
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-matrix-"))
    total = sum(map(len, plans.values()))
    told = 0

    def tell(done: int) -> None:
        nonlocal told
        if done >= told + 50:
            told = done
            print(f"{done} of {total}", flush=True)

    results = run_plans(plans, folder, timeout=options.timeout, tell=tell)
    shutil.rmtree(folder)
    problems = found_problems(results, layouts, pairs)
    raw = [answer | {"result": slim(answer)} for answer in results.answers]
    text = report(results, layouts, pairs, controlled, problems)
    print(
        write_record(
            options.name,
            title="Every layout's checkpoint reopened at every other",
            text=text,
            raw=raw,
            out=options.out,
        )
    )
    sys.exit(1 if problems else 0)


def found_problems(results: Results, layouts: list[Layout], pairs: list[tuple[Layout, Layout]]) -> list[str]:
    """Every bar that was missed, in words."""
    problems = [f"{layout}: {problem}" for layout in layouts for problem in results.problems_of_source(layout)]
    problems += [f"{layout}: {problem}" for layout in layouts for problem in results.problems_of_exact(layout)]
    for source, target in pairs:
        problems += [f"{source} → {target}: {problem}" for problem in results.problems_of_pair(source, target)]
    return problems


def slim(answer: dict[str, Any]) -> dict[str, Any]:
    """A result as the record keeps it: names that differ are counted, there being none."""
    result = dict(answer["result"])
    for key in ("differing", "differing_weights"):
        if key in result:
            result[key] = len(result[key])
    return result


def report(
    results: Results,
    layouts: list[Layout],
    pairs: list[tuple[Layout, Layout]],
    controlled: list[Layout],
    problems: list[str],
) -> str:
    """The record's body."""
    exact = sum(not results.problems_of_exact(layout) for layout in layouts)
    exports = [results.of(save_job(layout))["export"] for layout in layouts]
    worst_evaluation = max(export["evaluation_difference"] for export in exports)
    lines = [
        f"{len(layouts)} layouts, {len(pairs)} pairs; the largest difference of the next 10 losses (nats a token):",
        "",
        "| pairs | how many | state differs | losses, largest | at | allowed |",
        "|---|---|---|---|---|---|",
        *pair_rows(results, pairs),
        "",
        f"Same layout, 24 steps with dropout 0.1 and 3 micro-batches a step, a new engine after 12: {exact} of "
        f"{len(layouts)} runs end with the same losses, weights, moments and generators, bit for bit; so does the run "
        "that was saved and went on while its checkpoint was written.",
        "",
        f"Exports: {sum(export['differing'] == [] for export in exports)} of {len(exports)} have the engine's working "
        "weights bit for bit when plain transformers loads them; its evaluation loss is off by "
        f"{worst_evaluation:.1e} at most.",
        "",
        "What a damaged state would show in the same 10 losses:",
        "",
        "| saved at | damage | losses, largest |",
        "|---|---|---|",
    ]
    for source in controlled:
        for control in CONTROLS:
            lines.append(f"| `{source}` | {control} | {results.control_difference(source, source, control):.2g} |")
    lines += ["", *(f"- MISSED: {problem}" for problem in problems)] if problems else ["", "No bar was missed."]
    return "\n".join(lines)


def pair_rows(results: Results, pairs: list[tuple[Layout, Layout]]) -> list[str]:
    """A row of the table for each class of pairs, the worst pair named."""
    classes: dict[str, list[tuple[Layout, Layout]]] = {}
    for pair in pairs:
        classes.setdefault(pair_class(*pair), []).append(pair)
    rows = []
    for name, members in sorted(classes.items()):
        worst = max(members, key=lambda pair: results.loss_difference(*pair))
        differing = sum(any("loss" not in problem for problem in results.problems_of_pair(*pair)) for pair in members)
        rows.append(
            f"| {name} | {len(members)} | {differing} | {results.loss_difference(*worst):.2g} | "
            f"`{worst[0]}` → `{worst[1]}` | {loss_limit(*worst):.0e} |"
        )
    return rows


if __name__ == "__main__":
    main()
