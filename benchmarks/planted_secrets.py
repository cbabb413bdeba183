"""Plants twenty forms of secrets in a corpus, in git remotes and in the environment of whole runs, and looks for them.

python benchmarks/planted_secrets.py
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from record import REPOSITORY, record_parser, write_record

sys.path[:0] = [str(REPOSITORY)]

from tests.planted import NAMES, SECRETS, found_in, leaks, url, watched_processes  # noqa: E402
from tests.story.stories import SMALL, clean_environment  # noqa: E402
from tests.story.test_planted_secrets import plant_corpus  # noqa: E402

TRAIN = (*SMALL, "--data", "corpus", "--tokenizer", "tokenizer", "--num-lanes", "4", "--max-train-steps", "4")
TRAIN += ("--save-checkpoint-steps", "2", "--eval-prompts", "examples", "--eval-new-tokens", "8")
RUN = ("train", *TRAIN, "--run-name", "first", "--wandb", "offline", "--num-gpus", "2")
COMMANDS: dict[str, tuple[str, ...]] = {
    "corpus": ("corpus", "rows.jsonl", "src", "--out", "corpus", "--redact", "--validation-fraction", "0.2"),
    "tokenizer": ("tokenizer", "--data", "corpus", "--out", "tokenizer", "--vocab-size", "300"),
    "dry run": (*RUN, "--dry-run"),
    "a run on two ranks": RUN,
    "a run for a Hub behind a proxy": ("train", *TRAIN, "--run-name", "second", "--hub", "org/name", "--wandb", "off"),
    "evaluate": ("evaluate", "first"),
    "complete": ("complete", "first", "def f(x):"),
    "report": ("report", "first", "second", "--out", "report"),
    "publish": ("hub", "publish", "first"),
    "status": ("hub", "status", "second"),
    "runs": ("runs",),
    "a model elsewhere": ("evaluate", url("URL_PASSWORD")),
    "a corpus elsewhere": ("corpus", url("URL_TOKEN"), "--out", "other"),
}
MAY_FAIL = ("a model elsewhere", "a corpus elsewhere")


def main() -> int:
    options = record_parser(__doc__, name="planted-secrets-2-cores").parse_args()
    environment = clean_environment(**dict(zip(NAMES, SECRETS.values(), strict=True)))
    proxy = f"http://deploy:{SECRETS['URL_PASSWORD']}@127.0.0.1:9"
    environment |= {"HTTPS_PROXY": proxy, "HTTP_PROXY": proxy, "CODEPARROT_HUB_TIMEOUT_SECONDS": "5"}
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plant_corpus(folder)
        before = {path for path in folder.rglob("*") if path.is_file()}
        plant_working_directory(folder)
        for what, arguments in COMMANDS.items():
            began, command = time.monotonic(), [sys.executable, "-m", "codeparrot_ds", *arguments]
            with watched_processes() as processes:
                done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
            if what.endswith("elsewhere"):  # its own command line is the user's doing
                processes = {line: kinds for line, kinds in processes.items() if "-m codeparrot_ds" not in line}
            said = found_in(done.stdout + done.stderr)
            results.append({"command": what, "exit_code": done.returncode, "said": said, "processes": processes})
            print(f"{time.monotonic() - began:6.1f} s  {results[-1]}", flush=True)
            if done.returncode and what not in MAY_FAIL:
                raise SystemExit(done.stderr[-3000:])
        found = leaks_beside(folder, before) | objects(folder / "runs" / "hub.git")
        places = sorted({path.relative_to(folder).parts[0] for path in folder.rglob("*") if path.is_file()})
        looked_at = sum(1 for path in folder.rglob("*") if path.is_file())
    failed = bool(found) or any(result["said"] or result["processes"] for result in results)
    write_record(
        options.name,
        title="Planted secrets",
        text=report(results, found, looked_at),
        raw={"results": results, "found": found, "places": places, "files": looked_at},
        out=options.out,
    )
    return int(failed)


def plant_working_directory(folder: Path) -> None:
    """The commands' working directory is a checkout with a token in its remote and one in a change of the user's."""
    work = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@localhost"]
    for command in (
        *(
            ("init", "-q"),
            ("remote", "add", "origin", f"https://{SECRETS['URL_TOKEN']}:x-oauth-basic@host.example/o/r"),
        ),
        ("commit", "-q", "--allow-empty", "-m", "first"),
    ):
        subprocess.run([*work, *command], check=True)
    (folder / "settings.ini").write_text("[service]\n")
    subprocess.run([*work, "add", "settings.ini"], check=True)
    subprocess.run([*work, "commit", "-q", "-m", "second"], check=True)
    (folder / "settings.ini").write_text(f"[service]\npassword = {SECRETS['URL_PARAMETER']}\n")


def leaks_beside(folder: Path, planted: set[Path]) -> dict[str, list[str]]:
    """The secrets in files that were not planted."""
    own = {*map(str, planted), str(folder / "settings.ini"), str(folder / ".git" / "config")}
    return {os.path.relpath(path, folder): kinds for path, kinds in leaks(folder).items() if path not in own}


def objects(repository: Path) -> dict[str, list[str]]:
    """The secrets in the objects of the branch's repository, which its files hold compressed."""
    command = ["git", "--git-dir", str(repository), "cat-file", "--batch-all-objects", "--batch"]
    kinds = found_in(subprocess.run(command, capture_output=True, check=True).stdout)
    return {"objects of hub.git": kinds} if kinds else {}


def report(results: list[dict[str, Any]], found: dict[str, list[str]], looked_at: int) -> str:
    """The record's text."""
    rows = [
        f"| {each['command']} | {each['exit_code']} | {len(each['said'])} | {len(each['processes'])} |"
        for each in results
    ]
    leaked = "\n".join(f"- `{path}`: {', '.join(kinds)}" for path, kinds in sorted(found.items())) or "None."
    return "\n".join(
        [
            "Twenty forms of secrets, each planted three times: in every column of a row, in the remote of a checkout,",
            "and in the environment of every command; and in the working directory's own remote, in a change of it",
            "that is not committed, and in the proxy's URL. Looked for, also escaped as in a URL and in JSON, in what",
            "each command said, in the command line of every process (read every 20 ms), and at the end in every file",
            f"that was written ({looked_at} with the planted ones) and in every object of the branch's repository.",
            "",
            "| command | exit code | secrets said | command lines with one |",
            "|---|---|---|---|",
            *rows,
            "",
            "In files and objects:",
            "",
            leaked,
            "",
            "Configs, log records, tracebacks and refused options are in `tests/story/test_planted_secrets.py`.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
