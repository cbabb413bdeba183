"""Secrets in twenty forms to plant, put together here so that no scanner takes this file for a leak, and who looks."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

A = "aB3dE5fG7h"
HEX = "0f1e2d3c4b"
SECRETS = {
    "AWS_KEY": "AKIA" + "ABCD1234" * 2,
    "GITHUB_TOKEN": "ghp_" + (A * 4)[:36],
    "GITHUB_TOKEN 2": "github_pat_" + (A * 9)[:82],
    "GITLAB_TOKEN": "glpat-" + A * 2,
    "GOOGLE_KEY": "AIza" + (A * 4)[:35],
    "SLACK_TOKEN": "xoxb-" + "123456789012-" + A * 2,
    "STRIPE_KEY": "sk_live_" + (A * 3)[:24],
    "HUGGING_FACE_TOKEN": "hf_" + (A * 4)[:34],
    "OPENAI_KEY": "sk-proj-" + A * 6,
    "ANTHROPIC_KEY": "sk-ant-api03-" + A * 9,
    "NPM_TOKEN": "npm_" + (A * 4)[:36],
    "PYPI_TOKEN": "pypi-AgE" + A * 6,
    "DOCKER_TOKEN": "dckr_pat_" + (A * 3)[:27],
    "SENDGRID_KEY": "SG." + (A * 3)[:22] + "." + (A * 5)[:43],
    "DIGITALOCEAN_TOKEN": "dop_v1_" + (HEX * 7)[:64],
    "JWT": "eyJ" + A * 2 + ".eyJ" + A * 3 + "." + A * 4,
    "DATABRICKS_TOKEN": "dapi" + (HEX * 4)[:32],
    # Of no form of their own: seen by where they stand.
    "URL_PASSWORD": "correct-horse!battery",
    "URL_TOKEN": (HEX * 4) + "77",
    "URL_PARAMETER": "9d5f" + HEX * 3,
}
"""By kind; the last three are secrets in a URL alone."""
NAMES = [
    *("HF_TOKEN", "WANDB_API_KEY", "DB_PASS", "GCP_CREDENTIALS", "DEPLOY_TOKENS", "MY_SECRET", "ADMIN_PASSWORD"),
    *("ROOT_PASSWD", "SMTP_PWD", "GITHUB_PAT", "REGISTRY_AUTH", "API_KEYS", "CLIENT_SECRETS", "GPG_PASSPHRASE"),
    *("DB_CREDENTIAL", "TOKEN_2", "service_pass", "NPM_TOKEN", "AWS_SECRET_ACCESS_KEY", "CI_JOB_TOKEN"),
]
"""Of environment variables that hold secrets."""


def url(kind: str, path: str = "owner/name.git") -> str:
    """A git remote with the secret of this kind in it, where git and people put one."""
    secret, number = SECRETS[kind], list(SECRETS).index(kind)
    if kind in ("URL_PASSWORD", "URL_TOKEN", "URL_PARAMETER"):
        number = ("URL_PASSWORD", "URL_TOKEN", "URL_PARAMETER").index(kind)
    return (
        f"https://oauth2:{secret}@host.example/{path}",
        f"https://{secret}@host.example:8443/{path}",
        f"https://host.example/{path}?ref=main&access_token={secret}",
    )[number % 3]


def text(kind: str) -> str:
    """The secret as a text would have it."""
    return url(kind) if kind.startswith("URL_") else SECRETS[kind]


def found_in(content: str | bytes) -> list[str]:
    """The kinds of the secrets that something holds, also escaped for a URL."""
    data = content.encode() if isinstance(content, str) else content
    forms = {kind: (secret, quote(secret, safe=""), json.dumps(secret)[1:-1]) for kind, secret in SECRETS.items()}
    return [kind for kind, each in forms.items() if any(form.encode() in data for form in each)]


def leaks(folder: Path) -> dict[str, list[str]]:
    """The secrets in the files below a folder and in their names, by file."""
    found = {str(path): found_in(str(path)) for path in folder.rglob("*")}
    for path in folder.rglob("*"):
        if path.is_file():
            found[str(path)] += found_in(path.read_bytes())
    return {path: kinds for path, kinds in found.items() if kinds}


@contextlib.contextmanager
def watched_processes() -> Iterator[dict[str, list[str]]]:
    """Within, reads the command line of every process again and again; the secrets in them, by command line."""
    found: dict[str, list[str]] = {}
    done, seen = threading.Event(), set()

    def watch() -> None:
        while not done.wait(0.02):
            for place in Path("/proc").glob("[0-9]*/cmdline"):
                with contextlib.suppress(OSError):  # the process has ended
                    line = place.read_bytes()
                    if line not in seen:
                        seen.add(line)
                        if kinds := found_in(line):
                            found[line.replace(b"\0", b" ").decode("utf-8", "replace")] = kinds

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()
    assert len(seen) > 1  # it has looked
