"""The one peak that all trials of a comparison are held against for MFU, measured once and kept. No torch here.

A trial that measured its own would be held against what the machine had to spare at that moment, in its own precision:
then of two configs the faster one could have the lower MFU.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from codeparrot_ds import durable
from codeparrot_ds.child_process import last_words, run_module
from codeparrot_ds.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Peak:
    """FLOP/s of dense matrix products.

    Attributes:
        flops: of a device, or of all cores of a machine without any.
        source: where the number comes from.
        whole_machine: whether it is all cores', however many ranks share them.
    """

    flops: float
    source: str
    whole_machine: bool

    def of_ranks(self, world_size: int) -> float:
        """What so many ranks have together."""
        return self.flops if self.whole_machine else self.flops * world_size


def peak_of_comparison(file: Path, device: str) -> Peak:
    """The peak that a comparison's ``comparison.json`` has, measured and written there first where it has none.

    Raises:
        UserError: it could not be measured.
    """
    known = recorded_peak(file)
    if known is not None:
        return known
    process = run_module("codeparrot_ds.engine.hardware", device)
    if process.returncode != 0:
        raise UserError(f"the peak of this machine could not be measured: {last_words(process)}")
    peak = Peak(**json.loads(process.stdout))
    durable.write_json(file, json.loads(file.read_text(encoding="utf-8")) | {"peak": asdict(peak)})
    return peak


def recorded_peak(file: Path) -> Peak | None:
    """The peak that a ``comparison.json`` has; None where there is none."""
    if not file.is_file():
        return None
    found = json.loads(file.read_text(encoding="utf-8")).get("peak")
    return None if found is None else Peak(**found)
