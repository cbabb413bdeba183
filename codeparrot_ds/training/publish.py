"""After a checkpoint is on disk: older ones make room, and its export is queued for the run's branch."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable
from pathlib import Path

from codeparrot_ds.checkpoint import folders as checkpoint_files
from codeparrot_ds.checkpoint.run_folder import RunFolder
from codeparrot_ds.checkpoint.saver import RunState
from codeparrot_ds.config.run_config import RunConfig
from codeparrot_ds.errors import UserError
from codeparrot_ds.hub.queue import PushQueue
from codeparrot_ds.hub.worker import start_drain

logger = logging.getLogger("codeparrot_ds.publish")


@dataclasses.dataclass
class Publisher:
    """Of one run, on rank 0. ``say`` is what the user reads."""

    config: RunConfig
    folder: RunFolder
    say: Callable[..., None]

    def after_save(self, path: Path, state: RunState) -> None:
        """Removes checkpoints that nothing keeps and queues the export (rank 0, from the thread that wrote)."""
        config = self.config
        evaluations = state.extra["evaluations"]
        saved = {
            checkpoint_files.step_of(path) for path in checkpoint_files.checkpoint_folders(self.folder.checkpoints)
        }
        judged = [row for row in evaluations if row["step"] in saved and not math.isnan(row["eval_loss"])]
        best = min(judged, key=lambda row: row["eval_loss"], default={"step": -1})
        for removed in checkpoint_files.remove_old(
            self.folder.checkpoints,
            newest=config.keep_checkpoints,
            every=config.keep_checkpoint_every,
            best=[best["step"]] if config.keep_best_checkpoint else [],
        ):
            logger.debug("removed %s", removed)
        self._queue_export(path, state)

    def queue_again(self, restored: RunState) -> None:
        """Queues the export of the checkpoint that the run goes on from: a kill may have come before that (rank 0)."""
        path = checkpoint_files.step_folder(self.folder.checkpoints, restored.step)
        if not path.is_dir():  # another run's
            return
        try:
            self._queue_export(path, restored)
        except UserError as error:
            self.say("error: %s; training goes on", error)

    def _queue_export(self, path: Path, state: RunState) -> None:
        """Queues a checkpoint's export for the run's branch and starts pushing; one that is known changes nothing."""
        if self.folder.record.get("hub") is None:
            return
        evaluations = state.extra["evaluations"]
        title, eval_loss = f"Step {state.step}", None
        if evaluations:
            evaluation = evaluations[-1]
            is_of_now = evaluation["step"] == state.step and math.isfinite(evaluation["eval_loss"])
            eval_loss = evaluation["eval_loss"] if is_of_now else None
            title += f": loss {evaluation['eval_loss']:.4f}, perplexity {evaluation['perplexity']:.2f}"
            if evaluation["step"] != state.step:
                title += f" (at step {evaluation['step']})"
        files = checkpoint_files.read_manifest(path)["files"]
        exported = checkpoint_files.EXPORT + "/"
        dropped = PushQueue(self.folder.path).enqueue(
            state.step,
            path / checkpoint_files.EXPORT,
            title,
            f"Tokens: {state.tokens:,}",
            sha256={
                name.removeprefix(exported): entry["sha256"]
                for name, entry in files.items()
                if name.startswith(exported)
            },
            eval_loss=eval_loss,
            max_bytes=self.config.hub_queue_gb * 1e9,
        )
        for drop in dropped:
            self.say("error: not pushed: %s", drop)
        start_drain(self.folder.path)
