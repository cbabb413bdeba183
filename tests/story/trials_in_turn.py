"""One rank that runs several trials of comparisons one after the other, as ``train_in_turn.py`` does with runs.

Started by a launcher with the folders of trials that ``prepare_trial`` made.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from codeparrot_ds.compare.trial import Orders, run_trial
from codeparrot_ds.config.files import load_config
from codeparrot_ds.engine.ranks import leave_ranks
from codeparrot_ds.supervision.process_end import end_process


def main(places: list[str]) -> None:
    for place in places:
        orders = Orders(**json.loads((Path(place) / "orders.json").read_text()))
        run_trial(load_config(str(Path(place) / "config.yaml")), orders)
    leave_ranks()


if __name__ == "__main__":
    main(sys.argv[1:])
    end_process(0)
