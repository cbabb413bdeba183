"""The Hugging Face place, by the real client against the local Hub."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

import pytest

from codeparrot_ds.errors import UserError
from codeparrot_ds.hub.hugging_face import HubRepository
from codeparrot_ds.hub.places import open_repository
from codeparrot_ds.retry import UnavailableError
from tests.hub.model_hub import READER, Fault
from tests.hub.pushing import export, read_file

CARD = b"---\nlicense: other\ntags: [code]\n---\n# A card\n"


@pytest.fixture
def repository(hub):
    repository = HubRepository("org/model")
    repository.create()
    repository.create_branch("brave-fox-1")
    return repository


def checkpoint(folder: Path, step: int) -> Path:
    weights = b"%d" % step * 1000
    return export(folder / str(step), **{"model.safetensors": weights, "README.md": CARD, "state.json": b"%d" % step})


def requests(hub, *words: str) -> list[str]:
    return [f"{row.method} {row.path}" for row in hub.log if all(word in f"{row.method} {row.path}" for word in words)]


def test_a_commit_is_exactly_the_folder(hub, repository, tmp_path):
    first = export(tmp_path / "1", **{"model.safetensors": os.urandom(1 << 20), "sub__vocab.txt": b"a\r\n"})
    second = checkpoint(tmp_path, 2)
    one = repository.commit_folder("brave-fox-1", first, "step 1", "Step: 1")
    two = repository.commit_folder("brave-fox-1", second, "step 2\nof many", "Step: 2")
    assert [(c.id, c.title, c.trailer("Step")) for c in repository.commits("brave-fox-1")[:2]] == [
        (two, "step 2 of many", "2"),
        (one, "step 1", "1"),
    ]
    assert repository.head("brave-fox-1") == repository.resolve("brave-fox-1") == two
    assert repository.head("main") == repository.commits("brave-fox-1")[-1].id
    for commit, folder in ((one, first), (two, second)):
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        tracked = hub.text("org/model", "ls-tree", "-r", "--name-only", commit).split()
        assert sorted(tracked) == sorted([*files, ".gitattributes"])
        for name, content in files.items():
            assert hub.content("org/model", commit, name) == content
            assert read_file(repository, commit, name) == content
    hub.git("org/model", "fsck", "--strict")
    subprocess.run(["git", "clone", "-q", hub.repository("org/model"), tmp_path / "clone"], check=True)
    pointer = hub.git("org/model", "show", f"{one}:model.safetensors").decode()
    assert f"oid sha256:{hashlib.sha256((first / 'model.safetensors').read_bytes()).hexdigest()}" in pointer


def test_the_download_is_what_was_pushed(repository, tmp_path):
    folder = export(checkpoint(tmp_path, 7), **{"pytorch_model.bin": b"code", "modeling.py": b"code"})
    repository.commit_folder("brave-fox-1", folder, "step 7")
    got = repository.download("brave-fox-1", tmp_path / "unused")
    assert sorted(path.name for path in got.iterdir()) == ["README.md", "model.safetensors", "state.json"]
    for path in got.iterdir():
        assert path.read_bytes() == (folder / path.name).read_bytes()


def test_what_the_hub_has_is_not_uploaded_again(hub, repository, tmp_path):
    folder = checkpoint(tmp_path, 1)
    repository.commit_folder("brave-fox-1", folder, "step 1")
    (folder / "state.json").write_bytes(b"2")
    repository.commit_folder("brave-fox-1", folder, "step 2")
    assert len(requests(hub, "PUT /store")) == 1
    repository.create_branch("other-run-2")
    repository.commit_folder("other-run-2", folder, "the same weights on another branch")
    assert len(requests(hub, "PUT /store")) == 1


def test_files_in_parts(hub, repository, tmp_path):
    hub.multipart_bytes = 100_000
    folder = export(tmp_path / "x", **{"model.safetensors": os.urandom(350_000)})
    repository.commit_folder("brave-fox-1", folder, "in parts")
    assert len(requests(hub, "PUT /store")) == 4
    assert hub.content("org/model", "brave-fox-1", "model.safetensors") == (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("variable", [None, "", "1", "0"])
def test_uploads_take_lfs_unless_the_user_asks_for_xet(hub, repository, tmp_path, monkeypatch, variable):
    """The local Hub has no Xet: an upload that asks for its token there has taken that way."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", variable == "1")  # what the client's import makes of it
    monkeypatch.delenv("HF_HUB_DISABLE_XET")
    if variable is not None:
        monkeypatch.setenv("HF_HUB_DISABLE_XET", variable)
    if variable == "0":
        with pytest.raises(UserError):
            repository.commit_folder("brave-fox-1", checkpoint(tmp_path, 1), "step 1")
    else:
        repository.commit_folder("brave-fox-1", checkpoint(tmp_path, 1), "step 1")
    assert bool(requests(hub, "PUT /store")) == (variable != "0")
    assert bool(requests(hub, "xet-write-token")) == (variable == "0")
    assert (variable == "1") == constants.HF_HUB_DISABLE_XET  # downloads keep the client's own way


