"""Slurm: tasks of ``srun`` are the ranks of one run; a batch script without it starts the launcher."""

import os
import subprocess
import sys

from tests.needs import needs
from tests.slurm import batch, step
from tests.story.stories import REPOSITORY, STEPS, clean_environment, losses


@needs(on_two_ranks=["zero2"])
def test_two_tasks_of_srun_train_one_run(workshop, on_two_ranks, tmp_path):
    """Without an address to meet at, and without a name of the run: each way to start it, bit for bit as two ranks."""
    options = workshop.options("--deepspeed", "zero2", *STEPS, output_dir=tmp_path / "runs")
    tasks = []
    for rank, variables in enumerate(step("localhost", (2,), job=os.getpid())):
        way = (["codeparrot_ds", "train"], ["codeparrot_ds.train"])[rank]
        with (tmp_path / f"said-{rank}").open("w") as said:
            tasks.append(
                subprocess.Popen(
                    [sys.executable, "-m", *way, *options],
                    env=clean_environment(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", **variables),
                    cwd=REPOSITORY,
                    stdout=said,
                    stderr=said,
                )
            )
    try:
        codes = [task.wait(timeout=300) for task in tasks]
    finally:
        for task in tasks:
            task.kill()
    said = (tmp_path / "said-0").read_text()
    assert codes == [0, 0], said[-3000:]
    assert "srun has started 2 ranks: they train one run and meet at localhost:" in said
    (run,) = (tmp_path / "runs").iterdir()
    assert losses(run) == losses(on_two_ranks["zero2"])


def test_a_batch_script_starts_the_launcher(workshop, monkeypatch):
    """It checks what the launcher is to start, which a rank does not: refused here, before one is started."""
    for name, value in (batch("localhost", 2, job=os.getpid()) | {"MASTER_ADDR": "localhost"}).items():
        monkeypatch.setenv(name, value)
    process = workshop.refuse("--deepspeed", "zero2", *STEPS, "--num-gpus", "2", "--hostfile", "none-such")
    assert process.returncode == 2 and "hostfile none-such does not exist" in process.stderr
