import os
import platform
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import codeparrot_ds

ROOT = Path(__file__).resolve().parents[1]


def constraints():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def declared():
    """The requirements of setup.py with those of its extra `test`."""
    text = (ROOT / "setup.py").read_text()
    return [Requirement(found) for found in re.findall(r'"([A-Za-z][\w-]*>=[\d.]+)"', text) if "python" not in found]


def test_importing_the_package_is_free_of_torch():
    script = "import sys, codeparrot_ds; assert not {'torch', 'numpy', 'yaml'} & set(sys.modules); dir(codeparrot_ds)"
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("name", codeparrot_ds.__all__)
def test_every_public_name_is_there(name):
    assert callable(getattr(codeparrot_ds, name))
    assert name in dir(codeparrot_ds)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        codeparrot_ds.nothing  # noqa: B018


def test_constraints_are_exact_and_single():
    for version in ("3.10", "3.11", "3.12"):
        names = []
        for pin in constraints():
            assert re.fullmatch(r"==[\w.]+", str(pin.specifier)), pin
            assert "+" not in str(pin.specifier), f"{pin}: a local build of torch is not on the index"
            if pin.marker is None or pin.marker.evaluate({"python_version": version}):
                names.append(canonicalize_name(pin.name))
        assert len(names) == len(set(names))


def test_constraints_satisfy_the_declared_ranges():
    pins = constraints()
    for requirement in declared():
        found = [pin for pin in pins if canonicalize_name(pin.name) == canonicalize_name(requirement.name)]
        assert found, f"{requirement} has no pin"
        for pin in found:
            (version,) = (clause.version for clause in pin.specifier)
            assert requirement.specifier.contains(version), f"{pin} is outside {requirement}"


