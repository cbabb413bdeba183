"""The run config: everything about a run that is not DeepSpeed's (batch, schedule, data, saving), and its command line.

ZeRO, precision, optimizer kernel, activation checkpointing and communication belong to the DeepSpeed JSON
(``codeparrot_ds.zero``). Importing this module imports neither torch nor PyYAML.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from codeparrot_ds import durable
from codeparrot_ds.errors import UserError
from codeparrot_ds.option_types import count as _positive
from codeparrot_ds.option_types import index as _not_negative
from codeparrot_ds.option_types import port, real, whole_number
from codeparrot_ds.paths import NEAR, RUNS, SLIP, did_you_mean_path, expand, name_argument, nearest_of


def did_you_mean(word: str, choices: Iterable[str], likeness: float = NEAR) -> str:
    """``"; did you mean 'x'?"`` for the choice nearest to `word`, or the list of choices when none is near."""
    choices = sorted(set(choices))
    near = nearest_of(word, choices, likeness)
    if near is not None:
        return f"; did you mean {near!r}?"
    if 0 < len(choices) <= 12:
        return f"; choose one of {', '.join(choices)}"
    return ""


# --------------------------------------------------------------------------------------------------------------------
# The fields


class _Auto(int):
    """What ``auto`` stands for where a number is expected; no number that a user gives is one."""

    def __repr__(self) -> str:
        return "auto"


AUTO = _Auto(0)


def _setting(
    default: Any,
    group: str,
    text: str,
    *,
    minimum: float | None = None,
    choices: tuple[str, ...] = (),
    words: Mapping[str, int] | None = None,
    is_path: Callable[[str], bool] | None = None,
    mixture: bool = False,
) -> Any:
    metadata = {"group": group, "help": text, "minimum": minimum, "choices": choices, "words": words or {}}
    return dataclasses.field(default=default, metadata=metadata | {"is_path": is_path, "mixture": mixture})


def _is_anything_but(*words: str) -> Callable[[str], bool]:
    """Of a field that takes a path or one of some words."""
    return lambda text: text not in words


# Identifiers that the Hub takes in a model card; any other would make it refuse every checkpoint.
LICENSES = (
    *("other", "agpl-3.0", "apache-2.0", "bigcode-openrail-m", "bsd-2-clause", "bsd-3-clause", "cc-by-4.0", "cc0-1.0"),
    *("gpl-2.0", "gpl-3.0", "isc", "lgpl-3.0", "mit", "mpl-2.0", "openrail", "unlicense"),
)


MODEL_NAMES = ("demo", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
"""What ``model`` knows by name (``model.shapes.KNOWN_SHAPES``), whatever lies in a folder of that name."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run's settings; the defaults are the recipe's 111M model (preset ``small``).

    Every problem of the values is collected and raised as one `UserError`.
    """

    data: str = _setting(
        "",
        "data",
        "corpus folder, folder of shards, one shard, or Hub data set (org/name); several as NAME=WEIGHT,NAME=WEIGHT",
        is_path=os.path.exists,
        mixture=True,
    )
    validation_data: str = _setting(
        "",
        "data",
        "the same, to evaluate on (default: the validation split of data)",
        is_path=os.path.exists,
        mixture=True,
    )
    tokenizer: str = _setting(
        "",
        "data",
        "tokenizer folder made by `tokenizer` (holds tokenizer.json), or a name on the Hub (gpt2, org/name); init_from "
        "brings its own",
        is_path=os.path.exists,
    )
    seq_length: int = _setting(1024, "data", "tokens a row", minimum=2)
    shuffle_buffer: int = _setting(1000, "data", "documents a shuffle window holds", minimum=1)
    num_lanes: int = _setting(64, "data", "logical streams that fix the order of rows at any world size", minimum=1)
    num_workers: int = _setting(1, "data", "loader processes a rank (0: load in the rank's own process)", minimum=0)
    max_bad_documents: int = _setting(100, "data", "unreadable documents that a run skips before it stops", minimum=0)
    on_data_change: str = _setting(
        "refuse",
        "data",
        "a resumed run whose data, tokenizer, lanes or seed changed: refuse, or restart with a new epoch",
        choices=("refuse", "restart"),
    )

    on_batch_change: str = _setting(
        "refuse",
        "data",
        "a resumed run with another global_batch_size: refuse, or continue with the next rows and the same steps",
        choices=("refuse", "continue"),
    )

    model: str = _setting(
        "gpt2",
        "model",
        "gpt2, gpt2-medium, gpt2-large, gpt2-xl, demo, or a GPT-2 config.json",
        is_path=lambda text: text not in MODEL_NAMES and os.path.exists(text),
    )
    init_from: str = _setting(
        "",
        "model",
        "begin with the weights and tokenizer of a run, a model folder, org/name@BRANCH on the Hub, or REPO.git@BRANCH "
        "(default: random weights)",
        is_path=os.path.exists,
    )
    dropout: float = _setting(0.0, "model", "probability of residual, embedding and attention dropout", minimum=0.0)
    intra_document_masking: bool = _setting(
        False, "model", "attend inside a document only, with positions that restart; costs a dense mask"
    )
    chunked_loss: bool = _setting(
        False, "model", "never hold the softmax of all tokens in fp32: less memory for the logits, the same loss"
    )
    compile: bool = _setting(False, "model", "compile the model with torch.compile")
    deepspeed: str = _setting(
        "zero2:auto",
        "model",
        "DeepSpeed JSON: a path, a shipped file's name, or NAME:auto for it in the precision that is fastest here",
        is_path=os.path.isfile,
    )

    global_batch_size: int = _setting(192, "batch and schedule", "rows a step over all ranks", minimum=1)
    micro_batch_size: int = _setting(
        12,
        "batch and schedule",
        "rows a rank a forward pass; auto: as many as the memory plan says fit",
        minimum=1,
        words={"auto": AUTO},
    )
    learning_rate: float = _setting(5e-4, "batch and schedule", "peak learning rate", minimum=0.0)
    lr_scheduler_type: str = _setting(
        "cosine", "batch and schedule", "decay after the warm-up", choices=("cosine", "linear", "constant")
    )
    num_warmup_steps: int = _setting(2000, "batch and schedule", "steps of linear warm-up", minimum=0)
    max_train_steps: int = _setting(150_000, "batch and schedule", "optimizer steps of the whole run", minimum=1)
    weight_decay: float = _setting(
        0.1, "batch and schedule", "decay of matrices (biases and LayerNorms have none)", minimum=0.0
    )
    max_grad_norm: float = _setting(1.0, "batch and schedule", "clip the gradient norm here (0: never)", minimum=0.0)
    max_bad_steps: int = _setting(
        10, "batch and schedule", "skipped steps in a row (loss or gradient not finite) that end the run", minimum=1
    )
    seed: int = _setting(1, "batch and schedule", "seed of the weights, the data order and dropout", minimum=0)

    eval_steps: int | None = _setting(
        None, "evaluation", "optimizer steps between evaluations (none: with every checkpoint)", minimum=1
    )
    max_eval_steps: int = _setting(-1, "evaluation", "batches of one evaluation (-1: all of the validation split)")
    eval_prompts: str = _setting(
        "",
        "evaluation",
        "complete these at each evaluation: a file of prompts, or examples for the recipe's four",
        is_path=_is_anything_but("examples"),
    )
    eval_problems: str = _setting(
        "",
        "evaluation",
        "solve these at each evaluation, once each: a file of a few problems in HumanEval's or MBPP's schema",
        is_path=os.path.isfile,
    )
    eval_new_tokens: int = _setting(128, "evaluation", "tokens of each of these completions at most", minimum=1)
    allow_execution: bool = _setting(
        False, "evaluation", "run the programs that solve eval_problems, in a sandbox; needed for them"
    )

    output_dir: str = _setting("runs", "saving", "folder that holds the runs", is_path=_is_anything_but())
    run_name: str | None = _setting(None, "saving", "name of the run, its folder and branch (none: made up)")
    save_checkpoint_steps: int = _setting(15_000, "saving", "optimizer steps between checkpoints", minimum=1)
    save_in_background: bool = _setting(
        True, "saving", "go on training while a checkpoint is written (takes host memory for a copy of it)"
    )
    keep_checkpoints: int = _setting(3, "saving", "newest checkpoints to keep", minimum=1)
    keep_checkpoint_every: int | None = _setting(
        None, "saving", "keep also each checkpoint whose step is a multiple of this, for ever (none: none)", minimum=1
    )
    keep_best_checkpoint: bool = _setting(True, "saving", "keep also the checkpoint with the lowest evaluation loss")
    max_hours: float | None = _setting(
        None, "saving", "save, end and exit 0 at the first step boundary after so many hours (none: no limit)"
    )
    resume: str = _setting(
        "auto",
        "saving",
        "auto (the newest valid checkpoint), never, or the path of a checkpoint or of a run (its newest)",
        is_path=_is_anything_but("auto", "never"),
    )
    hub: str = _setting(
        "local",
        "saving",
        "branch of checkpoints: local, off, a bare git repository's path, or org/name on the Hub",
        is_path=lambda text: text.endswith(".git") and "://" not in text,
    )
    license: str = _setting("other", "saving", "licence of the weights, for the model card", choices=LICENSES)
    hub_queue_gb: float = _setting(
        100.0,
        "saving",
        "gigabytes of exports that only wait to be pushed; past it the oldest go",
        minimum=0,
    )

    log_steps: int = _setting(10, "logging", "optimizer steps between lines of metrics", minimum=1)
    profile: int = _setting(
        0,
        "logging",
        "steps to profile, from the fourth of a start on: a trace and a table (0: none)",
        minimum=0,
    )
    wandb: str = _setting(
        "auto",
        "logging",
        "Weights & Biases; auto is online when logged in",
        choices=("auto", "online", "offline", "off"),
    )

    def __post_init__(self) -> None:
        problems = []
        for name, field in FIELDS.items():
            value = getattr(self, name)
            if field.kind == "float" and _is_number(value):
                object.__setattr__(self, name, float(value))
            if isinstance(value, str) and value in field.words:
                object.__setattr__(self, name, field.words[value])
            problem = field.problem(getattr(self, name))
            if problem:
                problems.append(f"{name} {problem}")
            elif field.is_path and value:
                object.__setattr__(self, name, field.each_path(value, expand))
        if not problems:
            problems = self._cross_field_problems()
        if problems:
            raise UserError("run config: " + "; ".join(problems))

    def _cross_field_problems(self) -> list[str]:
        problems = []
        if not self.auto_micro_batch and self.global_batch_size % self.micro_batch_size:
            sizes = _nearest_divisors(self.global_batch_size, self.micro_batch_size)
            problems.append(
                f"global_batch_size {self.global_batch_size} is not divisible by micro_batch_size "
                f"{self.micro_batch_size} (nearest micro_batch_size: {sizes})"
            )
        if self.dropout >= 1:
            problems.append(f"dropout must be below 1, not {self.dropout}")
        if self.max_hours is not None and self.max_hours <= 0:
            problems.append(f"max_hours must be above 0, not {self.max_hours}")
        if self.max_eval_steps < -1 or self.max_eval_steps == 0:
            problems.append(f"max_eval_steps must be -1 (all) or at least 1, not {self.max_eval_steps}")
        name = self.run_name
        if name is not None and (not name.strip() or "/" in name or name.startswith((".", "-"))):
            problems.append(f"run_name must be a plain folder name, not {name!r}")
        return problems

    @property
    def auto_micro_batch(self) -> bool:
        """Whether the micro-batch is still to be chosen (`codeparrot_ds.run.micro_batch`)."""
        return isinstance(self.micro_batch_size, _Auto)

    def gradient_accumulation_steps(self, world_size: int) -> int:
        """Micro-batches that each of `world_size` ranks adds up for one optimizer step: global / (micro x world)."""
        if self.auto_micro_batch:
            raise UserError("micro_batch_size auto is chosen when a run starts; give a number here")
        rows = self.micro_batch_size * world_size
        if self.global_batch_size % rows == 0:
            return self.global_batch_size // rows
        nearest_global = max(rows, round(self.global_batch_size / rows) * rows)
        choices = f"--global-batch-size {nearest_global}"
        if self.global_batch_size % world_size == 0:
            micro = _nearest_divisors(self.global_batch_size // world_size, self.micro_batch_size)
            choices = f"--micro-batch-size {micro} or {choices}"
        raise UserError(
            f"global_batch_size {self.global_batch_size} is not divisible by micro_batch_size x world_size = "
            f"{self.micro_batch_size} x {world_size} = {rows}; nearest choices: {choices}"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _nearest_divisors(number: int, wanted: int) -> str:
    far = 1_000_000  # nobody counts a batch of 1e30 through
    start = min(wanted, number)
    below = next((d for d in range(start, max(0, start - far), -1) if number % d == 0), 1)
    above = next((d for d in range(wanted + 1, min(number, wanted + far) + 1) if number % d == 0), None)
    return " or ".join(str(d) for d in (below, above) if d is not None)


@dataclass(frozen=True)
class _Field:
    """What the parser and the checks need to know of one field of `RunConfig`."""

    name: str
    kind: str  # "str", "int", "float" or "bool"
    optional: bool
    default: Any
    group: str
    help: str
    minimum: float | None
    choices: tuple[str, ...]
    words: Mapping[str, int]  # that stand for values which no number does
    is_path: Callable[[str], bool] | None  # of a field that holds paths: whether a text is one, or a name
    mixture: bool  # whether it may hold several, as NAME=WEIGHT,NAME=WEIGHT

    @property
    def expected(self) -> str:
        text = {"str": "text", "int": "a whole number", "float": "a number", "bool": "true or false"}[self.kind]
        return " or ".join([text, *self.words, *(["none"] if self.optional else [])])

    def problem(self, value: Any) -> str | None:
        """What is wrong with `value`, or None."""
        if (value is None and self.optional) or (self.words and isinstance(value, _Auto)):
            return None
        types: Any = {"str": str, "int": int, "float": (int, float), "bool": bool}[self.kind]
        if not isinstance(value, types) or (isinstance(value, bool) and self.kind != "bool"):
            return f"must be {self.expected}, not {value!r}"
        if self.kind == "float" and not math.isfinite(value):
            return f"must be a finite number, not {value!r}"
        if self.minimum is not None and value < self.minimum:
            return f"must be at least {self.minimum:g}, not {value!r}"
        if self.choices and value not in self.choices:
            return f"cannot be {value!r}{did_you_mean(value, self.choices)}"
        if self.is_path and self.default and not value:
            return "cannot be an empty text"
        if self.is_path and value:
            try:
                self.each_path(value, expand)
            except UserError as error:
                return f"cannot be {error}"
        return None

    def each_path(self, value: str, change: Callable[[str], str]) -> str:
        """The value with each path in it changed, and the weights of a mixture as they are."""
        if not self.mixture or "=" not in value or os.path.exists(expand(value)):
            return change(value)
        parts = [part.strip().rpartition("=") for part in value.split(",")]
        return ",".join(change(name) + sign + weight if name else sign + weight for name, sign, weight in parts)

    def absolute(self, value: str) -> str:
        """The value with each path in it absolute, and names as they are."""
        is_path = self.is_path
        if is_path is None:
            return value
        return self.each_path(value, lambda text: str(Path(text).absolute()) if text and is_path(text) else text)

    def parse(self, text: str) -> Any:
        """The value that a flag's text means; ValueError if it means none (``1e5`` is a whole number)."""
        if self.optional and text.lower() in ("none", "null"):
            return None
        if text in self.words:
            return self.words[text]
        if self.kind == "float":
            return float(text)
        if self.kind == "int":
            return whole_number(text)
        return text


