"""One rank that trains several runs one after the other: they share one launch, which takes longer than their steps.

Started by a launcher, as ``codeparrot_ds.train`` is, with a JSON file of the runs' options; the process group stays up
between them. Rank 0 writes their outcomes beside that file.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from codeparrot_ds.config import ArgumentParser, add_config_arguments, config_from_arguments
from codeparrot_ds.run.ranks import end_process, leave_ranks
from codeparrot_ds.train import train


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
