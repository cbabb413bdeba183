"""The worker against a Hub that fails: nothing lost, nothing twice, in order; what only the user can mend is said."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from codeparrot_ds.errors import UserError
from codeparrot_ds.hub.commands import hub_publish, hub_push, hub_status, prepare_branch, settle
from codeparrot_ds.hub.queue import PushQueue, file_sha256
from codeparrot_ds.hub.worker import drain, read_destination, start_drain
from codeparrot_ds.retry import Pauses, UnavailableError
from tests.hub.model_hub import READER, TOKEN, Fault, ModelHub
from tests.hub.pushing import REPO, branch_problems, chaos, enqueue, make_run

NAME = "brave-fox-1"


@pytest.fixture
def run(hub, tmp_path):
    return make_run(tmp_path / "runs", NAME)


def quick(patience: float = 60) -> Pauses:
    return Pauses(patience, first_seconds=0.01, longest_seconds=0.1)


def push(run: Path, **options):
    return drain(PushQueue(run), read_destination(run), **{"pauses": quick(), **options})


def check_branch(hub: ModelHub, run: Path, *steps: int) -> None:
    assert branch_problems(hub, run, steps) == []


def test_pushes_in_order_and_says_what_waits(hub, run):
    enqueue(run, 500, 1000)
    assert "waiting  2" in hub_status(run) and f"codeparrot-ds hub push {run}" in hub_status(run)
    assert f"pushed step 1000 to branch {NAME} of {hub.endpoint}/{REPO}" in hub_push(run)
    check_branch(hub, run, 500, 1000)
    assert "waiting  0" in hub_status(run) and "up to date" in hub_push(run)


def test_every_checkpoint_arrives_once_through_faults_in_half_of_the_requests(hub, run, monkeypatch):
    monkeypatch.setenv("CODEPARROT_HUB_TIMEOUT_SECONDS", "1")
    steps = range(10, 60, 10)
    hub.inject = chaos(1, 0.5, 0, seconds=1.2)
    for step in steps:
        enqueue(run, step)
        push(run, pauses=quick(patience=300))
    hub.inject = lambda request: None
    assert sum(row.fault is not None for row in hub.log) > len(hub.log) / 4
    check_branch(hub, run, *steps)


def test_a_lost_answer_and_a_lost_record_are_recognised_by_the_head(hub, run):
    enqueue(run, 500, 1000)
    hub.faults = [Fault("lost", 2, matching="POST /api/models/org/model/commit")]
    result = push(run)
    assert len(result.pushed) == 2 and hub.faults[0].requests == 0
    check_branch(hub, run, 500, 1000)
    (run / "hub" / "pushed.jsonl").unlink()  # killed between the commit and its record
    enqueue(run, 1000)
    push(run)
    assert len(hub.commits(REPO, NAME)) == 3
    assert [row.step for row in PushQueue(run).pushed()] == [1000]


def test_a_rate_limit_is_waited_for(hub, run):
    enqueue(run, 500)
    hub.faults = [Fault("status", 1, status=429, headers={"Retry-After": "1"}, matching="/refs")]
    started, said = time.monotonic(), []
    push(run, say=said.append)
    assert time.monotonic() - started >= 1 and "answer 429" in said[0]
    check_branch(hub, run, 500)


def test_pauses_grow_with_failures_of_one_request_and_end_with_patience():
    pauses = Pauses(1000, first_seconds=1, longest_seconds=8)
    for low, high in ((0.5, 1), (1, 2), (2, 4), (4, 8), (4, 8)):
        assert low <= pauses.next(UnavailableError("x", request="GET /refs")) <= high
    assert pauses.next(UnavailableError("x", request="POST /commit")) <= 1
    assert pauses.next(UnavailableError("x", retry_after=70, request="POST /commit")) == 70
    assert pauses.next(UnavailableError("x", retry_after=2000)) is None
    assert len({Pauses(9).next(UnavailableError("x")) for _ in range(9)}) > 1


def test_an_outage_leaves_the_queue_and_a_later_push_finishes_it(hub, run):
    enqueue(run, 500, 1000)
    hub.faults = [Fault("status")]
    with pytest.raises(UnavailableError, match="answer 503"):
        push(run, pauses=quick(0.2))
    status = hub_status(run)
    assert "waiting  2" in status and "the last attempt failed" in status and "answer 503" in status
    hub.faults = []
    hub_push(run)
    check_branch(hub, run, 500, 1000)
    assert PushQueue(run).problem() is None


@pytest.mark.parametrize(
    ("token", "words"),
    [
        (READER, "right to write"),
        ("hf_" + "w" * 34, "does not accept the token"),
        (None, "wants a token: set HF_TOKEN"),
    ],
)
def test_what_the_user_must_mend_ends_the_worker_at_once(hub, run, monkeypatch, token, words):
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    enqueue(run, 500)
    with pytest.raises(UserError, match=words):
        hub_push(run)
    assert words in hub_status(run)
    with pytest.raises(UserError, match=rf"1 checkpoint\(s\) still wait.*step 500.*{words}.*hub push"):
        settle(run, wait_seconds=30)
    with pytest.raises(UserError, match=words.replace("wants a token: set HF_TOKEN", "HF_TOKEN is not set")):
        prepare_branch(REPO, run.parent, "new-run-2")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub_push(run)
    check_branch(hub, run, 500)


def test_the_end_of_a_run_says_what_is_left_and_a_worker_goes_on(hub, run):
    enqueue(run, 500)
    hub.faults = [Fault("status", status=502)]
    said = settle(run, wait_seconds=2.5)
    assert "1 checkpoint(s) still wait to be pushed" in said and "a process is still pushing them" in said
    assert "a worker is at it" in hub_status(run)
    began = time.monotonic()
    assert "1 checkpoint(s) still wait" in settle(run, wait_seconds=60, stopped=lambda: True)  # nobody waits for it
    assert time.monotonic() - began < 20
    hub.faults = []
    assert settle(run, wait_seconds=30) == f"branch {NAME} of {hub.endpoint}/{REPO} has every checkpoint"
    check_branch(hub, run, 500)


def test_a_branch_of_another_run_is_left_alone(hub, run, tmp_path):
    enqueue(run, 500)
    push(run)
    other = make_run(tmp_path / "elsewhere", NAME, run_id="another-id")
    enqueue(other, 20)
    with pytest.raises(UserError, match="another run with that name.*Step 500.*choose another --run-name"):
        push(other)
    with pytest.raises(UserError, match="another run with that name"):
        prepare_branch(REPO, tmp_path / "third", NAME)
    assert prepare_branch(REPO, run.parent, NAME) is None  # the run itself goes on
    check_branch(hub, run, 500)


def test_a_start_makes_the_branch_and_does_not_wait_for_an_outage(hub, tmp_path):
    assert prepare_branch(REPO, tmp_path, "new-run-1") is None
    assert [ref.split("\t")[1] for ref in hub.text(REPO, "show-ref").replace(" ", "\t").splitlines()] == [
        "refs/heads/main",
        "refs/heads/new-run-1",
    ]
    hub.faults = [Fault("status", status=503)]
    assert "answer 503" in str(prepare_branch(REPO, tmp_path, "new-run-2"))


def test_someone_elses_commit_on_the_branch_stays_in_its_history(hub, run):
    enqueue(run, 500)
    push(run)
    hub.write_commit(REPO, NAME, hub.find(REPO, NAME), "By hand", [("NOTES", b"x")], [])
    enqueue(run, 1000)
    push(run)
    titles = [commit["title"].split(":")[0] for commit in hub.commits(REPO, NAME)]
    assert titles == ["Step 1000", "By hand", "Step 500", "initial commit"]


def test_damage_after_queuing_is_refused_by_hash(hub, run):
    enqueue(run, 500, 1000)
    entry = PushQueue(run).pending()[0]
    weights = entry.files / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[7] ^= 1
    weights.unlink()
    weights.write_bytes(content)
    with pytest.raises(UserError, match="pushed 1 .*model.safetensors changed after it was queued"):
        hub_push(run)
    check_branch(hub, run, 1000)
    assert "refused  1" in hub_status(run)
    with pytest.raises(UserError, match="model.safetensors changed"):
        settle(run, wait_seconds=5)


def test_sigkill_of_the_worker_at_any_moment(hub, run, monkeypatch):
    """It dies before, in and after requests; the next one finishes. More of this in benchmarks/hub_faults.py."""
    steps = range(1, 9)
    enqueue(run, *steps)
    draw = random.Random(5)
    for _ in range(4):
        seen = len(hub.log)
        process = start_drain(run)
        until = seen + draw.randrange(1, 12)
        while len(hub.log) < until and process.poll() is None:
            time.sleep(0.001)
        time.sleep(draw.random() / 50)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    hub_push(run)
    check_branch(hub, run, *steps)


def test_publish_shows_last_or_best_with_a_tag(hub, run):
    enqueue(run, 500, eval_loss=2.5)
    enqueue(run, 1000, eval_loss=3.5)
    hub.inject = chaos(3, 0.3, 0)
    said = hub_publish(run, pauses=quick())
    hub.inject = lambda request: None
    assert f"is now {NAME} at step 1000" in said and f"tag {NAME}-step-1000" in said
    hub_publish(run, checkpoint="best", tag="v1")
    assert hub.commits(REPO, "main")[0]["title"] == f"Publish {NAME}: Step 500: loss 3.21"
    assert hub.content(REPO, "v1", "README.md").endswith(b"# Step 500\n")
    assert hub.content(REPO, "main", "README.md").endswith(b"# Step 500\n")
    assert len(hub.commits(REPO, "main")) == 3
    with pytest.raises(UserError, match="tag 'v1' names commit"):
        hub_publish(run, tag="v1")
    hub.write_commit(REPO, "main", hub.find(REPO, "main"), "By hand", [("NOTES", b"x")], [])
    with pytest.raises(UserError, match="'main' moved on by commit .*By hand.*--overwrite"):
        hub_publish(run, tag="v2")
    hub_publish(run, tag="v2", overwrite=True)


def test_the_queue_is_bounded_and_says_what_it_drops(run):
    size = 2000
    enqueue(run, 1, eval_loss=1.0)
    enqueue(run, 2, 3, 4, eval_loss=2.0)
    for step in (1, 2, 3, 4):  # retention has removed the checkpoints
        (run / "checkpoints" / f"step-{step:08d}").rename(run / f"gone-{step}")
        for path in (run / f"gone-{step}" / "export").iterdir():
            path.unlink()
    export = run / "checkpoints" / "step-00000005" / "export"
    export.mkdir(parents=True)
    (export / "model.safetensors").write_bytes(bytes(size))
    dropped = PushQueue(run).enqueue(5, export, "Step 5", max_bytes=2.5 * size, eval_loss=2.0)
    # The best and the newest stay, and 5 takes nothing as long as its checkpoint has it.
    assert [drop.step for drop in dropped] == [2, 3]
    assert [entry.step for entry in PushQueue(run).pending()] == [1, 4, 5]
    assert "the queue may keep" in hub_status(run) and "step 2" in hub_status(run)
    assert PushQueue(run).enqueue(5, export, "Step 5") == []


def test_an_export_that_is_dropped_while_it_is_pushed_holds_nothing_up(hub, run):
    enqueue(run, 1, 2)
    first = PushQueue(run).pending()[0]

    def drop(request: str) -> None:
        if "preupload" in request and first.path.exists():
            PushQueue(run).remove(first.path)

    hub.inject = drop
    push(run)
    check_branch(hub, run, 2)


def test_an_export_with_a_secret_is_not_queued(run, monkeypatch):
    export = run / "checkpoints" / "step-00000500" / "export"
    export.mkdir(parents=True)
    for text, words in (
        (f"token {TOKEN}", "the value of HF_TOKEN"),
        ("hf_" + "q" * 34, "hugging face token"),
        ("ghp_" + "q" * 36, "github token"),
    ):
        (export / "README.md").write_text(text)
        with pytest.raises(UserError, match=f"README.md holds .*{words}") as raised:
            PushQueue(run).enqueue(500, export, "Step 500")
        assert text not in str(raised.value)
    assert PushQueue(run).pending() == []


def test_a_large_export_takes_little_memory(hub, run):
    """Of a sparse file of 300 MB; benchmarks/hub_faults.py does it with 3 GB."""
    export = run / "checkpoints" / "step-00000500" / "export"
    export.mkdir(parents=True)
    with open(export / "model.safetensors", "wb") as file:
        file.truncate(300_000_000)
    PushQueue(run).enqueue(500, export, "Step 500: loss 3.21")
    code = "import re, sys; from codeparrot_ds.hub import worker; code = worker.main(sys.argv[1:]);"
    code += "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]); sys.exit(code)"
    done = subprocess.run([sys.executable, "-c", code, str(run)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.splitlines()[-1]) < 200_000  # KiB, Python and the client among them
    assert (hub.root / "lfs" / file_sha256(export / "model.safetensors")).stat().st_size == 300_000_000
