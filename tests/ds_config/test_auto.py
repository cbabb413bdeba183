"""An ``"auto"`` and the value that it becomes are the same to the check and to the run.

``more_public_configs.json`` has keys and values of configs that public projects ship, by project and file, beside those
of ``public_files.json``.
"""

import copy
import functools
import json
import re
from pathlib import Path

import pytest

from codeparrot_ds.config.run_config import RunConfig
from codeparrot_ds.ds_config.facts import leaves, set_value, value_at
from codeparrot_ds.ds_config.file import DsFile, open_ds_config, read_hjson, shipped_names
from codeparrot_ds.ds_config.known_keys import is_finite
from codeparrot_ds.ds_config.lint import lint, lint_file
from codeparrot_ds.ds_config.resolve import RUN_OWNED_KEYS, fill, fills_auto, modern, nvme_folder, resolve
from codeparrot_ds.errors import UserError
from codeparrot_ds.model.shapes import find_shape, num_parameters

HERE = Path(__file__).parent
KNOWN = json.loads((HERE / "public_configs.json").read_text())
FILES = json.loads((HERE / "public_files.json").read_text())
MORE = json.loads((HERE / "more_public_configs.json").read_text())
PUBLIC = {name: entry["config"] for name, entry in (KNOWN | FILES).items()} | MORE
SHIPPED = {name: open_ds_config(name).config for name in shipped_names()}
SHAPE = find_shape("gpt2", vocab_size=32_768, seq_length=1024)
MODEL = {"parameters": num_parameters(SHAPE), "model_hidden_size": SHAPE.n_embd}
OLD, NEW, T4, H100 = ("fp32",), ("bf16", "fp32"), ("fp16", "fp32"), ("bf16", "fp16", "fp32")
MACHINES = {"cuda": (H100, T4), "cpu": (NEW, OLD)}


