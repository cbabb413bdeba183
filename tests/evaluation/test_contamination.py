"""Solutions that are planted in a corpus are found and named, whatever their formatting; others are not."""

import dataclasses
import json
from pathlib import Path

import pytest

from codeparrot_ds.cli.main import main
from codeparrot_ds.data.shards import find_shards
from codeparrot_ds.errors import UserError
from codeparrot_ds.evaluation.contamination import find_contamination, tokens
from codeparrot_ds.evaluation.problems import load_problems

FILE = Path(__file__).with_name("problems.jsonl")
OTHER = "def area(a, b):\n    return a * b\n\n\ndef largest(numbers):\n    return max(numbers)\n" * 20


@pytest.fixture
def planted(tmp_path):
    """A corpus: one whole solution in other spaces among other text, a part of another, and a third held out."""
    problems = {problem.task_id: problem.solution for problem in load_problems(FILE)}
    whole = problems["own/largest"].replace("    ", "\t").replace("\n", "\n\n")
    part = " ".join(problems["own/root"].split()[:6])
    texts = [[OTHER, OTHER], [OTHER, OTHER + whole + OTHER, part, "x"]]
    for split in ("train", "validation"):
        (tmp_path / split).mkdir()
    for number, shard in enumerate(texts):
        lines = "".join(json.dumps({"content": text}) + "\n" for text in shard)
        (tmp_path / "train" / f"part-{number}.jsonl").write_text(lines)
    (tmp_path / "validation" / "part-0.jsonl").write_text(json.dumps({"content": problems["own/decode"]}) + "\n")
    return tmp_path


def test_source_is_split_whatever_its_spaces():
    parts = [b"x_1", b"=", b"a", b"[", b"0x1f", b"]", b"+", b"'", b"\xc3\xb6", b"'", b"#", b"no"]
    assert tokens(b"x_1 =a[0x1f]+'\xc3\xb6'\n\t#no") == parts


@pytest.mark.parametrize("num_workers", [1, 2])
def test_what_is_planted_is_found_and_nothing_else(planted, num_workers):
    problems = load_problems(FILE)
    found = find_contamination(problems, find_shards(planted, "train"), num_workers=num_workers)
    by_id = {row.task_id: row for row in found}
    assert list(by_id) == [problem.task_id for problem in problems]
    largest, root, decode = by_id["own/largest"], by_id["own/root"], by_id["own/decode"]
    assert largest.share == 1.0 and largest.num_ngrams == len(tokens(problems[1].solution.encode())) - 9
    assert largest.document.endswith("part-1.jsonl, document 2")
    assert 0 < root.share < 0.5 and root.document.endswith("part-1.jsonl, document 3")
    assert (decode.share, decode.document) == (0.0, "") and decode.num_ngrams > 0  # only the test set holds it
    assert by_id["own/add"].num_ngrams == 0  # four tokens


def test_the_command_names_the_problems(planted, capsys):
    command = ["data", "contamination", str(planted), "--problems", str(FILE)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("1 of 3 problems (33.3%) have a solution of which one document of ")
    assert "\n  own/largest: 100% of its " in printed and "part-1.jsonl, document 2\n" in printed
    assert printed.endswith("2 solutions are shorter than 10 tokens, and were not looked for\n")
    assert main([*command, "--json", "--ngram-tokens", "4", "--threshold", "0.1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["too_short"] == [] and set(found["contaminated"]) >= {"own/largest", "own/root"}
    assert found["share"] == len(found["contaminated"]) / 5
    assert main([*command, "--split", "validation", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["contaminated"] == ["own/decode"]
    assert main(["data", "contamination", str(planted / "absent"), "--problems", str(FILE)]) == 2


def test_problems_without_a_solution_are_refused(planted):
    problems = [dataclasses.replace(problem, solution=None) for problem in load_problems(FILE)]
    with pytest.raises(UserError, match="5 problems, own/add the first, have no reference solution"):
        find_contamination(problems, find_shards(planted, "train"))


def test_wrong_sizes_are_refused(planted):
    with pytest.raises(UserError, match="at least 1 token"):
        find_contamination(load_problems(FILE), find_shards(planted, "train"), ngram_tokens=0)
