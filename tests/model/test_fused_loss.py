"""The loss that writes its gradient over the logits: Triton's kernels in its interpreter, and what is around them."""

import importlib.util
import logging
import os
import sys

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from codeparrot_ds.model import fused_loss, loss
from codeparrot_ds.model.fused_loss import FusedCrossEntropy, fused_loss_works
from codeparrot_ds.model.loss import causal_lm_loss, chunked_lm_loss, fused_lm_loss
from tests.model.loss_kernels import gradient_by_formula, kernels_on_cpu, losses_by_formula
from tests.model.tiny_gpt2 import build, rows


@pytest.fixture
def kernels(monkeypatch):
    """Triton's in its interpreter (``tests/conftest.py``), with few logits at a time, so that a row takes several."""
    if torch.cuda.is_available():
        pytest.skip("the GPU runs them")
    if importlib.util.find_spec("triton") is None:
        assert os.environ.get("CI") != "true", "the test requirements bring triton"
        pytest.skip("no triton")
    from codeparrot_ds.model import loss_kernel

    monkeypatch.setattr(loss_kernel, "BLOCK", 128)
    with kernels_on_cpu(loss_kernel.losses_of, loss_kernel.gradient_in_place):
        yield loss_kernel


@pytest.fixture
def on_a_gpu(monkeypatch):
    """The loss as a GPU takes it, with the formulas in the kernels' place."""
    monkeypatch.setattr(loss, "by_cache", lambda logits: False)
    with kernels_on_cpu(losses_by_formula, gradient_by_formula):
        yield


def some_logits(dtype, vocab_size, scale=4.0):
    logits = (scale * torch.randn(7, vocab_size, generator=torch.Generator().manual_seed(1))).to(dtype)
    targets = torch.randint(vocab_size, (7,), generator=torch.Generator().manual_seed(2))
    targets[[0, 4]] = torch.tensor([-100, vocab_size - 1])
    return logits, targets


def both(logits, targets, scale=3.0):
    """(loss, gradient) of the fused loss in the logits' precision, and of PyTorch's in fp64."""
    exact = logits.double().requires_grad_()
    plain = F.cross_entropy(exact, targets)
    (scale * plain).backward()
    fused = logits.clone().requires_grad_()
    found = FusedCrossEntropy.apply(fused, targets)
    (scale * found).backward()
    return (found.double(), fused.grad.double()), (plain, exact.grad)


# A unit of a gradient's last place: the interpreter cuts bf16 off where a GPU rounds it.
LAST_PLACE = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


@pytest.mark.parametrize("vocab_size", [100, 128, 300], ids=["part of a block", "a block", "blocks and a part"])
@pytest.mark.parametrize("dtype", LAST_PLACE)
def test_the_kernels_have_the_loss_and_the_gradient_of_pytorch(kernels, dtype, vocab_size):
    fused, exact = both(*some_logits(dtype, vocab_size))
    torch.testing.assert_close(fused[0], exact[0], atol=0, rtol=1e-6)
    torch.testing.assert_close(fused[1], exact[1], atol=1e-7, rtol=LAST_PLACE[dtype])
    assert not fused[1][0].any() and fused[1][4, -1] < 0


@pytest.mark.parametrize("offset", [-30_000.0, 30_000.0])
def test_large_logits_lose_no_digits(kernels, offset):
    """Their differences count: the largest and the log of the sum are kept apart."""
    logits, targets = some_logits(torch.float32, 300)
    fused, exact = both(logits + offset, targets)
    torch.testing.assert_close(fused[0], exact[0], atol=0, rtol=1e-6)
    torch.testing.assert_close(fused[1], exact[1], atol=1e-7, rtol=1e-5)


def test_a_target_that_fp32_takes_for_impossible_has_its_loss(kernels):
    logits, targets = torch.zeros(2, 300), torch.tensor([5, 1])
    logits[:, 5] = 200.0
    fused, exact = both(logits, targets)
    assert fused[0] == 100.0  # one of 0 nats, one of 200
    torch.testing.assert_close(fused[1], exact[1], atol=1e-30, rtol=1e-6)


