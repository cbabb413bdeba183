"""The front door: mistakes found before any rank starts, and what the launcher is given."""

import base64
import collections
import dataclasses
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from codeparrot_ds import devices, durable, resolved_run
from codeparrot_ds.checkpoint.folders import STATE, publish
from codeparrot_ds.checkpoint.run_folder import continued_from
from codeparrot_ds.cli.main import build_parser, main
from codeparrot_ds.config.arguments import ArgumentParser, add_config_arguments, config_from_arguments
from codeparrot_ds.config.files import save_config
from codeparrot_ds.config.launch_options import LaunchOptions
from codeparrot_ds.devices import local_device, local_devices, local_ranks
from codeparrot_ds.ds_config import file, lint
from codeparrot_ds.errors import UserError
from codeparrot_ds.hub.commands import prepare_branch
from codeparrot_ds.hub.queue import PushQueue
from codeparrot_ds.launch import deepspeed_command as launcher
from codeparrot_ds.launch import job
from codeparrot_ds.launch import start as launch
from codeparrot_ds.launch.hostfile import Host
from codeparrot_ds.launch.preflight import check_run
from codeparrot_ds.launch.ssh import PDSH_OPTIONS, ssh_options
from codeparrot_ds.launch.start import front_door, rank_environment
from codeparrot_ds.resolved_run import ResolvedRun
from codeparrot_ds.shell import COMMAND
from codeparrot_ds.supervision.forwarded_env import FILE
from codeparrot_ds.supervision.process_end import LEADS
from codeparrot_ds.supervision.supervise import End, run_to_the_end
from codeparrot_ds.telemetry.startup import LAUNCHED_AT
from codeparrot_ds.train import given_run

REPOSITORY = Path(__file__).resolve().parents[2]


def test_a_run_that_is_fine_gets_its_json(make_config):
    ds_config = check_run(make_config(), device="cpu", world_size=2).ds_config
    assert ds_config["train_batch_size"] == 8 and ds_config["gradient_accumulation_steps"] == 2
    assert ds_config["zero_optimization"]["stage"] == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"run_name": "a b"}, "run_name 'a b' cannot be a branch"),
        ({"data": ""}, "--data is missing: make one with `codeparrot-ds corpus`"),
        ({"tokenizer": ""}, "--tokenizer is missing: make one with `codeparrot-ds tokenizer`"),
        ({"data": "/nowhere/corpus"}, "/nowhere/corpus"),
        ({"tokenizer": "/nowhere/tokenizer"}, "/nowhere/tokenizer"),
        ({"deepspeed": "zerro2"}, "did you mean 'zero2'"),
        ({"model": "gpt2-lrge"}, "did you mean 'gpt2-large'"),
        ({"seq_length": 2048}, "seq_length 2048 is longer than the 1024 positions of model demo"),
        ({"global_batch_size": 6}, "6 is not divisible by micro_batch_size x world_size = 2 x 2 = 4"),
        ({"num_lanes": 41}, "num_lanes=20 works"),
        ({"num_lanes": 5}, "num_lanes=5 cannot be shared by 2 ranks"),
        ({"deepspeed": "zero2_fp16"}, "fp16 needs a GPU"),
        ({"hub": __file__}, __file__),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_mistake_is_found_before_a_rank_starts(make_config, monkeypatch, changes, words):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")  # a few CPUs have fp16
    config = make_config(**changes)
    with pytest.raises(UserError) as caught:
        check_run(config, device="cpu", world_size=2)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert not Path(config.output_dir).exists()  # nothing is left behind


def test_a_corpus_without_a_validation_split(make_config, corpus_dir, tmp_path):
    shutil.copytree(corpus_dir / "train", tmp_path / "corpus" / "train")
    with pytest.raises(UserError, match="validation"):
        check_run(make_config(data=str(tmp_path / "corpus")), device="cpu", world_size=2)


def test_a_folder_of_another_config(make_config, tmp_path):
    run = tmp_path / "runs" / "brave-otter-7"
    run.mkdir(parents=True)
    (run / "run.json").write_text("{}")
    save_config(make_config(seq_length=64), run / "config.yaml")
    with pytest.raises(UserError, match="belongs to another config .seq_length is 64 there and 32 here"):
        check_run(make_config(), device="cpu", world_size=2)


