"""`runs`: the table of runs, what it says of each, and the view of one as it trains."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from codeparrot_ds.cli.main import build_parser, main
from codeparrot_ds.config.files import save_config
from codeparrot_ds.config.run_config import RunConfig
from codeparrot_ds.report.run_list import runs_in, state_of, table
from codeparrot_ds.report.run_view import BARS, PLAIN_BARS, Rows, follow, frame, sparkline

NOW = 1_700_000_000.0
REPOSITORY = Path(__file__).resolve().parents[2]


def write_run(
    path: Path, status: str | None = "finished", rows=(), *, age: float = 60.0, config=None, **record
) -> Path:
    path.mkdir(parents=True)
    save_config(RunConfig(max_train_steps=300, **(config or {})), path / "config.yaml")
    outcome = {} if status is None else {"outcome": {"status": status, "step": None}}
    (path / "run.json").write_text(json.dumps({"name": path.name, **outcome, **record}))
    write_rows(path, [{"time": NOW - age, **row} for row in rows])
    return path


def write_rows(run: Path, rows) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def trained(step: int, loss: float | str) -> dict:
    return {
        "step": step, "tokens": step * 4096, "loss": loss, "learning_rate": 2e-3, "grad_norm": 1.5,
        "tokens_per_second": 1234.5, "step_seconds": 2.0,
    }  # fmt: skip


def judged(step: int, loss: float) -> dict:
    return {"step": step, "tokens": step * 4096, "eval_loss": loss, "perplexity": 100.0}


@contextlib.contextmanager
def training(run: Path):
    """Holds a run's lock, as the process that trains it does."""
    with (run / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.mark.parametrize(
    ("status", "record", "said", "resumes"),
    [
        ("finished", {}, "finished", False),
        ("stopped", {}, "stopped", True),
        ("diverged", {}, "diverged", True),
        ("running", {}, "interrupted", True),  # nobody holds its lock
        (None, {"imported": {"tag": "global_step4"}}, "imported", True),
        (None, {}, "not started", True),
    ],
)
def test_what_a_run_came_to(tmp_path, status, record, said, resumes):
    run = write_run(tmp_path / "runs" / "brave-otter-7", status, [judged(0, 9.1), trained(120, 5.5)], **record)
    state = state_of(run)
    assert state.status == said
    assert (state.resume is not None) == resumes
    assert (state.step, state.max_train_steps, state.loss, state.eval_loss) == (120, 300, 5.5, 9.1)


def test_a_run_whose_lock_is_held_is_running(tmp_path):
    run = write_run(tmp_path / "a", "running", [trained(10, 5.0)])
    with training(run):
        assert state_of(run).status == "running" and state_of(run).resume is None
        # To look is no use of the run: its own process, and a start that is refused, find the lock as it was.
        with (run / ".lock").open() as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert state_of(run).status == "interrupted"


def test_the_command_continues_the_run_as_it_was(tmp_path, monkeypatch):
    monkeypatch.delenv("CODEPARROT_DS_COMMAND", raising=False)
    runs = tmp_path / "my runs"
    plain = write_run(runs / "a", "stopped")
    assert state_of(plain).resume == shlex.join(["codeparrot-ds", "train", "--config", f"{plain}/config.yaml"])
    parts = {
        "b": ({"world_size": 2, "hosts": ["here"]}, {}, ["--num-gpus", "2"]),
        "c": ({"world_size": 4, "hosts": ["x", "y"]}, {}, ["--hostfile", "HOSTFILE"]),
        "d": ({"world_size": 1}, {"resume": "never"}, ["--resume", "auto"]),
        "e": ({}, {"resume": "/some/checkpoint"}, ["--resume", "auto"]),
    }
    for name, (record, config, options) in parts.items():
        words = shlex.split(state_of(write_run(runs / name, "stopped", config=config, **record)).resume)
        assert words[4:] == options
        build_parser().parse_args(words[1:])


@pytest.mark.parametrize(
    "damage",
    [
        {"run.json": "{"},
        {"run.json": "[]"},
        {"config.yaml": "a: b: c"},
        {"config.yaml": ""},
        {"run.json": '{"starts": [{"time": 3}]}'},
    ],
    ids=str,
)
def test_a_damaged_run_is_a_line_and_hides_no_other(tmp_path, damage):
    write_run(tmp_path / "whole", rows=[trained(300, 4.0)])
    broken = write_run(tmp_path / "broken")
    for name, text in damage.items():
        (broken / name).write_text(text)
    states = {run.name: run.status for run in runs_in(tmp_path)}
    assert states == {"whole": "finished", "broken": "damaged"}
    assert "damaged" in table(runs_in(tmp_path))


def test_the_table_fits_80_columns_and_has_the_newest_first(tmp_path):
    runs = tmp_path / "runs"
    write_run(runs / "crimson-kestrel-12", "running", [trained(150_000, 12.3456), judged(9, 10.9876)], age=3600 * 23.9)
    write_run(runs / "b", "stopped", [trained(5, "nan")], age=59, config={"num_warmup_steps": 3})
    write_run(runs / "c", None, age=0)
    (runs / "crimson-kestrel-12" / "config.yaml").write_text("max_train_steps: 150000\n")
    shown = table(runs_in(runs), now=NOW).splitlines()
    head, *rows = shown[: shown.index("")]
    assert head.split() == ["run", "step", "loss", "eval", "status", "when"]
    assert [row.split()[0] for row in rows] == ["b", "crimson-kestrel-12", "c"]
    assert rows[0].split()[1:] == ["5", "of", "300", "nan", "–", "stopped", "59", "s", "ago"]
    assert re.fullmatch(r"crimson-kestrel-12 +150,000 of 150,000 +12.3456 +10.9876 +interrupted +23 h ago", rows[1]), (
        rows[1]
    )
    assert max(map(len, [head, *rows])) <= 80
    commands = [line for line in shown if line.startswith("  ")]
    assert len(commands) == 3 and "To resume:" in shown


def test_many_runs_propose_a_few_commands(tmp_path):
    for number in range(8):
        write_run(tmp_path / f"run-{number}", "stopped")
    shown = table(runs_in(tmp_path)).splitlines()
    assert sum(" train --config " in line for line in shown) == 5 and shown[-1] == "  … and 3 more"


def test_a_row_that_a_crash_cut_off_is_passed_over(tmp_path):
    run = write_run(tmp_path / "a", "running", [judged(0, 9.0), trained(10, 5.0)])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "loss": 4.')
    assert (state_of(run).step, state_of(run).loss) == (10, 5.0)


def test_as_json(tmp_path, capsys):
    write_run(tmp_path / "runs" / "a", "stopped", [trained(5, "nan")])
    assert main(["runs", str(tmp_path / "runs"), "--json"]) == 0
    (run,) = json.loads(capsys.readouterr().out)
    assert run["loss"] == "nan" and run["status"] == "stopped" and run["step"] == 5 and "train" in run["resume"]
    (tmp_path / "none").mkdir()
    assert main(["runs", str(tmp_path / "none"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_a_place_without_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["runs"]) == 0
    assert capsys.readouterr().out == "no runs in runs\n\nNext:\n  codeparrot-ds demo\n"
    write_run(tmp_path / "demo" / "runs" / "a")
    for arguments in (["runs"], ["runs", "demo"]):
        assert main(arguments) == 0
        said = capsys.readouterr().out
        assert said.startswith(f"no runs in {arguments[-1]}\n") and said.endswith("  codeparrot-ds runs demo/runs\n")
    assert main(["runs", "dmeo"]) == 2
    assert "there is no run or folder of runs dmeo" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path / "demo")
    assert main(["runs", "a"]) == 0  # by its name in runs
    assert capsys.readouterr().out.startswith("a  finished, step – of 300")


def test_sparklines():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == BARS
    assert sparkline([7, 7, 7], 8) == "▁▁▁"
    assert sparkline(list(range(1000)), 8) == BARS
    assert sparkline([0.0, float("nan"), 1.0], 3) == "▁ █"
    assert sparkline([float("nan")], 8) == " "
    assert sparkline([1, 2], 2, PLAIN_BARS) == "_#"


def test_a_frame_says_where_the_run_stands(tmp_path):
    rows = [judged(0, 9.0), *(trained(step, 9 - step / 50) for step in range(10, 130, 10))]
    run = write_run(tmp_path / "brave-otter-7", "running", rows)
    reader = Rows(run).read_all()
    with training(run):
        lines = frame(state_of(run), reader)
    assert lines[0] == "brave-otter-7  running, step 120 of 300 (40%), 6 min 0 s left"
    assert lines[2].startswith("loss ") and "█" in lines[2] and lines[2].endswith("8.8 to 6.6")
    assert [line.split()[0] for line in lines[-8:]] == [str(step) for step in range(50, 130, 10)]
    for columns in (40, 80, 120):
        assert max(map(len, frame(state_of(run), reader, columns=columns))) < columns


def test_rows_that_a_restart_drops_are_dropped(tmp_path):
    run = write_run(tmp_path / "a", "running", [trained(step, 5.0) for step in (10, 20, 30)])
    reader = Rows(run)
    assert [row["step"] for row in reader.read()] == [10, 20, 30] and list(reader.read()) == []
    (run / "metrics.jsonl").write_text("")
    write_rows(run, [trained(10, 5.0)])
    assert [row["step"] for row in reader.read()] == [10] and len(reader.last) == 1
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, ')
        file.flush()
        assert list(reader.read()) == []
        file.write('"loss": 4.0}\n')
    assert [row["step"] for row in reader.read()] == [20]


def test_following_shows_each_row_and_ends_with_the_run(tmp_path, capsys):
    run = write_run(tmp_path / "a", "running", [trained(10, 5.0)])
    waits = []
    with contextlib.ExitStack() as held:
        held.enter_context(training(run))

        def wait(seconds: float) -> None:
            waits.append(seconds)
            write_rows(run, [trained(10 + 10 * len(waits), 4.5)])
            if len(waits) == 2:
                (run / "run.json").write_text(json.dumps({"outcome": {"status": "finished", "step": 30}}))

        follow(run, wait=wait)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:4]] == ["step 10", "step 20", "step 30", "a"]
    assert lines[3] == "a: finished, step 30 of 300" and "Next:" in lines and len(waits) == 2


