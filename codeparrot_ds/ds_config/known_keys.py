"""Every key that DeepSpeed reads from its JSON with its type, block by block, kept by hand: a check needs no torch.

Taken from DeepSpeed 0.19.8; ``test_known_keys.py`` compares each block with the installed version: names,
types and ranges with the pydantic models where DeepSpeed has them, and the keys that its parser looks up where it has
not. Ranges that DeepSpeed does not check itself are those outside of which a value cannot be meant.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from codeparrot_ds.paths import did_you_mean


@dataclass(frozen=True)
class Kind:
    """The type and the range of one key.

    ``bool``, ``int``, ``number``, ``text``, ``choice`` (of `choices`, text without regard to case), ``texts`` and
    ``numbers`` (lists), ``block`` (an object with keys of its own), or ``any``.
    """

    name: str
    minimum: float | None = None
    above: float | None = None
    maximum: float | None = None
    below: float | None = None
    choices: tuple[Any, ...] = ()
    optional: bool = False  # null stands for DeepSpeed's default
    auto: bool = False  # "auto" is DeepSpeed's own word here

    @property
    def takes_auto(self) -> bool:
        """Whether ``"auto"`` is a value of the key and not a gap that somebody else fills."""
        return self.auto or "auto" in self.choices

    @property
    def expected(self) -> str:
        """What a value must be, in words."""
        if self.name == "choice":
            shown = [str(choice) for choice in self.choices]
            return f"one of {', '.join(shown)}" if len(shown) <= 12 else "a known name"
        text = {
            "bool": "true or false",
            "int": "a whole number",
            "number": "a number",
            "text": "text in quotes",
            "texts": "a list of texts",
            "numbers": "a list of numbers",
            "block": "an object {...}",
            "any": "anything",
        }[self.name]
        bounds = [
            f"{word} {bound:g}"
            for word, bound in (
                ("at least", self.minimum),
                ("above", self.above),
                ("at most", self.maximum),
                ("below", self.below),
            )
            if bound is not None
        ]
        return " ".join([text, " and ".join(bounds)]).strip()

    def problem(self, value: Any) -> str | None:
        """What is wrong with `value`, or None."""
        if self.name == "any" or (value is None and self.optional) or (value == "auto" and self.auto):
            return None
        if value is None:
            return f"is null; it must be {self.expected}, or remove the key"
        if isinstance(value, str) and self.name in ("bool", "int", "number"):
            return self._text_problem(value)
        if not self._has_type(value):
            return f"must be {self.expected}, not {_shown(value)}"
        if self.name == "choice":
            return self._choice_problem(value)
        if self.name == "texts" and self.choices and not set(value) <= set(self.choices):
            return f"must be a list of some of {', '.join(self.choices)}, not {_shown(value)}"
        numbers = value if self.name == "numbers" else [value] if self.name in ("int", "number") else []
        if any(not self._in_range(number) for number in numbers):
            return f"must be {self.expected}, not {_shown(value)}"
        return None

    def _text_problem(self, text: str) -> str:
        if self.name == "bool" and text.lower() in ("true", "false"):
            return f"is the text {text!r}; write {text.lower()} without quotes"
        if self.name != "bool" and is_number(text):
            return f"is the text {text!r}; write the number without quotes"
        return f"must be {self.expected}, not the text {text!r}"

    def _choice_problem(self, value: Any) -> str | None:
        known = {choice.lower() if isinstance(choice, str) else choice for choice in self.choices}
        if (value.lower() if isinstance(value, str) else value) in known:
            return None
        if isinstance(value, str) and is_number(value) and not isinstance(self.choices[0], str):
            return f"is the text {value!r}; write the number without quotes"
        if not isinstance(value, str) or not all(isinstance(choice, str) for choice in self.choices):
            return f"must be {self.expected}, not {_shown(value)}"
        return f"cannot be {value!r}{did_you_mean(value, self.choices)}"

    def _has_type(self, value: Any) -> bool:
        if self.name == "bool":
            return isinstance(value, bool)
        if self.name == "int":
            # DeepSpeed takes 5e8 for a whole number, as JSON writers do.
            return is_finite(value) and float(value).is_integer()
        if self.name == "number":
            return is_finite(value)
        if self.name == "text":
            return isinstance(value, str)
        if self.name == "choice":
            return isinstance(value, str) or is_finite(value)
        if self.name == "block":
            return isinstance(value, dict)
        of_items = (lambda item: isinstance(item, str)) if self.name == "texts" else is_finite
        return isinstance(value, list) and all(of_items(item) for item in value)

    def _in_range(self, number: float) -> bool:
        return (
            (self.minimum is None or number >= self.minimum)
            and (self.above is None or number > self.above)
            and (self.maximum is None or number <= self.maximum)
            and (self.below is None or number < self.below)
        )


def is_finite(value: Any) -> bool:
    """Whether a value is a finite number, and neither a truth value nor text."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_number(text: str) -> bool:
    """Whether a text reads as a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "an object {...}"
    return repr(value)


BOOL = Kind("bool")
ANY = Kind("any")
BLOCK = Kind("block")
TEXT = Kind("text")
TEXTS = Kind("texts")
NUMBER = Kind("number")
SIZE = Kind("int", minimum=0)
COUNT = Kind("int", minimum=1)
INT = Kind("int")
SHARE = Kind("number", minimum=0, maximum=1)


def choice(*choices: Any) -> Kind:
    """One of a few values."""
    return Kind("choice", choices=choices)


def optional(kind: Kind) -> Kind:
    """`kind`, or null."""
    return replace(kind, optional=True)


def or_auto(kind: Kind) -> Kind:
    """`kind`, or DeepSpeed's own ``"auto"``."""
    return replace(kind, auto=True)


