"""Where the seconds go between ``codeparrot-ds train`` and the first training step, operators already built.

python benchmarks/startup.py --data CORPUS --tokenizer TOKENIZER --rounds 5
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from record import REPOSITORY, record_parser, write_record

EVALUATION = "first evaluation"


def main() -> None:
    parser = record_parser(__doc__, name="startup-cpu")
    parser.add_argument("--data", required=True, help="corpus folder")
    parser.add_argument("--tokenizer", required=True, help="tokenizer folder")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--deepspeed", default="zero2")
    parser.add_argument("--num-gpus", type=int, default=1, help="ranks")
    options = parser.parse_args()

    laps: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as output_dir:
        for number in range(options.rounds + 1):
            command = [
                *(sys.executable, "-m", "codeparrot_ds", "train", "demo", "--deepspeed", options.deepspeed),
                *("--data", options.data, "--tokenizer", options.tokenizer, "--max-train-steps", "1"),
                *("--output-dir", output_dir, "--run-name", f"round-{number}", "--num-gpus", str(options.num_gpus)),
            ]
            subprocess.run(command, check=True, capture_output=True, text=True, cwd=REPOSITORY)
            record = json.loads((Path(output_dir) / f"round-{number}" / "run.json").read_text())
            if number:  # the first one warms the disk's cache and builds what is missing
                laps.append(record["starts"][-1]["startup_seconds"])
                print(number, f"{sum(laps[-1].values()):.1f} s", laps[-1], flush=True)

    totals = [sum(one.values()) for one in laps]
    without = [total - one[EVALUATION] for total, one in zip(totals, laps, strict=True)]
    lines = ["| part | median s | min - max |", "|---|---|---|"]
    for name in laps[0]:
        values = [one[name] for one in laps]
        lines.append(f"| {name} | {statistics.median(values):.2f} | {min(values):.2f} - {max(values):.2f} |")
    for name, values in (("**all**", totals), (f"all but the {EVALUATION}", without)):
        lines.append(f"| {name} | {statistics.median(values):.2f} | {min(values):.2f} - {max(values):.2f} |")
    folder = write_record(
        options.name,
        title=f"Launch to first training step, demo shape, {options.num_gpus} rank(s)",
        text="\n".join(lines),
        raw=laps,
        out=options.out,
    )
    print((folder / "README.md").read_text())


if __name__ == "__main__":
    main()
