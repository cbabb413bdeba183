"""Completions while a model trains: of some prompts, and of small problems whose tests are run.

Every rank completes its share. At ZeRO stage 3, where each forward pass gathers the weights from all ranks, all of them
complete everything together and take rank 0's tokens, so that none waits for another.
"""

from __future__ import annotations

import ast
import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from codeparrot_ds.config.run_config import RunConfig
from codeparrot_ds.engine.ranks import Ranks
from codeparrot_ds.evaluation.complete import BLOCK_STARTS, cut
from codeparrot_ds.evaluation.generate import Completion, Request, Sampling, generate
from codeparrot_ds.evaluation.prompts import TRAINING_LIMITS, what_to_complete
from codeparrot_ds.problem_sets.problem import Problem
from codeparrot_ds.sandbox.judge import judge_all
from codeparrot_ds.supervision.heartbeat import beat

_BATCH_SIZE = 16


@dataclass(frozen=True, kw_only=True)
class Samples:
    """What the model wrote at one evaluation, the same on every rank."""

    figures: dict[str, float]
    """For the evaluation's row: ``parsing_share`` and, with problems, ``pass_at_1``."""
    rows: list[dict[str, Any]]
    """``prompt``, ``completion``, ``log_probability``, ``tokens``, ``parses``; a problem's also ``task_id``,
    ``verdict``."""


class Sampler:
    """Completes the same prompts and problems at every evaluation of a run."""

    def __init__(
        self, config: RunConfig, ranks: Ranks, *, prompts: Sequence[str], problems: Sequence[Problem], together: bool
    ) -> None:
        """Reads the tokenizer.

        Args:
            together: whether a forward pass needs all ranks (ZeRO stage 3).
        """
        from transformers import AutoTokenizer

        self.ranks, self.together, self.problems = ranks, together, list(problems)
        self.tokenizer = AutoTokenizer.from_pretrained(config.tokenizer, trust_remote_code=False)
        self.requests = [
            Request(prompt=prompt, seed=config.seed * 1_000_003 + number, ends=BLOCK_STARTS)
            for number, prompt in enumerate(prompts)
        ]
        self.greedy = [Request(prompt=problem.prompt, ends=problem.ends) for problem in problems]
        self.sampling = Sampling(max_new_tokens=config.eval_new_tokens)
        self.most_probable = Sampling(temperature=0.0, max_new_tokens=config.eval_new_tokens)

    def __call__(self, engine: Any) -> Samples:
        """Completes, judges and counts; collective. The engine must be in evaluation mode."""
        with _generating(engine.module):
            completions = self._complete(engine, self.requests, self.sampling)
            solutions = self._complete(engine, self.greedy, self.most_probable)
        beat("evaluate")
        rows = [
            _row(request.prompt, cut(completion.text, request.ends).rstrip(), completion)
            for request, completion in zip(self.requests, completions, strict=True)
        ]
        figures = {}
        texts = [problem.cut(completion.raw) for problem, completion in zip(self.problems, solutions, strict=True)]
        verdicts = self.ranks.on_main(lambda: self._judge(texts))
        for problem, text, completion, verdict in zip(self.problems, texts, solutions, verdicts, strict=True):
            rows.append({**_row(problem.prompt, text, completion), "task_id": problem.task_id, "verdict": verdict})
        figures["parsing_share"] = sum(row["parses"] for row in rows) / len(rows)
        if verdicts:
            figures["pass_at_1"] = verdicts.count("passed") / len(verdicts)
        return Samples(figures=figures, rows=rows)

    def _complete(self, engine: Any, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """Returns every request's completion, on every rank."""
        beat("evaluate")
        numbers = list(range(len(requests)))
        if not self.together:
            numbers = numbers[self.ranks.rank :: self.ranks.world_size]
        found = generate(
            _Model(engine),
            self.tokenizer,
            [requests[number] for number in numbers],
            sampling=sampling,
            batch_size=_BATCH_SIZE,
            agree=self._first_ranks if self.together else None,
        )
        mine = {numbers[place]: completion for place, completion in found}
        if self.together:
            return [mine[number] for number in range(len(requests))]
        everything = {number: one for part in self.ranks.gather(mine) for number, one in part.items()}
        return [everything[number] for number in range(len(requests))]

    def _first_ranks(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.ranks.sum(tokens if self.ranks.is_main else torch.zeros_like(tokens))

    def _judge(self, texts: Sequence[str]) -> list[str]:
        items = [(problem.program(text), problem.check) for problem, text in zip(self.problems, texts, strict=True)]
        return [verdict.kind for verdict in judge_all(items, limits=TRAINING_LIMITS)] if items else []


def open_sampler(config: RunConfig, ranks: Ranks, *, together: bool) -> Sampler | None:
    """Returns the run's sampler, None where nothing is to be completed; collective.

    Raises ``UserError`` for prompts and problems that cannot be read, and for problems where programs may not run.
    """
    if not config.eval_prompts and not config.eval_problems:
        return None
    prompts, problems = ranks.on_main(lambda: what_to_complete(config))
    return Sampler(config, ranks, prompts=prompts, problems=problems, together=together)


def _row(prompt: str, text: str, completion: Completion) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "completion": text,
        "log_probability": completion.log_probability,
        "tokens": completion.num_tokens,
        "parses": parses(prompt + text + "\n"),
    }


def parses(source: str) -> bool:
    """Whether a text is Python of this interpreter's grammar."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what a model writes nobody wants to hear
            compile(source, "<completion>", "exec", flags=ast.PyCF_ONLY_AST, dont_inherit=True)
    except (SyntaxError, ValueError, MemoryError, RecursionError):  # a null character; too deep
        return False
    return True


class _Model:
    """A model as ``generate`` wants it, whose forward passes go through the engine, which gathers what it needs."""

    def __init__(self, engine: Any) -> None:
        module = engine.module
        self._engine, self.config, self.device = engine, module.config, engine.device
        self.generation_config, self.forward = module.generation_config, module.forward

    def __call__(self, **inputs: Any) -> Any:
        return self._engine(**inputs)


@contextlib.contextmanager
def _generating(module: Any) -> Iterator[None]:
    """Attention with the masks of padded rows and of a cache, in place of training's; nothing is compiled anew."""
    training = module.config._attn_implementation
    module.config._attn_implementation = "sdpa"
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        module.config._attn_implementation = training
