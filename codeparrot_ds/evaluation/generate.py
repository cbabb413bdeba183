"""Completions in batches with a key-value cache: equal to one prompt at a time, several times as fast.

Rows of a batch are padded on the left and read their own positions; a prompt that several rows share is read once;
rows that are through leave the batch. Each row draws from a generator of its own, so that a sample depends on its seed
and not on its neighbours.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional as F
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from codeparrot_ds.evaluation.complete import cut
from codeparrot_ds.evaluation.models import context_length

_ROOM_TOKENS = 64  # that a cache grows by
_FEW_TOKENS = 256  # of the vocabulary, which nearly always hold top_p of the probability: sorting all takes far longer
_LIVE_SHARE = 0.75  # of a batch's rows, below which it is made smaller


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 0.4
    """0 takes the most probable token."""
    top_p: float = 0.95
    """Of the probability, from the most probable token down; what is left is never drawn."""
    max_new_tokens: int = 256


@dataclass(frozen=True, kw_only=True)
class Request:
    """One completion that is wanted."""

    prompt: str
    seed: int = 0
    ends: tuple[str, ...] = ()
    """Texts of which the first ends the completion, and is no part of it."""
    max_new_tokens: int | None = None
    """Where it is not the sampling's."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What a model wrote."""

    text: str
    """Up to the first of the request's ends."""
    raw: str
    """With what came until the end was seen."""
    finish: str
    """``end`` (one of the request's), ``eos``, ``length`` (``max_new_tokens``) or ``context`` (of the model)."""
    log_probability: float
    """Of the tokens that make up ``text``, in nats, as the model gives it at temperature 1."""
    num_tokens: int
    """That make up ``text``."""
    tokens: tuple[int, ...]
    """Of ``raw``, with the end-of-sequence token where that came."""


