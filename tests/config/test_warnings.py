"""Values of the run config that can hardly be meant are said, and those that may be are not."""

import dataclasses
import json

import pytest

from codeparrot_ds.cli.main import main
from codeparrot_ds.compare.run import TRIAL_GROUPS
from codeparrot_ds.config.run_config import PRESETS, RunConfig
from codeparrot_ds.config.warnings import Continued, config_warnings, learning_rate_at
from codeparrot_ds.demo import demo_schedule
from codeparrot_ds.errors import UserError

DEMO = PRESETS["demo"]


@pytest.mark.parametrize("preset", PRESETS)
def test_no_preset_warns(preset):
    assert config_warnings(RunConfig(**PRESETS[preset])) == []


def test_the_recipe_as_the_book_has_it_does_not_warn():
    book = PRESETS["large"] | {"save_checkpoint_steps": 50_000, "max_train_steps": 50_000, "dropout": 0.1}
    assert config_warnings(RunConfig(**book)) == []


@pytest.mark.parametrize("steps", [None, 1, 4, 10, 20, 100, 149, 300, 10_000])
def test_no_demo_warns_whatever_its_steps(steps):
    config = RunConfig(**DEMO | demo_schedule(steps))
    assert config.max_train_steps == (steps or 300) and config_warnings(config) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"num_warmup_steps": 300},
            "num_warmup_steps 300 is not below max_train_steps 300: the learning rate comes to",
        ),
        (
            {"num_warmup_steps": 299},
            "299 leaves 1 of max_train_steps 300 after the warm-up; choose 15 or so",
        ),
        ({"num_warmup_steps": 2000}, "comes to 0.000299 and never to 0.002; choose 15 or so"),
        ({"save_checkpoint_steps": 301}, "nothing is saved or evaluated before the end"),
        ({"save_checkpoint_steps": 301, "eval_steps": 10}, "max_train_steps 300: nothing is saved before the end"),
        ({"eval_steps": 301}, "nothing is evaluated between start and end"),
        ({"eval_steps": 100}, "meet at multiples of 300 alone: keep_best_checkpoint chooses among those"),
        ({"keep_checkpoint_every": 100}, "before the last only those at multiples of 300 are kept for ever"),
        ({"keep_checkpoint_every": 200}, "keeps no checkpoint for ever: with save_checkpoint_steps 150 none up to"),
        ({"keep_checkpoint_every": 600}, "keep_checkpoint_every 600 keeps no checkpoint for ever"),
        ({"max_hours": 1e-4}, "max_hours 0.0001 is 0.36 seconds"),
        ({"eval_prompts": "examples", "eval_new_tokens": 257}, "eval_new_tokens 257 is above seq_length 256"),
        ({"compile_scope": "whole"}, "compile_scope whole compiles nothing without compile"),
        ({"allow_execution": True}, "allow_execution runs nothing without eval_problems"),
        ({"global_batch_size": 8 * 10**29}, "x seq_length 256 is 2.05e+32 tokens for one step"),
        ({"log_steps": 301}, "there is one line of metrics, at the end"),
        ({"profile": 298}, "profile 298 begins with step 4 of a start, and with max_train_steps 300 there are 297"),
        ({"max_eval_steps": 1}, "evaluates on 2,048 tokens, whose loss is much by chance; -1"),
        ({"learning_rate": 5.0}, "learning_rate 5 is far above what such a model trains with (1e-5 to 1e-2"),
        ({"learning_rate": 0.05}, "learning_rate 0.05 is far above"),
        ({"learning_rate": 0.0}, "learning_rate 0 changes no weight: nothing is learned"),
        ({"learning_rate": 5e-40}, "learning_rate 5e-40 changes no weight: steps so small are"),
        ({"weight_decay": 10.0}, "learning_rate x weight_decay = 0.02 of every matrix away each step"),
        ({"max_grad_norm": 1e-4}, "max_grad_norm 0.0001 cuts every gradient down to next to nothing"),
        ({"dropout": 0.9}, "dropout 0.9 is the share that is dropped"),
    ],
)
def test_what_can_hardly_be_meant(changes, words):
    (warning,) = config_warnings(RunConfig(**DEMO | changes))
    assert words in warning.sentence and warning.sentence.startswith(warning.field) and "\n" not in warning.sentence
    assert warning.field in changes


@pytest.mark.parametrize(
    "changes",
    [
        {"num_warmup_steps": 270},
        {"num_warmup_steps": 0},
        {"save_checkpoint_steps": 300},
        {"eval_steps": 50},
        {"eval_steps": 300},
        {"eval_steps": 1_000_000},
        {"eval_steps": 50, "save_checkpoint_steps": 200},
        {"max_hours": 0.02},
        {"eval_new_tokens": 257},
        {"allow_execution": True, "eval_problems": "problems.jsonl"},
        {"global_batch_size": 2**21},
        {"lr_scheduler_type": "constant"},
        {"eval_steps": 100, "keep_best_checkpoint": False},
        {"keep_checkpoint_every": 300},
        {"keep_checkpoint_every": 75},
        {"log_steps": 300},
        {"profile": 297},
        {"max_eval_steps": 2},
        {"max_eval_steps": 1, "micro_batch_size": "auto"},
        {"learning_rate": 0.02},
        {"learning_rate": 1e-7},
        {"weight_decay": 1.0},
        {"weight_decay": 2.0, "learning_rate": 1e-5},
        {"learning_rate": 3e-5},
        {"weight_decay": 0.0},
        {"max_grad_norm": 0.0},
        {"max_grad_norm": 0.01},
        {"dropout": 0.5},
    ],
)
def test_what_may_be_meant(changes):
    assert config_warnings(RunConfig(**DEMO | changes)) == []


