"""Asks all hosts of a run at once, through ssh. No torch here."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from codeparrot_ds.child_process import PACKAGE_PARENT, python_path
from codeparrot_ds.errors import UserError
from codeparrot_ds.launch.probe import MARK

CONNECT_SECONDS = 8
MAX_AT_ONCE = 64
PDSH_OPTIONS = "PDSH_SSH_ARGS_APPEND"
"""Environment variable: options that pdsh adds to those of ssh."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """What a host said.

    Attributes:
        host: its name.
        reply: of :func:`codeparrot_ds.launch.probe.answer`; empty where something went wrong.
        problem: what did, with the remedy.
        asked: when, by this machine's clock, in seconds since the epoch.
        answered: when.
    """

    host: str
    reply: dict[str, Any]
    problem: str | None = None
    asked: float = 0.0
    answered: float = 0.0


def ask_all(
    requests: dict[str, dict[str, Any]], *, seconds: float = 60.0, ssh_port: int | None = None
) -> dict[str, Answer]:
    """Asks each host its request, all at once; ``localhost`` is asked without ssh.

    Args:
        requests: by host.
        seconds: until a host that does not answer is given up.
        ssh_port: of their sshd; None for ssh's own choice.

    Raises:
        UserError: there is no ssh.
    """
    if not requests:
        return {}
    if shutil.which("ssh") is None and any(host != "localhost" for host in requests):
        raise UserError("there is no ssh on PATH: install openssh-client, or use --no-ssh on each host")
    options = ssh_options(ssh_port)
    with concurrent.futures.ThreadPoolExecutor(min(len(requests), MAX_AT_ONCE)) as pool:
        answers = pool.map(lambda host: _ask(host, requests[host], seconds, options), requests)
        return {answer.host: answer for answer in answers}


def ssh_options(port: int | None) -> list[str]:
    """What every ssh to a host is given, pdsh's and ours: the port, and what the user has pdsh add."""
    chosen = [] if port is None else ["-p", str(port)]  # first: of two ports ssh takes that one
    return [*chosen, *os.environ.get(PDSH_OPTIONS, "").split()]  # pdsh knows no quotes


def remote_command() -> str:
    """The probe's command line for a host's shell: from this folder, with this interpreter and this package."""
    variable = f'PYTHONPATH={shlex.quote(str(PACKAGE_PARENT))}"${{PYTHONPATH:+:$PYTHONPATH}}"'
    probe = f"exec env {variable} {shlex.quote(sys.executable)} -m codeparrot_ds.launch.probe"
    return f"cd {shlex.quote(os.getcwd())} && {probe}"


def _ask(host: str, request: dict[str, Any], seconds: float, chosen: list[str]) -> Answer:
    if host == "localhost":
        command = [sys.executable, "-m", "codeparrot_ds.launch.probe"]
    else:
        # What the user chose comes before our limit of time, so that it counts.
        options = ("-o", "BatchMode=yes", *chosen, "-o", f"ConnectTimeout={CONNECT_SECONDS}", "-T", "-x")
        command = ["ssh", *options, host, remote_command()]
    asked = time.time()
    environment = dict(os.environ)
    if host == "localhost":
        environment["PYTHONPATH"] = python_path(environment)
    try:
        said = subprocess.run(
            command,
            input=json.dumps(request),
            capture_output=True,
            text=True,
            errors="replace",
            env=environment,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Answer(host=host, reply={}, problem=f"does not answer within {seconds:.0f} s", asked=asked)
    answered = time.time()
    lines = [line for line in said.stdout.splitlines() if line.startswith(MARK)]
    if said.returncode == 0 and lines:
        reply = json.loads(lines[-1].removeprefix(MARK))
        return Answer(host=host, reply=reply, asked=asked, answered=answered)
    return Answer(host=host, reply={}, problem=explain(said.returncode, said.stderr), asked=asked, answered=answered)


def explain(code: int, errors: str) -> str:
    """Why a host did not answer, with the remedy, from the exit code and the last words of ssh or of the probe."""
    lines: Sequence[str] = [line.strip() for line in errors.splitlines() if line.strip()]
    last = lines[-1] if lines else f"exit code {code}"
    if code == 255:
        if "Permission denied" in errors:
            return f"ssh refuses this user's key ({last}): put your public key there with ssh-copy-id"
        if "Host key verification failed" in errors or "IDENTIFICATION HAS CHANGED" in errors:
            return "its host key is unknown or has changed: check it, then ssh-keygen -R HOST and ssh HOST once"
        if "Could not resolve" in errors or "Name or service not known" in errors:
            return "has no address: correct its name in the hostfile, or give it one in ~/.ssh/config or /etc/hosts"
        if re.search(r"^usage: ssh", errors, re.MULTILINE):
            return f"ssh does not take the options that {PDSH_OPTIONS} adds: {os.environ.get(PDSH_OPTIONS, '')}"
        if re.search(r"Connection (refused|closed|reset)", errors):  # by nobody, or by another service
            return (
                f"not reachable by ssh ({last}): is it up, and does sshd run there on this port? give another by "
                f"--ssh-port N, {PDSH_OPTIONS}='-p N' or `Port N` under its Host in ~/.ssh/config"
            )
        return f"not reachable by ssh ({last}): is it up, and does sshd run there?"
    if re.search(r"\bcd\b", last):
        return f"has no folder {os.getcwd()}: start from a folder that every host has"
    if code in (126, 127) or re.search(r"(No such file|not found)", last) and sys.executable in last:
        return f"has no Python at {sys.executable}: install the environment at the same place on every host"
    if "No module named" in errors:
        missing = re.findall(r"No module named '([^']+)'", errors)
        return f"its Python lacks {missing[-1] if missing else 'a module'}: install codeparrot-ds there, as here"
    if "No space left" in errors:
        return "its disk is full: free some space there"
    return f"the check failed there: {last[-300:]}"
