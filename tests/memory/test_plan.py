"""The plan command, what ``train`` does with a plan, and calibration; traces at two points, formulas elsewhere."""

import dataclasses
import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from codeparrot_ds import devices
from codeparrot_ds.cli.main import main
from codeparrot_ds.config.run_config import RunConfig
from codeparrot_ds.ds_config.file import open_ds_config, shipped_names
from codeparrot_ds.ds_config.lint import lint
from codeparrot_ds.ds_config.resolve import resolve_ds_config
from codeparrot_ds.errors import UserError
from codeparrot_ds.launch.preflight import check_memory, check_run
from codeparrot_ds.memory.check import MeasuredMemory, MemoryCheck
from codeparrot_ds.memory.device import Overhead, calibrate, load_overhead, parse_memory, save_overhead
from codeparrot_ds.memory.plan import PlanRequest, activation_line, as_json, describe, make_plan, predict, why_too_large
from codeparrot_ds.memory.trace import keep
from codeparrot_ds.memory.workload import Memory
from codeparrot_ds.model.shapes import find_shape
from codeparrot_ds.report.plan_chart import draw_plan

GB = 10**9


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Neither this machine's traces nor its calibration."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    """Puts an ``nvidia-smi`` on PATH that lists GPUs of the given MiB."""

    def install(*mebibytes):
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        lines = "".join(f"{index}, GPU-{index}abc, Test GPU {index}, {size}\\n" for index, size in enumerate(mebibytes))
        script = folder / "nvidia-smi"
        script.write_text(f"#!/bin/sh\nprintf '{lines}'\n")
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    return install


def plan(**values):
    fields = {"model": "large", "world_sizes": (8,), "device_memory": 80 * GB}
    return make_plan(PlanRequest(**fields | values), Overhead())


# --------------------------------------------------------------------------------------------------------------------
# The command


