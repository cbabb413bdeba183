"""After a checkpoint is on disk: older ones make room, and its export is queued for the run's branch."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable

from codeparrot_ds.checkpoint.folders import Checkpoint, checkpoint_folders, remove_old
from codeparrot_ds.checkpoint.run_folder import RunFolder
from codeparrot_ds.checkpoint.state import RunState
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

    def after_save(self, checkpoint: Checkpoint, state: RunState) -> None:
        """Removes checkpoints that nothing keeps and queues the export (rank 0, from the thread that wrote)."""
        config = self.config
        saved = {each.step for each in checkpoint_folders(self.folder.checkpoints)}
        judged = [row for row in state.evaluations if row.step in saved and not math.isnan(row.eval_loss)]
        best = min(judged, key=lambda row: row.eval_loss, default=None)
        for removed in remove_old(
            self.folder.checkpoints,
            newest=config.keep_checkpoints,
            every=config.keep_checkpoint_every,
            best=[best.step] if best is not None and config.keep_best_checkpoint else [],
        ):
            logger.debug("removed %s", removed)
        self._queue_export(checkpoint, state)

    def queue_again(self, restored: RunState) -> None:
        """Queues the export of the checkpoint that the run resumes from: a kill may have come before that (rank 0)."""
        checkpoint = Checkpoint.of_step(self.folder.checkpoints, restored.step)
        if not checkpoint.path.is_dir():  # another run's
            return
        try:
            self._queue_export(checkpoint, restored)
        except UserError as error:
            self.say("error: %s; training continues", error)

    def _queue_export(self, checkpoint: Checkpoint, state: RunState) -> None:
        """Queues a checkpoint's export for the run's branch and starts pushing; one that is known changes nothing."""
        if self.folder.record.get("hub") is None:
            return
        title, eval_loss = f"Step {state.step}", None
        if (evaluation := state.last_evaluation) is not None:
            is_of_now = evaluation.step == state.step and math.isfinite(evaluation.eval_loss)
            eval_loss = evaluation.eval_loss if is_of_now else None
            title += f": loss {evaluation.eval_loss:.4f}, perplexity {evaluation.perplexity:.2f}"
            if evaluation.step != state.step:
                title += f" (at step {evaluation.step})"
        dropped = PushQueue(self.folder.path).enqueue(
            state.step,
            checkpoint.export,
            title,
            f"Tokens: {state.tokens:,}",
            sha256={name: file.sha256 for name, file in checkpoint.manifest().exported().items()},
            eval_loss=eval_loss,
            max_bytes=self.config.hub_queue_gb * 1e9,
        )
        for drop in dropped:
            self.say("error: not pushed: %s", drop)
        start_drain(self.folder.path)
