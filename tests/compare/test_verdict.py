"""Verdicts on losses: the bands, what is called the same, where a config parts and which reason is named."""

import dataclasses
import math

import pytest

from codeparrot_ds.compare.verdict import (
    ALIKE,
    BAND,
    BITS,
    DIFFERENT,
    LOSS_ROUNDINGS,
    RANDOM,
    ROUNDING,
    ROUNDOFF,
    STEADY,
    UNJUDGED,
    Sensitivity,
    Trace,
    coarser,
    judge,
    loss_bands,
    norm_bands,
    sensitivity_of,
    steady_steps,
)

STEPS = 10
LOSSES = tuple(9.0 - 0.1 * step for step in range(STEPS))
NORMS = (2.0,) * STEPS
SETTINGS = {
    "seed": 1,
    "dropout": 0.0,
    "deepspeed: gradient_clipping": 1.0,
    "deepspeed: optimizer.type": "AdamW",
    "deepspeed: data_types.grad_accum_dtype": "fp32",
}


def trace(losses=LOSSES, norms=NORMS, *, settings=(), **changes):
    """The reference, fp32 on one rank, or what is changed of it."""
    fields = {
        "losses": losses,
        "grad_norms": norms,
        "skipped": [0] * len(losses),
        "row_hashes": [f"rows {step}" for step in range(len(losses))],
        "weights": ("float32", "hash of fp32"),
        "settings": SETTINGS | dict(settings),
        "precision": "fp32",
        "world_size": 1,
    }
    return Trace(**fields | changes)


def noise(precision="fp32", size=1e-6):
    """A sensitivity run whose differences grow evenly up to ``size``."""
    grown = [size * (step + 1) / STEPS for step in range(STEPS)]
    return {precision: Sensitivity(precision=precision, losses=grown, grad_norms=grown)}


def moved(values, by, since=1):
    """The same values, moved from a step on."""
    return tuple(value + by * (step + 1 >= since) for step, value in enumerate(values))


# --------------------------------------------------------------------------------------------------------------------
# Bands


def test_the_band_of_loss_is_floor_random_and_alike_errors():
    reference, sensitivity = trace(), noise("bf16", 1e-3)["bf16"]
    bands = loss_bands(reference, sensitivity)
    step = 4  # the fifth
    floor = LOSS_ROUNDINGS * 2.0**-24 * LOSSES[step]
    way = LOSSES[0] - LOSSES[step]
    assert bands[step] == pytest.approx(floor + RANDOM * 1e-3 * 5 / STEPS + ALIKE * 2.0**-8 * way, rel=1e-12)


def test_bands_never_shrink_and_outlast_their_sensitivity_run():
    shaking = Sensitivity(precision="fp32", losses=[1e-6, 5e-6, 0.0], grad_norms=[1e-6, 5e-6, 0.0])
    for bands in (loss_bands(trace(), shaking), norm_bands(trace(), shaking)):
        assert len(bands) == STEPS
        assert all(later >= RANDOM * 5e-6 for later in bands[1:])
    assert loss_bands(trace(), shaking)[0] < RANDOM * 2e-6


def test_without_a_sensitivity_run_only_the_logged_numbers_rounding_is_left():
    assert loss_bands(trace(), None) == [LOSS_ROUNDINGS * ROUNDOFF["fp32"] * loss for loss in LOSSES]


def test_of_a_gradient_norm_that_may_be_anything_nothing_is_said():
    wild = Sensitivity(precision="bf16", losses=[0.0] * STEPS, grad_norms=[0.01] * 5 + [1.0] * 5)
    bands = norm_bands(trace(), wild)
    assert bands[4] < 1 and bands[5:] == [math.inf] * 5


def test_infinite_noise_gives_an_infinite_band_and_not_a_nan():
    broken = Sensitivity(precision="fp32", losses=[0.0, math.nan], grad_norms=[0.0, math.nan])
    assert loss_bands(trace(), broken)[1] == math.inf


def test_a_sensitivity_run_is_compared_step_by_step():
    found = sensitivity_of(trace(), trace(moved(LOSSES, 1e-3, since=3), (2.0, 2.2), skipped=[0, 0]), "bf16")
    assert found.losses[:2] == [0.0, 0.0] and found.losses[2] == pytest.approx(1e-3)
    assert found.grad_norms == pytest.approx([0.0, 0.1])


@pytest.mark.parametrize(("one", "other", "which"), [("fp32", "bf16", "bf16"), ("fp16", "fp32", "fp16"),
                                                     ("bf16", "fp16", "bf16"), ("fp32", "fp32", "fp32")])  # fmt: skip