def _fields() -> dict[str, _Field]:
    fields = {}
    for field in dataclasses.fields(RunConfig):
        kind, _, optional = str(field.type).partition(" | ")
        fields[field.name] = _Field(field.name, kind, bool(optional), field.default, **field.metadata)
    return fields


FIELDS = _fields()

PATH_FIELDS = tuple(name for name, field in FIELDS.items() if field.is_path)


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """What a run keeps of its config and hands to its ranks: each path means the same from every working directory.

    A name (of a shipped file, a known model, something on the Hub) stays one; what is neither a name nor there stays
    as it was typed, for the refusal.
    """
    changed: dict[str, Any] = {name: FIELDS[name].absolute(getattr(config, name)) for name in PATH_FIELDS}
    return dataclasses.replace(config, **changed)


PRESETS: Mapping[str, Mapping[str, Any]] = {
    "small": {},
    "large": {
        "model": "gpt2-xl",
        "micro_batch_size": 2,
        "global_batch_size": 512,
        "learning_rate": 2e-4,
        "num_warmup_steps": 750,
        "max_train_steps": 50_000,
        "save_checkpoint_steps": 1024,
        "deepspeed": "zero2_activation_checkpointing:auto",
    },
    "demo": {
        "model": "demo",
        "seq_length": 256,
        "global_batch_size": 16,
        "micro_batch_size": 8,
        "learning_rate": 2e-3,
        "num_warmup_steps": 20,
        "max_train_steps": 300,
        "save_checkpoint_steps": 150,
        "max_eval_steps": 12,
        "log_steps": 10,
    },
}
REQUIRED = ("data", "tokenizer")
"""Fields without which no run starts (`init_from` brings a tokenizer)."""
SET_BY_COMPARE = ("deepspeed", "output_dir", "run_name", "resume", "hub", "wandb", "log_steps", "profile")
"""Fields that ``compare`` decides itself for each of its trials."""
PRESET_HELP = "small (111M parameters, the defaults), large (1.5B) or demo (a few million)"


