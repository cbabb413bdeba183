"""What is compared: configs and fields as typed, names, checks and plans, the folder, and the order of trials."""

import dataclasses
import json
import re

import pytest

from codeparrot_ds.compare.candidates import (
    Candidate,
    Request,
    Results,
    Trial,
    candidates_of,
    left_to_run,
    open_folder,
    parse_config,
    reference_of,
    slug_of,
    with_nothing_open,
)
from codeparrot_ds.compare.run import with_warnings
from codeparrot_ds.config.run_config import FIELDS, OPEN
from codeparrot_ds.ds_config.file import open_ds_config
from codeparrot_ds.errors import UserError

FP32 = {"zero_optimization": {"stage": 0}}


@pytest.fixture
def make_request(make_config):
    def make(*configs, world_sizes=(1,), **changes):
        fields = {name: changes.pop(name) for name in list(changes) if name in Request.__dataclass_fields__}
        run = dataclasses.replace(make_config(**changes), run_name=None)
        return Request(configs=configs, config=run, world_sizes=world_sizes, **fields)

    return make


def write(path, config):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(config))
    return str(path)


def end(folder, trial, status):
    place = folder / "trials" / trial.name
    place.mkdir(parents=True, exist_ok=True)
    (place / "result.json").write_text(json.dumps({"status": status, "seconds": 1.0}))


# --------------------------------------------------------------------------------------------------------------------
# As typed


def test_fields_after_the_comma():
    assert parse_config("zero2") == ("zero2", {})
    assert parse_config("dir/my.json,micro-batch-size=4,dropout=0.1,compile=yes") == (
        "dir/my.json",
        {"micro_batch_size": 4, "dropout": 0.1, "compile": True},
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("zero2,micro_batch=4", "comes field=value of the run config; did you mean 'micro_batch_size'?"),
        ("zero2,dropout", "after the comma comes field=value"),
        ("zero2,dropout=no", "dropout must be a number, not 'no'"),
        ("zero2,micro_batch_size=0", "micro_batch_size must be"),
        ("zero2,seq_length=8", "seq_length is the same for all configs of a comparison"),
    ],
)
def test_a_mistake_in_a_config_is_named(text, words):
    with pytest.raises(UserError, match=re.escape(words)):
        parse_config(text)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 5, "warmup_steps": 5}, "leaves none"),
        ({"steps": 400, "max_train_steps": 300}, "is more than the run's"),
    ],
)
def test_a_request_that_cannot_be_scored_is_refused(make_request, changes, words):
    with pytest.raises(UserError, match=words):
        make_request("zero2", **changes)


def test_names_are_files_and_stay_apart():
    assert slug_of("zero2 on 2") == "zero2-on-2"
    odd = [slug_of(text) for text in ("../a,b=1 on 1", "a,b=1 on 1", "a,b-1 on 1", "x" * 200, "x" * 201)]
    assert len(set(odd)) == len(odd)
    assert all("/" not in slug and ".." not in slug and len(slug) < 70 for slug in odd)


# --------------------------------------------------------------------------------------------------------------------
# Candidates


def test_every_config_on_every_number_of_ranks_with_every_micro_batch(make_request, tmp_path):
    request = make_request("zero1", "zero2,dropout=0.1", world_sizes=(1, 2), micro_batch_sizes=(2, 4))
    found = candidates_of(request, tmp_path, device="cpu")
    assert [each.name for each in found] == [
        "zero1 on 1", "zero1,micro_batch_size=4 on 1", "zero1 on 2", "zero1,micro_batch_size=4 on 2",
        "zero2,dropout=0.1 on 1", "zero2,dropout=0.1,micro_batch_size=4 on 1",
        "zero2,dropout=0.1 on 2", "zero2,dropout=0.1,micro_batch_size=4 on 2",
    ]  # fmt: skip
    last = found[-1]
    assert last.skipped is None and last.config.dropout == 0.1 and last.predicted.peak_bytes > 10**7
    assert last.resolved["gradient_accumulation_steps"] == 1 and last.resolved["train_micro_batch_size_per_gpu"] == 4


