"""What a run writes down."""

import dataclasses
import glob
import json
import logging
import math
import os
import re
import shlex
import socket
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import wandb

from codeparrot_ds.checkpoint.run_folder import RunFolder
from codeparrot_ds.metrics import EvaluationRow, TrainingRow
from codeparrot_ds.supervision import supervise
from codeparrot_ds.telemetry import tracking
from codeparrot_ds.telemetry.tracking import Metrics, Progress, Tracker, set_up_logging
from codeparrot_ds.terminal import duration
from tests.telemetry.screen import standard_error_on

LOGGERS = ("codeparrot_ds", "DeepSpeed", "transformers", "datasets", "huggingface_hub", "py.warnings")


@pytest.fixture
def loggers():
    """Puts every logger back as it was."""
    before = {name: (log.handlers, log.propagate, log.level) for name in LOGGERS for log in [logging.getLogger(name)]}
    yield
    logging.captureWarnings(False)
    for name, (handlers, propagate, level) in before.items():
        log = logging.getLogger(name)
        for handler in set(log.handlers) - set(handlers):
            handler.close()
        log.handlers, log.propagate = handlers, propagate
        log.setLevel(level)


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "runs" / "brave-otter-7"
    path.mkdir(parents=True)
    folder = RunFolder(path)
    folder.record = {"name": folder.name, "id": "brave-otter-7-abc123"}
    return folder


def rows(metrics):
    return [json.loads(line) for line in metrics.path.read_text().splitlines()]


