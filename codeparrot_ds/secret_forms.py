"""What a secret looks like, and texts without any: keys of services, credentials in URLs, values of the environment.

Every URL that the product writes or says goes through `without_credentials`, every name of a repository through
`repository_of`, and every message, log line and traceback through `hide_secrets`.
"""

from __future__ import annotations

import functools
import json
import os
import re
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from types import TracebackType
from urllib.parse import quote

_NOT_QUOTED = r"[^\s\"'<>`\\{}]"
_AUTHORITY = r"[^\s\"'<>`\\{}/?#\[\]]"
_NO_TEMPLATE = r"(?![{$<]|%[sd(]|\*\*)"  # {password}, $PASSWORD, %s: a program that puts the secret in later

# Kind, plain substrings one of which each such text holds, and the pattern. A group is what stays before the
# placeholder. Looking for a substring first is what makes this cheap: nearly all files hold none.
_FORMS = (
    ("AWS_KEY", ("AKIA", "ASIA", "ABIA", "ACCA"), r"(?<![A-Z0-9])A(?:KI|SI|BI|CC)A[A-Z0-9]{16}(?![A-Z0-9])"),
    (
        "AWS_SECRET",
        ("aws_secret_access_key", "AWS_SECRET_ACCESS_KEY"),
        r"(?<=(?i:aws_secret_access_key))(\s*[=:]\s*[\"']?)[A-Za-z0-9/+]{40}(?![A-Za-z0-9/+])",
    ),
    (
        "GITHUB_TOKEN",
        ("ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_"),
        r"(?<!\w)(?:gh[pousr]_[A-Za-z0-9]{36,255}|github_pat_[A-Za-z0-9_]{60,255})(?!\w)",
    ),
    (
        "GOOGLE_KEY",
        ("AIza", "GOCSPX-", "ya29."),
        r"(?<![\w-])(?:AIza[\w-]{35}|GOCSPX-[\w-]{28}|ya29\.[\w-]{40,})(?![\w-])",
    ),
    (
        "SLACK_TOKEN",
        ("xox", "xapp-", "hooks.slack.com"),
        r"(?<!\w)(?:xox[abeoprs]-[A-Za-z0-9-]{10,}|xapp-\d-[A-Za-z0-9-]{20,})"
        r"|https://hooks\.slack\.com/services/T\w+/B\w+/\w+",
    ),
    (
        "STRIPE_KEY",
        ("k_live_", "k_test_", "whsec_"),
        r"(?<!\w)(?:[sr]k_(?:live|test)_[A-Za-z0-9]{16,}|whsec_[A-Za-z0-9+/]{32,})",
    ),
    (
        "HUGGING_FACE_TOKEN",
        ("hf_", "api_org_"),
        r"(?<!\w)(?:hf_[A-Za-z0-9]{34,}|api_org_[A-Za-z0-9]{34,})(?!\w)",
    ),
    (
        "OPENAI_KEY",
        ("sk-",),
        r"(?<![\w-])sk-(?:(?:proj|svcacct|admin)-[\w-]{40,}|[A-Za-z0-9]{48})(?![\w-])",
    ),
    (
        "PRIVATE_KEY",
        ("PRIVATE KEY",),
        # Up to the next dashes: to look through 20,000 characters behind every beginning takes a minute for 6 MB. A key
        # has 64 letters at least; programs that name both lines of its frame have fewer between them.
        r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----(?:[^-]|-(?!----)){40,20000}"
        r"-----END (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----",
    ),
    ("JWT", ("eyJ",), r"(?<![\w-])eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]{16,}"),
    # user:password@ of a URL, and a token in the place of the user. As in detect-secrets' BasicAuthDetector, but with
    # the signs that passwords have and git and curl take.
    ("URL_PASSWORD", ("://",), rf"(?<=://)[^\s\"'<>`\\{{}}/?#@:]*:{_NO_TEMPLATE}{_AUTHORITY}{{3,256}}(?=@)"),
    ("URL_TOKEN", ("://",), r"(?<=://)[\w.~%+-]{20,}:?(?=@)"),
    (
        "URL_PARAMETER",
        ("oken=", "OKEN=", "ey=", "EY=", "ecret=", "assw", "ig=", "ignature="),
        r"([?&;](?i:(?:access|private|auth|job|refresh|id|x-amz-security)?[_-]?token|api[_-]?key|subscription-key|"
        r"(?:client_)?secret|password|passwd|sig|(?:x-amz-|x-goog-)?signature)=)"
        rf"{_NO_TEMPLATE}[^\s\"'<>`\\{{}}&#]{{8,}}",
    ),
)
# Prefixes as the services publish them, and gitleaks and detect-secrets look for them; a word ends before and behind.
_PREFIXED = {
    "ANTHROPIC_KEY": r"sk-ant-[\w-]{20,}",
    "ATLASSIAN_TOKEN": r"(?:ATATT3|ATCTT3|ATBB)[\w=-]{28,}",
    "AZURE_KEY": r"AccountKey=[A-Za-z0-9+/]{86}==",
    "DATABRICKS_TOKEN": r"dapi[0-9a-f]{32}(?:-\d)?",
    "DIGITALOCEAN_TOKEN": r"do[opr]_v1_[0-9a-f]{64}",
    "DISCORD_WEBHOOK": r"https://discord(?:app)?\.com/api/webhooks/\d+/[\w-]{40,}",
    "DOCKER_TOKEN": r"dckr_[po]at_[\w-]{20,}",
    "DOPPLER_TOKEN": r"dp\.(?:pt|st|ct|sa)\.(?:[\w-]{2,35}\.)?[\w-]{40,}",
    "FIGMA_TOKEN": r"figd_[\w-]{38,}",
    "GITLAB_TOKEN": r"gl(?:pat|dt|rt|cbt|ptt|ft|imt|agent|oas|soat|ffct)-[\w-]{20,}(?:\.[\w-]+)*",
    "GRAFANA_TOKEN": r"(?:glsa_[A-Za-z0-9]{32}_[0-9a-fA-F]{8}|glc_[A-Za-z0-9+/]{32,}={0,2})",
    "GROQ_KEY": r"gsk_[A-Za-z0-9]{40,}",
    "HEROKU_KEY": r"HRKU-[\w-]{36,}",
    "LANGSMITH_KEY": r"lsv2_(?:pt|sk)_[0-9a-f]{32}_[0-9a-f]{10}",
    "LINEAR_KEY": r"lin_api_[A-Za-z0-9]{40}",
    "MAILGUN_KEY": r"key-[0-9a-f]{32}",
    "NEW_RELIC_KEY": r"NRAK-[A-Z0-9]{27}",
    "NOTION_TOKEN": r"ntn_[A-Za-z0-9]{40,}",
    "NPM_TOKEN": r"npm_[A-Za-z0-9]{36}",
    "NVIDIA_KEY": r"nvapi-[\w-]{40,}",
    "OPENROUTER_KEY": r"sk-or-v1-[0-9a-f]{64}",
    "PERPLEXITY_KEY": r"pplx-[A-Za-z0-9]{40,}",
    "POSTMAN_KEY": r"PMAK-[0-9a-f]{24}-[0-9a-f]{34}",
    "PULUMI_TOKEN": r"pul-[0-9a-f]{40}",
    "PYPI_TOKEN": r"pypi-AgE[\w-]{50,}",
    "REPLICATE_TOKEN": r"r8_[A-Za-z0-9]{37}",
    "SENDGRID_KEY": r"SG\.[\w-]{20,24}\.[\w-]{39,50}",
    "SENTRY_TOKEN": r"(?:sntrys_[\w+/=-]{40,}|sntryu_[0-9a-f]{64})",
    "SHOPIFY_TOKEN": r"shp(?:at|ca|pa|ss)_[0-9a-fA-F]{32}",
    "SQUARE_TOKEN": r"sq0(?:atp|csp)-[\w-]{22,}",
    "SUPABASE_KEY": r"sbp_[0-9a-f]{40}",
    "TELEGRAM_TOKEN": r"\d{8,10}:AA[\w-]{33}",
    "TERRAFORM_TOKEN": r"[A-Za-z0-9]{14}\.atlasv1\.[\w-]{60,}",
    "TWILIO_KEY": r"SK[0-9a-f]{32}",
    "VAULT_TOKEN": r"hv[sbr]\.[\w-]{24,}",
    "WANDB_KEY": r"wandb_v\d_\w{40,}",
    "XAI_KEY": r"xai-[A-Za-z0-9]{60,}",
}
_HINTS_OF_PREFIXED = {
    "ATLASSIAN_TOKEN": ("ATATT3", "ATCTT3", "ATBB"),
    "DIGITALOCEAN_TOKEN": ("_v1_",),
    "DISCORD_WEBHOOK": ("/api/webhooks/",),
    "DOCKER_TOKEN": ("dckr_",),
    "DOPPLER_TOKEN": ("dp.",),
    "GITLAB_TOKEN": ("glpat-", "gldt-", "glrt-", "glcbt-", "glptt-", "glft-", "glimt-", "glagent-", "gloas-")
    + ("glsoat-", "glffct-"),
    "GRAFANA_TOKEN": ("glsa_", "glc_"),
    "LANGSMITH_KEY": ("lsv2_",),
    "SENDGRID_KEY": ("SG.",),
    "SENTRY_TOKEN": ("sntry",),
    "SHOPIFY_TOKEN": ("shp",),
    "SQUARE_TOKEN": ("sq0",),
    "TELEGRAM_TOKEN": (":AA",),
    "TERRAFORM_TOKEN": (".atlasv1.",),
    "VAULT_TOKEN": ("hvs.", "hvb.", "hvr."),
    "WANDB_KEY": ("wandb_v",),
}
# How the name of an environment variable or of a JSON key ends whose value is a secret.
_NAME = re.compile(
    r"(?:TOKEN|KEY|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|(?:^|_|^SSH)(?:PASS|PWD|PAT|AUTH))(?P<several>S)?(?:_?\d+)?$",
    re.IGNORECASE,
)
_LEAST_LENGTH = 12  # of a value that could not stand in a text by chance
# A path made of a URL has one slash only. The name before "://" is not looked for: of a megabyte of letters each could
# begin one, which would take an hour.
_URL = re.compile(r"(://|\b(?:https?|git|ssh|ftps?|\w+\+\w+):/(?!/))([^\s\"'<>`]+)")
# The second form is for passwords with a slash or a question mark that nobody escaped; behind a colon may be a port.
_USERINFO = re.compile(r"[^/?#]*@|[^/?#@:\[]*:(?!\d*(?:[/?#]|$))[^@]*@")
# With a space behind its last colon it is the name of a data set or of hosts, of which a sentence says something.
_SCP_PASSWORD = re.compile(r"(?<![\w/.@-])[\w.%+~-]{1,256}:[^\s/@:\"']+@(?=[\w.-]+:\S)")