def generate(
    model: Any,
    tokenizer: Any,
    requests: Sequence[Request],
    *,
    sampling: Sampling,
    batch_size: int = 32,
    on_token: Callable[[int, str], None] | None = None,
    agree: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Iterator[tuple[int, Completion]]:
    """Yields the number of each request and its completion, as they are through; prompts of like lengths go together.

    Args:
        model: a causal language model of ``transformers`` in evaluation mode.
        tokenizer: the model's.
        requests: a prompt that leaves no room in the context is completed with nothing.
        batch_size: rows at once.
        on_token: gets a request's number and all its text so far, whenever that grows.
        agree: makes the next tokens, (rows,), the same on all ranks, where a forward pass needs them all.
    """
    prompts = list(dict.fromkeys(request.prompt for request in requests))
    ids = {prompt: list(tokenizer(prompt, verbose=False)["input_ids"]) for prompt in prompts}
    for prompt, tokens in ids.items():
        if not tokens:  # something must be read for something to come next
            ids[prompt] = [tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id]
    context = context_length(model)
    rows = []
    for number, request in enumerate(requests):
        wanted = sampling.max_new_tokens if request.max_new_tokens is None else request.max_new_tokens
        room = wanted if context is None else min(wanted, context - len(ids[request.prompt]))
        if room < 1:
            yield number, Completion(text="", raw="", finish="context", log_probability=0.0, num_tokens=0, tokens=())
            continue
        rows.append(_Row(number, request, ids[request.prompt], room, "length" if room == wanted else "context"))
    rows.sort(key=lambda row: (len(row.prompt), row.prompt))
    for start in range(0, len(rows), batch_size):
        yield from _Batch(model, tokenizer, rows[start : start + batch_size], sampling, on_token, agree).run()


@dataclass
class _Row:
    number: int
    request: Request
    prompt: list[int]
    room: int
    at_the_end: str
    tokens: list[int] = field(default_factory=list)
    log_probabilities: list[float] = field(default_factory=list)
    shown: int = 0


class _Batch:
    """Rows that advance together, one token per step."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        rows: list[_Row],
        sampling: Sampling,
        on_token: Callable[[int, str], None] | None,
        agree: Callable[[torch.Tensor], torch.Tensor] | None,
    ) -> None:
        self.model, self.tokenizer, self.rows, self.sampling, self.on_token = model, tokenizer, rows, sampling, on_token
        self.agree = agree
        self.device, self.context = model.device, context_length(model)
        known = inspect.signature(model.forward).parameters
        self.keeps_logits, self.takes_positions = "logits_to_keep" in known, "position_ids" in known
        eos = model.generation_config.eos_token_id
        self.eos = set(eos if isinstance(eos, list) else [eos]) | {tokenizer.eos_token_id}
        # An end that the newest token completes lies within as many tokens as it has characters.
        self.tail = max((len(end) for row in rows for end in row.request.ends), default=0)
        self.draws = None
        if sampling.temperature > 0:
            longest = max(row.room for row in rows)
            draws = [torch.rand(longest, generator=torch.Generator().manual_seed(row.request.seed)) for row in rows]
            self.draws = torch.stack(draws).to(self.device)

    # Not inference mode: weights that ZeRO-3 gathers on the way would be of no use to training any more.
    @torch.no_grad()
    def run(self) -> Iterator[tuple[int, Completion]]:
        logits = self._read_prompts()
        alive = [True] * len(self.rows)
        for step in range(max(row.room for row in self.rows)):
            log_probabilities = F.log_softmax(logits.float(), dim=-1)
            chosen = self._choose(log_probabilities, step)
            if self.agree is not None:
                chosen = self.agree(chosen)
            likely = log_probabilities.gather(1, chosen[:, None])[:, 0].tolist()
            for place, (token, log_probability) in enumerate(zip(chosen.tolist(), likely, strict=True)):
                if not alive[place]:
                    continue
                row = self.rows[place]
                row.tokens.append(token)
                row.log_probabilities.append(log_probability)
                finish = self._finish(row)
                if self.on_token is not None:
                    self._show(row, finish)
                if finish:
                    alive[place] = False
                    yield row.number, self._completion(row, finish)
            if not any(alive):
                return
            if sum(alive) <= _LIVE_SHARE * len(alive):
                chosen = self._keep([place for place, lives in enumerate(alive) if lives], chosen)
                alive = [True] * len(self.rows)
            logits = self._read(chosen[:, None], self.positions[:, None] + step)

    def _read_prompts(self) -> torch.Tensor:
        """Reads each prompt once; returns the logits after it for every row, (rows, vocabulary)."""
        prompts = list(dict.fromkeys(tuple(row.prompt) for row in self.rows))
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        width = int(lengths.max())
        pad = width - lengths
        ids = torch.tensor([[prompt[0]] * (width - len(prompt)) + list(prompt) for prompt in prompts])
        places = torch.arange(width)[None]
        # Attention without a mask where no row is padded: it takes the fastest kernel.
        self.mask = None
        if pad.any():
            room = max(row.room for row in self.rows)
            self.mask = torch.ones((len(prompts), width + room), dtype=torch.long)
            self.mask[:, :width] = places >= pad[:, None]
            self.mask = self.mask.to(self.device)
        self.seen, self.cache = 0, _cache(self.model)
        logits = self._read(ids.to(self.device), (places - pad[:, None]).clamp(min=0).to(self.device))
        self.positions = lengths.to(self.device)
        if len(prompts) < len(self.rows):
            index = {prompt: place for place, prompt in enumerate(prompts)}
            of_rows = torch.tensor([index[tuple(row.prompt)] for row in self.rows], device=self.device)
            self._select(of_rows)
            logits = logits[of_rows]
        return logits

    def _read(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Reads (rows, tokens) after what is in the cache; returns the last token's logits, (rows, vocabulary)."""
        self.seen += ids.shape[1]
        arguments: dict[str, Any] = {"input_ids": ids, "past_key_values": self.cache, "use_cache": True}
        if self.mask is not None:
            arguments["attention_mask"] = self.mask[:, : self.seen]
        if self.takes_positions:
            # Rows that have finished keep running until the batch is made smaller, also past the context.
            arguments["position_ids"] = positions if self.context is None else positions.clamp(max=self.context - 1)
        if self.keeps_logits:
            arguments["logits_to_keep"] = 1
        output = self.model(**arguments)
        self.cache = output.past_key_values
        return output.logits[:, -1]

    def _choose(self, log_probabilities: torch.Tensor, step: int) -> torch.Tensor:
        """Returns each row's next token, (rows,)."""
        if self.draws is None:
            return log_probabilities.argmax(dim=-1)
        return sample(
            log_probabilities, self.draws[:, step], temperature=self.sampling.temperature, top_p=self.sampling.top_p
        )

    def _keep(self, places: list[int], chosen: torch.Tensor) -> torch.Tensor:
        kept = torch.tensor(places, device=self.device)
        self.rows = [self.rows[place] for place in places]
        if self.draws is not None:
            self.draws = self.draws[kept]
        self._select(kept)
        return chosen[kept]

    def _select(self, rows: torch.Tensor) -> None:
        self.cache.batch_select_indices(rows)
        if self.mask is not None:
            self.mask = self.mask[rows]
        self.positions = self.positions[rows]

    def _finish(self, row: _Row) -> str:
        """Why the row is through, empty while it is not."""
        if row.tokens[-1] in self.eos:
            return "eos"
        if row.request.ends:
            newest = self._text(row.tokens[-self.tail :])
            if any(end in newest for end in row.request.ends):
                return "end"
        if len(row.tokens) == row.room:
            return row.at_the_end
        return ""

    def _completion(self, row: _Row, finish: str) -> Completion:
        raw = self._text(row.tokens)
        text = cut(raw, row.request.ends)
        num_tokens = len(row.tokens)
        if finish == "end":
            num_tokens = 0
            while len(self._text(row.tokens[:num_tokens])) < len(text):
                num_tokens += 1
        return Completion(
            text=text,
            raw=raw,
            finish=finish,
            log_probability=sum(row.log_probabilities[:num_tokens]),
            num_tokens=num_tokens,
            tokens=tuple(row.tokens),
        )

    def _show(self, row: _Row, finish: str) -> None:
        """Hands over the text that no later token can change: ends and unfinished letters are held back."""
        text = self._text(row.tokens)
        if finish:
            text = cut(text, row.request.ends)
        else:
            held = next((size for size in range(self.tail, 0, -1) if _begins_end(text[-size:], row.request.ends)), 0)
            text = text[: len(text) - held].rstrip("\ufffd")
        assert self.on_token is not None
        if len(text) > row.shown:
            row.shown = len(text)
            self.on_token(row.number, text)

    def _text(self, tokens: list[int]) -> str:
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return text


def _begins_end(text: str, ends: Sequence[str]) -> bool:
    return any(end.startswith(text) for end in ends)


def sample(log_probabilities: torch.Tensor, draws: torch.Tensor, *, temperature: float, top_p: float) -> torch.Tensor:
    """Returns a token for each row, drawn from the most probable ones that together have ``top_p``.

    Args:
        log_probabilities: (rows, vocabulary), of any constant offset.
        draws: (rows,), uniform from 0 to 1: the same draw takes the same token.
        temperature: over 0, and applied before ``top_p``, as in ``transformers``.
    """
    probabilities = torch.softmax(log_probabilities / temperature, dim=-1)
    values, tokens = probabilities.topk(min(_FEW_TOKENS, probabilities.shape[-1]), dim=-1)
    if values.shape[-1] < probabilities.shape[-1] and bool((values.sum(dim=-1) < top_p).any()):
        values, tokens = probabilities.sort(dim=-1, descending=True)
    reached = values.cumsum(dim=-1)
    values = values.masked_fill(reached - values >= top_p, 0.0)
    reached = values.cumsum(dim=-1)
    places = (reached <= draws[:, None] * reached[:, -1:]).sum(dim=-1)
    last = (values > 0).sum(dim=-1) - 1
    return tokens.gather(1, torch.minimum(places, last)[:, None])[:, 0]


class _RoomyLayer(DynamicLayer):
    """A layer of the cache that copies what it has only now and then, not for every token."""

    keys: Any
    values: Any
    _buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        old, new = self.get_seq_length(), key_states.shape[-2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self._buffers is None or self._buffers[0].shape[-2] < old + new:
            self._buffers = (_with_room(self.keys, key_states, old), _with_room(self.values, value_states, old))
        keys, values = self._buffers
        keys[..., old : old + new, :] = key_states
        values[..., old : old + new, :] = value_states
        self.keys, self.values = keys[..., : old + new, :], values[..., : old + new, :]
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._buffers = None


def _with_room(old: torch.Tensor, new: torch.Tensor, length: int) -> torch.Tensor:
    *leading, added, size = new.shape
    buffer = new.new_empty((*leading, length + added + _ROOM_TOKENS, size))
    if length:
        buffer[..., :length, :] = old
    return buffer


def _cache(model: Any) -> Any:
    """An empty cache for a model; layers with a window or a state of their own stay as ``transformers`` makes them."""
    cache = DynamicCache(config=model.config)
    cache.layers = [_RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
