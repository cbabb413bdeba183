"""The local bare repository, with real git in an empty home."""

import os
import subprocess
from pathlib import Path

import pytest

from codeparrot_ds.errors import UserError
from codeparrot_ds.hub.local_git import LocalRepository
from codeparrot_ds.hub.places import open_repository
from tests.hub.pushing import export, read_file


@pytest.fixture(autouse=True)
def empty_home(tmp_path, monkeypatch):
    """No identity, no config, and the variables of a surrounding git command that must not redirect ours."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere.git"))
    for name in ("XDG_CONFIG_HOME", "GIT_AUTHOR_NAME", "GIT_COMMITTER_NAME", "GIT_AUTHOR_EMAIL", "EMAIL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def repository(tmp_path):
    repository = LocalRepository(tmp_path / "runs" / "hub.git")
    repository.create()
    return repository


def git(*arguments: str | Path) -> str:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    done = subprocess.run(["git", *map(str, arguments)], capture_output=True, text=True, env=environment, check=True)
    return done.stdout.strip()


def test_its_commands_survive_being_pasted(tmp_path):
    repository = LocalRepository(tmp_path / "my runs" / "hub.git")
    repository.create()
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    readme = read_file(repository, "main", "README.md").decode()
    (cloning,) = [line.strip() for line in readme.splitlines() if "git clone" in line]
    for command in (repository.how_to_get("main"), cloning.replace("BRANCH", "main") + " again"):
        subprocess.run(["sh", "-c", command], cwd=tmp_path, env=environment, capture_output=True, check=True)
    assert (tmp_path / "model" / "README.md").is_file() and (tmp_path / "again" / "README.md").is_file()


def checkpoint(repository: LocalRepository, branch: str, folder: Path, step: int) -> str:
    repository.create_branch(branch)
    return repository.commit_folder(branch, export(folder, weights=b"%d" % step), f"step {step}", f"Step: {step}")


def test_create_makes_a_bare_repository_with_main_once(repository):
    first = repository.head("main")
    repository.create()
    assert repository.branches() == ["main"]
    assert repository.head("main") == first
    assert b"git clone -b BRANCH" in read_file(repository, "main", "README.md")
    assert git("--git-dir", repository.path, "rev-parse", "--is-bare-repository") == "true"
    assert [path.name for path in repository.path.parent.iterdir()] == ["hub.git"]  # no staging folder is left


def test_a_commit_is_exactly_the_folder_and_a_plain_clone_gives_it(repository, tmp_path):
    repository.create_branch("brave-fox-1")
    weights = os.urandom(3 << 20)  # over core.bigFileThreshold: git streams it
    files = {"model.safetensors": weights, "config.json": b"{}\r\n", "sub__a__vocab": b"a", ".gitattributes": b"* text"}
    first = repository.commit_folder("brave-fox-1", export(tmp_path / "one", **files), "step 1", "Step: 1")
    second = repository.commit_folder("brave-fox-1", export(tmp_path / "two", weights=b"2"), "step 2\nof many", "")

    git("clone", "-q", "-b", "brave-fox-1", repository.path, tmp_path / "clone")
    assert sorted(path.name for path in (tmp_path / "clone").iterdir()) == [".git", "weights"]
    for name, content in files.items():
        assert read_file(repository, first, name.replace("__", "/")) == content
    log = repository.commits("brave-fox-1")
    assert [(commit.id, commit.title) for commit in log[:2]] == [(second, "step 2 of many"), (first, "step 1")]
    assert log[1].trailer("Step") == "1" and log[0].trailer("Step") is None
    assert log[2].id == repository.head("main")
    git("--git-dir", repository.path, "fsck", "--strict")


def test_a_commit_onto_a_branch_that_moved_meanwhile_is_refused(repository, tmp_path, monkeypatch):
    checkpoint(repository, "run-a", tmp_path / "a", 1)
    stale = repository.head("run-a")
    newest = checkpoint(repository, "run-a", tmp_path / "a", 2)
    monkeypatch.setattr(LocalRepository, "head", lambda self, branch: stale)
    with pytest.raises(UserError, match="run-a.*not moved"):
        repository.commit_folder("run-a", tmp_path / "a", "step 3")
    monkeypatch.undo()
    assert git("--git-dir", repository.path, "rev-parse", "run-a") == newest


def test_the_locks_of_a_killed_git_do_not_stop_later_pushes(repository, tmp_path, monkeypatch):
    monkeypatch.setattr("codeparrot_ds.hub.local_git._STALE_LOCK_SECONDS", 0.01)
    repository.create_branch("run-a")
    (repository.path / "refs" / "heads" / "run-a.lock").write_text("")
    (repository.path / "HEAD.lock").write_text("")
    tip = checkpoint(repository, "run-a", tmp_path / "a", 1)
    assert repository.head("run-a") == tip
    repository.merge("run-a")


def test_merge_shows_the_branch_on_main_with_both_histories(repository, tmp_path):
    before = repository.head("main")
    tip = checkpoint(repository, "run-a", tmp_path / "a", 1)
    merged = repository.merge("run-a")
    assert git("--git-dir", repository.path, "rev-parse", "main^1", "main^2").split() == [before, tip]
    assert read_file(repository, "main", "weights") == b"1"
    assert repository.commits("main")[0].title == "Merge run-a: step 1"
    assert repository.merge("run-a") == merged  # nothing new: nothing done


def test_merge_of_another_run_follows_an_earlier_publication(repository, tmp_path):
    checkpoint(repository, "run-a", tmp_path / "a", 1)
    checkpoint(repository, "run-b", tmp_path / "b", 2)
    repository.merge("run-a")
    repository.merge("run-b")
    assert read_file(repository, "main", "weights") == b"2"
    checkpoint(repository, "run-a", tmp_path / "a", 3)
    repository.merge("run-a")
    assert read_file(repository, "main", "weights") == b"3"


def test_an_earlier_commit_can_be_merged_and_tagged(repository, tmp_path):
    first = checkpoint(repository, "run-a", tmp_path / "a", 1)
    checkpoint(repository, "run-a", tmp_path / "a", 2)
    repository.merge("run-a", commit=first)
    assert read_file(repository, "main", "weights") == b"1"
    repository.merge("run-a")
    assert read_file(repository, "main", "weights") == b"2"
    merged = repository.merge("run-a", commit=first)  # back to one that main contains
    assert read_file(repository, "main", "weights") == b"1" == read_file(repository, merged, "weights")
    repository.tag("v1", first)
    repository.tag("v1", first)
    assert repository.resolve("v1") == first and read_file(repository, "v1", "weights") == b"1"
    with pytest.raises(UserError, match="'v1' names commit"):
        repository.tag("v1", merged)
    with pytest.raises(UserError, match="not a tag that git accepts"):
        repository.tag("a b", first)


def test_a_revision_is_written_to_a_folder(repository, tmp_path):
    repository.create_branch("run-a")
    weights = os.urandom(3 << 20)
    commit = repository.commit_folder("run-a", export(tmp_path / "a", weights=weights, sub__x=b"x"), "step 1")
    assert repository.download(commit, tmp_path / "out", only=["*"]) == tmp_path / "out"
    assert not repository.download(commit, tmp_path / "none").exists()  # no name of a model's file
    assert (tmp_path / "out" / "weights").read_bytes() == weights
    assert (tmp_path / "out" / "sub" / "x").read_bytes() == b"x"


def test_merge_refuses_to_hide_a_foreign_commit_on_main(repository, tmp_path):
    checkpoint(repository, "run-a", tmp_path / "a", 1)
    git("clone", "-q", repository.path, tmp_path / "clone")
    (tmp_path / "clone" / "NOTES").write_text("by hand")
    git("-C", tmp_path / "clone", "add", "NOTES")
    identity = ("-c", "user.name=someone", "-c", "user.email=someone@example.org")
    git("-C", tmp_path / "clone", *identity, "commit", "-q", "-m", "Notes by hand")
    git("-C", tmp_path / "clone", "push", "-q", "origin", "main")
    before = repository.head("main")
    with pytest.raises(UserError, match=r"Notes by hand.*merge 'main' into 'run-a'"):
        repository.merge("run-a")
    assert repository.head("main") == before
    assert read_file(repository, repository.merge("run-a", overwrite=True), "weights") == b"1"
    git("--git-dir", repository.path, "update-ref", "refs/heads/main", before)
    # Done as told, the merge goes through.
    git("-C", tmp_path / "clone", "checkout", "-q", "run-a")
    git("-C", tmp_path / "clone", *identity, "merge", "-q", "-m", "Take main in", "main")
    git("-C", tmp_path / "clone", "push", "-q", "origin", "run-a")
    repository.merge("run-a")
    assert read_file(repository, "main", "NOTES") == b"by hand"


@pytest.mark.parametrize("name", ["a b", "a..b", "-x", "x.lock", "HEAD", "@{-1}", "", "main", "deadbeef", "0" * 40])
def test_bad_branch_names_are_refused(repository, name):
    with pytest.raises(UserError, match="name|main"):
        repository.create_branch(name)
    assert repository.branches() == ["main"]


def test_a_branch_that_is_there_stays_as_it_is(repository, tmp_path):
    commit = checkpoint(repository, "run-a", tmp_path / "1", 1)
    repository.create_branch("run-a")
    assert repository.head("run-a") == commit


def test_places_that_are_not_ours_are_refused_untouched(tmp_path):
    folder = export(tmp_path / "plain.git", notes=b"mine")
    with pytest.raises(UserError, match="not a bare git repository"):
        LocalRepository(folder).create()
    git("init", "-q", tmp_path / "work")
    with pytest.raises(UserError, match="not a bare git repository"):
        LocalRepository(tmp_path / "work" / ".git").create()
    git("init", "-q", "--bare", tmp_path / "other.git")
    other = LocalRepository(tmp_path / "other.git")
    with pytest.raises(UserError, match="did not make.*codeparrot-ds.repository 1"):
        other.create()
    assert git("--git-dir", other.path, "for-each-ref") == ""
    git("--git-dir", other.path, "config", "codeparrot-ds.repository", "1")  # what the message says
    other.create()
    assert other.branches() == ["main"]
    with pytest.raises(UserError, match="no such repository"):
        LocalRepository(tmp_path / "absent.git").branches()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made"):
        LocalRepository(tmp_path / "file" / "hub.git").create()


def test_what_cannot_be_read_or_committed_is_named(repository, tmp_path):
    repository.create_branch("run-a")
    with pytest.raises(UserError, match="no branch 'run-b'; it has main, run-a"):
        repository.commits("run-b")
    with pytest.raises(UserError, match="no branch, tag or commit '--help'"):
        repository.download("--help", tmp_path / "download")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no files to commit"):
        repository.commit_folder("run-a", tmp_path / "empty", "nothing")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "passwords").symlink_to("/etc/passwd")
    with pytest.raises(UserError, match="no links"):
        repository.commit_folder("run-a", tmp_path / "links", "a link")


@pytest.mark.parametrize("name", ["../evil.json", "a/../../evil.json", "/evil.json"])
def test_a_tree_that_leads_out_of_its_folder_is_refused(repository, tmp_path, name):
    """git itself makes no such tree, and takes one that somebody else made."""
    blob = repository._git("hash-object", "-w", "--stdin", stdin="{}").strip()
    raw = b"100644 " + name.encode() + b"\0" + bytes.fromhex(blob)
    command = ["git", "--git-dir", repository.path, "hash-object", "-w", "-t", "tree", "--literally", "--stdin"]
    tree = subprocess.run(command, input=raw, capture_output=True, check=True).stdout.decode().strip()
    commit = repository._git("commit-tree", tree, "-m", "evil").strip()
    (tmp_path / "model").mkdir()
    with pytest.raises(UserError, match="would lie outside of the model's folder"):
        repository.download(commit, tmp_path / "model")
    assert not (tmp_path / "evil.json").exists() and list((tmp_path / "model").iterdir()) == []


def test_missing_git_is_said(repository, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="git is not installed"):
        repository.branches()


def test_open_repository_reads_the_hub_field(tmp_path):
    assert open_repository("off", tmp_path) is None
    assert open_repository("local", tmp_path).path == tmp_path / "hub.git"
    assert open_repository(str(tmp_path / "x.git"), "runs").path == tmp_path / "x.git"
    for place in ("/srv/models", "a/b/c", "one"):
        with pytest.raises(UserError, match="none of local, off, org/name on the Hub, or a path ending in .git"):
            open_repository(place, tmp_path)
    assert list(tmp_path.glob("*.git")) == []