def test_an_output_folder_that_cannot_be_made(make_config, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be made: .*file is a file"):
        check_run(make_config(output_dir=str(tmp_path / "file" / "runs")), device="cpu", world_size=2)


CHECK_AS_NOBODY = """
import os, sys
from pathlib import Path
from codeparrot_ds.errors import UserError
from codeparrot_ds.launch.preflight import _check_space
if os.geteuid() == 0:  # who may write everywhere
    os.setuid(65534)
try:
    _check_space(Path(sys.argv[1]), 1, 1)
except UserError as error:
    print(error)
"""


def test_an_output_folder_without_permission():
    with tempfile.TemporaryDirectory() as folder:  # not tmp_path, which is its owner's alone
        os.chmod(folder, 0o555)
        command = [sys.executable, "-c", CHECK_AS_NOBODY, f"{folder}/runs"]
        answer = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert answer.stdout == f"output_dir {folder}/runs cannot be written: no permission in {folder}\n"


def test_a_full_disk(make_config, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 10**12 - 10**8, 10**8))
    with pytest.raises(UserError, match=r"has 0\.1 GB free and a checkpoint .* takes 0\.\d GB: free some space"):
        check_run(make_config(), device="cpu", world_size=2)


def test_a_hostfile_that_does_not_exist(make_config):
    with pytest.raises(UserError, match="hostfile /nowhere/hosts does not exist"):
        front_door(make_config(), LaunchOptions(hostfile="/nowhere/hosts"))