def test_impossible_tokens_are_no_numbers_only_where_they_are_the_target(kernels):
    logits, targets = some_logits(torch.float32, 300)
    logits[:, :129] = -torch.inf  # a whole block, and one more
    targets[targets != -100] = 200
    fused, exact = both(logits, targets)
    torch.testing.assert_close(fused[0], exact[0], atol=0, rtol=1e-6)
    torch.testing.assert_close(fused[1], exact[1], atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_no_loss(kernels, value):
    logits, targets = some_logits(torch.float32, 300)
    logits[2, 140] = value
    (found, gradient), _ = both(logits, targets)
    assert found.isnan() and gradient[2].isnan().all() and gradient[1].isfinite().all()


def test_a_target_outside_the_vocabulary_is_read_nowhere(kernels):
    for target in (300, -1, 2**40):
        losses, _ = kernels.losses_of(torch.zeros(1, 300), torch.tensor([target]))
        assert losses.isnan().all()


def test_a_row_beyond_two_to_the_31_logits(kernels):
    """As the last rows of 64 x 1,024 tokens are; the pages between the two rows are never touched."""
    stride = 2**31 + 64
    memory = torch.empty(stride + 300, dtype=torch.bfloat16)
    logits, targets = some_logits(torch.bfloat16, 300)
    apart = memory.as_strided((2, 300), (stride, 1))
    apart.copy_(logits[4:6])
    losses, statistics = kernels.losses_of(apart, targets[4:6])
    expected, _ = losses_by_formula(logits[4:6], targets[4:6])
    torch.testing.assert_close(losses, expected, atol=0, rtol=1e-6)
    kernels.gradient_in_place(apart, targets[4:6], statistics, torch.tensor(1.0))
    assert apart[0, -1] < 0 and apart.float().sum(1).abs().max() < 0.05


def test_the_formulas_of_the_other_tests_are_those_of_the_kernels(kernels):
    logits, targets = some_logits(torch.float32, 300)
    losses, statistics = kernels.losses_of(logits, targets)
    expected = losses_by_formula(logits, targets)
    torch.testing.assert_close((losses, statistics), expected, atol=1e-6, rtol=1e-6)
    by_formula, scale = logits.clone(), torch.tensor(0.25)
    gradient_by_formula(by_formula, targets, statistics, scale)
    kernels.gradient_in_place(logits, targets, statistics, scale)
    torch.testing.assert_close(logits, by_formula, atol=1e-7, rtol=1e-6)


# --------------------------------------------------------------------------------------------------------------------
# Around the kernels


@pytest.mark.parametrize("dtype", LAST_PLACE)
def test_the_model_has_the_plain_loss_and_gradients(on_a_gpu, dtype):
    ids, found = rows(), []
    labels = ids.clone()
    labels[1, 20:] = -100
    for fused in (True, False):
        model = build(fused_loss=fused).to(dtype)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        found.append((loss.detach(), {name: each.grad for name, each in model.named_parameters()}))
    torch.testing.assert_close(found[0][0], found[1][0], atol=0, rtol=1e-6)
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-5, rtol=LAST_PLACE[dtype])


class MadeBeside(TorchDispatchMode):
    """Notes the bytes of the largest tensor that anything makes outside the memory of one."""

    def __init__(self, tensor):
        super().__init__()
        self.place, self.most = tensor.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            if isinstance(made, torch.Tensor) and made.untyped_storage().data_ptr() != self.place:
                self.most = max(self.most, made.nbytes)
        return result


def test_the_gradient_takes_the_place_of_the_logits(on_a_gpu):
    logits, targets = torch.randn(99, 300, requires_grad=True), rows().flatten()
    with MadeBeside(logits) as made:
        (gradient,) = torch.autograd.grad(FusedCrossEntropy.apply(logits, targets), logits)
    assert gradient.data_ptr() == logits.data_ptr() and 0 < made.most < 99 * 64


def test_a_share_of_the_loss_has_that_share_of_the_gradient(on_a_gpu):
    """As with accumulation: the gradient is rounded once, after the share is taken."""
    logits, targets = some_logits(torch.float16, 300)
    (fused, gradient), exact = both(logits, targets, scale=1 / 3)
    torch.testing.assert_close(gradient, exact[1], atol=1e-7, rtol=2**-11)


def test_a_loss_scale_saves_small_gradients_of_fp16(on_a_gpu):
    logits = torch.zeros(1, 257, 512, dtype=torch.float16, requires_grad=True)
    scale = 2.0**16
    (scale * fused_lm_loss(logits, torch.zeros(1, 257, dtype=torch.long), 512)).backward()
    torch.testing.assert_close(logits.grad[0, :-1, 1].float(), torch.full((256,), scale / 512 / 256), rtol=1e-3, atol=0)


