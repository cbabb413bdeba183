import copy
import inspect
import re
from pathlib import Path

import pytest

from codeparrot_ds.config.run_config import PRESETS, RunConfig
from codeparrot_ds.ds_config.file import DsFile, find_ds_config, open_ds_config, read_ds_config, shipped_names
from codeparrot_ds.ds_config.known_keys import KEYS
from codeparrot_ds.ds_config.lint import check_ds_config, libaio_installed, lint, lint_file, version_notice
from codeparrot_ds.errors import UserError
from codeparrot_ds.model.shapes import find_shape, num_parameters
from tools.ds_configs import catalogue


def findings(ds_config, **kwargs):
    return [(finding.severity, finding.key) for finding in lint(ds_config, "mine.json", **kwargs)]


def messages(ds_config, **kwargs):
    return "\n".join(map(str, lint(ds_config, "mine.json", **kwargs)))


HPZ = "zero_optimization.zero_hpz_partition_size"
# What files for several hosts, and for weights beyond a host's memory, are warned of where a run has neither.
ONLY_FOR_MORE = {
    "zero3_hpz": lambda parameters, ranks: {HPZ} if ranks in (1, 2, 8) else set(),
    "zero3_zeropp": lambda parameters, ranks: (
        {HPZ, "zero_optimization.zero_quantized_gradients"} if ranks in (1, 2, 8) else set()
    ),
    "zero3_infinity": lambda parameters, ranks: (
        {"zero_optimization.offload_param.device"} if parameters / (ranks or 1) <= 5e8 else set()
    ),
}


@pytest.mark.parametrize("preset", ["small", "large", "demo"])
@pytest.mark.parametrize("name", shipped_names())
def test_shipped_files_are_clean(name, preset):
    run = RunConfig(**(PRESETS[preset] | {"compile": "deepcompile" in name}))
    parameters = num_parameters(find_shape(run.model, vocab_size=32_768, seq_length=run.seq_length))
    file = read_ds_config(find_ds_config(name))
    known = {"config": run, "parameters": parameters, "libaio": True}
    expected = ONLY_FOR_MORE.get(name, lambda *_: set())
    for world_size in (None, 1, 2, 8, 16):
        said = lint_file(file, device="cuda", world_size=world_size, **known)
        assert {finding.key for finding in said} == expected(parameters, world_size)
    on_cpu = {finding.key for finding in lint_file(file, device="cpu", **known)}
    assert bool(on_cpu - expected(parameters, None)) == catalogue()[name].gpu_only
    assert lint_file(file) == []


def test_fp16_on_a_machine_without_gpu_names_what_to_choose():
    said = messages(open_ds_config("zero2_fp16").config, device="cpu")
    assert said == (
        "mine.json: error: fp16.enabled: fp16 needs a GPU: DeepSpeed refuses it on a CPU without AVX512-FP16; "
        "choose zero2.json (bf16) or zero2_fp32.json"
    )