def test_the_coarser_precision_decides(one, other, which):
    assert coarser(one, other) == which


def test_a_run_is_judged_until_rounding_alone_moves_its_loss_too_far():
    reference = trace()
    bands = [0.0] * 6 + [1.01 * STEADY * LOSSES[6]] + [1.0] * 3
    assert steady_steps(reference, bands) == 6
    assert steady_steps(reference, [math.nan] * STEPS) == 1


# --------------------------------------------------------------------------------------------------------------------
# The same


def test_equal_bit_for_bit():
    verdict = judge(trace(world_size=2), trace(), {})
    assert verdict.kind == BITS and verdict.same and str(verdict) == "equal bit for bit"


def test_equal_to_rounding_in_fp32_tells_the_largest_difference_and_its_step():
    losses = (*LOSSES[:6], LOSSES[6] + 2e-6, *LOSSES[7:])
    verdict = judge(trace(losses), trace(), noise("fp32", 1e-6))
    assert verdict.kind == ROUNDING and verdict.same
    assert verdict.largest == (pytest.approx(2e-6), 7)
    assert "at most 2.0e-06 at step 7" in str(verdict)


def test_within_its_band_in_bf16_where_the_band_of_fp32_would_be_left():
    theirs = trace(moved(LOSSES, 1e-3), weights=("bfloat16", "hash of bf16"), precision="bf16")
    expected = {"float32": "hash of fp32", "bfloat16": "hash of bf16"}
    bands = noise("bf16", 4e-3) | noise("fp32", 1e-6)
    verdict = judge(theirs, trace(), bands, expected)
    assert verdict.kind == BAND and verdict.same
    assert verdict.numerics == ["precision bf16, reference fp32"]
    assert judge(dataclasses.replace(theirs, precision="fp32"), trace(), bands, expected).kind == DIFFERENT


def test_a_difference_in_steps_that_are_not_judged_is_said_to_be_so():
    unsteady = {"bf16": Sensitivity(precision="bf16", losses=[0.0] * 5 + [1.0] * 5, grad_norms=[0.0] * STEPS)}
    theirs = trace(moved(LOSSES, 3.0, since=8), weights=("bfloat16", "b"), precision="bf16")
    verdict = judge(theirs, trace(), unsteady, {"bfloat16": "b"})
    assert verdict.same and verdict.judged_steps == 5
    assert "steps 1 to 5, then rounding takes over" in str(verdict)


def test_what_cannot_be_known_is_not_judged():
    missing = judge(trace(moved(LOSSES, 1e-3)), trace(), {})
    assert missing.kind == UNJUDGED and missing.same is None and "sensitivity run of fp32" in str(missing)
    empty = judge(trace((), ()), trace(), noise())
    assert empty.kind == UNJUDGED and "no step" in str(empty)


def test_a_shorter_trial_is_judged_by_the_steps_that_it_has():
    assert judge(trace(LOSSES[:3], NORMS[:3]), trace(), {}).kind == BITS


# --------------------------------------------------------------------------------------------------------------------
# Different


def test_other_initial_weights_are_found_by_their_hash():
    verdict = judge(trace(weights=("float32", "another")), trace(), noise())
    assert verdict.kind == DIFFERENT and not verdict.same and verdict.step == 1
    assert "initial weights" in str(verdict) and "float32" in verdict.evidence[0]


def test_other_rows_are_found_where_they_begin_and_the_setting_is_named():
    hashes = [*trace().row_hashes[:4], *(f"other {step}" for step in range(6))]
    verdict = judge(trace(moved(LOSSES, 0.5), row_hashes=hashes, settings={"seed": 2}), trace(), noise())
    assert (verdict.kind, verdict.step) == (DIFFERENT, 5)
    assert verdict.reason == "data order: it read other rows (seed 2, reference 1)"


def test_skipped_steps_are_counted():
    verdict = judge(trace(moved(LOSSES, 0.5, since=6), skipped=[0] * 4 + [1] * 6), trace(), noise())
    assert (verdict.kind, verdict.step) == (DIFFERENT, 5)
    assert "skipped steps: by step 5 it left out 1 and the reference 0" in verdict.reason


