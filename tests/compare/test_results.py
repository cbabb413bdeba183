"""What a comparison keeps on disk: results read and written as version 0.1.0 had them, and its one peak."""

import json
import tarfile

import pytest

from codeparrot_ds.child_process import run_module
from codeparrot_ds.compare import results as module
from codeparrot_ds.compare.candidates import Candidate, Request, Trial
from codeparrot_ds.compare.results import Peak, TrialResult, peak_of_comparison, recorded_peak
from codeparrot_ds.compare.trial_process import orders_of
from codeparrot_ds.errors import UserError
from tests.test_old_runs import ARCHIVE

MACHINE = Peak(flops=1e11, source="measured", whole_machine=True)


def test_a_result_of_version_0_1_0_is_written_back_as_it_was(tmp_path):
    with tarfile.open(ARCHIVE) as archive:
        results = [each for each in archive if each.name.endswith("/result.json")]
        archive.extractall(tmp_path, results, filter="data")
    for member in results:
        file = tmp_path / member.name
        assert TrialResult.read(file).as_json() == json.loads(file.read_text())
    assert {"found" in each and len(each["found"]) for each in map(saved, tmp_path.rglob("result.json"))} == {13, 15}


def saved(path):
    return json.loads(path.read_text())


def test_what_a_file_lacks_has_its_default_and_what_is_not_known_is_ignored(tmp_path):
    file = tmp_path / "result.json"
    assert TrialResult.read(file) is None
    found = {"world_size": 2, "weights": {"dtype": "float32", "sha256": "a", "more": 1}, "of a later version": 1}
    file.write_text(json.dumps({"status": "finished", "found": found, "of a later version": 1}))
    result = TrialResult.read(file)
    assert (result.status, result.rows, result.found.weights.sha256, result.found.parts) == ("finished", [], "a", None)


def test_ranks_share_a_machine_and_have_a_device_each():
    assert [MACHINE.of_ranks(count) for count in (1, 4)] == [1e11, 1e11]
    device = Peak(flops=1e15, source="data sheet", whole_machine=False)
    assert [device.of_ranks(count) for count in (1, 4)] == [1e15, 4e15]


def test_it_is_measured_once_and_kept_beside_what_is_there(tmp_path, monkeypatch):
    file = tmp_path / "comparison.json"
    file.write_text('{"version": 1, "steps": 30}')
    assert recorded_peak(file) is None and recorded_peak(tmp_path / "missing") is None
    peak = peak_of_comparison(file, "cpu")  # a fresh process, as for a comparison of old that goes on
    assert 1e8 < peak.flops < 1e16 and peak.whole_machine and "fastest measured" in peak.source
    monkeypatch.setattr(module, "run_module", None)
    assert peak_of_comparison(file, "cpu") == recorded_peak(file) == peak
    assert {"version": 1, "steps": 30}.items() <= json.loads(file.read_text()).items()


def test_what_cannot_be_measured_is_told(tmp_path, monkeypatch):
    file = tmp_path / "comparison.json"
    file.write_text("{}")
    monkeypatch.setattr(module, "run_module", lambda name, device: run_module("codeparrot_ds.no_such_module"))
    with pytest.raises(UserError, match="the peak of this machine could not be measured: .*no_such_module"):
        peak_of_comparison(file, "cpu")
    assert file.read_text() == "{}"


def test_every_trial_is_handed_the_same(make_config, tmp_path):
    request = Request(configs=["zero1"], config=make_config(), world_sizes=[1, 2])
    for ranks in (1, 2):
        candidate = Candidate(label="zero1", world_size=ranks, ds_config=tmp_path / "a", config=request.config)
        assert orders_of(request, Trial(candidate=candidate, repeat=1), MACHINE).peak_flops == 1e11
    assert orders_of(request, Trial(candidate=candidate, repeat=0), None).peak_flops is None
