"""What a trace of memory replaces in DeepSpeed, and where it finds the tensors of an engine (``memory/traced_engine``).

Each part that is replaced is required first: a replacement of something that DeepSpeed no longer looks at would leave
the real one in use, or the bytes in another category, without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from codeparrot_ds.engine.private_parts import BF16, ZERO3, ZERO12, require, wrapper_of

# What DeepSpeed's functions make, by file and function; "*" stands for all functions of a file. What stays from step to
# step is known by where it is found instead (`model_state`).
MAKERS: dict[str, dict[str, tuple[str, ...]]] = {
    "buckets": {
        "stage_1_and_2.py": ("setup_buckets", "allreduce_bucket", "allreduce_and_scatter"),
        "coalesced_collectives.py": ("*",),
    },
    "gradients": {
        "stage_1_and_2.py": (
            "copy_grads_in_partition",
            "fill_grad_accum_attribute",
            "_build_compact_grad_partition_buffer",
        )
    },
    "parameters": {
        name: ("*",) for name in ("partition_parameters.py", "partitioned_param_coordinator.py", "parameter_offload.py")
    },
}


def replace_backend(backend: Any) -> None:
    """Puts a backend of finished collectives in the place of DeepSpeed's, for good."""
    require("comm.cdb", "partitioned_param_coordinator.assert_ints_same_as_other_ranks")
    from deepspeed.comm import comm
    from deepspeed.runtime.zero import partitioned_param_coordinator

    comm.cdb = backend
    # It compares numbers of all ranks, which here have no values.
    partitioned_param_coordinator.assert_ints_same_as_other_ranks = lambda *_: None


def replace_operators(**modules: Any) -> None:
    """Hands DeepSpeed modules by the name of the compiled operator whose place they take, for good."""
    require("OpBuilder._loaded_ops")
    from deepspeed.ops.op_builder.builder import OpBuilder

    OpBuilder._loaded_ops.update(modules)


def replace_pinning(
    accelerator: type,
    *,
    pin: Callable[[Any], Any],
    empty: Callable[[Any, Any], Any],
    is_pinned: Callable[[Any], bool],
) -> None:
    """Makes a class of accelerators page-lock host memory as CUDA's does, by functions of a tensor (and a shape)."""
    hooks = {
        "_torch_pins_host_memory": True,
        "_torch_pin_memory": lambda self, tensor: pin(tensor),
        "_torch_empty_pinned": lambda self, tensor, shape: empty(tensor, shape),
        "_torch_is_pinned": lambda self, tensor: is_pinned(tensor),
    }
    require(*(f"DeepSpeedAccelerator.{name}" for name in hooks))
    for name, hook in hooks.items():
        setattr(accelerator, name, hook)


def model_state(engine: Any) -> Iterator[tuple[str, Any]]:
    """What stays from step to step: its category, and tensors or nested lists and dicts of tensors."""
    basic, wrapper, kind = engine.basic_optimizer, engine.optimizer, wrapper_of(engine)
    for parameter in engine.module.parameters():
        yield "parameters", parameter.data
        if kind == ZERO3:
            yield "parameters", [parameter.ds_tensor, parameter.ds_secondary_tensor]
    for group in basic.param_groups:
        yield "optimizer", [parameter.data for parameter in group["params"]]
    for state in basic.state.values():
        yield "optimizer", list(state.values())
    if kind == ZERO3:
        # Stage 3 hands the basic optimizer one sub-group at a time.
        yield "optimizer", wrapper.fp32_partitioned_groups_flat
        yield "gradients", wrapper.grad_partitions_flat_buffer
    if kind == BF16:
        yield "gradients", wrapper.fp32_groups_gradients_flat
    if kind in (ZERO12, ZERO3):
        yield "gradients", wrapper.averaged_gradients
        yield "buckets", [bucket.buffer for bucket in wrapper.ipg_buckets.values()]
    if kind == ZERO12 and wrapper.cpu_offload:
        yield "buckets", wrapper.temp_grad_buffer_for_gpu_offload


def capture_checkpoints(engine: Any, save: Callable[[Any, str], None]) -> None:
    """Has `save` called with what DeepSpeed's checkpoints hold and the file's path, instead of writing them."""
    engine.checkpoint_engine.save = save
