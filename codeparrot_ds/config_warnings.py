"""What of a run config can hardly be meant: legal values that do what they say, and not what anybody wants.

``check``, ``train``, ``compare`` and ``checkpoint import`` print what `config_warnings` returns, and go on. Its rules
are about what costs the user the run or a part that was asked for; taste is none of them. No file is read here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from codeparrot_ds.config import RunConfig
from codeparrot_ds.schedule import learning_rate_factor

LARGE_LEARNING_RATE = 0.05
"""Adam moves each weight by about the learning rate a step, and GPT-2's begin at about 0.02."""
LOST_LEARNING_RATE = 1e-9
"""Half the distance between a weight of 0.02 and the next fp32 number: what is less is rounded away."""
LARGE_WEIGHT_DECAY = 1.0
SMALL_GRAD_NORM = 0.01
LARGE_DROPOUT = 0.5
FEW_EVAL_TOKENS = 4096
JUMP, SETTLED = 2.0, 0.01
"""A learning rate that grows by more than the first where a run goes on, and to more than the second of its peak."""
PROFILED_FROM = 4
"""The step of a start that is profiled first."""


@dataclass(frozen=True, kw_only=True)
class ConfigWarning:
    """A field of the run config, and a sentence about its value."""

    field: str
    sentence: str


@dataclass(frozen=True, kw_only=True)
class Continued:
    """The checkpoint that a run goes on from.

    Attributes:
        name: of the run or the folder, for the reader.
        step: optimizer steps done.
        schedule_step: of them, those that the schedule counts: it stands still where a step is skipped.
        learning_rate: that the next step would have had; None where that is not known.
        config: that the checkpoint was trained with; None for a checkpoint of DeepSpeed's own.
    """

    name: str
    step: int
    schedule_step: int
    learning_rate: float | None
    config: RunConfig | None = None


def learning_rate_at(config: RunConfig, schedule_step: int) -> float:
    """The learning rate of the update that follows so many steps of the schedule."""
    factor = learning_rate_factor(
        config.lr_scheduler_type, schedule_step, config.num_warmup_steps, config.max_train_steps
    )
    return config.learning_rate * factor


def config_warnings(config: RunConfig, continued: Continued | None = None) -> list[ConfigWarning]:
    """What of a run config can hardly be meant; empty for every preset.

    Args:
        config: the run config.
        continued: what the run goes on from, where it does.
    """
    found = [*_schedule(config), *_intervals(config), *_evaluation(config), *_optimizer(config)]
    if continued is not None:
        found += _jump(config, continued)
    return [ConfigWarning(field=field, sentence=sentence) for field, sentence in found]


Found = Iterator[tuple[str, str]]


def _schedule(config: RunConfig) -> Found:
    last = config.max_train_steps
    if config.num_warmup_steps >= last:
        highest = learning_rate_at(config, last - 1)
        yield (
            "num_warmup_steps",
            f"num_warmup_steps {config.num_warmup_steps} is not below max_train_steps {last}: the learning rate comes "
            f"to {highest:.3g} and never to {config.learning_rate:g}; choose {last // 20} or so",
        )
    if config.profile and config.profile + PROFILED_FROM - 1 > last:
        there = max(0, last - PROFILED_FROM + 1)
        yield (
            "profile",
            f"profile {config.profile} begins with step {PROFILED_FROM} of a start, and with max_train_steps {last} "
            f"there are {there} from there on",
        )


def _intervals(config: RunConfig) -> Found:
    last, save, evaluate = config.max_train_steps, config.save_checkpoint_steps, config.eval_steps
    if save > last:
        what = "saved or evaluated" if evaluate is None else "saved"
        yield (
            "save_checkpoint_steps",
            f"save_checkpoint_steps {save} is beyond max_train_steps {last}: nothing is {what} before the end",
        )
    if evaluate is not None and evaluate > last:
        yield (
            "eval_steps",
            f"eval_steps {evaluate} is beyond max_train_steps {last}: nothing is evaluated between start and end",
        )
    if config.log_steps > last:
        yield (
            "log_steps",
            f"log_steps {config.log_steps} is beyond max_train_steps {last}: there is one line of metrics, at the end",
        )
    every = config.keep_checkpoint_every
    if every is not None and every % save and save % every:
        yield (
            "keep_checkpoint_every",
            f"keep_checkpoint_every {every} is no multiple of save_checkpoint_steps {save}: of the checkpoints only "
            f"those at multiples of {math.lcm(every, save)} are kept for ever",
        )


