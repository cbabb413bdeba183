"""Steps that wait for nothing, against DeepSpeed's own, on one real rank; two ranks are in ``tests/training``."""

import copy

import pytest
import torch

from codeparrot_ds.engine.engine import step_outcomes
from codeparrot_ds.engine.fragments import (
    create_optimizer_state,
    masters_to_working_weights,
    optimizer_step_count,
    owned_fragments,
    set_optimizer_step_count,
)
from codeparrot_ds.errors import UserError
from tests.engine.test_engine import equal, train_step, weights_of

STAGES = ["zero0", "zero0_fp32", "zero1", "zero1_fp32", "zero2", "zero2_fp32"]
# Of the loss over 50 steps; in bf16 a last bit of one weight grows to a thousandth (seen: 4.3e-7 and 1.04e-3).
BANDS = {"fp32": 1e-6, "bf16": 2.5e-3}


def state_of(engine) -> dict[str, torch.Tensor]:
    """Weights, masters, moments, and what is counted: whatever a step changes."""
    state = weights_of(engine)
    for fragments in owned_fragments(engine):
        for fragment in fragments:
            state |= {f"{kind} of {fragment.name}": each.clone() for kind, each in fragment.tensors.items()}
    counts = [optimizer_step_count(engine), engine.lr_scheduler.last_epoch]
    return state | {"counts": torch.tensor(counts), "rates": torch.tensor(engine.get_lr(), dtype=torch.float64)}


@pytest.mark.parametrize("name", STAGES)
def test_lean_steps_learn_what_plain_ones_learn(build, name):
    lean, plain = (build(name, lean_step=switch, max_grad_norm=0.5, num_warmup_steps=5) for switch in ("on", "off"))
    assert (lean.lean_step is None, plain.lean_step is None) == (False, True)
    for step in range(50):
        found, expected = train_step(lean, seed=step % 4), train_step(plain, seed=step % 4)
        assert found == pytest.approx(expected, rel=BANDS["fp32" if name.endswith("fp32") else "bf16"]), step
        if step == 0:
            assert float(lean.get_global_grad_norm()) == pytest.approx(float(plain.get_global_grad_norm()), rel=1e-6)
        assert lean.get_lr() == plain.get_lr()
    assert found < 3.0  # of 4.85: it has learned


def test_lean_steps_of_one_rank_are_the_same_at_every_stage(build):
    engines = [build(f"zero{stage}", lean_step="on") for stage in range(3)]
    for step in range(5):
        assert len({train_step(engine, seed=step) for engine in engines}) == 1


@pytest.mark.parametrize("name", ["zero0", "zero0_fp32", "zero2_fp32", "zero1"])
def test_a_bad_step_leaves_no_trace_and_is_known_one_step_late(build, name):
    engine, clean = (build(name, lean_step="on", num_warmup_steps=3) for _ in range(2))
    for step in range(2):
        train_step(engine, seed=step)
        train_step(clean, seed=step)
    assert step_outcomes(engine, 2, wait=True) == [True, True]
    before = state_of(engine)
    train_step(engine, seed=7, poison=float("nan"))
    assert step_outcomes(engine, 1, wait=False) == []
    train_step(engine, seed=7, poison=float("inf"))
    assert step_outcomes(engine, 2, wait=False) == [False]
    assert step_outcomes(engine, 1, wait=True) == [False] and step_outcomes(engine, 0, wait=True) == []
    assert engine.skipped_steps == 2 and engine.optimizer.overflow
    assert equal(state_of(engine), before)
    for step in range(2):
        assert train_step(engine, seed=step) == train_step(clean, seed=step)
    for each in (engine, clean):
        step_outcomes(each, 2, wait=True)
    assert equal(state_of(engine), state_of(clean)) and not engine.optimizer.overflow


@pytest.mark.parametrize("name", ["zero1", "zero2"])
def test_micro_batches_are_added_up_as_before(build, name):
    """The sums of one rank are the very same ones, although nothing goes through a bucket."""
    losses, norms = {}, {}
    for switch in ("on", "off"):
        engine = build(name, lean_step=switch, global_batch_size=12)
        assert engine.gradient_accumulation_steps() == 3
        losses[switch] = [train_step(engine, seed=seed) for seed in range(9)]
        norms[switch] = float(engine.get_global_grad_norm())
    assert losses["on"] == pytest.approx(losses["off"], rel=BANDS["bf16"])
    assert norms["on"] == pytest.approx(norms["off"], rel=2e-2)


@pytest.mark.parametrize("name", STAGES)
@torch.no_grad()
def test_a_continued_run_is_the_same_bit_for_bit(build, name):
    engine, again = (build(name, lean_step="on") for _ in range(2))
    with torch.enable_grad():
        for step in range(3):
            train_step(engine, seed=step)
    step_outcomes(engine, 3, wait=True)
    create_optimizer_state(again)
    for saved, filled in zip(owned_fragments(engine), owned_fragments(again), strict=True):
        for source, target in zip(saved, filled, strict=True):
            for kind, tensor in target.tensors.items():
                tensor.copy_(source.tensors[kind])
    set_optimizer_step_count(again, optimizer_step_count(engine))
    masters_to_working_weights(again)
    again.lr_scheduler.load_state_dict(copy.deepcopy(engine.lr_scheduler.state_dict()))
    for group, source in zip(again.basic_optimizer.param_groups, engine.basic_optimizer.param_groups, strict=True):
        group["lr"] = source["lr"]
    with torch.enable_grad():
        for step in range(3):
            assert train_step(again, seed=step) == train_step(engine, seed=step)
    assert equal(weights_of(again), weights_of(engine))


def test_where_a_step_has_to_wait_it_stays_as_it_is(build, fp16):
    for name in ("zero3", "zero2_fp16", "zero2_offload", "zero1_fp32_accumulation"):
        assert build(name, lean_step="auto").lean_step is None
        with pytest.raises(UserError, match="lean_step on"):
            build(name, lean_step="on")
    engine = build("zero2", lean_step="auto")
    assert (engine.lean_step is None) == (engine.device.type == "cpu")  # which waits for nothing
