"""What a rank does with the engines of ``layouts.py``: build, train, save, reopen, compare; and the ranks' entry.

Engines are built one after another through the project's own ``resolve`` and ``create_engine``, trained on the same
rows, saved with ``CheckpointSaver`` behind training and reopened with ``load_checkpoint``.
"""

from __future__ import annotations

import dataclasses
import errno
import gc
import itertools
import json
import os
import random
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from codeparrot_ds.checkpoint.deepspeed_checkpoint import read_deepspeed_checkpoint
from codeparrot_ds.checkpoint.export import Export
from codeparrot_ds.checkpoint.folders import Checkpoint
from codeparrot_ds.checkpoint.import_run import write_imported
from codeparrot_ds.checkpoint.saver import CheckpointSaver, load_checkpoint
from codeparrot_ds.checkpoint.state import RunState
from codeparrot_ds.checkpoint.tensor_files import fragment_file_name
from codeparrot_ds.config.run_config import RunConfig
from codeparrot_ds.config.schedule import learning_rate_factor
from codeparrot_ds.ds_config.facts import TORCH_DTYPES, zero_stage
from codeparrot_ds.ds_config.resolve import resolve_ds_config
from codeparrot_ds.engine.engine import create_engine
from codeparrot_ds.engine.fragments import MASTER, MOMENTS, Fragment, optimizer_step_count, owned_fragments
from codeparrot_ds.engine.ranks import Ranks, join_ranks, leave_ranks
from codeparrot_ds.model.gpt2 import build_model, get_grouped_params, hugging_face_config
from codeparrot_ds.model.shapes import parameter_shapes
from tests.checkpoint.layouts import (
    BETAS,
    COMPARED_STEPS,
    CONTROLS,
    NVME_SHAPE,
    SAVED_AT,
    SEQ_LENGTH,
    SHAPE,
    TOKENIZER,
    Job,
    Layout,
    ds_config_of,
    run_config,
    source_folder,
)

State = dict[str, dict[str, torch.Tensor]]  # by parameter and kind: fp32, exp_avg, exp_avg_sq


def build(layout: Layout, config: RunConfig, nvme: Path, *, seed: int) -> Any:
    """The engine of a layout."""
    raw, shape = ds_config_of(layout.name), layout.shape
    if shape is NVME_SHAPE:  # two groups of the matrices, both above 1 MiB at one rank
        raw["zero_optimization"]["sub_group_size"] = 300_000
    if "nvme" in str(raw["zero_optimization"].get("offload_param")):
        raw["zero_optimization"]["offload_param"]["buffer_size"] = 1_000_000
    ds_config = resolve_ds_config(
        raw, config, world_size=layout.world_size, model_hidden_size=shape.n_embd, nvme_path=nvme
    )
    zero3 = ds_config if zero_stage(ds_config) == 3 else None
    model = build_model(shape, eos_token_id=0, seed=seed, dropout=config.dropout, zero3_config=zero3)
    return create_engine(model, ds_config, config)


def rows(step: int, count: int) -> torch.Tensor:
    """The rows of a step, the same at every layout: arithmetic sequences, which the model learns within a few steps."""
    generator = torch.Generator().manual_seed(step)
    start = torch.randint(SHAPE.vocab_size, (count, 1), generator=generator)
    stride = torch.randint(1, 6, (count, 1), generator=generator)
    return (start + stride * torch.arange(SEQ_LENGTH)) % SHAPE.vocab_size


# --------------------------------------------------------------------------------------------------------------------
# What a rank does with an engine


def train(engine: Any, ranks: Ranks, steps: range) -> list[float]:
    """Trains and returns the mean loss of each step's rows; micro-batch m of rank r has rows m x world size + r."""
    micro, accumulation = engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()
    losses = []
    for step in steps:
        batch = rows(step, micro * accumulation * ranks.world_size)
        total = torch.zeros((), dtype=torch.float64)
        for m in range(accumulation):
            first = (m * ranks.world_size + ranks.rank) * micro
            ids = batch[first : first + micro]
            loss = engine(input_ids=ids, labels=ids).loss
            engine.backward(loss)
            engine.step()
            total += loss.detach().double()
        losses.append(ranks.sum(total).item() / (accumulation * ranks.world_size))
    return losses


def evaluate(model: Any) -> float:
    """The loss of a few rows that no step has, in evaluation mode, of an engine or of a plain model."""
    ids = rows(10_000, 4)
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=ids).logits.float()
    model.train()
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()


