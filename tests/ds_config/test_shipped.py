"""The shipped files: what is on disk, what each sets, and that each trains where it can."""

from __future__ import annotations

import copy
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from codeparrot_ds.config.run_config import RunConfig
from codeparrot_ds.ds_config.facts import (
    activation_checkpointing,
    leaves,
    offload_device,
    precision,
    value_at,
    zero_stage,
)
from codeparrot_ds.ds_config.file import ds_configs_folder, find_ds_config, read_ds_config, shipped_names
from codeparrot_ds.ds_config.lint import lint
from codeparrot_ds.ds_config.resolve import RUN_OWNED_KEYS, resolve_ds_config
from tools.ds_configs import TABLE_BEGIN, catalogue, names_for_cpu, render, render_readme, write_catalogue

REPOSITORY = Path(__file__).resolve().parents[2]
# DeepSpeed reads these blocks into pydantic models of its own; where it keeps each on its DeepSpeedConfig.
MODELS = {
    "zero_optimization": "zero_config",
    "bf16": "bfloat16_config",
    "fp16": "float16_config",
    "compile": "compile_config",
}


def test_files_on_disk_are_the_generators():
    assert shipped_names() == sorted(catalogue())
    for name, entry in catalogue().items():
        assert (ds_configs_folder() / f"{name}.json").read_text() == render(entry.config), name
    readme = (ds_configs_folder() / "README.md").read_text()
    assert readme == render_readme(readme)


def test_writing_the_catalogue(tmp_path):
    (tmp_path / "README.md").write_text(f"before\n{TABLE_BEGIN}\nstale\n<!-- table: end -->\nafter\n")
    write_catalogue(tmp_path)
    assert sorted(path.stem for path in tmp_path.glob("*.json")) == shipped_names()
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "stale" not in text
    assert "| `zero3_offload.json` | 3 | bf16 | CPU | CPU |" in text
    assert text.count("| GPU |") + text.count("| GPU; ") == len(catalogue()) - len(names_for_cpu())
    rows = [line for line in text.splitlines() if line.startswith("| `zero")]
    assert len(rows) == len(catalogue()) and {row.count("|") for row in rows} == {9}


def test_no_two_files_are_the_same():
    assert len({render(entry.config) for entry in catalogue().values()}) == len(catalogue())
    assert all(entry.use and entry.cost for entry in catalogue().values())


def test_every_stage_in_every_precision_is_there():
    configs = {name: entry.config for name, entry in catalogue().items()}
    for stage in range(4):
        for suffix, dtype in (("", "bf16"), ("_fp16", "fp16"), ("_fp32", "fp32")):
            config = configs[f"zero{stage}{suffix}"]
            assert (zero_stage(config), precision(config)) == (stage, dtype)


@pytest.mark.parametrize(
    ("name", "optimizer", "parameters", "checkpointing"),
    [
        ("zero2_offload", "cpu", "none", False),
        ("zero3_offload_optimizer", "cpu", "none", False),
        ("zero3_offload", "cpu", "cpu", False),
        ("zero3_nvme", "nvme", "cpu", False),
        ("zero3_infinity", "nvme", "nvme", False),
        ("zero2_activation_checkpointing", "none", "none", True),
        ("zero3_activation_checkpointing", "none", "none", True),
        ("zero2_offload_activation_checkpointing", "cpu", "none", True),
        ("zero2_cpu_checkpointing", "none", "none", True),
        ("zero3_offload_cpu_checkpointing", "cpu", "cpu", True),
    ],
)
def test_what_is_offloaded_and_recomputed(name, optimizer, parameters, checkpointing):
    config = catalogue()[name].config
    assert offload_device(config, "optimizer") == optimizer
    assert offload_device(config, "parameters") == parameters
    assert activation_checkpointing(config) is checkpointing
    on_the_host = value_at(config, ("activation_checkpointing", "cpu_checkpointing")) or False
    assert on_the_host is ("cpu_checkpointing" in name)


@pytest.mark.parametrize("name", shipped_names())
def test_no_file_holds_what_belongs_to_the_run(name):
    config = catalogue()[name].config
    assert not [path for path in RUN_OWNED_KEYS if value_at(config, path) is not None]
    assert "scheduler" not in config


