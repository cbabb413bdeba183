"""``train --compile`` through the front door: it trains the same and ends, with its cache beside the operators."""

from tests.story.stories import losses, metrics


def test_a_compiled_run_has_the_losses_of_the_plain_one(workshop, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    options = ("--deepspeed", "zero1_fp32", "--max-train-steps", "3", "--max-eval-steps", "2")
    for name in ("plain", "compiled"):
        compiled = ["--compile"] if name == "compiled" else []
        process = workshop.train("--run-name", name, *options, *compiled, output_dir=tmp_path)
        assert process.returncode == 0, process.stderr[-3000:]
    plain, compiled = losses(tmp_path / "plain"), losses(tmp_path / "compiled")
    assert list(compiled) == [1, 2, 3]
    assert all(abs(compiled[step] - loss) <= 2e-6 for step, loss in plain.items())
    assert any((tmp_path / "cache").rglob("*.so")), "nothing was compiled"
    evaluated = [
        [row["eval_loss"] for row in metrics(tmp_path / name) if "eval_loss" in row] for name in ("plain", "compiled")
    ]
    assert max(abs(one - other) for one, other in zip(*evaluated, strict=True)) <= 2e-6
