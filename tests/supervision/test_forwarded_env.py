"""The environment that travels to other hosts: what goes, how it is kept private, and what a rank makes of it."""

import json
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from codeparrot_ds.errors import UserError
from codeparrot_ds.launch import probe
from codeparrot_ds.launch.interface import choose_interface
from codeparrot_ds.launch.ssh import explain
from codeparrot_ds.supervision.forwarded_env import (
    FILE,
    carried,
    in_memory,
    read_private,
    take_carried,
    write_private,
)

REPOSITORY = Path(__file__).resolve().parents[2]


def test_what_a_run_needs_is_carried():
    wanted = {
        name: "x"
        for name in (
            "HF_TOKEN",
            "WANDB_API_KEY",
            "OMP_NUM_THREADS",
            "ONEDNN_MAX_CPU_ISA",
            "NCCL_DEBUG",
            "GLOO_SOCKET_IFNAME",
        )
    }
    wanted |= {name: "x" for name in ("TOKENIZERS_PARALLELISM", "CUDA_LAUNCH_BLOCKING", "https_proxy")}
    left = {
        name: "x" for name in ("CUDA_VISIBLE_DEVICES", "RANK", "SSH_AUTH_SOCK", "HOME", "TORCH_EXTENSIONS_DIR", FILE)
    }
    assert carried(wanted | left) == wanted


def test_the_file_is_this_users_alone(tmp_path):
    path = tmp_path / "environment.1"
    path.write_text("left by somebody")
    path.chmod(0o666)
    write_private(path, {"variables": {"HF_TOKEN": "secret"}, "run": {"device": "cpu"}})
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    environment = {FILE: str(tmp_path / "environment"), "CROSS_RANK": "1"}
    assert take_carried(environment) == {"device": "cpu"} and environment["HF_TOKEN"] == "secret"
    path.chmod(0o640)
    with pytest.raises(UserError, match="is not this user's alone"):
        take_carried(environment)
    path.unlink()
    with pytest.raises(UserError, match="cannot be read: .*No such file"):
        take_carried(environment)
    assert take_carried({}) is None


@pytest.mark.parametrize("listens", [True, False])
def test_a_host_writes_the_file_and_puts_in_the_address_that_it_knows_the_front_door_by(tmp_path, listens):
    path = tmp_path / "environment.0"
    front_door = socket.create_server(("127.0.0.1", 0))
    port = front_door.getsockname()[1]
    if not listens:
        front_door.close()
    variables = {"HF_TOKEN": "secret", "CODEPARROT_DS_CONTROL": f"login:{port}", "LIB": ["/x:", "LIB", ""]}
    content = {"variables": variables, "run": {}}
    request = {"environment": {"path": str(path), "content": content, "control_port": port}}
    said = subprocess.run(
        [sys.executable, "-m", "codeparrot_ds.launch.probe"],
        input=json.dumps(request),
        env=os.environ
        | {"PYTHONPATH": str(REPOSITORY), "SSH_CONNECTION": "127.0.0.1 50000 10.0.0.1 22", "LIB": "/its"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "secret" not in said.stdout + said.stderr
    written = json.loads(path.read_text())["variables"]
    assert written["CODEPARROT_DS_CONTROL"] == f"127.0.0.1:{port}" and written["LIB"] == "/x:/its"
    problem = json.loads(said.stdout.splitlines()[-1].removeprefix(probe.MARK))["front_door_problem"]
    assert problem == (None if listens else f"127.0.0.1:{port}: Connection refused")
    front_door.close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    probe.answer({"forget": str(path)})
    assert not path.exists()


def test_ranks_of_several_hosts_use_the_interface_toward_the_first():
    environment = {"CROSS_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    choose_interface(environment)
    assert environment["GLOO_SOCKET_IFNAME"] == environment["NCCL_SOCKET_IFNAME"] == "lo"
    chosen = {"CROSS_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "ib0"}
    choose_interface(chosen)
    assert chosen["GLOO_SOCKET_IFNAME"] == "ib0"
    alone = {"CROSS_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    choose_interface(alone)
    assert "GLOO_SOCKET_IFNAME" not in alone


@pytest.mark.parametrize(
    ("code", "errors", "words"),
    [
        (255, "root@a: Permission denied (publickey).", "ssh refuses this user's key"),
        (255, "Host key verification failed.", "its host key is unknown or has changed"),
        (255, "ssh: Could not resolve hostname a: Name or service not known", "has no address"),
        (255, "ssh: connect to host a port 22: No route to host", "not reachable by ssh (ssh: connect to host a"),
        (
            255,
            "ssh: connect to host a port 22: Connection refused",
            "--ssh-port N, PDSH_SSH_ARGS_APPEND='-p N' or `Port N`",
        ),
        (255, "kex_exchange_identification: Connection closed by remote host", "give another by --ssh-port N"),
        (
            255,
            "unknown option -- Z\nusage: ssh [-46AaCfGgKkMNnqsTtVvXxYy]\n [-p port]",
            "that PDSH_SSH_ARGS_APPEND adds",
        ),
        (1, "bash: line 1: cd: /work: No such file or directory", "start from a folder that every host has"),
        (127, f"env: '{sys.executable}': No such file or directory", f"has no Python at {sys.executable}"),
        (1, "ModuleNotFoundError: No module named 'psutil'", "its Python lacks psutil"),
        (1, "OSError: [Errno 28] No space left on device", "its disk is full"),
        (1, "Traceback …\nValueError: odd", "the check failed there: ValueError: odd"),
    ],
)
def test_why_a_host_did_not_answer(code, errors, words):
    assert words in explain(code, errors) and "\n" not in explain(code, errors)


def test_what_ranks_here_are_given_is_on_no_disk_and_ends_with_its_process(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    read = (
        "import json, pathlib, sys; from codeparrot_ds.supervision.forwarded_env import read_private; "
        "print(json.dumps(read_private(pathlib.Path(sys.argv[1]))))"
    )
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    with in_memory({"device": "cpu"}) as file:
        for _ in range(2):  # every rank reads it from its beginning
            answer = subprocess.run(
                [sys.executable, "-c", read, str(file)], env=environment, capture_output=True, text=True
            )
            assert answer.stdout == '{"device": "cpu"}\n', answer.stderr
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="cannot be read"):
        read_private(file)
