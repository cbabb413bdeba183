import copy
import json

import pytest

from codeparrot_ds.config.run_config import RunConfig
from codeparrot_ds.ds_config.facts import (
    activation_checkpointing,
    leaves,
    offload_device,
    precision,
    uses_nvme,
    zero_stage,
)
from codeparrot_ds.ds_config.file import find_ds_config, open_ds_config, read_ds_config, shipped_names
from codeparrot_ds.ds_config.resolve import resolve_ds_config
from codeparrot_ds.errors import UserError


def resolve(ds_config, config=None, *, world_size=2, **kwargs):
    config = config or RunConfig(global_batch_size=32, micro_batch_size=4)
    return resolve_ds_config(ds_config, config, world_size=world_size, model_hidden_size=256, **kwargs)


@pytest.mark.parametrize("name", ["zero2", "zero2.json"])
def test_shipped_file_is_found_by_name(name):
    assert find_ds_config(name).name == "zero2.json"


def test_own_file_is_found_by_path(tmp_path):
    path = tmp_path / "zero2.json"
    path.write_text("{}")
    assert find_ds_config(path) == path
    assert find_ds_config(str(path)) == path


def test_unknown_name_offers_the_nearest(tmp_path):
    with pytest.raises(UserError, match="did you mean 'zero2_offload'"):
        find_ds_config("zero2_ofload.json")
    with pytest.raises(UserError, match="is a folder"):
        find_ds_config(tmp_path)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('{\n  "fp16": {"enabled" true}\n}', "c.json:2:22: not JSON"),
        ('{"stage": 2 "b": true}', "c.json:1:13: not JSON: Expecting ',' delimiter"),
        ('{"enabled": True}', "c.json:1:13: not JSON: Expecting value"),
        # What is Hjson up to the mistake is read as DeepSpeed reads it: a comment is none.
        ('{ // c\n"fp16": {"enabled" true}\n}', "c.json:2:20: not JSON: Expecting ':' delimiter"),
        ('{ // c\n"type": AdamW, "b": 1\n}', "c.json:2:9: not JSON: text without quotes, which runs to the end of its"),
        ("{/* note\n}", "a comment or text that does not end"),
        ('{"a": 1e400}', "1e400 is too large for a number"),
        ("{'a': 1, # note\n \"a\": 2}", "key 'a' is given twice"),
        ("", "is empty"),
        ("  \n", "is empty"),
        ("[1]", "a DeepSpeed config is a JSON object"),
        ('{"a": 1, "a": 2}', "key 'a' is given twice"),
        ('{"a": NaN}', "NaN is not a JSON number"),
    ],
)
def test_what_is_not_json_names_the_place(tmp_path, content, sentence):
    path = tmp_path / "c.json"
    path.write_text(content)
    with pytest.raises(UserError) as error:
        read_ds_config(path)
    assert sentence in str(error.value) and str(path) in str(error.value)


def test_files_of_the_wrong_kind(tmp_path):
    (tmp_path / "c.yaml").write_text("a: 1")
    (tmp_path / "b.json").write_bytes(b"\xff\xfe")
    for name, sentence in (
        ("c.yaml", "is YAML"),
        ("b.json", "not a text file"),
        (".", "folder"),
        ("n.json", "no such"),
    ):
        with pytest.raises(UserError, match=sentence):
            read_ds_config(tmp_path / name)


@pytest.mark.parametrize("name", shipped_names())
def test_every_shipped_file_resolves_completely(name):
    ds_config = open_ds_config(name).config
    before = copy.deepcopy(ds_config)
    resolved = resolve(ds_config, nvme_path="/scratch/nvme")
    assert ds_config == before
    assert "auto" not in dict(leaves(resolved)).values()
    assert (resolved["train_batch_size"], resolved["train_micro_batch_size_per_gpu"]) == (32, 4)
    assert resolved["gradient_accumulation_steps"] == 4
    assert resolved["gradient_clipping"] == 1.0
    written = ds_config["optimizer"].get("params", {})
    assert resolved["optimizer"]["params"] == written | {"lr": 5e-4, "weight_decay": 0.1}
    assert resolved["timers"]["throughput"]["enabled"] is False
    assert resolved["wall_clock_breakdown"] is False
    assert json.loads(json.dumps(resolved)) == resolved


@pytest.mark.parametrize("name", [name for name in shipped_names() if "fp16" not in name])
def test_deepspeed_accepts_every_resolved_file(name):
    from deepspeed.runtime.config import DeepSpeedConfig

    resolved = resolve(open_ds_config(name).config, world_size=1, nvme_path="/scratch/nvme")
    parsed = DeepSpeedConfig(copy.deepcopy(resolved))
    assert parsed.zero_optimization_stage == zero_stage(resolved)
    assert parsed.bfloat16_config.enabled == (precision(resolved) == "bf16")
    assert parsed.gradient_clipping == 1.0
    assert parsed.optimizer_params["lr"] == 5e-4
    assert parsed.timers_config.enabled is False


