"""What the memory plan chooses: the micro-batch, and on a GPU the DeepSpeed config; what is said, and what stays."""

import dataclasses
import json
import re

import pytest
from tokenizers import Tokenizer, models

from codeparrot_ds.config.files import save_config
from codeparrot_ds.config.run_config import PRESETS, RunConfig
from codeparrot_ds.errors import UserError
from codeparrot_ds.memory import choice
from codeparrot_ds.memory.choice import (
    LADDER,
    as_begun,
    choices_of,
    config_fitting,
    ladder,
    memory_budget,
    micro_batch_sizes,
    with_choices,
    with_micro_batch,
)
from codeparrot_ds.memory.device import Overhead
from codeparrot_ds.memory.plan import PlanRequest, make_plan

GB = 10**9


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """A tokenizer with as many tokens as the recipe's vocabulary has."""
    folder = tmp_path_factory.mktemp("tokenizer")
    vocabulary = {"<|endoftext|>": 0} | {f"token{number}": number for number in range(1, 32_768)}
    Tokenizer(models.WordLevel(vocabulary, unk_token="<|endoftext|>")).save(str(folder / "tokenizer.json"))
    return str(folder)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Neither this machine's traces nor its calibration."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def gpu(monkeypatch):
    """Makes the machine have a GPU of so many MiB, or one that does not say how many."""

    def put(mebibytes: int | None):
        found = None if mebibytes is None else ("Some GPU", mebibytes * 2**20)
        monkeypatch.setattr(choice, "smallest_gpu", lambda: found)

    return put


@pytest.fixture
def config(tokenizer):
    return RunConfig(micro_batch_size="auto", tokenizer=tokenizer, deepspeed="zero2")


def test_it_is_a_word_and_no_number():
    config = RunConfig(micro_batch_size="auto")
    assert config.auto_micro_batch and dataclasses.replace(config, seed=2).auto_micro_batch
    assert not RunConfig(micro_batch_size=12).auto_micro_batch
    for wrong in (0, -1):
        with pytest.raises(UserError, match=f"micro_batch_size must be at least 1, not {wrong}"):
            RunConfig(micro_batch_size=wrong)
    with pytest.raises(UserError, match="micro_batch_size must be a whole number or auto, not 'many'"):
        RunConfig(micro_batch_size="many")
    with pytest.raises(UserError, match="seed must be a whole number, not 'auto'"):
        RunConfig(seed="auto")
    with pytest.raises(UserError, match="chosen when a run starts"):
        config.gradient_accumulation_steps(2)
    assert RunConfig(micro_batch_size="auto").micro_batch_size == "auto"


def test_sizes_divide_the_rows_and_end_where_a_device_is_full(config):
    assert micro_batch_sizes(config, 2, "cuda") == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48]
    assert micro_batch_sizes(config, 2, "cpu") == [1, 2, 3, 4, 6, 8]
    long_rows = dataclasses.replace(config, seq_length=100_000)
    assert micro_batch_sizes(long_rows, 2, "cuda") == [1]
    with pytest.raises(UserError, match="192 is not divisible by micro_batch_size x world_size = 1 x 7"):
        micro_batch_sizes(config, 7, "cuda")


def test_the_largest_that_fits_is_taken(config):
    sizes = micro_batch_sizes(config, 2, "cuda")
    chosen = {
        gb: config_fitting(config, sizes, world_size=2, device="cuda", budget=(gb * GB, "a GPU")).micro_batch_size
        for gb in (8, 16, 40, 80)
    }
    assert list(chosen.values()) == sorted(chosen.values()) and chosen[8] < chosen[16] < chosen[80] == 48
    # The one above it does not fit, by the plan that refuses a run.
    above = sizes[sizes.index(chosen[16]) + 1]
    with pytest.raises(UserError, match=r"one row needs .* GB a rank and a GPU gives 16.0 GB; .*plan"):
        config_fitting(config, [above], world_size=2, device="cuda", budget=(16 * GB, "a GPU"))


