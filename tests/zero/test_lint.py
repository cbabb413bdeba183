import pytest

from codeparrot_ds.config import RunConfig
from codeparrot_ds.zero.ds_config import find_ds_config, load_ds_config, shipped_names
from codeparrot_ds.zero.lint import lint


def findings(ds_config, **kwargs):
    return [(finding.severity, finding.key) for finding in lint(ds_config, "mine.json", **kwargs)]


def messages(ds_config, **kwargs):
    return "\n".join(map(str, lint(ds_config, "mine.json", **kwargs)))


@pytest.mark.parametrize("name", shipped_names())
def test_shipped_files_are_clean(name):
    path = find_ds_config(name)
    assert lint(load_ds_config(path), path, config=RunConfig(), device="cuda") == []
    on_cpu = lint(load_ds_config(path), path, config=RunConfig(), device="cpu")
    assert bool(on_cpu) == ("fp16" in name)


def test_fp16_on_a_machine_without_gpu_names_what_to_choose():
    said = messages(load_ds_config(find_ds_config("zero2_fp16")), device="cpu")
    assert said == (
        "mine.json: error: fp16.enabled: fp16 needs a GPU: DeepSpeed refuses it on the CPU; "
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
            {"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}},
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
        ({"aio": {"thread_count": 1}}, "aio.thread_count", "unknown key"),
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
    assert findings({"optimizer": {"type": "Lamb", "params": {"max_coeff": 10}}}) == []


def test_keys_of_the_run():
    ds_config = {"train_batch_size": 64, "optimizer": {"type": "AdamW", "params": {"lr": 5e-4}}, "gradient_clipping": 1}
    keys = ["train_batch_size", "gradient_clipping", "optimizer.params.lr"]
    assert findings(ds_config) == [("warning", key) for key in keys]
    assert findings(ds_config, config=RunConfig()) == [("error", "train_batch_size")]
    assert findings({"train_batch_size": "auto", "gradient_accumulation_steps": "auto"}) == []
    assert findings({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 9}}}) == [("error", "scheduler")]
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
        ({"zero_optimization": {"stage": 2, "cpu_offload": True}}, "zero_optimization.cpu_offload"),
        (
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            "zero_optimization.offload_param",
        ),
        (
            {"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}},
            "zero_optimization.offload_optimizer",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme", "nvme_path": "/n"}}},
            "zero_optimization.offload_optimizer",
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
        (
            {
                "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
                "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
            },
            "optimizer.params.torch_adam",
        ),
    ],
)
def test_wrong_values_and_conflicts(ds_config, key):
    assert findings(ds_config) == [("error", key)]


def test_gradient_accumulation_dtype_has_many_names():
    assert findings({"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "bfloat16"}}) == []
    zero1 = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}}
    assert findings(zero1) == []


def test_all_findings_at_once():
    ds_config = {"fp61": {}, "gradient_cliping": 1, "zero_optimization": {"stage": 3, "ofload_param": {}}}
    assert len(findings(ds_config)) == 3
