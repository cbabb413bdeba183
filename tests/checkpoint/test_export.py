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
from codeparrot_ds.corpus.tokenizer import _transformers_config
from codeparrot_ds.data.encoder import load_encoder
from codeparrot_ds.durable import WrittenFile
from codeparrot_ds.evaluation.generate import Request, Sampling, generate
from codeparrot_ds.evaluation.models import load_model
from codeparrot_ds.model.gpt2 import build_model
from codeparrot_ds.model.shapes import GPT2Shape, find_shape, num_parameters

TIED = GPT2Shape(n_layer=2, n_embd=32, n_head=2, vocab_size=257, n_positions=32)
UNTIED = dataclasses.replace(TIED, tie_word_embeddings=False)


@pytest.fixture
def export(tmp_path, tokenizer_dir):
    """Exports a fresh model and returns it with the folder."""

    def make(shape=TIED, dtype=torch.float32, tokenizer=tokenizer_dir):
        eos_token_id = load_encoder(tokenizer).eos_token_id
        model = build_model(shape, eos_token_id=eos_token_id, seed=1, dropout=0.1).to(dtype)
        weights = {name: weight.detach() for name, weight in model.named_parameters()}
        folder = tmp_path / "checkpoint" / "export"
        folder.mkdir(parents=True)
        entries = write_export(
            folder,
            Export(
                model_config=model.config,
                tokenizer=tokenizer,
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
    assert config["dtype"] == "bfloat16" and config["use_cache"] is True and config["eos_token_id"] == 0
    assert (folder / "README.md").read_text() == "# A card\n"
    assert json.loads((folder / TRAINING_STATE).read_text()) == {"step": 7}
    assert (folder / "tokenizer.json").read_bytes() == (tokenizer_dir / "tokenizer.json").read_bytes()


def test_config_has_what_converters_and_older_versions_read(export):
    _, folder = export(TIED, torch.bfloat16)
    config, generation = (json.loads((folder / name).read_text()) for name in ("config.json", "generation_config.json"))
    assert config["n_ctx"] == config["n_positions"] == 32
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"
    for kind in ("bos", "eos", "pad"):
        assert config[f"{kind}_token_id"] == generation[f"{kind}_token_id"] == 0
    needed = ("vocab_size", "n_embd", "n_head", "n_layer", "layer_norm_epsilon", "activation_function")
    assert all(config[key] is not None for key in needed)


EOS = "<|endoftext|>"
TOKENIZERS = {  # what is changed in tokenizer.json, and what is said beside it
    "as codeparrot-ds makes it": ({}, {"tokenizer_config.json": _transformers_config()}),
    "of 0.1.0": (
        {},
        {"tokenizer_config.json": {key: v for key, v in _transformers_config().items() if key != "pad_token"}},
    ),
    "nothing said": ({}, {}),
    "a class that splits otherwise": (
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        ]}},
        {"tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer", "clean_up_tokenization_spaces": True}},
    ),
    "a space in front": (
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
        {"tokenizer_config.json": {"eos_token": EOS}},
    ),
    "tokens that are not there": ({}, {"tokenizer_config.json": {
        "eos_token": EOS, "pad_token": "[PAD]", "unk_token": {"content": "<unk>", "special": True}, "mask_token": "<m>",
        "additional_special_tokens": ["<fim>", EOS], "added_tokens_decoder": {"300": {"content": "<more>"}},
    }}),
    "another file says it": ({}, {
        "special_tokens_map.json": {"eos_token": {"content": EOS}, "pad_token": "!", "bos_token": "#"},
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": None, "bos_token": '"'},
    }),
    "a pad of its own": ({}, {"tokenizer_config.json": {"eos_token": EOS, "pad_token": "!"}}),
}  # fmt: skip


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_tokenizer_is_that_of_training_whatever_is_said_beside_it(export, tokenizer_dir, tmp_path, kind):
    from transformers import AutoTokenizer

    changes, said = TOKENIZERS[kind]
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    content = json.loads((tokenizer_dir / "tokenizer.json").read_text()) | changes
    content["model"]["vocab"] |= {"12": 257, "34": 258, "1234": 259}  # which a pre-tokenizer may keep apart
    content["model"]["merges"] = [["1", "2"], ["3", "4"], ["12", "34"]]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    for name, values in said.items():
        (folder / name).write_text(json.dumps(values))
    _, exported = export(dataclasses.replace(TIED, vocab_size=260), tokenizer=folder)
    assert (exported / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert not (exported / "special_tokens_map.json").exists()
    encoder = load_encoder(folder)
    assert load_encoder(exported).fingerprint == encoder.fingerprint

    tokenizer = AutoTokenizer.from_pretrained(exported)
    text = "def f(x): return x . y == 1234 # naïve  \n\n"
    (ids,) = encoder.encode_batch([text])
    assert list(tokenizer(text)) == ["input_ids", "attention_mask"]
    assert tokenizer(text)["input_ids"] == ids.tolist()
    assert tokenizer.decode(ids) == encoder.decode(ids)
    assert len(tokenizer) == 260 and tokenizer.model_max_length == 32
    own = {"another file says it": ('"', "!"), "a pad of its own": (EOS, "!")}.get(kind, (EOS, EOS))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (own[0], EOS, own[1])
    generation = json.loads((exported / "generation_config.json").read_text())
    assert [generation[f"{kind}_token_id"] for kind in ("bos", "eos", "pad")] == [
        *(tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    ]


def test_batches_complete_as_single_prompts_do(export):
    """Padded, and longer than the model reads: with what the folder says and nothing else."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

    _, folder = export()
    pipe = pipeline("text-generation", model=str(folder), device="cpu")
    prompts = ["def f(x):", "x", "import os\n", "class LongerThanTheModelReads:\n    pass  # " + "=" * 40]
    options = {"max_new_tokens": 6, "do_sample": False, "handle_long_generation": "hole"}
    single = [pipe(prompt, **options)[0]["generated_text"] for prompt in prompts]
    batched = [rows[0]["generated_text"] for rows in pipe(prompts, batch_size=len(prompts), **options)]
    assert batched == single and all(text.startswith(prompt) for text, prompt in zip(single[:3], prompts, strict=False))

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    rows = tokenizer(prompts, padding=True, truncation=True, return_tensors="pt")
    assert rows["input_ids"].shape == (4, 32)
    together = model.generate(**rows, max_new_tokens=1, do_sample=False)[:, -1]
    alone = [
        model.generate(**tokenizer(prompt, truncation=True, return_tensors="pt"), max_new_tokens=1, do_sample=False)
        for prompt in prompts
    ]
    assert together.tolist() == [row[0, -1].item() for row in alone]


def test_commands_of_this_project_are_not_warned_of_what_it_says(export, monkeypatch):
    """Rows that end with the end-of-sequence token are not padded here, and a prompt that is too long is dealt with."""
    from transformers import modeling_utils, tokenization_utils_base

    _, folder = export()
    warned = []
    for logger, name in ((modeling_utils.logger, "warning_once"), (tokenization_utils_base.logger, "warning")):
        monkeypatch.setattr(logger, name, lambda text, *_: warned.append(text))
    model, tokenizer = load_model(folder)
    model(input_ids=torch.zeros((1, 4), dtype=torch.long))
    (completion,) = generate(model, tokenizer, [Request(prompt="x" * 40)], sampling=Sampling())
    assert completion[1].finish == "context" and not warned


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
