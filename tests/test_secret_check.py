"""What counts as a secret, and that it is never repeated."""

from __future__ import annotations

import pytest

from codeparrot_ds.errors import UserError
from codeparrot_ds.secret_check import check_export, check_for_secrets, check_settings
from codeparrot_ds.secret_forms import find_secret

FORMS = ["hf_" + "a" * 34, "ghp_" + "b" * 36, "AKIA" + "C" * 16, "sk-" + "d" * 48]


@pytest.mark.parametrize("secret", FORMS)
def test_well_known_formats(secret):
    assert "what looks like a secret" in str(find_secret(f'{{"x": "{secret}"}}'))
    with pytest.raises(UserError, match="here holds what looks like") as raised:
        check_for_secrets(f"token={secret}", "here")
    assert secret not in str(raised.value)


def test_values_of_the_environment(monkeypatch):
    for name, value, found in (
        ("MY_SERVICE_TOKEN", "plain-words-1234", True),
        ("db_password", "plain-words-1234", True),
        ("SOME_KEY", "short", False),
        ("SIGNING_KEY", "/home/me/plain-words-1234", False),
        ("KEYBOARD", "plain-words-1234", False),
        ("DB_PASS", "plain-words-1234", True),
        ("PASS", "plain-words-1234", True),
        ("SSHPASS", "plain-words-1234", True),
        ("BYPASS", "plain-words-1234", False),
        ("EOS_TOKEN", "<|plain-words-1234|>", False),
        ("FIM_TOKENS", "<|middle-of-it|>,<plain-words-1234>", False),
        ("HF_TOKEN", "<plain-words-1234", True),
        ("COMPASS", "plain-words-1234", False),
        ("GOOGLE_APPLICATION_CREDENTIALS", "~/plain-words-1234", False),
        ("GCP_CREDENTIALS", "plain-words-1234", True),
        ("DEPLOY_TOKENS", "other-words-5678,plain-words-1234", True),
        ("TOKEN_2", "plain-words-1234", True),
        ("HTTPS_PROXY", "http://me:plain-words-1234@proxy:3128", True),
        ("SERVICE_URL", "http://plain-words-1234/x", False),
    ):
        monkeypatch.setenv(name, value)
        assert (find_secret(f"before {value} after") == f"the value of {name}") is found, name
        monkeypatch.delenv(name)


def test_values_are_found_as_a_file_would_hold_them(monkeypatch, tmp_path):
    monkeypatch.setenv("DB_PASSWORD", 'quoted"word&more')
    for held in ('{"x": "quoted\\"word&more"}', "https://host/?x=quoted%22word%26more"):
        assert find_secret(held) == "the value of DB_PASSWORD"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "credentials.json").touch()
    monkeypatch.setenv("DB_PASSWORD", "credentials.json")  # where a secret lies is none
    assert find_secret("credentials.json") is None


def test_settings_are_refused_by_the_names_of_their_keys():
    for settings in ({"comet": {"api_key": "plain-words-1234"}}, {"list": [{"password": "plain-words-1234"}]}):
        with pytest.raises(UserError, match="^ds.json holds a secret under (api_key|password): remove it") as raised:
            check_settings(settings, "ds.json")
        assert "plain-words" not in str(raised.value)
    check_settings({"comet": {"api_key": "", "workspace": "plain-words-1234"}, "key": "/a/path/to/it", "n": 1}, "")


def test_exports_are_read_but_for_weights_and_vocabulary(tmp_path):
    for name in ("model.safetensors", "tokenizer.json", "vocab.json"):
        (tmp_path / name).write_text(FORMS[0])
    names = sorted(path.name for path in tmp_path.iterdir())
    check_export(tmp_path, names)
    for name in ("README.md", "config.json", "training_state.json"):
        (tmp_path / name).write_text(FORMS[0])
        with pytest.raises(UserError, match=f"{name} holds"):
            check_export(tmp_path, [*names, name])
