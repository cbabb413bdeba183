"""Peaks and memory of a device."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from codeparrot_ds.ds_config.precision import device_precisions
from codeparrot_ds.engine import hardware
from codeparrot_ds.engine.hardware import PEAK_FLOPS, one_peak_for_all, peak_flops, peak_memory_bytes

CPU = torch.device("cpu")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_cpu_is_measured(precision):
    flops, source = peak_flops(CPU, precision)
    assert 1e8 < flops < 1e15
    assert source == f"measured {precision} matrix products"


def test_one_peak_for_runs_in_any_precision_is_the_fastest(monkeypatch):
    threads = torch.get_num_threads()
    found = {}
    measure = hardware._measured

    def remembered(device, precision, **options):
        return found.setdefault(precision, measure(device, precision, **options))

    monkeypatch.setattr(hardware, "_measured", remembered)
    try:
        flops, source = one_peak_for_all(CPU)
    finally:
        torch.set_num_threads(threads)
    assert set(found) == set(device_precisions("cpu")) and flops == max(found.values())
    assert source == f"fastest measured matrix products of {', '.join(found)}: {max(found, key=found.get)}"


def test_one_peak_of_a_known_gpu_is_its_data_sheets(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert one_peak_for_all(torch.device("cuda", 0)) == peak_flops(torch.device("cuda", 0), "fp32")


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100 80GB PCIe", "A100"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("Tesla V100-SXM2-16GB", "V100"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
    ],
)
def test_a_known_gpu_has_its_data_sheets_peak(monkeypatch, name, known):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    flops, source = peak_flops(torch.device("cuda", 0), "bf16")
    assert flops == PEAK_FLOPS[known] and known in source


@pytest.mark.parametrize(
    "name", ["NVIDIA RTX A1000 Laptop GPU", "NVIDIA L40", "NVIDIA A10G", "NVIDIA GB200", "Tesla T4"]
)
def test_a_gpu_with_a_similar_name_is_not_taken_for_a_known_one(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch, "randn", measured)
    with pytest.raises(Measured):
        peak_flops(torch.device("cuda", 0), "bf16")


class Measured(Exception):
    """The peak would be measured now."""


def measured(*args, **kwargs):
    raise Measured


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_does_not_beat_its_data_sheet(monkeypatch):
    device = torch.device("cuda", 0)
    known, _ = peak_flops(device, "bf16")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "unknown")
    flops, _ = peak_flops(device, "bf16")
    assert 0.3 * known < flops < 1.05 * known


def test_peak_memory_of_a_cpu_rank_counts_what_it_held():
    script = (
        "import torch\n"
        "from codeparrot_ds.engine.hardware import peak_memory_bytes\n"
        "cpu = torch.device('cpu')\n"
        "before = peak_memory_bytes(cpu)\n"
        "held = torch.ones(100_000_000)\n"
        "del held\n"
        "print(peak_memory_bytes(cpu) - before)\n"
    )
    repository = Path(__file__).resolve().parents[2]
    # Through a shell: Linux counts what the parent held when it forked, and that would be the tests.
    command = ["sh", "-c", '"$0" -c "$1"; exit $?', sys.executable, script]
    answer = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=True)
    assert 380e6 < int(answer.stdout) < 500e6
    assert peak_memory_bytes(CPU) > 50e6
