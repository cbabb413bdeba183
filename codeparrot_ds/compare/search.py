"""``compare --search``: an autotuner that measures, stays inside a budget, and says what it tried and what it did not.

It measures the configs given, then the fastest way to fit at each stage by the plan, and then climbs: from the fastest
config so far to its neighbours, one change at a time, until none is faster or the budget is spent. What only looks
faster within the spread moves nothing; from a config whose losses differ the search never continues. All of it
follows from the results on the disk, so that a search that was stopped resumes where it was.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from codeparrot_ds import durable
from codeparrot_ds.compare.candidates import (
    Candidate,
    Request,
    Results,
    Trial,
    left_to_run,
    model_shape,
    plan_candidate,
    reference_of,
    slug_of,
)
from codeparrot_ds.compare.findings import Findings, judge_all
from codeparrot_ds.compare.page import write_reports
from codeparrot_ds.compare.results import FINISHED
from codeparrot_ds.ds_config.facts import activation_checkpointing, offload_device, precision, value_at, zero_stage
from codeparrot_ds.json_files import read_object
from codeparrot_ds.model.shapes import num_parameters

# --------------------------------------------------------------------------------------------------------------------
# The space

OFFLOADS = ("none", "optimizer", "parameters")
"""What is offloaded to the host's memory; parameters only together with the optimizer, and only at stage 3."""
DEFAULT_BUCKET = 500_000_000
BUCKET_FACTOR, SMALLEST_BUCKET = 4, 1_000_000
_CHECKPOINTING: dict[str, Any] = {}  # being there switches it on
_OFFLOAD = {"device": "cpu", "pin_memory": True}


@dataclass(frozen=True, kw_only=True)
class Point:
    """What a search changes of a config."""

    stage: int
    """Of ZeRO, 0 to 3."""
    micro_batch_size: int
    """Rows per rank and forward pass."""
    checkpointing: bool = False
    """Activations are computed again in the backward pass."""
    offload: str = "none"
    """One of `OFFLOADS`."""
    bucket: int = DEFAULT_BUCKET
    """``reduce_bucket_size``, in numbers."""

    def __str__(self) -> str:
        parts = [f"stage {self.stage}", f"micro-batch {self.micro_batch_size}"]
        parts += ["checkpointing"] * self.checkpointing
        parts += [f"offload {self.offload}"] * (self.offload != "none")
        parts += [f"bucket {self.bucket:.3g}"] * (self.stage > 0)
        return ", ".join(parts)


@dataclass(frozen=True, kw_only=True)
class Move:
    """One change of a point, in words."""

    words: str
    point: Point


Fits = Callable[[Point], bool]


def point_of(ds_config: Mapping[str, Any], micro_batch_size: int) -> Point:
    """Where a config lies."""
    offload = "none"
    if offload_device(ds_config, "optimizer") != "none":
        offload = "parameters" if offload_device(ds_config, "parameters") != "none" else "optimizer"
    bucket = value_at(ds_config, ("zero_optimization", "reduce_bucket_size"))
    return Point(
        stage=zero_stage(ds_config),
        micro_batch_size=micro_batch_size,
        checkpointing=activation_checkpointing(ds_config),
        offload=offload,
        bucket=bucket if isinstance(bucket, int) and not isinstance(bucket, bool) else DEFAULT_BUCKET,
    )


def config_at(base: Mapping[str, Any], point: Point) -> dict[str, Any]:
    """The config of a point; what the point does not say (precision, optimizer, dtypes, …) is the base's."""
    config = copy.deepcopy(dict(base))
    zero: dict[str, Any] = {}
    if point.stage > 0:
        zero = dict(config.get("zero_optimization") or {}) | {"reduce_bucket_size": point.bucket}
    for key in list(zero):
        if key in ("offload_optimizer", "offload_param") or (key.startswith("stage3_") and point.stage < 3):
            del zero[key]
    zero["stage"] = point.stage
    if point.offload != "none":
        zero["offload_optimizer"] = dict(_OFFLOAD)
    if point.offload == "parameters":
        zero["offload_param"] = dict(_OFFLOAD)
    config["zero_optimization"] = zero
    if not point.checkpointing:
        config.pop("activation_checkpointing", None)
    elif config.get("activation_checkpointing") is None:
        config["activation_checkpointing"] = dict(_CHECKPOINTING)
    return config


