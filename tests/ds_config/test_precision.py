"""The precision of a run that names none: its device's, then its own for as long as it lives."""

import json

import pytest

from codeparrot_ds.cli.main import main
from codeparrot_ds.config.run_config import PRESETS, RunConfig
from codeparrot_ds.ds_config.facts import precision, settled_precision, with_settled_precision
from codeparrot_ds.ds_config.file import name_in, open_ds_config
from codeparrot_ds.ds_config.lint import lint, lint_file
from codeparrot_ds.ds_config.precision import began_with, describe_choice, device_precisions, open_for, with_precision
from codeparrot_ds.ds_config.resolve import resolve, resolve_ds_config
from codeparrot_ds.errors import UserError

OLD, NEW, T4 = ("fp32",), ("bf16", "fp32"), ("fp16", "fp32")
H100 = ("bf16", "fp16", "fp32")
BOTH = {"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}


@pytest.fixture
def smi(monkeypatch, tmp_path):
    """Makes ``nvidia-smi`` say that there are GPUs of these compute capabilities."""

    def put(*capabilities):
        rows = "\n".join(f"{index}, GPU-{index}, Some GPU, {cap}" for index, cap in enumerate(capabilities))
        script = tmp_path / "nvidia-smi"
        script.write_text(f"#!/bin/sh\ncase $1 in *compute_cap) echo '{rows}';; *) exit 9;; esac\n")
        script.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))

    return put


@pytest.mark.parametrize(
    ("capabilities", "visible", "precisions"),
    [
        (("9.0",), None, H100),
        (("8.0", "7.5"), None, T4),
        (("8.0", "7.5"), "0", H100),
        (("7.0",), None, T4),
        (("[N/A]",), None, H100),
    ],
)
def test_gpus(smi, monkeypatch, capabilities, visible, precisions):
    smi(*capabilities)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert device_precisions("cuda") == precisions


def test_a_gpu_that_cannot_be_asked_has_bf16(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert device_precisions("cuda") == H100


@pytest.mark.parametrize(
    ("name", "chosen"),
    [
        ("zero2:auto", {"bf16": "zero2", "fp32": "zero2_fp32", "fp16": "zero2_fp16"}),
        ("zero0:auto", {"bf16": "zero0", "fp32": "zero0_fp32", "fp16": "zero0_fp16"}),
        ("zero3_offload", {"bf16": "zero3_offload", "fp32": "zero3_offload"}),
        ("my/own.json", {"fp32": "my/own.json"}),
    ],
)
def test_names(name, chosen):
    assert {precision: name_in(name, precision) for precision in chosen} == chosen


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("wanted", ["bf16", "fp16", "fp32"])
def test_every_preset_has_its_config_in_every_precision(preset, wanted):
    config = with_precision(RunConfig(**PRESETS[preset]).on_cpu(), wanted)
    file = open_ds_config(config.deepspeed)
    bf16 = open_ds_config(with_precision(RunConfig(**PRESETS[preset]).on_cpu(), "bf16").deepspeed)
    assert precision(file.config) == wanted
    assert file.config["zero_optimization"] == bf16.config["zero_optimization"]
    assert file.config.get("activation_checkpointing") == bf16.config.get("activation_checkpointing")


def test_names_that_there_are_not(tmp_path):
    with pytest.raises(UserError, match="'zerro2:auto' is no shipped config; did you mean 'zero2:auto'"):
        name_in("zerro2:auto", "fp32")
    for name in ("zero3_offload", "zero2_fp32"):  # whatever this machine's precision is
        with pytest.raises(UserError, match=f"{name} is not shipped in every precision: name a file, or .*zero3:auto"):
            name_in(f"{name}:auto", "bf16")
    own = tmp_path / "own.json"
    own.write_text("{}")
    with pytest.raises(UserError, match='write "enabled": "auto"'):
        name_in(f"{own}:auto", "fp32")


@pytest.mark.parametrize(
    ("blocks", "precisions", "chosen"),
    [
        (BOTH, NEW, "bf16"),
        (BOTH, OLD, "fp32"),
        (BOTH, T4, "fp16"),
        (BOTH, H100, "bf16"),
        ({"bf16": {"enabled": "auto"}}, T4, "fp16"),
        ({"bf16": {"enabled": "auto"}}, OLD, "fp32"),
        ({"bf16": {"enabled": "auto"}, "fp16": {"enabled": False}}, T4, "fp32"),
        ({"bf16": {"enabled": "auto"}, "fp16": {"enabled": True}}, H100, "fp16"),
        ({"fp16": {"enabled": "auto"}}, H100, "fp16"),
        ({"fp16": {"enabled": "auto"}}, NEW, "fp32"),
        ({"fp16": {"enabled": "auto"}, "bf16": {"enabled": True}}, T4, "bf16"),
        ({"bf16": {"enabled": True}}, OLD, "bf16"),
    ],
)
def test_auto_in_a_file_follows_the_device(tmp_path, blocks, precisions, chosen):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}, **blocks}))
    file = open_ds_config(str(path), precisions)
    resolved = resolve(file, RunConfig(), world_size=1, model_hidden_size=64)
    assert precision(resolved.config) == chosen
    assert "auto" not in json.dumps(resolved.config)
    for key in settled_precision(file.config, precisions):
        assert f"{path}:" in resolved.sources[key] or "auto" in resolved.sources[key]


