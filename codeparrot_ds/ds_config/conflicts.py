"""Keys that contradict each other, what trains, or this machine: DeepSpeed refuses them, or the run fails later.

Each rule was read in DeepSpeed 0.19.8's source; the place is named where it is not the key's own validator.
"""

from __future__ import annotations

import math
from typing import Any

from codeparrot_ds.config.run_config import RunConfig
from codeparrot_ds.ds_config.facts import short_dtype, value_at
from codeparrot_ds.ds_config.known_keys import ZERO_OPTIMIZERS
from codeparrot_ds.ds_config.resolve import ACCUMULATION, MICRO_BATCH
from codeparrot_ds.ds_config.rules import Subject, error, error_in_run, warning

_ZERO = "zero_optimization"
_OFFLOAD_OPTIMIZER, _OFFLOAD_PARAM = f"{_ZERO}.offload_optimizer", f"{_ZERO}.offload_param"
# The largest share that a bf16 number can lose and still be rounded back to what it was: half of its coarsest spacing.
_BF16_SPACING = 1 / 256
_STAGE1_FP32 = "stage 1 in bf16 with fp32 accumulation (BF16_Optimizer)"


def _on(subject: Subject, value: Any) -> bool:
    return value is True


def _has_cpu_adam(subject: Subject) -> bool:
    return subject.offloads("optimizer") and subject.is_adam and subject.get("optimizer.params.torch_adam") is not True


def _clips(subject: Subject) -> bool:
    return bool(subject.get("gradient_clipping", 1.0) > 0)


def _beta2_stands_still(subject: Subject) -> bool:
    # DeepSpeed's Adams have the same default where the file has none.
    betas = subject.get("optimizer.params.betas") or [0.9, 0.999]
    return subject.is_adam and 1 - betas[-1] < _BF16_SPACING


def _reduce_scatters(subject: Subject) -> bool:
    return subject.stage >= 2 and subject.get(f"{_ZERO}.reduce_scatter", True) is True


def _cannot_be_quantized(subject: Subject) -> bool:
    # ``CUDAQuantizer.quantize`` asserts it of each rank's piece, and a bias is as long as the model is wide.
    if subject.model_hidden_size is None or subject.world_size is None:
        return False
    return subject.model_hidden_size % (8 * subject.world_size) != 0


def _batches_disagree(subject: Subject, batch: int) -> bool:
    # Not by `get`: what a run has still to choose only multiplies the rows.
    factors = (value_at(subject.config, path) for path in (MICRO_BATCH, ACCUMULATION))
    known = math.prod(factor for factor in factors if isinstance(factor, int))
    return batch % (known * (subject.world_size or 1)) != 0


def _has_no_compile(subject: Subject) -> bool:
    run: RunConfig | None = subject.run
    return run is not None and not run.compile


