"""What is changed in DeepSpeed's engine so that every stage and precision does the same arithmetic: `FIXES` has all.

Each function but the first takes an engine of a config for which `FIXES` names it, whose private parts have been found.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import itertools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from codeparrot_ds.engine.lean_step import norms_of_rows, step_without_waiting
from codeparrot_ds.engine.private_parts import (
    BARE,
    FUSED,
    LEAN,
    PARTS,
    UNFUSED,
    VERIFIED,
    ZERO3,
    ZERO12,
    Configs,
    Use,
    installed_version,
    require,
)

logger = logging.getLogger("codeparrot_ds.engine")


def import_muon_uncompiled() -> None:
    """Imports DeepSpeed's Muon, for whose class ZeRO's optimizers look, without all of torch's compiler.

    Its functions are compiled as they are defined, which imports inductor: a third of a second of every start. Here
    they are when they are first called.
    """
    require("compiler.compile", "muon.original_muon")
    from deepspeed.runtime import compiler

    def compile_when_called(function: Callable) -> Callable:
        compiled = functools.cache(lambda: torch.compile(function))
        return functools.wraps(function)(lambda *args, **kwargs: compiled()(*args, **kwargs))

    plain_compile = compiler.compile
    compiler.compile = lambda: compile_when_called
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        compiler.compile = plain_compile


@torch.no_grad()
def undo_construction_step(engine: Any) -> None:
    """Takes back the optimizer step that DeepSpeed makes while it builds a bf16 or fp16 engine at stage 0.

    ``initialize_optimizer_states`` of ``FP16_Optimizer`` (fused Adam) and ``FP16_UnfusedOptimizer`` (torch's) steps
    once with zero gradients to create Adam's states. That leaves the step counter at 1 (a wrong bias correction: the
    first real update is about a third too small) and the masters decayed once, so stage 0 parts from stages 1 to 3
    within a few steps. The working weights are not touched by that step: they give the masters back.
    """
    optimizer = engine.optimizer
    if type(optimizer).__name__ == FUSED:
        working_weights, masters = optimizer.fp16_groups_flat, optimizer.fp32_groups_flat
    else:
        working_weights, masters = itertools.chain(*optimizer.fp16_groups), itertools.chain(*optimizer.fp32_groups)
    for working, master in zip(working_weights, masters, strict=True):
        master.data.copy_(working.data)
    for state in engine.basic_optimizer.state.values():
        state["step"] = torch.zeros_like(state["step"]) if torch.is_tensor(state["step"]) else 0
        state["exp_avg"].zero_()
        state["exp_avg_sq"].zero_()


def scale_the_loss_at_stage0(engine: Any) -> None:
    """Multiplies fp16's loss by the loss scale at stage 0, where DeepSpeed only divides the gradients by it.

    ``engine.backward`` scales the loss for ZeRO's optimizers alone. Unscaled, small gradients vanish in fp16, and the
    step takes what is left for 65,536 times as small as it is: it never clips, and Adam's epsilon weighs. Beside
    torch's optimizers (``FP16_UnfusedOptimizer``) it also keeps the norm as it was before the division.
    """
    optimizer = engine.optimizer
    scaling = optimizer.loss_scale_config
    plain_backward = engine.backward

    def backward(loss: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        scale = scaling.cur_scale
        return plain_backward(loss.float() * scale, *args, **kwargs) / scale

    engine.backward = backward
    if type(optimizer).__name__ == UNFUSED:
        plain_unscale = optimizer.unscale_and_clip_grads

        def unscale(total_norm: Any, *args: Any, **kwargs: Any) -> Any:
            optimizer._global_grad_norm = total_norm / scaling.cur_scale
            return plain_unscale(total_norm, *args, **kwargs)

        optimizer.unscale_and_clip_grads = unscale


def guard_bare_optimizer(engine: Any) -> None:
    """Gives stage 0 in fp32 what the other engines have: the gradient norm, and a skipped step where it is not finite.

    There DeepSpeed steps the bare optimizer: it clips but does not keep the norm, and a NaN goes into the weights. The
    norm is summed in fp64 as ZeRO does: torch's fp32 sum over millions of squares is off by 1e-4 to 1e-3 on a CPU, so
    that stage 0 would clip otherwise than the other stages.
    """
    optimizer = engine.optimizer
    parameters = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
    plain_step = optimizer.step
    optimizer.overflow = False

    def total_norm() -> torch.Tensor:
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norms = torch.stack([torch.linalg.vector_norm(norms_of_rows(grad), dtype=torch.float64) for grad in grads])
        return norms.square().sum().float().sqrt()  # infinite where fp32 cannot hold the square, as at other stages

    def clip() -> None:
        engine._global_grad_norm = total_norm()
        torch.nn.utils.clip_grads_with_norm_(parameters, engine.gradient_clipping(), engine._global_grad_norm)

    def step(*args: Any, **kwargs: Any) -> None:
        if engine.gradient_clipping() <= 0:
            engine._global_grad_norm = total_norm()
        optimizer.overflow = not bool(torch.isfinite(engine._global_grad_norm))
        if not optimizer.overflow:
            plain_step(*args, **kwargs)

    engine.clip_fp32_gradients = clip
    optimizer.step = step
    scaler = engine.torch_autocast_z0_gradscaler
    if scaler is not None:  # of fp16 autocast: it calls the optimizer's step only where the gradients are finite
        plain_scaler_step = scaler.step

        def scaler_step(optimizer: Any) -> None:
            optimizer.overflow = True
            plain_scaler_step(optimizer)

        scaler.step = scaler_step


def decide_by_the_norm(engine: Any) -> None:
    """Makes the norm of the gradient, which is there anyway, decide at stages 1 and 2 whether a step is left out.

    DeepSpeed first takes the largest and the smallest of every gradient, which tell nothing that the norm does not. It
    saves these passes where ``bf16.check_grad_overflow`` is false, but takes no notice of the norm either then, and NaN
    goes into the weights. With ``compute_grad_norm`` false there is no norm, so the passes are made, also in fp32 that
    has no such switch. An offloaded optimizer looks while the gradients arrive.
    """
    optimizer = engine.optimizer
    looks_itself = optimizer.cpu_offload and optimizer.check_grad_overflow
    optimizer.check_grad_overflow = True
    if optimizer.compute_grad_norm and not looks_itself:
        optimizer.check_overflow = lambda **_: None


def norm_without_fp64_copies(engine: Any) -> None:
    """Hands ZeRO the norms of short rows of each gradient, whose norm is the gradient's.

    It copies every gradient to fp64 for its norm, since fp32 loses digits over millions of squares. Over a thousand it
    does not; of a CPU's step of 111M parameters these copies are 1%, and a large one may need fresh memory.
    """
    optimizer = engine.optimizer
    plain_norm = optimizer.get_grad_norm_direct

    def norm(gradients: list[torch.Tensor], params: Any, **kwargs: Any) -> torch.Tensor:
        # Padding alone has the mark; stage 3 has neither.
        gradients = [gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False)]
        return plain_norm([norms_of_rows(gradient) for gradient in gradients], params, **kwargs)

    optimizer.get_grad_norm_direct = norm


def bound_stage3_norms(engine: Any) -> None:
    """Takes a gradient for infinite at stage 3 where the others do: when fp32 cannot hold the square of its norm.

    Stage 3 counts norms in fp64. Without clipping such a gradient would make Adam's second moment infinite for good.
    """
    plain_norms = engine.optimizer._get_norm_groups
    largest = torch.finfo(torch.float32).max ** 0.5

    def norms() -> list[torch.Tensor]:
        return [torch.where(norm < largest, norm, torch.inf) for norm in map(torch.as_tensor, plain_norms())]

    engine.optimizer._get_norm_groups = norms


def drop_offloaded_sums(engine: Any) -> None:
    """Drops gradients that were added up in fp32 for an offloaded optimizer when their step is left out.

    DeepSpeed keeps these sums at stages 1 and 2 and adds the next step's gradients to them: after one NaN every later
    step is skipped.
    """
    optimizer = engine.optimizer
    plain_reset = optimizer.reset_cpu_buffers

    def reset() -> None:  # called after every step; after one that was made there is nothing left to drop
        plain_reset()
        for group in optimizer.averaged_gradients:
            optimizer.averaged_gradients[group] = None

    optimizer.reset_cpu_buffers = reset


def let_the_loss_scale_rest(engine: Any) -> None:
    """Keeps fp16 at its smallest loss scale, where DeepSpeed would raise: such a step counts as a bad one instead."""
    engine.optimizer.loss_scaler.raise_error_at_min_scale = False


def forget_beta_powers(engine: Any) -> None:
    """Makes DeepSpeed's C++ Adam compute beta^t afresh at each step, as it does after a restart.

    The C++ optimizer keeps a running float product of beta^t in the process (``IncrementStep`` in
    ``csrc/includes/cpu_adam.h``) and falls back to ``pow`` when the step number does not follow the last one. The two
    differ in the last bits, so a resumed run would part from an uninterrupted one. Updating one dummy number with a
    step number far away leaves the next real step no choice but ``pow``. On a GPU the kernel has no such memory.
    """
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    base = engine.basic_optimizer
    beta1, beta2 = base.param_groups[0]["betas"]
    epsilon, far_away = base.param_groups[0]["eps"], 2**30
    grad, weight, moment1, moment2 = (torch.zeros(1) for _ in range(4))

    def update_dummy(*_: Any) -> None:
        if isinstance(base, DeepSpeedCPUAdam):
            base.ds_opt_adam.adam_update(
                base.opt_id, far_away, 0.0, beta1, beta2, epsilon, 0.0, True, weight, grad, moment1, moment2
            )
        else:
            tensors = [[grad], [weight], [moment1], [moment2]]
            base.multi_tensor_adam(
                2048 * 32, base._dummy_overflow_buf, tensors, 0.0, beta1, beta2, epsilon, far_away, 1, 1, 0.0
            )

    base.register_step_post_hook(update_dummy)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fix:
    """One thing that is changed, in the order in which they are made.

    A fix whose private parts are missing is refused before any is made (``check_parts``), so each finds what it needs.
    """

    apply: Callable[[Any], None]
    configs: tuple[Configs, ...]
    """Any of them needs it."""
    corrects: dict[str, str]
    """The code of DeepSpeed that it corrects, ``module:function`` or a file, and the hash of its text."""
    noticed_by: str
    """The test that fails when DeepSpeed no longer needs it."""
    verified: tuple[str, ...] = VERIFIED

    @property
    def name(self) -> str:
        return self.apply.__name__

    def include(self, use: Use) -> bool:
        return any(configs.include(use) for configs in self.configs)

    def changed_code(self) -> list[str]:
        """What it corrects that is not the code it was verified with: a fix there may do nothing, or harm."""
        return [where for where, digest in self.corrects.items() if text_digest(where) != digest]


FIXES = (
    Fix(
        apply=undo_construction_step,
        configs=(Configs((FUSED, UNFUSED)),),
        corrects={
            "runtime.fp16.fused_optimizer:FP16_Optimizer.initialize_optimizer_states": "f31c80131474",
            "runtime.fp16.unfused_optimizer:FP16_UnfusedOptimizer.initialize_optimizer_states": "88856fc3cbf5",
        },
        noticed_by="test_deepspeed_still_steps_while_it_builds_stage_0",
    ),
    Fix(
        apply=scale_the_loss_at_stage0,
        configs=(Configs((FUSED, UNFUSED), frozenset({"fp16"})),),
        corrects={
            "runtime.engine:DeepSpeedEngine.backward": "0ce89b380479",
            "runtime.fp16.unfused_optimizer:FP16_UnfusedOptimizer.step": "4a969b391faa",
        },
        noticed_by="test_the_loss_of_stage_0_in_fp16_is_scaled",
    ),
    Fix(
        apply=guard_bare_optimizer,
        configs=(Configs((BARE,)),),
        corrects={
            "runtime.engine:DeepSpeedEngine.clip_fp32_gradients": "a58137bd2c53",
            "runtime.engine:DeepSpeedEngine._take_model_step": "8e74072e9526",
        },
        noticed_by="test_deepspeed_still_lets_a_nan_into_the_weights_of_stage_0_in_fp32",
    ),
    Fix(
        apply=decide_by_the_norm,
        configs=(Configs((ZERO12,)),),
        corrects={"runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer.step": "fac1cee02b7c"},
        noticed_by="test_deepspeed_still_steps_on_a_nan_that_it_does_not_check",
    ),
    Fix(
        apply=norm_without_fp64_copies,
        configs=(Configs((ZERO12, ZERO3), frozenset({"cpu"})),),
        corrects={
            "runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer.get_grad_norm_direct": "b32464016844",
            "runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3.get_grad_norm_direct": "9df80f20d7ea",
        },
        noticed_by="test_the_norm_is_exact_without_an_fp64_copy_of_a_gradient",
    ),
    Fix(
        apply=bound_stage3_norms,
        configs=(Configs((ZERO3,)),),
        corrects={"runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3._get_norm_groups": "2d02e95e07c6"},
        noticed_by="test_deepspeed_still_takes_a_norm_for_finite_at_stage_3_whose_square_is_not",
    ),
    Fix(
        apply=drop_offloaded_sums,
        configs=(Configs((ZERO12,), frozenset({"offloaded optimizer"})),),
        corrects={"runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer.reset_cpu_buffers": "6af06bdbcc99"},
        noticed_by="test_deepspeed_still_keeps_the_offloaded_sums_of_a_step_that_it_skips",
    ),
    Fix(
        apply=let_the_loss_scale_rest,
        configs=(Configs((ZERO12, ZERO3), frozenset({"dynamic scale"})),),
        corrects={"runtime.fp16.loss_scaler:DynamicLossScaler.update_scale": "08587403c85d"},
        noticed_by="test_deepspeed_still_raises_at_the_smallest_loss_scale",
    ),
    Fix(
        apply=forget_beta_powers,
        configs=(Configs(traits=frozenset({"FusedAdam", "cpu"})), Configs(traits=frozenset({"DeepSpeedCPUAdam"}))),
        corrects={"ops/csrc/includes/cpu_adam.h": "d269bd3a7adc"},
        noticed_by="test_deepspeed_still_keeps_beta_powers_between_steps",
    ),
    # After those that change the plain step, whose place it takes.
    Fix(
        apply=step_without_waiting,
        configs=(Configs((BARE, FUSED, ZERO12), frozenset({LEAN})),),
        corrects={
            "runtime.fp16.fused_optimizer:FP16_Optimizer.step": "8e7b65e5aefd",
            "runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer.step": "fac1cee02b7c",
            "runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer.average_tensor": "da26b2ba0a2f",
            "runtime.engine:DeepSpeedEngine._take_model_step": "8e74072e9526",
        },
        noticed_by="test_deepspeed_still_waits_for_the_device_in_a_step",
    ),
)
"""`import_muon_uncompiled` is none of them: it changes no arithmetic, and comes before the engine."""


def text_digest(where: str) -> str:
    """The first digits of the SHA-256 of some code of the installed DeepSpeed (see `Fix.corrects`); empty: gone."""
    name, _, function = where.partition(":")
    specification = importlib.util.find_spec("deepspeed")
    assert specification is not None and specification.origin is not None
    path = Path(specification.origin).parent / (f"{name.replace('.', '/')}.py" if function else name)
    if not path.is_file():
        return ""
    if not function:
        return _digest(path.read_text(encoding="utf-8"))
    lines, node = _parsed(path)
    for name in function.split("."):
        node = next((child for child in node.body if getattr(child, "name", None) == name), None)
        if node is None:
            return ""
    return _digest("\n".join(lines[node.lineno - 1 : node.end_lineno]))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@functools.cache
def _parsed(path: Path) -> tuple[list[str], Any]:
    text = path.read_text(encoding="utf-8")
    return text.splitlines(), ast.parse(text)


def apply_fixes(engine: Any, use: Use) -> None:
    """Makes every fix that an engine needs; its private parts have been checked."""
    for fix in FIXES:
        if fix.include(use):
            fix.apply(engine)


@functools.cache
def warn_of_unverified_version() -> None:
    """Says once, where the installed DeepSpeed is not one that parts and fixes were verified with, what that means."""
    installed = installed_version()
    if installed in VERIFIED:
        return
    changed = [f"{fix.name} ({', '.join(code)})" for fix in FIXES if (code := fix.changed_code())]
    found = "what the fixes correct has not changed"
    if changed:
        found = f"what some fixes correct has changed: {'; '.join(changed)}"
    logger.warning(
        "DeepSpeed %s is installed, but the %d private parts of it that are used here and the %d fixes of its "
        "arithmetic were verified with %s alone; %s; install deepspeed==%s, or see docs/deepspeed.md",
        *(installed, len(PARTS), len(FIXES), ", ".join(VERIFIED), found, VERIFIED[-1]),
    )
