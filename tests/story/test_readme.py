"""The README's commands, as somebody types them whose every path has a space and a ``~``, from another directory.

Each command line of the README is taken as it stands, with other paths in the place of its paths, and on a small model.
"""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from codeparrot_ds.cli.main import build_parser
from codeparrot_ds.engine.operators import operators_folder
from tests.needs import needs
from tests.story.stories import REPOSITORY, run_here

# The README's paths and names, and what a user has in their places. The home has a space in its name too.
PATHS = {
    "~/src/project-a": "~/my source/project a",
    "~/src/project-b": "~/my source/project b",
    "corpus": "~/my corpus",
    "tokenizer": "~/my tokenizer",
    "runs/RUN": "~/my runs/first",
    "runs/brave-otter-7": "~/my runs/first",
    "runs/mine": "~/my runs/mine",
    "runs/mine/config.yaml": "~/my runs/mine/config.yaml",
    "my_config.json": "~/my configs/my config.json",
    "plan.png": "~/my pictures/plan.png",
    "model": "~/my models/first",
    "ckpt": "~/my checkpoints/of DeepSpeed",
    "15000": "2",
}
TINY = [
    *("--model", "~/my configs/my model.json", "--seq-length", "64", "--global-batch-size", "8"),
    *("--micro-batch-size", "4", "--num-warmup-steps", "1", "--save-checkpoint-steps", "2", "--max-eval-steps", "2"),
    *("--num-lanes", "8", "--shuffle-buffer", "64", "--wandb", "off"),
]
# What makes a command small, by its beginning.
SMALLER = {
    "tokenizer": ["--vocab-size", "1024"],
    "train small": [*TINY, "--max-train-steps", "2", "--output-dir", "~/my runs", "--run-name", "first"],
    "checkpoint import": [*TINY, "--max-train-steps", "22", "--deepspeed", "zero1_fp32", "--hub", "off"],
    "evaluate": ["--batch-size", "8"],
    "complete": ["--num-completions", "1", "--max-length", "32"],
    "humaneval": ["--problems", "~/my configs/problems.jsonl", "--num-samples", "1", "--temperatures", "0",
                  "--max-new-tokens", "4", "--k", "1"],
}  # fmt: skip
# A comparison and a trace of 1.5B parameters take minutes; stories and tests of their own run them.
PARSED = ("compare", "plan large --world-size 8 zero3 --trace")


def readme_commands() -> list[str]:
    """Every line of a code block that begins with the program's name, without it and its comment."""
    blocks = re.findall(r"```\w*\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("codeparrot-ds ")]
    return [line.removeprefix("codeparrot-ds ").partition(" #")[0].strip() for line in lines]


def as_typed(command: str) -> list[str]:
    """The words of a command with the user's paths, and what makes it small."""
    words = [word for word in shlex.split(command) if word != "…"]
    mine = [word if place == 0 else PATHS.get(word, word) for place, word in enumerate(words)]
    extra = [more for begin, more in SMALLER.items() if command.startswith(begin)]
    return [*mine, *(word for more in extra for word in more)]


@pytest.fixture
def home(tmp_path, monkeypatch, on_two_ranks):
    """A user's home with a space in its name, and another directory to work in."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(operators_folder()))  # which lies in the real home
    home = tmp_path / "a home"
    for folder in ("my configs", "my pictures", "my models", "my checkpoints"):
        (home / folder).mkdir(parents=True)
    for project, package in (("project a", "asyncio"), ("project b", "email")):
        source = Path(shutil.__file__).parent / package
        shutil.copytree(source, home / "my source" / project, ignore=shutil.ignore_patterns("__pycache__"))
    here = Path(__file__).parent
    shutil.copy(here / "model.json", home / "my configs" / "my model.json")
    shutil.copy(here.parent / "evaluation" / "problems.jsonl", home / "my configs" / "problems.jsonl")
    shutil.copy(REPOSITORY / "ds_configs" / "zero2.json", home / "my configs" / "my config.json")
    shutil.copytree(on_two_ranks["zero3_fp32"] / "deepspeed", home / "my checkpoints" / "of DeepSpeed")
    monkeypatch.setenv("HOME", str(home))
    work = tmp_path / "some where else"
    work.mkdir()
    monkeypatch.chdir(work)
    return home


@needs(on_two_ranks=["zero3_fp32"])
def test_the_commands_of_the_readme_from_anywhere_with_any_path(home, tmp_path):
    for command in readme_commands():
        words = as_typed(command)
        if command.startswith(PARSED):
            build_parser().parse_args(words)
            continue
        answer = run_here(*words)
        assert answer.returncode == 0, (shlex.join(words), answer.stdout[-2000:], answer.stderr[-2000:])
    made = ("my corpus", "my tokenizer", "my runs/first", "my runs/mine", "my pictures/plan.png", "my models/first")
    assert all((home / name).exists() for name in made)
    left = [path.name for path in (tmp_path / "some where else").iterdir()]
    assert left == [], "a path was taken for one below the working directory"


def test_each_command_of_the_program_is_in_the_readme():
    commands = {command.split()[0] for command in readme_commands()}
    (choices,) = [action.choices for action in build_parser()._actions if action.choices]
    assert set(choices) - commands <= {"demo", "doctor"}  # of ./launch.sh demo, and of docs/launching.md
