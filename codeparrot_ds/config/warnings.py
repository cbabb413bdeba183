"""What of a run config can hardly be meant: legal values that do what they say, and not what anybody wants.

``check``, ``train``, ``compare`` and ``checkpoint import`` print what `config_warnings` returns and continue. Its rules
are about what costs the user the run or a part that was asked for; taste is none of them. No file is read here.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from codeparrot_ds.config.run_config import FIELDS, RunConfig
from codeparrot_ds.config.schedule import learning_rate_factor

LARGE_LEARNING_RATE = 0.05
"""Adam moves each weight by about the learning rate a step, and GPT-2's begin at about 0.02."""
LOST_LEARNING_RATE = 1e-9
"""Half the distance between a weight of 0.02 and the next fp32 number: what is less is rounded away."""
LARGE_DECAY = 2e-3
"""Of learning_rate x weight_decay, which leaves a weight for 500 steps or fewer; the recipe's is 5e-5."""
LONG_WARMUP = 0.9
"""Of the run."""
LARGE_STEP_TOKENS = 1_000_000_000
NO_EVALUATION = 1_000_000
"""From here on eval_steps says that nothing is to be evaluated."""
SMALL_GRAD_NORM = 0.01
LARGE_DROPOUT = 0.5
FEW_EVAL_TOKENS = 4096
JUMP, SETTLED = 2.0, 0.01
"""A learning rate that grows by more than the first where a run resumes, and to more than the second of its peak."""
PROFILED_FROM = 4
"""The step of a start that is profiled first."""


@dataclass(frozen=True, kw_only=True)
class ConfigWarning:
    """A field of the run config, and a sentence about its value."""

    field: str
    sentence: str


