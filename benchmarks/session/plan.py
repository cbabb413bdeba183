"""The list of a GPU session: what is measured, in the order of worth."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from codeparrot_ds.config.run_config import FIELDS

# A lever is a change of the run as it is: fields of the run config, or a patch of the model that items.py knows. One
# whose fields or values this checkout lacks has that as its result, and so has one that is on by default or is the same
# as one before it.
_PLAIN = {"fused_loss": False, "lean_step": "off"}
_PER_BLOCK = {"compile": True, "compile_scope": "blocks"}
LEVERS: dict[str, dict[str, Any]] = {
    "without fused loss": {"fused_loss": False},
    "without lean boundary": {"lean_step": "off"},
    "without both": _PLAIN,
    "loss by torch.compile (patched in)": {"patch": "compiled loss"},
    "loss by Liger (patched in)": {"patch": "liger"},
    "chunked loss": {"chunked_loss": True},
    "compiled per block": _PER_BLOCK,
    "compiled per block, without both": _PER_BLOCK | _PLAIN,
    "compiled whole": {"compile": True, "compile_scope": "whole"},
    "compiled": {"compile": True},
    "ZeRO-0": {"deepspeed": "zero0"},
    "ZeRO-2": {"deepspeed": "zero2"},
}
# Configs whose memory records/2026-11-28-gpu-memory-h200 did not reach.
MEMORY_LEFT = (
    *("zero3_offload_optimizer", "zero3_fp16", "zero3_fp32", "zero3_offload", "zero3_offload_cpu_checkpointing"),
    *("zero3_nvme", "zero3_infinity", "zero3_hpz", "zero3_quantized_weights", "zero3_zeropp", "zero3_deepcompile"),
)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What the session trains."""

    small: dict[str, Any]
    """Fields of the run config: the run as it is, beside which levers are measured."""
    large: dict[str, Any]
    labels: tuple[str, str]
    peers: dict[str, int]
    """Rows of a micro-batch, of peers that take another than ours."""
    compiled_limit: float
    """Seconds for an item with torch.compile in it."""
    windows: int
    """Logged steps of each run that count."""
    batches: tuple[tuple[int, int], ...]
    """Other micro-batches and rows per step of a rank that are tried with the small model."""
    ceilings: dict[str, Any]
    story: list[str]
    """The command that a user types, without data."""
    story_steps: int


ON_GPU = Sizes(
    small={"model": "gpt2", "micro_batch_size": 64, "global_batch_size": 192, "log_steps": 4, "deepspeed": "zero1"},
    large={"model": "gpt2-xl", "micro_batch_size": 16, "global_batch_size": 32, "log_steps": 2, "deepspeed": "zero1"},
    labels=("111M", "1.5B"),
    # At 64 rows the recipe's eager attention keeps 198 GB.
    peers={"recipe": 32},
    compiled_limit=75,
    windows=2,
    batches=((64, 64), (32, 192), (96, 192), (128, 384)),
    ceilings={"seconds": 0.03, "copy_bytes": 2**31},
    story=["small"],
    story_steps=8,
)
_SHORT = {"model": "demo", "seq_length": 64, "log_steps": 1, "deepspeed": "zero1:auto", "num_workers": 0}
_SHORT |= {"num_lanes": 8}  # a small corpus fills them
ON_CPU = Sizes(
    small=_SHORT | {"micro_batch_size": 2, "global_batch_size": 4},
    large=_SHORT | {"seq_length": 32, "micro_batch_size": 2, "global_batch_size": 4},
    labels=("demo's shape", "demo's shape, 32 tokens"),
    peers={"recipe": 1},
    compiled_limit=20,  # a CPU's compiler may take a minute, which is no reason to wait
    windows=1,
    batches=((2, 2), (1, 4), (4, 4), (4, 8)),
    ceilings={"seconds": 0.002, "copy_bytes": 2**26},
    story=["demo", "--seq-length", "64", "--global-batch-size", "4", "--micro-batch-size", "2"],
    story_steps=4,
)