@pytest.mark.parametrize(("model", "parameters"), [("small", 111_008_256), ("large", 1_529_628_800)])
def test_json_counts_parameters(model, parameters, capsys):
    assert main(["plan", model, "--json", "--world-size", "8", "--device-memory", "80GB"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["parameters"] == parameters and answer["parameter_bytes"]["bf16"] == 2 * parameters
    assert {row["config"] for row in answer["plans"]} | {row["config"] for row in answer["impossible"]} == set(
        shipped_names()
    )
    for row in answer["plans"]:
        assert (
            sum(row["device_bytes"].values())
            == row["peak_bytes"]
            == max(row["phase_bytes"]["forward_backward"], row["phase_bytes"]["step"])
        )
        assert row["fits"] is (row["spare_bytes"] >= 0) and row["needed_bytes"] > row["peak_bytes"]


def test_the_whole_catalogue_in_seconds_and_without_torch():
    script = (
        "import sys; from codeparrot_ds.cli.main import main; code = main(['plan', 'large', '--world-size', '8']); "
        "sys.exit(code or 3 * bool({'torch', 'deepspeed', 'transformers', 'matplotlib'} & set(sys.modules)))"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
    assert ended.returncode == 0, ended.stderr
    assert all(name in ended.stdout for name in shipped_names()) and len(shipped_names()) > 30
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 5


def test_configs_may_stand_behind_options(capsys):
    assert main(["plan", "small", "--world-size", "1,8", "zero2", "--device-memory", "80 gb", "zero3"]) == 0
    text = capsys.readouterr().out
    assert "1 rank(s)" in text and "8 rank(s)" in text
    assert text.count("\nzero2 ") == text.count("\nzero3 ") == 2 and "zero1" not in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["lrge"], "did you mean 'large'?"),
        (["gpt2-lrge"], "did you mean 'gpt2-large'?"),
        (["/nowhere/config.json"], "neither a known shape nor a GPT-2 config.json"),
        (["large", "--device-memory", "lots"], "80GB (80 x 10^9 bytes), 80GiB"),
        (["large", "--device-memory", "80"], "has no unit: write 80GB (10^9 bytes) or 80GiB (2^30)"),
        (["large", "--device-memory", "-3GB"], "must be more than nothing"),
        (["large", "--device-memory", "0GB"], "must be more than nothing"),
        (["large", "--device-memory", "80XB"], "unknown unit 'XB'"),
        (["large", "--micro-batch-sizes", "0"], "at least 1, not '0'"),
        (["large", "--micro-batch-sizes", "3"], "nearest micro_batch_size: 2 or 4"),
        (["large", "--micro-batch-sizes", "1", "2"], "several numbers of one option have commas: 1,2,4"),
        (["large", "--world-size", "0"], "at least 1, not '0'"),
        (["large", "--world-size", "5"], "512 is not divisible by micro_batch_size x world_size"),
        (["large", "zero22"], "did you mean 'zero2'?"),
        (["large", "--seq-length", "4096"], "longer than the 1024 positions"),
        (["large", "--world-siz", "3"], "did you mean '--world-size'?"),
        ([], "nothing to plan: name a model"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_told_in_one_sentence(arguments, words, capsys):
    try:
        code = main(["plan", *arguments])
    except SystemExit as ended:
        code = ended.code
    said = capsys.readouterr().err.strip()
    assert code == 2 and words in said and "\n" not in said


def test_a_config_json_of_a_model(tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "gpt2", "n_layer": 2, "n_embd": 64, "n_head": 2, "n_positions": 1024}))
    assert main(["plan", str(path), "zero1", "--json", "--vocab-size", "100"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == 172_032


# --------------------------------------------------------------------------------------------------------------------
# Plans


def test_rows_are_sorted_and_the_largest_micro_batch_is_the_last_that_fits():
    made = plan(device_memory=24 * GB)
    order = [(row.fits is False, row.needed_bytes) for row in made.rows]
    assert order == sorted(order)
    largest = made.largest("zero2", 8)
    mine = {row.micro_batch_size: row for row in made.rows if row.config == "zero2"}
    above = min(size for size in mine if size > largest)
    assert mine[largest].fits and mine[above].fits is False
    assert made.largest("zero0", 8) is None
    text = describe(made)
    assert "none" in next(line for line in text.splitlines() if line.startswith("zero0 "))
    assert f"{mine[2].spare_bytes / 1e9:+.1f}" in text


def test_a_config_for_several_hosts_is_planned_where_its_ranks_can_be_shared_out():
    # As train: DeepSpeed takes 8 ranks per host on fewer than 8 as well, and refuses 12.
    made = plan(world_sizes=(12,), micro_batch_sizes=(2,), global_batch_size=48)
    assert ("zero3_hpz", 12) in made.impossible and "zero3_hpz" not in {row.config for row in made.rows}
    with pytest.raises(UserError, match="zero_hpz_partition_size: must divide the number of ranks"):
        plan(world_sizes=(12,), global_batch_size=48, ds_configs=("zero3_hpz",))
    # What the second copy adds to the peak of a traced step: 23,592,960, 11,796,480 and 5,898,240 bytes.
    for ranks, second in ((1, 23_592_960), (2, 11_796_480), (4, 5_898_240)):
        made = plan(model="demo", world_sizes=(ranks,), ds_configs=("zero3", "zero3_hpz"), micro_batch_sizes=(2,))
        peaks = {row.config: row.memory.peak_bytes for row in made.asked}
        assert peaks["zero3_hpz"] - peaks["zero3"] == pytest.approx(second, rel=0.01)


def test_the_largest_micro_batch_is_found_among_all_whatever_is_shown():
    asked = plan(ds_configs=("zero2",), micro_batch_sizes=(4,))
    assert (
        [row.micro_batch_size for row in asked.shown(8)]
        == [4]
        == [row["micro_batch_size"] for row in as_json(asked)["plans"]]
    )
    assert asked.largest("zero2", 8) == plan(ds_configs=("zero2",)).largest("zero2", 8) == 16


def test_attention_and_checkpointing_are_compared():
    activations = as_json(plan(ds_configs=("zero2",)))["activation_bytes"]["2"]
    assert activations["flash"]["kept"] > 10 * activations["flash"]["checkpointed"]
    assert activations["math"]["kept"] > 2 * activations["flash"]["kept"]
    whole_scores = plan(ds_configs=("zero2",), attention="math").rows[0]
    assert whole_scores.memory.peak_bytes > plan(ds_configs=("zero2",)).rows[0].memory.peak_bytes


def demo_plan(*configs, **values):
    return plan(model="demo", world_sizes=(2,), ds_configs=configs, micro_batch_sizes=(2,), **values)


def test_each_loss_takes_what_it_takes_for_its_logits_wherever_they_are_told():
    fused = plan(ds_configs=("zero2",))
    chunked, plain = (plan(ds_configs=("zero2",), chunked_loss=chosen, fused_loss=False) for chosen in (True, None))
    assert activation_line(fused, 2).endswith("; logits 0.1 GB")  # 2 bytes x 2 x 1024 x 32,768
    assert activation_line(chunked, 2).endswith("; logits 0.5 GB")  # 2 x 2 bytes, and 2 x 4 of a row
    assert activation_line(plain, 2).endswith("; logits 0.8 GB")  # 3 x 4 bytes
    peaks = [[row.memory.peak_bytes for row in each.rows] for each in (fused, chunked, plain)]
    assert all(sorted(sizes) == list(sizes) for sizes in zip(*peaks, strict=True))
    assert peaks[0][-1] < peaks[1][-1] < peaks[2][-1]


def test_traces_agree_with_the_formulas_and_replace_them():
    configs = ("zero1", "zero3")
    quick = {row.config: row.memory for row in demo_plan(*configs).asked}
    traced = demo_plan(*configs, trace=True, num_workers=2)
    assert {row.config for row in traced.asked} == set(configs)
    for row in traced.asked:
        assert (quick[row.config].depth, row.memory.depth) == ("quick", "traced")
        assert quick[row.config].peak_bytes == pytest.approx(row.memory.peak_bytes, rel=0.03)
    for config in configs:
        again = demo_plan(config)
        assert again.asked == [row for row in traced.asked if row.config == config]
        assert "*" in describe(again)


def test_a_kept_trace_is_used_where_it_belongs():
    (row,) = demo_plan("zero2").asked
    config = RunConfig(model="demo", seq_length=256, global_batch_size=16, micro_batch_size=2)
    shape = find_shape("demo", vocab_size=32_768, seq_length=256)
    resolved = resolve_ds_config(
        open_ds_config("zero2").config, config, world_size=2, model_hidden_size=256, nvme_path="nvme"
    )
    from codeparrot_ds.memory.workload import Workload

    workload = Workload(shape=shape, ds_config=resolved, world_size=2, seq_length=256, lean_step=True, fused_loss=True)
    keep(workload, dataclasses.replace(row.memory, depth="traced", resident_bytes=7))
    assert predict(config, shape, resolved, 2).resident_bytes == 7
    assert predict(config, shape, resolved | {"train_micro_batch_size_per_gpu": 1}, 2).depth == "quick"


@pytest.mark.parametrize("worlds", [(8,), (1, 8)])
def test_a_picture(worlds):
    image = draw_plan(plan(world_sizes=worlds, ds_configs=("zero0", "zero3"), device_memory=24 * GB))
    assert image.startswith(b"\x89PNG") and len(image) > 10_000
    assert int.from_bytes(image[16:20], "big") == 1120


# --------------------------------------------------------------------------------------------------------------------
# Files that say something of the run


@pytest.fixture
def own_file(tmp_path):
    """Writes a DeepSpeed JSON at stage 2 in bf16 with these keys as well; returns its path."""

    def write(**keys):
        path = tmp_path / "own.json"
        zero = {"stage": 2, "reduce_bucket_size": 5e7}
        path.write_text(json.dumps({"zero_optimization": zero, "bf16": {"enabled": True}} | keys, indent=1))
        return str(path)

    return write


MICRO, STEPS, ROWS = "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size"


@pytest.mark.parametrize(
    ("keys", "options", "planned"),
    [
        ({MICRO: 12}, {}, (12, 16, 192)),
        ({MICRO: 12}, {"micro_batch_sizes": (4, 12)}, (12, 16, 192)),
        ({MICRO: 5}, {}, (5, 38, 190)),  # as near to the preset's rows as it comes
        ({MICRO: 200}, {}, (200, 1, 200)),
        ({MICRO: 12, STEPS: 3}, {}, (12, 3, 36)),
        ({ROWS: 64, STEPS: 4}, {}, (16, 4, 64)),
        ({ROWS: 256, STEPS: 1}, {}, (256, 1, 256)),
        ({STEPS: 4}, {"global_batch_size": 64}, (16, 4, 64)),
        ({MICRO: 16, ROWS: 2048}, {}, (16, 128, 2048)),
        ({MICRO: 16, ROWS: 2048}, {"global_batch_size": 2048, "micro_batch_sizes": (16,)}, (16, 128, 2048)),
    ],
)
def test_a_file_that_says_the_micro_batch_is_planned_with_it(own_file, keys, options, planned):
    path = own_file(**keys)
    made = plan(model="small", world_sizes=(1,), ds_configs=(path, "zero2"), **options)
    (row,) = [row for row in made.shown(1) if row.config == path]
    assert (row.micro_batch_size, row.accumulation_steps, row.rows_per_step) == planned
    assert [each for each in made.rows if each.config == path] == [row]
    said = f"{path} says so itself: micro-batch {planned[0]}, {planned[2]:,} rows per step"
    assert said in describe(made).splitlines()
    alone = plan(model="small", world_sizes=(1,), micro_batch_sizes=planned[:1], global_batch_size=planned[2],
                 ds_configs=("zero2",))  # fmt: skip
    assert row.memory.peak_bytes == next(r for r in alone.asked).memory.peak_bytes


@pytest.mark.parametrize(
    "keys",
    [
        {ROWS: 64},
        {STEPS: 4},
        {"gradient_clipping": 0.5},
        {"optimizer": {"type": "AdamW", "params": {"lr": 3e-5, "weight_decay": 0.01}}},
        {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 100}}},
        {MICRO: "auto", ROWS: "auto", STEPS: "auto", "gradient_clipping": "auto"},
    ],
)
def test_what_else_a_file_says_of_the_run_stops_no_plan(own_file, keys):
    path = own_file(**keys)
    made = plan(model="small", world_sizes=(2,), ds_configs=(path,))
    (row,) = made.shown(2)
    assert row.micro_batch_size == (8 if ROWS in keys and keys[ROWS] == 64 else 12) and not row.is_own
    assert row.rows_per_step == {ROWS: 64, STEPS: 96}.get(next(iter(keys)) if len(keys) == 1 else "", 192)


@pytest.mark.parametrize(
    ("keys", "options", "words"),
    [
        (
            {MICRO: 12},
            ["--micro-batch-sizes", "1,8"],
            "own.json:9: the file itself makes micro-batches of 12 row(s) on 1",
        ),
        (
            {ROWS: 64},
            ["--global-batch-size", "32"],
            "own.json:9: train_batch_size is 64 but --global-batch-size says 32",
        ),
        (
            {STEPS: 5},
            ["--global-batch-size", "64"],
            "own.json:9: gradient_accumulation_steps 5 on 1 rank(s) cannot make 64",
        ),
        ({MICRO: 5}, ["--global-batch-size", "64"], "global_batch_size 64 is not divisible by micro_batch_size 5"),
        ({MICRO: 5, ROWS: 64}, [], "train_batch_size: is not divisible by"),
        ({MICRO: "five"}, [], "own.json:9: error: train_micro_batch_size_per_gpu: must be a whole number"),
    ],
)
def test_numbers_that_do_not_go_together_are_named(own_file, keys, options, words, capsys):
    assert main(["plan", "small", own_file(**keys), *options]) == 2
    said = capsys.readouterr().err.strip()
    assert words in said and "\n" not in said


def test_every_public_file_without_an_error_is_planned(tmp_path):
    folder = Path(__file__).parents[1] / "ds_config"
    public = json.loads((folder / "more_public_configs.json").read_text())
    for file in ("public_configs.json", "public_files.json"):
        public |= {name: each["config"] for name, each in json.loads((folder / file).read_text()).items()}
    refused, planned = [], 0
    for number, (name, config) in enumerate(public.items()):
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps(config))
        if any(each.severity == "error" for each in lint(config, name, world_size=1)):
            continue
        try:
            assert plan(model="small", world_sizes=(1,), ds_configs=(str(path),)).shown(1), name
            planned += 1
        except UserError as error:
            refused.append((name, str(error)))
    assert refused == [] and planned > 60


