"""Every private part of DeepSpeed that this package touches: where it is, which configs need it, and what for.

A release of DeepSpeed may rename any of them. What an engine's config needs is checked once, when the engine has been
made and before it trains; what is touched before there is an engine, where it is touched (`require`). A missing part is
a refusal: without it a fix would be left out, or a checkpoint would be wrong. ``docs/deepspeed.md`` is for people.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.metadata
import importlib.util
import operator
from collections.abc import Iterator, Mapping
from typing import Any

from codeparrot_ds.ds_config.facts import offload_device, precision, value_at
from codeparrot_ds.ds_config.known_keys import DEEPSPEED_VERSION
from codeparrot_ds.errors import UserError

VERIFIED = (DEEPSPEED_VERSION,)
"""Versions of DeepSpeed that the parts and the fixes have been verified with."""

FUSED, UNFUSED = "FP16_Optimizer", "FP16_UnfusedOptimizer"
ZERO12, BF16, ZERO3 = "DeepSpeedZeroOptimizer", "BF16_Optimizer", "DeepSpeedZeroOptimizer_Stage3"
BARE = "bare optimizer"
WRAPPERS = {
    BARE: "stage 0 in fp32",
    FUSED: "stage 0 in bf16 or fp16 with FusedAdam",
    UNFUSED: "stage 0 in bf16 or fp16 with torch's Adam",
    ZERO12: "stages 1 and 2",
    BF16: "stage 1 in bf16 with gradients summed in fp32",
    ZERO3: "stage 3",
}
"""The class of ``engine.optimizer``, and the configs that DeepSpeed makes it for."""
BARE_OPTIMIZERS = ("FusedAdam", "DeepSpeedCPUAdam", "AdamW", "Adam")

LAUNCHER = "launcher"


class PrivatePartError(UserError):
    """The installed DeepSpeed lacks a private part that this config needs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Use:
    """What decides which parts and which fixes a run needs."""

    wrapper: str
    """One of `WRAPPERS`."""
    traits: frozenset[str]
    """The class of the basic optimizer, ``cpu`` where it trains on one, and others of `use_of`."""


@dataclasses.dataclass(frozen=True)
class Configs:
    """Configs that need something: those with one of the wrappers and all of the traits."""

    wrappers: tuple[str, ...] = tuple(WRAPPERS)
    traits: frozenset[str] = frozenset()

    def include(self, use: Use) -> bool:
        return use.wrapper in self.wrappers and self.traits <= use.traits

    def __str__(self) -> str:
        where = "; ".join(WRAPPERS[name] for name in self.wrappers) if len(self.wrappers) < len(WRAPPERS) else "all"
        return ": ".join([where, ", ".join(sorted(self.traits))]) if self.traits else where


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """One private part of DeepSpeed."""

    module: str
    """Of DeepSpeed, without ``deepspeed.``."""
    owner: str
    """The class, or the function, that has it in the module; empty: the module itself."""
    attribute: str
    held: str
    """How it is looked for: ``class`` (an attribute of the class or module), ``submodule``, ``code`` (the function, or
    the class's ``__init__``, names it), the path from the engine to the object that has it once it has been made, or
    ``launcher`` (text that is only parsed, and held by tests)."""
    configs: Configs | None
    """None: touched before there is an engine, and checked there by `require`."""
    users: tuple[str, ...]
    """Names of fixes, or what else needs it."""
    why: str
    newer_than: str
    """The newest release that is known not to have it; empty: unknown."""

    @property
    def name(self) -> str:
        holder = self.owner.partition(".")[0] or self.module.rpartition(".")[2]
        return f"{holder}.{self.attribute}"

    def is_there(self, engine: Any = None) -> bool:
        """Whether the installed DeepSpeed, or the engine that it made, has it."""
        try:
            if self.held == "submodule":
                return importlib.util.find_spec(f"deepspeed.{self.module}.{self.attribute}") is not None
            if self.held in ("class", "code"):
                module = importlib.import_module(f"deepspeed.{self.module}")
                holder = operator.attrgetter(self.owner)(module) if self.owner else module
                if self.held == "code":
                    function: Any = vars(holder)["__init__"] if isinstance(holder, type) else holder
                    return self.attribute in function.__code__.co_names
            elif self.held == "parameter":
                holder = next(parameter for parameter in engine.module.parameters() if parameter.requires_grad)
            else:
                holder = functools.reduce(getattr, self.held.split(".")[1:], engine)
        except (AttributeError, ImportError, KeyError):  # what has it is missing
            return False
        return hasattr(holder, self.attribute)