@pytest.mark.parametrize(
    ("ds_config", "key", "hint"),
    [
        ({"gradient_cliping": 1}, "gradient_cliping", "did you mean 'gradient_clipping'?"),
        ({"zero_optimisation": {}}, "zero_optimisation", "did you mean 'zero_optimization'?"),
        ({"optimiser": {}}, "optimiser", "did you mean 'optimizer'?"),
        ({"fp61": {}}, "fp61", "did you mean 'fp16'?"),
        ({"BF16": {}}, "BF16", "did you mean 'bf16'?"),
        ({"stage": 2}, "stage", "it belongs at zero_optimization.stage"),
        ({"overlap_comm": True}, "overlap_comm", "it belongs at zero_optimization.overlap_comm"),
        ({"zero_optimization": {"stages": 2}}, "zero_optimization.stages", "did you mean 'stage'?"),
        ({"zero_optimization": {"gradient_clipping": 1}}, "zero_optimization.gradient_clipping", "it belongs at"),
        (
            {"zero_optimization": {"stage": 1, "offload_optimizer": {"devise": "cpu"}}},
            "zero_optimization.offload_optimizer.devise",
            "did you mean 'device'?",
        ),
        ({"bf16": {"enable": True}}, "bf16.enable", "did you mean 'enabled'?"),
        ({"optimizer": {"type": "AdamW", "parms": {}}}, "optimizer.parms", "did you mean 'params'?"),
        (
            {"optimizer": {"type": "AdamW", "params": {"beta": [0.9, 0.99]}}},
            "optimizer.params.beta",
            "did you mean 'betas'?",
        ),
        (
            {"activation_checkpointing": {"partitioned_activations": True}},
            "activation_checkpointing.partitioned_activations",
            "did you mean 'partition_activations'?",
        ),
        ({"data_types": {"grad_accum_type": "fp32"}}, "data_types.grad_accum_type", "did you mean 'grad_accum_dtype'?"),
        ({"timers": {"throughput": {"enable": False}}}, "timers.throughput.enable", "did you mean 'enabled'?"),
        ({"amp": {"enabled": True}}, "amp", "DeepSpeed has removed"),
        ({"zero_optimization": {"mics_shard_size": 2}}, "zero_optimization.mics_shard_size", "DeepSpeed has removed"),
        (
            {"optimizer": {"type": "AdamW", "params": {"max_grad_norm": 1}}},
            "optimizer.params.max_grad_norm",
            "clipping",
        ),
    ],
)
def test_unknown_keys_are_named_with_the_nearest(ds_config, key, hint):
    (finding,) = lint(ds_config, "mine.json")
    assert (finding.file, finding.severity, finding.key) == ("mine.json", "error", key)
    assert hint in finding.message


def test_params_of_other_optimizers_are_not_judged():
    assert findings({"optimizer": {"type": "Muon", "params": {"momentum": 0.9}}}) == [("warning", "optimizer.type")]
    assert findings({"optimizer": {"type": "Lamb", "params": {"max_coef": 10}}})[0] == (
        "error",
        "optimizer.params.max_coef",
    )


def test_keys_of_the_run():
    ds_config = {"train_batch_size": 64, "optimizer": {"type": "AdamW", "params": {"lr": 5e-4}}, "gradient_clipping": 1}
    keys = ["train_batch_size", "gradient_clipping", "optimizer.params.lr"]
    assert findings(ds_config) == [("warning", key) for key in keys]
    assert findings(ds_config, config=RunConfig()) == [("error", "train_batch_size")]
    assert findings({"train_batch_size": "auto", "gradient_accumulation_steps": "auto"}) == []
    scheduler = {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 9}}}
    assert findings(scheduler) == [("warning", "scheduler")]
    assert findings(scheduler, config=RunConfig()) == [("error", "scheduler")]


@pytest.mark.parametrize(("size", "severity"), [(8, "error"), ("auto", "warning")])
def test_a_micro_batch_that_is_still_to_be_chosen_contradicts_none(size, severity):
    ds_config = open_ds_config("zero2").config | {"train_micro_batch_size_per_gpu": 12}
    config = RunConfig(micro_batch_size=size)
    assert findings(ds_config, config=config) == [(severity, "train_micro_batch_size_per_gpu")]
    assert findings({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}}}) == []
    assert findings({"wandb": {"enabled": True}}) == [("warning", "wandb")]