@functools.cache
def _forms() -> tuple[tuple[str, tuple[str, ...], re.Pattern[str]], ...]:
    """Kind, hints and pattern of every form; made when the first text is looked at."""
    prefixed = (
        (kind, _HINTS_OF_PREFIXED.get(kind) or (_literal_start(body),), rf"(?<![\w-])(?:{body})(?!\w)")
        for kind, body in _PREFIXED.items()
    )
    return tuple((kind, hints, re.compile(pattern, re.ASCII)) for kind, hints, pattern in (*prefixed, *_FORMS))


def _literal_start(pattern: str) -> str:
    """The letters that each match of a pattern begins with."""
    found = re.match(r"[\w=-]+", pattern)
    assert found is not None and pattern[found.end()] in "[("
    return found[0]


KINDS = (*_PREFIXED, *(kind for kind, *_ in _FORMS))
"""What `replace_keys` calls what it finds."""


def find_key(text: str) -> str | None:
    """The kind of a secret in a well-known form that a text holds; None where there is none."""
    return next(
        (kind for kind, hints, pattern in _forms() if any(hint in text for hint in hints) and pattern.search(text)),
        None,
    )


def replace_keys(text: str, counts: Counter[str]) -> str:
    """The text with ``<AWS_KEY>``, ``<URL_PASSWORD>`` … in place of what was found, which is counted by kind."""
    for kind, hints, pattern in _forms():
        if any(hint in text for hint in hints):
            text = replace(pattern, kind, text, counts)
    return text


