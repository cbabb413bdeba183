"""A real comparison: the command line, fresh launches, and a report."""

from __future__ import annotations

import json
import sys

import pytest

from codeparrot_ds.compare.results import FOUND
from tests.story.stories import run_command, run_here

WRONG = "zero2_fp32,max_grad_norm=0"
# As for the Hugging Face Trainer, which fills in what is "auto".
TRAINER = {
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}},
    "zero_optimization": {"stage": 1, "reduce_bucket_size": 5e6},
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": 4,
}


def command(workshop, folder, *more):
    """Arguments of a comparison on one rank."""
    options = workshop.options(*more)
    for option in ("--wandb", "--hub", "--output-dir", "--log-steps"):  # a comparison decides these
        place = options.index(option)
        del options[place : place + 2]
    steps = ("--steps", "6", "--warmup-steps", "2", "--repeats", "1")
    trainer = folder.parent / "trainer.json"
    trainer.write_text(json.dumps(TRAINER))
    return [
        "compare",
        "zero0_fp32",
        WRONG,
        str(trainer),
        "--preset",
        *options,
        "--world-sizes",
        "1",
        *steps,
        "--out",
        str(folder),
    ]


@pytest.fixture(scope="module")
def comparison(workshop, tmp_path_factory):
    """Three configs on one rank: the reference, one without clipping, and one that was written for the Trainer."""
    folder = tmp_path_factory.mktemp("compared") / "out"
    process = run_command([sys.executable, "-m", "codeparrot_ds", *command(workshop, folder)])
    assert process.returncode == 0, process.stderr[-3000:]
    return folder, process.stdout, json.loads((folder / "report.json").read_text())


def test_what_was_measured(comparison):
    folder, said, report = comparison
    assert report["complete"] and report["reference"] == "zero0_fp32 on 1"
    for config in report["configs"]:
        assert config["status"] == "finished" and len(config["losses"]) == 6
        assert config["tokens_per_second"]["steps"] == 4
        parts = config["parts"]
        assert parts["steps"] == 3 and all(parts["seconds"][name] > 0 for name in ("data", "forward", "backward"))
        assert 0.5 * parts["total_seconds"] < sum(parts["seconds"].values()) <= parts["total_seconds"]
        assert config["checkpoint"]["error"] is None and config["checkpoint"]["bytes"] > 12 * 500_000
        assert config["memory"]["predicted_device_bytes"] and config["memory"]["host_grown_bytes"] > 10**6
        assert config["startup_seconds"] > 0.5
    assert "report: " in said and report["recommendation"] in said
    assert not any((folder / "runs").glob("*/checkpoints"))  # measured, and gone


def test_all_are_held_against_one_peak(comparison):
    folder, _, report = comparison
    peak = json.loads((folder / "comparison.json").read_text())["peak"]
    assert peak == report["peak"] and peak["whole_machine"]
    for path in (folder / "trials").glob(f"*/{FOUND}"):
        found = json.loads(path.read_text())
        assert found["peak_flops"] == peak["flops"]
        for row in found["rows"]:
            assert row["mfu"] == pytest.approx(row["tokens_per_second"] * found["flops_per_token"] / peak["flops"])
    mfu = {config["name"]: config["mfu"] for config in report["configs"]}
    assert sorted(mfu, key=mfu.get, reverse=True) == [place["name"] for place in report["ranking"]]


def test_the_same_weights_and_rows_and_what_parts(comparison):
    folder, _, report = comparison
    found = [json.loads(path.read_text()) for path in sorted((folder / "trials").glob(f"*/{FOUND}"))]
    assert len(found) == 4  # with the sensitivity run, whose weights have errors
    assert len({tuple(each["row_hashes"]) for each in found}) == 1
    assert len({each["weights"]["sha256"] for each in found}) == 2
    verdicts = {config["name"]: config["verdict"] for config in report["configs"]}
    assert verdicts["zero0_fp32 on 1"]["kind"] == "reference"
    assert verdicts["trainer on 1"]["kind"] in ("equal bit for bit", "equal to rounding")
    wrong = verdicts[f"{WRONG} on 1"]
    # Adam's first update is the same for a gradient and its half; from the second on the two are weighed.
    assert (wrong["kind"], wrong["step"]) == ("different", 3)
    assert "clipping 0.0, reference 1.0" in wrong["reason"]
    assert "max_grad_norm" not in report["recommendation"]
    micro_batches = {config["name"]: config["micro_batch_size"] for config in report["configs"]}
    assert micro_batches == {"zero0_fp32 on 1": 2, f"{WRONG} on 1": 2, "trainer on 1": 4}


def test_the_page_stands_alone(comparison):
    folder, _, report = comparison
    page = (folder / "report.html").read_text()
    assert report["recommendation"] in page and "clipping 0.0, reference 1.0" in page
    assert 'src="http' not in page and "<link" not in page and "<script" not in page
    assert page.count("data:image/png;base64,") >= 8  # four charts in two themes
    assert "prefers-color-scheme: dark" in page and "@media print" in page
    markdown = (folder / "report.md").read_text()
    for name in ("memory-speed.png", "parts.png", "losses.png", "differences.png"):
        assert f"]({name})" in markdown and (folder / name).is_file()


def test_it_goes_on_only_as_it_began(comparison, workshop):
    folder, _, report = comparison
    answer = run_here(*command(workshop, folder, "--seed", "2"))
    assert answer.returncode == 2 and "seed was 1 and is 2" in answer.stderr
    answer = run_here(*command(workshop, folder))  # nothing is left to do
    assert answer.returncode == 0 and report["recommendation"] in answer.stdout and "[1/" not in answer.stdout
