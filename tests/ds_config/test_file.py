import json

import pytest

from codeparrot_ds.ds_config.facts import leaves
from codeparrot_ds.ds_config.file import line_of, read_ds_config, read_hjson
from tools.ds_configs import catalogue, render


def test_lines_of_keys_in_blocks_lists_and_odd_texts():
    text = r"""{
  "a": {"b": -1.5e3,
        "c\"}": "text with { , : \" \\"},
  "list": [1, {"d": null}, [{"e": true}],
           {"d": {}}],

  "last": []
}"""
    config, lines = read_hjson(text)
    assert config == json.loads(text)
    assert lines == {
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
    _, lines = read_hjson(text)
    for path, _ in leaves(config):
        assert f'"{path[-1]}":' in text.splitlines()[lines[path] - 1]


def test_a_missing_key_stands_where_its_block_does():
    _, lines = read_hjson('{\n "a": {\n "b": 1}}')
    assert line_of(lines, ("a", "b")) == 3
    assert line_of(lines, ("a", "missing")) == 2
    assert line_of(lines, ("other",)) is None


HJSON = """# of the cluster
{
  // ZeRO-2 for one node
  "zero_optimization": {"stage": 2, /* overlap
     needs memory */ "overlap_comm": true,},
  'bf16':
    {enabled: true
     check_grad_overflow: false}
  "optimizer": {"type": AdamW
    "params": {"betas": [0.9, 0.95,], eps: 1e-8}},
}
"""


def test_comments_commas_and_texts_without_quotes_are_read_as_deepspeed_reads_them(tmp_path):
    import hjson

    config, lines = read_hjson(HJSON)
    assert config == hjson.loads(HJSON)
    assert config["zero_optimization"] == {"stage": 2, "overlap_comm": True}
    assert config["optimizer"] == {"type": "AdamW", "params": {"betas": [0.9, 0.95], "eps": 1e-8}}
    assert {".".join(path): line for path, line in lines.items()} == {
        **{"zero_optimization": 4, "zero_optimization.stage": 4, "zero_optimization.overlap_comm": 5},
        **{"bf16": 6, "bf16.enabled": 7, "bf16.check_grad_overflow": 8},
        **{"optimizer": 9, "optimizer.type": 9, "optimizer.params": 10},
        **{"optimizer.params.betas": 10, "optimizer.params.eps": 10},
    }


def test_a_file_without_braces_and_one_of_comments_alone():
    assert read_hjson("zero_optimization: {\n  stage: 2\n}\n")[1] == {
        ("zero_optimization",): 1,
        ("zero_optimization", "stage"): 2,
    }
    assert read_hjson("// nothing yet\n") == ({}, {})


def read(tmp_path, text):
    path = tmp_path / "c.json"
    path.write_text(text)
    return read_ds_config(path)


def test_notes_are_left_out_where_deepspeed_ignores_them_and_stay_where_it_refuses_them(tmp_path):
    file = read(tmp_path, '{"_comment": "x", "_bf16": {"on": 1}, "aio": {"_n": 1}, "zero_optimization": {"_n": 1}}')
    assert file.config == {"aio": {}, "zero_optimization": {"_n": 1}}


def test_values_of_another_type_become_what_deepspeed_takes_them_for(tmp_path):
    text = """{
      "zero_optimization": {"stage": 3, "overlap_comm": "yes", "sub_group_size": "1000", "contiguous_gradients": 0},
      "bf16": {"enabled": "True"}, "wall_clock_breakdown": 0, "prescale_gradients": "no", "gradient_clipping": "1"
    }"""
    file = read(tmp_path, text)
    assert file.config == {
        "zero_optimization": {
            **{"stage": 3, "overlap_comm": True, "sub_group_size": 1000, "contiguous_gradients": False}
        },
        "bf16": {"enabled": True},
        "wall_clock_breakdown": False,
        # By hand it reads these as they stand: any text is true.
        "prescale_gradients": "no",
        "gradient_clipping": "1",
    }
    assert [(".".join(path), words) for path, _, words in file.converted][:2] == [
        ("zero_optimization.overlap_comm", 'is "yes", which DeepSpeed takes for true; write that'),
        ("zero_optimization.sub_group_size", 'is "1000", which DeepSpeed takes for 1000; write that'),
    ]
    assert len(file.converted) == 5
    assert read(tmp_path, '{"zero_optimization": true}').config == {"zero_optimization": {"stage": 1}}
