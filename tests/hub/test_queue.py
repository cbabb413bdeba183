"""The push queue, drained into a real repository, with the crashes it must survive."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from codeparrot_ds.errors import UserError
from codeparrot_ds.hub import commands
from codeparrot_ds.hub.commands import hub_publish, hub_push, hub_status
from codeparrot_ds.hub.local_git import LocalRepository
from codeparrot_ds.hub.queue import PushQueue, file_sha256
from codeparrot_ds.hub.worker import NICENESS, drain, read_destination, start_drain
from tests.hub.pushing import read_file

NAME = "brave-fox-1"


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "runs" / NAME
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"name": NAME, "hub": "local", "id": f"{NAME}-abc"}))
    return folder


@pytest.fixture
def repository(run):
    return LocalRepository(run.parent / "hub.git")


def make_export(run: Path, step: int, content: str = "") -> Path:
    folder = run / "checkpoints" / f"step-{step:08d}" / "export"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_text(f"weights {step} {content}")
    (folder / "config.json").write_text("{}")
    return folder


def enqueue(run: Path, *steps: int) -> PushQueue:
    queue = PushQueue(run)
    for step in steps:
        queue.enqueue(step, make_export(run, step), f"step {step}: loss 3.21", f"tokens: {step * 1000}")
    return queue


def titles(repository: LocalRepository) -> list[str]:
    return [commit.title for commit in reversed(repository.commits(NAME))][1:]


def test_entries_are_pushed_in_order_and_once(run, repository):
    queue = enqueue(run, 500, 1000, 20)
    assert [entry.step for entry in queue.pending()] == [500, 1000, 20]  # as they came
    result = drain(queue, read_destination(run))
    assert [push.step for push in result.pushed] == [500, 1000, 20]
    assert titles(repository) == [f"step {step}: loss 3.21" for step in (500, 1000, 20)]
    assert queue.pending() == [] and [push.step for push in queue.pushed()] == [500, 1000, 20]
    assert list((run / "hub" / "queue").iterdir()) == []
    head = repository.commits(NAME)[0]
    assert (head.trailer("Run"), head.trailer("Step"), head.trailer("tokens")) == (NAME, "20", "20000")
    assert drain(queue, read_destination(run)).pushed == []
    enqueue(run, 500)  # a resumed run may offer a checkpoint again
    assert queue.pending() == [] and len(titles(repository)) == 3


def test_the_queue_takes_no_space_and_outlives_the_checkpoint(run, repository):
    queue = enqueue(run, 500)
    (entry,) = queue.pending()
    export = run / "checkpoints" / "step-00000500" / "export"
    assert (entry.files / "model.safetensors").stat().st_ino == (export / "model.safetensors").stat().st_ino
    shutil.rmtree(run / "checkpoints")
    drain(queue, read_destination(run))
    assert read_file(repository, NAME, "model.safetensors") == b"weights 500 "


def test_files_are_copied_where_links_cannot_be_made(run, monkeypatch):
    def refuse(source, target):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    (entry,) = enqueue(run, 500).pending()
    assert (entry.files / "model.safetensors").read_text() == "weights 500 "


def test_known_hashes_are_taken_over(run):
    export = make_export(run, 500)
    PushQueue(run).enqueue(500, export, "t", sha256={"model.safetensors": file_sha256(export / "model.safetensors")})
    PushQueue(run).enqueue(500, export, "t")  # the same contents, hashed here
    assert len(PushQueue(run).pending()) == 1


def test_a_step_reached_again_with_other_weights_is_a_second_commit(run, repository):
    queue = enqueue(run, 500)
    shutil.rmtree(run / "checkpoints")
    queue.enqueue(500, make_export(run, 500, "again"), "step 500 again")
    assert len(queue.pending()) == 2
    drain(queue, read_destination(run))
    assert titles(repository) == ["step 500: loss 3.21", "step 500 again"]


def test_a_push_whose_record_was_lost_is_not_repeated(run, repository):
    """The process died between the commit and the record, or the answer never came: entry and commit both exist."""
    queue = enqueue(run, 500, 1000)
    shutil.copytree(run / "hub" / "queue", run / "hub" / "saved")
    drain(queue, read_destination(run))
    pushed = queue.pushed()
    for lost in (1, 2):  # the last record, then all of them
        (run / "hub" / "pushed.jsonl").write_text(
            "".join(json.dumps(vars(push)) + "\n" for push in pushed[: len(pushed) - lost])
        )
        shutil.rmtree(run / "hub" / "queue")
        shutil.copytree(run / "hub" / "saved", run / "hub" / "queue")
        drain(queue, read_destination(run))
        assert len(titles(repository)) == 2
        assert [push.commit for push in queue.pushed()] == [push.commit for push in pushed]
        assert queue.pending() == []


def test_a_kill_at_any_moment_leaves_a_queue_that_the_next_drain_finishes(run, repository):
    steps = range(1, 31)
    enqueue(run, *steps)
    for kill in range(6):
        done = len(PushQueue(run).pushed())
        process = start_drain(run)
        while len(PushQueue(run).pushed()) == done and process.poll() is None:
            time.sleep(0.002)
        time.sleep(0.01 * kill)  # each time at another point of the next push
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert done < len(PushQueue(run).pushed()) < len(steps)
    hub_push(run)
    assert titles(repository) == [f"step {step}: loss 3.21" for step in steps]
    assert [push.step for push in PushQueue(run).pushed()] == list(steps)
    assert PushQueue(run).refused() == []


def test_a_damaged_entry_is_refused_by_name_and_the_others_go_on(run, repository):
    queue = enqueue(run, 1, 2, 3, 4)
    entries = {entry.step: entry for entry in queue.pending()}
    weights = entries[2].files / "model.safetensors"
    weights.unlink()
    weights.write_text("weightz 2 ")
    (entries[3].path / "entry.json").write_text('{"step": 3')
    assert [entry.step for entry in queue.pending()] == [1, 2, 4]
    damage = r"pushed 2.*000002-step-00000002: model.safetensors changed.*000003-step-00000003: entry.json"
    with pytest.raises(UserError, match=damage):
        hub_push(run)
    assert titles(repository) == ["step 1: loss 3.21", "step 4: loss 3.21"]
    assert len(queue.refused()) == 2 and queue.pending() == []
    assert (run / "hub" / "refused" / "000002-step-00000002" / "files" / "model.safetensors").exists()
    assert "refused  2" in hub_status(run)
    enqueue(run, 2)  # offered again whole, it goes through
    hub_push(run)
    assert titles(repository)[-1] == "step 2: loss 3.21"


def test_a_half_written_entry_is_invisible_and_replaced(run):
    staging = run / "hub" / "queue" / ".staging-00000500" / "files"
    staging.mkdir(parents=True)
    (staging / "old").write_text("half")
    queue = PushQueue(run)
    assert queue.pending() == []
    (entry,) = enqueue(run, 500).pending()
    assert sorted(path.name for path in entry.files.iterdir()) == ["config.json", "model.safetensors"]


def test_two_drains_at_once_push_everything_once(run, repository):
    enqueue(run, *range(1, 9))
    drains = [start_drain(run) for _ in range(3)]
    assert [drain.wait(timeout=60) for drain in drains] == [0, 0, 0]
    assert titles(repository) == [f"step {step}: loss 3.21" for step in range(1, 9)]


def test_the_draining_process_imports_no_torch_and_logs(run, repository):
    enqueue(run, 500)
    probe = (
        "import sys; from codeparrot_ds.hub.worker import main; code = main(sys.argv[1:]);"
        "heavy = {'torch', 'transformers', 'deepspeed', 'numpy'} & set(sys.modules); sys.exit(code or len(heavy))"
    )
    group = Path("/proc/self/autogroup")  # absent where the kernel does not weigh sessions
    before = group.read_text() if group.exists() else None
    assert subprocess.run([sys.executable, "-c", probe, str(run)], check=False).returncode == 0
    assert before is None or group.read_text() == before  # this session is nobody's to slow down
    enqueue(run, 1000)
    assert start_drain(run).wait(timeout=60) == 0
    assert "pushed step 1000 to branch brave-fox-1" in (run / "hub" / "push.log").read_text()
    (repository.path / "HEAD").unlink()
    enqueue(run, 1500)
    assert start_drain(run).wait(timeout=60) == UserError.exit_code
    assert "error:" in (run / "hub" / "push.log").read_text()
    assert [entry.step for entry in PushQueue(run).pending()] == [1500]


def test_status_and_publish_tell_what_is_where(run, repository):
    enqueue(run, 500, 1000)
    assert "waiting  2" in hub_status(run) and "codeparrot-ds hub push" in hub_status(run)
    said = hub_publish(run)
    assert "pushed step 500" in said and "at step 1000 (step 1000: loss 3.21)" in said
    assert read_file(repository, "main", "model.safetensors") == b"weights 1000 "
    assert "pushed   2" in hub_status(run) and "waiting  0" in hub_status(run)
    assert "up to date" in hub_push(run)


def test_a_background_worker_lets_training_go_first(run, repository):
    queue = enqueue(run, 500)
    with queue.lock():  # the worker waits for it, so that it can be looked at
        worker = start_drain(run)
        process, deadline = psutil.Process(worker.pid), time.monotonic() + 60
        while process.nice() != min(19, os.nice(0) + NICENESS):
            assert worker.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        # Where the kernel weighs sessions, the worker's own weighs as little. The file is absent elsewhere.
        group = Path(f"/proc/{worker.pid}/autogroup")
        while group.exists() and group.read_text().split()[-1] != "10":
            assert worker.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
    assert worker.wait(timeout=60) == 0 and titles(repository) == ["step 500: loss 3.21"]


def test_a_worker_that_is_killed_at_the_end_of_a_run_is_started_again(run, monkeypatch):
    started = []

    def killed(run_dir):
        started.append(start_drain(run_dir))
        if len(started) <= most:
            started[-1].kill()
        return started[-1]

    monkeypatch.setattr(commands, "start_drain", killed)
    enqueue(run, 500)
    most = 3
    assert "1 checkpoint(s) still wait" in commands.settle(run, wait_seconds=60) and len(started) == 3
    started.clear()
    most = 1
    assert commands.settle(run, wait_seconds=60).endswith("has every checkpoint") and len(started) == 2


def test_runs_without_anything_to_push_say_so(run, tmp_path):
    with pytest.raises(UserError, match="no checkpoint yet"):
        hub_publish(run)
    with pytest.raises(UserError, match="no run.json"):
        hub_status(tmp_path)
    (run / "run.json").write_text(json.dumps({"name": NAME, "hub": "off"}))
    with pytest.raises(UserError, match="hub off"):
        hub_push(run)
    (run / "run.json").write_text("[]")
    with pytest.raises(UserError, match=r"run\.json is damaged: it holds no JSON object"):
        hub_push(run)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no files to push"):
        PushQueue(run).enqueue(1, tmp_path / "empty", "t")


OFFLINE = """
import json, sys, time
from pathlib import Path
from codeparrot_ds.hub.commands import hub_publish, hub_status, prepare_branch, settle
from codeparrot_ds.hub.queue import PushQueue
runs, name, export = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
def timed(call):
    started = time.monotonic()
    call()
    spent.append(time.monotonic() - started)
