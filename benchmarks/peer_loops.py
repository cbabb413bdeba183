"""The peers: training loops that a user would write instead, timed. Prints one JSON object.

    python benchmarks/peer_loops.py recipe --shape gpt2 --micro-batch 1 --steps 6 --warmup 1 --threads 2
    python benchmarks/peer_loops.py bare --shape demo --data CORPUS --tokenizer TOKENIZER --seq-length 256
    torchrun --nproc-per-node 2 benchmarks/peer_loops.py trainer …

- ``recipe``: the recipe's loop (NLP with Transformers, chapter 10) on Accelerate as its users run it: fp32 or bf16
  autocast, eager attention, GPT-2's defaults (dropout 0.1, ``gelu_new``), torch's AdamW, a log line with ``.item()``
  in every step.
- ``trainer``: ``transformers.Trainer`` with DeepSpeed ZeRO-2 in bf16, its values "auto"; GPT-2's defaults. Several
  processes under torchrun.
- ``nanogpt``: a compiled module of its own in the manner of nanoGPT: autocast to bf16, fused attention and AdamW, no
  dropout.
- ``bare``: what our engine does, without an engine: our model in bf16, fp32 masters, torch's fused AdamW. ``--lean``
  takes all parameters at once in the casts around the optimizer, ``--compile`` compiles each block and the loss.
- ``ddp``: ``bare`` under DistributedDataParallel; ``fsdp2``: our model under ``fully_shard``, a unit per block, which
  computes and reduces in bf16. Several processes under torchrun.

All train on the same rows from the same initial weights with the same schedule: a step takes micro-batch x
accumulation x processes rows. Rows are prepared before the clock starts, which spares these loops the recipe's
tokenizing. The device is waited for after every ``--log-steps`` steps; by the recipe's loop in every micro-batch, as
its users do.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from codeparrot_ds.model.shapes import GPT2Shape, find_shape

logger = logging.getLogger("peer")


class Step(NamedTuple):
    """An optimizer step: the mean time of those since the last one that was logged, and its loss before the update."""

    seconds: float
    loss: float


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("loop", choices=LOOPS)
    parser.add_argument("--shape", default="gpt2", help="gpt2, demo or another known shape")
    parser.add_argument("--vocab-size", type=int, default=32_768, help="with --data it is the tokenizer's")
    parser.add_argument("--seq-length", type=int, default=1024)
    parser.add_argument("--micro-batch", type=int, default=1, help="rows per process and forward pass")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches per process and step")
    parser.add_argument("--steps", type=int, default=10, help="steps that count")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them that do not")
    parser.add_argument("--log-steps", type=int, default=1, help="steps between two that are logged")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16", help="of the recipe's loop")
    parser.add_argument("--dropout", type=float, help="of the recipe's loop and the Trainer's (default: GPT-2's 0.1)")
    parser.add_argument("--lean", action="store_true", help="of bare and ddp: one kernel casts many parameters")
    parser.add_argument("--fused-loss", action="store_true", help="of bare, ddp and fsdp2: ours, where it has one")
    parser.add_argument("--compile", action="store_true", help="of bare, ddp and fsdp2: each block, and the loss")
    parser.add_argument(
        "--threads", type=int, help="of torch on the CPU; all cores, shared by the processes, by default"
    )
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--num-warmup-steps", type=int, default=2000, help="of the learning rate")
    parser.add_argument("--max-train-steps", type=int, default=150_000, help="of the schedule")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--data", metavar="DIR", help="rows of a training run on this corpus, in its order; else random"
    )
    parser.add_argument("--tokenizer", metavar="DIR", help="with --data")
    parser.add_argument("--num-lanes", type=int, default=64, help="of the training run, which order its rows")
    options = parser.parse_args(arguments)
    if bool(options.data) != bool(options.tokenizer):
        parser.error("--data and --tokenizer go together")
    if options.loop not in SEVERAL_PROCESSES and world_size() > 1:
        parser.error(f"{options.loop} is a loop of one process")
    if options.steps % options.log_steps or options.warmup % options.log_steps:
        parser.error("--steps and --warmup are multiples of --log-steps")
    return options


def world_size() -> int:
    """Processes that torchrun started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rows_per_step(options: argparse.Namespace) -> int:
    """Of all processes."""
    return options.micro_batch * options.accumulation * world_size()