@pytest.mark.parametrize(
    ("config", "changes", "words"),
    [
        ("zero2_fp16", {}, "fp16"),
        ("zero2,micro_batch_size=3", {}, "global_batch_size"),
        ("zero2,micro_batch_size=4", {"world_sizes": (4,)}, "global_batch_size"),
    ],
)
def test_what_cannot_be_run_is_skipped_with_its_reason(make_request, tmp_path, monkeypatch, config, changes, words):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")  # a few CPUs have fp16
    request = make_request(config, "zero1,micro_batch_size=1", **changes)
    skipped, other = candidates_of(request, tmp_path, device="cpu")
    assert words in skipped.skipped and other.skipped is None


@pytest.mark.parametrize(("config", "words"), [("zero9", "did you mean 'zero3'"), ("mine.json", "mine.json:1")])
def test_a_config_that_is_not_there_or_no_json_is_refused_before_any_trains(make_request, tmp_path, config, words):
    (tmp_path / "mine.json").write_text('{"stage" 2}')
    path = str(tmp_path / config) if config == "mine.json" else config
    with pytest.raises(UserError, match=re.escape(words)):
        candidates_of(make_request("zero1", path), tmp_path, device="cpu")


def test_what_cannot_fit_is_skipped_by_its_plan(make_request, tmp_path, monkeypatch):
    import psutil

    memory = psutil.virtual_memory()._replace(total=10**7)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    (candidate,) = candidates_of(make_request("zero2"), tmp_path, device="cpu")
    assert "host memory by the plan and this machine has 10.0 MB" in candidate.skipped


def test_two_files_of_one_name_stay_apart(make_request, tmp_path):
    paths = [write(tmp_path / place / "ds.json", FP32 | {"zero_optimization": {"stage": stage}})
             for stage, place in enumerate(("one", "two"))]  # fmt: skip
    first, second = candidates_of(make_request(*paths), tmp_path / "out", device="cpu")
    assert first.ds_config != second.ds_config and first.slug != second.slug
    assert (first.resolved["zero_optimization"]["stage"], second.resolved["zero_optimization"]["stage"]) == (0, 1)


def test_an_autotuners_config_brings_its_micro_batch_and_its_notes(make_request, tmp_path):
    best = {**open_ds_config("zero2").config, "train_micro_batch_size_per_gpu": 4, "gradient_clipping": 0.5}
    (candidate,) = candidates_of(make_request(write(tmp_path / "best.json", best)), tmp_path / "out", device="cpu")
    assert candidate.skipped is None
    assert candidate.config.micro_batch_size == 4 and candidate.resolved["gradient_clipping"] == 1.0
    assert any("gradient_clipping 0.5 is left out" in note for note in candidate.notes)


def test_on_a_gpu_each_config_has_what_train_would_give_it(make_request, tmp_path, monkeypatch):
    config = make_request("zero1", deepspeed=f"{OPEN}zero2:auto", micro_batch_size=f"{OPEN}4").config
    for module in ("compare.candidates", "memory.choice"):
        monkeypatch.setattr(f"codeparrot_ds.{module}.smallest_gpu", lambda: ("a GPU", 24 * 2**30))
    given = {"world_size": 1, "precision": "bf16"}
    assert with_nothing_open(config, named=True, device="cuda", **given).auto_micro_batch
    base = with_nothing_open(config, named=False, device="cuda", **given)
    assert (base.deepspeed, base.micro_batch_size) == ("zero1", base.global_batch_size)
    assert with_nothing_open(config, named=True, device="cpu", **given).micro_batch_size == 4
    for module in ("compare.candidates", "memory.choice"):
        monkeypatch.setattr(f"codeparrot_ds.{module}.smallest_gpu", lambda: None)
    assert with_nothing_open(config, named=True, device="cuda", **given).micro_batch_size == 4