# --------------------------------------------------------------------------------------------------------------------
# Sizes, GPUs, calibration


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("80GB", 80 * 10**9),
        ("80 gb", 80 * 10**9),
        ("80GiB", 80 * 2**30),
        ("40960MiB", 40 * 2**30),
        ("1.5 TB", 15 * 10**11),
        ("24G", 24 * 10**9),
    ],
)
def test_sizes_of_memory(text, size):
    assert parse_memory(text) == size


def test_the_smallest_visible_gpu_counts(gpu, monkeypatch):
    gpu(81_559, 24_576, 40_960)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert devices.smallest_gpu() == ("Test GPU 1", 24 * 2**30)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,2")
    assert devices.smallest_gpu() == ("Test GPU 2", 40 * 2**30)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-0")
    assert devices.smallest_gpu() == ("Test GPU 0", 81_559 * 2**20)


MEASURED = {
    "predicted_bytes": 10 * GB, "library_bytes": GB // 2, "allocated_bytes": 11 * GB,
    "reserved_bytes": 12 * GB, "reserved_at_end_bytes": 12 * GB,
    "used_bytes": 14 * GB, "device": "Test GPU", "device_bytes": 80 * GB,
}  # fmt: skip


def test_calibration_is_kept_and_used(tmp_path, capsys):
    run = tmp_path / "brave-otter-1"
    run.mkdir()
    (run / "run.json").write_text(json.dumps({"name": "brave-otter-1", "memory": MEASURED}))
    before = plan(ds_configs=("zero2",)).rows[0]
    assert main(["plan", "large", "--world-size", "8", "zero2", "--json", "--calibrate", str(run)]) == 0
    captured = capsys.readouterr()
    assert "memory-calibration.json" in captured.err and "brave-otter-1" in captured.err
    overhead = load_overhead()
    assert overhead.fixed_bytes == 1.5 * GB and overhead.outside_bytes == 2 * GB
    assert overhead.ratio == pytest.approx(12 / 11)
    row = json.loads(captured.out)["plans"][0]
    assert row["peak_bytes"] == before.memory.peak_bytes
    assert row["needed_bytes"] == overhead.total(row["peak_bytes"], 8) > before.needed_bytes


