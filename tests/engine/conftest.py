"""Engines of the shipped DeepSpeed configs on one real rank, as they are or with changes."""

import pytest

from codeparrot_ds.ds_config.facts import zero_stage
from codeparrot_ds.ds_config.file import find_ds_config, read_ds_config
from codeparrot_ds.ds_config.resolve import resolve_ds_config
from codeparrot_ds.engine.engine import create_engine
from codeparrot_ds.engine.operators import build_operators
from codeparrot_ds.model.gpt2 import build_model, get_grouped_params
from codeparrot_ds.model.shapes import GPT2Shape

SHAPE = GPT2Shape(n_layer=2, n_embd=32, n_head=2, vocab_size=128, n_positions=32)


@pytest.fixture
def build(make_config, only_rank):
    """Builds the engine of a shipped DeepSpeed config, with changes to the run config or to the JSON."""

    def make(name, *, optimizer=None, blocks=None, fixed=True, **changes):
        import deepspeed

        settings = {"num_warmup_steps": 0, "learning_rate": 1e-2, "max_train_steps": 50, "dropout": 0.0}
        settings |= {"global_batch_size": 4, "micro_batch_size": 4, "lean_step": "off"}
        config = make_config(deepspeed=name, **settings | changes)
        source = find_ds_config(name)
        ds_config = resolve_ds_config(
            read_ds_config(source).config, config, world_size=1, model_hidden_size=SHAPE.n_embd
        )
        ds_config["optimizer"]["params"] |= optimizer or {}
        for block, values in (blocks or {}).items():
            ds_config[block] = ds_config.get(block, {}) | values
        build_operators(ds_config, only_rank.device.type)
        zero3 = ds_config if zero_stage(ds_config) == 3 else None
        model = build_model(SHAPE, eos_token_id=0, seed=1, zero3_config=zero3, device=only_rank.device)
        if fixed:
            return create_engine(model, ds_config, config)
        groups = get_grouped_params(model, config.weight_decay)
        return deepspeed.initialize(model=model, model_parameters=groups, config=ds_config)[0]

    return make


@pytest.fixture
def fp16(monkeypatch):
    """Lets DeepSpeed train fp16 here: torch's CPU kernels know it; DeepSpeed says no for their speed."""
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)
