"""The command `train`: checks what needs no rank, then starts the ``deepspeed`` launcher. No torch here.

The launcher is DeepSpeed's own; what is added is that mistakes are found before any process starts, that operators are
built once, that signals reach the ranks, and that the exit code tells what became of the run.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from codeparrot_ds.checkpoint.folders import Checkpoint
from codeparrot_ds.checkpoint.run_folder import (
    check_free,
    check_run_name,
    continued_from,
    finished_checkpoint,
    new_run_name,
    recorded_hub,
    recorded_outcome,
    with_checkpoint,
)
from codeparrot_ds.config.arguments import with_field
from codeparrot_ds.config.launch_options import LaunchOptions
from codeparrot_ds.config.run_config import RunConfig
from codeparrot_ds.config.warnings import config_warnings
from codeparrot_ds.data.datasets import check_local_data
from codeparrot_ds.data.encoder import find_tokenizer
from codeparrot_ds.devices import local_device, local_devices
from codeparrot_ds.ds_config.precision import describe_choice, open_for
from codeparrot_ds.engine.operators import are_built, needed_operators
from codeparrot_ds.errors import UserError
from codeparrot_ds.hub.commands import SETTLE_SECONDS, prepare_branch, settle
from codeparrot_ds.hub.places import is_remote, open_repository
from codeparrot_ds.launch.deepspeed_command import MODULE, hosts_of, is_local
from codeparrot_ds.launch.doctor import Wanted, local_paths
from codeparrot_ds.launch.hostfile import Host
from codeparrot_ds.launch.job import Job, rank_environment, run_job, shared_variables
from codeparrot_ds.launch.preflight import (
    build_operators,
    check_memory,
    check_named,
    existing_folder,
    for_ranks,
    preflight,
)
from codeparrot_ds.resolved_run import ResolvedRun
from codeparrot_ds.secret_check import check_for_secrets
from codeparrot_ds.shell import next_steps, pasteable


def front_door(
    config: RunConfig,
    launch: LaunchOptions,
    *,
    typed: Sequence[str] = (),
    module: str = MODULE,
    say: Callable[[str], None] = lambda line: None,
    dry_run: Callable[[ResolvedRun, list[Host]], Iterable[str]] | None = None,
) -> int:
    """Checks a run, starts its ranks through the ``deepspeed`` launcher, waits, and returns the exit code.

    0 is finished, or stopped and saved; 1 something broke; 2 a mistake of the user's; 3 too many bad steps in a row;
    4 a rank or host was lost; 5 the ranks hung.

    Args:
        config: the run config.
        launch: where the ranks run.
        typed: the options of ``train`` with the launcher's own, for the command that continues the run.
        module: what a rank runs.
        say: gets which run this is, and where its log will be, once nothing is wrong at first sight; and what to type
            next once it has finished.
        dry_run: what to say of the checked run instead of starting it; nothing is written then.

    Raises:
        UserError: anything that can be known to be wrong before a rank starts.
    """
    started = time.time()
    if launch.no_ssh and not config.run_name:
        raise UserError("--no-ssh needs --run-name, the same on every host: each would make a name of its own")
    output_dir = Path(config.output_dir)
    name = config.run_name or new_run_name(output_dir)
    going_on = _going_on(typed, config, name)
    check_for_secrets(json.dumps(dataclasses.asdict(config)), "the run config")  # before any of it is said
    check_run_name(name)
    check_named(config)
    if not launch.node_rank:  # with --no-ssh the first host's rank 0, which may have begun, holds the run
        check_free(output_dir / name)
    config = with_checkpoint(dataclasses.replace(config, run_name=name))
    steps, model = config.max_train_steps, Path(config.model).name
    say(f"run {name}: checking {steps} steps of {model}; log in {output_dir / name / 'log'}")
    device = local_device(hostfile=launch.hostfile is not None)
    hosts = hosts_of(launch, local_devices(device) if launch.hostfile is None else [])
    if launch.bind_cores and shutil.which("numactl") is None:
        raise UserError("--bind-cores needs numactl, which is not on PATH: install it, or leave the option out")
    if not is_local(hosts) and not launch.no_ssh:
        shared_variables(device)  # a mistake in .deepspeed_env is found before anything is made
    ranks = sum(len(host.slots) for host in hosts)
    run = preflight(config, device=device, world_size=ranks)
    finished = None if dry_run else finished_checkpoint(run.config)
    if finished is not None and _is_at_its_end(run.config, finished, going_on):
        return 0
    assert run.file is not None
    if (said := describe_choice(config.ds_config_name, run.file, device=device)) is not None:
        print(said, file=sys.stderr)
    for warning in config_warnings(run.config, continued_from(run.config)):
        print(f"warning: {warning.sentence}", file=sys.stderr)
    if is_local(hosts):
        check_memory(run, refuse=not launch.ignore_memory_plan)
    if dry_run is not None:
        for line in dry_run(run, hosts):
            print(line)
        return 0
    if is_local(hosts) and not are_built(needed_operators(run.ds_config, device)):
        build_operators(run.ds_config, device, rank_environment(device, ranks))
    if config.hub != "off":
        outage = prepare_branch(config.hub, output_dir, name)
        if outage is not None:
            print(f"warning: {outage}; checkpoints are queued and pushed when it answers", file=sys.stderr)
    places = "this machine" if is_local(hosts) else f"{len(hosts)} host(s)"
    print(f"starting {ranks} rank(s) on {places}; importing torch and DeepSpeed takes a while", flush=True)
    job = Job(
        run=for_ranks(run, config.tokenizer),
        launch=launch,
        hosts=hosts,
        started=started,
        folder=output_dir / name,
        going_on=going_on,
        module=module,
    )
    code = run_job(job)
    if code == 0 and not launch.node_rank and recorded_outcome(job.folder).get("status") == "finished":
        say(_what_to_do_with(job.folder, config))
    return code


def _what_to_do_with(run: Path, config: RunConfig) -> str:
    """What to type once a run has finished."""
    commands = [("report", run), ("evaluate", run), ("complete", run, "import os")]
    if config.hub != "off":
        commands.append(("hub", "publish", run))
    return next_steps(*(pasteable(*command) for command in commands))


def _going_on(typed: Sequence[str], config: RunConfig, name: str) -> list[str]:
    """The options of ``train`` that continue a run which was started with those typed."""
    named = list(typed) if config.run_name else with_field(typed, "run_name", name)
    return named if config.resume == "auto" else with_field(named, "resume", "auto")


def _is_at_its_end(config: RunConfig, checkpoint: Checkpoint, going_on: list[str]) -> bool:
    """Ends the start of a run that has finished, without a rank: says so, and pushes what still waits.

    False where ranks have something to do after all: the last checkpoint is damaged, so that its steps are trained
    again, or it is to be pushed to another place than the run's.
    """
    run = checkpoint.run
    repository = open_repository(config.hub, config.output_dir)
    if recorded_hub(run) != (None if repository is None else repository.spec):
        return False
    if damage := checkpoint.damage():
        print(f"run {run.name} finished, but its last checkpoint is damaged: {damage[0]}", file=sys.stderr)
        return False
    step = checkpoint.step
    print(f"run {run.name} finished at step {step} of {step}, so nothing is trained: {run}", flush=True)
    if repository is not None:
        print(settle(run, wait_seconds=SETTLE_SECONDS if is_remote(config.hub) else math.inf))
    print(_how_to_train_on(config, run, going_on))
    return True


def _how_to_train_on(config: RunConfig, run: Path, going_on: list[str]) -> str:
    """What to type after a run's end: a larger ``max_train_steps`` is right only where the learning rate stays."""
    longer = with_field(going_on, "max_train_steps", 2 * config.max_train_steps)
    if config.lr_scheduler_type == "constant":
        return f"To continue:\n  {pasteable('train', *longer)}"
    name = new_run_name(run.parent)
    begun = pasteable("train", "--config", run / "config.yaml", "--init-from", run, "--run-name", name)
    return (
        "Its learning rate has come down to 0, and more steps would make it jump. To continue with its weights and a "
        f"schedule of their own:\n  {begun}\nTo train longer from the start:\n  "
        f"{pasteable('train', *with_field(longer, 'run_name', name))}"
    )