def gathered_state(engine: Any, ranks: Ranks) -> State:
    """Masters and moments of every parameter, whole, by name and kind, from the fragments of all ranks; collective."""
    mine = []
    for fragments in owned_fragments(engine):
        for fragment in fragments:
            tensors = {kind: tensor.detach().clone() for kind, tensor in fragment.tensors.items()}
            mine.append(Fragment(name=fragment.name, start=fragment.start, tensors=tensors))
    return assembled(fragment for fragments in ranks.gather(mine) for fragment in fragments)


def assembled(fragments: Iterable[Fragment]) -> State:
    """Whole parameters from fragments in any order; every value must be there once."""
    state: State = {}
    pieces: dict[tuple[str, str], list[tuple[int, torch.Tensor]]] = {}
    for fragment in fragments:
        for kind, tensor in fragment.tensors.items():
            pieces.setdefault((fragment.name, kind), []).append((fragment.start, tensor))
    for (name, kind), found in pieces.items():
        found.sort(key=lambda piece: piece[0])
        ends = [start + tensor.numel() for start, tensor in found]
        assert [start for start, _ in found] == [0, *ends[:-1]], f"{name} {kind} has gaps or overlaps"
        state.setdefault(name, {})[kind] = torch.cat([tensor for _, tensor in found])
    return state


def working_weights(engine: Any) -> dict[str, torch.Tensor]:
    """The weights that the forward pass uses, whole, by name; collective at stage 3."""
    import deepspeed

    weights = {}
    for name, parameter in engine.module.named_parameters():
        if hasattr(parameter, "ds_id"):
            with deepspeed.zero.GatheredParameters(parameter):
                weights[name] = parameter.detach().clone()
        else:
            weights[name] = parameter.detach().clone()
    return weights


