"""``codeparrot-ds check`` as a user and a tool meet it."""

import json
import statistics
import subprocess
import sys
import time

import pytest

from codeparrot_ds.cli.main import main


@pytest.fixture
def bad(tmp_path):
    path = tmp_path / "bad.json"
    path.write_text(
        '{\n  "zero_optimization": {\n    "stage": 2,\n    "sub_group_size": 1e8,\n    "overlap_com": true\n  }\n}'
    )
    return path


def run(capsys, *arguments):
    code = main(["check", *map(str, arguments)])
    return code, capsys.readouterr().out


def test_findings_are_lines_that_an_editor_can_follow(bad, capsys):
    code, said = run(capsys, bad, "--device", "cuda")
    assert code == 1
    assert said.splitlines() == [
        f"{bad}:4: warning: zero_optimization.sub_group_size: does nothing at stage 2: it is for stage 3",
        f"{bad}:5: error: zero_optimization.overlap_com: unknown key, which DeepSpeed 0.19.8 refuses; "
        "did you mean 'overlap_comm'?",
    ]


def test_warnings_alone_are_no_failure(tmp_path, capsys):
    path = tmp_path / "own.json"
    path.write_text('{"zero_optimization": {"stage": 2, "sub_group_size": 5}}')
    assert run(capsys, path)[0] == 0


def test_json_is_one_object_for_tools(bad, tmp_path, capsys):
    code, said = run(capsys, bad, tmp_path / "none.json", "zero2", "--json", "--device", "cuda")
    report = json.loads(said)
    assert code == 1 and (report["errors"], report["warnings"]) == (2, 1)
    assert [len(file["findings"]) for file in report["files"]] == [2, 1, 0]
    first = report["files"][0]["findings"][1]
    assert (first["file"], first["line"], first["severity"]) == (str(bad), 5, "error")
    assert first["key"] == "zero_optimization.overlap_com" and "overlap_comm" in first["message"]
    missing = report["files"][1]["findings"][0]
    assert missing["line"] is None and "neither a file nor a shipped config" in missing["message"]


def test_explanation_shows_every_value_with_its_source(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("micro_batch_size: 4\n")
    code, said = run(
        capsys, "zero3", "--preset", "large", "--config", tmp_path / "run.yaml", "--world-size", 8, "--explain"
    )
    lines = {line.split()[0]: line for line in said.splitlines() if line.startswith("  ")}
    assert code == 0 and "resolved for 8 rank(s):" in said
    assert lines["gradient_accumulation_steps"].endswith("= 512 / (4 x 8)")
    assert lines["train_micro_batch_size_per_gpu"].endswith(f"micro_batch_size ({tmp_path / 'run.yaml'})")
    assert lines["optimizer.params.lr"].endswith("learning_rate (preset large)")
    assert lines["gradient_clipping"].endswith("max_grad_norm (default)")
    assert lines["zero_optimization.stage"].endswith("zero3.json:3")


def test_explanation_as_json(capsys):
    code, said = run(capsys, "zero2", "--world-size", 2, "--explain", "--json")
    (file,) = json.loads(said)["files"]
    assert code == 0 and file["world_size"] == 2
    assert file["resolved"]["gradient_accumulation_steps"] == 8
    assert file["sources"]["gradient_clipping"] == "run config: max_grad_norm (default)"


def test_a_batch_that_does_not_divide_is_found(capsys):
    code, said = run(capsys, "zero2", "--preset", "small", "--world-size", 7, "--explain")
    assert code == 1 and "global_batch_size 192 is not divisible by micro_batch_size x world_size" in said
    # The model's size is known with a preset, and the default bucket does not fit it.
    assert run(capsys, "zero2", "--preset", "small", "--world-size", 8)[0] == 0


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.json", '{\n  // stage\n  "zero_optimization" {}\n}', ":3:23: not JSON: Expecting ':' delimiter"),
        ("a.json", '{"zero_optimization": {"stage": 2', ":1:34: not JSON: Expecting ',' delimiter"),
        ("a.json", "", "is empty; the smallest DeepSpeed config is"),
        ("a.yaml", "zero_optimization:\n  stage: 2\n", "is YAML; a DeepSpeed config is a JSON file"),
        ("a.json", "zero_optimization:\n  stage: 2\n", ":2:3: not JSON: this looks like YAML"),
        ("a.json", None, "is a folder"),
        (
            "a.json",
            '{"nebula": {"enabled": true}}',
            "nebula: is a key of another DeepSpeed version, which 0.19.8 refuses",
        ),
        (
            "a.json",
            '{"optimizer": {"type": "AdamW", "params": {"eps": "1e-4"}}}',
            "is the text '1e-4'; write the number",
        ),
        ("a.json", '{"zero_optimization": {"stage": 2, "reduce_bucket_size": -5e7}}', "above 0, not -50000000.0"),
        ("a.json", '{"zero_optimization": {"stage": 2, "reduce_bucket_size": 0}}', "above 0, not 0"),
        ("a.json", "[]", "a DeepSpeed config is a JSON object {...}, not list"),
        ("a.json", '{"a": Infinity}', "Infinity is not a JSON number"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, capsys, name, content, sentence):
    path = tmp_path / name
    path.mkdir() if content is None else path.write_text(content)
    code, said = run(capsys, path, "--device", "cuda")
    assert code == 1
    assert sentence in said and said.count("\n") == 1


def test_check_imports_neither_torch_nor_deepspeed_and_answers_at_once():
    script = (
        "import sys; from codeparrot_ds.cli.main import main; "
        "main(['check', 'zero2', 'zero3_nvme', '--preset', 'large', '--explain', '--world-size', '8']); "
        "print(sorted({'torch', 'deepspeed', 'transformers'} & set(sys.modules)))"
    )
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        seconds.append(time.perf_counter() - started)
    assert answer.stdout.splitlines()[-1] == "[]"
    assert statistics.median(seconds) < 2  # 0.3 s on a quiet machine


def test_ranks_that_cannot_share_the_batch_or_the_lanes_are_errors(capsys):
    code, said = run(capsys, "zero2", "--preset", "demo", "--world-size", 7, "--explain")
    assert code == 1 and "resolved for" not in said
    assert "preset demo: error: num_lanes=64 cannot be shared by 7 ranks" in said
    assert said.count("preset demo: error: global_batch_size 16 is not divisible by") == said.count("x 7 = 56") == 1
