"""What is only parsed of DeepSpeed's launcher: options, the file of variables, its log's words for a killed rank."""

import ast
import importlib.util
import inspect
import json
import sys
from pathlib import Path

import pytest

from codeparrot_ds.compare.trial_process import KILLED_BY_LAUNCHER
from codeparrot_ds.engine.private_parts import LAUNCHER, PARTS
from codeparrot_ds.launch.deepspeed_command import LaunchOptions, node_command, runner_command, runner_environment
from codeparrot_ds.launch.hostfile import Host

HOSTS = [Host(name="one", slots=(0, 1)), Host(name="two", slots=(0,))]


def test_the_node_launcher_takes_our_options(monkeypatch):
    from deepspeed.launcher import launch

    for bind_cores in (False, True):
        options = LaunchOptions(bind_cores=bind_cores)
        command = node_command(HOSTS, options, ["--seed", "1"], addr="one", port=1234, node_rank=1)
        assert command[:3] == [sys.executable, "-m", "deepspeed.launcher.launch"]
        monkeypatch.setattr(sys, "argv", command[2:])
        parsed = launch.parse_args()
        world = json.loads(launch.base64.urlsafe_b64decode(parsed.world_info))
        assert world == {"one": [0, 1], "two": [0]} and parsed.bind_cores_to_rank == bind_cores
        assert (parsed.master_addr, parsed.master_port, parsed.node_rank) == ("one", 1234, 1)
        assert parsed.module and parsed.training_script_args == ["--seed", "1"]


def test_the_runner_takes_our_options(tmp_path):
    from deepspeed.launcher import runner

    command = runner_command(HOSTS, LaunchOptions(), tmp_path, addr="one", port=1234)
    assert command[:3] == [sys.executable, "-m", "deepspeed.launcher.runner"]
    parsed = runner.parse_args(command[3:])
    assert parsed.no_ssh_check and parsed.force_multi and parsed.module
    assert parsed.hostfile == str(tmp_path / "hostfile") and parsed.master_port == 1234


def test_the_runner_reads_our_file_of_variables(tmp_path, monkeypatch):
    from deepspeed.launcher import runner

    environment = runner_environment(tmp_path, {"NAME": "value"})
    monkeypatch.setenv("DS_ENV_FILE", environment["DS_ENV_FILE"])
    specification = importlib.util.spec_from_file_location("deepspeed.launcher.runner_again", runner.__file__)
    again = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(again)  # it reads the variable when it is imported
    assert Path(again.DEEPSPEED_ENVIRONMENT_NAME).read_text(encoding="utf-8") == "NAME=value\n"
    # An absolute path stays what it is where the runner joins it to its folders.
    assert "os.path.join(environ_path, DEEPSPEED_ENVIRONMENT_NAME)" in inspect.getsource(again.main)


@pytest.mark.parametrize(("code", "found"), [(-9, True), (-15, False), (1, False)])
def test_the_launcher_says_which_rank_was_killed_in_the_words_that_are_looked_for(code, found):
    from deepspeed.launcher import launch

    texts = [
        eval(  # the launcher's own f-string, with a command and an exit code
            compile(ast.Expression(node), "launch.py", "eval"),
            {"cmd": [sys.executable, "-m", "codeparrot_ds.train", "--local_rank=3"], "last_return_code": code},
        )
        for node in ast.walk(ast.parse(inspect.getsource(launch)))
        if isinstance(node, ast.JoinedStr) and "last_return_code" in ast.unparse(node)
    ]
    (text,) = texts
    match = KILLED_BY_LAUNCHER.search(text)
    assert (match is not None) == found and (not found or match[1] == "3")


def test_all_that_is_parsed_is_tested_here():
    assert {part.attribute for part in PARTS if part.held == LAUNCHER} == {
        *("--world_info", "--no_ssh_check", "--force_multi", "DS_ENV_FILE", "exits_with_return_code"),
    }
