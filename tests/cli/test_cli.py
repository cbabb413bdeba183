import argparse
import errno
import importlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import codeparrot_ds
from codeparrot_ds.cli import main as cli
from codeparrot_ds.cli.main import main
from codeparrot_ds.config.run_config import FIELDS, REQUIRED
from codeparrot_ds.ds_config.file import ds_configs_folder
from codeparrot_ds.memory.plan import VOCAB_SIZE
from tests.cli.slips import TRAIN, prepare, write_tokenizer

COMMANDS = "demo corpus tokenizer data train doctor evaluate complete humaneval".split()
COMMANDS += "check plan compare runs checkpoint hub report completion".split()
HEAVY = ("torch", "deepspeed", "transformers", "datasets", "pyarrow", "matplotlib", "wandb", "pandas")


def run(*arguments, **kwargs):
    command = [sys.executable, "-m", "codeparrot_ds", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, **kwargs)


def modules_after(*arguments):
    """What is imported once `codeparrot-ds ARGUMENTS` has run, and its exit code."""
    script = (
        "import json, sys\nfrom codeparrot_ds.cli.main import main\n"
        "try:\n    code = main(sys.argv[1:])\nexcept SystemExit as stop:\n    code = stop.code\n"
        "print(json.dumps([code, sorted(sys.modules)]))"
    )
    result = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["check", "zero2", "--preset", "large"],
        ["train", "large", "--print-config"],
        ["runs"],
        ["completion", "bash"],
    ],
)
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
    broken.write_text('{"fp16": {"enabled": true}')
    assert main(["check", str(bad), str(broken), "zero3_fp32"]) == 1
    said = capsys.readouterr().out
    assert "did you mean 'gradient_clipping'?" in said and "did you mean 'zero_optimization'?" in said
    assert f"{broken}:1:" in said
    assert f"{ds_configs_folder() / 'zero3_fp32.json'}: nothing wrong" in said


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
    said = capsys.readouterr().out
    assert "\n60 documents" in said
    assert next_commands(said) == [["tokenizer", "--data", corpus, "--out", tokenizer]]
    assert main(["tokenizer", "--data", corpus, "--out", tokenizer, "--vocab-size", "300"]) == 0
    said = capsys.readouterr().out
    train = ["train", "small", "--data", corpus, "--tokenizer", tokenizer]
    assert "300 tokens from" in said and next_commands(said) == [[*train, "--dry-run"], train]
    assert main(["corpus", str(source), "--out", corpus]) == 2
    assert main(["check", "--config", str(_config_with(tmp_path, tokenizer))]) == 0
    assert "(vocabulary 300: " in capsys.readouterr().out


def next_commands(said):
    """What the end of an output proposes, as words; each is a command that the parser takes."""
    lines = said.partition("\nNext:\n")[2].splitlines()
    found = [shlex.split(line, comments=True)[1:] for line in lines]
    for words in found:
        cli.build_parser().parse_args(words)
    return found


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

    monkeypatch.setattr("codeparrot_ds.cli.check._run_check", fail)
    assert main(["check", "zero2"]) == code
    assert capsys.readouterr().err == said


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch):
    def fail(arguments):
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr("codeparrot_ds.cli.check._run_check", fail)
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


def parsers(parser=None, path=()):
    """Every parser that has a command to itself, by its path: ("checkpoint", "export")."""
    parser = parser or cli.build_parser()
    inner = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not inner:
        yield path, parser
    for action in inner:
        for name, child in action.choices.items():
            yield from parsers(child, (*path, name))


PATHS = [path for path, _ in parsers()]


