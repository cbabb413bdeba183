import json

import pytest

from codeparrot_ds.ds_config.facts import leaves
from codeparrot_ds.ds_config.file import key_lines, line_of
from tools.ds_configs import catalogue, render


def test_lines_of_keys_in_blocks_lists_and_odd_texts():
    text = r"""{
  "a": {"b": -1.5e3,
        "c\"}": "text with { , : \" \\"},
  "list": [1, {"d": null}, [{"e": true}],
           {"d": {}}],

  "last": []
}"""
    json.loads(text)
    assert key_lines(text) == {
        ("a",): 2,
        ("a", "b"): 2,
        ("a", 'c"}'): 3,
        ("list",): 4,
        ("list", "1", "d"): 4,
        ("list", "2", "0", "e"): 4,
        ("list", "3", "d"): 5,
        ("last",): 7,
    }


@pytest.mark.parametrize("name", catalogue())
def test_every_key_of_a_shipped_file_is_on_its_line(name):
    config = catalogue()[name].config
    text = render(config)
    lines = key_lines(text)
    for path, _ in leaves(config):
        assert f'"{path[-1]}":' in text.splitlines()[lines[path] - 1]


def test_a_missing_key_stands_where_its_block_does():
    lines = key_lines('{\n "a": {\n "b": 1}}')
    assert line_of(lines, ("a", "b")) == 3
    assert line_of(lines, ("a", "missing")) == 2
    assert line_of(lines, ("other",)) is None
