"""Runs that begin from a checkpoint of DeepSpeed's own: what is taken, and what is refused in one sentence.

Every layout is imported and continued in ``test_matrix.py``, a whole run in ``tests/story``.
"""

import dataclasses
import datetime
import errno
import json
import os
import pickle
import random
import shutil
import struct
from collections import Counter, OrderedDict, defaultdict, deque
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from codeparrot_ds import durable
from codeparrot_ds.checkpoint.deepspeed_checkpoint import read_deepspeed_checkpoint
from codeparrot_ds.checkpoint.deepspeed_files import NumpyType, load_file, numpy_number
from codeparrot_ds.checkpoint.folders import Checkpoint
from codeparrot_ds.cli.main import main
from codeparrot_ds.config.files import load_config
from codeparrot_ds.config.run_config import RunConfig
from codeparrot_ds.data.datasets import resume_stream
from codeparrot_ds.data.encoder import load_encoder
from codeparrot_ds.data.loader import TrainingLoader
from codeparrot_ds.errors import UserError
from codeparrot_ds.launch.preflight import check_run
from codeparrot_ds.model.gpt2 import build_model, get_grouped_params
from codeparrot_ds.model.shapes import GPT2Shape, parameter_shapes
from tests.checkpoint.layout_ranks import assembled, differing_state, gathered_state
from tests.data.streams import open_stream

SHAPE = GPT2Shape(n_layer=1, n_embd=16, n_head=2, vocab_size=257, n_positions=32)
SHARD = "zero_pp_rank_0_mp_rank_00_optim_states.pt"
MODEL = "mp_rank_00_model_states.pt"


def engine_of(model, groups=None, *, optimizer="AdamW", client=None, **blocks):
    """An engine as a user builds it, without anything of this project's."""
    import deepspeed

    config = {"train_micro_batch_size_per_gpu": 4, "steps_per_print": 10**9, **blocks}
    if client is None:
        config["optimizer"] = {"type": optimizer, "params": {"lr": 1e-3, "weight_decay": 0.1}}
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=groups or list(model.parameters()),
        optimizer=client,
        config=config,
        dist_init_required=False,
    )
    return engine


def train_and_save(engine, folder, steps=2, **client_state):
    for _ in range(steps):
        ids = torch.randint(SHAPE.vocab_size, (4, 32))
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
    engine.save_checkpoint(str(folder), client_state=client_state)
    return folder


def fresh(shape=SHAPE):
    return build_model(shape, eos_token_id=256, seed=1)


