"""The recipe's completions: ``complete_code`` samples, ``first_block`` cuts (NLP with Transformers, chapter 10)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from codeparrot_ds.evaluation.models import load_model
from codeparrot_ds.problem_sets.problem import BLOCK_STARTS, cut

SEPARATOR = "\n" + "=" * 80 + "\n"
LINE = "-" * 80

# Each with the recipe's length in tokens, the prompt's own included.
EXAMPLE_PROMPTS: tuple[tuple[str, int], ...] = (
    ('def area_of_rectangle(a: float, b: float):\n    """Return the area of the rectangle."""', 64),
    ('def get_urls_from_html(html):\n    """Get all embedded URLs in a HTML string."""', 64),
    (
        "# a function in native python:\ndef mean(a):\n    return sum(a)/len(a)\n\n"
        "# the same function using numpy:\nimport numpy as np\ndef mean(a):",
        64,
    ),
    (
        "X = np.random.randn(100, 100)\ny = np.random.randint(0, 1, 100)\n\n"
        "# fit random forest classifier with 20 estimators",
        96,
    ),
)
EXAMPLE_ROOM = 32  # new tokens that an example gets at least: a small vocabulary writes its prompt with more tokens


def first_block(string: str) -> str:
    """Returns the text up to the first line that starts a new block at the left margin, without trailing space.

    A block starts with ``class``, ``def``, ``#``, ``@``, ``print`` or ``if``.
    """
    return cut(string, BLOCK_STARTS).rstrip()


def complete_code(
    pipe: Callable[..., Any], prompt: str, max_length: int = 64, num_completions: int = 4, seed: int = 1
) -> list[str]:
    """Samples completions of a prompt, prints them separated by a line of 80 ``=``, and returns them.

    Args:
        pipe: a ``transformers`` text-generation pipeline.
        prompt: the start of some code.
        max_length: tokens of prompt and completion together.
        num_completions: how many to sample.
        seed: of every random generator; the same pipeline, prompt and seed give the same completions.
    """
    from transformers import set_seed

    set_seed(seed)
    generations = pipe(
        prompt,
        num_return_sequences=num_completions,
        max_length=max_length,
        # Pipelines of some versions bring 256 new tokens as a default of their own, which would win over max_length.
        max_new_tokens=None,
        temperature=0.4,
        top_p=0.95,
        top_k=0,
        num_beams=1,
        do_sample=True,
    )
    completions = [first_block(generation["generated_text"][len(prompt) :]) for generation in generations]
    print(SEPARATOR.join(completions))
    return completions


def load_generator(source: str | Path, *, dtype: str = "auto", device: str | None = None) -> Any:
    """Returns the text-generation pipeline of a run, checkpoint, export or Hub model; see ``load_model``."""
    from transformers import pipeline

    model, tokenizer = load_model(source, dtype=dtype, device=device)
    # Training stores its configs without these: generation wants the cache, and a pad token to end rows with.
    model.generation_config.use_cache = True
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.eos_token_id
    return pipeline("text-generation", model=model, tokenizer=tokenizer, device=model.device, trust_remote_code=False)
