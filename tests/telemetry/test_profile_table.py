"""What a trace says of a step: hand-made traces of a CPU and a GPU, and one of PyTorch's own."""

import gzip
import json

import pytest
import torch
from torch import nn

from codeparrot_ds.telemetry.profile_table import kind_of, read_profile, table
from codeparrot_ds.telemetry.profiler import StepProfiler


def event(cat, name, ts, dur, tid=1, correlation=None):
    args = {} if correlation is None else {"correlation": correlation}
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid, "args": args}


def mark(name, ts, dur):
    return event("user_annotation", name, ts, dur)


def op(name, ts, dur, tid=1):
    return event("cpu_op", name, ts, dur, tid)


HOST = [
    mark("forward", -500, 100),  # of an evaluation
    op("aten::mm", -490, 50),
    mark("step", 0, 1000),
    mark("forward", 100, 300),
    op("aten::linear", 110, 100),
    op("aten::addmm", 120, 80),
    op("aten::scaled_dot_product_attention", 220, 60),
    op("aten::_scaled_dot_product_flash_attention_for_cpu", 225, 50),
    op("aten::mm", 230, 10),
    op("aten::cross_entropy_loss", 300, 50),
    mark("backward", 400, 400),
    op("aten::mm", 410, 200),
    mark("communication", 650, 100),
    op("c10d::allreduce_", 660, 20),
    mark("optimizer", 800, 150),
    op("aten::mul_", 810, 40),
]


def parts(profile):
    return {(part.phase, part.kind): (part.host_seconds, part.device_seconds) for part in profile.parts}


def test_host_time_goes_to_the_innermost_event_that_says_something():
    found = read_profile(HOST, data_seconds=60e-6)
    assert found.steps == 1 and found.step_seconds == pytest.approx(1e-3)
    assert {key: round(host * 1e6) for key, (host, _) in parts(found).items()} == {
        ("forward", "attention"): 60,
        ("forward", "loss"): 50,
        ("forward", "matrix products"): 80,
        ("forward", "rest"): 300 - 60 - 50 - 80,
        ("backward", "communication"): 100,
        ("backward", "matrix products"): 200,
        ("backward", "rest"): 100,
        ("optimizer", "rest"): 150,
    }
    assert found.data_seconds == pytest.approx(60e-6) and found.other_seconds == pytest.approx(90e-6)
    whole = sum(part.host_seconds for part in found.parts) + found.data_seconds + found.other_seconds
    assert whole == pytest.approx(found.step_seconds)
    assert found.device_idle_seconds is None
    assert found.attention == ["scaled_dot_product_flash_attention_for_cpu"]
    assert found.top[0] == ("aten::mm", pytest.approx(210e-6), 2)  # own time, of the step alone


# The host launches; autograd launches from thread 2, without a range of ours around.
GPU = [
    *HOST,
    event("cuda_runtime", "cudaLaunchKernel", 130, 5, correlation=1),
    event("kernel", "sm90_xmma_gemm_bf16", 150, 200, tid=7, correlation=1),
    event("cuda_runtime", "cudaLaunchKernel", 240, 5, correlation=2),
    event("kernel", "void pytorch_flash::flash_fwd_kernel<Traits>(Params)", 350, 100, tid=7, correlation=2),
    event("cuda_driver", "cuLaunchKernel", 380, 5, correlation=3),
    event("kernel", "triton_red_fused__log_softmax_3", 450, 50, tid=7, correlation=3),
    op("aten::mm", 420, 30, tid=2),
    event("cuda_runtime", "cudaLaunchKernel", 425, 5, tid=2, correlation=4),
    event("kernel", "sm90_xmma_gemm_bf16", 500, 300, tid=7, correlation=4),
    event("cuda_runtime", "cudaLaunchKernel", 670, 5, correlation=5),
    event("kernel", "ncclDevKernel_AllReduce_Sum_bf16_RING_LL", 700, 250, tid=8, correlation=5),
    event("cuda_runtime", "cudaMemcpyAsync", 820, 5, correlation=6),
    event("gpu_memcpy", "Memcpy DtoD", 960, 20, tid=7, correlation=6),
    event("cuda_runtime", "cudaLaunchKernel", -480, 5, correlation=7),
    event("kernel", "of an evaluation", -470, 5000, tid=7, correlation=7),
]


def test_kernels_belong_to_what_launched_them():
    found = read_profile(GPU)
    assert {key: round(device * 1e6) for key, (_, device) in parts(found).items() if device} == {
        ("forward", "matrix products"): 200,
        ("forward", "attention"): 100,
        ("forward", "loss"): 50,
        ("backward", "matrix products"): 300,
        ("backward", "communication"): 250,
        ("optimizer", "rest"): 20,
    }
    busy = (950 - 150) + 20  # communication runs beside the products
    assert found.device_idle_seconds == pytest.approx((1000 - busy) * 1e-6)
    assert found.attention == ["scaled_dot_product_flash_attention_for_cpu", "pytorch_flash::flash_fwd_kernel"]
    assert found.top[0] == ("sm90_xmma_gemm_bf16", pytest.approx(500e-6), 2)


