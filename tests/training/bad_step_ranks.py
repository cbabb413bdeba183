"""One of two ranks that poison steps under one DeepSpeed config after the other; prints what came of it as JSON.

The engine, its loss and its backward pass are the real ones: a hook on the model multiplies or adds to one rank's loss,
or to one number of its gradient.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import math
import os
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import groups

from codeparrot_ds.config.run_config import RunConfig
from codeparrot_ds.data.encoder import load_encoder
from codeparrot_ds.data.loader import TrainingLoader, token_ids
from codeparrot_ds.data.shards import find_shards
from codeparrot_ds.data.stream import Dataset, StreamConfig
from codeparrot_ds.ds_config.facts import zero_stage
from codeparrot_ds.ds_config.file import open_ds_config
from codeparrot_ds.ds_config.resolve import resolve_ds_config
from codeparrot_ds.engine.engine import create_engine, loss_scale
from codeparrot_ds.engine.fragments import optimizer_step_count, owned_fragments
from codeparrot_ds.engine.operators import build_operators
from codeparrot_ds.engine.ranks import join_ranks, leave_ranks
from codeparrot_ds.model.gpt2 import build_model
from codeparrot_ds.model.shapes import GPT2Shape
from codeparrot_ds.training.bad_steps import BadSteps, DivergedError
from codeparrot_ds.training.loop import accumulate_gradients

NAN, INF = math.nan, math.inf
FP32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}
TO_CPU = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
FIXED_SCALE = {"fp16": {"loss_scale": 64}}
# Name: the shipped file, and what is changed in it.
CONFIGS = {
    **{f"zero{stage}{suffix}": (f"zero{stage}{suffix}", {}) for suffix in ("", "_fp32") for stage in range(4)},
    **{f"zero{stage}_fp16": (f"zero{stage}_fp16", FIXED_SCALE) for stage in range(4)},
    **{name: (name, {}) for name in ("zero1_fp32_accumulation", "zero2_fp32_accumulation")},
    **{name: (name, {}) for name in ("zero2_offload", "zero3_offload", "zero3_nvme")},
    "zero1_fp32 on the CPU": ("zero1_fp32", TO_CPU),
    "zero2_offload, fp32 sums": ("zero2_offload", FP32_SUMS),
    "zero2, unchecked": ("zero2", {"bf16": {"check_grad_overflow": False}}),
    "zero2_fp32, no norm": ("zero2_fp32", {"zero_optimization": {"compute_grad_norm": False}}),
    "zero3, no clipping": ("zero3", {}),
    "zero0, torch's Adam": ("zero0", {"optimizer": {"params": {"torch_adam": True}}}),
    **{f"{name}, lean": (name, {}) for name in ("zero0", "zero0_fp32", "zero1_fp32", "zero2")},
    # Last: DeepSpeed keeps autocast as long as a process lives.
    "zero0_fp32, fp16 autocast": ("zero0_fp32", {"torch_autocast": {"enabled": True, "dtype": "float16"}}),
}
# What is poisoned on rank 1, with which number, in which of the two micro-batches.
POISONS = [("loss", INF, 0), ("loss", NAN, 1), ("gradient", NAN, 0), ("gradient", -INF, 1), ("gradient", 1e25, 1)]
SHAPE = GPT2Shape(n_layer=1, n_embd=32, n_head=2, vocab_size=320, n_positions=32)
BATCH, MICRO_BATCH, LANES = 8, 2, 4

data, tokenizer, only = sys.argv[1], sys.argv[2], sys.argv[3:]
get_accelerator().is_fp16_supported = lambda: True  # torch's CPU kernels know fp16; DeepSpeed says no for their speed
ranks = join_ranks()
quoted: list[str] = []


class Quotes(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        quoted.append(record.getMessage())


log = logging.getLogger("codeparrot_ds")
log.setLevel(logging.DEBUG)
log.propagate = False
log.addHandler(Quotes())
encoder = load_encoder(tokenizer)
stream = StreamConfig(
    datasets=[Dataset(name=data, shards=find_shards(data, "train"))], encoder=encoder, seq_length=32, num_lanes=LANES,
    shuffle_buffer=8, seed=1,
)  # fmt: skip


def merged(base: dict, changes: dict) -> dict:
    nested = {key: merged(base.get(key, {}), value) for key, value in changes.items() if isinstance(value, dict)}
    return base | changes | nested


class Trainer:
    """An engine with its data, as the session has it, and a place to poison it."""

    def __init__(
        self, name: str, folder: str, *, limit: int = 100, changes: dict | None = None, learning_rate: float = 1e-2
    ) -> None:
        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
        file, of_the_config = CONFIGS[name]
        config = RunConfig(
            data=data, tokenizer=tokenizer, seq_length=32, global_batch_size=BATCH, micro_batch_size=MICRO_BATCH,
            num_warmup_steps=0, learning_rate=learning_rate, max_train_steps=50,
            max_grad_norm=0.0 if name.endswith(("no norm", "no clipping")) else 1.0,
            lean_step="on" if name.endswith("lean") else "off",
        )  # fmt: skip
        ds_config = open_ds_config(file).config
        ds_config = resolve_ds_config(ds_config, config, world_size=2, model_hidden_size=32, nvme_path=folder)
        ds_config = merged(merged(ds_config, of_the_config), changes or {})
        zero3 = ds_config if zero_stage(ds_config) == 3 else None
        model = build_model(SHAPE, eos_token_id=encoder.eos_token_id, seed=1, zero3_config=zero3, device=ranks.device)
        self.engine = create_engine(model, ds_config, config)
        self.loader = TrainingLoader(stream, micro_batch_size=MICRO_BATCH, rank=ranks.rank, world_size=2)
        self.lines: list[str] = []
        self.bad_steps = BadSteps(
            engine=self.engine, ranks=ranks, stream=stream, loader=self.loader, global_batch_size=BATCH,
            start_step=0, start_row=0,
            limit=limit, say=lambda message, *arguments: self.lines.append(message % arguments),
            give_up=lambda step: Path("runs/brave/checkpoints/step-00000001"),
        )  # fmt: skip
        self.accumulation_steps, self.step = 2, 0
        self.meter = SimpleNamespace(forward=contextlib.nullcontext)  # nobody compares the ranks here
        self.poison: tuple[str, float, int] | None = None
        self.engine.module.transformer.ln_f.register_forward_hook(self._poison_gradient)
        self.engine.module.register_forward_hook(self._poison_loss)
        self.state = self._state()

    def model_inputs(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"input_ids": token_ids(batch), "labels": token_ids(batch)}

    def poisoned(self, what: str) -> bool:
        return self.poison is not None and ranks.rank == 1 and self.poison[::2] == (what, self.engine.micro_steps % 2)

    def _poison_loss(self, module, inputs, output):
        if self.poisoned("loss"):
            output.loss = output.loss + self.poison[1]
        return output

    def _poison_gradient(self, module, inputs, output):
        if self.poisoned("gradient"):
            value, place = torch.tensor([self.poison[1]]).to(output.dtype), torch.tensor([3])
            output.register_hook(lambda gradient: gradient.view(-1).index_copy(0, place, value).view_as(gradient))

    def skip_data(self, steps: int) -> None:
        for _ in range(2 * steps):
            next(self.loader)
        self.step += steps

    def train(self, poison: tuple[str, float, int] | None = None) -> dict:
        """One step; what became of the state, and what was said."""
        self.poison, before, skipped = poison, self.state, self.engine.skipped_steps
        losses = accumulate_gradients(self.engine, self.loader, self)
        self.step += 1
        self.lines.clear()
        quoted.clear()
        self.bad_steps.check(self.step, wait=True)
        self.state = self._state()
        return {
            "losses": losses.tolist(),
            "kept": equal(before, self.state),
            "counted": self.engine.skipped_steps - skipped,
            "in_a_row": self.bad_steps.in_a_row,
            "overflow": self.engine.optimizer.overflow,
            "lines": list(self.lines),
            "log": list(quoted),
        }

    def _state(self) -> dict:
        """Weights, masters, moments, Adam's step counter, schedule: whatever a step changes, as copies."""
        weights = [getattr(p, "ds_tensor", p).detach() for p in self.engine.module.parameters()]
        state: dict = {f"weight {number}": weight.clone() for number, weight in enumerate(weights)}
        if self.engine.basic_optimizer.state:
            for fragments in owned_fragments(self.engine, every_copy=True):
                for fragment in fragments:
                    for kind, tensor in fragment.tensors.items():
                        state[f"{kind} of {fragment.name} from {fragment.start}"] = tensor.detach().clone()
        state["counts"] = torch.tensor([optimizer_step_count(self.engine), self.engine.lr_scheduler.last_epoch])
        state["rates"] = torch.tensor(self.engine.get_lr())
        return state

    def close(self) -> None:
        self.loader.close()
        self.engine.destroy()


