"""Commands that survive being pasted, and SIGTERM as Ctrl-C."""

import os
import shlex
import signal
import subprocess

import pytest

from codeparrot_ds.shell import COMMAND, TerminatedError, interrupted_by_sigterm, pasteable

PARTS = ["train", "--data", "my corpus", "--run-name", "it's", "$HOME", "*", 3, ""]


def test_a_pasted_command_is_read_as_it_was_meant(monkeypatch):
    monkeypatch.delenv(COMMAND, raising=False)
    command = pasteable(*PARTS)
    assert shlex.split(command) == ["codeparrot-ds", *map(str, PARTS)]
    read = subprocess.run(["sh", "-c", f"printf '%s\\n' {command}"], capture_output=True, text=True, check=True).stdout
    assert read.split("\n")[:-1] == ["codeparrot-ds", *map(str, PARTS)]


def test_it_begins_as_the_user_can_call_the_program(monkeypatch):
    monkeypatch.setenv(COMMAND, "../my checkout/launch.sh")
    assert shlex.split(pasteable("demo")) == ["../my checkout/launch.sh", "demo"]


def test_sigterm_ends_a_block_as_ctrl_c_does():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt) as interrupt, interrupted_by_sigterm():
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()
    assert interrupt.type is TerminatedError and signal.getsignal(signal.SIGTERM) == before