def run_for(config):
    """The run that a file with values of its own wants."""
    said = {RUN_OWNED_KEYS[path]: value_at(config, path) for path in RUN_OWNED_KEYS}
    said = {field: value for field, value in said.items() if is_finite(value) and field in RunConfig.__annotations__}
    steps, rows = config.get("gradient_accumulation_steps"), said.get("global_batch_size", 0)
    micro = said.get("micro_batch_size") or (max(1, rows // (2 * steps)) if is_finite(steps) else 1)
    whole = 2 * micro * (steps if is_finite(steps) else 4)
    return RunConfig(**{"micro_batch_size": micro, "global_batch_size": whole} | said)


def file_of(config, precisions):
    return DsFile(Path("f.json"), config, read_hjson(json.dumps(config, indent=1))[1], precisions)


def filled(config, run, precisions):
    """The values that the autos of a config became, by the key that each group of them stands at."""
    folder = None if run is None else nvme_folder(run)
    hidden = None if run is None else SHAPE.n_embd
    result, _ = fill(file_of(config, precisions), run, world_size=2, model_hidden_size=hidden, nvme_path=folder)
    groups = {}
    for path, auto in result.autos.items():
        groups.setdefault(auto.key, {})[path] = value_at(result.config, path)
    return groups


def judged(config, run, device, precisions):
    """All that is said of a config, but for where an "auto" is named, and what a run makes of it."""
    file = file_of(config, precisions)
    known = MODEL | {"world_size": 2, "config": run} if run else {}
    findings = lint_file(file, device=device, **known)
    said = sorted((f.severity, f.key, without_auto(f.message)) for f in findings)
    if run is None:
        return said, None
    try:
        folder = nvme_folder(run)
        return said, resolve(file, run, world_size=2, model_hidden_size=SHAPE.n_embd, nvme_path=folder).config
    except UserError as error:
        return said, str(error)


def without_auto(message):
    return re.sub(r' \([\w.]+ is [^()]+ here, by the "auto".*\)$', "", message)


def with_values(config, values):
    """A copy with values at the keys, under the names that the file has for them."""
    changed = copy.deepcopy(config)
    _, renamed = modern(config)
    for path, value in values.items():
        old = next(((*old, *path[len(new) :]) for new, old in renamed.items() if path[: len(new)] == new), path)
        set_value(changed, old, value)
    return changed


def pairs(config, run, precisions):
    """Pairs of configs that mean the same: with an "auto", and with what it becomes."""
    groups = filled(config, run, precisions)
    for values in [*groups.values(), {path: value for group in groups.values() for path, value in group.items()}]:
        if values:
            yield config, with_values(config, values)
    now, _ = modern(config)
    standing = {path: value for path, value in leaves(now) if value != "auto" and fills_auto(path)}
    for path in standing:
        opened = with_values(config, {path: "auto"})
        values = filled(opened, run, precisions).get(path)
        # An "auto" that would bring more than what stands there means something else.
        if values and all(standing.get(key) == value for key, value in values.items()):
            yield opened, config


@pytest.mark.parametrize(("device", "precisions"), [(d, each) for d, both in MACHINES.items() for each in both])
def test_an_auto_is_what_it_becomes(device, precisions):
    differences, tried, look = [], 0, functools.lru_cache(None)(lambda text, run: judged(json.loads(text), *run))
    for name, config in (SHIPPED | PUBLIC).items():
        for run in (None, run_for(config)):
            key = (run, device, precisions)
            for opened, closed in pairs(config, run, precisions):
                tried += 1
                if look(json.dumps(opened), key) != look(json.dumps(closed), key):
                    differences.append((name, run is not None, opened, closed))
    assert differences == []
    assert tried > 500


def test_enough_configs_of_enough_projects_are_tried():
    assert len(MORE) >= 30 and len(PUBLIC) > 70 and len(SHIPPED) > 30
    texts = [json.dumps(config, sort_keys=True) for name, config in PUBLIC.items() if name not in KNOWN]
    assert len(set(texts)) == len(texts)


# --------------------------------------------------------------------------------------------------------------------
# Cases


def said(config, *, precisions=H100, device="cuda", run=None, **known):
    known = (MODEL | {"world_size": 2, "config": run} if run else {}) | known
    return {f.key: f for f in lint_file(file_of(config, precisions), device=device, **known)}


ACCUMULATION = "data_types.grad_accum_dtype"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(("accumulation", "wrong"), [("fp32", NEW), ("bf16", OLD)])
def test_accumulation_is_held_against_the_precision_that_is_chosen(device, accumulation, wrong):
    config = {"bf16": {"enabled": "auto"}, "data_types": {"grad_accum_dtype": accumulation}}
    for precisions in (NEW, OLD):
        found = said(config, device=device, precisions=precisions, run=RunConfig())
        assert (ACCUMULATION in found) == (precisions == wrong)
        if precisions == wrong:
            assert found[ACCUMULATION].severity == "error" and found[ACCUMULATION].line == 6
            value, names = "true" if precisions == NEW else "false", " or ".join(precisions)
            because = f'bf16.enabled is {value} here, by the "auto" on line 3: the device trains in {names}'
            assert found[ACCUMULATION].message.endswith(f" ({because})")


def test_a_bucket_that_follows_the_width_is_set():
    config = {"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}, "bf16": {"enabled": True}}
    assert said(config, run=RunConfig()) == {} == said(config, **MODEL)
    # Where only the number of parameters is known, nothing can be said of it.
    assert said(config, parameters=MODEL["parameters"]) == {}
    unset = {"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}}
    assert "500,000,000" in said(unset, run=RunConfig())["zero_optimization.stage"].message


def test_an_auto_at_a_stage_without_a_use_for_it_is_as_inert_as_its_value():
    for key in ("stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"):
        config = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 5e7, key: "auto"}, "bf16": {"enabled": True}}
        message = said(config, run=RunConfig())[f"zero_optimization.{key}"].message
        assert message.startswith("does nothing at stage 2: it is for stage 3 (") and 'the "auto" on line 5' in message
        assert said(config) == {}


def test_clipping_is_the_runs():
    config = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 5e7, "compute_grad_norm": False}}
    config["gradient_clipping"] = "auto"
    assert said(config) == {} == said(config, run=RunConfig(max_grad_norm=0.0))
    found = said(config, run=RunConfig())["zero_optimization.compute_grad_norm"]
    assert found.severity == "error" and found.line == 5
    assert found.message.endswith('(gradient_clipping is 1.0 here, by the "auto" on line 7: run config: max_grad_norm)')


def test_what_an_auto_switches_on_in_another_block_is_judged_where_it_stands():
    config = {"bf16": {"enabled": "auto"}, "torch_autocast": {"enabled": True, "dtype": "float16"}}
    found = said(config, precisions=T4)["torch_autocast.enabled"]
    assert found.message.startswith("fp16 and torch_autocast are two kinds of mixed precision")
    assert 'fp16.enabled is true here, by the "auto" of bf16.enabled on line 3' in found.message
    # A run that began in fp16 and goes on where there is none.
    file = DsFile(Path("f.json"), *read_with_lines({"bf16": {"enabled": "auto"}}), NEW, began="fp16")
    (found,) = lint_file(file, device="cpu")
    assert (found.key, found.line) == ("fp16.enabled", 3)