def test_ctrl_c_on_a_terminal_ends_the_view_and_not_the_run(tmp_path):
    """In a real terminal of 80 columns: drawn anew in its place as rows come, and left with exit code 0."""
    run = write_run(tmp_path / "a", "running", [trained(10, 5.0)])
    primary, secondary = pty.openpty()
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "TERM": "xterm", "COLUMNS": "80", "PYTHONUTF8": "1"}
    command = [sys.executable, "-m", "codeparrot_ds", "runs", str(run), "--follow"]
    with training(run):
        process = subprocess.Popen(command, stdout=secondary, stderr=secondary, env=environment)
        os.close(secondary)
        seen = bytearray()

        def read() -> None:
            with contextlib.suppress(OSError):  # the terminal's end
                while part := os.read(primary, 4096):
                    seen.extend(part)

        reader = threading.Thread(target=read)
        reader.start()
        wait_until(lambda: b"Ctrl-C ends this view" in seen, process)
        write_rows(run, [trained(20, 4.0)])
        wait_until(lambda: b"step 20 of 300" in seen, process)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0
        reader.join(timeout=60)
    os.close(primary)
    text = seen.decode()
    assert re.search(r"\x1b\[\d+A\x1b\[J", text) and "interrupted" not in text and "Traceback" not in text
    height = int(re.search(r"\x1b\[(\d+)A", text)[1])
    first = text.split("\x1b[")[0]
    assert first.count("\n") == height and max(map(len, first.splitlines())) <= 80


def wait_until(condition, process, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
