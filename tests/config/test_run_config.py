import dataclasses

import pytest

from codeparrot_ds.config.arguments import ArgumentParser, add_config_arguments, config_from_arguments, options_of
from codeparrot_ds.config.files import load_config, save_config
from codeparrot_ds.config.launch_options import LaunchOptions, add_launch_arguments, launch_from_arguments
from codeparrot_ds.config.run_config import PRESETS, RunConfig
from codeparrot_ds.errors import UserError


def parse(*arguments):
    parser = ArgumentParser(prog="train")
    add_config_arguments(parser)
    add_launch_arguments(parser)
    return parser.parse_args(list(arguments))


def config_of(*arguments):
    return config_from_arguments(parse(*arguments))


def test_small_is_the_recipe():
    config = config_of("small")
    assert config == RunConfig()
    assert (config.model, config.global_batch_size, config.micro_batch_rows) == ("gpt2", 192, 12)
    assert (config.learning_rate, config.num_warmup_steps, config.max_train_steps) == (5e-4, 2000, 150_000)
    assert (config.weight_decay, config.lr_scheduler_type, config.seq_length) == (0.1, "cosine", 1024)
    assert config.gradient_accumulation_steps(16) == 1


def test_large_is_the_recipe():
    config = config_of("large")
    assert (config.model, config.global_batch_size, config.micro_batch_rows) == ("gpt2-xl", 512, 2)
    assert (config.learning_rate, config.num_warmup_steps, config.max_train_steps) == (2e-4, 750, 50_000)
    assert config.gradient_accumulation_steps(16) == 16
    assert "activation_checkpointing" in config.ds_config_name


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_valid_and_runs_on_one_and_two_ranks(preset):
    config = RunConfig(**PRESETS[preset])
    assert config.gradient_accumulation_steps(1) == 2 * config.gradient_accumulation_steps(2)


def test_precedence_is_defaults_preset_file_options(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("max_train_steps: 7\nseed: 3\n")
    config = config_of("demo", "--config", str(path), "--seed", "9")
    assert (config.seed, config.max_train_steps, config.seq_length, config.weight_decay) == (9, 7, 256, 0.1)


@pytest.mark.parametrize("option", ["--max-train-steps", "--max_train_steps"])
def test_both_spellings_of_an_option(option):
    assert config_of(option, "20").max_train_steps == 20


def test_values_of_options():
    config = config_of("--max-train-steps", "1e5", "--compile", "--eval-steps", "5", "--max-eval-steps", "-1")
    assert (config.max_train_steps, config.compile, config.eval_steps) == (100_000, True, 5)
    assert config_of("--eval-steps", "none", "--no-compile") == RunConfig()


def test_help_shows_each_field_once_with_its_default(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    assert "_steps" not in shown
    text = " ".join(shown.split())
    for field in dataclasses.fields(RunConfig):
        assert f"--{field.name.replace('_', '-')} " in text.replace(",", " ")
        if isinstance(field.default, (int, float)) and not isinstance(field.default, bool):
            assert f"(default: {field.default})" in text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--max-trian-steps", "3"], "unknown option --max-trian-steps; did you mean '--max-train-steps'?"),
        (["--max_trian_steps=3"], "unknown option --max_trian_steps; did you mean '--max-train-steps'?"),
        (["--max", "3"], "unknown option --max"),
        (["--seed", "x"], "must be a whole number, not 'x'"),
        (["--seed", "1.5"], "must be a whole number, not '1.5'"),
        (["--learning-rate", "inf"], "must be a finite number"),
        (["--micro-batch-size", "0"], "must be at least 1, not 0"),
        (["--wandb", "of"], "cannot be 'of'; did you mean 'off'?"),
        (["small", "large"], "unexpected argument 'large'"),
        (["--num-gpus", "0"], "must be a whole number of at least 1, not '0'"),
    ],
)
def test_bad_option_is_one_sentence_and_exit_code_2(capsys, arguments, sentence):
    with pytest.raises(SystemExit) as stop:
        parse(*arguments)
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert sentence in said
    assert said.count("\n") == 1


def test_unknown_preset_offers_the_nearest():
    with pytest.raises(UserError, match="unknown preset 'lrge'; did you mean 'large'"):
        config_of("lrge")
    with pytest.raises(UserError, match="write --config run.yaml"):
        config_of("run.yaml")


def test_all_problems_are_raised_at_once():
    with pytest.raises(UserError) as error:
        RunConfig(seq_length=0, learning_rate="fast", wandb="maybe", compile=1, seed=None)
    for name in ("seq_length", "learning_rate", "wandb", "compile", "seed"):
        assert name in str(error.value)


@pytest.mark.parametrize(
    "values",
    [
        {"global_batch_size": 10, "micro_batch_size": 4},
        {"dropout": 1.0},
        {"max_eval_steps": 0},
        {"run_name": "a/b"},
        {"run_name": ".."},
        {"run_name": ""},
        {"learning_rate": float("nan")},
        {"seed": True},
    ],
)
def test_bad_values_are_refused(values):
    with pytest.raises(UserError, match=next(iter(values))):
        RunConfig(**values)


