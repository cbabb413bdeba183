"""Configs of other programs in a comparison: what is taken, what is left out, and what is said of it."""

import copy

from codeparrot_ds.config.run_config import RunConfig
from codeparrot_ds.ds_config.foreign import import_ds_config
from codeparrot_ds.ds_config.resolve import resolve_ds_config

RUN = RunConfig(global_batch_size=16, micro_batch_size=4, learning_rate=1e-3, max_grad_norm=1.0)
# The example of transformers' documentation: everything that the Trainer knows is "auto".
TRAINER = {
    "bf16": {"enabled": "auto"},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
    },
    "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto"}},
    "zero_optimization": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": "auto"},
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
}
# What the autotuner writes as its best.
AUTOTUNED = {
    "train_batch_size": 64,
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 8,
    "gradient_clipping": 0.5,
    "optimizer": {"type": "Adam", "params": {"lr": 3e-5, "weight_decay": 0.0}},
    "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 100}},
    "zero_optimization": {"stage": 3},
    "bf16": {"enabled": True},
    "autotuning": {"enabled": True, "fast": True},
    "tensorboard": {"enabled": True},
}


def test_a_trainers_config_loses_its_schedule_and_resolves_without_auto():
    given = copy.deepcopy(TRAINER)
    imported = import_ds_config(given, RUN)
    assert given == TRAINER  # what was given stays as it was
    assert imported.micro_batch_size is None and imported.notes == []
    assert "scheduler" not in imported.config
    resolved = resolve_ds_config(
        imported.config, RUN, world_size=2, source="test", model_hidden_size=256, nvme_path="n"
    )
    assert "auto" not in str(resolved)
    assert resolved["train_batch_size"] == 16 and resolved["gradient_accumulation_steps"] == 2
    assert resolved["optimizer"]["params"]["lr"] == 1e-3


def test_an_autotuners_best_brings_its_micro_batch_and_each_thing_left_out_is_named():
    imported = import_ds_config(AUTOTUNED, RUN)
    assert imported.micro_batch_size == 2
    assert imported.config == {
        "optimizer": {"type": "Adam", "params": {}},
        "zero_optimization": {"stage": 3},
        "bf16": {"enabled": True},
    }
    said = "\n".join(imported.notes)
    for words in (
        "train_batch_size 64 is left out: all configs train with global_batch_size 16",
        "gradient_clipping 0.5 is left out: all configs train with max_grad_norm 1.0",
        "optimizer.params.lr 3e-05 is left out: all configs train with learning_rate 0.001",
        "optimizer.params.weight_decay 0.0 is left out: all configs train with weight_decay 0.1",
        "scheduler is left out: all configs train with cosine",
        "autotuning is left out",
        "tensorboard is left out",
    ):
        assert words in said
    assert len(imported.notes) == 7


def test_what_says_the_same_as_the_run_is_taken_out_in_silence():
    assert import_ds_config({"gradient_clipping": 1.0, "train_batch_size": 16}, RUN).notes == []