@pytest.mark.parametrize(
    ("losses", "norms", "settings", "step", "words"),
    [
        # The loss of step 1 is of the initial weights: only the forward pass can change it.
        (moved(LOSSES, 1e-3), NORMS, {"dropout": 0.1}, 1, "dropout 0.1, reference 0.0"),
        # Equal loss and another gradient.
        (moved(LOSSES, 1e-3, 2), moved(NORMS, 1e-3), {"deepspeed: data_types.grad_accum_dtype": "bf16"}, 1,
         "accumulation dtype bf16, reference fp32"),
        # Equal loss and gradient in step 1, another loss in step 2: the update.
        (moved(LOSSES, 1e-3, 2), moved(NORMS, 1e-3, 2), {"deepspeed: gradient_clipping": 0.0}, 2,
         "clipping 0.0, reference 1.0"),
        # Two settings differ: the one of the half that shows it is named.
        (moved(LOSSES, 1e-3, 2), moved(NORMS, 1e-3, 2),
         {"deepspeed: gradient_clipping": 0.0, "deepspeed: data_types.grad_accum_dtype": "bf16"}, 2,
         "clipping 0.0, reference 1.0"),
        (moved(LOSSES, 1e-3, 2), moved(NORMS, 1e-3),
         {"deepspeed: gradient_clipping": 0.0, "deepspeed: data_types.grad_accum_dtype": "bf16"}, 1,
         "accumulation dtype bf16, reference fp32"),
        # No setting says why: what was seen is.
        (moved(LOSSES, 1e-3), NORMS, {}, 1, "the forward pass gives another loss"),
        (moved(LOSSES, 1e-3, 2), moved(NORMS, 1e-3), {}, 1, "the same loss gives another gradient"),
        (moved(LOSSES, 1e-3, 4), NORMS, {}, 4, "clipping (the norm was 2.00 and the limit is 1.0)"),
        (LOSSES, moved(NORMS, 1e-3, 3), {}, 3, "the gradient of step 3 differs first"),
    ],
)  # fmt: skip
def test_the_half_of_a_step_that_shows_it_names_the_setting(losses, norms, settings, step, words):
    verdict = judge(trace(losses, norms, settings=settings), trace(), noise())
    assert (verdict.kind, verdict.step) == (DIFFERENT, step)
    assert words in verdict.reason
    assert f"step {step}: loss differs by" in verdict.evidence[-1]


def test_dropout_draws_other_masks_on_another_number_of_ranks():
    with_dropout = trace(settings={"dropout": 0.1})
    verdict = judge(dataclasses.replace(with_dropout, losses=moved(LOSSES, 1e-2), world_size=2), with_dropout, noise())
    assert verdict.reason == "dropout draws other masks: ranks 2, reference 1"


@pytest.mark.parametrize(
    ("key", "theirs", "says"),
    [
        ("deepspeed: optimizer.params.bias_correction", False, "bias correction False, reference unset"),
        ("deepspeed: optimizer.params.bias_correction", True, None),  # as when it is unset
        ("deepspeed: torch_autocast.enabled", False, None),
        ("deepspeed: torch_autocast.enabled", True, "autocast True, reference unset"),
    ],
)
def test_an_unset_key_means_its_default(key, theirs, says):
    verdict = judge(trace(moved(LOSSES, 1e-3, 2), settings={key: theirs}), trace(), noise())
    assert verdict.reason == says or (says is None and "no setting says why" in verdict.reason)


def test_a_setting_that_follows_the_precision_is_no_reason_of_its_own():
    theirs = trace(
        moved(LOSSES, 0.3), settings={"deepspeed: data_types.grad_accum_dtype": "bf16"},
        weights=("bfloat16", "b"), precision="bf16",
    )  # fmt: skip
    verdict = judge(theirs, trace(), noise("bf16", 1e-3), {"bfloat16": "b"})
    assert verdict.reason == "precision bf16, reference fp32: it goes beyond what rounding explains"


def test_the_norm_of_one_outlier_among_the_batches_is_no_fault():
    once = (*NORMS[:5], NORMS[5] * 1.1, *NORMS[6:])
    assert judge(trace(LOSSES, once), trace(), noise()).same
    twice = (*NORMS[:5], NORMS[5] * 1.1, NORMS[6] * 1.1, *NORMS[7:])
    assert judge(trace(LOSSES, twice), trace(), noise()).step == 6


def test_a_dtype_that_follows_the_precision_is_shown_as_that():
    theirs = trace(LOSSES, moved(NORMS, 1e-3), settings={"deepspeed: communication_data_type": "bf16"})
    assert judge(theirs, trace(), noise()).reason == "communication dtype bf16, reference fp32"


def test_a_loss_that_is_not_finite_is_different():
    verdict = judge(trace((*LOSSES[:3], math.nan, *LOSSES[4:])), trace(), noise())
    assert (verdict.kind, verdict.step) == (DIFFERENT, 4)
    assert math.isnan(verdict.largest[0]) and verdict.largest[1] == 4