def differing(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> list[str]:
    """Names whose values differ in a bit; right is rounded to left's dtype."""
    assert left.keys() == right.keys()
    return [name for name in left if not torch.equal(left[name].flatten(), right[name].flatten().to(left[name].dtype))]


def differing_state(left: State, right: State) -> list[str]:
    """``name kind`` of what differs in a bit; right is rounded to left's dtypes."""
    assert left.keys() == right.keys()
    return [f"{name} {kind}" for name in left for kind in differing(left[name], right[name])]


def save(engine: Any, ranks: Ranks, folder: Path, layout: Layout, step: int) -> CheckpointSaver:
    """Starts to save; the caller waits for it."""
    folder.mkdir(parents=True, exist_ok=True)
    ranks.gather(None)
    saver = CheckpointSaver(
        engine,
        ranks,
        folder,
        in_background=True,
        published=lambda checkpoint, state: None,
        report=lambda outcome: None,
    )
    saver.save(*_state_and_export(layout, step))
    return saver


def _state_and_export(layout: Layout, step: int) -> tuple[RunState, Export]:
    state = RunState(
        step=step,
        tokens=step * 12 * SEQ_LENGTH,
        data={"step": step},
        layout={
            "world_size": layout.world_size,
            "zero_stage": zero_stage(ds_config_of(layout.name)),
            "precision": layout.precision,
        },
        evaluations=[],
        config={},
        ds_config={},
    )
    config = hugging_face_config(layout.shape, eos_token_id=0)
    dtype = TORCH_DTYPES[layout.precision]
    tokenizer = Path(sys.argv[1]).parent / TOKENIZER
    export = Export(model_config=config, tokenizer=tokenizer, dtype=dtype, card="", training_state={"step": step})
    return state, export


def save_natively(engine: Any, ranks: Ranks, folder: Path, layout: Layout, step: int) -> None:
    """Saves as DeepSpeed does, and imports that."""
    engine.save_checkpoint(str(folder.parent / "deepspeed"))
    ranks.on_main(lambda: _import(folder, layout, step))


def _import(folder: Path, layout: Layout, step: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    source = read_deepspeed_checkpoint(folder.parent / "deepspeed", parameter_shapes(layout.shape))
    found = {"world_size": source.world_size, "zero_stage": source.zero_stage, "precision": source.precision}
    state, export = _state_and_export(layout, step)
    assert (found, source.step) == (state.layout, step)
    write_imported(source, folder, state, export)


def read_native(ranks: Ranks, layout: Layout, folder: Path, nvme: Path) -> dict[str, Any]:
    """What the import reads of a checkpoint that DeepSpeed wrote, against the engine that it is of."""
    engine = build(layout, run_config(layout.world_size), nvme, seed=1)
    train(engine, ranks, range(2))
    state = gathered_state(engine, ranks)
    engine.save_checkpoint(str(folder))
    scaler = {"cur_scale": 65536.0, "cur_iter": 2} if layout.precision == "fp16" else {}
    expected = {
        "world_size": layout.world_size,
        "zero_stage": zero_stage(ds_config_of(layout.name)),
        "precision": layout.precision,
        "step": 2,
        "samples": 24,
        "skipped_steps": 0,
        "optimizer_step": optimizer_step_count(engine),
        "learning_rate": engine.basic_optimizer.param_groups[0]["lr"],
    }
    destroy(engine)

    def compare() -> dict[str, Any]:
        source = read_deepspeed_checkpoint(folder, parameter_shapes(layout.shape))
        found = assembled(itertools.chain.from_iterable(source.shards))
        differences = [f"{key} is {getattr(source, key)}" for key in expected if getattr(source, key) != expected[key]]
        if not scaler.items() <= source.loss_scaler.items() or bool(scaler) != bool(source.loss_scaler):
            differences.append(f"loss_scaler is {source.loss_scaler}")
        dtypes = {kinds[kind].dtype == state[name][kind].dtype for name, kinds in found.items() for kind in kinds}
        assert dtypes == {True}
        return {"differing": differing_state(found, state) + differences}

    return ranks.on_main(compare)


def check_export(export: Path, weights: dict[str, torch.Tensor], evaluation: float) -> dict[str, Any]:
    """What an export is in plain ``transformers``: differing weights, and how far its evaluation loss is off."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(export, dtype="auto")
    exported = {name: parameter.detach() for name, parameter in model.named_parameters()}
    dtypes = {str(parameter.dtype) for parameter in [*exported.values(), *weights.values()]}
    return {
        "differing": differing(exported, weights),
        "dtypes": sorted(dtypes),
        "evaluation_difference": abs(evaluate(model) - evaluation),
    }


def save_layout(ranks: Ranks, layout: Layout, folder: Path, nvme: Path) -> dict[str, Any]:
    """Trains a layout, saves it behind training, goes on; the checkpoint, its state and the next losses are left."""
    engine = build(layout, run_config(layout.world_size), nvme, seed=1)
    losses = train(engine, ranks, range(SAVED_AT))
    state, weights, evaluation = gathered_state(engine, ranks), working_weights(engine), evaluate(engine)
    saver = None
    if layout.native:
        save_natively(engine, ranks, folder / "checkpoints", layout, SAVED_AT)
    else:
        saver = save(engine, ranks, folder / "checkpoints", layout, SAVED_AT)
    next_losses = train(engine, ranks, range(SAVED_AT, SAVED_AT + COMPARED_STEPS))
    if saver is not None:
        outcome = saver.wait()
        assert outcome is not None and outcome.error is None, outcome
    result = {"losses": losses, "next_losses": next_losses}
    destroy(engine)
    if ranks.is_main:
        checkpoint = Checkpoint.of_step(folder / "checkpoints", SAVED_AT)
        assert checkpoint.damage() == []
        result["export"] = check_export(checkpoint.export, weights, evaluation)
        result["parts"] = len(list(checkpoint.path.glob("fragments-*")))
        torch.save(state, folder / "state.pt")
        (folder / "saved.json.part").write_text(json.dumps(result))
        (folder / "saved.json.part").rename(folder / "saved.json")
    return result


def reopen_layout(ranks: Ranks, layout: Layout, source: Path, nvme: Path) -> dict[str, Any]:
    """Reopens a saved checkpoint at a layout and trains on; the engine begins with other weights."""
    engine = build(layout, run_config(layout.world_size), nvme, seed=2)
    restored = load_checkpoint(engine, ranks, Checkpoint.of_step(source / "checkpoints", SAVED_AT))
    assert restored.step == SAVED_AT and restored.data == {"step": SAVED_AT}
    state, weights = gathered_state(engine, ranks), working_weights(engine)
    saved = torch.load(source / "state.pt", weights_only=True)
    result = {
        "differing": differing_state(state, saved),
        "differing_weights": differing(weights, {name: kinds[MASTER] for name, kinds in state.items()}),
        "optimizer_step": optimizer_step_count(engine),
        "learning_rate": engine.get_lr()[0],
        "global_steps": engine.global_steps,
        "losses": train(engine, ranks, range(SAVED_AT, SAVED_AT + COMPARED_STEPS)),
    }
    destroy(engine)
    return result


def exact_resume(ranks: Ranks, layout: Layout, folder: Path, nvme: Path) -> dict[str, Any]:
    """24 steps with dropout and 3 micro-batches a step, once without a stop and once with a new engine after 12."""
    config = run_config(layout.world_size, dropout=0.1, accumulation=3)

    def fresh(seed: int) -> Any:
        torch.manual_seed(1_000_003 * seed + ranks.rank)
        random.seed(seed)
        return build(layout, config, nvme, seed=seed)

    def end(engine: Any) -> dict[str, Any]:
        result = {"state": gathered_state(engine, ranks), "weights": working_weights(engine)}
        result["rng"] = (torch.get_rng_state(), random.getstate())
        destroy(engine)
        return result

    engine = fresh(1)
    losses = train(engine, ranks, range(24))
    whole = end(engine)
    engine = fresh(1)
    first = train(engine, ranks, range(12))
    saver = save(engine, ranks, folder / "checkpoints", layout, 12)
    # The run that was saved goes on while the checkpoint is written, and must not notice.
    beside = train(engine, ranks, range(12, 24))
    outcome = saver.wait()
    assert outcome is not None and outcome.error is None, outcome
    saved_and_on = end(engine)
    engine = fresh(2)
    load_checkpoint(engine, ranks, Checkpoint.of_step(folder / "checkpoints", 12))
    resumed = train(engine, ranks, range(12, 24))
    reopened = end(engine)
    same = [_same_end(whole, saved_and_on), _same_end(whole, reopened)]
    return {
        "losses": losses,
        "saved": first + beside,
        "resumed": first + resumed,
        "same_ends": [all(answers) for answers in zip(*ranks.gather(same), strict=True)],
    }


def failing_save(ranks: Ranks, layout: Layout, folder: Path, nvme: Path) -> dict[str, Any]:
    """Four steps with a save after two that fails at its second file, and a save that works at the end."""
    from codeparrot_ds import durable

    def fill_the_disk(path: Path, content: Any) -> Any:
        if path.name == fragment_file_name(ranks.rank, 1):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write_file(path, content)

    engine = build(layout, run_config(layout.world_size), nvme, seed=1)
    losses = train(engine, ranks, range(2))
    write_file, durable.write_file = durable.write_file, fill_the_disk
    failed = save(engine, ranks, folder / "failed", layout, 2).wait()
    durable.write_file = write_file
    losses += train(engine, ranks, range(2, 4))
    saved = save(engine, ranks, folder / "saved", layout, 4).wait()
    assert failed is not None and saved is not None
    destroy(engine)
    return {
        "losses": losses,
        "error": str(failed.error),
        "left": [path.name for path in (folder / "failed").iterdir()],
        "saved": saved.error is None and Checkpoint.of_step(folder / "saved", 4).damage() == [],
    }


def _same_end(left: dict[str, Any], right: dict[str, Any]) -> bool:
    generators = torch.equal(left["rng"][0], right["rng"][0]) and left["rng"][1] == right["rng"][1]
    return (
        generators
        and differing_state(left["state"], right["state"]) == []
        and differing(left["weights"], right["weights"]) == []
    )


def destroy(engine: Any) -> None:
    """Takes an engine's hooks down and lets its memory go."""
    import deepspeed

    engine.destroy()
    deepspeed.utils.groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # of zero3_hpz: DeepSpeed makes one a process


# --------------------------------------------------------------------------------------------------------------------
# What needs no DeepSpeed


def without(state: State, lost: str) -> State:
    """The state with one kind of tensor set to zero."""
    return {
        name: {kind: torch.zeros_like(tensor) if kind == lost else tensor for kind, tensor in kinds.items()}
        for name, kinds in state.items()
    }


def plain_continuation(layout: Layout, state: State, kept_in_bf16: str, adam_step: int = SAVED_AT) -> list[float]:
    """The next losses from a state by plain PyTorch in a layout's precision: masters, AdamW, accumulation.

    ``kept_in_bf16`` is the reopened engine's ``arithmetic[1]``: masters, or masters and moments, that are rounded to
    bf16 after each step. Two runs that were never reopened part by 7e-3 over these steps when one of them rounds its
    masters and the other does not, and by 6e-4 when both or neither do.
    """
    config = run_config(1)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[layout.precision]
    model = build_model(layout.shape, eos_token_id=0, seed=2).to(dtype)
    parameters = dict(model.named_parameters())
    masters = {
        name: torch.nn.Parameter(state[name][MASTER].float().view(parameter.shape).clone())
        for name, parameter in parameters.items()
    }
    names = {id(parameter): name for name, parameter in parameters.items()}
    groups = [
        {**group, "params": [masters[names[id(parameter)]] for parameter in group["params"]]}
        for group in get_grouped_params(model, config.weight_decay)
    ]
    adam = torch.optim.AdamW(groups, lr=config.learning_rate, betas=BETAS, eps=1e-8)
    for name, master in masters.items():
        moments = {kind: state[name][kind].float().view(master.shape).clone() for kind in MOMENTS}
        adam.state[master] = {"step": torch.tensor(float(adam_step)), **moments}
    rounded = [master.data for master in masters.values()] if kept_in_bf16 else []
    if kept_in_bf16 == "_bf16_states":
        rounded += [adam.state[master][kind] for master in masters.values() for kind in MOMENTS]
    _round_to_bf16(rounded)
    losses = []
    for step in range(SAVED_AT, SAVED_AT + COMPARED_STEPS):
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(masters[name])
        factor = learning_rate_factor("cosine", step, config.num_warmup_steps, config.max_train_steps)
        for group in adam.param_groups:
            group["lr"] = config.learning_rate * factor
        batches = rows(step, config.global_batch_size).split(config.micro_batch_size)
        found = []
        for ids in batches:
            loss = model(input_ids=ids, labels=ids).loss
            (loss / len(batches)).backward()
            found.append(loss.detach().double().item())
        for name, parameter in parameters.items():
            masters[name].grad, parameter.grad = parameter.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters.values(), config.max_grad_norm)
        adam.step()
        _round_to_bf16(rounded)
        losses.append(sum(found) / len(found))
    return losses


def _round_to_bf16(tensors: list[torch.Tensor]) -> None:
    for tensor in tensors:
        tensor.copy_(tensor.bfloat16())


# --------------------------------------------------------------------------------------------------------------------
# The ranks' entry


def _do(job: Job, ranks: Ranks, folder: Path) -> dict[str, Any]:
    layout, nvme = Layout.parse(job.layout), folder / "nvme" / job.layout
    if job.do == "save":
        return save_layout(ranks, layout, source_folder(folder, layout), nvme)
    if job.do == "native":
        return read_native(ranks, layout, folder / f"read-{layout}", nvme)
    if job.do == "failing":
        return failing_save(ranks, layout, folder / f"failing-{layout}", nvme)
    if job.do == "exact":
        return exact_resume(ranks, layout, folder / f"exact-{layout}", nvme)
    source = source_folder(folder, job.source)
    while not (source / "saved.json").is_file():  # other ranks are at it; who started us sees to the time
        time.sleep(0.05)
    if job.do == "reopen":
        return reopen_layout(ranks, layout, source, nvme)
    state, lost = torch.load(source / "state.pt", weights_only=True), CONTROLS.get(job.control, "")
    adam_step = 0 if lost == "step" else SAVED_AT
    return {"losses": plain_continuation(layout, without(state, lost), job.kept_in_bf16, adam_step)}


def main() -> None:
    from deepspeed.accelerator import get_accelerator

    from codeparrot_ds.engine.operators import build_operators, use_operators_folder

    get_accelerator().is_fp16_supported = lambda: True  # torch's CPU kernels know it; DeepSpeed minds their speed
    plan, answers = map(Path, sys.argv[1:])
    jobs = [Job(**fields) for fields in json.loads(plan.read_text())]
    use_operators_folder(os.environ)
    ranks = join_ranks()
    for name in sorted({Layout.parse(job.layout).name for job in jobs}):
        config = ds_config_of(name)
        ranks.together(lambda config=config: build_operators(config, "cpu"))
    with answers.open("a") as file:
        for job in jobs:
            result = _do(job, ranks, plan.parent)
            # Lets the engines go. What the imports made lives on, and need not be looked through again each time.
            gc.collect()
            gc.freeze()
            if ranks.is_main:
                file.write(json.dumps(dataclasses.asdict(job) | {"result": result}) + "\n")
                file.flush()
    leave_ranks()


if __name__ == "__main__":
    from codeparrot_ds.supervision.process_end import end_process

    main()
    end_process(0)
