"""GELU by its sigmoid against PyTorch's."""

import pytest
import torch
from torch.nn import functional as F

from codeparrot_ds.model import cpu_kernels
from codeparrot_ds.model.activation import TanhGELU
from tests.model.tiny_gpt2 import TINY, build, rows


def values(dtype, count=6000):
    spread = torch.linspace(-12, 12, count - 3, dtype=torch.float64)
    return torch.cat([spread, torch.tensor([0.0, 60.0, -60.0], dtype=torch.float64)]).to(dtype).view(3, -1)


def gelu_and_slope(function, x):
    x = x.detach().clone().requires_grad_()
    result = function(x)
    result.backward(torch.ones_like(result))
    return result.detach().double(), x.grad.double()


@pytest.mark.parametrize("chunk", [1, 777, 2**18])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_and_derivatives_are_as_near_as_their_precision_allows(monkeypatch, dtype, chunk):
    monkeypatch.setattr(cpu_kernels, "CHUNK", chunk)
    x = values(dtype)
    exact, exact_slope = gelu_and_slope(lambda v: F.gelu(v, approximate="tanh"), x.double())
    result, slope = gelu_and_slope(TanhGELU().train(), x)
    half_a_unit, smallest = torch.finfo(dtype).eps / 2, torch.finfo(dtype).smallest_normal
    torch.testing.assert_close(result, exact, rtol=1.01 * half_a_unit, atol=max(smallest, 1e-7))
    torch.testing.assert_close(slope, exact_slope, rtol=1.01 * half_a_unit, atol=max(smallest, 1e-6))


@pytest.mark.parametrize("case", ["evaluation", "fp32", "nothing to train", "transposed"])
def test_elsewhere_it_is_pytorchs_to_the_last_bit(case):
    x = values(torch.float32 if case == "fp32" else torch.bfloat16).requires_grad_(case != "nothing to train")
    x = x.t() if case == "transposed" else x
    layer = TanhGELU().train(case != "evaluation")
    assert torch.equal(layer(x), F.gelu(x, approximate="tanh"))


def test_a_gradient_of_another_layout_is_taken():
    x = values(torch.bfloat16).requires_grad_()
    TanhGELU().train()(x).t().contiguous().sum().backward()
    whole = x.grad
    x.grad = None
    TanhGELU().train()(x).sum().backward()
    assert torch.equal(whole, x.grad)


def test_a_model_in_16_bits_trains_with_it():
    model = build().to(torch.bfloat16)
    ids = rows()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(input_ids=ids, labels=ids).loss.backward()
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["SigmoidGELU"] == calls["SigmoidGELUBackward"] == TINY.n_layer and "aten::gelu" not in calls
