"""GPT-2 as it is trained: sizes, initial weights, parameter groups, and the same function as transformers' own."""

import dataclasses
import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from codeparrot_ds.model.gpt2 import get_grouped_params, hugging_face_config
from codeparrot_ds.model.shapes import KNOWN_SHAPES, num_parameters
from tests.model.tiny_gpt2 import EOS, TINY, UNTIED, build, rows


@pytest.mark.parametrize("shape", [KNOWN_SHAPES["demo"], TINY, UNTIED], ids=["demo", "tied", "untied"])
def test_number_of_parameters(shape):
    model = build(shape)
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters(shape)
    assert (model.lm_head.weight is model.transformer.wte.weight) == shape.tie_word_embeddings


def test_initial_weights_are_those_of_gpt2():
    model = build(KNOWN_SHAPES["demo"])
    for name, parameter in model.named_parameters():
        values = parameter.detach()
        if name.endswith("bias"):
            assert (values == 0).all(), name
        elif ".ln_" in name:
            assert (values == 1).all(), name
        else:
            std = 0.02 / math.sqrt(2 * 4) if name.endswith("c_proj.weight") else 0.02
            # Five standard errors, of the standard deviation and of the mean.
            assert values.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * values.numel())), name
            assert abs(values.mean().item()) < 5 * std / math.sqrt(values.numel()), name


def test_equal_seeds_give_equal_weights_whatever_happened_before():
    first = build(seed=3).state_dict()
    torch.manual_seed(99)
    torch.rand(10)
    state = torch.get_rng_state()
    second = build(seed=3).state_dict()
    assert torch.equal(torch.get_rng_state(), state)  # nothing is drawn from the rank's own generator
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_parameters_are_independent_of_each_other_and_of_the_seed():
    size = TINY.n_positions * TINY.n_embd  # the smallest matrix
    drawn = torch.stack(
        [p.detach().flatten()[:size] for seed in (1, 2) for p in build(UNTIED, seed).parameters() if p.dim() == 2]
    )
    correlation = torch.corrcoef(drawn) - torch.eye(len(drawn))
    assert len(drawn) == 2 * (3 + 4 * 3) and correlation.abs().max() < 6 / math.sqrt(size)


def test_a_parameter_follows_from_seed_and_name_alone():
    """What keeps the weights equal at every ZeRO stage: neither the order nor the other parameters matter."""
    shallow, deep = (
        dict(build().named_parameters()),
        dict(build(dataclasses.replace(TINY, n_layer=5)).named_parameters()),
    )
    assert all(torch.equal(shallow[name], deep[name]) for name in shallow if "c_proj" not in name)
    assert not torch.equal(shallow["transformer.h.0.mlp.c_proj.weight"], deep["transformer.h.0.mlp.c_proj.weight"])


@pytest.mark.parametrize("shape", [TINY, UNTIED], ids=["tied", "untied"])
def test_grouped_params(shape):
    model = build(shape)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, others = get_grouped_params(model, 0.1)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    not_decayed = {names[id(parameter)] for parameter in others["params"]}
    expected = {name for name in names.values() if name.endswith("bias")}
    expected |= {f"transformer.h.{layer}.{norm}.weight" for layer in range(3) for norm in ("ln_1", "ln_2")}
    assert not_decayed == expected | {"transformer.ln_f.weight"}
    everything = [id(parameter) for parameter in (*decayed["params"], *others["params"])]
    assert sorted(everything) == sorted(names)  # each one exactly once, a tied one too


def test_grouped_params_leave_frozen_parameters_out():
    model = build()
    model.transformer.wpe.weight.requires_grad_(False)
    assert all(p is not model.transformer.wpe.weight for group in get_grouped_params(model) for p in group["params"])


@pytest.mark.parametrize(
    "shape",
    [
        TINY,
        UNTIED,
        dataclasses.replace(TINY, activation_function="relu"),
        dataclasses.replace(TINY, scale_attn_weights=False),
        dataclasses.replace(TINY, scale_attn_by_inverse_layer_idx=True),
    ],
    ids=["tied", "untied", "relu", "unscaled", "scaled by layer"],
)
def test_same_loss_and_gradients_as_transformers(shape):
    model = build(shape)
    with torch.no_grad():  # fresh weights are so small that attention hardly matters
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(5)
    plain = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "attn_implementation": "eager"}
    reference = GPT2LMHeadModel(GPT2Config(**dataclasses.asdict(shape), **plain)).train()
    reference.load_state_dict(model.state_dict())
    assert reference.config._attn_implementation == "eager"
    ids = rows()
    labels = ids.clone()
    labels[1, 20:] = -100
    logits = model(input_ids=ids).logits
    ours, theirs = model(input_ids=ids, labels=labels), reference(input_ids=ids, labels=labels)
    assert theirs.loss.item() > 5
    torch.testing.assert_close(logits, theirs.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.loss, theirs.loss, atol=1e-5, rtol=0)
    ours.loss.backward()
    theirs.loss.backward()
    gradients = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name].grad, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("chunked", [True, False])
def test_the_model_with_its_loss_is_one_graph_and_keeps_the_flash_kernel(chunked):
    """``dynamo`` alone: what a compiled model's graph holds, without compiling it."""
    torch._dynamo.reset()
    model, ids, graphs = build(chunked_loss=chunked), rows(), []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=keep, fullgraph=True)
    loss = compiled(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(loss, model(input_ids=ids, labels=ids).loss, atol=1e-5, rtol=0)
    (graph,) = graphs
    called = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    attention = [node for node in graph.graph.nodes if "scaled_dot_product_attention" in str(node.target)]
    assert len(attention) == TINY.n_layer, called
    assert all(node.kwargs["attn_mask"] is None and node.kwargs["is_causal"] for node in attention)


@pytest.mark.parametrize("chunked", [True, False])
def test_nothing_in_a_micro_step_asks_for_a_value(monkeypatch, chunked):
    """``.item()``, ``bool()`` and ``nonzero`` make the host wait for a GPU; all show in a CPU's profile too."""
    monkeypatch.setattr("codeparrot_ds.model.loss.by_cache", lambda logits: False)  # as on a GPU
    model, ids = build(chunked_loss=chunked), rows()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(input_ids=ids, labels=ids).loss.backward()
    calls = {event.key for event in profile.key_averages()}
    assert "aten::addmm" in calls
    assert not calls & {
        "aten::_local_scalar_dense",
        "aten::item",
        "aten::nonzero",
        "aten::masked_select",
        "aten::equal",
    }


def test_dropout_reaches_the_config():
    config = hugging_face_config(TINY, eos_token_id=EOS, dropout=0.25)
    assert (config.resid_pdrop, config.embd_pdrop, config.attn_pdrop) == (0.25, 0.25, 0.25)
    assert (config.bos_token_id, config.eos_token_id, config.use_cache) == (EOS, EOS, False)