def equal(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def poisoned_and_clean(name: str, folder: str) -> dict:
    """A run that meets every poison between its good steps, and one that never sees those rows."""
    started = time.perf_counter()
    clean = Trainer(name, f"{folder}/clean")
    first = [clean.train()]
    clean.skip_data(len(POISONS))
    rest = [clean.train() for _ in range(2)]
    trainer = Trainer(name, f"{folder}/poisoned")
    said: dict = {"good": [trainer.train()], "bad": [trainer.train(poison) for poison in POISONS]}
    said["good"] += [trainer.train() for _ in range(2)]
    said["clean_losses"] = [step["losses"] for step in first + rest]
    said["as_if_unseen"] = equal(trainer.state, clean.state)
    said["optimizer"] = type(trainer.engine.optimizer).__name__
    trainer.close()
    clean.close()
    return said | {"seconds": time.perf_counter() - started}


def late(folder: str) -> dict:
    """Lean steps as the loop makes them, which does not wait: what is said after each of two bad ones, a good one, a
    bad one, and at the end."""
    trainer = Trainer("zero2, lean", folder, limit=3)
    said = []
    for poison in (None, *POISONS[:2], None, POISONS[3]):
        trainer.poison = poison
        accumulate_gradients(trainer.engine, trainer.loader, trainer)
        trainer.step += 1
        trainer.bad_steps.check(trainer.step)
        said.append([len(trainer.lines), trainer.bad_steps.in_a_row, trainer.engine.skipped_steps])
    trainer.bad_steps.settle()
    trainer.close()
    said.append([len(trainer.lines), trainer.bad_steps.in_a_row, trainer.engine.skipped_steps])
    return {"said": said, "lines": trainer.lines}


def as_plain(name: str, folder: str) -> list[list[float]]:
    """The losses of 50 lean steps on this rank, and of 50 plain ones."""
    found = []
    for kind in (f"{name}, lean", name):
        trainer = Trainer(kind, folder, learning_rate=2e-3)
        losses = []
        for _ in range(50):
            losses.append(accumulate_gradients(trainer.engine, trainer.loader, trainer).mean().item())
        trainer.close()
        found.append(losses)
    return found


def too_many(folder: str) -> dict:
    """Three bad steps in a row where three are too many; two before a good one are not."""
    trainer = Trainer("zero2", folder, limit=3)
    weight = trainer.engine.module.transformer.ln_f.weight
    weight.register_hook(lambda gradient: gradient * trainer.poison[1] if trainer.poisoned("weight") else gradient)
    said = [trainer.train(poison) for poison in (POISONS[0], ("weight", NAN, 1), None, *POISONS[1:3])]
    try:
        trainer.train(POISONS[1])
    except DivergedError as error:
        return {"steps": said, "error": str(error), "code": error.exit_code}
    finally:
        trainer.close()
    raise AssertionError("the third bad step in a row was survived")


def loss_scaling(name: str, folder: str) -> dict:
    """fp16 with a gradient that overflows at every loss scale, until there is nothing left to lower."""
    scale = {"fp16": {"loss_scale": 0, "initial_scale_power": 8, "hysteresis": 1, "min_loss_scale": 2.0**6}}
    trainer = Trainer(name, folder, limit=2, changes=scale)
    said, scales = [], []
    for _ in range(3):
        said.append(trainer.train(("gradient", INF, 0)))
        scales.append(loss_scale(trainer.engine))
    try:
        trainer.train(("gradient", INF, 0))
    except DivergedError as error:
        return {"steps": said, "scales": scales, "error": str(error)}
    finally:
        trainer.close()
    raise AssertionError("the second overflow at the smallest scale was survived")


for name in ("zero2", "zero2_offload", "zero3_nvme"):
    build_operators(open_ds_config(name).config, "cpu")
gc.freeze()  # DeepSpeed collects garbage several times an engine: what the imports made need not be looked through
with tempfile.TemporaryDirectory() as scratch:
    folder = ranks.broadcast(scratch)
    answer: dict = {"late": late(folder)}
    answer["as plain"] = {name: as_plain(name, folder) for name in ("zero1_fp32", "zero2")}
    for name in only or CONFIGS:
        answer[name] = poisoned_and_clean(name, f"{folder}/{name}")
        gc.collect()
        gc.freeze()  # what was imported for the first of a kind is not looked through again with each
    answer["too many"] = too_many(folder)
    answer["scaling"] = {name: loss_scaling(name, folder) for name in ("zero0_fp16", "zero2_fp16", "zero3_fp16")}
    ranks.gather(None)  # the folder is rank 0's
leave_ranks()
print(json.dumps(answer))
sys.stdout.flush()
os._exit(0)
