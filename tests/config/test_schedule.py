"""The learning-rate schedules against transformers' own."""

import pytest
import torch
from transformers import get_scheduler

from codeparrot_ds.config.schedule import learning_rate_factor

NAMES_IN_TRANSFORMERS = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


@pytest.mark.parametrize("kind", NAMES_IN_TRANSFORMERS)
@pytest.mark.parametrize(("warmup", "steps"), [(0, 10), (1, 7), (20, 150), (2000, 2001), (5, 5)])
def test_equal_to_transformers(kind, warmup, steps):
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(NAMES_IN_TRANSFORMERS[kind], optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    reference = scheduler.lr_lambdas[0]
    ours = [learning_rate_factor(kind, step, warmup, steps) for step in range(steps)]
    assert ours == pytest.approx([reference(step) for step in range(steps)], abs=1e-12)


def test_landmarks_of_the_recipe():
    def factor(step, kind="cosine"):
        return learning_rate_factor(kind, step, 2000, 150_000)

    assert factor(0) == 0
    assert factor(1000) == 0.5
    assert factor(2000) == 1
    assert factor(76_000) == pytest.approx(0.5)
    assert factor(76_000, "linear") == pytest.approx(0.5)
    assert factor(150_000) == pytest.approx(0, abs=1e-12)
    assert factor(150_000, "constant") == 1


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_stays_at_zero_after_the_end(kind):
    """transformers' cosine would rise again."""
    assert learning_rate_factor(kind, 25, 2, 10) == 0