def _parts(
    names: str,
    module: str,
    owner: str = "",
    held: str = "class",
    *,
    of: tuple[str, ...] | None = tuple(WRAPPERS),
    traits: tuple[str, ...] = (),
    users: str,
    why: str,
    newer_than: str = "",
) -> Iterator[Part]:
    configs = None if of is None else Configs(of, frozenset(traits))
    for name in names.split():
        yield Part(
            module=module,
            owner=owner,
            attribute=name,
            held=held,
            configs=configs,
            users=tuple(users.split()),
            why=why,
            newer_than=newer_than,
        )


_STAGE12, _STAGE3 = ("runtime.zero.stage_1_and_2", ZERO12), ("runtime.zero.stage3", ZERO3)
_FUSED, _UNFUSED = ("runtime.fp16.fused_optimizer", FUSED), ("runtime.fp16.unfused_optimizer", UNFUSED)
_BF16, _ENGINE = ("runtime.bf16_optimizer", BF16), ("runtime.engine", "DeepSpeedEngine")
_SCALE, _SCALER = ("runtime.fp16.loss_scaler", "LossScaleConfig"), ("runtime.fp16.loss_scaler", "DynamicLossScaler")
_CPU, _TRACED, _OFFLOAD, _NVME, _DYNAMIC = "cpu", "traced", "offloaded optimizer", "optimizer on NVMe", "dynamic scale"
LEAN = "lean step"
PARTS: tuple[Part, ...] = (
    # Before there is an engine
    *_parts("compile", "runtime.compiler", of=None, users="import_muon_uncompiled",
            why="compiles Muon's functions as they are defined"),
    *_parts("original_muon", "runtime.zero.muon", held="submodule", of=None, users="import_muon_uncompiled",
            newer_than="0.17.0", why="has the functions that are compiled at import"),
    *_parts("cdb", "comm.comm", of=None, users="profile parts trace",
            why="the backend whose collectives are timed, or replaced by ones that are over at once"),
    *_parts("_loaded_ops", "ops.op_builder.builder", "OpBuilder", of=None, users="operators trace",
            why="where an operator that is loaded is looked for before it is built"),
    *_parts("cxx_args", "ops.op_builder.builder", "OpBuilder", of=None, users="operators",
            why="options of the compiler, without debug information"),
    *_parts("__compatible_ops__", "comm.torch", "build_shm_op", "code", of=None, users="ranks trace",
            why="its entry deepspeed_shm_comm, set to False, keeps every rank from building an operator of inference"),
    *_parts("assert_ints_same_as_other_ranks", "runtime.zero.partitioned_param_coordinator", of=None, users="trace",
            why="compares numbers of ranks that are not there"),
    *_parts("_torch_pins_host_memory _torch_pin_memory _torch_empty_pinned _torch_is_pinned",
            "accelerator.abstract_accelerator", "DeepSpeedAccelerator", of=None, users="trace",
            why="page-locks host memory, which a trace only counts"),
    # Every engine
    *_parts("was_step_applied", *_ENGINE, users="bad-steps", why="whether the last step was skipped"),
    # Stage 0
    *_parts("fp16_groups fp16_groups_flat fp32_groups_flat", *_FUSED, "engine.optimizer", of=(FUSED,),
            users="undo_construction_step fragments", why="working weights and masters, a flat tensor per group"),
    *_parts("fp16_groups fp32_groups", *_UNFUSED, "engine.optimizer", of=(UNFUSED,),
            users="undo_construction_step fragments", why="working weights and masters"),
    *_parts("loss_scale_config", *_FUSED, "engine.optimizer", of=(FUSED,), newer_than="0.18.0",
            users="scale_the_loss_at_stage0 loss-scale", why="holds the loss scale at stage 0"),
    *_parts("loss_scale_config", *_UNFUSED, "engine.optimizer", of=(UNFUSED,), newer_than="0.18.0",
            users="scale_the_loss_at_stage0 loss-scale", why="holds the loss scale at stage 0"),
    *_parts("use_grad_scaling cur_scale dynamic_loss_scale min_loss_scale cur_iter last_overflow_iter", *_SCALE,
            "engine.optimizer.loss_scale_config", of=(FUSED, UNFUSED), newer_than="0.17.0",
            users="scale_the_loss_at_stage0 loss-scale", why="the loss scale, and what a checkpoint keeps of it"),
    *_parts("unscale_and_clip_grads", *_UNFUSED, of=(UNFUSED,), traits=("fp16",),
            users="scale_the_loss_at_stage0", why="where the norm is still that of the scaled gradient"),
    *_parts("_global_grad_norm", *_UNFUSED, "engine.optimizer", of=(UNFUSED,), traits=("fp16",),
            users="scale_the_loss_at_stage0", why="what the engine reports as the norm"),
    *_parts("_global_grad_norm", *_ENGINE, "engine", of=(BARE,), users="guard_bare_optimizer",
            why="the norm that the engine reports"),
    *_parts("torch_autocast_z0_gradscaler", *_ENGINE, "engine", of=(BARE,), users="guard_bare_optimizer",
            newer_than="0.17.0", why="the scaler of fp16 autocast, None without: it calls the optimizer's step"),
    *_parts("clip_fp32_gradients", *_ENGINE, of=(BARE,), users="guard_bare_optimizer",
            why="clips without keeping the norm"),
    # Stages 1 and 2
    *_parts("check_grad_overflow", *_STAGE12, "engine.optimizer", of=(ZERO12,), users="decide_by_the_norm",
            newer_than="0.17.0", why="whether a step looks at every gradient"),
    *_parts("cpu_offload", *_STAGE12, "engine.optimizer", of=(ZERO12,), users="decide_by_the_norm trace",
            why="an offloaded optimizer looks while gradients arrive, and has a bucket on the way to the host"),
    *_parts("compute_grad_norm", *_STAGE12, "engine.optimizer", of=(ZERO12,), users="decide_by_the_norm",
            newer_than="0.19.0", why="whether a step has a norm"),
    *_parts("check_overflow", *_STAGE12, of=(ZERO12,), users="decide_by_the_norm",
            why="passes over every gradient, which the norm makes superfluous"),
    *_parts("get_grad_norm_direct", *_STAGE12, of=(ZERO12,), traits=(_CPU,), users="norm_without_fp64_copies",
            why="copies every gradient to fp64"),
    *_parts("_zero_padding", _STAGE12[0], f"{ZERO12}.get_flat_partition", "code", of=(ZERO12,), traits=(_CPU,),
            users="norm_without_fp64_copies", newer_than="0.19.0",
            why="marks the gradients that only pad a partition; stage 3 has none"),
    *_parts("reset_cpu_buffers", *_STAGE12, of=(ZERO12,), traits=(_OFFLOAD,), users="drop_offloaded_sums",
            why="called after every step, also a skipped one"),
    *_parts("averaged_gradients", *_STAGE12, "engine.optimizer", of=(ZERO12,), traits=(_OFFLOAD,),
            users="drop_offloaded_sums", why="the sums that a skipped step leaves"),
    *_parts("loss_scaler", *_STAGE12, "engine.optimizer", of=(ZERO12,), users="loss-scale",
            why="holds the loss scale"),
    *_parts("single_partition_of_fp32_groups round_robin_bit16_groups real_dp_process_group", *_STAGE12,
            "engine.optimizer", of=(ZERO12,), users="fragments", why="this rank's masters, and the parameters in them"),
    *_parts("round_robin_bit16_offsets", *_STAGE12, "engine.optimizer", of=(ZERO12,), users="fragments",
            newer_than="0.19.0", why="where each parameter lies in the flat group"),
    *_parts("update_lp_params", *_STAGE12, of=(ZERO12,), users="fragments", why="copies masters to working weights"),
    *_parts("_lazy_init_hp_params_optimizer_state", *_STAGE12, of=(ZERO12,), users="fragments",
            why="links the optimizer's states to the parameters"),
    *_parts("_hp_optimizer_states_linked", *_STAGE12, "engine.optimizer", of=(ZERO12,), users="fragments",
            why="whether they are linked; reset before they are linked again"),
    # Stage 1 in bf16 with gradients summed in fp32
    *_parts("update_lp_params", *_BF16, of=(BF16,), users="fragments", why="copies masters to working weights"),
    *_parts("_lazy_init_hp_params_optimizer_state", *_BF16, of=(BF16,), users="fragments",
            why="links the optimizer's states to the parameters"),
    *_parts("_hp_optimizer_states_linked", *_BF16, "engine.optimizer", of=(BF16,), users="fragments",
            why="whether they are linked; reset before they are linked again"),
    *_parts("_hp_mapping", "utils.mixed_precision_linkage", "parameter", "parameter", of=(BF16,), users="fragments",
            why="where the parameter lies in the flat masters; None where other ranks own all of it"),
    *_parts("lp_fragment_address hp_fragment_address param_group_index", "utils.tensor_fragment", "tensor_fragment",
            "code", of=(BF16,), users="fragments", why="the two places of a fragment, and its group"),
    *_parts("start numel", "utils.tensor_fragment", "fragment_address", "code", of=(BF16,), users="fragments",
            why="such a place"),
    # Stage 3
    *_parts("fp32_partitioned_groups_flat grad_position dp_process_group", *_STAGE3, "engine.optimizer", of=(ZERO3,),
            users="fragments trace", why="this rank's masters, and where each parameter lies in them"),
    *_parts("get_param_id checkpoint_event_prologue checkpoint_event_epilogue _partitioned_params_swap_out", *_STAGE3,
            of=(ZERO3,), users="fragments", why="a parameter's key, and the way from masters to working weights"),
    *_parts("ds_shape ds_numel", "runtime.zero.partition_parameters", "parameter", "parameter", of=(ZERO3,),
            users="fragments trace", why="a whole parameter's shape and size"),
    *_parts("swap_optimizer", *_STAGE3, "engine.optimizer", of=(ZERO3,), users="fragments",
            why="whether masters and moments are on NVMe"),
    *_parts("_swappable_optimizer_subgroup _optimizer_states_and_gradient_swap_in "
            "_optimizer_states_and_gradient_swap_out", *_STAGE3, of=(ZERO3,), traits=(_NVME,), users="fragments",
            why="brings a group into memory and back to NVMe"),
    *_parts("get_grad_norm_direct", *_STAGE3, of=(ZERO3,), traits=(_CPU,), users="norm_without_fp64_copies",
            why="copies every gradient to fp64"),
    *_parts("_get_norm_groups", *_STAGE3, of=(ZERO3,), users="bound_stage3_norms", why="norms in fp64"),
    *_parts("loss_scaler", *_STAGE3, "engine.optimizer", of=(ZERO3,), users="loss-scale",
            why="holds the loss scale"),
    # Dynamic loss scaling of stages 1 to 3
    *_parts("raise_error_at_min_scale", *_SCALER, "engine.optimizer.loss_scaler", of=(ZERO12, ZERO3),
            traits=(_DYNAMIC,), users="let_the_loss_scale_rest", why="whether the smallest scale ends the run"),
    *_parts("dynamic cur_scale", _SCALER[0], "LossScalerBase", "engine.optimizer.loss_scaler", of=(ZERO12, ZERO3),
            users="loss-scale", why="the loss scale, and whether it changes"),
    *_parts("min_scale cur_iter last_overflow_iter cur_hysteresis", *_SCALER,
            "engine.optimizer.loss_scaler", of=(ZERO12, ZERO3), traits=(_DYNAMIC,), users="loss-scale",
            why="its lower end, and what a checkpoint keeps of it"),
    # A step that waits for nothing
    *_parts("buffered_allreduce_fallback", *_ENGINE, of=(BARE, FUSED), traits=(LEAN,), users="step_without_waiting",
            why="copies gradients into buckets for other ranks, also where there are none"),
    *_parts("clip_fp32_gradients", *_ENGINE, of=(BARE,), traits=(LEAN,), users="step_without_waiting",
            why="clips before the step, which does it itself"),
    *_parts("_global_grad_norm", *_FUSED, "engine.optimizer", of=(FUSED,), traits=(LEAN,),
            users="step_without_waiting", why="what the engine reports as the norm"),
    *_parts("_global_grad_norm", *_STAGE12, "engine.optimizer", of=(ZERO12,), traits=(LEAN,),
            users="step_without_waiting", why="what the engine reports as the norm"),
    *_parts("averaged_gradients all_grad_tensors bit16_groups dp_process_group", *_STAGE12, "engine.optimizer",
            of=(ZERO12,), traits=(LEAN,), users="step_without_waiting",
            why="this rank's gradients once they are reduced, the parameters, and the ranks that share the norm"),
    *_parts("_grad_acc_hooks", *_STAGE12, "engine.optimizer", of=(ZERO12,), traits=(LEAN,),
            users="step_without_waiting", why="copy gradients into buckets, also where there are no other ranks"),
    *_parts("reduce_gradients overlapping_partition_gradients_reduce_epilogue", *_STAGE12, of=(ZERO12,),
            traits=(LEAN,), users="step_without_waiting", why="reduce what is in the buckets"),
    # Adam in C++
    *_parts("_dummy_overflow_buf multi_tensor_adam", "ops.adam.fused_adam", "FusedAdam", "engine.basic_optimizer",
            traits=("FusedAdam", _CPU), users="forget_beta_powers", why="one update of a number that nobody needs"),
    *_parts("ds_opt_adam opt_id", "ops.adam.cpu_adam", "DeepSpeedCPUAdam", "engine.basic_optimizer",
            traits=("DeepSpeedCPUAdam",), users="forget_beta_powers", why="one update of a number that nobody needs"),
    *_parts("adam_update", "ops.adam.cpu_adam", "DeepSpeedCPUAdam", "engine.basic_optimizer.ds_opt_adam",
            traits=("DeepSpeedCPUAdam",), users="forget_beta_powers", why="one update of a number that nobody needs"),
    *_parts("fp32_optimizer_states", "ops.adam.cpu_adam", "DeepSpeedCPUAdam", "engine.basic_optimizer",
            traits=("DeepSpeedCPUAdam",), users="fragments", why="the precision of the moments that it would create"),
    # The trace of memory
    *_parts("checkpoint_engine", *_ENGINE, "engine", traits=(_TRACED,), users="trace",
            why="is handed what a checkpoint of DeepSpeed's holds"),
    *_parts("save", _ENGINE[0], "DeepSpeedEngine.checkpoint_engine", "engine.checkpoint_engine", traits=(_TRACED,),
            users="trace", why="writes it"),
    *_parts("setup_buckets allreduce_bucket allreduce_and_scatter copy_grads_in_partition fill_grad_accum_attribute "
            "_build_compact_grad_partition_buffer", *_STAGE12, of=(ZERO12,), traits=(_TRACED,), users="trace",
            why="make the tensors whose category is known by their maker"),
    *_parts("coalesced_collectives", "runtime.comm", held="submodule", of=(ZERO3,), traits=(_TRACED,), users="trace",
            why="makes buckets"),
    *_parts("partition_parameters partitioned_param_coordinator parameter_offload", "runtime.zero", held="submodule",
            of=(ZERO3,), traits=(_TRACED,), users="trace", why="make gathered parameters"),
    *_parts("averaged_gradients ipg_buckets", *_STAGE12, "engine.optimizer", of=(ZERO12,), traits=(_TRACED,),
            users="trace", why="gradients, and buckets for reducing them"),
    *_parts("temp_grad_buffer_for_gpu_offload", *_STAGE12, "engine.optimizer", of=(ZERO12,),
            traits=(_TRACED, _OFFLOAD), users="trace", why="a bucket on the way to the host"),
    *_parts("fp32_groups_gradients_flat", *_BF16, "engine.optimizer", of=(BF16,), traits=(_TRACED,), users="trace",
            why="gradients in fp32"),
    *_parts("grad_partitions_flat_buffer averaged_gradients ipg_buckets", *_STAGE3, "engine.optimizer", of=(ZERO3,),
            traits=(_TRACED,), users="trace", why="gradients, and buckets for reducing them"),
    *_parts("buffer", _STAGE12[0], "IPGBucket", "code", of=(ZERO12,), traits=(_TRACED,), users="trace",
            why="a bucket's memory"),
    *_parts("buffer", _STAGE3[0], "IPGBucketZ3", "code", of=(ZERO3,), traits=(_TRACED,), users="trace",
            why="a bucket's memory"),
    *_parts("ds_tensor ds_secondary_tensor", "runtime.zero.partition_parameters", "parameter", "parameter",
            of=(ZERO3,), traits=(_TRACED,), users="trace", why="this rank's shard, and the host's for hpZ"),
    # The launcher
    *_parts("--world_info", "launcher.launch", held=LAUNCHER, of=None, users="launch", why="the hosts and their slots"),
    *_parts("--no_ssh_check --force_multi", "launcher.runner", held=LAUNCHER, of=None, users="launch",
            why="every host has been asked before"),
    *_parts("DS_ENV_FILE", "launcher.runner", held=LAUNCHER, of=None, users="launch",
            why="the file of variables that it exports"),
    *_parts("exits_with_return_code", "launcher.launch", held=LAUNCHER, of=None, users="compare",
            why="its log's words for a rank that was killed"),
)  # fmt: skip


