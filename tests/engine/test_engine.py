"""The DeepSpeed engine on one real rank: groups, schedule, and the fixes of what DeepSpeed does."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from codeparrot_ds.config.schedule import learning_rate_factor
from codeparrot_ds.engine.deepspeed_fixes import forget_beta_powers
from codeparrot_ds.engine.engine import loss_scale, lowest_loss_scale
from codeparrot_ds.engine.fragments import optimizer_step_count
from codeparrot_ds.model.gpt2 import build_model
from tests.engine.conftest import SHAPE

STAGES = ["zero0", "zero0_fp32", "zero1", "zero1_fp32", "zero2", "zero2_fp32", "zero3", "zero3_fp32"]


def train_step(engine, seed=0, poison=None) -> float:
    """One optimizer step on random rows, the same for the same seed; ``poison`` multiplies the loss."""
    ids = torch.randint(SHAPE.vocab_size, (4, 32), generator=torch.Generator().manual_seed(seed)).to(engine.device)
    loss = engine(input_ids=ids, labels=ids).loss
    if poison is not None:
        loss = loss * poison
    engine.backward(loss)
    engine.step()
    return loss.item()


def weights_of(engine) -> dict[str, torch.Tensor]:
    """The weights that the forward pass uses; ZeRO-3's are gathered."""
    import deepspeed

    weights = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter] if hasattr(parameter, "ds_id") else []):
            weights[name] = parameter.detach().clone()
    return weights


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("name", STAGES)
def test_initial_weights_are_the_same_at_every_stage(build, name):
    dtype = torch.float32 if name.endswith("fp32") else torch.bfloat16
    plain = {
        key: value.detach().to(dtype) for key, value in build_model(SHAPE, eos_token_id=0, seed=1).named_parameters()
    }
    engine = build(name)
    assert equal(weights_of(engine), plain)
    assert optimizer_step_count(engine) == 0
    assert loss_scale(engine) == 1.0 and lowest_loss_scale(engine) is None


@pytest.mark.parametrize("name", ["zero0", "zero0_fp32", "zero2", "zero3"])
def test_schedule_and_groups(build, name):
    engine = build(name, num_warmup_steps=2, weight_decay=0.2)
    assert [group["weight_decay"] for group in engine.basic_optimizer.param_groups] == [0.2, 0.0]
    before, rates = weights_of(engine), []
    for step in range(4):
        rates.append(engine.get_lr()[0])
        train_step(engine)
        assert equal(weights_of(engine), before) == (step == 0)  # the first update of a warm-up has rate 0
    assert rates == pytest.approx([1e-2 * learning_rate_factor("cosine", step, 2, 50) for step in range(4)])
    assert engine.global_steps == 4 and engine.skipped_steps == 0


@pytest.mark.parametrize(("precision", "band"), [("", 2e-2), ("_fp32", 1e-5), ("_fp16", 5e-3)])
def test_all_stages_learn_alike(build, fp16, precision, band):
    losses, norms = {}, {}
    for stage in range(4):
        engine = build(f"zero{stage}{precision}")
        losses[stage] = [train_step(engine)]
        norms[stage] = float(engine.get_global_grad_norm())
        losses[stage] += [train_step(engine) for _ in range(7)]
    assert losses[0][-1] < losses[0][0] - 0.5
    for stage in (0, 1, 3):
        assert losses[stage] == pytest.approx(losses[2], abs=band), stage
        assert norms[stage] == pytest.approx(norms[2], rel=1e-2), stage


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.25])
@pytest.mark.parametrize("name", ["zero0_fp32", "zero2_fp32"])
def test_gradient_norm_of_stage_0_in_fp32(build, name, max_grad_norm):
    engine = build(name, max_grad_norm=max_grad_norm)
    model = build_model(SHAPE, eos_token_id=0, seed=1, device=engine.device)
    ids = torch.randint(SHAPE.vocab_size, (4, 32), generator=torch.Generator().manual_seed(0)).to(engine.device)
    model(input_ids=ids, labels=ids).loss.backward()
    norm = sum(parameter.grad.double().square().sum() for parameter in model.parameters()).sqrt().item()
    assert norm > 0.5  # so that clipping at 0.25 does something
    train_step(engine)
    assert float(engine.get_global_grad_norm()) == pytest.approx(norm, rel=1e-6)
    train_step(engine)
    train_step(engine, poison=float("nan"))
    assert not torch.isfinite(torch.tensor(float(engine.get_global_grad_norm())))