@pytest.mark.parametrize(
    ("preset", "steps", "words"),
    [
        ("small", 5, "choose with it num_warmup_steps 0, save_checkpoint_steps 5, log_steps 5"),
        ("small", 1000, "choose with it num_warmup_steps 50, save_checkpoint_steps 1000"),
        ("large", 5, "num_warmup_steps 750 (the learning rate comes to 1.07e-06 and never to 0.0002), save_checkpoint"),
        ("demo", 5, "save_checkpoint_steps 150 (nothing is saved or evaluated before the end), log_steps 10"),
    ],
)
def test_a_short_try_of_a_preset_is_told_once_what_to_set(preset, steps, words):
    (warning,) = config_warnings(RunConfig(**PRESETS[preset] | {"max_train_steps": steps}))
    assert warning.field == "max_train_steps" and words in warning.sentence
    assert warning.sentence.startswith(f"max_train_steps {steps} is short for ")


def test_a_comparison_hears_of_the_fields_of_its_trials_alone():
    config = RunConfig(**PRESETS["small"] | {"max_train_steps": 5})
    (warning,) = config_warnings(config, groups=TRIAL_GROUPS)
    assert warning.sentence.endswith("never to 0.0005; choose 0") and warning.field == "num_warmup_steps"


def test_a_batch_beyond_all_counting_is_refused_at_once():
    with pytest.raises(UserError, match=r"not divisible by micro_batch_size 12 \(nearest micro_batch_size: 10 or 16\)"):
        RunConfig(global_batch_size=10**30).on_cpu()
    with pytest.raises(UserError, match=r"\(nearest micro_batch_size: 96 or 192\)"):
        RunConfig(micro_batch_size=100)
    with pytest.raises(UserError, match=r"\(nearest micro_batch_size: 192\)"):
        RunConfig(micro_batch_size=10**30)


def continued(step: int, **changes) -> Continued:
    config = RunConfig(**DEMO | changes)
    rate = learning_rate_at(config, step)
    return Continued(name="runs/one", step=step, schedule_step=step, learning_rate=rate, config=config)


@pytest.mark.parametrize(
    ("then", "step", "now", "words"),
    [
        ({}, 300, {"max_train_steps": 500}, "jumps from 0 to 0.000741 where runs/one resumes, at step 300 (max_train"),
        ({}, 290, {"max_train_steps": 500}, "(max_train_steps was 300 and is 500), and unsettles what its decay had"),
        ({"lr_scheduler_type": "linear"}, 300, {"max_train_steps": 400}, "lr_scheduler_type was linear and is cosine"),
        ({}, 300, {"max_train_steps": 500, "lr_scheduler_type": "constant"}, "jumps from 0 to 0.002"),
        ({}, 100, {"learning_rate": 5e-3}, "learning_rate was 0.002 and is 0.005"),
    ],
)
def test_a_learning_rate_that_jumps_where_a_run_goes_on(then, step, now, words):
    (warning,) = config_warnings(RunConfig(**DEMO | now), continued(step, **then))
    assert words in warning.sentence and "--run-name" in warning.sentence and "--init-from" in warning.sentence


@pytest.mark.parametrize(
    ("then", "step", "now"),
    [
        ({}, 150, {}),
        ({}, 10, {}),
        ({}, 300, {}),
        ({}, 300, {"max_train_steps": 200}),  # nothing is left to train
        ({}, 300, {"max_train_steps": 310}),  # a rate of next to nothing
        ({}, 100, {"max_train_steps": 400}),  # early enough: less than twice the rate
        ({"lr_scheduler_type": "constant"}, 300, {"lr_scheduler_type": "constant", "max_train_steps": 500}),
        ({}, 150, {"learning_rate": 1e-3}),
        ({}, 10, {"learning_rate": 6e-3}),  # nothing had decayed
        ({}, 20, {"learning_rate": 6e-3}),
        ({"num_warmup_steps": 200}, 10, {}),
        ({"lr_scheduler_type": "constant"}, 100, {"learning_rate": 6e-3}),
    ],
)
def test_a_run_that_may_well_go_on_so(then, step, now):
    assert config_warnings(RunConfig(**DEMO | now), continued(step, **then)) == []


def test_a_checkpoint_of_deepspeeds_own_has_a_learning_rate_and_no_config():
    place = dataclasses.replace(continued(100), name="ckpt/global_step100", learning_rate=1e-5, config=None)
    (warning,) = config_warnings(RunConfig(**DEMO), place)
    assert "jumps from 1e-05 to 0.00" in warning.sentence and "ckpt/global_step100 resumes, at step 100, and" in (
        warning.sentence
    )
    assert config_warnings(RunConfig(**DEMO), dataclasses.replace(place, learning_rate=None)) == []


def test_check_says_it_and_finds_nothing_wrong(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text("learning_rate: 5\nmax_train_steps: 1000\nsave_checkpoint_steps: 500\n")
    assert main(["check", "--config", str(path)]) == 0
    said = capsys.readouterr().out
    assert f"{path}: warning: num_warmup_steps 2000 is not below max_train_steps 1000" in said
    assert f"{path}: warning: learning_rate 5 is far above" in said
    assert main(["check", "--config", str(path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["errors"], report["warnings"]) == (0, 2)
    assert [finding["key"] for finding in report["run_config"]] == ["num_warmup_steps", "learning_rate"]
    for preset in PRESETS:
        assert main(["check", "--preset", preset]) == 0
        assert "warning" not in capsys.readouterr().out
