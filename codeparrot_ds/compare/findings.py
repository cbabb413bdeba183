"""What a comparison found: every trial judged, ranked and written down as HTML, Markdown and JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from codeparrot_ds.compare.candidates import Candidate, Request, Results, Trial, fields_of, trials_of
from codeparrot_ds.compare.results import (
    COMPARISON,
    FINISHED,
    Found,
    PartsOfStep,
    Peak,
    TrialResult,
    fingerprints,
    recorded_peak,
)
from codeparrot_ds.compare.verdict import (
    REFERENCE,
    ROUNDOFF,
    LossVerdict,
    Sensitivity,
    Trace,
    judge,
    loss_bands,
    sensitivity_of,
)
from codeparrot_ds.devices import smallest_gpu
from codeparrot_ds.ds_config.facts import leaves, precision, zero_stage
from codeparrot_ds.memory.device import load_overhead
from codeparrot_ds.terminal import gigabytes

WAITING = "not run yet"
WORTH = 0.05
"""Of the memory: what a config must save to be taken before one that may be faster."""


@dataclass(kw_only=True)
class Outcome:
    """One candidate with all that its trials gave."""

    candidate: Candidate
    results: Sequence[TrialResult]
    """Of each trial, by repeat."""
    status: str
    """Of the first trial that did not finish, ``skipped``, `WAITING`, or ``finished``."""
    reason: str | None = None
    """Why it did not."""
    speed: Speed | None = None
    """None where no scored step was measured."""
    mfu: float | None = None
    """Of that speed, against the comparison's peak; None where that is not known."""
    verdict: LossVerdict | None = None
    """On its losses; None where it has none."""
    found: Found | None = None
    """What the first trial that has training rows found."""

    @property
    def name(self) -> str:
        return self.candidate.name

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The training rows of the first trial."""
        return [] if self.found is None else self.found.rows

    @property
    def parts(self) -> PartsOfStep | None:
        """Of a step of the first trial."""
        return None if self.found is None else self.found.parts

    def scored(self, key: str, warmup_steps: int) -> list[float]:
        """A figure of every scored step of every trial."""
        rows = (row for result in self.results for row in result.rows[warmup_steps:])
        return [float(row[key]) for row in rows if row.get(key) is not None]

    @property
    def device_bytes(self) -> int | None:
        """The most that tensors took on any rank's device; None on CPUs."""
        return max((peak for found in self._all_found() for peak in found.device_peak_bytes or ()), default=None)

    @property
    def host_bytes(self) -> int | None:
        """The most that any rank's process had resident."""
        return max((peak for found in self._all_found() for peak in found.resident_peak_bytes), default=None)

    @property
    def grown_bytes(self) -> int | None:
        """How much more than its libraries alone any rank's process had resident."""
        ranks = [
            rank
            for found in self._all_found()
            for rank in zip(found.resident_before_bytes, found.resident_peak_bytes, strict=True)
        ]
        return max((peak - before for before, peak in ranks), default=None)

    @property
    def memory_bytes(self) -> int | None:
        """What a rank's device holds: on CPUs what the process grew by."""
        return self.device_bytes if self.device_bytes is not None else self.grown_bytes

    def _all_found(self) -> list[Found]:
        return [result.found for result in self.results if result.found is not None]