def test_a_size_that_was_given_stays(config, monkeypatch):
    monkeypatch.setattr(choice, "memory_budget", lambda *_: pytest.fail("nothing to choose"))
    given = dataclasses.replace(config, micro_batch_size=3)
    assert with_micro_batch(given, world_size=2, device="cuda") is given


def test_what_is_chosen_is_said(config, monkeypatch, capsys):
    monkeypatch.setattr(choice, "memory_budget", lambda *_: (16 * GB, "a GPU"))
    chosen = with_micro_batch(config, world_size=2, device="cuda")
    steps = chosen.gradient_accumulation_steps(2)
    assert f"micro-batch {chosen.micro_batch_size}, the largest of 1, 2, 3" in capsys.readouterr().err
    assert chosen.micro_batch_size * steps * 2 == 192


@pytest.mark.parametrize(
    ("keys", "size"),
    [({"train_micro_batch_size_per_gpu": 6}, 6), ({"gradient_accumulation_steps": 4}, 24), ({}, None)],
)
def test_what_the_deepspeed_json_says_is_taken(config, tmp_path, monkeypatch, capsys, keys, size):
    monkeypatch.setattr(choice, "memory_budget", lambda *_: (80 * GB, "a GPU"))
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}} | keys))
    chosen = with_micro_batch(dataclasses.replace(config, deepspeed=str(path)), world_size=2, device="cuda")
    said = capsys.readouterr().err
    assert chosen.micro_batch_size == (size or 48)
    assert said.startswith(
        f"micro-batch {size}, as {path} says, and " if size else "micro-batch 48, the largest of 1, 2"
    )


def test_without_nvidia_smi_a_gpu_needs_a_number(monkeypatch):
    monkeypatch.setattr(choice, "smallest_gpu", lambda: None)
    with pytest.raises(UserError, match="nvidia-smi does not say: give it a number"):
        memory_budget("cuda", 2)
    monkeypatch.setattr(choice, "smallest_gpu", lambda: ("NVIDIA L4", 24 * GB))
    assert memory_budget("cuda", 2) == (24 * GB, "NVIDIA L4")
    assert memory_budget("cpu", 2)[0] == pytest.approx(memory_budget("cpu", 1)[0] / 2, rel=1e-6)


# --------------------------------------------------------------------------------------------------------------------
# On a GPU, by default


MIB = {24: 24_576, 40: 40_960, 80: 81_559, 141: 143_771}  # as nvidia-smi says of an L4, an A100, an H100 and an H200
CHOICES = {
    ("small", 24): [("zero1", 48), ("zero1", 48), ("zero1", 24)],
    ("small", 40): [("zero1", 64), ("zero1", 48), ("zero1", 24)],
    ("small", 80): [("zero1", 64), ("zero1", 48), ("zero1", 24)],
    ("small", 141): [("zero1", 64), ("zero1", 48), ("zero1", 24)],
    ("large", 24): [("zero2_offload", 4), ("zero2_activation_checkpointing", 32), ("zero1", 4)],
    ("large", 40): [("zero1", 4), ("zero1", 8), ("zero1", 8)],
    ("large", 80): [("zero1", 16), ("zero1", 16), ("zero1", 16)],
    ("large", 141): [("zero1", 32), ("zero1", 32), ("zero1", 32)],
}
"""Of 1, 2 and 8 GPUs."""


def chosen(preset, tokenizer, ranks=1, *, precision="bf16", **changes):
    config = RunConfig(**PRESETS[preset] | {"tokenizer": tokenizer} | changes)
    return with_choices(config, world_size=ranks, device="cuda", precision=precision)