@dataclass(frozen=True, kw_only=True)
class Continued:
    """The checkpoint that a run resumes from.

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


def config_warnings(
    config: RunConfig, continued: Continued | None = None, *, groups: Collection[str] | None = None
) -> list[ConfigWarning]:
    """What of a run config can hardly be meant; empty for every preset.

    Args:
        config: the run config.
        continued: what the run resumes from, where it does.
        groups: of the fields that matter (``FIELDS``); None for all.
    """
    rules = (_beyond_end, _schedule, _intervals, _evaluation, _optimizer, _compile)
    found = [each for rule in rules for each in rule(config)]
    if continued is not None:
        found += _jump(config, continued)
    found = [each for each in found if groups is None or FIELDS[each.field].group in groups]
    beyond = [each for each in found if isinstance(each, _Beyond)]
    if len(beyond) > 1:  # a short try: one cause, and often none of the values was set by the user
        found = [_short_run(config, beyond), *(each for each in found if each not in beyond)]
    return [ConfigWarning(field=each.field, sentence=each.sentence) for each in found]


Found = Iterator[ConfigWarning]


@dataclass(frozen=True, kw_only=True)
class _Beyond(ConfigWarning):
    """A number of steps that the run does not come to: what follows from that, and a number that it comes to."""

    follows: str
    choose: int


def _beyond_end(config: RunConfig) -> Iterator[_Beyond]:
    last, warmup, evaluate = config.max_train_steps, config.num_warmup_steps, config.eval_steps
    if warmup >= last:
        highest = learning_rate_at(config, last - 1)
        follows = f"the learning rate comes to {highest:.3g} and never to {config.learning_rate:g}"
        choose = last // 20
        yield _Beyond(
            field="num_warmup_steps",
            sentence=f"num_warmup_steps {warmup} is not below max_train_steps {last}: {follows}; choose {choose}"
            + (" or so" if choose else ""),
            follows=follows,
            choose=choose,
        )
    what = "saved or evaluated" if evaluate is None else "saved"
    intervals = [
        ("save_checkpoint_steps", config.save_checkpoint_steps, f"nothing is {what} before the end"),
        ("log_steps", config.log_steps, "there is one line of metrics, at the end"),
    ]
    if evaluate is not None and evaluate < NO_EVALUATION:
        intervals.append(("eval_steps", evaluate, "nothing is evaluated between start and end"))
    for field, steps, follows in intervals:
        if steps > last:
            sentence = f"{field} {steps} is beyond max_train_steps {last}: {follows}"
            yield _Beyond(field=field, sentence=sentence, follows=follows, choose=last)


def _short_run(config: RunConfig, beyond: list[_Beyond]) -> ConfigWarning:
    """All that a run is too short for in one sentence, with what to set together."""
    follows = ", ".join(f"{each.field} {getattr(config, each.field)} ({each.follows})" for each in beyond)
    choose = ", ".join(f"{each.field} {each.choose}" for each in beyond)
    return ConfigWarning(
        field="max_train_steps",
        sentence=f"max_train_steps {config.max_train_steps} is short for {follows}; choose with it {choose}",
    )


def _schedule(config: RunConfig) -> Found:
    last, warmup = config.max_train_steps, config.num_warmup_steps
    if LONG_WARMUP * last < warmup < last:
        yield ConfigWarning(
            field="num_warmup_steps",
            sentence=f"num_warmup_steps {warmup} leaves {last - warmup} of max_train_steps {last} after the warm-up; "
            f"choose {last // 20}" + (" or so" if last >= 20 else ""),
        )
    if config.profile and config.profile + PROFILED_FROM - 1 > last:
        there = max(0, last - PROFILED_FROM + 1)
        yield ConfigWarning(
            field="profile",
            sentence=f"profile {config.profile} begins with step {PROFILED_FROM} of a start, and with max_train_steps "
            f"{last} there are {there} from there on",
        )
    tokens = config.global_batch_size * config.seq_length
    if tokens > LARGE_STEP_TOKENS:
        yield ConfigWarning(
            field="global_batch_size",
            sentence=f"global_batch_size {config.global_batch_size} x seq_length {config.seq_length} is {tokens:.3g} "
            "tokens for one step; usual is 1e5 to 1e7",
        )


def _intervals(config: RunConfig) -> Found:
    last, save, every = config.max_train_steps, config.save_checkpoint_steps, config.keep_checkpoint_every
    if config.max_hours is not None and config.max_hours < 1 / 60:
        yield ConfigWarning(
            field="max_hours",
            sentence=f"max_hours {config.max_hours:g} is {config.max_hours * 3600:.2g} seconds: the run saves and ends "
            "after the first steps or earlier; it is a number of hours",
        )
    if every is None:
        return
    if math.lcm(every, save) > last and last % every:  # the last step is saved whatever it is
        yield ConfigWarning(
            field="keep_checkpoint_every",
            sentence=f"keep_checkpoint_every {every} keeps no checkpoint for ever: with save_checkpoint_steps {save} "
            f"none up to max_train_steps {last} is at a multiple of it",
        )
    elif every % save and save % every:
        yield ConfigWarning(
            field="keep_checkpoint_every",
            sentence=f"keep_checkpoint_every {every} is no multiple of save_checkpoint_steps {save}: of the "
            f"checkpoints before the last only those at multiples of {math.lcm(every, save)} are kept for ever",
        )


def _evaluation(config: RunConfig) -> Found:
    save, evaluate = config.save_checkpoint_steps, config.eval_steps
    within = evaluate is not None and max(evaluate, save) <= config.max_train_steps
    if config.keep_best_checkpoint and evaluate is not None and within and evaluate % save and save % evaluate:
        yield ConfigWarning(
            field="eval_steps",
            sentence=f"eval_steps {evaluate} and save_checkpoint_steps {save} meet at multiples of "
            f"{math.lcm(evaluate, save)} alone: keep_best_checkpoint chooses among those checkpoints and the last",
        )
    rows = 0 if config.auto_micro_batch else config.micro_batch_rows
    tokens = config.max_eval_steps * rows * config.seq_length
    if 0 < tokens < FEW_EVAL_TOKENS:
        yield ConfigWarning(
            field="max_eval_steps",
            sentence=f"max_eval_steps {config.max_eval_steps} x micro_batch_size {rows} evaluates "
            f"on {tokens:,} tokens, whose loss is much by chance; -1 evaluates on the whole validation split",
        )
    completes = config.eval_prompts or config.eval_problems
    if completes and config.eval_new_tokens > config.seq_length:
        yield ConfigWarning(
            field="eval_new_tokens",
            sentence=f"eval_new_tokens {config.eval_new_tokens} is above seq_length {config.seq_length}, the longest "
            "text that the model is trained on",
        )
    if config.allow_execution and not config.eval_problems:
        yield ConfigWarning(
            field="allow_execution",
            sentence="allow_execution runs nothing without eval_problems, a file of problems to solve",
        )


def _optimizer(config: RunConfig) -> Found:
    rate, decay = config.learning_rate, config.weight_decay
    if rate >= LARGE_LEARNING_RATE:
        yield ConfigWarning(
            field="learning_rate",
            sentence=f"learning_rate {rate:g} is far above what such a model trains with (1e-5 to 1e-2, the "
            "recipe's are 5e-4 and 2e-4): Adam moves each weight by about that much a step, and they begin at about "
            "0.02",
        )
    if rate < LOST_LEARNING_RATE:
        why = "steps so small are rounded away" if rate else "nothing is learned"
        yield ConfigWarning(field="learning_rate", sentence=f"learning_rate {rate:g} changes no weight: {why}")
    share = min(1.0, rate * decay)
    if share > LARGE_DECAY and (rate < LARGE_LEARNING_RATE or decay > 1):  # else it is the learning rate's fault
        yield ConfigWarning(
            field="weight_decay",
            sentence=f"weight_decay {decay:g} takes learning_rate x weight_decay = {share:.2g} of every matrix away "
            "each step; usual is a weight_decay of 0.01 to 0.1, and the recipe's product is 5e-05",
        )
    if 0 < config.max_grad_norm < SMALL_GRAD_NORM:
        yield ConfigWarning(
            field="max_grad_norm",
            sentence=f"max_grad_norm {config.max_grad_norm:g} cuts every gradient down to next to nothing; usual is 1, "
            "and 0 never cuts",
        )
    if config.dropout > LARGE_DROPOUT:
        yield ConfigWarning(
            field="dropout",
            sentence=f"dropout {config.dropout:g} is the share that is dropped, not that which is kept; usual is "
            "0 to 0.1",
        )


def _compile(config: RunConfig) -> Found:
    if config.compile_scope != RunConfig.compile_scope and not config.compile:
        yield ConfigWarning(
            field="compile_scope", sentence=f"compile_scope {config.compile_scope} compiles nothing without compile"
        )


def _jump(config: RunConfig, continued: Continued) -> Found:
    """A learning rate that rises where the run resumes, which undoes what its decay had settled."""
    before, now = continued.learning_rate, learning_rate_at(config, continued.schedule_step)
    if before is None or now <= max(JUMP * before, SETTLED * config.learning_rate):
        return
    if continued.step >= config.max_train_steps:
        return  # nothing is left to train
    then = continued.config
    if then is not None and (then.lr_scheduler_type == "constant" or continued.schedule_step <= then.num_warmup_steps):
        return  # nothing has decayed
    fields = ("learning_rate", "lr_scheduler_type", "num_warmup_steps", "max_train_steps")
    changed = [field for field in fields if then is not None and getattr(then, field) != getattr(config, field)]
    values = ", ".join(f"{field} was {getattr(then, field)} and is {getattr(config, field)}" for field in changed)
    yield ConfigWarning(
        field=changed[-1] if changed else "learning_rate",
        sentence=f"the learning rate jumps from {before:.3g} to {now:.3g} where {continued.name} resumes, at step "
        f"{continued.step}{f' ({values})' if values else ''}, and unsettles what its decay had settled: train longer "
        "from the start under another --run-name, or begin a run with its weights (--init-from) and a schedule of its "
        "own",
    )
