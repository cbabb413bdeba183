"""Twenty kills with SIGKILL, a third of them in a save: each run ends as if nothing had happened.

``benchmarks/torture.py`` does the same with hundreds and at other stages. One kill alone is one case:

    pytest "tests/torture/test_kills.py::test_the_run_ends_as_if_nothing_had_happened[zero2, one rank while saving]"
"""

from __future__ import annotations

import concurrent.futures
import random

import pytest

from tests.needs import needed, needs
from tests.torture.kills import TARGETS, Course, Kill, Torture, figures, lay_course

SEEDS = {"zero2": 5, "zero3": 6}
TRAINING = {"zero2": ("one rank", "launcher"), "zero3": ("all ranks", "command")}
CASES = [
    (deepspeed, moment, target)
    for deepspeed in SEEDS
    for moment, targets in (("saving", TARGETS), ("training", TRAINING[deepspeed]), ("starting", TARGETS))
    for target in targets
]
TITLES = [f"{deepspeed}, {target} while {moment}" for deepspeed, moment, target in CASES]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def kills(request, tmp_path_factory) -> dict[tuple[str, str, str], Kill]:
    """The kills of the chosen cases in a random order, several in a run, both stages side by side."""
    room = tmp_path_factory.mktemp("torture")
    folder, chosen = lay_course(room / "course"), needed(request, "kills")

    def torment(deepspeed: str) -> list[Kill]:
        draw = random.Random(SEEDS[deepspeed])
        plan = [(moment, target) for stage, moment, target in chosen if stage == deepspeed]
        plan = draw.sample(plan, len(plan))
        course = Course(folder=folder, deepspeed=deepspeed, steps=12 if len(plan) == 1 else 40)
        torture = Torture(course, room / deepspeed, SEEDS[deepspeed], plan)
        for kill in torture.torment(len(plan)):
            print(f"{deepspeed}, seed {SEEDS[deepspeed]}: {kill}")
        assert len(torture.kills) == len(plan), torture.problems  # it stops at a run that does not end
        return torture.kills

    stages = list(dict.fromkeys(stage for stage, _, _ in chosen))
    with concurrent.futures.ThreadPoolExecutor() as pool:
        found = zip(stages, pool.map(torment, stages), strict=True)
        return {(stage, kill.moment, kill.target): kill for stage, kills in found for kill in kills}


@pytest.mark.parametrize(("deepspeed", "moment", "target"), CASES, ids=TITLES)
@needs(kills=lambda deepspeed, moment, target: [(deepspeed, moment, target)])
def test_the_run_ends_as_if_nothing_had_happened(kills, deepspeed, moment, target):
    """Its rows, its last checkpoint and its weights are those of a run that nobody killed, bit for bit."""
    assert kills[deepspeed, moment, target].problems == []


@needs(kills=CASES)
def test_a_third_of_the_kills_came_in_a_save(kills):
    done = figures(list(kills.values()))
    assert done["kills"] == len(CASES) == 20 and done["in a save"] >= len(CASES) / 3, done
