"""The weights that all configs begin with: made once, whole or not at all, and known by their hash in each dtype."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

from codeparrot_ds.compare.initial_weights import make_initial_weights, weights_fingerprint
from codeparrot_ds.compare.trial_process import fingerprints, initial_weights
from codeparrot_ds.errors import UserError

SPACING = 2.0**-7


@pytest.fixture
def config(make_config, tmp_path):
    (tmp_path / "model.json").write_text(
        '{"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 64}'
    )
    return dataclasses.replace(make_config(model=str(tmp_path / "model.json")), run_name=None)


def weights(folder):
    return load_file(folder / "model.safetensors")


def test_the_same_seed_gives_the_same_weights_and_hashes(config, tmp_path):
    for name, changes in (("one", {}), ("two", {}), ("three", {"seed": 2})):
        make_initial_weights(dataclasses.replace(config, **changes), tmp_path / name)
    one, two, three = (fingerprints(tmp_path / name) for name in ("one", "two", "three"))
    assert one == two and set(one.values()).isdisjoint(three.values())
    assert len(set(one.values())) == 3  # one for each dtype
    rounded = sorted((name, value.to(torch.bfloat16)) for name, value in weights(tmp_path / "one").items())
    assert weights_fingerprint(rounded) == one["bfloat16"]


def test_perturbed_weights_have_an_error_of_a_rounding_each(config, tmp_path):
    make_initial_weights(config, tmp_path / "plain")
    make_initial_weights(config, tmp_path / "perturbed", perturbed="bf16")
    plain, perturbed = weights(tmp_path / "plain"), weights(tmp_path / "perturbed")
    for name, value in plain.items():
        apart = (perturbed[name] - value).abs()
        assert bool((apart <= 1.0001 * SPACING * value.abs()).all())
        assert bool(apart.any()) or not bool(value.any())


def test_given_weights_are_taken(config, tmp_path):
    make_initial_weights(dataclasses.replace(config, seed=7), tmp_path / "mine")
    make_initial_weights(dataclasses.replace(config, init_from=str(tmp_path / "mine")), tmp_path / "taken")
    assert fingerprints(tmp_path / "taken") == fingerprints(tmp_path / "mine")


def test_the_hash_knows_names_shapes_and_every_bit():
    value = torch.arange(6, dtype=torch.float32)
    known = weights_fingerprint([("a", value)])
    other = value.clone()
    other[3] = torch.nextafter(other[3], torch.tensor(9.0))
    changed = [("b", value), ("a", value.reshape(2, 3)), ("a", other), ("a", value.to(torch.bfloat16))]
    assert known not in {weights_fingerprint([each]) for each in changed}


def test_a_folder_that_is_not_whole_is_made_again_and_a_whole_one_kept(config, tmp_path):
    folder = tmp_path / "comparison"
    (folder / "initial").mkdir(parents=True)
    (folder / "initial" / "model.safetensors").write_bytes(b"half")
    place = initial_weights(config, folder)
    assert fingerprints(place) is not None and not (folder / ".initial.making").exists()
    made = (place / "model.safetensors").stat().st_mtime_ns
    assert initial_weights(config, folder) == place and (place / "model.safetensors").stat().st_mtime_ns == made


def test_weights_that_cannot_be_made_are_one_sentence(config, tmp_path):
    (tmp_path / "comparison").mkdir()
    broken = dataclasses.replace(config, init_from=str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="the initial weights could not be made: "):
        initial_weights(broken, tmp_path / "comparison")
    assert fingerprints(tmp_path / "comparison" / "initial") is None
