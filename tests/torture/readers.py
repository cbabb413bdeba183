"""What is fuzzed: the files that the product reads, each as the commands that read it do."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

from codeparrot_ds import durable
from codeparrot_ds.checkpoint import folders, run_folder
from codeparrot_ds.checkpoint.folders import Checkpoint, list_checkpoints, publish, sealed
from codeparrot_ds.checkpoint.state import EngineState, RunState, read_state, state_as_json
from codeparrot_ds.config.files import load_config, save_config
from codeparrot_ds.config.run_config import RunConfig
from codeparrot_ds.ds_config.changes import saved_ds_config
from codeparrot_ds.ds_config.file import find_ds_config, read_ds_config
from codeparrot_ds.hub.commands import hub_status
from codeparrot_ds.hub.identity import identity_of, place_of
from codeparrot_ds.hub.queue import Dropped, Pushed, PushQueue
from codeparrot_ds.hub.worker import read_destination
from codeparrot_ds.memory.device import calibrate
from codeparrot_ds.metrics import EvaluationRow, TrainingRow
from codeparrot_ds.model.shapes import GPT2Shape, find_shape, num_parameters, parameter_shapes
from codeparrot_ds.report.run_list import runs_in, table
from codeparrot_ds.report.run_view import show
from codeparrot_ds.supervision.supervise import _starts_and_status
from codeparrot_ds.telemetry.tracking import Metrics
from tests.torture.fuzz import Reader

STEP = "checkpoints/step-00000004"
SHAPE = GPT2Shape(n_layer=1, n_embd=4, n_head=1, vocab_size=8, n_positions=4)
SHAPES = parameter_shapes(SHAPE)
EVALUATION = EvaluationRow(step=4, tokens=512, eval_loss=5.5, perplexity=244.7, bits_per_byte=1.2, eval_tokens=64)


def run_config(run: Path) -> RunConfig:
    return RunConfig(
        data="corpus", tokenizer="tokenizer", model="gpt2", output_dir=str(run.parent), run_name=run.name, hub="local"
    )


def make_run(run: Path) -> None:
    """A run of two starts on two ranks, with a checkpoint and what waits to be pushed."""
    ds_config = json.loads(find_ds_config("zero2").read_text())
    save_config(run_config(run), run / "config.yaml")
    durable.write_json(run / "ds_config.json", ds_config)
    start = {"time": "2026-11-29T12:00:00+00:00", "world_size": 2, "command": "codeparrot-ds train", "hosts": ["a"]}
    record = {
        "name": "otter-1", "id": "otter-1-0a1b2c", "created": start["time"], "place": place_of(run), "hub": "local",
        "versions": {"torch": "2.13.0"}, "hosts": ["a"], "rank_hosts": ["a", "a"], "starts": [start, start],
        "outcome": {"status": "finished", "step": 4}, "order_version": 2, "parameters": 48, "world_size": 2,
        "zero_stage": 2, "precision": "bf16", "peak_flops": 1e12, "data_pins": {"a/b": "a/b@0123"},
        "memory": {"predicted_bytes": 10**9, "allocated_bytes": 10**9, "reserved_bytes": 10**9, "used_bytes": 10**9,
                   "reserved_at_end_bytes": 10**9, "device": "H200"},
        "data": {"summary": "epoch 0", "epoch": 0, "documents": 9, "characters": 99, "bytes": 99, "tokens": 512,
                 "bad_documents": ["a.jsonl, line 3"], "rows_per_lane": [4, 5], "tokens_per_document": 5.0,
                 "chars_per_token": 3.1, "encoder": "gigatoken"},
    }  # fmt: skip
    durable.write_json(run / "run.json", record)
    metrics, samples = Metrics(run / "metrics.jsonl"), Metrics(run / "samples.jsonl")
    for step in range(1, 5):
        row = TrainingRow(
            step=step, tokens=step * 128, epoch=0, loss=math.nan if step == 2 else 6.0, learning_rate=1e-4,
            grad_norm=1.0, tokens_per_second=99.5, mfu=0.3, step_seconds=0.5, data_wait_seconds=0.01,
            memory_bytes=10**9, skipped_steps=1, loss_scale=1.0, rank_seconds_median=0.2, rank_seconds_max=0.3,
            slowest_rank=1,
        )  # fmt: skip
        metrics.append(row.as_json() | {"time": 1.8e9 + step})
    metrics.append(EVALUATION.as_json() | {"time": 1.8e9 + 5})
    samples.append({"step": 4, "prompt": "def f", "completion": "():", "parses": True, "task_id": "a/1"})
    make_checkpoint(run, ds_config)
    queue = PushQueue(run)
    queue.enqueue(4, run / STEP / "export", "Step 4: loss 5.5", "Tokens: 512", eval_loss=5.5)
    queue.note_problem("no network", retry_at=1.8e9)
    pushed = Pushed(step=2, digest="ab", commit="cd", branch="otter-1", title="Step 2", time=1.8e9)
    dropped = Dropped(step=1, digest="ab", title="Step 1", reason="no room", time=1.8e9)
    for name, row in (("pushed", pushed), ("dropped", dropped)):
        (run / "hub" / f"{name}.jsonl").write_text(json.dumps(dataclasses.asdict(row)) + "\n")


def make_checkpoint(run: Path, ds_config: dict[str, Any]) -> None:
    staging = run / "checkpoints" / ".staging-00000004-0a"
    (staging / "export").mkdir(parents=True)
    state = RunState(
        step=4, tokens=512, layout={"world_size": 2, "zero_stage": 2, "precision": "bf16"}, evaluations=[EVALUATION],
        data={"fingerprint": {"order_version": 2, "columns": ""}, "rows": 16, "lanes": {"0": [{"epoch": 0}]}},
        config=dataclasses.asdict(run_config(run)), ds_config=ds_config,
    )  # fmt: skip
    engine = EngineState(
        parameters=SHAPES, bytes_a_parameter=12, optimizer_step=4, scheduler_step=4, global_steps=4, global_samples=16,
        skipped_steps=0, loss_scaler={},
    )  # fmt: skip
    contents = {"state.json": state_as_json(state, engine), "data.json": state.data, "export/config.json": {}}
    files = {name: durable.write_file(staging / name, [durable.json_bytes(value)]) for name, value in contents.items()}
    publish(staging, 4, files)


def seal(folder: Path, name: str) -> None:
    """Makes the manifest fit a file that was mutated, or its own content."""
    manifest = folder / STEP / "manifest.json"
    try:
        content = json.loads(manifest.read_bytes())
        if name != f"{STEP}/manifest.json" and name.startswith(STEP):
            data = (folder / name).read_bytes()
            content["files"][name.removeprefix(f"{STEP}/")] = {
                "bytes": len(data),
                "sha256": hashlib.sha256(data).hexdigest(),
            }
        content.pop("sha256")
        manifest.write_bytes(durable.json_bytes(sealed(content)))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass  # what is no manifest has no seal


def look_at_lists(run: Path) -> None:
    table(runs_in(run.parent))
    show(run)
    calibrate(run)
    _starts_and_status(run)


def look_at_report(run: Path) -> None:
    from codeparrot_ds.report.run_page import page_of
    from codeparrot_ds.report.run_report import _without_nan, charts, read_run, summarize

    record = read_run(run)
    summaries = [summarize(record)]
    list(charts([record]))
    json.dumps(_without_nan(summaries), allow_nan=False).encode()
    page_of("md", summaries, [{"config": record.config, "ds_config": record.ds_config}], []).encode()


def look_at_start(run: Path) -> None:
    """What a start reads before a rank."""
    config = load_config(run / "config.yaml")
    config = dataclasses.replace(config, output_dir=str(run.parent), run_name=run.name)
    run_folder.check_continuation(config, run)
    run_folder.recorded_pins(run)
    run_folder.order_version_of(run)
    run_folder.began_data(config)
    run_folder.recorded_hub(run)
    run_folder.recorded_outcome(run)
    run_folder.finished_checkpoint(config)
    run_folder.continued_from(config)
    run_folder.check_ds_continuation(config, run, json.loads(find_ds_config("zero2").read_text()))
    identity_of(run)
    if (run / "run.json").exists():
        run_folder.RunFolder(run).reload()
    metrics = Metrics(run / "metrics.jsonl")
    metrics.losses(100)
    metrics.truncate_after(4)


def look_at_checkpoint(run: Path) -> None:
    list_checkpoints(run)
    checkpoint = Checkpoint(run / STEP)
    problems = [*checkpoint.damage_in_sight(), *checkpoint.damage()]
    for problem in problems:
        assert run.name in problem and "\n" not in problem, problem
    run_folder.check_checkpoint(run_config(run), run, SHAPE)
    folders.readable_checkpoints(run / "checkpoints")
    checkpoint.manifest().exported()
    if not problems:
        read_state(checkpoint)


def look_at_queue(run: Path) -> None:
    queue = PushQueue(run)
    hub_status(run)
    queue.dropped()
    read_destination(run)
    for path in queue.entry_folders():
        queue._next_place(int(path.name.split("-")[0]))


def make_configs(folder: Path) -> None:
    save_config(run_config(folder), folder / "run.yaml")
    (folder / "run.json").write_text(json.dumps({"max_train_steps": 100, "learning_rate": 5e-4, "run_name": "otter-1"}))
    (folder / "ds.json").write_bytes(find_ds_config("zero3_offload").read_bytes())
    (folder / "ds_config.json").write_bytes(find_ds_config("zero3_offload").read_bytes())
    shape = {"model_type": "gpt2", "n_layer": 2, "n_embd": 128, "n_head": 2, "n_positions": 32, "n_inner": None}
    (folder / "config.json").write_text(json.dumps(shape))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|end|>"}}))
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "run.json"}]}))


def look_at_configs(folder: Path) -> None:
    from codeparrot_ds.data.encoder import _eos_token
    from codeparrot_ds.errors import UserError
    from codeparrot_ds.rows.files import saved_files

    looks = (
        lambda: load_config(folder / "run.yaml"),
        lambda: load_config(folder / "run.json"),
        lambda: read_ds_config(folder / "ds.json"),
        lambda: saved_ds_config(folder / "ds_config.json"),
        lambda: num_parameters(find_shape(str(folder / "config.json"), vocab_size=8, seq_length=4)),
        lambda: parameter_shapes(find_shape(str(folder), vocab_size=8, seq_length=4)),
        lambda: _eos_token(folder),
        lambda: saved_files(folder),
    )
    first: UserError | None = None
    for look in looks:
        try:
            look()
        except UserError as error:
            first = first or error
    if first is not None:
        raise first


def make_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(["def f(x):\n    return x\n"] * 50, trainer=trainer)
    tokenizer.save(str(folder / "tokenizer.json"))


def look_at_tokenizer(folder: Path) -> None:
    from codeparrot_ds.data.encoder import load_encoder

    encoder = load_encoder(folder)
    encoder.decode(encoder.encode_batch(["def f(x):\n    return x + 1\n# é<|endoftext|>"])[0])
    encoder.token_bytes()


def make_unit(folder: Path) -> None:
    from codeparrot_ds.corpus.plan import plan_sources
    from codeparrot_ds.corpus.units import UnitSettings, read_unit

    source = folder / "source"
    source.mkdir()
    (source / "a.py").write_text("def f(x):\n    return x\n")
    ((unit,),) = (each.units for each in plan_sources([str(source)], suffixes=[".py"], content_column="content"))
    read_unit(unit, UnitSettings(columns="content", filters=(), seed=1), folder / "unit")


def look_at_unit(unit: Path) -> None:
    """Damage of a unit is none: it is read anew."""
    from codeparrot_ds.corpus.units import finished_documents, load_unit, read_paths, read_texts

    if finished_documents(unit) is not None:
        loaded = load_unit(unit)
        assert read_paths(unit, loaded.index, 0) == [b"a.py"] and list(read_texts(unit, loaded.index))
        assert loaded.account.documents == len(loaded.repositories) == 1


def make_records(folder: Path) -> None:
    """What commands keep for later: a calibration, results of a comparison and of problems, a unit of a corpus."""
    cache = folder / "codeparrot-ds"
    cache.mkdir()
    overhead = {"fixed_bytes": 1, "ratio": 1.1, "outside_bytes": 2, "communication_bytes": 3, "source": "a run"}
    (cache / "memory-calibration.json").write_text(json.dumps({"overhead": overhead}))
    row = {"step": 1, "loss": 2.0}
    found = {"world_size": 2, "weights": {"dtype": "float32", "sha256": "ab"}, "rows": [row], "parts": None}
    result = {"status": "finished", "phase": "train", "name": "zero2", "repeat": 0, "seconds": 1.0, "found": found}
    (folder / "result.json").write_text(json.dumps(result))
    peak = {"flops": 1e12, "source": "measured", "whole_machine": True}
    (folder / "comparison.json").write_text(json.dumps({"version": 1, "steps": 3, "peak": peak}))
    rows = [{"task_id": "a/1", "sample": number, "completion": "x"} for number in range(3)]
    (folder / "generations-t0.2.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "passed.json").write_text(json.dumps({"passed": ["a/1"]}))
    failure = {"kind": "error", "message": "no", "type": "OSError", "phase": "steps", "step": 3}
    failure |= {"device_peak_bytes": None, "resident_peak_bytes": 10**9}
    (folder / "failure-0.json").write_text(json.dumps(failure))
    ended = {"code": 4, "sentence": "rank 1 was killed", "hosts": [], "dump": False}
    (folder / "end.json").write_text(json.dumps({"code": 4, "verdict": ended, "asked": False}))
    (folder / "output.log").write_text("step 3: loss 9\n")
    make_unit(folder)


def look_at_records(folder: Path) -> None:
    from codeparrot_ds.compare.results import TrialResult, recorded_peak
    from codeparrot_ds.compare.trial_process import judge_end
    from codeparrot_ds.evaluation.humaneval import _read
    from codeparrot_ds.memory.device import load_overhead
    from codeparrot_ds.problem_sets.references import _remembered

    os.environ["XDG_CACHE_HOME"] = str(folder)
    load_overhead().total(10**9, 2)
    TrialResult.read(folder / "result.json")
    recorded_peak(folder / "comparison.json")
    _read(folder, "generations", 0.2)
    _remembered(folder / "passed.json")
    look_at_unit(folder / "unit")
    judge_end(1, False, folder, sampled_peak_bytes=1)


def make_tensors(folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"transformer.wte.weight": torch.zeros(8, 4), "b": torch.zeros(3)}, folder / "model.safetensors")
    pieces = {f"w|{kind}|{start}": torch.zeros(8) for kind in ("fp32", "exp_avg") for start in (0, 8)}
    save_file(pieces, folder / "fragments-00000-000.safetensors")
    numbers = json.dumps([3, [*range(1, 625), 624], None])
    rng = {"torch": torch.get_rng_state()}
    save_file(rng, folder / "rng-00000.safetensors", {"python": numbers})


def look_at_tensors(folder: Path) -> None:
    import torch

    from codeparrot_ds.checkpoint.initial import _tensors_in
    from codeparrot_ds.checkpoint.saver import _load_rng
    from codeparrot_ds.checkpoint.tensor_files import FragmentReader
    from codeparrot_ds.engine.ranks import Ranks

    FragmentReader(folder, ["fragments-00000-000.safetensors"]).fill(torch.empty(16), "w", "fp32")
    _load_rng(folder, Ranks(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"), control=None), 4, True)
    _tensors_in(folder / "model.safetensors")


def make_deepspeed(folder: Path) -> None:
    """A checkpoint of two ranks at stage 1, laid out as DeepSpeed does it."""
    import torch

    place = folder / "global_step2"
    place.mkdir()
    (folder / "latest").write_text("global_step2")
    torch.manual_seed(1)
    weights = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    flat = torch.cat([weight.flatten() for weight in weights.values()])
    model = {
        "module": weights, "param_shapes": [{name: torch.Size(shape) for name, shape in SHAPES.items()}],
        "shared_params": {}, "buffer_names": [], "optimizer": None, "global_steps": 2, "skipped_steps": 0,
        "global_samples": 8, "dp_world_size": 2, "mp_world_size": 1, "ds_config": {"zero_optimization": {"stage": 1}},
        "ds_version": "0.19.2",
    }  # fmt: skip
    torch.save(model, place / "mp_rank_00_model_states.pt")
    for rank, part in enumerate(flat.chunk(2)):
        group = {"params": [0], "lr": 1e-3, "weight_decay": 0.1, "step": 2}
        moments = {"exp_avg": torch.zeros_like(part), "exp_avg_sq": torch.zeros_like(part), "step": torch.tensor(2.0)}
        owner = {
            "zero_stage": 1, "partition_count": [2],
            "base_optimizer_state": {"state": {0: moments}, "param_groups": [group]},
            "single_partition_of_fp32_groups": [part.clone()], "group_paddings": [0], "loss_scaler": None,
            "dynamic_loss_scale": False, "param_alignment_paddings": None,
        }  # fmt: skip
        torch.save({"optimizer_state_dict": owner}, place / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")


def look_at_deepspeed(folder: Path) -> None:
    from codeparrot_ds.checkpoint.deepspeed_checkpoint import read_deepspeed_checkpoint

    found = read_deepspeed_checkpoint(folder, SHAPES)
    assert found.bytes_a_parameter and [fragment.numel for shard in found.shards for fragment in shard]


_OF_RUN = ("run.json", "config.yaml", "ds_config.json", "metrics.jsonl", "samples.jsonl")
_OF_CHECKPOINT = (f"{STEP}/manifest.json", f"{STEP}/state.json", f"{STEP}/data.json")
_SEALED: dict[str, Any] = {"mended": seal, "also_changed": (f"{STEP}/manifest.json",)}
_OF_QUEUE = ("run.json", "hub/pushed.jsonl", "hub/dropped.jsonl", "hub/problem.json")
_OF_RECORDS = ("result.json", "comparison.json", "generations-t0.2.jsonl", "passed.json", "unit/account.json")
_OF_TRIALS = ("failure-0.json", "end.json")
_OF_DEEPSPEED = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt")
READERS = {
    reader.name: reader
    for reader in (
        Reader(name="lists", files=_OF_RUN, make=make_run, look=look_at_lists),
        Reader(name="report", files=_OF_RUN, make=make_run, look=look_at_report),
        Reader(name="start", files=(*_OF_RUN[:4], *_OF_CHECKPOINT), make=make_run, look=look_at_start),
        Reader(name="checkpoint", files=_OF_CHECKPOINT, make=make_run, look=look_at_checkpoint),
        Reader(name="sealed checkpoint", files=_OF_CHECKPOINT, make=make_run, look=look_at_checkpoint, **_SEALED),
        Reader(
            name="queue",
            files=(*_OF_QUEUE, "hub/queue/000001-step-00000004/entry.json"),
            make=make_run,
            look=look_at_queue,
        ),
        Reader(
            name="configs",
            files=("run.yaml", "run.json", "ds.json", "ds_config.json", "config.json", "tokenizer_config.json"),
            make=make_configs,
            look=look_at_configs,
        ),
        Reader(name="tokenizer", files=("tokenizer.json",), make=make_tokenizer, look=look_at_tokenizer),
        Reader(
            name="records",
            files=(*_OF_RECORDS, *_OF_TRIALS, "codeparrot-ds/memory-calibration.json"),
            make=make_records,
            look=look_at_records,
        ),
        Reader(
            name="tensors",
            files=("model.safetensors", "fragments-00000-000.safetensors", "rng-00000.safetensors"),
            make=make_tensors,
            look=look_at_tensors,
        ),
        Reader(
            name="deepspeed",
            files=("latest", *(f"global_step2/{name}" for name in _OF_DEEPSPEED)),
            make=make_deepspeed,
            look=look_at_deepspeed,
        ),
    )
}