def test_a_mistake_in_deepspeeds_file_of_variables_is_found_before_anything_is_made(make_config, tmp_path, monkeypatch):
    monkeypatch.delenv("DS_ENV_FILE", raising=False)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "pdsh").touch(mode=0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / "hosts").write_text("alpha slots=1\nbeta slots=1\n")
    (tmp_path / ".deepspeed_env").write_text("A='x\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"\.deepspeed_env, line 1: the value of A has a quote that is not closed"):
        front_door(make_config(), LaunchOptions(hostfile="hosts"))
    assert not (tmp_path / "runs").exists()


MODULE = ["--module", "codeparrot_ds.train", "demo", "--data", "d"]


def node(hosts, **options) -> list[str]:
    command = launcher.node_command(hosts, LaunchOptions(**options), MODULE[2:], addr="127.0.0.1", port=29511)
    assert command[:3] == [sys.executable, "-m", "deepspeed.launcher.launch"]
    command.remove("--quiet")
    return command[3:]


def test_launcher_command_on_this_machine():
    world, *rest = node([Host(name="localhost", slots=(0, 1, 2))])
    assert json.loads(base64.urlsafe_b64decode(world.removeprefix("--world_info="))) == {"localhost": [0, 1, 2]}
    assert rest == ["--master_addr=127.0.0.1", "--master_port=29511", *MODULE]


def test_launcher_command_on_a_host_that_is_started_by_itself():
    hosts = [Host(name="a", slots=(0,)), Host(name="b", slots=(0, 1))]
    command = launcher.node_command(hosts, LaunchOptions(bind_cores=True), [], addr="a", port=1234, node_rank=1)
    assert "--node_rank=1" in command and "--master_addr=a" in command and "--bind_cores_to_rank" in command


def test_deepspeeds_launcher_knows_the_options(tmp_path):
    """The real parser of DeepSpeed takes what is written for it, and the ranks' arguments are not among it."""
    from deepspeed.launcher.runner import parse_args

    hosts = [Host(name="a", slots=(1,)), Host(name="b", slots=(0, 1))]
    command = launcher.runner_command(hosts, LaunchOptions(launcher="pdsh"), tmp_path, addr="10.0.0.1", port=29511)
    assert command[:3] == [sys.executable, "-m", "deepspeed.launcher.runner"]
    known = parse_args(command[3:])
    assert (known.include, known.master_addr, known.master_port) == ("a:1@b:0,1", "10.0.0.1", 29511)
    assert known.module and known.user_script == "codeparrot_ds.train" and known.user_args == []
    assert known.force_multi and known.no_ssh_check and known.launcher == "pdsh"
    assert Path(known.hostfile).read_text() == "a slots=2\nb slots=2\n"
    slurm = launcher.runner_command(hosts, LaunchOptions(launcher="slurm"), tmp_path, addr="a", port=1)
    assert Path(slurm[-1]).name == "train.py" and Path(slurm[-1]).is_file() and "--include" not in slurm


def test_secrets_are_not_among_what_deepspeed_exports(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "secret-1")
    monkeypatch.setenv("PYTHONANYWHERE_API_TOKEN", "secret-2")
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    monkeypatch.setenv("HF_TOKEN", "secret-2")
    environment = launcher.runner_environment(tmp_path, {"DS_ACCELERATOR": "cpu"})
    assert "MLFLOW_TRACKING_PASSWORD" not in environment and "PYTHONANYWHERE_API_TOKEN" not in environment
    assert environment["PYTHONHASHSEED"] == "0"
    assert Path(environment["DS_ENV_FILE"]).read_text() == "DS_ACCELERATOR=cpu\n"


def test_pdsh_and_our_own_ssh_are_given_the_same_options(tmp_path, monkeypatch):
    monkeypatch.setenv(PDSH_OPTIONS, " -p 2200  -l me")
    for port, words in ((None, ["-p", "2200", "-l", "me"]), (2222, ["-p", "2222", "-p", "2200", "-l", "me"])):
        assert ssh_options(port) == words  # of two ports ssh takes the first
        assert launcher.runner_environment(tmp_path, {}, ssh_port=port)[PDSH_OPTIONS].split() == words


def local_hosts(monkeypatch=None, devices=(0, 1), **options) -> list:
    return [(host.name, host.slots) for host in launcher.hosts_of(LaunchOptions(**options), list(devices))]


def test_hosts_without_a_hostfile():
    assert local_hosts() == [("localhost", (0, 1))]
    assert local_hosts(num_gpus=1) == [("localhost", (0,))]
    assert local_hosts(num_gpus=4) == [("localhost", (0, 1, 2, 3))]  # ranks of a CPU
    assert local_hosts(include="localhost:1") == [("localhost", (1,))]
    assert local_hosts(devices=["GPU-a", "GPU-b"], exclude="localhost:GPU-a") == [("localhost", ("GPU-b",))]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"include": "alpha"}, "there is no host 'alpha'; choose one of localhost"),
        ({"min_hosts": 1}, "--min-hosts needs --hostfile"),
        ({"no_ssh": True}, "--no-ssh needs --hostfile"),
        ({"node_rank": 0}, "--node-rank needs --hostfile"),
        ({"ssh_port": 2222}, "--ssh-port needs --hostfile"),
        ({"include": "1,2"}, "'1,2' names slots without their host: write localhost:1,2"),
        ({"include": "localhost:2"}, "localhost has no slot '2'; its slots: 0, 1: write localhost:0"),
        ({"hostfile": "{two}", "ssh_port": 2, "no_ssh": True}, "--ssh-port does not go with --no-ssh, which makes no"),
        ({"hostfile": "{two}", "ssh_port": 2, "launcher": "openmpi"}, "--ssh-port does not go with --launcher openmpi"),
        ({"hostfile": "{two}", "min_hosts": 3}, "--min-hosts 3: the run has 2 host(s)"),
        ({"hostfile": "{two}", "no_ssh": True}, "--no-ssh needs --node-rank, --master-addr and --master-port"),
        ({"hostfile": "{two}", "node_rank": 1}, "--node-rank goes with --no-ssh"),
        ({"hostfile": "{mixed}"}, "localhost beside other hosts"),
        ({"hostfile": "{two}", "launcher": "mvapich"}, "there is no mpiname on PATH"),
        ({"hostfile": "{two}", "no_ssh": True, "node_rank": 2, "master_addr": "a", "master_port": 1}, "from 0"),
    ],
)
def test_launch_options_that_do_not_fit(tmp_path, options, words):
    (tmp_path / "two").write_text("alpha slots=1\nbeta slots=1\n")
    (tmp_path / "mixed").write_text("alpha slots=1\nlocalhost slots=1\n")
    if "hostfile" in options:
        options = options | {"hostfile": options["hostfile"].format(two=tmp_path / "two", mixed=tmp_path / "mixed")}
    with pytest.raises(UserError) as caught:
        local_hosts(**options)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_hostfile_of_this_machine_alone_needs_no_ssh(tmp_path):
    (tmp_path / "hosts").write_text("localhost slots=4\n")
    assert local_hosts(hostfile=str(tmp_path / "hosts"), num_gpus=3) == [("localhost", (0, 1, 2))]


