"""Rounding errors put in on purpose: their size, forwards and backwards, afresh each time, the same for a seed."""

import pytest
import torch
from torch import nn

from codeparrot_ds.compare.initial_weights import SPACING, factors, inject_rounding_noise
from codeparrot_ds.compare.verdict import ROUNDOFF


def a_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))


def outcome(model, inputs):
    """Its output and the gradient of its first matrix."""
    model.zero_grad()
    output = model(inputs)
    output.sum().backward()
    return output.detach().clone(), model[0].weight.grad.clone()


@pytest.mark.parametrize("precision", SPACING)
def test_the_spacing_is_that_of_the_dtype_and_twice_the_roundoff(precision):
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    assert SPACING[precision] == torch.finfo(dtype).eps == 2 * ROUNDOFF[precision]


def test_factors_lie_evenly_within_one_spacing():
    found = factors(torch.empty(100_000), 2.0**-7, torch.Generator().manual_seed(1)) - 1
    assert found.dtype == torch.float32 and found.abs().max() <= 2.0**-7
    assert found.abs().mean() == pytest.approx(2.0**-8, rel=0.02) and abs(found.mean()) < 1e-4


@pytest.mark.parametrize("precision", SPACING)
def test_outputs_and_gradients_move_by_about_a_rounding(precision):
    inputs = torch.randn(512, 64, generator=torch.Generator().manual_seed(2))
    output, gradient = outcome(a_model(), inputs)
    noisy = a_model()
    inject_rounding_noise(noisy, precision, seed=3)
    first = outcome(noisy, inputs)
    again = outcome(noisy, inputs)
    for clean, one, other in zip((output, gradient), first, again, strict=True):
        moved = ((one - clean).norm() / clean.norm()).item()
        assert 0.1 * SPACING[precision] < moved < 10 * SPACING[precision]
        assert not torch.equal(one, other)  # afresh at every step


def test_a_seed_gives_the_same_errors_again():
    inputs = torch.ones(4, 64)
    found = []
    for seed in (5, 5, 6):
        model = a_model()
        inject_rounding_noise(model, "bf16", seed=seed)
        found.append(outcome(model, inputs)[1])
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_what_is_not_a_floating_tensor_is_handed_on_as_it_is():
    class Indices(nn.Module):
        def forward(self, values):
            return values.argmax(), None

    layer = Indices()
    model = nn.Sequential(nn.Linear(3, 3), layer)
    inject_rounding_noise(model, "bf16", seed=1)
    index, nothing = model(torch.eye(3))
    assert index.dtype == torch.int64 and nothing is None
