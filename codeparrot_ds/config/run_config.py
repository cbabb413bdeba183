"""The run config: everything about a run that is not DeepSpeed's (batch, schedule, data, saving), and its command line.

ZeRO, precision, optimizer kernel, activation checkpointing and communication belong to the DeepSpeed JSON
(``ds_config/``). Importing this module imports neither torch nor PyYAML.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codeparrot_ds.config.option_types import whole_number
from codeparrot_ds.errors import UserError
from codeparrot_ds.layouts import parse_columns
from codeparrot_ds.paths import RUNS, did_you_mean, expand


def _setting(
    default: Any,
    group: str,
    text: str,
    *,
    minimum: float | None = None,
    choices: tuple[str, ...] = (),
    words: tuple[str, ...] = (),
    is_path: Callable[[str], bool] | None = None,
    mixture: bool = False,
) -> Any:
    metadata = {"group": group, "help": text, "minimum": minimum, "choices": choices, "words": words}
    return dataclasses.field(default=default, metadata=metadata | {"is_path": is_path, "mixture": mixture})


OPEN = "auto,cpu="
"""Before a CPU's value: on a GPU the memory plan chooses (``memory/choice.py``); a run that resumes keeps its own."""
CHOSEN_BY_PLAN = ("deepspeed", "micro_batch_size")
"""Fields that may be ``auto``, or open."""


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
        "corpus folder, folder of shards (split by their names), one shard, or Hub data set (org/name); several as "
        "NAME=WEIGHT,NAME=WEIGHT",
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
    columns: str = _setting(
        "",
        "data",
        "columns of the data, as content=text (default: those of published data sets of code, content before all)",
    )
    tokenizer: str = _setting(
        "",
        "data",
        "tokenizer folder made by `tokenizer` (holds tokenizer.json), or a name on the Hub (gpt2, org/name); init_from "
        "brings its own",
        is_path=os.path.exists,
    )
    seq_length: int = _setting(1024, "data", "tokens per row", minimum=2)
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
        False, "model", "restrict attention to the same document and restart position ids; costs a dense mask"
    )
    chunked_loss: bool = _setting(
        False, "model", "never hold the softmax of all tokens in fp32: less memory for the logits, the same loss"
    )
    fused_loss: bool = _setting(
        True,
        "model",
        "on a GPU, where Triton works: the loss by two kernels that write the gradient over the logits; less memory "
        "and time, the same loss; chunked_loss goes before it",
    )
    compile: bool = _setting(False, "model", "compile the model with torch.compile, for training")
    compile_scope: str = _setting(
        "blocks",
        "model",
        "what compile compiles: blocks (one graph for all of them, in seconds), or the whole model as one graph",
        choices=("blocks", "whole"),
    )
    lean_step: str = _setting(
        "auto",
        "model",
        "optimizer steps that do not wait for the device and report a bad step one step late (auto: on a GPU, where "
        "the DeepSpeed config allows it)",
        choices=("auto", "on", "off"),
    )
    deepspeed: str = _setting(
        f"{OPEN}zero2:auto",
        "model",
        "DeepSpeed JSON: a path, a shipped file's name, NAME:auto for it in the precision that is fastest here, or "
        "auto: on a GPU the first of ZeRO-1, 2, 3 and offload that fits",
        is_path=os.path.isfile,
    )

    global_batch_size: int = _setting(192, "batch and schedule", "rows per step over all ranks", minimum=1)
    micro_batch_size: int | str = _setting(
        f"{OPEN}12",
        "batch and schedule",
        "rows per rank and forward pass; auto: as many as the memory plan says fit",
        minimum=1,
        words=("auto",),
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
    accept_failing_references: bool = _setting(
        False, "evaluation", "use eval_problems although their own solutions do not pass their tests"
    )

    output_dir: str = _setting("runs", "saving", "folder that holds the runs", is_path=_is_anything_but())
    run_name: str | None = _setting(None, "saving", "name of the run, its folder and branch (none: made up)")
    save_checkpoint_steps: int = _setting(15_000, "saving", "optimizer steps between checkpoints", minimum=1)
    save_in_background: bool = _setting(
        True, "saving", "continue training while a checkpoint is written (takes host memory for a copy of it)"
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
        try:
            parse_columns(self.columns)
        except UserError as error:
            problems.append(str(error))
        if isinstance(self.micro_batch_size, int) and self.global_batch_size % self.micro_batch_size:
            sizes = _nearest_divisors(self.global_batch_size, self.micro_batch_rows)
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
        """Whether the micro-batch is still to be chosen (``memory/choice.py``)."""
        return self.micro_batch_size == "auto"

    @property
    def micro_batch_rows(self) -> int:
        """``micro_batch_size`` as a number: a CPU's while it is open; `UserError` while it is ``auto``."""
        size = cpu_value(self.micro_batch_size)
        if size == "auto":
            raise UserError("micro_batch_size auto is chosen when a run starts; give a number here")
        return int(size)

    @property
    def open_fields(self) -> tuple[str, ...]:
        """Those that the user left to the device."""
        return tuple(name for name in CHOSEN_BY_PLAN if str(getattr(self, name)).startswith(OPEN))

    @property
    def is_left_to_plan(self) -> bool:
        """Whether something is open, or is ``auto``."""
        return bool(self.open_fields) or "auto" in (self.deepspeed, self.micro_batch_size)

    @property
    def ds_config_name(self) -> str:
        """``deepspeed`` as a path or a name: a CPU's while it is left to the device."""
        name = cpu_value(self.deepspeed)
        return cpu_value(FIELDS["deepspeed"].default) if name == "auto" else name

    def on_cpu(self) -> RunConfig:
        """The config that it is on a CPU, with nothing open; `UserError` where its micro-batch does not divide."""
        size = cpu_value(self.micro_batch_size)
        size = size if size == "auto" else int(size)
        return dataclasses.replace(self, deepspeed=self.ds_config_name, micro_batch_size=size)

    def gradient_accumulation_steps(self, world_size: int) -> int:
        """Micro-batches that each of `world_size` ranks adds up for one optimizer step: global / (micro x world)."""
        rows = self.micro_batch_rows * world_size
        if self.global_batch_size % rows == 0:
            return self.global_batch_size // rows
        nearest_global = max(rows, round(self.global_batch_size / rows) * rows)
        choices = f"--global-batch-size {nearest_global}"
        if self.global_batch_size % world_size == 0:
            micro = _nearest_divisors(self.global_batch_size // world_size, self.micro_batch_rows)
            choices = f"--micro-batch-size {micro} or {choices}"
        raise UserError(
            f"global_batch_size {self.global_batch_size} is not divisible by micro_batch_size x world_size = "
            f"{self.micro_batch_rows} x {world_size} = {rows}; nearest choices: {choices}"
        )


def cpu_value(value: Any) -> Any:
    """What a field's value is on a CPU: that behind ``auto,cpu=`` as text, and any other as it is."""
    return value.removeprefix(OPEN) if isinstance(value, str) else value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _nearest_divisors(number: int, wanted: int) -> str:
    far = 1_000_000  # nobody counts a batch of 1e30 through
    start = min(wanted, number)
    below = next((d for d in range(start, max(0, start - far), -1) if number % d == 0), 1)
    above = next((d for d in range(wanted + 1, min(number, wanted + far) + 1) if number % d == 0), None)
    return " or ".join(str(d) for d in (below, above) if d is not None)


@dataclass(frozen=True)
class Field:
    """What the parser and the checks need to know of one field of `RunConfig`."""

    name: str
    kind: str  # "str", "int", "float" or "bool"
    optional: bool
    default: Any
    group: str
    help: str
    minimum: float | None
    choices: tuple[str, ...]
    words: tuple[str, ...]  # that stand for values which no number does
    is_path: Callable[[str], bool] | None  # of a field that holds paths: whether a text is one, or a name
    mixture: bool  # whether it may hold several, as NAME=WEIGHT,NAME=WEIGHT

    @property
    def expected(self) -> str:
        text = {"str": "text", "int": "a whole number", "float": "a number", "bool": "true or false"}[self.kind]
        return " or ".join([text, *self.words, *(["none"] if self.optional else [])])

    def problem(self, value: Any) -> str | None:
        """What is wrong with `value`, or None."""
        if self.is_open(value):
            try:
                value = self.parse(cpu_value(value))
            except ValueError:
                return f"must be {self.expected} behind {OPEN}, not {cpu_value(value)!r}"
        if (value is None and self.optional) or (isinstance(value, str) and value in self.words):
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

    def is_open(self, value: Any) -> bool:
        """Whether a value leaves the field to the device; only those of `CHOSEN_BY_PLAN` can be left to it."""
        return self.name in CHOSEN_BY_PLAN and isinstance(value, str) and value.startswith(OPEN)

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
        if text in self.words or self.is_open(text):
            return text
        if self.kind == "float":
            return float(text)
        if self.kind == "int":
            return whole_number(text)
        return text


def _fields() -> dict[str, Field]:
    fields = {}
    for field in dataclasses.fields(RunConfig):
        kind, *others = str(field.type).split(" | ")
        fields[field.name] = Field(field.name, kind, "None" in others, field.default, **field.metadata)
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
        "micro_batch_size": f"{OPEN}2",
        "global_batch_size": 512,
        "learning_rate": 2e-4,
        "num_warmup_steps": 750,
        "max_train_steps": 50_000,
        "save_checkpoint_steps": 1024,
        "deepspeed": f"{OPEN}zero2_activation_checkpointing:auto",
    },
    "demo": {
        "model": "demo",
        "seq_length": 256,
        "global_batch_size": 16,
        "micro_batch_size": f"{OPEN}8",
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


# Options that people know from other trainers, and what means that here.
OPTIONS_ELSEWHERE = {
    "--lr": "--learning-rate",
    "--batch-size": "--global-batch-size or --micro-batch-size",
    **dict.fromkeys(("--epochs", "--num-epochs", "--num-train-epochs"), "--max-train-steps"),
    "--bf16": "--deepspeed NAME, such as zero2",
    "--fp16": "--deepspeed NAME, such as zero2_fp16",
}


def what_for_preset(text: str) -> str:
    """What to write instead of a text that is no preset."""
    if text.endswith((".yaml", ".yml", ".json")):
        return f"; to read a file write --config {text}"
    for path in (Path(text, "config.yaml"), Path(RUNS, text, "config.yaml")):
        if path.is_file():
            return f"; to continue a run write --config {path}"
    return did_you_mean(text, PRESETS)
