"""A run's folder: names, identity, record, lock."""

import dataclasses
import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from codeparrot_ds.checkpoint.folders import Checkpoint, publish, staging_folder
from codeparrot_ds.checkpoint.run_folder import (
    ADJECTIVES,
    IDENTITY,
    NOUNS,
    check_checkpoint,
    check_continuation,
    check_free,
    check_run_name,
    forgotten_if_refused,
    new_run_name,
    open_run,
    with_checkpoint,
)
from codeparrot_ds.config.files import load_config, save_config
from codeparrot_ds.durable import write_file
from codeparrot_ds.errors import UserError
from codeparrot_ds.model.shapes import GPT2Shape, parameter_shapes


def git_takes(name: str) -> bool:
    return subprocess.run(["git", "check-ref-format", "--branch", name], capture_output=True).returncode == 0


def is_refused(name: str) -> bool:
    try:
        check_run_name(name)
    except UserError:
        return True
    return False


def test_new_names_are_branches_and_free(tmp_path):
    names = set()
    for _ in range(20):
        name = new_run_name(tmp_path)
        adjective, noun, number = name.split("-")
        assert adjective in ADJECTIVES and noun in NOUNS and int(number) >= 1
        assert git_takes(name) and not is_refused(name) and name not in names
        names.add(name)
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text("{}")
    assert len(set(ADJECTIVES)) == len(ADJECTIVES) and len(set(NOUNS)) == len(NOUNS)


def test_a_new_name_before_there_is_a_folder(tmp_path):
    assert new_run_name(tmp_path / "nowhere").endswith("-1")


@pytest.mark.parametrize(
    "name", ["brave-otter-7", "a", "v1.2_large", "2024-run", "Large.Model", "abcdefg-1", "abcde", "hub", "git"]
)
def test_names_that_are_fine(name):
    check_run_name(name)
    assert git_takes(name)


@pytest.mark.parametrize(
    "name",
    [
        *(
            "",
            " ",
            "a b",
            "-x",
            ".hidden",
            "a..b",
            "a.lock",
            "a.",
            "a/b",
            "../a",
            "a~1",
            "a^",
            "a:b",
            "a?",
            "a*",
            "a[1]",
        ),
        *("a\\b", "a@{1}", "@", "é", "a\n", "x" * 97, "HEAD", "main"),
        *("hub.git", "x.git", "X.GIT", "tokenizers", "FETCH_HEAD", "ORIG_HEAD", "AUTO_MERGE", "DEADBEEF", "a" * 64),
        *("deadbeef", "0123456789012345678901234567890123456789", "1234567"),
    ],
)
def test_names_that_are_refused(name):
    with pytest.raises(UserError, match="run_name"):
        check_run_name(name)


def open_folder(config, world_size=2):
    return open_run(config, {"zero_optimization": {"stage": 2}}, world_size, ["host-b", "host-a", "host-a"])


@pytest.fixture
def run(make_config):
    """A run's folder with a checkpoint, held by nobody."""
    folder = open_folder(make_config())
    (folder.checkpoints / "step-00000010").mkdir()
    folder._lock.close()
    return folder


def test_what_a_run_records(run, make_config):
    assert run.name == "brave-otter-7"
    assert load_config(run.path / "config.yaml") == make_config()
    assert json.loads((run.path / "ds_config.json").read_text()) == {"zero_optimization": {"stage": 2}}
    record = json.loads((run.path / "run.json").read_text())
    assert record == run.record
    assert record["name"] == "brave-otter-7" and record["id"].startswith("brave-otter-7-")
    assert record["hosts"] == ["host-a", "host-b"] and record["outcome"] == {"status": "running", "step": None}
    assert record["versions"]["python"] == sys.version.split()[0]
    assert {"torch", "deepspeed", "transformers", "wandb"} <= {
        k for k, version in record["versions"].items() if version
    }
    (start,) = record["starts"]
    assert start["world_size"] == 2 and start["hosts"] == ["host-a", "host-b"] and start["command"] and start["time"]


def test_a_restart_keeps_the_identity_and_adds_a_start(run, make_config):
    again = open_folder(make_config(max_train_steps=99, deepspeed="zero3"), world_size=4)
    assert again.record["id"] == run.record["id"] and again.record["created"] == run.record["created"]
    assert [start["world_size"] for start in again.record["starts"]] == [2, 4]
    assert load_config(run.path / "config.yaml").max_train_steps == 99


def test_update_is_what_another_rank_reads(run):
    run.update(hub="local", outcome={"status": "finished", "step": 5})
    run.record = {}
    run.reload()
    assert run.record["hub"] == "local" and run.record["outcome"]["step"] == 5 and run.record["name"] == run.name


@pytest.mark.parametrize("field", IDENTITY)
def test_another_config_is_refused_with_the_difference(run, make_config, field):
    other = {"model": "gpt2", "seq_length": 64, "global_batch_size": 16, "num_lanes": 8, "shuffle_buffer": 9, "seed": 2}
    config = make_config(**{field: other[field]})
    before = (run.path / "run.json").read_text()
    with pytest.raises(UserError) as caught:
        open_folder(config)
    mine = getattr(make_config(), field)
    assert f"{field} is {mine!r} there and {other[field]!r} here" in str(caught.value)
    assert "--run-name" in str(caught.value) and (run.path / "run.json").read_text() == before


