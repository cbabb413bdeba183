import pytest

from codeparrot_ds.ds_config.known_keys import Kind
from tools.known_keys import ANY, BLOCK, BOOL, COUNT, NUMBER, SHARE, SIZE, TEXT, TEXTS, choice, optional, or_auto


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (BOOL, True),
        (SIZE, 0),
        (SIZE, 5e8),
        (COUNT, 1),
        (NUMBER, -1.5),
        (SHARE, 1),
        (TEXT, ""),
        (TEXTS, ["a"]),
        (BLOCK, {}),
        (ANY, None),
        (optional(COUNT), None),
        (or_auto(COUNT), "auto"),
        (choice("bf16", "fp16"), "BF16"),
        (choice(0, 1), 1.0),
        (Kind("numbers", minimum=0, below=1), [0, 0.999]),
    ],
)
def test_right_values(kind, value):
    assert kind.problem(value) is None


@pytest.mark.parametrize(
    ("kind", "value", "said"),
    [
        (BOOL, "true", "is the text 'true'; write true without quotes"),
        (BOOL, 1, "must be true or false, not 1"),
        (BOOL, "maybe", "must be true or false, not the text 'maybe'"),
        (SIZE, "5e8", "is the text '5e8'; write the number without quotes"),
        (SIZE, -1, "must be a whole number at least 0, not -1"),
        (SIZE, 0.5, "must be a whole number at least 0, not 0.5"),
        (SIZE, True, "must be a whole number at least 0, not true"),
        (SIZE, {}, "must be a whole number at least 0, not an object {...}"),
        (SIZE, None, "is null; it must be a whole number at least 0, or remove the key"),
        (NUMBER, float("inf"), "must be a number, not inf"),
        (SHARE, 1.5, "must be a number at least 0 and at most 1, not 1.5"),
        (TEXT, 1, "must be text in quotes, not 1"),
        (TEXTS, "a", "must be a list of texts, not 'a'"),
        (TEXTS, [1], "must be a list of texts, not [1]"),
        (BLOCK, True, "must be an object {...}, not true"),
        (choice("bf16", "fp16"), "bf61", "cannot be 'bf61'; did you mean 'bf16'?"),
        (choice("bf16", "fp16"), 16, "must be one of bf16, fp16, not 16"),
        (choice(0, 1, 2), 7, "must be one of 0, 1, 2, not 7"),
        (choice(0, 1, 2), "1", "is the text '1'; write the number without quotes"),
        (Kind("texts", choices=("z1", "z3")), ["z2"], "must be a list of some of z1, z3, not ['z2']"),
        (
            Kind("numbers", minimum=0, below=1),
            [0.9, 1],
            "must be a list of numbers at least 0 and below 1, not [0.9, 1]",
        ),
    ],
)
def test_wrong_values(kind, value, said):
    assert kind.problem(value) == said
