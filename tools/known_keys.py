"""Writes ``codeparrot_ds/ds_config/known_keys.json``: ``python -m tools.known_keys``, with the DeepSpeed to describe.

Blocks that DeepSpeed reads with pydantic models are taken from these: names, types, ranges, choices. `BY_HAND` has the
rest: blocks that it reads key by key (``tests/ds_config/test_known_keys.py`` watches its parser do so and compares),
and keys of modelled blocks whose field says less than what a value can mean.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import inspect
import json
import types
import typing
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from codeparrot_ds.ds_config.known_keys import FILE, KeyPath, Kind

BOOL, INT, NUMBER = Kind("bool"), Kind("int"), Kind("number")
TEXT, TEXTS = Kind("text"), Kind("texts")
ANY, BLOCK = Kind("any"), Kind("block")
SIZE, COUNT = Kind("int", minimum=0), Kind("int", minimum=1)
SHARE = Kind("number", minimum=0, maximum=1)
POSITIVE, NOT_NEGATIVE = Kind("number", above=0), Kind("number", minimum=0)


def choice(*choices: Any) -> Kind:
    """One of a few values."""
    return Kind("choice", choices=choices)


def optional(kind: Kind) -> Kind:
    """`kind`, or null."""
    return dataclasses.replace(kind, optional=True)


def or_auto(kind: Kind) -> Kind:
    """`kind`, or DeepSpeed's own ``"auto"``."""
    return dataclasses.replace(kind, auto=True)


# --------------------------------------------------------------------------------------------------------------------
# What DeepSpeed has models of


