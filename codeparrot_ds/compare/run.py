"""``compare``: several DeepSpeed configs on the same weights and rows, one after the other, in fresh processes.

Everything is checked and planned first. Then each config is run in turn, as often as asked for, and forwards and
backwards by turns, so that what changes on the machine meanwhile meets all of them alike. Every trial leaves its result
on the disk: a comparison that was stopped resumes with the same command, and has a report of what it knows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from codeparrot_ds.checkpoint.initial import with_initial_model
from codeparrot_ds.compare.candidates import (
    Candidate,
    Request,
    Results,
    candidates_of,
    check_data,
    left_to_run,
    open_folder,
    reference_of,
)
from codeparrot_ds.compare.findings import Findings, judge_all
from codeparrot_ds.compare.page import write_reports
from codeparrot_ds.compare.progress import TrialProgress
from codeparrot_ds.compare.results import COMPARISON, peak_of_comparison
from codeparrot_ds.compare.search import Search
from codeparrot_ds.compare.trial_process import TrialRunner
from codeparrot_ds.config.arguments import options_of
from codeparrot_ds.config.run_config import PRESETS, RunConfig
from codeparrot_ds.config.warnings import config_warnings
from codeparrot_ds.devices import local_device
from codeparrot_ds.errors import UserError
from codeparrot_ds.launch.preflight import check_named
from codeparrot_ds.shell import next_steps, pasteable

Say = Callable[[str], None]
TRIAL_GROUPS = ("model", "batch and schedule")
"""Of the run config's fields, those that trials are trained with: they neither evaluate nor save at intervals."""


def run_comparison(
    request: Request,
    folder: Path,
    *,
    hang_seconds: float,
    retry_failed: bool,
    search_minutes: float | None = None,
    say: Say,
) -> int:
    """Compares, and writes ``report.html``, ``report.md`` and ``report.json`` into the folder.

    Args:
        request: what to compare.
        folder: of the comparison; one that was interrupted resumes.
        hang_seconds: the most that a rank of a trial may stay in one place.
        retry_failed: run again what did not finish.
        search_minutes: search on from the configs for so long; None compares them and no others.
        say: prints a line for the user.

    Returns:
        0 when at least one config was measured, 1 when none was.

    Raises:
        UserError: a mistake in what was asked for.
        KeyboardInterrupt: the user's; the report is of the trials done.
    """
    device = local_device()
    request = dataclasses.replace(request, config=with_initial_model(request.config))
    check_named(request.config)
    with _forgotten_if_refused(folder):
        candidates = _prepare(request, folder, device, retry_failed=retry_failed, say=say)
    num_ready = sum(candidate.skipped is None for candidate in candidates)
    say(f"training {num_ready} config(s), each in fresh processes; a line follows each trial")
    peak = peak_of_comparison(folder / COMPARISON, device)
    run = TrialRunner(request=request, folder=folder, peak=peak, hang_seconds=hang_seconds)
    try:
        if search_minutes is None:
            findings = compare(request, folder, candidates, run=run, say=say)
        else:
            findings = Search(
                request, folder, candidates, device=device, minutes=search_minutes, run=run, say=say
            ).run()
    except KeyboardInterrupt:
        say(f"stopped; {folder / 'report.html'} has what is known so far")
        raise
    for line in ("", *findings.lines(), f"report: {folder / 'report.html'}"):
        say(line)
    if findings.recommended is not None:
        say(next_steps(how_to_train(findings.outcome(findings.recommended).candidate)))
    return 0 if findings.speeds else 1


def how_to_train(candidate: Candidate) -> str:
    """The command that trains with a config as it was measured; its JSON is the comparison's own copy."""
    config = dataclasses.replace(candidate.config, deepspeed=str(candidate.ds_config))
    if config.init_from:  # brings its tokenizer, which may lie in a folder that goes with this process
        config = dataclasses.replace(config, tokenizer="")
    by_preset = [[name, *options_of(config, RunConfig(**PRESETS[name]))] for name in PRESETS]
    return pasteable("train", *min(by_preset, key=len), "--num-gpus", candidate.world_size)


def with_warnings(candidates: Sequence[Candidate], request: Request) -> list[Candidate]:
    """Says what of the run config that all share can hardly be meant; what one alone has becomes a note of its."""

    def sentences(config: RunConfig) -> list[str]:
        return [f"warning: {warning.sentence}" for warning in config_warnings(config, groups=TRIAL_GROUPS)]

    shared = sentences(request.config)
    for sentence in shared:
        print(sentence, file=sys.stderr, flush=True)
    return [
        dataclasses.replace(each, notes=[*each.notes, *(own for own in sentences(each.config) if own not in shared)])
        for each in candidates
    ]


def _prepare(request: Request, folder: Path, device: str, *, retry_failed: bool, say: Say) -> list[Candidate]:
    """Makes the folder, and checks and plans everything."""
    open_folder(folder, request)
    if retry_failed:
        Results(folder).forget_failures()
    candidates = with_warnings(candidates_of(request, folder, device=device), request)
    ready = [candidate for candidate in candidates if candidate.skipped is None]
    for candidate in candidates:
        for sentence in [candidate.skipped] if candidate.skipped else candidate.notes:
            say(f"{candidate.name}: {'skipped: ' if candidate.skipped else ''}{sentence}")
    if not ready:
        raise UserError("none of the configs can be run here: " + str(candidates[0].skipped))
    check_data(ready[0].config, folder, device=device, world_size=ready[0].world_size)
    return candidates


@contextlib.contextmanager
def _forgotten_if_refused(folder: Path) -> Iterator[None]:
    """Takes a folder that was not there before away again where the comparison is refused."""
    new = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        yield
    except UserError:
        if new:
            shutil.rmtree(new[-1], ignore_errors=True)
        raise


def compare(request: Request, folder: Path, candidates: Sequence[Candidate], *, run: TrialRunner, say: Say) -> Findings:
    """Runs every trial of candidates, checked and planned, that has no result yet; reports, also where interrupted."""
    results = Results(folder)
    try:
        with TrialProgress(request, candidates, results, say) as progress:
            while left := left_to_run(candidates, results):
                progress.finished(left[0], run(left[0], progress.steps_done))
    finally:
        findings = judge_all(request, results, candidates, reference_of(candidates, results))
        write_reports(findings, folder)
    return findings
