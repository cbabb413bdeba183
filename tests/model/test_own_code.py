"""Nothing that the product loads may bring code of its own: every call that could ask for it says no."""

from __future__ import annotations

import ast
import json
import os
import re
from pathlib import Path

import pytest

from codeparrot_ds.errors import UserError
from codeparrot_ds.model.foreign import recognized, refuse_own_code

REPOSITORY = Path(__file__).resolve().parents[2]
LOADERS = {"from_pretrained", "from_config", "pipeline"}
DATASETS = {"load_dataset", "load_dataset_builder"}


def calls():
    """Yields (place, name, keywords by name) for every call in the product of one of these names."""
    for path in sorted((REPOSITORY / "codeparrot_ds").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                if name in LOADERS | DATASETS:
                    keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                    yield f"{path.relative_to(REPOSITORY)}:{node.lineno}", name, keywords


def test_every_call_that_loads_says_no():
    found = list(calls())
    assert {name for _, name, _ in found} == {"from_pretrained", "pipeline", *DATASETS}
    wrong = [
        place
        for place, name, keywords in found
        if keywords.get("trust_remote_code") != ("False" if name in LOADERS else None)
    ]
    assert wrong == [], "pass trust_remote_code=False"


def test_data_sets_bring_no_code():
    """Since version 4 the library runs no script of a data set, whatever it is told."""
    (least,) = re.findall(r'"datasets>=(\d+)', (REPOSITORY / "setup.py").read_text(encoding="utf-8"))
    assert int(least) >= 4


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_folder_that_names_code_is_refused(tmp_path, name):
    refuse_own_code(tmp_path)
    for harmless in ("{}", '{"auto_map": null}', '{"auto_map": {}}', "[]", "no JSON", "[" * 100_000):
        (tmp_path / name).write_text(harmless)
        refuse_own_code(tmp_path)
    (tmp_path / name).write_text(json.dumps({"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}))
    with pytest.raises(
        UserError, match=rf"{name} names code of its own \('auto_map'\), and .* are not taken: name one"
    ):
        refuse_own_code(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_named_pipe_is_not_waited_for(tmp_path, name):
    """Whoever opened it would wait for its writer, until the test's time is up."""
    os.mkfifo(tmp_path / name)
    assert refuse_own_code(tmp_path) is None


@pytest.mark.parametrize("revision", [b"\xff", b"a" * 5000, b"/etc", b"../../x", b"a\0b", b""])
def test_a_cache_of_the_hub_whose_main_is_damaged_has_its_last_snapshot(tmp_path, revision):
    model = tmp_path / "snapshots" / "0123"
    model.mkdir(parents=True)
    for file in ("config.json", "model.safetensors"):
        (model / file).touch()
    (tmp_path / "refs").mkdir()
    (tmp_path / "refs" / "main").write_bytes(revision)
    found = recognized(tmp_path)
    assert found is not None and found.model == model