def test_the_token_goes_to_the_hub_and_not_to_its_store(hub, repository, tmp_path):
    repository.commit_folder("brave-fox-1", checkpoint(tmp_path, 1), "step 1")
    repository.download("brave-fox-1", tmp_path)
    assert all(row.authorization is None for row in hub.log if row.path.startswith("/store"))
    assert all(row.authorization == f"Bearer {os.environ['HF_TOKEN']}" for row in hub.log if "/store" not in row.path)


def test_of_two_commits_on_one_parent_one_succeeds(repository, tmp_path):
    parent = repository.head("brave-fox-1")
    repository.commit_folder("brave-fox-1", checkpoint(tmp_path, 1), "step 1", parent=parent)
    with pytest.raises(UnavailableError, match="moved on") as raised:
        repository.commit_folder("brave-fox-1", checkpoint(tmp_path, 1), "step 1 again", parent=parent)
    assert raised.value.retry_after == 0


def test_a_file_that_is_not_what_its_hash_says_is_refused_by_the_hub(hub, repository, tmp_path):
    folder = checkpoint(tmp_path, 1)
    with pytest.raises(UnavailableError, match="answer 400"):
        repository.commit_folder("brave-fox-1", folder, "step 1", sha256={"model.safetensors": "0" * 64})
    assert len(repository.commits("brave-fox-1")) == 1
    repository.commit_folder("brave-fox-1", folder, "step 1")


def test_a_body_damaged_on_the_way_is_noticed(hub, repository, tmp_path):
    hub.faults = [Fault("corrupt", requests=1, matching="PUT /store")]
    with pytest.raises(UnavailableError, match="answer 400"):
        repository.commit_folder("brave-fox-1", checkpoint(tmp_path, 1), "step 1")
    repository.commit_folder("brave-fox-1", checkpoint(tmp_path, 1), "step 1")


def test_the_librarys_own_retries_honour_retry_after(hub, repository, tmp_path):
    hub.faults = [Fault("status", 1, status=429, headers={"Retry-After": "0"}, matching="PUT /store")]
    repository.commit_folder("brave-fox-1", checkpoint(tmp_path, 1), "step 1")
    assert [row.status for row in hub.log if row.method == "PUT"] == [429, 200]


@pytest.mark.parametrize(
    ("fault", "seconds"),
    [
        (Fault("status", status=503), None),
        (Fault("status", status=500, headers={"Retry-After": "Sun, 06 Nov 1994 08:49:37 GMT"}), 0),
        (Fault("status", status=429, headers={"Retry-After": "7"}), 7),
        (Fault("status", status=429, headers={"RateLimit": '"api";r=0;t=55'}), 55),
        (Fault("status", status=409), None),
        (Fault("status", status=412), None),
        (Fault("reset"), None),
        (Fault("hang"), None),
    ],
)
def test_what_may_succeed_later_says_so(hub, fault, seconds):
    repository = HubRepository("org/model", timeout_seconds=0.3)
    hub.faults = [fault]
    for call in (
        repository.create,
        lambda: repository.create_branch("new-run-1"),
        lambda: repository.head("main"),
    ):
        with pytest.raises(UnavailableError) as raised:
            call()
        assert raised.value.retry_after == seconds


@pytest.mark.parametrize("matching", ["POST /api/validate-yaml", "commit/brave", "revision/"])
def test_each_request_that_the_library_does_not_repeat(hub, repository, tmp_path, matching):
    folder = checkpoint(tmp_path, 1)
    for kind in ("status", "reset", "lost"):
        hub.faults = [Fault(kind, 1, matching=matching)]
        before = repository.head("brave-fox-1")
        with pytest.raises(UnavailableError):
            repository.commit_folder("brave-fox-1", folder, "step 1", parent=before)
        arrived = kind == "lost" and "commit" in matching
        assert (repository.head("brave-fox-1") != before) == arrived


