"""The loss, plain and some tokens at a time."""

import pytest
import torch
from tiny_gpt2 import build, rows
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from codeparrot_ds.model import loss, shapes
from codeparrot_ds.model.loss import causal_lm_loss, chunked_lm_loss


def test_loss_is_the_mean_over_the_next_tokens_in_fp32():
    model = build().to(torch.bfloat16)
    ids = rows()
    output = model(input_ids=ids, labels=ids)
    assert output.logits.dtype == torch.bfloat16 and output.loss.dtype == torch.float32
    expected = F.cross_entropy(output.logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The losses as a GPU runs them: plain, and in chunks that are not sized for a cache."""
    monkeypatch.setattr(loss, "_by_cache", lambda logits: False)


@pytest.mark.parametrize("elements", [7 * 300, 2**25, 1], ids=["several chunks a row", "one chunk", "a token a chunk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("by_cache", [True, False])
def test_a_chunked_loss_is_the_plain_one(monkeypatch, dtype, elements, by_cache):
    monkeypatch.setattr(*((loss, "CACHED_ELEMENTS") if by_cache else (shapes, "CHUNK_ELEMENTS")), elements)
    monkeypatch.setattr(loss, "_by_cache", lambda logits: by_cache)
    generator = torch.Generator().manual_seed(1)
    logits = (4 * torch.randn(3, 33, 300, generator=generator)).to(dtype).requires_grad_()
    labels = rows()
    labels[1, 20:] = -100
    chunked = chunked_lm_loss(logits, labels, 300)
    (3 * chunked).backward()
    exact = logits.detach().double().requires_grad_()
    plain = F.cross_entropy(exact[:, :-1].reshape(-1, 300), labels[:, 1:].reshape(-1), ignore_index=-100)
    (3 * plain).backward()
    torch.testing.assert_close(chunked.double(), plain, atol=1e-6, rtol=1e-6)
    # Of a gradient that is rounded once, at the end: half a unit of its last place.
    rounding = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    torch.testing.assert_close(logits.grad.double(), exact.grad, atol=1e-7, rtol=rounding)


def test_a_loss_scale_saves_small_gradients_of_fp16():
    """What is below the smallest fp16 without the scale arrives with it: nothing is rounded before."""
    logits = torch.zeros(1, 257, 512, dtype=torch.float16, requires_grad=True)
    scale = 2.0**16
    (scale * causal_lm_loss(logits, torch.zeros(1, 257, dtype=torch.long), 512)).backward()
    torch.testing.assert_close(logits.grad[0, :-1, 1].float(), torch.full((256,), scale / 512 / 256), rtol=1e-3, atol=0)


def test_rows_without_a_target_have_no_loss():
    for function in (causal_lm_loss, chunked_lm_loss):
        assert function(torch.randn(1, 4, 8), torch.full((1, 4), -100), 8).isnan()


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
    model, ids = build(chunked_loss=chunked).to(torch.bfloat16), rows()
    with LargestFP32() as seen:
        model(input_ids=ids, labels=ids).loss.backward()
    assert (seen.most >= ids.numel() * 300) == (not chunked)
    assert not chunked or seen.most == 10 * 300


@pytest.mark.parametrize("chunked", [True, False])
def test_no_loss_on_a_cpu_holds_one(monkeypatch, chunked):
    monkeypatch.setattr(loss, "CACHED_ELEMENTS", 10 * 300)
    model, ids = build(chunked_loss=chunked).to(torch.bfloat16), rows()
    with LargestFP32() as seen:
        model(input_ids=ids, labels=ids).loss.backward()
    assert seen.most == 10 * 300