@dataclass(kw_only=True)
class Findings:
    """A comparison as far as it has come."""

    request: Request
    outcomes: Sequence[Outcome]
    """Of all candidates, in the order of the request."""
    reference: str | None
    """The name of the one that losses are compared with."""
    sensitivity: Mapping[str, Sensitivity]
    """Of the reference to errors of each precision whose sensitivity run has been made."""
    device: str
    """What the ranks ran on."""
    peak: Peak | None = None
    """What MFU is held against."""
    tried: Sequence[str] = ()
    """What a search says of its way; empty without one."""

    @property
    def speeds(self) -> dict[str, Speed]:
        """Of all that were measured."""
        return {each.name: each.speed for each in self.outcomes if each.speed is not None}

    @property
    def ranking(self) -> list[tuple[str, list[str]]]:
        """Names by falling tokens/s, each with those that its spread overlaps."""
        return ranked(self.speeds)

    def outcome(self, name: str) -> Outcome:
        """The outcome of a name."""
        return next(each for each in self.outcomes if each.name == name)

    @property
    def complete(self) -> bool:
        """Whether every trial has its result."""
        return all(each.status != WAITING for each in self.outcomes)

    @property
    def on_gpu(self) -> bool:
        """Whether the memory measured is that of tensors on devices; else it is what processes had resident."""
        return any(each.device_bytes is not None for each in self.outcomes)

    @property
    def memory_unit(self) -> tuple[str, float]:
        """The unit of memory in tables and pictures, and its bytes."""
        most = max((each.memory_bytes or 0 for each in self.outcomes), default=0)
        return ("GB", 1e9) if most >= 1e10 else ("MB", 1e6)

    def in_memory_unit(self, size: float | None) -> str:
        """A size in that unit."""
        unit, scale = self.memory_unit
        if not size:
            return "–" if size is None else "0"
        return f"{size / scale:,.{1 if unit == 'GB' else 0}f} {unit}"

    @property
    def front(self) -> list[str]:
        """The Pareto front of memory and tokens/s among those that train the same."""
        points = {
            each.name: (float(each.memory_bytes), each.speed.median)
            for each in self.outcomes
            if each.speed is not None and each.memory_bytes is not None and (each.verdict is None or each.verdict.same)
        }
        return pareto(points)

    @property
    def _usable(self) -> dict[str, Speed]:
        """Of all that were measured and train the same as the reference."""
        return {
            name: speed
            for name, speed in self.speeds.items()
            if (verdict := self.outcome(name).verdict) and verdict.same
        }

    @property
    def recommended(self) -> str | None:
        """The name of the config to take; None where none trains the same as the reference."""
        usable = self._usable
        # None of these is told apart from a faster one.
        fastest = [
            name for name, _ in ranked(usable) if not any(other.low > usable[name].high for other in usable.values())
        ]
        return self._with_least_memory(fastest) if fastest else None

    @property
    def recommendation(self) -> str:
        """Which config to take, why, and how sure that is."""
        usable, chosen = self._usable, self.recommended
        if chosen is None:
            return "No config was measured that trains the same as the reference."
        order = [name for name, _ in ranked(usable)]
        speed, outcome = usable[chosen], self.outcome(chosen)
        alike = [name for name in order if name != chosen and usable[name].tied(speed)]
        sentence = f"Take {_on_ranks(outcome.candidate)}: {_rate(speed)}"
        other = self.reference if self.reference in usable and self.reference != chosen else order[-1]
        if other != chosen and other not in alike:
            kind = "the reference " if other == self.reference else ""
            sentence += f", {_times(speed, usable[other])} the tokens/s of {kind}{other}"
        spare = self._spare_bytes(outcome)
        if spare is not None:
            sentence += f", with {gigabytes(spare)} of the device to spare"
        if alike:
            sentence += f"; in speed it is not told apart from {_listed(alike)}"
        if chosen != order[0]:
            sentence += f", and takes less memory{f' than {order[0]}' * (len(alike) > 1)}"
        if not self.complete:
            return f"{sentence} (so far: some trials have not been run)."
        again = f"the same command with --repeats {max(3, 2 * self.request.repeats)}"
        if alike:
            return f"{sentence}. To tell them apart, try {again}."
        if speed.trials == 1 and len(order) > 1:
            return f"{sentence}. From a single trial that is not sure: {again} shows how far trials differ."
        return f"{sentence}."

    def _with_least_memory(self, names: Sequence[str]) -> str:
        """The one that takes the least, or the first where that saves too little of its memory."""
        sizes = {name: size for name in names if (size := self.outcome(name).memory_bytes) is not None}
        least = min(sizes, key=lambda name: sizes[name], default=names[0])
        saves = sizes.get(least, 0) < (1 - WORTH) * sizes.get(names[0], math.inf)
        return least if saves else names[0]

    def _spare_bytes(self, outcome: Outcome) -> int | None:
        gpu = smallest_gpu() if outcome.device_bytes is not None else None
        if gpu is None or outcome.device_bytes is None:
            return None
        return gpu[1] - load_overhead().total(outcome.device_bytes, outcome.candidate.world_size)

    def lines(self) -> list[str]:
        """The findings for a terminal."""
        width = max((len(each.name) for each in self.outcomes), default=0)
        lines = []
        for place, (name, ties) in enumerate(self.ranking, 1):
            outcome = self.outcome(name)
            assert outcome.speed is not None
            kind = "per rank" if self.on_gpu else "per rank beside its libraries"
            memory = f", {self.in_memory_unit(outcome.memory_bytes)} {kind}" if outcome.memory_bytes is not None else ""
            lines.append(
                f"{place:2}. {name:{width}}  {_rate(outcome.speed, width=8)}{memory}; "
                f"losses: {outcome.verdict or 'none'}"
                + (f"; in speed not told apart from {', '.join(ties)}" if ties else "")
            )
        lines += [f"    {each.name:{width}}  {each.status}: {each.reason}" for each in self.outcomes if each.reason]
        return [*lines, "", self.recommendation]