def load_rows(options: argparse.Namespace) -> torch.Tensor:
    """Returns the token ids of all steps and processes, (rows, seq_length); sets the vocabulary to the tokenizer's."""
    num_rows = (options.warmup + options.steps) * rows_per_step(options)
    if options.data:
        rows = corpus_rows(options, num_rows)
    else:
        rows = np.random.default_rng(options.seed).integers(options.vocab_size, size=(num_rows, options.seq_length))
    return torch.from_numpy(rows.astype(np.int64))


def corpus_rows(options: argparse.Namespace, num_rows: int) -> np.ndarray:
    """Returns the first rows of a training run with the same seed and lanes and the default shuffle buffer."""
    from codeparrot_ds.config.run_config import RunConfig
    from codeparrot_ds.data.encoder import load_encoder
    from codeparrot_ds.data.shards import find_shards
    from codeparrot_ds.data.stream import Dataset, StreamConfig
    from tests.data.streams import RowStream

    encoder, defaults = load_encoder(options.tokenizer), RunConfig()
    options.vocab_size = encoder.vocab_size
    config = StreamConfig(
        datasets=[Dataset(name=str(options.data), shards=find_shards(options.data, "train"))],
        encoder=encoder,
        seq_length=options.seq_length,
        num_lanes=options.num_lanes,
        shuffle_buffer=defaults.shuffle_buffer,
        seed=options.seed,
    )
    return np.stack([row.ids for row in itertools.islice(RowStream(config), num_rows)])


# --------------------------------------------------------------------------------------------------------------------
# Models and parameters


def shape_of(options: argparse.Namespace) -> GPT2Shape:
    return find_shape(options.shape, vocab_size=options.vocab_size, seq_length=options.seq_length)


def our_model(options: argparse.Namespace) -> nn.Module:
    """Returns the model of a training run, whose initial weights all loops begin with."""
    from codeparrot_ds.model.gpt2 import build_model

    chosen = {"fused_loss": True} if options.fused_loss else {}
    # On the device: a GPU's generators draw other numbers than a CPU's.
    return build_model(shape_of(options), eos_token_id=0, seed=options.seed, device=device(), **chosen)


def plain_model(options: argparse.Namespace) -> nn.Module:
    """Returns transformers' GPT-2 with its own defaults for everything that is not a size, and our initial weights."""
    from transformers import AutoModelForCausalLM, GPT2Config

    chosen = (
        {} if options.dropout is None else dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), options.dropout)
    )
    config = GPT2Config(**asdict(shape_of(options)), bos_token_id=0, eos_token_id=0, **chosen)
    eager = {"attn_implementation": "eager"} if options.loop == "recipe" else {}
    model = AutoModelForCausalLM.from_config(config, **eager)
    model.load_state_dict(our_model(options).state_dict())
    return model


class Block(nn.Module):
    """One transformer block, with fused projections and attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.c_attn, self.attn_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.c_fc, self.mlp_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, tokens, width = x.shape
        q, k, v = (
            part.view(rows, tokens, self.heads, width // self.heads).transpose(1, 2)
            for part in self.c_attn(self.ln_1(x)).split(width, dim=2)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn_proj(attended.transpose(1, 2).reshape(rows, tokens, width))
        return x + self.mlp_proj(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))


class CompactGPT(nn.Module):
    """GPT-2 as one writes it for torch.compile: tied embeddings, learned positions, the loss inside."""

    def __init__(self, shape: GPT2Shape) -> None:
        super().__init__()
        self.wte = nn.Embedding(shape.vocab_size, shape.n_embd)
        self.wpe = nn.Embedding(shape.n_positions, shape.n_embd)
        self.blocks = nn.ModuleList(Block(shape.n_embd, shape.n_head) for _ in range(shape.n_layer))
        self.ln_f = nn.LayerNorm(shape.n_embd)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.ln_f(x)[:, :-1], self.wte.weight)
        return F.cross_entropy(logits.float().reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1))

    @torch.no_grad()
    def load_gpt2(self, model: nn.Module) -> None:
        """Takes the weights of transformers' module, whose products are transposed."""
        own, theirs = self.state_dict(), model.state_dict()
        names = {"attn_proj": "attn.c_proj", "c_attn": "attn.c_attn", "c_fc": "mlp.c_fc", "mlp_proj": "mlp.c_proj"}
        for name, tensor in own.items():
            source = f"transformer.{name.replace('blocks.', 'h.')}"
            for mine, their in names.items():
                source = source.replace(f".{mine}.", f".{their}.")
            is_product = any(f".{mine}.weight" in name for mine in names)
            tensor.copy_(theirs[source].t() if is_product else theirs[source])