def test_what_the_user_must_mend(hub, repository, tmp_path, monkeypatch):
    for status, words in ((401, "does not accept the token"), (403, "right to write to org/model"), (404, "404")):
        hub.faults = [Fault("status", status=status, matching="commit/brave")]
        with pytest.raises(UserError, match=words) as raised:
            repository.commit_folder("brave-fox-1", checkpoint(tmp_path, 1), "step 1")
        assert not isinstance(raised.value, UnavailableError)
    hub.faults = []
    export(checkpoint(tmp_path, 1), **{"README.md": b"---\nlicense: nonsense\n---\n"})
    with pytest.raises(UserError, match='Invalid metadata in README.md.*"license" must be one of'):
        repository.commit_folder("brave-fox-1", tmp_path / "1", "step 1")
    with pytest.raises(UserError, match="no branch 'absent'; it has brave-fox-1, main"):
        repository.head("absent")
    with pytest.raises(UserError, match="no such branch, tag or commit"):
        repository.commits("absent")
    with pytest.raises(UserError, match="no such model repository"):
        HubRepository("org/absent").head("main")
    monkeypatch.setenv("HF_TOKEN", READER)
    with pytest.raises(UserError, match="right to write"):
        repository.create_branch("another-run-1")
    with pytest.raises(UserError, match="right to write"):
        HubRepository("org/new").create()
    wrong = "hf_" + "x" * 34
    monkeypatch.setenv("HF_TOKEN", wrong)
    with pytest.raises(UserError, match="does not accept the token of HF_TOKEN") as raised:
        repository.create()
    assert wrong not in str(raised.value)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match="wants a token: set HF_TOKEN"):
        repository.head("main")


def test_a_name_of_another_kind_is_refused(hub):
    hub.create("org/things", "dataset")
    with pytest.raises(UserError, match="org/things is a dataset"):
        HubRepository("org/things").create()
    assert not hub.repository("org/things").exists()


@pytest.mark.parametrize("name", ["a b", "a..b", "-x", "x.lock", "", "main", "deadbeef"])
def test_bad_branch_names_are_refused(repository, name):
    with pytest.raises(UserError, match="name|main"):
        repository.create_branch(name)


def test_branches_and_tags_are_made_once(repository, tmp_path):
    repository.create_branch("brave-fox-1")
    one = repository.commit_folder("brave-fox-1", checkpoint(tmp_path, 1), "step 1")
    repository.create_branch("brave-fox-1")
    assert repository.head("brave-fox-1") == one
    two = repository.commit_folder("brave-fox-1", checkpoint(tmp_path, 2), "step 2")
    repository.tag("v1", one)
    repository.tag("v1", one)
    assert repository.resolve("v1") == one
    with pytest.raises(UserError, match="'v1' names commit"):
        repository.tag("v1", two)


def test_merge_shows_a_commit_on_main_without_an_upload(hub, repository, tmp_path):
    one = repository.commit_folder("brave-fox-1", export(checkpoint(tmp_path, 1), extra=b"x"), "step 1")
    two = repository.commit_folder("brave-fox-1", checkpoint(tmp_path, 2), "step 2")
    uploads = len(requests(hub, "PUT"))
    published = repository.merge("brave-fox-1")
    assert repository.head("main") == published == repository.merge("brave-fox-1")
    assert repository.commits("main")[0].title == "Publish brave-fox-1: step 2"
    assert repository.commits("main")[0].trailer("Published-Commit") == two
    tree = ["rev-parse", f"{two}^{{tree}}", f"{published}^{{tree}}"]
    assert len(set(hub.text("org/model", *tree).split())) == 1
    repository.merge("brave-fox-1", commit=one)  # back to another checkpoint of the same run
    assert hub.content("org/model", "main", "extra") == b"x"
    repository.create_branch("other-run-2")
    repository.commit_folder("other-run-2", checkpoint(tmp_path, 3), "step 3")
    repository.merge("other-run-2")
    assert hub.content("org/model", "main", "state.json") == b"3"
    assert len(requests(hub, "PUT")) == uploads + 1


def test_merge_refuses_to_hide_a_foreign_commit_on_main(hub, repository, tmp_path):
    repository.commit_folder("brave-fox-1", checkpoint(tmp_path, 1), "step 1")
    tip = repository.head("main")
    foreign = hub.write_commit("org/model", "main", tip, "Notes by hand", [("NOTES", b"by hand")], [])
    with pytest.raises(UserError, match=r"Notes by hand.*--overwrite"):
        repository.merge("brave-fox-1")
    assert repository.head("main") == foreign
    repository.merge("brave-fox-1", overwrite=True)
    assert hub.content("org/model", "main", "state.json") == b"1"
    assert hub.text("org/model", "rev-parse", "main^") == foreign


def test_a_lost_answer_to_a_publication_is_recognised(hub, repository, tmp_path):
    repository.commit_folder("brave-fox-1", checkpoint(tmp_path, 1), "step 1")
    hub.faults = [Fault("lost", 1, matching="commit/main")]
    with pytest.raises(UnavailableError):
        repository.merge("brave-fox-1")
    repository.merge("brave-fox-1")
    assert [commit.title for commit in repository.commits("main")] == ["Publish brave-fox-1: step 1", "initial commit"]


def test_open_repository_takes_names_and_no_urls(tmp_path):
    assert open_repository("org/name", tmp_path).spec == "org/name"
    secret = "hf_" + "s" * 34
    with pytest.raises(UserError, match="a URL is not taken") as raised:
        open_repository(f"https://user:{secret}@huggingface.co/org/name", tmp_path)
    assert secret not in str(raised.value)