def replace(
    pattern: re.Pattern[str],
    kind: str,
    text: str,
    counts: Counter[str],
    wanted: Callable[[re.Match[str]], bool] = lambda found: True,
) -> str:
    """The text with ``<kind>`` in place of each wanted match, behind what the pattern's group holds."""

    def placeholder(found: re.Match[str]) -> str:
        if not wanted(found):
            return found[0]
        counts[kind] += 1
        return (found[1] if found.re.groups else "") + f"<{kind}>"

    return pattern.sub(placeholder, text)


# --------------------------------------------------------------------------------------------------------------------
# URLs


def without_credentials(text: str) -> str:
    """A text whose URLs have neither user, password, query nor fragment: any of them may be a token."""

    def bare(found: re.Match[str]) -> str:
        userinfo, rest = _USERINFO.match(found[2]), found[2]
        return found[1] + re.split(r"[?#]", rest[userinfo.end() :] if userinfo else rest, maxsplit=1)[0]

    if "@" not in text and "?" not in text and "#" not in text:
        return text
    return _SCP_PASSWORD.sub("", _URL.sub(bare, text))


_LONGEST_REMOTE = 4096  # in characters


def repository_of(url: str) -> str:
    """``owner/name`` of a git remote: the last two parts of its host and path, without anything that may be a secret.

    Empty for what is longer than `_LONGEST_REMOTE`.

    Args:
        url: as git takes it: ``https://…``, ``ssh://…``, ``user@host:path``, ``helper::address`` or a path.
    """
    # As git reads its config: quotes are no part of a value, and a comment begins behind a space.
    url = re.split(r"\s[#;]", next(iter(url.strip().splitlines()), ""))[0].strip().strip('"')
    if len(url) > _LONGEST_REMOTE:
        return ""
    scheme, is_url, rest = url.partition("://")
    if is_url:
        # Of a URL that stands alone quotes and spaces are a part, which in a text end it.
        userinfo = _USERINFO.match(rest)
        host, slash, path = re.split(r"[?#]", rest[userinfo.end() :] if userinfo else rest)[0].partition("/")
        rest = re.sub(r":\d*$", "", host) + slash + path  # the port
    elif not (url := without_credentials(url)).startswith(("/", ".", "~")) and ":" in url:
        # What comes before the colon is a host, maybe with a user.
        host, _, path = re.sub(r"^[^/]*@", "", re.sub(r"^[^@/]*:[^@]*@(?=[^/]*:)", "", url)).partition(":")
        rest = f"{host}/{path.lstrip(':')}"
    else:
        rest = url
    parts = [part for part in rest.removesuffix("/").removesuffix(".git").split("/") if part.strip(".")]
    return replace_keys("/".join(parts[-2:]), Counter())


