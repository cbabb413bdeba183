"""One run with every value decided: made once per start, by preflight, and handed on from there, never made again.

Plan, comparison, import and every rank take what they need from it. It travels to ranks as JSON; tokenizer and model
shape are read again from what its config names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from codeparrot_ds.config.run_config import RunConfig
from codeparrot_ds.data.encoder import Encoder, load_encoder
from codeparrot_ds.ds_config.facts import precision, zero_stage
from codeparrot_ds.ds_config.file import DsFile
from codeparrot_ds.ds_config.resolve import Resolved, nvme_folder, resolve
from codeparrot_ds.model.shapes import GPT2Shape, find_shape, num_parameters


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResolvedRun:
    """What a run is on a number of ranks."""

    config: RunConfig
    """Without ``auto``, and with a name; its paths are absolute once it is handed to ranks."""
    ds: Resolved
    """The DeepSpeed config that ``deepspeed.initialize`` takes, and where each of its values came from."""
    encoder: Encoder
    shape: GPT2Shape
    """Of the model, with the tokenizer's vocabulary."""
    world_size: int
    device: str
    """``cpu`` or ``cuda``."""
    precisions: tuple[str, ...]
    """What the device was taken to train in, the fastest first: what an ``"auto"`` in the DeepSpeed JSON became."""
    file: DsFile | None = None
    """The DeepSpeed JSON as it was read; None on the ranks, which need no more than ``ds``."""

    @property
    def ds_config(self) -> dict[str, Any]:
        return self.ds.config

    @property
    def zero_stage(self) -> int:
        return zero_stage(self.ds.config)

    @property
    def precision(self) -> str:
        return precision(self.ds.config)

    @property
    def parameters(self) -> int:
        """Of the model."""
        return num_parameters(self.shape)

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches per rank and optimizer step."""
        return self.config.gradient_accumulation_steps(self.world_size)

    @property
    def layout(self) -> dict[str, Any]:
        """What a checkpoint records of how it was trained; another layout continues it, to rounding."""
        return {"world_size": self.world_size, "zero_stage": self.zero_stage, "precision": self.precision}

    def with_config(self, **changes: Any) -> ResolvedRun:
        """The same run with other values in fields that nothing else here follows from (``resume``, paths)."""
        return dataclasses.replace(self, config=dataclasses.replace(self.config, **changes))

    def as_json(self) -> dict[str, Any]:
        """For a file; `from_json` reads it on another host, too."""
        return {
            "config": dataclasses.asdict(self.config),
            "ds_config": self.ds.config,
            "sources": [[list(path), source] for path, source in self.ds.sources.items()],
            "world_size": self.world_size,
            "device": self.device,
            "precisions": list(self.precisions),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> ResolvedRun:
        """What `as_json` wrote; `UserError` where the tokenizer or the model cannot be read here."""
        config = RunConfig(**content["config"])
        encoder, shape = encoder_and_shape(config)
        return cls(
            config=config,
            ds=Resolved(content["ds_config"], {tuple(path): source for path, source in content["sources"]}),
            encoder=encoder,
            shape=shape,
            world_size=content["world_size"],
            device=content["device"],
            precisions=tuple(content["precisions"]),
        )


def encoder_and_shape(config: RunConfig) -> tuple[Encoder, GPT2Shape]:
    """The tokenizer and the model that a config names, which belong together: `UserError` where they are not there."""
    encoder = load_encoder(config.tokenizer)
    return encoder, find_shape(config.model, vocab_size=encoder.vocab_size, seq_length=config.seq_length)


def resolve_run(
    config: RunConfig,
    file: DsFile,
    *,
    world_size: int,
    device: str,
    model: tuple[Encoder, GPT2Shape] | None = None,
    origins: Mapping[str, str] | None = None,
) -> ResolvedRun:
    """A run of a config on so many ranks, with the DeepSpeed JSON that ``file`` is.

    Args:
        config: without ``auto``.
        file: as read for the device; nothing of it is checked here but what `resolve` refuses.
        world_size: number of ranks.
        device: ``cpu`` or ``cuda``.
        model: what `encoder_and_shape` returned, where that is known.
        origins: where fields of the config came from, for `Resolved.sources`.

    Raises:
        UserError: the JSON sets a key of the run to another value, or an ``"auto"`` in it has no meaning.
    """
    encoder, shape = model or encoder_and_shape(config)
    resolved = resolve(
        file,
        config,
        world_size=world_size,
        model_hidden_size=shape.n_embd,
        nvme_path=nvme_folder(config),
        origins=origins,
    )
    return ResolvedRun(
        config=config,
        ds=resolved,
        encoder=encoder,
        shape=shape,
        world_size=world_size,
        device=device,
        precisions=tuple(file.precisions or ()),
        file=file,
    )