@pytest.mark.parametrize("path", PATHS, ids=" ".join)
def test_help_states_the_default_that_holds(path):
    """Of every option with a value: the default that the parser or the run config has, or that it is required."""
    parser = dict(parsers())[path]
    for action in parser._actions:
        if not action.option_strings or action.nargs == 0 or action.help == argparse.SUPPRESS:
            continue
        is_field = action.default is argparse.SUPPRESS
        default = FIELDS[action.dest].default if is_field else action.default
        if path == ("plan",) and action.dest == "vocab_size":
            default = VOCAB_SIZE
        name, stated = action.option_strings[0], re.search(r"\(default: (.*)\)$", action.help)
        is_required = action.required or (is_field and action.dest in REQUIRED)
        assert action.help.endswith("(required)") == is_required, name
        assert (stated is not None) != is_required or action.dest in ("config", "preset"), name
        if stated is None:
            continue
        if default in (None, "", []):  # then words say what that means
            assert not re.fullmatch(r"-?[\d.,]+|required", stated[1]), name
        elif isinstance(default, bool):
            assert stated[1] in (("yes", "on") if default else ("no", "off")), name
        else:
            values = default if isinstance(default, (tuple, list)) else (default,)
            shown = stated[1].partition(", which")[0].removeprefix("./").replace(",", " ").split()
            as_it_is, plain = (list(map(str, values)), [str(value).removesuffix(".0") for value in values])
            assert shown in (as_it_is, plain) or stated[1] == default, name


def test_what_is_required_is_what_no_run_starts_without(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for field in REQUIRED:
        others = [part for other in REQUIRED if other != field for part in (f"--{other}", "x")]
        assert main(["train", "small", *others]) == 2
        assert f"--{field} is missing" in capsys.readouterr().err


def said_by(parser, arguments, capsys):
    """The one line of a refusal, and nothing where the arguments are taken."""
    try:
        parser.parse_args(arguments)
    except SystemExit as stop:
        assert stop.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") <= 1
    return said


NUMBERS = ("N", "K", "X", "T", "N,...", "K,K", "SECONDS")


@pytest.mark.parametrize("path", PATHS, ids=" ".join)
def test_an_option_for_a_number_says_what_it_takes(path, capsys):
    """To a negative number in any spelling, to a word, and to nothing at all."""
    parser = cli.build_parser()
    for option in dict(parsers(parser))[path]._actions:
        if option.metavar not in NUMBERS or not option.option_strings:
            continue
        name = option.option_strings[0]
        start = f"codeparrot-ds {' '.join(path)}: error: {name} "
        for value in ("-1e-4", "-0.5", "-7", "-inf", "many"):
            said = said_by(parser, [*path, name, value], capsys)
            if option.dest in ("max_hours", "max_eval_steps", "seed") and start not in said:
                continue  # a field that the run config judges as a whole, or a number like any other
            assert said.startswith(start + "must be "), said
            assert value.strip("-").split("e")[0] in said or "0.0001" in said
        for nothing in ([], ["--help"]):
            assert said_by(parser, [*path, name, *nothing], capsys).startswith(start + "needs "), name


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--learning-rate", "-1e-4"], "--learning-rate must be at least 0, not -0.0001"),
        (["--learning_rate", "-1e-4"], "--learning-rate must be at least 0, not -0.0001"),
        (["--learning-rate"], "--learning-rate needs a number"),
        (["--max-train-steps", "-5"], "--max-train-steps must be at least 1, not -5"),
        (["--max-hours", "-1e-1"], "max_hours must be above 0, not -0.1"),
        (["--max-eval-steps", "-3"], "max_eval_steps must be -1 (all) or at least 1, not -3"),
        (["--lr-scheduler-type", "--seed", "1"], "--lr-scheduler-type needs one of cosine, linear, constant"),
        (["--num-gpus", "-1"], "--num-gpus must be a whole number of at least 1, not '-1'"),
        (["--data"], "--data needs a value"),
    ],
)
def test_a_number_that_a_field_cannot_have(arguments, sentence, capsys):
    try:
        code = main(["train", "small", *arguments])
    except SystemExit as stop:
        code = stop.code
    assert code == 2 and sentence in capsys.readouterr().err


def test_the_help_says_where_to_start(capsys):
    assert main([]) == 0
    shown = capsys.readouterr().out
    proposed = [line.split("     ")[0] for line in shown.splitlines() if line.startswith("  codeparrot-ds ")]
    assert [line.split()[1] for line in proposed] == ["demo", "corpus", "tokenizer", "train"]
    for line in proposed:
        cli.build_parser().parse_args(shlex.split(line)[1:])
    assert all(len(line) <= 80 for line in proposed)


