"""What only a GPU can show: fp16, CUDA's operators, and that a run goes on there with the very same losses."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tests.story.stories import STEPS, evaluations, log, losses, train_in_turn

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

STAGES = [f"zero{stage}{precision}" for precision in ("", "_fp32", "_fp16") for stage in range(4)]
LAYOUTS = [*STAGES, "zero1_fp32_accumulation", "zero2_bf16_states", "zero2_offload", "zero3_offload_optimizer"]
MOVES = [("zero0", "zero3_fp32"), ("zero3", "zero1"), ("zero2_fp16", "zero3_fp16"), ("zero2_offload", "zero2")]


@pytest.fixture(scope="module")
def whole(workshop) -> dict[str, Path]:
    """Twenty steps with dropout at each layout, saved every ten, and of each stage without dropout."""
    options = {name: ("--deepspeed", name, "--dropout", "0.1", *STEPS) for name in LAYOUTS}
    options |= {f"plain {name}": ("--deepspeed", name, *STEPS) for name in STAGES}
    runs = [
        workshop.options("--run-name", f"{name.replace(' ', '-')}-on-gpu", *chosen) for name, chosen in options.items()
    ]
    outcomes = train_in_turn(runs, ranks=1, device="cuda")
    return {name: Path(outcome["run"]) for name, outcome in zip(options, outcomes, strict=True)}


@pytest.fixture(scope="module")
def continued(workshop, whole) -> dict[tuple[str, str], Path]:
    """Copies that went on from step 10 in new processes, at the same layout and by `MOVES` at another."""
    base, runs, options = workshop.runs.parent / "continued-on-gpu", {}, []
    for old, new in [*((name, name) for name in LAYOUTS), *MOVES]:
        run = base / f"{old}-{new}" / whole[old].name
        shutil.copytree(whole[old], run)
        shutil.rmtree(run / "checkpoints" / "step-00000020")
        runs[old, new] = run
        options.append(
            workshop.options(
                *("--run-name", run.name, "--deepspeed", new, "--dropout", "0.1", *STEPS), output_dir=run.parent
            )
        )
    train_in_turn(options, ranks=1, device="cuda")
    return runs


@pytest.mark.parametrize("name", LAYOUTS)
def test_trains(whole, name):
    got = losses(whole[name])
    assert len(got) == 20 and got[20] < got[1] - 0.3


@pytest.mark.parametrize("name", LAYOUTS)
def test_goes_on_with_the_very_same_losses(whole, continued, name):
    run = continued[name, name]
    assert "resumed from step 10" in log(run)
    assert losses(run) == losses(whole[name])
    assert evaluations(run) == evaluations(whole[name])


@pytest.mark.parametrize(("old", "new"), MOVES)
def test_goes_on_at_another_layout(whole, continued, old, new):
    run = continued[old, new]
    assert "resumed from step 10" in log(run)
    assert losses(run) == pytest.approx(losses(whole[old]), abs=2e-2)


@pytest.mark.parametrize(("precision", "band"), [("", 5e-3), ("_fp32", 1e-4), ("_fp16", 2e-2)])
def test_stages_agree(whole, precision, band):
    first = losses(whole[f"plain zero0{precision}"])
    for stage in (1, 2, 3):
        assert losses(whole[f"plain zero{stage}{precision}"]) == pytest.approx(first, abs=band)
