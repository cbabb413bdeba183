"""Splits by names as the ``datasets`` library has them, sidecars, and the columns of published data sets."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets.data_files import SPLIT_KEYWORDS, get_data_patterns, resolve_pattern

from codeparrot_ds.errors import UserError
from codeparrot_ds.layouts import (
    _WORDS,
    columns_of_text,
    find_columns,
    lay_out,
    named_split,
    no_text,
    parse_columns,
    split_of,
)

TRAIN, VALIDATION, TEST = "train", "validation", "test"


def laid_out(folder: Path, *names: str) -> dict[str, list[str]]:
    """The splits of a folder of such files, and under "" what is left out."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    layout = lay_out(folder, lambda name: name.endswith((".jsonl", ".json", ".parquet", ".jsonl.gz")))
    found = {split: [str(path.relative_to(folder)) for path in paths] for split, paths in layout.splits.items()}
    return found | ({"": [str(path.relative_to(folder)) for path in layout.left_out]} if layout.left_out else {})


def test_the_words_are_those_of_datasets() -> None:
    assert {word: str(split) for split, words in SPLIT_KEYWORDS.items() for word in words} == _WORDS


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-00000-of-00002.parquet", TRAIN),
        ("my_training.jsonl", TRAIN),
        ("dev.json", VALIDATION),
        ("en-val-0.jsonl.gz", VALIDATION),
        ("VALID 3.jsonl", VALIDATION),
        ("code.test.jsonl", TEST),
        ("eval_0.jsonl", TEST),
        ("train-test-0.jsonl", TEST),  # what may be held out is not trained on
        ("part-0.jsonl", None),
        ("latest.jsonl", None),
        ("trainer-0.jsonl", None),
        ("developer_values.jsonl", None),
        ("unittests.jsonl", None),
    ],
)
def test_a_name_says_its_split_in_a_whole_word(name: str, split: str | None) -> None:
    assert split_of(name) == split


@pytest.mark.parametrize(
    "names",
    [
        ("train-0.jsonl", "validation-0.jsonl", "test-0.jsonl"),
        ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"),
        ("train/a.jsonl", "train/b/c.jsonl", "valid/a.jsonl", "testing/x.jsonl"),
        ("a_train.jsonl", "a_dev.jsonl", "a_eval.jsonl", "README.md"),
        ("fr/train.jsonl", "en/train.jsonl", "en/test.jsonl"),
        ("my_train_set/0.jsonl", "my_val_set/0.jsonl"),
        ("x.jsonl", "y.jsonl"),
    ],
)
def test_usual_layouts_are_split_as_datasets_splits_them(tmp_path: Path, names: tuple[str, ...]) -> None:
    found = laid_out(tmp_path, *names)
    expected = {}
    for split, patterns in get_data_patterns(str(tmp_path)).items():
        files = {file for pattern in patterns for file in _resolved(pattern, tmp_path)}
        expected[str(split)] = sorted(str(Path(file).relative_to(tmp_path)) for file in files)
    assert found == expected


def _resolved(pattern: str, folder: Path) -> list[str]:
    try:
        return resolve_pattern(pattern, str(folder), allowed_extensions=[".jsonl", ".parquet"])
    except FileNotFoundError:
        return []


def test_what_says_no_split_trains_unless_something_says_train(tmp_path: Path) -> None:
    assert laid_out(tmp_path / "a", "part-0.jsonl", "part-1.jsonl", "validation.jsonl") == {
        TRAIN: ["part-0.jsonl", "part-1.jsonl"],
        VALIDATION: ["validation.jsonl"],
    }
    assert laid_out(tmp_path / "b", "train-0.jsonl", "part-1.jsonl") == {TRAIN: ["train-0.jsonl"], "": ["part-1.jsonl"]}
    # The outermost names count: an older corpus inside is none of this one.
    assert laid_out(tmp_path / "c", "train/0.jsonl", "validation/0.jsonl", "old/train/0.jsonl", "old/test/0.jsonl") == {
        TRAIN: ["train/0.jsonl"],
        VALIDATION: ["validation/0.jsonl"],
    }
    assert laid_out(tmp_path / "d", "part-0.jsonl", "notes/train.json") == {TRAIN: ["part-0.jsonl"]}
    # A lone .json outside describes a clone.
    assert laid_out(tmp_path / "e", "stats.json", "data/train-0.parquet") == {
        TRAIN: ["data/train-0.parquet"],
        "": ["stats.json"],
    }
    assert laid_out(tmp_path / "f", "a.json", "b.json") == {TRAIN: ["a.json", "b.json"]}