@pytest.mark.parametrize("optimizer", [{}, {"torch_adam": True}], ids=["DeepSpeed's Adam", "torch's Adam"])
def test_construction_at_stage_0_in_bf16_leaves_no_trace(build, optimizer):
    engine = build("zero0", optimizer=optimizer, weight_decay=0.5)
    assert optimizer_step_count(engine) == 0
    for state in engine.basic_optimizer.state.values():
        assert not state["exp_avg"].any() and not state["exp_avg_sq"].any()
    masters = [master for group in engine.basic_optimizer.param_groups for master in group["params"]]
    total = sum(master.double().sum().item() for master in masters)
    weights = sum(tensor.double().sum().item() for tensor in weights_of(engine).values())
    assert total == pytest.approx(weights, rel=1e-12)
    reference = build("zero1", optimizer=optimizer, weight_decay=0.5)
    for _ in range(4):
        assert train_step(engine) == pytest.approx(train_step(reference), abs=2e-2)


@pytest.mark.parametrize("optimizer", [{}, {"torch_adam": True}], ids=["DeepSpeed's Adam", "torch's Adam"])
def test_deepspeed_still_steps_while_it_builds_stage_0(build, optimizer):
    """When this fails, DeepSpeed has fixed it: remove ``undo_construction_step``."""
    engine = build("zero0", optimizer=optimizer, fixed=False)
    assert optimizer_step_count(engine) == 1


@pytest.mark.parametrize("optimizer", [{}, {"torch_adam": True}], ids=["DeepSpeed's Adam", "torch's Adam"])
def test_the_loss_of_stage_0_in_fp16_is_scaled(build, fp16, optimizer):
    """When the last assertion fails, DeepSpeed has fixed it: remove ``scale_the_loss_at_stage0``."""
    norms = []
    for name, fixed in (("zero1_fp16", True), ("zero0_fp16", True), ("zero0_fp16", False)):
        engine = build(name, optimizer=optimizer, fixed=fixed)
        assert loss_scale(engine) == 65_536
        train_step(engine)
        norms.append(float(engine.get_global_grad_norm()))
    assert norms[1] == pytest.approx(norms[0], rel=1e-2)
    assert norms[2] == pytest.approx(norms[0] if optimizer else norms[0] / 65_536, rel=1e-2)  # torch's: not divided


def test_deepspeed_still_lets_a_nan_into_the_weights_of_stage_0_in_fp32(build):
    """When this fails, DeepSpeed has fixed it: remove ``guard_bare_optimizer``."""
    engine = build("zero0_fp32", fixed=False)
    train_step(engine, poison=float("nan"))
    assert not all(tensor.isfinite().all() for tensor in weights_of(engine).values())


class LargestFP64(TorchDispatchMode):
    """Notes the most numbers of an fp64 tensor that anything makes."""

    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.float64:
            self.most = max(self.most, result.numel())
        return result


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero2_fp32", "zero3", "zero3_fp32"])
def test_the_norm_is_exact_without_an_fp64_copy_of_a_gradient(build, name):
    """4,096 numbers have the token embeddings, 1,056 the positions': a whole row and a part of one."""
    norms, most = {}, {}
    for fixed in (True, False):
        engine = build(name, fixed=fixed, max_grad_norm=0.25)
        with LargestFP64() as seen:
            train_step(engine)
        norms[fixed], most[fixed] = float(engine.get_global_grad_norm()), seen.most
    assert norms[True] == pytest.approx(norms[False], rel=1e-6) and norms[True] > 0.5
    assert most[True] < 1200 and most[False] >= 4096  # when the second fails, DeepSpeed makes no copies any more


def test_deepspeed_still_steps_on_a_nan_that_it_does_not_check(build):
    """When this fails, DeepSpeed has fixed it: remove ``decide_by_the_norm``."""
    for name, blocks in (
        ("zero2", {"bf16": {"check_grad_overflow": False}}),
        ("zero2_fp32", {"zero_optimization": {"compute_grad_norm": False}}),
    ):
        engine = build(name, fixed=False, blocks=blocks, max_grad_norm=0.0)
        train_step(engine, poison=float("nan"))
        assert not all(tensor.isfinite().all() for tensor in weights_of(engine).values())


def test_deepspeed_still_keeps_the_offloaded_sums_of_a_step_that_it_skips(build):
    """When this fails, DeepSpeed has fixed it: remove ``drop_offloaded_sums``."""
    sums = {"data_types": {"grad_accum_dtype": "fp32"}}
    engine = build("zero2_offload", fixed=False, blocks=sums)
    train_step(engine, poison=float("nan"))
    train_step(engine)
    assert engine.skipped_steps == 2


def test_deepspeed_still_takes_a_norm_for_finite_at_stage_3_whose_square_is_not(build):
    """When this fails, DeepSpeed has fixed it: remove ``bound_stage3_norms``."""
    engine = build("zero3", fixed=False, max_grad_norm=0.0)
    train_step(engine, poison=1e25)
    assert engine.skipped_steps == 0
    moments = [state["exp_avg_sq"] for state in engine.basic_optimizer.state.values()]
    assert not all(moment.isfinite().all() for moment in moments)