# --------------------------------------------------------------------------------------------------------------------
# Files


def load_config(path: str | os.PathLike[str]) -> RunConfig:
    """The run config of a YAML or JSON file; fields that it leaves out have their defaults."""
    return RunConfig(**read_config_file(path))


def save_config(config: RunConfig, path: str | os.PathLike[str]) -> None:
    """Writes `config` as YAML that `load_config` reads back equal; a reader sees the old file or the whole new one."""
    import yaml

    durable.replace_file(Path(path), [yaml.safe_dump(dataclasses.asdict(config), sort_keys=False).encode()])


def read_config_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The fields that a YAML or JSON file sets; `UserError` with file, line and key for what is not a field's value."""
    import yaml

    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such run config file{did_you_mean_path(path)}") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; --config takes one YAML or JSON file") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a text file; --config takes YAML or JSON") from None
    if path.suffix == ".json":
        # JSON is read as YAML, which knows line numbers; YAML forbids the tabs that may indent JSON.
        text = text.replace("\t", " ")
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise UserError(f"{path}{where}: not valid YAML or JSON: {error.problem}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML or JSON: {' '.join(str(error).split())}") from None
    if root is None:
        raise UserError(f"{path} is empty; write fields such as `max_train_steps: 1000`")
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{path}:{root.start_mark.line + 1}: expected `field: value` lines")
    return _fields_of_mapping(path, root)


