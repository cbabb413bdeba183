"""The config check and the real engine agree about the files of public projects, wherever a CPU can judge them."""

import dataclasses
import functools
import json
import math

import cpuinfo
import pytest

from codeparrot_ds.ds_config.facts import activation_checkpointing, leaves, set_value, zero_stage
from codeparrot_ds.ds_config.file import read_ds_config
from codeparrot_ds.ds_config.lint import lint_file
from codeparrot_ds.ds_config.resolve import fill, nvme_folder
from codeparrot_ds.engine.engine import create_engine
from codeparrot_ds.engine.operators import build_operators, needed_operators
from codeparrot_ds.model.gpt2 import build_model, enable_activation_checkpointing, get_grouped_params
from tests.ds_config.test_auto import NEW, PUBLIC, run_for
from tests.engine.conftest import SHAPE
from tests.engine.test_engine import train_step

ROWS = 4
# A test's one rank and few rows in place of those that the file or its run has.
BATCH = {"train_batch_size": ROWS, "train_micro_batch_size_per_gpu": ROWS, "gradient_accumulation_steps": 1}
# Why the check calls wrong what the engine trains with, by the key of the finding.
REASONS = {
    **dict.fromkeys(
        ("launcher", "deepspeed_mpi", "cuda_visible_devices", "log"),
        "the engine reads no such key, and a mistyped one would be ignored as well",
    ),
    **dict.fromkeys(
        ("zero_optimization.stage3_max_live_parameters", "zero_optimization.offload_param.buffer_size"),
        'the engine drops this "auto" and takes its default without a word',
    ),
    "scheduler": "the engine is handed the run's schedule and ignores the block",
    "data_efficiency.enabled": "the engine would take rows from its own loader, which a run does not use",
    "zero_optimization.offload_param.device": "at stage 2 the engine leaves the weights where they are",
    "zero_optimization.zenflow": "it trains, and what it has in its optimizer is in no checkpoint",
    "train_batch_size": "it does not go with the two ranks of the run; the engine here has one",
}
_loaded: set[tuple[str, ...]] = set()


@pytest.fixture(autouse=True)
def one_look_at_the_processor(monkeypatch):
    """DeepSpeed's Adam for offloading asks for a second what the processor is, in each engine."""
    monkeypatch.setattr(cpuinfo, "get_cpu_info", functools.cache(cpuinfo.get_cpu_info))


@pytest.fixture
def judged(tmp_path, fp16):
    """The run that a file wants, what the engine would be given, and what the check calls wrong."""

    def judge(name):
        config = json.loads(json.dumps(PUBLIC[name]))
        for path, value in list(leaves(config)):
            if path[-1] == "nvme_path" and value != "auto":
                set_value(config, path, str(tmp_path))
        path = tmp_path / "ds.json"
        path.write_text(json.dumps(config))
        file = dataclasses.replace(read_ds_config(path), precisions=(*NEW, "fp16"))
        run = dataclasses.replace(run_for(config), output_dir=str(tmp_path), run_name="a", dropout=0.0)
        known = {"world_size": 2, "model_hidden_size": SHAPE.n_embd}
        found = lint_file(file, device="cpu", config=run, parameters=100_000, **known)
        resolved, _ = fill(file, run, nvme_path=nvme_folder(run), **known)
        return run, resolved.config | BATCH, {each.key for each in found if each.severity == "error"}

    return judge


def train(run, ds_config, device, *, plainly):
    """One step of an engine: the loss; `plainly`: of DeepSpeed's own, without what is fixed here."""
    import deepspeed

    needed = tuple(needed_operators(ds_config, device.type))
    if needed not in _loaded:  # each time, ninja would look whether they are up to date
        build_operators(ds_config, device.type)
        _loaded.add(needed)
    zero3 = ds_config if zero_stage(ds_config) == 3 else None
    model = build_model(SHAPE, eos_token_id=0, seed=1, zero3_config=zero3, device=device)
    if plainly:
        if activation_checkpointing(ds_config):
            enable_activation_checkpointing(model, ds_config)
        groups = get_grouped_params(model, run.weight_decay)
        engine = deepspeed.initialize(model=model, model_parameters=groups, config=ds_config)[0]
    else:
        engine = create_engine(model, ds_config, run)
    return train_step(engine)


def test_the_engine_trains_what_the_check_lets_pass(judged, only_rank):
    trained = {}
    for name in PUBLIC:
        run, ds_config, errors = judged(name)
        kind = json.dumps(ds_config, sort_keys=True)
        if not errors and kind not in trained:
            trained[kind] = train(run, ds_config, only_rank.device, plainly=False)
    assert len(trained) > 25
    expected = math.log(SHAPE.vocab_size)  # of weights that know nothing
    assert all(loss == pytest.approx(expected, rel=0.02) for loss in trained.values())


def test_the_engine_refuses_what_the_check_calls_wrong_or_there_is_a_reason(judged, only_rank):
    trained, refused = {}, 0
    for name in PUBLIC:
        run, ds_config, errors = judged(name)
        if not errors:
            continue
        try:
            train(run, ds_config, only_rank.device, plainly=True)
        except Exception:
            refused += 1
        else:
            trained[name] = errors
    assert {key for errors in trained.values() for key in errors} == set(REASONS)
    assert refused > 5
