import errno
import json
import subprocess
import sys
import time

import pytest

import codeparrot_ds
from codeparrot_ds import cli
from codeparrot_ds.cli import main
from codeparrot_ds.zero.ds_config import ds_configs_folder

COMMANDS = "demo corpus tokenizer data train doctor evaluate complete humaneval".split()
COMMANDS += "check plan compare checkpoint hub report".split()
HEAVY = ("torch", "deepspeed", "transformers", "datasets", "pyarrow", "matplotlib", "wandb", "pandas")


def run(*arguments, **kwargs):
    command = [sys.executable, "-m", "codeparrot_ds", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, **kwargs)


def modules_after(*arguments):
    """What is imported once `codeparrot-ds ARGUMENTS` has run, and its exit code."""
    script = (
        "import json, sys\nfrom codeparrot_ds.cli import main\n"
        "try:\n    code = main(sys.argv[1:])\nexcept SystemExit as stop:\n    code = stop.code\n"
        "print(json.dumps([code, sorted(sys.modules)]))"
    )
    result = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("arguments", [["--help"], ["check", "zero2", "--preset", "large"]])
def test_answers_within_a_second_and_without_torch(arguments):
    code, modules = modules_after(*arguments)
    assert code == 0
    assert not set(HEAVY) & set(modules)
    seconds = []
    while not seconds or (seconds[-1] >= 1 and len(seconds) < 30):  # the machine may be busy for a while
        started = time.perf_counter()
        assert run(*arguments).returncode == 0
        seconds.append(time.perf_counter() - started)
    assert seconds[-1] < 1, seconds


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    assert shown.startswith(f"usage: codeparrot-ds {command} ")


@pytest.mark.parametrize("command", [["--help"], *([command, "--help"] for command in COMMANDS)])
def test_help_shows_a_default_or_a_duty_for_every_option(command):
    parser = cli.build_parser()
    (commands,) = (action for action in parser._actions if action.dest == "==SUPPRESS==" and action.choices)
    if command[0] not in commands.choices:
        assert set(commands.choices) == set(COMMANDS)
        return
    for action in commands.choices[command[0]]._actions:
        if action.option_strings and action.help != "==SUPPRESS==" and action.dest not in ("help", "config"):
            stated = "(default: " in action.help or "(required)" in action.help
            assert stated or action.nargs == 0 or action.dest == "preset", action.option_strings


