"""What other trainers' folders get from `checkpoint import` and `--init-from`, and that what is proposed works.

The folders are written by those trainers' own code; `tests/cli/slips.py` has those of programs that are not installed.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from codeparrot_ds.checkpoint.folders import Checkpoint
from codeparrot_ds.checkpoint.initial import initial_weights, with_initial_model
from codeparrot_ds.cli.main import main
from codeparrot_ds.errors import UserError
from codeparrot_ds.model.gpt2 import build_model, load_weights
from codeparrot_ds.model.shapes import find_shape
from tests.checkpoint.foreign_writers import SIZES
from tests.runs import free_port

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer_dir):
    folder = tmp_path_factory.mktemp("foreign")
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "DS_ACCELERATOR": "cpu", "MASTER_ADDR": "127.0.0.1"}
    environment |= {"OMP_NUM_THREADS": "1"}  # on a busy machine the steps of a model this small wait for threads
    environment |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-m", "tests.checkpoint.foreign_writers", str(folder), str(tokenizer_dir)]
    answer = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr[-4000:]
    return folder


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "gpt2", **SIZES}))
    return str(path)


FOLDERS = {
    "trainer": (
        "{f} holds folders with checkpoints of a transformers Trainer; name one of them, the newest is "
        "{f}/checkpoint-4",
        "{f} holds the checkpoints of a transformers Trainer: name {f}/checkpoint-4",
    ),
    "trainer/checkpoint-4/global_step4_universal": (
        "{f} holds a universal checkpoint of DeepSpeed's, which is not read: name the checkpoint that it was converted "
        "from, one of {p}/global_step4",
        "{f} holds a universal checkpoint of DeepSpeed's: make a RUN of the checkpoint that it was converted from with "
        "`codeparrot-ds checkpoint import`, and name RUN",
    ),
    "trainer/checkpoint-4/global_step4/mp_rank_00_model_states.pt": (
        "{f} is a file of a checkpoint; name its folder, {p}",
        "{f} holds a checkpoint of DeepSpeed's: make a run of it with `codeparrot-ds checkpoint import {p} RUN`, and "
        "name RUN",
    ),
    "trainer/checkpoint-4/global_step4": (
        None,
        "{f} holds a checkpoint of DeepSpeed's: make a run of it with `codeparrot-ds checkpoint import {f} RUN`, and "
        "name RUN",
    ),
    "plain-trainer": (
        "{f} holds the checkpoints of a transformers Trainer, not what engine.save_checkpoint wrote: begin a run with "
        "the weights: `train --init-from {f}/checkpoint-4`",
        "{f} holds the checkpoints of a transformers Trainer: name {f}/checkpoint-4",
    ),
    "plain-trainer/checkpoint-4": (
        "{f} holds a model without the state of an optimizer, not what engine.save_checkpoint wrote: begin a run with "
        "the weights: `train --init-from {f}`",
        None,
    ),
    "sharded": (
        "{f} holds a model without the state of an optimizer, not what engine.save_checkpoint wrote: begin a run with "
        "the weights: `train --init-from {f}`",
        None,
    ),
    "fsdp": (
        "{f} holds an FSDP checkpoint of accelerate's (.distcp), not what engine.save_checkpoint wrote: write its "
        "weights with `accelerate merge-weights {f}/pytorch_model_fsdp_0 DIR`, put the model's config.json and "
        "tokenizer.json beside them, and begin a run with the weights: `train --init-from DIR`",
        "{f} holds an FSDP checkpoint of accelerate's (.distcp): write its weights with `accelerate merge-weights "
        "{f}/pytorch_model_fsdp_0 DIR`, put the model's config.json and tokenizer.json beside them, and name DIR",
    ),
    "dcp": (
        "{f} holds a checkpoint of PyTorch's Distributed Checkpoint (.distcp), not what engine.save_checkpoint wrote: "
        "write it as one file with `python -m torch.distributed.checkpoint.format_utils dcp_to_torch {f}/step-7 FILE`, "
        "load it into the model, write model and tokenizer with save_pretrained('DIR'), and begin a run with the "
        "weights: `train --init-from DIR`",
        "{f} holds a checkpoint of PyTorch's Distributed Checkpoint (.distcp): write it as one file with `python -m "
        "torch.distributed.checkpoint.format_utils dcp_to_torch {f}/step-7 FILE`, load it into the model, write "
        "model and tokenizer with save_pretrained('DIR'), and name DIR",
    ),
    "fsdp-whole": (
        "{f} holds an FSDP checkpoint as a pickle, not what engine.save_checkpoint wrote: load it into the model",
        "{f} holds an FSDP checkpoint as a pickle: load it into the model",
    ),
    "fp32": (
        "{f} holds weights as pickles (pytorch_model.bin), which can run code and are not read, not what",
        "{f} holds weights as pickles (pytorch_model.bin), which can run code and are not read: load them with "
        "AutoModelForCausalLM.from_pretrained",
    ),
    "bin": (
        "{f} holds weights as pickles (pytorch_model.bin), which can run code and are not read, not what",
        "{f} holds weights as pickles (pytorch_model.bin), which can run code and are not read: load them with "
        "AutoModelForCausalLM.from_pretrained, write model and tokenizer with save_pretrained('DIR'), and name DIR",
    ),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_foreign_folder_is_said_to_be_what_it_is(folders, make_config, tmp_path, capsys, name, model):
    place, run = folders / name, tmp_path / "runs" / "new"
    as_checkpoint, as_model = (text and text.format(f=place, p=place.parent) for text in FOLDERS[name])
    if as_checkpoint:
        options = [text for key in ("data", "tokenizer") for text in (f"--{key}", getattr(make_config(), key))]
        assert main(["checkpoint", "import", str(place), str(run), *options]) == 2
        (said,) = capsys.readouterr().err.splitlines()
        assert said.startswith(f"codeparrot-ds: error: {as_checkpoint}")
    if as_model:
        with pytest.raises(UserError) as caught:
            with_initial_model(make_config(init_from=str(place), tokenizer="", model=model))
        assert str(caught.value).startswith(f"--init-from {place}: {as_model}")
    assert not run.parent.exists()


def test_the_checkpoint_of_a_trainer_becomes_a_run(folders, make_config, tmp_path, model):
    source, config = folders / "trainer" / "checkpoint-4", make_config()
    options = {"data": config.data, "tokenizer": config.tokenizer, "model": model, "seq_length": 32}
    options |= {"num_lanes": 4, "global_batch_size": 4, "micro_batch_size": 4, "num_workers": 0}
    arguments = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    assert main(["checkpoint", "import", str(source), str(tmp_path / "run"), *arguments]) == 0
    made = Checkpoint(tmp_path / "run" / "checkpoints" / "step-00000004")
    assert made.damage() == [] and made.read_json("state.json")["extra"]["imported"]["zero_stage"] == 2
    latest = source / "latest"
    latest.write_text("global_step4_universal")
    try:
        assert main(["checkpoint", "import", str(source), str(tmp_path / "other"), *arguments]) == 2
    finally:
        latest.write_text("global_step4")


@pytest.mark.parametrize("name", ["trainer/checkpoint-4", "plain-trainer/checkpoint-4", "sharded", "merged", "by-hand"])
def test_a_run_begins_with_the_weights(folders, make_config, model, name):
    from transformers import AutoModelForCausalLM

    config = with_initial_model(make_config(init_from=str(folders / name), tokenizer="", model=model))
    built = build_model(find_shape(model, vocab_size=257, seq_length=32), eos_token_id=256, seed=2)
    names = [key for key, _ in built.named_parameters()]
    load_weights(built, initial_weights(config.init_from, names), partitioned=False)
    wanted = dict(AutoModelForCausalLM.from_pretrained(folders / name).named_parameters())
    assert all(torch.equal(parameter, wanted[key]) for key, parameter in built.named_parameters())
