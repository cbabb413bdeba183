"""Twenty forms of secrets in corpora, remotes, configs and environments: none comes out anywhere.

``benchmarks/planted_secrets.py`` does the same with a whole run, its branch and its report.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from codeparrot_ds.errors import UserError
from codeparrot_ds.secret_check import check_for_secrets
from codeparrot_ds.secret_forms import hide_secrets
from codeparrot_ds.telemetry.tracking import set_up_logging
from tests.corpus.test_build import program
from tests.planted import NAMES, SECRETS, found_in, leaks, text, url, watched_processes
from tests.story.stories import clean_environment, run_command, run_here

REPOSITORY = Path(__file__).resolve().parents[2]


def plant_corpus(folder: Path) -> list[str]:
    """Rows and checkouts with each secret in every column and in the remote; the sources."""
    rows = []
    for number, kind in enumerate(SECRETS):
        secret = text(kind)
        content = f"{program(number)}    # {secret}\n    call('{secret}')\n"
        rows.append({"content": content, "repo_name": url(kind), "path": f"{secret}/a.py", "license": secret})
        git = folder / "src" / f"repo{number}" / ".git"
        git.mkdir(parents=True)
        (git / "config").write_text(f'[core]\n\tbare = false\n[remote "origin"]\n\turl = {url(kind)}\n')
        (git.parent / "a.py").write_text(program(100 + number))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [str(folder / "rows.jsonl"), str(folder / "src")]


def corpus_rows(corpus: Path) -> list[dict]:
    return [json.loads(line) for shard in corpus.glob("*/*.jsonl") for line in shard.read_text().splitlines()]


def test_no_secret_of_a_corpus_or_a_remote_comes_out(tmp_path):
    sources = plant_corpus(tmp_path)
    command = [sys.executable, "-m", "codeparrot_ds", "corpus", *sources, "--out", str(tmp_path / "out"), "--redact"]
    with watched_processes() as processes:
        done = run_command(command, env=clean_environment())
    assert done.returncode == 0, done.stderr
    assert len(corpus_rows(tmp_path / "out")) == 2 * len(SECRETS)
    assert leaks(tmp_path / "out") == {} and processes == {} and found_in(done.stdout + done.stderr) == []
    assert {row["repo_name"] for row in corpus_rows(tmp_path / "out") if row["path"] == "a.py"} == {"owner/name"}


def test_names_of_repositories_hold_none_without_redacting(tmp_path):
    done = run_here("corpus", *plant_corpus(tmp_path), "--out", str(tmp_path / "out"), "--num-workers", "1")
    assert done.returncode == 0, done.stderr
    names = {row["repo_name"] for row in corpus_rows(tmp_path / "out")}
    assert found_in(json.dumps(sorted(names))) == []
    assert names == {"owner/name", *(f"https://host.example{port}/owner/name.git" for port in ("", ":8443"))}


@pytest.mark.parametrize("kind", SECRETS)
def test_a_secret_in_a_config_is_refused_and_not_repeated(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"data": text(kind)}))
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump({"seed": text(kind)}))
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 2}, "wandb": {"group": text(kind)}}))
    for command in (
        *(("train", "demo", "--data", url(kind)), ("train", "demo", "--config", "run.yaml", "--print-config")),
        *(("train", "demo", "--config", "wrong.yaml"), ("train", "demo", "--deepspeed", "ds.json", "--data", "x")),
        *(("check", "ds.json"), ("check", "--config", "run.yaml"), ("compare", "zero1", "--data", text(kind))),
        *(("corpus", url(kind), "--out", "new"), ("tokenizer", "--data", url(kind), "--out", "new")),
        *(("evaluate", url(kind)), ("complete", url(kind), "x"), ("humaneval", "x", "--problems", url(kind))),
        *(("runs", url(kind)), ("report", url(kind)), ("hub", "status", url(kind)), ("doctor", "--data", url(kind))),
        *(("train", "demo", "--init-from", url(kind)), ("train", "demo", "--hub", url(kind, "x.git"))),
        *(("train", "demo", url(kind)), ("data", "inspect", url(kind)), ("plan", url(kind))),
    ):
        done = run_here(*command)
        assert done.returncode == (1 if command == ("check", "ds.json") else 2), (command, done.stdout, done.stderr)
        assert found_in(done.stdout + done.stderr) == [], (command, done.stderr)
    assert {path.name for path in tmp_path.iterdir()} == {"run.yaml", "wrong.yaml", "ds.json"}


@pytest.fixture
def environment(monkeypatch):
    """Each secret as the value of a variable."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, secret in zip(NAMES, SECRETS.values(), strict=True):
        monkeypatch.setenv(name, secret)


def test_a_secret_of_the_environment_comes_out_nowhere(environment, tmp_path):
    for name, secret in zip(NAMES, SECRETS.values(), strict=True):
        with pytest.raises(UserError, match=f"here holds the value of {name}: ") as raised:
            check_for_secrets(f"seen: {secret}.", "here")
        assert found_in(str(raised.value)) == []
        assert hide_secrets(f"seen: {secret}.") == f"seen: <{name}>."
        assert str(UserError(f"cannot open {secret}/x")) == f"cannot open <{name}>/x"
    logger = logging.getLogger("codeparrot_ds")
    before = (logger.handlers, logger.propagate, logger.level)
    try:
        path = set_up_logging(tmp_path, 0)
        for secret in SECRETS.values():
            try:
                raise OSError(f"407 from proxy with {secret}")
            except OSError:
                logger.exception("could not send %s", secret)
    finally:
        logging.captureWarnings(False)
        logger.handlers, logger.propagate = before[:2]
        logger.setLevel(before[2])
    assert "Traceback" in path.read_text() and leaks(tmp_path) == {}


HIDING = "from codeparrot_ds.secret_forms import hide_secrets_in_tracebacks\nhide_secrets_in_tracebacks()\n"
FAILS = {
    "process": (HIDING, "fail()"),
    "thread": (HIDING, "threading.Thread(target=fail).start()"),
    "one of several that judge a model": (
        "from codeparrot_ds.evaluation.processes import run_task\n",
        "texts, sys.argv = sys.argv, ['', '{\"threads\": 1}']\nrun_task(fail)",
    ),
}


@pytest.mark.parametrize("where", FAILS)
def test_a_traceback_has_none(environment, where):
    kinds, (before, fails) = list(SECRETS), FAILS[where]
    script = (
        f"import sys, threading\n{before}texts = sys.argv\n"
        "def fail(task=None):\n    try:\n        raise OSError(texts[1])\n    except OSError as error:\n"
        f"        raise RuntimeError(texts[2]) from error\n{fails}"
    )
    texts = [" ".join(map(text, kinds)), "\n".join(map(url, kinds))]
    done = subprocess.run(
        [sys.executable, "-c", script, *texts], capture_output=True, text=True, env=dict(os.environ), cwd=REPOSITORY
    )
    assert done.stderr.count("Traceback (most recent call last)") == 2 and "RuntimeError: " in done.stderr
    assert found_in(done.stderr) == []
