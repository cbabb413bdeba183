"""``train --compile`` through the launcher: it trains the same, resumes exactly, and keeps its cache."""

from tests.story.stories import losses, metrics


def test_a_compiled_run_has_the_losses_of_the_plain_one_and_resumes(workshop, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    options = ("--deepspeed", "zero1_fp32", "--max-train-steps", "3", "--max-eval-steps", "2")
    resumed = ("--compile", "--resume", str(tmp_path / "compiled" / "checkpoints" / "step-00000002"))
    runs = {"plain": (), "compiled": ("--compile", "--save-checkpoint-steps", "2"), "resumed": resumed}
    for name, more in runs.items():
        process = workshop.train("--run-name", name, *options, *more, output_dir=tmp_path)
        assert process.returncode == 0, process.stderr[-3000:]
        # One graph for all blocks; none for an evaluation, before or after.
        assert process.stderr.count("compiled the model's blocks: 1 graph(s) in ") == (name != "plain"), process.stderr
        assert process.stderr.count("graph(s)") == (name != "plain")
    plain, compiled = losses(tmp_path / "plain"), losses(tmp_path / "compiled")
    assert list(compiled) == [1, 2, 3]
    assert all(abs(compiled[step] - loss) <= 2e-6 for step, loss in plain.items())
    assert losses(tmp_path / "resumed")[3] == compiled[3]
    assert any((tmp_path / "cache").rglob("*.so")), "nothing was compiled"
    evaluated = [
        [row["eval_loss"] for row in metrics(tmp_path / name) if "eval_loss" in row] for name in ("plain", "compiled")
    ]
    assert evaluated[0][0] == evaluated[1][0]
    assert max(abs(one - other) for one, other in zip(evaluated[0][-1:], evaluated[1][-1:], strict=True)) <= 2e-6