@pytest.mark.parametrize("name", shipped_names())
def test_deepspeed_reads_every_value(name):
    """Loaded, linted, resolved, and parsed by DeepSpeed itself, which keeps each value as it stands in the file."""
    from deepspeed.runtime.config import DeepSpeedConfig

    path = find_ds_config(name)
    ds_config = read_ds_config(path).config
    device = "cuda" if catalogue()[name].gpu_only else "cpu"
    assert not [finding for finding in lint(ds_config, path, device=device) if finding.severity == "error"]
    config = RunConfig(data="corpus", tokenizer="tokenizer", global_batch_size=8, micro_batch_size=2)
    resolved = resolve_ds_config(ds_config, config, world_size=1, model_hidden_size=768, nvme_path="/scratch/nvme")
    parsed = DeepSpeedConfig(copy.deepcopy(resolved))
    for block, attribute in MODELS.items():
        read = json.loads(getattr(parsed, attribute).model_dump_json(by_alias=True))
        for key, value in leaves(resolved.get(block, {})):
            assert value_at(read, key) == value, (block, *key)
    checkpointing = parsed.activation_checkpointing_config
    wanted = value_at(resolved, ("activation_checkpointing", "cpu_checkpointing")) or False
    assert (checkpointing.cpu_checkpointing, checkpointing.partition_activations) == (wanted, False)
    communication = {None: "None", "bf16": "torch.bfloat16", "fp16": "torch.float16"}
    assert str(parsed.communication_data_type) == communication[resolved.get("communication_data_type")]
    assert parsed.grad_accum_dtype == resolved["data_types"]["grad_accum_dtype"]
    assert parsed.optimizer_params["betas"] == resolved["optimizer"]["params"]["betas"]


# --------------------------------------------------------------------------------------------------------------------
# Why some values are what they are


@pytest.mark.parametrize(("stage", "per_step"), [(0, 2), (1, 3), (2, 3), (3, 2)])
def test_the_traffic_that_the_catalogue_states_was_counted_on_two_ranks(stage, per_step):
    """A step of one micro-batch: a ring of two ranks sends half of what one of many does."""
    name = f"zero{stage}"
    stated = [int(times or 1) for times in re.findall(r"(\d?)N per", catalogue()[name].cost)]
    assert sum(stated) == per_step
    record = json.loads((REPOSITORY / "records/2026-11-28-comparison-2-cores/raw.json").read_text())
    counted = {config["name"]: config["parts"]["sent_bytes"] for config in record["raw"]["stages"][0]["configs"]}
    parameters = 5_518_848
    assert counted[f"{name}_fp32 on 2"] == pytest.approx(per_step * 4 * parameters / 2, rel=1e-3)
    assert counted[f"{name} on 2"] == pytest.approx(per_step * 2 * parameters / 2, rel=1e-3)


def test_a_second_moment_in_bf16_cannot_shrink_by_a_thousandth():
    """The reason for beta2 = 0.95 where Adam's states are bf16."""
    import torch

    moments = torch.arange(2**7, 2**15, dtype=torch.int16).view(torch.bfloat16)
    moments = moments[(moments > 1e-30) & torch.isfinite(moments)]
    assert torch.equal((moments.float() * 0.999).bfloat16(), moments)
    assert ((moments.float() * 0.95).bfloat16() < moments).all()
    # Gradients of size 1 for 1,000 steps, of size 0.1 for 5,000 more: what is left of a second moment of 1.
    left = {(beta2, dtype): second_moment(beta2, dtype) for beta2 in (0.999, 0.95) for dtype in ("float32", "bfloat16")}
    assert left[0.999, "float32"] == pytest.approx(0.0142, abs=0.0005)
    assert left[0.999, "bfloat16"] > 0.6
    assert left[0.95, "bfloat16"] == pytest.approx(left[0.95, "float32"], rel=0.05)


def test_only_bf16_states_have_another_beta2():
    for name, entry in catalogue().items():
        in_bf16 = value_at(entry.config, ("bf16", "bf16_optimizer_states")) is True
        assert in_bf16 == ("bf16_states" in name)
        assert entry.config["optimizer"]["params"]["betas"][1] == (0.95 if in_bf16 else 0.999)


def second_moment(beta2: float, dtype: str) -> float:
    """The mean of Adam's second moments when gradients have fallen tenfold, in the given precision."""
    import torch

    generator = torch.Generator().manual_seed(0)
    moments = torch.zeros(4000, dtype=getattr(torch, dtype))
    for step in range(6000):
        gradient = torch.randn(4000, generator=generator) * (1.0 if step < 1000 else 0.1)
        moments = (beta2 * moments.float() + (1 - beta2) * gradient * gradient).to(moments.dtype)
    return moments.float().mean().item()


def test_quantized_gradients_travel_as_what_the_kernel_reads():
    """DeepSpeed's kernel takes the memory of any gradient for fp16; should that change, so may the file."""
    import deepspeed

    source = (Path(deepspeed.__file__).parent / "ops/csrc/quantization/pt_binding.cpp").read_text()
    kernel = source[source.index("ds_swizzle_quant(") :]
    assert "(__half*)input_vals.data_ptr()" in kernel[: kernel.index("return {")]
    quantized = [
        entry.config
        for entry in catalogue().values()
        if value_at(entry.config, ("zero_optimization", "zero_quantized_gradients"))
    ]
    assert quantized and all(config["communication_data_type"] == "fp16" for config in quantized)


# --------------------------------------------------------------------------------------------------------------------
# Training

