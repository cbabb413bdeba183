"""Whether two configs trained the same: a band from the size of rounding errors, and the likely reason where they part.

Pure. ``docs/comparisons.md`` derives the bands. In short: how far rounding errors carry depends on the model, the data
and the learning rate, so it is measured, by a *sensitivity run* a precision: the reference once more, with a random
rounding error of that precision in every weight and in what every layer hands on. What random errors leave out is that
one rounding can err alike in all elements of a gradient, by up to the unit roundoff ``u``: then all updates are so much
longer, and so is the way that the loss has come. The bands of loss and of gradient norm at step ``t`` are::

    loss(t) = floor + 8 * max(S(1) ... S(t)) + 4 * u * max(|L(1) - L(1)| ... |L(1) - L(t)|)
    norm(t) = floor + 8 * max(N(1) ... N(t)) + 4 * u

where ``S`` and ``N`` are the differences that the sensitivity run shows, ``L`` is the reference's loss, and ``floor``
the rounding of the logged number itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from codeparrot_ds.ds_config.facts import short_dtype

# Unit roundoff: half the distance from 1 to the next number. fp32 24 bits of significand, fp16 11, bf16 8.
ROUNDOFF = {"fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8}
RANDOM = 8
"""Two programs err, in several roundings a layer (2), and the sensitivity run is one draw, perhaps a small one (4)."""
ALIKE = 4
"""Forward pass, backward pass, accumulation and communication may each err once, alike in all elements."""
STEADY = 0.05
"""A band wider than this share of the loss says nothing any more: from there on the run is not judged."""
LOSS_ROUNDINGS = 8
"""fp32 roundings between the tokens' losses and the logged mean: in rows, micro-batches, accumulation and ranks."""
NORM_ROUNDINGS = 64
"""The same for the norm of a gradient, whose sums over millions of squares are longer."""

REFERENCE, BITS, ROUNDING, BAND = "reference", "equal bit for bit", "equal to rounding", "equal within its band"
DIFFERENT, UNJUDGED = "different", "not judged"
SAME = (REFERENCE, BITS, ROUNDING, BAND)


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What one config's training left to be judged by."""

    losses: Sequence[float]
    """Of every step, nats per token."""
    grad_norms: Sequence[float | None]
    """Of every step, before clipping."""
    skipped: Sequence[int]
    """Skipped steps up to and with each step."""
    row_hashes: Sequence[str]
    """Of the rows of every step; equal where the rows are, in whatever order."""
    weights: tuple[str, str]
    """What the config began with: dtype and SHA-256 of the weights."""
    settings: Mapping[str, Any]
    """Run config and resolved DeepSpeed config, flat, as ``deepspeed: optimizer.params.eps`` → value."""
    precision: str
    """``fp32``, ``bf16`` or ``fp16``."""
    world_size: int


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """What random rounding errors do to the reference."""

    precision: str
    """Whose errors they are."""
    losses: Sequence[float]
    """Absolute difference at every step."""
    grad_norms: Sequence[float]
    """Relative difference at every step."""


@dataclass(frozen=True, kw_only=True)
class LossVerdict:
    """What is said of a config's losses."""

    kind: str
    """One of the constants above."""
    step: int | None = None
    """Where it parts from the reference; None where it does not."""
    largest: tuple[float, int] | None = None
    """Of the differences of loss, and the step of it."""
    band: float | None = None
    """Of the loss at that step; None where it is not known."""
    judged_steps: int | None = None
    """How many were judged, where rounding alone makes the reference unsteady after them; None for all."""
    reason: str | None = None
    """Why it parts, in words; None where it does not."""
    evidence: Sequence[str] = ()
    """What was seen, in the order of a step."""
    numerics: Sequence[str] = ()
    """Settings that are meant to change rounding, as ``name theirs, reference the reference's``."""

    @property
    def same(self) -> bool | None:
        """Whether it trains the same; None where that is not known."""
        return None if self.kind == UNJUDGED else self.kind in SAME

    def __str__(self) -> str:
        if self.kind == DIFFERENT:
            return f"different from step {self.step}: {self.reason}"
        if self.kind == UNJUDGED:
            return f"{UNJUDGED}: {self.reason}"
        if self.kind in (ROUNDING, BAND) and self.largest is not None:
            limit = "" if self.judged_steps is None else f"; steps 1 to {self.judged_steps}, then rounding takes over"
            return f"{self.kind} (at most {self.largest[0]:.1e} at step {self.largest[1]}, band {self.band:.1e}{limit})"
        return self.kind