def test_a_check_judges_what_auto_becomes():
    told = {"zero_optimization": {"stage": 0}, **BOTH, "data_types": {"grad_accum_dtype": "bf16"}}
    said = {
        precisions: [finding.key for finding in lint(told, "f", device="cuda", precisions=precisions)]
        for precisions in (H100, T4)
    }
    assert "data_types.grad_accum_dtype" not in said[H100] and "data_types.grad_accum_dtype" in said[T4]


@pytest.mark.parametrize(
    ("config", "device", "precisions", "words"),
    [
        ({"bf16": {"enabled": True}}, "cpu", OLD, "this CPU has no bf16 instructions"),
        ({"bf16": {"enabled": True}}, "cpu", NEW, None),
        ({"bf16": {"enabled": True}}, "cuda", T4, "choose zero2_fp16.json"),
        ({"bf16": {"enabled": True}}, "cuda", H100, None),
        ({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, "cpu", OLD, "leave the block out"),
    ],
)
def test_a_check_says_what_a_precision_costs(config, device, precisions, words):
    config = {"zero_optimization": {"stage": 2}, **config}
    said = [f.message for f in lint(config, "f", device=device, precisions=precisions)]
    assert any(words in message for message in said) if words else not any("bf16" in message for message in said)


@pytest.mark.parametrize(
    ("name", "device", "precisions", "words"),
    [
        ("zero2_activation_checkpointing", "cpu", OLD, "choose zero2_activation_checkpointing_fp32.json"),
        ("zero2_activation_checkpointing", "cuda", T4, "choose zero2_activation_checkpointing_fp16.json"),
        ("zero2_activation_checkpointing_fp16", "cpu", OLD, "zero2_activation_checkpointing.json (bf16) or zero2_a"),
        ("zero3_offload", "cpu", OLD, "choose the same with bf16 off"),
        ("zero3_offload", "cuda", T4, "choose the same with fp16 on and bf16 off"),
        ("zero3_activation_checkpointing", "cpu", OLD, "choose the same with bf16 off"),
    ],
)
def test_what_is_to_be_chosen_instead_keeps_what_saves_memory(name, device, precisions, words):
    config = open_ds_config(name).config
    said = [each.message for each in lint(config, "f", device=device, precisions=precisions)]
    assert any(words in message for message in said)


@pytest.mark.parametrize("precisions", [OLD, NEW])
def test_auto_under_bf16s_old_name_is_settled_as_under_the_new(precisions):
    old = {"zero_optimization": {"stage": 2}, "bfloat16": {"enabled": "auto"}}
    assert not [each for each in lint(old, "f", device="cpu", precisions=precisions) if each.severity == "error"]
    settled = with_settled_precision(old, precisions)
    assert "bf16" not in settled and settled["bfloat16"]["enabled"] is (precisions[0] == "bf16")
    resolved = resolve_ds_config(old, RunConfig(), world_size=1, model_hidden_size=64, precisions=precisions)
    assert resolved["bf16"]["enabled"] is (precisions[0] == "bf16")


def test_a_run_keeps_the_precision_that_it_began_with(tmp_path):
    config = RunConfig(output_dir=str(tmp_path), run_name="old")
    assert began_with(config) is None
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "ds_config.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    assert began_with(config) == "fp32"
    assert with_precision(config.on_cpu(), "fp32").deepspeed == "zero2_fp32"
    assert open_for(config, "cpu").path.name == "zero2_fp32.json"
    # A branch of it goes on as it was; a start afresh is the device's.
    checkpoint = str(tmp_path / "old" / "checkpoints" / "step-00000010")
    assert began_with(RunConfig(output_dir=str(tmp_path), run_name="new", resume=checkpoint)) == "fp32"
    assert began_with(RunConfig(output_dir=str(tmp_path), run_name="old", resume="never")) is None
    own = tmp_path / "own.json"
    own.write_text(json.dumps(BOTH))
    assert open_ds_config(str(own), H100, began="fp32").followed == ("fp32", "bf16", "fp16")


@pytest.mark.parametrize(
    ("began", "device", "precisions", "key"),
    [("fp16", "cpu", OLD, "fp16.enabled"), ("bf16", "cpu", OLD, "bf16.enabled"), ("bf16", "cuda", T4, "bf16.enabled")],
)
def test_what_a_run_began_in_is_still_judged_by_the_device_that_it_goes_on_with(began, device, precisions, key):
    file = open_ds_config("zero2:auto", precisions, began=began)
    assert [finding.key for finding in lint_file(file, device=device)] == [key]


def test_what_is_said_of_the_choice(monkeypatch, tmp_path):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    old = open_ds_config("zero2:auto", OLD)
    assert describe_choice("zero2:auto", old, device="cpu") == (
        "training in fp32 (zero2_fp32): ONEDNN_MAX_CPU_ISA=AVX2 leaves this CPU no bf16 instructions; "
        "--deepspeed zero2 trains in bf16 all the same, no faster"
    )
    assert describe_choice("zero2", open_ds_config("zero2", OLD), device="cpu") is None  # named
    said = describe_choice("zero2:auto", open_ds_config("zero2:auto", OLD, began="bf16"), device="cpu")
    assert said == "training in bf16 (zero2), as the run began; this machine is faster in fp32"
    said = describe_choice("zero2:auto", open_ds_config("zero2:auto", NEW, began="fp32"), device="cpu")
    assert said == "training in fp32 (zero2_fp32), as the run began; this machine is faster in bf16"
    assert describe_choice("zero2:auto", open_ds_config("zero2:auto", NEW), device="cpu") is None
    own = tmp_path / "own.json"
    own.write_text(json.dumps(BOTH))
    said = describe_choice(str(own), open_ds_config(str(own), T4), device="cuda")
    assert said == f"training in fp16 ({own}): a GPU here is older than Ampere and has no bf16 products"
    assert describe_choice(str(own), open_ds_config(str(own), H100), device="cuda") is None
    own.write_text(json.dumps({"fp16": {"enabled": "auto"}}))  # no word of bf16: the device's lack of it is no reason
    assert describe_choice(str(own), open_ds_config(str(own), H100), device="cuda") is None


@pytest.mark.parametrize(
    "command",
    [
        ["plan", "small", "zero2:auto", "--world-size", "8", "--json"],
        ["check", "zero2:auto", "zero3", "--preset", "large", "--device", "cuda", "--world-size", "8", "--explain"],
    ],
    ids=lambda words: words[0],
)
def test_what_is_asked_for_gpus_does_not_depend_on_this_machine(command, monkeypatch, capsys):
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    assert main(command) == 0
    said = capsys.readouterr().out
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert main(command) == 0
    assert capsys.readouterr().out == said and "zero2_fp32" not in said
