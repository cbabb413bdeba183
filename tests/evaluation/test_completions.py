"""The complete command: where prompts come from, what is printed, and the session that asks for them."""

import io
import json
import re

import pytest

from codeparrot_ds.cli.main import main
from codeparrot_ds.errors import UserError
from codeparrot_ds.evaluation.complete import EXAMPLE_PROMPTS, LINE, SEPARATOR, first_block, load_generator
from codeparrot_ds.evaluation.completions import CompleteSettings, coloured, run_complete
from codeparrot_ds.evaluation.prompts import gather_prompts

AREA = EXAMPLE_PROMPTS[0][0]
TWO = CompleteSettings(num_completions=2, max_length=24)


def without_colour(text):
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def test_prompts_come_from_arguments_files_and_standard_input(model_folder, tmp_path, capsys, monkeypatch):
    (tmp_path / "one.py").write_text("def from_file(x):\n")
    (tmp_path / "many.jsonl").write_text('"def first(x):"\n\n{"prompt": "def second(x):", "more": 1}\n')
    monkeypatch.setattr("sys.stdin", io.StringIO("def from_stdin(x):\n"))
    run_complete(
        model_folder,
        gather_prompts(["def f(x):", "-"], [tmp_path / "one.py", tmp_path / "many.jsonl"]),
        settings=TWO,
        batch_size=3,
    )
    printed = capsys.readouterr().out
    names = ["f", "from_stdin", "from_file", "first", "second"]
    places = [printed.index(f"def {name}(x):\n{LINE}\n") for name in names]
    assert places == sorted(places) and places[0] == 0
    assert printed.count("=" * 80) == len(names)


def test_the_recipes_four_prompts_are_the_examples(model_folder, capsys):
    run_complete(model_folder, settings=CompleteSettings(num_completions=1))
    printed = capsys.readouterr().out
    assert all(f"{prompt}\n{LINE}" in printed for prompt, _ in EXAMPLE_PROMPTS)


def test_greedy_completions_are_the_pipelines_cut_by_the_recipe(model_folder, capsys):
    prompts = ["def f(x):", "class Box:\n    def", "# ö"]
    settings = CompleteSettings(temperature=0.0, num_completions=1, max_length=40)
    run_complete(model_folder, prompts, settings=settings)
    printed = capsys.readouterr().out
    pipe = load_generator(model_folder)
    expected = [
        pipe(p, do_sample=False, max_length=40, max_new_tokens=None)[0]["generated_text"][len(p) :] for p in prompts
    ]
    pairs = zip(prompts, expected, strict=True)
    assert printed == "".join(f"{prompt}\n{LINE}\n{first_block(text)}\n\n" for prompt, text in pairs)


def test_json_tells_what_each_completion_is_worth(model_folder, capsys):
    command = [
        "complete",
        str(model_folder),
        "def f(x):",
        "x",
        "--json",
        "--num-completions",
        "2",
        "--max-length",
        "20",
    ]
    assert main(command) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["prompt"] for row in rows] == ["def f(x):"] * 2 + ["x"] * 2
    for row in rows:
        assert row["log_probability"] <= 0 and row["finish"] in ("length", "eos", "end")
        assert row["completion"] == first_block(row["completion"])
    assert rows[0]["completion"] != rows[1]["completion"]  # another seed each
    assert main(command) == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == rows  # and always the same


def test_a_terminal_shows_colours_and_log_probabilities_and_obeys_nothing(model_folder, capsys):
    for prompts in (["def f(x):"], ["def f(x):", "x = 1  # one"]):
        run_complete(model_folder, prompts, settings=TWO, colour=True)
        shown = capsys.readouterr().out
        run_complete(model_folder, prompts, settings=TWO)
        plain = capsys.readouterr().out
        assert "\x1b[1;34mdef\x1b[0m f(x):" in shown
        assert len(re.findall(r"\x1b\[2mlog-probability -?\d+\.\d\d, \d+ tokens, \w+\x1b\[0m", shown)) == 2 * len(
            prompts
        )
        said = re.sub(r"\nlog-probability .*", "", without_colour(shown))
        visible = "".join(letter if letter.isprintable() or letter == "\n" else "." for letter in plain)
        assert len(said) == len(visible) and set(said) - set("\n") <= set(filter(str.isprintable, said))
    assert coloured("'a\x1b[31m", before="x = ") == "\x1b[32m'a\u241b[31m\x1b[0m"
    assert coloured("b' + 1", before="x = 'a") == "\x1b[32mb'\x1b[0m + \x1b[32m1\x1b[0m"


def test_a_session_asks_until_its_input_ends(model_folder, tmp_path, capsys, monkeypatch):
    (tmp_path / "p.py").write_text("class A:\n\n    def f(self):\n")
    typed = (
        f"def f(x):\n    y = 1\n\n:num_completions 1\n:more\n:temperature hot\n:nonsense\n:max_length 2\n\n\nx = 1\n\n"
        f":max_length 64\n:file {tmp_path / 'p.py'}\n:file absent.py\nlast = "
    )
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    run_complete(model_folder, settings=TWO, interactive=True)
    printed = capsys.readouterr().out
    assert printed.count(f"def f(x):\n    y = 1\n{LINE}\n") == 2 and printed.count(SEPARATOR.strip()) == 1
    for part in (
        "error: temperature is a number, not 'hot'\n",
        "error: :nonsense is no command",
        "error: the prompt 'x = 1' has",
        f"    def f(self):\n{LINE}\n",
        "error: absent.py: no such file",
        f"last = \n{LINE}\n",
    ):
        assert part in printed
    assert main(["complete", str(model_folder), "--interactive", "--max-length", "24"]) == 0


def test_prompts_that_do_not_fit_are_refused_before_anything_is_printed(model_folder, tmp_path, capsys):
    for prompts, length, message in (
        (["def f(x):", AREA], 8, "max_length, which includes them, is 8; give at least"),
        (["x = 1\n" * 200], 64, "context is 256"),
        (["def f(x):"], 500, "give at most 256"),
    ):
        with pytest.raises(UserError, match=message):
            run_complete(model_folder, prompts, settings=CompleteSettings(max_length=length))
    (tmp_path / "bad.jsonl").write_text('"x"\n{"text": "y"}\n')
    (tmp_path / "worse.jsonl").write_text("x\n")
    (tmp_path / "binary.py").write_bytes(b"\xff\xfe")
    for file, message in (
        ("bad.jsonl", "bad.jsonl, line 2: neither a text"),
        ("worse.jsonl", "worse.jsonl, line 1: broken JSON"),
        ("binary.py", "no UTF-8"),
        ("absent.py", "no such file"),
    ):
        with pytest.raises(UserError, match=message):
            gather_prompts([], [tmp_path / file])
    for wrong in ({"num_completions": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            CompleteSettings(**wrong)
    assert capsys.readouterr().out == ""
