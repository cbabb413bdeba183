"""The ranking of speeds: medians, spread, ties and the Pareto front."""

from codeparrot_ds.compare.findings import Speed, pareto, ranked, speed_of


def speed(median, low, high):
    return Speed(median=median, low=low, high=high, steps=10, trials=2)


def test_the_median_is_of_all_steps_and_the_spread_of_the_trials_quartiles():
    found = speed_of([[100.0, 102.0, 104.0, 106.0, 108.0], [90.0, 91.0, 92.0, 93.0, 94.0]])
    assert found == Speed(median=97.0, low=91.0, high=106.0, steps=10, trials=2)


def test_trials_without_a_scored_step_do_not_count():
    assert speed_of([]) is None and speed_of([[]]) is None
    assert speed_of([[], [100.0], [100.0]]) == Speed(median=100.0, low=100.0, high=100.0, steps=2, trials=2)


def test_one_slow_step_does_not_widen_the_spread():
    assert speed_of([[1.0, *[100.0] * 9], [100.0] * 10]).low == 100.0


def test_one_trial_does_not_show_how_processes_differ():
    assert speed_of([[], [100.0] * 9]) == Speed(median=100.0, low=95.0, high=105.0, steps=9, trials=1)
    wide = speed_of([[50.0, 60.0, 100.0, 140.0, 150.0]])
    assert (wide.low, wide.high) == (60.0, 140.0)
    assert speed_of([[106.0] * 9]).tied(speed_of([[100.0] * 9]))
    assert not speed_of([[106.0] * 9] * 2).tied(speed_of([[100.0] * 9] * 2))


def test_tied_where_the_spreads_overlap_whichever_is_asked():
    steady, wide, slow = speed(100, 99, 101), speed(94, 89, 99.5), speed(80, 79, 81)
    assert wide.tied(steady) and steady.tied(wide)
    assert not slow.tied(steady) and not wide.tied(slow)


def test_a_search_goes_on_where_neither_median_lies_in_the_others_spread():
    steady, wide, near = speed(100, 99, 101), speed(94, 89, 99.5), speed(99.2, 98, 100)
    assert steady.passes(wide) and not wide.passes(steady) and not steady.passes(near)


def test_the_ranking_falls_and_names_ties():
    speeds = {"slow": speed(80, 79, 81), "wide": speed(95, 90, 101), "steady": speed(100, 99, 101)}
    assert ranked(speeds) == [("steady", ["wide"]), ("wide", ["steady"]), ("slow", [])]


def test_the_front_has_what_no_other_beats_in_both():
    points = {
        "small": (1.0, 50.0),
        "fast": (3.0, 100.0),
        "beaten": (3.0, 90.0),
        "equal": (1.0, 50.0),
        "big": (9.0, 99.0),
    }
    assert pareto(points) == ["small", "equal", "fast"]
