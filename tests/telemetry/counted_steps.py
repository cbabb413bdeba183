"""Counts steps of both models at every stage, of one layer, and single operators; prints JSON.

One whole model is counted as ``benchmarks/counted_step.py --layers 1 2`` does it.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import counted_step
import torch

from codeparrot_ds.memory import fake_device
from codeparrot_ds.telemetry.counted_step import StepCounter, register_kernel


@torch.library.custom_op("codeparrot_test::halve", mutates_args=("values",))
def halve(values: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    raise NotImplementedError("its kernel is opaque here")


@halve.register_fake
def _(values, by):
    return torch.empty_like(by)


def operators() -> dict:
    """What single operators on 1,000 fp32 numbers count: launches, bytes, waits."""
    device = fake_device.pretend_accelerator()
    counter, found = StepCounter(device), {}

    def count(name, function):
        counter.begin()
        function()
        launches, waits = counter.counted
        found[name] = [len(launches), sum(launch.num_bytes for launch in launches), len(waits)]

    with fake_device.FakeTensors(), counter:
        a, b = (torch.empty(1000, device=device) for _ in range(2))
        table, places = torch.empty(100, 10, device=device), torch.zeros(7, dtype=torch.long, device=device)
        many = [torch.empty(10, device=device) for _ in range(200)]
        on_host = torch.empty(1000)
        count("views", lambda: a.view(10, 100).t()[3:].detach())
        count("allocation", lambda: torch.empty_like(a))
        count("addition", lambda: a + b)
        count("in place", lambda: a.add_(b))
        count("overwritten", lambda: a.copy_(b))
        count("product elsewhere", lambda: torch.mul(a.bfloat16(), b[:1], out=b))
        count("zeros", lambda: torch.zeros_like(a))
        count("cast", lambda: a.bfloat16())
        count("expanded", lambda: a.view(10, 100) + torch.empty(1, device=device).expand(10, 100))
        count("rows", lambda: torch.nn.functional.embedding(places, table))
        count("asked", lambda: bool(a.sum() > 0))
        count("to the host", lambda: a.to("cpu"))
        count("to the host later", lambda: a.to("cpu", non_blocking=True))
        count("from the host", lambda: a.copy_(on_host))
        count("from the host later", lambda: a.copy_(on_host, non_blocking=True))
        count("on the host", lambda: (on_host + 1).sum().item())
        count("many at once", lambda: torch._foreach_mul_(many, 2.0))
        count("event", lambda: fake_device.FakeStream().synchronize())
        count("one's own", lambda: halve(a, b))
        register_kernel("codeparrot_test::halve", lambda output, values, by: 3 * 4000)
        count("one's own, said", lambda: halve(a, b))
    return found


def all_figures() -> dict:
    """Of both models with one layer at each stage, and of one whole model by what its second layer adds."""
    names = [(model, f"zero{stage}") for model in counted_step.MICRO_BATCH_SIZES for stage in range(4)]
    works = [counted_step.workload(*name, counted_step.MICRO_BATCH_SIZES[name[0]], 1, 1) for name in names]
    plain = [counted_step.workload("gpt2", "zero1", 64, 1, layers, lean="off", loss="plain") for layers in (1, 2)]
    figures = counted_step.count([*works, counted_step.workload("gpt2", "zero1", 64, 1, 2), *plain])
    one_layer = {" ".join(name): each for name, each in zip(names, figures, strict=False)}
    two_layers, *plain = figures[len(names) :]
    return {
        "one layer": one_layer,
        "whole": counted_step.continued(one_layer["gpt2 zero1"], two_layers, 11),
        "whole, plain": counted_step.continued(*plain, 11),
    }


if __name__ == "__main__":
    answer = all_figures()
    sys.stdout.flush()
    print(json.dumps(answer | {"operators": operators()}), flush=True)
    os._exit(0)
