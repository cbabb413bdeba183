"""Paths: `~` and variables through every door, absolute on the way out, names of runs, and what was meant."""

import argparse
import json
import os
from pathlib import Path

import pytest

from codeparrot_ds.cli import main as cli
from codeparrot_ds.config.arguments import ArgumentParser, add_config_arguments, config_from_arguments
from codeparrot_ds.config.files import load_config
from codeparrot_ds.config.run_config import FIELDS, MODEL_NAMES, PATH_FIELDS, RunConfig, with_absolute_paths
from codeparrot_ds.ds_config.resolve import resolve_ds_config
from codeparrot_ds.errors import UserError
from codeparrot_ds.model.shapes import KNOWN_SHAPES
from codeparrot_ds.paths import expand, find_run, in_runs, may_be_on_hub, nearest, not_a_run, shown

FIELDS_WITH_PATHS = "data validation_data tokenizer model init_from deepspeed eval_prompts eval_problems".split()
FIELDS_WITH_PATHS += "output_dir resume hub".split()
# What a path is called in the help of an argument.
PLACES = ("DIR", "FILE", "RUN", "PATH", "SRC", "DATA", "MODEL", "DS_JSON", "JSON", "PNG", "PLACE")
PLACES += ("RUN_FOLDER", "DEEPSPEED_FOLDER")


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DATA", "/data")
    (tmp_path / "home").mkdir()
    return str(tmp_path / "home")


def test_what_a_shell_puts_in(home, tmp_path):
    assert expand("~/runs") == f"{home}/runs" and expand("~") == home
    assert expand("~root/x") == os.path.expanduser("~root/x") != "~root/x"
    assert expand("$DATA/a") == expand("${DATA}/a") == "/data/a"
    assert expand("x/$DATA-1/~") == "x//data-1/~" and expand("a$") == "a$" and expand("") == ""
    assert expand("$HOME/runs") == f"{home}/runs" == expand(expand("~/runs"))
    (tmp_path / "odd$name").mkdir()
    assert expand("odd$name") == "odd$name"  # a folder of that name


@pytest.mark.parametrize("name", FIELDS_WITH_PATHS)
def test_a_field_means_the_same_from_python_a_file_and_an_option(home, tmp_path, name):
    for typed, meant in (("~/x.git", f"{home}/x.git"), ("${DATA}/x.git", "/data/x.git")):
        (tmp_path / "run.yaml").write_text(f"{name}: {typed}\n")
        (tmp_path / "run.json").write_text(json.dumps({name: typed}))
        parser = ArgumentParser()
        add_config_arguments(parser)
        option = config_from_arguments(parser.parse_args([f"--{name.replace('_', '-')}", typed]))
        files = [load_config(tmp_path / f"run.{kind}") for kind in ("yaml", "json")]
        assert {getattr(each, name) for each in (RunConfig(**{name: typed}), option, *files)} == {meant}


def test_the_fields_with_paths_are_known():
    assert sorted(PATH_FIELDS) == sorted(FIELDS_WITH_PATHS)
    assert sorted(MODEL_NAMES) == sorted(KNOWN_SHAPES)


def test_the_parts_of_a_mixture(home, tmp_path):
    assert RunConfig(data="~/a=0.7, $DATA/b=.3,org/name=1").data == f"{home}/a=0.7,/data/b=.3,org/name=1"
    (tmp_path / "here").mkdir()
    assert with_absolute_paths(RunConfig(data="here=1,org/name@main=2")).data == f"{tmp_path}/here=1,org/name@main=2"


def parsers(parser, name="codeparrot-ds"):
    yield name, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command, sub in action.choices.items():
                yield from parsers(sub, f"{name} {command}")


def test_every_path_of_every_command_goes_through_the_door(home):
    """By what arguments are called in the help; those of the run config's fields are put in by it."""
    seen = 0
    for command, parser in parsers(cli.build_parser()):
        for action in parser._actions:
            if action.metavar not in PLACES:
                continue
            if action.type is None and command in ("codeparrot-ds demo", "codeparrot-ds doctor"):
                assert action.dest in PATH_FIELDS  # these make a run config of it
                continue
            parsed = action.type("~/x")
            if action.dest in FIELDS and action.default == argparse.SUPPRESS:
                parsed = getattr(RunConfig(**{action.dest: parsed}), action.dest)
            assert str(parsed) == f"{home}/x", f"{command}: {action.metavar} {action.dest}"
            seen += 1
    assert seen > 40


def test_what_a_run_keeps_means_the_same_from_everywhere(home, tmp_path, monkeypatch):
    for name in ("corpus", "tokenizer", "gpt2", "examples", "auto", "humaneval"):
        (tmp_path / name).mkdir()
    (tmp_path / "zero2").mkdir()
    (tmp_path / "mine.json").write_text("{}")
    config = RunConfig(data="corpus", tokenizer="tokenizer", deepspeed="mine.json", hub="hub.git", eval_prompts="p.txt")
    kept = with_absolute_paths(config)
    assert (kept.data, kept.tokenizer) == (f"{tmp_path}/corpus", f"{tmp_path}/tokenizer")
    assert (kept.deepspeed, kept.hub) == (f"{tmp_path}/mine.json", f"{tmp_path}/hub.git")
    assert (kept.output_dir, kept.eval_prompts) == (f"{tmp_path}/runs", f"{tmp_path}/p.txt")
    monkeypatch.chdir("/")
    assert with_absolute_paths(kept) == kept
    monkeypatch.chdir(tmp_path)
    names = RunConfig(
        **{"data": "org/name", "tokenizer": "org/name", "model": "gpt2", "deepspeed": "zero2", "hub": "org/name"},
        **{"eval_prompts": "examples", "eval_problems": "humaneval", "init_from": "org/name@main"},
    )
    kept = with_absolute_paths(names)
    assert {name for name in PATH_FIELDS if getattr(kept, name) != getattr(names, name)} == {"output_dir"}