@pytest.fixture(scope="module")
def saved(only_rank, tmp_path_factory):
    """Steps 2 and 4 of a ZeRO-2 run in fp32: the folder, and its engine."""
    engine = engine_of(fresh(), zero_optimization={"stage": 2})
    folder = tmp_path_factory.mktemp("saved") / "zero2"
    train_and_save(engine, folder)
    return train_and_save(engine, folder), engine


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of it to be damaged."""
    return Path(shutil.copytree(saved[0], tmp_path / "deepspeed"))


@pytest.fixture
def options(tmp_path, corpus_dir, tokenizer_dir):
    """What the run is."""
    model = tmp_path / "config.json"
    sizes = {key: value for key, value in dataclasses.asdict(SHAPE).items() if key != "vocab_size"}
    model.write_text(json.dumps({"model_type": "gpt2", **sizes}))
    values = {"data": corpus_dir, "tokenizer": tokenizer_dir, "model": model, "deepspeed": "zero3", "seq_length": 32}
    values |= {"global_batch_size": 8, "micro_batch_size": 4, "num_lanes": 4, "shuffle_buffer": 8, "num_workers": 0}
    values |= {"learning_rate": 1e-3, "num_warmup_steps": 8, "max_train_steps": 20, "wandb": "off", "hub": "off"}
    return [text for key, value in values.items() for text in ("--" + key, str(value))]


def refused(capsys, *arguments):
    """The one sentence that an import ends with."""
    assert main(["checkpoint", "import", *map(str, arguments)]) == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    return sentence


def test_a_run_begins_from_a_deepspeed_checkpoint(saved, options, tmp_path, capsys):
    run = tmp_path / "runs" / "imported"
    assert main(["checkpoint", "import", str(saved[0]), str(run), *options]) == 0
    said = capsys.readouterr().out
    assert f"imported {saved[0]}/global_step4 (DeepSpeed 0." in said and "ZeRO-2 fp32 on 1 rank(s)" in said
    assert "Adam's step 4" in said and "step 4, skipped steps 0, 16 rows" in said
    assert "place in the data: the run continues with row 0" in said and "8 per step where DeepSpeed had 4" in said
    assert "the config's at step 4, learning rate 0.0005 (it was 0.001 in DeepSpeed's)" in said
    assert said.endswith(f"\nNext:\n  codeparrot-ds train --config {run}/config.yaml\n")
    checkpoint = Checkpoint(run / "checkpoints" / "step-00000004")
    assert checkpoint.damage() == []
    state = checkpoint.read_json("state.json")
    assert state["extra"]["imported"]["tag"] == "global_step4" and state["tokens"] == 16 * 32
    assert json.loads((run / "run.json").read_text())["imported"] == state["extra"]["imported"]
    # What a start of the run looks at before any rank: it may go on, at another stage.
    config = load_config(run / "config.yaml")
    assert (config.output_dir, config.run_name) == (str(run.parent), "imported")
    check_run(config, device="cpu", world_size=2)
    assert "zero_optimization.stage 2 -> 3" in capsys.readouterr().err
    assert main(["checkpoint", "export", str(run), "--out", str(tmp_path / "model")]) == 0
    from transformers import AutoModelForCausalLM

    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    weights = dict(saved[1].module.named_parameters())
    assert all(torch.equal(weight, weights[name]) for name, weight in exported.named_parameters())


def test_the_tag_and_the_first_row_can_be_told(saved, options, tmp_path, capsys):
    run = tmp_path / "imported"
    arguments = ["--tag", "global_step2", "--first-row", "24", "--learning-rate", "0.01", "--num-warmup-steps", "0"]
    assert main(["checkpoint", "import", str(saved[0]), str(run), *options, *arguments]) == 0
    said = capsys.readouterr().err
    assert "warning: save_checkpoint_steps 15000 is beyond max_train_steps 20" in said
    assert f"warning: the learning rate jumps from 0.001 to 0.00976 where {saved[0]}/global_step2 resumes" in said
    config = load_config(run / "config.yaml")
    stream = open_stream(config, load_encoder(config.tokenizer))
    data = json.loads((run / "checkpoints" / "step-00000002" / "data.json").read_text())
    start, changed = resume_stream(data, data["fingerprint"], on_data_change="refuse")
    assert (start.row, changed) == (24, [])
    whole, later = (
        TrainingLoader(stream, micro_batch_size=8, **kwargs)
        for kwargs in ({}, {"start_row": start.row, "lane_states": start.lane_states})
    )
    expected = [next(whole) for _ in range(5)][3:]
    assert torch.equal(torch.cat(expected), torch.cat([next(later), next(later)]))
    sentence = refused(capsys, saved[0], tmp_path / "other", *options, "--first-row", "20")
    assert sentence.endswith("--first-row 20 is in the middle of a step of 8 rows; the nearest is 16")


def test_a_folder_of_one_tag_can_be_named_itself(saved):
    source = read_deepspeed_checkpoint(saved[0] / "global_step2", parameter_shapes(SHAPE))
    assert (source.step, source.path.name) == (2, "global_step2")


# --------------------------------------------------------------------------------------------------------------------
# What is refused


def without_latest(folder):
    (folder / "latest").unlink()


def latest_of_nothing(folder):
    (folder / "latest").write_text("global_step40")


def without_shard(folder):
    (folder / "global_step4" / SHARD).unlink()


def of_more_ranks(folder):
    change(folder / "global_step4" / MODEL, lambda state: state.update(dp_world_size=2))


def cut_off(folder):
    os.truncate(folder / "global_step4" / SHARD, (folder / "global_step4" / SHARD).stat().st_size // 2)


def flipped(folder):
    content = bytearray((folder / "global_step4" / SHARD).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "global_step4" / SHARD).write_bytes(content)


def empty(folder):
    shutil.rmtree(folder / "global_step4")
    shutil.rmtree(folder / "global_step2")


def offloaded(folder):
    (folder / "global_step4" / "offloaded_tensors").mkdir()


def tensor_parallel(folder):
    (folder / "global_step4" / "mp_rank_01_model_states.pt").touch()


def without_a_moment(folder):
    def forget(state):
        for moments in state["optimizer_state_dict"]["base_optimizer_state"]["state"].values():
            del moments["exp_avg_sq"]

    change(folder / "global_step4" / SHARD, forget)


def of_lamb(folder):
    change(folder / "global_step4" / MODEL, lambda state: state["ds_config"]["optimizer"].update(type="Lamb"))


def short(folder):
    def shorten(state):
        masters = state["optimizer_state_dict"]["single_partition_of_fp32_groups"]
        masters[0] = masters[0][:-3].clone()

    change(folder / "global_step4" / SHARD, shorten)


def without_shapes(folder):
    change(folder / "global_step4" / MODEL, lambda state: state.update(param_shapes=None))


def of_another_layout(folder):
    change(folder / "global_step4" / SHARD, lambda state: state["optimizer_state_dict"].pop("group_paddings"))


def of_two_saves(folder):
    shutil.copy(folder / "global_step2" / MODEL, folder / "global_step4" / MODEL)


def not_begun(folder):
    change(folder / "global_step4" / MODEL, lambda state: state.update(global_steps=0))


def change(path, work):
    state = torch.load(path, weights_only=False)  # this test's own file
    work(state)
    torch.save(state, path)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (without_latest, "cannot be read; choose one with --tag: global_step2, global_step4"),
        (latest_of_nothing, "deepspeed has no checkpoint 'global_step40'; did you mean 'global_step4'?"),
        (without_shard, f"was saved by 1 rank(s) and is not complete: {SHARD} is missing"),
        (of_more_ranks, "was saved by 2 rank(s) and is not complete: zero_pp_rank_1_mp_rank_00_optim_states.pt is"),
        (cut_off, f"{SHARD} is cut off or damaged: File is not a zip file"),
        (flipped, "in it is not what was written"),
        (empty, "holds no checkpoint of DeepSpeed's: no folder in it has a *_model_states.pt"),
        (offloaded, "has its optimizer's state as raw files of NVMe offload, which cannot be imported"),
        (tensor_parallel, "split between ranks (mp_rank_01_model_states.pt): only data-parallel training can be"),
        (without_a_moment, "the optimizer is another than Adam or AdamW, or it has made no step yet"),
        (of_lamb, "was trained with optimizer 'Lamb': only Adam and AdamW can be imported"),
        (short, "does not hold every value of transformer.ln_f.bias once: its layout is not one that is known"),
        (without_shapes, "does not say which parameters the optimizer's state is of (param_shapes)"),
        (of_another_layout, "is not laid out as DeepSpeed 0.19 does it"),
        (of_two_saves, "the masters of transformer.wte.weight are not its weights: its files are of several saves, or"),
        (not_begun, "is of a run that has made no step: there is nothing to continue"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_what_cannot_be_imported_is_said_and_nothing_is_left(folder, options, tmp_path, capsys, damage, sentence):
    damage(folder)
    runs = tmp_path / "runs"
    said = refused(capsys, folder, runs / "imported", *options)
    assert said.startswith("codeparrot-ds: error: ") and str(folder) in said and sentence in said
    assert not runs.exists()


def test_a_tag_that_is_not_there_names_the_nearest(folder, options, tmp_path, capsys):
    said = refused(capsys, folder, tmp_path / "run", *options, "--tag", "global_step3")
    assert "has no checkpoint 'global_step3'; did you mean 'global_step" in said


def test_another_model_is_refused_with_the_first_difference(folder, options, tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "n_layer": 1, "n_embd": 24, "n_head": 2}')
    said = refused(capsys, folder, tmp_path / "run", *options)
    assert (
        "belongs to another model: transformer.wte.weight has shape [257, 16] there and has shape [257, 24] here"
        in said
    )


def test_a_run_that_is_there_is_left_alone(folder, options, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "notes").write_text("mine")
    assert "run exists: an imported checkpoint begins a new run" in refused(capsys, folder, run, *options)
    assert [path.name for path in run.iterdir()] == ["notes"]
    assert "--run-name does not go with RUN_FOLDER" in refused(capsys, folder, run, *options, "--run-name", "a-b-1")
    assert "--data is missing" in refused(capsys, folder, tmp_path / "new", *options, "--data", "")


def test_a_full_disk_leaves_nothing(folder, options, tmp_path, capsys, monkeypatch):
    write_file = durable.write_file

    def fill_the_disk(path, content):
        if path.name == "model.safetensors":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write_file(path, content)

    monkeypatch.setattr(durable, "write_file", fill_the_disk)
    runs = tmp_path / "runs"
    assert "No space left on device" in refused(capsys, folder, runs / "imported", *options)
    assert list(runs.iterdir()) == []


# --------------------------------------------------------------------------------------------------------------------
# Pickles


class Bomb:
    """Makes a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_code_in_a_checkpoint_is_named_and_not_run(saved, options, tmp_path, capsys):
    proof = tmp_path / "ran"
    folder = tmp_path / "deepspeed"
    shutil.copytree(saved[0], folder)
    change(folder / "global_step4" / SHARD, lambda state: state.update(bomb=Bomb(str(proof))))
    said = refused(capsys, folder, tmp_path / "run", *options)
    assert f"{SHARD} would run code that is not DeepSpeed's (posix.mkdir) and was not loaded" in said
    assert not proof.exists()
    pickle.loads(pickle.dumps(Bomb(str(proof))))
    assert proof.exists()  # it is one


