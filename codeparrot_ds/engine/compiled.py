"""``--compile``: the model's blocks, or all of it, by ``torch.compile`` in training; as written where that fails.

All blocks are the same code on weights of the same shapes, so one graph serves them: it is compiled in seconds where
the whole model takes minutes, and gradients reach DeepSpeed block by block. In evaluation nothing is compiled: batches
of other sizes would need graphs of their own, and the loss is that of whoever loads the export.
"""

from __future__ import annotations

import functools
import logging
import os
import time
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from codeparrot_ds.config.run_config import RunConfig
from codeparrot_ds.ds_config.facts import value_at, zero_stage

logger = logging.getLogger("codeparrot_ds.compiled")


def compiles_whole(engine: Any, config: RunConfig) -> bool:
    """Whether a run's model is one graph: hooks inside it would cut it."""
    return config.compile and (config.compile_scope == "whole" or engine.is_deepcompile_enabled())


def keep_hooks_out_of_blocks(model: nn.Module, ds_config: dict[str, Any], config: RunConfig) -> None:
    """Has ZeRO-3 gather a whole block's weights before it instead of each module's inside; before the engine is made.

    Its hooks would cut a block's graph into a dozen.
    """
    is_deepcompile = value_at(ds_config, ("compile", "deepcompile")) is True  # which has its own way
    if config.compile and config.compile_scope == "blocks" and zero_stage(ds_config) == 3 and not is_deepcompile:
        from deepspeed.utils import set_z3_leaf_modules

        set_z3_leaf_modules(model, [type(model.transformer.h[0])])


def compile_model(engine: Any, config: RunConfig) -> None:
    """Has the engine's model compiled as the run config says, in training; each graph when it is first needed.

    DeepCompile, which the DeepSpeed JSON asks for, is DeepSpeed's own affair: it makes its backend of the whole model.
    """
    if engine.is_deepcompile_enabled():
        engine.compile()
        return
    import torch._dynamo.config as dynamo
    from transformers.modeling_layers import GradientCheckpointingLayer

    is_whole = config.compile_scope == "whole"
    modules = [engine.module] if is_whole else list(engine.module.transformer.h)
    written = type(modules[0]).forward
    # What activation checkpointing calls again is compiled, it itself cannot be. It wraps a block's forward pass where
    # transformers does not have it in the block's call, as older versions do.
    is_wrapped = not is_whole and "__call__" not in vars(GradientCheckpointingLayer)
    inner = written.__wrapped__ if is_wrapped else written
    # Attention's scale is part of a graph: where it differs each block has its own, and one more with checkpointing.
    dynamo.recompile_limit = max(dynamo.recompile_limit, 2 * len(modules))
    compiled = compiled_where_possible(inner, "the model" if is_whole else "the model's blocks")

    @functools.wraps(written)  # whose signature is asked for
    def forward(module: Any, *args: Any, **kwargs: Any) -> Any:
        if not module.training:
            return written(module, *args, **kwargs)
        if is_wrapped and module.gradient_checkpointing:
            return module._gradient_checkpointing_func(functools.partial(compiled, module, **kwargs), *args)
        return compiled(module, *args, **kwargs)

    for module in modules:
        module.forward = types.MethodType(forward, module)


def compiled_where_possible(function: Callable, what: str) -> Callable:
    """The function by ``torch.compile``; once that fails, the function itself, and a warning.

    Args:
        function: is called with shapes that stay the same.
        what: it is of, for the log, which has the graphs and seconds of each compilation.
    """
    # Imported for a run that compiles alone: it takes a second.
    import torch._functorch.config as backward_passes
    from deepspeed.accelerator import get_accelerator
    from torch._dynamo.exc import BackendCompilerFailed, TorchDynamoException
    from torch._dynamo.utils import counters

    # A backward pass is compiled with its forward pass: in the first backward pass it would be too late to do without.
    backward_passes.force_non_lazy_backward_lowering = True
    has_failed = False

    def give_up(error: RuntimeError) -> None:
        nonlocal has_failed
        has_failed = True
        cause = error.inner_exception if isinstance(error, BackendCompilerFailed) else error
        words = next((line for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
        logger.warning("%s cannot be compiled, and training continues as it is written: %s", what, words)
        logger.debug("the compiler's failure", exc_info=error)  # to the rank's file

    try:
        compiled = torch.compile(function, dynamic=False, backend=get_accelerator().get_compile_backend())
    except RuntimeError as error:  # this Python, or this platform, has no compiler
        give_up(error)

    def call(*args: Any, **kwargs: Any) -> Any:
        if has_failed:
            return function(*args, **kwargs)
        graphs, started = counters["stats"]["unique_graphs"], time.perf_counter()
        try:
            result = compiled(*args, **kwargs)
        except TorchDynamoException as error:
            give_up(error)
            return function(*args, **kwargs)
        made = counters["stats"]["unique_graphs"] - graphs
        if made:
            seconds = time.perf_counter() - started
            folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR", "torch's own cache")
            logger.info("compiled %s: %d graph(s) in %.1f s, kept in %s", what, made, seconds, folder)
        return result

    return call