# --------------------------------------------------------------------------------------------------------------------
# The environment's


def names_a_secret(name: str) -> bool:
    """Whether the value under this name is a secret, whatever it looks like: ``HF_TOKEN``, ``db_pass``, ``api_key``."""
    return _NAME.search(name) is not None


def may_be_secret(value: str) -> bool:
    """Whether the value under such a name is long enough to be looked for, and no path, where a secret only lies.

    Nor ``<|endoftext|>`` as EOS_TOKEN, which every export holds, nor ``<your token>``.
    """
    if len(value) < _LEAST_LENGTH or (value.startswith("<") and value.endswith(">")):
        return False
    return not value.startswith(("/", "~", "./", "../")) and not os.path.exists(value)


def secrets_in_use() -> Iterator[tuple[str, str]]:
    """Name and value of each environment variable that holds a secret, in each form that a file could hold it in."""
    for name, text in os.environ.items():
        named, values = _NAME.search(name), re.findall(r"://[^\s/?#:@]*:([^\s/?#]+)@", text)  # HTTPS_PROXY
        if named:
            values.append(text.strip())
        if named and named["several"] and not text.startswith(("{", "[", "-")):  # HF_TOKENS=one,two; no JSON, no PEM
            values += re.split(r"[\s,;]+", text)
        for value in filter(may_be_secret, dict.fromkeys(values)):
            yield from ((name, form) for form in dict.fromkeys((value, json.dumps(value)[1:-1], quote(value, safe=""))))


def find_secret(text: str) -> str | None:
    """Says what secret a text holds, without repeating it; None for none that is known.

    That is the value of an environment variable whose name ends as those of secrets do (``HF_TOKEN``, ``DB_PASS``,
    ``WANDB_API_KEY``), the password in a variable that holds a URL, or a secret in one of the well-known forms.
    """
    for name, value in secrets_in_use():
        if value in text:
            return f"the value of {name}"
    kind = find_key(text)
    return None if kind is None else f"what looks like a secret ({kind.lower().replace('_', ' ')})"


def hide_secrets(text: str) -> str:
    """A text for people and for files, with the name of each known secret in its place."""
    for name, value in secrets_in_use():
        text = text.replace(value, f"<{name}>")
    return replace_keys(without_credentials(text), Counter())


def hide_secrets_in_tracebacks() -> None:
    """From now on, what this process says of an exception that nobody catches goes through `hide_secrets`."""

    def show(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
        print(
            hide_secrets("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr, flush=True
        )

    def show_in_thread(args: threading.ExceptHookArgs) -> None:
        if args.exc_type is not SystemExit:
            print(f"Exception in thread {args.thread.name if args.thread else '?'}:", file=sys.stderr)
            show(args.exc_type, args.exc_value, args.exc_traceback)

    sys.excepthook, threading.excepthook = show, show_in_thread
