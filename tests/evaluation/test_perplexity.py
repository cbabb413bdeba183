"""Loss, perplexity and bits a byte, against transformers' own loss and against counting by hand."""

import json
import math
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from codeparrot_ds.data.encoder import load_encoder
from codeparrot_ds.data.shards import find_shards
from codeparrot_ds.data.validation import ValidationLoader
from codeparrot_ds.errors import UserError
from codeparrot_ds.evaluation import perplexity
from codeparrot_ds.evaluation.models import data_of, load_model
from codeparrot_ds.evaluation.perplexity import (
    evaluate_batches,
    evaluate_in_processes,
    evaluate_model,
    result_from_sums,
    token_losses,
)


def transformers_loss(model, batches) -> tuple[float, int]:
    """The token-weighted mean of the model's own loss over batches with labels, and the number of targets."""
    loss_sum = tokens = 0
    with torch.no_grad():
        for input_ids, labels in batches:
            count = int((labels[:, 1:] != -100).sum())
            loss_sum += model(input_ids=input_ids, labels=labels).loss.double().item() * count
            tokens += count
    return loss_sum / tokens, tokens


def validation_batches(model_folder, corpus_folder, **settings):
    shards = find_shards(corpus_folder, "validation")
    settings = {"seq_length": 64, "num_lanes": 2, "batch_size": 3} | settings
    return list(ValidationLoader(shards, load_encoder(model_folder), **settings))


def test_loss_equals_that_of_transformers(model_folder, corpus_folder):
    batches = validation_batches(model_folder, corpus_folder)
    assert any((labels == -100).any() for _, labels in batches)  # a padded row is among them
    model, _ = load_model(model_folder)
    expected, tokens = transformers_loss(model, batches)
    result = evaluate_model(model_folder, data=corpus_folder, seq_length=64, num_lanes=2, batch_size=5)
    assert result["loss"] == pytest.approx(expected, abs=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)
    assert result["eval_tokens"] == tokens
    assert (result["dtype"], result["seq_length"], result["split"]) == ("float32", 64, "validation")


def test_an_exports_data_is_read_as_its_run_read_it(run_folder, model_folder, tmp_path):
    (tmp_path / "data" / "validation").mkdir(parents=True)
    rows = "".join(json.dumps({"content": f"x = {number}  # not <|endoftext|> yet"}) + "\n" for number in range(40))
    (tmp_path / "data" / "validation" / "part-0.jsonl").write_text("\ufeff" + rows, encoding="utf-8")
    export = run_folder / "checkpoints" / "step-00000500" / "export"
    settings = {"data": tmp_path / "data", "seq_length": 64, "num_lanes": 1}
    before = evaluate_model(export, **settings)["eval_tokens"]  # 0.1.0 wrote no version
    for version in (1, 2):
        (export / "training_state.json").write_text(json.dumps({"evaluated_with": {"order_version": version}}))
        found = evaluate_model(export, **settings)["eval_tokens"]
        assert found == before if version == 1 else found > before + 40 * 3
    assert found == evaluate_model(model_folder, **settings)["eval_tokens"]


def test_token_losses_do_not_depend_on_the_chunks_and_leave_out_ignored_labels(monkeypatch):
    logits = torch.randn(3, 7, 11, dtype=torch.bfloat16)
    labels = torch.randint(0, 11, (3, 7))
    labels[1, 3:] = -100
    whole = token_losses(logits, labels)
    monkeypatch.setattr(perplexity, "_LOGITS_AT_ONCE", 44)
    assert torch.equal(token_losses(logits, labels), whole)
    assert whole.dtype == torch.float32 and whole.shape == labels.shape
    assert (whole[:, -1] == 0).all() and (whole[1, 2:] == 0).all() and (whole[1, :2] > 0).all()
    by_hand = -logits[0, 2].float().log_softmax(-1)[labels[0, 3]]
    assert whole[0, 2].item() == pytest.approx(by_hand.item(), rel=1e-6)


