"""A small corpus of real code for the whole-story tests."""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path

import pytest
from stories import Workshop

from codeparrot_ds.data.corpus import build_corpus
from codeparrot_ds.data.tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def workshop(tmp_path_factory) -> Workshop:
    """Some packages of the standard library as a corpus, and a tokenizer of 1,024 tokens."""
    base = tmp_path_factory.mktemp("workshop")
    tree = base / "tree"
    for package in ("asyncio", "email", "http", "json", "logging", "unittest", "xml"):
        shutil.copytree(Path(sysconfig.get_path("stdlib")) / package, tree / package)
    build_corpus([str(tree)], base / "corpus")
    train_tokenizer(base / "corpus", base / "tokenizer", vocab_size=1024)
    return Workshop(corpus=base / "corpus", tokenizer=base / "tokenizer", runs=base / "runs")
