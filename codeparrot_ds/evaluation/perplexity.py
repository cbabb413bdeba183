"""Loss, perplexity and bits per byte: one exact pass, on any number of ranks, from sums over tokens.

``evaluate_batches`` is what training calls on every rank; ``evaluate_model`` is the command line's, with plain
``transformers``.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from codeparrot_ds.checkpoint.folders import find_model
from codeparrot_ds.data.validation import IGNORED_LABEL, ValidationLoader
from codeparrot_ds.errors import UserError
from codeparrot_ds.evaluation.details import Details, TokenClasses
from codeparrot_ds.evaluation.models import check_seq_length, context_length, data_of, load_model
from codeparrot_ds.evaluation.processes import number_of_processes, run_processes, run_task
from codeparrot_ds.json_files import DamagedFileError, parts_of, read_object
from codeparrot_ds.model.attention import document_inputs

_LOGITS_AT_ONCE = 1 << 24  # 64 MiB in fp32

Batch = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """The figures of one evaluation; each is over all tokens of all ranks."""

    loss: float
    """Nats per token, NaN without any token."""
    perplexity: float
    """exp(loss), infinity on overflow."""
    bits_per_byte: float | None
    """Bits per byte of text, comparable across tokenizers; None where the bytes of a token are not known."""
    eval_tokens: int
    """Tokens that were predicted: all but the first of each row, and no padding."""


def result_from_sums(loss_sum: float, tokens: float, num_bytes: float | None = None) -> EvaluationResult:
    """Returns the figures from the sum of the losses in nats and the numbers of target tokens and of their bytes."""
    loss = loss_sum / tokens if tokens else math.nan
    try:
        perplexity = math.exp(loss)
    except OverflowError:
        perplexity = math.inf
    bits_per_byte = loss_sum / math.log(2) / num_bytes if num_bytes else None
    return EvaluationResult(loss=loss, perplexity=perplexity, bits_per_byte=bits_per_byte, eval_tokens=round(tokens))


def shift_labels(labels: torch.Tensor) -> torch.Tensor:
    """Returns each position's target: the next position's label, and ``IGNORED_LABEL`` at the end of a row."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Returns each position's cross entropy in nats, fp32, 0 where there is no target.

    Args:
        logits: (batch, tokens, vocabulary), any precision.
        labels: (batch, tokens), not shifted; ``IGNORED_LABEL`` is left out.

    The logits are cast to fp32 a few rows at a time: a whole copy would be the largest tensor of the evaluation.
    """
    losses = [
        F.cross_entropy(some, wanted, ignore_index=IGNORED_LABEL, reduction="none")
        for some, wanted in _in_parts(logits, labels)
    ]
    return torch.cat(losses).view(labels.shape)


def token_ranks(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Returns how many tokens are held more probable than each position's target, (batch, tokens), int64.

    Args: as for ``token_losses``; where there is no target, the number means nothing.
    """
    ranks = [
        (some > some.gather(1, wanted.clamp(min=0)[:, None])).sum(dim=1) for some, wanted in _in_parts(logits, labels)
    ]
    return torch.cat(ranks).view(labels.shape)