# --------------------------------------------------------------------------------------------------------------------
# Bands


def sensitivity_of(reference: Trace, perturbed: Trace, precision: str) -> Sensitivity:
    """What the sensitivity run of a precision shows."""
    return Sensitivity(
        precision=precision,
        losses=[abs(a - b) for a, b in zip(perturbed.losses, reference.losses, strict=False)],
        grad_norms=[_relative(a, b) for a, b in zip(perturbed.grad_norms, reference.grad_norms, strict=False)],
    )


def coarser(precision: str, other: str) -> str:
    """Of two precisions the one that rounds more, whose band both are judged by."""
    return max((precision, other), key=lambda name: ROUNDOFF[name])


def loss_bands(reference: Trace, sensitivity: Sensitivity | None) -> list[float]:
    """The largest difference of loss that rounding explains, for every step of the reference."""
    floor = [LOSS_ROUNDINGS * ROUNDOFF["fp32"] * abs(loss) for loss in reference.losses]
    if sensitivity is None:
        return floor
    way = [abs(reference.losses[0] - loss) for loss in reference.losses]
    return _bands(floor, sensitivity.losses, way, ROUNDOFF[sensitivity.precision])


def norm_bands(reference: Trace, sensitivity: Sensitivity | None) -> list[float]:
    """The largest relative difference of gradient norm that rounding explains, for every step."""
    floor = [NORM_ROUNDINGS * ROUNDOFF["fp32"]] * len(reference.grad_norms)
    if sensitivity is None:
        return floor
    bands = _bands(floor, sensitivity.grad_norms, [1.0] * len(floor), ROUNDOFF[sensitivity.precision])
    return [band if band < 1 else math.inf for band in bands]  # of a norm that may be anything nothing is said


def _bands(floor: Sequence[float], seen: Sequence[float], scale: Sequence[float], roundoff: float) -> list[float]:
    """``seen`` ends where the sensitivity run did; its largest counts on."""
    random = _largest_so_far(seen) or [0.0]
    random += [random[-1]] * (len(floor) - len(random))
    alike = [roundoff * value for value in _largest_so_far(scale)]
    return [low + RANDOM * a + ALIKE * b for low, a, b in zip(floor, random, alike, strict=False)]


def _largest_so_far(values: Sequence[float]) -> list[float]:
    return list(accumulate(map(_or_infinite, values), max))


def _relative(value: float | None, reference: float | None) -> float:
    if value is None or reference is None or value == reference:
        return 0.0
    return abs(value - reference) / abs(reference) if reference else math.inf


# --------------------------------------------------------------------------------------------------------------------
# The verdict


