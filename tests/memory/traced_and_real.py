"""Engines on the CPU accelerator, on real tensors or on tensors without memory; the process of one rank.

``python traced_and_real.py real|fake WORLD_SIZE FILE`` reads configs from a JSON file and prints, for each, what
:func:`codeparrot_ds.memory.traced_engine.measure` counts on rank 0.
"""

import dataclasses
import gc
import json
import os
import sys
import time
import warnings

import torch

from codeparrot_ds.memory.storage_counter import StorageCounter
from codeparrot_ds.memory.traced_engine import measure
from codeparrot_ds.memory.workload import Workload
from codeparrot_ds.model.shapes import GPT2Shape

SHAPE = GPT2Shape(n_layer=2, n_embd=64, n_head=2, vocab_size=512, n_positions=64)


class YieldingCounter(StorageCounter):
    """Lets gloo's threads drop the tensors of finished collectives, which needs the interpreter now and then."""

    def __torch_dispatch__(self, *arguments):
        time.sleep(1e-6)
        return super().__torch_dispatch__(*arguments)


def count(ds_config: dict, world_size: int, *modes) -> dict:
    workload = Workload(shape=SHAPE, ds_config=ds_config, world_size=world_size, seq_length=64)
    counter = StorageCounter(fake=True) if modes else YieldingCounter()
    for mode in modes:
        mode.__enter__()
    with counter:
        engine, memory = measure(workload, counter, torch.device("cpu"))
        engine.destroy()
        del engine
        gc.collect()
    for mode in reversed(modes):
        mode.__exit__(None, None, None)
    return dataclasses.asdict(memory)


def real(ds_configs: list[dict]) -> list[dict]:
    from codeparrot_ds.engine.operators import build_operators
    from codeparrot_ds.engine.ranks import join_ranks

    ranks = join_ranks()
    for name in ("none", "cpu"):
        zero = {"offload_optimizer": {"device": name}}
        ranks.on_main(lambda zero=zero: build_operators({"zero_optimization": zero}, "cpu"))
        build_operators({"zero_optimization": zero}, "cpu")
    return [count(ds_config, ranks.world_size) for ds_config in ds_configs]


def fake(ds_configs: list[dict], world_size: int) -> list[dict]:
    from codeparrot_ds.memory import fake_device as fake_ranks

    fake_ranks.join_fake_ranks(world_size)
    fake_ranks.use_fake_operators()
    fake_ranks.convert_modules_in_place()
    fake_ranks.make_everything_finite()
    return [count(ds_config, world_size, fake_ranks.FakeTensors()) for ds_config in ds_configs]


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    sys.setswitchinterval(1e-5)
    with open(sys.argv[3]) as file:
        ds_configs = json.load(file)
    answer = real(ds_configs) if sys.argv[1] == "real" else fake(ds_configs, int(sys.argv[2]))
    print("\n" + json.dumps(answer), flush=True)
    os._exit(0)
