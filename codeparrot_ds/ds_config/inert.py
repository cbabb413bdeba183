"""Keys that DeepSpeed 0.19.8 reads and that do nothing where they stand, or cost more than they seem to: warnings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from codeparrot_ds.ds_config.facts import short_dtype
from codeparrot_ds.ds_config.known_keys import KEYS
from codeparrot_ds.ds_config.rules import Rule, Subject, warning

_ZERO = "zero_optimization"
_OFFLOAD_OPTIMIZER, _OFFLOAD_PARAM = f"{_ZERO}.offload_optimizer", f"{_ZERO}.offload_param"
# Memory that a bucket larger than the model must waste before it is worth a word.
WASTED_BYTES = 1 << 29
DEFAULT_BUCKET = 500_000_000
DEFAULT_SUB_GROUP = 1_000_000_000
# DeepSpeed's of offload_param: elements of a buffer, and how many there are.
DEFAULT_PARAM_BUFFER, DEFAULT_PARAM_BUFFERS = 100_000_000, 5

# The stages at which each ZeRO key does something, where that is not all of 1 to 3.
_STAGES = {
    (1, 2): "use_multi_rank_bucket_allreduce round_robin_gradients parameter_alignment",
    (2,): "ignore_unused_parameters",
    (3,): """
        enable_sanity_checks leaf_module log_trace_cache_warnings memory_efficient_linear override_module_apply
        save_muon_momentum_buffer_in_memory sub_group_size zero_hpz_partition_size zero_quantized_gradients
        zero_quantized_nontrainable_weights zero_quantized_weights
        """,
}
_NOTHING_AT_ALL = "allgather_bucket_size allgather_partitions"
_STAGE_OF = {name: stages for stages, names in _STAGES.items() for name in names.split()}


def _stages_of(key: str) -> tuple[int, ...]:
    return (3,) if key.startswith("stage3_") else _STAGE_OF.get(key, (1, 2, 3))


def _by_stage() -> list[Rule]:
    """One rule a ZeRO key: it does nothing at the other stages."""
    rules = []
    handled_elsewhere = {"stage", "offload_optimizer", "offload_param", "compute_grad_norm", "legacy_stage1"}
    for key in KEYS[("zero_optimization",)]:
        stages = _stages_of(key)
        if (
            key in handled_elsewhere
            or key in _NOTHING_AT_ALL.split()
            or f"stage3_{key}" in KEYS[("zero_optimization",)]
        ):
            continue
        where = f"stage {stages[0]}" if len(stages) == 1 else f"stages {stages[0]}-{stages[-1]}"

        def wrong(s: Subject, value: Any, stages: tuple[int, ...] = stages, key: str = key) -> bool:
            off = value is False or (key == "zero_hpz_partition_size" and value <= 1)
            return s.stage not in stages and not off

        rules.append(warning(f"{_ZERO}.{key}", wrong, f"does nothing at stage {{stage}}: it is for {where}"))
    return rules


def _only(keys: str, when: Callable[[Subject], bool], message: str) -> list[Rule]:
    """Keys that do something only `when`; one that is switched off anyway is not worth a word."""

    def wrong(s: Subject, value: Any) -> bool:
        return value is not False and not when(s)

    return [warning(key, wrong, message) for key in keys.split()]


def _within(block: str, keys: str) -> str:
    return " ".join(f"{block}.{key}" for key in keys.split())


def _bucket_is_wasteful(subject: Subject, bucket: int) -> bool:
    if subject.parameters is None or subject.stage == 0:
        return False
    buckets = 2 if subject.stage < 3 and subject.get(f"{_ZERO}.overlap_comm") is True else 1
    value_bytes = 4 if subject.precision == "fp32" else 2
    return (bucket - subject.parameters) * buckets * value_bytes > WASTED_BYTES


def _is_one_group(subject: Subject) -> bool:
    """Whether a secondary partition (hpZ), whose size is the GPUs of a host, holds all ranks."""
    size = subject.get(f"{_ZERO}.zero_hpz_partition_size", 1)
    return subject.stage == 3 and subject.world_size is not None and size > 1 and subject.world_size <= size


def _param_buffers_hold_the_model(subject: Subject) -> bool:
    size = subject.get(f"{_OFFLOAD_PARAM}.buffer_size", DEFAULT_PARAM_BUFFER)
    buffers = size * subject.get(f"{_OFFLOAD_PARAM}.buffer_count", DEFAULT_PARAM_BUFFERS)
    return subject.parameters is not None and buffers >= subject.parameters / (subject.world_size or 1)


def _is_all_false(block: Any) -> bool:
    return isinstance(block, Mapping) and len(block) > 0 and all(value in (False, None) for value in block.values())


ZERO = (
    *_by_stage(),
    *_only(
        _within(_ZERO, _NOTHING_AT_ALL),
        lambda s: s.get(f"{_ZERO}.zenflow") is not None,
        "does nothing: DeepSpeed 0.19.8 gathers all partitions in one call",
    ),
    warning(
        f"{_ZERO}.contiguous_gradients",
        lambda s, value: value is False and s.stage in (1, 2) and s.offloads("optimizer"),
        "offloading the optimizer switches it on whatever the file says",
    ),
    warning(
        f"{_ZERO}.zero_quantized_nontrainable_weights",
        lambda s, value: value is True and s.stage == 3 and s.run is not None,
        "a run here trains every weight: there is nothing that it would quantize",
    ),
    warning(
        f"{_ZERO}.zero_hpz_partition_size",
        lambda s, value: _is_one_group(s),
        "does nothing but take memory for a second copy of the weights: all ranks are in one group, as on one host; "
        "remove the key",
    ),
    warning(
        f"{_ZERO}.zero_quantized_gradients",
        lambda s, value: value is True and _is_one_group(s),
        "does nothing: gradients are quantized between hosts only, and by zero_hpz_partition_size this is one host",
    ),
    warning(
        f"{_ZERO}.reduce_bucket_size",
        _bucket_is_wasteful,
        "is larger than the model ({parameters:,} parameters): memory is set aside for nothing, and with one bucket "
        "nothing overlaps; 5e7 is a good size",
    ),
    warning(
        f"{_ZERO}.stage",
        lambda s, value: s.get(f"{_ZERO}.reduce_bucket_size") is None and _bucket_is_wasteful(s, DEFAULT_BUCKET),
        "reduce_bucket_size is not set, and DeepSpeed's default of 500,000,000 is larger than the model "
        "({parameters:,} parameters): memory is set aside for nothing, and with one bucket nothing overlaps; write 5e7",
    ),
)

OFFLOAD = (
    *_only(
        _within(_OFFLOAD_OPTIMIZER, "pin_memory ratio"),
        lambda s: s.offloads("optimizer"),
        "does nothing: nothing is offloaded here; write the device",
    ),
    *_only(
        f"{_OFFLOAD_PARAM}.pin_memory",
        lambda s: s.offloads("parameters"),
        "does nothing: nothing is offloaded here; write the device",
    ),
    *_only(
        _within(_OFFLOAD_OPTIMIZER, "buffer_count nvme_path pipeline_read pipeline_write fast_init"),
        lambda s: s.on_nvme("optimizer"),
        "does nothing: it is for device nvme",
    ),
    *_only(
        _within(_OFFLOAD_PARAM, "buffer_count buffer_size nvme_path max_in_cpu"),
        lambda s: s.on_nvme("parameters"),
        "does nothing: it is for device nvme",
    ),
    *_only(
        f"{_OFFLOAD_OPTIMIZER}.super_offload",
        lambda s: s.stage == 3,
        "does nothing at stage {stage}: it is for stage 3",
    ),
    *_only(
        f"{_OFFLOAD_OPTIMIZER}.cpuadam_cores_perc",
        lambda s: s.stage == 3 and s.get(f"{_OFFLOAD_OPTIMIZER}.super_offload") is True,
        "does nothing without super_offload at stage 3",
    ),
    *_only(
        _within("aio", " ".join(KEYS[("aio",)])),
        lambda s: s.on_nvme("optimizer") or s.on_nvme("parameters"),
        "does nothing: nothing is offloaded to NVMe",
    ),
    warning(
        f"{_OFFLOAD_OPTIMIZER}.device",
        lambda s, value: (
            value == "nvme"
            and s.parameters is not None
            and s.stage == 3
            and s.get(f"{_ZERO}.sub_group_size", DEFAULT_SUB_GROUP) >= DEFAULT_SUB_GROUP > s.parameters
        ),
        "saves no memory: sub_group_size is larger than the model ({parameters:,} parameters), so all of it passes "
        "through pinned buffers at once; write a smaller sub_group_size, such as 1e7",
    ),
    warning(
        f"{_OFFLOAD_PARAM}.device",
        lambda s, value: value == "nvme" and s.stage == 3 and _param_buffers_hold_the_model(s),
        "saves no memory: buffer_count x buffer_size pinned elements per rank are more than its share of the weights "
        '({parameters:,} parameters over all ranks); write "cpu"',
    ),
)

PRECISION = (
    *(
        warning(block, lambda s, value: "enabled" not in value, 'is off: the block has no "enabled": true')
        for block in ("fp16", "bf16", "torch_autocast")
    ),
    *_only(
        _within("fp16", "initial_scale_power loss_scale_window hysteresis consecutive_hysteresis min_loss_scale"),
        lambda s: s.get("fp16.enabled") is not True or s.get("fp16.loss_scale", 0) == 0,
        "does nothing: loss_scale sets a fixed scale; 0 makes it dynamic",
    ),
    *_only(
        "bf16.immediate_grad_update",
        lambda s: s.has_bf16_optimizer,
        "does nothing: it is for stage 1 in bf16 with fp32 accumulation",
    ),
    *_only(
        "bf16.check_grad_overflow",
        lambda s: s.get("bf16.enabled") is not True or s.stage in (1, 2),
        "does nothing at stage {stage}: it is for stages 1 and 2",
    ),
    warning(
        "bf16.check_grad_overflow",
        # ``decide_by_the_norm`` in ``engine/deepspeed_fixes.py``; an offloaded optimizer looks while gradients arrive.
        lambda s, value: (
            value is True
            and s.run is not None
            and s.stage in (1, 2)
            and not (s.has_bf16_optimizer or s.offloads("optimizer"))
            and s.get(f"{_ZERO}.compute_grad_norm") is not False
        ),
        "does nothing in a run here: the norm of the gradient says the same, without a pass over all gradients",
    ),
    warning(
        "communication_data_type",
        lambda s, value: short_dtype(value) == s.precision and s.get(f"{_ZERO}.zero_quantized_gradients") is not True,
        "does nothing: it is the precision of the run, in which DeepSpeed communicates anyway",
    ),
    warning(
        "bf16.bf16_master_weights_and_grads",
        lambda s, value: value is True and s.has_bf16_optimizer,
        "does nothing: stage 1 with fp32 accumulation (BF16_Optimizer) always keeps fp32 masters",
    ),
    warning(
        "bf16.bf16_master_weights_and_grads",
        lambda s, value: value is True and s.precision != "bf16",
        "rounds the master weights of a {precision} run to bf16; switch bf16 on, or remove the key",
    ),
    warning(
        "torch_autocast.enabled",
        lambda s, value: (
            value is True and s.get("bf16.enabled") is True and s.get("bf16.bf16_master_weights_and_grads") is not True
        ),
        "adds casts and saves no memory: bf16 has the weights in bf16 already; keep one of the two",
    ),
    warning(
        "torch_autocast.enabled",
        lambda s, value: (
            value is True
            and s.run is not None
            and "transformers.pytorch_utils.Conv1D" not in s.get("torch_autocast.lower_precision_safe_modules", [])
        ),
        "gradients of GPT-2's matrices are communicated in fp32 unless lower_precision_safe_modules names "
        "transformers.pytorch_utils.Conv1D (and torch.nn.Linear)",
    ),
)

OPTIMIZER = (
    warning(
        "optimizer.params.adam_w_mode",
        lambda s, value: value is False and s.optimizer == "adamw",
        "does nothing: the type AdamW always decays as AdamW; write the type Adam",
    ),
    *_only(
        "optimizer.params.fp32_optimizer_states",
        lambda s: s.offloads("optimizer") or not s.is_adam,
        "does nothing: it is for offloaded optimizers",
    ),
    *_only(
        "optimizer.legacy_fusion",
        lambda s: s.stage == 0 and s.precision != "fp32",
        "does nothing: it is for stage 0 in fp16 or bf16",
    ),
)

ACTIVATION_CHECKPOINTING = (
    warning(
        "activation_checkpointing.partition_activations",
        lambda s, value: value is True and s.get("tensor_parallel.autotp_size", 0) <= 1,
        "saves nothing without model parallelism, which this file does not set up",
    ),
    *_only(
        "activation_checkpointing.number_checkpoints",
        lambda s: s.get("activation_checkpointing.contiguous_memory_optimization") is True,
        "does nothing without contiguous_memory_optimization",
    ),
)

_WAITS = "waits for the device"
# What costs time or memory that nobody asked for by its name. On a CPU there is no device to wait for, and no harm.
COSTLY = (
    warning(
        "activation_checkpointing",
        lambda s, value: _is_all_false(value),
        "recomputes every layer in the backward pass, a third more compute, though every value is false: in a run here "
        "the block switches it on by being there; remove the block, or write {{}} where that is meant",
    ),
    warning(
        "activation_checkpointing.synchronize_checkpoint_boundary",
        lambda s, value: value is True,
        f"{_WAITS} at both ends of every layer, forwards and backwards; remove the key",
    ),
    warning(
        "activation_checkpointing.profile",
        lambda s, value: value is True,
        f"{_WAITS} in every layer and prints its time; a run here has --profile",
    ),
    warning(
        "wall_clock_breakdown",
        lambda s, value: value is True,
        f"{_WAITS} in every micro-batch and prints its times; a run here has --profile, and measures its steps anyway",
    ),
    warning(
        "memory_breakdown",
        lambda s, value: value is True,
        "collects garbage, prints, and sets the peak of memory back several times per micro-batch; remove the key",
    ),
    warning(
        "flops_profiler.enabled",
        lambda s, value: value is True,
        f"switches wall_clock_breakdown on, which {_WAITS} in every micro-batch of the run, not only in the step that "
        "is profiled; a run here has --profile, and measures MFU anyway",
    ),
    warning(
        "timers.throughput.enabled",
        lambda s, value: value is True and s.get("timers.throughput.synchronized") is not False,
        f"{_WAITS} twice in every micro-batch; the run measures tokens/s without",
    ),
    warning(
        "comms_logger",
        lambda s, value: value.get("enabled") is True,
        f"{_WAITS} after every collective, so that no communication overlaps computation; remove the block",
    ),
)

# What a run here does itself; other programs may need it.
IN_A_RUN = (
    *(
        warning(key, lambda s, value: s.run is not None, message)
        for keys, message in (
            (
                _within(_ZERO, "load_from_fp32_weights elastic_checkpoint pipeline_loading_checkpoint"),
                "does nothing: the run saves and restores its checkpoints itself",
            ),
            ("dataloader_drop_last", "does nothing: the run has its own data stream, which drops nothing"),
            ("pipeline", "does nothing: a run here has no pipeline parallelism"),
            ("steps_per_print", "does nothing: the run sets it and has its own log"),
        )
        for key in keys.split()
    ),
)

INERT = (*ZERO, *OFFLOAD, *PRECISION, *OPTIMIZER, *ACTIVATION_CHECKPOINTING, *COSTLY, *IN_A_RUN)
