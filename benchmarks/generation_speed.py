"""Tokens a second of batched generation against the pipeline prompt by prompt, with equal greedy completions.

python benchmarks/generation_speed.py --tokenizer TOKENIZER
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from record import REPOSITORY, record_parser, write_record
from transformers import AutoTokenizer

from codeparrot_ds.evaluation.complete import load_generator
from codeparrot_ds.evaluation.generate import Request, Sampling, generate
from codeparrot_ds.model.gpt2 import build_model
from codeparrot_ds.model.shapes import find_shape


def prompts_of(folder: Path, number: int) -> list[str]:
    """Heads of functions with their docstrings, from this package's own source."""
    texts = [part for path in sorted(folder.rglob("*.py")) for part in path.read_text().split("\ndef ")[1:]]
    heads = ["def " + text[: text.index('"""', text.index('"""') + 3) + 3] for text in texts if text.count('"""') > 1]
    return [head + "\n" for head in heads if len(head) < 600][:number]


def save_model(folder: str, shape: str, tokenizer: str) -> None:
    """Fresh weights times four, which are livelier: fresh ones say one token for ever."""
    words = AutoTokenizer.from_pretrained(tokenizer)
    sizes = find_shape(shape, vocab_size=len(words), seq_length=1024)
    model: Any = build_model(sizes, eos_token_id=words.eos_token_id, seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    model.generation_config.eos_token_id = None  # every completion has all its tokens
    model.save_pretrained(folder)
    words.save_pretrained(folder)


def one_by_one(pipe: Any, prompts: list[str], new_tokens: int) -> list[str]:
    settings = {"do_sample": False, "max_new_tokens": new_tokens, "return_full_text": False}
    return [pipe(prompt, **settings)[0]["generated_text"] for prompt in prompts]


def batched(pipe: Any, prompts: list[str], new_tokens: int, batch_size: int) -> list[str]:
    requests = [Request(prompt=prompt) for prompt in prompts]
    sampling = Sampling(temperature=0.0, max_new_tokens=new_tokens)
    found = dict(generate(pipe.model, pipe.tokenizer, requests, sampling=sampling, batch_size=batch_size))
    return [found[number].raw for number in range(len(prompts))]


def main() -> None:
    parser = record_parser(__doc__, name="generation-speed-cpu")
    parser.add_argument("--tokenizer", required=True, help="tokenizer folder")
    parser.add_argument("--shape", default="demo")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        save_model(folder, options.shape, options.tokenizer)
        pipe = load_generator(folder, device="cpu")
    prompts = prompts_of(REPOSITORY / "codeparrot_ds", options.prompts)
    ways = {
        "the pipeline, prompt by prompt": lambda: one_by_one(pipe, prompts, options.new_tokens),
        f"batches of {options.batch_size}": lambda: batched(pipe, prompts, options.new_tokens, options.batch_size),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for name, way in ways.items():
        way() if name.startswith("batches") else one_by_one(pipe, prompts[:2], 8)
    for _ in range(options.rounds):
        texts = []
        for name, way in ways.items():
            started = time.perf_counter()
            texts.append(way())
            rates[name].append(len(prompts) * options.new_tokens / (time.perf_counter() - started))
        equal = sum(first == second for first, second in zip(*texts, strict=True))
        print(
            {name: round(values[-1]) for name, values in rates.items()}, f"{equal} of {len(prompts)} equal", flush=True
        )
    before, after = (statistics.median(values) for values in rates.values())
    lines = ["| way | tokens/s, median | min - max |", "|---|---|---|"]
    for name, values in rates.items():
        lines.append(f"| {name} | {statistics.median(values):,.0f} | {min(values):,.0f} - {max(values):,.0f} |")
    lines += [
        "",
        f"{after / before:.1f} times as fast; {equal} of {len(prompts)} greedy completions are equal "
        f"({len(set(texts[0]))} different ones; {options.new_tokens} new tokens each, fp32, {torch.get_num_threads()} "
        "threads). The weights are fresh ones times four, so that the completions differ.",
    ]
    folder = write_record(
        options.name,
        title=f"Batched generation, {options.shape} shape",
        text="\n".join(lines),
        raw=rates | {"equal": equal, "prompts": len(prompts)},
        out=options.out,
    )
    print((folder / "README.md").read_text())


if __name__ == "__main__":
    main()
