import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from codeparrot_ds.corpus import tokenizer as module
from codeparrot_ds.corpus.build import build_corpus
from codeparrot_ds.corpus.tokenizer import train_tokenizer
from codeparrot_ds.errors import UserError

STRANGE = "def f(x):\r\n\t\x0creturn 'naïve 漢字 😀 \u2028' # x . y ,z  \n\n\n  <|endoftext|>é" + "=" * 100


def load(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Part of the installed standard library: real code, the same on every machine with this interpreter."""
    folder = tmp_path_factory.mktemp("corpus")
    build_corpus([str(Path(logging.__file__).parent), str(Path(json.__file__).parent)], folder / "data", filters=[])
    return folder / "data"


@pytest.fixture(scope="module")
def trained(corpus) -> tuple[Path, dict]:
    out = corpus.parent / "tokenizer"
    return out, train_tokenizer(corpus, out, vocab_size=1000)


def test_vocabulary_is_bytes_and_one_special_token(trained):
    out, card = trained
    tokenizer = load(out)
    assert tokenizer.get_vocab_size() == card["vocab_size"] == 1000
    assert tokenizer.token_to_id("<|endoftext|>") == 0
    assert [token.content for token in tokenizer.get_added_tokens_decoder().values()] == ["<|endoftext|>"]
    assert tokenizer.encode("<|endoftext|>").ids == [0]


def test_round_trip_is_exact(trained):
    tokenizer = load(trained[0])
    assert tokenizer.decode(tokenizer.encode(STRANGE).ids, skip_special_tokens=False) == STRANGE


def test_transformers_loads_it_as_fast_gpt2(trained, caplog):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(trained[0])
    ours = load(trained[0])
    with caplog.at_level(logging.WARNING):
        ids = theirs(STRANGE * 200)["input_ids"]
    assert not caplog.records
    assert ids == ours.encode(STRANGE * 200).ids
    assert theirs.decode(ids) == STRANGE * 200
    assert theirs.is_fast and "GPT2" in type(theirs).__name__
    assert theirs.eos_token == theirs.bos_token == "<|endoftext|>" and theirs.eos_token_id == 0
    assert len(theirs) == 1000
    assert theirs.model_max_length == int(1e30), "transformers' own value for no limit"


def test_card_of_the_training(trained, corpus):
    out, card = trained
    rows = [json.loads(line) for shard in (corpus / "train").iterdir() for line in shard.read_text().splitlines()]
    assert card["documents"] == len(rows) and card["bytes"] == sum(row["size"] for row in rows)
    tokenizer = load(out)
    num_tokens = sum(len(tokenizer.encode(row["content"]).ids) for row in rows)
    assert card["chars_per_token"] == pytest.approx(sum(len(row["content"]) for row in rows) / num_tokens)
    assert 2 < card["chars_per_token"] < 5


def test_validation_stays_unseen(tmp_path):
    source = tmp_path / "project"
    source.mkdir()
    for i in range(40):
        word = f"zyxwv{chr(97 + i % 26)}{i}q"
        (source / f"m{i}.py").write_text(f"def {word}():\n" + f"    {word} = {word}\n" * 30)
    build_corpus([str(source)], tmp_path / "data", filters=[])
    train_tokenizer(tmp_path / "data", tmp_path / "tokenizer", vocab_size=310)
    held_out = [json.loads(line)["content"] for line in (tmp_path / "data/validation/part-00000.jsonl").open()]
    vocabulary = load(tmp_path / "tokenizer").get_vocab()
    card = train_tokenizer(tmp_path / "data", tmp_path / "again", vocab_size=310)
    assert held_out and card["documents"] == 40 - len(held_out)
    for text in held_out:
        word = text.split("(")[0].removeprefix("def ")
        assert not [token for token in vocabulary if word in token]


def test_same_corpus_same_file_on_any_number_of_cores(corpus, trained, tmp_path):
    script = (
        "import sys; from codeparrot_ds.corpus.tokenizer import train_tokenizer as t; t(*sys.argv[1:], vocab_size=1000)"
    )
    environment = {**os.environ, "RAYON_NUM_THREADS": "1", "PYTHONHASHSEED": "7"}
    command = [sys.executable, "-c", script, str(corpus), str(tmp_path / "out")]
    subprocess.run(command, check=True, env=environment, cwd=Path(module.__file__).parents[2])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (trained[0] / name).read_bytes()


def test_limits(corpus, tmp_path):
    few = train_tokenizer(corpus, tmp_path / "few", vocab_size=300, max_documents=3)
    assert few["documents"] == 3
    small = train_tokenizer(corpus, tmp_path / "small", vocab_size=300, max_bytes=20_000)
    assert small["bytes"] >= 20_000 and 0 < small["documents"] < 10


def test_vocabulary_larger_than_the_corpus_supports(corpus, tmp_path):
    with pytest.raises(
        UserError, match=r"vocab_size is 100000, but the [\d,]+ bytes of .* support only \d+ tokens"
    ) as e:
        train_tokenizer(corpus, tmp_path / "out", vocab_size=100_000)
    assert not (tmp_path / "out").exists()
    supported = int(str(e.value).split("at most ")[1].split()[0])
    assert train_tokenizer(corpus, tmp_path / "out", vocab_size=supported)["vocab_size"] == supported


def test_vocabulary_smaller_than_the_bytes(corpus, tmp_path):
    with pytest.raises(UserError, match="vocab_size is 256; 257 is the least"):
        train_tokenizer(corpus, tmp_path / "out", vocab_size=256)


def test_another_tokenizer_is_refused_unless_overwritten(corpus, tmp_path):
    train_tokenizer(corpus, tmp_path / "out", vocab_size=300)
    before = (tmp_path / "out" / "tokenizer.json").read_bytes()
    with pytest.raises(UserError, match="already holds a tokenizer.json"):
        train_tokenizer(corpus, tmp_path / "out", vocab_size=320)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == before
    train_tokenizer(corpus, tmp_path / "out", vocab_size=320, overwrite=True)
    assert load(tmp_path / "out").get_vocab_size() == 320


def test_data_that_is_no_corpus(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        train_tokenizer(tmp_path / "nowhere", tmp_path / "out", vocab_size=300)


def test_rows_without_a_text_are_said(tmp_path):
    (tmp_path / "ids.jsonl").write_text('{"blob_id": "1", "path": "x.py"}\n' * 3)
    with pytest.raises(
        UserError, match="no document can be read from .*: these are ids of contents, as in The Stack v2"
    ):
        train_tokenizer(tmp_path / "ids.jsonl", tmp_path / "out", vocab_size=300)
    assert not (tmp_path / "out").exists()