FIRST_WORD = """
import sys
for name in ("torch", "transformers", "deepspeed"):
    sys.modules[name] = None  # who imports it now fails, and shows that nothing was said before
spoken = []
class Ear:
    def __init__(self, stream): self.stream = stream
    def __getattr__(self, name): return getattr(self.stream, name)
    def write(self, text):
        if text.strip() and not spoken:
            spoken.append(sorted({"numpy", "tokenizers", "yaml", "datasets", "pyarrow"} & set(sys.modules)))
            self.stream.write(f"{spoken[0]} {text}")
        return len(text)
sys.stdout, sys.stderr = Ear(sys.stdout), Ear(sys.stderr)
from codeparrot_ds.cli.main import main
try:
    main(sys.argv[1:])
except ImportError:
    pass
"""


IMPORTED = ["demo", "--data", "corpus", "--tokenizer", "t"]


@pytest.mark.parametrize(
    ("arguments", "first"),
    [
        (
            ["train", "small", "--data", "corpus", "--tokenizer", "t", "--run-name", "one"],
            "run one: checking 150000 steps",
        ),
        (["demo", "--workdir", "w"], "[] demo in w: "),
        (["compare", "zero2", "--data", "c", "--tokenizer", "t"], "[] comparison in comparison: "),
        (["evaluate", "model", "--data", "corpus"], "importing torch, then reading model"),
        (["complete", "model"], "importing torch, then reading model"),
        (["humaneval", "model", "--generate-only"], "fetching the problems openai/openai_humaneval:test"),
        (["humaneval", "model", "--generate-only", "--problems", "p.jsonl"], "importing torch, then reading model"),
        (["checkpoint", "export", "model", "--out", "o"], "[] reading model: every byte is verified first"),
        (["checkpoint", "import", "states", "run", *IMPORTED], "importing torch, then reading states"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else "",
)
def test_something_is_seen_before_anything_heavy_is_imported(arguments, first, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "w").write_text("")  # a file: the demo ends there
    for split in ("train", "validation"):
        (tmp_path / "corpus" / split).mkdir(parents=True)
        (tmp_path / "corpus" / split / "0.jsonl").write_text('{"content": "x = 1"}\n')
    write_tokenizer(tmp_path / "t")
    (tmp_path / "states").mkdir()
    (tmp_path / "states" / "mp_rank_00_model_states.pt").touch()
    problem = {"task_id": "1", "prompt": "def f():", "entry_point": "f", "canonical_solution": " pass", "test": ""}
    (tmp_path / "p.jsonl").write_text(json.dumps(problem))
    command = [sys.executable, "-c", FIRST_WORD, *arguments]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2]), "HF_HUB_OFFLINE": "1"}
    answer = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert first in answer.stdout + answer.stderr


@pytest.mark.parametrize(
    "command",
    [
        "train",
        f"{TRAIN} --no-ssh",
        "checkpoint import hosts new demo --data corpus --tokenizer tokenizer",
        "checkpoint export first --step 9 --out new",
        "plan small zero2 --out nodir/plan.png",
    ],
)
def test_nothing_is_announced_before_a_refusal(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with prepare(tmp_path):
        assert main(shlex.split(command)) == 2
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("arguments", "where", "what"),
    [
        (
            ["compare", "zero2", "--data", "my corpus", "--tokenizer", "t"],
            "codeparrot_ds.compare.run",
            "run_comparison",
        ),
        (["demo", "--workdir", "my demo", "--num-gpus", "1"], "codeparrot_ds.demo", "build_corpus"),
    ],
)
def test_an_interrupted_command_says_how_to_go_on(arguments, where, what, number, tmp_path, monkeypatch, capsys):
    def interrupted(*_, **__):
        os.kill(os.getpid(), number)
        signal.pause()

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CODEPARROT_DS_COMMAND", raising=False)
    monkeypatch.setattr(importlib.import_module(where), what, interrupted)
    assert main(arguments) == 128 + number
    said = capsys.readouterr()
    assert said.out.endswith(f"Continue with:\n  {shlex.join(['codeparrot-ds', *arguments])}\n")
    assert said.err == "codeparrot-ds: interrupted\n"