@pytest.mark.parametrize(
    ("record", "words"),
    [(None, "is not a run"), ("{", "damaged"), ('{"name": "x", "world_size": 2}', "it ran on CPUs")],
)
def test_nothing_to_calibrate_from(tmp_path, record, words):
    if record is not None:
        (tmp_path / "run.json").write_text(record)
    with pytest.raises(UserError, match=words):
        calibrate(tmp_path)
    assert load_overhead() == Overhead()


def test_a_damaged_calibration_is_named():
    path = save_overhead(Overhead(), {})
    assert load_overhead() == Overhead()
    path.write_text("{}")
    with pytest.raises(UserError, match=r"memory-calibration\.json is damaged"):
        load_overhead()


# --------------------------------------------------------------------------------------------------------------------
# What train does


def large_run(**changes):
    values = {"model": "gpt2-xl", "global_batch_size": 512, "micro_batch_size": 16, "deepspeed": "zero2"}
    config = RunConfig(**values | changes)
    shape = find_shape("gpt2-xl", vocab_size=32_768, seq_length=1024)
    resolved = resolve_ds_config(open_ds_config(config.deepspeed).config, config, world_size=8, model_hidden_size=1600)
    return config, shape, resolved


def test_the_refusal_names_the_shortfall_and_what_fits():
    config, shape, resolved = large_run()
    needed = Overhead().total(predict(config, shape, resolved, 8).peak_bytes, 8)
    problem = why_too_large(config, shape, resolved, 8, 40 * GB, "Test GPU")
    assert f"{(needed - 40 * GB) / 1e9:,.1f} GB too little" in problem and "--ignore-memory-plan" in problem
    assert "--micro-batch-size 8 (" in problem and "--deepspeed zero2_activation_checkpointing (" in problem
    assert why_too_large(config, shape, resolved, 8, needed, "Test GPU") is None
    assert "no shipped config" in why_too_large(config, shape, resolved, 8, 2 * GB, "Test GPU")