def test_deepspeed_still_raises_at_the_smallest_loss_scale(build, fp16):
    """When this fails, DeepSpeed has fixed it: remove ``let_the_loss_scale_rest``."""
    scale = {"fp16": {"initial_scale_power": 4, "min_loss_scale": 16, "hysteresis": 1}}
    engine = build("zero2_fp16", fixed=False, blocks=scale)
    with pytest.raises(Exception, match="Current loss scale already at minimum"):
        train_step(engine, poison=float("inf"))
    engine = build("zero2_fp16", blocks=scale)
    train_step(engine, poison=float("inf"))
    assert engine.skipped_steps == 1 and (loss_scale(engine), lowest_loss_scale(engine)) == (16.0, 16)


def test_deepspeed_still_keeps_beta_powers_between_steps(only_rank):
    """When this fails, DeepSpeed has fixed it: remove ``forget_beta_powers``.

    The same gradients, step by step: with the powers of one step kept for the next, the last bits are others.
    """
    from deepspeed.ops.adam import FusedAdam

    after = []
    for fixed in (True, False):
        weights, random = torch.nn.Parameter(torch.zeros(4096)), torch.Generator().manual_seed(0)
        optimizer = FusedAdam([weights], lr=1e-2)
        if fixed:
            forget_beta_powers(SimpleNamespace(basic_optimizer=optimizer))
        for _ in range(50):
            weights.grad = torch.randn(4096, generator=random)
            optimizer.step()
        after.append(weights.detach().clone())
    assert not torch.equal(*after) and torch.allclose(*after, atol=1e-5)


class Asked(TorchDispatchMode):
    """Counts how often the host asks for a number of a tensor."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["zero0", "zero0_fp32", "zero2"])
def test_deepspeed_still_waits_for_the_device_in_a_step(build, name):
    """When this fails without lean steps, DeepSpeed waits for nothing by itself: remove ``step_without_waiting``."""
    asked = {}
    for switch in ("off", "on"):
        engine = build(name, lean_step=switch)
        train_step(engine)
        ids = torch.zeros(4, 32, dtype=torch.long, device=engine.device)
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        with Asked() as asked[switch]:
            engine.step()
    assert asked["on"].count == 1  # what became of the step before, which has long been known
    assert asked["off"].count > (1 if name == "zero2" else 0)


def test_activation_checkpointing_recomputes_and_changes_nothing(build):
    engine, plain = build("zero2_activation_checkpointing"), build("zero2")
    calls = []
    engine.module.transformer.h[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    assert [train_step(engine) for _ in range(3)] == pytest.approx([train_step(plain) for _ in range(3)], abs=1e-4)
    assert len(calls) == 6  # once forward, once again in the backward pass


LARGE = """
import ctypes
import torch
from codeparrot_ds.engine.engine import keep_freed_pages
keep_freed_pages()
end_of_heap = ctypes.CDLL(None).sbrk
end_of_heap.argtypes, end_of_heap.restype = [ctypes.c_long], ctypes.c_void_p
before = end_of_heap(0)
torch.empty(5 * 2**29, dtype=torch.uint8)  # untouched: no memory is taken for it
assert end_of_heap(0) - before > 2 * 2**30
"""

FAULTS = """
import json, resource
import torch
from codeparrot_ds.engine.engine import keep_freed_pages
keep_freed_pages()
keep_freed_pages()
for step in range(30):
    if step == 10:
        before = resource.getrusage(resource.RUSAGE_SELF)
    torch.ones(16 * 2**20)
after = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({"faults": after.ru_minflt - before.ru_minflt, "grown": after.ru_maxrss - before.ru_maxrss}))
"""


def test_more_than_two_gigabytes_of_freed_pages_are_kept_too():
    repository = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", LARGE], cwd=repository, check=True)


def test_freed_pages_are_kept_and_used_again():
    repository = Path(__file__).resolve().parents[2]
    answer = subprocess.run([sys.executable, "-c", FAULTS], cwd=repository, capture_output=True, text=True, check=True)
    answer = json.loads(answer.stdout)
    assert answer["faults"] < 16_384  # what a single tensor of 64 MiB would take from the system; here are twenty
    assert answer["grown"] < 64 * 1024  # KiB


def test_muon_is_imported_without_a_compiler_and_still_compiled():
    """In a fresh process: importing it would bring inductor in, which takes a third of a second."""
    script = """
import sys
import torch
from codeparrot_ds.engine.deepspeed_fixes import import_muon_uncompiled
import deepspeed
from deepspeed.runtime import compiler
before = compiler.compile
import_muon_uncompiled()
assert "torch._inductor.compile_fx" not in sys.modules, "inductor was imported"
assert compiler.compile is before
from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam
from deepspeed.runtime.zero.muon import original_muon
asked = []
torch.compile = lambda function: asked.append(function.__name__) or function
matrix = torch.randn(8, 8)
first, second = (original_muon.zeropower_via_newtonschulz5(matrix, steps=5) for _ in range(2))
assert torch.equal(first, second) and asked == ["zeropower_via_newtonschulz5"], asked
"""
    environment = os.environ | {"DS_ACCELERATOR": "cpu"}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment, timeout=120)
