"""Attention as it is trained: a fused kernel without a mask, blocks of products on a CPU, documents of packed rows."""

import dataclasses
import math

import pytest
import torch
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from codeparrot_ds.model import cpu_kernels
from codeparrot_ds.model.attention import causal_attention, document_inputs
from codeparrot_ds.model.cpu_kernels import BlockedAttention
from tests.model.tiny_gpt2 import EOS, TINY, build, rows

FLASH = "aten::_scaled_dot_product_flash_attention_for_cpu"


def profiled(model, ids):
    """What a forward and backward pass called, by name, and the last two sizes of every operand."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        model(input_ids=ids, labels=ids).loss.backward()
    calls = {event.key: event.count for event in profile.key_averages()}
    sizes = {tuple(shape[-2:]) for event in profile.events() for shape in event.input_shapes if len(shape) >= 2}
    return calls, sizes


@pytest.mark.parametrize("training", [True, False])
def test_attention_runs_the_flash_kernel_without_a_mask(training):
    model = build(dropout=0.1 if not training else 0.0).train(training)
    calls, sizes = profiled(model, rows(tokens=48))
    assert calls[FLASH] == calls[f"{FLASH}_backward"] == TINY.n_layer
    assert (48, 48) not in sizes, "a (tokens, tokens) tensor"


@pytest.mark.parametrize(("training", "has_bf16"), [(True, True), (True, False), (False, True)])
def test_training_in_bf16_on_a_cpu_attends_in_blocks_where_they_are_faster(monkeypatch, training, has_bf16):
    monkeypatch.setattr(cpu_kernels, "has_bf16_products", lambda: has_bf16)
    monkeypatch.setattr(cpu_kernels, "BLOCK", 16)
    model = build(dropout=0.1 if not training else 0.0).to(torch.bfloat16).train(training)
    calls, sizes = profiled(model, rows(tokens=48))
    blocked = training and has_bf16
    expected = ("BlockedAttention", "BlockedAttentionBackward") if blocked else (FLASH, f"{FLASH}_backward")
    assert all(calls[name] == TINY.n_layer for name in expected)
    assert blocked == (FLASH not in calls)
    assert (48, 48) not in sizes, "a (tokens, tokens) tensor"


def leaves(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    # As a model has them: heads beside each other in the memory of a token.
    made = (torch.randn(*shape, generator=generator).transpose(1, 2).contiguous().transpose(1, 2) for _ in range(3))
    return [tensor.to(dtype).requires_grad_() for tensor in made]


def result_and_gradients(function, inputs):
    for tensor in inputs:
        tensor.grad = None
    output = function(*inputs)
    generator = torch.Generator().manual_seed(9)
    (output.float() * torch.randn(output.shape, generator=generator)).sum().backward()
    return [output.detach(), *(tensor.grad for tensor in inputs)]


@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize("tokens", [1, 255, 256, 257, 700])
def test_blocks_are_the_plain_attention(tokens, scaling):
    inputs = leaves(2, 3, tokens, 8)
    plain = result_and_gradients(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling), inputs
    )
    blocked = result_and_gradients(lambda q, k, v: BlockedAttention.apply(q, k, v, scaling), inputs)
    for one, other in zip(blocked, plain, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


def test_gradients_of_blocks_are_those_of_finite_differences(monkeypatch):
    monkeypatch.setattr(cpu_kernels, "BLOCK", 3)
    inputs = leaves(1, 2, 7, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda q, k, v: BlockedAttention.apply(q, k, v, None), inputs)


def test_blocks_in_bf16_are_as_exact_as_the_flash_kernel():
    """Against fp32: within twice its distance, where scores are rounded to bf16 as the flash kernel's are not."""
    inputs = leaves(2, 4, 600, 64, dtype=torch.bfloat16)
    exact = [tensor.detach().float().requires_grad_() for tensor in inputs]
    flash = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)  # noqa: E731
    reference = result_and_gradients(flash, exact)
    distances = [
        [((one.float() - right).norm() / right.norm()).item() for one, right in zip(found, reference, strict=True)]
        for found in (
            result_and_gradients(lambda q, k, v: BlockedAttention.apply(q, k, v, None), inputs),
            result_and_gradients(flash, inputs),
        )
    ]
    assert all(ours < 2 * theirs and ours < 0.01 for ours, theirs in zip(*distances, strict=True)), distances


def test_blocks_look_at_nothing_later():
    query, key, value = leaves(1, 2, 600, 16, dtype=torch.bfloat16)
    before = BlockedAttention.apply(query, key, value, None)
    key.data[:, :, 300:] = math.nan
    value.data[:, :, 300:] = math.nan
    after = BlockedAttention.apply(query, key, value, None)
    # The block's products hold the later keys too; their scores are masked, whatever they are but NaN.
    assert torch.equal(after[:, :, :256], before[:, :, :256])


def test_attention_dropout_only_in_training():
    query = torch.randn(1, 2, 8, 4)
    module = torch.nn.Module()
    module.eval()
    quiet, weights = causal_attention(module, query, query, query, None, dropout=0.5)
    expected = F.scaled_dot_product_attention(query, query, query, is_causal=True).transpose(1, 2)
    assert weights is None and torch.equal(quiet, expected)
    module.train()
    for values in (query, query.bfloat16()):
        noisy = causal_attention(module, values, values, values, None, dropout=0.5)[0]
        assert (noisy.float() - quiet).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_causal(monkeypatch, dtype):
    monkeypatch.setattr(cpu_kernels, "BLOCK", 8)
    model = build().to(dtype)
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