@pytest.mark.parametrize(
    ("ds_config", "key"),
    [
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "fp16.enabled"),
        ({"fp16": {"enabled": "true"}}, "fp16.enabled"),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": "5e7"}}, "zero_optimization.reduce_bucket_size"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage"),
        ({"zero_optimization": {"stage": "2"}}, "zero_optimization.stage"),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage"),
        ({"zero_optimization": True}, "zero_optimization"),
        ({"optimizer": "AdamW"}, "optimizer"),
        ({"optimizer": {"type": "AdamW", "params": []}}, "optimizer.params"),
        ({"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}, "data_types.grad_accum_dtype"),
        ({"zero_optimization": {"stage": 0, "cpu_offload": True}}, "zero_optimization.cpu_offload"),
        ({"zero_optimization": {"cpu_offload_params": True}}, "zero_optimization.cpu_offload_params"),
        (
            {"zero_optimization": {"stage": 2, "cpu_offload": True, "offload_optimizer": {"device": "cpu"}}},
            "zero_optimization.cpu_offload",
        ),
        (
            {"zero_optimization": {"stage": 3, "prefetch_bucket_size": 1, "stage3_prefetch_bucket_size": 2}},
            "zero_optimization.prefetch_bucket_size",
        ),
        ({"optimizer": {"type": "OneBitAdam", "params": {"freeze_step": 400}}}, "optimizer.type"),
        ({"zero_optimization": {"stage": 3, "leaf_module": {"names": "wte"}}}, "zero_optimization.leaf_module.names"),
        ({"gradient_clipping": -1}, "gradient_clipping"),
        ({"train_batch_size": 0}, "train_batch_size"),
        ({"train_batch_size": 10, "train_micro_batch_size_per_gpu": 4}, "train_batch_size"),
        ({"steps_per_print": "1e3"}, "steps_per_print"),
        ({"fp16": {"enabled": True, "loss_scale": -1}}, "fp16.loss_scale"),
        ({"zero_optimization": {"stage": 2, "overlap_comm": 1}}, "zero_optimization.overlap_comm"),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": None}}, "zero_optimization.reduce_bucket_size"),
        (
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            "zero_optimization.offload_param.device",
        ),
        (
            {"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}},
            "zero_optimization.offload_optimizer.device",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme", "nvme_path": "/n"}}},
            "zero_optimization.offload_optimizer.device",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
            "zero_optimization.offload_optimizer.nvme_path",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "gpu"}}},
            "zero_optimization.offload_optimizer.device",
        ),
        (
            {
                "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
                "optimizer": {"type": "Lamb", "params": {}},
            },
            "optimizer.type",
        ),
    ],
)
def test_wrong_values_and_conflicts(ds_config, key):
    assert [found for found in findings(ds_config) if found[0] == "error"] == [("error", key)]


def test_gradient_accumulation_dtype_has_many_names():
    assert findings({"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "bfloat16"}}) == []
    zero1 = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}}
    assert findings(zero1) == []


def test_all_findings_at_once():
    ds_config = {"fp61": {}, "gradient_cliping": 1, "zero_optimization": {"stage": 3, "ofload_param": {}}}
    assert len(findings(ds_config)) == 3


def test_findings_name_the_line(tmp_path):
    path = tmp_path / "c.json"
    path.write_text(
        '{\n  "zero_optimization": {\n    "stage": 3,\n    "offload_optimizer": {"device": "nvme"},\n    "x": 1\n  }\n}'
    )
    found = lint_file(read_ds_config(path))
    assert [(finding.line, finding.key) for finding in found] == [
        (4, "zero_optimization.offload_optimizer.nvme_path"),
        (5, "zero_optimization.x"),
    ]
    assert str(found[1]).startswith(
        f"{path}:5: error: zero_optimization.x: unknown key, which DeepSpeed 0.19.8 refuses"
    )
    assert found[1].as_json() == {
        "file": str(path),
        "key": "zero_optimization.x",
        "severity": "error",
        "message": found[1].message,
        "line": 5,
    }


@pytest.mark.parametrize(
    ("value", "is_right"),
    [(5e8, True), (500_000_000, True), ("5e8", False), ("500000000", False), (5e7 + 0.5, False), (-5e8, False)],
)
def test_sizes(value, is_right):
    # DeepSpeed takes 5e8; it refuses "5e8" and takes "500000000", which nothing else that reads the file does.
    assert (findings({"zero_optimization": {"stage": 2, "reduce_bucket_size": value}}) == []) == is_right


def test_what_is_written_wrong_is_judged_as_meant():
    mistyped = {"zero_optimisation": {"stage": "3", "overlap_comm": "true"}, "fp16": {"enabled": True}}
    assert [key for _, key in findings(mistyped)] == [
        "zero_optimisation",
        "zero_optimisation.stage",
        "zero_optimisation.overlap_comm",
    ]
    # Where the stage cannot be told, nothing is said of keys that depend on it.
    assert findings({"zero_optimization": {"stage": 7, "sub_group_size": 5}}) == [("error", "zero_optimization.stage")]