@dataclass(kw_only=True)
class Item:
    """One line of the list: what is measured, and what came of it."""

    name: str
    limit: float
    """Seconds that it may take, its share of a worker's start included."""
    order: dict[str, Any] | None = None
    """For the ranks of `session.items`; None of what runs in processes of its own."""
    peer: list[str] | None = None
    """Arguments of peer_loops.py, of a loop that wants a process of its own."""
    beside: str | None = None
    """Name of the item that it is compared with, where it has no turns with one."""
    lacks: str | None = None
    """Why this checkout cannot do it."""
    status: str = "not begun"
    error: str | None = None
    began: float | None = None
    """Seconds after the session's start."""
    seconds: float | None = None
    parts: list[dict[str, Any]] = field(default_factory=list)
    device: dict[str, float] | None = None
    """Medians of clock, power and temperature while it ran."""

    def all(self, key: str) -> list[Any]:
        """What its parts say under a key."""
        return [part[key] for part in self.parts if part.get(key) is not None]

    def one(self, key: str) -> Any:
        return next(iter(self.all(key)), None)

    @property
    def rows_per_step(self) -> int | None:
        """Of a run."""
        return self.order["fields"]["global_batch_size"] if self.order is not None and "fields" in self.order else None

    def as_json(self) -> dict[str, Any]:
        names = ("name", "status", "error", "began", "seconds", "device", "order", "peer", "parts")
        return {name: getattr(self, name) for name in names}


def plan(options: argparse.Namespace, *, vocab_size: int, folder: Path, workspace: str) -> list[Item]:
    """All items in the order of worth, or those that ``--only`` names.

    Args:
        options: of the command.
        vocab_size: the tokenizer's.
        folder: of the record.
        workspace: a folder for what is not kept.
    """
    sizes: Sizes = options.sizes
    small_name, large_name = sizes.labels
    shared = {"data": options.data, "tokenizer": options.tokenizer, "output_dir": workspace, "wandb": "off"}
    # The learning rate rises within the steps of a run, so that losses could differ.
    shared |= {"hub": "off", "resume": "never", "max_eval_steps": 1, "num_warmup_steps": 20, "seq_length": 1024}
    small, large = (
        shared | fields | {"global_batch_size": fields["global_batch_size"] * options.ranks}
        for fields in (sizes.small, sizes.large)
    )
    of_small, of_large = (
        sizes.ceilings
        | {"model": fields["model"], "rows": fields["micro_batch_size"], "seq_length": fields["seq_length"]}
        | {"vocab_size": vocab_size}
        for fields in (small, large)
    )
    items = [
        Item(name="device", limit=60, order={"does": "device"}),
        Item(name=f"matrix products of {small_name}", limit=20, order={"does": "products", **of_small}),
        Item(name=f"matrix products of {large_name}", limit=20, order={"does": "products", **of_large}),
        Item(name="passes over memory", limit=40, order={"does": "passes", **of_small}),
        Item(name="attention", limit=20, order={"does": "attention", **of_small}),
    ]
    kept = {"keep": True, "keep_files": str(folder / "calibration" / "small")}
    items.append(run_item(f"{small_name}: as it is", small | {"profile": 1}, options, limit=90, **kept))
    batches = {f"{rows} x {step // rows} rows": (rows, step) for rows, step in sizes.batches}
    levers = LEVERS | {
        name: {"micro_batch_size": rows, "global_batch_size": step * options.ranks}
        for name, (rows, step) in batches.items()
    }
    for name, changes in levers.items():
        items.append(run_item(f"{small_name}: {name}", small, options, changes=changes, against=small))
    more_rows = large["micro_batch_size"] * 3 // 2
    large_levers: dict[str, dict[str, Any]] = {
        "activation checkpointing, ZeRO-2": {"deepspeed": "zero2_activation_checkpointing"},
        "compiled per block": _PER_BLOCK,
        "without fused loss and lean boundary": _PLAIN,
        f"{more_rows} x 2 rows": {"micro_batch_size": more_rows, "global_batch_size": 2 * more_rows * options.ranks},
        "as it is, again": {},
    }
    kept = {"keep_files": str(folder / "calibration" / "large")}
    items.append(run_item(f"{large_name}: as it is", large | {"profile": 1}, options, limit=60, **kept))
    for name, changes in large_levers.items():
        item = run_item(f"{large_name}: {name}", large, options, changes=changes, limit=45)
        item.beside = f"{large_name}: as it is"  # two engines of this size need not fit
        items.append(item)
    name_doubles(items)
    items += peer_items(options.ranks, sizes, small)
    items.append(Item(name="train as a user sees it, and a resume", limit=75))
    half = {"max_train_steps": 6, "save_checkpoint_steps": 3, "log_steps": 1, "num_warmup_steps": 2}
    for config in ("zero0_fp16", "zero1_fp16", small["deepspeed"]):
        fields = small | half | {"deepspeed": config, "global_batch_size": small["micro_batch_size"] * options.ranks}
        fields |= {"run_name": f"resume-{config.replace(':', '-')}", "resume": "auto"}
        items.append(Item(name=f"resume in {config}", limit=40, order={"does": "resume", "fields": fields}))
    for config in MEMORY_LEFT:
        fields = small | {"deepspeed": config, "micro_batch_size": 4, "global_batch_size": 8 * options.ranks}
        fields |= {"log_steps": 3, "run_name": f"memory-{config}"}
        items.append(Item(name=f"memory of {config}", limit=30, order={"does": "memory", "fields": fields}))
    for item in items:
        item.limit *= options.patience
    return [item for item in items if not options.only or any(words in item.name for words in options.only)]