def models() -> dict[KeyPath, Any]:
    """The pydantic model of each block that has one; such a block refuses unknown keys."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.compile.config import CompileConfig
    from deepspeed.inference.config import WeightQuantConfig
    from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
    from deepspeed.runtime.config import HybridEngineConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.tensor_parallel.config import TPConfig, TPTrainingConfig
    from deepspeed.runtime.zenflow.zenflow_config import ZenFlowConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.leaf_module_config import DeepSpeedZeroLeafModuleConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    return {
        ("zero_optimization",): DeepSpeedZeroConfig,
        ("zero_optimization", "offload_param"): DeepSpeedZeroOffloadParamConfig,
        ("zero_optimization", "offload_optimizer"): DeepSpeedZeroOffloadOptimizerConfig,
        ("zero_optimization", "zenflow"): ZenFlowConfig,
        ("zero_optimization", "leaf_module"): DeepSpeedZeroLeafModuleConfig,
        ("bf16",): DeepSpeedBF16Config,
        ("bfloat16",): DeepSpeedBF16Config,
        ("fp16",): DeepSpeedFP16Config,
        ("tensorboard",): TensorBoardConfig,
        ("csv_monitor",): CSVConfig,
        ("wandb",): WandbConfig,
        ("comet",): CometConfig,
        ("comms_logger",): CommsLoggerConfig,
        ("compile",): CompileConfig,
        ("timers", "throughput"): DeepSpeedThroughputTimerConfig,
        ("hybrid_engine",): HybridEngineConfig,
        ("weight_quantization",): WeightQuantConfig,
        ("tensor_parallel",): TPTrainingConfig,
        ("tensor_parallel", "tp"): TPConfig,
        ("tensor_parallel", "tensor_parallel"): TPConfig,
    }


def kind_of(field: Any) -> Kind:
    """What the field of a pydantic model takes; `ANY` for a type that the check does not judge."""
    annotation, is_optional = _without_null(field.annotation)
    kind = _kind_of_type(annotation)
    names = {"ge": "minimum", "gt": "above", "le": "maximum", "lt": "below"}
    bounds = {
        ours: getattr(mark, name) for mark in field.metadata for name, ours in names.items() if hasattr(mark, name)
    }
    return kind if kind == ANY else dataclasses.replace(kind, optional=is_optional, **bounds)


def _without_null(annotation: Any) -> tuple[Any, bool]:
    if typing.get_origin(annotation) not in (typing.Union, types.UnionType):
        return annotation, False
    plain = [option for option in typing.get_args(annotation) if option is not type(None)]
    return plain[0] if len(plain) == 1 else Any, type(None) in typing.get_args(annotation)


def _kind_of_type(annotation: Any) -> Kind:
    origin, inside = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is list or origin is list:
        return Kind("texts", choices=typing.get_args(inside[0]) if inside else ())
    if origin is typing.Literal:
        return choice(*inside)
    if inspect.isclass(annotation) and issubclass(annotation, Enum):
        return choice(*(member.value for member in annotation))
    if hasattr(annotation, "model_fields"):
        return BLOCK
    return {bool: BOOL, int: INT, float: NUMBER, str: TEXT, Path: TEXT}.get(annotation, ANY)


# --------------------------------------------------------------------------------------------------------------------
# What it has no models of, and ranges that it does not check but outside of which a value cannot be meant


def _of(kind: Kind, names: str) -> dict[str, Kind]:
    return dict.fromkeys(names.split(), kind)


_DTYPE = choice("bf16", "bfloat16", "fp16", "float16", "half", "fp32", "float32", "float", "torch.bfloat16",
                "torch.float16", "torch.float32", "int8", "torch.int8")  # fmt: skip
_LOW_PRECISION = choice("bf16", "bfloat16", "fp16", "float16", "half", "torch.bfloat16", "torch.float16")
_COMMUNICATION_DTYPE = optional(choice("fp16", "bf16", "fp32"))
# As its own documentation spells them; it takes them in any case. torch's have torch's spelling.
DEEPSPEED_OPTIMIZERS = ("Adagrad", "Adam", "AdamW", "Lamb", "Lion", "MuAdam", "MuAdamW", "MuSGD", "Muon")

# By block; one that has a model keeps only what its fields leave open.
BY_HAND: Mapping[KeyPath, Mapping[str, Kind]] = {
    (): {
        **_of(
            BLOCK,
            """
            activation_checkpointing aio autotuning bf16 bfloat16 checkpoint comet comms_logger compile csv_monitor
            data_efficiency data_types expert_parallel flops_profiler fp16 hybrid_engine optimizer pipeline scheduler
            tensor_parallel tensorboard timers torch_autocast wandb weight_quantization zero_optimization
            """,
        ),
        **_of(
            BOOL,
            """
            dataloader_drop_last disable_allgather disable_python_gc dump_state managed_gradient_accumulation
            memory_breakdown prescale_gradients use_data_before_expert_parallelism wall_clock_breakdown
            zero_allow_untested_optimizer zero_force_ds_cpu_optimizer
            """,
        ),
        **_of(COUNT, "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps"),
        **_of(COUNT, "sequence_parallel_size"),
        **_of(optional(COUNT), "steps_per_print vocabulary_size"),
        **_of(_COMMUNICATION_DTYPE, "communication_data_type seq_parallel_communication_data_type"),
        "gradient_clipping": NOT_NEGATIVE,
        "gradient_predivide_factor": POSITIVE,
        "gradient_allreduce_op": choice("mean", "sum"),
        "log_level": optional(choice("debug", "info", "warning", "error", "critical")),
        "datastates_ckpt": ANY,
    },
    ("zero_optimization",): {"leaf_module": optional(BLOCK)},
    ("zero_optimization", "zenflow"): {
        "select_strategy": choice("auto", "step", "epoch"),
        **_of(or_auto(COUNT), "select_interval update_interval"),
        "full_warm_up_rounds": SIZE,
        "steps_per_epoch": optional(COUNT),
    },
    ("fp16",): {
        "loss_scale": NOT_NEGATIVE,
        "initial_scale_power": SIZE,
        **_of(COUNT, "loss_scale_window hysteresis min_loss_scale"),
    },
    ("torch_autocast",): {"enabled": BOOL, "dtype": _LOW_PRECISION, "lower_precision_safe_modules": optional(TEXTS)},
    ("data_types",): {
        **_of(optional(_DTYPE), "grad_accum_dtype param_dtype buffer_dtype"),
        "keep_in_fp32_modules": or_auto(TEXTS),
    },
    ("optimizer",): {"params": optional(BLOCK), "legacy_fusion": BOOL},  # "type": see `optimizers`
    ("scheduler",): {"type": optional(TEXT), "params": optional(BLOCK)},
    ("activation_checkpointing",): {
        **_of(
            BOOL,
            """
            partition_activations contiguous_memory_optimization cpu_checkpointing profile
            synchronize_checkpoint_boundary
            """,
        ),
        "number_checkpoints": optional(COUNT),
    },
    ("checkpoint",): {
        "tag_validation": choice("Warn", "Ignore", "Fail"),
        **_of(BOOL, "checkpoint_serialization load_universal use_node_local_storage"),
        "parallel_write": BLOCK,
        "writer": optional(BLOCK),
    },
    ("checkpoint", "parallel_write"): {"pipeline_stage": BOOL},
    ("checkpoint", "writer"): {
        "type": optional(choice("mock", "python", "fast")),
        "data_parallel": optional(choice("replica", "socket", "machine")),
        **_of(BOOL, "decoupled io_buffer_double show_statistics"),
        **_of(COUNT, "io_buffer_size io_multiplier"),
    },
    ("aio",): {
        **_of(COUNT, "block_size queue_depth intra_op_parallelism"),
        **_of(BOOL, "single_submit overlap_events use_gds"),
    },
    ("timers",): {"throughput": BLOCK},
    ("flops_profiler",): {
        **_of(BOOL, "enabled detailed"),
        "recompute_fwd_factor": NOT_NEGATIVE,
        **_of(COUNT, "profile_step top_modules"),
        "module_depth": Kind("int", minimum=-1),
        "output_file": optional(TEXT),
    },
    ("comet",): {"samples_log_interval": COUNT},
    ("compile",): {"free_activation_threshold": SIZE},
    ("hybrid_engine",): _of(COUNT, "inference_tp_size tp_gather_partition_size"),
    ("weight_quantization",): {**_of(COUNT, "num_bits q_groups"), "q_type": choice("symmetric", "asymmetric")},
    ("tensor_parallel",): {"autotp_size": SIZE},
    ("tensor_parallel", "tp"): _of(COUNT, "tp_size tp_grain_size"),
    ("tensor_parallel", "tensor_parallel"): _of(COUNT, "tp_size tp_grain_size"),
    ("expert_parallel",): {
        **_of(
            BOOL,
            "enabled validate_folding_routing async_split_plan use_grouped_mm disable_triton_grouped_mm",
        ),
        **_of(optional(BOOL), "route_norm has_shared_experts"),
        **_of(COUNT, "autoep_size expert_tensor_parallel_size comm_num_sm"),
        **_of(SIZE, "comm_qp_margin comm_max_tokens_per_rank"),
        **_of(optional(COUNT), "num_expert_groups num_limited_groups"),
        "route_scale": NUMBER,
        "score_apply": choice("auto", "pre", "post"),
        "combine_impl": choice("auto", "weighted_sum", "fused_weighted_sum", "legacy_bmm"),
        "row_weighting_impl": choice("auto", "eager", "fused"),
        "gate_up_impl": choice("separate", "fused"),
        "comm_backend": choice("comm", "deepep"),
        "score_func": choice("auto", "softmax", "sigmoid"),
        "top_k": or_auto(COUNT),
        "routed_scaling_factor": or_auto(NUMBER),
        "load_balance_coeff": ANY,
        **_of(
            optional(TEXT),
            """
            preset_model moe_layer_pattern expert_pattern router_pattern expert_w1 expert_w2 expert_w3
            num_experts_attr top_k_attr shared_experts_pattern shared_experts_gate_pattern expert_activation
            """,
        ),
    },
    ("autotuning",): {
        **_of(BOOL, "enabled fast overwrite"),
        **_of(TEXT, "results_dir exps_dir"),
        **_of(optional(TEXT), "metric_path model_info_path"),
        "metric": choice("latency", "throughput", "flops", "forward", "step"),
        "tuner_type": choice("gridsearch", "random", "model_based"),
        **_of(COUNT, "start_profile_step end_profile_step tuner_early_stopping tuner_num_trials mp_size"),
        **_of(
            COUNT,
            """
            min_train_batch_size max_train_micro_batch_size_per_gpu min_train_micro_batch_size_per_gpu
            num_tuning_micro_batch_sizes
            """,
        ),
        "max_train_batch_size": optional(COUNT),
        "arg_mappings": ANY,
        "model_info": optional(BLOCK),
    },
    ("autotuning", "model_info"): {"profile": BOOL, **_of(optional(COUNT), "num_params hidden_size num_layers")},
    ("data_efficiency",): {"enabled": BOOL, "seed": SIZE, **_of(BLOCK, "data_sampling data_routing")},
    ("data_efficiency", "data_sampling"): {
        **_of(BOOL, "enabled pin_memory"),
        "num_epochs": COUNT,
        "num_workers": SIZE,
        **_of(BLOCK, "curriculum_learning dynamic_batching"),
    },
    ("data_efficiency", "data_sampling", "curriculum_learning"): {
        "enabled": BOOL,
        "data_cluster_path": TEXT,
        "curriculum_metrics": ANY,
    },
    ("data_efficiency", "data_sampling", "dynamic_batching"): {
        **_of(BOOL, "enabled verbose"),
        "metrics_path": TEXT,
        "lr_scaling_method": choice("linear", "sqrt", "none"),
        "sequence_picking_order": choice("random", "seqlen", "dataloader"),
        **_of(COUNT, "min_batch_size max_tokens"),
        "max_batch_size": optional(COUNT),
    },
    ("data_efficiency", "data_routing"): {"enabled": BOOL, "random_ltd": BLOCK},
    ("data_efficiency", "data_routing", "random_ltd"): {
        "enabled": BOOL,
        **_of(COUNT, "total_layer_num random_ltd_layer_num global_batch_size micro_batch_size"),
        **_of(TEXT, "model_mask_name model_type hidden_state_order"),
        **_of(ANY, "random_ltd_layer_id random_ltd_schedule layer_token_lr_schedule attention_mask"),
    },
    ("pipeline",): {
        "stages": or_auto(COUNT),
        "partition": TEXT,
        **_of(BOOL, "seed_layers pipe_partitioned grad_partitioned use_reentrant"),
        "activation_checkpoint_interval": SIZE,
    },
}

_BETAS = Kind("numbers", minimum=0, below=1)
_RATES = {**_of(NOT_NEGATIVE, "lr weight_decay"), "betas": _BETAS}
_ADAM = {
    **_RATES,
    "eps": NOT_NEGATIVE,
    **_of(BOOL, "adam_w_mode amsgrad bias_correction torch_adam"),
    **_of(optional(BOOL), "foreach fp32_optimizer_states"),
}
# What ``optimizer.params`` may hold, by optimizer in lower case; the others' are not judged.
OPTIMIZER_PARAMS: Mapping[str, Mapping[str, Kind]] = {
    "adam": _ADAM,
    "adamw": _ADAM,
    "lion": {**_RATES, "fp32_optimizer_states": BOOL},
    "lamb": {
        **_RATES,
        **_of(NOT_NEGATIVE, "eps max_coeff min_coeff"),
        **_of(BOOL, "bias_correction eps_inside_sqrt amsgrad"),
    },
}
_WARM_UP = {"warmup_num_steps": SIZE, "warmup_type": choice("log", "linear"), "last_batch_iteration": INT}
_WARM_UP_RATES = _of(ANY, "warmup_min_lr warmup_max_lr")
# What ``scheduler.params`` may hold, by scheduler.
SCHEDULER_PARAMS: Mapping[str, Mapping[str, Kind]] = {
    "WarmupLR": {**_WARM_UP, **_WARM_UP_RATES},
    "WarmupDecayLR": {**_WARM_UP, **_WARM_UP_RATES, "total_num_steps": COUNT},
    "WarmupCosineLR": {
        **_WARM_UP,
        "total_num_steps": COUNT,
        **_of(NOT_NEGATIVE, "warmup_min_ratio cos_min_ratio"),
    },
}


# --------------------------------------------------------------------------------------------------------------------
# What is written


def optimizers() -> tuple[str, ...]:
    """Every name that ``optimizer.type`` may have: DeepSpeed's own and ``torch.optim``'s others."""
    import torch

    own = {name.lower() for name in DEEPSPEED_OPTIMIZERS}
    classes = {name for name, value in vars(torch.optim).items() if inspect.isclass(value)} - {"Optimizer"}
    return (*DEEPSPEED_OPTIMIZERS, *sorted(name for name in classes if name.lower() not in own))


def keys() -> dict[KeyPath, dict[str, Kind]]:
    """Every key by block.

    Raises:
        ValueError: `BY_HAND` has a key of a modelled block that the model has not.
    """
    found = {block: dict(kinds) for block, kinds in BY_HAND.items()}
    found["optimizer",]["type"] = choice(*optimizers())
    for block, model in models().items():
        fields = {key: field for name, field in model.model_fields.items() for key in (name, field.alias) if key}
        if unknown := set(found.get(block, ())) - set(fields):
            raise ValueError(f"{'.'.join(block)} has no {', '.join(sorted(unknown))} in this DeepSpeed")
        found[block] = {key: kind_of(field) for key, field in fields.items()} | found.get(block, {})
    return dict(sorted(found.items()))


def render() -> str:
    """The text of the file."""
    from deepspeed.runtime import config

    table = keys()
    facts = {
        "deepspeed": importlib.metadata.version("deepspeed").split("+")[0],
        "ignores_unknown": [".".join(block) for block in table if block not in models()],
        "removed_keys": sorted(config._REMOVED_TOP_LEVEL_CONFIG_KEYS),
        "removed_zero_keys": sorted(config._REMOVED_ZERO_CONFIG_KEYS),
    }
    tables = {
        "keys": {".".join(block): kinds for block, kinds in table.items()},
        "optimizer_params": OPTIMIZER_PARAMS,
        "scheduler_params": SCHEDULER_PARAMS,
    }
    labels = {
        _label(kind): _as_json(kind)
        for blocks in tables.values()
        for kinds in blocks.values()
        for kind in kinds.values()
    }
    parts = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in facts.items()]
    parts.append(f'"kinds": {_lines(dict(sorted(labels.items())), 1)}')
    for name, blocks in tables.items():
        texts = [f" {json.dumps(block)}: {_lines(_labels(kinds), 2)}" for block, kinds in blocks.items()]
        parts.append(f"{json.dumps(name)}: {{\n" + ",\n".join(texts) + "\n}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _labels(kinds: Mapping[str, Kind]) -> dict[str, str]:
    """What each key takes, by kind and name: findings without a line come in this order."""
    return dict(sorted(((key, _label(kind)) for key, kind in kinds.items()), key=lambda pair: pair[::-1]))


def _lines(values: Mapping[str, Any], depth: int) -> str:
    """A JSON object with a line for each key, so that a diff shows what a new DeepSpeed changes."""
    lines = [f"{' ' * depth}{json.dumps(key)}: {json.dumps(value)}" for key, value in values.items()]
    return "{\n" + ",\n".join(lines) + f"\n{' ' * (depth - 1)}}}"


def _as_json(kind: Kind) -> dict[str, Any]:
    """The fields of a kind whose values are not the defaults."""
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    return {name: value for name, value in vars(kind).items() if value != defaults[name]}


def _label(kind: Kind) -> str:
    """What a kind is called in the file: ``int minimum=0``. Equal kinds are written, and made, once."""
    fields = _as_json(kind)
    words = [fields.pop("name"), "/".join(map(str, fields.pop("choices", ())))]
    words += [field if value is True else f"{field}={value:g}" for field, value in fields.items()]
    return " ".join(filter(None, words))


if __name__ == "__main__":
    FILE.write_text(render(), encoding="utf-8")