def test_auto_is_taken_where_somebody_fills_it():
    zenflow = {"zero_optimization": {"stage": 2, "zenflow": {"select_interval": "auto"}}}
    assert ("error", "zero_optimization.zenflow.select_interval") not in findings(zenflow)
    assert findings({"optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto"}}}) == []
    said = messages({"zero_optimization": {"stage": 3, "sub_group_size": "auto"}})
    assert 'zero_optimization.sub_group_size: is "auto", which means nothing here' in said


def test_keys_of_other_versions_say_so():
    said = messages(
        {"fp32_allreduce": True, "aio": {"thread_count": 1}, "elasticity": {}, "bf16": {"check_overflow": True}}
    )
    assert "warning: fp32_allreduce: is a key of another DeepSpeed version, which 0.19.8 ignores" in said
    assert "warning: aio.thread_count: is a key of another DeepSpeed version, which 0.19.8 ignores" in said
    assert "error: elasticity: is a key of another DeepSpeed version, which 0.19.8 refuses" in said
    assert "error: bf16.check_overflow: is a key of another DeepSpeed version, which 0.19.8 refuses" in said


def test_another_installed_version_is_said(monkeypatch):
    assert version_notice() is None
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.20.1")
    assert version_notice() == "checked against DeepSpeed 0.19.8, but 0.20.1 is installed: its keys may differ"


def test_keys_that_only_other_programs_use_are_errors_in_a_run():
    hybrid = {"hybrid_engine": {"enabled": True}, "optimizer": {"type": "Lion"}}
    assert {severity for severity, _ in findings(hybrid)} == {"warning"}
    assert {severity for severity, _ in findings(hybrid, config=RunConfig())} == {"error"}


def test_a_bucket_larger_than_the_model():
    stage2 = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 5e8}}
    assert findings(stage2, parameters=111_008_256) == [("warning", "zero_optimization.reduce_bucket_size")]
    assert findings(stage2, parameters=1_529_628_800) == [] and findings(stage2) == []
    unset = {"zero_optimization": {"stage": 2}}
    assert "default of 500,000,000 is larger than the model (111,008,256 parameters)" in messages(
        unset, parameters=111_008_256
    )
    assert findings({"zero_optimization": {"stage": 0}}, parameters=111_008_256) == []


def test_what_needs_this_machine():
    nvme = open_ds_config("zero3_nvme").config
    assert findings(nvme, libaio=False) == [("error", "zero_optimization.offload_optimizer.device")]
    assert findings(nvme, libaio=True) == findings(nvme) == []


def test_libaio_is_found_by_its_header(tmp_path, monkeypatch):
    for name in ("CPATH", "C_INCLUDE_PATH", "CONDA_PREFIX"):
        monkeypatch.delenv(name, raising=False)
    system, own = tmp_path / "system", tmp_path / "own"
    for folder in (system, own):
        folder.mkdir()
    assert not libaio_installed([system])
    (own / "libaio.h").touch()
    assert not libaio_installed([system])
    monkeypatch.setenv("CPATH", f"/nowhere:{own}")
    assert libaio_installed([system])
    monkeypatch.delenv("CPATH")
    (system / "libaio.h").touch()
    assert libaio_installed([system])


def test_ranks_that_a_secondary_partition_does_not_divide():
    hpz = {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}}
    assert findings(hpz, world_size=12) == [("error", HPZ)]
    assert findings(hpz, world_size=16) == []
    # One host has all of it already.
    assert findings(hpz, world_size=4) == findings(hpz, world_size=8) == [("warning", HPZ)]


def zero(stage, **keys):
    return {"zero_optimization": {"stage": stage, **keys}, "bf16": {"enabled": True}}