@pytest.mark.parametrize(("preset", "size"), CHOICES, ids=lambda value: str(value))
def test_a_gpu_is_filled_within_the_rows_of_the_preset(tokenizer, gpu, preset, size):
    gpu(MIB[size])
    for ranks, expected in zip((1, 2, 8), CHOICES[preset, size], strict=True):
        config = chosen(preset, tokenizer, ranks)
        assert (config.deepspeed, config.micro_batch_size) == expected, ranks
        usual = RunConfig(**PRESETS[preset], tokenizer=tokenizer)
        assert dataclasses.replace(config, deepspeed=usual.deepspeed, micro_batch_size=usual.micro_batch_size) == usual
        assert config.micro_batch_size * ranks * config.gradient_accumulation_steps(ranks) == usual.global_batch_size


def test_every_config_of_the_ladder_is_shipped():
    assert ladder("bf16") == list(LADDER)
    assert ladder("fp16")[:3] == ["zero1_fp16", "zero2_fp16", "zero2_activation_checkpointing_fp16"]


def test_the_plan_says_what_train_chooses(gpu):
    request = PlanRequest(model="large", world_sizes=(1, 8), device_memory=MIB[24] * 2**20)
    said = choices_of(make_plan(request, Overhead()), "bf16")
    assert [(each["world_size"], each["config"], each["micro_batch_size"]) for each in said] == [
        (1, *CHOICES["large", 24][0]),
        (8, *CHOICES["large", 24][2]),
    ]


def test_the_choice_is_said_in_one_line_with_its_reason(tokenizer, gpu, capsys):
    gpu(MIB[24])
    chosen("large", tokenizer, 2)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("zero2_activation_checkpointing, micro-batch 32 and 8 accumulation step(s), chosen for ")
    assert "GB of 25.8 GB per rank; less than 4 row(s) would fit with zero1, zero2; --deepspeed and --micro" in line
    chosen("large", tokenizer)
    assert re.search(r"per rank and \d\d\.\d GB of the host's; less than 4 row\(s\)", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("pinned", "expected"),
    [
        ({"deepspeed": "zero3"}, ("zero3", 4)),
        ({"micro_batch_size": 2}, ("zero1", 2)),
        ({"micro_batch_size": 16}, ("zero2_activation_checkpointing", 16)),
        ({"deepspeed": "zero2", "micro_batch_size": 64}, ("zero2", 64)),  # which the memory plan then refuses
        ({"deepspeed": "auto", "micro_batch_size": "auto"}, ("zero1", 4)),
    ],
    ids=str,
)
def test_what_is_named_stays(tokenizer, gpu, pinned, expected):
    gpu(MIB[40])
    config = chosen("large", tokenizer, **pinned)
    assert (config.deepspeed, config.micro_batch_size) == expected


def test_a_json_of_the_users_stays(tokenizer, gpu, tmp_path):
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}))
    gpu(MIB[80])
    assert chosen("small", tokenizer, deepspeed=str(path)).deepspeed == str(path)
    path.write_text(json.dumps({"train_micro_batch_size_per_gpu": 6, "bf16": {"enabled": True}}))
    assert chosen("small", tokenizer, deepspeed=str(path)).micro_batch_size == 6


def test_a_gpu_without_bf16_has_what_is_shipped_in_fp16(tokenizer, gpu):
    gpu(15_360)  # a T4
    config = chosen("small", tokenizer, precision="fp16")
    assert (config.deepspeed, config.micro_batch_size) == ("zero1_fp16", 32)
    with pytest.raises(UserError, match=r"no DeepSpeed config holds 1 row\(s\) of gpt2-xl here: zero\S+_fp16 needs "):
        chosen("large", tokenizer, precision="fp16")


@pytest.mark.parametrize("ranks", [2, 4, 8, 16])
def test_a_few_rows_are_shared_among_any_number_of_gpus(tokenizer, gpu, ranks):
    gpu(MIB[24])
    assert chosen("demo", tokenizer, ranks).micro_batch_size == 16 // ranks


def test_a_gpu_that_does_not_say_its_memory_has_what_a_cpu_has(tokenizer, gpu, capsys):
    gpu(None)
    config = chosen("large", tokenizer)
    assert (config.deepspeed, config.micro_batch_size) == ("zero2_activation_checkpointing", 2)
    assert "nvidia-smi does not say how much memory a GPU has, so nothing is chosen" in capsys.readouterr().err
    with pytest.raises(UserError, match="nvidia-smi does not say: give it a number"):
        chosen("large", tokenizer, deepspeed="auto")