def test_an_automatic_micro_batch_is_chosen_for_each_config_and_the_comparison_continues(
    make_request, tmp_path, monkeypatch
):
    def start():
        request = make_request("zero1", "zero2,micro_batch_size=2", "zero3,micro_batch_size=auto",
                               micro_batch_size=FIELDS["micro_batch_size"].parse("auto"))  # fmt: skip
        open_folder(tmp_path, request)
        return candidates_of(request, tmp_path, device="cpu")

    found = start()
    saved = json.loads((tmp_path / "comparison.json").read_text())
    assert saved["config"]["micro_batch_size"] == "auto"
    assert [each.skipped for each in found] == [None] * 3
    largest = found[0].config.micro_batch_size  # of the rows of a step
    assert largest == found[0].config.global_batch_size > 2
    assert [each.name for each in found] == [
        f"zero1,micro_batch_size={largest} on 1", "zero2,micro_batch_size=2 on 1",
        f"zero3,micro_batch_size=auto,micro_batch_size={largest} on 1",
    ]  # fmt: skip
    assert all(each.resolved["train_micro_batch_size_per_gpu"] == each.config.micro_batch_size for each in found)
    assert [each.name for each in start()] == [each.name for each in found]
    # A machine where a smaller one fits has trials of its own.
    monkeypatch.setattr("codeparrot_ds.compare.candidates.micro_batch_sizes", lambda *config: [1, 2])
    assert start()[0].name == "zero1,micro_batch_size=2 on 1"
    monkeypatch.setattr("codeparrot_ds.compare.candidates.memory_budget", lambda *device: (10, "half of nothing"))
    assert "one row needs" in start()[0].skipped


# --------------------------------------------------------------------------------------------------------------------
# The folder


def test_a_comparison_goes_on_only_as_it_began(make_request, tmp_path):
    folder = tmp_path / "out"
    open_folder(folder, make_request("zero2", steps=10))
    open_folder(folder, make_request("zero2", "zero3", steps=10, repeats=5))  # more configs and trials are no other
    with pytest.raises(UserError, match=r"another comparison \(steps was 10 and is 12\)"):
        open_folder(folder, make_request("zero2", steps=12))
    with pytest.raises(UserError, match=r"seed was 1 and is 2"):
        open_folder(folder, make_request("zero2", steps=10, seed=2))


def test_a_comparison_that_kept_relative_paths_goes_on(make_request, tmp_path, corpus_dir, monkeypatch):
    monkeypatch.chdir(corpus_dir.parent)
    folder = tmp_path / "out"
    request = make_request("zero2", data=corpus_dir.name)
    open_folder(folder, request)
    saved = json.loads((folder / "comparison.json").read_text())
    assert saved["config"]["data"] == str(corpus_dir)
    saved["config"]["data"] = corpus_dir.name  # as versions did that kept paths as they were typed
    (folder / "comparison.json").write_text(json.dumps(saved))
    open_folder(folder, request)
    monkeypatch.chdir(tmp_path)
    open_folder(folder, make_request("zero2", data=corpus_dir.name, output_dir="elsewhere"))
    with pytest.raises(UserError, match="another comparison .data was"):
        open_folder(folder, make_request("zero2", data=str(corpus_dir)))


def test_a_folder_with_something_else_in_it_is_left_alone(make_request, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="is no comparison and not empty"):
        open_folder(tmp_path, make_request("zero2"))


def test_a_config_that_changed_meanwhile_is_refused(make_request, tmp_path):
    path = write(tmp_path / "mine.json", FP32)
    candidates_of(make_request(path), tmp_path / "out", device="cpu")
    write(tmp_path / "mine.json", FP32 | {"zero_optimization": {"stage": 1}})
    with pytest.raises(UserError, match="differs from the config of that name as it is now"):
        candidates_of(make_request(path), tmp_path / "out", device="cpu")