CPU, NVME = {"device": "cpu"}, {"device": "nvme", "nvme_path": "/n"}
BF16_STATES = {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
RUN = RunConfig(**PRESETS["small"])
SMALL = {"config": RUN, "parameters": 111_008_256, "model_hidden_size": 768}
# Combinations that ds_configs/README.md and docs/ warn of: wrong, right, what is known around it, and what is said.
SAID_IN_THE_DOCS = [
    (
        zero(3, zero_hpz_partition_size=8, offload_param=CPU),
        zero(3, zero_hpz_partition_size=8, offload_optimizer=CPU),
        {},
        HPZ,
        "warning",
        "users saw the loss stand still together with offload_param (DeepSpeed issue 6926)",
    ),
    (
        zero(3, zero_hpz_partition_size=8, zero_quantized_gradients=True) | {"communication_data_type": "fp16"},
        zero(3, zero_quantized_gradients=True) | {"communication_data_type": "fp16"},
        {"world_size": 8},
        "zero_optimization.zero_quantized_gradients",
        "warning",
        "gradients are quantized between hosts only",
    ),
    (
        zero(3, zero_quantized_weights=True),
        zero(3),
        {"world_size": 64, **SMALL},
        "zero_optimization.zero_quantized_weights",
        "error",
        "needs a model whose width (768) is a multiple of 8 x ranks",
    ),
    (
        zero(3, offload_param=NVME, reduce_bucket_size=5e7),
        zero(3, offload_param=NVME | {"buffer_size": 1e6}, reduce_bucket_size=5e7),
        SMALL,
        "zero_optimization.offload_param.device",
        "warning",
        "saves no memory: buffer_count x buffer_size pinned elements per rank are more than its share",
    ),
    (
        zero(2) | {"bf16": BF16_STATES},
        zero(2) | {"bf16": BF16_STATES, "optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.95]}}},
        {},
        "bf16.bf16_optimizer_states",
        "warning",
        "should shrink by less per step than bf16 can express",
    ),
    (
        zero(2) | {"communication_data_type": "bf16"},
        zero(2) | {"communication_data_type": "fp32"},
        {},
        "communication_data_type",
        "warning",
        "in which DeepSpeed communicates anyway",
    ),
    (
        zero(2) | {"bf16": {"enabled": True, "check_grad_overflow": True}},
        zero(2, offload_optimizer=CPU) | {"bf16": {"enabled": True, "check_grad_overflow": True}},
        {"config": RUN},
        "bf16.check_grad_overflow",
        "warning",
        "the norm of the gradient says the same",
    ),
]


@pytest.mark.parametrize(("wrong", "right", "known", "key", "severity", "words"), SAID_IN_THE_DOCS)
def test_what_the_docs_warn_of_is_found(wrong, right, known, key, severity, words):
    (found,) = [finding for finding in lint(wrong, "f", **known) if finding.key == key]
    assert found.severity == severity and words in found.message
    assert key not in [finding.key for finding in lint(right, "f", **known)]


def test_how_many_ranks_quantized_weights_go_with():
    quantized = zero(3, zero_quantized_weights=True)
    for width, allowed in ((768, {8, 16, 32}), (1600, {8})):
        assert {
            n for n in (8, 16, 32, 64) if findings(quantized, world_size=n, model_hidden_size=width) == []
        } == allowed


def test_a_second_moment_in_bf16_is_warned_of_from_where_it_cannot_shrink():
    def said(beta2):
        optimizer = {"type": "AdamW", "params": {"betas": [0.9, beta2]}}
        return findings(zero(2) | {"bf16": BF16_STATES, "optimizer": optimizer})

    assert said(0.995) == said(0.95) == []
    assert said(0.997) == said(0.999) == [("warning", "bf16.bf16_optimizer_states")]


# A block or key that costs something, one that does not, and the price in the warning.
COSTLY = [
    (
        {"activation_checkpointing": {"profile": False, "number_checkpoints": None}},
        "activation_checkpointing",
        "a third",
    ),
    ({"activation_checkpointing": {}}, None, ""),
    ({"activation_checkpointing": {"cpu_checkpointing": True, "profile": False}}, None, ""),
    ({"activation_checkpointing": {"profile": True}}, "activation_checkpointing.profile", "in every layer"),
    (
        {"activation_checkpointing": {"synchronize_checkpoint_boundary": True}},
        "activation_checkpointing.synchronize_checkpoint_boundary",
        "at both ends of every layer",
    ),
    ({"wall_clock_breakdown": True}, "wall_clock_breakdown", "waits for the device in every micro-batch"),
    ({"wall_clock_breakdown": False}, None, ""),
    ({"flops_profiler": {"enabled": True}}, "flops_profiler.enabled", "waits for the device in every micro-batch"),
    ({"flops_profiler": {"enabled": False, "profile_step": 1}}, None, ""),
    ({"comms_logger": {"enabled": True}}, "comms_logger", "waits for the device after every collective"),
    ({"comms_logger": {"enabled": False}}, "comms_logger", "is left out of a run here: DeepSpeed would switch it on"),
    ({"comms_logger": {}}, "comms_logger", "is left out of a run here: DeepSpeed would switch it on"),
    ({"memory_breakdown": True}, "memory_breakdown", "sets the peak of memory back"),
    ({"timers": {"throughput": {"enabled": True}}}, "timers.throughput.enabled", "twice in every micro-batch"),
    ({"timers": {"throughput": {"enabled": True, "synchronized": False}}}, None, ""),
]


@pytest.mark.parametrize(("block", "key", "price"), COSTLY)
def test_what_costs_something_unsaid_has_one_warning_with_its_price(block, key, price):
    said = lint(zero(2) | block, "f")
    assert [(finding.severity, finding.key) for finding in said] == ([("warning", key)] if key else [])
    assert all(price in finding.message for finding in said)


def test_deepspeed_still_switches_these_on_unsaid():
    from deepspeed.runtime.config import DeepSpeedConfig

    parsed = DeepSpeedConfig(
        {"train_batch_size": 1, "comms_logger": {"enabled": False}, "flops_profiler": {"enabled": True}}
    )
    assert parsed.comms_config.comms_logger_enabled
    assert parsed.wall_clock_breakdown


def test_deepspeed_still_ends_the_process_when_autotuning_is_on():
    from deepspeed.runtime.engine import DeepSpeedEngine

    assert "self._autotuning_exit()" in inspect.getsource(DeepSpeedEngine.step)
    assert "exit()" in inspect.getsource(DeepSpeedEngine._autotuning_exit)


@pytest.mark.parametrize("block", ["tensorboard", "wandb", "csv_monitor", "comet", "autotuning", "datastates_ckpt"])
def test_a_block_that_works_against_the_run_is_left_out_and_said(block):
    for known in ({}, {"config": RunConfig()}):
        (found,) = [finding for finding in lint({block: {"enabled": True}}, "f", **known) if finding.key == block]
        assert found.severity == "warning" and found.message.startswith("is left out of a run here: ")
    assert findings({block: {"enabled": False}}) == []


def test_check_for_a_program_raises_the_errors_and_returns_the_warnings():
    file = DsFile(Path("c.json"), {"zero_optimization": {"stage": 2, "sub_group_size": 5}}, {})
    (warning,) = check_ds_config(file)
    assert warning.key == "zero_optimization.sub_group_size"
    with pytest.raises(UserError, match=r"c.json: error: bf61: .*; c.json: error: fp16.enabled: must be true or false"):
        check_ds_config(DsFile(Path("c.json"), {"bf61": {}, "fp16": {"enabled": 1}}, {}))


def test_no_value_of_any_key_breaks_the_check():
    junk = [
        None,
        True,
        -1,
        0,
        0.5,
        1e300,
        "",
        "auto",
        "3",
        "x",
        [],
        [None],
        [{}],
        {},
        {"device": "nvme"},
        {"enabled": 1},
    ]
    base = open_ds_config("zero3_offload").config
    for block, kinds in KEYS.items():
        for key in [*kinds, "stages"]:
            for value in junk:
                config = copy.deepcopy(base)
                inner = config
                for part in block:
                    inner[part] = inner[part] if isinstance(inner.get(part), dict) else {}
                    inner = inner[part]
                inner[key] = value
                for known in ({}, {"config": RunConfig(), "world_size": 3, "parameters": 10**8, "device": "cpu"}):
                    for finding in lint(config, "f", **known):
                        assert finding.severity in ("error", "warning")
                        assert not re.search(r"\{(value|stage|precision|parameters)", finding.message)
