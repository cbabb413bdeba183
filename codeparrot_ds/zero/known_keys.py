"""Every key that DeepSpeed reads from its JSON, block by block, kept by hand so that a check needs no torch.

Taken from DeepSpeed 0.19.8; ``tests/zero/test_known_keys.py`` compares each block with the installed version: pydantic
models where DeepSpeed has them, and the keys that its parser looks up where it has not.
"""

from __future__ import annotations

from collections.abc import Mapping

KeyPath = tuple[str, ...]


def _keys(text: str) -> frozenset[str]:
    return frozenset(text.split())


_MONITOR = _keys("enabled job_name output_path")
_BF16 = _keys("bf16_master_weights_and_grads bf16_optimizer_states check_grad_overflow enabled immediate_grad_update")

# Blocks that are not listed (autotuning, data_efficiency, tensor_parallel …) are not looked into.
KNOWN_KEYS: Mapping[KeyPath, frozenset[str]] = {
    (): _keys(
        """
        activation_checkpointing aio autotuning bf16 bfloat16 checkpoint comet comms_logger communication_data_type
        compile csv_monitor data_efficiency data_types dataloader_drop_last datastates_ckpt disable_allgather
        disable_python_gc dump_state expert_parallel flops_profiler fp16 gradient_accumulation_steps
        gradient_allreduce_op gradient_clipping gradient_predivide_factor hybrid_engine log_level
        managed_gradient_accumulation memory_breakdown optimizer pipeline prescale_gradients scheduler
        seq_parallel_communication_data_type sequence_parallel_size steps_per_print tensor_parallel tensorboard timers
        torch_autocast train_batch_size train_micro_batch_size_per_gpu use_data_before_expert_parallelism
        vocabulary_size wall_clock_breakdown wandb weight_quantization zero_allow_untested_optimizer
        zero_force_ds_cpu_optimizer zero_optimization
        """
    ),
    ("zero_optimization",): _keys(
        """
        allgather_bucket_size allgather_partitions allgather_sequential compute_grad_norm contiguous_gradients
        cpu_offload cpu_offload_param cpu_offload_use_pin_memory elastic_checkpoint enable_sanity_checks
        gather_16bit_weights_on_model_save ignore_unused_parameters leaf_module legacy_stage1 load_from_fp32_weights
        log_trace_cache_warnings max_live_parameters max_reuse_distance memory_efficient_linear
        model_persistence_threshold module_granularity_threshold offload_optimizer offload_param overlap_comm
        override_module_apply param_persistence_threshold parameter_alignment pipeline_loading_checkpoint
        prefetch_bucket_size reduce_bucket_size reduce_scatter round_robin_gradients
        save_muon_momentum_buffer_in_memory stage stage3_allgather_sequential
        stage3_gather_16bit_weights_on_model_save stage3_gather_fp16_weights_on_model_save stage3_max_live_parameters
        stage3_max_reuse_distance stage3_model_persistence_threshold stage3_module_granularity_threshold
        stage3_param_persistence_threshold stage3_prefetch_bucket_size stage3_use_all_reduce_for_fetch_params
        sub_group_size use_all_reduce_for_fetch_params use_multi_rank_bucket_allreduce zenflow zero_hpz_partition_size
        zero_quantized_gradients zero_quantized_nontrainable_weights zero_quantized_weights
        """
    ),
    ("zero_optimization", "offload_param"): _keys("buffer_count buffer_size device max_in_cpu nvme_path pin_memory"),
    ("zero_optimization", "offload_optimizer"): _keys(
        """
        buffer_count cpuadam_cores_perc device fast_init nvme_path pin_memory pipeline_read pipeline_write ratio
        super_offload
        """
    ),
    ("zero_optimization", "zenflow"): _keys(
        """
        auto_ratio full_warm_up_rounds offload overlap_step pt_reserved_cores_perc select_interval select_strategy
        steps_per_epoch topk_ratio update_interval
        """
    ),
    ("zero_optimization", "leaf_module"): _keys("classes name_suffixes names"),
    ("bf16",): _BF16,
    ("bfloat16",): _BF16,
    ("fp16",): _keys(
        """
        auto_cast consecutive_hysteresis enabled fp16_master_weights_and_grads hysteresis initial_scale_power
        loss_scale loss_scale_window min_loss_scale
        """
    ),
    ("torch_autocast",): _keys("dtype enabled lower_precision_safe_modules"),
    ("data_types",): _keys("buffer_dtype grad_accum_dtype keep_in_fp32_modules param_dtype"),
    ("optimizer",): _keys("legacy_fusion params type"),
    ("scheduler",): _keys("params type"),
    ("activation_checkpointing",): _keys(
        """
        contiguous_memory_optimization cpu_checkpointing number_checkpoints partition_activations profile
        synchronize_checkpoint_boundary
        """
    ),
    ("checkpoint",): _keys(
        "checkpoint_serialization load_universal parallel_write tag_validation use_node_local_storage writer"
    ),
    ("checkpoint", "parallel_write"): _keys("pipeline_stage"),
    ("checkpoint", "writer"): _keys(
        "data_parallel decoupled io_buffer_double io_buffer_size io_multiplier show_statistics type"
    ),
    ("aio",): _keys("block_size intra_op_parallelism overlap_events queue_depth single_submit use_gds"),
    ("timers",): _keys("throughput"),
    ("timers", "throughput"): _keys("enabled synchronized"),
    ("flops_profiler",): _keys(
        "detailed enabled module_depth output_file profile_step recompute_fwd_factor top_modules"
    ),
    ("comms_logger",): _keys("debug enabled prof_all prof_ops verbose"),
    ("tensorboard",): _MONITOR,
    ("csv_monitor",): _MONITOR,
    ("wandb",): _keys("enabled group project team"),
    ("comet",): _keys(
        "api_key enabled experiment_key experiment_name mode online project samples_log_interval workspace"
    ),
    ("compile",): _keys(
        """
        autoep_non_moe debug_log deepcompile double_buffer free_activation free_activation_threshold
        keep_all_input_tensors keep_int_input_tensors offload_activation offload_activation_pin_memory
        offload_opt_states offload_parameters passes symmetric_memory sync_after_allgather sync_after_reduce
        sync_before_allgather sync_before_reduce
        """
    ),
}

# What ``optimizer.params`` may hold for Adam and AdamW; DeepSpeed passes the rest on to a TypeError.
ADAM_PARAMS = _keys(
    "adam_w_mode amsgrad betas bias_correction eps foreach fp32_optimizer_states lr torch_adam weight_decay"
)
# Optimizers with a CPU kernel for offloading, in lower case as DeepSpeed compares them.
CPU_OPTIMIZERS = _keys("adagrad adam adamw lion")

# Keys that DeepSpeed had once and now refuses.
REMOVED_KEYS = _keys(
    """
    amp compression_training curriculum_learning eigenvalue elasticity graph_harvesting nebula progressive_layer_drop
    quantize_training sparse_attention sparse_gradients
    """
)
REMOVED_ZERO_KEYS = _keys("mics_hierarchical_params_gather mics_shard_size zeropp_loco_param")
