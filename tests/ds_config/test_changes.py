import copy
import json
from pathlib import Path

import pytest

from codeparrot_ds.config.run_config import RunConfig
from codeparrot_ds.ds_config.changes import changes, explain, field_origins, saved_ds_config, sources_as_json
from codeparrot_ds.ds_config.facts import leaves
from codeparrot_ds.ds_config.file import DsFile, find_ds_config, read_ds_config, shipped_names
from codeparrot_ds.ds_config.resolve import resolve


def resolved(file, config=None, **kwargs):
    config = config or RunConfig(global_batch_size=32, micro_batch_size=4)
    kwargs = {"world_size": 2, "model_hidden_size": 256, "nvme_path": "/run/nvme"} | kwargs
    return resolve(file, config, **kwargs)


def own(config):
    return DsFile(Path("own.json"), config, {})


@pytest.mark.parametrize("name", shipped_names())
def test_every_value_of_every_shipped_file_has_a_source(name):
    file = read_ds_config(find_ds_config(name))
    result = resolved(file)
    assert set(result.sources) == {path for path, _ in leaves(result.config)}
    text = file.path.read_text().splitlines()
    for path, value in leaves(file.config):
        place, line = result.sources[path].rsplit(":", 1) if value != "auto" else (str(file.path), "0")
        assert place == str(file.path)
        assert value == "auto" or f'"{path[-1]}"' in text[int(line) - 1]


def test_sources_tell_file_run_auto_mend_default_and_old_name(tmp_path):
    path = tmp_path / "own.json"
    path.write_text(
        '{"zero_optimization": {\n"stage": 2,\n"reduce_bucket_size": "auto",\n"cpu_offload": true},\n"fp16": {}}'
    )
    origins = {"learning_rate": "option", "weight_decay": "preset small"}
    sources = sources_as_json(resolved(read_ds_config(path), origins=origins))
    assert sources == {
        "zero_optimization.stage": f"{path}:2",
        "zero_optimization.reduce_bucket_size": f'"auto" at {path}:3: the model\'s width squared',
        "zero_optimization.offload_optimizer.device": f"{path}:4, as zero_optimization.cpu_offload",
        "fp16": f"{path}:5",
        "optimizer.type": "the recipe's: the file names no optimizer",
        "optimizer.params.betas": "the recipe's: the file names no optimizer",
        "optimizer.params.eps": "the recipe's: the file names no optimizer",
        "optimizer.params.lr": "run config: learning_rate (option)",
        "optimizer.params.weight_decay": "run config: weight_decay (preset small)",
        "train_batch_size": "run config: global_batch_size",
        "train_micro_batch_size_per_gpu": "run config: micro_batch_size",
        "gradient_accumulation_steps": "run config: global_batch_size / (micro_batch_size x world_size) = 32 / (4 x 2)",
        "gradient_clipping": "run config: max_grad_norm",
        "timers.throughput.enabled": "set here: DeepSpeed's own default costs time",
        "wall_clock_breakdown": "DeepSpeed's default",
        "steps_per_print": "set here: the run has its own log, and DeepSpeed's costs time",
    }


def test_deepspeeds_own_auto_stays():
    zenflow = {"zero_optimization": {"stage": 2, "zenflow": {"select_interval": "auto"}}}
    assert resolved(own(zenflow)).config["zero_optimization"]["zenflow"] == {"select_interval": "auto"}


def test_sizes_are_whole_numbers_as_deepspeed_reads_them():
    result = resolved(own({"zero_optimization": {"stage": 2, "reduce_bucket_size": 5e7}, "gradient_clipping": 1.0}))
    size = result.config["zero_optimization"]["reduce_bucket_size"]
    assert size == 50_000_000 and type(size) is int
    assert type(result.config["gradient_clipping"]) is float


def test_null_blocks_are_filled_like_missing_ones():
    result = resolved(own({"timers": {"throughput": None}, "optimizer": {"type": "AdamW", "params": None}})).config
    assert result["timers"] == {"throughput": {"enabled": False}}
    assert result["optimizer"]["params"] == {"lr": 5e-4, "weight_decay": 0.1}


def test_explanation_is_in_columns():
    lines = explain(resolved(own({"zero_optimization": {"stage": 2}})))
    assert lines[0].split() == ["zero_optimization.stage", "2", "own.json"]
    column = lines[0].index("own.json")
    assert all(line[column - 2 : column] == "  " and line[column] != " " for line in lines)


def test_origins_of_fields(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("learning_rate: 1e-3\nseed: 2\n")
    origins = field_origins("large", path, {"seed": 3, "hostfile": "h"})
    assert origins["micro_batch_size"] == "preset large"
    assert origins["learning_rate"] == str(path)
    assert origins["seed"] == "option"
    assert origins["dropout"] == "default" and "hostfile" not in origins


# --------------------------------------------------------------------------------------------------------------------
# Changes of a resumed run


def change_of(before, after):
    """What is said of going on with `after` where `before` was saved, as key → refused."""
    found = changes(resolved(own(before)).config, resolved(own(after)).config)
    return {change.key: bool(change.refused) for change in found}


ADAM = {"optimizer": {"type": "AdamW", "params": {}}}


@pytest.mark.parametrize("before", shipped_names())
def test_a_run_may_go_on_with_any_shipped_file(before):
    saved = resolved(read_ds_config(find_ds_config(before))).config
    for after in shipped_names():
        found = changes(saved, resolved(read_ds_config(find_ds_config(after))).config)
        assert [str(change) for change in found if change.refused] == []
        assert bool(found) == (before != after)


@pytest.mark.parametrize(
    ("before", "after", "refused"),
    [
        (ADAM, {"optimizer": {"type": "Adam", "params": {}}}, False),
        (ADAM, {"optimizer": {"type": "adamw", "params": {}}}, False),
        (ADAM, {"optimizer": {"type": "Adam", "params": {"adam_w_mode": True}}}, False),
        (ADAM, {"optimizer": {"type": "Adam", "params": {"adam_w_mode": False}}}, True),
        (ADAM, {"optimizer": {"type": "Lion", "params": {}}}, True),
        (ADAM, {"optimizer": {"type": "AdamW", "params": {"bias_correction": False}}}, True),
        (ADAM, {"optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.95]}}}, False),
        (ADAM, {"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}, False),
    ],
)
def test_what_the_optimizers_state_means_must_stay(before, after, refused):
    assert any(change_of(before, after).values()) == refused


def test_changes_say_from_what_to_what():
    saved = resolved(own({"zero_optimization": {"stage": 2, "reduce_bucket_size": 1}})).config
    now = copy.deepcopy(saved)
    now["zero_optimization"] = {"stage": 3, "overlap_comm": True}
    now["optimizer"]["type"] = "Lion"
    assert list(map(str, changes(saved, now))) == [
        "zero_optimization.stage 2 -> 3",
        "zero_optimization.reduce_bucket_size 1 -> unset",
        'optimizer.type "AdamW" -> "Lion" (the checkpoint has the other optimizer\'s state)',
        "zero_optimization.overlap_comm unset -> true",
    ]
    assert changes(saved, copy.deepcopy(saved)) == []


def test_reading_a_saved_config(tmp_path):
    path = tmp_path / "ds_config.json"
    assert saved_ds_config(path) is None
    path.write_text("{broken")
    assert saved_ds_config(path) is None
    path.write_text(json.dumps({"fp16": {}}))
    assert saved_ds_config(path) == {"fp16": {}}
