"""What ``codeparrot-ds hub`` does with a run's branch: status, push, publish; and what the end of a run says of it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from codeparrot_ds.errors import UserError
from codeparrot_ds.hub.hugging_face import HubRepository, require_token
from codeparrot_ds.hub.identity import identity_of
from codeparrot_ds.hub.places import is_remote, open_repository
from codeparrot_ds.hub.queue import PushQueue
from codeparrot_ds.hub.repository import MAIN, Commit, Repository
from codeparrot_ds.hub.worker import Destination, check_owner, drain, read_destination, start_drain
from codeparrot_ds.retry import Answer, Pauses, UnavailableError, say_retry
from codeparrot_ds.shell import pasteable

PATIENCE_SECONDS = 300.0
"""How long a command keeps trying without a success while the place is not available."""
START_SECONDS = 15.0
"""Of silence on a connection to the Hub after which the start of a run does not wait for it."""
SETTLE_SECONDS = 60.0
"""That the end of a run waits for the Hub; the worker continues after that."""


def prepare_branch(hub: str, output_dir: str | os.PathLike[str], name: str) -> str | None:
    """Makes the repository and the branch of a run that is about to start, and checks that it may have the branch.

    Returns:
        Why the place is not available, None where it is: a run does not wait for it, its worker tries again later.

    Raises:
        UserError: what the user must fix before a checkpoint can be pushed: the token, its rights, the branch's owner.
    """
    if is_remote(hub):
        require_token(hub)
        repository: Repository | None = HubRepository(hub, timeout_seconds=START_SECONDS)
    else:
        repository = open_repository(hub, output_dir)
    assert repository is not None
    identity = identity_of(Path(output_dir) / name)
    branch = identity.branch
    try:
        repository.create()
        repository.create_branch(branch)
        if repository.head(branch) != repository.head(MAIN):
            history = repository.commits(branch)
            check_owner(history, Destination(branch=branch, run_id=identity.run_id, repository=repository))
    except UnavailableError as error:
        return str(error)
    return None


def hub_status(run_dir: str | os.PathLike[str]) -> str:
    """Returns what of a run is pushed, waiting, dropped and refused, as lines of text, without asking the place."""
    destination, queue = read_destination(run_dir), PushQueue(run_dir)
    pushed, pending, refused, dropped = queue.pushed(), queue.pending(), queue.refused(), queue.dropped()
    lines = [f"branch {destination.branch} of {destination.repository}", f"pushed   {len(pushed)}"]
    lines += [f"  step {push.step:>8}  {push.commit[:10]}  {push.title}" for push in pushed]
    lines += [f"waiting  {len(pending)}"]
    lines += [f"  step {entry.step:>8}  {entry.title}" for entry in pending]
    lines += [f"dropped  {len(dropped)}"] if dropped else []
    lines += [f"  {drop}" for drop in dropped]
    lines += [f"refused  {len(refused)}"] if refused else []
    lines += [f"  {sentence}" for sentence in refused]
    problem = queue.problem()
    if pending and problem:
        lines += [f"the last attempt failed {_clock(problem['time'])}: {problem['problem']}"]
    if pending and queue.is_draining():
        again = problem and problem["retry_at"]
        lines += [f"a worker is at it{f', and tries again {_clock(again)}' if again else ''}"]
    elif pending:
        lines += [f"push them with: {pasteable('hub', 'push', run_dir)}"]
    return "\n".join(lines)


def hub_push(
    run_dir: str | os.PathLike[str],
    *,
    pauses: Pauses | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> str:
    """Drains a run's queue and returns what was pushed; raises ``UserError`` when an entry was refused."""
    pauses = pauses or Pauses(PATIENCE_SECONDS)
    destination = read_destination(run_dir)
    queue = PushQueue(run_dir)
    _wait_for_another(queue, pauses.patience_seconds, say)
    result = drain(queue, destination, pauses=pauses, say=say)
    branch, repository = destination.branch, destination.repository
    if result.refused:
        raise UserError("; ".join([f"pushed {len(result.pushed)} to branch {branch}", *result.refused]))
    lines = [f"pushed step {push.step} to branch {branch} of {repository}: {push.title}" for push in result.pushed]
    return "\n".join(lines) or f"nothing waits: branch {branch} of {repository} is up to date"


def _wait_for_another(queue: PushQueue, patience_seconds: float, say: Callable[[str], None]) -> None:
    """Waits for a worker that drains the queue already; raises its own problem when patience ends before it does."""
    end, said = time.monotonic() + patience_seconds, False
    while queue.is_draining() and queue.entry_folders():
        if not said:
            say("the run's own worker is pushing; waiting for it")
        said = True
        if time.monotonic() > end:
            problem = (queue.problem() or {}).get("problem", "it has not said why")
            raise UserError(f"the run's own worker is pushing and has not come through: {problem}")
        time.sleep(0.1)


