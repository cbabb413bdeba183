"""What the rules call a conflict is what the real engine refuses, and what they let pass is what it takes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from codeparrot_ds.ds_config.lint import lint

REPOSITORY = Path(__file__).resolve().parents[2]


def zero(stage, **keys):
    return {"zero_optimization": {"stage": stage, **keys}, "bf16": {"enabled": True}}


def masters(config, **keys):
    return config | {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True, **keys}}


def adam(config, **params):
    return config | {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3, **params}}}


CPU = {"device": "cpu"}
FP32 = {"data_types": {"grad_accum_dtype": "fp32"}}
SGD = {"optimizer": {"type": "SGD", "params": {"lr": 1e-3}}}
REFUSED = {
    "fp16 on the CPU": {"fp16": {"enabled": True}},
    "fp16 and bf16": zero(2) | {"fp16": {"enabled": True}},
    "fp32 accumulation at stage 0": zero(0) | FP32,
    "another parameter dtype": zero(1) | {"data_types": {"param_dtype": "fp32"}},
    "prescaling at stage 2": zero(2) | {"prescale_gradients": True},
    "prescaling at stage 3": zero(3) | {"prescale_gradients": True},
    "predividing at stage 2": zero(2) | {"gradient_predivide_factor": 2.0},
    "an odd allgather bucket": zero(2, allgather_bucket_size=5),
    "the old stage 1": zero(1, legacy_stage1=True),
    "bf16 masters at stage 0": masters(zero(0)),
    "bf16 masters without anything": masters(zero(2)),
    "bf16 masters, torch's Adam offloaded": adam(masters(zero(2, offload_optimizer=CPU)), torch_adam=True),
    "bf16 states without masters": zero(2) | {"bf16": {"enabled": True, "bf16_optimizer_states": True}},
    "no norm and clipping": zero(2, compute_grad_norm=False),
    "no norm at stage 3": zero(3, compute_grad_norm=False) | {"gradient_clipping": 0},
    "no norm and offload": zero(2, compute_grad_norm=False, offload_optimizer=CPU) | {"gradient_clipping": 0},
    "an untested optimizer": zero(2) | SGD,
    "foreach of DeepSpeed's Adam": adam(zero(2), foreach=True),
    "amsgrad of DeepSpeed's Adam": adam(zero(2), amsgrad=True),
    "bias correction of torch's Adam": adam(zero(2), torch_adam=True, bias_correction=True),
    "clipping in the optimizer": adam(zero(2), max_grad_norm=1.0),
    "sums at stage 3": zero(3) | {"gradient_allreduce_op": "sum"},
    "part of the optimizer at stage 2": zero(2, offload_optimizer={"device": "cpu", "ratio": 0.5}),
    "quantized weights on the CPU": zero(3, zero_quantized_weights=True),
    "autocast and quantized weights": {
        "zero_optimization": {"stage": 3, "zero_quantized_weights": True},
        "torch_autocast": {"enabled": True, "dtype": "bfloat16"},
    },
    "unmanaged accumulation with overlap": zero(1, overlap_comm=True) | {"managed_gradient_accumulation": False},
    "GPU Direct Storage on the CPU": zero(3) | {"aio": {"use_gds": True}},
    "ZenFlow without offload": zero(2, zenflow={"topk_ratio": 0.1}),
}
TAKEN = {
    "prescaling at stage 1": zero(1) | {"prescale_gradients": True},
    "prescaling without reduce-scatter": zero(2, reduce_scatter=False) | {"prescale_gradients": True},
    "an odd allgather bucket at stage 3": zero(3, allgather_bucket_size=5),
    "bf16 masters, Adam offloaded": masters(zero(2, offload_optimizer=CPU)),
    "bf16 masters and states": masters(zero(3), bf16_optimizer_states=True),
    "bf16 masters that stage 1 does not keep": masters(zero(1)) | FP32,
    "no norm and no clipping": zero(2, compute_grad_norm=False) | {"gradient_clipping": 0},
    "an untested optimizer that is allowed": zero(2) | SGD | {"zero_allow_untested_optimizer": True},
    "torch's Adam offloaded": adam(zero(2, offload_optimizer=CPU), torch_adam=True),
    "a secondary partition larger than the world": zero(3, zero_hpz_partition_size=8),
    "quantized weights below stage 3": zero(2, zero_quantized_weights=True),
    "autocast and bf16": zero(2) | {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
}
SCRIPT = """
import copy, json, logging, os, sys, torch
logging.disable(logging.CRITICAL)
import deepspeed
from codeparrot_ds.engine.operators import build_operators
# DeepSpeed's own loading would compile them again with other flags, and the next run once more with ours.
for device in ("none", "cpu"):
    build_operators({"zero_optimization": {"offload_optimizer": {"device": device}}}, "cpu")
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # as join_ranks does: it would be compiled
deepspeed.init_distributed("gloo")
refused = {}
for name, config in json.load(sys.stdin).items():
    config = {"train_batch_size": 1, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}} | config
    model = torch.nn.Linear(8, 8)
    try:
        engine, *_ = deepspeed.initialize(
            model=model, model_parameters=model.parameters(), config=config, dist_init_required=False
        )
        row = torch.ones(1, 8, dtype=next(engine.parameters()).dtype)
        for _ in range(2):
            engine.backward(engine(row).float().sum())
            engine.step()
    except Exception as error:
        refused[name] = f"{type(error).__name__}: {error}"
json.dump(refused, open(sys.argv[1], "w"))
sys.stdout.flush()
os._exit(0)
"""


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    """What the engine says of every config that it does not take: one process, one rank."""
    environment = os.environ | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    environment |= {"MASTER_PORT": "0", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    # fp16 is refused on all CPUs but those with fp16 instructions: none here.
    environment |= {"PYTHONPATH": str(REPOSITORY), "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}
    path = tmp_path_factory.mktemp("engine") / "refused.json"
    subprocess.run(
        [sys.executable, "-c", SCRIPT, str(path)],
        input=json.dumps(REFUSED | TAKEN),
        text=True,
        env=environment,
        check=True,
        capture_output=True,
    )
    return json.loads(path.read_text())


def errors(config):
    return [str(f) for f in lint(config, "f", device="cpu", world_size=1) if f.severity == "error"]


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_called_a_conflict_is_refused(name, refused):
    assert name in refused, "DeepSpeed takes it"
    assert errors(REFUSED[name]), refused[name]


@pytest.mark.parametrize("name", TAKEN)
def test_what_passes_is_taken(name, refused):
    assert name not in refused
    assert errors(TAKEN[name]) == []