def test_sidecars_and_hidden_files_are_no_data(tmp_path: Path) -> None:
    beside = ("dataset_info.json", "state.json", "._part-0.jsonl", "README.md", ".gitattributes", "_SUCCESS")
    hidden = (".part-0.jsonl.crc", ".git/train.jsonl", ".cache/test-0.jsonl", "_delta_log/00.json", "corpus.json")
    assert laid_out(tmp_path, "part-0.jsonl", *beside, *hidden) == {
        TRAIN: ["part-0.jsonl"],
        "": ["._part-0.jsonl", "dataset_info.json", "state.json"],
    }


def test_names_are_told_apart_in_one_line(tmp_path: Path) -> None:
    def line(name: str, *names: str) -> str | None:
        laid_out(tmp_path / name, *names)
        return lay_out(tmp_path / name, lambda name: name.endswith((".jsonl", ".json"))).describe()

    assert line("plain", "train/0.jsonl", "validation/0.jsonl", "corpus.json") is None
    assert line("flat", "0.jsonl", "1.jsonl") == (
        f"{tmp_path}/flat: no name tells splits apart: its 2 shard(s) are taken as one"
    )
    assert line("usual", "train-0.jsonl", "train-1.jsonl", "test-0.jsonl", "state.json") == (
        f"{tmp_path}/usual: shards by their names: train 2, test 1 (test is not trained on); left out: state.json"
    )


def test_two_shards_never_have_one_name(tmp_path: Path) -> None:
    laid_out(tmp_path, "train/train-0.jsonl", "train-0.jsonl")
    layout = lay_out(tmp_path, lambda name: name.endswith(".jsonl"))
    assert layout.names(TRAIN) == ["train/train-0.jsonl", "train-0.jsonl"]


@pytest.mark.parametrize(
    ("there", "found", "of_its_own"),
    [
        ("train validation test", "validation", "validation"),
        ("train test", "test", None),
        ("test", "test", None),
        ("train", "train", None),  # as codeparrot-clean-valid
    ],
)
def test_what_is_named_to_evaluate_on(there: str, found: str, of_its_own: str | None) -> None:
    assert named_split("validation", there.split(), named=True) == found
    assert named_split("validation", there.split(), named=False) == of_its_own
    assert named_split("train", ["test"], named=True) is None


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ("repo_name path copies size content license hash", "content repo_name path license copies"),
        (
            "hexsha size ext lang max_stars_repo_path max_stars_repo_name max_stars_repo_licenses content",
            "content max_stars_repo_name max_stars_repo_path max_stars_repo_licenses",
        ),
        ("max_stars_repo_path max_stars_repo_name id content", "content max_stars_repo_name max_stars_repo_path"),
        ("content licenses repository_name path size lang", "content repository_name path licenses"),
        ("code repo_name path language license size", "code repo_name path license"),
        ("code answer", ""),
    ],
)
def test_columns_of_published_data_sets(names: str, found: str) -> None:
    assert list(find_columns(tuple(names.split()), "").values()) == found.split()


def test_columns_that_are_named_win(tmp_path: Path) -> None:
    names = ("content", "text", "repo_name", "terms")
    assert find_columns(names, "content=text,license=terms") == {
        "content": "text",
        "repo": "repo_name",
        "license": "terms",
    }
    assert find_columns(names, "text")["content"] == "text"
    assert "content" not in find_columns(names, "body")
    assert no_text(names, "body").startswith("no column 'body' (columns: content, text, repo_name, terms)")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("contnt=x", "'contnt' is nothing that is read of a row; did you mean 'content'"),
        ("content=", "'content=' is not WHAT=COLUMN"),
        ("content=a,content=b", "content is named twice"),
        ("a,content=b", "content is named twice"),
    ],
)
def test_columns_with_a_mistake(text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        parse_columns(text)


def test_a_column_that_is_named_needs_none_beside_it():
    """`code` alone can be anything, unless the user says what it is."""
    assert "content" not in find_columns(("code", "id"), "")
    assert find_columns(("code", "id"), "content=code")["content"] == "code"
    assert columns_of_text(("code", "id"), "") == []
    assert columns_of_text(("code", "id"), "content=code") == ["code"]
    assert columns_of_text(("id", "code", "repo_name"), "") == ["code", "repo_name"]