def run_item(
    name: str,
    fields: dict[str, Any],
    options: argparse.Namespace,
    *,
    changes: dict[str, Any] | None = None,
    limit: float = 40,
    **order: Any,
) -> Item:
    """A run, window by window; ``changes`` of its fields, or a ``patch`` of its model, are a lever."""
    changes = dict(changes or {})
    patch = changes.pop("patch", None)
    run_name = "".join(letter if letter.isalnum() else "-" for letter in name)
    order |= {"does": "train", "fields": fields | changes | {"run_name": run_name}, "patch": patch}
    # The profiled step is the fourth, and belongs to no window that counts.
    order |= {"windows": options.sizes.windows, "warmup": -(-4 // fields["log_steps"]) if "profile" in fields else 1}
    if "compile" in changes or "compile" in str(patch):
        limit = options.sizes.compiled_limit
    item = Item(name=name, limit=limit, order=order, lacks=lacking(changes))
    return item


def name_doubles(items: list[Item]) -> None:
    """Says of each run that is the same as one before it, by the defaults of this checkout, which that is."""
    defaults = {name: field.default for name, field in FIELDS.items()}
    seen: list[tuple[dict[str, Any], str]] = []
    for item in items:
        if item.order is None or item.order["does"] != "train" or item.lacks is not None:
            continue
        own = defaults | item.order["fields"] | {"patch": item.order["patch"], "run_name": None, "profile": None}
        same = next((name for fields, name in seen if fields == own), None)
        if same is not None and not item.name.endswith(", again"):
            item.lacks = f"the same as {same}"
        seen.append((own, item.name))


def peer_items(ranks: int, sizes: Sizes, small: dict[str, Any]) -> list[Item]:
    """Loops that others would write, at micro-batches of their own and the rows per step of ours."""
    shared = ["--shape", small["model"], "--seq-length", str(small["seq_length"])]
    shared += ["--data", small["data"], "--tokenizer", small["tokenizer"], "--log-steps", str(small["log_steps"])]
    shared += ["--warmup", str(small["log_steps"]), "--steps", str(small["log_steps"] * sizes.windows)]
    shared += ["--num-warmup-steps", str(small["num_warmup_steps"])]
    shared += ["--num-lanes", str(small.get("num_lanes", FIELDS["num_lanes"].default))]
    fused = ["--fused-loss"] if "fused_loss" in FIELDS else []  # the levers that ours has by default
    lean = ["--lean", *fused]
    # A CPU's compiler would take the whole session.
    compiled = ["--compile"] if sizes is ON_GPU else []
    loops: list[tuple[str, str, list[str]]] = [("recipe bf16", "recipe", []), ("Trainer + DeepSpeed", "trainer", [])]
    if ranks > 1:
        loops += [("DDP", "ddp", []), ("DDP lean", "ddp", lean), ("FSDP2", "fsdp2", fused)]
    else:
        loops += [("nanoGPT", "nanogpt", []), ("bare", "bare", []), ("bare lean", "bare", lean)]
    if compiled:
        loop, name = ("ddp", "DDP") if ranks > 1 else ("bare", "bare")
        loops.append((f"{name} lean, compiled per block", loop, lean + compiled))
    items = []
    for name, loop, more in loops:
        rows, processes = sizes.peers.get(loop, small["micro_batch_size"]), 1 if loop == "recipe" else ranks
        accumulation = small["global_batch_size"] // processes // rows
        arguments = [loop, *shared, "--micro-batch", str(rows), "--accumulation", str(accumulation), *more]
        item = Item(
            name=f"peer: {name}", limit=sizes.compiled_limit if name == "nanoGPT" or "--compile" in more else 50
        )
        if loop in ("recipe", "trainer"):  # Accelerate keeps one set-up per process, and the Trainer its own
            item.peer = arguments
        else:
            item.order = {"does": "peer", "arguments": arguments, "against": small, "windows": sizes.windows}
        items.append(item)
    return items


def lacking(changes: dict[str, Any]) -> str | None:
    """Which of these fields and values this checkout does not have."""
    for name, value in changes.items():
        if name not in FIELDS:
            return f"this checkout has no field {name}"
        problem = FIELDS[name].problem(value)
        if problem is not None:
            return f"{name} {problem} in this checkout"
    return None
