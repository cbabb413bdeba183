"""`train --dry-run`: all that a start would do, and nothing of it done; `--print-config`: a file to start from."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from codeparrot_ds import durable
from codeparrot_ds.checkpoint.folders import STATE, publish
from codeparrot_ds.cli.main import main
from codeparrot_ds.config.files import load_config, save_config
from codeparrot_ds.config.run_config import FIELDS, PRESETS, RunConfig
from codeparrot_ds.ds_config.facts import precision
from codeparrot_ds.ds_config.precision import device_precisions
from codeparrot_ds.launch.preflight import preflight

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def options(corpus_dir, tokenizer_dir, tmp_path, monkeypatch):
    """Of a small run, which begins in an empty folder."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    values = {"data": corpus_dir, "tokenizer": tokenizer_dir, "seq-length": 32, "global-batch-size": 8,
              "micro-batch-size": 2, "num-lanes": 4, "shuffle-buffer": 8, "max-train-steps": 100,
              "num-warmup-steps": 10, "save-checkpoint-steps": 50, "wandb": "off"}  # fmt: skip
    return ["demo", *(text for name, value in values.items() for text in (f"--{name}", str(value)))]


def facts(said: str) -> dict[str, str]:
    """What is said beside each label, of the first part."""
    found, label = {}, ""
    for line in said.partition("Dry run: ")[2].split("\n\n")[1].splitlines():
        label = line[:12].strip() or label
        found[label] = f"{found.get(label, '')} {line[12:]}".strip()
    return found


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}


def test_a_dry_run_says_all_that_would_happen(options, tmp_path, capsys):
    before = contents(tmp_path)
    assert main(["train", *options, "--num-gpus", "2", "--dry-run", "--run-name", "one"]) == 0
    said = capsys.readouterr().out
    assert contents(tmp_path) == before
    found = facts(said)
    assert found["run"] == "one in runs/one"
    assert found["begins"] == "with random weights"
    assert found["model"].startswith("demo: ") and f"ZeRO-2, {device_precisions('cpu')[0]}" in found["model"]
    assert found["steps"] == "100 of 100, 256 tokens each, 25,600 in all"
    assert "2 per rank and forward pass x 2 accumulated x 2 rank(s)" in found["batch"]
    assert found["ranks"] == "2 on cpu: 2 on localhost"
    assert found["operators"].startswith("fused_adam: ")
    assert "of tensors per rank at the peak of a step: parameters" in found["memory"]
    assert "1 shard, " in found["data"] and "to evaluate on: 1 shard, " in found["data"]
    assert found["branch"].startswith("one of runs/hub.git")
    assert max(map(len, said.partition("Run config:")[0].splitlines())) <= 80
    lines = [line.split() for line in said.splitlines()]
    assert ["max_train_steps", "100", "option"] in lines
    assert ["learning_rate", "0.002", "preset", "demo"] in lines
    assert "at their defaults: " in said and "keep_checkpoints 3" in said.replace("\n  ", " ")
    assert ["train_micro_batch_size_per_gpu", "2"] in [line[:2] for line in lines]
    assert "row 0 · lane 0" in said and "def train_" in said and "end of document" in said
    again = shlex.split(said.splitlines()[-1])
    assert again[1:] == ["train", *options, "--num-gpus", "2", "--run-name", "one"]