spent = []
timed(lambda: prepare_branch("local", runs, name))
for step in (1, 2):
    timed(lambda: PushQueue(runs / name).enqueue(step, export, f"Step {step}", f"{step}"))
    timed(lambda: settle(runs / name, wait_seconds=60))
timed(lambda: hub_status(runs / name))
timed(lambda: hub_publish(runs / name))
print(json.dumps(spent), PushQueue(runs / name).dropped())
"""


def test_the_local_place_needs_no_network(run, repository, tmp_path):
    """In a network namespace with no interface up: all that a run does with its branch, with no delay of a second."""
    probe = ["unshare", "--net", "--map-root-user"]
    if subprocess.run([*probe, "true"], capture_output=True, check=False).returncode:
        assert not os.environ.get("CI"), "CI must be able to make a network namespace"
        pytest.skip("no network namespace can be made here")
    connect = "import socket; socket.create_connection(('192.0.2.1', 80))"
    unreachable = subprocess.run([*probe, sys.executable, "-c", connect], capture_output=True, text=True, check=False)
    assert "unreachable" in unreachable.stderr
    export = make_export(run, 1)
    fresh = shutil.copytree(run.parent, tmp_path / "fresh")
    delays = []
    while not delays or delays[-1] >= 1 and len(delays) < 4:  # a busy machine delays once, a missing network always
        spent = []
        for prefix, runs in ((probe, run.parent), ([], tmp_path / "with-network")):
            shutil.rmtree(runs, ignore_errors=True)
            shutil.copytree(fresh, runs)
            command = [*prefix, sys.executable, "-c", OFFLINE, str(runs), NAME, str(export)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            spent.append(json.loads(done.stdout.split("]")[0] + "]"))
        delays.append(max(without - usual for without, usual in zip(*spent, strict=True)))
    assert delays[-1] < 1, delays
    assert read_file(repository, "main", "config.json") == b"{}"
    assert [commit.title for commit in repository.commits(NAME)][:2] == ["Step 2", "Step 1"]


def test_a_full_disk_leaves_the_queue_as_it_was(run, monkeypatch):
    queue = enqueue(run, 500)

    def full(path, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("codeparrot_ds.durable.write_json", full)
    with pytest.raises(UserError, match="step 1000 was not queued: No space left"):
        enqueue(run, 1000)
    assert [entry.step for entry in queue.pending()] == [500]
    assert [path.name for path in (run / "hub" / "queue").iterdir()] == ["000001-step-00000500"]
