"""What counts as a secret, and that it is never repeated."""

from __future__ import annotations

import pytest

from codeparrot_ds.errors import UserError
from codeparrot_ds.hub.secrets import check_export, check_for_secrets, find_secret

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
    ):
        monkeypatch.setenv(name, value)
        assert (find_secret(f"before {value} after") == f"the value of {name}") is found, name
        monkeypatch.delenv(name)


def test_exports_are_read_but_for_weights_and_vocabulary(tmp_path):
    for name in ("model.safetensors", "tokenizer.json", "vocab.json"):
        (tmp_path / name).write_text(FORMS[0])
    names = sorted(path.name for path in tmp_path.iterdir())
    check_export(tmp_path, names)
    for name in ("README.md", "config.json", "training_state.json"):
        (tmp_path / name).write_text(FORMS[0])
        with pytest.raises(UserError, match=f"{name} holds"):
            check_export(tmp_path, [*names, name])
