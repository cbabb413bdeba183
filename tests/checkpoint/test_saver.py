"""Saving behind training, what a failed save leaves, retention, and exports in another precision."""

import dataclasses
import logging
import shutil
import threading
from collections import namedtuple

import pytest
import torch
from safetensors.torch import load_file

from codeparrot_ds import durable
from codeparrot_ds.checkpoint import saver as checkpoint_module
from codeparrot_ds.checkpoint import tensor_files
from codeparrot_ds.checkpoint.export import export_checkpoint
from codeparrot_ds.checkpoint.folders import find_checkpoint
from codeparrot_ds.cli.main import main
from codeparrot_ds.engine.fragments import owned_fragments
from codeparrot_ds.errors import UserError
from tests.torture.tiny_run import TinyRun, checkpoint_steps, evaluation, leftovers


@pytest.fixture
def run(only_rank, tokenizer_dir, tmp_path) -> TinyRun:
    run = TinyRun(tokenizer_dir, tmp_path / "run")
    run.folder.record = {"hub": None}
    run.train_step()
    return run


@pytest.fixture
def gate(monkeypatch) -> threading.Event:
    """Files are written once it is set."""
    event = threading.Event()
    write_file = durable.write_file

    def waiting(path, content):
        assert event.wait(30)
        return write_file(path, content)

    monkeypatch.setattr(durable, "write_file", waiting)
    yield event
    event.set()


def test_training_goes_on_while_a_checkpoint_is_written(run, gate):
    expected, saver = run.content(1), run._savers[True]
    saver.save(run.state(1), run.export(1))
    run.train_step()
    run.train_step()
    assert saver.outcomes == [] and checkpoint_steps(run.checkpoints) == []
    gate.set()
    outcome = saver.wait()
    assert outcome.error is None and outcome.stall_seconds < outcome.seconds
    assert not run.content(1).equals(expected)
    assert run.load(outcome.checkpoint).equals(expected)
    files = [path for path in outcome.checkpoint.path.rglob("*") if path.is_file() and path.name != "manifest.json"]
    assert outcome.num_bytes == sum(path.stat().st_size for path in files)


def test_a_second_save_waits_for_the_first(run, gate):
    saver = run._savers[True]
    saver.save(run.state(1), run.export(1))
    threading.Timer(0.3, gate.set).start()
    saver.save(run.state(2), run.export(2))
    assert [outcome.step for outcome in saver.outcomes][:1] == [1]
    assert saver.wait().step == 2 and checkpoint_steps(run.checkpoints) == [2, 1]


def test_without_memory_for_a_copy_training_waits(run, monkeypatch, caplog):
    empty = torch.empty

    def refuse(*size, **options):
        if options.get("dtype") == torch.uint8 and size[0]:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return empty(*size, **options)

    expected, saver = run.content(1), run._savers[True]
    monkeypatch.setattr(torch, "empty", refuse)
    with caplog.at_level(logging.WARNING, logger="codeparrot_ds.checkpoint"):
        saver.save(run.state(1), run.export(1))
    assert "no 0.0 GB of host memory for a copy of the optimizer's state (DefaultCPUAllocator" in caplog.text
    (outcome,) = saver.outcomes
    assert outcome.error is None and outcome.stall_seconds == outcome.seconds
    monkeypatch.undo()
    assert run.load(outcome.checkpoint).equals(expected)


def test_a_disk_without_room_is_seen_before_anything_is_written(run, monkeypatch):
    before = run.save(1)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(100_000))
        outcome = run.save(2, in_background=True)
    assert outcome.checkpoint is None
    assert "the checkpoint of step 2 could not be written" in str(outcome.error)
    assert f"{run.checkpoints} has 0.00 GB free and it takes 0.00 GB" in str(outcome.error)
    assert "the one before it is untouched" in str(outcome.error)
    assert leftovers(run.checkpoints) == [] and run.newest() == before.checkpoint
    assert run.save(3, in_background=True).error is None


