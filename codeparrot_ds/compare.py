"""``compare``: several DeepSpeed configs on the same weights and rows, one after the other, in fresh processes.

Everything is checked and planned first. Then each config is run in turn, as often as asked for, and forwards and
backwards by turns, so that what changes on the machine meanwhile meets all of them alike. Every trial leaves its result
on the disk: a comparison that was stopped goes on with the same command, and has a report of what it knows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from codeparrot_ds.errors import UserError
from codeparrot_ds.run.comparison import (
    Candidate,
    Request,
    Trial,
    candidates_of,
    check_data,
    open_folder,
    read_result,
)
from codeparrot_ds.run.comparison_progress import TrialProgress
from codeparrot_ds.run.comparison_report import Findings, judge_all, write_reports
from codeparrot_ds.run.comparison_trial import run_trial
from codeparrot_ds.run.initial_weights_folder import initial_weights
from codeparrot_ds.run.launch import local_device
from codeparrot_ds.zero.ds_config import precision, zero_stage
from codeparrot_ds.zero.verdict import coarser

Say = Callable[[str], None]


def run_comparison(request: Request, folder: Path, *, hang_seconds: float, say: Say) -> int:
    """Compares, and writes ``report.html``, ``report.md`` and ``report.json`` into the folder.

    Args:
        request: what to compare.
        folder: of the comparison; one that was interrupted goes on.
        hang_seconds: a trial that writes nothing for so long is ended.
        say: prints a line for the user.

    Returns:
        0 when at least one config was measured, 1 when none was.

    Raises:
        UserError: a mistake in what was asked for.
        KeyboardInterrupt: the user's; the report is of the trials done.
    """
    device = local_device()
    open_folder(folder, request)
    candidates = candidates_of(request, folder, device=device)
    ready = [candidate for candidate in candidates if candidate.skipped is None]
    for candidate in candidates:
        for sentence in [candidate.skipped] if candidate.skipped else candidate.notes:
            say(f"{candidate.name}: {'skipped: ' if candidate.skipped else ''}{sentence}")
    if not ready:
        raise UserError("none of the configs can be run here: " + str(candidates[0].skipped))
    check_data(ready[0].config, folder, device=device, world_size=ready[0].world_size)
    return compare(request, folder, candidates, hang_seconds=hang_seconds, say=say)


def compare(request: Request, folder: Path, candidates: Sequence[Candidate], *, hang_seconds: float, say: Say) -> int:
    """Runs every trial that has no result yet, and reports."""
    trials = all_trials(request, candidates)
    with TrialProgress(trials, request, folder, say) as progress:
        try:
            for trial in trials:
                if read_result(folder, trial) is not None:
                    continue
                result = run_trial(
                    trial,
                    folder,
                    initial=initial_weights(request.config, folder, perturbed=trial.perturbed),
                    orders=orders_of(request, trial),
                    hang_seconds=hang_seconds,
                    progress=progress.steps_done,
                )
                progress.finished(trial, result)
        finally:
            findings = report(request, folder, candidates)
    say("")
    for line in findings.lines():
        say(line)
    say(f"report: {folder / 'report.html'}")
    return 0 if findings.speeds else 1


def report(request: Request, folder: Path, candidates: Sequence[Candidate]) -> Findings:
    """Judges what the trials on the disk found and writes the reports."""
    ready = [candidate for candidate in candidates if candidate.skipped is None]
    findings = judge_all(request, folder, candidates, reference_of(ready))
    write_reports(findings, folder)
    return findings


def all_trials(request: Request, candidates: Sequence[Candidate]) -> list[Trial]:
    """Every trial in the order of running: forwards and backwards by turns, sensitivity runs after the first."""
    ready = [candidate for candidate in candidates if candidate.skipped is None]
    reference = reference_of(ready)
    ready.sort(key=lambda candidate: candidate != reference)  # the others keep their order
    trials = []
    for repeat in range(request.repeats):
        turn = ready if repeat % 2 == 0 else ready[::-1]
        trials += [Trial(candidate=candidate, repeat=repeat) for candidate in turn]
    return [trials[0], *sensitivity_trials(ready, reference), *trials[1:]]


def sensitivity_trials(ready: Sequence[Candidate], reference: Candidate) -> list[Trial]:
    """The reference once more for each precision that another config is judged in."""
    own = precision(reference.resolved)
    others = [candidate for candidate in ready if candidate != reference]
    needed = {coarser(precision(candidate.resolved), own) for candidate in others}
    return [Trial(candidate=reference, repeat=0, perturbed=name) for name in sorted(needed)]


def reference_of(candidates: Sequence[Candidate]) -> Candidate:
    """The config that losses are compared with: fp32 at stage 0 on the fewest ranks where given, else the first."""
    plain = [
        candidate
        for candidate in candidates
        if precision(candidate.resolved) == "fp32" and zero_stage(candidate.resolved) == 0
    ]
    return min(plain, key=lambda candidate: candidate.world_size, default=candidates[0])


def orders_of(request: Request, trial: Trial) -> dict[str, Any]:
    """What a trial does: parts and a checkpoint are measured once for each candidate."""
    first = trial.repeat == 0 and not trial.perturbed
    return {
        "steps": request.steps,
        "parts_steps": request.parts_steps if first else 0,
        "checkpoint": request.checkpoint and first,
        "noise": trial.perturbed,
    }
