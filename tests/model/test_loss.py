"""The loss, plain and some tokens at a time."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from codeparrot_ds.model import loss, shapes
from codeparrot_ds.model.loss import causal_lm_loss, chunked_lm_loss
from tests.model.tiny_gpt2 import TINY, build, rows


def test_loss_is_the_mean_over_the_next_tokens_in_fp32():
    model = build().to(torch.bfloat16)
    ids = rows()
    logits, found = model(input_ids=ids).logits, model(input_ids=ids, labels=ids).loss
    assert logits.dtype == torch.bfloat16 and found.dtype == torch.float32
    torch.testing.assert_close(found, F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten()))


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The losses as a GPU runs them: plain, and in chunks that are not sized for a cache."""
    monkeypatch.setattr(loss, "by_cache", lambda logits: False)


@pytest.mark.parametrize("elements", [7 * 300, 2**25, 1], ids=["several chunks a row", "one chunk", "a token a chunk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("by_cache", [True, False])
def test_a_chunked_loss_is_the_plain_one(monkeypatch, dtype, elements, by_cache):
    monkeypatch.setattr(*((loss, "CACHED_ELEMENTS") if by_cache else (shapes, "CHUNK_ELEMENTS")), elements)
    monkeypatch.setattr(loss, "by_cache", lambda logits: by_cache)
    generator = torch.Generator().manual_seed(1)
    logits = (4 * torch.randn(3, 33, 300, generator=generator)).to(dtype).requires_grad_()
    labels = rows()
    labels[1, 20:] = -100
    exact = logits.detach().double().requires_grad_()
    chunked = chunked_lm_loss(logits, labels, 300)
    (3 * chunked).backward()
    plain = F.cross_entropy(exact[:, :-1].reshape(-1, 300), labels[:, 1:].reshape(-1), ignore_index=-100)
    (3 * plain).backward()
    torch.testing.assert_close(chunked.double(), plain, atol=1e-6, rtol=1e-6)
    # Of a gradient that is rounded once, at the end: half a unit of its last place. A CPU's is rounded before it is
    # multiplied by 3, too.
    rounding = {torch.float32: 1e-5, torch.bfloat16: 2**-7 if by_cache else 2**-8, torch.float16: 2**-10}[dtype]
    torch.testing.assert_close(logits.grad.double(), exact.grad, atol=1e-7, rtol=rounding)


@pytest.mark.parametrize("chunked", [True, False])
def test_a_target_that_fp32_takes_for_impossible_has_its_loss(chunked):
    logits = torch.zeros(1, 3, 8)
    logits[0, :, 5] = 200.0
    logits.requires_grad_()
    found = (chunked_lm_loss if chunked else causal_lm_loss)(logits, torch.tensor([[0, 5, 1]]), 8)
    found.backward()
    assert found == 100.0  # one of 0 nats, one of 200
    assert logits.grad[0, 1, 1] == -0.5 and logits.grad[0, 0].abs().max() == 0.0


def test_a_share_of_the_loss_has_that_share_of_the_gradient():
    """As with accumulation: nothing but the gradient's last rounding is lost, though a third is no bf16 number."""
    logits = torch.randn(2, 33, 300, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    whole, third = (logits.clone().requires_grad_() for _ in range(2))
    causal_lm_loss(whole, rows()[:2], 300).backward()
    (causal_lm_loss(third, rows()[:2], 300) / 3).backward()
    ratio = third.grad.double().sum(1)[:, 5] / whole.grad.double().sum(1)[:, 5]
    torch.testing.assert_close(ratio, torch.full((2,), 1 / 3, dtype=torch.float64), rtol=5e-4, atol=0)


def test_logits_that_became_a_gradient_are_not_taken_for_logits():
    logits = torch.randn(2, 33, 300, requires_grad=True)
    scores = logits * 2
    kept_for_its_gradient = scores.square().sum()
    found = causal_lm_loss(scores, rows()[:2], 300)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (found + kept_for_its_gradient).backward()


def test_a_loss_scale_saves_small_gradients_of_fp16():
    """What is below the smallest fp16 without the scale arrives with it: nothing is rounded before."""
    logits = torch.zeros(1, 257, 512, dtype=torch.float16, requires_grad=True)
    scale = 2.0**16
    (scale * causal_lm_loss(logits, torch.zeros(1, 257, dtype=torch.long), 512)).backward()
    torch.testing.assert_close(logits.grad[0, :-1, 1].float(), torch.full((256,), scale / 512 / 256), rtol=1e-3, atol=0)


def test_rows_without_a_target_have_no_loss():
    for function in (causal_lm_loss, chunked_lm_loss):
        assert function(torch.randn(1, 4, 8), torch.full((1, 4), -100), 8).isnan()


WITHOUT_FP32 = dataclasses.replace(TINY, activation_function="relu")  # a GELU in 16 bits has its own chunks of fp32


class LargestFP32(TorchDispatchMode):
    """Notes the most elements of an fp32 tensor that anything makes."""

    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            if isinstance(made, torch.Tensor) and made.dtype == torch.float32:
                self.most = max(self.most, made.untyped_storage().nbytes() // 4)
        return result


@pytest.mark.parametrize("chunked", [True, False])
def test_a_chunked_loss_holds_no_fp32_tensor_of_the_logits_size(monkeypatch, as_on_a_gpu, chunked):
    monkeypatch.setattr(shapes, "CHUNK_ELEMENTS", 10 * 300)
    model, ids = build(WITHOUT_FP32, chunked_loss=chunked).to(torch.bfloat16), rows()
    with LargestFP32() as seen:
        model(input_ids=ids, labels=ids).loss.backward()
    assert (seen.most >= ids.numel() * 300) == (not chunked)
    assert not chunked or seen.most == 10 * 300


@pytest.mark.parametrize("chunked", [True, False])
def test_no_loss_on_a_cpu_holds_one(monkeypatch, chunked):
    monkeypatch.setattr(loss, "CACHED_ELEMENTS", 10 * 300)
    model, ids = build(WITHOUT_FP32, chunked_loss=chunked).to(torch.bfloat16), rows()
    with LargestFP32() as seen:
        model(input_ids=ids, labels=ids).loss.backward()
    assert seen.most == 10 * 300