def test_no_arguments_show_the_help(capsys):
    assert main([]) == 0
    assert "commands:" in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"codeparrot-ds {codeparrot_ds.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["trian"], "cannot be 'trian'; did you mean 'train'?"),
        (["train", "--max-trian-steps", "3"], "unknown option --max-trian-steps; did you mean '--max-train-steps'?"),
        (["train", "lrge"], "unknown preset 'lrge'; did you mean 'large'?"),
        (["train", "--config", "none.yaml"], "none.yaml: no such run config file"),
        (["train", "small"], "--data is missing"),
        (["corpus", "/nonexistent", "--out", "out"], "source /nonexistent does not exist"),
        (["corpus", "src", "--out", "out", "--overwrit"], "unknown option --overwrit; did you mean '--overwrite'?"),
        (["tokenizer", "--data", "none", "--out", "out"], "the data none does not exist"),
        (["data", "inspct", "corpus"], "did you mean 'inspect'?"),
        (["data", "inspect", "none"], "there is no run or data none"),
        (["check"], "nothing to check"),
        (["plan"], "nothing to plan"),
        (["compare"], "nothing to compare"),
        (["compare", "--search", "--world-sizes", "1,2"], "--search looks for the best config of one number of ranks"),
        (["compare", "zero2", "--step", "9"], "unknown option --step"),
        (["checkpoint", "list", "none"], "there is no run none, and none of that name in runs"),
        (["checkpoint", "lst", "none"], "did you mean 'list'?"),
        (["hub", "status", "none"], "there is no run none"),
        (["report", "none"], "there is no run none"),
        (["evaluate", "none/at/all"], "there is no run or model folder none/at/all"),
        (["complete", "./none"], "there is no run or model folder ./none"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(arguments, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr().err
    assert code == 2
    assert sentence in said
    assert said.startswith("codeparrot-ds") and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_check_prints_all_findings_and_fails_on_errors(tmp_path, capsys):
    bad = tmp_path / "bad.json"
    bad.write_text('{"gradient_cliping": 1, "zero_optimisation": {"stage": 2}}')
    broken = tmp_path / "broken.json"
    broken.write_text('{"fp16": {"enabled": true,}}')
    assert main(["check", str(bad), str(broken), "zero3"]) == 1
    said = capsys.readouterr().out
    assert "did you mean 'gradient_clipping'?" in said and "did you mean 'zero_optimization'?" in said
    assert f"{broken}:1:" in said
    assert f"{ds_configs_folder() / 'zero3.json'}: nothing wrong" in said


def test_check_of_fp16_depends_on_the_device(capsys):
    assert main(["check", "zero2_fp16", "--device", "cpu"]) == 1
    assert "choose zero2.json (bf16) or zero2_fp32.json" in capsys.readouterr().out
    assert main(["check", "zero2_fp16", "--device", "cuda"]) == 0


@pytest.mark.parametrize(("preset", "parameters"), [("small", "111,008,256"), ("large", "1,529,628,800")])
def test_check_shows_the_parameters(preset, parameters, capsys):
    assert main(["check", "--preset", preset]) == 0
    assert f"{parameters} parameters" in capsys.readouterr().out


def test_check_reads_the_run_config(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(f"deepspeed: {tmp_path}/own.json\nmax_grad_norm: 0.5\n")
    (tmp_path / "own.json").write_text('{"gradient_clipping": 1.0}')
    assert main(["check", "--config", str(tmp_path / "run.yaml")]) == 1
    assert "gradient_clipping: is 1.0 but the run config's max_grad_norm says 0.5" in capsys.readouterr().out


def test_corpus_and_tokenizer_on_a_source_tree(tmp_path, capsys):
    source = tmp_path / "src"
    source.mkdir()
    for number in range(60):  # unlike each other, or they would be near duplicates
        body = "\n".join(f"    value_{line} = part_{number}_{line} * {number + line}" for line in range(30))
        (source / f"module_{number}.py").write_text(f"def function_{number}(argument):\n{body}\n    return value_0\n")
    corpus, tokenizer = str(tmp_path / "corpus"), str(tmp_path / "tokenizer")
    assert main(["corpus", str(source), "--out", corpus, "--validation-fraction", "0.1"]) == 0
    assert "\n60 documents" in capsys.readouterr().out
    assert main(["tokenizer", "--data", corpus, "--out", tokenizer, "--vocab-size", "300"]) == 0
    assert "300 tokens from" in capsys.readouterr().out
    assert main(["corpus", str(source), "--out", corpus]) == 2
    assert main(["check", "--config", str(_config_with(tmp_path, tokenizer))]) == 0
    assert "(vocabulary 300: " in capsys.readouterr().out


def _config_with(folder, tokenizer):
    path = folder / "run.yaml"
    path.write_text(f"tokenizer: {tokenizer}\nmodel: demo\n")
    return path


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (OSError(errno.ENOSPC, "No space", "/data/x"), 2, "codeparrot-ds: error: the disk is full: /data/x\n"),
        (PermissionError(errno.EACCES, "no", "/etc/x"), 2, "codeparrot-ds: error: permission denied: /etc/x\n"),
        (KeyboardInterrupt(), 130, "codeparrot-ds: interrupted\n"),
    ],
)
def test_refusals_of_the_system_are_one_sentence(monkeypatch, capsys, error, code, said):
    def fail(arguments):
        raise error

    monkeypatch.setattr(cli, "_run_check", fail)
    assert main(["check", "zero2"]) == code
    assert capsys.readouterr().err == said


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch):
    def fail(arguments):
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(cli, "_run_check", fail)
    with pytest.raises(OSError, match="broken"):
        main(["check", "zero2"])


def test_a_full_disk_is_one_sentence():
    result = subprocess.run(
        f"{sys.executable} -m codeparrot_ds check zero2 > /dev/full",
        shell=True,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr == "codeparrot-ds: error: the disk is full\n"


def test_a_reader_that_leaves_is_no_error():
    command = f"{sys.executable} -m codeparrot_ds check zero2 zero3 | true; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert result.stderr == ""
    assert result.returncode in (0, 141)
