"""A CPU without bf16 instructions (or one that was made so): what a run trains in there, and that it learns alike.

The other stories train by name in bf16 and fp32 on whatever CPU this is.
"""

from __future__ import annotations

import pytest

from codeparrot_ds.config.files import load_config
from codeparrot_ds.cpu import cpu_precisions
from tests.needs import needs
from tests.old_cpu import OLD_CPU
from tests.story.stories import log, losses, run_here


def furthest(run, other):
    """The largest difference of the losses of two runs."""
    ours, theirs = losses(run), losses(other)
    assert ours.keys() == theirs.keys() and len(ours) == 20
    return max(abs(ours[step] - theirs[step]) for step in ours)


@needs(on_an_old_cpu=["default"], on_two_ranks=["zero2_fp32"])
def test_a_run_that_names_no_config_trains_in_fp32_there(on_an_old_cpu, on_two_ranks):
    run = on_an_old_cpu["default"]
    assert "ZeRO-2 fp32 on 2 rank(s)" in log(run)
    assert load_config(run / "config.yaml").deepspeed == "zero2_fp32"
    assert furthest(run, on_two_ranks["zero2_fp32"]) <= 5e-6  # other instructions add up in another order


@needs(on_an_old_cpu=["default"], continued=["default"])
def test_it_goes_on_in_fp32_on_any_cpu(continued, on_an_old_cpu):
    run = continued["default"]
    assert "resumed from step 10" in log(run)
    assert load_config(run / "config.yaml").deepspeed == "zero2_fp32"
    assert furthest(run, on_an_old_cpu["default"]) <= 5e-6


@needs(on_an_old_cpu=["zero2"], on_two_ranks=["zero2"])
def test_bf16_by_name_learns_as_it_does_on_a_newer_cpu(on_an_old_cpu, on_two_ranks):
    assert "ZeRO-2 bf16" in log(on_an_old_cpu["zero2"])
    assert furthest(on_an_old_cpu["zero2"], on_two_ranks["zero2"]) <= 1e-3  # as between stages


def test_the_command_says_what_it_chose_and_why(workshop, monkeypatch):
    for name, value in OLD_CPU.items():
        monkeypatch.setenv(name, value)
    said = run_here("check", "--preset", "demo").stdout
    assert "zero2_fp32.json: nothing wrong" in said
    by_name = run_here("check", "zero2")
    assert by_name.returncode == 0 and "no bf16 instructions: matrix products are made in fp32" in by_name.stdout
    elsewhere = run_here("check", "zero2", "--device", "cuda")
    assert "nothing wrong" in elsewhere.stdout


@pytest.mark.skipif("bf16" not in cpu_precisions(), reason="this CPU has no bf16 instructions")
def test_a_newer_cpu_trains_in_bf16_by_default():
    assert "zero2.json: nothing wrong" in run_here("check", "--preset", "demo").stdout