def recipe_groups(model: nn.Module, weight_decay: float = 0.1) -> list[dict]:
    """Returns the recipe's groups, by its match of names."""
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (others if any(part in name for part in ("bias", "LayerNorm.weight")) else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def cosine(optimizer: torch.optim.Optimizer, options: argparse.Namespace) -> Any:
    from transformers import get_scheduler

    return get_scheduler("cosine", optimizer, options.num_warmup_steps, options.max_train_steps)


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def wait() -> None:
    """Waits for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# --------------------------------------------------------------------------------------------------------------------
# Loops: each yields its loss, on the device, after every optimizer step; the mean over this process's micro-batches


def measured(options: argparse.Namespace, losses: Iterator[torch.Tensor]) -> Iterator[Step]:
    """The steps of a loop that are logged; only these wait for the device."""
    started = time.perf_counter()
    for number, loss in enumerate(losses, start=1):
        if number % options.log_steps == 0:
            if options.loop in SEVERAL_PROCESSES and world_size() > 1:
                dist.all_reduce(loss)
                loss = loss / world_size()
            value = loss.item()
            wait()
            yield Step((time.perf_counter() - started) / options.log_steps, value)
            started = time.perf_counter()  # what the caller did in between is not the loop's


def micro_batches(options: argparse.Namespace, rows: torch.Tensor) -> Iterator[list[torch.Tensor]]:
    """This process's micro-batches of each step, on the CPU; a step has the same rows in any number of processes."""
    mine = int(os.environ.get("RANK", "0"))
    for step in rows.split(rows_per_step(options)):
        yield list(step.split(options.micro_batch)[mine :: world_size()])


def recipe(options: argparse.Namespace, rows: torch.Tensor, log_dir: str) -> Iterator[torch.Tensor]:
    from accelerate import Accelerator
    from torch.utils.data import DataLoader
    from torch.utils.tensorboard import SummaryWriter

    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(), mixed_precision="bf16" if options.precision == "bf16" else "no"
    )
    logging.basicConfig(filename=f"{log_dir}/debug_0.log", level=logging.INFO, force=True)
    writer = SummaryWriter(log_dir)
    model = plain_model(options)
    optimizer = torch.optim.AdamW(recipe_groups(model), lr=options.learning_rate)
    scheduler = cosine(optimizer, options)
    loader: DataLoader = DataLoader(list(rows), batch_size=options.micro_batch)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    model.train()
    losses: list[torch.Tensor] = []
    for step, batch in enumerate(loader, start=1):
        loss = model(batch, labels=batch).loss
        metrics = {"lr": optimizer.param_groups[0]["lr"], "loss/train": loss.item()}
        logger.info(f"Step {step}: {metrics}")
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)
        accelerator.backward(loss / options.accumulation)
        losses.append(loss.detach())
        if step % options.accumulation == 0:
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            yield torch.stack(losses).mean()
            losses.clear()


def nanogpt(options: argparse.Namespace, rows: torch.Tensor, log_dir: str) -> Iterator[torch.Tensor]:
    module = CompactGPT(shape_of(options))
    module.load_gpt2(our_model(options))
    module.to(device())
    decayed = [parameter for parameter in module.parameters() if parameter.dim() >= 2]
    others = [parameter for parameter in module.parameters() if parameter.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, fused=True)
    scheduler = cosine(optimizer, options)
    compiled = torch.compile(module)
    for batches in micro_batches(options, rows):
        losses = []
        for batch in batches:
            with torch.autocast(device().type, torch.bfloat16):
                loss = compiled(batch.to(device(), non_blocking=True))
            (loss / options.accumulation).backward()
            losses.append(loss.detach())
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        yield torch.stack(losses).mean()