def _in_parts(logits: torch.Tensor, labels: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields some rows of (rows, vocabulary) in fp32 with their targets at a time."""
    rows = max(1, _LOGITS_AT_ONCE // logits.shape[-1])
    flat, targets = logits.flatten(0, 1), shift_labels(labels).flatten()
    for some, wanted in zip(flat.split(rows), targets.split(rows), strict=True):
        yield some.float(), wanted


@torch.no_grad()
def evaluate_batches(
    loss_fn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    batches: Iterable[Batch],
    *,
    token_bytes: np.ndarray | torch.Tensor | None = None,
    reduce: Callable[[torch.Tensor], Any] | None = None,
    device: torch.device | str = "cpu",
    details: Details | None = None,
) -> EvaluationResult:
    """Evaluates this rank's batches and returns the figures over all ranks, the same on each.

    Ranks may have different numbers of batches, even none: those that have finished run a row without targets, so that
    every rank calls ``loss_fn``, and ZeRO-3 its collectives, the same number of times.

    Args:
        loss_fn: takes input ids and labels, both (batch, tokens) on ``device``, and returns the losses of the tokens in
            any shape, or their sum; 0 where there is no target. The model must be in evaluation mode.
        batches: pairs of input ids and labels; labels are not shifted, ``IGNORED_LABEL`` is left out.
        token_bytes: bytes of text that each token id stands for, (vocabulary,).
        reduce: sums a float64 tensor over the ranks in place; ``torch.distributed.all_reduce`` by default where that is
            initialised. Called once per batch and once at the end, twice with details.
        details: what ``loss_fn`` adds to, summed over the ranks at the end.
    """
    if reduce is None and torch.distributed.is_available() and torch.distributed.is_initialized():
        reduce = torch.distributed.all_reduce
    sizes = None if token_bytes is None else torch.as_tensor(token_bytes, device=device)
    totals = torch.zeros(3, dtype=torch.float64, device=device)  # loss in nats, target tokens, their bytes
    for input_ids, labels in _in_step(batches, reduce, device):
        targets = shift_labels(labels)
        is_target = targets != IGNORED_LABEL
        # Summed in float64 and left on the device: the host does not wait for it.
        totals[0] += loss_fn(input_ids, labels).double().sum()
        totals[1] += is_target.sum()
        if sizes is not None:
            totals[2] += (sizes[targets.clamp(min=0)] * is_target).sum()
    if reduce is not None:
        reduce(totals)
        if details is not None:
            reduce(details.sums)
    loss_sum, tokens, num_bytes = totals.tolist()
    return result_from_sums(loss_sum, tokens, num_bytes)


def _in_step(
    batches: Iterable[Batch], reduce: Callable[[torch.Tensor], Any] | None, device: torch.device | str
) -> Iterable[Batch]:
    """Yields this rank's batches on the device, and rows without targets after them until every rank is through."""
    # Two tokens: the least that has a target, were there one.
    dummy = (torch.zeros((1, 2), dtype=torch.long), torch.full((1, 2), IGNORED_LABEL))
    own = iter(batches)
    while True:
        batch = next(own, None)
        ranks_with_batch = torch.tensor(float(batch is not None), dtype=torch.float64, device=device)
        if reduce is not None:
            reduce(ranks_with_batch)
        if not ranks_with_batch:
            return
        input_ids, labels = dummy if batch is None else batch
        yield input_ids.to(device), labels.to(device)


def evaluate_model(
    source: str | Path,
    *,
    data: str | Path | None = None,
    split: str = "validation",
    columns: str = "",
    seq_length: int | None = None,
    batch_size: int | None = None,
    max_eval_steps: int | None = None,
    num_lanes: int | None = None,
    dtype: str = "auto",
    device: str | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> dict[str, Any]:
    """Evaluates a run, checkpoint, export or Hub model on a corpus folder, with its own tokenizer.

    What is not given defaults to how training evaluated: an export says so in its ``training_state.json``, also after a
    clone. So the same rows are evaluated, and the loss is the one that the run logged (up to precision).

    Args:
        source: as for ``load_model``.
        data: corpus folder, a run's own by default.
        split: ``validation``, ``train`` or ``test``.
        columns: as in a run config; the run's by default.
        seq_length: tokens per row; by default the model's context, at most 1024.
        batch_size: rows at once; 8 for a model that says nothing.
        max_eval_steps: batches at most; -1 for all, also for a model that says nothing.
        num_lanes: see ``ValidationLoader``.
        dtype: one of ``DTYPES``; ``auto`` keeps the precision of the stored weights.
        rank, world_size: of this process, where several share the rows; ``torch.distributed`` is initialised then, with
            gloo, and each gets the figures over all of them.

    Returns:
        ``source``, ``model`` (what was loaded), ``data``, ``split``, ``seq_length``, ``dtype``, ``loss``,
        ``perplexity``, ``bits_per_byte``, ``eval_tokens``, ``seconds``, and what ``Details.result`` returns.
    """
    from codeparrot_ds.config.run_config import RunConfig
    from codeparrot_ds.data.shards import BadDocuments, in_version_1, read_texts

    as_trained = _evaluated_with(source)
    batch_size = as_trained.get("batch_size", 8) if batch_size is None else batch_size
    max_eval_steps = as_trained.get("max_eval_steps", -1) if max_eval_steps is None else max_eval_steps
    intra_document = as_trained.get("intra_document_masking", False)
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}; it must be at least 1")
    if max_eval_steps < 1 and max_eval_steps != -1:
        raise UserError(f"max_eval_steps is {max_eval_steps}; it must be at least 1, or -1 for all")
    found = data_of(source, split, None if data is None else str(data), columns)
    data, shards = found.name, found.shards(split)  # before the model: a wrong folder is said at once
    model, tokenizer = load_model(source, dtype=dtype, device=device)
    context = context_length(model)
    if seq_length is None:
        seq_length = as_trained.get("seq_length") or min(context or 1024, 1024)
    check_seq_length(seq_length, context)
    encoder = _encoder_of(tokenizer)
    if as_trained and as_trained.get("order_version", 1) == 1:  # 0.1.0 wrote no version
        shards, encoder = in_version_1(shards), encoder.in_version_1()
    encoder.prove_fast_encoding(read_texts(shards, BadDocuments(limit=None)))
    loader = ValidationLoader(
        shards,
        encoder,
        seq_length=seq_length,
        num_lanes=num_lanes or as_trained.get("num_lanes") or RunConfig().num_lanes,
        batch_size=batch_size,
        max_rows=None if max_eval_steps == -1 else max_eval_steps * batch_size,
        rank=rank,
        world_size=world_size,
    )
    token_bytes = encoder.bytes_of_tokens()
    classes = None if token_bytes is None else TokenClasses(token_bytes, encoder.eos_token_id)
    details = Details(seq_length, classes, model.device)

    def loss_fn(input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        inputs = document_inputs(input_ids, encoder.eos_token_id) if intra_document else {}
        logits = model(input_ids=input_ids, use_cache=False, **inputs).logits
        losses = token_losses(logits, labels)
        details.add(input_ids, shift_labels(labels) != IGNORED_LABEL, losses, token_ranks(logits, labels))
        return losses

    started = time.perf_counter()
    result = evaluate_batches(
        loss_fn,
        loader,
        token_bytes=encoder.token_bytes(),
        reduce=_sum_on_host if world_size > 1 else None,
        device=model.device,
        details=details,
    )
    if not result.eval_tokens:
        raise UserError(f"{data}: split '{split}' has no text to evaluate")
    return {
        "source": str(source),
        "model": model.name_or_path,
        "data": data,
        "split": split,
        "seq_length": seq_length,
        "dtype": str(model.dtype).removeprefix("torch."),
        "loss": result.loss,
        "perplexity": result.perplexity,
        "bits_per_byte": result.bits_per_byte,
        "eval_tokens": result.eval_tokens,
        **details.result(),
        "seconds": time.perf_counter() - started,
    }


def _sum_on_host(tensor: torch.Tensor) -> None:
    """Sums over the processes in host memory, which needs no library of the device's."""
    total = tensor.cpu()
    torch.distributed.all_reduce(total)
    tensor.copy_(total)


def evaluate_in_processes(
    source: str | Path, *, num_processes: int | None = None, device: str | None = None, **options: Any
) -> dict[str, Any]:
    """``evaluate_model`` on several processes of this machine: one per GPU by default, and a single one without."""
    number = number_of_processes(num_processes, device)
    if number == 1:
        return evaluate_model(source, device=device, **options)
    plain = {key: str(value) if isinstance(value, Path) else value for key, value in options.items()}
    with TemporaryDirectory() as folder:
        task = {"source": str(source), "options": plain, "folder": folder, "world_size": number}
        run_processes(__spec__.name, [{**task, "rank": rank} for rank in range(number)], device=device)
        result = read_object(Path(folder) / "result.json")
    return result


def _evaluate_share(task: dict[str, Any]) -> None:
    ranks = {"rank": task["rank"], "world_size": task["world_size"]}
    folder = Path(task["folder"])
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder / 'store'}", **ranks)
    result = evaluate_model(task["source"], device=task["device"], **task["options"], **ranks)
    if not task["rank"]:
        (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    torch.distributed.destroy_process_group()


def _evaluated_with(source: str | Path) -> dict[str, Any]:
    """Returns how training evaluated a model, from its export's ``training_state.json``; empty for any other model."""
    path = Path(find_model(source)) / "training_state.json"
    if not path.is_file():
        return {}
    try:
        with parts_of(path):
            return dict(read_object(path)["evaluated_with"])
    except DamagedFileError as error:
        raise UserError(f"{path} is not a training state of codeparrot-ds: {error}") from error


def _encoder_of(tokenizer: Any) -> Any:
    """Returns the data stream's encoder for a loaded tokenizer, wherever that came from."""
    from codeparrot_ds.data.encoder import load_encoder

    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return load_encoder(folder)


if __name__ == "__main__":
    run_task(_evaluate_share)