def test_environment_of_a_rank(monkeypatch):
    for name in ("OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM", "DS_ACCELERATOR", "PYTHONPATH", "TORCH_EXTENSIONS_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("MY_OWN", "kept")
    environment = rank_environment("cpu", 2)
    assert environment["PYTHONPATH"] == str(REPOSITORY) and environment["MY_OWN"] == "kept"
    assert environment["DS_ACCELERATOR"] == "cpu" and "CUDA_VISIBLE_DEVICES" not in environment
    assert environment["OMP_NUM_THREADS"] == str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert environment["TOKENIZERS_PARALLELISM"] == "false" and environment["TORCH_EXTENSIONS_DIR"]
    assert environment["PATH"].split(":")[0] == str(Path(sys.executable).parent)
    assert "OMP_NUM_THREADS" not in os.environ  # ours is as it was


def test_environment_keeps_what_the_user_set(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,2")
    monkeypatch.setenv("PYTHONPATH", "/mine")
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    environment = rank_environment("cuda", 64)
    assert environment["OMP_NUM_THREADS"] == "7" and environment["CUDA_VISIBLE_DEVICES"] == "1,2"
    assert environment["PYTHONPATH"].endswith(":/mine") and "DS_ACCELERATOR" not in environment


@pytest.mark.parametrize(
    ("visible", "count"),
    [("", 0), ("0", 1), ("0,1,3", 3), ("-1", 0), ("GPU-5f9,GPU-77a", 2), ("0,", 1), (" 0 , 1 ", 2)],
)
def test_gpus_that_the_environment_shows(monkeypatch, visible, count):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert devices._count_gpus() == count


@pytest.mark.parametrize(
    ("script", "count"),
    [
        ('echo "GPU 0: NVIDIA H200 (UUID: GPU-a)"; echo "GPU 1: NVIDIA H200 (UUID: GPU-b)"', 2),
        ('echo "NVIDIA-SMI has failed"; exit 9', 0),
        (None, 0),
    ],
)
def test_gpus_that_the_driver_lists(monkeypatch, tmp_path, script, count):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    if script:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    assert devices._count_gpus() == count


def test_device_and_ranks(monkeypatch):
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "2.13.0+cpu")
    assert local_device() == "cpu"  # a torch that cannot use them
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "2.13.0")
    assert local_device() == "cuda" and local_ranks("cuda") == 3
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-7")
    assert local_devices("cuda") == [3, "GPU-7"]  # and not the first two
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert local_device() == "cpu" and local_ranks("cpu") == 1
    monkeypatch.delenv("DS_ACCELERATOR")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert local_device() == "cpu"


def end(run: Path, status: str, code: str = "pass") -> list[str]:
    """A command in the launcher's place that records an end and then does ``code``."""
    record = json.dumps({"starts": [{}], "outcome": {"status": status, "step": 3}})
    lines = ["import os, signal, sys, pathlib, time", f"run = pathlib.Path({str(run)!r})", f"text = {record!r}"]
    lines += ["run.mkdir(exist_ok=True)", "(run / 'run.json').write_text(text)", code]
    return [sys.executable, "-c", "\n".join(lines)]


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        ("finished", "pass", 0),
        ("stopped", "pass", 0),
        ("running", "pass", 1),  # the launcher says success when its ranks died of a signal
        ("finished", "sys.exit(3)", 3),
        ("running", "os.kill(os.getpid(), signal.SIGKILL)", 128 + 9),
    ],
)
def test_the_exit_code_tells_what_became_of_the_run(tmp_path, status, code, expected):
    command = end(tmp_path / "run", status, code)
    assert run_to_the_end(command, dict(os.environ), tmp_path / "run").code == expected


