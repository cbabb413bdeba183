"""Hostfiles and filters: what is read, and what is refused with file, line and nearest choice."""

from pathlib import Path

import pytest

from codeparrot_ds.errors import UserError
from codeparrot_ds.launch.hostfile import Host, include_option, read_hostfile, select, write_hostfile

HOSTS = [Host(name="alpha", slots=(0, 1)), Host(name="beta", slots=(0, 1, 2, 3)), Host(name="node-3.lab", slots=(0,))]
TEXT = """
# the lab
alpha slots=2   # two GPUs
beta\tslots=4

  node-3.lab slots=1
"""


@pytest.fixture
def hostfile(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "hosts"
        path.write_text(text)
        return path

    return write


def test_comments_and_blank_lines_are_skipped(hostfile):
    assert read_hostfile(hostfile(TEXT)) == HOSTS


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("alpha slots=2\nalpha slots=4\n", "line 2: alpha is on line 1 already"),
        ("alpha slots=0\n", "line 1: slots=0: must be the number of ranks on alpha, at least 1"),
        ("alpha slots=two\n", "line 1: slots=two"),
        ("alpha slots=-1\n", "line 1: slots=-1"),
        ("\nalpha\n", "line 2: 'alpha' is not `host slots=N`, as in `alpha slots=8`"),
        ("alpha:4\n", "line 1: 'alpha:4' is not `host slots=N`, as in `alpha slots=8`"),
        ("alpha slots=2 max-slots=4\n", "line 1: 'alpha slots=2 max-slots=4' is not"),
        ("me@alpha slots=2\n", "line 1: 'me@alpha' is not a host's name"),
        ("alpha,beta slots=2\n", "line 1: 'alpha,beta' is not a host's name"),
        ("-oProxyCommand=x slots=2\n", "line 1: '-oProxyCommand=x' is not a host's name"),
        ("# alpha slots=2\n\n", "names no host"),
        ("", "names no host"),
    ],
)
def test_a_wrong_line_is_named(hostfile, text, words):
    path = hostfile(text)
    with pytest.raises(UserError) as caught:
        read_hostfile(path)
    assert words in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_is_no_local_run(tmp_path):
    with pytest.raises(UserError, match="does not exist: DeepSpeed would quietly train on this machine alone"):
        read_hostfile(tmp_path / "absent")
    with pytest.raises(UserError, match="is not a file"):
        read_hostfile(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read"):
        read_hostfile(tmp_path / "binary")


def test_marks_of_other_systems_are_no_part_of_a_name(tmp_path):
    (tmp_path / "hosts").write_bytes(b"\xef\xbb\xbfalpha slots=2\r\nbeta slots=4\r\n")
    assert [host.name for host in read_hostfile(tmp_path / "hosts")] == ["alpha", "beta"]


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, {"alpha": (0, 1), "beta": (0, 1, 2, 3), "node-3.lab": (0,)}),
        ({"include": "beta:2,0@alpha"}, {"alpha": (0, 1), "beta": (0, 2)}),
        ({"exclude": "beta@alpha:1"}, {"alpha": (0,), "node-3.lab": (0,)}),
        ({"exclude": "node-3.lab:0"}, {"alpha": (0, 1), "beta": (0, 1, 2, 3)}),
        ({"num_gpus": 1}, {"alpha": (0,), "beta": (0,), "node-3.lab": (0,)}),
    ],
)
def test_filters(options, kept):
    assert {host.name: host.slots for host in select(HOSTS, **options)} == kept


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"include": "aplha"}, "--include aplha: there is no host 'aplha'; did you mean 'alpha'?"),
        ({"exclude": "gamma-99"}, "there is no host 'gamma-99'; choose one of alpha, beta, node-3.lab"),
        (
            {"include": "alpha:2"},
            "alpha has no slot '2'; its slots: 0, 1: write alpha:0, or slots=3 for it in the host",
        ),
        ({"include": "alpha:2,3"}, "no slot '2'; its slots: 0, 1: write alpha:0,1, or slots=4 for it in the hostfile"),
        ({"include": "alpha:0,3"}, "no slot '3'; its slots: 0, 1: write alpha:0,1, or slots=4 for it in the hostfile"),
        ({"exclude": "alpha:2"}, "no slot '2'; its slots: 0, 1: only those can be left out, as in alpha:1"),
        ({"include": "alpha:"}, "alpha has no slot ''"),
        ({"include": "alpha:x"}, "alpha has no slot 'x'; its slots: 0, 1; slots are numbers joined by ','"),
        ({"include": "alpha:0-1"}, "alpha has no slot '0-1'; its slots: 0, 1; slots are numbers joined by ','"),
        (
            {"include": "alpha:0,beta:1"},
            "alpha has no slot 'beta:1'; its slots: 0, 1; slots are numbers joined by ',' and",
        ),
        ({"include": "0,1"}, "--include 0,1: '0,1' names slots without their host: write alpha:0,1"),
        ({"include": "2,3"}, "'2,3' names slots without their host: write beta:2,3"),
        ({"exclude": "alpha:0@1"}, "'1' names slots without their host: write alpha:1"),
        ({"include": ":0,1"}, "a host's name is missing; the form is a:0,2@b: write alpha:0,1"),
        ({"include": "alpha,beta"}, "hosts are joined by '@', as in alpha@beta"),
        ({"include": "alpha beta"}, "hosts are joined by '@', as in alpha@beta"),
        ({"include": "alpha@alpha:1"}, "alpha is named twice"),
        ({"include": "alpha@"}, "a host's name is missing"),
        ({"include": ""}, "a host's name is missing"),
        ({"exclude": "alpha@beta@node-3.lab"}, "leaves no host"),
        ({"include": "alpha", "exclude": "beta"}, "do not go together"),
        ({"include": "alpha", "num_gpus": 1}, "--num-gpus and --include do not go together"),
        ({"num_gpus": 2}, "--num-gpus 2: node-3.lab has 1 slot(s)"),
    ],
)
def test_a_wrong_filter_is_refused(options, words):
    with pytest.raises(UserError) as caught:
        select(HOSTS, **options)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_deepspeed_reads_the_same(tmp_path):
    from deepspeed.launcher.runner import fetch_hostfile, parse_inclusion_exclusion

    chosen = select(HOSTS, include="beta:1,3@alpha")
    write_hostfile(chosen, tmp_path / "hosts")
    pool = fetch_hostfile(str(tmp_path / "hosts"))
    resources = parse_inclusion_exclusion(pool, include_option(chosen), "")
    assert {name: tuple(slots) for name, slots in resources.items()} == {host.name: host.slots for host in chosen}
    assert list(resources) == ["alpha", "beta"]