def test_metrics_are_rows_at_once(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.append({"step": 1, "loss": 2.5, "grad_norm": None})
    assert rows(metrics) == [{"step": 1, "loss": 2.5, "grad_norm": None}]
    metrics.append({"step": 2, "loss": 2.25})
    assert [row["step"] for row in rows(metrics)] == [1, 2]


def test_the_curve_of_losses_is_thin_and_ends_with_the_last(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl")
    assert metrics.losses(4) == []
    for step in range(1, 11):
        metrics.append({"step": step, "loss": step / 2})
        metrics.append({"step": step, "eval_loss": 1.0})
    metrics.append({"step": 11, "loss": float("nan")})  # no number of JSON, for a card or training_state.json
    assert metrics.losses(4) == [(1, 0.5), (4, 2.0), (7, 3.5), (10, 5.0)]
    assert len(metrics.losses(100)) == 10


def test_numbers_that_json_has_no_word_for(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.append({"step": 1, "loss": math.nan, "grad_norm": math.inf, "low": -math.inf})

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    row = json.loads(metrics.path.read_text(), parse_constant=refuse)
    assert math.isnan(float(row["loss"])) and float(row["grad_norm"]) == math.inf and float(row["low"]) == -math.inf
    assert row["step"] == 1


@pytest.mark.parametrize("torn", ["", '{"step": 3, "lo', '{"step": 2, "loss": 1.0}', "\0\0\0\0"])
def test_a_restart_drops_the_steps_that_it_does_again(tmp_path, torn):
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.truncate_after(5)  # no file yet
    for step in (0, 1, 2, 3):
        metrics.append({"step": step, "loss": float(step)})
    metrics.append({"step": 1, "eval_loss": 2.0})
    with metrics.path.open("a") as file:
        file.write(torn)
    metrics.truncate_after(1)
    assert [row["step"] for row in rows(metrics)] == [0, 1, 1]
    metrics.append({"step": 2, "loss": 9.0})  # on a line of its own
    assert rows(metrics)[-1] == {"step": 2, "loss": 9.0}


def test_a_log_a_rank(tmp_path, loggers, capsys):
    logging.getLogger("DeepSpeed").setLevel(logging.INFO)  # as importing DeepSpeed does
    for rank in (0, 1):
        set_up_logging(tmp_path, rank)
        logging.getLogger("codeparrot_ds.session").debug("detail of rank %d", rank)
        logging.getLogger("codeparrot_ds.session").info("progress of rank %d", rank)
        logging.getLogger("codeparrot_ds.session").error("trouble of rank %d", rank)
        logging.getLogger("DeepSpeed").info("a setting of rank %d", rank)
        warnings.warn(f"deprecated on rank {rank}", stacklevel=1)
    assert capsys.readouterr().err.splitlines() == [
        "progress of rank 0",
        "trouble of rank 0",
        "rank 1: trouble of rank 1",
    ]
    for rank in (0, 1):
        text = (tmp_path / "log" / f"debug_{rank}.log").read_text()
        assert f"DEBUG codeparrot_ds.session: detail of rank {rank}" in text
        assert f"trouble of rank {rank}" in text and f"a setting of rank {rank}" in text
        assert f"deprecated on rank {rank}" in text and f"rank {1 - rank}" not in text


TRAINING_ROW = TrainingRow(
    step=5,
    tokens=640,
    epoch=0,
    loss=3.5,
    learning_rate=1e-3,
    grad_norm=None,
    tokens_per_second=12345.6,
    mfu=math.nan,
    step_seconds=0.1,
    data_wait_seconds=0.0,
    memory_bytes=10**9,
    skipped_steps=0,
    loss_scale=1.0,
)
EVALUATION_ROW = EvaluationRow(step=5, tokens=640, eval_loss=3.25, perplexity=25.8, bits_per_byte=None, eval_tokens=252)


def test_tensorboard_is_read_back(folder, loggers):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = {"model": "demo", "learning_rate": 1e-3, "compile": False, "eval_steps": None, "betas": [0.9, 0.999]}
    tracker = Tracker(folder, active=True, mode="off", hyperparameters=settings)
    tracker.train(TRAINING_ROW)
    tracker.evaluation(EVALUATION_ROW)
    tracker.close()
    assert tracker.last_evaluation == EVALUATION_ROW

    events = EventAccumulator(str(folder.path / "tensorboard")).Reload()
    (loss,) = events.Scalars("train/loss")
    assert (loss.step, loss.value) == (5, 3.5)
    assert events.Scalars("validation/perplexity")[0].value == pytest.approx(25.8)
    assert {"train/grad_norm", "train/step"}.isdisjoint(events.Tags()["scalars"])
    assert events.Scalars("final/eval_loss")[0].value == 3.25

    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    start = HParamsPluginData.FromString(content).session_start_info.hparams
    assert start["model"].string_value == "demo" and start["learning_rate"].number_value == 1e-3
    assert start["compile"].bool_value is False and start["betas"].string_value == "[0.9, 0.999]"
    assert "eval_steps" not in start

    first, second = rows(tracker.metrics)
    assert list(second) == "step tokens eval_loss perplexity bits_per_byte eval_tokens time".split()
    assert list(first)[-2:] == ["loss_scale", "time"]  # a single rank compares none
    assert first["loss"] == 3.5 and first["mfu"] == "nan" and first["time"] > 0
    assert second["eval_loss"] == 3.25 and second["bits_per_byte"] is None


def steps_shown(folder):
    """The steps of every curve and text, as TensorBoard itself reads a folder of runs."""
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer

    shown = EventMultiplexer(tensor_size_guidance={"scalars": 0, "text": 0}).AddRunsFromDirectory(str(folder)).Reload()
    ((run, tags),) = shown.Runs().items()
    curves = [tag for tag in tags["tensors"] if "hparams" not in tag]
    return {tag: [event.step for event in shown.Tensors(run, tag)] for tag in curves}


def test_tensorboard_shows_each_step_once_however_often_a_run_continues(folder, loggers):
    sample = {"prompt": "def f", "completion": "(x):"}

    def train(first, last, *, last_step, ends):
        tracker = Tracker(folder, active=True, mode="off", hyperparameters={"model": "demo"}, last_step=last_step)
        for step in range(first, last + 1):
            if step:
                tracker.train(dataclasses.replace(TRAINING_ROW, step=step, loss=float(step)))
            if step % 2 == 0:
                tracker.evaluation(dataclasses.replace(EVALUATION_ROW, step=step))
                tracker.completions(step, [sample])
        tracker.close() if ends else tracker.tensorboard.flush()
        time.sleep(1.1)  # TensorBoard orders a run's files by the second in their names

    train(0, 3, last_step=-1, ends=False)  # killed before its first checkpoint
    train(0, 6, last_step=-1, ends=True)
    train(5, 8, last_step=4, ends=False)  # from an older checkpoint, and killed
    train(7, 8, last_step=6, ends=True)
    shown = steps_shown(folder.path.parent)
    assert shown.pop("train/loss") == shown.pop("train/learning_rate") == list(range(1, 9))
    assert shown.pop("validation/perplexity") == shown.pop("completions/text_summary") == [0, 2, 4, 6, 8]
    assert shown.pop("final/eval_loss") == [8]
    assert len(shown) > 5 and all(len(set(steps)) == len(steps) for steps in shown.values())
    assert [row["step"] for row in rows(Tracker(folder, active=False, mode="off", hyperparameters={}).metrics)] == [
        *(0, 1, 2, 2, 3, 4, 4, 5, 6, 6, 7, 8, 8)
    ]


def test_the_other_ranks_write_nothing(folder):
    tracker = Tracker(folder, active=False, mode="offline", hyperparameters={"model": "demo"})
    tracker.train(TRAINING_ROW)
    tracker.evaluation(EVALUATION_ROW)
    tracker.close()
    assert list(folder.path.iterdir()) == []
    assert tracker.last_evaluation == EVALUATION_ROW


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    """The environment of somebody who never logged in to wandb."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NETRC", raising=False)
    wandb.teardown()  # it reads the environment once a process
    yield
    wandb.teardown()


def test_wandb_runs_offline_under_the_runs_name(folder, stranger, loggers, caplog, monkeypatch, tmp_path):
    """And takes nothing from the user's own repository: a token in its remote, a password in a change."""
    caplog.set_level(logging.INFO, "codeparrot_ds")
    work, token = tmp_path / "work", "0123456789abcdef" * 2
    for command in (
        *(("init", "-q", work), ("-C", work, "remote", "add", "origin", f"https://{token}:x-oauth-basic@host/o/r")),
        ("-C", work, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "first"),
    ):
        subprocess.run(["git", *command], check=True)
    monkeypatch.chdir(work)
    tracker = Tracker(folder, active=True, mode="auto", hyperparameters={"model": "demo"})
    assert tracker.wandb.name == "brave-otter-7" and tracker.wandb.id == "brave-otter-7-abc123"
    assert tracker.wandb.project == "codeparrot-ds" and tracker.wandb.config["model"] == "demo"
    assert tracker.wandb.offline
    tracker.train(TRAINING_ROW)
    tracker.close()
    wandb.teardown()  # what the end of the process does: the service writes the rest
    (stored,) = glob.glob(f"{folder.path}/wandb/offline-run-*-brave-otter-7-abc123/run-*.wandb")
    content = Path(stored).read_bytes()
    assert b"brave-otter-7" in content and b"train/loss" in content
    assert not [file for file in folder.path.rglob("*") if file.is_file() and token.encode() in file.read_bytes()]
    (line,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("wandb: ")]
    assert line.startswith("wandb: offline, run brave-otter-7")
    command = shlex.split(line.partition("upload later with: ")[2])
    assert command[:2] == ["wandb", "sync"] and glob.glob(command[2]) == [str(Path(stored).parent)]


def test_every_start_of_an_offline_run_is_synced_to_one_run(folder, stranger):
    """As far as it goes without an account: `wandb sync` finds the file of each start, and all name the same run."""
    for last_step, step in ((-1, 5), (4, 6)):
        tracker = Tracker(folder, active=True, mode="offline", hyperparameters={}, last_step=last_step)
        tracker.train(dataclasses.replace(TRAINING_ROW, step=step))
        tracker.close()
        wandb.teardown()
        time.sleep(1.1)  # the names of its folders have the second in them
    starts = sorted(glob.glob(f"{folder.path}/wandb/offline-run-*"))
    assert len(starts) == 2 and all(start.endswith("-brave-otter-7-abc123") for start in starts)
    command = [sys.executable, "-m", "wandb", "sync", "--dry-run", *starts]
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert "Would sync 2 run(s)" in found.stdout + found.stderr


def test_wandb_off(folder, stranger, caplog):
    caplog.set_level(logging.INFO, "codeparrot_ds")
    tracker = Tracker(folder, active=True, mode="off", hyperparameters={})
    tracker.close()
    assert tracker.wandb is None and not (folder.path / "wandb").exists()
    assert "wandb: off" in caplog.text


class SlowRun:
    """A run of wandb's that starts when it is told to."""

    def __init__(self):
        self.may_start, self.told = threading.Event(), []

    def start(self, *_):
        assert self.may_start.wait(20)
        return self

    def log(self, values):
        if values["step"] == 3:
            raise OSError("wandb's disk is full")
        self.told.append(values["step"])

    def finish(self):
        self.told.append("finish")


def test_training_does_not_wait_for_wandb_and_hears_of_its_faults(folder, monkeypatch):
    run = SlowRun()
    monkeypatch.setattr(tracking, "_start_wandb", run.start)
    tracker = Tracker(folder, active=True, mode="auto", hyperparameters={})
    tracker.evaluation(dataclasses.replace(EVALUATION_ROW, step=0))
    for step in (1, 2, 4):
        tracker.train(dataclasses.replace(TRAINING_ROW, step=step))
    assert run.told == []
    run.may_start.set()
    tracker.close()
    assert run.told == [0, 1, 2, 4, "finish"]
    tracker = Tracker(folder, active=True, mode="auto", hyperparameters={})
    tracker.train(dataclasses.replace(TRAINING_ROW, step=3))
    tracker._told_wandb[0].exception(timeout=20)
    with pytest.raises(OSError, match="disk is full"):
        tracker.train(dataclasses.replace(TRAINING_ROW, step=4))
    tracker.close()


def test_a_run_that_fails_before_its_first_step_ends(tmp_path):
    """Nobody closes its tracker: what is kept for wandb must not hold up the end of the rank."""
    script = """
import sys
from pathlib import Path
from types import SimpleNamespace
from codeparrot_ds.metrics import EvaluationRow
from codeparrot_ds.supervision.process_end import end_process
from codeparrot_ds.telemetry.tracking import Tracker
folder = SimpleNamespace(path=Path(sys.argv[1]), name="brave-otter-7", record={"id": "brave-otter-7-abc123"})
tracker = Tracker(folder, active=True, mode="offline", hyperparameters={})
row = EvaluationRow(step=0, tokens=0, eval_loss=9.0, perplexity=8.0, bits_per_byte=None, eval_tokens=9)
tracker.evaluation(row)
end_process(4)
"""
    end = subprocess.run([sys.executable, "-c", script, str(tmp_path)], timeout=60, check=False)
    assert end.returncode == 4 and not (tmp_path / "wandb").exists()


def test_an_unreachable_wandb_server_turns_a_run_offline(folder, stranger, caplog, monkeypatch):
    """A key and a server that nobody runs: a run must not die of it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{probe.getsockname()[1]}")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(tracking, "WANDB_TIMEOUT_SECONDS", 2)
    caplog.set_level(logging.INFO, "codeparrot_ds")
    tracker = Tracker(folder, active=True, mode="auto", hyperparameters={})
    assert tracker.wandb.offline and tracker.wandb.name == "brave-otter-7"
    assert "cannot reach the server" in caplog.text and "wandb: offline, run brave-otter-7" in caplog.text
    tracker.train(TRAINING_ROW)
    tracker.close()


@pytest.mark.parametrize(
    ("machine", "server", "logged_in"),
    [
        ("api.wandb.ai", None, True),
        ("api.forge.coreweave.com", None, True),
        ("wandb.example.org", "https://wandb.example.org/", True),
        ("api.wandb.ai", "https://wandb.example.org", False),
        ("github.com", None, False),
    ],
)
@pytest.mark.parametrize("variable", [None, "NETRC"])
def test_who_is_logged_in_to_wandb(tmp_path, monkeypatch, stranger, machine, server, logged_in, variable):
    assert not tracking._logged_in_to_wandb()
    path = tmp_path / ("credentials" if variable else ".netrc")
    path.write_text(f"machine {machine}\n  login user\n  password {'0' * 40}\n")
    path.chmod(0o600)
    if variable:
        monkeypatch.setenv(variable, str(path))
    if server:
        monkeypatch.setenv("WANDB_BASE_URL", server)
    assert tracking._logged_in_to_wandb() == logged_in


def test_progress_in_lines(caplog, capsys):
    caplog.set_level(logging.INFO, "codeparrot_ds")
    progress = Progress(active=True, start=0, total=100)
    progress.show(TRAINING_ROW, 185)
    progress.say("evaluation at step %d", 5)
    progress.close()
    silent = Progress(active=False, start=0, total=100)
    silent.show(TRAINING_ROW, 1)
    silent.say("nothing")
    silent.close()
    assert [record.getMessage() for record in caplog.records] == [
        "step 5/100: loss 3.5000, lr 1.00e-03, 12,346 tokens/s, 3 min 5 s left",
        "evaluation at step 5",
    ]


# A long run on a fast machine: no figure is wider.
SHOWN = dataclasses.replace(
    TRAINING_ROW, loss=10.8251, learning_rate=4.87e-4, tokens_per_second=1_304_567.8, grad_norm=1.25
)


@pytest.mark.parametrize(
    ("columns", "least", "more"),
    [(80, 8, []), (140, 20, ["lr 4.87e-04", "gradient norm 1.25"]), (60, 4, [])],
)
def test_the_bar_fits_the_terminal(columns, least, more):
    with standard_error_on(columns) as screen:
        progress = Progress(active=True, start=0, total=150_000)
        progress.show(dataclasses.replace(SHOWN, step=75_000), 23 * 3600 + 59 * 60)
        (line,) = screen.lines()
        progress.close()
    fields = ["loss 10.8251", "1,304,568 tokens/s", "23 h 59 min left"]
    _, bar, told = re.fullmatch(r"( 50%)\|(.+)\| 75000/150000, (.*)", line).groups()
    assert told.split(", ") == (fields if columns > 60 else fields[:2]) + more
    assert len(line) == columns - 1 and len(bar) >= least and abs(bar.count("█") - len(bar) / 2) <= 1


@pytest.mark.parametrize("columns", [80, 140])
def test_what_is_said_while_the_bar_is_shown_stands_above_it(tmp_path, loggers, columns):
    """Also by threads (wandb's, the saver's) and other libraries, which know of no bar."""
    with standard_error_on(columns) as screen:
        set_up_logging(tmp_path, 0)
        progress = Progress(active=True, start=0, total=300)
        progress.show(dataclasses.replace(SHOWN, step=10), 60)
        progress.say("evaluation at step %d", 10)
        thread = threading.Thread(target=lambda: logging.getLogger("codeparrot_ds").info("wandb: offline"))
        thread.start()
        thread.join()
        progress.show(dataclasses.replace(SHOWN, step=20), 55)
        logging.getLogger("DeepSpeed").error("a word of a library")
        supervise.say("stopping: the ranks save")  # another process on the same terminal, which has no bar of its own
        progress.show(dataclasses.replace(SHOWN, step=30), 50)
        lines = screen.lines()
        progress.close()
        supervise.say("the end")
        assert screen.lines()[-1] == "the end" and len(screen.lines()) == len(lines) + 1
    said = ["evaluation at step 10", "wandb: offline", "a word of a library", "stopping: the ranks save"]
    assert lines[:-1] == said and lines[-1].startswith(" 10%|") and "50 s left" in lines[-1]
    assert "wandb: offline" in (tmp_path / "log" / "debug_0.log").read_text()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (-3, "0 s"),
        (41.6, "42 s"),
        (59.7, "1 min 0 s"),
        (185, "3 min 5 s"),
        (3599.6, "1 h 0 min"),
        (7440, "2 h 4 min"),
        (7 * 86400 + 3 * 3600 + 59, "7 d 3 h"),
        (math.nan, "unknown time"),
        (math.inf, "unknown time"),
    ],
)
def test_duration(seconds, text):
    assert duration(seconds) == text
