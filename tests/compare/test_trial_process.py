"""Trials whose processes crash, hang, are killed or interrupted: what is told, what is left, and how it goes on."""

import base64
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from codeparrot_ds.compare import trial_process as comparison_trial
from codeparrot_ds.compare.candidates import Request, Results, Trial, candidates_of, left_to_run
from codeparrot_ds.compare.progress import TrialProgress
from codeparrot_ds.compare.run import compare
from codeparrot_ds.compare.trial_process import TrialRunner, judge_end
from tests.telemetry.screen import standard_error_on

PROGRAM = (sys.executable, str(Path(__file__).with_name("fake_trial.py")))
FP32 = {"zero_optimization": {"stage": 0}}


@pytest.fixture
def start(make_config, tmp_path, monkeypatch):
    """Compares ``a`` and ``b``, fp32 at stages 0 and 1, with trials that do as they are told."""
    monkeypatch.setattr(comparison_trial, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(comparison_trial, "SAMPLE_SECONDS", 0.05)
    monkeypatch.setattr(comparison_trial, "WATCHDOG_SECONDS", 0.0)
    paths = []
    for stage, name in enumerate("ab"):
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    config = dataclasses.replace(make_config(), run_name=None)
    request = Request(
        configs=[str(path) for path in paths], config=config, world_sizes=[1], steps=6, warmup_steps=2, repeats=2
    )
    folder = tmp_path / "out"
    for weights in ("initial", "perturbed-fp32"):  # stand for themselves: nothing here reads them
        (folder / weights).mkdir(parents=True)
        (folder / weights / "fingerprints.json").write_text('{"float32": "same"}')
    candidates = candidates_of(request, folder, device="cpu")

    def run(plans, hang_seconds=30.0):
        monkeypatch.setenv("FAKE_TRIALS", json.dumps(plans))
        said = []
        trials = TrialRunner(request=request, folder=folder, hang_seconds=hang_seconds, program=PROGRAM)
        findings = compare(request, folder, candidates, run=trials, say=said.append)
        return findings, said

    run.folder, run.request, run.candidates = folder, request, candidates
    return run


def saved(folder):
    return json.loads((folder / "report.json").read_text())


def outcomes(folder):
    return {config["name"]: (config["status"], config["reason"]) for config in saved(folder)["configs"]}


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[0] != "Z"
    except OSError:
        return False


def test_all_go_well(start):
    findings, said = start({})
    assert findings.complete and [name for name, _ in findings.ranking] == ["a on 1", "b on 1"]
    assert findings.reference == "a on 1" and str(findings.outcome("b on 1").verdict) == "equal bit for bit"
    assert findings.recommendation.startswith("Take a on 1 rank: 1,000 tokens/s (1,000 to 1,001, 2 trials), 1.25x")
    assert [line.partition(" ")[0] for line in said] == ["[1/5]", "[2/5]", "[3/5]", "[4/5]", "[5/5]"]
    assert said[-1].endswith("nothing left") and "sensitivity run of fp32" in said[1]
    for name in ("report.html", "report.md"):
        assert "Take a on 1 rank" in (start.folder / name).read_text()


def test_a_terminal_has_a_bar_with_the_time_that_is_left(start, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    _, said = start({"b": "crash"})
    shown = capsys.readouterr().err
    assert "time left unknown, a on 1" in shown and re.search(r"about [\d min]+ s left, a on 1", shown)
    assert "<" not in shown  # nor does tqdm say another time, as [00:03<00:09]
    assert "b on 1: crashed: RuntimeError: the crash" in shown and said == []


@pytest.mark.parametrize(
    ("columns", "name"), [(80, "zero2_activation_check…"), (140, "zero2_activation_checkpointing on 1")]
)
def test_the_bar_fits_the_terminal_and_has_one_time_that_is_left(start, columns, name):
    candidates = [dataclasses.replace(each, label="zero2_activation_checkpointing") for each in start.candidates[:1]]
    results = Results(start.folder)
    place = results.folder / "trials" / Trial(candidate=candidates[0], repeat=0).name / "result.json"
    place.parent.mkdir(parents=True)
    place.write_text(json.dumps({"status": "finished", "seconds": 86_000.0, "reason": None, "found": None}))
    with standard_error_on(columns) as screen, TrialProgress(start.request, candidates, results, print) as progress:
        progress.steps_done(3)
        done, bar = screen.lines()
    assert done == "1 of 2 trials are done; continuing with the others"
    assert re.fullmatch(rf" 50%\|█+ +\| 3/6, about 23 h 53 min left, {re.escape(name)}", bar), bar
    assert columns - 2 <= len(bar) < columns


@pytest.mark.parametrize(
    ("plan", "status", "words"),
    [
        ("crash", "crashed", "RuntimeError: the crash (in step 2; exit code 1; see"),
        ("killed", "crashed", "a process was killed by SIGKILL in step 2"),
        ("no memory", "out of memory", "in step 3, at a peak of 5.0 GB: you tried to allocate 8 GB"),
    ],
    ids=["crash", "killed", "no memory"],
)
def test_one_that_breaks_is_a_result_and_the_others_go_on(start, plan, status, words):
    findings, said = start({"b-on-1-0": plan})
    found = outcomes(start.folder)
    assert found["b on 1"][0] == status and words in found["b on 1"][1]
    assert found["a on 1"] == ("finished", None)
    assert findings.complete and not (start.folder / "trials" / "b-on-1-1").exists()  # its other trial is spared
    assert any(f"b on 1: {status}: " in line for line in said)
    assert words.replace("(", "").partition(";")[0].split()[-1] in (start.folder / "report.html").read_text()


def test_one_that_hangs_is_ended_with_all_its_processes(start):
    began = time.monotonic()
    start({"b-on-1-0": "hang"}, hang_seconds=1.0)
    status, reason = outcomes(start.folder)["b on 1"]
    assert status == "hung" and "wrote nothing for too long after step 2 and was ended" in reason
    assert time.monotonic() - began < 15
    assert not is_alive((start.folder / "trials" / "b-on-1-0" / "child").read_text())


def test_a_reference_that_breaks_leaves_its_place_to_another(start):
    findings, _ = start({"a-on": "crash"})
    assert findings.reference == "b on 1" and str(findings.outcome("b on 1").verdict) == "reference"
    assert outcomes(start.folder)["a on 1"][0] == "crashed"


def test_all_that_break_leave_a_report_without_a_recommendation(start):
    findings, _ = start({"a": "crash", "b": "crash"})
    assert not findings.speeds and "No config was measured" in findings.recommendation
    assert "No config was measured" in (start.folder / "report.html").read_text()


def test_one_that_trains_otherwise_is_not_recommended_however_fast(start):
    findings, _ = start({"b-on": "fast and wrong"})
    assert findings.ranking[0][0] == "b on 1"
    assert "different from step 1" in str(findings.outcome("b on 1").verdict)
    assert findings.recommendation.startswith("Take a on 1 rank")
    assert findings.front == ["a on 1"]


def test_ctrl_c_leaves_a_partial_report_and_the_same_command_goes_on(start):
    # A worker of pytest's may ignore the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            start({"b-on-1-0": "interrupt"})
    finally:
        signal.signal(signal.SIGINT, before)
    assert not is_alive((start.folder / "trials" / "b-on-1-0" / "child").read_text())
    partial = saved(start.folder)
    assert not partial["complete"] and outcomes(start.folder)["b on 1"][0] == "not run yet"
    assert partial["ranking"] == [{"name": "a on 1", "tied_with": []}]
    assert "so far: some trials have not been run" in partial["recommendation"]
    result = start.folder / "trials" / "a-on-1-0" / "result.json"
    kept = result.stat().st_mtime_ns
    findings, said = start({})
    assert said[0] == "2 of 5 trials are done; continuing with the others" and len(said) == 4
    assert findings.complete and outcomes(start.folder)["b on 1"] == ("finished", None)
    assert result.stat().st_mtime_ns == kept


def test_what_failed_is_run_again_when_that_is_asked_for(start):
    start({"b-on-1-0": "crash"})
    _, said = start({})
    assert said == []  # a crash is a result
    Results(start.folder).forget_failures()
    assert len(left_to_run(start.candidates, Results(start.folder))) == 2
    findings, _ = start({})
    assert findings.complete and outcomes(start.folder)["b on 1"] == ("finished", None)


def test_a_trial_that_says_success_without_a_result_has_crashed(tmp_path):
    place = tmp_path / "trials" / "a"
    place.mkdir(parents=True)
    (place / "output.log").write_text("bye\n")
    end = judge_end(0, False, place, sampled_peak_bytes=1)
    assert end.status == "crashed" and "bye" in end.reason


LOST_BY_LAUNCHER = (
    "[ERROR] [launch.py:259:sigkill_handler] ['python', '-m', 'codeparrot_ds.compare.trial', '--local_rank=1', '-x'] "
    "exits with return code = -9\n"
)
LOST = {"code": 4, "sentence": "rank 1 was killed by SIGKILL in forward, step 4", "hosts": [], "dump": False}
HANGS = {"code": 5, "sentence": "rank 1 hangs in data, step 4, for 31 s", "hosts": [], "dump": True}


def failure(rank, kind, error, phase="steps", step=4):
    return {
        "kind": kind, "message": f"words of rank {rank}", "type": error, "phase": phase, "step": step,
        "device_peak_bytes": None, "resident_peak_bytes": (rank + 1) * 10**9,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("code", "said", "failures", "killed", "status", "words"),
    [
        # Its peers' complaints of a lost connection do not hide the rank that ran out of memory.
        (1, "", [failure(0, "error", "RuntimeError"), failure(1, "out of memory", "RuntimeError")], False,
         "out of memory", "in step 4, at a peak of 2.0 GB: words of rank 1"),
        (4, LOST, [failure(0, "error", "RuntimeError")], True,
         "out of memory", "the system's, in step 4, at a peak of 7.0 GB in all"),
        (4, LOST, [failure(0, "error", "RuntimeError")], False, "crashed", "rank 1 was killed by SIGKILL in forward"),
        (247, LOST_BY_LAUNCHER, [failure(0, "error", "RuntimeError")], False, "crashed", "rank 1 was killed by"),
        (137, "", [], False, "crashed", "a process was killed by SIGKILL in its start phase"),
        (5, HANGS, [], False, "hung", "rank 1 hangs in data, step 4, for 31 s; every rank's Python stacks are in "),
        # What one rank found wrong the others only pass on.
        (1, "", [failure(0, "refused", "SharedError"), failure(1, "error", "ValueError", "checkpoint")], False,
         "crashed", "ValueError: words of rank 1 (in its checkpoint phase; exit code 1"),
        (2, "", [failure(0, "refused", "UserError")], False, "refused", "words of rank 0"),
        (2, "note\ncodeparrot-ds compare: error: no such file\n", [], False, "refused", "no such file"),
        (1, "OSError: 407 from https://me:pass@proxy:1/x?y\n", [], False, "crashed", "407 from https://proxy:1/x ("),
    ],
)  # fmt: skip
def test_the_end_is_told_by_what_was_written(tmp_path, code, said, failures, killed, status, words):
    """``said`` is the log, or what the trial's own launcher found wrong with its ranks."""
    (tmp_path / "output.log").write_text(said if isinstance(said, str) else "step 3: loss 9\n")
    if not isinstance(said, str):
        (tmp_path / "end.json").write_text(json.dumps({"code": said["code"], "verdict": said, "asked": False}))
    for rank, each in enumerate(failures):
        (tmp_path / f"failure-{rank}.json").write_text(json.dumps(each))
    end = judge_end(code, False, tmp_path, sampled_peak_bytes=7 * 10**9, killed_for_memory=killed)
    assert end.status == status and words in end.reason


def test_deepspeeds_launcher_says_which_process_was_killed(tmp_path):
    """The installed one: of a guard that is killed nothing else tells the rank."""
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, signal, time\nif os.environ['RANK'] == '1': os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(60)\n"
    )
    world = base64.urlsafe_b64encode(json.dumps({"localhost": [0, 1]}).encode()).decode()
    command = [sys.executable, "-m", "deepspeed.launcher.launch", f"--world_info={world}", "--master_port=29400"]
    process = subprocess.run(
        [*command, str(script)], env=os.environ | {"DS_ACCELERATOR": "cpu"}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, timeout=120, check=False,
    )  # fmt: skip
    (tmp_path / "output.log").write_text(process.stdout)
    end = judge_end(process.returncode, False, tmp_path, sampled_peak_bytes=1)
    assert end.status == "crashed" and end.reason == "rank 1 was killed by SIGKILL in its start phase", process.stdout


def test_what_a_trials_command_refuses_is_its_reason(tmp_path):
    command = [sys.executable, "-m", "codeparrot_ds.compare.trial", "--data", str(tmp_path)]
    with (tmp_path / "output.log").open("wb") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, timeout=120, check=False).returncode
    end = judge_end(code, False, tmp_path, sampled_peak_bytes=1)
    assert end.status == "refused" and end.reason.startswith("--tokenizer is missing: ")


