"""One rank that trains several runs one after the other: they share one launch, which takes longer than their steps.

Started by a launcher, as ``codeparrot_ds.train`` is, with a JSON file of the runs' options; the process group stays up
between them. Rank 0 writes their outcomes beside that file. A run whose folder's name is in ``SAVED_BY_DEEPSPEED_TOO``
has its engine save into its folder ``deepspeed`` as well, as a loop of the user's own does.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from codeparrot_ds.config.arguments import ArgumentParser, add_config_arguments, config_from_arguments
from codeparrot_ds.engine.ranks import leave_ranks
from codeparrot_ds.supervision.process_end import end_process
from codeparrot_ds.training.loop import train
from codeparrot_ds.training.session import Session

SAVED_BY_DEEPSPEED_TOO = ("zero3_fp32-on-2",)


def save(session: Session, step: int) -> None:
    """``Session.save``, and the engine's own."""
    plain_save(session, step)
    if session.folder.name in SAVED_BY_DEEPSPEED_TOO:
        session.engine.save_checkpoint(str(session.folder.path / "deepspeed"))


plain_save, Session.save = Session.save, save  # type: ignore[method-assign]


def main(file: Path) -> None:
    parser = ArgumentParser()
    add_config_arguments(parser)
    outcomes = []
    for arguments in json.loads(file.read_text()):
        outcomes.append(train(config_from_arguments(parser.parse_args(arguments))))
    leave_ranks()
    if os.environ["RANK"] == "0":
        file.with_suffix(".outcomes.json").write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    end_process(0)