def _fields_of_mapping(path: Path, root: Any) -> dict[str, Any]:
    values: dict[str, Any] = {}
    problems = []
    for key_node, value_node in root.value:
        key, where = str(key_node.value), f"{path}:{key_node.start_mark.line + 1}"
        name = key.replace("-", "_")
        if name not in FIELDS:
            problems.append(f"{where}: unknown field {key!r}{did_you_mean(key, FIELDS)}")
        elif name in values:
            problems.append(f"{where}: {key} is given twice")
        else:
            value, problem = _value_of_node(FIELDS[name], value_node)
            values[name] = value
            if problem:
                problems.append(f"{where}: {key} {problem}")
    if problems:
        raise UserError("; ".join(problems))
    return values


def _value_of_node(field: _Field, node: Any) -> tuple[Any, str | None]:
    """The value of one YAML node, and what is wrong with it.

    YAML 1.1 reads ``off`` as false and ``5e-4`` as text: text fields take the words as written, and number fields
    take whatever an unquoted word means as a number.
    """
    import yaml

    if not isinstance(node, yaml.ScalarNode):
        return None, f"must be {field.expected}, not a list or mapping"
    tag = node.tag.rpartition(":")[2]
    value: Any = node.value
    if tag == "null":
        value = None
        if node.value == "~" and field.is_path:
            return None, 'must be text, and YAML reads ~ as nothing: write "~" in quotes'
    elif field.kind == "bool" and tag == "bool":
        value = node.value.lower() in ("true", "yes", "on")
    elif field.kind in ("int", "float") and node.style is None and tag in ("int", "float", "str"):
        try:
            value = field.parse(node.value.replace("_", ""))
        except (ValueError, OverflowError):
            return None, f"must be {field.expected}, not {node.value!r}"
    return value, field.problem(value)