# Two ranks build one engine after the other; a launch for each would take ten times as long.
TRAIN = """
import cpuinfo, functools, gc, json, sys, torch
import deepspeed, transformers.models.gpt2.modeling_gpt2
from codeparrot_ds.config.run_config import RunConfig
from codeparrot_ds.model.gpt2 import build_model
from codeparrot_ds.model.shapes import GPT2Shape
from codeparrot_ds.engine.engine import create_engine
from codeparrot_ds.engine.operators import build_operators
from codeparrot_ds.engine.ranks import join_ranks, leave_ranks
from codeparrot_ds.ds_config.facts import zero_stage
from codeparrot_ds.ds_config.file import find_ds_config, read_ds_config
from codeparrot_ds.ds_config.resolve import resolve_ds_config

names, folder = json.loads(sys.argv[1]), sys.argv[2]
# Every engine with its optimizer on the host asks for the processor, which takes a second.
cpuinfo.get_cpu_info = functools.cache(cpuinfo.get_cpu_info)
gc.freeze()  # what was imported: a collection after each config need not look through it
ranks = join_ranks()
shape = GPT2Shape(n_layer=2, n_embd=64, n_head=2, vocab_size=512, n_positions=32)
config = RunConfig(
    data="corpus", tokenizer="tokenizer", seq_length=32, global_batch_size=8, micro_batch_size=2, num_warmup_steps=0,
    learning_rate=3e-3, max_train_steps=50,
)
trained = {}
for name in names:
    path = find_ds_config(name)
    ds_config = resolve_ds_config(
        read_ds_config(path).config, config, world_size=2, model_hidden_size=64, nvme_path=f"{folder}/{name}"
    )
    build_operators(ds_config, "cpu")
    zero3 = ds_config if zero_stage(ds_config) == 3 else None
    model = build_model(shape, eos_token_id=0, seed=1, zero3_config=zero3, device=ranks.device)
    engine = create_engine(model, ds_config, config)
    rows = torch.randint(512, (8, 32), generator=torch.Generator().manual_seed(0))
    losses = []
    for step in range(4):
        total = 0.0
        for micro in range(2):
            ids = rows[4 * ranks.rank + 2 * micro :][:2]
            loss = engine(input_ids=ids, labels=ids).loss
            engine.backward(loss)
            engine.step()
            total += loss.item() / 4
        losses.append(float(ranks.sum(torch.tensor([total]))))
    states = next(iter(engine.basic_optimizer.state.values()), {})
    trained[name] = {
        "losses": losses,
        "grad_norm": float(engine.get_global_grad_norm()),
        "skipped": engine.skipped_steps,
        "optimizer": type(engine.optimizer).__name__,
        "adam": type(engine.basic_optimizer).__name__,
        "moments": str(states["exp_avg_sq"].dtype) if "exp_avg_sq" in states else None,
    }
    engine.destroy()
    del engine, model
    gc.collect()
leave_ranks()
print(json.dumps(trained))
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, dict]:
    """Losses of four steps of every file that trains on a CPU, and the classes that DeepSpeed chose for it."""
    folder = tmp_path_factory.mktemp("nvme")
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}
    shared |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TRAIN, json.dumps(names_for_cpu()), str(folder)],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        # Cold operators take minutes to build, and pytest gives a test ten.
        outputs = [process.communicate(timeout=540) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs[0][1][-3000:] + outputs[1][1][-3000:]
    return json.loads(outputs[0][0].splitlines()[-1])


@pytest.mark.parametrize("name", names_for_cpu())
def test_config_trains(trained, name):
    said = trained[name]
    reference = trained["zero1_fp32" if "fp32" in name and "accumulation" not in name else "zero1"]
    assert said["skipped"] == 0 and said["grad_norm"] > 0
    assert said["losses"][-1] < said["losses"][0] - 0.3
    # Another beta2 changes no step but the later ones.
    same_steps = 2 if "bf16_states" in name else 4
    assert said["losses"][:same_steps] == pytest.approx(reference["losses"][:same_steps], abs=0.02)


@pytest.mark.parametrize(
    ("name", "optimizer", "adam", "moments"),
    [
        ("zero1", "DeepSpeedZeroOptimizer", "FusedAdam", "torch.float32"),
        ("zero1_fp32_accumulation", "BF16_Optimizer", "FusedAdam", "torch.float32"),
        ("zero2_fp32_accumulation", "DeepSpeedZeroOptimizer", "FusedAdam", "torch.float32"),
        ("zero2_bf16_states", "DeepSpeedZeroOptimizer", "FusedAdam", "torch.bfloat16"),
        ("zero3_bf16_states", "DeepSpeedZeroOptimizer_Stage3", "FusedAdam", "torch.bfloat16"),
        ("zero2_offload", "DeepSpeedZeroOptimizer", "DeepSpeedCPUAdam", "torch.float32"),
        ("zero2_offload_bf16_states", "DeepSpeedZeroOptimizer", "DeepSpeedCPUAdam", "torch.bfloat16"),
        ("zero3_offload_optimizer", "DeepSpeedZeroOptimizer_Stage3", "DeepSpeedCPUAdam", "torch.float32"),
    ],
)
def test_config_makes_deepspeed_choose(trained, name, optimizer, adam, moments):
    said = trained[name]
    assert (said["optimizer"], said["adam"], said["moments"]) == (optimizer, adam, moments)