def test_a_config_that_was_saved_with_relative_paths_goes_on_from_there(run, make_config, tmp_path, monkeypatch):
    """As versions did that kept paths as they were typed; elsewhere it is another model, or none."""
    for place in ("here", "there"):
        (tmp_path / place / "model").mkdir(parents=True)
        (tmp_path / place / "model" / "config.json").write_text('{"model_type": "gpt2", "n_layer": 1}')
    save_config(make_config(model="model/config.json", data="corpus"), run.path / "config.yaml")
    monkeypatch.chdir(tmp_path / "here")
    for typed in ("model/config.json", str(tmp_path / "here" / "model" / "config.json")):
        check_continuation(make_config(model=typed), run.path)
    monkeypatch.chdir(tmp_path / "there")
    with pytest.raises(UserError, match="model is 'model/config.json' there"):
        check_continuation(make_config(model=str(tmp_path / "here" / "model" / "config.json")), run.path)


def test_every_difference_is_named(run, make_config):
    with pytest.raises(UserError, match=r"seq_length is 32 there and 64 here; seed is 1 there and 5 here"):
        check_continuation(make_config(seq_length=64, seed=5), run.path)


def test_what_may_change_between_starts(run, make_config):
    check_continuation(make_config(micro_batch_size=4, learning_rate=1e-5, num_workers=0, max_train_steps=7), run.path)


def test_resume_never(run, make_config):
    with pytest.raises(UserError, match="holds a run with checkpoints and resume is 'never'"):
        check_continuation(make_config(resume="never"), run.path)
    (run.checkpoints / "step-00000010").rmdir()
    check_continuation(make_config(resume="never"), run.path)  # nothing would be lost


def test_folders_that_are_no_run(make_config, tmp_path):
    path = tmp_path / "runs" / "brave-otter-7"
    check_continuation(make_config(), path)
    path.mkdir(parents=True)
    check_continuation(make_config(), path)
    (path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="is not a run and not empty"):
        check_continuation(make_config(), path)
    (path / "thesis.txt").unlink()
    path.rmdir()
    path.write_text("")
    with pytest.raises(UserError, match="is a file"):
        open_folder(make_config())


@pytest.mark.parametrize(
    ("names", "goes_on"),
    [
        (["checkpoints/"], True),
        (["checkpoints/", ".lock"], True),
        (["checkpoints/", ".lock", ".config.yaml.4711.tmp"], True),
        (["checkpoints/", ".lock", "config.yaml", "ds_config.json", "ds_config_sources.json"], True),
        (["checkpoints/", ".lock", "config.yaml", "ds_config.json", ".run.json.4711.tmp"], True),
        (["config.yaml"], False),
        (["checkpoints/", "checkpoints/best.pt"], False),
        (["checkpoints/", ".lock", "thesis.txt"], False),
    ],
    ids=str,
)
def test_a_first_start_that_was_killed_before_its_record_is_no_strangers_folder(make_config, names, goes_on):
    path = Path(make_config().output_dir, "brave-otter-7")
    path.mkdir(parents=True)
    for name in names:
        if name.endswith("/"):
            (path / name).mkdir()
        else:
            (path / name).write_text("")
    if goes_on:
        assert open_folder(make_config()).record["name"] == "brave-otter-7"
    else:
        with pytest.raises(UserError, match="is not a run and not empty"):
            open_folder(make_config())