def test_the_mean_of_several_steps():
    later = [event | {"ts": event["ts"] + 5000} for event in HOST]
    one, two = read_profile(HOST), read_profile([*HOST, *later], data_seconds=0.0)
    assert two.steps == 2 and two.step_seconds == pytest.approx(one.step_seconds)
    assert parts(two) == {key: pytest.approx(value) for key, value in parts(one).items()}
    assert two.top[0] == ("aten::mm", pytest.approx(210e-6), 2)


def test_a_trace_without_steps_is_refused():
    with pytest.raises(ValueError, match="no step"):
        read_profile([op("aten::mm", 0, 1)])


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL", "communication"),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention"),
        ("autograd::engine::evaluate_function: LogSoftmaxBackward0", "loss"),
        ("aten::baddbmm", "matrix products"),
        ("aten::mmx", "rest"),
        ("my_communication_op", "rest"),
    ],
)
def test_kinds(name, kind):
    assert kind_of(name) == kind


@pytest.mark.parametrize("events", [HOST, GPU])
def test_the_table_has_a_line_for_each_part(events):
    text = table(read_profile(events, data_seconds=60e-6))
    for words in ("data: waiting", "backward: communication", "host between the phases", "attention: scaled_dot"):
        assert words in text
    assert ("device idle" in text) == (events is GPU)
    assert ("device ms" in text) == (events is GPU)
    assert "mean of 1" in text and "most time in: " in text


class Engine:
    """An engine's three methods on a small module."""

    def __init__(self):
        self.module = nn.Linear(64, 64)
        self.optimizer = torch.optim.SGD(self.module.parameters(), lr=0.1)

    def forward(self, x):
        return self.module(x).square().mean()

    def backward(self, loss):
        loss.backward()

    def step(self):
        self.optimizer.step()


class Loader:
    wait_seconds = 0.0


class Collectives:
    def all_reduce(self, tensor):
        return tensor.clone()


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Makes a run of some steps with a profiler; returns what it said, its folder and its pauses."""
    import deepspeed.comm.comm as deepspeed_comm

    backend = Collectives()
    monkeypatch.setattr(deepspeed_comm, "cdb", backend)

    def go(num_steps, profiled, first_step=1):
        engine, said, pauses = Engine(), [], []
        loader = Loader()
        profiler = StepProfiler(
            engine=engine, loader=loader, device=torch.device("cpu"), folder=tmp_path, num_steps=profiled,
            first_step=first_step, say=lambda *words: said.append(words[0] % words[1:]), pause=pauses.append,
        )  # fmt: skip
        for step in range(first_step, first_step + num_steps):
            with profiler.step(step):
                loader.wait_seconds += 1e-6
                loss = engine.forward(torch.ones(8, 64))
                backend.all_reduce(torch.zeros(4))
                engine.backward(loss)
                engine.step()
        profiler.close()
        assert not {"forward", "backward", "step"} & set(vars(engine)) and "all_reduce" not in vars(backend)
        return said, tmp_path / "profile", pauses

    return go


def test_the_profiler_records_steps_from_the_fourth_on(run):
    said, folder, pauses = run(num_steps=8, profiled=2, first_step=11)
    (message,) = said
    assert "2 steps from step 14" in message and "forward: matrix products" in message
    assert len(pauses) == 1 and pauses[0] > 0
    found = json.loads((folder / "profile.json").read_text())
    assert found["steps"] == 2 and found["data_seconds"] == pytest.approx(1e-6)
    assert found["step_seconds"] > 0 and found["device_idle_seconds"] is None
    phases = {(part["phase"], part["kind"]) for part in found["parts"]}
    assert {("forward", "matrix products"), ("backward", "matrix products"), ("optimizer", "rest")} <= phases
    with gzip.open(folder / "trace.json.gz", "rt") as file:
        names = [one["name"] for one in json.load(file)["traceEvents"] if one.get("cat") == "user_annotation"]
    assert names.count("step") == 2 and names.count("communication") == 2


def test_a_run_that_ends_within_the_profile_has_the_steps_it_made(run):
    said, folder, _ = run(num_steps=5, profiled=10)
    assert "2 steps from step 4" in said[0] and json.loads((folder / "profile.json").read_text())["steps"] == 2


def test_a_run_that_ends_before_the_profile_has_none(run):
    said, folder, _ = run(num_steps=3, profiled=10)
    assert said == [] and not folder.exists()
