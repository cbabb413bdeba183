"""The `complete` command: prompts from anywhere, completions in batches, or one at a time as they grow."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from codeparrot_ds.errors import UserError
from codeparrot_ds.evaluation.complete import BLOCK_STARTS, EXAMPLE_PROMPTS, EXAMPLE_ROOM, LINE, SEPARATOR
from codeparrot_ds.evaluation.details import TOKEN_CLASSES, byte_classes
from codeparrot_ds.evaluation.generate import Completion, Request, Sampling, generate
from codeparrot_ds.evaluation.models import context_length, load_model
from codeparrot_ds.evaluation.prompts import read_prompts
from codeparrot_ds.paths import expand
from codeparrot_ds.terminal import visible

HELP = """A prompt is what you type up to an empty line; its completions follow.
:file PATH        a file's text is the prompt
:more             other completions of the last prompt
:temperature X    :top_p X    :num_completions N    :max_length N    :seed N
:quit             or the end of the input"""


@dataclass(frozen=True, kw_only=True)
class CompleteSettings:
    """How completions are sampled; the defaults are the recipe's."""

    max_length: int = 64
    """Tokens of prompt and completion together."""
    num_completions: int = 4
    temperature: float = 0.4
    """0 takes the most probable token: all completions of a prompt are the same."""
    top_p: float = 0.95
    seed: int = 1

    def __post_init__(self) -> None:
        if self.num_completions < 1:
            raise UserError(f"num_completions is {self.num_completions}; it must be at least 1")
        if self.temperature < 0:
            raise UserError(f"temperature is {self.temperature:g}; it must be at least 0")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p:g}; it must be over 0 and at most 1")


def run_complete(
    source: str | Path,
    prompts: Sequence[str] = (),
    *,
    settings: CompleteSettings | None = None,
    interactive: bool = False,
    as_json: bool = False,
    batch_size: int = 32,
    dtype: str = "auto",
    device: str | None = None,
    colour: bool = False,
) -> None:
    """Prints completions of each prompt, cut where their block ends; without any prompt those of the recipe's four.

    Args:
        source: as for ``load_model``.
        prompts: texts, as ``gather_prompts`` reads them.
        interactive: asks for prompts, also after those given.
        as_json: one object per line: ``prompt``, ``completion``, ``log_probability`` (nats), ``tokens``, ``finish``.
        colour: whether standard output is a terminal: completions grow there in colour, with their log-probabilities.

    Raises ``UserError`` before the first completion when a prompt does not fit.
    """
    settings = settings or CompleteSettings()
    writer = _Writer(load_model(source, dtype=dtype, device=device), settings, batch_size, as_json, colour)
    if prompts or interactive:
        writer.write(prompts)
    else:
        longest = [max(length, settings.max_length) for _, length in EXAMPLE_PROMPTS]
        writer.write([text for text, _ in EXAMPLE_PROMPTS], longest)
    if interactive:
        _converse(writer, sys.stdin)


class _Writer:
    """Completes prompts and prints what comes of it."""

    def __init__(
        self, loaded: tuple[Any, Any], settings: CompleteSettings, batch_size: int, as_json: bool, colour: bool
    ) -> None:
        self.model, self.tokenizer = loaded
        self.settings, self.batch_size, self.as_json, self.colour = settings, batch_size, as_json, colour

    def write(self, prompts: Sequence[str], max_lengths: Sequence[int] | None = None) -> None:
        """Completes all prompts in batches; prints those of each prompt as soon as they and all before are there.

        Args:
            max_lengths: for each prompt, where it is not the settings'; raised where the prompt needs more.
        """
        number = self.settings.num_completions
        requests = []
        for place, prompt in enumerate(prompts):
            tokens = len(self.tokenizer(prompt, verbose=False)["input_ids"])
            longest = self.settings.max_length
            if max_lengths is not None:
                longest = max(max_lengths[place], tokens + EXAMPLE_ROOM)
            self._check_fits(prompt, tokens, longest)
            for sample in range(number):
                # Far apart: the samples of seed n + 1 are none of those of seed n.
                seed = self.settings.seed * 1_000_003 + sample
                room = longest - max(tokens, 1)
                requests.append(Request(prompt=prompt, seed=seed, ends=BLOCK_STARTS, max_new_tokens=room))
        sampling = Sampling(temperature=self.settings.temperature, top_p=self.settings.top_p)
        # One prompt on a terminal is watched as it grows; several go through the model together.
        growing = _Growing(prompts[0]) if self.colour and not self.as_json and len(prompts) == 1 else None
        if growing is not None:
            self._print_prompt(prompts[0])
        found: dict[int, Completion] = {}
        shown = 0
        for place, completion in generate(
            self.model,
            self.tokenizer,
            requests,
            sampling=sampling,
            batch_size=self.batch_size,
            on_token=None if growing is None else growing,
        ):
            found[place] = completion
            while shown < len(prompts) and all(shown * number + sample in found for sample in range(number)):
                rows = [found[shown * number + sample] for sample in range(number)]
                self._print(prompts[shown], rows, growing)
                shown += 1

    def _print_prompt(self, prompt: str) -> None:
        print(f"{coloured(prompt) if self.colour else prompt}\n{LINE}")

    def _print(self, prompt: str, completions: list[Completion], growing: _Growing | None) -> None:
        if self.as_json:
            for completion in completions:
                row = {
                    "prompt": prompt,
                    "completion": completion.text.rstrip(),
                    "log_probability": completion.log_probability,
                    "tokens": completion.num_tokens,
                    "finish": completion.finish,
                }
                print(json.dumps(row), flush=True)
            return
        if growing is None:
            self._print_prompt(prompt)
        parts = []
        for place, completion in enumerate(completions):
            text = completion.text.rstrip()
            if self.colour:
                text = coloured(text, before=prompt) if growing is None or place else ""
                score = f"log-probability {completion.log_probability:.2f}, {completion.num_tokens} tokens"
                text = f"{text}\n\x1b[2m{score}, {completion.finish}\x1b[0m"
            parts.append(text)
        print(SEPARATOR.join(parts) + "\n", flush=True)

    def _check_fits(self, prompt: str, tokens: int, max_length: int) -> None:
        context = context_length(self.model)
        start = " ".join(prompt.split())[:40]
        if context is not None and tokens >= context:
            raise UserError(
                f"the prompt '{start}' has {tokens} tokens and the model's context is {context}; shorten it"
            )
        if context is not None and max_length > context:
            raise UserError(
                f"max_length is {max_length} and the model's context is {context} tokens; give at most {context}"
            )
        if tokens >= max_length:
            raise UserError(
                f"the prompt '{start}' has {tokens} tokens and max_length, which includes them, is {max_length}; "
                f"give at least {tokens + 1}"
            )