KeyPath = tuple[str, ...]
DEEPSPEED_VERSION = "0.19.8"


def _of(kind: Kind, names: str) -> dict[str, Kind]:
    return dict.fromkeys(names.split(), kind)


_POSITIVE = Kind("number", above=0)
_NOT_NEGATIVE = Kind("number", minimum=0)
_DTYPE = choice("bf16", "bfloat16", "fp16", "float16", "half", "fp32", "float32", "float", "torch.bfloat16",
                "torch.float16", "torch.float32", "int8", "torch.int8")  # fmt: skip
_LOW_PRECISION = choice("bf16", "bfloat16", "fp16", "float16", "half", "torch.bfloat16", "torch.float16")
_COMMUNICATION_DTYPE = optional(choice("fp16", "bf16", "fp32"))
_MONITOR = {**_of(BOOL, "enabled"), **_of(TEXT, "output_path job_name")}
_BF16 = _of(
    BOOL, "enabled immediate_grad_update check_grad_overflow bf16_master_weights_and_grads bf16_optimizer_states"
)
_STAGE3_SIZES = "prefetch_bucket_size param_persistence_threshold model_persistence_threshold max_live_parameters max_reuse_distance"  # noqa: E501
_STAGE3_SWITCHES = "gather_16bit_weights_on_model_save use_all_reduce_for_fetch_params allgather_sequential"


def _stage3(names: str) -> str:
    """Both spellings of stage 3's keys: DeepSpeed takes them with and without ``stage3_``."""
    return " ".join(f"{name} stage3_{name}" for name in names.split())


# What optimizers and schedulers may be called: DeepSpeed's own in any case, torch's as torch spells them.
DEEPSPEED_OPTIMIZERS = ("Adagrad", "Adam", "AdamW", "Lamb", "Lion", "MuAdam", "MuAdamW", "MuSGD", "Muon")
TORCH_OPTIMIZERS = (
    "ASGD", "Adadelta", "Adafactor", "Adamax", "LBFGS", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD", "SparseAdam",
)  # fmt: skip
SCHEDULERS = ("LRRangeTest", "OneCycle", "WarmupLR", "WarmupDecayLR", "WarmupCosineLR")

