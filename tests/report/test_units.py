import pytest

from codeparrot_ds.report.units import gigabytes, listed, megabytes, number, percent, short, shown, whole


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (0.0005, "0.0005"), (2e-6, "2e-6"), (3.14159, "3.142"), (999.9, "999.9"), (32768, "32,768"),
        (1.2345e9, "1.234B"), (float("inf"), "inf"),
    ],
)  # fmt: skip
def test_numbers_as_text(value, text):
    assert number(value) == text


def test_what_was_not_measured_is_a_dash():
    assert {write(None) for write in (gigabytes, megabytes, percent, short, whole)} == {"–"}
    assert shown(None, "{:.4f}") == "–" and whole(1.5) == "–"


def test_sizes_and_shares_as_text():
    assert [gigabytes(2**30), gigabytes(0)] == ["1.07 GB", "0.00 GB"]
    assert [megabytes(size) for size in (0, 87e6, 5e9, 1.25e10)] == ["0", "87 MB", "5,000 MB", "12.5 GB"]
    assert [percent(0.25), whole(1234), short(1234.5), shown(0.0821, "{:.1f}", 1000)] == [
        *("25%", "1,234", "1,234", "82.1"),
    ]


@pytest.mark.parametrize(("texts", "text"), [("a", "a"), ("ab", "a and b"), ("abc", "a, b and c")])
def test_lists_as_text(texts, text):
    assert listed(texts) == text