def test_what_is_decided_is_said_with_what_was_asked(options, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("micro_batch_size: auto\nseed: 3\n")
    micro = options.index("--micro-batch-size")
    asked = [*options[:micro], *options[micro + 2 :], "--config", str(tmp_path / "run.yaml")]
    assert main(["train", *asked, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "the name is made up" in " ".join(facts(said)["run"].split())
    rows = {line.split()[0]: line for line in said.splitlines() if line.startswith("  ") and line.strip()}
    assert f"decided here; {tmp_path}/run.yaml: auto" in rows["micro_batch_size"]
    assert rows["seed"].split()[1:] == ["3", f"{tmp_path}/run.yaml"]
    assert "decided here; default: auto,cpu=zero2:auto" in rows["deepspeed"]


@pytest.fixture
def gpus(tmp_path, monkeypatch):
    """Makes this machine have so many GPUs of so many MiB, and a torch for them."""

    def put(count: int, mebibytes: int) -> None:
        folder = tmp_path / "bin"
        folder.mkdir()
        cases = {"list-gpus": "GPU {0}: Some GPU", "memory.total": f"{{0}}, GPU-{{0}}, Some GPU, {mebibytes}"}
        cases["compute_cap"] = "{0}, GPU-{0}, Some GPU, 9.0"
        branches = [
            f"*{word}*) printf '{''.join(line.format(n) + chr(92) + 'n' for n in range(count))}';;"
            for word, line in cases.items()
        ]
        (folder / "nvidia-smi").write_text(f'#!/bin/sh\ncase "$*" in {" ".join(branches)} esac\n')
        (folder / "nvidia-smi").chmod(0o755)
        monkeypatch.setenv("PATH", str(folder), prepend=":")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        for name in ("DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES"):
            monkeypatch.delenv(name, raising=False)
        installed = importlib.metadata.version
        of_gpus = {"torch": "2.13.0"}
        monkeypatch.setattr(importlib.metadata, "version", lambda name: of_gpus.get(name) or installed(name))

    return put


def test_on_gpus_every_way_to_the_run_config_gives_the_same_choice(options, gpus, tmp_path, capsys):
    gpus(2, 24_576)
    micro = options.index("--micro-batch-size")
    asked = [*options[:micro], *options[micro + 2 :], "--run-name", "one"]
    assert main(["train", *asked, "--dry-run"]) == 0
    said = capsys.readouterr()
    chosen = "zero1, micro-batch 4 and 1 accumulation step(s), chosen for Some GPU: by the memory plan "
    assert [line for line in said.err.splitlines() if line.startswith(chosen)]
    assert "ZeRO-1, bf16" in facts(said.out)["model"] and facts(said.out)["ranks"].startswith("2 on cuda")
    assert "decided here; preset demo: auto,cpu=8" in said.out
    assert "decided here; default: auto,cpu=zero2:auto" in said.out
    (tmp_path / "run.yaml").write_text(printed(capsys, *asked))
    assert main(["train", "--config", str(tmp_path / "run.yaml"), "--dry-run"]) == 0
    assert chosen in capsys.readouterr().err
    # A rank that srun starts has the config alone, and asks the same.
    config = load_config(tmp_path / "run.yaml")
    run = preflight(config, device="cuda", world_size=2)
    assert (run.config.deepspeed, run.config.micro_batch_size) == ("zero1", 4)
    # What a run has begun with it keeps, on fewer ranks and on a CPU.
    save_run(run.config, 50, 400, "running")
    for ranks, device in ((1, "cuda"), (1, "cpu")):
        again = preflight(config, device=device, world_size=ranks)
        assert (again.config.deepspeed, again.config.micro_batch_size) == ("zero1", 4)
    named = dataclasses.replace(config, deepspeed="zero3", micro_batch_size=2)
    again = preflight(named, device="cuda", world_size=1)
    assert (again.config.deepspeed, again.config.micro_batch_size) == ("zero3", 2)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (["--data", "corpsu"], "the data corpsu does not exist"),
        (["--deepspeed", "zerro2"], "did you mean 'zero2'"),
        (["--num-gpus", "3"], "num_lanes=4 cannot be shared by 3 ranks"),
        (["--hostfile", "nowhere"], "hostfile nowhere does not exist"),
        (["--print-config"], "not allowed with argument"),
    ],
)
def test_what_a_start_refuses_a_dry_run_refuses(options, wrong, sentence, tmp_path, capsys):
    before = contents(tmp_path)
    try:
        code = main(["train", *options, *wrong, "--dry-run"])
    except SystemExit as stop:
        code = stop.code
    assert code == 2 and sentence in capsys.readouterr().err
    assert contents(tmp_path) == before


def save_run(config: RunConfig, step: int, rows: int, status: str) -> Path:
    """A run with a checkpoint, as far as a start looks at it before its ranks do."""
    from codeparrot_ds.data.datasets import StreamStart, open_datasets, saved_stream, stream_of
    from codeparrot_ds.data.stream import stream_fingerprint
    from codeparrot_ds.model.shapes import parameter_shapes

    resolved = preflight(config, device="cpu", world_size=1)
    config = resolved.config
    run = Path(config.output_dir) / str(config.run_name)
    staging = run / "checkpoints" / ".staging"
    staging.mkdir(parents=True)
    save_config(config, run / "config.yaml")
    state = {"step": step, "scheduler_step": step, "extra": {"config": dataclasses.asdict(config)}}
    state["parameters"] = parameter_shapes(resolved.shape)
    stream = stream_of(config, open_datasets(config), resolved.encoder)
    data = saved_stream(stream_fingerprint(stream), StreamStart(row=rows))
    files = {
        name: durable.write_file(staging / name, [durable.json_bytes(content)])
        for name, content in {STATE: state, "data.json": data}.items()
    }
    record = {"name": run.name, "hub": None, "outcome": {"status": status, "step": step}}
    (run / "run.json").write_text(json.dumps(record))
    publish(staging, step, files)
    return run


def test_of_a_run_that_resumes_and_of_one_that_has_finished(make_config, capsys):
    config = make_config(max_train_steps=100, num_warmup_steps=10, run_name="one", deepspeed="zero2_fp32")
    run = save_run(config, 50, 400, "stopped")
    typed = ["train", "--config", str(run / "config.yaml"), "--dry-run"]
    before = contents(run)
    assert main(typed) == 0
    said = capsys.readouterr().out
    found = facts(said)
    assert found["begins"] == f"after step 50 of {run}" and found["steps"].startswith("50 of 100, ")
    assert f"codeparrot-ds data inspect {run} --start-row 400" in said
    (run / "run.json").write_text(
        json.dumps({"name": "one", "hub": None, "outcome": {"status": "finished", "step": 50}})
    )
    assert main([*typed, "--max-train-steps", "50"]) == 0
    said = capsys.readouterr().out
    found = facts(said)
    assert "  none: it has finished\n" in said and "--start-row" not in said
    assert found["begins"].startswith("not at all: it has finished at step 50") and found["steps"].startswith(
        "0 of 50, "
    )
    before.pop(str(run / "run.json"))
    assert before.items() <= contents(run).items()


def test_neither_imports_torch(options):
    script = (
        "import sys\nfor name in ('torch', 'transformers', 'deepspeed'): sys.modules[name] = None\n"
        "from codeparrot_ds.cli.main import main\n"
        "assert main(['train', *sys.argv[1:], '--dry-run']) == 0\n"
        "assert main(['train', *sys.argv[1:], '--print-config']) == 0\n"
        "assert main(['runs']) == 0\n"
    )
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", script, *options]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr


# --------------------------------------------------------------------------------------------------------------------
# --print-config

ODD = {
    "data": "/a place/with: colon=0.5,'quoted' #b=0.5", "tokenizer": "~x", "run_name": "off", "eval_steps": 7,
    "learning_rate": 1e-10, "micro_batch_size": "auto", "compile": True, "max_hours": 23.5, "eval_prompts": "null",
    "output_dir": "ünïcode/" + "long name " * 20, "keep_best_checkpoint": False, "max_eval_steps": -1,
    "wandb": "off", "global_batch_size": 24,
}  # fmt: skip


def printed(capsys, *arguments: str) -> str:
    assert main(["train", *arguments, "--print-config"]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("preset", [None, *PRESETS])
def test_a_printed_config_is_read_back_equal(preset, tmp_path, capsys):
    text = printed(capsys, *filter(None, [preset]))
    (tmp_path / "run.yaml").write_text(text)
    assert load_config(tmp_path / "run.yaml") == RunConfig(**PRESETS[preset] if preset else {})
    assert max(map(len, text.splitlines())) <= 80
    for name, field in FIELDS.items():
        before, _, after = text.partition(f"\n{name}: ")
        comment = " ".join(line.removeprefix("# ") for line in before.rpartition("\n\n")[2].splitlines())
        assert comment.startswith(field.help) and after, name


def test_values_that_yaml_could_mistake_are_read_back_equal(tmp_path, monkeypatch, capsys):
    home = tmp_path / "~x"
    home.mkdir()
    monkeypatch.chdir(tmp_path)
    config = RunConfig(**ODD)
    save_config(config, tmp_path / "first.yaml")
    text = printed(capsys, "--config", "first.yaml")
    (tmp_path / "second.yaml").write_text(text)
    assert load_config(tmp_path / "second.yaml") == config
    assert "ünïcode" in text


def test_a_printed_config_has_preset_file_and_options(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("seed: 5\nlearning_rate: 1e-3\n")
    text = printed(capsys, "large", "--config", str(tmp_path / "run.yaml"), "--seed", "6")
    values = dict(line.split(": ", 1) for line in text.splitlines() if line and line[0] not in "#-")
    assert (values["model"], values["learning_rate"], values["seed"]) == ("gpt2-xl", "0.001", "6")
    assert "# decay after the warm-up (default: cosine); one of cosine, linear, constant" in text
    assert precision({}) == "fp32"  # the JSON's own default, which no field stands for