def test_no_other_micro_batch_is_offered_than_the_file_says(own_file):
    path = own_file(**{MICRO: 16})
    config, shape, resolved = large_run(deepspeed=path)
    problem = why_too_large(config, shape, resolved, 8, 40 * GB, "Test GPU")
    assert "--deepspeed zero2_activation_checkpointing (" in problem and "--micro-batch-size" not in problem


def test_train_refuses_on_a_gpu_and_can_be_overruled(make_config, gpu, capsys):
    config = make_config()
    run = dataclasses.replace(check_run(config, device="cpu", world_size=2), device="cuda")
    gpu(1024)
    with pytest.raises(UserError, match="too little"):
        check_memory(run)
    check_memory(run, refuse=False)
    assert "warning: the run needs" in capsys.readouterr().err
    gpu(81_559)
    check_memory(run)


def test_cpu_ranks_are_warned_only(make_config, monkeypatch, capsys):
    import psutil

    config = make_config(deepspeed="zero2_fp32")
    run = check_run(config, device="cpu", world_size=2)
    check_memory(run)
    assert capsys.readouterr().err == ""
    real = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: real._replace(total=10**7))
    check_memory(run)
    assert "warning: the tensors of 2 rank(s) take" in capsys.readouterr().err


def test_predicted_and_measured_are_told_once_and_kept(caplog):
    memory = Memory(
        depth="quick",
        device={"parameters": 9.5 * GB},
        resident_bytes=GB,
        phases={"initialization": 1, "forward_backward": 9.5 * GB, "step": GB},
        host_bytes=0,
        nvme_bytes=0,
        checkpoint_bytes=0,
    )
    measured = {key: value for key, value in MEASURED.items() if key not in ("predicted_bytes", "library_bytes")}
    said, kept = [], []
    check = MemoryCheck(
        memory,
        library_bytes=GB // 2,
        measure=lambda: MeasuredMemory(**measured),
        say=lambda text, *values: said.append(text % values),
        record=kept.append,
        first_step=20,
    )
    for step in (21, 22, 23, 24):
        check.after(step)
    (line,), (record,) = said, kept
    assert line.startswith("memory: 10.0 GB predicted (quick), 11.0 GB measured (+10.0%)")
    assert record["step"] == 23 and record | MEASURED == record