# --------------------------------------------------------------------------------------------------------------------
# The command line


class ArgumentParser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, with the nearest option for an unknown one, and exits 2."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", HelpFormatter)
        super().__init__(*args, **kwargs)
        # argparse takes -5 for a value and -1e-4 for an option; both are numbers that an option may refuse.
        self._negative_number_matcher = re.compile(r"-(\d[\d_]*\.?\d*|\.\d+)(e[+-]?\d+)?$|-(inf|nan)$", re.IGNORECASE)

    def _match_argument(self, action: argparse.Action, arg_strings_pattern: str) -> int:
        try:
            return super()._match_argument(action, arg_strings_pattern)
        except argparse.ArgumentError:
            if not action.option_strings:
                raise
            raise argparse.ArgumentError(action, f"needs {_needed(action)}") from None

    def parse_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def, override]
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            # A sub-command's leftovers reach the top parser, which does not know the sub-command's options.
            parser = getattr(parsed, "parser", self)
            parser.error(parser.describe_unknown(unknown[0]))
        return parsed

    def describe_unknown(self, argument: str) -> str:
        if not argument.startswith("-"):
            return f"unexpected argument {argument!r}"
        option = argument.partition("=")[0]
        options = {name for action in self._actions for name in action.option_strings}
        # An option with two spellings is offered in the one that the help shows.
        options = {name for name in options if "_" not in name or name.replace("_", "-") not in options}
        dashed = option.replace("_", "-")
        here = OPTIONS_ELSEWHERE.get(dashed, "")
        if here.partition(" ")[0] in options:
            return f"unknown option {option}; here it is {here}"
        return f"unknown option {option}{did_you_mean(dashed, options - {'--help', '-h'}, SLIP)}"

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            hint = did_you_mean(str(value), action.choices, SLIP)
            raise argparse.ArgumentError(action, f"cannot be {value!r}{hint}")

    def error(self, message: str) -> NoReturn:
        # argparse's "argument --a/--b: …" as a sentence about the option in the spelling that the help shows.
        message = re.sub(r"^argument (-[\w-]+)(?:/-[\w-]+)*: (?=must|cannot|needs)", r"\1 ", message)
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