KEYS: Mapping[KeyPath, Mapping[str, Kind]] = {
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
        "gradient_clipping": _NOT_NEGATIVE,
        "gradient_predivide_factor": _POSITIVE,
        "gradient_allreduce_op": choice("mean", "sum"),
        "log_level": optional(choice("debug", "info", "warning", "error", "critical")),
        "datastates_ckpt": ANY,
    },
    ("zero_optimization",): {
        "stage": choice(0, 1, 2, 3),
        **_of(
            BOOL,
            """
            allgather_partitions compute_grad_norm contiguous_gradients elastic_checkpoint enable_sanity_checks
            ignore_unused_parameters legacy_stage1 load_from_fp32_weights log_trace_cache_warnings
            memory_efficient_linear override_module_apply parameter_alignment pipeline_loading_checkpoint
            reduce_scatter round_robin_gradients save_muon_momentum_buffer_in_memory
            stage3_gather_fp16_weights_on_model_save use_multi_rank_bucket_allreduce zero_quantized_gradients
            zero_quantized_nontrainable_weights zero_quantized_weights
            """,
        ),
        **_of(BOOL, _stage3(_STAGE3_SWITCHES)),
        **_of(optional(BOOL), "overlap_comm cpu_offload cpu_offload_param cpu_offload_use_pin_memory"),
        "reduce_bucket_size": Kind("int", above=0),
        **_of(SIZE, "allgather_bucket_size sub_group_size zero_hpz_partition_size"),
        **_of(SIZE, _stage3(_STAGE3_SIZES)),
        **_of(INT, _stage3("module_granularity_threshold")),
        **_of(optional(BLOCK), "offload_param offload_optimizer zenflow leaf_module"),
    },
    ("zero_optimization", "offload_param"): {
        "device": choice("none", "cpu", "nvme"),
        "nvme_path": optional(TEXT),
        **_of(SIZE, "buffer_count buffer_size max_in_cpu"),
        "pin_memory": BOOL,
    },
    ("zero_optimization", "offload_optimizer"): {
        "device": choice("none", "cpu", "nvme"),
        "nvme_path": optional(TEXT),
        "buffer_count": SIZE,
        **_of(BOOL, "pin_memory pipeline_read pipeline_write fast_init super_offload"),
        **_of(SHARE, "ratio cpuadam_cores_perc"),
    },
    ("zero_optimization", "zenflow"): {
        "topk_ratio": Kind("number", above=0, below=1),
        "select_strategy": choice("auto", "step", "epoch"),
        **_of(or_auto(COUNT), "select_interval update_interval"),
        **_of(BOOL, "overlap_step offload"),
        **_of(SHARE, "auto_ratio pt_reserved_cores_perc"),
        "full_warm_up_rounds": SIZE,
        "steps_per_epoch": optional(COUNT),
    },
    ("zero_optimization", "leaf_module"): _of(TEXTS, "classes names name_suffixes"),
    ("bf16",): _BF16,
    ("bfloat16",): _BF16,
    ("fp16",): {
        **_of(BOOL, "enabled auto_cast consecutive_hysteresis fp16_master_weights_and_grads"),
        "loss_scale": _NOT_NEGATIVE,
        "initial_scale_power": SIZE,
        **_of(COUNT, "loss_scale_window hysteresis min_loss_scale"),
    },
    ("torch_autocast",): {"enabled": BOOL, "dtype": _LOW_PRECISION, "lower_precision_safe_modules": optional(TEXTS)},
    ("data_types",): {
        **_of(optional(_DTYPE), "grad_accum_dtype param_dtype buffer_dtype"),
        "keep_in_fp32_modules": or_auto(TEXTS),
    },
    ("optimizer",): {
        "type": choice(*DEEPSPEED_OPTIMIZERS, *TORCH_OPTIMIZERS),
        "params": optional(BLOCK),
        "legacy_fusion": BOOL,
    },
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
    ("timers", "throughput"): _of(BOOL, "enabled synchronized"),
    ("flops_profiler",): {
        **_of(BOOL, "enabled detailed"),
        "recompute_fwd_factor": _NOT_NEGATIVE,
        **_of(COUNT, "profile_step top_modules"),
        "module_depth": Kind("int", minimum=-1),
        "output_file": optional(TEXT),
    },
    ("comms_logger",): {**_of(BOOL, "enabled prof_all verbose debug"), "prof_ops": TEXTS},
    ("tensorboard",): _MONITOR,
    ("csv_monitor",): _MONITOR,
    ("wandb",): {"enabled": BOOL, **_of(optional(TEXT), "group team"), "project": TEXT},
    ("comet",): {
        "enabled": BOOL,
        "samples_log_interval": COUNT,
        **_of(optional(TEXT), "project workspace api_key experiment_name experiment_key mode"),
        "online": optional(BOOL),
    },
    ("compile",): {
        **_of(
            BOOL,
            """
            autoep_non_moe debug_log deepcompile double_buffer free_activation keep_all_input_tensors
            keep_int_input_tensors offload_activation offload_activation_pin_memory offload_opt_states
            offload_parameters symmetric_memory sync_after_allgather sync_after_reduce sync_before_allgather
            sync_before_reduce
            """,
        ),
        "free_activation_threshold": SIZE,
        "passes": optional(Kind("texts", choices=("z1", "z3", "autosp", "autotp"))),
    },
    ("hybrid_engine",): {
        **_of(BOOL, "enabled release_inference_cache pin_parameters enable_cuda_graph"),
        "max_out_tokens": Kind("int", above=0),
        **_of(COUNT, "inference_tp_size tp_gather_partition_size"),
    },
    ("weight_quantization",): {
        "enabled": BOOL,
        **_of(COUNT, "num_bits q_groups"),
        "q_type": choice("symmetric", "asymmetric"),
        **_of(ANY, "quantized_initialization post_init_quant"),
    },
    ("tensor_parallel",): {
        "autotp_size": SIZE,
        **_of(BOOL, "tp_overlap_comm keep_module_on_host replace_with_kernel_inject kernel_inject"),
        "vocab_parallel_lm_head": optional(BOOL),
        "vocab_parallel_ce_backend": choice("torch", "liger"),
        "preset_model": optional(TEXT),
        **_of(ANY, "dtype injection_policy_tuple partition_config"),
        **_of(BLOCK, "tp tensor_parallel"),
    },
    ("tensor_parallel", "tp"): {**_of(COUNT, "tp_size tp_grain_size"), **_of(ANY, "mpu tp_group")},
    ("tensor_parallel", "tensor_parallel"): {**_of(COUNT, "tp_size tp_grain_size"), **_of(ANY, "mpu tp_group")},
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

