"""Batched generation, against the pipeline prompt by prompt and against a slow transcription of what a sample is."""

import pytest
import torch

from codeparrot_ds.evaluation.complete import BLOCK_STARTS, first_block, load_generator
from codeparrot_ds.evaluation.generate import Request, Sampling, generate, sample
from codeparrot_ds.evaluation.models import load_model

GREEDY = Sampling(temperature=0.0, max_new_tokens=24)
PROMPTS = [
    "def f(x):",
    "class Box:\n    def __init__(self):\n",
    "x",
    "import os\n\n\ndef area(a, b):\n    return",
    "# ö",
    "",
]


@pytest.fixture(scope="module")
def pipe(model_folder):
    return load_generator(model_folder)


@pytest.fixture(scope="module")
def loaded(model_folder):
    return load_model(model_folder)


def complete(loaded, requests, **settings):
    found = dict(generate(*loaded, requests, **{"sampling": GREEDY} | settings))
    assert sorted(found) == list(range(len(requests)))
    return [found[number] for number in range(len(requests))]


def piped(pipe, prompt, tokens=24):
    (answer,) = pipe(prompt, do_sample=False, max_new_tokens=tokens, return_full_text=False)
    return answer["generated_text"]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_greedy_completions_are_the_pipelines(loaded, pipe, batch_size):
    """Prompts of six lengths in one batch, some twice: padding, sharing and rows that leave change nothing."""
    prompts = PROMPTS + PROMPTS[:2]
    completions = complete(loaded, [Request(prompt=prompt) for prompt in prompts], batch_size=batch_size)
    expected = [piped(pipe, prompt) for prompt in prompts]
    assert [completion.raw for completion in completions] == expected
    assert len(set(expected)) >= 5  # the model does not say the same whatever it reads
    assert {completion.finish for completion in completions} <= {"length", "eos"}


def test_blocks_end_where_the_recipe_cuts(loaded, pipe):
    """The untrained model hardly writes an end by itself, so ends that it does write are looked for."""
    texts = [piped(pipe, prompt) for prompt in PROMPTS]
    ends = tuple({text[position : position + 2] for text in texts for position in (5, 11) if len(text) > 13})
    requests = [Request(prompt=prompt, ends=ends) for prompt in PROMPTS]
    for completion, text in zip(complete(loaded, requests), texts, strict=True):
        places = [text.find(end) for end in ends if end in text]
        assert completion.text == (text[: min(places)] if places else text)
        assert text.startswith(completion.raw) and completion.num_tokens <= len(completion.tokens)
        if places:
            assert completion.finish == "end" and len(completion.raw) < len(text)
            assert len(completion.raw) - min(places) < 12  # it stopped soon
    with_recipe = complete(loaded, [Request(prompt=prompt, ends=BLOCK_STARTS) for prompt in PROMPTS])
    assert [c.text.rstrip() for c in with_recipe] == [first_block(text) for text in texts]


def test_log_probabilities_are_the_models(loaded):
    model, tokenizer = loaded
    request = Request(prompt="def f(x):")
    (completion,) = complete(loaded, [request], sampling=Sampling(temperature=0.7, top_p=0.9, max_new_tokens=12))
    prompt = tokenizer(request.prompt)["input_ids"]
    ids = prompt + list(completion.tokens)
    with torch.no_grad():
        scores = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    by_hand = sum(scores[place - 1, ids[place]].item() for place in range(len(prompt), len(ids)))
    assert (
        len(ids) - len(prompt) == completion.num_tokens == 12 and tokenizer.decode(completion.tokens) == completion.raw
    )
    assert completion.log_probability == pytest.approx(by_hand, abs=1e-4)


def test_a_sample_depends_on_its_seed_and_not_on_its_neighbours(loaded):
    sampling = Sampling(temperature=0.8, top_p=0.95, max_new_tokens=20)
    requests = [Request(prompt=prompt, seed=seed) for prompt in PROMPTS[:3] for seed in (1, 2)]
    together = complete(loaded, requests, sampling=sampling)
    alone = [complete(loaded, [request], sampling=sampling)[0] for request in requests]
    assert [c.raw for c in together] == [c.raw for c in alone]
    assert together[0].raw != together[1].raw


def warped(logits, temperature, top_p):
    """The distribution that transformers samples from."""
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature), TopPLogitsWarper(top_p)])
    return warpers(torch.zeros((len(logits), 1), dtype=torch.long), logits).softmax(-1)


@pytest.mark.parametrize("spread", [0.1, 3.0])  # flat: hundreds of tokens make up top_p; steep: few do
def test_sampling_draws_from_the_distribution_of_transformers(spread):
    generator = torch.Generator().manual_seed(0)
    logits = spread * torch.randn((1, 700), generator=generator)
    expected = warped(logits, 0.6, 0.9)[0]
    draws = (torch.arange(20_000) + 0.5) / 20_000  # every quantile once
    tokens = torch.cat(
        [sample(logits.expand(len(some), -1), some, temperature=0.6, top_p=0.9) for some in draws.split(5_000)]
    )
    found = torch.bincount(tokens, minlength=700) / len(tokens)
    assert (found - expected).abs().max() < 1e-4
    assert (found[expected == 0] == 0).all()


def test_edges_of_sampling():
    logits = torch.tensor([[0.0, 5.0, 1.0]])
    for draw in (0.0, 1.0 - 2**-24, 1.0):
        assert sample(logits, torch.tensor([draw]), temperature=1e-3, top_p=0.95).item() == 1
        assert sample(logits, torch.tensor([draw]), temperature=1.0, top_p=1e-9).item() == 1
    assert sample(logits, torch.tensor([1.0]), temperature=1.0, top_p=1.0).item() == 0  # the least probable


def test_prompts_that_fill_the_context_end_there(loaded):
    model, tokenizer = loaded
    context = model.config.max_position_embeddings
    prompt = "x" * (context - 3)
    assert len(tokenizer(prompt)["input_ids"]) == context - 3
    fits, full, long, short = complete(
        loaded, [Request(prompt=text) for text in (prompt, prompt + "xxx", prompt + "xxxx", "x")]
    )
    assert (fits.finish, len(fits.tokens)) == ("context", 3)
    assert (full.finish, full.text) == (long.finish, long.text) == ("context", "")
    assert short.finish == "length"


def test_text_is_shown_as_it_grows_and_never_taken_back(loaded):
    shown: dict[int, list[str]] = {}
    requests = [Request(prompt=prompt, seed=1, ends=BLOCK_STARTS) for prompt in PROMPTS]
    completions = complete(
        loaded,
        requests,
        sampling=Sampling(temperature=1.0, max_new_tokens=60),
        on_token=lambda number, text: shown.setdefault(number, []).append(text),
    )
    for number, completion in enumerate(completions):
        parts = shown.get(number, [""])
        assert parts[-1] == completion.text
        assert all(completion.text.startswith(part) for part in parts)
    assert max(len(parts) for parts in shown.values()) > 10
