"""What is wrong with the ranks, judged by their guards' reports: one is lost, or all wait for one. No torch here.

The limits are learned: ten times the longest that any rank stayed in one place of a step (a micro-batch's forward pass,
say) since its first step, at least `FLOOR_SECONDS` and at most the ceiling. A start, an evaluation, a save and the end
of a run have a limit of their own. A process that somebody has stopped (SIGSTOP) gets `FLOOR_SECONDS`, for it does not
continue by itself.
"""

from __future__ import annotations

import dataclasses
import signal
import time

from codeparrot_ds.supervision.control import SILENCE_SECONDS, RankView
from codeparrot_ds.supervision.heartbeat import STEP_PHASES, Place

FAILED, LOST, HUNG = 1, 4, 5
"""Exit codes: something broke, a rank or host is lost, the ranks hang. 2 and 3 are the ranks' own."""
FLOOR_SECONDS = 30.0
START_SECONDS = 1800.0
"""For a start, with its compilations, at least."""
FACTOR = 10.0
GONE_SECONDS = 1.0
"""After a guard disappeared without an exit code: its launcher, which knows more, may end within this time."""
FAILED_SECONDS = 3.0
"""Time for the other ranks to write their own errors after one has failed."""
OWN_WORDS_SECONDS = 20.0
"""The same after an exit code that every rank comes to by itself: a mistake of the user's, or too many bad steps."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """What is wrong."""

    code: int
    """Exit code of the run."""
    sentence: str
    """Names rank, host, phase and step."""
    hosts: tuple[str, ...] = ()
    """Those that have not responded."""
    dump: bool = False
    """Whether the stacks of the living ranks say more."""


class Watchdog:
    """Judges the ranks; ``ceiling_seconds`` bounds every limit but that of a start."""

    def __init__(self, ceiling_seconds: float) -> None:
        self.ceiling_seconds = ceiling_seconds
        self._failed_at: float | None = None

    def judge(self, ranks: dict[int, RankView], now: float | None = None) -> Verdict | None:
        """The first thing that is wrong with the ranks; None while they are well."""
        now = time.monotonic() if now is None else now
        silence = min(SILENCE_SECONDS, self.ceiling_seconds)
        return self._ended(ranks, now) or _silent(ranks, now, silence) or self._stuck(ranks, now)

    def limit_seconds(self, ranks: dict[int, RankView], place: Place) -> float:
        """How long a rank may stay in a place."""
        if place.phase == "start" or place.steps_done < 2:
            return max(START_SECONDS, self.ceiling_seconds)
        if place.phase not in STEP_PHASES:
            return self.ceiling_seconds
        longest = max(view.place.longest_seconds for view in ranks.values() if view.place is not None)
        return min(self.ceiling_seconds, max(FLOOR_SECONDS, FACTOR * longest))

    def _ended(self, ranks: dict[int, RankView], now: float) -> Verdict | None:
        for rank, view in ranks.items():
            if view.exit_code is not None and view.exit_code < 0:
                name = signal.Signals(-view.exit_code).name
                hint = "; the system may have run out of memory" if name == "SIGKILL" else ""
                return Verdict(code=LOST, sentence=f"{_who(rank, view)} was killed by {name} {view.place}{hint}")
        failed = {rank: view for rank, view in ranks.items() if view.exit_code}
        if failed:
            self._failed_at = self._failed_at or now
            codes = {view.exit_code for view in failed.values()}
            patience = FAILED_SECONDS if FAILED in codes else OWN_WORDS_SECONDS
            living = [rank for rank, view in ranks.items() if view.exit_code is None and view.gone is None]
            if living and now - self._failed_at > patience:
                rank, view = next(iter(failed.items()))
                code = view.exit_code or FAILED
                return Verdict(code=code, sentence=f"{_who(rank, view)} failed {view.place} (exit code {code})")
            return None
        gone = {
            rank: view
            for rank, view in ranks.items()
            if view.exit_code is None and view.gone is not None and now - view.gone > GONE_SECONDS
        }
        if gone:
            rank, view = next(iter(gone.items()))
            sentence = f"{_who(rank, view)} disappeared without an exit code; it was {view.place}"
            return Verdict(code=LOST, sentence=sentence)
        return None

    def _stuck(self, ranks: dict[int, RankView], now: float) -> Verdict | None:
        if any(view.exit_code or (view.exit_code is None and view.gone is not None) for view in ranks.values()):
            return None  # what the others wait for is known, and its time is counted above
        living = {rank: view for rank, view in ranks.items() if view.exit_code is None and view.place is not None}
        stuck = {}
        for rank, view in living.items():
            assert view.place is not None
            stopped_seconds = 0.0 if view.stopped is None else now - view.stopped
            if view.place.seconds + now - view.heard > self.limit_seconds(living, view.place) or stopped_seconds > min(
                FLOOR_SECONDS, self.ceiling_seconds
            ):
                stuck[rank] = view
        # A rank that is further on waits for the others, and may have got there later than they hang.
        if not stuck:
            return None
        return _name_the_stuck(living, max(view.place.seconds for view in stuck.values() if view.place))


def _silent(ranks: dict[int, RankView], now: float, limit_seconds: float) -> Verdict | None:
    silent = {
        rank: view
        for rank, view in ranks.items()
        if view.exit_code is None and view.gone is None and now - view.heard > limit_seconds
    }
    if not silent:
        return None
    hosts = tuple(dict.fromkeys(view.host for view in silent.values()))
    rank, view = next(iter(silent.items()))
    whole = [host for host in hosts if all(r in silent for r, other in ranks.items() if other.host == host)]
    seconds = now - view.heard
    if whole:
        numbers = ", ".join(str(rank) for rank, view in silent.items() if view.host in whole)
        return Verdict(
            code=LOST,
            sentence=f"host {', '.join(whole)} (rank {numbers}) has not responded for {seconds:.0f} s, last "
            f"{view.place}: it is down, or the network to it is",
            hosts=tuple(whole),
        )
    sentence = f"the guard of {_who(rank, view)} has not responded for {seconds:.0f} s; the rank was {view.place}"
    return Verdict(code=LOST, sentence=sentence)


def _name_the_stuck(living: dict[int, RankView], seconds: float) -> Verdict:
    """The sentence for a hang: the culprit is a stopped process, or who is furthest behind."""
    stopped = [rank for rank, view in living.items() if view.stopped is not None]
    places = {rank: view.place for rank, view in living.items() if view.place is not None}
    last = min(place.changes for place in places.values())
    behind = [rank for rank, place in places.items() if place.changes == last]
    culprits = stopped or (behind if len(behind) < len(living) else [])
    if not culprits:
        place = next(iter(places.values()))
        return Verdict(
            code=HUNG,
            sentence=f"all {len(living)} ranks hang {place}, for {seconds:.0f} s: the network, or a device",
            dump=True,
        )
    names = ", ".join(_who(rank, living[rank]) for rank in culprits)
    what = "is a stopped process" if stopped else "hangs"
    others = sorted({str(places[rank]) for rank in living if rank not in culprits})
    waiting = f"; the others wait {' and '.join(others)}" if others else ""
    place = places[culprits[0]]
    return Verdict(
        code=HUNG, sentence=f"{names} {what} {place}, for {max(seconds, place.seconds):.0f} s{waiting}", dump=True
    )


def _who(rank: int, view: RankView) -> str:
    return f"rank {rank} on {view.host} (process {view.pid})"
