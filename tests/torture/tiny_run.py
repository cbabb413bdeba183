"""A real run of one rank in this process, as small as can be: a DeepSpeed engine, its saver, its folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file

from codeparrot_ds.checkpoint.export import Export
from codeparrot_ds.checkpoint.folders import Checkpoint, checkpoint_folders
from codeparrot_ds.checkpoint.run_folder import RunFolder
from codeparrot_ds.checkpoint.saver import CheckpointSaver, SaveOutcome, load_checkpoint
from codeparrot_ds.checkpoint.state import RunState
from codeparrot_ds.config.run_config import RunConfig
from codeparrot_ds.ds_config.file import open_ds_config
from codeparrot_ds.ds_config.resolve import resolve_ds_config
from codeparrot_ds.engine.engine import create_engine
from codeparrot_ds.engine.fragments import owned_fragments
from codeparrot_ds.engine.ranks import Ranks
from codeparrot_ds.metrics import EvaluationRow
from codeparrot_ds.model.gpt2 import build_model
from codeparrot_ds.model.shapes import GPT2Shape
from codeparrot_ds.training.publish import Publisher
from codeparrot_ds.training.resume import newest_valid

SHAPE = GPT2Shape(n_layer=1, n_embd=16, n_head=2, vocab_size=257, n_positions=32)
T = TypeVar("T")


class OnlyRank(Ranks):
    """The one rank of a run, which asks nobody: gloo's threads do not live on in a forked child."""

    def with_own_group(self) -> Ranks:
        return self

    def broadcast(self, value: T) -> T:
        return value

    def gather(self, value: T) -> list[T]:
        return [value]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Content:
    """Everything that comes back from a checkpoint: the state, the counters, and every number."""

    state: RunState
    counters: tuple[int, ...]
    tensors: dict[str, torch.Tensor]

    def equals(self, other: Content) -> bool:
        same = (self.state, self.counters, self.tensors.keys()) == (other.state, other.counters, other.tensors.keys())
        return same and all(torch.equal(tensor, other.tensors[name]) for name, tensor in self.tensors.items())


def build_engine(config: RunConfig) -> Any:
    """A ZeRO-2 engine in bf16."""
    ds_config = open_ds_config("zero2").config
    resolved = resolve_ds_config(ds_config, config, world_size=1, model_hidden_size=SHAPE.n_embd)
    return create_engine(build_model(SHAPE, eos_token_id=0, seed=1), resolved, config)


class TinyRun:
    """A run that trains a step, saves, and starts again from what is in its folder.

    The engine that trains and the one that checkpoints are loaded into are two: what was restored is compared with what
    was saved.
    """

    def __init__(self, tokenizer: Path, path: Path) -> None:
        self.config = config = RunConfig(
            data="corpus",
            tokenizer=str(tokenizer),
            seq_length=32,
            global_batch_size=4,
            micro_batch_size=4,
            num_warmup_steps=0,
            keep_checkpoints=2,
        )
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.checkpoints.mkdir(parents=True)
        device = torch.device("cpu")
        self.ranks = OnlyRank(rank=0, world_size=1, local_rank=0, device=device, control=None)
        self.engine, self.restored = build_engine(config), build_engine(config)
        for _ in range(2):  # the restored one has moments too, others
            self._train_step(self.restored)
        self.folder = RunFolder(path)
        self.folder.record = {"hub": str(path.parent / "hub.git")}
        self.publisher = Publisher(config, self.folder, lambda *message: None)
        self._savers = {in_background: self._saver(in_background) for in_background in (False, True)}

    def _saver(self, in_background: bool) -> CheckpointSaver:
        return CheckpointSaver(
            self.engine,
            self.ranks,
            self.checkpoints,
            in_background=in_background,
            published=self.publisher.after_save,
            report=lambda outcome: None,
        )

    def train_step(self) -> None:
        """One optimizer step on random rows."""
        self._train_step(self.engine)

    def _train_step(self, engine: Any) -> None:
        ids = torch.randint(SHAPE.vocab_size, (4, 32))
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()

    def state(self, step: int) -> RunState:
        lanes = {"lanes": {"0": step}}
        layout = {"world_size": 1, "zero_stage": 2, "precision": "bf16"}
        return RunState(
            step=step,
            tokens=step * 128,
            data=lanes,
            layout=layout,
            evaluations=[evaluation(step, 5.0 - step / 100)],
            config={},
            ds_config={},
        )

    def export(self, step: int) -> Export:
        return Export(
            model_config=self.engine.module.config,
            tokenizer=Path(self.config.tokenizer),
            dtype="bfloat16",
            card=f"# A model\n\nAs small as can be, after {step} steps of training on random rows.\n",
            training_state={"step": step},
        )

    def save(self, step: int, *, in_background: bool = False) -> SaveOutcome:
        """Saves and waits until that is done, or has failed."""
        saver = self._savers[in_background]
        saver.save(self.state(step), self.export(step))
        outcome = saver.wait()
        assert outcome is not None and outcome.step == step
        return outcome

    def become(self, checkpoint: Checkpoint) -> None:
        """Brings the training engine to where it was when the checkpoint was saved."""
        load_checkpoint(self.engine, self.ranks, checkpoint)

    def content(self, step: int) -> Content:
        """What a checkpoint of now must bring back."""
        return self._content(self.engine, self.state(step))

    def newest(self) -> Checkpoint | None:
        """The checkpoint that a start would choose; damaged ones are set aside and logged."""
        return newest_valid(self.folder, self.ranks)

    def load(self, checkpoint: Checkpoint) -> Content:
        """Brings a checkpoint back, into an engine that holds nothing of it; its export has the same weights."""
        (fragments,) = owned_fragments(self.restored)
        with torch.no_grad():
            for tensor in (*(t for f in fragments for t in f.tensors.values()), *self.restored.module.parameters()):
                tensor.fill_(float("nan"))
        state = load_checkpoint(self.restored, self.ranks, checkpoint)
        exported = load_file(checkpoint.export / "model.safetensors")
        for name, weight in self.restored.module.named_parameters():
            assert torch.equal(weight, exported[name]), f"{checkpoint}: {name} in the export"
        return self._content(self.restored, state)

    def _content(self, engine: Any, state: RunState) -> Content:
        (fragments,) = owned_fragments(engine)
        tensors = {
            f"{fragment.name} {kind} {fragment.start}": tensor.detach().clone()
            for fragment in fragments
            for kind, tensor in fragment.tensors.items()
        }
        weights = torch.cat([weight.detach().flatten() for weight in engine.module.parameters()])
        tensors |= {"weights": weights.clone(), "rng": torch.get_rng_state()}
        counters = (engine.global_steps, engine.global_samples, engine.skipped_steps, engine.lr_scheduler.last_epoch)
        return Content(state=state, counters=counters, tensors=tensors)


def evaluation(step: int, loss: float) -> EvaluationRow:
    return EvaluationRow(
        step=step, tokens=step * 128, eval_loss=loss, perplexity=100.0, bits_per_byte=None, eval_tokens=9
    )


def leftovers(checkpoints: Path) -> list[str]:
    """What is hidden in the folder: nothing, while no save is under way."""
    return sorted(path.name for path in checkpoints.iterdir() if path.name.startswith("."))


def checkpoint_steps(checkpoints: Path) -> list[int]:
    return [checkpoint.step for checkpoint in checkpoint_folders(checkpoints)]
