"""The formulas of a memory plan: against what DeepSpeed's own engine took when it was traced, and term by term."""

import dataclasses
import json
from pathlib import Path

import pytest

from codeparrot_ds.config.run_config import RunConfig
from codeparrot_ds.ds_config.file import open_ds_config
from codeparrot_ds.ds_config.resolve import resolve_ds_config
from codeparrot_ds.memory.formulas import quick_memories
from codeparrot_ds.memory.gradient_memory import partitions
from codeparrot_ds.memory.model_memory import BackwardPass, parameters
from codeparrot_ds.memory.workload import CATEGORIES, Workload
from codeparrot_ds.model.shapes import KNOWN_SHAPES, find_shape, num_parameters

RECORD = Path(__file__).resolve().parents[2] / "records" / "2026-11-24-memory-plan" / "raw.json"
ROWS = [row for row in json.loads(RECORD.read_text())["raw"] if "traced" in row]
SEQ_LENGTH = 1024


def workload(config, model="gpt2", world_size=8, micro_batch_size=2, accumulation_steps=1, **changes):
    """A shipped config, or a mapping, as a workload; ``changes`` are the workload's own fields."""
    run = RunConfig(
        model=model,
        global_batch_size=micro_batch_size * accumulation_steps * world_size,
        micro_batch_size=micro_batch_size,
    )
    shape = find_shape(model, vocab_size=32_768, seq_length=SEQ_LENGTH)
    raw = open_ds_config(config).config if isinstance(config, str) else config
    resolved = resolve_ds_config(
        raw, run, world_size=world_size, model_hidden_size=shape.n_embd, nvme_path="nvme", source="test"
    )
    fields = {"shape": shape, "ds_config": resolved, "world_size": world_size, "seq_length": SEQ_LENGTH}
    return Workload(**fields | changes)


def quick(asked):
    (memory,) = quick_memories([asked])
    return memory


def name_of(row):
    point = row["point"]
    return "-".join(str(value) for value in point.values())


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_the_peak_is_within_3_percent_of_the_traced_engine(row):
    point = dict(row["point"])
    memory = quick(workload(point.pop("config"), **point))
    traced = row["traced"]
    peak = max(traced["phases"]["forward_backward"], traced["phases"]["step"])
    assert memory.peak_bytes == pytest.approx(peak, rel=0.03)
    assert memory.resident_bytes == pytest.approx(traced["resident_bytes"], rel=0.03)
    assert sum(memory.device.values()) == memory.peak_bytes and set(memory.device) == set(CATEGORIES)


def test_the_record_covers_both_shapes_three_worlds_and_every_stage():
    points = [row["point"] for row in ROWS]
    assert {point["model"] for point in points} == {"gpt2", "gpt2-xl"}
    assert len({point["world_size"] for point in points}) == 3
    assert len({point["config"] for point in points}) >= 20


@pytest.mark.parametrize("shape", KNOWN_SHAPES.values(), ids=KNOWN_SHAPES)
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_add_up(shape, tied):
    shape = dataclasses.replace(shape, tie_word_embeddings=tied)
    assert sum(parameter.numel for parameter in parameters(shape)) == num_parameters(shape)
    moments = BackwardPass(
        shape, seq_length=8, width=2, attention="flash", dropout=False, checkpointing=False
    ).moments()
    arrived = [parameter for moment in moments for parameter in moment.arriving]
    assert sorted(arrived, key=lambda p: p.name) == sorted(parameters(shape), key=lambda p: p.name)


def test_a_block_saves_32_bytes_a_token_and_channel():
    """32·s·b·h + 4·b·a·s with flash attention and GELU, plus the statistics of two LayerNorms."""
    shape = KNOWN_SHAPES["gpt2-xl"]
    backward = BackwardPass(
        shape, seq_length=SEQ_LENGTH, width=2, attention="flash", dropout=False, checkpointing=False
    )
    statistics = 2 * 2 * 4 * SEQ_LENGTH
    assert backward.block == 32 * SEQ_LENGTH * shape.n_embd + 4 * shape.n_head * SEQ_LENGTH + statistics
    whole_scores = BackwardPass(
        shape, seq_length=SEQ_LENGTH, width=2, attention="math", dropout=False, checkpointing=False
    )
    assert whole_scores.block - backward.block > 4 * shape.n_head * SEQ_LENGTH**2  # fp32


@pytest.mark.parametrize(
    ("config", "bytes_a_parameter"),
    [
        ("zero0", 14),
        ("zero0_fp32", 12),
        ("zero1", 2 + 12 / 8),
        ("zero2", 2 + 12 / 8),
        ("zero1_fp32_accumulation", 6 + 12 / 8),
        ("zero2_bf16_states", 2 + 6 / 8),
        ("zero3", 16 / 8),
        ("zero3_fp32", 20 / 8),
        ("zero2_offload", 2),
    ],
)
def test_what_stays_between_two_steps(config, bytes_a_parameter):
    asked = workload(config, model="gpt2-xl")
    parameters = num_parameters(asked.shape)
    # Stage 3 keeps a bucket of 5e7 elements and small weights; offloading a buffer for the largest gradient.
    beside = 0.2e9 + 5e6
    resident = quick(asked).resident_bytes
    assert bytes_a_parameter * parameters <= resident <= bytes_a_parameter * parameters + beside


