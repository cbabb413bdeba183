"""What makes a step cheaper trains the same: fifty steps of the real engine with and without, at every stage."""

import dataclasses
import logging
import re
from types import SimpleNamespace

import pytest
import torch
from deepspeed.accelerator import get_accelerator

from codeparrot_ds.engine.compiled import compile_model
from codeparrot_ds.model import loss
from codeparrot_ds.model.gpt2 import build_model
from codeparrot_ds.model.loss import fused_lm_loss
from tests.engine.conftest import SHAPE
from tests.model.loss_kernels import gradient_by_formula, kernels_on_cpu, losses_by_formula

STEPS = 50
# Relative to a loss. In bf16 a gradient's last place turns over now and then, and a weight with it.
BAND = {"fp32": 1e-6, "bf16": 1e-3}


def losses_of(engine, steps):
    """The losses of so many steps, on the same rows for every engine."""
    random, losses = torch.Generator().manual_seed(0), []
    for _ in range(steps):
        ids = torch.randint(SHAPE.vocab_size, (4, 16), generator=random)
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    assert engine.global_steps == steps and losses[0] != losses[-1]
    return losses


_plain: dict[str, list[float]] = {}


@pytest.fixture
def train(build, monkeypatch):
    """(losses with a change to the engine, those without) by the name of its config, as on a GPU."""
    monkeypatch.setattr(loss, "by_cache", lambda logits: False)

    def both(name, change, *, steps=STEPS, **settings):
        engine = build(name, learning_rate=1e-3, **settings)
        change(engine)
        changed = losses_of(engine, steps)
        if len(_plain.get(name, ())) < steps:
            _plain[name] = losses_of(build(name, learning_rate=1e-3), steps)
        return changed, _plain[name][:steps]

    return both


def band(name):
    return BAND["fp32" if name.endswith("fp32") else "bf16"]


@pytest.mark.parametrize("name", ["zero0_fp32", "zero1_fp32", "zero2_fp32", "zero3_fp32", "zero1"])
def test_the_fused_loss_trains_as_the_plain_one(train, name):
    def change(engine):
        engine.module.loss_function = fused_lm_loss

    with kernels_on_cpu(losses_by_formula, gradient_by_formula):
        fused, plain = train(name, change)
    assert fused == pytest.approx(plain, rel=band(name), abs=0)


@pytest.fixture
def said(caplog, monkeypatch):
    """What is logged from INFO on."""
    monkeypatch.setattr(logging.getLogger("codeparrot_ds"), "propagate", True)  # a run's logging ends it
    caplog.set_level(logging.INFO, logger="codeparrot_ds")
    torch._dynamo.reset()
    return caplog


@pytest.fixture
def graphs_alone(monkeypatch):
    """The graphs of the compiler, forwards and backwards, without its generated code, which takes half a minute."""
    monkeypatch.setattr(get_accelerator(), "_compile_backend", "aot_eager")


@pytest.mark.parametrize(
    ("name", "graphs", "steps"),
    [*((f"zero{stage}_fp32", 1, STEPS) for stage in range(4)), ("zero2_activation_checkpointing", 2, 10)],
)
def test_compiled_blocks_train_as_the_plain_ones(train, make_config, said, graphs_alone, name, graphs, steps):
    """One graph serves all blocks, and with activation checkpointing one more, in which nothing is kept."""
    config = make_config(compile=True)
    compiled, plain = train(name, lambda engine: compile_model(engine, config), steps=steps, compile=True)
    assert compiled == pytest.approx(plain, rel=band(name), abs=0)
    found = re.findall(r"compiled the model's blocks: (\d+) graph\(s\) in \d+\.\d s, kept in ", said.text)
    assert found == ["1"] * graphs, said.text


@pytest.mark.parametrize(
    ("name", "lean_step"),
    [*((f"zero{stage}_fp32", "on") for stage in range(3)), ("zero3_fp32", "auto"), ("zero1", "on")],
)
def test_all_levers_together_train_as_none(train, make_config, graphs_alone, name, lean_step):
    config = make_config(compile=True)

    def change(engine):
        engine.module.loss_function = fused_lm_loss
        compile_model(engine, config)

    with kernels_on_cpu(losses_by_formula, gradient_by_formula):
        changed, plain = train(name, change, compile=True, lean_step=lean_step)
    assert changed == pytest.approx(plain, rel=band(name), abs=0)


def test_a_whole_model_is_compiled_too(train, make_config, said, monkeypatch):
    monkeypatch.setattr(get_accelerator(), "_compile_backend", "eager")  # its backward pass is long to trace
    config = make_config(compile=True, compile_scope="whole")
    compiled, plain = train("zero1_fp32", lambda engine: compile_model(engine, config), steps=5)
    assert compiled == pytest.approx(plain, rel=1e-6, abs=0)
    assert "compiled the model: 1 graph(s)" in said.text


def test_blocks_that_scale_their_attention_by_their_place_have_a_graph_each(make_config, said, monkeypatch):
    monkeypatch.setattr(get_accelerator(), "_compile_backend", "eager")
    shape = dataclasses.replace(SHAPE, n_layer=9, scale_attn_by_inverse_layer_idx=True)
    model = build_model(shape, eos_token_id=0, seed=1).train()
    ids = torch.arange(32).view(2, 16)
    plain = model(input_ids=ids, labels=ids).loss
    compile_model(SimpleNamespace(module=model, is_deepcompile_enabled=lambda: False), make_config(compile=True))
    assert model(input_ids=ids, labels=ids).loss.item() == pytest.approx(plain.item(), rel=1e-6)
    assert said.text.count("1 graph(s)") == 9 and "limit" not in said.text


def test_evaluation_makes_no_graph(build, make_config, said, graphs_alone):
    """Its batches have other sizes; its loss is that of whoever loads the export, to the last bit."""
    engine, plain, ids = build("zero1_fp32", compile=True), build("zero1_fp32"), torch.zeros(3, 9, dtype=torch.long)
    compile_model(engine, make_config(compile=True))
    for each in (engine, plain):
        each.eval()
    with torch.no_grad():
        assert torch.equal(engine(input_ids=ids).logits, plain(input_ids=ids).logits)
    assert "compiled" not in said.text


def test_a_compiler_that_fails_is_said_once_and_the_run_trains(train, make_config, said, monkeypatch):
    def broken(graph, inputs):
        raise FileNotFoundError("no C++ compiler here\nnor there")

    monkeypatch.setattr(get_accelerator(), "_compile_backend", broken)
    config = make_config(compile=True)
    found, plain = train("zero1_fp32", lambda engine: compile_model(engine, config), steps=5)
    assert found == plain
    (warning,) = [each.getMessage() for each in said.records if each.levelno >= logging.WARNING]
    assert warning == (
        "the model's blocks cannot be compiled, and training continues as it is written: no C++ compiler here"
    )