def can_be(base: Mapping[str, Any], point: Point) -> bool:
    """Whether DeepSpeed has such a config: offloading needs a stage, offloaded parameters stage 3."""
    lowest = {"none": 0, "optimizer": 1, "parameters": 3}[point.offload]
    keeps_masters_in_bf16 = value_at(base, (precision(base), "bf16_master_weights_and_grads")) is True
    return point.stage >= max(lowest, 1 if keeps_masters_in_bf16 else 0)


def micro_batch_sizes(global_batch_size: int, world_size: int) -> list[int]:
    """Every number of rows per rank and forward pass that divides a step."""
    rows = global_batch_size // world_size
    return [size for size in range(1, rows + 1) if rows % size == 0] if global_batch_size % world_size == 0 else []


def starts(base: Point, sizes: list[int], fits: Fits) -> Iterator[Move]:
    """The fastest way to fit at each stage, as far as the plan tells: without recomputing and offloading where it can.

    The bucket is that of the user's config, ``base``, and the micro-batch the largest of ``sizes`` up to its.
    """
    smaller = [size for size in sizes if size <= max(base.micro_batch_size, sizes[0])]
    for stage in range(4):
        ways = (
            Point(stage=stage, micro_batch_size=size, checkpointing=again, offload=offload, bucket=base.bucket)
            for offload in OFFLOADS
            for again in (False, True)
            for size in reversed(smaller)
        )
        way = next(filter(fits, ways), None)
        if way is not None:
            yield Move(words=f"stage {stage}", point=way)