# --------------------------------------------------------------------------------------------------------------------
# The order


def candidate(name, stage, precision="bf16", world_size=1):
    resolved = {"zero_optimization": {"stage": stage}} | ({} if precision == "fp32" else {precision: {"enabled": True}})
    return Candidate(label=name, world_size=world_size, ds_config=None, config=None, resolved=resolved)


A, B, PLAIN2, PLAIN1 = (
    candidate("a", 1), candidate("b", 2), candidate("plain", 0, "fp32", 2), candidate("plain", 0, "fp32", 1),
)  # fmt: skip
OUT = dataclasses.replace(candidate("out", 3), skipped="too large")


def left(*candidates, folder, repeats=1):
    repeated = [dataclasses.replace(each, repeats=repeats) for each in candidates]
    return [trial.name for trial in left_to_run(repeated, Results(folder))]


def test_trials_go_forwards_and_backwards_from_the_reference_and_its_sensitivity_runs(tmp_path):
    assert left(A, OUT, B, PLAIN2, PLAIN1, folder=tmp_path, repeats=3) == [
        "plain-on-1-0", "sensitivity-bf16-plain-on-1", "sensitivity-fp32-plain-on-1",
        "a-on-1-0", "b-on-1-0", "plain-on-2-0",
        "plain-on-2-1", "b-on-1-1", "a-on-1-1", "plain-on-1-1",
        "plain-on-1-2", "a-on-1-2", "b-on-1-2", "plain-on-2-2",
    ]  # fmt: skip


def test_what_is_done_is_not_run_again_and_what_failed_has_no_more_trials(tmp_path):
    end(tmp_path, Trial(candidate=A, repeat=0), "finished")
    end(tmp_path, Trial(candidate=A, repeat=0, perturbed="bf16"), "finished")
    end(tmp_path, Trial(candidate=B, repeat=0), "hung")
    assert left(A, B, folder=tmp_path, repeats=2) == ["a-on-1-1"]
    Results(tmp_path).forget_failures()
    assert left(A, B, folder=tmp_path, repeats=2) == ["b-on-1-0", "b-on-1-1", "a-on-1-1"]


def test_a_reference_that_failed_leaves_that_to_the_next(tmp_path):
    everything, results = [A, PLAIN2, PLAIN1], Results(tmp_path)
    assert reference_of(everything, results) == PLAIN1
    end(tmp_path, Trial(candidate=PLAIN1, repeat=0), "crashed")
    assert reference_of(everything, results) == PLAIN2
    assert left(*everything, folder=tmp_path) == ["plain-on-2-0", "sensitivity-bf16-plain-on-2", "a-on-1-0"]
    end(tmp_path, Trial(candidate=PLAIN2, repeat=0), "hung")
    assert reference_of(everything, results) == A
    end(tmp_path, Trial(candidate=A, repeat=0), "out of memory")
    assert reference_of(everything, results) == PLAIN1
    assert left(*everything, folder=tmp_path) == []


def test_what_can_hardly_be_meant_is_said_once_for_all_and_else_by_config(make_request, tmp_path, capsys):
    changes = {"max_train_steps": 100, "num_warmup_steps": 100, "steps": 10}  # no trial saves every 15,000 steps
    request = make_request("zero1_fp32", "zero2_fp32,learning_rate=5", **changes)
    one, other = with_warnings(candidates_of(request, tmp_path / "out", device="cpu"), request)
    (shared,) = capsys.readouterr().err.splitlines()
    assert shared.startswith("warning: num_warmup_steps 100 is not below max_train_steps 100: ")
    assert not one.notes and other.notes[0].startswith("warning: num_warmup_steps 100")  # comes to another rate
    assert other.notes[1].startswith("warning: learning_rate 5 is far above") and len(other.notes) == 2
