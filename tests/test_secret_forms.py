"""Forms of secrets, URLs without credentials, and names of repositories."""

from __future__ import annotations

import time
from collections import Counter

import pytest

from codeparrot_ds.errors import UserError
from codeparrot_ds.secret_forms import KINDS, find_key, hide_secrets, replace_keys, repository_of, without_credentials
from tests.planted import HEX, A

MORE = {
    "ATLASSIAN_TOKEN": "ATATT3" + A * 18,
    "AZURE_KEY": "AccountKey=" + (A * 9)[:86] + "==",
    "DATABRICKS_TOKEN": "dapi" + (HEX * 4)[:32] + "-2",
    "DISCORD_WEBHOOK": "https://discord.com/api/webhooks/" + "123456789012345678/" + A * 6,
    "DOPPLER_TOKEN": "dp.pt." + A * 5,
    "FIGMA_TOKEN": "figd_" + A * 4,
    "GITLAB_TOKEN": "glptt-" + HEX * 4,
    "GOOGLE_KEY": "ya29." + A * 7,
    "GRAFANA_TOKEN": "glsa_" + (A * 4)[:32] + "_" + HEX[:8],
    "GROQ_KEY": "gsk_" + (A * 6)[:52],
    "HEROKU_KEY": "HRKU-" + A * 6,
    "LANGSMITH_KEY": "lsv2_pt_" + (HEX * 4)[:32] + "_" + HEX,
    "LINEAR_KEY": "lin_api_" + A * 4,
    "MAILGUN_KEY": "key-" + (HEX * 4)[:32],
    "NEW_RELIC_KEY": "NRAK-" + ("ABC123" * 5)[:27],
    "NOTION_TOKEN": "ntn_" + A * 5,
    "NVIDIA_KEY": "nvapi-" + A * 7,
    "OPENROUTER_KEY": "sk-or-v1-" + (HEX * 7)[:64],
    "PERPLEXITY_KEY": "pplx-" + A * 5,
    "POSTMAN_KEY": "PMAK-" + (HEX * 3)[:24] + "-" + (HEX * 4)[:34],
    "PULUMI_TOKEN": "pul-" + HEX * 4,
    "REPLICATE_TOKEN": "r8_" + (A * 4)[:37],
    "SENTRY_TOKEN": "sntryu_" + (HEX * 7)[:64],
    "SHOPIFY_TOKEN": "shpat_" + (HEX * 4)[:32],
    "SLACK_TOKEN": "xapp-1-" + "A0123-456-" + A * 3,
    "SQUARE_TOKEN": "sq0atp-" + (A * 3)[:22],
    "STRIPE_KEY": "whsec_" + (A * 4)[:32],
    "SUPABASE_KEY": "sbp_" + HEX * 4,
    "TELEGRAM_TOKEN": "123456789:AA" + (A * 4)[:33],
    "TERRAFORM_TOKEN": (A * 2)[:14] + ".atlasv1." + A * 6,
    "TWILIO_KEY": "SK" + (HEX * 4)[:32],
    "VAULT_TOKEN": "hvs." + A * 9,
    "WANDB_KEY": "wandb_v1_" + A * 5,
    "XAI_KEY": "xai-" + A * 8,
}


@pytest.mark.parametrize("kind", MORE)
@pytest.mark.parametrize("around", ["key = '{}'\n", "# {}.\n", '{{"x": "{}"}}', "a, {}, b", "X={}"])
def test_published_forms(kind, around):
    counts: Counter[str] = Counter()
    assert find_key(around.format(MORE[kind])) == kind and kind in KINDS
    assert replace_keys(around.format(MORE[kind]), counts) == around.format(f"<{kind}>") and counts == {kind: 1}


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("postgres://app:s3cr@t:pw@db:5432/x", "postgres://<URL_PASSWORD>@db:5432/x"),
        ("ssh://git:hunter22@[::1]:22/x", "ssh://<URL_PASSWORD>@[::1]:22/x"),
        (f"git clone https://{A * 3}@host/o/r", "git clone https://<URL_TOKEN>@host/o/r"),
        (f"https://{A * 3}:@host/o/r", "https://<URL_TOKEN>@host/o/r"),
        (f"'https://h/x?a=1&X-Amz-Signature={A}&b=2'", "'https://h/x?a=1&X-Amz-Signature=<URL_PARAMETER>&b=2'"),
        (f"https://h/x?private_token={A}", "https://h/x?private_token=<URL_PARAMETER>"),
    ],
)
def test_credentials_in_urls_are_replaced(text, left):
    assert replace_keys(text, Counter()) == left


@pytest.mark.parametrize(
    "text",
    [
        'f"https://{user}:{password}@{host}" "https://%s:%s@%s" "https://$USER:$PASS@host" "https://me:<password>@host"',
        "https://me@host/x ssh://git@github.com:22/o/r http://[::1]:8080/a@b http://host:8080/@scope/x",
        "hf://datasets/org/name@0123456789abcdef0123/data https://medium.com/@somebody/a-long-story",
        "https://h/x?token={token}&page=2 https://h/?q=access_token https://h/?key=some_category",
        "SKIP = 'SKILLS' key-value gl-pat shp sq0 dapi hvs.x dp.pt SG.x npm_config_cache ntn_x :AA x_v1_y pul-request",
    ],
)
def test_what_looks_alike_stays(text):
    assert replace_keys(text, Counter()) == text


