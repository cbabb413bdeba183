"""``compare --search``: an autotuner that measures, stays inside a budget, and says what it tried and what it did not.

It measures the configs given, then the fastest way to fit at each stage by the plan, and then climbs: from the fastest
config so far to its neighbours, one change at a time, until none is faster or the budget is spent. What only looks
faster within the spread moves nothing; a config whose losses differ is never gone on from. All of it
follows from the results on the disk, so that a search that was stopped goes on where it was.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from codeparrot_ds import durable
from codeparrot_ds.errors import UserError
from codeparrot_ds.model.shapes import num_parameters
from codeparrot_ds.run.comparison import (
    FINISHED,
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
from codeparrot_ds.run.comparison_report import Findings, judge_all, write_reports
from codeparrot_ds.zero.search import (
    Move,
    Point,
    can_be,
    config_at,
    micro_batch_sizes,
    moves,
    point_of,
    starts,
)

FINALISTS = 3


class OutOfBudget(Exception):
    """The next trial would take the search past its minutes."""


class Search:
    """A search in its folder.

    Args:
        request: one number of ranks; ``repeats`` are the trials of those that end on top.
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
        run: Callable[[Trial], None],
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
                size = candidate.config.micro_batch_size
                self._known[_key(_ds_config(candidate), size)] = candidate
                self._points[candidate.name] = point_of(_ds_config(candidate), size)
                self._origins[candidate.name] = candidate
        self.tried: list[str] = []

    def run(self) -> Findings:
        """Searches, gives the best more trials, and says in ``tried`` what was done; reports also when interrupted."""
        ready = [candidate for candidate in self.candidates if candidate.skipped is None]
        if not ready:
            raise UserError("none of the configs can be run here: " + str(self.candidates[0].skipped))
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
        found = list(starts(base, self._sizes, lambda point: self._problem(origin, point) is None))
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
        around = moves(
            self._points[best.name],
            self._sizes,
            world_size=self._world_size,
            parameters=self._parameters,
            fits=lambda point: self._problem(best, point) is None,
        )
        for move in around:
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
        outcome = next(each for each in self.findings().outcomes if each.name == candidate.name)
        told = outcome.reason or "no scored step"
        if outcome.speed is not None:
            told = f"{outcome.speed.median:,.0f} tokens/s; losses: {outcome.verdict}"
        line = f"{candidate.name} ({why}): {told}"
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
        return sum(seconds for _, seconds in self._done())

    def _expected(self) -> float:
        finished = [seconds for status, seconds in self._done() if status == FINISHED]
        return statistics.mean(finished) if finished else 0.0

    def _done(self) -> list[tuple[str, float]]:
        paths = self._folder.glob("trials/*/result.json")
        results = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
        return [(result["status"], float(result["seconds"])) for result in results]

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

    def _problem(self, origin: Candidate, point: Point) -> str | None:
        return self._candidate(origin, point).skipped


def _key(ds_config: dict[str, Any], micro_batch_size: int) -> str:
    return json.dumps([ds_config, micro_batch_size], sort_keys=True)


def _ds_config(candidate: Candidate) -> dict[str, Any]:
    return dict(json.loads(candidate.ds_config.read_text(encoding="utf-8")))


def _is_usable(findings: Findings, name: str) -> bool:
    outcome = findings.outcome(name)
    return outcome.status != "skipped" and outcome.verdict is not None and bool(outcome.verdict.same)
