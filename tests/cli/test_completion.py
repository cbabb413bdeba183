"""Completion as a shell does it: the bash script in bash, and every word of the command line in all of them."""

from __future__ import annotations

import argparse
import json
import re
import subprocess

import pytest

from codeparrot_ds.cli.main import build_parser, main
from codeparrot_ds.config.run_config import PRESETS
from codeparrot_ds.ds_config.file import shipped_names


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """By shell, the file of its script."""
    folder = tmp_path_factory.mktemp("scripts")
    found = {}
    for shell in ("bash", "zsh", "fish"):
        answer = _said("completion", shell)
        found[shell] = folder / shell
        found[shell].write_text(answer)
    return found


def _said(*arguments: str) -> str:
    import contextlib
    import io

    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert main(arguments) == 0
    return said.getvalue()


COMPLETE = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
_codeparrot_ds
printf '%s\\n' "${COMPREPLY[@]}"
"""


def completed(script, *words: str, cwd=None) -> list[str]:
    """What bash offers for the last of the words that follow the program's name."""
    command = ["bash", "--norc", "-c", COMPLETE, "bash", str(script), "codeparrot-ds", *words]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, cwd=cwd)
    assert answer.stderr == ""
    return answer.stdout.split()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["tr"], ["train"]),
        (["--"], ["--help", "--version"]),
        (["checkpoint", ""], ["list", "verify", "export", "import"]),
        (["checkpoint", "ex"], ["export"]),
        (["train", ""], list(PRESETS)),
        (["train", "sm"], ["small"]),
        (["train", "--max-tr"], ["--max-train-steps"]),
        (["train", "demo", "--lr-s"], ["--lr-scheduler-type"]),
        (["train", "demo", "--lr-scheduler-type", ""], ["cosine", "linear", "constant"]),
        (["train", "--lr-scheduler-type", "=", "co"], ["cosine", "constant"]),
        (["train", "--lr-scheduler-type", "="], ["cosine", "linear", "constant"]),
        (["train", "--deepspeed", "zero3_of"], [name for name in shipped_names() if name.startswith("zero3_of")]),
        (["check", "zero1_fp32_b"], ["zero1_fp32_bf16_communication"]),
        (["train", "--data", ""], []),  # bash offers files
        (["train", "--seed", ""], []),
        (["checkpoint", "export", "--d"], ["--dtype"]),
        (["checkpoint", "export", "x", "--dtype", "b"], ["bfloat16"]),
        (["train", "checkpoint", "--run-n"], ["--run-name"]),  # a word that is a command elsewhere
        (["compare", "--preset", "l"], ["large"]),
        (["completion", ""], ["bash", "zsh", "fish"]),
        (["none", "--x"], []),
    ],
)
def test_bash_offers(scripts, words, offered):
    assert completed(scripts["bash"], *words) == offered


def test_bash_offers_the_runs_that_are_there(scripts, tmp_path):
    for name in ("brave-otter-7", "calm-ara-8"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "run.json").write_text("{}")
    (tmp_path / "runs" / "hub.git").mkdir()
    for command in (["report"], ["runs"], ["checkpoint", "list"], ["evaluate"], ["hub", "publish"]):
        assert completed(scripts["bash"], *command, "", cwd=tmp_path) == ["brave-otter-7", "calm-ara-8"]
        assert completed(scripts["bash"], *command, "br", cwd=tmp_path) == ["brave-otter-7"]
    assert completed(scripts["bash"], "report", "") == []


def every_option(parser=None, path=()):
    """(path of a command, option) for each that the help shows."""
    for action in (parser or build_parser())._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, child in action.choices.items():
                yield from every_option(child, (*path, name))
        elif path and action.help != argparse.SUPPRESS:
            yield from ((path, name) for name in action.option_strings if name.startswith("--") and "_" not in name)


def test_every_option_is_offered_in_every_shell(scripts):
    texts = {shell: path.read_text() for shell, path in scripts.items()}
    assert texts["zsh"].partition("_codeparrot_ds_runs()")[2] == texts["bash"].partition("_codeparrot_ds_runs()")[2]
    offered = {}
    for path, option in every_option():
        if path not in offered:
            offered[path] = set(completed(scripts["bash"], *path, "--"))
        assert option in offered[path] or path in (("checkpoint",), ("hub",), ("data",)), (path, option)
        if path not in (("checkpoint",), ("hub",), ("data",)):
            begin = f"complete -c codeparrot-ds -n '__codeparrot_ds_at {' '.join(path)}' -l {option[2:]} "
            assert begin in texts["fish"]
    assert len(offered) > 20
    for line in texts["fish"].splitlines():
        if line.startswith("complete "):  # quoted so that fish reads it as it was meant
            assert re.fullmatch(r"complete(?: -[a-z]|[ ][\w.-]+| '(?:[^'\\]|\\['\\])*')+", line), line


def test_the_launch_script_completes_as_well(monkeypatch, capsys):
    monkeypatch.setenv("CODEPARROT_DS_COMMAND", "../my checkout/launch.sh")
    assert main(["completion", "bash"]) == 0
    assert capsys.readouterr().out.endswith("\ncomplete -o default -F _codeparrot_ds codeparrot-ds launch.sh\n")


def test_an_unknown_shell(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["completion", "tcsh"])
    assert stop.value.code == 2
    assert json.dumps("cannot be 'tcsh'; choose one of bash, fish, zsh").strip('"') in capsys.readouterr().err
