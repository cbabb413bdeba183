"""Replaces e-mail addresses, public IP addresses and well-known forms of secret keys by placeholders.

It finds only these forms: names, postal addresses, telephone numbers, passwords and keys of other services stay.
"""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Callable

LIMITS = (
    "partial: only e-mail addresses, public IP addresses and secret keys in well-known formats are found; "
    "names, telephone numbers, passwords and keys of other services stay"
)

# Any two letters may be a country; without a list for the rest, "a@b.dot" (a matrix product) would be an address.
_TOP_LEVEL = "[a-z]{2}|com|org|net|edu|gov|mil|int|info|biz|name|pro|dev|app|cloud|tech|online|site|email|xyz"
_EMAIL = re.compile(
    r"(?<![\w.%+-])(?!git@)[a-z0-9][\w.%+-]{0,63}@(?:[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\.){1,8}"
    rf"(?:{_TOP_LEVEL})(?![\w-]|\.\w)",
    re.IGNORECASE | re.ASCII,
)
_EMAIL_HINT = re.compile(r"@(?<=\w@)\w")
# The first character comes before the look behind it, because the engine leaps to a character, but not to a condition.
_IPV4 = re.compile(r"[0-9](?<![\w.-].)\d{0,2}\.(?:\d{1,3}\.){2}\d{1,3}(?![\w-]|\.\w)", re.ASCII)
_IPV6 = re.compile(
    r"[23](?<![\w:.].)[0-9a-f]{0,3}:(?:[0-9a-f]{1,4}:){0,6}(?::?[0-9a-f]{1,4}|:)(?::[0-9a-f]{1,4}){0,5}(?![\w:]|\.\w)",
    re.IGNORECASE,
)
_VERSION_BEFORE = re.compile(
    r"(?:version\w*|\bver|release|\bv|[=<>~!]=|(?<![A-Z0-9_])[<>])\s*[\"'=:(\[]*\s*[\"']?$", re.IGNORECASE
)
_VERSION_CONTEXT = 24
_VERSION_PART = 20

# Formats as the services document them and secret scanners look for them.
_SECRETS = {
    "AWS_KEY": r"(?<![A-Z0-9])(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Z0-9])",
    "AWS_SECRET": r"(?<=(?i:aws_secret_access_key))(\s*[=:]\s*[\"']?)[A-Za-z0-9/+]{40}(?![A-Za-z0-9/+])",
    "GITHUB_TOKEN": r"(?<!\w)(?:gh[pousr]_[A-Za-z0-9]{36,255}|github_pat_[A-Za-z0-9_]{60,255})(?!\w)",
    "GOOGLE_KEY": r"(?<![\w-])(?:AIza[\w-]{35}|GOCSPX-[\w-]{28})(?![\w-])",
    "SLACK_TOKEN": r"(?<!\w)xox[abeoprs]-[A-Za-z0-9-]{10,}|https://hooks\.slack\.com/services/T\w+/B\w+/\w+",
    "STRIPE_KEY": r"(?<!\w)[sr]k_(?:live|test)_[A-Za-z0-9]{16,}",
    "HUGGING_FACE_TOKEN": r"(?<!\w)hf_[A-Za-z0-9]{34,}(?!\w)",
    "OPENAI_KEY": r"(?<![\w-])sk-(?:(?:proj|svcacct|admin)-[\w-]{40,}|[A-Za-z0-9]{48})(?![\w-])",
    "PRIVATE_KEY": r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----[\s\S]{1,20000}?"
    r"-----END (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----",
    "JWT": r"(?<![\w-])eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]{16,}",
}
# Looking for a plain substring first is what makes redaction cheap: nearly all files hold none.
_HINTS = {
    "AWS_KEY": ("AKIA", "ASIA"),
    "AWS_SECRET": ("aws_secret_access_key", "AWS_SECRET_ACCESS_KEY"),
    "GITHUB_TOKEN": ("ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_"),
    "GOOGLE_KEY": ("AIza", "GOCSPX-"),
    "SLACK_TOKEN": ("xox", "hooks.slack.com"),
    "STRIPE_KEY": ("k_live_", "k_test_"),
    "HUGGING_FACE_TOKEN": ("hf_",),
    "OPENAI_KEY": ("sk-",),
    "PRIVATE_KEY": ("PRIVATE KEY",),
    "JWT": ("eyJ",),
}
_PATTERNS = {kind: re.compile(pattern, re.ASCII) for kind, pattern in _SECRETS.items()}
KINDS = (*_SECRETS, "EMAIL", "IPV4", "IPV6")


def redact(text: str) -> tuple[str, Counter[str]]:
    """The text with ``<EMAIL>``, ``<IPV4>``, ``<AWS_KEY>`` … in place of what was found, and how many of each kind."""
    counts: Counter[str] = Counter()
    for kind, pattern in _PATTERNS.items():
        if any(hint in text for hint in _HINTS[kind]):
            text = _replace(pattern, kind, text, counts, lambda found: True)
    if _EMAIL_HINT.search(text):
        text = _replace(_EMAIL, "EMAIL", text, counts, lambda found: True)
    text = _replace(_IPV4, "IPV4", text, counts, _is_public_ipv4)
    if ":" in text:
        text = _replace(_IPV6, "IPV6", text, counts, _is_public_ipv6)
    return text, counts


def find_key(text: str) -> str | None:
    """The kind of the first secret key in a well-known format; None where there is none."""
    return next(
        (
            kind
            for kind, pattern in _PATTERNS.items()
            if any(hint in text for hint in _HINTS[kind]) and pattern.search(text)
        ),
        None,
    )


def _replace(
    pattern: re.Pattern[str], kind: str, text: str, counts: Counter[str], wanted: Callable[[re.Match[str]], bool]
) -> str:
    def placeholder(found: re.Match[str]) -> str:
        if not wanted(found):
            return found[0]
        counts[kind] += 1
        return (found[1] if found.re.groups else "") + f"<{kind}>"

    return pattern.sub(placeholder, text)


def _is_public_ipv4(found: re.Match[str]) -> bool:
    """Private, local, documentation and multicast addresses tell nothing about anybody; versions are no addresses."""
    try:
        address = ipaddress.IPv4Address(found[0])
    except ValueError:
        return False
    if not address.is_global or address.is_multicast or max(address.packed) < _VERSION_PART:
        return False
    return not _VERSION_BEFORE.search(found.string, max(0, found.start() - _VERSION_CONTEXT), found.start())


def _is_public_ipv6(found: re.Match[str]) -> bool:
    """Global unicast (2000::/3) alone: times, MAC addresses and slices such as ``1::2`` look alike."""
    try:
        address = ipaddress.IPv6Address(found[0])
    except ValueError:
        return False
    return address.is_global and address.packed[0] >> 5 == 1 and found[0].count(":") >= 3
