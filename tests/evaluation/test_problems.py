"""Problem files in both schemas: right solutions score 1.0, wrong ones 0.0, and bad files are told by line and key."""

import gzip
import json
from pathlib import Path

import datasets
import huggingface_hub
import pytest

from codeparrot_ds.errors import UserError
from codeparrot_ds.evaluation.complete import first_block
from codeparrot_ds.evaluation.pass_at_k import estimate
from codeparrot_ds.evaluation.problems import load_problems
from codeparrot_ds.sandbox.judge import judge_all

FILES = {name: Path(__file__).with_name(f"{name}.jsonl") for name in ("problems", "problems_mbpp")}


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def score(problems, completions):
    items = [(problem.program(text), problem.check) for problem, text in zip(problems, completions, strict=True)]
    return estimate([(1, int(verdict.passed)) for verdict in judge_all(items, num_workers=2)], 1).value


@pytest.mark.parametrize("name", FILES)
def test_right_solutions_score_one_and_mutated_ones_zero(name):
    problems = load_problems(FILES[name])
    assert score(problems, [problem.solution for problem in problems]) == 1.0
    mutated = [row["mutated_solution"] for row in rows_of(FILES[name])]
    mutated = ["\n" + text for text in mutated]  # a completion begins where the prompt's text ends
    assert score(problems, mutated) == 0.0
    assert score(problems, [problem.cut(problem.solution) for problem in problems]) == 1.0  # no end inside


def test_a_datasets_name_and_a_compressed_file_are_the_same_problems(tmp_path, monkeypatch):
    packed = tmp_path / "p.jsonl.gz"
    packed.write_bytes(gzip.compress(FILES["problems"].read_bytes()))
    assert load_problems(packed) == load_problems(FILES["problems"])
    # What `datasets` takes as a name may be a folder as well: the real library reads it, without a network.
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "org" / "name" / "test.jsonl").write_bytes(FILES["problems"].read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    assert load_problems("org/name:test") == load_problems(FILES["problems"])


def test_completions_are_cut_as_the_recipe_cuts_them():
    problem = load_problems(FILES["problems"])[0]
    for text in ("    return 1\n\ndef g(): pass\nclass A: pass", "    x\n# y\n@z", "    return 1  \n", "\nif x:", ""):
        assert problem.cut(text) == first_block(text)
    mbpp = load_problems(FILES["problems_mbpp"])[0]
    assert mbpp.cut("def f():\n    return 1\n\ndef g(): pass\nassert f()") == "def f():\n    return 1\n\ndef g(): pass"


GOOD = json.loads(FILES["problems"].read_text().splitlines()[0])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps(GOOD) + "\n{'a'}\n", "line 2: broken JSON"),
        (json.dumps({**GOOD, "entry_point": None}), "line 1: entry_point is missing; HumanEval's keys are task_id"),
        (json.dumps({**GOOD, "test": 3}), "line 1: test is a int"),
        (json.dumps({"task_id": 1, "code": "x", "test_list": [1], "text": "t"}), "a test_list of texts"),
        ("[]", "line 1: a problem is a JSON object, not list"),
        ("\n\n", "holds no problem"),
        (f"{json.dumps(GOOD)}\n{json.dumps(GOOD)}", "two problems have the task_id 'own/add'"),
        (b"\xff\xfe", "line 1: UTF-16, not UTF-8"),
    ],
)
def test_a_bad_file_is_told_by_line_and_key(tmp_path, content, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as told:
        load_problems(path)
    assert str(path) in str(told.value)


def test_names_that_lead_nowhere_are_told(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    for source, message in (
        ("absent.jsonl", "no such file, and neither humaneval, mbpp nor a data set's name"),
        ("org/absent", "no folder org/absent here, and the Hub at http://127.0.0.1:9 cannot be reached .*: name a"),
        (tmp_path, "is a folder"),
    ):
        with pytest.raises(UserError, match=message):
            load_problems(source)
    assert not datasets.config.HF_HUB_OFFLINE and not huggingface_hub.constants.HF_HUB_OFFLINE