def test_bits_a_byte_of_a_uniform_distribution_count_the_text(model_folder, texts):
    """Each token costs log2(vocabulary) bits whatever the model, so the figure follows from counting alone."""
    encoder = load_encoder(model_folder)
    text = "".join(texts[:2])
    ids = torch.tensor(encoder.encode_batch([text])[0].astype(np.int64))[None]
    for vocabulary in (encoder.vocab_size, 50_000):

        def uniform(input_ids, labels, vocabulary=vocabulary):
            return token_losses(torch.zeros(*input_ids.shape, vocabulary), labels)

        result = evaluate_batches(uniform, [(ids, ids)], token_bytes=encoder.token_bytes())
        targets = ids.shape[1] - 1
        bytes_of_targets = len(text.encode()) - int(encoder.token_bytes()[ids[0, 0]])
        assert result.eval_tokens == targets
        assert result.loss == pytest.approx(math.log(vocabulary), rel=1e-6)
        assert result.bits_per_byte == pytest.approx(targets * math.log2(vocabulary) / bytes_of_targets, rel=1e-6)
    assert evaluate_batches(uniform, [(ids, ids)]).bits_per_byte is None


def test_sums_become_figures_also_at_the_edges():
    result = result_from_sums(6.0, 3, 4)
    assert (result.loss, result.perplexity, result.eval_tokens) == (2.0, math.exp(2), 3)
    assert result.bits_per_byte == pytest.approx(6 / math.log(2) / 4)
    assert result_from_sums(1e6, 1).perplexity == math.inf
    assert math.isnan(result_from_sums(0.0, 0).loss)
    assert math.isnan(result_from_sums(math.nan, 3).perplexity)


def test_sums_are_kept_in_double_precision():
    """A million tokens of loss 0.1 after one of 1e7: in fp32 the small ones would be rounded away."""
    losses = iter([torch.tensor([1e7]), *[torch.full((1000,), 0.1)] * 1000])
    batch = (torch.zeros((1, 1001), dtype=torch.long),) * 2
    result = evaluate_batches(lambda ids, labels: next(losses), [batch] * 1001)
    assert result.loss * result.eval_tokens == pytest.approx(1e7 + 1e5, rel=1e-7)


RANK_SCRIPT = """
import sys, torch
from torch import distributed
from codeparrot_ds.evaluation.perplexity import evaluate_batches
rank, world, store = int(sys.argv[1]), 3, sys.argv[2]
distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
generator = torch.Generator().manual_seed(0)
everything = [torch.randint(0, 50, (2, 9), generator=generator) for _ in range(5)]
mine = [everything[i] for i in [(0, 1, 2, 3), (4,), ()][rank]]  # ranks with 4, 1 and no batches
calls = 0

def loss_fn(input_ids, labels):
    global calls
    calls += 1
    distributed.all_reduce(torch.ones(1))  # as ZeRO-3 would gather: every rank must come here equally often
    return (input_ids.float() * (labels != -100))[:, 1:]

result = evaluate_batches(loss_fn, [(ids, ids) for ids in mine], token_bytes=torch.arange(50))
print(calls, repr(result.loss), repr(result.bits_per_byte), result.eval_tokens, flush=True)
distributed.destroy_process_group()
"""


def test_ranks_with_unequal_numbers_of_batches_stay_in_step(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK_SCRIPT, str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE, text=True, env=environment,
        )
        for rank in range(3)
    ]  # fmt: skip
    answers = [rank.communicate(timeout=120)[0].strip() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0, 0]
    generator = torch.Generator().manual_seed(0)
    targets = [torch.randint(0, 50, (2, 9), generator=generator)[:, 1:] for _ in range(5)]
    total, count = sum(int(some.sum()) for some in targets), sum(some.numel() for some in targets)
    bits_per_byte = total / math.log(2) / total  # each target id stands for as many bytes as its loss
    assert answers == [f"4 {total / count!r} {bits_per_byte!r} {count}"] * 3


def evaluate_in_threads(model, encoder, shards, world_size):
    """``evaluate_batches`` on so many ranks of this process; each rank's result."""
    barrier, parts, results = threading.Barrier(world_size), [None] * world_size, [None] * world_size

    def run(rank):
        def reduce(tensor):
            parts[rank] = tensor.clone()
            barrier.wait()
            total = sum(parts)
            barrier.wait()
            tensor.copy_(total)

        loader = ValidationLoader(
            shards, encoder, seq_length=32, num_lanes=12, batch_size=2, rank=rank, world_size=world_size
        )
        results[rank] = evaluate_batches(
            lambda ids, labels: token_losses(model(input_ids=ids).logits, labels),
            loader,
            token_bytes=encoder.token_bytes(),
            reduce=reduce,
        )

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    return results