def test_an_outcome_of_an_earlier_start_does_not_count(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text(json.dumps({"starts": [{}], "outcome": {"status": "finished", "step": 3}}))
    assert run_to_the_end([sys.executable, "-c", ""], dict(os.environ), run).code == 1
    shutil.rmtree(run)
    assert run_to_the_end([sys.executable, "-c", ""], dict(os.environ), run).code == 1


def test_a_clock_that_is_set_back_does_not_make_a_good_end_bad(tmp_path):
    command = end(tmp_path / "run", "finished", f"os.utime({str(tmp_path / 'run' / 'run.json')!r}, (0, 0))")
    assert run_to_the_end(command, dict(os.environ), tmp_path / "run").code == 0


def test_a_killed_front_door_leaves_no_launcher_behind(tmp_path):
    launcher = [sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(60)"]
    script = (
        "import os, pathlib, sys; from codeparrot_ds.supervision.supervise import run_to_the_end; "
        "run_to_the_end(sys.argv[2:], dict(os.environ), pathlib.Path(sys.argv[1]))"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    command = [sys.executable, "-c", script, str(tmp_path / "run"), *launcher]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as front_door:
        launched = psutil.Process(int(front_door.stdout.readline()))
        assert launched.is_running()
        front_door.kill()
    _, alive = psutil.wait_procs([launched], timeout=10)
    assert not alive or launched.status() == psutil.STATUS_ZOMBIE


def test_a_rank_has_no_torch_before_its_environment_and_its_guard(tmp_path):
    """Torch reads OMP_NUM_THREADS when it is loaded, and the guard is to stay small."""
    environment = {FILE: str(tmp_path / "nothing"), "RANK": "0", "LOCAL_RANK": "0", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-X", "importtime", "-m", "codeparrot_ds.train"]
    said = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert said.returncode == 2 and "what the launcher's command left for this rank cannot be read" in said.stderr
    assert "codeparrot_ds.supervision.forwarded_env" in said.stderr and not re.search(
        r"\| +(torch|numpy)$", said.stderr, re.MULTILINE
    )


def test_a_rank_whose_launcher_ended_before_it_could_ask_ends_at_once():
    """Its parent is another by then; it must not train on without anybody who waits for it."""
    rank = [sys.executable, "-m", "codeparrot_ds.train", "--max-train-steps", "none"]
    launcher = (
        "import os, signal, subprocess, sys; subprocess.Popen(sys.argv[1:]); os.kill(os.getpid(), signal.SIGKILL)"
    )
    command = [sys.executable, "-c", launcher, "sh", "-c", 'sleep 1; exec "$@"', "sh", *rank]
    environment = os.environ | {"RANK": "0", "LOCAL_RANK": "0", "PYTHONPATH": str(REPOSITORY)}

    def words(**extra: str) -> str:
        """What it says; that ends when launcher and rank have ended."""
        options = {"start_new_session": True, "capture_output": True, "text": True, "timeout": 60}
        return subprocess.run(command, env=environment | extra, **options).stderr

    assert words(**{LEADS: "1"}) == ""
    assert "--max-train-steps" in words()  # started by something else, it asks nobody, and finds the mistake


def test_a_second_signal_stops_without_saving(tmp_path, capfd):
    ask = "os.kill(os.getppid(), signal.SIGTERM); time.sleep(0.5); " * 2
    handler = signal.getsignal(signal.SIGTERM)
    command = end(tmp_path / "run", "running", ask + "time.sleep(60)")
    started = time.time()
    assert run_to_the_end(command, dict(os.environ), tmp_path / "run").code == 128 + 9
    assert time.time() - started < 30
    assert "checkpointing at the next step boundary" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == handler


def given_to_ranks(command) -> ResolvedRun:
    """The run in the file that a launcher's command names, as a rank reads it."""
    run = given_run(command[command.index("codeparrot_ds.train") + 1 :])
    assert isinstance(run, ResolvedRun)
    return run


def test_ranks_get_the_config_with_absolute_paths(corpus_dir, tokenizer_dir, monkeypatch, tmp_path, capsys):
    """Whatever their working directory, home and variables are; the front door itself speaks as the user did."""
    seen = {}

    def run_to_the_end(command, environment, run, **options):
        given = given_to_ranks(command)
        assert given.world_size == 2 and given.zero_stage == 1
        seen.update(config=given.config, run=run)
        return End(code=0)

    monkeypatch.setattr(job, "run_to_the_end", run_to_the_end)
    monkeypatch.setattr(launch, "are_built", lambda names: True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DATA", str(corpus_dir.parent))
    (tmp_path / "home").mkdir()
    shutil.copytree(tokenizer_dir, tmp_path / "tok")
    (tmp_path / "mine.json").write_text('{"zero_optimization": {"stage": 1}}')
    (tmp_path / "run.yaml").write_text(f"data: $DATA/{corpus_dir.name}\ntokenizer: tok\noutput_dir: ~/runs\n")
    arguments = ["train", "demo", "--config", "run.yaml", "--deepspeed", "mine.json", "--hub", "hub.git"]
    assert main([*arguments, "--run-name", "first", "--num-lanes", "4", "--num-gpus", "2", "--model", "gpt2"]) == 0
    monkeypatch.chdir("/")
    for name in ("HOME", "DATA"):
        monkeypatch.delenv(name)
    config = seen["config"]
    here = str(tmp_path)
    assert (config.data, config.tokenizer, config.hub) == (str(corpus_dir), f"{here}/tok", f"{here}/hub.git")
    assert (config.deepspeed, config.output_dir) == (f"{here}/mine.json", f"{here}/home/runs")
    assert (config.model, config.resume, config.run_name, config.num_lanes) == ("gpt2", "auto", "first", 4)
    assert seen["run"] == tmp_path / "home" / "runs" / "first" and not (tmp_path / "~").exists()


def test_a_name_is_made_before_anything_else(make_config, monkeypatch, tmp_path):
    """The front door gives every rank the same new name; nothing is started here."""
    seen = {}

    def run_to_the_end(command, environment, run, **options):
        seen.update(given=given_to_ranks(command), run=run, environment=environment)
        return End(code=0)

    monkeypatch.setattr(job, "run_to_the_end", run_to_the_end)
    monkeypatch.setattr(launch, "are_built", lambda names: True)
    config = dataclasses.replace(make_config(), run_name=None)
    assert front_door(config, LaunchOptions(num_gpus=2)) == 0
    name = seen["run"].name
    assert seen["given"].config.run_name == name and seen["run"].parent == tmp_path / "runs"
    assert len(name.split("-")) == 3 and float(seen["environment"][LAUNCHED_AT]) <= time.time()


@pytest.fixture
def front(make_config, monkeypatch):
    """The front door with a launcher that starts nothing and ends as it is told; with what it was given."""
    monkeypatch.delenv(COMMAND, raising=False)
    monkeypatch.setattr(launch, "are_built", lambda names: True)
    started = []

    def enter(config, *options, end=None, outcome=None, **more):
        def run_to_the_end(command, environment, run, **_):
            started.append(given_to_ranks(command))
            run.mkdir(parents=True, exist_ok=True)
            if outcome is not None:
                (run / "run.json").write_text(json.dumps({"starts": [{}], "outcome": outcome}))
            return end or End(code=0)

        monkeypatch.setattr(job, "run_to_the_end", run_to_the_end)
        return front_door(config, LaunchOptions(num_gpus=2), **({"typed": list(options)} | more))

    enter.started = started
    return enter


def test_a_start_without_a_host_resumes_as_was_asked(make_config):
    """`--min-hosts` at the first start: from what the user named or anew, and not from the newest checkpoint."""
    run = check_run(make_config(deepspeed="zero2_fp32", resume="never"), device="cpu", world_size=2)
    hosts = [Host(name=name, slots=(0,)) for name in ("alpha", "beta")]
    asked = job.Job(run=run, launch=LaunchOptions(), hosts=hosts, started=0.0, folder=Path("runs"), going_on=[])
    left = job._without(asked, {"beta"})
    assert [host.name for host in left.hosts] == ["alpha"] and left.run.world_size == 1
    assert left.run.config == run.config


def test_the_deepspeed_json_is_read_checked_and_resolved_once(make_config, front, monkeypatch):
    """And not again by the ranks, which are given the result."""
    calls = collections.Counter()

    def counting(module, name):
        work = getattr(module, name)

        def count(*args, **kwargs):
            calls[name] += 1
            return work(*args, **kwargs)

        monkeypatch.setattr(module, name, count)

    counting(file, "read_ds_config")
    counting(lint, "lint_file")
    counting(resolved_run, "resolve")
    assert front(make_config(deepspeed="zero3_fp32")) == 0
    assert front.started[0].zero_stage == 3 and front.started[0].file is None
    assert calls == {"read_ds_config": 1, "lint_file": 1, "resolve": 1}


def test_what_can_hardly_be_meant_is_said_and_the_run_goes_on(make_config, front, capsys):
    assert front(make_config(learning_rate=5.0, max_train_steps=100, deepspeed="zero2_fp32")) == 0
    said = capsys.readouterr()
    warnings = said.err.splitlines()
    assert [line.split()[1] for line in warnings] == ["max_train_steps", "learning_rate"]
    assert all(line.startswith("warning: ") for line in warnings)
    assert said.out == "starting 2 rank(s) on this machine; importing torch and DeepSpeed takes a while\n"
    assert len(front.started) == 1


@pytest.mark.parametrize("hub", ["off", "local"])
def test_a_run_that_finishes_ends_with_what_to_type_next(make_config, front, tmp_path, hub):
    said: list[str] = []
    config = make_config(deepspeed="zero2_fp32", hub=hub, output_dir=str(tmp_path / "my runs"))
    assert front(config, outcome={"status": "finished", "step": 3}, say=said.append) == 0
    _, _, commands = said[-1].partition("\nNext:\n")
    proposed = [shlex.split(line)[1:] for line in commands.splitlines()]
    run = str(tmp_path / "my runs" / "brave-otter-7")
    wanted = [["report", run], ["evaluate", run], ["complete", run, "import os"], ["hub", "publish", run]]
    assert proposed == wanted[: 3 if hub == "off" else 4]
    for words in proposed:
        build_parser().parse_args(words)


@pytest.mark.parametrize(
    ("end", "status"), [(End(code=0, asked=True), "stopped"), (End(code=1), "running"), (End(code=3), "diverged")]
)
def test_one_that_does_not_finish_proposes_nothing_to_look_at(make_config, front, end, status):
    said: list[str] = []
    config = make_config(deepspeed="zero2_fp32")
    assert front(config, end=end, outcome={"status": status, "step": 3}, say=said.append) == end.code
    assert "Next:" not in "".join(said)


def save_run(config, step: int, **record) -> Path:
    """A run with a checkpoint of a step, as far as the front door looks at it; returns the checkpoint."""
    run = Path(config.output_dir) / config.run_name
    staging = run / "checkpoints" / ".staging"
    staging.mkdir(parents=True)
    save_config(config, run / "config.yaml")
    state = {"step": step, "scheduler_step": step, "extra": {"config": dataclasses.asdict(config)}}
    files = {STATE: durable.write_file(staging / STATE, [durable.json_bytes(state)])}
    outcome = {"status": "finished", "step": step, "run": str(run)}
    record = {"name": run.name, "id": f"{run.name}-1", "hub": None, "starts": [{}], "outcome": outcome} | record
    (run / "run.json").write_text(json.dumps(record))
    return publish(staging, step, files).path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def lines_after(said: str, words: str) -> list[str]:
    """The command of the line below one that ends with these words."""
    lines = said.splitlines()
    (place,) = [number for number, line in enumerate(lines) if line.endswith(words)]
    return shlex.split(lines[place + 1])


def test_a_run_that_has_finished_says_so_and_starts_no_rank(make_config, front, tmp_path, capsys):
    runs = str(tmp_path / "my runs")
    config = make_config(max_train_steps=20, num_warmup_steps=1, output_dir=runs, deepspeed="zero2_fp32")
    run = save_run(config, 20).parent.parent
    before = contents(run)
    typed = ["small", "--output-dir", config.output_dir, "--run_name=brave-otter-7", "--max-train-steps", "20"]
    assert front(config, *typed) == 0
    said = capsys.readouterr()
    assert said.out.startswith(f"run brave-otter-7 finished at step 20 of 20, so nothing is trained: {run}\n")
    assert said.err == "" and front.started == [] and contents(run) == before
    begun = lines_after(said.out, "a schedule of their own:")
    assert begun[:6] == ["codeparrot-ds", "train", "--config", str(run / "config.yaml"), "--init-from", str(run)]
    longer = lines_after(said.out, "from the start:")
    assert longer[1:5] == ["train", "small", "--output-dir", config.output_dir]
    assert longer[-4:-1] == ["--max-train-steps", "40", "--run-name"] and longer[-1] == begun[-1] != "brave-otter-7"
    parser = ArgumentParser()
    add_config_arguments(parser)
    new = config_from_arguments(parser.parse_args(begun[2:]))  # what is proposed can be typed, and is another run
    assert continued_from(new) is None and new.init_from == str(run) and new.run_name == begun[-1]


def test_a_run_with_a_constant_learning_rate_just_goes_on(make_config, front, capsys):
    config = make_config(max_train_steps=20, num_warmup_steps=1, lr_scheduler_type="constant")
    save_run(config, 20)
    assert front(config, "small") == 0
    command = lines_after(capsys.readouterr().out, "To continue:")
    assert command == ["codeparrot-ds", "train", "small", "--max-train-steps", "40"]


@pytest.mark.parametrize(
    ("changes", "outcome"),
    [
        ({"max_train_steps": 21}, {}),
        ({"hub": "local"}, {}),  # its last checkpoint is to be pushed now
        ({}, {"status": "stopped"}),
        ({}, {"status": "running", "step": None}),
        ({}, {"step": 30}),  # whose checkpoint is gone
    ],
)
def test_a_run_with_something_left_to_do_starts_its_ranks(make_config, front, changes, outcome, capsys):
    config = make_config(max_train_steps=20, num_warmup_steps=1)
    save_run(config, 20, outcome={"status": "finished", "step": 20} | outcome)
    assert front(dataclasses.replace(config, **changes)) == 0
    assert len(front.started) == 1 and "nothing is trained" not in capsys.readouterr().out


def test_a_damaged_last_checkpoint_is_trained_again(make_config, front, capsys):
    config = make_config(max_train_steps=20, num_warmup_steps=1)
    checkpoint = save_run(config, 20)
    shutil.copytree(checkpoint, checkpoint.with_name("step-00000010"))  # to go back to
    (checkpoint / STATE).write_text("{}")
    assert front(config) == 0 and len(front.started) == 1
    assert "its last checkpoint is damaged" in capsys.readouterr().err


def test_the_start_of_a_finished_run_pushes_what_still_waits(make_config, front, tmp_path, capsys):
    config = make_config(max_train_steps=20, num_warmup_steps=1, hub=str(tmp_path / "hub.git"))
    run = save_run(config, 20, hub=config.hub).parent.parent
    assert prepare_branch(config.hub, config.output_dir, run.name) is None
    export = tmp_path / "export"
    export.mkdir()
    (export / "config.json").write_text("{}")
    PushQueue(run).enqueue(20, export, "Step 20", "Tokens: 1")
    assert front(config) == 0
    assert f"branch {run.name} of {config.hub} has every checkpoint" in capsys.readouterr().out
    assert [push.step for push in PushQueue(run).pushed()] == [20] and front.started == []


def test_a_larger_max_train_steps_warns_of_the_jump(make_config, front, capsys):
    config = make_config(max_train_steps=20, num_warmup_steps=1, save_checkpoint_steps=10)
    save_run(config, 20)
    assert front(dataclasses.replace(config, max_train_steps=40)) == 0
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if "jumps" in line]
    assert "the learning rate jumps from 0 to 0.00026" in warning and "max_train_steps was 20 and is 40" in warning
    assert len(front.started) == 1


@pytest.mark.parametrize(
    ("end", "status", "has_checkpoint", "words"),
    [
        (End(code=0, asked=True), "stopped", True, "Stopped and saved. Continue with:"),
        (End(code=0), "stopped", True, "Stopped and saved. Continue with:"),  # by --max-hours
        (End(code=0, asked=True), "stopped", False, "Stopped before anything was saved. Continue with:"),
        (End(code=137, asked=True), "running", True, "step-00000010. Continue with:"),
        (End(code=0), "finished", True, None),
        (End(code=2), "running", True, None),
    ],
)
def test_a_run_that_was_stopped_says_how_to_go_on(make_config, front, capsys, end, status, has_checkpoint, words):
    config = dataclasses.replace(make_config(max_train_steps=20, num_warmup_steps=1), resume="never")
    if has_checkpoint:
        config = dataclasses.replace(config, resume=str(save_run(config, 10, outcome={"status": "running"})))
    typed = ["small", "--data", "my corpus", "--resume", config.resume, "--num-gpus", "2"]
    outcome = {"status": status, "step": 12}
    assert front(config, "small", typed=typed, end=end, outcome=outcome) == end.code
    said = capsys.readouterr().out
    if words is None:
        assert "Go on" not in said
        return
    expected = ["codeparrot-ds", "train", "small", "--data", "my corpus", "--num-gpus", "2", "--resume", "auto"]
    assert lines_after(said, words) == expected


def test_a_name_that_was_made_up_is_in_the_command_that_goes_on(make_config, front, capsys):
    config = dataclasses.replace(make_config(), run_name=None)
    assert front(config, "small", end=End(code=0, asked=True), outcome={"status": "stopped", "step": 0}) == 0
    command = lines_after(capsys.readouterr().out, "Continue with:")
    assert command[:-1] == ["codeparrot-ds", "train", "small", "--run-name"]
    assert command[-1] == front.started[0].config.run_name