@dataclasses.dataclass
class Settings:
    """As a user's own script has them."""

    rate: float = 0.1
    folder: Path = Path("here")


CLIENT_STATE = {
    "numpy": {"loss": np.float64(0.5), "best": np.float32(2), "step": np.int64(7), "name": np.str_("a")},
    "arrays": [np.arange(3), np.array(["a"]), np.random.default_rng(1), np.random.get_state()],
    "python": [Fraction(1, 3), Decimal("1.5"), datetime.datetime(2026, 1, 1), Path("a"), random.getstate()],
    "containers": [deque([1.0], maxlen=3), defaultdict(list, a=[1]), OrderedDict(a=1), Counter("aab"), frozenset({1})],
    "own": Settings(),
    "kind": Settings,
}


@pytest.mark.parametrize("key", CLIENT_STATE)
def test_client_state_of_any_class_is_left_out(saved, only_rank, tmp_path, key):
    train_and_save(saved[1], tmp_path, steps=1, **{key: CLIENT_STATE[key]})
    source = read_deepspeed_checkpoint(tmp_path, parameter_shapes(SHAPE))
    assert differing_state(assembled(source.shards[0]), gathered_state(saved[1], only_rank)) == []


def test_numbers_of_numpy_are_read_as_numbers(folder):
    """A schedule of the user's own leaves them in the optimizer's groups."""
    values = {"rate": np.float64(0.25), "small": np.float32(0.5), "step": np.int64(-7), "on": np.bool_(True)}
    values |= {"word": np.str_("a")}

    def with_numbers(state):
        state["optimizer_state_dict"]["base_optimizer_state"]["param_groups"][0] |= {"lr": np.float64(0.25)}

    change(folder / "global_step4" / SHARD, with_numbers)
    assert read_deepspeed_checkpoint(folder, parameter_shapes(SHAPE)).learning_rate == 0.25
    torch.save({"values": values | {"word": None}}, folder / "numbers.pt")
    read = load_file(folder / "numbers.pt")["values"]
    assert read == {"rate": 0.25, "small": 0.5, "step": -7, "on": True, "word": None}
    assert {type(value) for value in read.values()} == {float, int, bool, type(None)}
    of_a_mainframe = NumpyType("f8", False, True)
    of_a_mainframe.__setstate__((3, ">", None))
    assert numpy_number(of_a_mainframe, struct.pack(">d", 0.25)) == 0.25
    torch.save({"values": values}, folder / "numbers.pt")
    with pytest.raises(UserError, match=r"numbers.pt would run code that is not DeepSpeed's \(a type of NumPy's\)"):
        load_file(folder / "numbers.pt")