def bare(options: argparse.Namespace, rows: torch.Tensor, log_dir: str) -> Iterator[torch.Tensor]:
    yield from with_masters(options, rows, lambda model: model)


def ddp(options: argparse.Namespace, rows: torch.Tensor, log_dir: str) -> Iterator[torch.Tensor]:
    from torch.nn.parallel import DistributedDataParallel

    def wrapped(model: nn.Module) -> nn.Module:
        here = [torch.cuda.current_device()] if torch.cuda.is_available() else None
        return DistributedDataParallel(model, device_ids=here, gradient_as_bucket_view=True)

    yield from with_masters(options, rows, wrapped)


def with_masters(
    options: argparse.Namespace, rows: torch.Tensor, wrap: Callable[[nn.Module], nn.Module]
) -> Iterator[torch.Tensor]:
    """Our model in bf16 with fp32 masters; ``wrap`` makes of it what a step calls."""
    from codeparrot_ds.engine.engine import keep_freed_pages
    from codeparrot_ds.model.gpt2 import get_grouped_params

    keep_freed_pages()
    model = our_model(options).to(torch.bfloat16).train()
    compile_parts(options, model)
    groups = get_grouped_params(model)
    parameters = [parameter for group in groups for parameter in group["params"]]
    # As DeepSpeed makes them: of the weights that are bf16 already.
    masters = {id(p): p.detach().float().requires_grad_() for p in parameters}
    optimizer = torch.optim.AdamW(
        [group | {"params": [masters[id(p)] for p in group["params"]]} for group in groups],
        lr=options.learning_rate, fused=True,
    )  # fmt: skip
    scheduler = cosine(optimizer, options)
    called = wrap(model)
    for batches in micro_batches(options, rows):
        losses = []
        for number, batch in enumerate(batches, start=1):
            last = number == len(batches)
            with called.no_sync() if called is not model and not last else contextlib.nullcontext():
                batch = batch.to(device(), non_blocking=True)
                loss = called(input_ids=batch, labels=batch).loss
                (loss / options.accumulation).backward()
            losses.append(loss.detach())
        update(options, parameters, list(masters.values()), optimizer)
        scheduler.step()
        yield torch.stack(losses).mean()


