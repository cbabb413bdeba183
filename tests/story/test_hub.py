"""A run of two ranks that pushes to a Hub with the real client, and what does not get out on the way."""

from __future__ import annotations

import json
import subprocess
import threading
from pathlib import Path

import psutil
import pytest

from codeparrot_ds.config.files import load_config
from codeparrot_ds.evaluation.completions import CompleteSettings, run_complete
from codeparrot_ds.evaluation.perplexity import evaluate_model
from tests.hub.model_hub import TOKEN, running_hub
from tests.story.stories import clean_environment, evaluations, train_in_turn

WANDB_KEY = "0123456789abcdef" * 2 + "deadbeef"
REPO = "org/code-model"


class Watcher(threading.Thread):
    """Looks at the arguments of all processes for a secret, as long as it runs."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.end, self.found, self.workers = threading.Event(), set(), set()

    def run(self) -> None:
        while not self.end.wait(0.05):
            for process in psutil.process_iter(["cmdline"]):
                line = " ".join(process.info["cmdline"] or [])
                if TOKEN in line or WANDB_KEY in line:
                    self.found.add(line)
                if "codeparrot_ds.hub.worker" in line:
                    self.workers.add(process.pid)


@pytest.fixture(scope="module")
def pushed(workshop, tmp_path_factory):
    """A run that pushed to a Hub; its folder, the Hub, the environment, and who watched the processes."""
    base = tmp_path_factory.mktemp("hub-story")
    with running_hub(base / "hub") as hub:
        environment = clean_environment(
            HF_ENDPOINT=hub.endpoint,
            HF_TOKEN=TOKEN,
            WANDB_API_KEY=WANDB_KEY,
            WANDB_MODE="offline",
            HF_HOME=str(base / "hf-home"),
        )
        del environment["HF_HUB_DISABLE_XET"]  # of the tests: a user's uploads take LFS without it
        watcher = Watcher()
        watcher.start()
        arguments = ("--hub", REPO, "--run-name", "brave-otter-1", "--wandb", "auto", "--num-gpus", "2")
        steps = ("--max-train-steps", "8", "--save-checkpoint-steps", "4")
        process = workshop.train(*arguments, *steps, output_dir=base / "runs", env=environment)
        watcher.end.set()
        watcher.join()
        assert process.returncode == 0, process.stderr[-3000:]
        yield base / "runs" / "brave-otter-1", hub, environment, watcher, process


def test_every_checkpoint_is_a_commit_and_its_download_has_the_logged_loss(workshop, pushed, tmp_path):
    from huggingface_hub import snapshot_download

    run, hub, _, _, process = pushed
    assert f"branch {run.name} of {hub.endpoint}/{REPO} has every checkpoint" in process.stderr + process.stdout
    commits = hub.commits(REPO, run.name)
    logged = evaluations(run)
    titles = [commit["title"] for commit in reversed(commits)]
    assert titles[0] == "initial commit" and [title.split(":")[0] for title in titles[1:]] == ["Step 4", "Step 8"]
    assert titles[-1].startswith(f"Step 8: loss {logged[8]:.4f}, perplexity")
    files = hub.files(REPO, commits[0]["id"])
    assert set(files) == {
        ".gitattributes", "README.md", "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json", "training_state.json",
    }  # fmt: skip
    for step, revision in ((4, commits[1]["id"]), (8, run.name)):
        folder = snapshot_download(
            REPO, revision=revision, endpoint=hub.endpoint, token=TOKEN, cache_dir=tmp_path / "cache"
        )
        state = json.loads((Path(folder) / "training_state.json").read_text())
        assert (state["step"], state["evaluation"]["eval_loss"]) == (step, pytest.approx(logged[step]))
        loss = evaluate_model(folder, data=workshop.corpus, device="cpu")["loss"]
        assert loss == pytest.approx(logged[step], rel=1e-3)


def test_other_runs_begin_with_its_weights_whole_and_partitioned(workshop, pushed, monkeypatch, tmp_path):
    """The first evaluation of a run that begins with a branch's weights is the last one of that branch's run."""
    run, hub, environment, _, _ = pushed
    for name in ("HF_ENDPOINT", "HF_TOKEN", "HF_HOME"):
        monkeypatch.setenv(name, environment[name])
    steps = ("--max-train-steps", "1", "--init-from", f"{REPO}@{run.name}")
    outcomes = train_in_turn(
        [
            workshop.options("--run-name", name, "--deepspeed", name, *steps, output_dir=tmp_path)
            for name in ("zero2", "zero3")
        ],
        ranks=2,
    )
    logged, commit = evaluations(run)[8], hub.find(REPO, run.name)
    for outcome in outcomes:
        begun = Path(outcome["run"])
        assert evaluations(begun)[0] == pytest.approx(logged, rel=1e-3)
        assert load_config(begun / "config.yaml").init_from == f"{REPO}@{commit}"


def test_evaluate_and_complete_take_a_branch(workshop, pushed, monkeypatch, tmp_path, capsys):
    run, hub, environment, _, _ = pushed
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    result = evaluate_model(f"{REPO}@{run.name}", data=workshop.corpus, device="cpu")
    assert result["loss"] == pytest.approx(evaluations(run)[8], rel=1e-3)
    settings = CompleteSettings(max_length=24, num_completions=1)
    run_complete(f"{REPO}@{run.name}", ["def f(x):"], settings=settings, device="cpu")
    assert capsys.readouterr().out.startswith("def f(x):")


def test_no_token_gets_into_a_file_an_argument_or_a_commit(pushed):
    run, hub, environment, watcher, process = pushed
    assert watcher.workers and not watcher.found
    assert list((run / "wandb").glob("offline-run-*")) and (run / "hub" / "push.log").stat().st_size
    secrets = [TOKEN.encode(), WANDB_KEY.encode()]
    said = (process.stdout + process.stderr).encode()
    places = [path for folder in (run.parent, hub.root) for path in folder.rglob("*") if path.is_file()]
    assert len(places) > 30
    for place, content in [("console", said), *((path, path.read_bytes()) for path in places)]:
        assert not any(secret in content for secret in secrets), place
    for repository in (hub.root / "models").glob("*/*.git"):  # its objects are compressed
        history = subprocess.run(
            ["git", f"--git-dir={repository}", "log", "--all", "-p", "--text"], capture_output=True, check=True
        ).stdout
        assert b"Step 8" in history and not any(secret in history for secret in secrets)
