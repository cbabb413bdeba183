"""The export: a plain Hugging Face folder."""

import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open

from codeparrot_ds.checkpoint.export import TRAINING_STATE, Export, write_export
from codeparrot_ds.durable import WrittenFile
from codeparrot_ds.model.gpt2 import build_model
from codeparrot_ds.model.shapes import GPT2Shape, find_shape, num_parameters

TIED = GPT2Shape(n_layer=2, n_embd=32, n_head=2, vocab_size=257, n_positions=32)
UNTIED = dataclasses.replace(TIED, tie_word_embeddings=False)


@pytest.fixture
def export(tmp_path, tokenizer_dir):
    """Exports a fresh model and returns it with the folder."""

    def make(shape=TIED, dtype=torch.float32):
        model = build_model(shape, eos_token_id=256, seed=1, dropout=0.1).to(dtype)
        weights = {name: weight.detach() for name, weight in model.named_parameters()}
        folder = tmp_path / "checkpoint" / "export"
        folder.mkdir(parents=True)
        entries = write_export(
            folder,
            Export(
                model_config=model.config,
                tokenizer=tokenizer_dir,
                dtype=str(dtype).removeprefix("torch."),
                card="# A card\n",
                training_state={"step": 7},
            ),
            {name: list(weight.shape) for name, weight in weights.items()},
            weights.values(),
        )
        assert sorted(entries) == sorted(path.name for path in folder.iterdir())
        for name, entry in entries.items():
            content = (folder / name).read_bytes()
            assert entry == WrittenFile(len(content), hashlib.sha256(content).hexdigest())
        return model, folder

    return make


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [TIED, UNTIED], ids=["tied", "untied"])
def test_the_same_model_comes_back(export, shape, dtype):
    from transformers import AutoModelForCausalLM

    model, folder = export(shape, dtype)
    loaded, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    assert type(loaded).__name__ == "GPT2LMHeadModel" and loaded.dtype == dtype
    assert (loaded.lm_head.weight is loaded.transformer.wte.weight) == shape.tie_word_embeddings
    model.eval()
    ids = torch.randint(257, (2, 32))
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_weights_are_stored_once_and_as_they_are(export):
    _, folder = export(TIED, torch.bfloat16)
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = set(file.keys())
        stored = sum(file.get_tensor(name).numel() for name in names)
        assert file.metadata() == {"format": "pt"}
        assert all(file.get_tensor(name).dtype == torch.bfloat16 for name in names)
    assert "lm_head.weight" not in names and stored == num_parameters(TIED)


def test_config_holds_nothing_of_training(export, tokenizer_dir):
    _, folder = export(TIED, torch.bfloat16)
    config = json.loads((folder / "config.json").read_text())
    assert "codeparrot_causal" not in json.dumps(config) and not any("attn_impl" in key for key in config)
    assert config["architectures"] == ["GPT2LMHeadModel"] and config["model_type"] == "gpt2"
    assert config["dtype"] == "bfloat16" and config["use_cache"] is True and config["eos_token_id"] == 256
    generation = json.loads((folder / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["pad_token_id"]) == (256, 256)
    assert (folder / "README.md").read_text() == "# A card\n"
    assert json.loads((folder / TRAINING_STATE).read_text()) == {"step": 7}
    assert (folder / "tokenizer.json").read_bytes() == (tokenizer_dir / "tokenizer.json").read_bytes()


def test_an_export_is_a_shape_to_train_from(export):
    for shape in (TIED, UNTIED):
        _, folder = export(shape)
        found = find_shape(str(folder), vocab_size=257, seq_length=32)
        assert dataclasses.replace(found, activation_function="gelu_new", n_inner=None) == shape
        shutil.rmtree(folder)


def test_a_stranger_needs_transformers_alone(export, tmp_path):
    """In a process that knows nothing of this project: load, tokenize, generate with the cache."""
    _, folder = export(TIED, torch.bfloat16)
    script = (
        "import sys\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "rows = tokenizer('def f(x):', return_tensors='pt')\n"
        "output = model.generate(**rows, max_new_tokens=5, do_sample=False)\n"
        "assert 'codeparrot_ds' not in sys.modules\n"
        "print(tokenizer.eos_token, rows['input_ids'].shape[1], output.shape[1] > rows['input_ids'].shape[1])\n"
        "print(tokenizer.decode(rows['input_ids'][0]))\n"
    )
    answer = subprocess.run([sys.executable, "-c", script, str(folder)], cwd=tmp_path, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.splitlines()[-2:] == ["<|endoftext|> 9 True", "def f(x):"]