@torch.no_grad()
def update(
    options: argparse.Namespace,
    parameters: list[nn.Parameter],
    masters: list[torch.Tensor],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Gradients to the masters, clip, step, and the masters' values to the parameters."""
    gradients = [parameter.grad for parameter in parameters]
    if options.lean:
        fp32 = [torch.empty_like(master) for master in masters]
        torch._foreach_copy_(fp32, gradients)
    else:
        fp32 = [gradient.float() for gradient in gradients]
    for parameter, master, gradient in zip(parameters, masters, fp32, strict=True):
        master.grad, parameter.grad = gradient, None
    nn.utils.clip_grad_norm_(masters, 1.0)
    optimizer.step()
    if options.lean:
        torch._foreach_copy_(parameters, masters)
    else:
        for parameter, master in zip(parameters, masters, strict=True):
            parameter.copy_(master)
    for master in masters:
        master.grad = None


def compile_parts(options: argparse.Namespace, model: nn.Module) -> None:
    """Compiles each block, whose one graph serves all of them, and the loss."""
    if options.compile:
        for block in model.transformer.h:
            block.compile()
        model.loss_function = torch.compile(model.loss_function)


def fsdp2(options: argparse.Namespace, rows: torch.Tensor, log_dir: str) -> Iterator[torch.Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    from codeparrot_ds.engine.engine import keep_freed_pages
    from codeparrot_ds.model.gpt2 import get_grouped_params

    keep_freed_pages()
    model = our_model(options).train()
    compile_parts(options, model)
    mesh = init_device_mesh(device().type, (world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    # Gathered weights are kept between forward and backward, as at ZeRO-2: these models fit.
    for module in (*model.transformer.h, model):
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    optimizer = torch.optim.AdamW(get_grouped_params(model), lr=options.learning_rate, fused=True)
    scheduler = cosine(optimizer, options)
    for batches in micro_batches(options, rows):
        losses = []
        for number, batch in enumerate(batches, start=1):
            model.set_requires_gradient_sync(number == len(batches))
            batch = batch.to(device(), non_blocking=True)
            loss = model(input_ids=batch, labels=batch).loss
            (loss / options.accumulation).backward()
            losses.append(loss.detach())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        yield torch.stack(losses).mean()


def trainer(options: argparse.Namespace, rows: torch.Tensor, log_dir: str) -> Iterator[Step]:
    """Yields logged steps, at the end of them all; the Trainer's loss is the mean since the last one."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    steps: list[Step] = []

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    class Clock(TrainerCallback):
        started: float | None = None

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if self.started is None:
                wait()
                self.started = time.perf_counter()

        def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
            if state.global_step % options.log_steps == 0:
                wait()
                self.seconds = (time.perf_counter() - self.started) / options.log_steps
                self.started = None

        def on_log(self, *_: Any, logs: dict[str, Any], **__: Any) -> None:
            if "loss" in logs:  # the mean since the last one
                steps.append(Step(self.seconds, float(logs["loss"])))

    ds_config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": 2, "overlap_comm": True, "contiguous_gradients": True},
        "optimizer": {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")},
    }
    arguments = TrainingArguments(
        output_dir=log_dir,
        per_device_train_batch_size=options.micro_batch,
        gradient_accumulation_steps=options.accumulation,
        max_steps=len(rows) // rows_per_step(options),
        learning_rate=options.learning_rate,
        weight_decay=0.1,
        max_grad_norm=1.0,
        lr_scheduler_type="cosine",
        warmup_steps=options.num_warmup_steps,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        deepspeed=ds_config,
        logging_steps=options.log_steps,
        report_to=["tensorboard"],
        save_strategy="no",
        disable_tqdm=True,
        dataloader_drop_last=True,
    )
    # The first label is nobody's target, but the Trainer divides by the number of labels.
    data = [{"input_ids": row, "labels": torch.cat([torch.tensor([-100]), row[1:]])} for row in rows]
    InOrder(model=plain_model(options), args=arguments, train_dataset=data, callbacks=[Clock()]).train()
    yield from steps


LOOPS = {"recipe": recipe, "trainer": trainer, "nanogpt": nanogpt, "bare": bare, "ddp": ddp, "fsdp2": fsdp2}
SEVERAL_PROCESSES = ("trainer", "ddp", "fsdp2")


def run_loop(options: argparse.Namespace, rows: torch.Tensor, log_dir: str) -> Iterator[Step]:
    """The logged steps of a loop, as they come; the Trainer's come at its end."""
    loop = LOOPS[options.loop](options, rows, log_dir)
    return loop if options.loop == "trainer" else measured(options, loop)


def join_processes(options: argparse.Namespace) -> None:
    """Each process of a loop of several takes its GPU and joins the others; the Trainer does it by itself."""
    if options.loop in ("ddp", "fsdp2") and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def summarize(options: argparse.Namespace, steps: list[Step]) -> dict:
    """Returns the run's settings and figures; the steps of the warm-up count in the losses only."""
    tokens = rows_per_step(options) * options.seq_length
    seconds = [step.seconds for step in steps[options.warmup // options.log_steps :]]
    samples = [tokens / step for step in seconds]
    names = ("loop", "shape", "vocab_size", "seq_length", "micro_batch", "accumulation", "precision", "dropout")
    names += ("lean", "compile", "log_steps")
    return {
        **{name: getattr(options, name) for name in names},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "memory_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        "processes": world_size(),
        "threads": torch.get_num_threads(),
        "tokens_per_second": statistics.median(samples),
        "step_tokens_per_second": samples,
        "losses": [step.loss for step in steps],
    }


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    torch.set_num_threads(options.threads or max(1, len(os.sched_getaffinity(0)) // world_size()))
    torch.manual_seed(options.seed)
    rows = load_rows(options)
    with tempfile.TemporaryDirectory() as log_dir:
        join_processes(options)
        steps = list(run_loop(options, rows, log_dir))
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(summarize(options, steps)))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
