"""The counted step: a change that makes a GPU do more in a step fails here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Launches, GB and waits of the host in a step of one micro-batch, 64 rows (gpt2) or 16 (gpt2-xl) of 1,024 tokens, with
# one layer, the embeddings and the loss. What lowers them lowers the limit.
ONE_LAYER = {
    "gpt2 zero0": (88, 40.9, 1),
    "gpt2 zero1": (90, 40.9, 1),
    "gpt2 zero2": (90, 40.9, 1),
    "gpt2 zero3": (193, 42.4, 6),
    "gpt2-xl zero0": (94, 17.9, 1),
    "gpt2-xl zero1": (96, 17.9, 1),
    "gpt2-xl zero2": (96, 17.9, 1),
    "gpt2-xl zero3": (196, 21.2, 7),
}


@pytest.fixture(scope="module")
def counted() -> dict:
    """What ``counted_steps.py`` counts, in a process of its own: an accelerator is pretended for good."""
    script = Path(__file__).with_name("counted_steps.py")
    answer = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=os.environ, timeout=600)
    assert answer.returncode == 0, answer.stderr[-2000:]
    return json.loads(answer.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", ONE_LAYER)
def test_a_step_launches_moves_and_waits_no_more_than_before(counted, name):
    launches, gigabytes, waits = ONE_LAYER[name]
    found = counted["one layer"][name]
    assert found["launches"] <= launches, found["parts"]
    assert found["bytes"] / 1e9 <= gigabytes, found["parts"]
    assert found["waits"] <= waits
    # A step that lost its work, or was not seen, would pass too.
    assert found["launches"] > 0.97 * launches and found["bytes"] / 1e9 > 0.97 * gigabytes


def test_a_whole_step_of_the_small_model(counted):
    """With neither fused loss nor lean step, as it was when it was first counted, and as it is: parts and roofline."""
    plain, found = counted["whole, plain"], counted["whole"]
    assert (plain["launches"], plain["waits"]) == (1051, 6)
    assert plain["bytes"] / 1e9 == pytest.approx(243.6, rel=1e-3)
    assert plain["flops"] == pytest.approx(47.6e12, rel=1e-2)  # 6 N for each token, and causal attention
    assert found["flops"] == pytest.approx(plain["flops"], rel=1e-3)
    assert 65_536 / plain["roofline_seconds"]["H200"] == pytest.approx(677_000, rel=1e-2)
    assert found["launches"] <= 453 and found["waits"] <= 1 and found["bytes"] / 1e9 <= 174.3
    assert 65_536 / found["roofline_seconds"]["H200"] >= 811_000
    for figures, most in ((plain, 86.1), (found, 42.1), (counted["one layer"]["gpt2-xl zero1"], 42.1)):
        assert figures["parts"]["engine"]["bytes"] / figures["parameters"] <= most


def test_the_fused_loss_moves_six_bytes_per_logit(counted):
    """Two launches: the logits are read, and read and written; the numbers of each token are little beside them."""
    loss = {name: size for _, name, _, size in counted["whole"]["operators"] if name.startswith("codeparrot_ds::")}
    assert list(loss) == ["codeparrot_ds::logits_gradient_", "codeparrot_ds::token_losses"]
    assert sum(loss.values()) / (65_536 * 32_768) == pytest.approx(6, rel=1e-3)


NUMBERS = 4 * 1000  # bytes of what the operators are applied to
OPERATORS = {
    "views": (0, 0, 0),
    "allocation": (0, 0, 0),
    "addition": (1, 3 * NUMBERS, 0),
    "in place": (1, 3 * NUMBERS, 0),
    "overwritten": (1, 2 * NUMBERS, 0),
    "product elsewhere": (2, 2 * (NUMBERS + NUMBERS // 2) + 4, 0),  # of a cast by one number
    "zeros": (1, NUMBERS, 0),
    "cast": (1, NUMBERS + NUMBERS // 2, 0),
    "expanded": (1, 2 * NUMBERS + 4, 0),
    "rows": (1, 2 * 7 * 10 * 4 + 7 * 8, 0),
    "asked": (2, NUMBERS + 4 + 4 + 1, 1),  # a sum, and whether it is positive
    "to the host": (0, 0, 1),
    "to the host later": (0, 0, 0),
    "from the host": (0, 0, 1),
    "from the host later": (0, 0, 0),
    "on the host": (0, 0, 0),
    "many at once": (2, 2 * 200 * 10 * 4, 0),  # 110 tensors a launch
    "event": (0, 0, 1),
    "one's own": (1, 4 * NUMBERS, 0),  # one is read and written, one is read, one comes out
    "one's own, said": (1, 3 * NUMBERS, 0),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_what_an_operator_counts(counted, name):
    assert tuple(counted["operators"][name]) == OPERATORS[name]
    assert counted["operators"].keys() == OPERATORS.keys()
