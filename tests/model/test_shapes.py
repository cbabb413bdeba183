import json

import pytest

from codeparrot_ds.errors import UserError
from codeparrot_ds.model.shapes import (
    KNOWN_SHAPES,
    GPT2Shape,
    find_shape,
    flops_per_token,
    num_parameters,
    parameter_shapes,
)


@pytest.mark.parametrize(("name", "parameters"), [("gpt2", 111_008_256), ("gpt2-xl", 1_529_628_800)])
def test_parameter_counts_of_the_recipe(name, parameters):
    assert num_parameters(find_shape(name, vocab_size=32_768, seq_length=1024)) == parameters


def test_flops_per_token_of_the_recipe():
    small = find_shape("gpt2", vocab_size=32_768, seq_length=1024)
    assert flops_per_token(small, 1024) == 6 * 111_008_256 + 12 * 12 * 768 * 1024


@pytest.mark.parametrize(
    "shape",
    [
        GPT2Shape(n_layer=2, n_embd=64, n_head=4, vocab_size=300, n_positions=32),
        GPT2Shape(n_layer=1, n_embd=48, n_head=3, vocab_size=100, n_positions=16, n_inner=80),
        GPT2Shape(n_layer=1, n_embd=32, n_head=2, vocab_size=100, n_positions=16, tie_word_embeddings=False),
    ],
)
def test_parameters_are_those_of_the_real_model(shape):
    import dataclasses

    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(**dataclasses.asdict(shape)))
    if shape.tie_word_embeddings:
        model.tie_weights()  # on the meta device they are not
    assert parameter_shapes(shape) == {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    assert list(parameter_shapes(shape)) == [name for name, _ in model.named_parameters()]
    assert num_parameters(shape) == sum(parameter.numel() for parameter in model.parameters())


def test_shape_of_a_hugging_face_config(tmp_path):
    config = {"model_type": "gpt2", "n_layer": 3, "n_embd": 96, "n_head": 6, "n_positions": 128, "vocab_size": 5}
    (tmp_path / "config.json").write_text(json.dumps(config | {"scale_attn_by_inverse_layer_idx": True}))
    expected = GPT2Shape(
        n_layer=3, n_embd=96, n_head=6, n_positions=128, vocab_size=1000, scale_attn_by_inverse_layer_idx=True
    )
    for source in (tmp_path, tmp_path / "config.json"):
        assert find_shape(str(source), vocab_size=1000, seq_length=128) == expected


def test_unknown_name_offers_the_nearest():
    with pytest.raises(UserError, match="did you mean 'gpt2-large'"):
        find_shape("gpt2-lrge", vocab_size=1000, seq_length=128)


@pytest.mark.parametrize("name", KNOWN_SHAPES)
def test_sequence_longer_than_the_positions_is_refused(name):
    with pytest.raises(UserError, match="seq_length 1025 .* at most 1024"):
        find_shape(name, vocab_size=1000, seq_length=1025)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"model_type": "llama"}', "model_type must be 'gpt2', not 'llama'"),
        ("[1]", "model_type must be 'gpt2'"),
        ("{", "line 1 is not JSON"),
        ('{"model_type": "gpt2", "n_embd": 10, "n_head": 3}', "n_embd 10 is not divisible by n_head 3"),
        ('{"model_type": "gpt2", "n_layer": -1}', "n_layer must be a whole number"),
        ('{"model_type": "gpt2", "n_layer": "2"}', "n_layer must be a whole number"),
    ],
)
def test_bad_config_file_is_one_sentence_with_the_file(tmp_path, content, message):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message) as error:
        find_shape(str(path), vocab_size=1000, seq_length=128)
    assert str(path) in str(error.value)