def test_the_loss_is_the_token_weighted_mean_at_any_world_size(tmp_path, model_folder):
    """Documents of very different lengths, so that a mean over ranks or rows would be another number."""
    texts = [f"def f_{n}(x):\n" + f"    x += {n}\n" * (n * n % 97) for n in range(60)]
    (tmp_path / "validation").mkdir()
    for part in range(3):
        rows = "".join(json.dumps({"content": text}) + "\n" for text in texts[part::3])
        (tmp_path / "validation" / f"part-{part}.jsonl").write_text(rows)
    shards, encoder = find_shards(tmp_path, "validation"), load_encoder(model_folder)
    model, _ = load_model(model_folder)
    loader = ValidationLoader(shards, encoder, seq_length=32, num_lanes=12, batch_size=4)
    expected, tokens = transformers_loss(model, list(loader))
    for world_size in (1, 2, 3, 4):
        for result in evaluate_in_threads(model, encoder, shards, world_size):
            assert result.eval_tokens == tokens
            assert result.loss == pytest.approx(expected, abs=1e-6)


def test_which_shards_a_model_is_evaluated_on(tmp_path, run_folder, model_folder):
    """Those that names say; of a folder whose names say none all, but a run's own only where that is named."""

    def write(*names):
        for name in names:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text('{"content": "x = 1"}\n')

    def names(source, data=None, split="validation"):
        return [shard.name for shard in data_of(source, split, data).shards(split)]

    write("usual/train-0.jsonl", "usual/dev-0.jsonl", "usual/test-0.jsonl", "flat/0.jsonl", "flat/1.jsonl")
    usual, flat = str(tmp_path / "usual"), str(tmp_path / "flat")
    assert names(model_folder, usual) == ["dev-0.jsonl"] and names(model_folder, usual, "test") == ["test-0.jsonl"]
    assert names(model_folder, flat) == ["0.jsonl", "1.jsonl"]
    config = run_folder / "config.yaml"
    config.write_text("".join(line for line in config.open() if not line.startswith("data:")) + f"data: {flat}\n")
    with pytest.raises(UserError, match=r"no name tells any of its 2 shard\(s\) from the others"):
        names(run_folder)
    assert names(run_folder, flat) == names(run_folder, split="train") == ["0.jsonl", "1.jsonl"]
    # A run of version 0.1 evaluated on all of such a folder, and its loss can be found again.
    checkpoint = next((run_folder / "checkpoints").glob("step-*"))
    (checkpoint / "data.json").write_text(json.dumps({"fingerprint": {"datasets": []}}))
    assert names(run_folder) == ["0.jsonl", "1.jsonl"]
    (checkpoint / "data.json").write_text(json.dumps({"fingerprint": {"datasets": [], "columns": ""}}))
    with pytest.raises(UserError, match="no name tells"):
        names(run_folder)


def test_a_run_is_evaluated_on_its_own_rows(run_folder, model_folder, corpus_folder):
    run = evaluate_model(run_folder)
    assert run["model"].endswith("step-00001000/export") and run["data"] == str(corpus_folder)
    model, _ = load_model(model_folder)
    expected, tokens = transformers_loss(model, validation_batches(model_folder, corpus_folder))
    assert (run["eval_tokens"], run["seq_length"]) == (tokens, 64)
    assert run["loss"] == pytest.approx(expected, abs=1e-5)
    export = evaluate_model(run_folder / "checkpoints" / "step-00000500" / "export")
    assert export["loss"] == run["loss"]  # the same rows from inside the run
    one_batch = evaluate_model(run_folder, max_eval_steps=1, batch_size=2)
    rows = validation_batches(model_folder, corpus_folder, batch_size=2)[:1]
    assert one_batch["eval_tokens"] == transformers_loss(model, rows)[1]
    assert evaluate_model(run_folder, split="train")["loss"] == pytest.approx(run["loss"])  # the same text here