def test_whole_numbers_are_accepted_for_floats():
    assert isinstance(RunConfig(max_grad_norm=1).max_grad_norm, float)


def test_accumulation_that_does_not_divide_names_valid_choices():
    config = RunConfig(global_batch_size=192, micro_batch_size=12)
    assert [config.gradient_accumulation_steps(n) for n in (1, 2, 4, 8, 16)] == [16, 8, 4, 2, 1]
    with pytest.raises(UserError) as error:
        config.gradient_accumulation_steps(5)
    assert "192 is not divisible by micro_batch_size x world_size = 12 x 5 = 60" in str(error.value)
    assert "--global-batch-size 180" in str(error.value)
    with pytest.raises(UserError, match="--micro-batch-size 8 or --global-batch-size 288"):
        RunConfig(global_batch_size=192, micro_batch_size=12).gradient_accumulation_steps(24)


def test_saved_config_is_read_back_equal(tmp_path):
    config = RunConfig(
        run_name="2024", hub="off", wandb="off", resume="no", learning_rate=1e-5, eval_steps=3, data="null"
    )
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    save_config(RunConfig(), tmp_path / "config.yaml")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.rename", fail)
    with pytest.raises(OSError, match="No space left"):
        save_config(RunConfig(seed=5), tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == RunConfig()
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_what_yaml_misreads_is_read_as_meant(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "learning_rate: 5e-4\nmax_train_steps: 1e3\nhub: off\nrun-name: 2024\ncompile: yes\nshuffle_buffer: 1_000\n"
    )
    config = load_config(path)
    assert (config.learning_rate, config.max_train_steps, config.hub, config.run_name) == (5e-4, 1000, "off", "2024")
    assert config.compile and config.shuffle_buffer == 1000


def test_json_with_tabs(tmp_path):
    path = tmp_path / "run.json"
    path.write_text('{\n\t"learning_rate": 5e-4,\n\t"run_name": null,\n\t"seed": 4\n}\n')
    assert load_config(path) == RunConfig(seed=4)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (
            "seed: 1\nmax_trian_steps: 5\n",
            "run.yaml:2: unknown field 'max_trian_steps'; did you mean 'max_train_steps'?",
        ),
        ("seed: 1\nseq_length: long\n", "run.yaml:2: seq_length must be a whole number, not 'long'"),
        ("seed: 1.5\n", "run.yaml:1: seed must be a whole number, not '1.5'"),
        ('learning_rate: "1e-4"\n', "run.yaml:1: learning_rate must be a number, not '1e-4'"),
        ("compile: 1\n", "run.yaml:1: compile must be true or false"),
        ("data: [a, b]\n", "run.yaml:1: data must be text, not a list"),
        ("data:\n", "run.yaml:1: data must be text, not None"),
        ("seed: 1\nseed: 2\n", "run.yaml:2: seed is given twice"),
        ("wandb: onlin\n", "run.yaml:1: wandb cannot be 'onlin'; did you mean 'online'?"),
        ("seed: [1\n", "run.yaml:2:1: not valid YAML or JSON"),
        ("", "is empty"),
        ("- seed\n", "expected `field: value` lines"),
    ],
)
def test_bad_file_names_file_line_and_key(tmp_path, content, sentence):
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(UserError) as error:
        load_config(path)
    assert sentence in str(error.value)


def test_file_problems_are_raised_together(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("sed: 1\nseq_length: x\n")
    with pytest.raises(UserError) as error:
        load_config(path)
    assert "run.yaml:1" in str(error.value) and "run.yaml:2" in str(error.value)


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for path, sentence in (("none.yaml", "no such"), (".", "is a folder"), ("binary.yaml", "not a text file")):
        with pytest.raises(UserError, match=sentence):
            load_config(tmp_path / path)


def test_launch_options():
    assert launch_from_arguments(parse()) == LaunchOptions()
    options = launch_from_arguments(parse("--num_ranks", "3", "--hostfile", "h", "--master-port", "29500"))
    assert options == LaunchOptions(num_gpus=3, hostfile="h", master_port=29500)


def test_the_launchers_own_rank_option_is_accepted():
    assert config_of("--local_rank=1", "small") == RunConfig()


@pytest.mark.parametrize("preset", PRESETS)
def test_ranks_get_a_config_as_options(preset):
    """Whatever a field holds: the options say it again, without a preset or a file."""
    config = RunConfig(**PRESETS[preset])
    assert config_of(*options_of(config, RunConfig())) == config
    odd = {
        "run_name": "x=$y 'z'",
        "data": "a b=0.7,c=.3",
        "learning_rate": 1 / 3,
        "micro_batch_size": "auto",
        "compile": True,
        "keep_best_checkpoint": False,
        "eval_steps": 7,
        "max_eval_steps": -1,
        "max_hours": 0.1,
        "resume": "never",
        "eval_prompts": "--help",
    }
    config = dataclasses.replace(config, **odd)
    assert config_of(*options_of(config, RunConfig())) == config
