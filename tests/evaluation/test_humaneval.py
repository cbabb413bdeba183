"""humaneval, from completions to the result file: resumed, shared among processes, judged in the sandbox."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from codeparrot_ds.cli.main import main
from codeparrot_ds.errors import UserError
from codeparrot_ds.evaluation import humaneval as judging
from codeparrot_ds.evaluation.humaneval import Settings, default_folder, describe, humaneval
from codeparrot_ds.evaluation.pass_at_k import estimate
from codeparrot_ds.evaluation.problems import load_problems
from codeparrot_ds.sandbox.judge import Limits

FILE = Path(__file__).with_name("problems.jsonl")
SETTINGS = Settings(problems=str(FILE), num_samples=2, temperatures=(0.0, 0.6), max_new_tokens=8)


def rows(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def write(folder, name, content):
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))


def completed(model_folder, folder, **settings):
    values = {**SETTINGS.__dict__, **settings}
    return humaneval(model_folder, folder, settings=Settings(**values), judge=False, batch_size=4)


def test_completions_that_solve_problems_are_counted_and_told(model_folder, tmp_path, capsys):
    """A tiny model solves nothing: the completions of a better one are put in their places."""
    completed(model_folder, tmp_path / "r")
    problems = load_problems(FILE)
    kept = rows(tmp_path / "r", "generations-t0.6")
    assert {(row["task_id"], row["sample"]) for row in kept} == {(p.task_id, n) for p in problems for n in (0, 1)}
    assert len({row["seed"] for row in kept}) == len(kept) and max(row["tokens"] for row in kept) <= 8
    solved = {problem.task_id: problem.solution + "\n\ndef" for problem in problems[:3]}
    for row in kept:
        if row["task_id"] in solved and (row["sample"] == 0 or row["task_id"] == problems[0].task_id):
            row["completion"] = solved[row["task_id"]]
    write(tmp_path / "r", "generations-t0.6", kept)
    code = main(
        ["humaneval", str(model_folder), "--problems", str(FILE), "--num-samples", "2", "--temperatures", "0", "0.6"]
        + ["--max-new-tokens", "8", "--out", str(tmp_path / "r"), "--allow-execution", "--k", "1,2"]
    )
    printed = capsys.readouterr().out
    assert code == 0
    results = json.loads((tmp_path / "r" / "results.json").read_text())
    expected = [estimate([(2, 2), (2, 1), (2, 1), (2, 0), (2, 0)], k) for k in (1, 2)]
    metrics = results["results"]["problems"]
    assert metrics["pass@1,create_test"] == expected[0].value == pytest.approx(0.4)
    assert metrics["pass@2,create_test"] == expected[1].value == pytest.approx(0.6)
    assert metrics["pass@1_stderr,create_test"] == expected[0].stderr
    own = results["codeparrot_ds"]
    assert own["best"]["1"]["temperature"] == 0.6 and own["temperatures"]["0"]["pass_at_k"]["1"]["value"] == 0.0
    assert own["temperatures"]["0.6"]["verdicts"]["passed"] == 4 and own["temperatures"]["0.6"]["problems_solved"] == 3
    assert sum(own["temperatures"]["0.6"]["verdicts"].values()) == 10
    assert results["n-samples"]["problems"] == {"original": 5, "effective": 5}
    assert f"{100 * 0.4:6.2f}% ({100 * expected[0].low:.1f} - {100 * expected[0].high:.1f})*" in printed
    assert printed == describe(results) + f"\nresults in {tmp_path / 'r'}\n"
    verdicts = rows(tmp_path / "r", "verdicts-t0.6")
    assert {row["task_id"] for row in verdicts if row["kind"] == "passed"} == set(solved)


def test_a_killed_command_goes_on_where_it_was(model_folder, tmp_path, monkeypatch):
    completed(model_folder, tmp_path / "whole")
    completed(model_folder, tmp_path / "r", num_samples=1, temperatures=(0.6,))
    path = tmp_path / "r" / "generations-t0.6.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3]) + lines[3][:20])  # cut in the middle of a line
    begun = path.read_bytes()[: len(b"".join(lines[:3]))]
    completed(model_folder, tmp_path / "r")
    assert path.read_bytes().startswith(begun)
    for name in ("generations-t0.6", "generations-t0"):
        by_key = [
            {(row["task_id"], row["sample"]): row["completion"] for row in rows(tmp_path / folder, name)}
            for folder in ("whole", "r")
        ]
        assert by_key[0] == by_key[1] and len(rows(tmp_path / "r", name)) == len(by_key[0])
    # All is there: no model is needed any more, and nothing is judged twice.
    results = humaneval(model_folder, tmp_path / "r", settings=SETTINGS, num_workers=2)
    verdicts = (tmp_path / "r" / "verdicts-t0.6.jsonl").read_bytes()
    monkeypatch.setattr("codeparrot_ds.evaluation.models.load_model", None)
    judged = []

    def judge_all(items, **settings):
        items = list(items)
        judged.append({check for _, check in items})
        return real(items, **settings)

    real = judging.judge_all
    monkeypatch.setattr(judging, "judge_all", judge_all)
    again = humaneval(model_folder, tmp_path / "r", settings=SETTINGS)
    assert again["results"] == results["results"] and not judged
    assert (tmp_path / "r" / "verdicts-t0.6.jsonl").read_bytes() == verdicts
    # But for what other tests or limits would say.
    problems = load_problems(FILE)
    other = [dataclasses.replace(problems[0], check=dataclasses.replace(problems[0].check, setup="import math"))]
    monkeypatch.setattr(judging, "load_problems", lambda *_: other + problems[1:])
    humaneval(model_folder, tmp_path / "r", settings=SETTINGS, num_workers=2)
    assert judged == [{other[0].check}] * 2  # temperatures
    humaneval(model_folder, tmp_path / "r", settings=SETTINGS, limits=Limits(seconds=9), num_workers=2)
    assert judged[2:] == [{problem.check for problem in other + problems[1:]}] * 2


def test_processes_share_the_problems_and_write_the_same(model_folder, tmp_path):
    settings = {"temperatures": (0.6,)}
    completed(model_folder, tmp_path / "one", **settings)
    humaneval(
        model_folder,
        tmp_path / "two",
        settings=Settings(**{**SETTINGS.__dict__, **settings}),
        judge=False,
        num_processes=2,
        device="cpu",
    )
    parts = [rows(tmp_path / "two", f"generations-t0.6.{n}of2") for n in (1, 2)]
    assert [len(part) for part in parts] == [6, 4]
    key = ("task_id", "sample", "completion", "seed")
    found = sorted(tuple(row[k] for k in key) for part in parts for row in part)
    assert found == sorted(tuple(row[k] for k in key) for row in rows(tmp_path / "one", "generations-t0.6"))


def test_other_settings_and_other_folders_are_refused(model_folder, tmp_path, save_model):
    completed(model_folder, tmp_path / "r", temperatures=(0.0,))
    with pytest.raises(UserError, match=r"max_new_tokens was 8 and is 9; name another folder with --out"):
        completed(model_folder, tmp_path / "r", max_new_tokens=9)
    other = save_model(tmp_path / "other", dtype="bfloat16")
    with pytest.raises(UserError, match="model was"):
        completed(other, tmp_path / "r")
    humaneval(
        model_folder,
        tmp_path / "r",
        settings=Settings(**{**SETTINGS.__dict__, "temperatures": (0.0,), "max_new_tokens": 3}),
        judge=False,
        overwrite=True,
    )
    assert max(row["tokens"] for row in rows(tmp_path / "r", "generations-t0")) <= 3
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="is not empty and holds no results"):
        completed(model_folder, tmp_path / "full")
    for wrong in ({"temperatures": ()}, {"temperatures": (-1.0,)}, {"temperatures": (1.0, 1.0)}, {"top_p": 0.0}):
        with pytest.raises(UserError):
            completed(model_folder, tmp_path / "new", **wrong)
    assert not (tmp_path / "new").exists()


def test_nothing_runs_unless_it_is_allowed(model_folder, tmp_path, capsys, monkeypatch):
    command = ["humaneval", str(model_folder), "--problems", str(FILE), "--out", str(tmp_path / "r")]
    for options in ([], ["--allow-execution", "--generate-only"]):
        assert main([*command, *options]) == 2
        assert "allow that with --allow-execution" in capsys.readouterr().err
    monkeypatch.setenv("PATH", str(tmp_path))  # no bubblewrap
    process = subprocess.run(
        [sys.executable, "-m", "codeparrot_ds", *command, "--allow-execution"], capture_output=True, text=True
    )
    assert process.returncode == 2 and "apt-get install bubblewrap" in process.stderr
    assert len(process.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "r").exists()


def test_problems_whose_own_solutions_fail_are_refused_unless_that_is_accepted(model_folder, tmp_path, capsys):
    problems = [json.loads(line) for line in FILE.read_text().splitlines()[:2]]
    problems[1]["canonical_solution"] = problems[1].pop("mutated_solution")
    path = tmp_path / "wrong.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in problems))
    options = ["--num-samples", "1", "--temperatures", "0", "--max-new-tokens", "2", "--out", str(tmp_path / "r")]
    command = ["humaneval", str(model_folder), "--problems", str(path), *options]
    assert main([*command, "--allow-execution"]) == 2
    assert f"1 of 2 reference solutions of {path} do not pass their own tests here (own/largest: failed " in (
        capsys.readouterr().err
    )
    assert not (tmp_path / "r").exists()  # nothing was generated
    assert main([*command, "--allow-execution", "--limit", "1"]) == 0  # those that are judged count
    assert "reference solutions: 1 of 1 pass their own tests\n" in capsys.readouterr().out
    assert main([*command, "--allow-execution", "--accept-failing-references"]) == 0
    printed = capsys.readouterr().out
    assert "\nreference solutions: 1 of 2 pass their own tests; not own/largest: failed AssertionError\n" in printed
    results = json.loads((tmp_path / "r" / "results.json").read_text())
    found = results["codeparrot_ds"]["references"]
    assert found["passed"] == 1 and found["failed"] == {"own/largest": "failed AssertionError"}
    assert main([*command, "--generate-only"]) == 0  # nothing is run, no solution either


def test_results_of_a_run_lie_in_it(run_folder):
    assert default_folder(run_folder, "humaneval") == run_folder / "humaneval" / "step-00001000-humaneval"
    assert default_folder("org/name", "google/mbpp:test") == Path("humaneval/name-mbpp")
    assert default_folder("org/name", "mbpp+") == Path("humaneval/name-mbppplus")


def test_programs_import_numpy_where_they_may(model_folder, tmp_path):
    completed(model_folder, tmp_path / "r", limit=1, temperatures=(0.6,))
    kept = rows(tmp_path / "r", "generations-t0.6")
    for row in kept:
        row["completion"] = "\n    import numpy\n    return a + b if numpy.arange(3).sum() == 3 else None"
    write(tmp_path / "r", "generations-t0.6", kept)
    command = [
        "humaneval",
        str(model_folder),
        "--problems",
        str(FILE),
        "--limit",
        "1",
        "--num-samples",
        "2",
        "--k",
        "1",
    ]
    command += ["--temperatures", "0.6", "--max-new-tokens", "8", "--out", str(tmp_path / "r"), "--allow-execution"]
    for options, kind in ((["--imports", "numpy"], "passed"), ([], "error")):
        (tmp_path / "r" / "verdicts-t0.6.jsonl").unlink(missing_ok=True)
        assert main([*command, *options]) == 0
        assert {row["kind"] for row in rows(tmp_path / "r", "verdicts-t0.6")} == {kind}
