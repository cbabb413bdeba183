"""Faults planted into the shipped files, one at a time: each is found under its key; and nothing else is."""

import copy
import json
from pathlib import Path

import pytest

from codeparrot_ds.config.run_config import RunConfig
from codeparrot_ds.ds_config.facts import leaves, value_at
from codeparrot_ds.ds_config.file import open_ds_config
from codeparrot_ds.ds_config.lint import lint
from codeparrot_ds.model.shapes import find_shape, num_parameters
from tools.ds_configs import catalogue

FAULTS = json.loads(Path(__file__).with_name("planted_faults.json").read_text())
PARAMETERS = num_parameters(find_shape("gpt2", vocab_size=32_768, seq_length=1024))


def planted(fault):
    """The shipped config with the fault: keys set, renamed or removed."""
    config = copy.deepcopy(open_ds_config(fault["file"]).config)

    def block_of(key):
        *path, last = key.split(".")
        block = config
        for part in path:
            block = block.setdefault(part, {})
        return block, last

    for key, value in fault.get("set", {}).items():
        block, last = block_of(key)
        block[last] = value
    if "rename" in fault:
        block, last = block_of(fault["rename"][0])
        block[fault["rename"][1]] = block.pop(last)
    for key in fault.get("remove", []):
        block, last = block_of(key)
        del block[last]
    return config


def found(fault):
    run = RunConfig(**fault["run"]) if "run" in fault else None
    parameters = PARAMETERS if run else None
    return lint(planted(fault), "f", config=run, device=fault.get("device", "cuda"), parameters=parameters)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault['kind']}-{fault['file']}-{fault['key']}")
def test_a_planted_fault_is_found_under_its_key(fault):
    assert (fault["severity"], fault["key"]) in [(finding.severity, finding.key) for finding in found(fault)]


def slips(key):
    """A key as a hand mistypes it: a letter left out, doubled, or swapped with the next, at each place."""
    for i in range(len(key) - 1):
        yield key[:i] + key[i + 1 :]
        yield key[: i + 1] + key[i:]
        yield key[:i] + key[i + 1] + key[i] + key[i + 2 :]


def test_every_slip_in_every_key_of_the_shipped_files_is_found():
    tried = named = 0
    seen = set()
    for name, entry in catalogue().items():
        paths = {path[:length] for path, _ in leaves(entry.config) for length in range(1, len(path) + 1)}
        for path in paths - seen:
            seen.add(path)
            block = value_at(entry.config, path[:-1]) if path[:-1] else entry.config
            for slip in set(slips(path[-1])) - set(block):
                config = copy.deepcopy(entry.config)
                inner = value_at(config, path[:-1]) if path[:-1] else config
                inner[slip] = inner.pop(path[-1])
                wrong = ".".join((*path[:-1], slip))
                messages = [f.message for f in lint(config, name) if f.key == wrong and f.severity == "error"]
                assert messages, (name, wrong)
                tried += 1
                named += any(path[-1] in message for message in messages)
    assert tried > 1000
    assert named / tried > 0.995  # "fb16" may be bf16 or fp16


def test_there_are_many_faults_of_every_kind_in_most_files():
    kinds = [fault["kind"] for fault in FAULTS]
    assert len(FAULTS) >= 60
    assert min(kinds.count(kind) for kind in ("typo", "type", "inert", "conflict")) >= 12
    assert len({json.dumps(fault, sort_keys=True) for fault in FAULTS}) == len(FAULTS)
    assert len({fault["file"] for fault in FAULTS}) >= 10


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault['kind']}-{fault['file']}-{fault['key']}")
def test_a_fault_brings_no_false_alarm_about_keys_that_are_right(fault):
    """One fault is one finding, but for keys that it really touches: those of the same block, or the optimizer's."""
    others = {finding.key for finding in found(fault)} - {fault["key"]}
    allowed = set(fault.get("also", []))
    assert others == allowed, [str(finding) for finding in found(fault)]


def test_mistyped_keys_are_named_with_the_right_one():
    named = 0
    for fault in (fault for fault in FAULTS if "rename" in fault):
        right = fault["rename"][0].split(".")[-1]
        (finding,) = [
            finding for finding in found(fault) if finding.key == fault["key"] and "unknown" in finding.message
        ]
        named += f"did you mean '{right}'?" in finding.message or right in finding.message.partition("choose one of")[2]
    assert named == sum("rename" in fault for fault in FAULTS)


def test_the_planted_configs_differ_from_the_shipped():
    for fault in FAULTS:
        assert planted(fault) != catalogue()[fault["file"]].config, fault
        assert (
            value_at(catalogue()[fault["file"]].config, tuple(fault["key"].split("."))) is None
            or "set" in fault
            or ("remove" in fault)
        )
