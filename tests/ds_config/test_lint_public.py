"""Well-known configs of other programs, written down from their documentation: nothing untrue is said of them.

``findings`` of each are all that is said, and all of it is so: old names, keys that DeepSpeed 0.19.8 reads and does not
use, and what a run here has itself.
"""

import copy
import json
from pathlib import Path

import pytest

from codeparrot_ds.config.run_config import RunConfig
from codeparrot_ds.ds_config.facts import leaves
from codeparrot_ds.ds_config.file import DsFile
from codeparrot_ds.ds_config.lint import lint
from codeparrot_ds.ds_config.resolve import modern, resolve

PUBLIC = json.loads(Path(__file__).with_name("public_configs.json").read_text())


def test_there_are_at_least_twelve():
    assert len(PUBLIC) >= 12
    assert all(entry["source"].startswith("https://") for entry in PUBLIC.values())


@pytest.mark.parametrize("name", PUBLIC)
def test_only_what_is_so_is_said(name):
    said = [[finding.severity, finding.key] for finding in lint(PUBLIC[name]["config"], name)]
    assert said == PUBLIC[name]["findings"]
    assert not [key for severity, key in said if severity == "error"]


@pytest.mark.parametrize("name", PUBLIC)
def test_deepspeed_takes_them_as_well(name):
    from deepspeed.runtime.config import DeepSpeedConfig

    config = copy.deepcopy(PUBLIC[name]["config"])
    # "auto" of the batch is what the Trainer fills in; DeepSpeed drops or ignores the others at this point.
    for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        config.pop(key, None)
    config["train_batch_size"] = 1
    parsed = DeepSpeedConfig(config)
    assert parsed.zero_optimization_stage == PUBLIC[name]["config"].get("zero_optimization", {}).get("stage", 0)


@pytest.mark.parametrize("name", [name for name in PUBLIC if name.startswith(("transformers", "axolotl", "LLaMA"))])
def test_files_that_leave_the_run_to_the_run_can_train_here(name):
    file = DsFile(Path("public.json"), PUBLIC[name]["config"], {})
    resolved = resolve(file, RunConfig(), world_size=2, model_hidden_size=768).config
    assert "auto" not in dict(leaves(resolved)).values()
    assert not [f for f in lint(resolved, name, config=RunConfig(), world_size=2) if f.severity == "error"]


def test_old_names_mean_what_deepspeed_takes_them_for():
    from deepspeed.runtime.config import DeepSpeedConfig

    old = {
        "train_batch_size": 1,
        "bfloat16": {"enabled": True},
        "zero_optimization": {
            "stage": 3,
            "cpu_offload": True,
            "cpu_offload_param": True,
            "stage3_gather_fp16_weights_on_model_save": True,
            "prefetch_bucket_size": 7,
        },
    }
    now, renamed = modern(old)
    assert renamed["bf16",] == ("bfloat16",) and len(renamed) == 5
    by_old, by_new = DeepSpeedConfig(copy.deepcopy(old)), DeepSpeedConfig(copy.deepcopy(now))
    assert by_old.bfloat16_config == by_new.bfloat16_config
    for field in type(by_new.zero_config).model_fields:
        if not field.startswith("cpu_offload") and "fp16" not in field:
            assert getattr(by_old.zero_config, field) == getattr(by_new.zero_config, field), field
    switched_off, _ = modern({"zero_optimization": {"stage": 2, "cpu_offload": False}})
    assert switched_off == {"zero_optimization": {"stage": 2}}