class _Growing:
    """Writes the first completion of a prompt as it grows."""

    def __init__(self, prompt: str) -> None:
        self.prompt, self.written = prompt, ""

    def __call__(self, number: int, text: str) -> None:
        text = text.rstrip()  # as it is shown in the end
        if number == 0 and len(text) > len(self.written):
            sys.stdout.write(coloured(text[len(self.written) :], before=self.prompt + self.written))
            sys.stdout.flush()
            self.written = text


def _converse(writer: _Writer, lines: TextIO) -> None:
    """Completes what is typed until the input ends."""
    print(HELP)
    last = ""
    for block in _blocks(lines):
        word, _, rest = block.partition(" ")
        try:
            if word == ":quit":
                return
            if word == ":help":
                print(HELP)
            elif word == ":more":
                writer.settings = dataclasses.replace(writer.settings, seed=writer.settings.seed + 1)
                writer.write([last])
            elif word == ":file":
                (last,) = read_prompts(expand(rest.strip()))[:1] or [""]
                writer.write([last])
            elif word.startswith(":"):
                writer.settings = _changed(writer.settings, word[1:], rest.strip())
            else:
                last = block
                writer.write([last])
        except UserError as error:  # the session continues
            print(f"error: {error}")


def _blocks(lines: TextIO) -> Iterable[str]:
    """Yields what is typed up to each empty line, and each line that begins with a colon by itself."""
    block: list[str] = []
    while True:
        if lines.isatty():
            print("... " if block else ">>> ", end="", flush=True)
        line = lines.readline()
        text = line.rstrip("\n")
        if not block and text.startswith(":"):
            yield text
        elif text.strip():
            block.append(text)
        elif block:
            yield "\n".join(block)
            block = []
        if not line:
            return


def _changed(settings: CompleteSettings, name: str, value: str) -> CompleteSettings:
    kinds: dict[str, Callable[[str], Any]] = {
        field.name: int if field.type == "int" else float for field in dataclasses.fields(settings)
    }
    if name not in kinds:
        raise UserError(f":{name} is no command; :help lists them")
    try:
        return dataclasses.replace(settings, **{name: kinds[name](value)})
    except ValueError:
        raise UserError(f"{name} is a number, not {value!r}") from None


_COLOURS = {"keyword": "\x1b[1;34m", "literal": "\x1b[32m", "comment": "\x1b[2m"}
_PLAIN = "\x1b[0m"


def coloured(text: str, before: str = "") -> str:
    """Returns source with colours, and with what a terminal would obey made visible.

    Args:
        text: any part of a source.
        before: what it follows: a string or comment that begins there continues here.
    """
    start = before.encode("utf-8", "replace")
    data = text.encode("utf-8", "replace")
    classes = byte_classes(start + data)[len(start) :].tolist()
    parts, begin = [], 0
    for end in range(1, len(data) + 1):
        if end == len(data) or classes[end] != classes[begin]:
            piece = visible(data[begin:end].decode("utf-8", "replace"))
            colour = _COLOURS.get(TOKEN_CLASSES[classes[begin]], "")
            parts.append(f"{colour}{piece}{_PLAIN}" if colour else piece)
            begin = end
    return "".join(parts)
