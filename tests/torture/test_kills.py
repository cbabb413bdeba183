"""Twenty kills with SIGKILL, a third of them in a save: each run ends as if nothing had happened."""

import concurrent.futures

import pytest

from tests.torture.kills import Course, Torture, figures, lay_course

SEEDS = {"zero2": 5, "zero3": 6}
KILLS = 10  # of each


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_runs_that_are_killed_again_and_again(tmp_path):
    """At two stages side by side; ``benchmarks/torture.py`` does the same with hundreds and at others."""
    course = lay_course(tmp_path / "course")

    def torment(deepspeed: str) -> Torture:
        torture = Torture(Course(folder=course, deepspeed=deepspeed), tmp_path / deepspeed, SEEDS[deepspeed])
        for kill in torture.torment(KILLS):
            print(f"{deepspeed}, seed {SEEDS[deepspeed]}: {kill}")
        return torture

    with concurrent.futures.ThreadPoolExecutor() as pool:
        tortures = list(pool.map(torment, SEEDS))
    assert [problem for torture in tortures for problem in torture.problems] == []
    assert all(torture.runs >= 1 for torture in tortures)
    done = figures([kill for torture in tortures for kill in torture.kills])
    assert done["kills"] == 2 * KILLS and done["in a save"] >= 2 * KILLS / 3, done