@pytest.mark.parametrize(
    ("text", "bare"),
    [
        ("cannot open https://TOKEN@host/o/r.git, sorry", "cannot open https://host/o/r.git, sorry"),
        ("https://oauth2:TOKEN@host:8443/o/r", "https://host:8443/o/r"),
        ("https://u:p@ss@host/x", "https://host/x"),
        ("https://u:p/a?s#s@host/x", "https://host/x"),
        ("https://host/x?access_token=TOKEN and ftp://h/y#access_token=TOKEN", "https://host/x and ftp://h/y"),
        ("git+ssh://user:pw@host/x 'svn+https://user:pw@host'", "git+ssh://host/x 'svn+https://host'"),
        ("user:pw@host:o/r", "host:o/r"),
        ("from git@github.com:o/r", "from git@github.com:o/r"),
        ("/home/me/https:/oauth2:TOKEN@host/o/r.git: no such path", "/home/me/https:/host/o/r.git: no such path"),
        ("hf://datasets/o/n@main/x http://h:80/@a/b http://[::1]:80/a@b", None),
        ("org/name@main a.git@branch me@example.com 12:30 x?y#z", None),
    ],
)
def test_urls_without_credentials(text, bare):
    assert without_credentials(text) == (text if bare is None else bare)


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("https://github.com/owner/name.git", "owner/name"),
        ("https://TOKEN@gist.github.com/ID.git", "gist.github.com/ID"),
        ("https://oauth2:TOKEN@host/repo", "host/repo"),
        ("https://oauth2:TOKEN@host:8443/repo.git/", "host/repo"),
        ("https://TOKEN:x-oauth-basic@github.com/owner/name", "owner/name"),
        ("https://user:to/ken@host/owner/name", "owner/name"),
        ("https://host/owner/name.git?access_token=TOKEN", "owner/name"),
        ("https://host/owner/name#TOKEN", "owner/name"),
        ("ssh://user:TOKEN@host:22/owner/name", "owner/name"),
        ("ssh://git@host/name", "host/name"),
        ("git@github.com:owner/name", "owner/name"),
        ("git@gist.github.com:ID.git", "gist.github.com/ID"),
        ("TOKEN@host:name", "host/name"),
        ("user:TOKEN@host:owner/name.git", "owner/name"),
        ("user:TO/KEN@host:owner/name.git", "owner/name"),
        ("host:owner/name", "owner/name"),
        ("codecommit::us-east-1://TOKEN@name", "name"),
        ("/srv/git/owner/name.git/", "owner/name"),
        ("/srv/my repositories/name@2", "my repositories/name@2"),
        ("../name", "name"),
        ("file:///srv/git/owner/name.git", "owner/name"),
        ('"https://TOKEN@host/owner/name" # TOKEN', "owner/name"),
        ("https://host/owner/name\nTOKEN", "owner/name"),
        (f"https://host/ghp_{(A * 4)[:36]}/name", "<GITHUB_TOKEN>/name"),
        ("https://me:TO'K\"E<N@host/name", "host/name"),
        ("https://me:TO'/KEN?`#x@host:8443/name", "host/name"),
        ("https://me:TO KEN@host/name", "host/name"),
        ("https://TO'KEN@host/name?x=TOKEN", "host/name"),
        ("https:/me:TOKEN@host/name", "host/name"),
        ("x" + ":" * 1_000_000 + "@host", ""),
        ("", ""),
    ],
)
def test_names_of_repositories_have_nothing_secret(url, name):
    assert repository_of(url) == name


KEY = "-----BEGIN PRIVATE KEY-----"
BODY = "\n".join([A * 6 + "+/a="] * 9)


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("PRIVATE KEY", f"\n{A * 6}+/a=\n"),
        ("PRIVATE KEY", f"\\n{A * 6}\\n{A * 6}\\n"),
        ("OPENSSH PRIVATE KEY", f"\n{BODY}\n"),
        ("RSA PRIVATE KEY", f"\r\nProc-Type: 4,ENCRYPTED\r\nDEK-Info: AES-256-CBC,0F--1E\r\n\r\n{BODY}\r\n"),
        ("PGP PRIVATE KEY BLOCK", f"\nVersion: GnuPG v2 - x\n\n{BODY * 20}\n=a+b/\n"),
    ],
)
def test_private_keys(kind, body):
    key = f"-----BEGIN {kind}-----{body}-----END {kind}-----"
    assert replace_keys(f"a = '{key}'; b = '{key}'", Counter()) == "a = '<PRIVATE_KEY>'; b = '<PRIVATE_KEY>'"


def test_the_frame_of_a_key_is_none():
    text = 'START = b"-----BEGIN OPENSSH PRIVATE KEY-----"\nEND = b"-----END OPENSSH PRIVATE KEY-----"\n'
    assert replace_keys(text, Counter()) == text


@pytest.mark.parametrize("text", ["a", "%", "a+", "a:", "://", "a://", "http:/", ":@", "?", "1a", KEY])
def test_a_long_text_takes_no_longer_by_its_letter(text):
    """A megabyte takes some hundredths of a second; where each letter is looked at again for each, half an hour."""
    before = time.process_time()
    replace_keys(without_credentials(f"{text * (1_000_000 // len(text))} @"), Counter())
    assert time.process_time() - before < 5


def test_messages_hide_what_was_typed():
    assert str(UserError("source https://me:pw@host/x?y=1 does not exist")) == "source https://host/x does not exist"
    assert hide_secrets(f"WANDB: {MORE['VAULT_TOKEN']}") == "WANDB: <VAULT_TOKEN>"
    assert hide_secrets(hide_secrets(f"https://me:{A}@h/x?y")) == "https://h/x"
    assert str(UserError("me:pw@host:x/y.git is no source")) == "host:x/y.git is no source"


@pytest.mark.parametrize("sentence", ["the form is a:0,2@b: write a:0", "squad:plain_text@main: no such split"])
def test_names_with_a_colon_and_an_at_sign_are_no_passwords(sentence):
    assert hide_secrets(sentence) == sentence