def _evaluation(config: RunConfig) -> Found:
    save, evaluate = config.save_checkpoint_steps, config.eval_steps
    within = evaluate is not None and max(evaluate, save) <= config.max_train_steps
    if config.keep_best_checkpoint and evaluate is not None and within and evaluate % save and save % evaluate:
        yield (
            "eval_steps",
            f"eval_steps {evaluate} and save_checkpoint_steps {save} meet at multiples of {math.lcm(evaluate, save)} "
            "alone: keep_best_checkpoint chooses among those checkpoints and the last",
        )
    tokens = config.max_eval_steps * config.micro_batch_size * config.seq_length  # 0 for a micro-batch of auto
    if 0 < tokens < FEW_EVAL_TOKENS:
        yield (
            "max_eval_steps",
            f"max_eval_steps {config.max_eval_steps} x micro_batch_size {config.micro_batch_size} evaluates on "
            f"{tokens:,} tokens, whose loss is much by chance; -1 evaluates on the whole validation split",
        )


def _optimizer(config: RunConfig) -> Found:
    rate, decay = config.learning_rate, config.weight_decay
    if rate >= LARGE_LEARNING_RATE:
        yield (
            "learning_rate",
            f"learning_rate {rate:g} is far above what such a model trains with (1e-5 to 1e-2, the recipe's are 5e-4 "
            "and 2e-4): Adam moves each weight by about that much a step, and they begin at about 0.02",
        )
    if rate < LOST_LEARNING_RATE:
        yield ("learning_rate", f"learning_rate {rate:g} changes no weight: steps so small are rounded away")
    if decay > LARGE_WEIGHT_DECAY:
        share = min(1.0, rate * decay)
        yield (
            "weight_decay",
            f"weight_decay {decay:g} takes learning_rate x weight_decay = {share:.2g} of every matrix away each step; "
            "usual is 0.01 to 0.1",
        )
    if 0 < config.max_grad_norm < SMALL_GRAD_NORM:
        yield (
            "max_grad_norm",
            f"max_grad_norm {config.max_grad_norm:g} cuts every gradient down to next to nothing; usual is 1, and 0 "
            "never cuts",
        )
    if config.dropout > LARGE_DROPOUT:
        yield (
            "dropout",
            f"dropout {config.dropout:g} is the share that is dropped, not that which is kept; usual is 0 to 0.1",
        )


def _jump(config: RunConfig, continued: Continued) -> Found:
    """A learning rate that rises where the run goes on, which undoes what its decay had settled."""
    before, now = continued.learning_rate, learning_rate_at(config, continued.schedule_step)
    if before is None or now <= max(JUMP * before, SETTLED * config.learning_rate):
        return
    if continued.step >= config.max_train_steps:
        return  # nothing is left to train
    fields = ("learning_rate", "lr_scheduler_type", "num_warmup_steps", "max_train_steps")
    then = continued.config
    changed = [field for field in fields if then is not None and getattr(then, field) != getattr(config, field)]
    values = ", ".join(f"{field} was {getattr(then, field)} and is {getattr(config, field)}" for field in changed)
    yield (
        changed[-1] if changed else "learning_rate",
        f"the learning rate jumps from {before:.3g} to {now:.3g} where {continued.name} goes on, at step "
        f"{continued.step}{f' ({values})' if values else ''}, and unsettles what its decay had settled: train longer "
        "from the start under another --run-name, or begin a run with its weights (--init-from) and a schedule of its "
        "own",
    )