def wanted_of(config: RunConfig, launch: LaunchOptions, *, build: bool, clear_locks: bool) -> tuple[list[Host], Wanted]:
    """What ``doctor`` looks at: the hosts, and what a run of this config would need of them.

    Args:
        config: of the run; any field may be at its default.
        launch: where it would run.
        build: build missing operators.
        clear_locks: remove the locks of killed builds.

    Raises:
        UserError: what the config names is not there, or cannot be made.
    """
    for data, split in ((config.data, "train"), (config.validation_data, "validation")):
        if data:
            check_local_data(data, split, named=True)
    if config.tokenizer:
        find_tokenizer(config.tokenizer)
    existing_folder(Path(config.output_dir))
    device = local_device(hostfile=launch.hostfile is not None)
    hosts = hosts_of(launch, local_devices(device) if launch.hostfile is None else [])
    file = open_for(config, device)
    wanted = Wanted(
        device=device,
        output_dir=Path(config.output_dir),
        data=local_paths(config.data, config.validation_data or "", config.tokenizer),
        operators=needed_operators(file.config, device),
        build=file.config if build else None,
        clear_locks=clear_locks,
        master_addr=launch.master_addr,
        master_port=launch.master_port,
        ssh_port=launch.ssh_port,
        links=not is_local(hosts),
        variables={} if is_local(hosts) else shared_variables(device),
    )
    return hosts, wanted