# Blocks that DeepSpeed reads by name and whose unknown keys it ignores; the other blocks refuse them.
IGNORES_UNKNOWN: frozenset[KeyPath] = frozenset(
    path
    for path in KEYS
    if not path
    or path[0]
    in {
        "activation_checkpointing", "aio", "autotuning", "checkpoint", "data_efficiency", "data_types",
        "expert_parallel", "flops_profiler", "optimizer", "pipeline", "scheduler", "torch_autocast",
    }
    or path == ("timers",)
)  # fmt: skip

_BETAS = Kind("numbers", minimum=0, below=1)
_RATES = {**_of(_NOT_NEGATIVE, "lr weight_decay"), "betas": _BETAS}
_ADAM = {
    **_RATES,
    "eps": _NOT_NEGATIVE,
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
        **_of(_NOT_NEGATIVE, "eps max_coeff min_coeff"),
        **_of(BOOL, "bias_correction eps_inside_sqrt amsgrad"),
    },
}
_WARM_UP = {"warmup_num_steps": SIZE, "warmup_type": choice("log", "linear"), "last_batch_iteration": INT}
_WARM_UP_RATES = _of(Kind("any"), "warmup_min_lr warmup_max_lr")
# What ``scheduler.params`` may hold, by scheduler.
SCHEDULER_PARAMS: Mapping[str, Mapping[str, Kind]] = {
    "WarmupLR": {**_WARM_UP, **_WARM_UP_RATES},
    "WarmupDecayLR": {**_WARM_UP, **_WARM_UP_RATES, "total_num_steps": COUNT},
    "WarmupCosineLR": {
        **_WARM_UP,
        "total_num_steps": COUNT,
        **_of(_NOT_NEGATIVE, "warmup_min_ratio cos_min_ratio"),
    },
}
# Optimizers that ZeRO takes without "zero_allow_untested_optimizer".
ZERO_OPTIMIZERS = frozenset({"adagrad", "adam", "adamw", "lion", "muon"})

# Keys that DeepSpeed still takes under an old name: what the new one is called. ``modern`` in ``ds_config`` renames.
RENAMED: Mapping[KeyPath, KeyPath] = {
    ("bfloat16",): ("bf16",),
    ("zero_optimization", "cpu_offload"): ("zero_optimization", "offload_optimizer"),
    ("zero_optimization", "cpu_offload_param"): ("zero_optimization", "offload_param"),
    ("zero_optimization", "stage3_gather_fp16_weights_on_model_save"): (
        "zero_optimization",
        "stage3_gather_16bit_weights_on_model_save",
    ),
}

# Keys of other DeepSpeed versions: what became of them. DeepSpeed 0.19.8 raises for those in REMOVED_KEYS.
REMOVED_KEYS = frozenset(
    """
    amp compression_training curriculum_learning eigenvalue elasticity graph_harvesting nebula progressive_layer_drop
    quantize_training sparse_attention sparse_gradients
    """.split()
)
REMOVED_ZERO_KEYS = frozenset("mics_hierarchical_params_gather mics_shard_size zeropp_loco_param".split())
REMOVED_OPTIMIZERS = frozenset({"onebitadam", "onebitlamb", "zerooneadam"})
OTHER_VERSIONS: Mapping[KeyPath, str] = {
    **{(key,): "the feature was removed" for key in REMOVED_KEYS},
    **{("zero_optimization", key): "the feature was removed" for key in REMOVED_ZERO_KEYS},
    ("fp32_allreduce",): 'write "communication_data_type": "fp32"',
    ("allreduce_always_fp32",): 'write "communication_data_type": "fp32"',
    ("zero_optimization", "cpu_offload_params"): 'write "offload_param": {"device": "cpu"}',
    ("zero_optimization", "cpu_offload_use_pin_memory"): "write pin_memory into the offload block",
    ("aio", "thread_count"): "it is called intra_op_parallelism now",
    ("bf16", "check_overflow"): "it is called check_grad_overflow now",
    ("compile", "enabled"): "call engine.compile() or, here, set the run config's compile",
    ("compile", "backend"): "engine.compile() takes it",
    ("compile", "kwargs"): "engine.compile() takes them",
}