def judge(
    trace: Trace,
    reference: Trace,
    sensitivities: Mapping[str, Sensitivity],
    expected_weights: Mapping[str, str] | None = None,
) -> LossVerdict:
    """Judges a config against the reference.

    Args:
        trace: of the config.
        reference: of the config that it is compared with.
        sensitivities: of the reference, by precision; without the one that is needed only what is equal to the floor,
            or parts by its inputs, is judged.
        expected_weights: SHA-256 of the initial weights in each dtype; None takes the reference's for its own dtype.
    """
    steps = min(len(trace.losses), len(reference.losses))
    numerics = differing(trace, reference, (FORWARD, BACKWARD, UPDATE))
    if steps == 0:
        return LossVerdict(kind=UNJUDGED, reason="it has no step", numerics=numerics)
    differences = [abs(a - b) for a, b in zip(trace.losses, reference.losses, strict=False)]
    norms = [_relative(a, b) for a, b in zip(trace.grad_norms, reference.grad_norms, strict=False)]
    verdict = LossVerdict(kind=BITS, largest=_largest(differences), band=0.0, numerics=numerics)
    inputs = _inputs(trace, reference, steps, expected_weights)
    if inputs is not None:
        step, reason, seen = inputs
        return replace(verdict, kind=DIFFERENT, step=step, band=None, reason=reason, evidence=[seen])
    if not any(differences) and not any(norms[:steps]):
        return verdict
    precision = coarser(trace.precision, reference.precision)
    sensitivity = sensitivities.get(precision)
    bands = loss_bands(reference, sensitivity)
    judged = steady_steps(reference, bands[:steps])
    largest = _largest(differences[:judged])
    verdict = replace(verdict, largest=largest, band=bands[largest[1] - 1])
    parted = _parting(differences[:judged], bands, norms[:judged], norm_bands(reference, sensitivity))
    if parted is None:
        kind = ROUNDING if precision == "fp32" else BAND
        return replace(verdict, kind=kind, judged_steps=None if judged == steps else judged)
    if sensitivity is not None:
        step, where, evidence = parted
        reason = _reason(trace, reference, step, where)
        return replace(verdict, kind=DIFFERENT, step=step, reason=reason, evidence=evidence)
    broken = next((step for step in range(judged) if not math.isfinite(differences[step])), None)
    if broken is not None:
        reason = f"its loss is {trace.losses[broken]} and the reference's {reference.losses[broken]:.4g}"
        return replace(verdict, kind=DIFFERENT, step=broken + 1, band=None, reason=reason)
    reason = f"the sensitivity run of {precision}, which says how far rounding carries, is missing"
    return replace(verdict, kind=UNJUDGED, band=None, reason=reason)


def steady_steps(reference: Trace, bands: Sequence[float]) -> int:
    """How many steps of the reference are worth judging: until rounding alone moves its loss too far; at least one."""
    for step, band in enumerate(bands):
        if not band <= STEADY * abs(reference.losses[step]):
            return max(1, step)
    return len(bands)


def _largest(differences: Sequence[float]) -> tuple[float, int]:
    """The largest, and its step; what is not finite is larger than all."""
    at = max(range(len(differences)), key=lambda step: _or_infinite(differences[step]))
    return differences[at], at + 1


