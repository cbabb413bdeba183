"""The DeepSpeed engine of a run: optimizer groups, schedule, precision, and the fixes of DeepSpeed.

Every engine that is made here leaves an optimizer step out when the gradient is not finite: weights, masters and Adam's
states stay what they were bit for bit, the gradient is dropped, ``engine.skipped_steps`` counts it, and the schedule
stands still. ``optimizer.overflow`` says so, the same on all ranks; of a lean step (``lean_step.py``) one step late.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import torch
from torch import nn

from codeparrot_ds.config.run_config import RunConfig
from codeparrot_ds.config.schedule import learning_rate_factor
from codeparrot_ds.ds_config.facts import activation_checkpointing, steps_lean
from codeparrot_ds.engine.compiled import keep_hooks_out_of_blocks
from codeparrot_ds.engine.deepspeed_fixes import apply_fixes, import_muon_uncompiled, warn_of_unverified_version
from codeparrot_ds.engine.private_parts import FUSED, UNFUSED, ZERO3, ZERO12, check_parts, use_of
from codeparrot_ds.model.gpt2 import enable_activation_checkpointing, get_grouped_params

LOSS_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def create_engine(model: nn.Module, ds_config: dict[str, Any], config: RunConfig, *, traced: bool = False) -> Any:
    """Hands the model to DeepSpeed with AdamW groups and the schedule; collective. Returns the engine.

    Args:
        model: from ``build_model``.
        ds_config: the resolved DeepSpeed config.
        config: the run config, for the schedule and the weight decay.
        traced: whether its memory is traced, which needs more of DeepSpeed's private parts.

    Raises:
        PrivatePartError: DeepSpeed lacks a private part that this config needs, or made an optimizer of unknown class.
    """
    import deepspeed

    if activation_checkpointing(ds_config):
        enable_activation_checkpointing(model, ds_config)

    def factor(step: int) -> float:
        return learning_rate_factor(config.lr_scheduler_type, step, config.num_warmup_steps, config.max_train_steps)

    if torch.distributed.get_rank() == 0:
        warn_of_unverified_version()
    import_muon_uncompiled()
    keep_hooks_out_of_blocks(model, ds_config, config)
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=get_grouped_params(model, config.weight_decay),
        config=ds_config,
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, factor),
        dist_init_required=False,
    )
    engine.lean_step = None  # set by its fix
    use = use_of(engine, ds_config, traced=traced, lean=steps_lean(config.lean_step, ds_config, engine.device.type))
    check_parts(use, engine)
    apply_fixes(engine, use)
    return engine


def step_outcomes(engine: Any, most: int, *, wait: bool) -> list[bool]:
    """Whether the last steps, `most` at most, were made and not skipped, the oldest first; the same on all ranks.

    Each is said once. A lean step's (``engine/lean_step.py``) is known when the next one is made, or with `wait`.
    """
    if engine.lean_step is None:
        return [bool(engine.was_step_applied())] * min(most, 1)
    if wait:
        engine.lean_step.settle()
    return engine.lean_step.outcomes()


def _loss_scaler(engine: Any) -> tuple[Any, bool]:
    """What holds the loss scale, and whether it finds the scale as it goes; (None, False) where there is no scale."""
    kind, optimizer = type(engine.optimizer).__name__, engine.optimizer
    if kind in (FUSED, UNFUSED):
        return optimizer.loss_scale_config, optimizer.loss_scale_config.dynamic_loss_scale
    if kind in (ZERO12, ZERO3):
        return optimizer.loss_scaler, optimizer.loss_scaler.dynamic
    return None, False


def loss_scale(engine: Any) -> float:
    """The current loss scale; 1 where the precision needs none."""
    scaler, _ = _loss_scaler(engine)
    return 1.0 if scaler is None else float(scaler.cur_scale)


def lowest_loss_scale(engine: Any) -> float | None:
    """How far dynamic loss scaling may lower the scale; None where the scale is fixed or the precision needs none."""
    scaler, dynamic = _loss_scaler(engine)
    if not dynamic:
        return None
    return scaler.min_loss_scale if type(engine.optimizer).__name__ in (FUSED, UNFUSED) else scaler.min_scale


def loss_scaler_state(engine: Any) -> dict[str, Any]:
    """What dynamic loss scaling continues with after a restart; empty where the scale is fixed or there is none."""
    scaler, dynamic = _loss_scaler(engine)
    # Stage 0 counts no hysteresis: it only hands on what a checkpoint of another stage brought.
    names = [name for name in LOSS_SCALER_FIELDS if name != "cur_hysteresis" or name in vars(scaler)] if dynamic else []
    return {name: getattr(scaler, name) for name in names}


def restore_loss_scaler(engine: Any, state: dict[str, Any]) -> None:
    """Takes over `loss_scaler_state`; from another precision it is empty, and fp16 begins with its initial scale."""
    scaler, dynamic = _loss_scaler(engine)
    if dynamic:
        for name, value in state.items():
            setattr(scaler, name, value)


def keep_freed_pages() -> None:
    """Tells glibc to keep freed memory instead of handing it back to the system.

    A training step on the CPU allocates and frees the same large tensors each time; by default each comes from a fresh
    ``mmap`` whose pages fault one by one. Keeping them made steps 1.2 to 1.35 times faster.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # Another C library (musl): nothing to tune.
        return
    m_trim_threshold, m_mmap_max, never = -1, -4, -1  # not the largest int: more than 2 GiB may lie freed
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, never)