def test_a_class_in_what_is_used_is_named(folder):
    change(folder / "global_step4" / MODEL, lambda state: state["ds_config"].update(ratio=Fraction(1, 3)))
    with pytest.raises(UserError, match=r"mp_rank_00_model_states.pt would run code .*\(fractions.Fraction\)"):
        read_deepspeed_checkpoint(folder, parameter_shapes(SHAPE))


class Program:
    """Writes a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return exec, (f"open({str(self.path)!r}, 'w').close()",)


def test_code_in_client_state_is_not_run(saved, options, tmp_path, capsys):
    proof = tmp_path / "ran"
    pickle.loads(pickle.dumps(Program(proof)))
    proof.unlink()  # it was one
    train_and_save(saved[1], tmp_path / "exec", steps=1, program=Program(proof))
    read_deepspeed_checkpoint(tmp_path / "exec", parameter_shapes(SHAPE))
    train_and_save(saved[1], tmp_path / "mkdir", steps=1, bomb=Bomb(str(proof)))
    said = refused(capsys, tmp_path / "mkdir", tmp_path / "run", *options)
    assert f"{MODEL} would run code that is not DeepSpeed's (posix.mkdir) and was not loaded" in said
    assert not proof.exists()


def test_plain_values_of_client_state_are_read(saved, tmp_path):
    from argparse import Namespace

    train_and_save(saved[1], tmp_path, steps=1, epoch=3, args=Namespace(lr=0.1), names=("a", {"b"}))
    read_deepspeed_checkpoint(tmp_path, parameter_shapes(SHAPE))
    content = load_file(next(tmp_path.glob(f"*/{MODEL}")))
    assert vars(content["args"]) == {"lr": 0.1} and type(content["args"]) is not Namespace


# --------------------------------------------------------------------------------------------------------------------
# What users build


def decay_by_name(model):
    """The recipe's groups: LayerNorms' weights decay, for want of that name in GPT-2."""
    named = dict(model.named_parameters())
    kept = [name for name in named if not any(part in name for part in ("bias", "LayerNorm.weight"))]
    return [
        {"params": [named[name] for name in kept], "weight_decay": 0.1},
        {"params": [value for name, value in named.items() if name not in kept], "weight_decay": 0.0},
    ]


def by_layer(model):
    """Groups that no name or size tells."""
    named = list(model.parameters())
    return [{"params": named[:5]}, {"params": named[5:]}]


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    "groups",
    [
        lambda model: list(model.parameters()),
        get_grouped_params,
        lambda model: get_grouped_params(model)[::-1],
        decay_by_name,
    ],
    ids=["one", "matrices", "reversed", "recipe"],
)
def test_stage_0_finds_the_names_of_what_it_does_not_name(only_rank, tmp_path, groups, bf16):
    model = fresh()
    engine = engine_of(model, groups(model), bf16={"enabled": bf16})
    source = read_deepspeed_checkpoint(train_and_save(engine, tmp_path), parameter_shapes(SHAPE))
    assert (source.zero_stage, source.precision) == (0, "bf16" if bf16 else "fp32")
    # DeepSpeed makes a step while it builds the bf16 engine; `create_engine` takes it back, a user's own loop does not.
    assert (source.step, source.optimizer_step) == (2, 3 if bf16 else 2)
    assert {fragment.name: fragment.tensors for fragment in source.shards[0]}.keys() == parameter_shapes(SHAPE).keys()
    if not bf16:
        for fragment in source.shards[0]:
            state = engine.basic_optimizer.state[engine.module.get_parameter(fragment.name)]
            assert torch.equal(fragment.tensors["exp_avg"], state["exp_avg"].view(-1))
            assert torch.equal(fragment.tensors["exp_avg_sq"], state["exp_avg_sq"].view(-1))
    else:
        masters = torch.cat([flat.detach() for flat in engine.optimizer.fp32_groups_flat])
        found = torch.cat([fragment.tensors["fp32"] for fragment in source.shards[0]])
        assert torch.equal(masters.sort().values, found.sort().values)
        for fragment in source.shards[0]:
            weight = engine.module.get_parameter(fragment.name)
            assert torch.equal(fragment.tensors["fp32"].bfloat16(), weight.view(-1))


def test_a_checkpoint_that_was_made_elastic(only_rank, tmp_path):
    """DeepSpeed then saves Adam's states alone, without the optimizer's settings and without padding."""
    model = fresh()
    zero = {"stage": 1, "elastic_checkpoint": True}
    engine = engine_of(model, get_grouped_params(model), zero_optimization=zero, bf16={"enabled": True})
    source = read_deepspeed_checkpoint(train_and_save(engine, tmp_path), parameter_shapes(SHAPE))
    assert differing_state(assembled(source.shards[0]), gathered_state(engine, only_rank)) == []
    assert (source.optimizer_step, source.learning_rate) == (2, None)


def test_stage_0_with_groups_of_its_own_is_refused(only_rank, tmp_path):
    model = fresh()
    train_and_save(engine_of(model, by_layer(model)), tmp_path)
    with pytest.raises(UserError, match=r"optimizer's groups \(5, \d+ tensors\) are neither all parameters"):
        read_deepspeed_checkpoint(tmp_path, parameter_shapes(SHAPE))


@pytest.mark.parametrize(("stage", "bf16"), [(0, False), (2, True)])
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_inside_another_module(only_rank, tmp_path, stage, bf16, tied):
    class Wrapper(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.inner = model

        def forward(self, **inputs):
            return self.inner(**inputs)

    shape = dataclasses.replace(SHAPE, tie_word_embeddings=tied)
    engine = engine_of(Wrapper(fresh(shape)), zero_optimization={"stage": stage}, bf16={"enabled": bf16})
    train_and_save(engine, tmp_path)
    source = read_deepspeed_checkpoint(tmp_path, parameter_shapes(shape))
    assert source.prefix == "inner." and ("lm_head.weight" in source.shapes) is not tied
    other = parameter_shapes(dataclasses.replace(SHAPE, tie_word_embeddings=not tied))
    with pytest.raises(UserError, match="another model: lm_head.weight (has .* and is missing here|is missing there)"):
        read_deepspeed_checkpoint(tmp_path, other)


@pytest.mark.parametrize(
    ("optimizer", "reason"),
    [
        (lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9), "it has 'momentum_buffer'"),
        (lambda parameters: torch.optim.RMSprop(parameters), "it has 'square_avg'"),
        (lambda parameters: torch.optim.AdamW(parameters, amsgrad=True), "it has 'amsgrad'"),
    ],
    ids=["SGD", "RMSprop", "AMSGrad"],
)
def test_other_optimizers_are_refused(only_rank, tmp_path, optimizer, reason):
    model = fresh()
    train_and_save(engine_of(model, client=optimizer(model.parameters())), tmp_path)
    with pytest.raises(UserError, match=f"has the state of another optimizer than Adam or AdamW: {reason}"):
        read_deepspeed_checkpoint(tmp_path, parameter_shapes(SHAPE))


def test_adam_that_decays_otherwise_is_not_continued_as_adamw(only_rank, options, tmp_path, capsys):
    """PyTorch's Adam, handed over by the client: its moments have the weight decay in them."""
    model = fresh()
    engine = engine_of(model, client=torch.optim.Adam(model.parameters(), weight_decay=0.1))
    train_and_save(engine, tmp_path / "adam")
    said = refused(capsys, tmp_path / "adam", tmp_path / "run", *options)
    assert 'optimizer.type "Adam" -> "AdamW" (the checkpoint has the other optimizer\'s state)' in said


def test_the_run_config_says_what_the_run_is(folder, options, tmp_path):
    """A file, as another run's config.yaml."""
    from codeparrot_ds.config.files import save_config

    values = dict(zip([option.strip("-") for option in options[::2]], options[1::2], strict=True))
    save_config(
        dataclasses.replace(RunConfig(), data=values["data"], tokenizer=values["tokenizer"]), tmp_path / "c.yaml"
    )
    place = options.index("--deepspeed")
    arguments = ["--config", str(tmp_path / "c.yaml"), *options[4:place], *options[place + 2 :], "demo"]
    assert main(["checkpoint", "import", str(folder), str(tmp_path / "run"), *arguments]) == 0
    config = load_config(tmp_path / "run" / "config.yaml")
    assert (config.data, config.save_checkpoint_steps) == (values["data"], 15_000)  # the file wins over the preset
    assert config.deepspeed == RunConfig().deepspeed  # left to the device of the first start
