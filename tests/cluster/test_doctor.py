"""Faults planted on the cluster's hosts: ``doctor`` names each with its host, and nothing else."""

import importlib.metadata
import json
import shutil
import sys
from pathlib import Path

import pytest

import codeparrot_ds
from codeparrot_ds.engine.operators import operators_folder
from tests.cluster.conftest import OTHER_PORT
from tests.cluster.trainings import options

THREE = "alpha slots=1\nbeta slots=1\ngamma slots=1\n"


@pytest.fixture
def doctor(cluster, course, tmp_path):
    """Runs ``doctor``; returns its exit code, its findings as (host, check) → detail, and all that it said in JSON."""
    (tmp_path / "runs").mkdir()

    def run(hostfile: str = THREE, *extra: str, **how):
        where = ["--data", str(course / "corpus"), "--tokenizer", str(course / "tokenizer")]
        where += ["--output-dir", str(tmp_path / "runs"), "--hostfile", cluster.hostfile(hostfile), "--json"]
        said = cluster.codeparrot("doctor", *where, *extra, **how)
        assert said.returncode in (0, 1), said.stderr
        answer = json.loads(said.stdout)
        return said.returncode, {(one["host"], one["check"]): one["detail"] for one in answer["findings"]}, answer

    yield run
    cluster.unmount_all()


def test_three_healthy_hosts(doctor, cluster):
    code, findings, answer = doctor()
    assert (code, findings) == (0, {})
    assert answer["master_addr"] == cluster.address("alpha")
    for name, next_one in (("alpha", "beta"), ("beta", "gamma"), ("gamma", "alpha")):
        host = answer["hosts"][name]
        assert host["reachable"] and host["hostname"] == name and host["slots"] == [0]
        assert host["interface"] == "eth0" and host["address"] == cluster.address(name)
        assert host["link"]["to"] == next_one and host["link"]["bits_per_second"] > 1e8


def test_faults_of_hosts_that_answer(doctor, cluster, course, tmp_path):
    """All at once, on three hosts."""
    # alpha: the port is taken, more slots than cores, the link out of it is slow
    taken = cluster.popen([sys.executable, "-c", LISTEN], on="alpha")
    assert taken.stdout.readline() == "listening\n"
    cluster.slow("alpha", "20mbit")
    # beta: another torch, another codeparrot-ds, no data, a clock that is off, an interface of another name
    python = cluster.folder / "beta-python"
    (python / "torch-2.0.1.dist-info").mkdir()
    (python / "torch-2.0.1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.0.1\n")
    (python / "sitecustomize.py").write_text("import time\nreal = time.time\ntime.time = lambda: real() + 90\n")
    errors = Path(codeparrot_ds.__file__).parent / "errors.py"
    (tmp_path / "errors.py").write_text(errors.read_text() + "\n# another version\n")
    cluster.mount("beta", str(tmp_path / "errors.py"), errors, "--bind")
    cluster.mount("beta", "none", course / "corpus", "-t", "tmpfs")
    cluster.rename_interface("beta", "eth0", "ib0")
    # gamma: a small disk of its own, an operator whose build was killed
    cluster.mount("gamma", "none", tmp_path / "runs", "-t", "tmpfs", "-o", "size=1m")
    operators = operators_folder()
    shutil.copytree(operators, tmp_path / "operators")  # with the times, which say that they were built
    (tmp_path / "operators" / "fused_adam" / "lock").touch()
    cluster.mount("gamma", str(tmp_path / "operators"), operators, "--bind")
    try:
        code, findings, _ = doctor(
            "alpha slots=99\nbeta slots=1\ngamma slots=1\n",
            *("--master-port", "29876"),
            env={"GLOO_SOCKET_IFNAME": "eth0"},
        )
    finally:
        cluster.rename_interface("beta", "ib0", "eth0")
        cluster.unslow("alpha")
        shutil.rmtree(python / "torch-2.0.1.dist-info")
        (python / "sitecustomize.py").unlink()
        taken.kill()
        taken.communicate()
    here = importlib.metadata.version("torch")
    wanted = {
        ("alpha", "port"): "port 29876 is taken there: choose another --master-port",
        ("alpha", "slots"): "99 ranks on ",
        ("alpha", "slow link"): " Mbit/s to gamma, and ",
        ("beta", "versions"): f"torch 2.0.1 (here {here}): install the same versions",
        ("beta", "operators"): "fused_adam not built there yet",  # for that torch
        ("beta", "code"): "its codeparrot-ds is not the one here",
        ("beta", "data"): "corpus holds other files than here",
        ("beta", "clock"): "it is 90 s off",
        ("beta", "interface"): "'eth0', of GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME, does not exist there",
        ("gamma", "disk"): "0.00 GB free",
        ("gamma", "run folder"): "put --output-dir on a file system that all hosts share",
        ("gamma", "build lock"): "fused_adam/lock was left by a killed build",
    }
    assert code == 1
    assert findings.keys() == wanted.keys(), findings
    assert {key: words for key, words in wanted.items() if words not in findings[key]} == {}, findings