def installed_version() -> str:
    """Of DeepSpeed, without what a build of one's own adds to it."""
    return importlib.metadata.version("deepspeed").partition("+")[0]


def wrapper_of(engine: Any) -> str:
    """Which of `WRAPPERS` an engine's optimizer is.

    Raises:
        PrivatePartError: none: where its states are is not known, and a checkpoint would be wrong.
    """
    name = type(engine.optimizer).__name__
    if engine.optimizer is engine.basic_optimizer:
        if name in BARE_OPTIMIZERS:
            return BARE
    elif name in WRAPPERS:
        return name
    raise PrivatePartError(
        f"the optimizer class {name} of DeepSpeed {installed_version()} is not known here; known are "
        f"{', '.join([*BARE_OPTIMIZERS, *(name for name in WRAPPERS if name != BARE)])}; {_remedy()}"
    )


def use_of(engine: Any, ds_config: Mapping[str, Any], *, traced: bool = False, lean: bool = False) -> Use:
    """What decides which parts and fixes an engine needs."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam  # public: by class, a renamed one is no other optimizer

    offload, fp16 = offload_device(ds_config, "optimizer"), precision(ds_config) == "fp16"
    traits = {
        type(engine.basic_optimizer).__name__: True,
        "FusedAdam": isinstance(engine.basic_optimizer, FusedAdam),
        "DeepSpeedCPUAdam": isinstance(engine.basic_optimizer, DeepSpeedCPUAdam),
        _CPU: engine.device.type == "cpu",
        "fp16": fp16,
        _DYNAMIC: fp16 and not value_at(ds_config, ("fp16", "loss_scale")),
        _OFFLOAD: offload != "none",
        _NVME: offload == "nvme",
        _TRACED: traced,
        LEAN: lean,
    }
    return Use(wrapper=wrapper_of(engine), traits=frozenset(name for name, has in traits.items() if has))


def check_parts(use: Use, engine: Any) -> None:
    """Refuses a DeepSpeed that lacks a part which this config needs.

    Raises:
        PrivatePartError: with the names of all that are missing.
    """
    _refuse(part for part in PARTS if part.configs and part.configs.include(use) and not part.is_there(engine))


def require(*names: str) -> None:
    """`check_parts` for parts that are touched before there is an engine, by name."""
    early = {part.name: part for part in PARTS if part.configs is None and part.held != LAUNCHER}
    _refuse(part for part in map(early.__getitem__, names) if not part.is_there())


def _refuse(missing: Iterator[Part]) -> None:
    parts = list({part.name: part for part in missing}.values())
    if parts:
        names = ", ".join(f"{part.name} ({'deepspeed.' + part.module}: {part.why})" for part in parts)
        raise PrivatePartError(f"DeepSpeed {installed_version()} has no {names}, which this config needs; {_remedy()}")


def _remedy() -> str:
    return f"install deepspeed=={VERIFIED[-1]}, or report this: docs/deepspeed.md says how to move to another version"
