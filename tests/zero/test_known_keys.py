"""The hand-kept tables against the installed DeepSpeed."""

from typing import Any

import pytest

from codeparrot_ds.zero.known_keys import ADAM_PARAMS, CPU_OPTIMIZERS, KNOWN_KEYS, REMOVED_KEYS, REMOVED_ZERO_KEYS

# Read outside the parser: the first by deepspeed.initialize's callers, the second only when a model asks.
READ_ELSEWHERE = {"sequence_parallel_size", "vocabulary_size"}


class Recorder(dict):
    """A config block that remembers which keys its reader looks for."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.asked: set[str] = set()

    def __copy__(self) -> "Recorder":
        return self

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def keys(self) -> Any:
        return self


@pytest.fixture(scope="module")
def asked():
    from deepspeed.runtime.config import DeepSpeedConfig

    blocks: dict[tuple[str, ...], Recorder] = {
        ("optimizer",): Recorder({"type": "AdamW", "params": {}}),
        ("scheduler",): Recorder({"type": "WarmupLR", "params": {}}),
        ("activation_checkpointing",): Recorder(),
        ("data_types",): Recorder(),
        ("aio",): Recorder(),
        ("torch_autocast",): Recorder({"enabled": False, "lower_precision_safe_modules": [], "dtype": "bfloat16"}),
        ("flops_profiler",): Recorder(),
        ("timers",): Recorder({"throughput": {}}),
        ("checkpoint", "parallel_write"): Recorder(),
        ("checkpoint", "writer"): Recorder({"type": "fast"}),
    }
    blocks[("checkpoint",)] = Recorder(
        {"parallel_write": blocks["checkpoint", "parallel_write"], "writer": blocks["checkpoint", "writer"]}
    )
    top = Recorder({path[0]: block for path, block in blocks.items() if len(path) == 1})
    top["train_batch_size"] = 1
    DeepSpeedConfig(top)
    return {(): top.asked, **{path: block.asked for path, block in blocks.items()}}


def test_top_level_keys_are_those_that_the_parser_looks_for(asked):
    assert asked[()] - REMOVED_KEYS | READ_ELSEWHERE == KNOWN_KEYS[()]


@pytest.mark.parametrize(
    "block",
    [
        ("optimizer",),
        ("scheduler",),
        ("activation_checkpointing",),
        ("data_types",),
        ("aio",),
        ("torch_autocast",),
        ("flops_profiler",),
        ("timers",),
        ("checkpoint",),
        ("checkpoint", "parallel_write"),
        ("checkpoint", "writer"),
    ],
    ids=".".join,
)
def test_keys_of_blocks_that_deepspeed_reads_by_hand(asked, block):
    # "params" is taken from the block only through its own function, after "type".
    assert asked[block] | ({"params"} & KNOWN_KEYS[block]) == KNOWN_KEYS[block]


def models():
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.compile.config import CompileConfig
    from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
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
    }


def test_keys_of_blocks_that_deepspeed_reads_with_models():
    for block, model in models().items():
        fields = model.model_fields
        names = set(fields) | {field.alias for field in fields.values() if field.alias}
        assert names == KNOWN_KEYS[block], block


def test_no_block_escapes_these_tests(asked):
    assert set(KNOWN_KEYS) == set(asked) | set(models())


def test_removed_keys_and_optimizers():
    import inspect

    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
    from deepspeed.runtime import config

    assert set(config._REMOVED_TOP_LEVEL_CONFIG_KEYS) == REMOVED_KEYS
    assert set(config._REMOVED_ZERO_CONFIG_KEYS) == REMOVED_ZERO_KEYS
    assert set(config.DEEPSPEED_OPTIMIZERS) >= CPU_OPTIMIZERS
    accepted = set()
    for kernel in (FusedAdam, DeepSpeedCPUAdam):
        accepted |= set(inspect.signature(kernel.__init__).parameters)
    own = {"self", "params", "model_params", "set_grad_none", "adamw_mode"}
    assert accepted - own | {"torch_adam", "foreach"} == ADAM_PARAMS