def test_hosts_that_do_not_answer(doctor, cluster, course, tmp_path):
    (tmp_path / "authorized_keys").touch()
    cluster.mount("beta", str(tmp_path / "authorized_keys"), cluster.folder / "authorized_keys", "--bind")
    cluster.cut("gamma")
    try:
        code, findings, answer = doctor()
        # A run is not started, and says why.
        where = ("--hostfile", cluster.hostfile(THREE), "--output-dir", str(tmp_path / "runs"))
        refused = cluster.codeparrot("train", *options(course, *where))
    finally:
        cluster.mend("gamma")
    assert code == 1 and findings.keys() == {("beta", "ssh"), ("gamma", "ssh")}
    assert "ssh refuses this user's key" in findings["beta", "ssh"] and "ssh-copy-id" in findings["beta", "ssh"]
    assert "not reachable by ssh" in findings["gamma", "ssh"]
    assert [answer["hosts"][name]["reachable"] for name in cluster.names] == [True, False, False]
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    last = refused.stderr.splitlines()[-1]
    assert "beta: ssh: ssh refuses this user's key" in last and "gamma: ssh: not reachable by ssh" in last
    # Two hosts would do, but three lanes cannot be shared by two ranks.
    few = cluster.codeparrot("train", *options(course, *where, "--num-lanes", "3", "--min-hosts", "2"))
    assert few.returncode == 2 and "warning: continuing without beta: ssh: ssh refuses this user's key" in few.stderr
    assert "the run cannot continue with alpha, gamma alone: num_lanes=3 cannot be shared by 2 ranks" in few.stderr


def test_ssh_on_another_port(on_another_port, tmp_path):
    """It is found where --ssh-port or the user's ssh config says so; else the sentence names what can say it."""
    cluster = on_another_port
    where = ("doctor", "--output-dir", str(tmp_path), "--hostfile")
    three = cluster.codeparrot(*where, cluster.hostfile(THREE), "--ssh-port", str(OTHER_PORT))
    assert three.returncode == 0 and "nothing is wrong" in three.stdout, three.stdout + three.stderr
    refused = cluster.codeparrot(*where, cluster.hostfile("alpha slots=1\n"))
    assert refused.returncode == 1 and "alpha: ssh: not reachable by ssh" in refused.stdout
    for remedy in ("Connection refused", "--ssh-port N", "PDSH_SSH_ARGS_APPEND='-p N'", "`Port N`"):
        assert remedy in refused.stdout, refused.stdout
    config = cluster.folder / "ssh_config"
    before = config.read_text()
    config.write_text(f"Host alpha\n    Port {OTHER_PORT}\n{before}")
    try:
        entry = cluster.codeparrot(*where, cluster.hostfile("alpha slots=1\n"))
    finally:
        config.write_text(before)
    assert entry.returncode == 0, entry.stdout + entry.stderr


LISTEN = """
import socket, time
listener = socket.socket()
listener.bind(("", 29876))
listener.listen()
print("listening", flush=True)
time.sleep(600)
"""
