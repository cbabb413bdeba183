"""What a start writes down: the run's folder and branch, its trackers, and the first lines that its user reads."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
from pathlib import Path

from codeparrot_ds.checkpoint.run_folder import RunFolder, continued_from, open_run, run_path
from codeparrot_ds.checkpoint.state import RunState
from codeparrot_ds.config.arguments import options_of
from codeparrot_ds.config.run_config import RunConfig
from codeparrot_ds.config.warnings import config_warnings
from codeparrot_ds.ds_config.changes import sources_as_json
from codeparrot_ds.engine.ranks import Ranks
from codeparrot_ds.hub.places import is_remote, open_repository
from codeparrot_ds.paths import shown
from codeparrot_ds.resolved_run import ResolvedRun
from codeparrot_ds.secret_check import check_for_secrets
from codeparrot_ds.supervision.guard import write_stacks_to
from codeparrot_ds.telemetry.startup import LAUNCHED_AT
from codeparrot_ds.telemetry.tracking import Progress, Tracker, set_up_logging, warm_up


def open_folder(run: ResolvedRun, ranks: Ranks) -> RunFolder:
    """Creates the run's folder and branch, or takes those that are there, and their lock; collective."""
    config = run.config
    hosts = ranks.gather(socket.gethostname())
    folder = RunFolder(run_path(config))

    def open_on_main() -> None:
        nonlocal folder
        check_for_secrets(json.dumps(dataclasses.asdict(config)), "the run config")
        check_for_secrets(json.dumps(run.ds_config), "the DeepSpeed config")
        repository = open_repository(config.hub, Path(config.output_dir))
        # A rank that the command started has only the name of a file, which is gone after the start, on its own.
        command = ["codeparrot-ds", "train", *options_of(config, RunConfig())] if LAUNCHED_AT in os.environ else None
        folder = open_run(config, run.ds_config, ranks.world_size, hosts, sources_as_json(run.ds), command)
        if repository is not None and not is_remote(config.hub):  # on the Hub its worker does: training waits for none
            repository.create()
            repository.create_branch(folder.branch)
        folder.update(hub=None if repository is None else repository.spec)

    ranks.on_main(open_on_main)
    if not ranks.is_main:
        folder.reload()
    return folder


def open_log(run: ResolvedRun, ranks: Ranks, folder: RunFolder) -> None:
    """This rank's log file, where a watchdog finds its stacks, too; wandb's import begins beside what comes next."""
    write_stacks_to(set_up_logging(folder.path, ranks.rank))
    if ranks.is_main and run.config.wandb != "off":
        warm_up()


def open_tracker(run: ResolvedRun, ranks: Ranks, folder: RunFolder, step: int) -> Tracker:
    """The run's metrics files, TensorBoard and wandb; what was logged later than ``step`` is dropped."""
    hyperparameters = dataclasses.asdict(run.config) | run.layout
    hyperparameters |= {
        "parameters": run.parameters,
        "vocab_size": run.shape.vocab_size,
        "gradient_accumulation_steps": run.accumulation_steps,
    }
    tracker = Tracker(
        folder,
        active=ranks.is_main,
        mode=run.config.wandb,
        hyperparameters=hyperparameters,
        last_step=step if step else -1,  # a fresh start evaluates step 0 again
    )
    if ranks.is_main:
        folder.update(parameters=run.parameters, **run.layout)
    return tracker


def introduce(
    progress: Progress, run: ResolvedRun, folder: RunFolder, restored: RunState | None, data_changes: list[str]
) -> None:
    """Says what is about to train, from where, and what is different from before."""
    config = run.config
    progress.say(
        "run %s: %s, %s parameters, ZeRO-%d %s on %d rank(s), %d rows per step (%d x %d x %d)",
        folder.name,
        shown(config.model),
        f"{run.parameters:,}",
        run.zero_stage,
        run.precision,
        run.world_size,
        config.global_batch_size,
        config.micro_batch_rows,
        run.accumulation_steps,
        run.world_size,
    )
    if folder.copy_of is not None:
        progress.say(
            "%s is a copy of %s, which is still there: its checkpoints go to a branch of its own, %s, and wandb sees "
            "another run",
            folder.path,
            folder.copy_of,
            folder.branch,
        )
    if restored is not None:
        progress.say("resumed from step %d (%s tokens)", restored.step, f"{restored.tokens:,}")
        before, now = restored.layout, run.layout
        changes = [f"{key} {before[key]} -> {now[key]}" for key in now if before[key] != now[key]]
        if changes:
            progress.say("layout changed: %s; losses agree to rounding", ", ".join(changes))
    if LAUNCHED_AT not in os.environ:  # else the command has said it
        for warning in config_warnings(config, continued_from(config)):
            progress.say("warning: %s", warning.sentence)
    if data_changes:
        progress.say("the data begins a new epoch: %s", " ".join(data_changes))
