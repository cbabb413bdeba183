"""GPT-2 as it is trained: sizes, initial weights, parameter groups, and the same function as transformers' own."""

import dataclasses
import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GPT2Config, GPT2LMHeadModel

from codeparrot_ds.model import shapes
from codeparrot_ds.model.gpt2 import (
    build_model,
    causal_attention,
    document_inputs,
    get_grouped_params,
    hugging_face_config,
)
from codeparrot_ds.model.shapes import KNOWN_SHAPES, GPT2Shape, num_parameters

TINY = GPT2Shape(n_layer=3, n_embd=64, n_head=4, vocab_size=300, n_positions=48)
UNTIED = dataclasses.replace(TINY, tie_word_embeddings=False, n_inner=100)
EOS = 7


def build(shape=TINY, seed=1, **kwargs):
    return build_model(shape, eos_token_id=EOS, seed=seed, **kwargs)


def rows(batch=3, tokens=33, vocab_size=300, seed=0):
    return torch.randint(vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(seed))


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
    ours, theirs = model(input_ids=ids, labels=labels), reference(input_ids=ids, labels=labels)
    assert theirs.loss.item() > 5
    torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.loss, theirs.loss, atol=1e-5, rtol=0)
    ours.loss.backward()
    theirs.loss.backward()
    gradients = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name].grad, atol=1e-5, rtol=1e-4, msg=name)


def test_loss_is_the_mean_over_the_next_tokens_in_fp32():
    model = build().to(torch.bfloat16)
    ids = rows()
    output = model(input_ids=ids, labels=ids)
    assert output.logits.dtype == torch.bfloat16 and output.loss.dtype == torch.float32
    expected = F.cross_entropy(output.logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)