def test_a_second_backward_pass_is_refused(on_a_gpu):
    found = fused_lm_loss(torch.randn(2, 33, 300, requires_grad=True) * 2, rows()[:2], 300)
    found.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="its logits became their gradient in the first; call the model again"):
        found.backward()


def test_a_gradient_of_the_gradient_is_refused(on_a_gpu):
    found = fused_lm_loss(torch.randn(2, 33, 300, requires_grad=True) * 2, rows()[:2], 300)
    with pytest.raises(RuntimeError, match="the fused loss has no second derivative"):
        found.backward(create_graph=True)


def test_logits_that_became_a_gradient_are_not_taken_for_logits(on_a_gpu):
    scores = torch.randn(2, 33, 300, requires_grad=True) * 2
    kept_for_its_gradient = scores.square().sum()
    found = fused_lm_loss(scores, rows()[:2], 300)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (found + kept_for_its_gradient).backward()


def test_without_a_gradient_the_logits_stay(on_a_gpu):
    logits = torch.randn(2, 33, 300)
    before = logits.clone()
    with torch.no_grad():
        found = fused_lm_loss(logits, rows()[:2], 300)
    torch.testing.assert_close(found, causal_lm_loss(logits, rows()[:2], 300), atol=0, rtol=1e-6)
    assert torch.equal(logits, before)


def test_rows_without_a_target_have_no_loss(on_a_gpu):
    assert fused_lm_loss(torch.randn(1, 4, 8), torch.full((1, 4), -100), 8).isnan()


def wrong_gradient(logits, targets, statistics, scale):
    gradient_by_formula(logits, targets, statistics, scale * 1.02)


def no_compiler(*_):
    raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.\n  in triton/runtime")


@pytest.mark.parametrize(
    ("gradient", "words"),
    [
        (no_compiler, "takes its place: Failed to find C compiler. Please specify via CC environment variable."),
        (wrong_gradient, "takes its place: its result differs from PyTorch's"),
    ],
)
def test_kernels_that_do_not_work_are_said_once_and_pytorchs_loss_is_taken(monkeypatch, caplog, gradient, words):
    monkeypatch.setattr(loss, "by_cache", lambda logits: False)
    monkeypatch.setattr(logging.getLogger("codeparrot_ds"), "propagate", True)  # a run's logging ends it
    logits, labels = torch.randn(2, 33, 300), rows()[:2]
    gradients = []
    with kernels_on_cpu(losses_by_formula, gradient):
        for function in (fused_lm_loss, fused_lm_loss, chunked_lm_loss):
            leaf = logits.clone().requires_grad_()
            found = function(leaf, labels, 300)
            found.backward()
            gradients.append((found.detach(), leaf.grad))
    assert torch.equal(gradients[0][1], gradients[2][1]) and gradients[0][0] == gradients[2][0]
    (record,) = [each for each in caplog.records if each.levelno >= logging.WARNING]
    assert record.getMessage().endswith(words)


def test_a_gpu_whose_triton_is_missing_has_pytorchs_loss(monkeypatch, caplog):
    """What the operators do on a GPU, in a process to which nothing is called triton."""
    monkeypatch.setattr(logging.getLogger("codeparrot_ds"), "propagate", True)
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "codeparrot_ds.model.loss_kernel", raising=False)
    with kernels_on_cpu(fused_loss._losses_by_triton, fused_loss._gradient_by_triton):
        assert not fused_loss_works(torch.device("cpu"), torch.float32, 300)
    assert "triton" in caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("vocab_size", [300, 32_768, 50_257])
@pytest.mark.parametrize("dtype", LAST_PLACE)
def test_the_kernels_on_a_gpu(dtype, vocab_size):
    logits, targets = some_logits(dtype, vocab_size)
    assert fused_loss_works(torch.device("cuda", 0), dtype, vocab_size)
    fused, exact = both(logits.cuda(), targets.cuda())
    torch.testing.assert_close(fused[0], exact[0], atol=0, rtol=1e-6)
    torch.testing.assert_close(fused[1], exact[1], atol=1e-7, rtol=LAST_PLACE[dtype])