def _or_infinite(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def _inputs(
    trace: Trace, reference: Trace, steps: int, expected_weights: Mapping[str, str] | None
) -> tuple[int, str, str] | None:
    """Whether weights, rows or skipped steps differ: (step, reason, evidence)."""
    dtype, fingerprint = trace.weights
    expected = expected_weights or {reference.weights[0]: reference.weights[1]}
    if dtype in expected and fingerprint != expected[dtype]:
        return 1, "initial weights: it did not begin with the same", f"the hash of its {dtype} weights differs"
    for step in range(min(steps, len(trace.row_hashes), len(reference.row_hashes))):
        if trace.row_hashes[step] != reference.row_hashes[step]:
            changed = differing(trace, reference, (DATA,))
            reason = "data order: it read other rows" + (f" ({'; '.join(changed)})" if changed else "")
            return step + 1, reason, f"the hash of the rows of step {step + 1} differs"
    for step in range(min(steps, len(trace.skipped), len(reference.skipped))):
        if trace.skipped[step] != reference.skipped[step]:
            num, other = trace.skipped[step], reference.skipped[step]
            # The step's own loss is before its update: what was skipped shows from the next one on.
            reason = f"skipped steps: by step {step + 1} it left out {num} and the reference {other}"
            return step + 1, reason, "the counts of skipped steps differ"
    return None


def _parting(
    losses: Sequence[float],
    loss_limits: Sequence[float],
    norms: Sequence[float],
    norm_limits: Sequence[float],
) -> tuple[int, str, list[str]] | None:
    """The first step beyond a band, in which half of a step that shows, and the evidence.

    A norm counts where it is beyond in two steps running: a fault in the gradient is one in every step, while the norm
    of a single outlier among the batches may be many times less steady than those before it.
    """
    beyond = [not norm <= limit for norm, limit in zip(norms, norm_limits, strict=False)]
    for step, difference in enumerate(losses):
        loss_parts = not difference <= loss_limits[step]
        norm_parts = all(beyond[step : step + 2]) and len(beyond) >= step + 2
        if not loss_parts and not norm_parts:
            continue
        evidence = [
            f"step {step + 1}: loss differs by {difference:.1e} (band {loss_limits[step]:.1e}), "
            f"gradient norm by {norms[step]:.1e} of itself (band {norm_limits[step]:.1e})"
        ]
        if step > 0:
            evidence.insert(
                0, f"step {step}: loss {losses[step - 1]:.1e}, gradient norm {norms[step - 1]:.1e}: within their bands"
            )
        first_part = UPDATE if step > 0 else FORWARD
        return step + 1, first_part if loss_parts else BACKWARD if step == 0 else BACKWARD_OR_UPDATE, evidence
    return None


# --------------------------------------------------------------------------------------------------------------------
# Reasons

DATA, FORWARD, BACKWARD, UPDATE = "data", "forward", "backward", "update"
BACKWARD_OR_UPDATE = "backward or update"
# Which settings change what is computed, in which half of a step it shows first, and what a reader calls it.
MEANING: Mapping[str, tuple[str, str]] = {
    "seed": (DATA, "seed"),
    "data": (DATA, "data"),
    "shuffle_buffer": (DATA, "shuffle buffer"),
    "num_lanes": (DATA, "lanes"),
    "dropout": (FORWARD, "dropout"),
    "intra_document_masking": (FORWARD, "masking between documents"),
    "deepspeed: zero_optimization.zero_quantized_weights": (FORWARD, "quantized weights"),
    "deepspeed: torch_autocast.enabled": (FORWARD, "autocast"),
    "compile": (FORWARD, "compiled kernels"),
    "deepspeed: data_types.grad_accum_dtype": (BACKWARD, "accumulation dtype"),
    "deepspeed: communication_data_type": (BACKWARD, "communication dtype"),
    "deepspeed: zero_optimization.zero_quantized_gradients": (BACKWARD, "quantized gradients"),
    "deepspeed: gradient_predivide_factor": (BACKWARD, "gradient predivide factor"),
    "deepspeed: prescale_gradients": (BACKWARD, "prescaled gradients"),
    "deepspeed: gradient_clipping": (UPDATE, "clipping"),
    "deepspeed: optimizer.type": (UPDATE, "optimizer"),
    "deepspeed: optimizer.params.lr": (UPDATE, "learning rate"),
    "deepspeed: optimizer.params.weight_decay": (UPDATE, "weight decay"),
    "deepspeed: optimizer.params.betas": (UPDATE, "betas"),
    "deepspeed: optimizer.params.eps": (UPDATE, "epsilon"),
    "deepspeed: optimizer.params.adam_w_mode": (UPDATE, "kind of weight decay"),
    "deepspeed: optimizer.params.bias_correction": (UPDATE, "bias correction"),
    "deepspeed: bf16.bf16_master_weights_and_grads": (UPDATE, "master weights' dtype"),
    "deepspeed: bf16.bf16_optimizer_states": (UPDATE, "optimizer states' dtype"),
    "deepspeed: fp16.fp16_master_weights_and_grads": (UPDATE, "master weights' dtype"),
    "deepspeed: fp16.loss_scale": (UPDATE, "loss scale"),
    "deepspeed: fp16.initial_scale_power": (UPDATE, "initial loss scale"),
    "lean_step": (UPDATE, "another kernel of Adam"),
    "lr_scheduler_type": (UPDATE, "schedule"),
    "num_warmup_steps": (UPDATE, "warm-up"),
    "max_train_steps": (UPDATE, "length of the schedule"),
}


def differing(trace: Trace, reference: Trace, parts: Iterable[str]) -> list[str]:
    """The settings of some halves of a step in which a config differs, as ``clipping 0.0, reference 1.0``."""
    wanted = set(parts)
    found = []
    for key, (part, name) in MEANING.items():
        mine, theirs = trace.settings.get(key), reference.settings.get(key)
        if part in wanted and _differs(key, (mine, theirs), (trace.precision, reference.precision)):
            if key in _OF_PRECISION:  # unset, it follows the precision
                mine, theirs = mine or trace.precision, theirs or reference.precision
            found.append(f"{name} {_shown(mine)}, reference {_shown(theirs)}")
    if FORWARD in wanted and trace.settings.get("dropout") and reference.settings.get("dropout"):
        for name, mine, theirs in (
            ("seed", trace.settings.get("seed"), reference.settings.get("seed")),
            ("ranks", trace.world_size, reference.world_size),
        ):
            if mine != theirs:
                found.append(f"dropout draws other masks: {name} {mine}, reference {theirs}")
    if FORWARD in wanted and trace.precision != reference.precision:
        found.append(f"precision {trace.precision}, reference {reference.precision}")
    return found


# What an unset key means, where that is not "off".
_UNSET = {"deepspeed: optimizer.params.bias_correction": True, "deepspeed: optimizer.params.adam_w_mode": True}
_OF_PRECISION = ("deepspeed: data_types.grad_accum_dtype", "deepspeed: communication_data_type")


def _differs(key: str, values: tuple[Any, Any], precisions: tuple[str, str]) -> bool:
    """Whether two values of a setting mean different things; dtypes that follow the precision do not count again."""
    default = _UNSET.get(key, False)
    mine, theirs = (default if value is None else value for value in values)
    if key in _OF_PRECISION:
        mine, theirs = (short_dtype(str(value)) if value else own
                        for value, own in zip((mine, theirs), precisions, strict=True))  # fmt: skip
        return mine != theirs and (mine, theirs) != precisions
    if key == "deepspeed: optimizer.type":
        return str(mine).lower() != str(theirs).lower()
    return mine != theirs


def _shown(value: Any) -> str:
    return "unset" if value is None else str(value)


def _reason(trace: Trace, reference: Trace, step: int, where: str) -> str:
    """The likely reason: differing settings of the half that shows it, then of the others, then what was seen."""
    orders = {
        FORWARD: ((FORWARD,), (BACKWARD, UPDATE)),
        BACKWARD: ((BACKWARD,), (FORWARD,), (UPDATE,)),
        BACKWARD_OR_UPDATE: ((BACKWARD,), (UPDATE,), (FORWARD,)),
        UPDATE: ((UPDATE,), (BACKWARD,), (FORWARD,)),
    }
    for parts in orders[where]:
        changed = [text for text in differing(trace, reference, parts) if not text.startswith("precision ")]
        if changed:
            return "; ".join(changed)
    if trace.precision != reference.precision:
        return f"precision {trace.precision}, reference {reference.precision}: it goes beyond what rounding explains"
    seen = {
        FORWARD: "the forward pass gives another loss from the same weights and rows",
        BACKWARD: "the same loss gives another gradient: its accumulation, scaling or communication",
        BACKWARD_OR_UPDATE: f"the gradient of step {step} differs first: its accumulation, or the update before it",
        UPDATE: f"the same gradient in step {step - 1} led to other weights: {_update_words(reference, step)}",
    }[where]
    return f"{seen}; no setting says why"


def _update_words(reference: Trace, step: int) -> str:
    limit = reference.settings.get("deepspeed: gradient_clipping") or 0
    norm = reference.grad_norms[step - 2]
    if limit and norm is not None and norm > limit:
        return f"clipping (the norm was {norm:.2f} and the limit is {limit}), rate or optimizer"
    return "rate or optimizer (the norm was below the clipping limit)"
