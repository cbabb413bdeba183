"""The key table against the installed DeepSpeed: what a new version reads otherwise is noticed here."""

import importlib.metadata
import inspect
import json
import types
import typing
from enum import Enum
from typing import Any

import pytest
from pydantic import ValidationError

from codeparrot_ds.ds_config import known_keys
from codeparrot_ds.ds_config.facts import value_at
from codeparrot_ds.ds_config.inert import DEFAULT_BUCKET, DEFAULT_PARAM_BUFFER, DEFAULT_PARAM_BUFFERS, DEFAULT_SUB_GROUP
from codeparrot_ds.ds_config.known_keys import (
    IGNORES_UNKNOWN,
    KEYS,
    OPTIMIZER_PARAMS,
    REMOVED_KEYS,
    REMOVED_ZERO_KEYS,
    RENAMED,
    SCHEDULER_PARAMS,
)
from codeparrot_ds.ds_config.reading import read_keys
from tools.known_keys import DEEPSPEED_OPTIMIZERS, models, optimizers, render

# Read outside the parser: the first by deepspeed.initialize's callers, the second only when a model asks.
READ_ELSEWHERE = {"sequence_parallel_size", "vocabulary_size"}
ZERO = ("zero_optimization",)
SAMPLING = ("data_efficiency", "data_sampling")
ROUTING = ("data_efficiency", "data_routing")


def test_the_table_is_of_the_installed_version():
    assert importlib.metadata.version("deepspeed").split("+")[0] == known_keys.DEEPSPEED_VERSION


def test_the_file_is_what_the_tool_writes():
    assert known_keys.FILE.read_text(encoding="utf-8") == render(), "run python -m tools.known_keys"


# --------------------------------------------------------------------------------------------------------------------
# Blocks that DeepSpeed reads by hand: it is watched while it does


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
        ("expert_parallel",): Recorder({"enabled": False}),
        ("autotuning", "model_info"): Recorder(),
        (*SAMPLING, "curriculum_learning"): Recorder(),
        (*SAMPLING, "dynamic_batching"): Recorder(),
        (*ROUTING, "random_ltd"): Recorder(),
    }
    blocks["autotuning",] = Recorder({"model_info": blocks["autotuning", "model_info"]})
    blocks["checkpoint",] = Recorder(
        {"parallel_write": blocks["checkpoint", "parallel_write"], "writer": blocks["checkpoint", "writer"]}
    )
    for parent in (SAMPLING, ROUTING):
        blocks[parent] = Recorder({path[-1]: block for path, block in blocks.items() if path[:-1] == parent})
    blocks["data_efficiency",] = Recorder({path[-1]: blocks[path] for path in (SAMPLING, ROUTING)})
    top = Recorder({path[0]: block for path, block in blocks.items() if len(path) == 1})
    top["train_batch_size"] = 1
    DeepSpeedConfig(top)
    return {(): top.asked, **{path: block.asked for path, block in blocks.items()}}


def test_top_level_keys_are_those_that_the_parser_looks_for(asked):
    assert asked[()] - REMOVED_KEYS | READ_ELSEWHERE == set(KEYS[()])


# Keys that the parser takes along unread, for whoever reads the block later.
TAKEN_ALONG = {
    ("optimizer",): {"params"},  # through its own function, after "type"
    ("scheduler",): {"params"},
    (*SAMPLING, "curriculum_learning"): {"curriculum_metrics", "data_cluster_path"},
    (*SAMPLING, "dynamic_batching"): {"metrics_path", "max_tokens", "enabled", "verbose"},
    (*ROUTING, "random_ltd"): set(KEYS[(*ROUTING, "random_ltd")]) - {"enabled"},
}
BY_HAND = sorted(IGNORES_UNKNOWN - {(), ("pipeline",)})


@pytest.mark.parametrize("block", BY_HAND, ids=".".join)
def test_keys_of_blocks_that_deepspeed_reads_by_hand(asked, block):
    if block == (*SAMPLING, "dynamic_batching"):  # copied whole, then read: its defaults are named constants
        return
    assert asked[block] | TAKEN_ALONG.get(block, set()) == set(KEYS[block])