# Options that people know from other trainers, and what means that here.
OPTIONS_ELSEWHERE = {
    "--lr": "--learning-rate",
    "--batch-size": "--global-batch-size or --micro-batch-size",
    **dict.fromkeys(("--epochs", "--num-epochs", "--num-train-epochs"), "--max-train-steps"),
    "--bf16": "--deepspeed NAME, such as zero2",
    "--fp16": "--deepspeed NAME, such as zero2_fp16",
}
# What an option needs, by what the help calls it.
VALUES = {
    **dict.fromkeys(("N", "K"), "a whole number"),
    **dict.fromkeys(("X", "T"), "a number"),
    **dict.fromkeys(("N,...", "K,K"), "whole numbers, such as 1,2,4"),
    **{"SECONDS": "a number of seconds", "SIZE": "a size, such as 80GB", "DIR": "a folder", "FILE": "a file"},
    **{"JSON": "the name of a shipped file or a path", "NAME": "a name", "TEXT": "a value"},
}


def _needed(action: argparse.Action) -> str:
    """What an option that was given nothing needs."""
    shown = str(action.metavar or "")
    if action.choices or shown.startswith("{"):
        return f"one of {', '.join(map(str, action.choices or shown.strip('{}').split(',')))}"
    return VALUES.get(shown, f"a value ({shown})" if shown else "a value")


class HelpFormatter(argparse.HelpFormatter):
    """Wide enough for the long option names, and silent about an option's second spelling."""

    def __init__(self, prog: str, **kwargs: Any) -> None:
        kwargs.setdefault("max_help_position", 34)
        super().__init__(prog, **kwargs)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        hidden = [name for name in action.option_strings if "_" in name]
        if not hidden:
            return super()._format_action_invocation(action)
        shown = [name for name in action.option_strings if "_" not in name]
        if action.nargs == 0:
            return ", ".join(shown)
        return f"{', '.join(shown)} {self._format_args(action, self._get_default_metavar_for_optional(action))}"


def _spellings(name: str) -> list[str]:
    dashed = "--" + name.replace("_", "-")
    return [dashed] if "_" not in name else [dashed, "--" + name]


