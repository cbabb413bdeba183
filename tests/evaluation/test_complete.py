"""Completions, against an independent transcription of the recipe's functions on the same pipeline."""

import json
import re
import shutil

import pytest

from codeparrot_ds.checkpoint.folders import find_model
from codeparrot_ds.errors import UserError
from codeparrot_ds.evaluation.complete import complete_code, first_block, load_generator
from codeparrot_ds.hub.local_git import LocalRepository
from codeparrot_ds.hub.queue import PushQueue
from codeparrot_ds.hub.worker import Destination, drain


@pytest.fixture(scope="module")
def pipe(model_folder):
    return load_generator(model_folder)


def book_first_block(string):
    return re.split("\nclass|\ndef|\n#|\n@|\nprint|\nif", string)[0].rstrip()


def book_complete_code(pipe, prompt, max_length=64, num_completions=4, seed=1):
    from transformers import set_seed

    set_seed(seed)
    gen_kwargs = {"temperature": 0.4, "top_p": 0.95, "top_k": 0, "num_beams": 1, "do_sample": True}
    code_gens = pipe(prompt, num_return_sequences=num_completions, max_length=max_length, **gen_kwargs)
    code_strings = []
    for code_gen in code_gens:
        code_strings.append(book_first_block(code_gen["generated_text"][len(prompt) :]))
    print(("\n" + "=" * 80 + "\n").join(code_strings))


@pytest.mark.parametrize(
    ("text", "block"),
    [
        ("\n    return a * b\n\nclass Next:", "\n    return a * b"),
        ("\n    return 1\n\ndef next():", "\n    return 1"),
        (" x\n# comment\n@decorated", " x"),
        (" x\n@decorated\n", " x"),
        (" x\nprint(x)", " x"),
        (" x\nif x:", " x"),
        (" x\n    if x:\n        print(x)  \n\n", " x\n    if x:\n        print(x)"),
        ("def f(): pass", "def f(): pass"),
        ("\nclassical = 1", ""),
        ("", ""),
    ],
)
def test_first_block_cuts_at_the_left_margin(text, block):
    assert first_block(text) == block == book_first_block(text)


@pytest.mark.parametrize(
    ("prompt", "arguments"),
    [
        ("def f(x):", {}),
        ("def f(x):", {"seed": 7, "num_completions": 2}),
        ("class A:\n    ", {"max_length": 128}),
        ("", {"max_length": 32}),
    ],
)
def test_complete_code_prints_what_the_recipe_prints(pipe, capsys, prompt, arguments):
    book_complete_code(pipe, prompt, **arguments)
    expected = capsys.readouterr().out
    completions = complete_code(pipe, prompt, **arguments)
    printed = capsys.readouterr()
    assert printed.out == expected
    assert printed.out.count("=" * 80) == arguments.get("num_completions", 4) - 1 == len(completions) - 1


def test_completions_follow_the_seed_and_end_at_max_length(pipe, capsys):
    first, again, other = (complete_code(pipe, "def f(x):", seed=seed) for seed in (3, 3, 4))
    assert first == again != other
    lengths = []

    def counting(prompt, **arguments):
        generations = pipe(prompt, return_tensors=True, **arguments)
        lengths.extend(len(generation["generated_token_ids"]) for generation in generations)
        return pipe(prompt, **arguments)

    complete_code(counting, "def f(x):", max_length=40)
    assert max(lengths) == 40


def test_a_run_stands_for_its_newest_complete_checkpoint(run_folder):
    checkpoints = run_folder / "checkpoints"
    assert find_model(run_folder) == str(checkpoints / "step-00001000" / "export")
    assert find_model(checkpoints / "step-00000500") == str(checkpoints / "step-00000500" / "export")
    assert find_model(checkpoints / "step-00000500" / "export") == str(checkpoints / "step-00000500" / "export")
    assert find_model("org/name") == "org/name"


def test_a_drained_branch_cloned_with_plain_git_generates_the_same(run_folder, tmp_path, capsys):
    import subprocess

    queue = PushQueue(run_folder)
    queue.enqueue(1000, find_model(run_folder), "step 1000")
    repository = LocalRepository(tmp_path / "hub.git")
    drain(queue, Destination(branch="brave-fox-1", run_id=None, repository=repository))
    subprocess.run(["git", "clone", "-q", "-b", "brave-fox-1", tmp_path / "hub.git", tmp_path / "clone"], check=True)
    here = complete_code(load_generator(run_folder), "def f(x):")
    assert complete_code(load_generator(tmp_path / "clone"), "def f(x):") == here


def test_models_that_cannot_be_used_are_named(model_folder, tmp_path, monkeypatch):
    with pytest.raises(
        UserError, match="there is no run or model folder ./absent; a model on the Hub is named org/name"
    ):
        load_generator("./absent")
    with pytest.raises(UserError, match="no run, checkpoint or Hugging Face model"):
        load_generator(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="no checkpoint yet"):
        load_generator(tmp_path)
    broken = shutil.copytree(model_folder, tmp_path / "broken")
    weights = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(UserError, match="cannot be loaded"):
        load_generator(broken)
    description = json.loads((broken / "tokenizer.json").read_text())
    description["model"]["merges"] = [["a", "no such token"]]
    (broken / "tokenizer.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match=r"broken/tokenizer\.json is not a tokenizer .*: Token `no such token` out of"):
        load_generator(broken)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="org/absent: the model cannot be loaded"):
        load_generator("org/absent")


@pytest.mark.parametrize("named", [True, False])
def test_code_of_a_model_folder_never_runs(model_folder, tmp_path, monkeypatch, named):
    """Neither where the config names it, nor, past that check, where transformers would ask for it."""
    coded, ran = shutil.copytree(model_folder, tmp_path / "coded"), tmp_path / "ran"
    code = f"from pathlib import Path\nPath({str(ran)!r}).touch()\n"
    for name in ("modeling_evil.py", "configuration_evil.py", "tokenization_evil.py", "custom_generate.py"):
        (coded / name).write_text(code)
    config = json.loads((coded / "config.json").read_text())
    classes = {"AutoConfig": "configuration_evil.Config", "AutoModelForCausalLM": "modeling_evil.Model"}
    (coded / "config.json").write_text(json.dumps(config | {"model_type": "evil", "auto_map": classes}))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    if not named:
        monkeypatch.setattr("codeparrot_ds.evaluation.models.refuse_own_code", lambda place: None)
    with pytest.raises(
        UserError, match=r"names code of its own \('auto_map'\), and models and tokenizers that bring code"
    ):
        load_generator(coded)
    assert not ran.exists()


def test_weights_that_lack_a_tensor_are_refused(model_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    partial = shutil.copytree(model_folder, tmp_path / "partial")
    tensors = load_file(partial / "model.safetensors")
    tensors.pop("transformer.h.1.mlp.c_fc.weight")
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lack transformer.h.1.mlp.c_fc.weight"):
        load_generator(partial)


def test_generation_uses_the_cache_even_if_training_saved_it_off(pipe):
    assert pipe.model.generation_config.use_cache is True
