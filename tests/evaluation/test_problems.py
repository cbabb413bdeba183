"""Problems from files of every kind and from the Hub; right solutions score 1.0, wrong ones 0.0."""

import gzip
import json
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest

from codeparrot_ds.errors import UserError
from codeparrot_ds.evaluation.complete import first_block
from codeparrot_ds.evaluation.pass_at_k import estimate
from codeparrot_ds.evaluation.problems import PUBLIC, load_problems
from codeparrot_ds.sandbox.judge import judge_all
from tests.data.hub_server import client_process, running_hub
from tests.problem_sets.sets import SETS

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


ROWS = [{**SETS["mbpp-sanitized"][0], "task_id": number} for number in (1, 2)]
TEXT = json.dumps(ROWS[0]) + "\r\n\n" + json.dumps(ROWS[1])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", b"\xef\xbb\xbf" + TEXT.encode()),
        ("rows.jsonl.gz", gzip.compress(TEXT[:9].encode()) + gzip.compress(TEXT[9:].encode())),
        ("sanitized-mbpp.json", json.dumps(ROWS, indent=2).encode()),
        ("sanitized-mbpp.json.gz", gzip.compress(json.dumps(ROWS).encode())),
        ("lines.json", TEXT.encode()),
        ("test-00000-of-00001.parquet", None),
    ],
)
def test_each_kind_of_file_holds_the_same_problems(tmp_path, name, content):
    if content is None:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / name)
    else:
        (tmp_path / name).write_bytes(content)
    (tmp_path / "plain.jsonl").write_text(TEXT)
    assert load_problems(tmp_path / name) == load_problems(tmp_path / "plain.jsonl")
    assert [problem.task_id for problem in load_problems(tmp_path / name)] == ["1", "2"]


