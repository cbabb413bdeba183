"""Which run the ranks agree on: the one that the command resolved, or the one that rank 0 resolves."""

import dataclasses
import shlex
import sys

import pytest

from codeparrot_ds.checkpoint.run_folder import run_path
from codeparrot_ds.config.arguments import ArgumentParser, add_config_arguments, config_from_arguments
from codeparrot_ds.ds_config.file import open_ds_config
from codeparrot_ds.errors import UserError
from codeparrot_ds.launch.preflight import check_run, for_ranks
from codeparrot_ds.resolved_run import ResolvedRun, resolve_run
from codeparrot_ds.telemetry.startup import LAUNCHED_AT
from codeparrot_ds.training.process import agree_on_run
from codeparrot_ds.training.records import open_folder


@pytest.fixture
def resolved(make_config):
    config = make_config(deepspeed="zero2_fp32")
    return for_ranks(check_run(config, device="cpu", world_size=1), config.tokenizer)


def test_a_run_survives_the_file_that_it_travels_in(resolved):
    content = resolved.as_json()
    there = ResolvedRun.from_json(content)
    assert there.as_json() == content and there.shape == resolved.shape and there.layout == resolved.layout
    assert there.encoder.fingerprint == resolved.encoder.fingerprint and there.ds.sources == resolved.ds.sources


def test_ranks_take_what_the_command_resolved(resolved, only_rank):
    """A change in the data's folder meanwhile, say, is found where it matters, not by resolving a second time."""
    given = ResolvedRun.from_json(resolved.as_json())
    assert agree_on_run(given, only_rank) is given


def test_rank_0_resolves_a_config_with_its_name_and_its_micro_batch(make_config, only_rank):
    config = dataclasses.replace(make_config(deepspeed="zero2_fp32"), run_name=None, micro_batch_size="auto")
    run = agree_on_run(config, only_rank)
    assert run.config.run_name and not run_path(run.config).exists()
    assert run.world_size == 1 and run.config.micro_batch_rows * run.accumulation_steps == 8


def test_a_run_for_other_devices_is_resolved_for_these(resolved, only_rank):
    """As where the command saw no GPU of the hosts: its number of ranks or its precisions may be wrong."""
    content = resolved.as_json() | {"world_size": 2, "precisions": ["bf16", "fp16", "fp32"]}
    run = agree_on_run(ResolvedRun.from_json(content), only_rank)
    assert run.world_size == 1 and run.layout == resolved.layout and run.ds_config == resolved.ds_config


def test_a_folder_that_the_deepspeed_config_names_is_absolute(make_config, tmp_path, monkeypatch):
    """A rank, or its host, may have another working directory than the command."""
    monkeypatch.chdir(tmp_path)
    config = make_config(deepspeed="zero3_nvme", output_dir="runs")
    run = resolve_run(config, open_ds_config(config.deepspeed), world_size=1, device="cpu")
    offloaded = run.ds_config["zero_optimization"]["offload_optimizer"]
    assert offloaded["nvme_path"] == str(tmp_path / "runs" / "brave-otter-7" / "nvme")


@pytest.mark.parametrize("launched", [True, False])
def test_a_start_is_recorded_with_a_command_that_says_what_it_was(resolved, only_rank, monkeypatch, launched):
    if launched:
        monkeypatch.setenv(LAUNCHED_AT, "0.0")
    monkeypatch.setattr("sys.argv", ["train.py", "--data", "my corpus"])
    folder = open_folder(resolved, only_rank)
    (start,) = folder.record["starts"]
    parser = ArgumentParser()
    add_config_arguments(parser)
    program, command, *options = shlex.split(start["command"])
    if launched:
        assert (program, command) == ("codeparrot-ds", "train")
        assert config_from_arguments(parser.parse_args(options)) == resolved.config
    else:
        assert [program, command, *options] == sys.argv


def test_a_mistake_is_found_by_rank_0_as_by_the_command(make_config, only_rank):
    with pytest.raises(UserError, match="did you mean 'zero2'"):
        agree_on_run(make_config(deepspeed="zerro2"), only_rank)
