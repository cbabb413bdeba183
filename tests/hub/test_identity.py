"""Runs that were copied, renamed and moved."""

import shutil

import pytest

from codeparrot_ds import durable
from codeparrot_ds.errors import UserError
from codeparrot_ds.hub.identity import Identity, identity_of, place_of


@pytest.fixture
def run(tmp_path):
    """A run that was started where it lies."""
    folder = tmp_path / "runs" / "a"
    folder.mkdir(parents=True)
    durable.write_json(folder / "run.json", {"name": "a", "id": "a-0a1b2c", "place": place_of(folder)})
    return folder


ITSELF = Identity(branch="a", run_id="a-0a1b2c")


def test_a_folder_that_is_not_there_yet_has_its_name(tmp_path):
    assert identity_of(tmp_path / "otter") == Identity(branch="otter", run_id=None)


def test_a_run_in_its_place_is_itself(run):
    assert identity_of(run) == ITSELF


def test_a_copy_beside_the_original_is_another(run):
    copy = shutil.copytree(run, run.with_name("b"))
    assert identity_of(copy) == Identity(branch="b", run_id=None, copy_of=run)
    assert identity_of(run) == ITSELF


def test_a_copy_of_the_same_name_elsewhere_has_a_branch_of_another_name(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "elsewhere" / "a")
    found = identity_of(copy)
    assert found.copy_of == run and found.branch.startswith("a-copy-") and found.run_id is None
    assert identity_of(copy) == found  # at every start until it is written down


def test_a_run_that_was_renamed_keeps_its_branch_even_with_a_copy_in_its_old_place(run):
    renamed = run.rename(run.with_name("b"))
    assert identity_of(renamed) == ITSELF
    shutil.copytree(renamed, run)
    assert identity_of(renamed) == ITSELF
    assert identity_of(run).copy_of == renamed


def test_a_copy_of_a_run_that_was_renamed_is_another(run):
    copy = shutil.copytree(run, run.with_name("b"))
    renamed = run.rename(run.with_name("c"))
    assert identity_of(copy) == Identity(branch="b", run_id=None, copy_of=renamed)
    assert identity_of(renamed) == ITSELF


def test_a_run_that_was_moved_to_another_disk_keeps_its_branch(run, tmp_path):
    moved = shutil.copytree(run, tmp_path / "disk" / "a")
    shutil.rmtree(run)
    assert identity_of(moved) == ITSELF
    run.mkdir()  # another run, or anything else, in the old place
    assert identity_of(moved) == ITSELF
    durable.write_json(run / "run.json", {"name": "a", "id": "a-ffffff"})
    assert identity_of(moved) == ITSELF


def test_a_run_that_is_named_by_a_link_is_itself(run, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(run)
    assert identity_of(link) == ITSELF


def test_a_run_of_an_earlier_version_is_itself(run):
    durable.write_json(run / "run.json", {"name": "a", "id": "a-0a1b2c"})
    assert identity_of(shutil.copytree(run, run.with_name("b"))) == ITSELF


@pytest.mark.parametrize("place", [[], {}, {"path": "x", "device": "many", "inode": 1}])
def test_a_place_that_is_none_is_damage(run, place):
    durable.write_json(run / "run.json", {"name": "a", "place": place})
    with pytest.raises(UserError, match=r"run\.json is damaged"):
        identity_of(run)
