"""Replaces e-mail addresses, public IP addresses and well-known forms of secrets by placeholders.

It finds only these forms (``secret_forms``): names, postal addresses, telephone numbers, passwords outside of URLs and
keys of other services stay.
"""

from __future__ import annotations

import ipaddress
import re
from collections import Counter

from codeparrot_ds.secret_forms import replace, replace_keys

LIMITS = (
    "partial: only e-mail addresses, public IP addresses, credentials in URLs and secret keys in well-known formats "
    "are found; names, telephone numbers, other passwords and keys of other services stay"
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


def redact(text: str) -> tuple[str, Counter[str]]:
    """The text with ``<EMAIL>``, ``<IPV4>``, ``<AWS_KEY>`` … in place of what was found, and how many of each kind."""
    counts: Counter[str] = Counter()
    text = replace_keys(text, counts)
    if _EMAIL_HINT.search(text):
        text = replace(_EMAIL, "EMAIL", text, counts)
    text = replace(_IPV4, "IPV4", text, counts, _is_public_ipv4)
    if ":" in text:
        text = replace(_IPV6, "IPV6", text, counts, _is_public_ipv6)
    return text, counts


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