def test_paths_in_a_deepspeed_json(home, tmp_path):
    offload = {"device": "nvme", "nvme_path": "~/nvme"}
    ds_config = {
        "zero_optimization": {"stage": 2, "offload_optimizer": offload},
        "flops_profiler": {"enabled": False, "output_file": "$DATA/flops.txt"},
    }
    resolved = resolve_ds_config(ds_config, RunConfig(), world_size=1, model_hidden_size=64)
    assert resolved["zero_optimization"]["offload_optimizer"]["nvme_path"] == f"{home}/nvme"
    assert resolved["flops_profiler"]["output_file"] == "/data/flops.txt"
    ds_config["flops_profiler"]["output_file"] = "flops.txt"
    resolved = resolve_ds_config(ds_config, RunConfig(), world_size=1, model_hidden_size=64)
    assert resolved["flops_profiler"]["output_file"] == f"{tmp_path}/flops.txt"
    offload["nvme_path"] = "$NONE_SUCH/nvme"
    with pytest.raises(UserError, match=r"offload_optimizer.nvme_path cannot be \$NONE_SUCH/nvme: the variable"):
        resolve_ds_config(ds_config, RunConfig(), world_size=1, model_hidden_size=64)


def test_shown_from_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shown(tmp_path / "runs") == "runs" and shown("runs") == "runs" and shown("/else/where") == "/else/where"


def test_the_nearest_that_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus" / "train").mkdir(parents=True)
    (tmp_path / "Tokenizer").mkdir()
    assert nearest("corpsu") == "corpus" and nearest("corpsu/trian") == "corpus/train"
    assert nearest("tokenizer") == "Tokenizer" and nearest(str(tmp_path / "corpsu")) == str(tmp_path / "corpus")
    assert nearest("xyz") is None and nearest("corpus/xyz") is None and nearest("corpus/train/x/y") is None
    assert nearest("a" * 5000) is None and nearest("a\0b") is None


def test_a_folder_that_may_not_be_looked_into_is_not_taken_for_nothing(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "stat", refuse)  # root may look into everything
    with pytest.raises(UserError, match="closed/run cannot be looked at: permission denied"):
        find_run("closed/run")


def test_names_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("org/name", "org/name:config", "org/name@main", "org/name:config@refs/convert/parquet"):
        assert may_be_on_hub(name), name
    assert may_be_on_hub("gpt2", bare=True) and not may_be_on_hub("gpt2")
    for path in ("./org/name", "/org/name", "org/name/x", "runs/name", "org/", "~/name", ""):
        assert not may_be_on_hub(path, bare=True), path
    (tmp_path / "org").mkdir()
    (tmp_path / "corpora" / "python").mkdir(parents=True)
    assert not may_be_on_hub("org/name")  # something of a folder here
    assert not may_be_on_hub("corpora/pyhton") and not may_be_on_hub("copora/python")
    assert may_be_on_hub("org/name@main")  # a name in any case


def test_a_run_by_its_bare_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "first" / "checkpoints").mkdir(parents=True)
    (tmp_path / "elsewhere" / "second").mkdir(parents=True)
    assert find_run("first") == Path("runs/first")
    assert capsys.readouterr().err == "first is taken for runs/first\n"
    assert find_run("first/checkpoints") == Path("runs/first/checkpoints")
    assert in_runs("second", "elsewhere") == "elsewhere/second"
    capsys.readouterr()
    assert find_run("runs/first") == Path("runs/first") and in_runs("second") == "second"
    assert find_run(str(tmp_path / "runs" / "first")) == tmp_path / "runs" / "first"
    (tmp_path / "first").mkdir()
    assert find_run("first") == Path("first")  # what is here comes first
    assert capsys.readouterr().err == ""
    for text, words in (
        ("secnod", "there is no run secnod, and none of that name in elsewhere; did you mean 'elsewhere/second'?"),
        ("elsewhere/secnod", "there is no run elsewhere/secnod; did you mean 'elsewhere/second'?"),
        ("./xyz", "there is no run ./xyz"),
    ):
        with pytest.raises(UserError) as caught:
            find_run(text, "elsewhere")
        assert str(caught.value) == words


def test_a_folder_of_runs_is_none(tmp_path):
    for name in ("b", "a"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text("{}")
    assert str(not_a_run(tmp_path)) == f"{tmp_path} is not a run: it has no run.json; it holds the runs a, b"
    assert str(not_a_run(tmp_path / "a")).endswith("it has no run.json")