PRECISION = (
    error(
        "fp16.enabled",
        lambda s, value: value is True and s.get("bf16.enabled") is True,
        "fp16 and bf16 are both on; keep one",
    ),
    error(
        "fp16.enabled",
        lambda s, value: (
            value is True and s.get("bf16.enabled") is not True and s.device == "cpu" and "fp16" not in s.precisions
        ),
        "fp16 needs a GPU: DeepSpeed refuses it on a CPU without AVX512-FP16; choose {in_bf16} or {in_fp32}",
    ),
    warning(
        "bf16.enabled",
        lambda s, value: value is True and s.device == "cpu" and "bf16" not in s.precisions,
        "this CPU has no bf16 instructions: matrix products are made in fp32 and rounded, which is no faster than fp32 "
        "and often slower; choose {in_fp32}",
    ),
    warning(
        "bf16.enabled",
        lambda s, value: value is True and s.device == "cuda" and "bf16" not in s.precisions,
        "this GPU has no bf16 products (it is older than Ampere), and PyTorch's stand-in is slow; choose {in_fp16}",
    ),
    warning(
        "torch_autocast.enabled",
        lambda s, value: value is True and s.device == "cpu" and "bf16" not in s.precisions,
        "this CPU has no bf16 instructions, so that its casts only cost time: leave the block out",
    ),
    error(
        "torch_autocast.enabled",
        lambda s, value: value is True and s.get("fp16.enabled") is True,
        "fp16 and torch_autocast are two kinds of mixed precision, each with a loss scale of its own; keep one",
    ),
    error(
        "torch_autocast.enabled",
        lambda s, value: value is True and s.get(f"{_ZERO}.zero_quantized_weights") is True,
        "DeepSpeed refuses torch_autocast together with zero_quantized_weights; keep one",
    ),
    error(
        "data_types.grad_accum_dtype",
        lambda s, value: s.stage == 0 and short_dtype(value) != s.precision,
        "stage 0 adds gradients up in the training precision only; write '{precision}' or use stages 1-3",
    ),
    error(
        "data_types.param_dtype",
        lambda s, value: short_dtype(value) != s.precision,
        "is {value!r} but the config trains in {precision}, which DeepSpeed refuses; remove the key",
    ),
    error(
        "bf16.bf16_master_weights_and_grads",
        lambda s, value: value is True and s.stage == 0,
        "bf16 master weights need ZeRO stage 1, 2 or 3, and this is stage 0",
    ),
    error(
        "bf16.bf16_master_weights_and_grads",
        lambda s, value: (
            value is True
            and s.stage > 0
            and not s.has_bf16_optimizer
            and s.get("bf16.bf16_optimizer_states") is not True
            and not _has_cpu_adam(s)
        ),
        "needs bf16_optimizer_states: true as well, or DeepSpeed's Adam in CPU memory (offload_optimizer)",
    ),
    error(
        "bf16.bf16_optimizer_states",
        lambda s, value: value is True and s.get("bf16.bf16_master_weights_and_grads") is not True,
        "needs bf16_master_weights_and_grads: true, or DeepSpeed refuses it",
    ),
    warning(
        "bf16.bf16_optimizer_states",
        lambda s, value: value is True and _beta2_stands_still(s),
        "Adam's second moment should shrink by less per step than bf16 can express: it stays as it is, and the steps "
        "become too small; write optimizer.params.betas [0.9, 0.95]",
    ),
    error(
        "fp16.fp16_master_weights_and_grads",
        lambda s, value: value is True and not (s.stage > 0 and _has_cpu_adam(s)),
        "needs ZeRO stages 1-3 and DeepSpeed's Adam in CPU memory (offload_optimizer)",
    ),
    error(
        "fp16.fp16_master_weights_and_grads",
        lambda s, value: value is True and s.get("bf16.bf16_master_weights_and_grads") is True,
        "master weights cannot be fp16 and bf16 at once; keep one",
    ),
)

OFFLOAD = (
    error(
        f"{_OFFLOAD_OPTIMIZER}.device",
        lambda s, value: (value == "cpu" and s.stage == 0) or (value == "nvme" and s.stage < 3),
        "the optimizer can go to the CPU at stages 1-3 and to NVMe at stage 3, and this is stage {stage}, where "
        "DeepSpeed would do something else without a word",
    ),
    error(
        f"{_OFFLOAD_PARAM}.device",
        lambda s, value: value in ("cpu", "nvme") and s.stage < 3,
        "the weights can go to CPU or NVMe at stage 3, and this is stage {stage}, where DeepSpeed would leave them on "
        "the device without a word",
    ),
    *(
        error(
            f"{block}.device",
            lambda s, value: value == "nvme" and s.libaio is False,
            "NVMe needs libaio, which this machine lacks (Debian and Ubuntu: apt install libaio-dev)",
        )
        for block in (_OFFLOAD_OPTIMIZER, _OFFLOAD_PARAM)
    ),
    error(
        "optimizer.type",
        lambda s, value: s.offloads("optimizer") and s.optimizer == "lamb",
        "{value} has no CPU kernel, which offloading needs; write AdamW",
    ),
    warning(
        "optimizer.params.torch_adam",
        lambda s, value: value is True and s.offloads("optimizer") and s.is_adam,
        "torch's Adam steps on the CPU far more slowly than DeepSpeed's; remove the key",
    ),
    error(
        f"{_ZERO}.zenflow",
        lambda s, value: not s.offloads("optimizer"),
        "needs the optimizer in CPU memory (offload_optimizer)",
    ),
    error(
        f"{_OFFLOAD_OPTIMIZER}.ratio",
        lambda s, value: value < 1 and s.stage != 3,
        "offloading a part works at stage 3 only, and this is stage {stage}",
    ),
    error(
        f"{_OFFLOAD_OPTIMIZER}.buffer_count",
        lambda s, value: value < 4 and s.on_nvme("optimizer") and s.is_adam,
        "Adam on NVMe needs at least 4 buffers: weights, gradients and two moments",
    ),
    error("aio.use_gds", lambda s, value: value is True and s.device == "cpu", "GPU Direct Storage needs a GPU"),
)

