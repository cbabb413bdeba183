"""What a trial broke of is told apart."""

import errno

import pytest

from codeparrot_ds.compare.trial import describe_failure, is_out_of_memory, processes_killed_for_memory
from codeparrot_ds.errors import UserError


class OutOfMemoryError(RuntimeError):
    """As torch's, which is known by its name."""


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
)
def test_out_of_memory(error):
    assert is_out_of_memory(error)
    assert describe_failure(error, "steps", 4, resident_peak_bytes=1, device_peak_bytes=2).kind == "out of memory"


@pytest.mark.parametrize(
    "error",
    [RuntimeError("shapes differ"), OSError(errno.ENOSPC, "No space left on device"), ValueError("out of memory"),
     KeyboardInterrupt()],
)  # fmt: skip
def test_not_out_of_memory(error):
    assert not is_out_of_memory(error)


def test_what_torch_really_raises_is_out_of_memory():
    import torch

    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(raised.value)
    assert is_out_of_memory(torch.OutOfMemoryError("anything"))


def test_a_users_mistake_is_refused_and_one_line_is_kept():
    failure = describe_failure(
        UserError("\nno such file\nmore"), "start", 0, resident_peak_bytes=7, device_peak_bytes=None
    )
    assert failure.kind == "refused" and failure.message == "no such file"
    assert failure.resident_peak_bytes == 7 and failure.device_peak_bytes is None


def test_an_error_without_words_has_its_name_and_where_it_came_from():
    try:
        raise AssertionError
    except AssertionError as error:
        failure = describe_failure(error, "checkpoint", 30, resident_peak_bytes=1, device_peak_bytes=None)
    assert failure.kind == "error" and failure.message == "AssertionError"
    assert (failure.phase, failure.step) == ("checkpoint", 30)
    assert "test_trial_failure.py" in failure.traceback


def test_the_systems_kills_are_counted(tmp_path):
    counters = tmp_path / "vmstat"
    assert processes_killed_for_memory(counters) == 0
    counters.write_text("pgfault 17\noom_kill 3\noom_kill_other 9\n")
    assert processes_killed_for_memory(counters) == 3