def test_weights_are_used_in_their_own_precision_unless_told(tmp_path, corpus_folder, save_model):
    folder = save_model(tmp_path / "model", dtype="bfloat16")
    settings = {"data": corpus_folder, "seq_length": 64, "num_lanes": 1}
    stored = evaluate_model(folder, **settings)
    widened = evaluate_model(folder, dtype="float32", **settings)
    assert (stored["dtype"], widened["dtype"]) == ("bfloat16", "float32")
    assert stored["loss"] != widened["loss"] and stored["loss"] == pytest.approx(widened["loss"], rel=2e-2)


def test_what_does_not_fit_together_is_refused(model_folder, corpus_folder, run_folder, tmp_path, save_model):
    small = save_model(tmp_path / "small", vocab_size=100)
    for arguments, message in (
        ({"source": small, "data": corpus_folder}, r"tokenizer has \d+ tokens and the model only 100"),
        ({"source": model_folder}, "--data"),
        ({"source": model_folder, "data": tmp_path / "absent"}, "absent"),
        ({"source": model_folder, "data": corpus_folder, "split": "test"}, "test"),
        ({"source": model_folder, "data": corpus_folder, "seq_length": 512}, "rows of 2 to 256"),
        ({"source": run_folder, "max_eval_steps": 0}, "max_eval_steps"),
        ({"source": run_folder, "batch_size": 0}, "batch_size"),
        ({"source": run_folder, "device": "abacus"}, "device 'abacus'"),
        ({"source": run_folder, "dtype": "fp8"}, "auto, float32"),
        ({"source": tmp_path / "absent"}, "absent"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate_model(**arguments)


def test_bits_a_byte_of_uniform_bytes_are_eight_with_any_tokenizer(tmp_path, model_folder, corpus_folder):
    """Of bytes that are all as likely a token of n has 256^-n: 8 bits a byte, whatever a token is."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = Tokenizer(models.BPE({c: n for n, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    letters.pre_tokenizer, letters.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    letters.add_special_tokens(["<|endoftext|>"])
    letters.save(str(tmp_path / "tokenizer.json"))
    found = []
    for folder in (model_folder, tmp_path):
        encoder = load_encoder(folder)
        sizes = torch.as_tensor(encoder.token_bytes())

        def uniform(input_ids, labels, sizes=sizes):
            targets = perplexity.shift_labels(labels)
            return (sizes[targets.clamp(min=0)] * (targets != -100)) * math.log(256)

        shards = find_shards(corpus_folder, "validation")
        loader = ValidationLoader(shards, encoder, seq_length=64, num_lanes=2, batch_size=3)
        found.append(evaluate_batches(uniform, loader, token_bytes=encoder.token_bytes()))
    assert [result.bits_per_byte for result in found] == pytest.approx([8.0, 8.0], rel=1e-7)
    assert found[0].eval_tokens < 0.8 * found[1].eval_tokens and found[0].loss > 1.2 * found[1].loss


def test_processes_share_the_rows_and_give_the_same_figures(run_folder, capfd):
    alone = evaluate_model(run_folder, device="cpu")
    shared = evaluate_in_processes(run_folder, num_processes=2, device="cpu")
    assert {key: value for key, value in shared.items() if isinstance(value, str | int)} == {
        key: value for key, value in alone.items() if isinstance(value, str | int)
    }
    for key in ("loss", "perplexity", "bits_per_byte", "top_1_accuracy", "top_5_accuracy"):
        assert shared[key] == pytest.approx(alone[key], rel=1e-6)
    assert set(shared["loss_by_class"]) == set(alone["loss_by_class"])
    for key in ("loss_by_class", "loss_by_position"):
        pairs = zip(*(x[key].values() if isinstance(x[key], dict) else x[key] for x in (shared, alone)), strict=True)
        assert all(first == pytest.approx(second, rel=1e-5) for first, second in pairs)
    with pytest.raises(UserError, match="process [12] of 2 ended with code 1"):
        evaluate_in_processes(run_folder, num_processes=2, device="cpu", seq_length=512)
    assert "rows of 2 to 256 tokens" in capfd.readouterr().err