def test_a_bad_row_is_named_in_each_kind_of_file(tmp_path):
    rows = [{**ROWS[0], "tests": ""}, {**ROWS[1], "tests": "assert False"}]
    (tmp_path / "rows.json").write_text(json.dumps(rows, indent=2))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    for name, place in (("rows.json", "row 2"), ("rows.parquet", "row 2")):
        with pytest.raises(UserError, match=f"{name}, {place}: tests may be a part of the tests") as refusal:
            load_problems(tmp_path / name)
        assert str(refusal.value).startswith(str(tmp_path))
    for name, content, words in (
        ("cut.parquet", (tmp_path / "rows.parquet").read_bytes()[:-9], "row 1: truncated or damaged"),
        ("cut.json", f'[{json.dumps(ROWS[0])},\n {{"task_id"'.encode(), "row 2: "),
        ("cut.jsonl.gz", gzip.compress(TEXT.encode())[:-9], "truncated or damaged"),
        ("text.jsonl.gz", TEXT.encode(), "truncated or damaged"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=words):
            load_problems(tmp_path / name)


@pytest.mark.parametrize("number", ["18446744073709551617", "1e400", "Infinity"])
def test_numbers_of_tests_are_exact_in_each_kind_of_file(tmp_path, number):
    """Rows of texts are read by a faster reader, to which 2**64 is a float, and infinity no number."""
    row = json.dumps({**SETS["humanevalplus-file"][0], "plus_input": [["number"]]}).replace('"number"', number)
    (tmp_path / "lines.jsonl").write_text(row)
    (tmp_path / "lines.jsonl.gz").write_bytes(gzip.compress(row.encode()))
    (tmp_path / "array.json").write_text(f"[\n{row}]")
    sources = [load_problems(path)[0].check for path in sorted(tmp_path.iterdir())]
    assert sources[0] == sources[1] == sources[2]
    assert repr(json.loads(number)) in str(sources[0])


def test_a_split_of_mbpps_one_file_is_its_task_ids(tmp_path):
    path = tmp_path / "mbpp.jsonl"
    path.write_text("".join(json.dumps({**ROWS[0], "task_id": number}) + "\n" for number in range(974, 0, -1)))
    splits = {"prompt": (1, 10), "test": (11, 510), "validation": (511, 600), "train": (601, 974)}
    for split, (first, last) in splits.items():
        ids = [problem.task_id for problem in load_problems(f"{path}:{split}")]
        assert ids == [str(number) for number in range(first, last + 1)]
    assert len(load_problems(path)) == 974
    path.write_text(path.read_text().partition("\n")[2])
    with pytest.raises(UserError, match="would be the problems 601 to 974 of MBPP, and the file has no task_id 974;"):
        load_problems(f"{path}:train")
    assert len(load_problems(f"{path}:test")) == 500


def test_keys_that_are_not_read_are_named(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({**ROWS[0], "topic": "lists", "author": "me", "empty": ""}))
    said = []
    load_problems(tmp_path / "rows.jsonl", said.append)
    assert said == [f"keys of {tmp_path / 'rows.jsonl'} that are not read: author, topic"]


def task_ids(name):
    return [problem.task_id for problem in load_problems(name)]


def test_the_public_sets_are_known_by_name(tmp_path):
    """In the form that the Hub has them: parquet, with a column for every key."""
    sets = {"humaneval": "humaneval", "humaneval+": "humanevalplus-hub", "mbpp": "mbpp", "mbpp+": "mbppplus-hub"}
    with running_hub() as hub, client_process(tmp_path, HF_ENDPOINT=hub.endpoint) as call:
        for name, schema in sets.items():
            place = PUBLIC[name.replace("+", "plus")].partition(":")[0]
            row = {**SETS[schema][0], "task_id": f"of {name}"}
            table = pyarrow.Table.from_pylist([row])
            pyarrow.parquet.write_table(table, tmp_path / "test.parquet")
            hub.commit(place, {"data/test-00000-of-00001.parquet": (tmp_path / "test.parquet").read_bytes()})
            assert call(task_ids, name) == [f"of {name}"]
            assert call(task_ids, name.replace("+", "plus")) == [f"of {name}"]


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
        (
            json.dumps({"task_id": 1, "code": "x", "test_list": [1], "text": "t"}),
            "line 1: test_list is no list of texts",
        ),
        (f"{json.dumps(GOOD)}\n{json.dumps({**GOOD, 'task_id': 2, 'suffix': 'x'})}", "line 2: the row has a suffix"),
        ("[" * 100_000, "line 1: broken JSON"),
        ('{"task_id": ' + "1" * 5000 + "}", "line 1: broken JSON"),
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
        ("absent.jsonl", "no such file, and neither humaneval, humanevalplus, mbpp, mbppplus nor a data set's name"),
        (
            "mbpp+",
            "the Hub at http://127.0.0.1:9 cannot be reached .*: name a .jsonl file .* such as MbppPlus.jsonl.gz",
        ),
        ("org/absent", "no folder org/absent here, and the Hub at http://127.0.0.1:9 cannot be reached .*: name a"),
        (tmp_path, "is a folder"),
    ):
        with pytest.raises(UserError, match=message):
            load_problems(source)
    assert not datasets.config.HF_HUB_OFFLINE and not huggingface_hub.constants.HF_HUB_OFFLINE


def test_a_function_that_is_named_like_a_built_in_is_judged_itself(tmp_path):
    rows = [
        {"task_id": 1, "text": "t", "code": "def abs(x):\n    return max(x, -x)", "test_list": ["assert abs(-3) == 3"]},
        {"task_id": 2, "text": "t", "code": "def sum(a, b):\n    return a + b", "test_list": ["assert sum(1, 2) == 3"]},
    ]
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    problems = load_problems(path)
    assert score(problems, [problem.solution for problem in problems]) == 1.0
    assert score(problems, ["\ndef abs(x): return 'wrong'", "\ndef sum(*values): return 4"]) == 0.0