@pytest.mark.parametrize("preset", PRESETS)
def test_a_cpu_has_what_it_always_had(preset):
    config = RunConfig(**PRESETS[preset]).on_cpu()
    files = {"large": "zero2_activation_checkpointing:auto"}
    sizes = {"small": 12, "large": 2, "demo": 8}
    assert (config.deepspeed, config.micro_batch_size) == (files.get(preset, "zero2:auto"), sizes[preset])
    assert not config.is_left_to_plan and config.on_cpu() == config
    assert RunConfig(deepspeed="auto").on_cpu().deepspeed == "zero2:auto"
    assert RunConfig(micro_batch_size="auto").on_cpu().auto_micro_batch


# --------------------------------------------------------------------------------------------------------------------
# Of a run that resumes


@pytest.fixture
def begun(tmp_path, tokenizer):
    """A run that began with a choice; gives its config as it was asked for, with changes."""

    def make(saved=("zero1", 64), **changes):
        run = tmp_path / "runs" / "old"
        run.mkdir(parents=True)
        asked = RunConfig(tokenizer=tokenizer, output_dir=str(tmp_path / "runs"), run_name="old")
        decided = dataclasses.replace(asked, deepspeed=saved[0], micro_batch_size=saved[1])
        save_config(decided, run / "config.yaml")
        return dataclasses.replace(asked, **changes)

    return make


@pytest.mark.parametrize(
    ("ranks", "device", "size"), [(1, "cuda", 64), (3, "cuda", 64), (8, "cuda", 24), (1, "cpu", 64)]
)
def test_a_run_keeps_its_choice_on_other_devices(begun, gpu, capsys, ranks, device, size):
    gpu(MIB[24])
    config = as_begun(begun(), world_size=ranks, device=device)
    assert (config.deepspeed, config.micro_batch_size) == ("zero1", size)
    said = capsys.readouterr().err
    assert said.startswith(f"deepspeed zero1 and micro_batch_size {size}, as ") and said.count("\n") == 1
    assert "--deepspeed auto and --micro-batch-size auto would choose for this machine" in said


def test_a_run_of_a_cpu_keeps_what_it_had_and_says_nothing_there(begun, capsys):
    config = begun(("zero2_fp32", 12))
    assert as_begun(config, world_size=1, device="cpu").deepspeed == "zero2_fp32"
    assert capsys.readouterr().err == ""
    assert as_begun(config, world_size=1, device="cuda").micro_batch_size == 12
    assert "micro_batch_size 12, as " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"micro_batch_size": 4}, ("zero1", 4)),
        ({"deepspeed": "zero3"}, ("zero3", 64)),
        ({"deepspeed": "auto"}, ("auto", 64)),
        ({"resume": "never"}, ("auto,cpu=zero2:auto", "auto,cpu=12")),
        ({"run_name": "new"}, ("auto,cpu=zero2:auto", "auto,cpu=12")),
    ],
    ids=str,
)
def test_a_run_changes_what_the_user_changes(begun, changes, expected):
    config = as_begun(begun(**changes), world_size=1, device="cuda")
    assert (config.deepspeed, config.micro_batch_size) == expected


def test_a_branch_of_a_run_keeps_it_and_a_file_that_is_gone_is_not_looked_for(begun, tmp_path):
    checkpoint = str(tmp_path / "runs" / "old" / "checkpoints" / "step-00000010")
    branch = begun((str(tmp_path / "gone.json"), 16), run_name="branch", resume=checkpoint)
    config = as_begun(branch, world_size=1, device="cuda")
    assert (config.deepspeed, config.micro_batch_size) == ("auto,cpu=zero2:auto", 16)
    (tmp_path / "gone.json").write_text("{}")
    assert as_begun(branch, world_size=1, device="cuda").deepspeed == str(tmp_path / "gone.json")