def test_partitions_are_padded_and_start_with_the_embedding():
    decayed, others = partitions(parameters(KNOWN_SHAPES["gpt2"]), 8)
    for share in (decayed, others):
        assert share.numel * 8 == share.flat_numel and share.flat_numel % 16 == 0
    assert [parameter.name for parameter in decayed.owned] == ["wte"]  # larger than an eighth of the model
    assert decayed.owners()["wte"] == (0, 1)


def test_what_accumulation_costs():
    """Stage 1 keeps whole gradients and its buckets between micro-batches, stage 2 what the rank owns."""

    def peak(config, steps):
        return quick(workload(config, "gpt2-xl", micro_batch_size=4, accumulation_steps=steps)).peak_bytes

    parameters = num_parameters(KNOWN_SHAPES["gpt2-xl"])
    assert peak("zero1", 2) - peak("zero1", 1) == 2 * parameters + 2 * 2 * 50_000_000
    owned = peak("zero2", 2) - peak("zero2", 1)
    assert 2 * parameters / 8 <= owned <= 1.1 * 2 * parameters / 8
    assert peak("zero3", 2) == peak("zero3", 1)


@pytest.mark.parametrize("config", ["zero0", "zero1", "zero2"])
def test_a_lean_step_holds_less(config):
    """2 bytes a parameter in the step, or 4 at stage 0; and no bucket where a rank is alone."""
    plain, lean = (quick(workload(config, "gpt2-xl", 1, lean_step=lean)) for lean in (False, True))
    fewer = (4 if config == "zero0" else 2) * num_parameters(KNOWN_SHAPES["gpt2-xl"])
    assert plain.phases["step"] - lean.phases["step"] == pytest.approx(fewer, rel=0.02)
    assert lean.device["buckets"] == 0 and lean.peak_bytes < plain.peak_bytes


def test_a_peak_is_a_line_in_the_micro_batch():
    sizes = [quick(workload("zero2", "gpt2-xl", micro_batch_size=rows)).peak_bytes for rows in (8, 16, 24)]
    assert sizes[1] - sizes[0] == sizes[2] - sizes[1] > 0


def test_activation_checkpointing_and_the_host():
    kept, again, away = (
        quick(workload(config, "gpt2-xl", micro_batch_size=8))
        for config in ("zero2", "zero2_activation_checkpointing", "zero2_cpu_checkpointing")
    )
    row = 2 * SEQ_LENGTH * 1600
    assert kept.device["activations"] > 10 * again.device["activations"]
    assert again.device["activations"] > 8 * 48 * row > away.device["activations"]
    assert away.host_bytes >= 47 * 8 * row and again.host_bytes == 0


@pytest.mark.parametrize("width_of_a_live_weight", [2])
def test_stage_3_gathers_up_to_its_limit(width_of_a_live_weight):
    def parameters_at_peak(limit):
        config = {"zero_optimization": {"stage": 3, "stage3_max_live_parameters": limit}, "bf16": {"enabled": True}}
        return quick(workload(config, "gpt2-xl", micro_batch_size=8)).device["parameters"]

    assert parameters_at_peak(10**9) - parameters_at_peak(5 * 10**8) == width_of_a_live_weight * 5 * 10**8


def test_dropout_adds_a_mask_and_fp32_doubles_activations():
    plain = quick(workload("zero2", micro_batch_size=8)).device["activations"]
    assert quick(workload("zero2", micro_batch_size=8, dropout=0.1)).device["activations"] > plain
    fp32 = quick(workload("zero2_fp32", micro_batch_size=8)).device["activations"]
    assert fp32 == pytest.approx(2 * plain, rel=0.01)


def test_a_bucket_is_allocated_whole_and_twice_with_overlap():
    def buckets(overlaps):
        zero = {"stage": 1, "reduce_bucket_size": 300_000_000, "overlap_comm": overlaps}
        config = {"zero_optimization": zero, "bf16": {"enabled": True}}
        return quick(workload(config, micro_batch_size=1, accumulation_steps=2)).device["buckets"]

    assert buckets(True) == 2 * buckets(False) == 2 * 2 * 300_000_000


@pytest.mark.parametrize(
    ("config", "rows", "traced_peak"),
    [
        ("zero2", 2, 3_125_800_000),
        ("zero2_fp32", 2, 3_844_800_000),
        ("zero2_activation_checkpointing", 16, 7_183_600_000),
    ],
)
def test_plain_attention_agrees_with_the_traced_engine(config, rows, traced_peak):
    """Peaks of the traced engine, 111M on 8 ranks, with torch's math kernel."""
    memory = quick(workload(config, micro_batch_size=rows, attention="math"))
    assert memory.peak_bytes == pytest.approx(traced_peak, rel=0.005)