def add_config_arguments(
    parser: argparse.ArgumentParser, *, preset: str = "preset", without: Iterable[str] = ()
) -> None:
    """PRESET, ``--config FILE`` and one option a field; `config_from_arguments` reads them.

    Args:
        parser: gets the arguments.
        preset: ``preset`` for a positional argument, ``--preset`` for an option.
        without: fields that get no option.
    """
    optional: dict[str, Any] = {} if preset.startswith("-") else {"nargs": "?"}
    parser.add_argument(preset, metavar="PRESET", help=f"starting values: {PRESET_HELP}", **optional)
    parser.add_argument(
        "--config", type=name_argument, metavar="FILE", help="YAML or JSON file of fields; options win over it"
    )
    # The deepspeed launcher hands this to every rank.
    parser.add_argument("--local_rank", type=int, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    groups: dict[str, Any] = {}
    for field in FIELDS.values():
        if field.name in without:
            continue
        group = groups.get(field.group)
        if group is None:
            group = groups[field.group] = parser.add_argument_group(field.group)
        _add_field(group, field)


def _add_field(group: Any, field: _Field) -> None:
    says_default = field.help.endswith(")") and "(default: " in field.help
    stated = "(required)" if field.name in REQUIRED else f"(default: {_shown(field.default)})"
    text = (field.help if says_default else f"{field.help} {stated}").replace("%", "%%")
    if field.kind == "bool":
        group.add_argument(
            *_spellings(field.name), dest=field.name, action=argparse.BooleanOptionalAction,
            default=argparse.SUPPRESS, help=text,
        )  # fmt: skip
        return

    def parse(value: str) -> Any:
        try:
            parsed = field.parse(value)
        except (ValueError, OverflowError):
            raise argparse.ArgumentTypeError(f"must be {field.expected}, not {value!r}") from None
        problem = field.problem(parsed)
        if problem:
            raise argparse.ArgumentTypeError(problem)
        return parsed

    metavar = {"int": "N", "float": "X", "str": "{" + ",".join(field.choices) + "}" if field.choices else "TEXT"}
    group.add_argument(
        *_spellings(field.name), dest=field.name, type=parse, default=argparse.SUPPRESS,
        metavar="JSON" if field.name == "deepspeed" else metavar[field.kind], help=text,
    )  # fmt: skip


def _shown(default: Any) -> str:
    if isinstance(default, bool):
        return "yes" if default else "no"
    return "none" if default in (None, "") else str(default)


def config_from_arguments(arguments: argparse.Namespace) -> RunConfig:
    """The run config of parsed arguments: defaults < preset < file < options."""
    values: dict[str, Any] = {}
    preset = getattr(arguments, "preset", None)
    if preset is not None:
        if preset not in PRESETS:
            raise UserError(f"unknown preset {preset!r}{_what_for_preset(preset)}")
        values.update(PRESETS[preset])
    if getattr(arguments, "config", None) is not None:
        values.update(read_config_file(arguments.config))
    values.update({name: value for name, value in vars(arguments).items() if name in FIELDS})
    return RunConfig(**values)


def _what_for_preset(text: str) -> str:
    """What to write instead of a text that is no preset."""
    if text.endswith((".yaml", ".yml", ".json")):
        return f"; to read a file write --config {text}"
    for path in (Path(text, "config.yaml"), Path(RUNS, text, "config.yaml")):
        if path.is_file():
            return f"; to go on with a run write --config {path}"
    return did_you_mean(text, PRESETS)


def arguments_of(config: RunConfig) -> list[str]:
    """The options that say what a run config says, without a preset or a file; `config_from_arguments` reads them."""
    options = []
    for name, field in FIELDS.items():
        value = getattr(config, name)
        if value == field.default:
            continue
        dashed = name.replace("_", "-")
        if field.kind == "bool":
            options.append(f"--{dashed}" if value else f"--no-{dashed}")
        else:
            options.append(f"--{dashed}={'none' if value is None else value}")
    return options


_seconds = real(minimum=1, unit="seconds")
LAUNCHERS = ("pdsh", "openmpi", "mpich", "impi", "mvapich", "slurm")


@dataclass(frozen=True, kw_only=True)
class LaunchOptions:
    """Where the ranks run; handed to the ``deepspeed`` launcher."""

    num_gpus: int | None = None  # ranks on this machine, with or without GPUs; None: one a GPU, or one
    hostfile: str | None = None
    include: str | None = None
    exclude: str | None = None
    launcher: str = "pdsh"  # of DeepSpeed's, between hosts
    master_addr: str | None = None
    master_port: int | None = None
    no_ssh: bool = False  # every host starts its own ranks
    node_rank: int | None = None  # of this host, with no_ssh
    bind_cores: bool = False
    max_restarts: int = 0  # after a lost rank, a hang or a failure
    min_hosts: int | None = None  # go on with so many when others do not answer; None: all
    hang_seconds: float = 600.0  # the most that a rank may stay in one place of a step, an evaluation or a save
    ignore_memory_plan: bool = False  # start a run that the memory plan says does not fit


def add_launch_arguments(parser: argparse.ArgumentParser) -> None:
    """The launcher's own options; `launch_from_arguments` reads them."""
    group = parser.add_argument_group("launch")
    group.add_argument(
        "--num-gpus", "--num_gpus", "--num-ranks", "--num_ranks", type=_positive, metavar="N", dest="num_gpus",
        help="ranks on this machine (default: one a GPU, or one on a machine without)",
    )  # fmt: skip
    group.add_argument(
        "--hostfile", type=name_argument, metavar="FILE", help="lines of `host slots=N` (default: this machine alone)"
    )
    group.add_argument("--include", metavar="HOSTS", help="hosts and GPUs to use, as in a:0,2@b (default: all)")
    group.add_argument("--exclude", metavar="HOSTS", help="hosts and GPUs to leave out, same form (default: none)")
    group.add_argument(
        "--master-addr", "--master_addr", metavar="HOST", dest="master_addr",
        help="address of the first host (default: found by the launcher)",
    )  # fmt: skip
    group.add_argument(
        "--master-port", "--master_port", type=port, metavar="N", dest="master_port",
        help="port of the first host (default: a free one)",
    )  # fmt: skip
    group.add_argument(
        "--launcher", choices=LAUNCHERS, default="pdsh",
        help="what DeepSpeed starts the hosts with (default: pdsh, which uses ssh)",
    )  # fmt: skip
    group.add_argument(
        "--no-ssh", "--no_ssh", action="store_true", dest="no_ssh",
        help="start this host's ranks alone; the same command is given on every host (default: start all)",
    )  # fmt: skip
    group.add_argument(
        "--node-rank", "--node_rank", type=_not_negative, metavar="N", dest="node_rank",
        help="place of this host in the hostfile, from 0; with --no-ssh (default: none)",
    )  # fmt: skip
    group.add_argument(
        "--bind-cores", "--bind_cores", action="store_true", dest="bind_cores",
        help="bind each rank to cores of its own with numactl (default: they share)",
    )  # fmt: skip
    group.add_argument(
        "--max-restarts", "--max_restarts", type=_not_negative, default=0, metavar="N", dest="max_restarts",
        help="start again from the newest whole checkpoint after a lost rank, a hang or a failure (default: 0)",
    )  # fmt: skip
    group.add_argument(
        "--min-hosts", "--min_hosts", type=_positive, metavar="N", dest="min_hosts",
        help="go on with so many hosts when others do not answer (default: all of them)",
    )  # fmt: skip
    group.add_argument(
        "--hang-seconds", "--hang_seconds", type=_seconds, default=600.0, metavar="SECONDS", dest="hang_seconds",
        help="the most that a rank may stay in one micro-batch, evaluation or save; the limit of a micro-batch is "
        "learned from the run's own and may be less (default: 600)",
    )  # fmt: skip
    group.add_argument(
        "--ignore-memory-plan", "--ignore_memory_plan", action="store_true", dest="ignore_memory_plan",
        help="start even where the memory plan says that the run does not fit the GPUs (default: refuse)",
    )  # fmt: skip


def with_field(arguments: Sequence[str], name: str, value: object) -> list[str]:
    """`arguments` with another value of a field of the run config."""
    parser = ArgumentParser(add_help=False)
    parser.add_argument(*_spellings(name))
    return [*parser.parse_known_args(list(arguments))[1], _spellings(name)[0], str(value)]


def launch_from_arguments(arguments: argparse.Namespace) -> LaunchOptions:
    """The launch options of parsed arguments."""
    return LaunchOptions(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(LaunchOptions)})
