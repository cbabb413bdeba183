"""Whether the reference solutions of published sets of problems pass their own tests in the sandbox.

python benchmarks/reference_solutions.py HumanEval.jsonl.gz mbpp.jsonl:test HumanEvalPlus.jsonl.gz
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from pathlib import Path

from record import record_parser, write_record

from codeparrot_ds.evaluation.problems import load_problems
from codeparrot_ds.problem_sets.references import check_references
from codeparrot_ds.sandbox.judge import Limits


def main() -> None:
    parser = record_parser(__doc__, name="reference-solutions-cpu")
    parser.add_argument("sources", nargs="+", help="as humaneval --problems")
    parser.add_argument("--seconds", type=float, default=Limits().seconds)
    parser.add_argument("--memory-mb", type=int, default=Limits().memory_bytes >> 20)
    parser.add_argument("--num-workers", type=int, default=None)
    options = parser.parse_args()
    limits = Limits(seconds=options.seconds, memory_bytes=options.memory_mb << 20)
    raw: dict[str, object] = {"limits": vars(limits)}
    lines = ["| problems | SHA-256 of the file | pass | do not pass | s |", "|---|---|---|---|---|"]
    for source in options.sources:
        path = Path(source if Path(source).is_file() else source.rpartition(":")[0])
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        problems = load_problems(source)
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as cache:  # nothing is remembered from before
            os.environ["XDG_CACHE_HOME"] = cache
            found = check_references(
                problems,
                source,
                limits=limits,
                accept_failing=True,
                num_workers=options.num_workers,
            )
        seconds = time.perf_counter() - started
        failed = ", ".join(f"{task_id}: {why}" for task_id, why in found.failed.items()) or "none"
        name = Path(source).name
        lines.append(f"| {name} | {digest[:16]} | {found.passed} of {found.problems} | {failed} | {seconds:.1f} |")
        raw[name] = {"sha256": digest, "seconds": seconds, **found.as_json()}
        print(lines[-1], flush=True)
    folder = write_record(
        options.name,
        title="Reference solutions that pass their own tests",
        text="\n".join(lines),
        raw=raw,
        out=options.out,
    )
    print((folder / "README.md").read_text())


if __name__ == "__main__":
    main()