def test_nvme_path_is_the_runs_unless_written():
    ds_config = open_ds_config("zero3_nvme").config
    offload = resolve(ds_config, nvme_path="/run/nvme")["zero_optimization"]["offload_optimizer"]
    assert offload["nvme_path"] == "/run/nvme"
    ds_config["zero_optimization"]["offload_optimizer"]["nvme_path"] = "/fast"
    assert resolve(ds_config, nvme_path="/run/nvme")["zero_optimization"]["offload_optimizer"]["nvme_path"] == "/fast"
    ds_config["zero_optimization"]["offload_optimizer"]["nvme_path"] = "auto"
    with pytest.raises(UserError, match="offload_optimizer.nvme_path"):
        resolve(ds_config)


@pytest.mark.parametrize(
    ("ds_config", "key"),
    [
        ({"train_batch_size": 64}, "train_batch_size is 64 but the run config's global_batch_size says 32"),
        ({"train_micro_batch_size_per_gpu": 1}, "train_micro_batch_size_per_gpu is 1"),
        ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps is 1"),
        ({"gradient_clipping": 0.5}, "gradient_clipping is 0.5 but the run config's max_grad_norm says 1.0"),
        ({"gradient_clipping": True}, "gradient_clipping is True"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1}}}, "optimizer.params.lr is 1"),
        ({"optimizer": {"type": "AdamW", "params": {"weight_decay": 0}}}, "optimizer.params.weight_decay is 0"),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5}}}, "scheduler belongs to the run config"),
        ({"optimizer": "AdamW"}, "optimizer must be an object"),
        ({"zero_optimization": {"stage": 3, "sub_group_size": "auto"}}, 'zero_optimization.sub_group_size is "auto"'),
    ],
)
def test_conflicts_name_the_file_and_the_key(ds_config, key):
    with pytest.raises(UserError) as error:
        resolve(ds_config, source="mine.json")
    assert str(error.value).startswith("mine.json: ")
    assert key in str(error.value)


def test_all_conflicts_are_raised_at_once():
    with pytest.raises(UserError, match="train_batch_size.*gradient_clipping"):
        resolve({"train_batch_size": 1, "gradient_clipping": 0.1})


def test_equal_values_of_the_run_are_accepted():
    assert resolve({"train_batch_size": 32, "gradient_clipping": 1})["gradient_clipping"] == 1.0


def test_a_trainer_users_file_with_auto_everywhere():
    # The ZeRO-3 example of the Trainer's DeepSpeed documentation.
    ds_config = {
        "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000},
        "bf16": {"enabled": "auto"},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
        },
        "scheduler": {
            "type": "WarmupLR",
            "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"},
        },
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
        },
        "data_types": {"keep_in_fp32_modules": "auto"},
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "wall_clock_breakdown": False,
    }
    resolved = resolve(ds_config)
    assert "auto" not in dict(leaves(resolved)).values()
    assert "scheduler" not in resolved
    assert precision(resolved) == "bf16" and resolved["fp16"]["enabled"] is False
    zero = resolved["zero_optimization"]
    assert (zero["reduce_bucket_size"], zero["stage3_prefetch_bucket_size"]) == (65_536, 58_982)
    assert zero["stage3_param_persistence_threshold"] == 2560
    assert resolved["optimizer"]["params"]["betas"] == [0.9, 0.999]


def test_fp16_asked_for_wins_over_an_open_bf16():
    resolved = resolve({"fp16": {"enabled": True}, "bf16": {"enabled": "auto"}})
    assert precision(resolved) == "fp16" and resolved["bf16"]["enabled"] is False
    assert precision(resolve({"fp16": {"enabled": "auto"}})) == "fp16"


def test_a_file_without_optimizer_or_zero_gets_the_recipes_optimizer_and_stage_0():
    resolved = resolve({})
    assert resolved["optimizer"]["type"] == "AdamW"
    assert zero_stage(resolved) == 0 and precision(resolved) == "fp32"


def test_blocks_that_work_against_the_run_are_left_out():
    blocks = {block: {"enabled": True} for block in ("wandb", "tensorboard", "csv_monitor", "comet", "autotuning")}
    blocks |= {"checkpoint": {"writer": {"type": "fast"}}, "comms_logger": {"enabled": False}}
    blocks["csv_monitor"]["output_path"] = "$NONE_SUCH/logs"  # nor is anything in them looked at
    assert resolve(blocks) == resolve({})
    assert resolve({"comms_logger": {"enabled": True}})["comms_logger"] == {"enabled": True}


def test_a_timer_that_the_user_asks_for_stays():
    assert resolve({"timers": {"throughput": {"enabled": True}}})["timers"]["throughput"]["enabled"] is True


def test_what_a_config_says():
    nvme = open_ds_config("zero3_nvme").config
    assert (offload_device(nvme, "optimizer"), offload_device(nvme, "parameters")) == ("nvme", "cpu")
    assert uses_nvme(nvme) and not uses_nvme(open_ds_config("zero3_offload").config)
    assert offload_device({}, "optimizer") == "none"
    assert zero_stage({}) == 0 and zero_stage(nvme) == 3
    assert precision({"bfloat16": {"enabled": True}}) == "bf16"
    assert activation_checkpointing(open_ds_config("zero2_activation_checkpointing").config)
    assert not activation_checkpointing(nvme)
