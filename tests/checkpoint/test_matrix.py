"""Engines saved at one layout and reopened at another; all pairs are in ``benchmarks/checkpoint_matrix.py``.

Every stage in both precisions is saved by two and by three ranks and reopened by three and by two; the rest of the list
has offloading, other classes of optimizer, other precisions of its state, one rank, the disk, and what DeepSpeed itself
wrote. What is compared, and with what, is said in ``layouts.py``. One case alone runs the engines of that case:

    pytest "tests/checkpoint/test_matrix.py::test_resumes[zero1-on-2 -> zero3-on-3]"
"""

import itertools

import pytest

from tests.checkpoint.layouts import (
    BF16_BAND,
    CONTROLS,
    FP32_TOLERANCE,
    OFFLOADED,
    STAGES,
    WORLD_SIZES,
    Layout,
    exact_job,
    failing_job,
    native_job,
    pair_jobs,
    plain_job,
    plans_of,
    run_plans,
    save_job,
)
from tests.needs import needed, needs

# Neighbours have another stage, another world size and mostly the same precision: each is reopened at the next.
ORDER = sorted(STAGES, key=lambda name: (name.endswith("_fp32"), "0213".index(name[4])))
CIRCLE = list(itertools.starmap(Layout, itertools.product(ORDER, (2, 3))))
PAIRS = list(zip(CIRCLE, CIRCLE[3:] + CIRCLE[:3], strict=True))
PAIRS += [
    (Layout(source, 2), Layout(target, 1 + 2 * (number % 2)))
    for number, (source, target) in enumerate(zip(OFFLOADED, OFFLOADED[1:] + OFFLOADED[:1], strict=True))
]
PAIRS += [
    (Layout.parse(source), Layout.parse(target))
    for source, target in (
        # Masters, and masters and moments, in bf16: written as they are, rounded or widened when they are read.
        ("zero2_offload_bf16_masters@2", "zero1_fp32@3"),
        ("zero2_offload_bf16_states@1", "zero2_offload_bf16_masters@2"),
        ("zero2_offload_bf16_masters@2", "zero3_bf16_states@3"),
        ("zero3_bf16_states@2", "zero2_bf16_states@1"),
        ("zero2_bf16_states@3", "zero0@2"),
        # Other classes and orders of the same state.
        ("zero1_fp32_accumulation@3", "zero3@2"),
        ("zero3@2", "zero1_fp32_accumulation@2"),
        ("zero2_round_robin@3", "zero1_round_robin@2"),
        ("zero0_torch_adam@2", "zero2_torch_adam@3"),
        ("zero3_fp32@2", "zero0_fp32_torch_adam@1"),
        ("zero3_hpz@2", "zero2@3"),
        # On the disk, a file a group of parameters.
        ("zero3_nvme@1", "zero1_fp32_large@2"),
        ("zero3_nvme@1", "zero3_nvme@2"),
        ("zero1_fp32_large@2", "zero3_infinity@1"),
    )
]
# What DeepSpeed itself saved, imported and reopened.
PAIRS += [
    (Layout.parse(f"native:{source}"), Layout.parse(target))
    for source, target in (
        ("zero0_fp32@2", "zero2_fp32@1"),
        ("zero1_fp32@2", "zero3_fp32@3"),
        ("zero2_fp32@3", "zero0_fp32@2"),
        ("zero3_fp32@2", "zero1_fp32@1"),
        ("zero2@3", "zero3@2"),
        ("zero3_fp16@2", "zero1_fp16@1"),
    )
]
# The same, read only. In fp16 with a loss scale; the last ones have other classes and orders of the same state.
NATIVE = [
    Layout.parse(text)
    for text in (
        *("zero0@2", "zero1@2", "zero3@3", "zero0_fp16@1", "zero2_fp16@1", "zero0_fp32_torch_adam@2"),
        *(
            "zero0_torch_adam@1",
            "zero1_fp32_accumulation@2",
            "zero2_round_robin@3",
            "zero2_offload_bf16_masters@2",
            "zero3_offload@2",
        ),
    )
]
EXACT = [Layout(name, 2) for name in [*STAGES, "zero2_offload", "zero1_fp32_accumulation", "zero3_bf16_states"]]
EXACT += [Layout("zero2_fp32", 3), Layout("zero3", 1), Layout("zero3_nvme", 1)]
ON_DISK = Layout("zero3_nvme", 1)
DAMAGED = (Layout("zero3_fp32", 2), Layout("zero2", 3))


@pytest.fixture(scope="module")
def results(request, tmp_path_factory):
    """All jobs that the chosen cases need, on the ranks of all three world sizes at once."""
    return run_plans(plans_of(needed(request, "results")), tmp_path_factory.mktemp("matrix"), timeout=540)


def title(layout: Layout) -> str:
    return layout.title


PAIR_TITLES = [f"{source.title} -> {target.title}" for source, target in PAIRS]


@pytest.mark.parametrize(("source", "target"), PAIRS, ids=PAIR_TITLES)
@needs(results=pair_jobs)
def test_resumes(results, source, target):
    """State bit for bit, counters exactly, the next losses to rounding."""
    assert results.problems_of_pair(source, target) == []


@pytest.mark.parametrize("source", dict.fromkeys(source for source, _ in PAIRS), ids=title)
@needs(results=lambda source: [save_job(source)])
def test_an_export_is_the_model_in_plain_transformers(results, source):
    assert results.problems_of_source(source) == []


@pytest.mark.parametrize("layout", NATIVE, ids=title)
@needs(results=lambda layout: [native_job(layout)])
def test_what_deepspeed_saved_is_read_bit_for_bit(results, layout):
    assert results.of(native_job(layout))["differing"] == []


@pytest.mark.parametrize("layout", EXACT, ids=title)
@needs(results=lambda layout: [exact_job(layout)])
def test_a_run_resumes_bit_for_bit_at_the_same_layout(results, layout):
    assert results.problems_of_exact(layout) == []


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("source", DAMAGED, ids=title)
@needs(results=lambda source, control: [save_job(source), *(plain_job(source, source, name) for name in ("", control))])
def test_a_lost_piece_of_state_would_show(results, source, control):
    """The losses of a run that lost it are off by far more than what is allowed."""
    limit = FP32_TOLERANCE if source.precision == "fp32" else BF16_BAND
    assert results.control_difference(source, source, control) > 10 * limit


@needs(results=[save_job(ON_DISK)])
def test_state_on_the_disk_is_a_file_a_group(results):
    assert results.of(save_job(ON_DISK))["parts"] == 3  # two groups on the disk, and what stays in memory


@needs(results=[save_job(ON_DISK), failing_job(ON_DISK)])
def test_a_save_that_fails_leaves_state_on_the_disk_as_it_was(results):
    result = results.of(failing_job(ON_DISK))
    assert "No space left on device" in result["error"] and result["left"] == []
    assert result["losses"] == results.of(save_job(ON_DISK))["losses"][:4]
    assert result["saved"]


def test_the_selection_is_whole():
    sources, targets = zip(*PAIRS, strict=True)
    assert set(sources) >= set(CIRCLE) and set(targets) >= set(CIRCLE)
    assert {layout.name for layout in sources} & {layout.name for layout in targets} >= set(OFFLOADED)
    assert len(CIRCLE) == 16 and all(source.world_size != target.world_size for source, target in PAIRS[:20])
    assert {layout.world_size for layout in sources} == {layout.world_size for layout in targets} == set(WORLD_SIZES)