def test_keys_that_later_readers_of_data_efficiency_look_for():
    from deepspeed.runtime.data_pipeline import constants

    named = {name: value for name, value in vars(constants).items() if isinstance(value, str)}
    prefixes = {
        (*SAMPLING, "dynamic_batching"): "DYNAMIC_BATCHING_",
        (*SAMPLING, "curriculum_learning"): "CURRICULUM_LEARNING_",
        (*ROUTING, "random_ltd"): "RANDOM_LTD_",
    }
    for block, prefix in prefixes.items():
        words = {value for name, value in named.items() if name.startswith(prefix)}
        assert set(KEYS[block]) <= words, block
    batching = {v for n, v in named.items() if n.startswith("DYNAMIC_BATCHING_") and not n.endswith("_DEFAULT")}
    assert set(KEYS[(*SAMPLING, "dynamic_batching")]) == batching


def test_pipeline_keys_are_those_with_defaults():
    from deepspeed.runtime.config import get_pipeline_config

    assert set(get_pipeline_config({})) | {"use_reentrant"} == set(KEYS["pipeline",])


def defaults_by_hand():
    """(block, key) → DeepSpeed's default, of blocks without models, from its constants and tables of defaults."""
    from deepspeed.autotuning import constants as autotuning
    from deepspeed.profiling import constants as profiling
    from deepspeed.runtime import constants
    from deepspeed.runtime.activation_checkpointing.config import ACT_CHKPT_DEFAULT
    from deepspeed.runtime.config import get_pipeline_config
    from deepspeed.runtime.model_checkpointing import constants as checkpointing
    from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT

    found = {("activation_checkpointing", key): value for key, value in ACT_CHKPT_DEFAULT.items()}
    found |= {("aio", key): value for key, value in AIO_DEFAULT_DICT.items()}
    found |= {("pipeline", key): value for key, value in get_pipeline_config({}).items()}
    sources = (
        (constants, ()),
        (profiling, ("flops_profiler",)),
        (autotuning, ("autotuning",)),
        (autotuning, ("autotuning", "model_info")),
        (checkpointing, ("checkpoint",)),
        (checkpointing, ("checkpoint", "writer")),
        (constants, ("data_types",)),
    )
    for module, block in sources:
        names = vars(module)
        for name, default in names.items():
            key = names.get(name.removesuffix("_DEFAULT"))
            if name.endswith("_DEFAULT") and isinstance(key, str) and key in KEYS[block]:
                found[(*block, key)] = default
    return found


def test_deepspeeds_own_defaults_are_right_values():
    defaults = defaults_by_hand()
    assert len(defaults) > 60
    for path, default in defaults.items():
        kind = KEYS[path[:-1]][path[-1]]
        if default is None or kind.name == "block":
            continue
        assert kind.problem(default) is None, (path, default)
        if isinstance(default, bool):
            assert kind.name == "bool", path
        elif isinstance(default, int):
            assert kind.name in ("int", "number"), path


# --------------------------------------------------------------------------------------------------------------------
# Blocks that DeepSpeed reads with models


def fields():
    """(block, key, model, field) of every key that a model reads, under each of its names."""
    for block, model in models().items():
        for name, field in model.model_fields.items():
            for key in filter(None, (name, field.alias)):
                yield block, key, model, field


FIELDS = list(fields())


def test_keys_of_blocks_that_deepspeed_reads_with_models():
    for block in models():
        assert {key for other, key, _, _ in FIELDS if other == block} == set(KEYS[block]), block


def test_no_block_escapes_these_tests(asked):
    assert set(KEYS) == set(asked) | set(models()) | {("pipeline",)}


def test_which_blocks_refuse_unknown_keys():
    assert set(KEYS) - IGNORES_UNKNOWN == set(models())
    for model in models().values():
        assert model.model_config["extra"] == "forbid"


def plain_type(annotation):
    """(type, whether null is one of its values) of a field's annotation."""
    options = typing.get_args(annotation) if typing.get_origin(annotation) in (typing.Union, types.UnionType) else ()
    plain = [option for option in options if option is not type(None)]
    return (plain[0] if plain else annotation), type(None) in options


