"""A learning rate that no model survives: the run skips what is not finite, stops, and names where to go on."""

from __future__ import annotations

import json

from safetensors.torch import load_file

from codeparrot_ds.report.run_report import write_report
from tests.story.stories import metrics


def refuse(constant: str):
    raise AssertionError(f"{constant} is not JSON")


def test_a_run_that_diverges_stops_and_names_its_last_good_checkpoint(workshop, tmp_path):
    """Step 1 has rate 0, step 2 moves every weight by a million: its evaluation and all later losses are NaN."""
    process = workshop.train(
        *("--run-name", "wild", "--deepspeed", "zero0_fp32", "--num-gpus", "2", "--max-train-steps", "20"),
        *("--learning-rate", "1e6", "--num-warmup-steps", "1", "--save-checkpoint-steps", "1", "--max-bad-steps", "3"),
        output_dir=tmp_path,
    )
    run = tmp_path / "wild"
    checkpoint = run / "checkpoints" / "step-00000001"
    assert process.returncode == 3, process.stderr[-3000:]
    assert "Traceback" not in process.stderr
    lines = process.stderr.splitlines()
    skipped = [line for line in lines if line.startswith("step ") and "skipped" in line]
    assert skipped[0] == "step 3 skipped: the loss of all its micro-batches, rows 16 to 23, is nan"
    assert len(skipped) == 3 and skipped[2].endswith("(3 in a row; the run stops at 3)")
    (error,) = [line for line in lines if "error: " in line]
    assert "3 steps in a row were skipped, the last was step 5: the loss of all its micro-batches" in error
    assert error.endswith(f"the last good checkpoint is {checkpoint}")

    # Neither the weights that gave NaN nor those of the steps after them were saved; what was is whole.
    assert [path.name for path in (run / "checkpoints").glob("step-*")] == [checkpoint.name]
    (weights,) = (checkpoint / "export").glob("*.safetensors")
    assert all(tensor.abs().max() < 2 for tensor in load_file(weights).values())
    assert json.loads((run / "run.json").read_text())["outcome"] == {"status": "diverged", "step": 5, "run": str(run)}

    for line in (run / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    rows = {row["step"]: row for row in metrics(run) if "loss" in row}
    assert [rows[step]["skipped_steps"] for step in (1, 2, 3, 4)] == [0, 0, 1, 2]
    assert rows[3]["loss"] == rows[4]["grad_norm"] == "nan" and isinstance(rows[2]["loss"], float)
    assert rows[3]["learning_rate"] == rows[4]["learning_rate"]
    write_report([run])
    figures = json.loads((run / "report" / "report.json").read_text())["runs"][0]
    assert (figures["status"], figures["skipped_steps"], figures["non_finite_losses"]) == ("diverged", 2, 2)

    log = (run / "log" / "debug_1.log").read_text()
    assert all(f"WARNING codeparrot_ds.bad_steps: {line}" in log for line in skipped)
    assert "step 3: the loss of rows 17 and 19 (rank 1, lanes 1 and 3, " in log and ".jsonl near byte " in log
    assert "row 17 (lane 1) begins " in log and "row 16 (lane 0)" not in log
    assert "row 16 (lane 0) begins " in (run / "log" / "debug_0.log").read_text()