def test_a_defect_in_the_thread_is_raised_where_training_next_asks(run, monkeypatch):
    def broken(*_):
        raise ValueError("a defect")

    monkeypatch.setattr(checkpoint_module, "write_export", broken)
    saver = run._savers[True]
    saver.save(run.state(1), run.export(1))
    with pytest.raises(ValueError, match="a defect"):
        saver.wait()
    assert checkpoint_steps(run.checkpoints) == []


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"keep_best_checkpoint": True}, [4, 2]),
        ({"keep_best_checkpoint": False}, [4]),
        ({"keep_best_checkpoint": False, "keep_checkpoint_every": 3}, [4, 3]),
    ],
)
def test_the_best_and_each_mth_are_kept(run, settings, kept):
    run.publisher.config = dataclasses.replace(run.config, keep_checkpoints=1, **settings)
    rows = [evaluation(step, loss) for step, loss in enumerate((3.0, 2.0, 2.5, float("nan")), start=1)]
    saver = run._savers[False]
    for step in range(1, 5):
        state = dataclasses.replace(run.state(step), evaluations=rows[:step])
        saver.save(state, run.export(step))
        assert saver.outcomes[-1].error is None
    assert checkpoint_steps(run.checkpoints) == kept


def test_an_export_has_the_masters_in_the_precision_asked_for(run, tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_files, "PIECE", 1000)  # values at a time: less than some weights have
    checkpoint = run.save(1).checkpoint
    (fragments,) = owned_fragments(run.engine)
    for dtype in ("float32", "bfloat16", "float16"):
        export_checkpoint(checkpoint, tmp_path / dtype, dtype=dtype, overwrite=False)
        weights = load_file(tmp_path / dtype / "model.safetensors")
        assert len(weights) == len(fragments)
        for fragment in fragments:  # one rank: whole parameters
            master = fragment.tensors["fp32"].to(getattr(torch, dtype))
            assert torch.equal(weights[fragment.name].flatten(), master)
    assert (tmp_path / "bfloat16" / "model.safetensors").read_bytes() == (
        checkpoint.export / "model.safetensors"
    ).read_bytes()
    assert "exported in float32 from the optimizer's masters" in (tmp_path / "float32" / "README.md").read_text()
    with pytest.raises(UserError, match="already holds"):
        export_checkpoint(checkpoint, tmp_path / "float32", dtype="float32", overwrite=False)


def test_a_weight_that_float16_cannot_hold(run, tmp_path):
    (fragments,) = owned_fragments(run.engine)
    fragments[0].tensors["fp32"][0] = 1e6
    checkpoint = run.save(1).checkpoint
    with pytest.raises(UserError, match=r"has values that float16 cannot hold: export it in bfloat16 or float32"):
        export_checkpoint(checkpoint, tmp_path / "half", dtype="float16", overwrite=False)
    assert not (tmp_path / "half").exists()


def test_a_checkpoint_to_export_is_found_and_verified(run, capsys):
    (run.path / "run.json").write_text("{}")
    with pytest.raises(UserError, match="has no checkpoint yet"):
        find_checkpoint(run.path)
    first, second = run.save(10).checkpoint, run.save(20).checkpoint
    assert find_checkpoint(run.path) == second
    assert find_checkpoint(run.path, 10) == find_checkpoint(first.path) == first
    with pytest.raises(UserError, match=r"no checkpoint of step 13; the nearest is of step 10 \(there are: 10, 20\)"):
        find_checkpoint(run.path, 13)
    with pytest.raises(UserError, match="--step goes with a run's folder"):
        find_checkpoint(first.path, 20)
    (second.path / "data.json").write_text("{}")
    assert main(["checkpoint", "export", str(run.path), "--out", str(run.path / "out")]) == 2
    assert "data.json has 2 bytes instead of" in capsys.readouterr().err and not (run.path / "out").exists()