OPTIMIZER = (
    error(
        "optimizer.type",
        lambda s, value: (
            s.stage > 0
            and s.optimizer not in ZERO_OPTIMIZERS
            and not (s.offloads("optimizer") and s.optimizer == "lamb")
            and s.get("zero_allow_untested_optimizer") is not True
        ),
        'ZeRO was not tested with {value} and refuses it without "zero_allow_untested_optimizer": true',
    ),
    error_in_run(
        "optimizer.type",
        lambda s, value: not s.is_adam,
        "a run here saves and restores Adam's two moments, and {value} has others; write AdamW",
    ),
    error(
        "optimizer.params.amsgrad",
        lambda s, value: value is True and s.is_adam and s.get("optimizer.params.torch_adam") is not True,
        "DeepSpeed's Adam has no AMSGrad; remove the key",
    ),
    error(
        "optimizer.params.foreach",
        lambda s, value: s.is_adam and s.get("optimizer.params.torch_adam") is not True,
        "only torch's Adam takes it; remove the key",
    ),
    error(
        "optimizer.params.bias_correction",
        lambda s, value: s.is_adam and s.get("optimizer.params.torch_adam") is True,
        "torch's Adam does not take it; remove the key",
    ),
    error(
        f"{_ZERO}.compute_grad_norm",
        lambda s, value: value is False and s.stage not in (1, 2),
        "can be false at stages 1 and 2 only, and this is stage {stage}",
    ),
    error(
        f"{_ZERO}.compute_grad_norm",
        lambda s, value: value is False and s.stage in (1, 2) and _clips(s),
        "clipping needs the norm: set clipping to 0 (max_grad_norm; DeepSpeed's own default is 1), or remove the key",
    ),
    error(
        f"{_ZERO}.compute_grad_norm",
        lambda s, value: value is False and (s.offloads("optimizer") or s.has_bf16_optimizer),
        f"offloading and {_STAGE1_FP32} need the norm; remove the key",
    ),
)

COMMUNICATION = (
    error(
        "prescale_gradients",
        lambda s, value: value is True and _reduce_scatters(s),
        "stages 2 and 3 refuse it while reduce_scatter is on; remove the key",
    ),
    error(
        "gradient_predivide_factor",
        lambda s, value: value != 1 and _reduce_scatters(s),
        "stages 2 and 3 take 1 only while reduce_scatter is on; remove the key",
    ),
    error(
        "gradient_allreduce_op",
        lambda s, value: (
            value == "sum"
            and (s.stage == 3 or s.get(f"{_ZERO}.zenflow") is not None or s.get("compile.deepcompile") is True)
        ),
        "'sum' does not go with stage 3, ZenFlow or DeepCompile",
    ),
    error(
        f"{_ZERO}.allgather_bucket_size",
        lambda s, value: value % 2 == 1 and s.stage in (1, 2),
        "must be even at stages 1 and 2, or DeepSpeed refuses it",
    ),
    error(
        f"{_ZERO}.legacy_stage1",
        lambda s, value: value is True and s.stage > 0,
        "DeepSpeed has removed the old stage 1 and raises; remove the key",
    ),
    error(
        f"{_ZERO}.zero_hpz_partition_size",
        lambda s, value: (
            s.stage == 3 and value > 1 and s.world_size is not None and s.world_size % min(value, s.world_size) != 0
        ),
        "must divide the number of ranks",
    ),
    warning(
        f"{_ZERO}.zero_hpz_partition_size",
        # No error: on four CPU ranks in two groups the losses are those without either.
        lambda s, value: s.stage == 3 and value > 1 and s.offloads("parameters"),
        "users saw the loss stand still together with offload_param (DeepSpeed issue 6926); keep one of the two",
    ),
    error(
        f"{_ZERO}.zero_quantized_gradients",
        lambda s, value: value is True and s.stage == 3 and s.get(f"{_ZERO}.reduce_scatter") is False,
        "needs reduce_scatter, which is off",
    ),
    error(
        f"{_ZERO}.zero_quantized_gradients",
        # ``ds_swizzle_quant`` (csrc/quantization) reads whatever it gets as fp16; ``stage3.py`` converts first.
        lambda s, value: (
            value is True
            and s.stage == 3
            and s.precision == "bf16"
            and short_dtype(s.get("communication_data_type", "bf16")) != "fp16"
        ),
        'reads {precision} gradients as if they were fp16; write "communication_data_type": "fp16"',
    ),
    *(
        error(
            f"{_ZERO}.{key}",
            lambda s, value: value is True and s.stage == 3 and s.device == "cpu",
            "needs a GPU: the kernels are CUDA's",
        )
        for key in ("zero_quantized_weights", "zero_quantized_gradients", "zero_quantized_nontrainable_weights")
    ),
    error(
        f"{_ZERO}.zero_quantized_weights",
        lambda s, value: value is True and s.stage == 3 and _cannot_be_quantized(s),
        "needs a model whose width ({model_hidden_size:,}) is a multiple of 8 x ranks, or DeepSpeed asserts it",
    ),
    error(
        "compile.deepcompile",
        lambda s, value: value is True and s.device == "cpu",
        "needs a GPU: DeepCompile is for CUDA only",
    ),
    error(
        "managed_gradient_accumulation",
        lambda s, value: value is False and s.stage != 2 and s.get(f"{_ZERO}.overlap_comm", s.stage == 3) is True,
        "goes with overlap_comm at stage 2 only, and this is stage {stage}",
    ),
)

