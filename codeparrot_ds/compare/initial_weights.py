"""The weights that every config of a comparison begins with, and rounding errors put into a model on purpose.

The weights are made once, saved as a model folder, and known by their hash. A run in bf16 or fp16 rounds them, so the
folder has the hash of each precision: a trial that began with anything else is found out. Run as a program this module
makes the folder, so that ``compare`` itself needs no torch.

How far rounding errors carry is what a comparison's bands are made of. Monte Carlo arithmetic (D. S. Parker, 1997): the
result of an operation is moved at random within its rounding error, and what comes out tells how sure the result is.
Here an operation is a layer: what each hands on, forwards and backwards, is multiplied by a random number within one
spacing of the precision around 1, afresh at every step.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from codeparrot_ds import durable
from codeparrot_ds.checkpoint.folders import TOKENIZER_FILES
from codeparrot_ds.checkpoint.initial import initial_weights
from codeparrot_ds.checkpoint.tensor_files import save_tensors
from codeparrot_ds.compare.results import FINGERPRINTS
from codeparrot_ds.config.files import load_config
from codeparrot_ds.config.run_config import RunConfig
from codeparrot_ds.data.encoder import find_tokenizer
from codeparrot_ds.model.foreign import WEIGHTS
from codeparrot_ds.resolved_run import encoder_and_shape

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def make_initial_weights(config: RunConfig, folder: Path, *, perturbed: str | None = None) -> None:
    """Makes a model folder in Hugging Face format that ``init_from`` takes, with ``fingerprints.json``.

    Args:
        config: a run's; its model, tokenizer and seed decide, or its ``init_from``.
        folder: of the model, new.
        perturbed: change each weight by a random factor within one spacing of this precision: ``bf16`` for 1 ± 2^-7.
    """
    from codeparrot_ds.model.gpt2 import build_model, load_weights

    encoder, shape = encoder_and_shape(config)
    model: Any = build_model(shape, eos_token_id=encoder.eos_token_id, seed=config.seed)
    if config.init_from:
        names = [name for name, _ in model.named_parameters()]
        load_weights(model, initial_weights(config.init_from, names), partitioned=False)
    weights = {name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}
    if perturbed is not None:
        generator = torch.Generator().manual_seed(config.seed)
        for weight in weights.values():
            weight.mul_(factors(weight, SPACING[perturbed], generator))
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = find_tokenizer(config.tokenizer)
    for name in TOKENIZER_FILES:
        if (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, folder / name)
    model.config.save_pretrained(folder)
    save_tensors(folder / WEIGHTS, weights)
    hashes = {
        name: weights_fingerprint((key, weight.to(dtype)) for key, weight in sorted(weights.items()))
        for name, dtype in DTYPES.items()
    }
    durable.write_json(folder / FINGERPRINTS, hashes)  # last: it says that the folder is whole


def weights_fingerprint(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """SHA-256 of names, shapes and bytes, in the order given."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        digest.update(memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def engine_fingerprint(engine: Any, *, partitioned: bool) -> tuple[str, str]:
    """The working weights' dtype, by torch's name, and their fingerprint; collective where they are partitioned.

    Rank 0's answer counts: below stage 3 every rank has all weights, at stage 3 each is gathered in turn.
    """
    import deepspeed

    parameters = sorted(engine.module.named_parameters())

    def whole() -> Iterable[tuple[str, torch.Tensor]]:
        for name, parameter in parameters:
            gathered = deepspeed.zero.GatheredParameters(parameter) if partitioned else contextlib.nullcontext()
            with gathered:
                yield name, parameter.data

    dtype = str(parameters[0][1].dtype).removeprefix("torch.")
    return dtype, weights_fingerprint(whole())


# What rounding does

SPACING = {"fp32": 2.0**-23, "fp16": 2.0**-10, "bf16": 2.0**-7}
"""Distance of neighbouring numbers, relative to them: twice the largest error of one rounding."""


class _Noise(torch.autograd.Function):
    """Multiplies values by 1 ± ``relative``, uniform, and their gradients by other such numbers."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, relative: float, generator: torch.Generator) -> torch.Tensor:
        ctx.relative, ctx.generator = relative, generator
        return (values.float() * factors(values, relative, generator)).to(values.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        return (gradient.float() * factors(gradient, ctx.relative, ctx.generator)).to(gradient.dtype), None, None


def factors(like: torch.Tensor, relative: float, generator: torch.Generator) -> torch.Tensor:
    """Numbers uniform in 1 ± ``relative``, in fp32, shaped as a tensor."""
    noise = torch.rand(like.shape, generator=generator, device=like.device, dtype=torch.float32)
    return (noise * 2 - 1) * relative + 1


def inject_rounding_noise(model: nn.Module, precision: str, seed: int) -> None:
    """Makes every layer of a model that has no layers of its own round at random as in a precision, from now on."""
    device = next(model.parameters()).device
    generator = torch.Generator(device=device).manual_seed(seed)
    relative = SPACING[precision]

    def round_at_random(module: nn.Module, inputs: Any, output: Any) -> Any:
        if torch.is_tensor(output) and output.is_floating_point():
            return _Noise.apply(output, relative, generator)
        return output

    for module in model.modules():
        if not any(True for _ in module.children()):
            module.register_forward_hook(round_at_random)


if __name__ == "__main__":
    make_initial_weights(load_config(sys.argv[1]), Path(sys.argv[2]), perturbed=next(iter(sys.argv[3:]), None))