def test_the_processes_of_a_trial_go_with_the_comparison(start, monkeypatch):
    """A comparison that is killed outright leaves no trial behind."""
    monkeypatch.setenv("FAKE_TRIALS", json.dumps({"a": "hang"}))
    pid = os.fork()
    if pid == 0:  # stands for the comparison
        try:
            trials = TrialRunner(request=start.request, folder=start.folder, hang_seconds=60, program=PROGRAM)
            compare(start.request, start.folder, start.candidates, run=trials, say=str)
        finally:
            os._exit(1)
    log = start.folder / "trials" / "a-on-1-0" / "child"
    deadline = time.monotonic() + 20
    while not (log.is_file() and log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    child = int(log.read_text())
    parent = int(Path(f"/proc/{child}/stat").read_text().rpartition(") ")[2].split()[1])
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    while is_alive(parent) and time.monotonic() < deadline:
        time.sleep(0.05)
    alive = is_alive(parent)
    os.kill(child, signal.SIGKILL)  # the trial's own children are its launcher's to end
    assert not alive


def test_a_trial_is_named_by_its_candidate(start):
    names = [Trial(candidate=each, repeat=1).name for each in start.candidates]
    assert names == ["a-on-1-1", "b-on-1-1"]
    assert Trial(candidate=start.candidates[0], repeat=0, perturbed="bf16").name == "sensitivity-bf16-a-on-1"
