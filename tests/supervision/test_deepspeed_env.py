"""``.deepspeed_env``: each line as a shell and DeepSpeed's own launcher read it, or refused."""

import subprocess

import pytest

from codeparrot_ds.errors import UserError
from codeparrot_ds.supervision.deepspeed_env import on_this_host, read_deepspeed_env

HOST = {"OTHER": "there", "HOME": "/home/me"}


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Reads a file of these lines; variables of the host are put in."""
    monkeypatch.delenv("DS_ENV_FILE", raising=False)

    def read(text: str, known=None, host=None):
        (tmp_path / ".deepspeed_env").write_bytes(text if isinstance(text, bytes) else text.encode())
        return on_this_host(read_deepspeed_env([tmp_path], known or {}), HOST if host is None else host)

    return read


SHELL = [
    'A="eth0"',
    "A='eth0'",
    "export A=INFO",
    "export   A='two words'",
    "A=/opt/x/lib:$OTHER",
    'A="/opt/$OTHER/lib"',
    "A=${OTHER}ly",
    "A=$NOT_SET:x",
    "A='$OTHER'",
    r"A=\$OTHER",
    r'A="a \"word\" \\ of \$5"',
    r"A='a\b'",
    r'A="a\b"',
    "A=a'b c'\"d\"e",
    "A=''",
    "A=",
    "A=x=y",
    "A=x#y",
    "A='x # y; z'",
    "A=mlx5_0:1,mlx5_1:1",
    'A={"a":1}',
    'A=\'{"a": [1, "$b"]}\'',
    "A=*",
    "B=1\nA=$B$B",
    "A=1\nA=${A}2",
]
DEEPSPEED = [
    # As a shell reads them too
    *("A=/opt/x/lib:$OTHER", "A=${OTHER}ly", "export A=INFO", 'A="eth0"', r"A=\$OTHER", "A=x=y", "A=x#y", "A=", "A=*"),
    *("A=mlx5_0:1,mlx5_1:1", 'A={"a":1}', "B=1\nA=$B$B"),
    # which a shell would take for a command
    *("A=two words", "A = x", "A=verbs;ofi_rxm", "A=--x=1 --y=2", "A=a(b)"),
]


@pytest.mark.parametrize("text", SHELL)
def test_as_a_shell_reads_it(read, text, tmp_path):
    (tmp_path / "script").write_text(text + '\nprintf %s "$A"')
    said = subprocess.run(["bash", "script"], env=HOST, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert read(text)["A"] == said.stdout


@pytest.mark.parametrize("text", DEEPSPEED)
def test_as_deepspeed_reads_it(read, text):
    """What its runner writes into the command of a host's shell."""
    from deepspeed.launcher.multinode_runner import PDSHRunner

    runner = object.__new__(PDSHRunner)
    runner.exports = {}
    for line in text.splitlines():
        runner.add_export(*line.split("=", maxsplit=1))
    command = "".join(f"export {name}={value}; " for name, value in runner.exports.items()) + 'printf %s "$A"'
    said = subprocess.run(["bash", "-c", command], env=HOST, capture_output=True, text=True, check=True)
    assert read(text)["A"] == said.stdout


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A=1\nexport", "line 2: 'export' is not NAME=value"),
        ("export A", "'export A' is not NAME=value"),
        ("setenv HF_TOKEN plain-words", "'setenv HF_TOKEN …' is not NAME=value"),
        ("DB-PASS: plain-words", "'DB-PASS …' is not NAME=value"),
        ("unset A", "'unset A' is not NAME=value"),
        ("A+=x", "'A+=x' is not NAME=value"),
        ("2A=x", "'2A=x' is not NAME=value"),
        ("setenv A 1", "is not NAME=value"),
        ("declare -x A=1", "is not NAME=value"),
        ('A="x', "the value of A has a quote that is not closed"),
        ("A=it's", "the value of A has a quote that is not closed"),
        ("A=x\\", "or ends in a backslash"),
        ("A=$(hostname)", "has a ` or a $ that is neither $NAME nor ${NAME}"),
        ("A=`hostname`", "has a ` or a $"),
        ("A=${B:-x}", "has a ` or a $"),
        ('A="$1"', "has a ` or a $"),
        ("A=$'a'", "has a ` or a $"),
        ("A=a\\b", "has a backslash outside of quotes"),
        ("A=x # why", "has a # outside of quotes"),
        ("A=~/x", "has a ~, which is left as it is there: write $HOME"),
        ("A=/x:~/y", "has a ~"),
        ("A=1;", "has a ; outside of quotes"),
        ("A=1; B=2", "has a ; outside of quotes"),
        ("export A=1 B=2", "is followed by another variable"),
        ("A='x' y", "has a space outside of its quotes"),
    ],
)
def test_what_cannot_be_read_is_refused_with_file_and_line(read, tmp_path, text, words):
    with pytest.raises(UserError) as caught:
        read(text)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert f"{tmp_path / '.deepspeed_env'}, line {len(text.splitlines())}: " in str(caught.value)


def test_a_value_is_not_shown(read):
    with pytest.raises(UserError) as caught:
        read("HF_TOKEN='hf_secret")
    assert "hf_secret" not in str(caught.value)


def test_comments_blank_lines_and_both_folders(read, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / ".deepspeed_env").write_bytes(b"\xef\xbb\xbfA=1\r\n# ours\r\n\r\nB=x=y\r\n")
    (tmp_path / ".deepspeed_env").write_text("A=$A$B\n")
    assert read_deepspeed_env([tmp_path / "home", tmp_path], {}) == {"A": "1x=y", "B": "x=y"}
    (tmp_path / ".deepspeed_env").write_bytes(b"A=\xff\n")
    with pytest.raises(UserError, match=r"\.deepspeed_env cannot be read: .*0xff"):
        read_deepspeed_env([tmp_path], {})


def test_what_the_run_carries_comes_before_the_hosts_own(read):
    """The host gets it in any case, so that is what the name means there."""
    text = 'LD_LIBRARY_PATH="/opt/x/lib:$LD_LIBRARY_PATH:$OTHER"'
    known = {"LD_LIBRARY_PATH": "/here", "NCCL_DEBUG": "INFO"}
    host = {"LD_LIBRARY_PATH": "/there", "OTHER": "/other"}
    assert read(text, known, host) == {"LD_LIBRARY_PATH": "/opt/x/lib:/here:/other", "NCCL_DEBUG": "INFO"}
    assert read(text, {}, {}) == {"LD_LIBRARY_PATH": "/opt/x/lib::"}
