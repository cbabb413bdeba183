"""The local Hub, and an environment in which the client talks to it and to nothing else."""

from __future__ import annotations

import os

import pytest

from tests.hub.model_hub import TOKEN, running_hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with running_hub(tmp_path / "hub-root") as server:
        for name in ("HF_HUB_OFFLINE", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf-home"))
        monkeypatch.setenv("CODEPARROT_HUB_TIMEOUT_SECONDS", "2")
        monkeypatch.setenv("NO_PROXY", os.environ.get("NO_PROXY", "") + ",127.0.0.1,localhost")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf-home" / "hub"))
        yield server