ACTIVATION_CHECKPOINTING = (
    error(
        "activation_checkpointing.cpu_checkpointing",
        lambda s, value: value is True and s.device == "cpu",
        # There the copy on the host is the tensor itself, which DeepSpeed then empties: the backward pass fails.
        "needs a GPU: on the CPU DeepSpeed empties the activations that it means to have copied",
    ),
    error_in_run(
        "activation_checkpointing.contiguous_memory_optimization",
        lambda s, value: value is True and s.get("activation_checkpointing.partition_activations") is not True,
        "needs partition_activations, which needs model parallelism; remove the key",
    ),
    error_in_run(
        "activation_checkpointing.contiguous_memory_optimization",
        lambda s, value: (
            value is True
            and s.get("activation_checkpointing.partition_activations") is True
            and s.get("activation_checkpointing.number_checkpoints") is None
        ),
        "needs number_checkpoints, the number of layers",
    ),
)

# What belongs to other programs than this trainer: model parallelism, other engines, other loops.
OTHER_PROGRAMS = (
    error_in_run(
        "tensor_parallel.autotp_size",
        lambda s, value: value > 1,
        "a run here has no tensor parallelism: every rank is a data-parallel one; remove the block",
    ),
    error_in_run(
        "sequence_parallel_size",
        lambda s, value: value > 1,
        "a run here has no sequence parallelism: every rank is a data-parallel one; remove the key",
    ),
    error_in_run("expert_parallel.enabled", _on, "GPT-2 has no experts; remove the block"),
    error_in_run(
        "hybrid_engine.enabled", _on, "is for generating inside RLHF training; a run here does not; remove the block"
    ),
    error_in_run(
        "managed_gradient_accumulation",
        lambda s, value: value is False,
        "the training loop leaves accumulation to DeepSpeed; remove the key",
    ),
    error_in_run(
        f"{_ZERO}.zenflow",
        lambda s, value: True,
        "a run here cannot save or restore ZenFlow's optimizer states; remove the block",
    ),
    error_in_run(
        f"{_OFFLOAD_OPTIMIZER}.super_offload",
        lambda s, value: value is True and s.stage == 3,
        "a run here cannot save or restore SuperOffload's optimizer states; remove the key",
    ),
    error_in_run(
        f"{_OFFLOAD_OPTIMIZER}.ratio",
        lambda s, value: value < 1 and s.stage == 3,
        "a run here cannot save or restore an optimizer that is offloaded in part; remove the key",
    ),
    error_in_run("data_efficiency.enabled", _on, "a run here has its own data stream; remove the block"),
    warning(
        "compile.deepcompile",
        lambda s, value: value is True and s.device != "cpu" and _has_no_compile(s),
        "works only in a run that compiles; add --compile (compile: true in the run config)",
    ),
)

BATCH = (
    error(
        "train_batch_size",
        _batches_disagree,
        "is not divisible by train_micro_batch_size_per_gpu x gradient_accumulation_steps x ranks",
    ),
)

CONFLICTS = (*PRECISION, *OFFLOAD, *OPTIMIZER, *COMMUNICATION, *ACTIVATION_CHECKPOINTING, *OTHER_PROGRAMS, *BATCH)
