"""The one peak of a comparison: where it is kept, what ranks have of it, and that it is measured once."""

import json

import pytest

from codeparrot_ds.child_process import run_module
from codeparrot_ds.compare import results as module
from codeparrot_ds.compare.candidates import Candidate, Request, Trial
from codeparrot_ds.compare.results import Peak, peak_of_comparison, recorded_peak
from codeparrot_ds.compare.trial_process import orders_of
from codeparrot_ds.errors import UserError

MACHINE = Peak(flops=1e11, source="measured", whole_machine=True)


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