def read_with_lines(config):
    return config, read_hjson(json.dumps(config, indent=1))[1]


def test_quantized_gradients_and_fp16_behind_an_auto():
    quantized = {"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}, "bf16": {"enabled": "auto"}}
    assert "zero_optimization.zero_quantized_gradients" in said(quantized)
    assert said(quantized, precisions=T4) == {}
    both = {"fp16": {"enabled": "auto"}, "torch_autocast": {"enabled": True}}
    assert "torch_autocast.enabled" in said(both, precisions=T4)
    assert said(both, device="cpu", precisions=NEW) == {}
    assert "data_types.param_dtype" in said({"bf16": {"enabled": "auto"}, "data_types": {"param_dtype": "fp32"}})


def test_a_batch_that_no_run_can_make_is_said_before_the_run_is_known():
    config = {"train_batch_size": 10, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": "auto"}
    assert said(config)["train_batch_size"].severity == "error"
    assert said(config | {"train_batch_size": 12})["train_batch_size"].severity == "warning"


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"optimizer": {"type": "auto"}}, "optimizer.type"),
        ({"optimizer": {"type": "SGD", "params": {"momentum": "auto"}}}, "optimizer.params.momentum"),
        ({"zero_optimization": {"stage": 3, "stage3_max_live_parameters": "auto"}}, None),
        ({"communication_data_type": "auto"}, "communication_data_type"),
        ({"aio": {"block_size": "auto"}}, "aio.block_size"),
    ],
)
def test_an_auto_that_nobody_fills_is_refused_by_the_check_as_by_the_run(config, key):
    found = said(config)[key or "zero_optimization.stage3_max_live_parameters"]
    assert found.severity == "error" and 'is "auto", which means nothing here' in found.message
    with pytest.raises(UserError, match='is "auto" and the run has no value for it'):
        resolve(file_of(config, H100), RunConfig(), world_size=1, model_hidden_size=64)


def test_an_auto_under_an_old_name_means_the_same(tmp_path):
    config = {
        "zero_optimization": {"stage": 3, "prefetch_bucket_size": "auto", "gather_16bit_weights_on_model_save": "auto"}
    }
    assert [f for f in said(config).values() if f.severity == "error"] == []
    resolved = resolve(file_of(config, H100), RunConfig(), world_size=1, model_hidden_size=10)
    assert resolved.config["zero_optimization"]["stage3_prefetch_bucket_size"] == 90
    assert resolved.sources["zero_optimization", "stage3_prefetch_bucket_size"].startswith('"auto" at f.json:4: ')


def test_an_nvme_path_without_nvme_does_nothing_whoever_writes_it(tmp_path):
    block = {"device": "cpu", "nvme_path": "auto"}
    config = {"zero_optimization": {"stage": 3, "reduce_bucket_size": 5e7, "offload_optimizer": block}}
    run = RunConfig(output_dir=str(tmp_path), run_name="a")
    assert "for device nvme" in said(config, run=run)["zero_optimization.offload_optimizer.nvme_path"].message
    assert said(config) == {}


def test_the_runs_nvme_folder_is_absolute_as_a_written_one_is():
    block = {"device": "nvme", "nvme_path": "auto"}
    file = file_of({"zero_optimization": {"stage": 3, "offload_optimizer": block}}, H100)
    run = RunConfig(output_dir="runs", run_name="a")
    resolved = resolve(file, run, world_size=1, model_hidden_size=8, nvme_path=nvme_folder(run)).config
    path = resolved["zero_optimization"]["offload_optimizer"]["nvme_path"]
    assert path == str(Path("runs/a/nvme").absolute())


def test_what_the_check_lets_pass_the_run_can_resolve():
    """With a run that agrees with it, a file without errors is never refused by what comes after the check."""
    passed = 0
    for name, config in (SHIPPED | PUBLIC).items():
        run = run_for(config)
        if any(f.severity == "error" for f in lint(config, name, config=run, world_size=2, **MODEL)):
            continue
        file = file_of(config, H100)
        assert resolve(file, run, world_size=2, model_hidden_size=SHAPE.n_embd, nvme_path=nvme_folder(run)), name
        passed += 1
    assert passed > 60