def test_declared_ranges_admit_the_older_versions_that_are_supported():
    ranges = {requirement.name: requirement.specifier for requirement in declared()}
    assert ranges["torch"].contains("2.11.0") and ranges["transformers"].contains("5.17.0")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from a copy of what is packaged, so that the checkout stays as it is."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("codeparrot_ds", "ds_configs"):
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
        str(source),
    ]
    subprocess.run(command, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def test_the_wheel_carries_the_configs_and_finds_them(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path)
    shipped = {path.name for path in (ROOT / "ds_configs").iterdir()}
    assert {f"codeparrot_ds/ds_configs/{name}" for name in shipped} <= names
    assert "codeparrot_ds/ds_config/known_keys.json" in names
    assert "codeparrot_ds/py.typed" in names  # type checkers read our annotations
    (metadata,) = tmp_path.glob("*.dist-info/METADATA")
    links = re.findall(r"^Project-URL: (\w+), (https://\S+)$", metadata.read_text(), re.MULTILINE)
    assert {name for name, _ in links} == {"DeepSpeed", "Recipe"}
    assert not [name for name in names if name.startswith(("tests", "ds_configs"))]
    command = [sys.executable, "-m", "codeparrot_ds", "check", "zero2", "--device", "cpu"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert str(tmp_path / "codeparrot_ds" / "ds_configs" / "zero2.json") in result.stdout


def test_the_wheel_carries_the_templates_of_pages_and_makes_a_report(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "tokens": 64, "loss": 5.5}\n')
    command = [sys.executable, "-m", "codeparrot_ds", "report", "run"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    for name in ("report.html", "report.md"):
        assert "Run run" in (tmp_path / "run" / "report" / name).read_text()


# launch.sh, on a copy of it whose package installs in a moment: what is tested is the script, not pip.
SETUP = """
from setuptools import setup
setup(name="codeparrot-ds", version="0", packages=["codeparrot_ds"],
      entry_points={"console_scripts": ["codeparrot-ds = codeparrot_ds:main"]}, extras_require={"test": []})
"""
PROGRAM = """
import os, shutil, sys
def main():
    print("arguments", sys.argv[1:], "cwd", os.getcwd(), "python", shutil.which("python"))
    print("called as", os.environ.get("CODEPARROT_DS_COMMAND"))
"""


@pytest.fixture
def checkout(tmp_path):
    root = tmp_path / "a checkout"
    (root / "codeparrot_ds").mkdir(parents=True)
    (root / "codeparrot_ds" / "__init__.py").write_text(PROGRAM)
    (root / "setup.py").write_text(SETUP)
    (root / "constraints.txt").write_text("")
    shutil.copy(ROOT / "launch.sh", root)
    return root


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """An active environment that borrows this interpreter's packages, so that nothing is downloaded.

    Shared by the tests: each has a checkout of its own, for which the environment is not prepared yet.
    """
    folder = tmp_path_factory.mktemp("environment") / "active"
    venv.create(folder, with_pip=True, symlinks=True)
    # What ensurepip brings to Python 3.10 and 3.11 is too old to build a wheel, and would hide the borrowed one.
    uninstall = [folder / "bin" / "python", "-m", "pip", "uninstall", "-y", "setuptools"]
    subprocess.run(uninstall, check=True, capture_output=True)
    purelib = subprocess.run(
        [folder / "bin" / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    own = [path for path in sys.path if path.endswith("-packages")]
    Path(purelib, "borrowed.pth").write_text("\n".join(own) + "\n")
    return folder


def launch(checkout, environment, *arguments, cwd=None, **variables):
    settings = {key: value for key, value in os.environ.items() if key not in ("CONDA_PREFIX", "PYTHONPATH")}
    settings |= {"VIRTUAL_ENV": str(environment), "PIP_NO_BUILD_ISOLATION": "0", **variables}
    return subprocess.run(
        [str(checkout / "launch.sh"), *arguments],
        cwd=cwd or checkout,
        env=settings,
        capture_output=True,
        text=True,
        check=False,
    )


def test_launch_installs_once_and_hands_over(checkout, environment, tmp_path):
    first = launch(checkout, environment, "train", "a b", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert f"arguments ['train', 'a b'] cwd {tmp_path} python {environment}/bin/python" in first.stdout
    assert "installing into" in first.stderr
    second = launch(checkout, environment, cwd="/")
    assert (second.returncode, second.stderr) == (0, "")
    assert "arguments [] cwd /" in second.stdout
    # The commands that the program proposes begin as the user can type them.
    assert f"called as {checkout / 'launch.sh'}\n" in second.stdout
    path = f"{environment / 'bin'}:{os.environ['PATH']}"
    assert "called as \n" in launch(checkout, environment, PATH=path).stdout


def test_launch_installs_again_when_what_it_depends_on_changes(checkout, environment):
    assert launch(checkout, environment).returncode == 0
    (checkout / "constraints.txt").write_text("# newer\n")
    assert "installing into" in launch(checkout, environment).stderr


def test_an_interrupted_installation_is_not_taken_for_a_whole_one(checkout, environment):
    (checkout / "setup.py").write_text("raise SystemExit('interrupted')\n")
    assert launch(checkout, environment).returncode != 0
    assert not list(environment.glob(".codeparrot-ds*"))
    (checkout / "setup.py").write_text(SETUP)
    assert launch(checkout, environment).returncode == 0


def test_launch_test_runs_pytest_in_the_checkout(checkout, environment):
    (checkout / "test_it.py").write_text("def test_it():\n    pass\n")
    result = launch(checkout, environment, "test", "-q", "test_it.py", cwd="/")
    assert "1 passed" in result.stdout, result.stdout + result.stderr
    # The test installation holds all that the plain one does.
    assert launch(checkout, environment).stderr == ""


def test_two_first_calls_do_not_collide(checkout, environment):
    settings = os.environ | {"VIRTUAL_ENV": str(environment), "PIP_NO_BUILD_ISOLATION": "0"}
    settings.pop("PYTHONPATH", None)  # which may name this checkout's own package
    calls = [
        subprocess.Popen(
            [str(checkout / "launch.sh")], env=settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    said = [call.communicate()[1] for call in calls]
    assert [call.returncode for call in calls] == [0, 0], said
    assert sum("installing into" in text for text in said) == 1


def test_an_old_python_is_refused_in_one_sentence(checkout, tmp_path):
    fake = tmp_path / "fake" / "bin"
    fake.mkdir(parents=True)
    (fake / "python").write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.8.1 && exit 0\nexit 1\n')
    (fake / "python").chmod(0o755)
    result = launch(checkout, fake.parent)
    assert result.returncode == 1
    assert result.stderr == f"launch.sh: needs Python 3.10 or newer, and {fake}/python is Python 3.8.1\n"


@pytest.mark.parametrize(
    ("settings", "offered"),
    [({}, True), ({"PIP_EXTRA_INDEX_URL": "https://some.index/cpu"}, False), ({"PIP_FIND_LINKS": "/wheels"}, False)],
    ids=["nothing set", "an index", "a folder"],
)
def test_a_machine_without_a_gpu_is_offered_the_cpu_build(
    checkout, environment, tmp_path, monkeypatch, settings, offered
):
    fake = tmp_path / "without torch" / "bin"
    fake.mkdir(parents=True)
    # All of the environment but its torch; and pip installs nothing.
    (fake / "python").write_text(
        '#!/bin/sh\n[ "$1 $2" = "-c import torch" ] && exit 1\n[ "$4" = install ] && exit 1\n'
        f'exec {environment}/bin/python "$@"\n'
    )
    (fake / "python").chmod(0o755)
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    said = launch(checkout, fake.parent, "train", "a b", PIP_CONFIG_FILE=os.devnull, **settings).stderr
    has_no_gpu = platform.machine() == "x86_64" and not Path("/dev/nvidiactl").exists()
    command = "PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu ./launch.sh train a\\ b\n"
    assert said.endswith(command) == (offered and has_no_gpu)
    assert ("3 GB to fetch" in said) == (offered and has_no_gpu)