def names_of(annotation):
    """The kinds of the table that fit a field's annotation."""
    if inspect.isclass(annotation) and issubclass(annotation, Enum):
        return {"choice"}
    if inspect.isclass(annotation) and hasattr(annotation, "model_fields"):
        return {"block"}
    if typing.get_origin(annotation) is typing.Literal:
        return {"choice"}
    if annotation is list or typing.get_origin(annotation) is list:
        return {"texts"}
    return {bool: {"bool"}, int: {"int"}, float: {"number"}, str: {"text", "choice", "int"}}.get(
        annotation, {"text", "any"}
    )


@pytest.mark.parametrize(("block", "key", "model", "field"), FIELDS, ids=lambda value: str(value)[:40])
def test_types_and_ranges_are_the_models(block, key, model, field):
    kind = KEYS[block][key]
    annotation, optional = plain_type(field.annotation)
    assert kind.name in names_of(annotation), (annotation, kind)
    if kind.name not in ("any", "block"):
        assert kind.optional == optional
    limits = {"minimum": "ge", "above": "gt", "maximum": "le", "below": "lt"}
    for ours, theirs in limits.items():
        for mark in field.metadata:
            if hasattr(mark, theirs):
                assert getattr(kind, ours) == getattr(mark, theirs)
    if inspect.isclass(annotation) and issubclass(annotation, Enum):
        assert set(kind.choices) == {choice.value for choice in annotation}
    elif typing.get_origin(annotation) is typing.Literal:
        assert set(kind.choices) == set(typing.get_args(annotation))


CANDIDATES = [-1, 0, 1, 0.5, 1e9, "x", "5e8", "none", True, None, [], ["x"], [1]]


@pytest.mark.parametrize(("block", "key", "model", "field"), FIELDS, ids=lambda value: str(value)[:40])
def test_a_value_that_deepspeed_refuses_is_an_error(block, key, model, field):
    if KEYS[block][key].name in ("any", "block"):
        return
    for value in CANDIDATES:
        try:
            model(**{key: value})
        except (ValidationError, AssertionError):
            config: dict[str, Any] = {key: value}
            for part in reversed(block):
                config = {part: config}
            wrong = [path for path, severity, _ in read_keys(config).said if severity == "error"]
            # Between keys (partial offload, the gradient norm) it is a rule that says so.
            assert wrong == [(*block, key)] or key in ("ratio", "compute_grad_norm"), (key, value)


# Without "5.0" for a whole number, of which the models think differently: there it is an error.
OTHER_TYPES = ["true", "False", "yes", "off", "1", "0", "5", " 5", "1_000", "5e8", "0.5", "1e-8", "x", "", "nan"]
OTHER_TYPES += [0, 1, 2, 0.0, 1.0, 0.5, True, False, [], [1], {}]


@pytest.mark.parametrize(("block", "key", "model", "field"), FIELDS, ids=lambda value: str(value)[:40])
def test_a_value_of_another_type_is_taken_for_what_the_model_makes_of_it(block, key, model, field):
    kind = KEYS[block][key]
    if kind.name in ("any", "block", "texts") or (*block, key) in RENAMED:
        return
    name = next(name for name, other in model.model_fields.items() if other is field)
    for value in OTHER_TYPES:
        if kind.problem(value) is None or (isinstance(value, bool) and kind.name != "bool"):
            continue  # right as it is, or true and false for a number, which nobody means
        try:
            made = getattr(model(**{key: value}), name)
        except (ValidationError, AssertionError):
            made = None
        if made is not None and kind.problem(made):
            made = None  # the table knows a smaller range than the model
        if key != "compute_grad_norm":  # between keys: a rule
            assert kind.converted(value) == made and type(kind.converted(value)) is type(made), (key, value)


def test_a_default_that_a_model_has_is_a_right_value():
    for block, key, _, field in FIELDS:
        default = field.get_default(call_default_factory=True)
        kind = KEYS[block][key]
        if isinstance(default, Enum):
            default = default.value
        if kind.name not in ("any", "block"):
            assert kind.problem(default) is None, (block, key, default)