def _rate(speed: Speed, width: int = 0) -> str:
    """Tokens/s with their spread, and how many trials have shown it."""
    trials = f"{speed.trials} trial{'s' * (speed.trials != 1)}"
    return f"{speed.median:{width},.0f} tokens/s ({speed.low:,.0f} to {speed.high:,.0f}, {trials})"


def _times(speed: Speed, other: Speed) -> str:
    """How many times as fast, with the least and the most that the spreads allow."""
    return f"{speed.median / other.median:.2f}x ({speed.low / other.high:.2f}x to {speed.high / other.low:.2f}x)"


def _listed(names: Sequence[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def _on_ranks(candidate: Candidate) -> str:
    return f"{candidate.label} on {candidate.world_size} rank{'s' * (candidate.world_size != 1)}"


# --------------------------------------------------------------------------------------------------------------------
# Judging


def judge_all(
    request: Request,
    results: Results,
    candidates: Sequence[Candidate],
    reference: Candidate,
    tried: Sequence[str] = (),
) -> Findings:
    """Reads every result, and judges it against the reference, or the first that has losses where that has none."""
    outcomes = [_outcome(request, results, candidate) for candidate in candidates]
    with_losses = [each for each in outcomes if each.rows]
    chosen = next((each for each in with_losses if each.name == reference.name), next(iter(with_losses), None))
    sensitivity: dict[str, Sensitivity] = {}
    if chosen is not None:
        base = trace_of(chosen)
        for name in ROUNDOFF:
            result = results.of(Trial(candidate=chosen.candidate, repeat=0, perturbed=name))
            if result is not None and result.rows:
                twin = Outcome(candidate=chosen.candidate, results=[result], status=FINISHED, found=result.found)
                sensitivity[name] = sensitivity_of(base, trace_of(twin), name)
        expected = fingerprints(results.folder / "initial")
        for each in with_losses:
            verdict = judge(trace_of(each), base, sensitivity, expected)
            each.verdict = dataclasses.replace(verdict, kind=REFERENCE) if each is chosen and verdict.same else verdict
    device = next((each.found.device for each in with_losses if each.found and each.found.device), "")
    peak = recorded_peak(results.folder / COMPARISON) or _fastest_of_trials(outcomes, device)
    for each in outcomes:
        flops = each.found.flops_per_token if each.found is not None else None
        if each.speed is not None and peak is not None and flops is not None:
            each.mfu = each.speed.median * flops / peak.of_ranks(each.candidate.world_size)
    return Findings(
        request=request,
        outcomes=outcomes,
        reference=None if chosen is None else chosen.name,
        sensitivity=sensitivity,
        device=device,
        peak=peak,
        tried=tried,
    )


def _fastest_of_trials(outcomes: Sequence[Outcome], device: str) -> Peak | None:
    """The peak of a comparison that recorded none, of whose trials each measured its own."""
    on_cpu = device == "CPU"
    found = [result.found for each in outcomes for result in each.results if result.found is not None]
    peaks = [each.peak_flops / (1 if on_cpu else each.world_size) for each in found if each.peak_flops is not None]
    source = "the fastest that a trial measured" if on_cpu else "the highest of a trial's"
    return Peak(flops=max(peaks), source=source, whole_machine=on_cpu) if peaks else None


def _outcome(request: Request, results: Results, candidate: Candidate) -> Outcome:
    if candidate.skipped is not None:
        return Outcome(candidate=candidate, results=[], status="skipped", reason=candidate.skipped)
    done = [result for trial in trials_of(candidate) if (result := results.of(trial)) is not None]
    outcome = Outcome(
        candidate=candidate,
        results=done,
        status=FINISHED,
        speed=speed_of(
            [
                [float(row["tokens_per_second"]) for row in result.rows[request.warmup_steps :]]
                for result in done
                if result.status == FINISHED
            ]
        ),
        found=next((result.found for result in done if result.rows), None),
    )
    broken = next((result for result in done if result.status != FINISHED), None)
    if broken is not None:
        outcome.status, outcome.reason = broken.status, broken.reason
    elif len(done) < candidate.repeats:
        outcome.status = WAITING
        outcome.reason = f"{len(done)} of {candidate.repeats} trials" if done else None
    return outcome


def trace_of(outcome: Outcome) -> Trace:
    """What an outcome's first trial left to be judged by; it must have training rows."""
    found, candidate = outcome.found, outcome.candidate
    assert found is not None
    return Trace(
        losses=[float(row["loss"]) for row in found.rows],
        grad_norms=[None if row["grad_norm"] is None else float(row["grad_norm"]) for row in found.rows],
        skipped=[int(row["skipped_steps"]) for row in found.rows],
        row_hashes=found.row_hashes,
        weights=(found.weights.dtype, found.weights.sha256),
        settings=_settings(candidate),
        precision=precision(candidate.resolved),
        world_size=candidate.world_size,
    )


def _settings(candidate: Candidate) -> dict[str, Any]:
    """Run config and resolved DeepSpeed config, flat, as ``deepspeed: optimizer.params.eps`` → value."""
    settings = {name: value for name, value in dataclasses.asdict(candidate.config).items() if name != "deepspeed"}
    return settings | {"deepspeed: " + ".".join(path): value for path, value in leaves(candidate.resolved)}


# --------------------------------------------------------------------------------------------------------------------
# Writing


def figures_of(outcome: Outcome, request: Request) -> dict[str, Any]:
    """The figures of one outcome, for tables and for programs; None where something was not measured."""
    candidate, found, predicted, verdict = (
        outcome.candidate,
        outcome.found,
        outcome.candidate.predicted,
        outcome.verdict,
    )
    seconds, waits = (outcome.scored(key, request.warmup_steps) for key in ("step_seconds", "data_wait_seconds"))
    checkpoint = None if found is None else found.checkpoint
    return {
        "name": outcome.name,
        "config": candidate.label,
        "world_size": candidate.world_size,
        "micro_batch_size": candidate.config.micro_batch_size,
        "zero_stage": zero_stage(candidate.resolved) if candidate.resolved else None,
        "precision": precision(candidate.resolved) if candidate.resolved else None,
        "status": outcome.status,
        "reason": outcome.reason,
        "step": next((result.step for result in outcome.results if result.step), None),
        "peak_bytes": next((result.peak_bytes for result in outcome.results if result.peak_bytes), None),
        "tokens_per_second": _as_dict(outcome.speed),
        "step_seconds": statistics.median(seconds) if seconds else None,
        "data_wait_seconds": statistics.mean(waits) if waits else None,
        "mfu": outcome.mfu,
        "memory": {
            "predicted_device_bytes": None if predicted is None else predicted.peak_bytes,
            "predicted_host_bytes": None if predicted is None else predicted.host_bytes,
            "prediction": None if predicted is None else predicted.depth,
            "device_bytes": outcome.device_bytes,
            "host_resident_bytes": outcome.host_bytes,
            "host_grown_bytes": outcome.grown_bytes,
        },
        "parts": _as_dict(outcome.parts),
        "checkpoint": _as_dict(checkpoint),
        "startup_seconds": sum(found.startup_seconds.values()) if found and found.startup_seconds else None,
        "verdict": None if verdict is None else {**dataclasses.asdict(verdict), "text": str(verdict)},
        "losses": [row["loss"] for row in outcome.rows],
        "grad_norms": [row["grad_norm"] for row in outcome.rows],
        "notes": list(candidate.notes),
        "trials": [{"name": each.name, "status": each.status, "seconds": each.seconds} for each in outcome.results],
    }


def _as_dict(part: Any) -> dict[str, Any] | None:
    return None if part is None else dataclasses.asdict(part)


def as_json(findings: Findings) -> dict[str, Any]:
    """The whole comparison for programs; what is not finite is a string."""
    request = findings.request
    reference = findings.reference and findings.outcome(findings.reference)
    bands = {}
    if reference:
        base = trace_of(reference)
        bands = {name: loss_bands(base, sensitivity) for name, sensitivity in findings.sensitivity.items()}
    report = {
        "recommendation": findings.recommendation,
        "complete": findings.complete,
        "reference": findings.reference,
        "device": findings.device,
        "peak": _as_dict(findings.peak),
        "steps": request.steps,
        "warmup_steps": request.warmup_steps,
        "repeats": request.repeats,
        "config": fields_of(request.config),
        "ranking": [{"name": name, "tied_with": ties} for name, ties in findings.ranking],
        "pareto_front": findings.front,
        "sensitivity": {name: dataclasses.asdict(each) for name, each in findings.sensitivity.items()},
        "loss_bands": bands,
        "configs": [figures_of(each, request) for each in findings.outcomes],
        "tried": list(findings.tried),
    }
    return dict(_plain(report))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def differences(findings: Findings) -> list[tuple[str, list[str]]]:
    """Every setting in which the candidates differ: the key, and a text for each; the first row has the names."""
    shown = [each for each in findings.outcomes if each.candidate.resolved]
    flat = [{"ranks": each.candidate.world_size} | _settings(each.candidate) for each in shown]
    keys = list(dict.fromkeys(key for settings in flat for key in settings))
    rows = [(key, [json.dumps(settings[key]) if key in settings else "–" for settings in flat]) for key in keys]
    differing = [(key, values) for key, values in rows if len(set(values)) > 1]
    return [("setting", [each.name for each in shown]), *differing] if differing else []


# Of the median, to either side. Of 16 configs that were compared twice with one trial each, 13 differed by less
# (records/2026-11-28-comparison-2-cores).
PROCESS_SPREAD = 0.05


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Tokens/s of one config: the median over all scored steps of its trials, and the spread around it."""

    median: float
    low: float
    high: float
    steps: int
    trials: int

    def tied(self, other: Speed) -> bool:
        """Whether the spreads overlap: then another comparison may rank the two otherwise."""
        return self.low <= other.high and other.low <= self.high

    def passes(self, other: Speed) -> bool:
        """Whether its median is above the other's spread, and the other's below its own.

        Enough for a search to continue from it, which costs little where it was wrong; not enough to be told apart.
        """
        return self.median > other.high and other.median < self.low


def speed_of(trials: Sequence[Sequence[float]]) -> Speed | None:
    """The speed from the tokens/s of each scored step of each trial; None where there is none."""
    kept = [list(steps) for steps in trials if steps]
    if not kept:
        return None
    everything = [value for steps in kept for value in steps]
    median, unseen = statistics.median(everything), PROCESS_SPREAD if len(kept) == 1 else 0.0
    return Speed(
        median=median,
        low=min(median * (1 - unseen), *(_quartile(steps, 1) for steps in kept)),
        high=max(median * (1 + unseen), *(_quartile(steps, 3) for steps in kept)),
        steps=len(everything),
        trials=len(kept),
    )


def _quartile(values: Sequence[float], number: int) -> float:
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=4, method="inclusive")[number - 1]


def ranked(speeds: Mapping[str, Speed]) -> list[tuple[str, list[str]]]:
    """Names by falling median, each with those that its spread overlaps."""
    order = sorted(speeds, key=lambda name: -speeds[name].median)
    return [(name, [other for other in order if other != name and speeds[name].tied(speeds[other])]) for name in order]


def pareto(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Names of which no other takes as little memory and is as fast: (memory, tokens/s), by rising memory."""
    front = []
    for name, (memory, speed) in points.items():
        others = (point for other, point in points.items() if other != name)
        if not any(m <= memory and s >= speed and (m, s) != (memory, speed) for m, s in others):
            front.append(name)
    return sorted(front, key=lambda name: points[name])