def test_a_folder_that_cannot_be_made(make_config, tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(UserError, match="cannot write the run folder .*: Not a directory"):
        open_folder(make_config())


def checkpoint(run, step, parameters=None):
    staging = staging_folder(run.checkpoints, step)
    staging.mkdir()
    return publish(
        staging,
        step,
        {"state.json": write_file(staging / "state.json", [json.dumps({"parameters": parameters}).encode()])},
    ).path


SHAPE = GPT2Shape(n_layer=1, n_embd=4, n_head=1, vocab_size=7, n_positions=8)


def test_a_run_stands_for_its_newest_checkpoint(run, make_config, tmp_path, monkeypatch, capsys):
    (run.checkpoints / "step-00000010").rmdir()
    monkeypatch.chdir(tmp_path)
    first, second = checkpoint(run, 10), checkpoint(run, 20)
    (run.checkpoints / "step-00000030").mkdir()  # cut off
    for typed in (str(run.path), f"runs/{run.name}", run.name):
        config = make_config(resume=typed, output_dir="runs")
        assert Path(with_checkpoint(config).resume).absolute() == second
    assert capsys.readouterr().err == f"{run.name} is taken for runs/{run.name}\n"
    assert with_checkpoint(make_config(resume=str(first))).resume == str(first)
    for word in ("auto", "never"):
        assert with_checkpoint(make_config(resume=word)).resume == word


def test_the_checkpoint_of_a_start_is_looked_at(run, make_config):
    (run.checkpoints / "step-00000010").rmdir()
    assert check_checkpoint(make_config(), run.path, SHAPE) is None
    first = checkpoint(run, 10, parameter_shapes(SHAPE))
    second = checkpoint(run, 20, parameter_shapes(SHAPE))
    assert check_checkpoint(make_config(), run.path, SHAPE) == Checkpoint(second)
    assert check_checkpoint(make_config(resume=str(first)), run.path, SHAPE) == Checkpoint(first)
    assert check_checkpoint(make_config(resume="never"), run.path, SHAPE) is None
    with pytest.raises(
        UserError, match="step-00000020 belongs to another model: transformer.wte.weight has shape .7, 4"
    ):
        check_checkpoint(make_config(), run.path, dataclasses.replace(SHAPE, vocab_size=9))
    (second / "state.json").unlink()
    assert check_checkpoint(make_config(), run.path, SHAPE) == Checkpoint(first)  # as the ranks would
    with pytest.raises(UserError, match="--resume .*step-00000020: .*state.json is missing"):
        check_checkpoint(make_config(resume=str(second)), run.path, SHAPE)
    (first / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="no checkpoint of .* is whole: .*state.json is missing"):
        check_checkpoint(make_config(), run.path, SHAPE)
    (run.checkpoints / ".replaced-step-00000005").mkdir()  # comes back with the next start
    assert check_checkpoint(make_config(), run.path, SHAPE) is None


def test_a_refused_start_takes_its_new_folder_away_again(make_config, tmp_path):
    @forgotten_if_refused()
    def start(error):
        folder = open_folder(make_config())
        (folder.path / "log").mkdir()
        folder._lock.close()  # which a process's end does
        raise error

    path = tmp_path / "runs" / "brave-otter-7"
    with pytest.raises(UserError, match="something"):
        start(UserError("something"))
    assert not path.exists()
    with pytest.raises(RuntimeError):  # its logs tell why
        start(RuntimeError("a fault"))
    assert (path / "log").is_dir()
    (path / "log").rmdir()
    with pytest.raises(UserError, match="again"):
        start(UserError("again"))
    assert (path / "run.json").is_file()  # it was there before


REPOSITORY = Path(__file__).resolve().parents[2]
HOLDER = """
import sys
from codeparrot_ds.config.run_config import RunConfig
from codeparrot_ds.checkpoint.run_folder import open_run
folder = open_run(RunConfig(output_dir=sys.argv[1], run_name="brave-otter-7"), {}, 1, ["here"])
print("locked", flush=True)
sys.stdin.read()
"""


def run_record(config) -> str:
    return Path(config.output_dir, "brave-otter-7", "run.json").read_text()


def test_a_second_process_is_told_who_holds_the_folder(make_config):
    config = make_config(seq_length=1024, global_batch_size=192, num_lanes=64, shuffle_buffer=1000, model="gpt2")
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, config.output_dir],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout.readline() == "locked\n"
        record = run_record(config)
        with pytest.raises(UserError, match=f"in use by process {holder.pid} on {socket.gethostname()}"):
            open_folder(config)
        with pytest.raises(UserError, match=f"in use by process {holder.pid}"):
            check_free(Path(config.output_dir, "brave-otter-7"))
        assert run_record(config) == record
    finally:
        holder.kill()
        holder.communicate()
    check_free(Path(config.output_dir, "brave-otter-7"))  # the system has released the lock of the killed one
    open_folder(config)
    check_free(Path(config.output_dir, "nowhere"))


def copied(run, name="copy"):
    return Path(shutil.copytree(run.path, run.path.with_name(name)))


def test_a_copied_run_gets_an_id_a_branch_and_a_queue_of_its_own(run, make_config):
    (run.path / "hub").mkdir()
    copy = copied(run)
    folder = open_folder(dataclasses.replace(make_config(), run_name=copy.name))
    assert folder.copy_of == run.path.resolve() and folder.branch == folder.record["name"] == "copy"
    assert folder.record["id"] != run.record["id"] and len(folder.record["starts"]) == 2
    assert not (copy / "hub").exists() and (copy / f"hub-of-{run.record['id']}").is_dir()
    folder._lock.close()
    again = open_folder(dataclasses.replace(make_config(), run_name=copy.name))
    assert again.copy_of is None and again.record["id"] == folder.record["id"] and again.branch == "copy"
    original = open_folder(make_config())
    assert original.copy_of is None and original.record["id"] == run.record["id"]


def test_a_renamed_run_keeps_its_id_and_its_branch(run, make_config):
    (run.path / "hub").mkdir()
    run.path.rename(run.path.with_name("other"))
    folder = open_folder(dataclasses.replace(make_config(), run_name="other"))
    assert folder.copy_of is None and folder.branch == run.branch and folder.record["id"] == run.record["id"]
    assert (folder.path / "hub").is_dir() and folder.record["place"]["path"] == str(folder.path.resolve())