def test_defaults_that_rules_speak_of():
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadParamConfig

    assert DeepSpeedZeroConfig().reduce_bucket_size == DEFAULT_BUCKET
    assert DeepSpeedZeroConfig().sub_group_size == DEFAULT_SUB_GROUP
    parameters = DeepSpeedZeroOffloadParamConfig()
    assert (parameters.buffer_size, parameters.buffer_count) == (DEFAULT_PARAM_BUFFER, DEFAULT_PARAM_BUFFERS)
    # What the traffic of stages 1 and 2 in ds_configs/README.md goes by.
    assert DeepSpeedZeroConfig().use_multi_rank_bucket_allreduce


# --------------------------------------------------------------------------------------------------------------------
# Old names, removed keys, optimizers, schedulers


def test_old_names_are_those_that_the_models_call_deprecated():
    deprecated = {
        (*block, key)
        for block, key, _, field in FIELDS
        if (field.json_schema_extra or {}).get("deprecated") and block == ZERO
    }
    without_effect = {(*ZERO, "cpu_offload_use_pin_memory")}
    assert deprecated == {old for old in RENAMED if old[:1] == ZERO} | without_effect


def test_removed_keys():
    from deepspeed.runtime import config

    assert set(config._REMOVED_TOP_LEVEL_CONFIG_KEYS) == REMOVED_KEYS
    assert set(config._REMOVED_ZERO_CONFIG_KEYS) == REMOVED_ZERO_KEYS


def test_dtypes():
    from deepspeed.runtime.config import DtypeEnum

    words = {word for dtype in DtypeEnum for word in dtype._all_values if isinstance(word, str)}
    assert set(KEYS["data_types",]["grad_accum_dtype"].choices) == words


def test_optimizers():
    from deepspeed.runtime import config
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    own = {name.lower() for name in DEEPSPEED_OPTIMIZERS}
    assert own == set(config.DEEPSPEED_OPTIMIZERS)
    assert KEYS["optimizer",]["type"].choices == optimizers()
    words = " ".join(optimizer.__name__.lower() for optimizer in ZERO_SUPPORTED_OPTIMIZERS) + " muon"
    assert {name for name in own - {"muadam", "muadamw"} if name in words} == known_keys.ZERO_OPTIMIZERS
    assert not known_keys.REMOVED_OPTIMIZERS & set(config.DEEPSPEED_OPTIMIZERS)


def test_parameters_of_optimizers():
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
    from deepspeed.ops.lamb import FusedLamb
    from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion

    kernels = {"adam": (FusedAdam, DeepSpeedCPUAdam), "lion": (FusedLion, DeepSpeedCPULion), "lamb": (FusedLamb,)}
    not_of_the_file = {"self", "params", "model_params", "set_grad_none", "adamw_mode", "max_grad_norm"}
    read_by_the_engine = {"adam": {"torch_adam", "foreach"}, "lion": set(), "lamb": set()}
    for name, classes in kernels.items():
        accepted = set().union(*(inspect.signature(kernel.__init__).parameters for kernel in classes))
        assert accepted - not_of_the_file | read_by_the_engine[name] == set(OPTIMIZER_PARAMS[name]), name


def test_schedulers():
    from deepspeed.runtime import lr_schedules

    assert set(SCHEDULER_PARAMS) < set(lr_schedules.VALID_LR_SCHEDULES)
    for name, params in SCHEDULER_PARAMS.items():
        accepted = set(inspect.signature(getattr(lr_schedules, name).__init__).parameters)
        assert set(params) == accepted - {"self", "optimizer"}, name


def test_deepspeeds_documented_formats_hold_known_keys_only():
    """The examples that DeepSpeed's constants carry, where they are JSON."""
    from deepspeed.runtime.swap_tensor.constants import AIO_FORMAT
    from deepspeed.utils.config import TIMERS_FORMAT

    for text in (AIO_FORMAT, TIMERS_FORMAT.partition(":\n")[2]):
        example = json.loads("{" + text + "}")
        assert read_keys(example).said == [] and value_at(example, (next(iter(example)),))