@pytest.mark.parametrize("chunk_elements", [7 * 300, 2**25], ids=["several chunks a row", "a row a chunk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_chunked_loss_is_the_plain_one(monkeypatch, dtype, chunk_elements):
    monkeypatch.setattr(shapes, "CHUNK_ELEMENTS", chunk_elements)
    plain, chunked = build().to(dtype), build(chunked_loss=True).to(dtype)
    ids = rows()
    labels = ids.clone()
    labels[1, 20:] = -100
    losses = [model(input_ids=ids, labels=labels).loss for model in (plain, chunked)]
    torch.testing.assert_close(losses[1], losses[0], atol=1e-6, rtol=1e-6)
    for loss in losses:
        (3 * loss).backward()
    gradients = dict(plain.named_parameters())
    for name, parameter in chunked.named_parameters():
        torch.testing.assert_close(
            parameter.grad, gradients[name].grad, msg=name, atol=1e-7 if dtype == torch.float32 else 1e-4, rtol=1e-4
        )


class LargestFP32(TorchDispatchMode):
    """Notes the most elements of an fp32 tensor that anything makes."""

    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            if isinstance(made, torch.Tensor) and made.dtype == torch.float32:
                self.most = max(self.most, made.untyped_storage().nbytes() // 4)
        return result


@pytest.mark.parametrize("chunked", [True, False])
def test_a_chunked_loss_holds_no_fp32_tensor_of_the_logits_size(monkeypatch, chunked):
    monkeypatch.setattr(shapes, "CHUNK_ELEMENTS", 10 * 300)
    model, ids = build(chunked_loss=chunked).to(torch.bfloat16), rows()
    with LargestFP32() as seen:
        model(input_ids=ids, labels=ids).loss.backward()
    assert (seen.most >= ids.numel() * 300) == (not chunked)
    assert not chunked or seen.most == 10 * 300


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
def test_nothing_in_a_micro_step_asks_for_a_value(chunked):
    """``.item()``, ``bool()`` and ``nonzero`` make the host wait for a GPU; all show in a CPU's profile too."""
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


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_runs_the_flash_kernel_without_a_mask(training, dtype):
    model = build(dropout=0.1 if not training else 0.0).to(dtype).train(training)
    ids = rows(tokens=48)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["aten::_scaled_dot_product_flash_attention_for_cpu"] == TINY.n_layer
    assert calls["aten::_scaled_dot_product_flash_attention_for_cpu_backward"] == TINY.n_layer
    dense = [
        (event.name, shape)
        for event in profile.events()
        for shape in event.input_shapes
        if len(shape) >= 2 and shape[-2:] == [48, 48]
    ]
    assert not dense, f"(tokens, tokens) tensors: {dense[:3]}"


def test_attention_dropout_only_in_training():
    query = torch.randn(1, 2, 8, 4)
    module = torch.nn.Module()
    module.eval()
    quiet, weights = causal_attention(module, query, query, query, None, dropout=0.5)
    expected = F.scaled_dot_product_attention(query, query, query, is_causal=True).transpose(1, 2)
    assert weights is None and torch.equal(quiet, expected)
    module.train()
    assert not torch.equal(causal_attention(module, query, query, query, None, dropout=0.5)[0], expected)


def test_dropout_reaches_the_config():
    config = hugging_face_config(TINY, eos_token_id=EOS, dropout=0.25)
    assert (config.resid_pdrop, config.embd_pdrop, config.attn_pdrop) == (0.25, 0.25, 0.25)
    assert (config.bos_token_id, config.eos_token_id, config.use_cache) == (EOS, EOS, False)


def test_attention_is_causal():
    model = build().eval()
    ids = rows(batch=1, tokens=20)
    changed = ids.clone()
    changed[0, 12:] = (changed[0, 12:] + 1) % 300
    with torch.no_grad():
        before, after = model(input_ids=ids).logits, model(input_ids=changed).logits
    assert torch.equal(before[0, :12], after[0, :12])
    assert not torch.equal(before[0, 12:], after[0, 12:])


# --------------------------------------------------------------------------------------------------------------------
# Attention inside documents


def packed(*lengths, seed=0):
    """One row of documents of so many tokens, the last of each EOS; a length below 0 is one that the row cuts off."""
    parts = []
    for number, length in enumerate(lengths):
        generator = torch.Generator().manual_seed(100 * seed + number)
        document = torch.randint(EOS + 1, 300, (abs(length),), generator=generator)
        if length > 0:
            document[-1] = EOS
        parts.append(document)
    return torch.cat(parts)[None]


def loud_model(**kwargs):
    """A model in which every token and position matters: fresh weights are so small that attention hardly does."""
    model = build(**kwargs).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(5)
    return model


def test_document_inputs_by_hand():
    inputs = document_inputs(torch.tensor([[9, EOS, 8, 8, EOS], [EOS, EOS, 5, 6, 7]]), EOS)
    assert inputs["position_ids"].tolist() == [[0, 1, 0, 1, 2], [0, 0, 0, 1, 2]]
    assert inputs["attention_mask"].dtype == torch.bool
    assert inputs["attention_mask"].long().tolist() == [
        [[[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]],
        [[[1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]],
    ]


# The first document may be the rest of one that an earlier row began, the last one may go on in the next row.
@pytest.mark.parametrize(
    "lengths", [(10, 1, 22, -15), (-48,), (48,), (1, 1, 1, 45), (47, -1)], ids=lambda lengths: str(lengths)
)
@pytest.mark.parametrize("training", [True, False])
def test_packed_documents_give_the_logits_of_each_alone(lengths, training):
    model, ids = loud_model().train(training), packed(*lengths)
    with torch.no_grad():
        together = model(input_ids=ids, **document_inputs(ids, EOS)).logits
        alone = [model(input_ids=part).logits for part in ids.split([abs(length) for length in lengths], dim=1)]
    torch.testing.assert_close(together, torch.cat(alone, dim=1), atol=1e-5, rtol=1e-5)
    if len(lengths) > 1:  # without the mask it makes a difference
        with torch.no_grad():
            plain = model(input_ids=ids).logits
        assert (plain - together)[:, abs(lengths[0]) :].abs().max() > 0.1


def test_packed_documents_train_as_each_alone():
    """The gradient of the packed row is the sum of the documents', less the target across each border."""
    ids, lengths = packed(20, 13, 15), [20, 13, 15]
    model, reference = loud_model().train(), loud_model().train()
    logits = model(input_ids=ids, **document_inputs(ids, EOS)).logits
    targets = ids[:, 1:].clone()
    targets[ids[:, :-1] == EOS] = -100
    F.cross_entropy(logits[0, :-1], targets[0], ignore_index=-100, reduction="sum").backward()
    for part in ids.split(lengths, dim=1):
        F.cross_entropy(reference(input_ids=part).logits[0, :-1], part[0, 1:], reduction="sum").backward()
    expected = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, atol=1e-4, rtol=1e-4, msg=name)


def test_no_token_reaches_another_document():
    lengths, model = [10, 8, 30], loud_model()
    ids = torch.cat([packed(*lengths), packed(*lengths, seed=1)])  # two rows: nor does it reach another row
    embedded = model.transformer.wte(ids).detach().requires_grad_()
    logits = model(inputs_embeds=embedded, **document_inputs(ids, EOS)).logits
    reached = [torch.autograd.grad(logits[0, place].sum(), embedded, retain_graph=True)[0] for place in range(48)]
    influence = torch.stack([(each != 0).any(dim=-1) for each in reached])  # (output place, row, input place)
    expected = torch.block_diag(*(torch.ones(length, length).tril() for length in lengths)).bool()
    assert torch.equal(influence[:, 0], expected)
    assert not influence[:, 1].any()


def test_rows_that_begin_inside_a_document_lose_only_what_lies_before():
    """What the row has of its first document is a text of its own, and the documents after it do not notice."""
    model, whole = loud_model(), packed(40, 8)
    cut = whole[:, 25:]
    with torch.no_grad():
        logits = model(input_ids=cut, **document_inputs(cut, EOS)).logits
        rest = model(input_ids=whole[:, 25:40]).logits
        full = model(input_ids=whole, **document_inputs(whole, EOS)).logits
    torch.testing.assert_close(logits[:, :15], rest, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits[:, 15:], full[:, 40:], atol=1e-5, rtol=1e-5)
    assert (logits[:, :15] - full[:, 25:40]).abs().max() > 0.1


def test_rows_of_one_document_are_those_of_training_without_the_option():
    model, ids = loud_model().train(), packed(-48)
    masked, plain = (model(input_ids=ids, labels=ids, **extra) for extra in (document_inputs(ids, EOS), {}))
    torch.testing.assert_close(masked.logits, plain.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(masked.loss, plain.loss, atol=1e-5, rtol=0)


@pytest.mark.parametrize("masked", [True, False])
def test_transformers_own_attention_understands_the_mask(masked):
    """What `evaluate` does: an export is loaded without our attention function."""
    ours = loud_model()
    theirs = GPT2LMHeadModel(GPT2Config(**dataclasses.asdict(TINY), attn_implementation="sdpa")).eval()
    theirs.load_state_dict(ours.state_dict())
    ids = torch.cat([packed(10, 8, -30), packed(47, -1, seed=1)])
    inputs = document_inputs(ids, EOS) if masked else {}
    with torch.no_grad():
        torch.testing.assert_close(
            theirs(input_ids=ids, use_cache=False, **inputs).logits,
            ours(input_ids=ids, **inputs).logits,
            atol=1e-5,
            rtol=1e-5,
        )


def test_no_attention_mask_without_the_option(monkeypatch):
    """An end-of-sequence token alone changes nothing: all of a row attends to all before it, in the fused kernel."""
    seen = []
    plain_attention = F.scaled_dot_product_attention

    def watched(*args, **kwargs):
        seen.append((kwargs["attn_mask"], kwargs["is_causal"]))
        return plain_attention(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    model, ids = loud_model(), packed(10, 38)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        assert seen == [(None, True)] * TINY.n_layer
        ids[0, 3] += 1
        assert (model(input_ids=ids).logits - before)[:, 10:].abs().max() > 1e-3
        seen.clear()
        model(input_ids=ids, **document_inputs(ids, EOS))
    assert [(mask.shape, is_causal) for mask, is_causal in seen] == [((1, 1, 48, 48), False)] * TINY.n_layer