def moves(point: Point, sizes: list[int], *, world_size: int, parameters: int, fits: Fits) -> list[Move]:
    """The neighbours of a point, those first that gain most where they gain.

    Recomputing and offloading cost time and give memory. They are taken back where they are on, and begun only where
    they make room for a larger micro-batch that does not fit otherwise. A bucket larger than the model changes nothing.
    """
    found: list[Move] = []

    def add(words: str, **changes: Any) -> None:
        found.append(Move(words=words, point=replace(point, **changes)))

    offload = OFFLOADS.index(point.offload)
    larger = next((size for size in sizes if size >= 2 * point.micro_batch_size), None)
    smaller = next((size for size in reversed(sizes) if 2 * size <= point.micro_batch_size), None)
    if larger is not None:
        add(f"micro-batch {larger}", micro_batch_size=larger)
    if point.checkpointing:
        add("no checkpointing", checkpointing=False)
    if offload > 0:
        add(f"offload {OFFLOADS[offload - 1]}", offload=OFFLOADS[offload - 1])
    for stage in (point.stage - 1, point.stage + 1):
        if 0 <= stage <= 3:
            add(f"stage {stage}", stage=stage)
    if smaller is not None:
        add(f"micro-batch {smaller}", micro_batch_size=smaller)
    if point.stage > 0 and world_size > 1:
        buckets = [point.bucket // BUCKET_FACTOR] if point.bucket >= BUCKET_FACTOR * SMALLEST_BUCKET else []
        buckets += [point.bucket * BUCKET_FACTOR] if point.bucket < parameters else []
        for bucket in buckets:
            add(f"bucket {bucket:.3g}", bucket=bucket)
    if larger is not None and not fits(found[0].point):
        if not point.checkpointing:
            add(f"checkpointing and micro-batch {larger}", micro_batch_size=larger, checkpointing=True)
        for more in OFFLOADS[offload + 1 : offload + 2]:
            add(f"offload {more} and micro-batch {larger}", micro_batch_size=larger, offload=more)
    return found


# --------------------------------------------------------------------------------------------------------------------
# The search

FINALISTS = 3


class OutOfBudget(Exception):
    """The next trial would take the search past its minutes."""


class Search:
    """A search in its folder, on one number of ranks.

    Args:
        request: its ``repeats`` are the trials of those that end on top.
        folder: of the comparison.
        given: the user's configs, checked and planned.
        device: ``cpu`` or ``cuda``.
        minutes: of trials, those of earlier tries included.
        run: runs a trial to its end and leaves its result.
        say: prints a line for the user.
    """

    def __init__(
        self,
        request: Request,
        folder: Path,
        given: Sequence[Candidate],
        *,
        device: str,
        minutes: float,
        run: Callable[[Trial], object],
        say: Callable[[str], None],
    ) -> None:
        self._request, self._folder, self._device, self._run, self._say = request, folder, device, run, say
        self._world_size = given[0].world_size
        self._budget_seconds = 60 * minutes
        self._results = Results(folder)
        self._parameters = num_parameters(model_shape(request.config))
        self._sizes = micro_batch_sizes(request.config.global_batch_size, self._world_size)
        self.candidates = [dataclasses.replace(candidate, repeats=1) for candidate in given]
        self._known: dict[str, Candidate] = {}
        self._points: dict[str, Point] = {}
        self._origins: dict[str, Candidate] = {}  # the user's config that a candidate takes all else from
        for candidate in self.candidates:
            if candidate.skipped is None:
                size = candidate.config.micro_batch_rows
                self._known[_key(_ds_config(candidate), size)] = candidate
                self._points[candidate.name] = point_of(_ds_config(candidate), size)
                self._origins[candidate.name] = candidate
        self.tried: list[str] = []

    def run(self) -> Findings:
        """Searches, gives the best more trials, and says in ``tried`` what was done; reports also when interrupted."""
        ready = [candidate for candidate in self.candidates if candidate.skipped is None]
        self.tried += [f"{each.name}: not run: {each.skipped}" for each in self.candidates if each.skipped]
        try:
            for candidate in ready:
                self._measure(candidate, "given")
            self._start(ready[0])
            self._climb()
            self._finish()
        except OutOfBudget as end:
            self._tell(f"the budget ends here: {end}")
        finally:
            findings = self.findings()
            write_reports(findings, self._folder)
        return findings

    def findings(self) -> Findings:
        """What is known so far."""
        reference = reference_of(self.candidates, self._results)
        return judge_all(self._request, self._results, self.candidates, reference, self.tried)

    # ----------------------------------------------------------------------------------------------------------------
    # The way

    def _start(self, origin: Candidate) -> None:
        base = self._points[origin.name]
        found = list(starts(base, self._sizes, self._fits(origin)))
        for stage in sorted({0, 1, 2, 3} - {move.point.stage for move in found}):
            self._tell(f"stage {stage}: not run: it fits in no way by the plan, or DeepSpeed has no such config")
        for move in found:
            self._try(origin, move, "the fastest way to fit by the plan")

    def _climb(self) -> None:
        best = self._best()
        while best is not None:
            better = self._better_neighbour(best)
            if better is None:
                self._tell(f"no neighbour of {best.name} is faster: the search ends")
                return
            best = better

    def _better_neighbour(self, best: Candidate) -> Candidate | None:
        sizes = {"world_size": self._world_size, "parameters": self._parameters}
        for move in moves(self._points[best.name], self._sizes, fits=self._fits(best), **sizes):
            candidate = self._try(best, move, f"from {best.name}")
            if candidate is not None and self._best() == candidate and self._passes(candidate, best):
                return candidate
        return None

    def _finish(self) -> None:
        """Further trials of the fastest and of those that are not told apart from it, in turn."""
        findings = self.findings()
        best = self._best()
        if best is None or self._request.repeats == 1:
            return
        ties = next(ties for name, ties in findings.ranking if name == best.name)
        usable = [name for name in ties if _is_usable(findings, name)]
        finalists = [best.name, *usable][:FINALISTS]
        self.candidates = [
            dataclasses.replace(each, repeats=self._request.repeats) if each.name in finalists else each
            for each in self.candidates
        ]
        self._tell(f"more trials of {', '.join(finalists)}")
        while left := left_to_run(self.candidates, self._results):
            self._spend(left[0], "further trial")

    # ----------------------------------------------------------------------------------------------------------------
    # One config

    def _try(self, origin: Candidate, move: Move, why: str) -> Candidate | None:
        """Measures a neighbour unless it cannot be or is known; returns it, or None where it was not measured."""
        candidate = self._candidate(origin, move.point)
        if candidate.skipped is not None:
            line = f"{move.words} ({why}): not run: {candidate.skipped}"
            if line not in self.tried:
                self._tell(line)
            return None
        if candidate not in self.candidates:
            self.candidates.append(candidate)
        self._measure(candidate, f"{move.words}, {why}")
        return candidate

    def _measure(self, candidate: Candidate, why: str) -> None:
        """The trial of a config, the sensitivity run of its precision, and a line that says what came out."""
        for trial in left_to_run(self.candidates, self._results):
            if trial.candidate == candidate or trial.perturbed:
                self._spend(trial, why)
        outcome = self.findings().outcome(candidate.name)
        result = outcome.reason or "no scored step"
        if outcome.speed is not None:
            result = f"{outcome.speed.median:,.0f} tokens/s; losses: {outcome.verdict}"
        line = f"{candidate.name} ({why}): {result}"
        if not any(each.startswith(f"{candidate.name} (") for each in self.tried):
            self._tell(f"{line}; {self._spent() / 60:.1f} of {self._budget_seconds / 60:g} minutes", line)

    def _spend(self, trial: Trial, why: str) -> None:
        spent, expected = self._spent(), self._expected()
        if spent + expected > self._budget_seconds:
            raise OutOfBudget(
                f"{spent / 60:.1f} of {self._budget_seconds / 60:g} minutes are spent, and {trial.candidate.name} "
                f"({why}) would take about {expected / 60:.1f} more"
            )
        self._run(trial)

    def _spent(self) -> float:
        return sum(result.seconds for result in self._results.all())

    def _expected(self) -> float:
        finished = [result.seconds for result in self._results.all() if result.status == FINISHED]
        return statistics.mean(finished) if finished else 0.0

    def _best(self) -> Candidate | None:
        findings = self.findings()
        name = next((name for name, _ in findings.ranking if _is_usable(findings, name)), None)
        return None if name is None else findings.outcome(name).candidate

    def _passes(self, one: Candidate, other: Candidate) -> bool:
        speeds = self.findings().speeds
        return speeds[one.name].passes(speeds[other.name])

    def _tell(self, line: str, kept: str | None = None) -> None:
        self.tried.append(kept or line)
        self._say(line)

    # ----------------------------------------------------------------------------------------------------------------
    # Points as candidates

    def _candidate(self, beside: Candidate, point: Point) -> Candidate:
        """The candidate of a point with all else as in another; one that is there already where it is the same."""
        origin = self._origins[beside.name]
        ds_config = config_at(_ds_config(origin), point)
        key = _key(ds_config, point.micro_batch_size)
        if key not in self._known:
            candidate = self._planned(origin, point, ds_config)
            self._known[key], self._points[candidate.name] = candidate, point
            self._origins[candidate.name] = origin
        return self._known[key]

    def _planned(self, origin: Candidate, point: Point, ds_config: dict[str, Any]) -> Candidate:
        label = str(point)
        if any(each.label == label for each in self._known.values()):  # of another optimizer, precision or dtype
            label += f" (like {origin.label})"
        path = self._folder / "ds_configs" / f"{slug_of(label)}.json"
        config = dataclasses.replace(
            origin.config, micro_batch_size=point.micro_batch_size, deepspeed=str(path.absolute())
        )
        candidate = Candidate(label=label, world_size=self._world_size, ds_config=path, config=config)
        if not can_be(ds_config, point):
            return dataclasses.replace(candidate, skipped="DeepSpeed has no such config")
        durable.write_json(path, ds_config)
        return plan_candidate(candidate, ds_config, device=self._device)

    def _fits(self, beside: Candidate) -> Fits:
        return lambda point: self._candidate(beside, point).skipped is None


def _key(ds_config: dict[str, Any], micro_batch_size: int) -> str:
    return json.dumps([ds_config, micro_batch_size], sort_keys=True)


def _ds_config(candidate: Candidate) -> dict[str, Any]:
    return read_object(candidate.ds_config)


def _is_usable(findings: Findings, name: str) -> bool:
    outcome = findings.outcome(name)
    return outcome.status != "skipped" and outcome.verdict is not None and bool(outcome.verdict.same)