def hub_publish(
    run_dir: str | os.PathLike[str],
    *,
    checkpoint: str = "last",
    tag: str | None = None,
    overwrite: bool = False,
    pauses: Pauses | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> str:
    """Drains a run's queue, makes main show one of its checkpoints, tags it, and returns what was done.

    Args:
        checkpoint: ``last``, or ``best`` for the lowest evaluation loss.
        tag: name of the release; ``<run>-step-<step>`` by default.
        overwrite: publish although main has commits of others, which then show in its history only.

    Raises:
        UserError: the branch has no checkpoint, main moved on, or the tag names another commit.
    """
    destination = read_destination(run_dir)
    branch, repository = destination.branch, destination.repository
    pauses = pauses or Pauses(PATIENCE_SECONDS)
    said = hub_push(run_dir, pauses=pauses, say=say)

    def patiently(ask: Callable[[], Answer]) -> Answer:
        return pauses.patiently(ask, lambda error, pause: say_retry(error, pause, say))

    if not PushQueue(run_dir).pushed():
        raise _nothing_yet(destination)
    chosen = _choose(patiently(lambda: repository.commits(branch)), destination, checkpoint)
    step = chosen.trailer("Step")
    commit = patiently(lambda: repository.merge(branch, commit=chosen.id, overwrite=overwrite))
    name = tag or f"{branch}-step-{step}"
    patiently(lambda: repository.tag(name, chosen.id))
    return "\n".join(
        [
            said,
            f"main of {repository} is now {branch} at step {step} ({chosen.title}): commit {commit[:10]}, tag {name}",
            f"get it with: {repository.how_to_get(name)}",
        ]
    )


def _nothing_yet(destination: Destination) -> UserError:
    branch, repository = destination.branch, destination.repository
    return UserError(f"branch {branch} of {repository} has no checkpoint yet; there is nothing to publish")


def _choose(history: list[Commit], destination: Destination, checkpoint: str) -> Commit:
    check_owner(history, destination)
    checkpoints = [commit for commit in history if commit.trailer("Run") == destination.branch]
    if not checkpoints:
        raise _nothing_yet(destination)
    if checkpoint == "last":
        return checkpoints[0]
    judged = [commit for commit in checkpoints if commit.trailer("Eval-Loss") is not None]
    if not judged:
        raise UserError(
            f"no checkpoint of branch {destination.branch} was evaluated at its own step, so none is the best; publish "
            "the last one"
        )
    return min(judged, key=lambda commit: float(commit.trailer("Eval-Loss") or "inf"))


MOST_WORKERS = 3
"""That the end of a run starts one after another where they are killed."""


def settle(run_dir: str | os.PathLike[str], *, wait_seconds: float, stopped: Callable[[], bool] = lambda: False) -> str:
    """Starts a worker on what waits in a run's queue, waits for it, and says how things stand.

    The worker continues where it takes longer, and where ``stopped`` says that nobody waits for this any more.

    Returns:
        One line where everything is pushed, and otherwise what is left, why, and what to do.

    Raises:
        UserError: exports were refused, or the place wants something that only the user can fix.
    """
    destination, queue = read_destination(run_dir), PushQueue(run_dir)
    end = time.monotonic() + wait_seconds
    for _ in range(MOST_WORKERS):
        if not queue.entry_folders():
            break
        worker = start_drain(run_dir)
        while queue.entry_folders() and (worker.poll() is None or queue.is_draining()):
            if time.monotonic() > end or stopped():
                break
            time.sleep(0.05)
        if (worker.poll() or 0) >= 0:  # else it was killed, for want of memory perhaps
            break
    left, problem, dropped = queue.pending(), queue.problem(), queue.dropped()
    place = f"branch {destination.branch} of {destination.repository}"
    lines = queue.refused() + [f"not pushed: {drop}" for drop in dropped]
    if left:
        steps = ", ".join(str(entry.step) for entry in left)
        working = "a process is still pushing them; " if queue.is_draining() else ""
        why = f" ({problem['problem']})" if problem else ""
        lines.append(
            f"{len(left)} checkpoint(s) still wait to be pushed to {place}: step {steps}{why}; {working}see them with "
            f"`{pasteable('hub', 'status', run_dir)}`, push them with `{pasteable('hub', 'push', run_dir)}`"
        )
    if queue.refused() or (left and problem and problem["retry_at"] is None and not queue.is_draining()):
        raise UserError("; ".join(lines))
    return "\n".join(lines) or f"{place} has every checkpoint"


def _clock(seconds: float) -> str:
    return time.strftime("at %H:%M:%S on %Y-%m-%d", time.localtime(seconds))
