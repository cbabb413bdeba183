"""16-bit products on a CPU without them: none reaches PyTorch's scalar kernels, and all are as exact as its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from codeparrot_ds.model.products import has_bf16_products, multiply_in_fp32_where_needed
from tests.old_cpu import OLD_CPU

REPOSITORY = Path(__file__).resolve().parents[2]
# Half a spacing of bf16 and fp16 relative to a number, and some for sums of two rounded terms.
ROUNDING = {"bf16": 2.0**-8, "fp16": 2.0**-11}


@pytest.fixture(scope="module")
def replaced(tmp_path_factory):
    """What `replaced_products.py` found on such a CPU."""
    path = tmp_path_factory.mktemp("products") / "answer.json"
    environment = os.environ | OLD_CPU | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "DS_ACCELERATOR": "cpu"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), str(Path(__file__).parent)])
    script = str(Path(__file__).with_name("replaced_products.py"))
    process = subprocess.run([sys.executable, "-W", "error::UserWarning:codeparrot_ds", script, str(path)],
                             env=environment, capture_output=True, text=True)  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(path.read_text())


def test_pytorch_and_the_checks_agree_that_there_are_none(replaced):
    assert not replaced["has_bf16_products"] and replaced["cpu_precisions"] == ["fp32"]
    assert replaced["before"] == {"mm 16-bit": 1}  # what is counted below is there to be counted
    assert replaced["replaced"] == [["torch.bfloat16"], ["torch.bfloat16", "torch.float16"]]


@pytest.mark.parametrize("name", ["zero0", "zero2", "zero3", "zero2_fp32"])
def test_no_16_bit_product_of_a_step_or_an_evaluation_is_native(replaced, name):
    calls = replaced["calls"][name]
    assert not [kind for kind in calls if kind.endswith("16-bit")]
    # Three layers of four linear ones and the head, twice forwards and backwards and once more forwards.
    assert calls["mm fp32"] + calls["addmm fp32"] == 13 * (2 * 3 + 1)
    assert calls["_scaled_dot_product_flash_attention_for_cpu fp32"] == 3 * 3
    assert calls["_scaled_dot_product_flash_attention_for_cpu_backward fp32"] == 3 * 2


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_products_are_fp32_ones_that_were_rounded(replaced, precision):
    worst = {name: error for name, error in replaced[precision].items() if error > ROUNDING[precision]}
    assert len(replaced[precision]) == 16 and not worst


def test_what_pytorch_refuses_is_refused(replaced):
    assert "taken" not in replaced["refused"].values()


@pytest.mark.skipif(not has_bf16_products(), reason="this CPU has no bf16 products of its own")
def test_a_cpu_with_products_of_its_own_keeps_them():
    assert torch.bfloat16 not in multiply_in_fp32_where_needed(torch.bfloat16)
